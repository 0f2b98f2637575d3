"""SoftCoT's training in a folder: it can be killed at any time, and goes on to the same bits.

The training itself is the method's generator; this iterates it, logs, saves and validates. What
makes it fast plugs in from here: `hidden_after`, `checkpointed`, `epoch_order`. The method's module
(softcot) is handed over: nothing here imports it.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lab import files
from lab.folder import check_own, log_until
from lab.grading import grade, read_answer
from lab.tasks import Problem, Task
from lab.trained import BEST, read_tensors, write_file, write_tensors
from model import Prompt, Request, Tokenizer, Transformer, UserError, causal_attention, decode

# ------------------------------------------------------------------------------------------- speed


class Past:
    """A cache for training: the keys and values of a first pass are constants of the second."""

    def __init__(self, device: torch.device):
        self.device, self.L, self.kept, self.mask = device, 0, {}, None

    def advance(self, T: int) -> Tensor:
        L, self.L = self.L, self.L + T
        self.mask = causal_lower_right(T, L + T) if L else None  # the last query attends to all
        return torch.arange(L, L + T, device=self.device)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.kept[layer], (k, v)))
        else:
            self.kept[layer] = k, v
        return causal_attention(q, k, v, self.mask)


def hidden_after(model: Transformer, embeds: Tensor, L: int) -> Tensor:
    """model(embeds)[:, L:], [B, T, d] -> [B, T - L, d], with the first L positions as constants.

    Before the first thought nothing depends on what is trained: there the model runs without
    autograd, and leaves the keys and values that the positions from L on attend to.
    """
    if not L:
        return model(embeds)
    past = Past(embeds.device)
    with torch.no_grad():
        model(embeds[:, :L], past)
    return model(embeds[:, L:], past)


@contextmanager
def checkpointed(model: Transformer) -> Iterator[None]:
    """While inside: a layer's activations are computed again in the backward pass, not kept."""
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in model.layers:
            del block.forward


def epoch_order(lengths: list[int], epoch: int, s: Any) -> list[list[int]]:
    """The steps of an epoch, each a list of indices, by length.

    A function of seed and epoch, so a step's number is all that going on needs. Sixteen steps'
    worth of problems are sorted together, so that a batch holds little padding.
    """
    rng, size = np.random.default_rng((s.seed, epoch)), s.batch_size * s.accumulate
    order, steps = rng.permutation(len(lengths)).tolist(), []
    for i in range(0, len(order), 16 * size):
        bucket = sorted(order[i : i + 16 * size], key=lambda j: lengths[j])
        steps += [bucket[j : j + size] for j in range(0, len(bucket), size)]
    return [steps[i] for i in rng.permutation(len(steps))]


# ------------------------------------------------------------------------------------------ folder


