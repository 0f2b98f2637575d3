"""baselines/coconut.py: thoughts, loss, gradient and answers, beside a slow computation of them.

The slow one feeds thoughts one by one, keeps no cache and computes the whole prefix again for each.
"""

import math

import pytest
import torch
from softcot_pair import lengthen

import model as plain
from baselines.coconut import Example, Past, Training, answer, framed, loss_one, markers
from baselines.coconut import negative_log_likelihood, stage, thoughts_one, train

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = [[5, 9, 31, 7], [11], [64, 2, 90, 17, 33, 8, 120]]
LABELS = [[40, 41, 257], [77, 257], [3, 1, 4, 1, 5, 257]]


@pytest.fixture
def model_of(folder_of):
    def make(family="qwen3", dtype="float64"):
        model, _ = plain.load(str(lengthen(folder_of(family))), "cpu", dtype)
        return model.requires_grad_(True)

    return make


def marked(method, d=32):
    torch.manual_seed(3)
    drawn = markers(method, torch.randn(50, d))
    return {name: x.double().requires_grad_() for name, x in drawn.items()}


def slow_prefix(model, own, question, n):
    """The input in front of the first label, made position by position."""
    x = [model.embed.weight[i] for i in question]
    if "pause" in own:
        return torch.stack(x + [own["pause"][0]] * n)
    if "bot" in own:
        x.append(own["bot"][0])
        for _ in range(n):
            x.append(model(torch.stack(x)[None])[0, -1])
        x.append(own["eot"][0])
    return torch.stack(x)


def slow_loss(model, own, question, n, labels):
    """The sum over labels, each predicted by a pass of its own."""
    x, total = slow_prefix(model, own, question, n), 0.0
    for label in labels:
        z = model(x[None])[0, -1] @ model.lm_head.weight.T
        total = total + torch.logsumexp(z, 0) - z[label]
        x = torch.cat([x, model.embed.weight[label][None]])
    return total


# --------------------------------------------------------------------------------- loss, gradient


@pytest.mark.parametrize("family", ["qwen3", "llama2", "mistral"])
@pytest.mark.parametrize(
    "method, n", [("coconut", 0), ("coconut", 1), ("coconut", 4), ("pause", 3), ("cot", 0)]
)
def test_loss_and_gradients_are_those_of_a_slow_computation(family, method, n, model_of):
    model, own = model_of(family), marked(method)
    wanted = [*own.values(), *model.parameters()]
    slow = [slow_loss(model, own, q, n, y) for q, y in zip(QUESTIONS, LABELS)]
    expected = torch.autograd.grad(sum(slow), wanted)
    for q, y, loss in zip(QUESTIONS, LABELS, slow):
        assert torch.allclose(loss_one(model, own, q, n, y), loss / len(y), rtol=1e-9)
    found = negative_log_likelihood(model, own, QUESTIONS, n, LABELS)
    assert torch.allclose(found, sum(slow), rtol=1e-9)
    largest = max(g.abs().max() for g in expected)
    for g, g_slow in zip(torch.autograd.grad(found, wanted), expected):
        assert torch.allclose(g, g_slow, rtol=1e-6, atol=1e-9 * largest)


def test_the_gradient_runs_through_the_chain_of_thoughts(model_of):
    model, own = model_of(), marked("coconut")
    along = torch.randn(1, 32, dtype=torch.float64)

    def at(t):
        moved = own | {"bot": own["bot"] + t * along}
        return loss_one(model, moved, QUESTIONS[0], 3, LABELS[0])

    g = torch.autograd.grad(at(0.0), own["bot"])[0]
    measured = (at(1e-5) - at(-1e-5)).item() / 2e-5
    assert abs(measured) > 1e-4
    assert (g * along).sum().item() == pytest.approx(measured, rel=1e-5)


def test_n_thoughts_take_n_passes_over_one_new_position_each_and_one_more(model_of, monkeypatch):
    model, own, shapes = model_of(dtype="float32"), marked("coconut"), []
    real = plain.Transformer.forward

    def watched(self, embeds, cache=None):
        shapes.append(tuple(embeds.shape[:2]))
        return real(self, embeds, cache)

    monkeypatch.setattr(plain.Transformer, "forward", watched)
    negative_log_likelihood(model, own, QUESTIONS, 3, LABELS)
    # The longest question and <bot>; two thoughts; the third, <eot>, and all labels but the last.
    assert shapes == [(3, 8), (3, 1), (3, 1), (3, 1 + 1 + 5)]


def test_a_thought_is_the_hidden_state_after_the_final_norm(model_of):
    model, own = model_of(), marked("coconut")
    before, n, after = framed(model, own, QUESTIONS[0], 2)
    thoughts, x = thoughts_one(model, before, n, Past(torch.tensor([0])))
    slow = slow_prefix(model, own, QUESTIONS[0], 2)
    assert torch.allclose(torch.cat([before, torch.stack(thoughts), after]), slow, rtol=1e-9)
    assert torch.equal(x[0], thoughts[-1])


# ----------------------------------------------------------------------------------- the curriculum


