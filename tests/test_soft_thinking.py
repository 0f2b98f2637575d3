"""soft_thinking.py against hand-computed values, a slow independent implementation, and scripted logits."""

import io
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPLATE, record_steps, write_tokenizer
from make_golden import FAMILIES

from model import Config, Prompt, Request, Tokenizer, Transformer, UserError, load
from soft_thinking import (
    END,
    Job,
    Settings,
    SoftThinking,
    View,
    build_prompt,
    concept_embedding,
    concept_token,
    dirichlet,
    draw,
    main,
    marker_automaton,
    think,
)

P = [0.4, 0.3, 0.15, 0.1, 0.04, 0.01]  # a distribution to compute with by hand
LOGITS = torch.tensor([P]).log()


# ----------------------------------------------------------------------------------------------------- concept tokens


@pytest.mark.parametrize("settings, expected", [
    ({"top_k": 0, "top_p": 1, "min_p": 0, "max_topk": 6}, P),
    ({"top_k": 3, "top_p": 1, "min_p": 0, "max_topk": 6}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),
    ({"top_k": 0, "top_p": 0.71, "min_p": 0, "max_topk": 6}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),  # 0.7 has not reached 0.71
    ({"top_k": 3, "top_p": 0.81, "min_p": 0, "max_topk": 6}, [4 / 7, 3 / 7]),  # after top-k they are 0.4706, 0.3529: 0.8235
    ({"top_k": 0, "top_p": 1, "min_p": 0.3, "max_topk": 6}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85]),  # 0.1 is below 0.3 * 0.4
    ({"top_k": 0, "top_p": 1, "min_p": 0, "max_topk": 2}, [4 / 7, 3 / 7]),
    ({"top_k": 5, "top_p": 0.95, "min_p": 0.26, "max_topk": 2}, [4 / 7, 3 / 7]),
    ({"top_k": 0, "top_p": 0.001, "min_p": 0, "max_topk": 6}, [1.0]),
    ({"top_k": 0, "top_p": 1, "min_p": 1, "max_topk": 6}, [1.0]),
])
def test_concept_tokens_by_hand(settings, expected):
    ids, probs, entropy = concept_token(LOGITS, temperature=1.0, **settings)
    got = probs[0][probs[0] > 0]
    assert ids[0, : len(got)].tolist() == list(range(len(expected)))
    assert torch.allclose(got, torch.tensor(expected), atol=1e-6)
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in P), abs=1e-6)  # whole vocabulary, always


def test_the_temperature_divides_the_logits_for_entropy_and_weights():
    sharp = np.array(P) ** (1 / 0.5)
    sharp /= sharp.sum()
    _, probs, entropy = concept_token(LOGITS, temperature=0.5, top_k=0, top_p=1, min_p=0, max_topk=6)
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


@pytest.mark.parametrize("settings", [
    {"temperature": 0.6, "top_k": 30, "top_p": 0.95, "min_p": 0.001, "max_topk": 10},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.7, "min_p": 0.05, "max_topk": 20},
    {"temperature": 0.2, "top_k": 7, "top_p": 1.0, "min_p": 0.0, "max_topk": 15},
])
def test_concept_tokens_are_those_of_a_slow_implementation(settings):
    logits = torch.randn(40, 500, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 9, 40)[:, None]
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
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, concept_token(logits[row : row + 1])))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
                                      {"min_p": 2}, {"max_topk": 0}, {"temperature": float("nan")}])
def test_nonsense_is_a_value_error(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        concept_token(LOGITS, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_concept_token_of_one_component_is_the_discrete_token(dtype):
    weight = torch.randn(50, 16).to(dtype)
    ids = torch.tensor([[7, 3, 9], [4, 1, 2]])
    assert torch.equal(concept_embedding(weight, ids, torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])), weight[[7, 2]])


