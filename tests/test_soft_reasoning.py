"""soft_reasoning.py: the search space, rewards by hand, made-up outcomes, whole models, itself."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT

from gp import GP, expected_improvement
from lab import tasks
from model import At, Prompt, Request, UserError, decode, load, split_thought
from soft_reasoning import (
    Generation,
    Outcome,
    Perturbed,
    Question,
    Settings,
    coherence,
    generate_one,
    reason,
    search,
    verifier_message,
)


@pytest.fixture
def tiny_model(folder_of):
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return load(str(folder), "cpu", "float32")


def continuations(model, tokenizer, generations, max_new_tokens):
    """Outcomes of generations in a batch of four; those of generate_one must be the same."""
    requests = [Request(g.prompt, g.seeds, (0, i, g)) for i, g in enumerate(generations)]
    outputs = decode(model, requests, Perturbed(model, 4), 4, max_new_tokens, 1)
    outcomes = [None] * len(generations)
    for output in outputs:
        text = tokenizer.decode([t for t in output.ids if t not in model.config.eos_ids])
        probs = output.notes[0].tolist()
        outcomes[output.request.data[1]] = Outcome(text, output.ids, probs)
    for g, outcome in zip(generations, outcomes):
        one = generate_one(model, tokenizer, g, max_new_tokens)
        assert (one.text, one.ids) == (outcome.text, outcome.ids)
        assert one.probs == pytest.approx(outcome.probs, abs=1e-5)
    return outcomes


# ------------------------------------------------------------------------------- the search space


def test_without_a_perturbation_the_answer_is_greedy(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    zero, tiny = torch.zeros(32), torch.full((32,), 1e-30)
    generations = [Generation(prompt), Generation(prompt, zero), Generation(prompt, tiny)]
    outcomes = continuations(model, tokenizer, generations, 25)
    assert outcomes[0].ids == outcomes[1].ids == outcomes[2].ids and len(outcomes[0].ids) > 5
    embeds = prompt.embeds
    for token in outcomes[0].ids:  # greedy decoding of the whole sequence, from the start each time
        logits = model.logits(model(embeds[None])[0, -1])
        assert token == logits.argmax()
        embeds = torch.cat([embeds, model.embed.weight[token][None]])


@pytest.mark.parametrize("position", [0, 2])
def test_only_one_token_is_perturbed_and_by_exactly_the_offset(position, tiny_model):
    model, _ = tiny_model
    prompt, offset = Prompt(model.embed(torch.tensor([5, 80, 70]))), torch.randn(32)
    method = Perturbed(model, 1)
    method.begin(0, Request(prompt, data=(0, 0, Generation(prompt, offset, position))))
    for t in range(4):
        logits = torch.randn(1, 272)
        at = At(t=torch.tensor([t]), live=torch.tensor([True]))
        token, embeds, prob = method.step(logits, at)
        z = model.embed.weight[logits.argmax()]
        assert token == logits.argmax() and prob == torch.softmax(logits, -1).max()
        assert torch.equal(embeds[0], z + offset if t == position else z)


def test_a_perturbed_answer_is_the_greedy_continuation_of_the_perturbed_embedding(tiny_model):
    """At several positions side by side, in rows that are used again."""
    model, tokenizer = tiny_model
    prompt, offset = Prompt(model.embed(torch.tensor([5, 80, 70]))), 3 * torch.randn(32)
    positions = [0, 1, 4, 0, 7, 30]
    generations = [Generation(prompt, offset, position) for position in positions]
    outcomes = continuations(model, tokenizer, generations, 12)
    for position, outcome in zip(positions, outcomes):
        embeds = prompt.embeds
        for t, (token, p) in enumerate(zip(outcome.ids, outcome.probs)):
            logits = model.logits(model(embeds[None])[0, -1])
            assert token == logits.argmax()
            assert p == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
            x = model.embed.weight[token] + (offset if t == position else 0)
            embeds = torch.cat([embeds, x[None]])
    greedy = outcomes[-1].ids  # which ends before its position
    for position, outcome in zip(positions, outcomes):
        assert outcome.ids[: position + 1] == greedy[: position + 1]
    assert len(greedy) == 12 and outcomes[0].ids != greedy != outcomes[2].ids


def drive(model, tokenizer, question, settings, objective, seed=0):
    """Run a search on made-up outcomes: objective(Generation) -> Outcome.

    Returns its record and what it asked for.
    """
    searching = search(model, tokenizer, question, settings, seed)
    asked, outcomes = [], None
    while True:
        try:
            wanted = searching.send(outcomes)
        except StopIteration as end:
            return end.value, asked
        asked.append(wanted)
        outcomes = [objective(g) for g in wanted]


def replying(*outcomes):
    """An objective that gives these, one after another."""
    following = iter(outcomes)
    return lambda g: next(following)


def said(text, p=0.5, n=4):
    return Outcome(text, list(range(n)), [0.9] + [p] * (n - 1), [0.1] * n)


def test_each_coordinate_of_the_perturbation_has_standard_deviation_sigma(tiny_model):
    offsets, question = [], tasks.ask_number("q")
    settings = Settings(rounds=1, k=20, sigma=0.3, dimension=8, reward="coherence")
    for seed in range(60):
        _, asked = drive(*tiny_model, question, settings, lambda g: said("1"), seed)
        offsets += [g.offset for g in asked[0]]
    offsets = torch.stack(offsets)
    assert offsets.shape == (1200, 32) and offsets.std().item() == pytest.approx(0.3, rel=0.05)
    assert offsets.mean().abs() < 0.02


# ------------------------------------------------------------------------------------ the rewards


def test_rewards_by_hand(tiny_model):
    """Candidates say 1, 2, 2, nothing; the verifier says 2.

    Their tokens after the first have probability 0.5 or 0.25.
    """
    for kind, value in (
        ("prob", [0.5, 0.25]),
        ("mean", [math.log(0.5), math.log(0.25)]),
        ("sum", [3 * math.log(0.5), 3 * math.log(0.25)]),
    ):
        texts = [said("1"), said("2", 0.25), said("so 2"), said("none")]
        reply = replying(*texts, said("I judge: the answer is 2"))
        settings = Settings(rounds=1, k=4, dimension=4, coherence=kind)
        question = tasks.ask_number("How many?")
        record, asked = drive(*tiny_model, question, settings, reply)
        points = record["points"]
        assert [p["reward_verifier"] for p in points] == [0, 1, 1, 0]
        coherences = [p["reward_coherence"] for p in points]
        assert coherences == pytest.approx([value[0], value[1], value[0], value[0]])
        assert coherences == [coherence(outcome, kind) for outcome in texts]
        both = [p["reward_verifier"] + p["reward_coherence"] for p in points]
        assert [p["reward"] for p in points] == pytest.approx(both)
        assert record["answer_text"] == "so 2" and record["answers"] == ["1", "2", "2", None]
        counts = record["generation_tokens"], record["verification_tokens"], record["answer_tokens"]
        assert counts == (16, 4, 20)
        assert len(asked) == 2 and asked[1][0].offset is None
        assert record["verdicts"][0]["answer"] == "2"


@pytest.mark.parametrize("kind", ["prob", "mean", "sum"])
def test_the_coherence_is_of_what_follows_the_perturbed_token(kind, tiny_model):
    outcome = Outcome("1", [1, 2, 3, 4], [0.9, 0.8, 0.5, 0.25])
    mean = {"prob": 0.375, "mean": math.log(0.125) / 2, "sum": math.log(0.125)}[kind]
    assert coherence(outcome, kind, 1) == pytest.approx(mean)
    nothing = 1.0 if kind == "prob" else 0.0
    assert coherence(outcome, kind, 3) == coherence(outcome, kind, 9) == nothing
    settings = Settings(rounds=1, k=2, dimension=4, coherence=kind, position=1)
    record, asked = drive(*tiny_model, tasks.ask_number("q"), settings, lambda g: outcome)
    assert [g.position for g in asked[0]] == [1, 1]
    assert [p["reward_coherence"] for p in record["points"]] == pytest.approx([mean, mean])


def test_a_verifier_that_says_nothing_gives_no_reward_and_nobody_answering_is_no_answer(tiny_model):
    settings, question = Settings(rounds=1, k=2, dimension=4), tasks.ask_number("How many?")
    record, _ = drive(*tiny_model, question, settings, lambda g: said("who knows"))
    assert record["verdicts"][0]["answer"] is None and record["answers"] == [None, None]
    assert [p["reward_verifier"] for p in record["points"]] == [0, 0]


def test_candidates_that_leave_no_room_are_shown_without_their_thoughts_or_not_at_all(tiny_model):
    texts = ["x" * 900 + "</think>7", "8"]
    assert verifier_message(Question("q"), texts, whole=True).count("x") == 900
    short = "q\nCandidate 1: 7\nCandidate 2: 8\nWhich answer is right?"
    assert verifier_message(Question("q"), texts, whole=False) == short
    settings, question = Settings(rounds=1, k=2, dimension=4), tasks.ask_number("How many?")
    reply = replying(said(texts[0]), said("8"), said("8"))
    record, asked = drive(*tiny_model, question, settings, reply)
    assert record["verdicts"][0]["answer"] == "8" and len(asked[1][0].prompt.embeds) < 200
    record, asked = drive(*tiny_model, question, settings, lambda g: said("y" * 2000))
    assert len(asked) == 1
    assert record["verdicts"] == [{"answer": None, "text": "", "tokens": 0}]


# ------------------------------------------------------------------------------------- the search


def bowl(model, tokenizer, settings, seed=0):
    """An objective whose best point is where the offset's first four coordinates are 0.8."""

    def objective(g):
        return said("1", p=math.exp(-float((g.offset[:4] - 0.8).square().sum()) / 4))

    return drive(model, tokenizer, tasks.ask_number("q"), settings, objective, seed)[0]


