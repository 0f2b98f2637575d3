"""soft_thinking.py against hand-computed values, a slow implementation, scripted logits, itself."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPLATE, record_steps, write_tokenizer
from make_golden import FAMILIES

from model import (
    At,
    Prompt,
    Request,
    Tokenizer,
    Transformer,
    UserError,
    config_from_json,
    draw,
    load,
    text_seed,
)
from soft_thinking import (
    END,
    Settings,
    SoftThinking,
    build_prompt,
    concept_embedding,
    concept_token,
    think,
    think_one,
    truncated,
)

P = [0.4, 0.3, 0.15, 0.1, 0.04, 0.01]  # a distribution to compute with by hand
LOGITS = torch.tensor([P]).log()
TWO, THREE = [4 / 7, 3 / 7], [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]


# --------------------------------------------------------------------------------- concept tokens


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"top_k": 0, "top_p": 1, "min_p": 0, "max_topk": 6}, P),
        ({"top_k": 3, "top_p": 1, "min_p": 0, "max_topk": 6}, THREE),
        # 0.7 has not reached 0.71
        ({"top_k": 0, "top_p": 0.71, "min_p": 0, "max_topk": 6}, THREE),
        # after top-k they are 0.4706, 0.3529: 0.8235
        ({"top_k": 3, "top_p": 0.81, "min_p": 0, "max_topk": 6}, TWO),
        # 0.1 is below 0.3 * 0.4
        ({"top_k": 0, "top_p": 1, "min_p": 0.3, "max_topk": 6}, THREE),
        ({"top_k": 0, "top_p": 1, "min_p": 0, "max_topk": 2}, TWO),
        ({"top_k": 5, "top_p": 0.95, "min_p": 0.26, "max_topk": 2}, TWO),
        ({"top_k": 0, "top_p": 0.001, "min_p": 0, "max_topk": 6}, [1.0]),
        ({"top_k": 0, "top_p": 1, "min_p": 1, "max_topk": 6}, [1.0]),
    ],
)
def test_concept_tokens_by_hand(settings, expected):
    ids, probs, entropy = concept_token(LOGITS, temperature=1.0, **settings)
    got = probs[0][probs[0] > 0]
    assert ids[0, : len(got)].tolist() == list(range(len(expected)))
    assert torch.allclose(got, torch.tensor(expected), atol=1e-6)
    # Over the whole vocabulary, always.
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in P), abs=1e-6)


def test_the_temperature_divides_the_logits_for_entropy_and_weights():
    sharp = np.array(P) ** (1 / 0.5)
    sharp /= sharp.sum()
    whole = {"top_k": 0, "top_p": 1, "min_p": 0, "max_topk": 6}
    _, probs, entropy = concept_token(LOGITS, temperature=0.5, **whole)
    assert np.allclose(probs[0], sharp, atol=1e-6)
    assert entropy.item() == pytest.approx(-(sharp * np.log(sharp)).sum(), abs=1e-6)


def reference(logits, temperature, top_k, top_p, min_p, max_topk):
    """The same by another road: float64, one row, one token at a time."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    kept = sorted(range(len(p)), key=lambda i: -p[i])
    kept = kept[: top_k or len(p)]

    def weights():
        return np.array([p[i] for i in kept]) / sum(p[i] for i in kept)

    mass, count = 0.0, 0
    for w in weights():
        if mass >= top_p and top_p < 1:
            break
        mass, count = mass + w, count + 1
    kept = kept[:count]
    w = weights()
    kept = [i for i, x in zip(kept, w) if x >= min_p * w.max()][:max_topk]
    return kept, weights(), entropy


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_k": 30, "top_p": 0.95, "min_p": 0.001, "max_topk": 10},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.7, "min_p": 0.05, "max_topk": 20},
        {"temperature": 0.2, "top_k": 7, "top_p": 1.0, "min_p": 0.0, "max_topk": 15},
    ],
)
def test_concept_tokens_are_those_of_a_slow_implementation(settings):
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(0))
    logits = logits * torch.linspace(0.2, 9, 40)[:, None]
    ids, probs, entropy = concept_token(logits, **settings)
    for row in range(40):
        want_ids, want, H = reference(logits[row], **settings)
        n = int((probs[row] > 0).sum())
        assert ids[row, :n].tolist() == want_ids
        assert np.allclose(probs[row, :n], want, atol=1e-6)
        assert entropy[row].item() == pytest.approx(H, abs=1e-5)


def test_masked_tokens_take_no_part():
    logits = torch.cat([LOGITS, torch.full((1, 3), -math.inf)], 1)
    for got, want in zip(concept_token(logits, max_topk=6), concept_token(LOGITS, max_topk=6)):
        assert torch.allclose(got[..., :6], want)


def test_concept_tokens_do_not_depend_on_the_batch():
    logits = torch.randn(16, 60000, generator=torch.Generator().manual_seed(0)) * 3
    together = concept_token(logits)
    for row in range(16):
        alone = concept_token(logits[row : row + 1])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone))