def test_concept_embeddings_are_summed_in_float32():
    weight = torch.randn(50, 16).bfloat16()
    ids, probs = torch.arange(20)[None], torch.rand(1, 20)
    exact = (weight[:20].double() * probs[0, :, None].double()).sum(0)
    got = concept_embedding(weight, ids, probs)
    assert got.dtype == torch.bfloat16 and torch.equal(got[0], exact.to(torch.bfloat16))


def test_drawing_inverts_the_distribution_function():
    ids, probs = torch.tensor([[5, 3, 8]]), torch.tensor([[0.5, 0.3, 0.2]])
    u = torch.arange(1000) / 1000
    drawn = draw(ids.expand(1000, 3), probs.expand(1000, 3), u)
    assert [(drawn == i).sum().item() for i in (5, 3, 8)] == pytest.approx([500, 300, 200], abs=1)
    # Neither end of [0, 1) reaches a token that has been cut off.
    cut = torch.tensor([[0.7, 0.3, 0.0]])
    assert draw(ids, cut, torch.tensor([0.0])).item() == 5 and draw(ids, cut, torch.tensor([1 - 2**-24])).item() == 3


# ------------------------------------------------------------------------------------------- the marker, prompts


def test_the_automaton_finds_the_marker_wherever_tokens_break(folder_of):
    tokenizer = Tokenizer(folder_of("qwen2", thinking=False))
    pieces = ["<", "</", "/", "t", "think", "</th", "ink", ">", ">\n", "</think>", "x</think>y", "a<", "think></", "</think", "nk>", "i"]

    class Pieces:  # a vocabulary of every way to break the marker
        def token_to_id(self, token):
            return None

        def get_vocab(self):
            return {piece: i for i, piece in enumerate(pieces)}

    tokenizer.core = Pieces()
    table = marker_automaton(tokenizer, len(pieces) + 3)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(20000):
        ids = rng.integers(len(pieces), size=4)
        if rng.random() < 0.5:
            ids[-3:] = [pieces.index(x) for x in rng.permutation(["</th", "ink", ">", "<", "/", "think", ">\n"])[:3]]
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
    table = marker_automaton(tokenizer, 272)
    assert tokenizer.encode(END) == [259]
    assert table.nonzero().tolist() == [[matched, 259] for matched in range(len(END))]


def test_prompts_open_the_thought_and_only_instruct_models_are_told_how(folder_of):
    reasoning, instruct = Tokenizer(folder_of("qwen2", True)), Tokenizer(folder_of("qwen2", False, name="instruct"))
    assert build_prompt(reasoning, "Why?") == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    told = build_prompt(instruct, "Why?")
    assert told.startswith("<|im_start|>user\nWhy?\n\nReason step by step between <think> and </think>.")
    assert told.endswith("<|im_start|>assistant\n<think>\n")


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


# ----------------------------------------------------------------------- the state machine, driven by scripted logits


def scripted(folder, settings, steps, rows=1, limit_prompt=1, **options):
    """Feed logits whose argmax are the given ids (or (id, id) spreads), all rows alike, until the first row finishes."""
    model = Transformer(Config.from_json(FAMILIES["qwen2"], eos_ids=(257,))).requires_grad_(False)
    method = SoftThinking(model, Tokenizer(folder), settings, rows, **options)
    for row in range(rows):
        method.begin(row, Request(Prompt(torch.zeros(limit_prompt, 32)), Job(0, "q", "p", row, (0, 0, row))))
    fed = []
    for step in steps:
        logits = torch.full((rows, 272), -1e9)
        for i in step if isinstance(step, tuple) else (step,):
            logits[:, i] = 0
        embeds, finished = method.step(logits, torch.ones(rows, dtype=torch.bool))
        fed.append(embeds[0])
        if finished[0]:
            break
    return method.end(0), fed, model.embed.weight


