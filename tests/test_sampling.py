"""baselines/sampling.py: what Soft Reasoning is compared with, and all its methods in batches."""

import json
import typing
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from conftest import record_steps
from tokenizers import decoders, models, normalizers, pre_tokenizers

import soft_reasoning
from baselines import rap
from baselines.sampling import Choice, Sampling, Settings, cot_decoding, margin, reason, sampled
from lab import tasks
from model import Prompt, Request, Tokenizer, decode, load, text_seed
from soft_reasoning import Outcome

METHODS = typing.get_args(typing.get_type_hints(Settings)["method"])


@pytest.fixture
def tiny_model(folder_of):
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return load(str(folder), "cpu", "float32")


def rollouts(model, tokenizer, choices, settings):
    """The outcome of each choice, in their order."""
    requests = [Request(c.prompt, c.seeds, (0, i, c)) for i, c in enumerate(choices)]
    method, outcomes = Sampling(model, 4, settings), [None] * len(choices)
    for output in decode(model, requests, method, 4, settings.max_new_tokens, 2):
        text = tokenizer.decode([t for t in output.ids if t not in model.config.eos_ids])
        notes = [note.tolist() for note in output.notes]
        outcomes[output.request.data[1]] = Outcome(text, output.ids, *notes)
    return outcomes


# ----------------------------------------------------------------------------------- the baselines


def test_the_methods_settings_are_those_of_soft_reasoning_and_their_own():
    own = {f.name: f.default for f in fields(soft_reasoning.Settings)}
    assert own.items() <= {f.name: f.default for f in fields(Settings)}.items()
    assert METHODS == ("soft", "greedy", "sc", "fire", "cot-decoding", "rap")
    at_once = {method: Settings(method=method).at_once for method in METHODS}
    assert at_once == {"soft": 5, "greedy": 1, "sc": 25, "fire": 25, "cot-decoding": 25, "rap": 4}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"first_temperature": float("inf")},
        {"num_samples": 0},
        {"first_top_k": 0},
        {"rap_iterations": 0},
        {"rap_width": 0},
        {"rap_depth": 0},
        {"rap_exploration": float("inf")},
        {"rap_alpha": 1.5},
        {"rap_alpha": -0.5},
        {"rap_temperature": 0},
        {"k": 0},
        {"sigma": -1.0},
    ],
)
def test_nonsense_is_a_value_error(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be "):
        Settings(**wrong)


def test_votes_group_equal_numbers_and_weigh():
    question = tasks.ask_number("q")

    def vote(answers, weights=None):
        i = question.vote(answers, question.same, weights)
        return None if i is None else answers[i]

    assert vote(["1,000", "7", "1000", None]) == "1,000"
    assert vote(["7", "8"]) == "7" and vote([None]) is None
    assert vote(["7", "8", "7.0"], [0.2, 0.5, 0.2]) == "8"


def test_the_margin_is_that_of_the_answers_tokens(tiny_model):
    _, tokenizer = tiny_model
    ids = tokenizer.encode("so 42 is it: 42.")
    margins = [i / 100 for i in range(len(ids))]
    outcome = Outcome("so 42 is it: 42.", ids, [1.0] * len(ids), margins)
    found = margin(tokenizer, tasks.ask_number("q"), outcome)
    assert found == pytest.approx((0.13 + 0.14) / 2)  # the last "42" is bytes 13, 14


def test_margins_of_words_and_letters_are_found_in_any_spelling(tiny_model):
    _, tokenizer = tiny_model
    for text, kind, at in (
        ("The answer is Yes.", "yesno", range(14, 17)),
        ("It is (B). Because", "choice", range(7, 8)),
        ("The answer is (A). It is a cat.", "choice", range(15, 16)),  # not the article
        ("The answer is 18, not 18.75.", "number", range(14, 16)),
        ("The answer is 3, and so not -3.", "number", range(14, 15)),
        ("It is -3, or 3.5: it is 3.", "number", range(24, 25)),
        # In other words: over the last line.
        ("We see.\nThe answer is True.\n", "yesno", range(8, 27)),
        ("So\n\\boxed{1{,}000}", "number", range(3, 18)),
        ("It is\nthe wug.", "choice", range(6, 14)),
        ("We see.\nThe answer is true\U0001f600.", "yesno", range(99)),  # of four tokens
    ):
        ids = tokenizer.encode(text)
        margins = [float(i in at) for i in range(len(ids))] + [float(len(at) > len(ids))]
        outcome = Outcome(text, [*ids, 257], [1.0] * len(margins), margins)
        problem = tasks.Problem("p", "q", "B", kind, {"A": "x", "B": "wug"})
        question = tasks.ask(problem, tasks.TASKS["tiny"])
        assert question.read(text), text
        assert margin(tokenizer, question, outcome) == 1.0, text


def test_spaces_are_found_where_a_decoder_strips_the_first(tmp_path):
    """As in Llama 2's and Mistral's files: alone, a word's token would lose the space before it."""
    words = ["<unk>", "</s>", "\u2581", "\u2581so", "\u2581a", "\u2581it", "4", "2", ".", "a"]
    words += ["Yes", "\u2581Yes", "No", "\u2581No"]
    core = tokenizers.Tokenizer(models.WordLevel(dict(zip(words, range(14))), "<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    pieces = "|".join(sorted(words[2:], key=len, reverse=True)).replace(".", "\\.")
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pieces), "isolated")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = Tokenizer(tmp_path), "so it 42. it"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids[1:2]) == "it"
    outcome = Outcome(text, ids, [1.0] * len(ids), [float(i in (6, 7)) for i in ids])
    assert margin(tokenizer, tasks.ask_number("q"), outcome) == 1.0
    model = SimpleNamespace(config=SimpleNamespace(eos_ids=(1,), vocab_size=14), device="cpu")
    steps = rap.Steps(model, 1, tokenizer)
    spaced = [words[i] for i in steps.space.nonzero()[:, 0]]
    assert spaced == [word for word in words if word.startswith("\u2581")]
    assert steps.sentence.nonzero().tolist() == [[8]]


