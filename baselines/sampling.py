"""What Soft Reasoning is compared with: greedy CoT, self-consistency, FIRE, CoT-decoding; and RAP.

They share its driver, its records and its command line: `python soft_reasoning.py --method sc`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import soft_reasoning
from baselines import rap
from model import At, Request, Tokenizer, Transformer, check_ranges, draw, text_seed
from soft_reasoning import Generation, Outcome, Question, Search, encoded, record, run


@dataclass(frozen=True)
class Settings(rap.Settings):
    """Those of Soft Reasoning and of RAP, and the other baselines' own."""

    # soft: the paper; greedy; sc: self-consistency; fire: hot first token; cot-decoding: branches
    # on the most probable first tokens; rap: a tree search over steps
    method: Literal["soft", "greedy", "sc", "fire", "cot-decoding", "rap"] = "soft"
    num_samples: int = 25  # answers that sc, fire and cot-decoding vote over
    temperature: float = 0.6  # of sc, and of fire after its first token (paper: 0.4, 0.6, 0.8)
    first_temperature: float = 30.0  # of fire's first token
    first_top_k: int = 16  # fire's first token is one of so many most probable ones

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, "temperature first_temperature", num_samples=1, first_top_k=1)

    @property
    def at_once(self) -> int:
        """Generations that one search can have in work at the same time."""
        others = {"soft": self.k, "greedy": 1, "rap": self.rap_width}
        return others.get(self.method, self.num_samples)


# --------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True, eq=False)
class Choice(Generation):
    """A continuation whose tokens are chosen in another way than greedily."""

    rank: int = 0  # the first token is the one of this rank, 0 the most probable
    first_temperature: float = 0.0  # 0: the first token is not sampled
    temperature: float = 0.0  # 0: later tokens are not sampled


class Sampling:
    """What `decode` asks. Notes: probability of the token, and margin over the second, [rows]."""

    def __init__(self, model: Transformer, rows: int, s: Settings):
        self.model, self.s = model, s
        self.rank = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.temperatures = torch.zeros(rows, 2, device=model.device)  # of the first, the others
        self.rows = torch.arange(rows, device=model.device)

    def begin(self, row: int, request: Request) -> None:
        choice: Choice = request.data[-1]
        self.rank[row] = choice.rank
        self.temperatures[row] = torch.tensor([choice.first_temperature, choice.temperature])

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, ...]:
        s, first = self.s, at.t == 0
        p = torch.softmax(logits, -1)
        width = max(2, s.num_samples) if s.method == "cot-decoding" else 2
        top, ids = p.topk(min(width, p.shape[1]))  # [rows, width]
        # argmax, not the first of top-k: of equally probable tokens the two may name others.
        branch = ids.gather(1, self.rank[:, None])[:, 0]
        token = torch.where(first & (self.rank > 0), branch, logits.argmax(-1))
        if s.method in ("sc", "fire"):
            tau = self.temperatures[self.rows, (~first).long()]
            hot = torch.softmax(logits / tau.clamp(min=1e-3)[:, None], -1)
            if s.method == "fire":
                least = hot.topk(min(s.first_top_k, hot.shape[1])).values[:, -1:]
                hot = hot.masked_fill(first[:, None] & (hot < least), 0)
            token = draw(hot, at.u)
        chosen = p.gather(1, token[:, None])[:, 0]
        return token, self.model.embed(token), chosen, top[:, 0] - top[:, 1]


# --------------------------------------------------------------------------------------- searches


def greedy(model: Transformer, tokenizer: Tokenizer, q: Question, s: Settings, seed: int) -> Search:
    (outcome,) = yield [Choice(encoded(model, tokenizer, q.text))]
    return record(outcome.text, [q.read(outcome.text)], [len(outcome.ids)])


def sampled(
    model: Transformer, tokenizer: Tokenizer, q: Question, s: Settings, seed: int
) -> Search:
    """Self-consistency (2203.11171); FIRE (2410.21236), the same with a hot first token."""
    prompt, seeds = encoded(model, tokenizer, q.text), (seed, text_seed(q.text))
    first = s.temperature if s.method == "sc" else s.first_temperature
    outcomes = yield [
        Choice(prompt, seeds=(*seeds, i), first_temperature=first, temperature=s.temperature)
        for i in range(s.num_samples)
    ]
    return voted(q, outcomes, None)


def cot_decoding(
    model: Transformer, tokenizer: Tokenizer, q: Question, s: Settings, seed: int
) -> Search:
    """CoT-decoding (2402.10200): greedy after each of the most probable first tokens.

    A branch's vote weighs as much as the mean margin between the two best tokens at its answer.
    """
    prompt, width = encoded(model, tokenizer, q.text), min(s.num_samples, model.config.vocab_size)
    outcomes = yield [Choice(prompt, rank=rank) for rank in range(width)]
    return voted(q, outcomes, [margin(tokenizer, q, outcome) for outcome in outcomes])


def margin(tokenizer: Tokenizer, q: Question, outcome: Outcome) -> float:
    """Mean p(most probable) - p(second) over the last occurrence of the answer; 0 without one.

    Over the last line, where the answer is said in other words (True for yes, 1{,}000 for 1,000).
    """
    answer, last_line = q.read(outcome.text), outcome.text.rstrip().rpartition("\n")[2]
    if not answer:
        return 0.0
    one = tokenizer.encode("a")  # before each: some decoders strip a space that comes first
    skip = len(tokenizer.decode(one))
    pieces = [tokenizer.decode([*one, i])[skip:] for i in outcome.ids]
    case = re.IGNORECASE if len(answer) > 1 else 0  # a choice A is no article
    # Over everything, where a character of the last line is spread over tokens.
    patterns = rf"(?<![\w.-]){re.escape(answer)}(?!\w|\.\d)", re.escape(last_line), "(?s).+"
    found = [list(re.finditer(pattern, "".join(pieces), case)) for pattern in patterns]
    start, end = (found[0] or found[1] or found[2])[-1].span()
    stops = np.cumsum([len(piece) for piece in pieces])
    spans = zip(outcome.margins, pieces, stops)
    inside = [m for m, piece, stop in spans if stop > start and stop - len(piece) < end]
    return sum(inside) / len(inside)


def voted(q: Question, outcomes: list[Outcome], weights: list[float] | None) -> dict:
    answers = [q.read(outcome.text) for outcome in outcomes]
    i = q.vote(answers, q.same, weights)
    counts = [len(outcome.ids) for outcome in outcomes]
    found = record(outcomes[i or 0].text, answers, counts)
    return found | {"weights": weights, "texts": [outcome.text for outcome in outcomes]}


def reason(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[Question],
    settings: Settings = Settings(),
    seed: int = 0,
    batch_size: int = 16,
    watch: Callable | None = None,
    order: Iterator[int] | None = None,
) -> Iterator[tuple[int, dict]]:
    """As soft_reasoning.reason, for any of the methods."""
    if settings.method == "rap":
        yield from rap.reason(model, tokenizer, questions, settings, seed, batch_size, order)
        return
    if settings.method == "soft":
        yield from soft_reasoning.reason(
            model, tokenizer, questions, settings, seed, batch_size, watch, order
        )
        return
    start = {"greedy": greedy, "cot-decoding": cot_decoding}.get(settings.method, sampled)
    start = partial(start, model, tokenizer, s=settings, seed=seed)
    method = partial(Sampling, s=settings)
    yield from run(model, tokenizer, questions, start, method, settings, batch_size, order=order)