def test_thinking_feeds_mixtures_and_answering_feeds_tokens(folder_of):
    steps = [(10, 11), 12, 259, (20, 20), 21, 257]
    record, fed, e = scripted(folder_of("qwen2"), Settings(), steps)
    assert torch.allclose(fed[0], (e[10] + e[11]) / 2)
    assert torch.equal(fed[1], e[12]) and torch.equal(fed[2], e[259]) and torch.equal(fed[4], e[21])
    assert record["thought_ids"][1:] == [12, 259] and record["answer_ids"] == [20, 21, 257]
    assert (record["stopped_by"], record["finish_reason"]) == ("think_end", "stop")
    assert (record["thought_tokens"], record["answer_tokens"]) == (3, 3)


def test_the_marker_is_fed_discretely_when_it_is_the_most_probable_component(folder_of):
    model = Transformer(Config.from_json(FAMILIES["qwen2"], eos_ids=(257,))).requires_grad_(False)
    method = SoftThinking(model, Tokenizer(folder_of("qwen2")), Settings(), 1)
    method.begin(0, Request(Prompt(torch.zeros(1, 32)), Job(0, "q", "p", 0, (0, 0, 0))))
    logits = torch.full((1, 272), -1e9)
    logits[0, 259], logits[0, 30] = 1.0, 0.8
    embeds, _ = method.step(logits, torch.tensor([True]))
    assert torch.equal(embeds[0], model.embed.weight[259]) and not method.thinking[0]


def test_in_the_answer_phase_a_spread_distribution_is_sampled(folder_of):
    record, fed, e = scripted(folder_of("qwen2"), Settings(), [259] + [(20, 21, 22)] * 30 + [257])
    answers = record["answer_ids"][:-1]
    assert set(answers) == {20, 21, 22}
    assert all(torch.equal(x, e[i]) for x, i in zip(fed[1:], answers))


def test_the_answer_has_settings_of_its_own(folder_of):
    """Not silently those of the thought: with answer_top_k 1, or hardly any temperature, the answer is argmax."""
    model = Transformer(Config.from_json(FAMILIES["qwen2"], eos_ids=(257,))).requires_grad_(False)
    logits = torch.full((200, 272), -1e9)
    logits[:, 20], logits[:, 21] = 0.1, 0.0
    for options, drawn in (({}, {20, 21}), ({"answer_top_k": 1}, {20}), ({"answer_temperature": 1e-3}, {20}),
                           ({"answer_top_p": 0.3}, {20}), ({"answer_min_p": 0.95}, {20})):
        method = SoftThinking(model, Tokenizer(folder_of("qwen2", name=str(options))), Settings(**options), 200)
        for row in range(200):
            method.begin(row, Request(Prompt(torch.zeros(1, 32)), Job(0, "q", "p", row, (0, 0, row))))
        method.thinking[:] = False
        method.step(logits, torch.ones(len(logits), dtype=torch.bool))
        assert set(method.tokens[:, 0].tolist()) == drawn


def test_greedy_is_argmax_also_among_equals(folder_of):
    record, _, _ = scripted(folder_of("qwen2"), Settings(method="greedy"), [tuple(range(40, 250)), 259, 257])
    assert record["thought_ids"][0] == 40


def test_what_the_model_would_have_said_while_cold_stop_speaks_counts_for_nothing(folder_of):
    folder = folder_of("qwen2", thinking=False)
    marker = Tokenizer(folder).encode(END)
    settings = Settings(cold_stop_steps=3)
    # The model spells </think> itself, but from the third sure step on it is Cold Stop's that is fed.
    record, fed, e = scripted(folder, settings, [32, *marker, 40, 41, 257, 257, 257])
    assert record["thought_ids"] == [32, marker[0], *marker] and record["stopped_by"] == "cold_stop"
    assert torch.equal(torch.stack(fed[2:10]), e[marker])


