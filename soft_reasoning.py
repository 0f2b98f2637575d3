"""Soft Reasoning: Bayesian optimisation of the first answer token (Zhu et al., arXiv 2505.24688).

    python soft_reasoning.py --model qwen2.5-7b --question "What is 17 * 24?"

Everything after the first answer token is decoded greedily, so an answer is a function of that
token's embedding, and the search looks for the embedding whose answer is best:

    x = z + sigma u A      z: greedy first token's embedding; u in R^d; A in R^(d x D), N(0, 1/d)
    y(x)                   the greedy continuation of prompt and x
    f(x) = r_verifier + r_coherence

`generate_one` and `search` are the paper, `reason` runs many in one batch. The official code feeds
u A alone, A of N(0, 1); not kept: its lengthscale 1 (a random search), EI's sign, variance for std.
"""

import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gp import GP, expected_improvement, suggest
from model import At, KVCache, Prompt, Request, Tokenizer, Transformer, UserError
from model import check_prompt, check_ranges, decode, split_thought, text_seed


@dataclass(frozen=True)
class Settings:
    """What decides what is generated, beside the seed. ValueError for nonsense."""

    k: int = 5  # k: points evaluated in each round
    rounds: int = 5  # rounds at most, round 0 included
    dimension: int = 50  # d: of the space that is searched
    sigma: float = 1.0  # sigma: standard deviation of each coordinate of x - z
    position: int = 0  # p: which answer token is perturbed, from 0 on; earlier ones are greedy
    acquisition: Literal["ei", "ucb", "pi", "random"] = "ei"  # how later points are chosen
    kappa: float = 2.0  # of ucb: standard deviations that are added to the mean
    reward: Literal["verifier", "coherence", "both"] = "both"  # what is maximised
    coherence: Literal["prob", "mean", "sum"] = "prob"  # mean p (code); mean, sum (paper) of log p
    select: Literal["best", "vote"] = "best"  # best point's answer (paper), or majority (code)
    stop_on: Literal["ei", "gain"] = "ei"  # ends the search: the best EI, or a round's gain (code)
    stop_threshold: float = 0.01  # below this; EI only once the verifier has agreed with a point
    max_new_tokens: int = 4096  # of each generation; the context window ends it too

    def __post_init__(self):
        least = {"position": 0, "max_new_tokens": 1, "stop_threshold": 0}
        check_ranges(self, "sigma kappa", k=1, rounds=1, dimension=1, **least)
        if self.position >= self.max_new_tokens:
            raise ValueError(f"position must be below max_new_tokens, not {self.position}")