def test_a_concept_token_is_the_head_of_the_truncated_distribution():
    logits = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)) * 3
    ids, probs, H = concept_token(logits, 0.9, 12, 0.9, 0.01, 4)
    kept_ids, kept, whole_H = truncated(logits, 0.9, 12, 0.9, 0.01)
    assert kept.shape == (5, 12) and torch.allclose(kept.sum(-1), torch.ones(5))
    assert torch.equal(ids, kept_ids[:, :4]) and torch.equal(H, whole_H)
    assert torch.allclose(probs, kept[:, :4] / kept[:, :4].sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"max_topk": 0},
        {"temperature": float("nan")},
    ],
)
def test_nonsense_is_a_value_error(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        concept_token(LOGITS, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_concept_token_of_one_component_is_the_discrete_token(dtype):
    weight = torch.randn(50, 16).to(dtype)
    ids, probs = torch.tensor([[7, 3, 9], [4, 1, 2]]), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    assert torch.equal(concept_embedding(weight, ids, probs), weight[[7, 2]])


def test_concept_embeddings_are_summed_in_float32():
    weight = torch.randn(50, 16).bfloat16()
    ids, probs = torch.arange(20)[None], torch.rand(1, 20)
    exact = (weight[:20].double() * probs[0, :, None].double()).sum(0)
    got = concept_embedding(weight, ids, probs)
    assert got.dtype == torch.bfloat16 and torch.equal(got[0], exact.to(torch.bfloat16))


def test_drawing_inverts_the_distribution_function():
    ids, probs = torch.tensor([5, 3, 8]), torch.tensor([[0.5, 0.3, 0.2]])
    drawn = ids[draw(probs.expand(1000, 3), torch.arange(1000) / 1000)]
    assert [(drawn == i).sum().item() for i in (5, 3, 8)] == pytest.approx([500, 300, 200], abs=1)
    # Neither end of [0, 1) reaches a token that has been cut off.
    cut = torch.tensor([[0.7, 0.3, 0.0]])
    assert ids[draw(cut, torch.tensor([0.0]))].item() == 5
    assert ids[draw(cut, torch.tensor([1 - 2**-24]))].item() == 3


# ----------------------------------------------------------------------------- the marker, prompts


def test_the_automaton_finds_the_marker_wherever_tokens_break(folder_of):
    tokenizer = Tokenizer(folder_of("qwen2", thinking=False))
    pieces = ["<", "</", "/", "t", "think", "</th", "ink", ">", ">\n", "</think>", "x</think>y"]
    pieces += ["a<", "think></", "</think", "nk>", "i"]

    class Pieces:  # a vocabulary of every way to break the marker
        def token_to_id(self, token):
            return None

        def get_vocab(self):
            return {piece: i for i, piece in enumerate(pieces)}

    tokenizer.core = Pieces()
    table = tokenizer.automaton(END, len(pieces) + 3)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(20000):
        ids = rng.integers(len(pieces), size=4)
        if rng.random() < 0.5:
            some = rng.permutation(["</th", "ink", ">", "<", "/", "think", ">\n"])[:3]
            ids[-3:] = [pieces.index(x) for x in some]
        matched, text = 0, ""
        for i in ids:
            matched, text = int(table[matched, i]), text + pieces[i]
            assert (matched == len(END)) == (END in text), text
            if matched == len(END):
                found += 1
                break
            assert END[:matched] == text[len(text) - matched :]
    assert found > 1000
    assert not table[:, len(pieces) :].any()


def test_reasoning_models_are_recognised_by_their_token_alone(folder_of):
    tokenizer = Tokenizer(folder_of("qwen2", thinking=True))
    table = tokenizer.automaton(END, 272)
    assert tokenizer.encode(END) == [259]
    assert table.nonzero().tolist() == [[matched, 259] for matched in range(len(END))]


def test_prompts_open_the_thought_and_only_instruct_models_are_told_how(folder_of):
    reasoning = Tokenizer(folder_of("qwen2", True))
    instruct = Tokenizer(folder_of("qwen2", False, name="instruct"))
    opened = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert build_prompt(reasoning, "Why?") == opened
    told = build_prompt(instruct, "Why?")
    start = "<|im_start|>user\nWhy?\n\nReason step by step between <think> and </think>."
    assert told.startswith(start) and told.endswith("<|im_start|>assistant\n<think>\n")


def test_a_thought_that_the_template_skips_is_opened_again_and_dates_are_fixed(folder_of):
    folder = folder_of("qwen2")
    write_tokenizer(folder, True, TEMPLATE + "<think>\n\n</think>\n\n")
    assert build_prompt(Tokenizer(folder), "Why?").endswith("assistant\n<think>\n")
    write_tokenizer(folder, True, "{{ date_string }}")
    assert build_prompt(Tokenizer(folder), "Why?") == "26 Jul 2024<think>\n"


def test_a_template_that_opens_the_thought_itself_is_left_alone(folder_of):
    folder = folder_of("qwen2")
    write_tokenizer(folder, True, TEMPLATE + "<think>\n")
    assert build_prompt(Tokenizer(folder), "Why?").count("<think>") == 1


# ------------------------------------------------------------ decoding, driven by scripted logits


def scripted(folder, settings, steps, question="q", context=512):
    """Think on logits whose argmax at each step is the given id (or one of a tuple, a spread).

    Returns the record, with its trace, the embeddings that were fed after each step but the last,
    and the embedding matrix. What think_one says to the same script must be the same.
    """
    numbers = FAMILIES["qwen2"] | {"max_position_embeddings": context}
    model = Transformer(config_from_json(numbers, eos_ids=(257,))).requires_grad_(False)
    tokenizer, fed = Tokenizer(folder), []

    def logits(hidden):
        fed.append(hidden[0].clone())
        step = next(script)
        scores = torch.full((1, 272), -1e9)
        scores[:, list(step) if isinstance(step, tuple) else step] = 0
        return scores

    model.forward, model.logits = lambda embeds, cache=None: embeds, logits
    script = iter(steps)
    ((_, record),) = think(model, tokenizer, [question], settings, batch_size=1, trace=True)
    by_batch, script = fed[1:], iter(steps)
    fed.clear()
    if settings.method == "soft":
        thought, answer = think_one(model, tokenizer, question, settings)
        assert (thought, answer) == (record["thought_ids"], record["answer_ids"])
        assert torch.equal(torch.stack(fed[1:]), torch.stack(by_batch)) if fed[1:] else not by_batch
    return record, by_batch, model.embed.weight


def first_steps(model, folder, settings, rows, trace=False):
    """A method with all its rows begun, and where they stand, for steps without decode."""
    method = SoftThinking(model, Tokenizer(folder), settings, rows, trace)
    prompt, u = Prompt(torch.zeros(1, 32)), []
    for row in range(rows):
        rng = np.random.default_rng((0, 0, row))
        u.append(float(rng.random(dtype=np.float32)))
        method.begin(row, Request(prompt, (0, 0, row), rng=rng))
    t, live = torch.zeros(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool)
    return method, At(t=t, live=live, u=torch.tensor(u))


def random_model():
    return Transformer(config_from_json(FAMILIES["qwen2"], eos_ids=(257,))).requires_grad_(False)


def test_thinking_feeds_mixtures_and_answering_feeds_tokens(folder_of):
    steps = [(10, 11), 12, 259, (20, 20), 21, 257]
    record, fed, e = scripted(folder_of("qwen2"), Settings(), steps)
    assert torch.allclose(fed[0], (e[10] + e[11]) / 2)
    assert torch.equal(fed[1], e[12]) and torch.equal(fed[2], e[259]) and torch.equal(fed[4], e[21])
    assert record["thought_ids"][1:] == [12, 259] and record["answer_ids"] == [20, 21, 257]
    assert (record["stopped_by"], record["finish_reason"]) == ("think_end", "stop")
    assert (record["thought_tokens"], record["answer_tokens"]) == (3, 3)


def test_the_marker_is_fed_discretely_when_it_is_the_most_probable_component(folder_of):
    model = random_model()
    method, at = first_steps(model, folder_of("qwen2"), Settings(), 1)
    logits = torch.full((1, 272), -1e9)
    logits[0, 259], logits[0, 30] = 1.0, 0.8
    token, embeds, *_ = method.step(logits, at)
    assert token.item() == 259 and torch.equal(embeds[0], model.embed.weight[259])
    at.t += 1
    token, embeds, phase, *_ = method.step(logits.roll(1), at)  # the thought is over: a token
    assert phase.item() == 3 and torch.equal(embeds, model.embed.weight[token])


def test_in_the_answer_phase_a_spread_distribution_is_sampled(folder_of):
    steps = [259] + [(20, 21, 22)] * 30 + [257]
    record, fed, e = scripted(folder_of("qwen2"), Settings(), steps)
    answers = record["answer_ids"][:-1]
    assert set(answers) == {20, 21, 22}
    assert len(fed[1:]) == len(answers) and all(
        torch.equal(x, e[i]) for x, i in zip(fed[1:], answers)
    )


def test_the_answer_has_settings_of_its_own(folder_of):
    """Not silently those of the thought: with answer_top_k 1 or hardly any heat it is argmax."""
    model, folder = random_model(), folder_of("qwen2")
    logits, closing = torch.full((200, 272), -1e9), torch.full((200, 272), -1e9)
    logits[:, 20], logits[:, 21], closing[:, 259] = 0.1, 0.0, 0.0
    for options, drawn in (
        ({}, {20, 21}),
        ({"answer_top_k": 1}, {20}),
        ({"answer_temperature": 1e-3}, {20}),
        ({"answer_top_p": 0.3}, {20}),
        ({"answer_min_p": 0.95}, {20}),
    ):
        method, at = first_steps(model, folder, Settings(**options), 200)
        method.step(closing, at)
        at.t += 1
        token, *_ = method.step(logits, at)
        assert set(token.tolist()) == drawn


def test_greedy_is_argmax_also_among_equals(folder_of):
    steps = [tuple(range(40, 250)), 259, 257]
    record, _, _ = scripted(folder_of("qwen2"), Settings(method="greedy"), steps)
    assert record["thought_ids"][0] == 40


def test_what_the_model_would_have_said_while_cold_stop_speaks_counts_for_nothing(folder_of):
    folder = folder_of("qwen2", thinking=False)
    marker = Tokenizer(folder).encode(END)
    # The model spells </think> itself, but from the third sure step on Cold Stop's is fed.
    steps = [32, *marker, 40, 41, 257, 257, 257]
    record, fed, e = scripted(folder, Settings(cold_stop_steps=3), steps)
    assert record["thought_ids"] == [32, marker[0], *marker]
    assert record["stopped_by"] == "cold_stop"
    assert torch.equal(torch.stack(fed[2:10]), e[marker])


def test_textual_markers_end_the_thought_and_are_forced_token_by_token(folder_of):
    folder = folder_of("qwen2", thinking=False)
    marker = Tokenizer(folder).encode(END)
    assert len(marker) == 8  # bytes
    record, _, _ = scripted(folder, Settings(), [30, *marker, 40, 257])
    assert record["thought_ids"] == [30, *marker] and record["answer_ids"] == [40, 257]
    assert record["stopped_by"] == "think_end"
    steps = [(30, 31)] + [32] * 20 + [257]
    record, fed, e = scripted(folder, Settings(cold_stop_steps=3), steps)
    assert record["thought_ids"][1:] == [32, 32, *marker] and record["answer_ids"][:2] == [32, 32]
    assert record["stopped_by"] == "cold_stop"
    assert torch.equal(torch.stack(fed[3:11]), e[marker])


def test_cold_stop_counts_sure_steps_in_a_row(folder_of):
    folder = folder_of("qwen2")

    def run(steps, **options):
        return scripted(folder, Settings(**options), steps)[0]

    unsure, sure = (30, 31), 32
    steps = [sure, sure, unsure, sure, sure, sure, sure, 257]
    record = run(steps, cold_stop_steps=3)
    # The third sure step in a row feeds the marker instead.
    assert record["thought_ids"][3:] == [32, 32, 259]
    assert record["stopped_by"] == "cold_stop" and record["answer_ids"] == [32, 257]
    assert 259 not in run(steps, cold_stop_steps=3, cold_stop=False)["thought_ids"]
    assert 259 not in run(steps, cold_stop_steps=3, method="cot")["thought_ids"]
    assert 259 in run(steps, cold_stop_steps=3, method="greedy", cold_stop=True)["thought_ids"]
    # tau_H is a strict bound in nats: ln 2 is the entropy of an even pair.
    even = [unsure] * 4 + [257]
    record = run(even, cold_stop_steps=2, cold_stop_entropy=0.70)
    assert record["stopped_by"] == "cold_stop"
    record = run(even, cold_stop_steps=2, cold_stop_entropy=0.69)
    assert record["stopped_by"] == "think_end"


def test_only_concept_tokens_are_cut_by_min_p_where_nothing_else_is_said(folder_of):
    """0.001 while soft thinking; 0 in the answer, and for CoT sampling."""
    model, folder = random_model(), folder_of("qwen2")
    logits, closing = torch.full((1, 272), -1e9), torch.full((1, 272), -1e9)
    logits[0, 20], logits[0, 21], closing[0, 259] = 0.0, math.log(0.0009), 0.0
    drawn = {}
    for name, options in {
        "soft": {},
        "cut": {"answer_min_p": 0.001},
        "cot": {"method": "cot"},
        "cot, cut": {"method": "cot", "min_p": 0.001},
    }.items():
        settings = Settings(temperature=1.0, top_p=1.0, **options)
        method, at = first_steps(model, folder, settings, 1)
        at.u[:] = 0.9999  # the least probable token that is kept
        token, _, _, _, ids, ct = method.step(logits, at)
        thought = {i for i, p in zip(ids[0].tolist(), ct[0].tolist()) if p > 0}
        method.step(closing, at)
        answer, *_ = method.step(logits, at)
        drawn[name] = token.item(), thought, answer.item()
    assert drawn == {
        "soft": (20, {20}, 21),
        "cut": (20, {20}, 20),
        "cot": (21, {20, 21}, 21),
        "cot, cut": (20, {20}, 21),
    }


@pytest.mark.parametrize("thinking", [True, False])
def test_cold_stop_ends_an_answer_too_where_that_is_asked_for(thinking, folder_of):
    folder = folder_of("qwen2", thinking)
    marker, steps = Tokenizer(folder).encode(END), [30] * 2 + [31] * 40 + [257]
    settings = Settings(cold_stop_steps=3)
    record, _, _ = scripted(folder, settings, steps)
    assert record["finish_reason"] == "stop" and len(record["answer_ids"]) > 3
    settings = Settings(cold_stop_steps=3, cold_stop_answer=True)
    record, _, _ = scripted(folder, settings, steps)
    assert record["thought_ids"] == [30, 30, *marker]  # the count begins anew after the marker
    assert record["answer_ids"] == [31, 31, 257] and record["answer_tokens"] == 3
    assert (record["stopped_by"], record["finish_reason"]) == ("cold_stop", "cold_stop")
    if thinking:
        steps = [30, 259, 31, (31, 32), 31, 31, 31, 31, 257]
        record, _, _ = scripted(folder, settings, steps)
        assert record["answer_ids"][2:] == [31, 31, 257]
        assert (record["stopped_by"], record["finish_reason"]) == ("think_end", "cold_stop")


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("noise", [None, "gumbel", "dirichlet"])
def test_a_trace_shows_what_was_fed_also_where_cold_stop_feeds_the_marker(
    thinking, noise, folder_of
):
    folder = folder_of("qwen2", thinking)
    marker, pair = Tokenizer(folder).encode(END), (30, 31)
    settings = Settings(cold_stop_steps=3, cold_stop_entropy=0.7, noise=noise)
    record, fed, e = scripted(folder, settings, [pair] * 20 + [257])
    assert record["stopped_by"] == "cold_stop" and record["thought_ids"][2:] == marker
    for step, embedding in zip(record["steps"], fed, strict=False):
        mixture = sum(p * e[i] for p, i in zip(step["probs"], step["ids"]))
        assert torch.allclose(embedding, mixture, atol=1e-6)
    for step, token in zip(record["steps"][2:], marker, strict=True):
        assert step["ids"] == [token] and step["probs"] == [1.0]
        assert step["entropy"] == pytest.approx(math.log(2))  # the model's, which was sure enough
    assert all(set(step["ids"]) <= set(pair) for step in record["steps"][:2])
    if not noise:
        assert [sorted(step["ids"]) for step in record["steps"][:2]] == [[30, 31]] * 2


def test_lengths_end_the_thought_or_the_answer(folder_of):
    folder = folder_of("qwen2")
    record, _, _ = scripted(folder, Settings(max_new_tokens=4), [30] * 9)
    assert (record["stopped_by"], record["finish_reason"]) == ("length", "length")
    assert record["thought_tokens"] == 4
    record, _, _ = scripted(folder, Settings(max_new_tokens=4), [30, 259, 31, 32, 33])
    assert (record["stopped_by"], record["finish_reason"]) == ("think_end", "length")
    assert record["answer_ids"] == [31, 32]
    room = 60 - len(Tokenizer(folder).encode(build_prompt(Tokenizer(folder), "")))
    record, _, _ = scripted(folder, Settings(), [30] * 99, "x" * room, 64)  # the context window
    assert record["thought_tokens"] == 4
    # The model ends its turn without closing the thought.
    record, _, _ = scripted(folder, Settings(), [30, 257, 31])
    assert record["thought_ids"] == [30, 257] and record["answer_ids"] == []
    assert record["finish_reason"] == "stop"


def one_noisy_step(folder, rows, **options):
    """Tokens, and concept tokens [rows, V], of a step: the first tokens have 0.6, 0.3, 0.1."""
    settings = Settings(temperature=1.0, max_new_tokens=1, **options)
    method, at = first_steps(random_model(), folder, settings, rows, trace=True)
    logits = torch.full((rows, 272), -1e9)
    logits[:, :3] = torch.tensor([0.6, 0.3, 0.1]).log()
    token, _, _, _, ids, ct = method.step(logits, at)
    return token, torch.zeros(rows, 272).scatter(1, ids, ct)


def test_gumbel_noise_of_low_temperature_picks_tokens_as_often_as_the_concept_token_says(folder_of):
    options = {"noise": "gumbel", "gumbel_temperature": 1e-4}
    token, ct = one_noisy_step(folder_of("qwen2"), 4000, **options)
    share = torch.bincount(token, minlength=3) / 4000
    # Four standard deviations.
    assert torch.allclose(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)
    assert ct.max(-1).values.mean() > 0.999


def test_gumbel_noise_by_hand(folder_of):
    """softmax((log ct + g) / tau_g), and g are the first draws after the row's uniform ones."""
    _, ct = one_noisy_step(folder_of("qwen2"), 3, noise="gumbel", gumbel_temperature=0.7)
    for row in range(3):
        rng = np.random.default_rng((0, 0, row))
        rng.random(dtype=np.float32)
        g = rng.gumbel(size=(2, 10))[0]
        odds = [math.exp((math.log(p) + x) / 0.7) for p, x in zip((0.6, 0.3, 0.1), g)]
        assert np.allclose(ct[row, :3], np.array(odds) / sum(odds), atol=1e-6)
        assert (ct[row, 3:] == 0).all()


def test_dirichlet_noise_of_a_small_alpha_picks_one_token_as_often_as_p_says(folder_of):
    options = {"noise": "dirichlet", "dirichlet_alpha": 1e-30}
    token, ct = one_noisy_step(folder_of("qwen2"), 4000, **options)
    share = torch.bincount(token, minlength=3) / 4000
    assert torch.allclose(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)
    assert (ct.max(-1).values == 1).all()


def test_dirichlet_noise_is_drawn_over_all_kept_tokens_and_cut_afterwards(folder_of):
    """Of three kept tokens the two of the largest draws, whichever they are: by hand."""
    settings = Settings(temperature=1.0, max_new_tokens=1, noise="dirichlet", max_topk=2)
    method, at = first_steps(random_model(), folder_of("qwen2"), settings, 50)
    logits = torch.full((50, 272), -1e9)
    logits[:, :3] = torch.tensor([0.6, 0.3, 0.1]).log()
    token, *_, ids, ct = method.step(logits, at)
    for row in range(50):
        rng = np.random.default_rng((0, 0, row))
        rng.random(dtype=np.float32)
        drawn = rng.dirichlet(np.float32([0.6, 0.3, 0.1] + [0] * 27).astype(float))[:3]
        best = np.argsort(-drawn)[:2]
        assert ids[row].tolist() == best.tolist() and token[row] == best[0]
        assert np.allclose(ct[row], drawn[best] / drawn[best].sum(), atol=1e-4)
    assert {tuple(sorted(pair)) for pair in ids.tolist()} == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize("alpha", [1.0, 20.0])
def test_dirichlet_noise_has_the_mean_and_spread_of_its_distribution(alpha, folder_of):
    _, ct = one_noisy_step(folder_of("qwen2"), 3000, noise="dirichlet", dirichlet_alpha=alpha)
    ct, mean = ct[:, :3], torch.tensor([0.6, 0.3, 0.1])
    assert torch.allclose(ct.mean(0), mean, atol=0.035)
    assert torch.allclose(ct.var(0), mean * (1 - mean) / (alpha + 1), rtol=0.2)


# ------------------------------------------------------------------------------ with a whole model


@pytest.fixture
def golden(folder_of):
    """A golden model with a longer context: golden("qwen3", thinking=False)."""

    def make(family, thinking=True, context=512, dtype="float32"):
        folder = folder_of(family, thinking)
        config = json.loads((folder / "config.json").read_text())
        config |= {"max_position_embeddings": context}
        (folder / "config.json").write_text(json.dumps(config))
        return load(str(folder), "cpu", dtype)

    return make


@pytest.mark.parametrize("family", ["qwen3", "llama3", "qwen2-yarn"])
def test_every_concept_token_is_that_of_a_slow_implementation(family, golden):
    """Without cache, batch or state: at each step all embeddings so far, from the start."""
    model, tokenizer = golden(family)
    s = Settings(max_new_tokens=40, temperature=0.9)
    for _, record in think(model, tokenizer, ["Why?", "How so?"], s, trace=True):
        embeds = model.embed(torch.tensor(tokenizer.encode(record["prompt"])))
        assert 5 < record["thought_tokens"] == len(record["steps"]) == len(record["thought_ids"])
        for step, token in zip(record["steps"], record["thought_ids"]):
            logits = model.logits(model(embeds[None])[0, -1])
            truncation = s.temperature, s.top_k, s.top_p, s.min_p, s.max_topk
            ids, w, H = reference(logits, *truncation)
            assert token == ids[0]
            if [token] == tokenizer.encode(END):  # is fed as it is
                ids, w = [token], [1.0]
            assert step["ids"] == ids and np.allclose(step["probs"], w, atol=1e-4)
            assert step["entropy"] == pytest.approx(H, abs=1e-3)
            # On with the recorded weights: this compares each step by itself, and rounding does
            # not add up over steps.
            pairs = zip(step["probs"], step["ids"])
            mixture = sum(x * model.embed.weight[i].double() for x, i in pairs).float()
            embeds = torch.cat([embeds, mixture[None]])


@pytest.mark.parametrize("method", ["cot", "greedy"])
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_a_baseline_feeds_the_tokens_that_it_names(method, family, golden):
    """Each token from those before it, from the start, with the request's own draws."""
    model, tokenizer = golden(family, dtype="float64")
    s = Settings(max_new_tokens=30, method=method, temperature=1.3)
    ((_, record),) = think(model, tokenizer, ["Why?"], s, 7)
    u = np.random.default_rng((7, text_seed("Why?"), 0)).random(31, dtype=np.float32)
    ids = tokenizer.encode(record["prompt"])
    for t, token in enumerate(record["thought_ids"] + record["answer_ids"]):
        logits = model.logits(model(model.embed(torch.tensor([ids])))[0, -1])
        kept, w, _ = reference(logits, s.temperature, s.top_k, s.top_p, 0, len(logits))
        assert token == kept[np.searchsorted(np.cumsum(w), u[t]) if method == "cot" else 0], t
        ids.append(token)
    assert record["thought_tokens"] > 10


HOT = {"answer_temperature": 1.7, "answer_top_k": 0, "answer_top_p": 1.0, "answer_min_p": 0.0}
ONE = {  # what think_one has to do as think does
    "plain": {},
    "cold stop": {"cold_stop_entropy": 9, "cold_stop_steps": 5},
    "gumbel": {"noise": "gumbel"},
    "gumbel and cold stop": {"noise": "gumbel", "cold_stop_entropy": 9, "cold_stop_steps": 5},
    "dirichlet": {"noise": "dirichlet"},
    "dirichlet and cold stop": {"noise": "dirichlet", "cold_stop_entropy": 9, "cold_stop_steps": 5},
    "cold stop in the answer": {
        "cold_stop_entropy": 9,
        "cold_stop_steps": 5,
        "cold_stop_answer": True,
    },
    "another answer": {"cold_stop_entropy": 9, "cold_stop_steps": 5, **HOT},
    "cut in the marker": {"cold_stop_entropy": 9, "cold_stop_steps": 2, "max_new_tokens": 5},
    # Only with small random models:
    "no cold stop": {"cold_stop_entropy": 9, "cold_stop_steps": 5, "cold_stop": False},
    "one component": {"max_topk": 1},
    "all tokens": {"top_k": 0, "top_p": 1.0, "max_topk": 300},
    "one token": {"max_new_tokens": 1},
    "the whole context": {"max_new_tokens": 32768},
}


def equal_to_one(model, tokenizer, questions, settings, batch_size):
    """think in a batch, alone in a batch of one, and think_one: the same tokens. The records."""
    together = dict(think(model, tokenizer, questions, settings, 7, batch_size=batch_size))
    for i, question in enumerate(questions):
        one = think_one(model, tokenizer, question, settings, 7)
        ((_, alone),) = think(model, tokenizer, [question], settings, 7, batch_size=1)
        assert one == (alone["thought_ids"], alone["answer_ids"])
        assert one == (together[i]["thought_ids"], together[i]["answer_ids"])
    return [together[i] for i in range(len(questions))]


@pytest.mark.parametrize("case", ONE)
@pytest.mark.parametrize("family, thinking", [("qwen3", True), ("llama3", False)])
def test_one_sequence_is_thought_as_in_a_batch(family, thinking, case, golden):
    # A model without a token for </think> is told about it: a long prompt.
    context = (64 if thinking else 224) if case == "the whole context" else 512
    # In float64: a random model goes on quite differently after another rounding of a product, and
    # think_one's products, of a whole prompt and of one row, are of other shapes than think's.
    model, tokenizer = golden(family, thinking, context, "float64")
    settings = Settings(**{"max_new_tokens": 30} | ONE[case])
    records = equal_to_one(model, tokenizer, ["a", "bcd", "efghij"], settings, 2)
    assert (len(tokenizer.encode(END)) == 1) == thinking
    for record in records:
        tokens = record["thought_tokens"] + record["answer_tokens"]
        assert tokens <= settings.max_new_tokens
        if case == "the whole context" and record["finish_reason"] == "length":
            assert tokens == context - len(tokenizer.encode(record["prompt"]))
    if settings.cold_stop_steps == 5 and settings.cold_stop:
        assert any(record["stopped_by"] == "cold_stop" for record in records)
        if settings.cold_stop_answer:
            assert any(record["finish_reason"] == "cold_stop" for record in records)
            assert max(record["answer_tokens"] for record in records) == 5
        else:
            assert any(record["answer_tokens"] > 5 for record in records)
    if case == "cut in the marker" and not thinking:
        assert all(record["stopped_by"] == "length" for record in records)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny/base; and the same without tokens for <think> and </think>, which it spells then."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    shutil.copytree(ROOT / "tiny" / "base", folder)
    core = json.loads((folder / "tokenizer.json").read_text())
    core["added_tokens"] = [t for t in core["added_tokens"] if "think" not in t["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(core))
    return [load(str(path), "cpu", "float32") for path in (ROOT / "tiny" / "base", folder)]


@pytest.fixture(scope="module")
def problems():
    with open(ROOT / "tiny" / "test.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["question"] for line, _ in zip(file, range(3))]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("case", list(ONE)[:8])
def test_one_sequence_of_the_bundled_model_is_thought_as_in_a_batch(
    case, thinking, tiny, problems, one_thread
):
    model, tokenizer = tiny[0 if thinking else 1]
    options = {"max_new_tokens": 50 if thinking else 25} | ONE[case]
    if "cold_stop_entropy" in options:
        options |= {"cold_stop_entropy": 0.5, "cold_stop_steps": 3}
    settings = Settings(**options)
    records = equal_to_one(model, tokenizer, problems, settings, 3)
    assert (len(tokenizer.encode(END)) == 1) == thinking
    stops = {record["stopped_by"] for record in records}
    if thinking and settings.max_new_tokens > 5:
        forced = "cold_stop_entropy" in options and settings.cold_stop
        assert stops == {"cold_stop" if forced else "think_end"}


def outcome(record):
    return {k: v for k, v in record.items() if k != "seconds"}


@pytest.mark.parametrize(
    "settings",
    [
        Settings(max_new_tokens=25),
        Settings(max_new_tokens=25, method="cot", temperature=1.5),
        Settings(max_new_tokens=25, noise="gumbel"),
        Settings(max_new_tokens=25, noise="dirichlet"),
    ],
)
def test_a_sample_does_not_depend_on_what_else_is_asked(settings, golden):
    model, tokenizer = golden("qwen3")
    questions, samples = ["a", "bcd", "a", "efghij", "bcd"], [0, 0, 1, 0, 3]
    records = think(model, tokenizer, questions, settings, 5, samples, batch_size=3)
    many = {i: outcome(record) for i, record in records}
    for i in range(5):
        one = think(model, tokenizer, [questions[i]], settings, 5, [samples[i]], batch_size=3)
        ((_, alone),) = one
        assert outcome(alone) == many[i]
    if settings.method == "cot" or settings.noise:
        assert many[0]["thought_ids"] != many[2]["thought_ids"]
        ((_, other),) = think(model, tokenizer, ["a"], settings, 6, [0])
        assert other["thought_ids"] != many[0]["thought_ids"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "cot"},
        {"method": "greedy"},
        {"noise": "gumbel"},
        {"cold_stop_entropy": 9, "cold_stop_steps": 5},
    ],
)
def test_steps_can_be_recorded_replayed_and_stopped_late(options, golden, monkeypatch):
    model, tokenizer = golden("qwen3")
    questions, samples, seen = ["a", "bcd", "a", "efghij", "bcd"], [0, 0, 1, 0, 3], {}
    settings = Settings(max_new_tokens=25, **options)

    def all_of(name):
        seen[name] = []

        def watch(token, phase, entropy, ids, probs):
            seen[name].append(
                (int(token), int(phase), float(entropy), ids.tolist(), probs.tolist())
            )

        records = think(model, tokenizer, questions, settings, 5, samples, 2, True, watch)
        return {i: outcome(record) for i, record in records}

    expected = all_of("at once")
    replays = record_steps(monkeypatch)
    assert all_of("recorded") == expected and len(replays) > 20
    # Row 0 serves the same questions; between two of them nothing is fed that was not shown.
    assert seen["recorded"][:25] == seen["at once"][:25]
    shown = [expected[i]["thought_ids"] + expected[i]["answer_ids"] for i in (0, 2)]
    assert len(seen["at once"]) >= sum(map(len, shown))


def test_who_watches_sees_the_entropies_that_a_trace_has(golden):
    model, tokenizer = golden("qwen3")
    settings, seen = Settings(method="greedy", max_new_tokens=9), []
    watch = lambda token, phase, entropy, ids, probs: seen.append(float(entropy))
    list(think(model, tokenizer, ["a"], settings, watch=watch))
    ((_, record),) = think(model, tokenizer, ["a"], settings, trace=True)
    traced = [step["entropy"] for step in record["steps"]]
    assert traced and seen[: len(traced)] == traced


def test_soft_with_one_component_is_greedy_thinking(folder_of):
    model, tokenizer = load(str(folder_of("qwen3")), "cpu", "float32")
    ((_, soft),) = think(model, tokenizer, ["a"], Settings(max_topk=1, max_new_tokens=20))
    ((_, greedy),) = think(model, tokenizer, ["a"], Settings(method="greedy", max_new_tokens=20))
    assert soft["thought_ids"] == greedy["thought_ids"]


def test_an_empty_question_is_a_user_error_from_python_too(folder_of):
    model, tokenizer = load(str(folder_of("qwen3")), "cpu")
    with pytest.raises(UserError, match="empty"):
        list(think(model, tokenizer, ["  "]))


def test_a_record_holds_its_settings_as_they_were_given(folder_of):
    model, tokenizer = load(str(folder_of("qwen3")), "cpu", "float32")
    settings = Settings(max_new_tokens=2, answer_top_p=0.5)
    ((_, record),) = think(model, tokenizer, ["a"], settings)
    assert record["settings"] == dataclasses.asdict(settings)
    assert Settings(**record["settings"]) == settings  # what was left to a default is written out