def test_textual_markers_end_the_thought_and_are_forced_token_by_token(folder_of):
    folder = folder_of("qwen2", thinking=False)
    marker = Tokenizer(folder).encode(END)
    assert len(marker) == 8  # bytes
    record, _, _ = scripted(folder, Settings(), [30, *marker, 40, 257])
    assert record["thought_ids"] == [30, *marker] and record["answer_ids"] == [40, 257]
    assert record["stopped_by"] == "think_end"
    settings = Settings(cold_stop_steps=3)
    record, fed, e = scripted(folder, settings, [(30, 31)] + [32] * 20 + [257])
    assert record["thought_ids"][1:] == [32, 32, *marker] and record["answer_ids"][:2] == [32, 32]
    assert record["stopped_by"] == "cold_stop"
    assert torch.equal(torch.stack(fed[3:11]), e[marker])


def test_cold_stop_counts_sure_steps_in_a_row(folder_of):
    folder = folder_of("qwen2")
    settings = Settings(cold_stop_steps=3)
    unsure, sure = (30, 31), 32
    steps = [sure, sure, unsure, sure, sure, sure, sure, 257]
    record, _, _ = scripted(folder, settings, steps)
    assert record["thought_ids"][3:] == [32, 32, 259]  # the third sure step in a row feeds the marker instead
    assert record["stopped_by"] == "cold_stop" and record["answer_ids"] == [32, 257]
    for other in (Settings(cold_stop_steps=3, cold_stop=False), Settings(cold_stop_steps=3, method="cot")):
        assert 259 not in scripted(folder, other, steps)[0]["thought_ids"]
    assert 259 in scripted(folder, Settings(cold_stop_steps=3, method="greedy", cold_stop=True), steps)[0]["thought_ids"]
    # tau_H is a strict bound in nats: ln 2 is the entropy of an even pair.
    even = [unsure] * 4 + [257]
    assert scripted(folder, Settings(cold_stop_steps=2, cold_stop_entropy=0.70), even)[0]["stopped_by"] == "cold_stop"
    assert scripted(folder, Settings(cold_stop_steps=2, cold_stop_entropy=0.69), even)[0]["stopped_by"] == "think_end"


def test_lengths_end_the_thought_or_the_answer(folder_of):
    folder = folder_of("qwen2")
    record, _, _ = scripted(folder, Settings(max_new_tokens=4), [30] * 9)
    assert (record["stopped_by"], record["finish_reason"], record["thought_tokens"]) == ("length", "length", 4)
    record, _, _ = scripted(folder, Settings(max_new_tokens=4), [30, 259, 31, 32, 33])
    assert (record["stopped_by"], record["finish_reason"], record["answer_ids"]) == ("think_end", "length", [31, 32])
    record, _, _ = scripted(folder, Settings(), [30] * 99, limit_prompt=60)  # the context window is 64
    assert record["thought_tokens"] == 4
    record, _, _ = scripted(folder, Settings(), [30, 257, 31])  # the model ends its turn without closing the thought
    assert (record["thought_ids"], record["answer_ids"], record["finish_reason"]) == ([30, 257], [], "stop")


def test_gumbel_noise_of_low_temperature_picks_tokens_as_often_as_the_concept_token_says(folder_of):
    settings = Settings(noise="gumbel", gumbel_temperature=1e-4, temperature=1.0, max_new_tokens=1)
    model = Transformer(Config.from_json(FAMILIES["qwen2"])).requires_grad_(False)
    method = SoftThinking(model, Tokenizer(folder_of("qwen2")), settings, 4000, trace=True)
    logits = torch.full((4000, 272), -1e9)
    logits[:, :3] = torch.tensor([0.6, 0.3, 0.1]).log()
    for row in range(4000):
        method.begin(row, Request(Prompt(torch.zeros(1, 32)), Job(0, "q", "p", row, (0, 0, row))))
    method.step(logits, torch.ones(len(logits), dtype=torch.bool))
    share = torch.bincount(method.tokens[:, 0], minlength=3) / 4000
    assert torch.allclose(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)  # four standard deviations
    assert method.steps[2][:, 0].max(-1).values.mean() > 0.999