def last_number(text: str) -> str | None:
    """The answer in a text, if nobody reads it better."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else None


def vote(answers: list, same: Callable | None = None, weights: list | None = None) -> int | None:
    """Index of the answer with the largest weight (default: the most frequent), None: no answer."""
    mass = Counter()
    for answer, weight in zip(answers, weights or [1] * len(answers)):
        mass[answer] += weight
    del mass[None]  # a Counter allows it, there or not
    return answers.index(max(mass, key=mass.get)) if mass else None


@dataclass(frozen=True, eq=False)
class Question:
    """What the user says, and how answers to it are read, compared and counted."""

    text: str
    read: Callable[[str], str | None] = last_number
    same: Callable[[Any, Any], bool] = lambda a, b: a is not None and a == b
    vote: Callable[..., int | None] = vote
    form: str = ""  # tells a verifier in which form to answer
    judge: Callable[..., str] | None = None  # what it is asked, if not verifier_message


def verifier_message(question: Question, texts: list[str], whole: bool = True) -> str:
    """The question, each candidate on a line (whole, or without its thought), what is asked."""
    said = [" ".join(split_thought(text)[0 if whole else 1 :]).split() for text in texts]
    lines = [f"Candidate {i}: {' '.join(words)}" for i, words in enumerate(said, 1)]
    return "\n".join([question.text, *lines, f"Which answer is right? {question.form}".strip()])


def encoded(model: Transformer, tokenizer: Tokenizer, message: str) -> Prompt:
    ids = tokenizer.encode(tokenizer.open(message))
    check_prompt(model.config, ids, message)
    return Prompt(model.embed(torch.tensor(ids, device=model.device)))


# -------------------------------------------------------------------------- the paper, one sequence


@dataclass(frozen=True, eq=False)
class Generation:
    """What a search asks for: the greedy continuation of a prompt, with one token perturbed."""

    prompt: Prompt
    offset: Tensor | None = None  # x - z, [D]
    position: int = 0  # of the answer token that it is added to
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Outcome:
    """What came of it: text without the end-of-sequence token, ids with it, numbers per token."""

    text: str
    ids: list[int]
    probs: list[float]  # the model's own probability of each token
    margins: list[float] = ()  # p(most probable) - p(second) at each token, for CoT-decoding


@torch.inference_mode()
def generate_one(model: Transformer, tokenizer: Tokenizer, g: Generation, most: int) -> Outcome:
    """y(x) for x = z + offset, of at most so many tokens; y(z) if it ends before the position."""
    x, eos, ids, probs = g.prompt.embeds, model.config.eos_ids, [], []
    cache, length = KVCache(model, 1, len(x)), len(x)
    while len(ids) < min(most, model.config.context - length):
        cache.reserve(length + len(ids))
        logits = model.logits(model(x[None], cache)[:, -1])  # x [T, D], later [1, D] -> [1, V]
        token = logits.argmax(-1)  # [1]
        x = model.embed(token)  # z, for the token that is perturbed
        if len(ids) == g.position and g.offset is not None:
            x = (x + g.offset.to(x.device)).to(x.dtype)
        ids.append(int(token))
        probs.append(float(torch.softmax(logits, -1)[0, token]))
        if ids[-1] in eos:
            break
    return Outcome(tokenizer.decode([i for i in ids if i not in eos]), ids, probs)


Search = Generator[list[Generation], list[Outcome], dict]


def search(
    model: Transformer,
    tokenizer: Tokenizer,
    question: Question,
    s: Settings = Settings(),
    seed: int = 0,
    watch: Callable | None = None,
) -> Search:
    """The paper: yields generations that it wants, is sent their outcomes, returns its record."""
    d, D, prompt = s.dimension, model.config.d, encoded(model, tokenizer, question.text)
    rng = np.random.default_rng((seed, text_seed(question.text)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    # A's entries have variance 1/d, so each coordinate of u A has variance 1: sigma is x - z's.
    A = torch.randn(d, D, generator=generator) / math.sqrt(d)
    U = torch.randn(s.k, d, generator=generator, dtype=torch.float64)  # round 0: u ~ N(0, I)
    ei, points, verdicts, verdict = [None] * s.k, [], [], None
    for t in range(s.rounds):
        # Evaluate f at x = z + sigma u A: r_verifier = 1[y = y_v], and r_coherence.
        outcomes = yield [Generation(prompt, s.sigma * (u.float() @ A), s.position) for u in U]
        if s.reward != "coherence":
            texts = [outcome.text for outcome in outcomes]
            verdict = yield from verify(model, tokenizer, question, texts, verdicts)
            verdicts.append(verdict)
        for u, e, outcome in zip(U, ei, outcomes):
            answer = question.read(outcome.text)
            r_verifier = float(question.same(answer, verdict["answer"])) if verdict else None
            r_coherence = coherence(outcome, s.coherence, s.position)
            reward = (r_verifier or 0.0) + (r_coherence if s.reward != "verifier" else 0.0)
            point = {"round": t, "u": u.tolist(), "reward_verifier": r_verifier}
            point |= {"reward_coherence": r_coherence, "reward": reward, "ei": e, "answer": answer}
            points.append(point | {"text": outcome.text, "tokens": len(outcome.ids)})
        if watch:
            watch(t, points[-s.k :], verdict)
        f = [point["reward"] for point in points]
        gain = max(f) - max(f[: -s.k], default=-math.inf)
        stopped_by = "gain" if s.stop_on == "gain" and gain < s.stop_threshold else "rounds"
        if stopped_by == "gain" or t + 1 == s.rounds:
            break
        # Fit the Gaussian process to all points, and choose k more by Expected Improvement.
        gp = GP.fit([point["u"] for point in points], f)
        unverified = s.reward != "coherence" and not any(p["reward_verifier"] for p in points)
        if unverified:  # +1 is still to be had: f's std is then 0.5 or more, not the coherences'
            gp = GP(gp.x, gp.y, gp.lengthscale, max(1, (0.5 / gp.y_std) ** 2), gp.noise)
        if s.acquisition == "random":
            U = torch.randn(s.k, d, generator=generator, dtype=torch.float64)
            expected = expected_improvement(*gp.posterior(U), max(f))
        else:
            U, expected = suggest(gp, s.k, None, s.acquisition, generator, s.kappa)
        ei = expected.tolist()
        if s.stop_on == "ei" and max(ei) < s.stop_threshold and not unverified:
            stopped_by = "ei"
            break
    text, spent = chosen(question, points, verdicts, s.select), sum(v["tokens"] for v in verdicts)
    found = record(text, [p["answer"] for p in points], [p["tokens"] for p in points], spent)
    found |= {"points": points, "verdicts": verdicts, "stopped_by": stopped_by}
    return found | {"rounds": t + 1}


def verify(
    model: Transformer, tokenizer: Tokenizer, q: Question, texts: list[str], verdicts: list[dict]
) -> Generator:
    """y_v: the same model's answer when it is shown the question and the candidates."""
    for whole in (True, False):  # without their thoughts if these leave too little of the context
        message = q.judge(q, texts, verdicts) if q.judge else verifier_message(q, texts, whole)
        if len(tokenizer.encode(tokenizer.open(message))) <= 0.75 * model.config.context:
            (outcome,) = yield [Generation(encoded(model, tokenizer, message))]
            answer, said = q.read(outcome.text), split_thought(outcome.text)[1]
            # "Candidate 2 is right" names a candidate, not the number 2.
            named = re.search(r"candidate\W*(\d+)\W*(?:is|has|gives)\b", said, re.IGNORECASE)
            if named and answer == named[1] and int(answer) <= len(texts):
                answer = q.read(texts[int(answer) - 1])
            return {"answer": answer, "text": outcome.text, "tokens": len(outcome.ids)}
    return {"answer": None, "text": "", "tokens": 0}


