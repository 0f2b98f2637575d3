"""What the records of Soft Reasoning amount to, and the paper's study of its mechanism."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab import grading, tables, tasks
from model import At, Prompt, Request, Tokenizer, Transformer, decode, draw, text_seed

# ------------------------------------------------------------------------------------------ costs


def compare(records: dict, methods: list[str], problems: list, task: Any, seeds: int) -> None:
    """Print what method soft found and spent, and the voting methods at equal cost.

    A method that has no sample for a seed draws nothing: its first one stands for every seed.
    """
    pairs = [(problem, seed) for seed in range(seeds) for problem in problems]
    of = {m: [records.get((p.id, m, i)) or records[p.id, m, 0] for p, i in pairs] for m in methods}
    print()
    if "soft" not in of:
        return
    print(shares(of["soft"]))
    if "rap" in of:
        times = [sum(r["answer_tokens"] for r in of[m]) for m in ("rap", "soft")]
        print(f"{effort('rap', of['rap'])}: {times[0] / times[1]:.1f} times what soft spent")
    for method in ("sc", "fire", "cot-decoding"):
        for by in ("generations", "tokens") if method in of else ():
            asked = [problem for problem, _ in pairs]
            accuracy, tokens, capped = matched(of["soft"], of[method], asked, task, by)
            low, high = tables.wilson(accuracy, len(problems))  # seeds are not independent
            few = f"its --num-samples were too few for as many {by}"
            short = f"; on {capped} of {len(pairs)} {few}" if capped else ""
            print(
                f"{method}, on each question no more {by} than soft: {accuracy:.1%} "
                f"({low:.1%} to {high:.1%}) with {tokens:.0f} tokens{short}"
            )


def shares(records: list[dict]) -> str:
    """Any candidate right, tokens, and the share of questions that stopped in each round."""
    n, rounds = len(records), max(record["rounds"] for record in records)
    stops = [sum(r["rounds"] == i for r in records) / n for i in range(1, rounds + 1)]
    after = ", ".join(f"{stop:.0%}" for stop in stops)
    return f"{effort('soft', records)}; stopped after 1, 2, ... rounds: {after}"


def effort(method: str, records: list[dict]) -> str:
    n = len(records)
    return (
        f"{method}: {sum(r['any_correct'] for r in records) / n:.1%} have a right candidate "
        f"(pass@k); tokens per question: {sum(r['generation_tokens'] for r in records) / n:.0f} "
        f"generated, {sum(r['verification_tokens'] for r in records) / n:.0f} to verify"
    )


def matched(
    soft: list[dict], other: list[dict], problems: list, task: Any, by: str
) -> tuple[float, float, int]:
    """A voting method that may spend, on each question, only what soft spent on it.

    by "generations": as many answers as soft had candidates; by "tokens": answers until soft's
    tokens, verification included, are spent (at least one). Returns its accuracy, its mean tokens,
    and on how many questions it ran out of answers.
    """
    right, spent, capped = 0, 0, 0
    for problem, a, b in zip(problems, soft, other):
        n = len(a["answers"])
        short = len(b["answers"]) < n
        if by == "tokens":
            total = np.cumsum(b["tokens"])
            n = max(1, int(np.searchsorted(total, a["answer_tokens"], side="right")))
            short = total[-1] < a["answer_tokens"]
        capped += short
        answers, weights = b["answers"][:n], b["weights"][:n] if b["weights"] else None
        _, same = grading.reader(problem, task.tolerance)
        i = grading.vote(answers, same, weights)
        chosen = None if i is None else answers[i]
        right += grading.grade(chosen, problem.answer, problem.kind, task.tolerance)
        spent += sum(b["tokens"][:n])
    return right / len(problems), spent / len(problems), int(capped)


# -------------------------------------------------------------------------------------- mechanism


class FirstTokens:
    """A method for `decode`: one token is perturbed (an offset) or sampled, the others greedy."""

    def __init__(self, model: Transformer, temperature: float, position: int, rows: int):
        self.model, self.temperature, self.position = model, temperature, position
        self.offset = torch.zeros(rows, model.config.d, device=model.device)

    def begin(self, row: int, request: Request) -> None:
        if request.data is not None:
            self.offset[row] = request.data

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, Tensor]:
        token, first = logits.argmax(-1), at.t == self.position
        if self.temperature:
            sampled = draw(torch.softmax(logits / self.temperature, -1), at.u)
            token = torch.where(first, sampled, token)
        z = self.model.embed(token)
        return token, (z + self.offset * first[:, None]).to(z.dtype)


def analyse(
    model: Transformer,
    tokenizer: Tokenizer,
    question: str,
    s: Any,
    seed: int,
    reason: Callable,
    samples: int = 200,
) -> str:
    """Do perturbed first tokens put other MLP neurons to work than sampled ones do?

    A neuron is active where its gate, silu's argument, is above 0. Counted per layer over the first
    five tokens that are fed, the first included, of `samples` generations each; with --position,
    from that token on. Then one search: how its points concentrate. reason: the method's own.

    Two measures of the search are defined here, not by the paper. Key neurons: the 1 % of all
    layers' neurons that are active most more often after perturbed tokens than after sampled ones.
    Shown is which share of them is active after a round's points; round 0, whose points are random,
    is the yardstick. Correlation: Pearson's over the d coordinates, mean of all pairs of a round's
    points; 0 is expected of random ones.
    """
    ids = tokenizer.encode(tokenizer.open(question))
    A = projection(question, s.dimension, model.config.d, seed)
    generator = torch.Generator().manual_seed(seed)
    U = (torch.randn(s.dimension, generator=generator) for _ in range(samples))

    def active(offsets: list[Tensor | None], temperature: float = 0.0) -> tuple[list, Tensor]:
        return active_neurons(model, ids, offsets, temperature, s.position, seed, question)

    perturbed, often = active([s.sigma * (u @ A) for u in U])
    sampled, seldom = active([None] * samples, s.temperature)
    key = (often - seldom).topk(max(1, len(often) // 100)).indices
    lines = [
        "active MLP neurons, first five tokens: mean (standard deviation over tokens and samples)",
        "layer  perturbed        sampled          difference",
    ]
    for i, (p, q) in enumerate(zip(perturbed, sampled)):
        both = f"{p[0]:.4f} ({p[1]:.4f})  {q[0]:.4f} ({q[1]:.4f})"
        lines.append(f"{i:5}  {both}  {p[0] - q[0]:+.4f}")
    s = replace(s, method="soft", stop_threshold=0.0)
    ((_, record),) = reason(model, tokenizer, [tasks.ask_number(question)], s, seed, s.k)
    after = f"{often[key].mean():.4f} perturbed, {seldom[key].mean():.4f} sampled"
    lines += ["", f"share of the {len(key)} key neurons that is active: {after}"]
    lines += ["", "how the search's points concentrate"]
    head = "round  distance to the best point  distance to each other  correlation  norm"
    lines += [f"{head}  reward  key neurons"]
    best = torch.tensor(max(record["points"], key=lambda point: point["reward"])["u"])
    for t in range(record["rounds"]):
        points = [point for point in record["points"] if point["round"] == t]
        U = torch.tensor([point["u"] for point in points])
        apart = torch.pdist(U).mean().item() if len(U) > 1 else 0.0
        reward = sum(point["reward"] for point in points) / len(points)
        near, norm = (U - best).norm(dim=1).mean(), U.norm(dim=1).mean()
        _, rates = active([s.sigma * (u @ A) for u in U])
        line = f"{t:5}  {near:26.2f}  {apart:22.2f}  {correlation(U):+11.3f}  {norm:4.1f}"
        lines.append(f"{line}  {reward:.4f}  {rates[key].mean():11.4f}")
    return "\n".join(lines)


def projection(question: str, d: int, D: int, seed: int) -> Tensor:
    """A [d, D] as the search for this question draws it, so that u A is what its points add."""
    rng = np.random.default_rng((seed, text_seed(question)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    return torch.randn(d, D, generator=generator) / math.sqrt(d)


def correlation(U: Tensor) -> float:
    """Mean of Pearson's correlation over all pairs of points U [k, d]; 0 of a single point."""
    k = len(U)
    return (torch.corrcoef(U).sum().item() - k) / (k * (k - 1)) if k > 1 else 0.0


