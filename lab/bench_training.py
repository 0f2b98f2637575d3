"""Bench of SoftCoT's training: how long a step takes beside the same one by transformers.

python -m lab.bench --model smollm2-135m --assistant tiny/assistant --against transformers
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from lab import checkpoint, fast, peers, tasks, timing, training


def measure(softcot: ModuleType, args: argparse.Namespace) -> list[str]:
    """Four problems, 32 thoughts, only the projection trained: lines of Markdown.

    The peer is the same step by transformers' modules, with the assistant inside the loop, as the
    official code has it. softcot: the method's module.
    """
    model, tokenizer = fast.load(args.model, args.device, args.dtype)
    assistant, assistant_tokenizer = fast.load(args.assistant, args.device, args.dtype)
    device, n, sequences = model.device, 32, []
    problems = tasks.load("tiny-train", limit=4)
    for p in problems:
        target = tokenizer.encode(softcot.target_text(tokenizer, p.answer, p.steps))
        labels = target + list(model.config.eos_ids[:1])
        sequences.append(softcot.sequence(tokenizer, p.question, n, labels))
    asked = [softcot.assistant_ids(assistant_tokenizer, p.question, n) for p in problems]
    trained = softcot.projection(assistant.config.d, model.config.d)
    trained = {name: x.to(device).requires_grad_() for name, x in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-5)
    thoughts = partial(softcot.soft_thoughts, trained)
    hidden = softcot.hidden_states(assistant, asked, n).to(device)  # once per problem
    count, tokens = sum(len(s.labels) for s in sequences), sum(len(s.ids) for s in sequences)

    def our_loss() -> Tensor:
        forward = training.hidden_after
        return softcot.negative_log_likelihood(model, sequences, thoughts(hidden), forward) / count

    def finish(loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    losses = {"ours": our_loss}
    if "transformers" in args.against:
        folders = [checkpoint.find_folder(name) for name in (args.model, args.assistant)]
        plain = [(s.ids[: s.start], s.labels, len(s.left)) for s in sequences]
        make = peers.transformers_thoughts
        if loss := peers.made("transformers", make, folders, model, plain, asked, thoughts, n):
            losses["transformers"] = loss
    steps = {name: partial(finish, loss) for name, loss in losses.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps["ours"]()
    peak = timing.peak_memory(device)  # before a peer takes more
    times = timing.in_turns(steps, args.repeats, device)
    dtype = str(model.embed.weight.dtype)[6:]
    about = f"4 problems, {tokens} tokens, {n} thoughts each; torch {torch.__version__}"
    what = f"SoftCoT training step of {args.model} with {args.assistant}, {dtype}"
    lines = [f"{what}: {about}; {timing.hardware(device)}", ""]
    lines += ["| | tokens/s: median (least to most) | beside ours |", "|---|---|---|"]
    for name, t in times.items():
        ratio = statistics.median(a / b for a, b in zip(t, times["ours"]))
        middle, low, high = (tokens / f(t) for f in (statistics.median, max, min))
        spread = f"{middle:.0f} ({low:.0f} to {high:.0f})"
        lines.append(f"| {name} | {spread} | {ratio:.2f} x the time |")
    if device.type == "cuda":
        lines += ["", f"peak memory of ours {peak:.1f} GB"]
    return lines