class Trainer:
    """A training in a folder: one step after another, from wherever the folder stands."""

    def __init__(
        self,
        method: ModuleType,
        folder: Path,
        model: Transformer,
        tokenizer: Tokenizer,
        task: Task,
        problems: list[Problem],
        sequences: list,
        about: dict[str, str],
        s: Any,
        trained: dict[str, Tensor],
        adapter: dict | None = None,
    ):
        """`problems` and `sequences` belong together; the last s.dev of them are held out.

        So does `hidden`, [problems, N, d_a], where the method needs it, to be set before `run`.
        UserError where the folder holds a training of other settings.
        """
        self.method, self.folder, self.s, self.about = method, folder, s, about
        self.model, self.tokenizer, self.task, self.adapter = model, tokenizer, task, adapter
        self.problems, self.sequences, self.hidden = problems, sequences, None
        self.train = sequences[: len(problems) - s.dev]
        self.dev = range(len(self.train), len(problems))
        self.trained = {name: x.to(model.device).requires_grad_() for name, x in trained.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), weight_decay=0.0)
        self.per_epoch = -(-len(self.train) // (s.batch_size * s.accumulate))
        self.total = s.epochs * self.per_epoch
        self.step, self.best, self.dev_loss, self.given = 0, math.inf, math.nan, s
        self.saved: int | None = None  # step of the last saved state
        self.resume()

    def thoughts(self, indices: list[int]) -> Tensor | None:
        """What stands in the placeholders' places, [B, n, d]; None for LoRA."""
        if "prompt" in self.trained:
            return self.trained["prompt"].expand(len(indices), -1, -1)
        if self.hidden is None:
            return None
        return self.method.soft_thoughts(self.trained, self.hidden[indices].to(self.model.device))

    def loss(self, indices: list[int]) -> Tensor:
        batch = [self.sequences[i] for i in indices]
        return self.method.negative_log_likelihood(
            self.model, batch, self.thoughts(indices), hidden_after
        )

    def steps(self, checkpointing: bool) -> Iterator[tuple[int, float, float, list[int]]]:
        """The method's training from where this one stands, each step as fast as it can be."""
        weight = self.model.embed.weight
        # In bfloat16 on a CPU fused attention is slower than plain attention.
        plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        steps = self.method.train(
            self.trained, self.loss, self.train, self.given, self.step, self.optimizer, epoch_order
        )
        while True:
            less = checkpointed(self.model) if checkpointing else nullcontext()
            with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(), less:
                found = next(steps, None)
            if found is None:
                return
            yield found

    def run(self, save_every: int, checkpointing: bool) -> None:
        """All steps that are left.

        UserError where the loss is no number: what is saved by then has a finite loss.
        """
        title = f"train {self.s.method}"
        with tqdm(desc=title, total=self.total, initial=self.step) as bar:
            if self.saved is None:
                self.validate()
            began = time.perf_counter()
            for step, loss, norm, indices in self.steps(checkpointing):
                seconds, self.step = time.perf_counter() - began, step
                epoch = step // self.per_epoch
                if step > self.saved and step % self.per_epoch == 0:
                    self.validate()
                if not math.isfinite(loss + norm):
                    where = ", ".join(self.problems[i].id for i in indices)
                    raise self.diverged(
                        f"the loss is {loss} and its gradient's norm {norm} at step {step + 1} "
                        f"(epoch {epoch + 1}, problems {where})"
                    )
                # Only now is this state known to be good.
                if step % save_every == 0 and step > self.saved:
                    self.save()
                lr = self.optimizer.param_groups[0]["lr"]
                speed = sum(len(self.sequences[i].ids) for i in indices) / seconds
                line = {"epoch": epoch, "loss": loss, "gradient_norm": norm, "lr": lr}
                self.log(step + 1, **line, tokens_per_second=round(speed, 1))
                said = f"loss {loss:.4f}, lr {lr:.1e}, {speed:.0f} tokens/s"
                bar.set_postfix_str(said, refresh=False)
                bar.update()
                began = time.perf_counter()
            if self.step < self.total:
                self.step = self.total
                self.validate()

    @torch.no_grad()
    def validate(self) -> None:
        """Loss of the held-out problems, accuracy of some; the best loss so far is kept as BEST."""
        s = self.s
        by_length = sorted(self.dev, key=lambda i: len(self.sequences[i].ids))
        batches = [by_length[i : i + s.batch_size] for i in range(0, len(by_length), s.batch_size)]
        total = sum(self.loss(batch).item() for batch in batches)
        self.dev_loss = total / sum(len(self.sequences[i].labels) for i in self.dev)
        if not math.isfinite(self.dev_loss):
            raise self.diverged(f"the held-out loss is {self.dev_loss} after step {self.step}")
        asked = self.dev[: s.dev_limit]
        right = sum(self.answered_right(asked))
        line = {"epoch": self.step // self.per_epoch, "dev_loss": self.dev_loss}
        self.log(self.step, **line, dev_accuracy=right / len(asked) if asked else None)
        shown = f", accuracy {right}/{len(asked)}" if asked else ""
        best = " (the best)" if self.dev_loss < self.best else ""
        tqdm.write(f"step {self.step}: held-out loss {self.dev_loss:.4f}{shown}{best}")
        if self.dev_loss < self.best:
            self.best = self.dev_loss
            write_tensors(self.folder / BEST[s.method], self.trained, self.metadata())
            if self.adapter:
                config = json.dumps(self.adapter, indent=1).encode()
                write_file(self.folder / "adapter_config.json", config)
        self.save()

    def answered_right(self, asked: range) -> Iterator[bool]:
        """Greedy answers to these problems: whether they are right."""
        method, model = self.method, self.model
        longest = max((self.sequences[i].start for i in asked), default=1)
        rows, new = max(1, min(16, len(asked))), self.s.max_new_tokens
        try:
            model.plan(rows, longest, new)
        except UserError:  # slower is better than a training that stops
            rows = model.plan(1, longest, new)

        def requests() -> Iterator[Request]:
            for i in asked:
                sequence = replace(self.sequences[i], labels=[])
                embeds = method.input_embeddings(model, [sequence], self.thoughts([i]))
                yield Request(Prompt(embeds[0]), data=self.problems[i])

        sampler = method.Sampler(model)
        for output in decode(model, requests(), sampler, rows, self.s.max_new_tokens):
            problem = output.request.data
            kept = [t for t in output.ids if t not in model.config.eos_ids]
            found = read_answer(self.tokenizer.decode(kept), problem)
            yield grade(found, problem.answer, problem.kind, self.task.tolerance)

    def diverged(self, what: str) -> UserError:
        kept = "holds no state yet" if self.saved is None else f"keeps step {self.saved}"
        remedy = "lower --lr or use --dtype float32, with another --folder"
        return UserError(f"{what}: {self.folder} {kept}; {remedy}")

    def metadata(self) -> dict:
        here = {"step": self.step, "loss": self.dev_loss}
        return self.about | here | {"settings": json.dumps(asdict(self.s))}

    def log(self, step: int, **what: Any) -> None:
        files.append(self.folder / "log.jsonl", {"step": step} | what)

    def save(self) -> None:
        """last.safetensors for use, and state.safetensors, which alone counts when going on."""
        write_tensors(self.folder / "last.safetensors", self.trained, self.metadata())
        state = {f"trained.{name}": x for name, x in self.trained.items()}
        for name, x in self.trained.items():  # step, exp_avg, exp_avg_sq
            state |= {f"{key}.{name}": value for key, value in self.optimizer.state[x].items()}
        metadata = self.metadata() | {"best": self.best}
        write_tensors(self.folder / "state.safetensors", state, metadata)
        self.saved = self.step

    def resume(self) -> None:
        """Go back to the last saved step, the log too. UserError where it had other settings."""
        path, log = self.folder / "state.safetensors", self.folder / "log.jsonl"
        check_own(self.folder, BEST[self.s.method], self.metadata())
        if path.exists():
            state, there = read_tensors(path)
            was = json.loads(there.pop("settings")) | there
            now = asdict(self.s) | {key: str(value) for key, value in self.about.items()}
            other = [key for key in now if was.get(key) != now[key]]
            if other:
                said = ", ".join(
                    f"{key} is {was.get(key)} there and {now[key]} here" for key in other
                )
                raise UserError(
                    f"{self.folder} holds a training with other settings: {said}; give --folder "
                    "another name"
                )
            for name, x in self.trained.items():
                x.data.copy_(state[f"trained.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):  # there is none before the first step
                    if (value := state.get(f"{key}.{name}")) is not None:
                        value = value.to(x.device) if value.ndim else value
                        self.optimizer.state[x][key] = value
            self.step = self.saved = int(there["step"])
            self.best, self.dev_loss = float(there["best"]), float(there["loss"])
            said = f"going on after step {self.step}"
            said = said if self.step < self.total else "this training is finished"
            print(f"{self.folder}: {said}", file=sys.stderr)
        if log.exists():
            write_file(log, log_until(log, self.step) if path.exists() else b"")
