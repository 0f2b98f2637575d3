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
            few = "its --num-samples were too few to spend as much"
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
        if by == "tokens":
            total = np.cumsum(b["tokens"])
            n = max(1, int(np.searchsorted(total, a["answer_tokens"], side="right")))
            capped += total[-1] < a["answer_tokens"]
        answers, weights = b["answers"][:n], b["weights"][:n] if b["weights"] else None
        _, same = grading.reader(problem, task.tolerance)
        i = grading.vote(answers, same, weights)
        chosen = None if i is None else answers[i]
        right += grading.grade(chosen, problem.answer, problem.kind, task.tolerance)
        spent += sum(b["tokens"][:n])
    return right / len(problems), spent / len(problems), int(capped)


# -------------------------------------------------------------------------------------- mechanism


class FirstTokens:
    """A method for `decode`: the first token is perturbed (an offset) or sampled, then greedy."""

    def __init__(self, model: Transformer, temperature: float, rows: int):
        self.model, self.temperature = model, temperature
        self.offset = torch.zeros(rows, model.config.d, device=model.device)

    def begin(self, row: int, request: Request) -> None:
        if request.data is not None:
            self.offset[row] = request.data

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, Tensor]:
        token, first = logits.argmax(-1), at.t == 0
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
    five tokens that are fed, the first included, of `samples` generations each. Then one search:
    how its points concentrate. reason: the method's own.
    """
    ids = tokenizer.encode(tokenizer.open(question))
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(s.dimension, model.config.d, generator=generator) / math.sqrt(s.dimension)
    U = (torch.randn(s.dimension, generator=generator) for _ in range(samples))
    offsets = [s.sigma * (u @ A) for u in U]
    perturbed = active_neurons(model, ids, offsets, 0.0, seed, question)
    sampled = active_neurons(model, ids, [None] * samples, s.temperature, seed, question)
    lines = [
        "active MLP neurons, first five tokens: mean (standard deviation over tokens and samples)",
        "layer  perturbed        sampled          difference",
    ]
    for i, (p, q) in enumerate(zip(perturbed, sampled)):
        both = f"{p[0]:.4f} ({p[1]:.4f})  {q[0]:.4f} ({q[1]:.4f})"
        lines.append(f"{i:5}  {both}  {p[0] - q[0]:+.4f}")
    s = replace(s, method="soft", stop_threshold=0.0)
    ((_, record),) = reason(model, tokenizer, [tasks.ask_number(question)], s, seed)
    lines += ["", "how the search's points concentrate"]
    lines += ["round  distance to the best point  distance to each other  norm  reward"]
    best = torch.tensor(max(record["points"], key=lambda point: point["reward"])["u"])
    for t in range(record["rounds"]):
        points = [point for point in record["points"] if point["round"] == t]
        U = torch.tensor([point["u"] for point in points])
        apart = torch.pdist(U).mean().item() if len(U) > 1 else 0.0
        reward = sum(point["reward"] for point in points) / len(points)
        near, norm = (U - best).norm(dim=1).mean(), U.norm(dim=1).mean()
        lines.append(f"{t:5}  {near:26.2f}  {apart:22.2f}  {norm:4.1f}  {reward:.4f}")
    return "\n".join(lines)


def active_neurons(
    model: Transformer,
    ids: list[int],
    offsets: list[Tensor | None],
    temperature: float,
    seed: int,
    question: str,
) -> list[tuple[float, float]]:
    """Of each layer: mean and standard deviation of the share of active neurons."""
    active: list[list[Tensor]] = [[] for _ in model.layers]

    def count(shares: list, module: nn.Module, inputs: tuple, out: Tensor) -> None:
        gate = out[..., : model.config.ffn]
        shares.append((gate > 0).float().mean(-1).flatten().cpu())

    handles = [
        block.mlp.gate_up.register_forward_hook(partial(count, shares))
        for block, shares in zip(model.layers, active)
    ]
    prompt = Prompt(model.embed(torch.tensor(ids, device=model.device)))

    def requests() -> Iterator[Request]:
        for i, offset in enumerate(offsets):
            yield Request(prompt, (seed, text_seed(question), i), offset)

    while not prompt.ready:
        prompt.prefill(model)
    for shares in active:
        shares.clear()
    rows = len(offsets)
    for _ in decode(model, requests(), FirstTokens(model, temperature, rows), rows, 6):
        pass
    for handle in handles:
        handle.remove()
    # Without the first step, which is fed the prompt's last token.
    shares = [torch.cat(layer[1:]) for layer in active]
    return [(x.mean().item(), x.std().item()) for x in shares]
