"""soft_reasoning.py: the search space, the rewards by hand, the search driven by made-up outcomes, and whole models."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import record_steps

import tasks
from model import Prompt, Request, UserError, decode, load
from soft_reasoning import (
    METHODS,
    Generation,
    Outcome,
    Rollouts,
    Searcher,
    Settings,
    main,
    matched,
    question_of,
    reason,
    split_thought,
    verifier_message,
)


@pytest.fixture
def tiny_model(folder_of):
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return load(str(folder), "cpu", "float32")


def rollouts(model, tokenizer, generations, settings):
    requests = [Request(g.prompt, (0, i, g)) for i, g in enumerate(generations)]
    outs = decode(model, requests, Rollouts(model, tokenizer, settings, 4), 4)
    return [outcome for (_, _, _), outcome in sorted(outs, key=lambda out: out[0][1])]


# --------------------------------------------------------------------------------------------------- the search space


def test_without_a_perturbation_the_answer_is_greedy(tiny_model):
    model, tokenizer = tiny_model
    s = Settings(max_new_tokens=25)
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    zero, tiny = torch.zeros(32), torch.full((32,), 1e-30)
    outcomes = rollouts(model, tokenizer, [Generation(prompt), Generation(prompt, offset=zero), Generation(prompt, offset=tiny)], s)
    assert outcomes[0].ids == outcomes[1].ids == outcomes[2].ids and len(outcomes[0].ids) > 5
    embeds = prompt.embeds
    for token in outcomes[0].ids:  # greedy decoding of the whole sequence, from the start each time
        logits = model.logits(model(embeds[None])[0, -1])
        assert token == logits.argmax()
        embeds = torch.cat([embeds, model.embed.weight[token][None]])


def test_only_the_first_token_is_perturbed_and_by_exactly_the_offset(tiny_model):
    model, tokenizer = tiny_model
    prompt, offset = Prompt(model.embed(torch.tensor([5, 80, 70]))), torch.randn(32)
    method = Rollouts(model, tokenizer, Settings(), 1)
    method.begin(0, Request(prompt, (0, 0, Generation(prompt, offset=offset))))
    for t in range(3):
        logits = torch.randn(1, 272)
        embeds, _ = method.step(logits, torch.tensor([True]))
        z = model.embed.weight[logits.argmax()]
        assert torch.equal(embeds[0], z + offset if t == 0 else z)


def test_a_perturbed_answer_is_the_greedy_continuation_of_the_perturbed_embedding(tiny_model):
    model, tokenizer = tiny_model
    prompt, offset = Prompt(model.embed(torch.tensor([5, 80, 70]))), torch.randn(32)
    (outcome,) = rollouts(model, tokenizer, [Generation(prompt, offset=offset)], Settings(max_new_tokens=12))
    first = model.logits(model(prompt.embeds[None])[0, -1]).argmax()
    assert outcome.ids[0] == first
    embeds = torch.cat([prompt.embeds, (model.embed.weight[first] + offset)[None]])
    for token, p in zip(outcome.ids[1:], outcome.probs[1:]):
        logits = model.logits(model(embeds[None])[0, -1])
        assert token == logits.argmax() and p == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
        embeds = torch.cat([embeds, model.embed.weight[token][None]])


def drive(searcher, question, objective, prompt=None):
    """Run a search on made-up outcomes: objective(Generation) -> Outcome.  Returns its record and what it asked for."""
    search, asked, outcomes = searcher.soft(question, prompt), [], None
    while True:
        try:
            wanted = search.send(outcomes)
        except StopIteration as end:
            return end.value, asked
        asked.append(wanted)
        outcomes = [objective(g) for g in wanted]


def said(text, p=0.5, n=4):
    return Outcome(text, list(range(n)), [0.9] + [p] * (n - 1), [0.1] * n)


def test_each_coordinate_of_the_perturbation_has_standard_deviation_sigma(tiny_model):
    offsets = []
    for seed in range(60):
        searcher = Searcher(*tiny_model, Settings(rounds=1, k=20, sigma=0.3, dimension=8, reward="coherence"))
        _, asked = drive(searcher, question_of(0, "q", seed), lambda g: said("1"))
        offsets += [g.offset for g in asked[0]]
    offsets = torch.stack(offsets)
    assert offsets.shape == (1200, 32) and offsets.std().item() == pytest.approx(0.3, rel=0.05)
    assert offsets.mean().abs() < 0.02


# ------------------------------------------------------------------------------------------------------- the rewards


def test_rewards_by_hand(tiny_model):
    """Candidates say 1, 2, 2, nothing; the verifier says 2; their tokens after the first have probability 0.5 or 0.25."""
    for coherence, value in (("prob", [0.5, 0.25]), ("mean", [math.log(0.5), math.log(0.25)]),
                             ("sum", [3 * math.log(0.5), 3 * math.log(0.25)])):
        replies = iter([said("1"), said("2", 0.25), said("so 2"), said("none"), said("I judge: the answer is 2")])
        searcher = Searcher(*tiny_model, Settings(rounds=1, k=4, dimension=4, coherence=coherence))
        record, asked = drive(searcher, question_of(0, "How many?", 0), lambda g, replies=replies: next(replies))
        points = record["points"]
        assert [p["reward_verifier"] for p in points] == [0, 1, 1, 0]
        assert [p["reward_coherence"] for p in points] == pytest.approx([value[0], value[1], value[0], value[0]])
        assert [p["reward"] for p in points] == pytest.approx([p["reward_verifier"] + p["reward_coherence"] for p in points])
        assert record["answer_text"] == "so 2" and record["answers"] == ["1", "2", "2", None]
        assert (record["generation_tokens"], record["verification_tokens"], record["answer_tokens"]) == (16, 4, 20)
        assert len(asked) == 2 and asked[1][0].offset is None and record["verdicts"][0]["answer"] == "2"


def test_a_verifier_that_says_nothing_gives_no_reward_and_nobody_answering_is_no_answer(tiny_model):
    searcher = Searcher(*tiny_model, Settings(rounds=1, k=2, dimension=4))
    record, _ = drive(searcher, question_of(0, "How many?", 0), lambda g: said("who knows"))
    assert record["verdicts"][0]["answer"] is None and record["answers"] == [None, None]
    assert [p["reward_verifier"] for p in record["points"]] == [0, 0]


def test_candidates_that_leave_no_room_are_shown_without_their_thoughts_or_not_at_all(tiny_model):
    texts = ["x" * 900 + "</think>7", "8"]
    assert verifier_message("q", texts, whole=True).count("x") == 900
    assert verifier_message("q", texts, whole=False) == "q\nCandidate 1: 7\nCandidate 2: 8\nWhich answer is right?"
    searcher = Searcher(*tiny_model, Settings(rounds=1, k=2, dimension=4))
    replies = iter([said(texts[0]), said("8"), said("8")])
    record, asked = drive(searcher, question_of(0, "How many?", 0), lambda g: next(replies))
    assert record["verdicts"][0]["answer"] == "8" and len(asked[1][0].prompt.embeds) < 200
    record, asked = drive(searcher, question_of(0, "How many?", 0), lambda g: said("y" * 2000))
    assert len(asked) == 1 and record["verdicts"] == [{"answer": None, "text": "", "tokens": 0}]


# -------------------------------------------------------------------------------------------------------- the search


def bowl(searcher, question):
    """An objective whose best point is where the first four coordinates of the offset are 0.8."""
    def objective(g):
        return said("1", p=math.exp(-float((g.offset[:4] - 0.8).square().sum()) / 4))
    return drive(searcher, question, objective)[0]


def test_the_search_climbs_where_random_points_do_not(tiny_model):
    best = {"ei": [], "random": []}
    for acquisition, rewards in best.items():
        for seed in range(6):
            searcher = Searcher(*tiny_model, Settings(acquisition=acquisition, reward="coherence", dimension=8, rounds=6,
                                                      stop_threshold=0))
            record = bowl(searcher, question_of(0, "q", seed))
            assert len(record["points"]) == 30
            rewards.append(max(p["reward"] for p in record["points"]))
    assert np.median(best["ei"]) > np.median(best["random"]) + 0.05


def test_it_stops_when_nothing_more_is_expected_or_gained_or_after_the_rounds(tiny_model):
    question = question_of(0, "q", 0)
    record = bowl(Searcher(*tiny_model, Settings(reward="coherence", dimension=4, rounds=3, stop_threshold=0)), question)
    assert (record["stopped_by"], record["rounds"]) == ("rounds", 3)
    record = bowl(Searcher(*tiny_model, Settings(reward="coherence", dimension=4, rounds=9, stop_threshold=5)), question)
    assert (record["stopped_by"], record["rounds"], len(record["points"])) == ("ei", 1, 5)
    flat = Searcher(*tiny_model, Settings(reward="coherence", dimension=4, rounds=9, stop_on="gain"))
    record, _ = drive(flat, question, lambda g: said("1"))
    assert (record["stopped_by"], record["rounds"]) == ("gain", 2)
    assert all(p["ei"] is None for p in record["points"][:5]) and all(p["ei"] >= 0 for p in record["points"][5:])


def test_best_takes_the_best_point_and_vote_the_majority(tiny_model):
    for select, answer in (("best", "7"), ("vote", "3")):
        searcher = Searcher(*tiny_model, Settings(rounds=1, k=3, dimension=4, reward="both", select=select, coherence="prob"))
        replies = iter([said("3", 0.1), said("7", 0.9), said("3", 0.2), said(f"the answer is {answer}")])
        record, _ = drive(searcher, question_of(0, "q", 0), lambda g, replies=replies: next(replies))
        assert record["answer_text"] == answer


# ----------------------------------------------------------------------------------------------------- the baselines


def test_votes_group_equal_numbers_and_weigh():
    question = question_of(0, "q", 0)
    assert question.vote(["1,000", "7", "1000", None]) == "1,000"
    assert question.vote(["7", "8"]) == "7" and question.vote([None]) is None
    assert question.vote(["7", "8", "7.0"], [0.2, 0.5, 0.2]) == "8"


def test_the_margin_is_that_of_the_answers_tokens(tiny_model):
    model, tokenizer = tiny_model
    ids = tokenizer.encode("so 42 is it: 42.")
    margins = [i / 100 for i in range(len(ids))]
    outcome = Outcome("so 42 is it: 42.", ids, [1.0] * len(ids), margins)
    searcher = Searcher(model, tokenizer, Settings(method="cot-decoding"))
    assert searcher.margin(question_of(0, "q", 0), outcome) == pytest.approx((0.13 + 0.14) / 2)  # the last "42" is bytes 13, 14


def test_margins_of_words_and_letters_are_found_in_any_spelling(tiny_model):
    model, tokenizer = tiny_model
    searcher = Searcher(model, tokenizer, Settings(method="cot-decoding"))
    for text, kind, at in (("The answer is Yes.", "yesno", range(14, 17)), ("It is (B). Because", "choice", range(7, 8))):
        margins = [float(i in at) for i in range(len(text))]
        outcome = Outcome(text, tokenizer.encode(text), [1.0] * len(text), margins)
        assert searcher.margin(question_of(0, "q", 0, kind, {"A": "x", "B": "y"}), outcome) == 1.0


def test_a_verifier_may_name_a_candidate_and_a_majority_may_be_its_own(tiny_model):
    replies = iter([said("7"), said("9"), said("Candidate 2 is right.")])
    record, _ = drive(Searcher(*tiny_model, Settings(rounds=1, k=2, dimension=4)), question_of(0, "q", 0), lambda g: next(replies))
    assert record["verdicts"][0]["answer"] == "9" and [p["reward_verifier"] for p in record["points"]] == [0, 1]
    replies = iter([said("1"), said("the answer is 42"), said("2"), said("the answer is 42")])
    settings = Settings(rounds=2, k=1, dimension=4, select="vote", stop_threshold=0)
    record, _ = drive(Searcher(*tiny_model, settings), question_of(0, "q", 0), lambda g: next(replies))
    assert record["answer_text"] == "the answer is 42"


def test_the_verifier_is_told_the_form_of_its_answer():
    assert verifier_message("q", ["a"], form="Say it so.") == "q\nCandidate 1: a\nWhich answer is right? Say it so."


def test_an_embedding_that_breaks_the_model_is_one_line(tiny_model):
    searcher = Searcher(*tiny_model, Settings(rounds=1, k=1, dimension=4, reward="coherence"))
    with pytest.raises(UserError, match="lower --sigma"):
        drive(searcher, question_of(0, "q", 0), lambda g: said("1", p=float("nan")))


def test_cot_decoding_branches_on_the_most_probable_first_tokens(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    settings = Settings(method="cot-decoding", num_samples=6, max_new_tokens=3)
    outcomes = rollouts(model, tokenizer, [Generation(prompt, rank=rank) for rank in range(6)], settings)
    logits = model.logits(model(prompt.embeds[None])[0, -1])
    assert [o.ids[0] for o in outcomes] == logits.topk(6).indices.tolist()
    top = logits.softmax(-1).topk(2).values
    assert outcomes[3].margins[0] == pytest.approx((top[0] - top[1]).item(), abs=1e-5)


def test_fire_heats_the_first_token_only_and_keeps_it_among_the_most_probable(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    settings = Settings(method="fire", first_temperature=1000.0, first_top_k=4, max_new_tokens=4, temperature=1e-3)
    generations = [Generation(prompt, first_temperature=1000.0, temperature=1e-3, seeds=(0, i)) for i in range(200)]
    outcomes = rollouts(model, tokenizer, generations, settings)
    top = model.logits(model(prompt.embeds[None])[0, -1]).topk(4).indices.tolist()
    firsts = [o.ids[0] for o in outcomes]
    assert sorted(set(firsts)) == sorted(top) and all(firsts.count(i) > 25 for i in top)
    for o in outcomes:  # cold, hence greedy, after it: the second token is the most probable one (or as good as that)
        embeds = torch.cat([prompt.embeds, model.embed.weight[o.ids[0]][None]])
        best = model.logits(model(embeds[None])[0, -1]).softmax(-1).max().item()
        assert o.probs[1] == pytest.approx(best, rel=0.02)


def test_self_consistency_samples_in_proportion(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    generations = [Generation(prompt, first_temperature=2.0, temperature=2.0, seeds=(0, i)) for i in range(2000)]
    outcomes = rollouts(model, tokenizer, generations, Settings(method="sc", max_new_tokens=1))
    expected = (model.logits(model(prompt.embeds[None])[0, -1]) / 2).softmax(-1)
    counts = torch.bincount(torch.tensor([o.ids[0] for o in outcomes]), minlength=272)
    likely = expected > 0.01
    assert torch.allclose(counts[likely] / 2000, expected[likely], atol=0.03)


def test_equal_generations_and_equal_tokens_are_counted_question_by_question():
    problems = [tasks.Problem("a", "q", "1", "number"), tasks.Problem("b", "q", "2", "number")]
    soft = [{"answers": ["1"] * 3, "answer_tokens": 25}, {"answers": ["2"] * 1, "answer_tokens": 100}]
    sc = [{"answers": ["9", "1", "1", "9", "9"], "tokens": [10] * 5, "weights": None},
          {"answers": ["2", "9", "9"], "tokens": [10] * 3, "weights": None}]
    assert matched(soft, sc, problems, tasks.TASKS["tiny"], "generations") == (1.0, 20.0, 0)  # 3 and 1 answers
    assert matched(soft, sc, problems, tasks.TASKS["tiny"], "tokens") == (0.0, 25.0, 1)  # 2 and 3 answers: 9 and 9 win


# -------------------------------------------------------------------------------------------------- with whole models


def strip(record):
    return {key: value for key, value in record.items() if key != "seconds"}


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_the_same_alone_and_among_others(method, tiny_model):
    settings = Settings(method=method, max_new_tokens=15, rounds=3, num_samples=6, dimension=16, stop_threshold=0)
    messages = ["one?", "and two?", "what of three?", "four"]
    questions = [question_of(i, message, 7) for i, message in enumerate(messages)]
    together = {i: strip(record) for i, record in reason(*tiny_model, questions, settings, batch_size=6)}
    assert sorted(together) == [0, 1, 2, 3]
    for i, message in enumerate(messages):
        ((_, alone),) = reason(*tiny_model, [question_of(0, message, 7)], settings, batch_size=6)
        assert strip(alone)["answers"] == together[i]["answers"] and strip(alone)["tokens"] == together[i]["tokens"]
        if method == "soft":
            assert [p["text"] for p in alone["points"]] == [p["text"] for p in together[i]["points"]]
            assert np.allclose([p["u"] for p in alone["points"]], [p["u"] for p in together[i]["points"]], atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_steps_can_be_recorded_and_replayed(method, tiny_model, monkeypatch):
    settings = Settings(method=method, max_new_tokens=15, rounds=3, num_samples=6, dimension=16, stop_threshold=0)
    questions = [question_of(i, message, 7) for i, message in enumerate(["one?", "and two?", "what of three?"])]
    expected = {i: strip(record) for i, record in reason(*tiny_model, questions, settings, batch_size=6)}
    replays = record_steps(monkeypatch)
    assert {i: strip(record) for i, record in reason(*tiny_model, questions, settings, batch_size=6)} == expected
    assert len(replays) > 10


def test_thoughts_are_split_from_what_is_said():
    assert split_thought("<think>a b</think> c ") == ("a b", "c") and split_thought("a b") == ("", "a b")


def test_a_question_in_the_terminal_and_its_record(folder_of, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    arguments = ["--model", str(folder), "--question", "2?", "--device", "cpu", "--max-new-tokens", "9", "--rounds", "2", "--dimension",
                 "8", "--output", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "round 0: the verifier says" in printed and "<- best" in printed and "stopped after round" in printed
    (record,) = map(json.loads, out.read_text().splitlines())
    assert {"round", "u", "reward_verifier", "reward_coherence", "reward", "ei", "answer", "text", "tokens"} == set(record["points"][0])
    assert len(record["points"][0]["u"]) == 8 and record["settings"]["sigma"] == 1.0
    assert main(arguments) == 0 and len(out.read_text().splitlines()) == 1
    assert main([*arguments, "--sigma", "0.5"]) == 2
    assert main([*arguments[:-2], "--analyse"]) == 0
    printed = capsys.readouterr().out
    assert "layer  perturbed" in printed and "distance to the best point" in printed


@pytest.mark.parametrize("arguments, said", [
    (["--sigma", "0"], "--sigma must be above 0, not 0.0"),
    (["--k", "0"], "--k must be at least 1, not 0"),
    (["--dimension", "33"], "--dimension 33 is larger than the embedding's 32"),
    (["--question", " "], "the question is empty"),
    (["--dimension", "8", "--question", "x" * 200], "the context window 64"),
    (["--acquisition", "magic"], "invalid choice: 'magic'"),
    (["--stop-threshold", "-1"], "--stop-threshold must be at least 0"),
    (["--question", "x", "--json", "t.json"], "--json goes with --task or --data"),
    (["--analyse", "--task", "tiny"], "--analyse studies one question"),
    (["--task", "nothing"], "no task 'nothing'"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, said, folder_of, capsys):
    question = [] if {"--question", "--task"} & set(arguments) else ["--question", "2?"]
    try:
        code = main(["--model", str(folder_of("qwen3")), "--device", "cpu", *question, *arguments])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error


def test_more_dimensions_than_the_embedding_has_are_refused_from_python(tiny_model):
    with pytest.raises(UserError, match="larger than the embedding"):
        Searcher(*tiny_model, Settings())
