"""RAP, reasoning via planning: a tree search over steps (Hao et al. 2023, arXiv 2305.14992).

    python soft_reasoning.py --method rap

A state is the question and the steps so far, an action the next step. Monte Carlo tree search:

    r = p^alpha c^(1 - alpha)             reward of a step: self-evaluation p, confidence c
    Q = max of (mean r from here on)      over the paths that were taken through a state
    Q + w sqrt(ln N(parent) / N)          what selection maximises (UCT); Q is r before any visit

The paper shows a base model worked examples of sub-questions and their answers, and c is the share
of 8 sampled answers that agree. Here a chat model answers in its own form, without examples: a step
is a sentence or a line of it, and c the geometric mean of its tokens' probabilities. So the reward
of a step is known as soon as it is sampled, and the paper's stand-in for c (0.8) is not needed.
Steps are sampled without the top-k of 50 and the top-p of 0.95 that its public code has.
"""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

import soft_reasoning
from model import At, Prompt, Request, Tokenizer, Transformer, UserError
from model import check_ranges, draw, split_thought, text_seed
from soft_reasoning import Generation, Outcome, Question, Search, encoded, record, run


@dataclass(frozen=True)
class Settings(soft_reasoning.Settings):
    """Those of Soft Reasoning, and RAP's own; `select` is of both, RAP's vote weighs by reward."""

    rap_iterations: int = 10  # of rap: selections, each with its way to an answer
    rap_width: int = 4  # of rap: steps that are sampled after each state
    rap_depth: int = 5  # of rap: steps at most; the last one is greedy, and all the rest
    rap_exploration: float = 1.0  # w of rap: weight of what was tried seldom
    rap_alpha: float = 0.5  # alpha of rap: 1 rewards self-evaluation alone, 0 confidence alone
    rap_temperature: float = 0.8  # of rap's sampled steps

    def __post_init__(self):
        super().__post_init__()
        least = {"rap_iterations": 1, "rap_width": 1, "rap_depth": 1, "rap_alpha": 0}
        check_ranges(self, "rap_temperature", rap_exploration=0, **least)
        if self.rap_alpha > 1:
            raise ValueError(f"rap_alpha must be at most 1, not {self.rap_alpha}")


# ------------------------------------------------------------------------------------------- tree


@dataclass(eq=False)
class Node:
    """A state, and the reward of the step that leads to it."""

    ids: list[int]  # the answer so far
    rewards: list[float]  # of its steps
    ended: bool = False  # no step follows
    children: list["Node"] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)  # one for each visit

    @property
    def Q(self) -> float:
        return max(self.returns, default=self.rewards[-1])

    def uct(self, parent: "Node", w: float) -> float:
        visits = max(1, len(self.returns))
        return self.Q + w * math.sqrt(math.log(len(parent.returns)) / visits)


def select(root: Node, w: float) -> list[Node]:
    """The path from the root to a state without children that has the largest UCT at every step."""
    path = [root]
    while path[-1].children:
        path.append(max(path[-1].children, key=lambda child: child.uct(path[-1], w)))
    return path


def back_propagate(path: list[Node]) -> None:
    """A visit of each state: the mean reward from the step to it on (the root: of all steps)."""
    rewards = path[-1].rewards
    for node in path:
        rest = rewards[max(0, len(node.rewards) - 1) :]
        node.returns.append(sum(rest) / len(rest))


def answered(node: Node) -> Iterator[Node]:
    """The states at or below this one whose answer is complete, visited or not."""
    if node.ended:
        yield node
    for child in node.children:
        yield from answered(child)


# ----------------------------------------------------------------------------------------- search


def search(model: Transformer, tokenizer: Tokenizer, q: Question, s: Settings, seed: int) -> Search:
    """The record has, for each answer in the tree, its text and the rewards of its steps."""
    question, seeds = encoded(model, tokenizer, q.text), (seed, text_seed(q.text))
    root, tokens, verification = Node([], []), [], 0
    for _ in range(s.rap_iterations):
        path = select(root, s.rap_exploration)
        while not path[-1].ended:  # expansion, then simulation: the step of the largest reward
            node = path[-1]
            if not node.children:
                last = len(node.rewards) + 1 == s.rap_depth
                outcomes = yield actions(model, question, node, s, (*seeds, len(tokens)), last)
                tokens += [len(outcome.ids) for outcome in outcomes]
                steps = list({tuple(o.ids): o for o in outcomes}.values())  # equal ones are one
                useful, spent = yield from evaluate(model, tokenizer, q, node, steps)
                verification += spent
                for step, p in zip(steps, useful):
                    ids = node.ids + [i for i in step.ids if i not in model.config.eos_ids]
                    reward = p**s.rap_alpha * confidence(step) ** (1 - s.rap_alpha)
                    ended = last or step.probs[-1] > 0 or len(ids) >= s.max_new_tokens
                    node.children.append(Node(ids, [*node.rewards, reward], ended))
            path.append(max(node.children, key=lambda child: child.rewards[-1]))
        back_propagate(path)
    paths = [{"text": tokenizer.decode(n.ids), "rewards": n.rewards} for n in answered(root)]
    answers = [q.read(path["text"]) for path in paths]
    means = [sum(path["rewards"]) / len(path["rewards"]) for path in paths]
    i = q.vote(answers, q.same, means) if s.select == "vote" else None
    if i is None:  # the best path that gives an answer, or else the best
        i = max(range(len(paths)), key=lambda i: (answers[i] is not None, means[i]))
    return record(paths[i]["text"], answers, tokens, verification) | {"paths": paths}


