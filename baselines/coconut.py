r"""Coconut: the last hidden state is the next input, chained (Hao et al., arXiv 2412.06769).

    python tiny/graph.py                                  # the problems of the task graph
    python -m baselines.coconut train --from-nothing --first-epochs 2 --stage-epochs 1 \
        --epochs 5 --lr 1e-3 --folder out                           # a small model on these
    python -m baselines.coconut eval --trained out/coconut.safetensors        # or probe
    python -m baselines.coconut train --model qwen2.5-0.5b --lora --task gsm8k --c 2 --folder other

Read `thoughts_one` and `loss_one`: that is the paper. What it is compared with is here too: CoT,
No-CoT, and pause tokens (2310.02226). <bot> and <eot> are never predicted, so that they are trained
vectors beside the model (the paper: new tokens), whose tokenizer and matrices stay as they are.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import softcot
from model import At, Output, Prompt, Request, Transformer, causal_attention, check_ranges, decode

# ----------------------------------------------------------------------------------- the curriculum


@dataclass(frozen=True)
class Training:
    """What changes a training or its log, but for models and data. ValueError for nonsense."""

    # no-cot: the answer alone; pause: behind as many pause tokens as coconut has thoughts at last
    method: Literal["coconut", "pause", "no-cot", "cot"] = "coconut"
    c: int = 1  # continuous thoughts in place of a step (paper: 2 for GSM8K, 1 for ProsQA)
    stages: int = 3  # K: so many steps are replaced one by one, then all (paper: 3, 6 for ProsQA)
    first_epochs: int = 6  # epochs of stage 0, all in words (paper: 6, 5 for ProsQA)
    stage_epochs: int = 3  # epochs of each later stage but the last (paper: 3, 5 for ProsQA)
    epochs: int = 20  # in all: the last stage has what the others leave
    lr: float = 1e-4  # learning rate, constant
    batch_size: int = 32  # problems in one pass through the model
    accumulate: int = 1  # passes whose gradients make one step (paper: 128 problems a step)
    dev: int = 200  # problems, the last ones, that are held out for the validation loss
    dev_limit: int = 50  # of these, how many are answered for the accuracy
    seed: int = 0  # of the start, the order and LoRA's dropout

    def __post_init__(self):
        ones = ["c", "first_epochs", "stage_epochs", "epochs", "batch_size", "accumulate", "dev"]
        check_ranges(self, "lr", **dict.fromkeys(ones, 1), stages=0, dev_limit=0, seed=0)


def stage(s: Training, epoch: int) -> tuple[int, int | None]:
    """(n, k): in this epoch (from 0 on) n thoughts stand for the first k steps, None: for all."""
    if s.method != "coconut":
        return {"pause": (s.c * s.stages, None), "no-cot": (0, None), "cot": (0, 0)}[s.method]
    k = max(0, 1 + (epoch - s.first_epochs) // s.stage_epochs)
    return (s.c * k, k) if k <= s.stages else (s.c * s.stages, None)


@dataclass(frozen=True)
class Example:
    """A problem as token ids: targets[k] are the labels without its first k steps."""

    question: list[int]
    targets: list[list[int]]  # the last is the answer alone

    @property
    def ids(self) -> list[int]:
        return self.question + self.targets[0]

    def labels(self, k: int | None) -> list[int]:
        return self.targets[-1 if k is None else min(k, len(self.targets) - 1)]


# -------------------------------------------------------------------------- the paper, one problem


class Past:
    """A cache that gradients flow through. Row b begins with pad[b] positions of padding."""

    def __init__(self, pad: Tensor):
        self.pad, self.S, self.kept, self.mask = pad, 0, {}, None

    def advance(self, T: int) -> Tensor:
        """As KVCache.advance: the new positions, LongTensor [B, T]."""
        self.S += T
        key = torch.arange(self.S, device=self.pad.device)
        query = key[-T:, None]
        seen = (key <= query) & (key >= self.pad[:, None, None])  # [B, T, S]
        self.mask = (seen | (key == query))[:, None]  # padding sees itself: no softmax of nothing
        return (query.T - self.pad[:, None]).clamp(min=0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat(pair, 1) for pair in zip(self.kept[layer], (k, v)))
        self.kept[layer] = k, v
        return causal_attention(q, k, v, self.mask)


def markers(method: str, E: Tensor) -> dict[str, Tensor]:
    """<bot> and <eot>, or <pause>, before training: [1, d] in float32, as large as E's rows."""
    names = {"coconut": ["bot", "eot"], "pause": ["pause"]}.get(method, [])
    return {name: torch.randn(1, E.shape[1]).to(E.device) * E.float().std() for name in names}


def framed(
    model: Transformer, trained: dict[str, Tensor], question: list[int], n: int
) -> tuple[Tensor, int, Tensor]:
    """[E(question), <bot>], n thoughts, [<eot>]; or [E(question), n <pause>], no thoughts, []."""
    q = model.embed(torch.tensor(question, device=model.device))  # [len(question), d]
    if "bot" in trained:
        return torch.cat([q, trained["bot"].to(q)]), n, trained["eot"].to(q)
    if "pause" in trained:
        q = torch.cat([q, trained["pause"].to(q).expand(n, -1)])
    return q, 0, q[:0]


def thoughts_one(model: Transformer, x: Tensor, n: int, cache: Past) -> tuple[list[Tensor], Tensor]:
    """n continuous thoughts behind embeddings x [T, d]: n passes, each over what is new alone.

    Returns them, [d] each, and what the model has yet to read: the last one, [1, d]; x if n is 0.
    """
    thoughts = []
    for _ in range(n):
        x = model(x[None], cache)[0, -1:]  # [1, d], after the final norm
        thoughts.append(x[0])
    return thoughts, x


