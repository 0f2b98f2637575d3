"""Soft Reasoning: Bayesian optimisation of the first answer token's embedding (Zhu et al., arXiv 2505.24688).

    python soft_reasoning.py --model qwen2.5-7b --question "What is 17 * 24?"

Everything after the first answer token is decoded greedily, so an answer is a function of that token's embedding:

    x = z + sigma u A      z the greedy first token's embedding, u in R^d, A in R^(d x D) with entries N(0, 1/d)
    y(x)                   the greedy continuation of prompt and x
    f(x) = r_verifier + r_coherence
    r_verifier  = 1[answer of y = y_v]    y_v: the same model's answer when shown the question and the candidates
    r_coherence = mean probability of y's tokens (the official code), or sum or mean of their logs (the paper: sum)

Round 0 evaluates k points u ~ N(0, I).  Each later round fits a Gaussian process to all points so far and evaluates the
k that maximise Expected Improvement together (gp.py), until no improvement is expected, or the rounds are over.

Where the official code is faulty we do not follow it: its RBF lengthscale of 1 in 50 dimensions makes all points
unrelated, so that its search is random (ours scales with sqrt(d) and is fitted), and its Expected Improvement has the
sign of its argument turned round.  Baselines: --method greedy, sc (self-consistency), fire, cot-decoding.
"""

import argparse
import hashlib
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tasks
from gp import GP, expected_improvement, suggest
from model import (
    KVCache,
    Prompt,
    Request,
    Tokenizer,
    Transformer,
    UserError,
    check_prompt,
    decode,
    load,
)

# ----------------------------------------------------------------------------------------------------------- settings


def flag(default, help: str, **options):
    return field(default=default, metadata={"help": help, **options})


METHODS = ("soft", "greedy", "sc", "fire", "cot-decoding")