def test_dirichlet_draws_are_distributions_for_any_alpha():
    ct, rng = np.array([0.6, 0.3, 0.1, 0.0]), np.random.default_rng(0)
    for alpha in (1e-300, 1e-3, 1.0, 1e6):
        drawn = np.array([dirichlet(rng, ct, alpha) for _ in range(500)])
        assert np.allclose(drawn.sum(1), 1) and (drawn[:, 3] == 0).all()
        assert np.allclose(drawn.mean(0), ct, atol=0.09)
    assert np.allclose(drawn, ct, atol=0.01)


@pytest.mark.parametrize("alpha", [1.0, 20.0])
def test_dirichlet_noise_has_the_mean_and_spread_of_its_distribution(alpha, folder_of):
    settings = Settings(noise="dirichlet", dirichlet_alpha=alpha, temperature=1.0, max_new_tokens=1)
    model = Transformer(Config.from_json(FAMILIES["qwen2"])).requires_grad_(False)
    method = SoftThinking(model, Tokenizer(folder_of("qwen2")), settings, 3000, trace=True)
    logits = torch.full((3000, 272), -1e9)
    logits[:, :3] = torch.tensor([0.6, 0.3, 0.1]).log()
    for row in range(3000):
        method.begin(row, Request(Prompt(torch.zeros(1, 32)), Job(0, "q", "p", row, (0, 0, row))))
    method.step(logits, torch.ones(len(logits), dtype=torch.bool))
    ct = method.steps[2][:, 0, :3]
    mean = torch.tensor([0.6, 0.3, 0.1])
    assert torch.allclose(ct.mean(0), mean, atol=0.035)
    assert torch.allclose(ct.var(0), mean * (1 - mean) / (alpha + 1), rtol=0.2)


# ------------------------------------------------------------------------------------------------- with a whole model