def test_the_search_climbs_where_random_points_do_not(tiny_model):
    best = {"ei": [], "random": []}
    for acquisition, rewards in best.items():
        options = {"dimension": 8, "rounds": 6, "stop_threshold": 0}
        settings = Settings(acquisition=acquisition, reward="coherence", **options)
        for seed in range(6):
            record = bowl(*tiny_model, settings, seed)
            assert len(record["points"]) == 30
            rewards.append(max(p["reward"] for p in record["points"]))
    assert np.median(best["ei"]) > np.median(best["random"]) + 0.05


def test_it_stops_when_nothing_more_is_expected_or_gained_or_after_the_rounds(tiny_model):
    def settings(**options):
        return Settings(reward="coherence", dimension=4, **options)

    record = bowl(*tiny_model, settings(rounds=3, stop_threshold=0))
    assert (record["stopped_by"], record["rounds"]) == ("rounds", 3)
    # Nothing is chosen, or expected, after the last round.
    record = bowl(*tiny_model, settings(rounds=1, stop_threshold=5))
    assert (record["stopped_by"], record["rounds"]) == ("rounds", 1)
    record = bowl(*tiny_model, settings(rounds=9, stop_threshold=5))
    stopped = record["stopped_by"], record["rounds"], len(record["points"])
    assert stopped == ("ei", 1, 5)
    flat, question = settings(rounds=9, stop_on="gain"), tasks.ask_number("q")
    record, _ = drive(*tiny_model, question, flat, lambda g: said("1"))
    assert (record["stopped_by"], record["rounds"]) == ("gain", 2)
    assert all(p["ei"] is None for p in record["points"][:5])
    assert all(p["ei"] >= 0 for p in record["points"][5:])