def coherence(outcome: Outcome, kind: str, position: int = 0) -> float:
    """r_coherence, of what follows the perturbed token: up to it all candidates are the same."""
    probs = outcome.probs[position + 1 :] or [1.0]
    if kind == "prob":
        return sum(probs) / len(probs)
    logs = [math.log(max(p, 1e-38)) for p in probs]
    return sum(logs) / (len(logs) if kind == "mean" else 1)


def chosen(question: Question, points: list[dict], verdicts: list[dict], select: str) -> str:
    """The text of the best point that gives an answer, or of the best with the majority's."""
    given = [point for point in points if point["answer"] is not None] or points
    answers = [said["answer"] for said in points + verdicts]
    i = question.vote(answers, question.same) if select == "vote" else None
    if i is not None:
        given = [v for v in given + verdicts if question.same(v["answer"], answers[i])] or given
    return max(given, key=lambda said: said.get("reward", -math.inf))["text"]


def record(text: str, answers: list, tokens: list[int], verification: int = 0) -> dict:
    """What every search returns; tokens of each generation, and those of the verifications."""
    thought, said = split_thought(text)
    found = {"thought_text": thought, "answer_text": said, "answers": answers, "tokens": tokens}
    found |= {"generation_tokens": sum(tokens), "verification_tokens": verification}
    return found | {"answer_tokens": sum(tokens) + verification}