def actions(
    model: Transformer, question: Prompt, node: Node, s: Settings, seeds: tuple, last: bool
) -> list["Action"]:
    """Samples of the next step, or the rest of the answer."""
    ids = torch.tensor(node.ids, dtype=torch.long, device=model.device)
    prompt = Prompt(torch.cat([question.embeds, model.embed(ids)]))
    if last:
        return [Action(prompt)]
    numbers, options = range(s.rap_width), {"kind": "step", "temperature": s.rap_temperature}
    return [Action(prompt, seeds=(*seeds, i), **options) for i in numbers]


def evaluate(
    model: Transformer, tokenizer: Tokenizer, q: Question, node: Node, steps: list[Outcome]
) -> Generator:
    """p of each step: P(yes), or 0.5 where the context has no room to ask; and the tokens spent."""
    before, useful, asked = tokenizer.decode(node.ids), [0.5] * len(steps), {}
    for i, step in enumerate(steps):
        text = tokenizer.open(evaluation_message(q, before, step.text))
        # A model that would think first answers at once.
        text += "</think>\n\n" if text.rstrip().endswith("<think>") else ""
        ids = tokenizer.encode(text)
        if len(ids) < model.config.context:
            embeds = model.embed(torch.tensor(ids, device=model.device))
            asked[i] = Action(Prompt(embeds), kind="judge")
    replies = (yield list(asked.values())) if asked else []
    for i, reply in zip(asked, replies):
        useful[i] = reply.probs[0]
    return useful, sum(len(reply.ids) for reply in replies)


def evaluation_message(q: Question, before: str, step: str) -> str:
    before, step = (" ".join(" ".join(split_thought(text)).split()) for text in (before, step))
    parts = [q.text, f"Solution so far: {before}" if before else "", f"Next step: {step}"]
    parts.append("Is the next step right, and does it help to find the answer? Say Yes or No.")
    return "\n\n".join(part for part in parts if part)


def confidence(outcome: Outcome) -> float:
    """Geometric mean of the probabilities of a step's tokens, without its cut."""
    logs = [math.log(p) for p in outcome.probs if p > 0]
    return math.exp(sum(logs) / len(logs))


# --------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True, eq=False)
class Action(Generation):
    """One step, the rest of an answer, or whether a step is right: a single token, yes or no."""

    kind: Literal["step", "rest", "judge"] = "rest"
    temperature: float = 0.0  # 0: greedy


class Steps:
    """What `decode` asks. Notes: the token's probability, P(yes), or 0 at a cut: [rows].

    A step ends with a line, and with a sentence: . ! or ? before a space. It is the next token that
    shows it: the end-of-sequence token takes its place, with the probability 0.
    """

    SHORTEST = 4  # tokens: "1." and "Dr." are no steps

    def __init__(self, model: Transformer, rows: int, tokenizer: Tokenizer):
        self.model, self.end = model, model.config.eos_ids[0]
        every, device = range(model.config.vocab_size), model.device
        one = tokenizer.encode("a")  # before each: some decoders strip a space that comes first
        texts = tokenizer.core.decode_batch([[*one, i] for i in every], skip_special_tokens=False)
        skip = len(tokenizer.decode(one))

        def table(holds: Callable[[str], bool]) -> Tensor:  # of each token, [V]
            return torch.tensor([holds(text[skip:]) for text in texts], device=device)

        self.line = table(lambda text: "\n" in text)
        self.sentence = table(lambda text: text.rstrip().endswith((".", "!", "?")))
        self.space = table(lambda text: text[:1].isspace())
        self.eos = torch.tensor([i in model.config.eos_ids for i in every], device=device)
        firsts = [{tokenizer.encode(w)[0] for w in (a, a.lower(), f" {a}")} for a in ("Yes", "No")]
        yes, no = firsts[0] - firsts[1], firsts[1] - firsts[0]  # without a space of its own
        self.yes, self.no = (torch.tensor(sorted(ids), device=device) for ids in (yes, no))
        self.cuts, self.judges = torch.zeros(2, rows, dtype=torch.bool, device=device)
        self.previous = torch.zeros(rows, dtype=torch.long, device=device)
        self.temperature = torch.zeros(rows, device=device)

    def begin(self, row: int, request: Request) -> None:
        action: Action = request.data[-1]
        self.cuts[row], self.judges[row] = action.kind == "step", action.kind == "judge"
        self.temperature[row] = action.temperature

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, Tensor, Tensor]:
        hot = torch.softmax(logits / self.temperature.clamp(min=1e-3)[:, None], -1)
        token = torch.where(self.temperature > 0, draw(hot, at.u), logits.argmax(-1))
        p = torch.softmax(logits, -1).gather(1, token[:, None])[:, 0]
        line, sentence = self.line[self.previous], self.sentence[self.previous]
        ends = (line | (sentence & self.space[token])) & ~self.eos[token]
        cut = self.cuts & (at.t >= self.SHORTEST) & ends
        yes, no = (logits[:, ids].logsumexp(-1) for ids in (self.yes, self.no))
        p = torch.where(self.judges, torch.sigmoid(yes - no), p.masked_fill(cut, 0))
        token = token.masked_fill(cut | self.judges, self.end)
        self.previous.copy_(token)
        return token, self.model.embed(token), p


def reason(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[Question],
    settings: Settings = Settings(),
    seed: int = 0,
    batch_size: int = 16,
    order: Iterator[int] | None = None,
) -> Iterator[tuple[int, dict]]:
    """As soft_reasoning.reason."""
    if not model.config.eos_ids:
        raise UserError("the model's config.json names no end-of-sequence token: add eos_token_id")
    start = partial(search, model, tokenizer, s=settings, seed=seed)
    how = settings, batch_size, settings.max_new_tokens + 100, order  # steps, asking about them
    yield from run(model, tokenizer, questions, start, partial(Steps, tokenizer=tokenizer), *how)