def test_ucb_looks_further_away_with_a_larger_kappa(tiny_model):
    """What is chosen second differs in how little is known there."""
    unknown = []
    for kappa in (0.1, 50.0):
        options = {"acquisition": "ucb", "kappa": kappa, "reward": "coherence"}
        record = bowl(*tiny_model, Settings(rounds=2, dimension=8, stop_threshold=0, **options))
        u = [p["u"] for p in record["points"]]
        gp = GP.fit(u[:5], [p["reward"] for p in record["points"][:5]])
        unknown.append(gp.posterior(u[5:6])[1].item())
    assert unknown[1] > 1.2 * unknown[0]


@pytest.mark.parametrize("options", [{}, {"reward": "verifier"}, {"acquisition": "random"}])
def test_expected_improvement_ends_no_search_while_nothing_is_verified(options, tiny_model):
    """Coherences are nearly alike, so of them alone nothing is expected."""

    def objective(right, g):
        if g.offset is None:
            return said("7")
        return said("7" if right else "1", 0.9 + 1e-5 * float(g.offset[0]))

    question, settings = tasks.ask_number("q"), Settings(dimension=8, **options)
    record, _ = drive(*tiny_model, question, settings, partial(objective, False))
    assert (record["stopped_by"], record["rounds"]) == ("rounds", 5)
    assert all(p["ei"] > settings.stop_threshold for p in record["points"][5:])
    record, _ = drive(*tiny_model, question, settings, partial(objective, True))
    stopped = record["stopped_by"], record["rounds"]
    assert stopped == (("ei", 1) if settings.reward == "both" else ("rounds", 5))
    coherence_alone = replace(settings, reward="coherence")
    record, _ = drive(*tiny_model, question, coherence_alone, partial(objective, False))
    assert (record["stopped_by"], record["rounds"]) == ("ei", 1)
    large = replace(settings, dimension=1, rounds=12, stop_threshold=3)
    record, _ = drive(*tiny_model, question, large, partial(objective, False))
    assert record["rounds"] == 12