def test_spaces_are_found_where_a_tokenizer_puts_one_before_a_text(tiny_model, tmp_path):
    """ByteLevel with add_prefix_space: what is decoded behind "a" begins with " a"."""
    _, tokenizer = tiny_model
    core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    core.save(str(tmp_path / "tokenizer.json"))
    prefixed = Tokenizer(tmp_path)
    assert prefixed.decode(prefixed.encode("a")) == " a"
    ids = tokenizer.encode("so 42.")
    outcome = Outcome("so 42.", ids, [1.0] * 6, [0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    assert margin(prefixed, tasks.ask_number("q"), outcome) == 1.0
    model = SimpleNamespace(config=SimpleNamespace(eos_ids=(257,), vocab_size=272), device="cpu")
    one, other = (rap.Steps(model, 1, t) for t in (tokenizer, prefixed))
    assert one.space.any() and torch.equal(one.space, other.space)


def asked_and_found(start, model, tokenizer, settings, texts, margins=()):
    """What a search asks for, and its record where each outcome is given."""
    searching, outcomes = start(model, tokenizer, tasks.ask_number("q"), settings, 5), []
    wanted = next(searching)
    for text, m in zip(texts, margins or [0.5] * len(texts), strict=True):
        ids = tokenizer.encode(text)
        outcomes.append(Outcome(text, ids, [0.9] * len(ids), [m] * len(ids)))
    with pytest.raises(StopIteration) as end:
        searching.send(outcomes)
    return wanted, end.value.value


def test_sampled_answers_have_their_temperatures_and_own_seeds_and_one_vote_each(tiny_model):
    texts = ["so 7", "so 8", "it is 8", "so 9"]
    for method, first in (("sc", 0.6), ("fire", 30.0)):
        settings = Settings(method=method, num_samples=4)
        wanted, found = asked_and_found(sampled, *tiny_model, settings, texts)
        assert [(c.first_temperature, c.temperature) for c in wanted] == [(first, 0.6)] * 4
        assert [c.seeds for c in wanted] == [(5, text_seed("q"), i) for i in range(4)]
        assert found["answers"] == ["7", "8", "8", "9"] and found["answer_text"] == "so 8"
        assert found["weights"] is None and found["texts"] == texts


def test_cot_decoding_asks_for_each_rank_and_votes_weigh_as_much_as_their_margins(tiny_model):
    settings = Settings(method="cot-decoding", num_samples=4)
    given = ["so 7", "so 8", "it is 8", "so 9"], [0.9, 0.2, 0.3, 0.6]
    wanted, found = asked_and_found(cot_decoding, *tiny_model, settings, *given)
    assert [(c.rank, c.first_temperature, c.temperature) for c in wanted] == [
        (rank, 0.0, 0.0) for rank in range(4)
    ]
    assert found["answer_text"] == "so 7" and found["weights"] == pytest.approx(given[1])
    given = given[0], [0.9, 0.6, 0.5, 0.8]
    assert asked_and_found(cot_decoding, *tiny_model, settings, *given)[1]["answer_text"] == "so 8"


def test_cot_decoding_branches_on_the_most_probable_first_tokens(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    settings = Settings(method="cot-decoding", num_samples=6, max_new_tokens=3)
    choices = [Choice(prompt, rank=rank) for rank in range(6)]
    outcomes = rollouts(model, tokenizer, choices, settings)
    logits = model.logits(model(prompt.embeds[None])[0, -1])
    assert [o.ids[0] for o in outcomes] == logits.topk(6).indices.tolist()
    top = logits.softmax(-1).topk(2).values
    assert outcomes[3].margins[0] == pytest.approx((top[0] - top[1]).item(), abs=1e-5)
    for o in outcomes:  # greedy after it
        embeds = torch.cat([prompt.embeds, model.embed.weight[o.ids[:-1]]])
        logits = model.logits(model(embeds[None])[0, len(prompt.embeds) - 1 :])
        assert o.ids[1:] == logits[1:].argmax(-1).tolist()
        assert o.probs == pytest.approx(
            logits.softmax(-1)[range(len(o.ids)), o.ids].tolist(), abs=1e-5
        )


def test_fire_heats_the_first_token_only_and_keeps_it_among_the_most_probable(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    options = {"first_temperature": 1000.0, "temperature": 1e-3}
    settings = Settings(method="fire", first_top_k=4, max_new_tokens=4, **options)
    choices = [Choice(prompt, seeds=(0, i), **options) for i in range(200)]
    outcomes = rollouts(model, tokenizer, choices, settings)
    top = model.logits(model(prompt.embeds[None])[0, -1]).topk(4).indices.tolist()
    firsts = [o.ids[0] for o in outcomes]
    assert sorted(set(firsts)) == sorted(top) and all(firsts.count(i) > 25 for i in top)
    # Cold, hence greedy, after it: the second token is the most probable one (or as good as that).
    for o in outcomes:
        embeds = torch.cat([prompt.embeds, model.embed.weight[o.ids[0]][None]])
        best = model.logits(model(embeds[None])[0, -1]).softmax(-1).max().item()
        assert o.probs[1] == pytest.approx(best, rel=0.02)


def test_self_consistency_samples_in_proportion(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    choices = [
        Choice(prompt, first_temperature=2.0, temperature=2.0, seeds=(0, i)) for i in range(2000)
    ]
    outcomes = rollouts(model, tokenizer, choices, Settings(method="sc", max_new_tokens=1))
    expected = (model.logits(model(prompt.embeds[None])[0, -1]) / 2).softmax(-1)
    counts = torch.bincount(torch.tensor([o.ids[0] for o in outcomes]), minlength=272)
    likely = expected > 0.01
    assert torch.allclose(counts[likely] / 2000, expected[likely], atol=0.03)


# -------------------------------------------------------------------------------- with whole models

OPTIONS = {"max_new_tokens": 15, "rounds": 3, "num_samples": 6, "dimension": 16}
OPTIONS |= {"rap_iterations": 3, "rap_width": 3, "rap_depth": 2}


def strip(record):
    return {key: value for key, value in record.items() if key != "seconds"}


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_the_same_alone_and_among_others(method, tiny_model):
    settings = Settings(method=method, stop_threshold=0, **OPTIONS)
    texts = ["one?", "and two?", "what of three?", "four"]
    questions = [tasks.ask_number(text) for text in texts]
    records = reason(*tiny_model, questions, settings, 7, batch_size=6)
    together = {i: strip(record) for i, record in records}
    assert sorted(together) == [0, 1, 2, 3]
    for i, question in enumerate(questions):
        ((_, alone),) = reason(*tiny_model, [question], settings, 7, batch_size=6)
        assert strip(alone)["answers"] == together[i]["answers"]
        assert strip(alone)["tokens"] == together[i]["tokens"]
        if method == "soft":
            points, others = alone["points"], together[i]["points"]
            assert [p["text"] for p in points] == [p["text"] for p in others]
            assert np.allclose([p["u"] for p in points], [p["u"] for p in others], atol=1e-9)
        elif method == "rap":
            paths, others = alone["paths"], together[i]["paths"]
            assert [path["text"] for path in paths] == [path["text"] for path in others]
            for path, other in zip(paths, others):
                assert np.allclose(path["rewards"], other["rewards"], rtol=1e-6)
        elif method != "greedy":
            assert alone["texts"] == together[i]["texts"]
            assert len(alone["answers"]) == len(alone["tokens"]) == 6


@pytest.mark.parametrize("method", METHODS)
def test_steps_can_be_recorded_and_replayed(method, tiny_model, monkeypatch):
    settings = Settings(method=method, stop_threshold=0, **OPTIONS)
    questions = [tasks.ask_number(text) for text in ("one?", "and two?", "what of three?")]

    def records():
        found = reason(*tiny_model, questions, settings, 7, batch_size=6)
        return {i: strip(record) for i, record in found}

    expected = records()
    replays = record_steps(monkeypatch)
    assert records() == expected
    assert len(replays) > 10