def loss_one(
    model: Transformer, trained: dict[str, Tensor], question: list[int], n: int, labels: list[int]
) -> Tensor:
    """-sum_i log p(y_i | question, thoughts, y_<i) / |y|, in the (n + 1)st pass; scalar."""
    before, n, after = framed(model, trained, question, n)
    cache = Past(torch.zeros(1, dtype=torch.long, device=model.device))
    _, x = thoughts_one(model, before, n, cache)
    said = model.embed(torch.tensor(labels[:-1], dtype=torch.long, device=model.device))
    hidden = model(torch.cat([x, after, said])[None], cache)[0]
    log_p = model.logits(hidden[-len(labels) :]).log_softmax(-1)  # [len(labels), V]
    return -sum(log_p[i, y] for i, y in enumerate(labels)) / len(labels)


# ----------------------------------------------------------------------------- the same for a batch


def negative_log_likelihood(
    model: Transformer,
    trained: dict[str, Tensor],
    questions: list[list[int]],
    n: int,
    labels: list[list[int]],
) -> Tensor:
    """-sum_i log p(y_i | question, thoughts, y_<i) over all labels of all rows; scalar.

    What stands before the thoughts is padded on the left, so that they stand abreast.
    """
    before, (n, *_), (after, *_) = zip(*(framed(model, trained, q, n) for q in questions))
    x = nn.utils.rnn.pad_sequence(list(before), batch_first=True, padding_side="left")  # [B, T, d]
    cache = Past(torch.tensor([x.shape[1] - len(row) for row in before], device=model.device))
    for _ in range(n):
        x = model(x, cache)[:, -1:]  # [B, 1, d]
    y = [torch.tensor(row, device=model.device) for row in labels]
    y = nn.utils.rnn.pad_sequence(y, batch_first=True, padding_value=-1)  # [B, L]
    said = model.embed(y[:, :-1].clamp(min=0))
    x = torch.cat([x, after.expand(len(y), -1, -1), said], 1)
    hidden, real = model(x, cache)[:, -y.shape[1] :], y >= 0
    return F.cross_entropy(model.logits(hidden[real]), y[real], reduction="sum")


def train(
    trained: dict[str, Tensor],
    loss: Callable[[list[int], int, int | None], Tensor],
    examples: list[Example],
    s: Training = Training(),
    step: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[tuple[int, float, float, list[int]]]:
    """As softcot.train, in stages: the optimizer forgets its moments where one begins.

    loss(indices, n, k) sums over labels, as `negative_log_likelihood` does.
    """
    optimizer = optimizer or torch.optim.AdamW(trained.values(), weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = s.lr
    lengths, steps = [len(example.ids) for example in examples], []
    per_epoch = len(softcot.shuffled(lengths, 0, s))
    for done in range(step, s.epochs * per_epoch):
        epoch, place = divmod(done, per_epoch)
        steps = softcot.shuffled(lengths, epoch, s) if not steps or place == 0 else steps
        n, k = stage(s, epoch)
        if place == 0 and (n, k) != stage(s, max(epoch - 1, 0)):
            optimizer.state.clear()
        indices, mean = steps[place], 0.0
        # A step's own seed, for LoRA's dropout: going on needs no state but the step's number.
        torch.manual_seed(int(np.random.default_rng((s.seed, done)).integers(2**63)))
        labels = sum(len(examples[i].labels(k)) for i in indices)
        optimizer.zero_grad()
        for i in range(0, len(indices), s.batch_size):  # accumulated: as of one larger batch
            part = loss(indices[i : i + s.batch_size], n, k) / labels
            part.backward()
            mean += part.item()
        norm = nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
        yield done, mean, norm, indices
        optimizer.step()


# --------------------------------------------------------------------------------------- answering


class Coconut(softcot.Sampler):
    """What `decode` asks: n hidden states are fed back, then <eot>, then the likeliest tokens."""

    def __init__(self, model: Transformer, n: int, eot: Tensor):
        super().__init__(model)
        self.n, self.eot = n, eot.to(model.embed.weight)
        self.eos = torch.tensor(model.config.eos_ids, device=model.device)

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, Tensor]:
        silent = at.t <= self.n
        # A thought's name is the likeliest token that does not end the sequence.
        named = logits.index_fill(-1, self.eos, -torch.inf).argmax(-1)
        token = torch.where(silent, named, logits.argmax(-1))
        following = torch.where(silent[:, None], self.eot, self.model.embed(token))
        return token, torch.where((at.t < self.n)[:, None], at.hidden, following)


def answer(
    model: Transformer,
    trained: dict[str, Tensor],
    questions: list[list[int]],
    n: int,
    most: int = 256,
    rows: int = 16,
) -> Iterator[tuple[int, list[int], list[int], Output]]:
    """Answer in at most so many tokens: (index, tokens, names of the thoughts, all of it)."""
    silent = n + 1 if "eot" in trained else 0  # steps before the first token that is said
    method = Coconut(model, n, trained["eot"]) if silent else softcot.Sampler(model)
    prompts = (Prompt(framed(model, trained, question, n)[0]) for question in questions)
    requests = (Request(prompt, data=i) for i, prompt in enumerate(prompts))
    rows = model.plan(rows, max(map(len, questions), default=0) + n + 1, silent + most)
    for output in decode(model, requests, method, rows, silent + most):
        ids, names = output.ids[silent:], output.ids[: max(0, silent - 1)]
        yield output.request.data, ids, names, output


if __name__ == "__main__":
    from baselines import lora
    from lab import coconut_cli

    coconut_cli.main(sys.modules[__name__], lora, softcot)