def test_the_curriculum_is_the_paper_s():
    gsm8k = Training(c=2, stages=3, first_epochs=6, stage_epochs=3, epochs=21)
    stages = [stage(gsm8k, epoch) for epoch in range(21)]
    assert stages[:15] == [(0, 0)] * 6 + [(2, 1)] * 3 + [(4, 2)] * 3 + [(6, 3)] * 3
    assert stages[15:] == [(6, None)] * 6  # as many thoughts, no language
    others = {"cot": (0, 0), "no-cot": (0, None), "pause": (6, None)}
    for method, expected in others.items():
        s = Training(method=method, c=2, stages=3)
        assert {stage(s, epoch) for epoch in range(20)} == {expected}


def test_steps_are_left_out_from_the_first_on_and_of_short_problems_all():
    e = Example([1, 2], [[10, 11, 12, 13], [12, 13], [13]])  # of two steps
    assert e.ids == [1, 2, 10, 11, 12, 13]
    assert [e.labels(k) for k in (0, 1, 2, 3, None)] == [*e.targets, [13], [13]]


def test_each_stage_begins_with_a_new_optimizer():
    s = Training(stages=1, first_epochs=2, stage_epochs=2, epochs=5, batch_size=1, lr=0.1, dev=1)
    examples = [Example([1], [[2, 3], [3]])] * 3
    seen = []

    def loss(indices, n, k):
        seen.append((n, k))
        return 0.1 * (x["x"] - 1.0).square().sum() * len(examples[0].labels(k))

    x = {"x": torch.tensor([5.0], requires_grad=True)}
    list(train(x, loss, examples, s))
    assert seen == [(0, 0)] * 6 + [(1, 1)] * 6 + [(1, None)] * 3
    y = torch.tensor([5.0], requires_grad=True)
    for steps in (6, 6, 3):
        optimizer = torch.optim.AdamW([y], lr=0.1, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.1 * (y - 1.0).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_([y], 1.0)
            optimizer.step()
    assert torch.equal(x["x"], y)


def test_accumulated_passes_are_one_batch_and_each_step_has_its_own_draws():
    examples = [Example([1], [[2] * k, [3]]) for k in range(1, 9)]

    def trained(size, accumulate, start=0):
        s = Training("cot", epochs=2, batch_size=size, accumulate=accumulate, lr=0.1, dev=1)
        x, drawn, passes = {"x": torch.tensor([3.0, 2.0], requires_grad=True)}, [], []

        def loss(indices, n, k):
            drawn.append(torch.rand(1).item())
            passes.append(len(indices))
            return sum((x["x"] - i).square().sum() * len(examples[i].labels(k)) for i in indices)

        torch.manual_seed(size)  # of no consequence
        steps = [step[:3] for step in train(x, loss, examples, s, start)]
        return x["x"], steps, passes, drawn

    whole, one_by_one = trained(4, 1), trained(1, 4)
    assert [passes for _, _, passes, _ in (whole, one_by_one)] == [[4] * 4, [1] * 16]
    assert torch.allclose(whole[0], one_by_one[0], atol=1e-5)
    for a, b in zip(whole[1], one_by_one[1], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert trained(4, 1, start=2)[3] == whole[3][2:] and len(set(whole[3])) == 4


@pytest.mark.parametrize(
    "nonsense", [{"c": 0}, {"stages": -1}, {"lr": 0.0}, {"lr": math.nan}, {"epochs": 0}]
)
def test_nonsense_is_refused(nonsense):
    with pytest.raises(ValueError, match=next(iter(nonsense))):
        Training(**nonsense)


# --------------------------------------------------------------------------------------- answering


def slow_answer(model, own, question, n, most):
    x, ids = slow_prefix(model, own, question, n), []
    while len(ids) < most and not set(ids) & set(model.config.eos_ids):
        ids.append(model.logits(model(x[None])[0, -1]).argmax().item())
        x = torch.cat([x, model.embed.weight[ids[-1]][None]])
    return ids


@torch.no_grad()
@pytest.mark.parametrize("method, n", [("coconut", 0), ("coconut", 3), ("pause", 3), ("cot", 0)])
def test_answers_are_those_of_a_slow_computation(method, n, model_of):
    model, own = model_of(), marked(method)
    found = {i: (ids, names) for i, ids, names, _ in answer(model, own, QUESTIONS, n, 9, rows=2)}
    for i, question in enumerate(QUESTIONS):
        ids, names = found[i]
        assert ids == slow_answer(model, own, question, n, 9)
        thoughts = slow_prefix(model, own, question, n)[-n - 1 : -1] if method == "coconut" else []
        logits = [model.logits(thought) for thought in thoughts]
        assert names == [z.index_fill(0, torch.tensor([257, 261]), -1e9).argmax() for z in logits]


@torch.no_grad()
def test_a_thought_that_looks_like_the_end_ends_nothing(model_of):
    model, own = model_of(), marked("coconut")
    model.lm_head.weight[257] = 100 * model.norm.weight * torch.randn(32).sign()
    model.lm_head.weight[261] = -model.lm_head.weight[257]  # one of them is always the likeliest
    ((_, ids, names, _),) = answer(model, own, QUESTIONS[:1], 4, 9)
    assert len(ids) == 1 and ids[0] in (257, 261)
    assert len(names) == 4 and not set(names) & {257, 261}