def test_the_amplitude_is_that_of_a_verdict_until_one_point_is_verified(tiny_model):
    question, settings = tasks.ask_number("q"), Settings(rounds=2, dimension=8, stop_threshold=0)
    for right in (False, True):

        def objective(g, right=right):
            answer = "7" if g.offset is None or (right and g.offset[0] > 0) else "1"
            return said(answer, 0.9 + 0.01 * math.sin(float(g.offset[0] if answer == "1" else 0)))

        record, _ = drive(*tiny_model, question, settings, objective)
        u, f = zip(*((p["u"], p["reward"]) for p in record["points"][:5]))
        gp = GP.fit(u, f)
        assert any(p["reward_verifier"] for p in record["points"][:5]) == right
        if not right:
            assert gp.y_std < 0.05
            variance = float((0.5 / gp.y_std) ** 2)
            gp = GP(u, f, gp.lengthscale, variance, gp.noise)
        picked, e = record["points"][5]["u"], record["points"][5]["ei"]
        mean, std = gp.posterior([picked])
        assert e == pytest.approx(expected_improvement(mean, std, max(f)).item(), rel=1e-6)


def test_best_takes_the_best_point_and_vote_the_majority(tiny_model):
    for select, answer in (("best", "7"), ("vote", "3")):
        settings = Settings(
            rounds=1, k=3, dimension=4, reward="both", select=select, coherence="prob"
        )
        replies = [said("3", 0.1), said("7", 0.9), said("3", 0.2), said(f"the answer is {answer}")]
        record, _ = drive(*tiny_model, tasks.ask_number("q"), settings, replying(*replies))
        assert record["answer_text"] == answer


def test_a_verifier_may_name_a_candidate_and_a_majority_may_be_its_own(tiny_model):
    question, own = tasks.ask_number("q"), said("the answer is 42")
    reply = replying(said("7"), said("9"), said("Candidate 2 is right."))
    settings = Settings(rounds=1, k=2, dimension=4)
    record, _ = drive(*tiny_model, question, settings, reply)
    assert record["verdicts"][0]["answer"] == "9"
    assert [p["reward_verifier"] for p in record["points"]] == [0, 1]
    reply = replying(said("1"), own, said("2"), own)
    settings = Settings(rounds=2, k=1, dimension=4, select="vote", stop_threshold=0)
    record, _ = drive(*tiny_model, question, settings, reply)
    assert record["answer_text"] == "the answer is 42"


def test_the_verifier_is_told_the_form_of_its_answer():
    told = verifier_message(tasks.ask_number("q", "Say it so."), ["a"])
    assert told == "q\nCandidate 1: a\nWhich answer is right? Say it so."


def test_generations_whose_logits_are_not_finite_are_counted_and_earn_little(tiny_model):
    model, tokenizer = tiny_model
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    settings = Settings(rounds=1, k=3, dimension=4, reward="coherence", coherence="sum")
    ((_, record),) = reason(model, tokenizer, [tasks.ask_number("q")], settings)
    assert record["not_finite"] == 3 and record["tokens"] == [1, 1, 1]
    assert all(math.isfinite(point["reward"]) for point in record["points"])


def test_thoughts_are_split_from_what_is_said():
    assert split_thought("<think>a b</think> c ") == ("a b", "c")
    assert split_thought("a b") == ("", "a b")


def test_a_question_of_ones_own_reads_the_last_number_and_counts_equal_answers():
    question = Question("q")
    assert question.read("first 3, then -1,250.5 or so") == "-1250.5"
    assert question.read("none") is None
    assert question.same("7", "7") and not question.same("7", "8")
    assert not question.same(None, None)
    assert question.vote(["7", "8", None, "8", None, None], question.same) == 1
    assert question.vote(["7", "8"], question.same) == 0
    assert question.vote(["7", "8", "7"], question.same, [0.2, 0.5, 0.2]) == 1
    assert question.vote([None], question.same) is None and question.vote([]) is None