@pytest.mark.parametrize("family", ["qwen3", "llama3", "qwen2-yarn"])
def test_every_concept_token_is_that_of_a_slow_implementation(family, folder_of):
    """Without cache, batch or state machine: for each step the whole sequence of embeddings so far, from the start."""
    folder = folder_of(family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    model, tokenizer = load(str(folder), "cpu", "float32")
    settings = Settings(max_new_tokens=40, temperature=0.9)
    for _, record in think(model, tokenizer, ["Why?", "How so?"], settings, trace=True):
        embeds = model.embed(torch.tensor(tokenizer.encode(record["prompt"])))
        assert 5 < record["thought_tokens"] == len(record["steps"]) == len(record["thought_ids"])
        for step, token in zip(record["steps"], record["thought_ids"]):
            logits = model.logits(model(embeds[None])[0, -1])
            ids, w, H = reference(logits, settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.max_topk)
            assert step["ids"] == ids and token == ids[0]
            assert np.allclose(step["probs"], w, atol=1e-4) and step["entropy"] == pytest.approx(H, abs=1e-3)
            # On with the recorded weights: this compares each step by itself, and rounding does not add up over steps.
            mixture = sum(x * model.embed.weight[i].double() for x, i in zip(step["probs"], step["ids"])).float()
            embeds = torch.cat([embeds, mixture[None]])


def outcome(record):
    return {k: v for k, v in record.items() if k != "seconds"}


@pytest.mark.parametrize("settings", [Settings(max_new_tokens=25), Settings(max_new_tokens=25, method="cot", temperature=1.5),
                                      Settings(max_new_tokens=25, noise="gumbel"), Settings(max_new_tokens=25, noise="dirichlet")])
def test_a_sample_does_not_depend_on_what_else_is_asked(settings, folder_of):
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    model, tokenizer = load(str(folder), "cpu", "float32")
    questions, samples = ["a", "bcd", "a", "efghij", "bcd"], [0, 0, 1, 0, 3]
    many = {i: outcome(r) for i, r in think(model, tokenizer, questions, settings, 5, samples, batch_size=3)}
    for i in range(5):
        ((_, alone),) = think(model, tokenizer, [questions[i]], settings, 5, [samples[i]], batch_size=3)
        assert outcome(alone) == many[i]
    if settings.method == "cot" or settings.noise:
        assert many[0]["thought_ids"] != many[2]["thought_ids"]
        ((_, other),) = think(model, tokenizer, ["a"], settings, 6, [0])
        assert other["thought_ids"] != many[0]["thought_ids"]


@pytest.mark.parametrize("options", [{}, {"method": "cot"}, {"method": "greedy"}, {"noise": "gumbel"}, {"cold_stop_entropy": 9, "cold_stop_steps": 5}])
def test_steps_can_be_recorded_replayed_and_stopped_late(options, folder_of, monkeypatch):
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    model, tokenizer = load(str(folder), "cpu", "float32")
    questions, seen = ["a", "bcd", "a", "efghij", "bcd"], {}

    def all_of(name):
        seen[name] = []

        def watch(token, thinking, ids, probs):
            seen[name].append((int(token), bool(thinking), ids.tolist(), probs.tolist()))

        records = think(model, tokenizer, questions, Settings(max_new_tokens=25, **options), 5, [0, 0, 1, 0, 3], 2, True, watch)
        return {i: outcome(record) for i, record in records}

    expected = all_of("at once")
    replays = record_steps(monkeypatch)
    assert all_of("recorded") == expected and len(replays) > 20
    # Row 0 serves the same questions; between two of them nothing is fed that was not shown.
    assert [t for t, *_ in seen["recorded"]][:25] == [t for t, *_ in seen["at once"]][:25]
    assert len(seen["at once"]) >= sum(len(expected[i]["thought_ids"]) + len(expected[i]["answer_ids"]) for i in (0, 2))


def test_soft_with_one_component_is_greedy_thinking(folder_of):
    model, tokenizer = load(str(folder_of("qwen3")), "cpu", "float32")
    ((_, soft),) = think(model, tokenizer, ["a"], Settings(max_topk=1, max_new_tokens=20))
    ((_, greedy),) = think(model, tokenizer, ["a"], Settings(method="greedy", max_new_tokens=20))
    assert soft["thought_ids"] == greedy["thought_ids"]


# -------------------------------------------------------------------------------------------------- the command line


def test_one_question_prints_the_thought_the_answer_and_a_summary(folder_of, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder_of("qwen3")), "--question", "Why?", "--max-new-tokens", "9", "--device", "cpu",
                 "--output", str(out), "--trace", "--temperature", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("<think>\n") and "\033[" not in printed and " tokens/s, peak memory " in printed
    (record,) = map(json.loads, out.read_text().splitlines())
    assert set(record) == {"question", "prompt", "method", "settings", "seed", "sample", "thought_ids", "thought_text", "answer_ids",
                           "answer_text", "stopped_by", "finish_reason", "thought_tokens", "answer_tokens", "seconds", "steps"}
    assert len(record["steps"]) == record["thought_tokens"] and record["settings"]["temperature"] == 2.0
    for step in record["steps"]:
        assert sum(step["probs"]) == pytest.approx(1, abs=1e-5) and len(step["ids"]) == len(step["probs"]) <= 10


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_the_view_shows_what_is_fed_and_colours_a_terminal_only(no_color, folder_of, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", Terminal())
    view = View(Tokenizer(folder_of("qwen2")))
    a, b = 65, 66  # single bytes; which letters they are does not matter
    view(torch.tensor(a), torch.tensor(True), torch.tensor([a, b, 67]), torch.tensor([0.6, 0.35, 0.05]))
    view(torch.tensor(a), torch.tensor(True), torch.tensor([a, b]), torch.tensor([1.0, 0.0]))
    view(torch.tensor(b), torch.tensor(False), torch.tensor([b]), torch.tensor([1.0]))
    text = sys.stdout.getvalue()
    letter = view.tokenizer.decode([a]), view.tokenizer.decode([b])
    assert f"[{letter[1]!r} 0.35]" in text and text.count("[") - text.count("\033[") == 1
    assert ("\033[" in text) == (no_color == "")


def test_started_again_it_goes_on_and_other_settings_are_refused(folder_of, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder_of("qwen3")), "--question", "Why?", "--max-new-tokens", "9", "--device", "cpu",
                 "--output", str(out), "--method", "cot"]
    assert main([*arguments, "--num-samples", "4"]) == 0
    whole = {r["sample"]: outcome(r) for r in map(json.loads, out.read_text().splitlines())}
    lines = out.read_text().splitlines()
    out.write_text(lines[0] + "\n" + lines[1][:40])  # what a kill leaves
    assert main([*arguments, "--num-samples", "4"]) == 0
    assert {r["sample"]: outcome(r) for r in map(json.loads, out.read_text().splitlines())} == whole
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments, said", [
    (["--question", ""], "the question is empty"),
    (["--question", "\udcff"], "not valid UTF-8"),
    (["--question", "x", "--gumbel-temperature", "inf"], "--gumbel-temperature must be above 0, not inf"),
    (["--question", "x", "--model", "a\nb"], "unknown model a b"),
    (["--question", "x", "--top-p", "0"], "--top-p must be above 0 and at most 1, not 0.0"),
    (["--question", "x", "--temperature", "-1"], "--temperature must be above 0, not -1.0"),
    (["--question", "x", "--answer-min-p", "7"], "--answer-min-p must be between 0 and 1, not 7.0"),
    (["--question", "x", "--max-topk", "0"], "--max-topk must be at least 1, not 0"),
    (["--question", "x", "--num-samples", "0"], "--num-samples must be at least 1, not 0"),
    (["--question", "x", "--seed", "-3"], "--seed must be at least 0, not -3"),
    (["--question", "x", "--method", "hard"], "argument --method: invalid choice: 'hard'"),
    (["--question", "x", "--noise", "gumbel", "--method", "cot"], "it needs method soft, not cot"),
    (["--question", "x" * 99], "tokens, the context window 64"),
    (["--question", "x", "--output", "/nowhere/x.jsonl"], "cannot read and write /nowhere/x.jsonl"),
    (["--question", "x", "--limit", "3"], "--limit goes with --task or --data"),
    (["--question", "x", "--task", "tiny"], "--question asks one question"),
    (["--task", "gsm9k"], "no task 'gsm9k' (did you mean gsm8k"),
    (["--task", "tiny", "--methods", "soft,hard"], "--methods: no method 'hard'; there are soft, cot, greedy"),
    (["--data", "/nowhere/x.jsonl"], "cannot read /nowhere/x.jsonl"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, said, folder_of, capsys):
    try:
        code = main(["--model", str(folder_of("qwen3")), "--device", "cpu", *arguments])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error and error.startswith("soft_thinking.py: ")


def test_control_c_ends_within_a_second_and_keeps_what_was_finished(folder_of, tmp_path):
    folder, out = folder_of("qwen3"), tmp_path / "out.jsonl"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100000}))
    command = [sys.executable, "soft_thinking.py", "--model", str(folder), "--question", "x", "--num-samples", "99", "--batch-size",
               "1", "--max-new-tokens", "300", "--device", "cpu", "--output", str(out), "--method", "cot", "--temperature", "3"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not out.exists() or not out.read_text().count("\n"):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    start = time.time()
    process.wait()
    assert time.time() - start < 1 and process.returncode == 130 and "Traceback" not in process.stderr.read()
    text = out.read_text()
    assert text.endswith("\n") and all("thought_ids" in json.loads(line) for line in text.splitlines())


def test_an_empty_question_is_a_user_error_from_python_too(folder_of):
    model, tokenizer = load(str(folder_of("qwen3")), "cpu")
    with pytest.raises(UserError, match="empty"):
        list(think(model, tokenizer, ["  "]))