@dataclass(frozen=True)
class Settings:
    """Everything that changes what is generated, but for the seed.  Each field is a flag.  ValueError for nonsense."""

    method: str = flag("soft", "soft: the paper; greedy; sc: self-consistency; fire: hot first token; cot-decoding: "
                               "branches on the most probable first tokens", choices=METHODS)
    k: int = flag(5, "k: points evaluated in each round")
    rounds: int = flag(5, "rounds at most, round 0 included")
    dimension: int = flag(50, "d: of the space that is searched")
    sigma: float = flag(1.0, "sigma: standard deviation of each coordinate of x - z")
    acquisition: str = flag("ei", "how later points are chosen", choices=("ei", "ucb", "pi", "random"))
    reward: str = flag("both", "what is maximised", choices=("verifier", "coherence", "both"))
    coherence: str = flag("prob", "prob: mean probability of the tokens; mean, sum: of their log-probabilities (paper: sum)",
                          choices=("prob", "mean", "sum"))
    select: str = flag("best", "best: the answer of the best point (paper); vote: majority of candidates and verifiers (code)",
                       choices=("best", "vote"))
    stop_on: str = flag("ei", "stop when this is below the threshold: the best EI, or the gain of a round", choices=("ei", "gain"))
    stop_threshold: float = flag(0.01, "stop below this")
    num_samples: int = flag(25, "answers that sc, fire and cot-decoding vote over")
    temperature: float = flag(0.6, "of sc, and of fire after its first token (paper: 0.4, 0.6, 0.8)")
    first_temperature: float = flag(30.0, "of fire's first token")
    first_top_k: int = flag(16, "fire's first token is one of so many most probable ones")
    max_new_tokens: int = flag(4096, "of each generation; the context window ends it too")

    def __post_init__(self):
        for name in ("k", "rounds", "dimension", "num_samples", "first_top_k", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("sigma", "temperature", "first_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.stop_threshold >= 0:
            raise ValueError(f"stop_threshold must be at least 0, not {self.stop_threshold}")

    @property
    def at_once(self) -> int:
        """Generations that one search can have in work at the same time."""
        return {"soft": self.k, "greedy": 1}.get(self.method, self.num_samples)


# ----------------------------------------------------------------------------------------------------- one generation


@dataclass(frozen=True, eq=False)
class Generation:
    """What a search asks for: a greedy continuation of the prompt, but for what the fields say."""

    prompt: Prompt
    offset: Tensor | None = None  # [D]: added to the first token's embedding, x - z
    rank: int = 0  # the first token is the one of this rank, 0 the most probable
    first_temperature: float = 0.0  # 0: the first token is not sampled
    temperature: float = 0.0  # 0: later tokens are not sampled
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Outcome:
    """What came of it: text without the end-of-sequence token, ids with it, and two numbers per token."""

    text: str
    ids: list[int]
    probs: list[float]  # the model's own probability of each token
    margins: list[float]  # p(most probable) - p(second) at each token


class Rollouts:
    """What `decode` asks at each step: the rules of every row in one batch, with all state on the device."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, settings: Settings, rows: int):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        device, N = model.embed.weight.device, min(settings.max_new_tokens, model.config.context)
        self.eos = torch.tensor(model.config.eos_ids, device=device)
        self.jobs: list[tuple | None] = [None] * rows  # (search, place, generation)

        def per_row(*shape: int, dtype=torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.t, self.limit = per_row(dtype=torch.long), per_row(dtype=torch.long)
        self.offset = per_row(model.config.d)
        self.rank = per_row(dtype=torch.long)
        self.heat = per_row(2)  # temperature of the first token, of the others
        self.tokens, self.probs, self.margins = (
            per_row(N + 1, dtype=torch.long), per_row(N + 1), per_row(N + 1))  # the last place: what comes when all is over
        self.u = per_row(N + 1)  # the uniform draw of each step

    def begin(self, row: int, request: Request) -> None:
        g: Generation = request.data[-1]
        self.jobs[row] = request.data
        self.t[row], self.rank[row] = 0, g.rank
        self.limit[row] = min(self.settings.max_new_tokens, self.model.config.context - len(request.prompt.embeds))
        self.offset[row] = 0 if g.offset is None else g.offset.to(self.offset)
        self.heat[row] = torch.tensor([g.first_temperature, g.temperature])
        if g.first_temperature or g.temperature:
            self.u[row] = torch.from_numpy(np.random.default_rng(g.seeds).random(self.u.shape[1], dtype=np.float32))

    def step(self, logits: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [rows, V] -> next embeddings [rows, D], finished rows [rows]; those not live stay at their t."""
        s = self.settings
        rows = torch.arange(len(logits), device=logits.device)
        t = self.t.clone()
        p = torch.softmax(logits, -1)
        width = max(2, s.num_samples) if s.method == "cot-decoding" else 2
        top, ids = p.topk(min(width, p.shape[1]))  # [rows, width]
        first = t == 0
        # argmax, not the first of top-k: of equally probable tokens the two may name different ones.
        branch = ids.gather(1, self.rank[:, None])[:, 0]
        token = torch.where(first & (self.rank > 0), branch, logits.argmax(-1))
        if s.method in ("sc", "fire"):  # sampling by inverting the distribution function
            heat = self.heat[rows, (~first).long()]
            hot = torch.softmax(logits / heat.clamp(min=1e-3)[:, None], -1)
            if s.method == "fire":
                hot = hot.masked_fill(first[:, None] & (hot < hot.topk(min(s.first_top_k, hot.shape[1])).values[:, -1:]), 0)
            mass = hot.cumsum(-1)
            token = (mass < self.u[rows, t, None] * mass[:, -1:]).sum(-1)
        # x = z + sigma u A.  What is added is 0 but for the first token of a candidate.
        embeds = self.model.embed(token)
        embeds = (embeds + self.offset * first[:, None]).to(embeds.dtype)
        self.tokens[rows, t], self.probs[rows, t] = token, p.gather(1, token[:, None])[:, 0]
        self.margins[rows, t] = top[:, 0] - top[:, 1]
        self.t += live
        return embeds, (token[:, None] == self.eos).any(-1) | (t + 1 >= self.limit)

    def end(self, row: int) -> tuple[tuple, Outcome]:
        ids, probs, margins = (x[row, : int(self.t[row])].tolist() for x in (self.tokens, self.probs, self.margins))
        text = self.tokenizer.decode([i for i in ids if i not in self.model.config.eos_ids])
        return self.jobs[row], Outcome(text, ids, probs, margins)


# ------------------------------------------------------------------------------------------------- prompts and answers


VERIFY = "Which answer is right?"


def build_prompt(tokenizer: Tokenizer, message: str) -> str:
    """The chat, ready to be answered; a model that has a token for <think> begins to think."""
    text = tokenizer.render(message, date_string="26 Jul 2024")  # some Llama templates would print today's date
    text = re.sub(r"<think>\s*</think>\s*$", "", text)  # a template that skips the thought is not followed in that
    opens = tokenizer.core.token_to_id("<think>") is not None and not text.rstrip().endswith("<think>")
    return text + "<think>\n" if opens else text


def split_thought(text: str) -> tuple[str, str]:
    """(thought, what is said after it); a model without thinking tokens only says."""
    thought, marker, said = text.rpartition("</think>")
    return (thought.removeprefix("<think>").strip(), said.strip()) if marker else ("", text.strip())


def verifier_message(message: str, texts: list[str], whole: bool = True, form: str = "") -> str:
    """The question, each candidate on a line (whole, or without its thought), what is asked, and in which form."""
    said = [" ".join(part for part in split_thought(text)[0 if whole else 1:] if part) for text in texts]
    lines = [f"Candidate {i}: {' '.join(text.split())}" for i, text in enumerate(said, 1)]
    return "\n".join([message, *lines, " ".join(part for part in (VERIFY, form) if part)])


@dataclass(frozen=True, eq=False)
class Question:
    """One problem to be searched: what the user says, how its answer is read, and where its randomness begins."""

    index: int
    message: str
    kind: str
    choices: dict | None
    tolerance: float
    seeds: tuple[int, ...]
    form: str = ""  # tells a verifier in which form to answer; the bundled model knows no such sentence

    def read(self, text: str) -> str | None:
        """The answer in a text: in what is said after the thought, or else anywhere."""
        return tasks.extract(split_thought(text)[1], self.kind, self.choices) or tasks.extract(text, self.kind, self.choices)

    def same(self, a: str | None, b: str | None) -> bool:
        return a is not None and b is not None and tasks.grade(a, b, self.kind, self.tolerance)

    def vote(self, answers: list[str | None], weights: list[float] | None = None) -> str | None:
        """The answer with the largest weight (by default: the most frequent one), the earliest among equals."""
        groups: list[list] = []  # [answer, weight]
        for answer, weight in zip(answers, weights or [1.0] * len(answers)):
            if answer is not None:
                group = next((g for g in groups if self.same(answer, g[0])), None)
                if group is None:
                    groups.append([answer, weight])
                else:
                    group[1] += weight
        return max(groups, key=lambda g: g[1])[0] if groups else None


# A search is a generator: it yields the generations that it wants next, is sent their outcomes, and returns its record.
Search = Generator[list[Generation], list[Outcome], dict]


class Searcher:
    """The methods.  Each turns a question into a search; `watch(round, points, verdict)` is called after every round."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, settings: Settings, watch: Callable | None = None):
        self.model, self.tokenizer, self.settings, self.watch = model, tokenizer, settings, watch
        if settings.method == "soft" and settings.dimension > model.config.d:
            raise UserError(f"--dimension {settings.dimension} is larger than the embedding's {model.config.d}: lower it")

    def prompt(self, message: str) -> Prompt:
        ids = self.tokenizer.encode(build_prompt(self.tokenizer, message))
        check_prompt(self.model.config, ids)
        return Prompt(self.model.embed(torch.tensor(ids, device=self.model.embed.weight.device)))

    def search(self, question: Question) -> Search:
        run = {"soft": self.soft, "greedy": self.greedy, "sc": self.sampled, "fire": self.sampled,
               "cot-decoding": self.cot_decoding}[self.settings.method]
        return run(question, self.prompt(question.message))

    # -- the paper's method

    def soft(self, question: Question, prompt: Prompt) -> Search:
        s, d = self.settings, self.settings.dimension
        generator = torch.Generator().manual_seed(int(np.random.default_rng(question.seeds).integers(2**63)))
        # A's entries have variance 1/d, so each coordinate of u A has variance 1: sigma is that of x - z.
        A = torch.randn(d, self.model.config.d, generator=generator) / math.sqrt(d)
        U, ei = torch.randn(s.k, d, generator=generator, dtype=torch.float64), [None] * s.k
        points, verdicts, verification, stop = [], [], 0, "rounds"
        for number in range(s.rounds):
            best_before = max((point["reward"] for point in points), default=-math.inf)
            outcomes = yield [Generation(prompt, offset=s.sigma * (u.float() @ A)) for u in U]
            answers = [question.read(outcome.text) for outcome in outcomes]
            verdict = None
            if s.reward != "coherence":
                verdict = yield from self.verify(question, [outcome.text for outcome in outcomes])
                verification += verdict["tokens"]
                verdicts.append(verdict)
            for u, e, outcome, answer in zip(U, ei, outcomes, answers):
                agrees = float(question.same(answer, verdict["answer"])) if verdict else None
                sense = self.coherence(outcome)
                if not math.isfinite(sense):
                    raise UserError(f"the perturbed embedding makes the model's output not finite: lower --sigma {s.sigma}, or "
                                    "use --dtype bfloat16")
                points.append({"round": number, "u": u.tolist(), "reward_verifier": agrees, "reward_coherence": sense,
                               "reward": (agrees if s.reward != "coherence" else 0.0) + (sense if s.reward != "verifier" else 0.0),
                               "ei": e, "answer": answer, "text": outcome.text, "tokens": len(outcome.ids)})
            if self.watch:
                self.watch(number, points[-s.k:], verdict)
            gain = max(point["reward"] for point in points) - best_before
            if s.stop_on == "gain" and gain < s.stop_threshold:
                stop = "gain"
                break
            if number + 1 < s.rounds:
                x, f = [point["u"] for point in points], [point["reward"] for point in points]
                gp = GP.fit(x, f)
                if s.acquisition == "random":
                    U = torch.randn(s.k, d, generator=generator, dtype=torch.float64)
                    expected = expected_improvement(*gp.posterior(U), max(f))
                else:
                    U, expected = suggest(gp, s.k, acquisition=s.acquisition, generator=generator)
                ei = expected.tolist()
                if s.stop_on == "ei" and max(ei) < s.stop_threshold:
                    stop = "ei"
                    break
        answered = [point for point in points if point["answer"] is not None] or points
        if s.select == "vote":
            chosen = question.vote([point["answer"] for point in points] + [verdict["answer"] for verdict in verdicts])
            said = [verdict for verdict in verdicts if question.same(verdict["answer"], chosen)]
            answered = [point for point in answered if question.same(point["answer"], chosen)] or \
                       [{"text": verdict["text"], "reward": 0.0} for verdict in said] or answered
        best = max(answered, key=lambda point: point["reward"])
        return self.record(best["text"], [point["answer"] for point in points], [point["tokens"] for point in points],
                           verification, points=points, verdicts=verdicts, stopped_by=stop, rounds=points[-1]["round"] + 1)

    def verify(self, question: Question, texts: list[str]) -> Generator:
        """y_v of these candidates.  They are shown with their thoughts if that leaves a quarter of the context for the
        reply, else without; if that is too long too, there is no answer and no reward."""
        context = self.model.config.context
        for whole in (True, False):
            message = verifier_message(question.message, texts, whole, question.form)
            if len(self.tokenizer.encode(build_prompt(self.tokenizer, message))) <= context - context // 4:
                (outcome,) = yield [Generation(self.prompt(message))]
                # "Candidate 2 is right" names a candidate, not the number 2.
                named = re.search(r"candidate\W*(\d+)\W*(?:is|has|gives)\b", split_thought(outcome.text)[1], re.IGNORECASE)
                answer = question.read(outcome.text)
                if named and answer == named[1] and int(answer) <= len(texts):
                    answer = question.read(texts[int(answer) - 1])
                return {"answer": answer, "text": outcome.text, "tokens": len(outcome.ids)}
        return {"answer": None, "text": "", "tokens": 0}

    def coherence(self, outcome: Outcome) -> float:
        """r_coherence of the tokens after the first, whose embedding is ours and not the model's choice."""
        probs = outcome.probs[1:] or [1.0]
        if self.settings.coherence == "prob":
            return sum(probs) / len(probs)
        logs = [math.log(max(p, 1e-38)) for p in probs]
        return sum(logs) / (len(logs) if self.settings.coherence == "mean" else 1)

    # -- the baselines

    def greedy(self, question: Question, prompt: Prompt) -> Search:
        (outcome,) = yield [Generation(prompt)]
        return self.record(outcome.text, [question.read(outcome.text)], [len(outcome.ids)])

    def sampled(self, question: Question, prompt: Prompt) -> Search:
        """Self-consistency (2203.11171), and FIRE (2410.21236): the same with a hot first token.  Majority vote."""
        s = self.settings
        first = s.temperature if s.method == "sc" else s.first_temperature
        outcomes = yield [Generation(prompt, first_temperature=first, temperature=s.temperature, seeds=(*question.seeds, i))
                          for i in range(s.num_samples)]
        return self.voted(question, outcomes, None)

    def cot_decoding(self, question: Question, prompt: Prompt) -> Search:
        """CoT-decoding (2402.10200): greedy after each of the most probable first tokens; a branch's vote weighs as much
        as the mean margin between the two best tokens where its answer stands."""
        width = min(self.settings.num_samples, self.model.config.vocab_size)
        outcomes = yield [Generation(prompt, rank=rank) for rank in range(width)]
        return self.voted(question, outcomes, [self.margin(question, outcome) for outcome in outcomes])

    def margin(self, question: Question, outcome: Outcome) -> float:
        """Mean p(most probable) - p(second) over the tokens of the answer's last occurrence; 0 without an answer."""
        answer = question.read(outcome.text)
        pieces = [self.tokenizer.decode([i]) for i in outcome.ids]
        places = list(re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", "".join(pieces), re.IGNORECASE)) if answer else []
        if not places:
            return 0.0
        start, end = places[-1].span()
        stops = np.cumsum([len(piece) for piece in pieces])
        inside = [m for m, piece, stop in zip(outcome.margins, pieces, stops) if stop > start and stop - len(piece) < end]
        return sum(inside) / len(inside)

    def voted(self, question: Question, outcomes: list[Outcome], weights: list[float] | None) -> dict:
        answers = [question.read(outcome.text) for outcome in outcomes]
        chosen = question.vote(answers, weights)
        text = next((o.text for o, a in zip(outcomes, answers) if question.same(a, chosen)), outcomes[0].text)
        return self.record(text, answers, [len(o.ids) for o in outcomes], weights=weights, texts=[o.text for o in outcomes])

    @staticmethod
    def record(text: str, answers: list, tokens: list[int], verification: int = 0, **more) -> dict:
        thought, said = split_thought(text)
        return {"thought_text": thought, "answer_text": said, "answers": answers, "tokens": tokens,
                "generation_tokens": sum(tokens), "verification_tokens": verification,
                "answer_tokens": sum(tokens) + verification, **more}


def reason(model: Transformer, tokenizer: Tokenizer, questions: list[Question], settings: Settings = Settings(),
           batch_size: int | None = None, watch: Callable | None = None) -> Iterator[tuple[int, dict]]:
    """Search for many questions in one batch; yields (question.index, record) as each is finished.

    A search that waits for outcomes leaves its rows to the others.  No more searches are open at once than fill the
    batch (batch_size sequences; default: as many as the questions can use at once, at most 16).  A record holds answer_text, thought_text, answers and tokens (one per generation), generation_tokens,
    verification_tokens, answer_tokens (both), seconds, and for method soft: points (round, u, reward_verifier,
    reward_coherence, reward, ei, answer, text, tokens), verdicts, rounds, stopped_by ("ei" | "gain" | "rounds").
    """
    searcher = Searcher(model, tokenizer, settings, watch)
    for question in questions:  # all of them before the first is decoded
        check_prompt(model.config, tokenizer.encode(build_prompt(tokenizer, question.message)), question.message)
    if not questions:
        return
    longest = max(len(tokenizer.encode(build_prompt(tokenizer, q.message))) for q in questions)
    longest += settings.k * settings.max_new_tokens if settings.method == "soft" else 0  # the candidates, before the verifier
    rows = KVCache.fitting(model, batch_size or min(16, len(questions) * settings.at_once), longest, settings.max_new_tokens)
    waiting, queue = deque(questions), deque()
    running: dict[int, list] = {}  # question index -> [search, outcomes so far, when it began]
    finished: list[tuple[int, dict]] = []

    def advance(index: int, outcomes: list[Outcome] | None) -> None:
        search, _, began = running[index]
        try:
            wanted = search.send(outcomes)
        except StopIteration as end:
            del running[index]
            finished.append((index, end.value | {"seconds": time.perf_counter() - began}))
            return
        running[index][1] = [None] * len(wanted)
        queue.extend(Request(g.prompt, (index, place, g)) for place, g in enumerate(wanted))

    def requests() -> Iterator[Request | None]:
        while True:
            while not queue and waiting:  # open the next search only when the open ones have nothing to do
                question = waiting.popleft()
                running[question.index] = [searcher.search(question), None, time.perf_counter()]
                advance(question.index, None)
            yield queue.popleft() if queue else None

    for (index, place, _), outcome in decode(model, requests(), Rollouts(model, tokenizer, settings, rows), rows):
        outcomes = running[index][1]
        outcomes[place] = outcome
        if None not in outcomes:
            advance(index, outcomes)
        yield from finished
        finished.clear()


def question_of(index: int, message: str, seed: int, kind: str = "number", choices: dict | None = None,
                tolerance: float = 0, form: str = "") -> Question:
    seeds = (seed, int.from_bytes(hashlib.sha256(message.encode()).digest()[:8], "little"))
    return Question(index, message, kind, choices, tolerance, seeds, form)


# ---------------------------------------------------------------------------------------------------- the terminal view


class View:
    """One search, round by round: the candidates, what chose them, what they earned, and the best so far."""

    def __init__(self):
        self.points: list[dict] = []

    def __call__(self, number: int, points: list[dict], verdict: dict | None) -> None:
        self.points += points
        best = max(self.points, key=lambda point: point["reward"])
        print(f"round {number}" + (f": the verifier says {verdict['answer']}" if verdict else ""))
        for point in points:
            verifier = "-" if point["reward_verifier"] is None else f"{point['reward_verifier']:.0f}"
            ei = "" if point["ei"] is None else f"  EI {point['ei']:.4f}"
            print(f"  answer {point['answer'] or 'none':>8}  verifier {verifier}  coherence {point['reward_coherence']:.4f}  "
                  f"reward {point['reward']:.4f}{ei}{'  <- best' if point is best else ''}", flush=True)


WHY = {"ei": "no point is expected to improve by the threshold", "gain": "the last round gained less than the threshold",
       "rounds": "the rounds are over"}


# -------------------------------------------------------------------------------------------- what the records amount to


def shares(records: list[dict]) -> str:
    """Of method soft: any candidate right, tokens, and the share of questions that stopped in each round."""
    n, rounds = len(records), max(record["rounds"] for record in records)
    stopped = ", ".join(f"{sum(r['rounds'] == i for r in records) / n:.0%}" for i in range(1, rounds + 1))
    return (f"soft: {sum(r['any_correct'] for r in records) / n:.1%} have a right candidate (pass@k); tokens per question: "
            f"{sum(r['generation_tokens'] for r in records) / n:.0f} generated, "
            f"{sum(r['verification_tokens'] for r in records) / n:.0f} to verify; stopped after 1, 2, ... rounds: {stopped}")


def matched(soft: list[dict], other: list[dict], problems: list, task, by: str) -> tuple[float, float, int]:
    """Accuracy, mean tokens, and on how many questions it ran out of answers, of a voting method that may spend, on each question, only what soft spent on it.

    by "generations": as many answers as soft had candidates; by "tokens": answers until soft's tokens, verification
    included, are spent (at least one).
    """
    right, spent, capped = 0, 0, 0
    for problem, a, b in zip(problems, soft, other):
        n = len(a["answers"])
        if by == "tokens":
            n = max(1, int(np.searchsorted(np.cumsum(b["tokens"]), a["answer_tokens"], side="right")))
            capped += sum(b["tokens"]) < a["answer_tokens"]
        n = min(n, len(b["answers"]))
        question = question_of(0, problem.question, 0, problem.kind, problem.choices, task.tolerance)
        chosen = question.vote(b["answers"][:n], b["weights"][:n] if b["weights"] else None)
        right += tasks.grade(chosen, problem.answer, problem.kind, task.tolerance)
        spent += sum(b["tokens"][:n])
    return right / len(problems), spent / len(problems), capped


def analyse(model: Transformer, tokenizer: Tokenizer, message: str, settings: Settings, seed: int, samples: int = 200) -> str:
    """The paper's mechanism study: do perturbed first tokens put other MLP neurons to work than sampled ones do?

    A neuron is active where its gate, silu's argument, is above 0.  Counted per layer over the first five tokens that
    are fed, the first included, of `samples` generations each.
    """
    lines, results = [], {}
    for name in ("perturbed", "sampled"):
        method = "soft" if name == "perturbed" else "sc"
        s = Settings(**asdict(settings) | {"method": method, "max_new_tokens": 6})
        searcher, question = Searcher(model, tokenizer, s), question_of(0, message, seed)
        prompt = searcher.prompt(message)
        while not prompt.ready:
            prompt.prefill(model)
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(s.dimension, model.config.d, generator=generator) / math.sqrt(s.dimension)
        wanted = [Generation(prompt, offset=s.sigma * (torch.randn(s.dimension, generator=generator) @ A)) if name == "perturbed"
                  else Generation(prompt, first_temperature=s.temperature, seeds=(*question.seeds, i)) for i in range(samples)]
        active = [[] for _ in model.blocks]

        def count(layer: list, module: torch.nn.Module, inputs: tuple, out: Tensor) -> None:
            layer.append((out[..., : model.config.ffn] > 0).float().mean(-1).flatten().cpu())

        hooks = [block.mlp.gate_up.register_forward_hook(partial(count, layer)) for block, layer in zip(model.blocks, active)]
        for _ in decode(model, [Request(prompt, (0, i, g)) for i, g in enumerate(wanted)], Rollouts(model, tokenizer, s, samples), samples):
            pass
        for handle in hooks:
            handle.remove()
        active = [torch.cat(a[1:]) for a in active]  # without the first step, which is fed the prompt's last token
        results[name] = [(a.mean().item(), a.std().item()) for a in active]
    lines.append("active MLP neurons, first five tokens: mean (standard deviation over tokens and samples)")
    lines.append("layer  perturbed        sampled          difference")
    for i, (p, q) in enumerate(zip(results["perturbed"], results["sampled"])):
        lines.append(f"{i:5}  {p[0]:.4f} ({p[1]:.4f})  {q[0]:.4f} ({q[1]:.4f})  {p[0] - q[0]:+.4f}")
    ((_, record),) = reason(model, tokenizer, [question_of(0, message, seed)],
                            Settings(**asdict(settings) | {"method": "soft", "stop_threshold": 0.0}))
    best = torch.tensor(max(record["points"], key=lambda point: point["reward"])["u"])
    lines += ["", "how the search's points concentrate", "round  distance to the best point  distance to each other  norm  reward"]
    for number in range(record["rounds"]):
        points = [point for point in record["points"] if point["round"] == number]
        U = torch.tensor([point["u"] for point in points])
        apart = torch.pdist(U).mean().item() if len(U) > 1 else 0.0
        lines.append(f"{number:5}  {(U - best).norm(dim=1).mean():26.2f}  {apart:22.2f}  {U.norm(dim=1).mean():4.1f}  "
                     f"{sum(point['reward'] for point in points) / len(points):.4f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ command line


TINY = str(Path(__file__).resolve().parent / "tiny" / "base")  # the bundled model


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="soft_reasoning.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(fail(message))  # one line, without the usage
    parser.add_argument("--model", default=TINY, help="alias such as qwen2.5-7b, Hugging Face id, or folder (default: bundled)")
    parser.add_argument("--question", help="answer this one in the terminal, with a number (default: a problem of the task tiny)")
    parser.add_argument("--analyse", action="store_true", help="the paper's mechanism study, on the question")
    parser.add_argument("--task", help=f"score a benchmark: {', '.join(tasks.TASKS)}")
    parser.add_argument("--data", metavar="FILE", help="score your own JSON lines: question, answer, optional choices, steps")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--methods", help=f"with --task: several, compared problem by problem (default: {','.join(METHODS)})")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences decoded side by side (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, or cuda:N (default: cuda where there is one)")
    parser.add_argument("--quantize", choices=["int8"], help="keep the weights in 8 bits: half the memory of bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step first: for long runs")
    parser.add_argument("--dtype", help="bfloat16, float16, or float32 (default: what the device is fast at)")
    parser.add_argument("--output", metavar="FILE", help="append one JSON line per question, with every point; started again, it goes on")
    parser.add_argument("--json", metavar="FILE", help="with --task: the table as JSON")
    for f in fields(Settings):
        said = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, choices=f.metadata.get("choices"), default=argparse.SUPPRESS,
                            help=said)
    return parser


def fail(message: str) -> int:
    print("soft_reasoning.py:", " ".join(message.split()), file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    args = command_line().parse_args(arguments)
    try:
        for name, low in (("seed", 0), ("batch_size", 1)):
            if getattr(args, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
        if args.question is not None and (args.task or args.data):
            raise UserError("--question asks one question, --task and --data score many: pass one of them")
        for name in ("limit", "methods", "json"):
            if getattr(args, name) is not None and not (args.task or args.data):
                raise UserError(f"--{name} goes with --task or --data")
        if args.analyse and (args.task or args.data or args.output):
            raise UserError("--analyse studies one question and prints: it goes with none of --task, --data, --output")
        score(args) if args.task or args.data else answer(args)
    except (UserError, tasks.UserError) as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail("out of GPU memory: lower --batch-size or --max-new-tokens, or use a smaller --model")
    except KeyboardInterrupt:
        print("\ninterrupted" + (f"; what was finished is in {args.output}" if args.output else ""), file=sys.stderr)
        return 130
    return 0


def settings_of(args: argparse.Namespace, method: str | None = None) -> Settings:
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    try:
        return Settings(**given | ({"method": method} if method else {}))
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from None


def recorded(args: argparse.Namespace, settings: Settings, model: Transformer) -> dict:
    """Everything that decides what is generated, for the records: other settings are not mixed in one file."""
    weight = model.embed.weight
    return {"model": args.model, "device": weight.device.type, "dtype": str(weight.dtype)[6:], "quantize": args.quantize,
            "compile": args.compile, "seed": args.seed} | asdict(settings)


def answer(args: argparse.Namespace) -> None:
    """One question in the terminal."""
    settings, gold = settings_of(args), None
    if args.question is None:
        problem = tasks.load("tiny", limit=1)[0]
        args.question, gold = problem.question, problem.answer
        print(args.question)
    if not args.question.strip():
        raise UserError("the question is empty: pass --question TEXT")
    if args.analyse and args.compile:
        raise UserError("--analyse looks into the layers, which are not there any more after --compile: leave one out")
    model, tokenizer = load(args.model, args.device, args.dtype, args.quantize, args.compile)
    if args.analyse:
        print(analyse(model, tokenizer, args.question, settings, args.seed))
        return
    kept, key = recorded(args, settings, model), ("question", "method", "seed")
    if args.output and (args.question, settings.method, args.seed) in tasks.resume(args.output, {settings.method: kept}, key):
        print(f"{args.output} holds this search already", file=sys.stderr)
        return
    # The bundled model knows its own stories only; others are told what form the answer takes.
    form = "" if args.model == TINY else tasks.INSTRUCTION["number"]
    question = question_of(0, "\n\n".join(part for part in (args.question, form) if part), args.seed, form=form)
    ((_, record),) = reason(model, tokenizer, [question], settings, min(args.batch_size, settings.at_once), View())
    if args.output:
        tasks.append(args.output, {"question": args.question, "method": settings.method, "seed": args.seed, "settings": kept} | record)
    stopped = f"stopped after round {record['rounds'] - 1}: {WHY[record['stopped_by']]}\n" if "rounds" in record else ""
    print(f"{stopped}{record['answer_text'] or record['thought_text']}")
    if not any(record["answers"]):
        print("unanswered: no candidate gives an answer that can be read")
    print(f"{len(record['answers'])} generations of {record['generation_tokens']} tokens, {record['verification_tokens']} tokens to verify, "
          f"{record['answer_tokens'] / record['seconds']:.1f} tokens/s" + (f"  (the right answer is {gold})" if gold else ""))


def score(args: argparse.Namespace) -> None:
    """A benchmark: every method on the same problems, graded, recorded, and compared, also at equal cost."""
    methods = args.methods.split(",") if args.methods else [args.method] if hasattr(args, "method") else list(METHODS)
    if wrong := [m for m in methods if m not in METHODS]:
        raise UserError(f"--methods: no method {wrong[0]!r}; there are {', '.join(METHODS)}")
    wanted = {method: settings_of(args, method) for method in methods}
    name = args.task or "data"
    problems, task = tasks.load(name, args.data, args.limit), tasks.TASKS[name]
    model, tokenizer = load(args.model, args.device, args.dtype, args.quantize, args.compile)

    def solver(settings: Settings) -> Callable:
        def solve(jobs: list[tuple[tasks.Problem, int]]) -> Iterator[tuple[tasks.Problem, int, dict]]:
            questions = [question_of(i, tasks.prompt(p, task), args.seed, p.kind, p.choices, task.tolerance,
                                     tasks.INSTRUCTION[p.kind] if task.instruct else "") for i, (p, _) in enumerate(jobs)]
            for i, record in reason(model, tokenizer, questions, settings, min(args.batch_size, len(problems) * settings.at_once)):
                yield *jobs[i], record
        return solve

    _, records = tasks.run(problems, task, {method: (recorded(args, settings, model), solver(settings)) for method, settings in wanted.items()},
                        1, args.output, args.json)
    of = {method: [records[problem.id, method, 0] for problem in problems] for method in methods}
    print()
    if "soft" in of:
        print(shares(of["soft"]))
        for method in ("sc", "fire", "cot-decoding"):
            for by in ("generations", "tokens") if method in of else ():
                accuracy, tokens, capped = matched(of["soft"], of[method], problems, task, by)
                low, high = tasks.wilson(accuracy, len(problems))
                short = f"; on {capped} of {len(problems)} its --num-samples were too few to spend as much" if capped else ""
                print(f"{method}, on each question no more {by} than soft: {accuracy:.1%} ({low:.1%} to {high:.1%}) with "
                      f"{tokens:.0f} tokens{short}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets question marks, not a traceback
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: the interpreter would take most of a second to unload PyTorch, also after Ctrl-C