def test_more_dimensions_than_the_embedding_has_are_refused_from_python(tiny_model):
    with pytest.raises(UserError, match="larger than the embedding"):
        list(reason(*tiny_model, [Question("q")], Settings()))


def test_what_fits_in_memory_is_asked_for_prompts_that_hold_the_candidates(tiny_model):
    model, tokenizer = tiny_model
    asked = []
    model.planner = lambda model, rows, prompt, new: asked.append((rows, prompt, new)) or rows
    settings = Settings(k=3, rounds=1, dimension=8, max_new_tokens=7)
    questions = [Question("q"), Question("a longer one")]
    list(reason(model, tokenizer, questions, settings, batch_size=5))
    longest = len(tokenizer.encode(tokenizer.open("a longer one")))
    assert asked == [(5, longest + 3 * 7, 7)]


# ----------------------------------------------------------------- one after another, or in a batch


def one_by_one(model, tokenizer, question, settings, seed):
    """The search of one question, each generation by itself. Its record."""

    def objective(g):
        return generate_one(model, tokenizer, g, settings.max_new_tokens)

    return drive(model, tokenizer, question, settings, objective, seed)[0]


def check_search(record, batched):
    """Equal in everything but time, and rewards to rounding."""
    assert set(batched) - set(record) == {"seconds", "not_finite"} and not batched["not_finite"]
    for name, value in record.items():
        if name not in ("points", "verdicts"):
            assert batched[name] == value, name
    assert batched["verdicts"] == record["verdicts"]
    rewards = ("reward_verifier", "reward_coherence", "reward", "ei")
    for one, other in zip(record["points"], batched["points"], strict=True):
        assert np.allclose(one["u"], other["u"], atol=1e-9)
        for name in rewards:
            assert other[name] == pytest.approx(one[name], abs=1e-5)
        rest = set(one) - {"u", *rewards}
        assert {name: one[name] for name in rest} == {name: other[name] for name in rest}


VARIANTS = [{}, {"select": "vote", "coherence": "sum", "stop_on": "gain"}, {"position": 6}]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_search_one_by_one_is_that_of_a_batch(options, tiny_model):
    settings = Settings(max_new_tokens=15, rounds=3, dimension=16, stop_threshold=0, **options)
    questions = [tasks.ask_number(text) for text in ("one?", "and two?", "what of three?")]
    together = dict(reason(*tiny_model, questions, settings, 7, batch_size=4))
    for i, question in enumerate(questions):
        check_search(one_by_one(*tiny_model, question, settings, 7), together[i])


def test_a_search_of_the_bundled_model_one_by_one_is_that_of_a_batch(one_thread):
    model, tokenizer = load(str(ROOT / "tiny" / "base"), "cpu", "float32")
    task, problems = tasks.TASKS["tiny"], tasks.load("tiny", limit=3)
    questions = [tasks.ask(problem, task) for problem in problems]
    settings = Settings(k=3, rounds=3, max_new_tokens=60, stop_threshold=0)
    together = dict(reason(model, tokenizer, questions, settings, 1, batch_size=9))
    for i, question in enumerate(questions):
        check_search(one_by_one(model, tokenizer, question, settings, 1), together[i])
        assert together[i]["rounds"] == 3 and any(together[i]["answers"])


def test_what_a_verifier_is_shown_again_is_taken_in_once(tiny_model, monkeypatch):
    taken, prefill = [], Prompt.prefill

    def spy(prompt, model):
        taken.append((prompt.embeds.tolist(), prefill(prompt, model)))
        return taken[-1][1]

    monkeypatch.setattr(Prompt, "prefill", spy)
    settings = Settings(k=2, rounds=3, dimension=8, stop_threshold=0, max_new_tokens=4)
    list(reason(*tiny_model, [Question("Three of four, and what then?")], settings))
    (first, n), *verifiers = taken
    assert n == len(first) - 1 and len(verifiers) == 3
    for (before, _), (embeds, n) in zip(taken, verifiers):
        same = [a == b for a, b in zip(before, embeds)].index(False)  # the question, and more
        assert same > 20 and n == len(embeds) - 1 - same
