"""lab/study.py: what the records of Soft Reasoning amount to, and what its analysis counts."""

import re
from types import SimpleNamespace

import pytest
import torch

import soft_reasoning
from baselines import sampling
from lab import fast, study, tasks
from model import At, Request


def test_equal_generations_and_equal_tokens_are_counted_question_by_question():
    problems = [tasks.Problem("a", "q", "1", "number"), tasks.Problem("b", "q", "2", "number")]
    soft = [
        {"answers": ["1"] * 3, "answer_tokens": 25},
        {"answers": ["2"] * 1, "answer_tokens": 100},
    ]
    sc = [
        {"answers": ["9", "1", "1", "9", "9"], "tokens": [10] * 5, "weights": None},
        {"answers": ["2", "9", "9"], "tokens": [10] * 3, "weights": None},
    ]
    task = tasks.TASKS["tiny"]
    # 3 and 1 answers.
    assert study.matched(soft, sc, problems, task, "generations") == (1.0, 20.0, 0)
    # 2 and 3 answers: 9 and 9 win.
    assert study.matched(soft, sc, problems, task, "tokens") == (0.0, 25.0, 1)
    # Of one answer where three would be as many: it is counted.
    sc[0] = {"answers": ["1"], "tokens": [10], "weights": None}
    assert study.matched(soft, sc, problems, task, "generations") == (1.0, 10.0, 1)


def test_weights_count_at_equal_cost_and_the_dearest_answer_is_still_one():
    problems, task = [tasks.Problem("a", "q", "1", "number")], tasks.TASKS["tiny"]
    soft = [{"answers": ["1"] * 3, "answer_tokens": 5}]
    branches = {"answers": ["1", "9", "9"], "tokens": [10] * 3, "weights": [0.9, 0.2, 0.3]}
    assert study.matched(soft, [branches], problems, task, "generations") == (1.0, 30.0, 0)
    branches["answers"] = ["9", "1", "1"]  # the first alone costs more than soft spent
    assert study.matched(soft, [branches], problems, task, "tokens") == (0.0, 10.0, 0)


def test_shares_by_hand():
    records = [
        {"any_correct": c, "generation_tokens": g, "verification_tokens": v, "rounds": n}
        for c, g, v, n in (
            (True, 100, 10, 1),
            (False, 200, 30, 3),
            (True, 300, 20, 1),
            (True, 0, 0, 2),
        )
    ]
    assert study.shares(records) == (
        "soft: 75.0% have a right candidate (pass@k); tokens per question: 150 generated, "
        "15 to verify; stopped after 1, 2, ... rounds: 50%, 25%, 25%"
    )


@pytest.fixture
def model_of(folder_of):
    """A fast model, whose gates have hooks, and its tokenizer."""
    return fast.load(str(folder_of("qwen3")), "cpu", "float32")


@pytest.mark.parametrize("position", [0, 3])
def test_active_neurons_are_those_whose_gate_is_above_zero(position, model_of):
    """Nothing perturbed: the shares of the greedy continuation, counted from the position."""
    model, tokenizer = model_of
    ids = tokenizer.encode("one?")
    found, often = study.active_neurons(model, ids, [torch.zeros(32)] * 2, 0.0, position, 0, "one?")
    embeds, gates = model.embed(torch.tensor(ids)), []
    for _ in range(position + 5):
        logits = model.logits(model(embeds[None])[0, -1])
        embeds = torch.cat([embeds, model.embed(logits.argmax())[None]])
    hooks = [
        block.mlp.gate_up.register_forward_hook(lambda module, inputs, out: gates.append(out))
        for block in model.layers
    ]
    model(embeds[None])
    for hook in hooks:
        hook.remove()
    for (mean, std), gate in zip(found, gates, strict=True):
        shares = (gate[0, -5:, : model.config.ffn] > 0).float().mean(-1)
        assert mean == pytest.approx(shares.mean().item(), abs=1e-3)
        assert std == pytest.approx(shares.repeat(2).std().item(), abs=1e-3)
    expected = [(gate[0, -5:, : model.config.ffn] > 0).float().mean(0) for gate in gates]
    assert (often - torch.cat(expected)).abs().mean() < 1e-3 and len(often) == often.numel()


def test_only_the_token_at_the_position_is_perturbed_or_sampled():
    class Embed:
        def embed(self, ids):
            return torch.zeros(len(ids), 4)

        config, device = SimpleNamespace(d=4), torch.device("cpu")

    offset = torch.arange(4.0)
    for temperature in (0.0, 1.0):
        method = study.FirstTokens(Embed(), temperature, 1, 1)
        method.begin(0, Request(None, data=offset))
        for t in range(3):
            at = At(torch.tensor([t]), torch.tensor([True]), torch.tensor([0.999]))
            token, embeds = method.step(torch.tensor([[2.0, 1.0, 1.0]]), at)
            assert token == (2 if temperature and t == 1 else 0)
            assert torch.equal(embeds[0], offset if t == 1 else 0 * offset)


def test_the_correlation_of_points_by_hand():
    line = torch.tensor([1.0, 2.0, 3.0])
    assert study.correlation(torch.stack([line, 5 * line + 1])) == pytest.approx(1)
    assert study.correlation(torch.stack([line, -line])) == pytest.approx(-1)
    # Centred, these are (-1, 0, 1) and (1, -2, 1), whose product is 0: the pairs have 1, 0 and 0.
    other = torch.tensor([1.0, -2.0, 1.0])
    assert study.correlation(torch.stack([line, line, other])) == pytest.approx(1 / 3, abs=1e-6)
    assert study.correlation(line[None]) == 0
    random = study.correlation(torch.randn(40, 500, generator=torch.Generator().manual_seed(0)))
    assert abs(random) < 0.02


def test_the_projection_is_that_of_the_search(model_of):
    model, tokenizer = model_of
    settings = sampling.Settings(rounds=1, k=3, dimension=8, sigma=0.5, reward="coherence")
    searching = soft_reasoning.search(model, tokenizer, tasks.ask_number("one?"), settings, 3)
    asked = next(searching)
    with pytest.raises(StopIteration) as end:
        searching.send([soft_reasoning.Outcome("1", [1, 2], [0.5, 0.5])] * 3)
    A = study.projection("one?", 8, model.config.d, 3)
    for g, point in zip(asked, end.value.value["points"], strict=True):
        assert torch.allclose(g.offset, 0.5 * (torch.tensor(point["u"]) @ A), atol=1e-6)


def test_the_study_has_a_line_for_each_layer_and_each_round_and_leaves_no_hooks(model_of):
    model, tokenizer = model_of
    settings = sampling.Settings(rounds=2, k=3, dimension=8, max_new_tokens=6, reward="coherence")
    arguments = (model, tokenizer, "one?", settings, 3, sampling.reason, 20)
    text = study.analyse(*arguments)
    layers, key, rounds = text.split("\n\n")
    assert len(re.findall(r"^ +\d+  0\.\d{4} \(", layers, re.MULTILINE)) == model.config.layers
    assert len(re.findall(r"^ +\d+  +[\d.]+", rounds, re.MULTILINE)) == 2
    number = model.config.layers * model.config.ffn // 100
    assert key.startswith(f"share of the {max(1, number)} key neurons that is active: ")
    often, seldom = (float(share) for share in re.findall(r"0\.\d{4}", key))
    assert often > seldom  # they are chosen for it
    assert not any(block.mlp.gate_up._forward_hooks for block in model.layers)
    assert study.analyse(*arguments) == text  # of the seed alone
    assert study.analyse(*arguments[:4], 4, *arguments[5:]) != text