def active_neurons(
    model: Transformer,
    ids: list[int],
    offsets: list[Tensor | None],
    temperature: float,
    position: int,
    seed: int,
    question: str,
) -> tuple[list[tuple[float, float]], Tensor]:
    """Of each layer: mean and standard deviation of the share of active neurons.

    And how often each neuron is active, all layers one after another: [layers * ffn].
    """
    # Of each step: the share of each sequence [rows], how often each neuron [ffn].
    shares: list[list[Tensor]] = [[] for _ in model.layers]
    rates: list[list[Tensor]] = [[] for _ in model.layers]

    def count(layer: int, module: nn.Module, inputs: tuple, out: Tensor) -> None:
        active = (out[..., : model.config.ffn] > 0).float().flatten(end_dim=-2)
        shares[layer].append(active.mean(1).cpu())
        rates[layer].append(active.mean(0).cpu())

    handles = [
        block.mlp.gate_up.register_forward_hook(partial(count, layer))
        for layer, block in enumerate(model.layers)
    ]
    prompt = Prompt(model.embed(torch.tensor(ids, device=model.device)))

    def requests() -> Iterator[Request]:
        for i, offset in enumerate(offsets):
            yield Request(prompt, (seed, text_seed(question), i), offset)

    while not prompt.ready:
        prompt.prefill(model)
    for steps in shares + rates:
        steps.clear()
    rows = len(offsets)
    method = FirstTokens(model, temperature, position, rows)
    for _ in decode(model, requests(), method, rows, position + 6):
        pass
    for handle in handles:
        handle.remove()
    # The first step is fed the prompt's last token, not an answer's.
    told = [torch.cat(steps[position + 1 :]) for steps in shares]
    often = torch.cat([torch.stack(steps[position + 1 :]).mean(0) for steps in rates])
    return [(x.mean().item(), x.std().item()) for x in told], often