# -------------------------------------------------------------------------- the same for a batch


class Perturbed:
    """`generate_one` for every row. Notes: the token's probability [rows]."""

    def __init__(self, model: Transformer, rows: int):
        self.model, self.offset = model, torch.zeros(rows, model.config.d, device=model.device)
        self.position = torch.zeros(rows, dtype=torch.long, device=model.device)

    def begin(self, row: int, request: Request) -> None:
        g: Generation = request.data[-1]
        self.position[row] = g.position
        self.offset[row] = 0 if g.offset is None else g.offset.to(self.offset)

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, Tensor, Tensor]:
        token = logits.argmax(-1)
        z = self.model.embed(token)
        x = (z + self.offset * (at.t == self.position)[:, None]).to(z.dtype)
        return token, x, torch.softmax(logits, -1).gather(1, token[:, None])[:, 0]


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
    """Many searches in one batch; yields (index, `search`'s record with seconds) as each finishes.

    batch_size: rows decoded side by side, in use or not. order: which questions (default: all).
    """
    if settings.dimension > model.config.d:
        larger = f"{settings.dimension} is larger than the embedding's {model.config.d}"
        raise UserError(f"--dimension {larger}: lower it")
    start = partial(search, model, tokenizer, s=settings, seed=seed, watch=watch)
    most = settings.k * settings.max_new_tokens  # a verifier reads the candidates, too
    yield from run(model, tokenizer, questions, start, Perturbed, settings, batch_size, most, order)


def run(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[Question],
    start: Callable[[Question], Search],
    method: Callable[[Transformer, int], Any],
    s: Settings,
    batch_size: int,
    longest: int = 0,
    order: Iterator[int] | None = None,
) -> Iterator[tuple[int, dict]]:
    """Run a search for each question, with a method for decode that is made for model and rows.

    While one waits for outcomes, others use its rows. longest: tokens of a prompt after q.text's.
    """
    lengths = [len(encoded(model, tokenizer, q.text).embeds) for q in questions]
    rows = model.plan(batch_size, max(lengths, default=1) + longest, s.max_new_tokens)
    queue, finished = deque(), []
    running: dict[int, list] = {}  # index -> [search, outcomes, start, not finite, last prompt]

    def advance(index: int, outcomes: list[Outcome] | None) -> None:
        current, _, began, cut, last = running[index]
        try:
            wanted = current.send(outcomes)
        except StopIteration as end:
            del running[index]
            about = {"not_finite": cut, "seconds": time.perf_counter() - began}
            finished.append((index, end.value | about))
            return
        running[index][1] = [None] * len(wanted)
        for i, g in enumerate(wanted):
            if g.prompt.cache is None:  # it begins as the last one does: with the question
                g.prompt.like, running[index][4] = last, g.prompt
            queue.append(Request(g.prompt, g.seeds, (index, i, g)))

    def requests() -> Iterator[Request | None]:
        for index in order or range(len(questions)):
            running[index] = [start(questions[index]), None, time.perf_counter(), 0, None]
            advance(index, None)
            while queue:  # the next one is opened when those that are have nothing to do
                yield queue.popleft()
        while True:
            yield queue.popleft() if queue else None

    for output in decode(model, requests(), method(model, rows), rows, s.max_new_tokens, keep=2):
        index, i, _ = output.request.data
        text = tokenizer.decode([t for t in output.ids if t not in model.config.eos_ids])
        running[index][3] += not output.finite
        outcomes = running[index][1]
        outcomes[i] = Outcome(text, output.ids, *(note.tolist() for note in output.notes))
        if None not in outcomes:
            advance(index, outcomes)
        yield from finished
        finished.clear()


if __name__ == "__main__":
    from baselines import sampling
    from lab import cli, show

    cli.main(__doc__, sampling.Settings, sampling.reason, show.Search)
