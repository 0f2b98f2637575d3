"""Does Soft Reasoning's search find what is rare? Made landscapes, and the bundled model's answers.

    python -m lab.bench --search --repeats 100

A landscape says of each x - z whether the answer is right, and how coherent it is. Right are: a
half-space, the top of a smooth function, a Voronoi cell, all of a low-dimensional projection, or
where one of ten linear functions is the largest. A judge that knows replaces the verifier, so that
what is measured is the search alone: is a right answer among its points, and what did it cost?
"""

import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor

from lab import fast, flags, peers, tasks, timing

D = 256  # of the made embeddings
TOKENS = 120  # of a generation by the model
Score = Callable[[Tensor], Tensor]  # x - z [n, D] -> [n]: the answer is right where it is above 0

# -------------------------------------------------------------------------------------- landscapes


def normal(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def directions(g: Generator, m: int) -> Tensor:
    """[D, m], orthonormal: x - z ~ N(0, I) becomes m numbers ~ N(0, I)."""
    return torch.linalg.qr(normal(g, D, m))[0]


def linear(g: Generator) -> Score:
    """A half-space of 5 %."""
    w = directions(g, 1)
    return lambda x: (x @ w)[:, 0] - 1.645


def smooth(g: Generator) -> Score:
    """The highest 5 % of a random smooth function (lengthscale 2) of 7 directions."""
    w, frequencies, phases = directions(g, 7), normal(g, 7, 200) / 2, normal(g, 200) * 10
    weights = normal(g, 200) / 10

    def height(x: Tensor) -> Tensor:
        return (x @ w @ frequencies + phases).cos() @ weights

    level = height(normal(g, 5000, D)).quantile(0.95)
    return lambda x: height(x) - level


def voronoi(g: Generator) -> Score:
    """Of twenty Voronoi cells in 3 directions, the one whose share is nearest to 5 %."""
    w, centres = directions(g, 3), 1.5 * normal(g, 20, 3)
    cells = torch.cdist(normal(g, 5000, D) @ w, centres).argmin(1)
    right = (cells.bincount(minlength=20) / 5000 - 0.05).abs().argmin()

    def margin(x: Tensor) -> Tensor:
        distances = torch.cdist(x @ w, centres)
        own = distances[:, right].clone()
        distances[:, right] = math.inf
        return distances.amin(1) - own

    return margin


def argmax(g: Generator) -> Score:
    """Where the first of ten linear functions is the largest: 10 %."""
    w = directions(g, 10)
    return lambda x: (x @ w)[:, 0] - (x @ w)[:, 1:].amax(1)


LANDSCAPES = {
    "half-space 5 %": linear,
    "smooth, 7 directions, 5 %": smooth,
    "Voronoi, 3 directions, 5 %": voronoi,
    "argmax 10 %": argmax,
}


def landscape(name: str, informative: bool, seed: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x - z [n, D] -> is it right [n], its coherence [n]: 0.85 with standard deviation 0.02.

    Informative: correlated by 0.7 with how far inside or outside x is; the rest, or all, is half a
    trend in a direction of its own and half noise.
    """
    g = Generator().manual_seed(seed)
    score, elsewhere = LANDSCAPES[name](g), directions(g, 1)
    typical = score(normal(g, 5000, D))
    share = 0.7 if informative else 0.0

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        inside = score(x)
        other = ((x @ elsewhere)[:, 0] + normal(g, len(x))) / math.sqrt(2)
        signal = share * (inside - typical.mean()) / typical.std()
        signal += math.sqrt(1 - share**2) * other
        return inside > 0, (0.85 + 0.02 * signal).clamp(0.01, 1)

    return at


# ---------------------------------------------------------------------------------------- searches

MODEL = SimpleNamespace(  # what a search asks of a model, where the landscape answers
    config=SimpleNamespace(d=D, context=4096, vocab_size=1),
    device=torch.device("cpu"),
    embed=lambda ids: torch.zeros(len(ids), D),
)
TOKENIZER = SimpleNamespace(open=str, encode=lambda text: [0] * 8)


def judged(searching: Any, reply: Any) -> Any:
    """A search whose verifier's every reply is this Outcome; the rest is asked for as before."""
    outcomes = None
    while True:
        try:
            wanted = searching.send(outcomes)
        except StopIteration as end:
            return end.value
        outcomes = [reply] if wanted[0].offset is None else (yield wanted)


def by_search(method: ModuleType, settings: Any, name: str, informative: bool, seed: int) -> dict:
    """The record of a search on a made landscape."""
    at, question = landscape(name, informative, seed), method.Question(f"{name} {seed}")
    searching = method.search(MODEL, TOKENIZER, question, settings, seed)
    searching = judged(searching, method.Outcome("1", [0], [1.0]))
    outcomes = None
    while True:
        try:
            wanted = searching.send(outcomes)
        except StopIteration as end:
            return end.value
        right, coherence = at(torch.stack([g.offset for g in wanted]))
        pairs = zip(right.tolist(), coherence.tolist())
        outcomes = [method.Outcome(str(int(r)), [0, 0], [1.0, c]) for r, c in pairs]


def by_botorch(propose: Callable, name: str, informative: bool, seed: int) -> dict:
    """The same with BoTorch's model and points, in [0, 1]^50 by Phi; never stopped early."""
    at, g = landscape(name, informative, seed), Generator().manual_seed(seed)
    A = normal(g, 50, D) / math.sqrt(50)
    u = torch.rand(5, 50, generator=g, dtype=torch.float64)
    right, y = torch.empty(0), torch.empty(0, dtype=torch.float64)
    while True:
        found, coherence = at(torch.special.ndtri(u[len(y) :].clamp(1e-4, 1 - 1e-4)).float() @ A)
        right, y = torch.cat([right, found]), torch.cat([y, (found + coherence).double()])
        if len(u) == 25:
            break
        u = torch.cat([u, propose(u, y, g)])
    points = [{"reward_verifier": float(r)} for r in right]
    return {"points": points, "stopped_by": "rounds", "rounds": 5}


# ------------------------------------------------------------------------- a model in the loop


def rare_answers(method: ModuleType, model: Any, tokenizer: Any, number: int) -> list[tuple]:
    """(question, Outcome of the judge): an answer that at most 2 of 20 random points give."""
    task, problems = tasks.TASKS["tiny"], tasks.load("tiny", limit=number)
    questions = [tasks.ask(problem, task) for problem in problems]
    s = method.Settings(k=20, rounds=1, reward="coherence", max_new_tokens=TOKENS)
    found = []
    for index, record in method.reason(model, tokenizer, questions, s, seed=1000):
        said = {p["answer"]: p["text"] for p in record["points"] if p["answer"] is not None}
        counts = Counter(record["answers"])
        rarest = min(said, key=lambda answer: counts[answer], default=None)
        if rarest is not None and counts[rarest] <= 2:
            found.append((questions[index], method.Outcome(said[rarest], [0], [1.0])))
    return found


def by_model(
    method: ModuleType, model: Any, tokenizer: Any, rare: list[tuple], settings: Any
) -> list[dict]:
    """The records of searches for them."""
    settings = replace(settings, max_new_tokens=TOKENS)
    replies = {id(question): reply for question, reply in rare}

    def start(question: Any) -> Any:
        searching = method.search(model, tokenizer, question, settings)
        return judged(searching, replies[id(question)])

    questions = [question for question, _ in rare]
    found = method.run(model, tokenizer, questions, start, method.Perturbed, settings, 16)
    return [record for _, record in found]


# ------------------------------------------------------------------------------------- the tables


def verified(record: dict) -> bool:
    return any(point["reward_verifier"] for point in record["points"])


def share(records: list[dict]) -> str:
    """Of the searches that found something, with its standard error."""
    p = sum(map(verified, records)) / max(len(records), 1)
    return f"{p:.3f} ± {math.sqrt(p * (1 - p) / max(len(records), 1)):.3f}"


def stops(records: list[dict]) -> list[str]:
    """Generations, verifications, ended by EI after which round, and with nothing verified."""
    n = max(len(records), 1)
    calls = sum(len(r["points"]) for r in records) / n, sum(r["rounds"] for r in records) / n
    early = [r for r in records if r["stopped_by"] == "ei"]
    after = Counter(r["rounds"] for r in early)
    cells = [f"{calls[0]:.1f}", f"{calls[1]:.1f}"]
    cells += [f"{after[t] / n:.1%}" for t in (1, 2, 3, 4)]
    return cells + [f"{sum(not verified(r) for r in early) / n:.1%}"]


def measure(method: ModuleType, args: Any) -> tuple[list[str], dict]:
    """Lines of Markdown, and the share found behind each; method: soft_reasoning."""
    torch.set_num_threads(1)
    policies = {
        "random": method.Settings(acquisition="random", stop_threshold=0),
        "search": method.Settings(),
    }
    ways = {name: partial(by_search, method, s) for name, s in policies.items()}
    if "botorch" in args.against and (propose := peers.made("botorch", peers.botorch_batch)):
        ways["BoTorch qLogEI"] = partial(by_botorch, propose)
    model, tokenizer = fast.load(args.model or flags.TINY, args.device, args.dtype)
    where = f"{timing.hardware(model.device)}; torch {torch.__version__}, gp.py on one thread"
    lines = [f"share of searches with a right answer; {args.repeats} seeds; {where}", ""]
    lines += [f"| right answers | coherence | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    everything: dict[str, list[dict]] = {name: [] for name in ways}
    for name in LANDSCAPES:
        for informative in (True, False):
            cells = [name, "informative" if informative else "uninformative"]
            for way, search in ways.items():
                found = [search(name, informative, seed) for seed in range(args.repeats)]
                everything[way] += found
                cells.append(share(found))
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr)
    rare = rare_answers(method, model, tokenizer, max(args.repeats // 2, 1))
    looped = {name: by_model(method, model, tokenizer, rare, s) for name, s in policies.items()}
    cells = [share(looped[way]) if way in looped else "" for way in ways]
    lines.append(f"| {len(rare)} rare answers of the model | its own | {' | '.join(cells)} |")
    columns = "policy", "generations", "verifications", *(f"after {t}" for t in (1, 2, 3, 4))
    lines += ["", "calls, and searches that EI ended, after how many rounds:", ""]
    lines += [f"| {' | '.join(columns)} | by EI with nothing verified |", "|---" * 8 + "|"]
    for title, records in (("landscapes", everything), ("model", looped)):
        rows = [[f"{way}, {title}", *stops(found)] for way, found in records.items()]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    numbers = {way: [verified(r) for r in found] for way, found in everything.items()}
    return lines, {"found": numbers}
