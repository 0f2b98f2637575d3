"""What k samples of a problem are worth: pass@k and majority@k, from the n that were recorded."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from lab.tables import aligned, clustered
from model import UserError

DRAWS = 10_000  # choices of k samples that are looked at, where there are more


def pass_at(k: int, correct: Sequence[bool]) -> float:
    """The chance that one of k samples is right, unbiased (Chen et al., arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k): of all choices of k of these n samples, of which c are right, the
    share that holds a right one.
    """
    n, c = len(correct), sum(correct)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at(
    k: int,
    answers: Sequence[str | None],
    correct: Sequence[bool],
    same: Callable[[str, str], bool],
) -> float:
    """The chance that the vote of k of these samples, drawn without replacement, is right.

    The samples keep their order: of equally frequent answers the earliest wins, and None is no
    answer, as in lab.grading.vote. Exact where there are at most DRAWS choices of k samples, else
    the mean over DRAWS random ones, the same ones in every run.
    """
    labels: list[int] = []  # of each sample, the first with its answer; -1 for none
    for i, answer in enumerate(answers):
        firsts = sorted(set(labels) - {-1})
        agreeing = (j for j in firsts if same(answer, answers[j]))
        labels.append(-1 if answer is None else next(agreeing, i))
    chosen = choices(len(answers), k)  # [choices, k]
    label, votes = np.array(labels)[chosen], np.zeros(chosen.shape, dtype=int)
    for group in set(labels) - {-1}:
        members = label == group
        votes += members * members.sum(1, keepdims=True)
    winner = chosen[np.arange(len(chosen)), votes.argmax(1)]  # the first of equals
    return float(np.array(correct)[winner].mean())


@functools.cache
def choices(n: int, k: int) -> np.ndarray:
    """All choices of k of n samples, or DRAWS random ones of them: indices [choices, k]."""
    if math.comb(n, k) <= DRAWS:
        return np.array(list(itertools.combinations(range(n), k)))
    rng = np.random.default_rng((n, k))
    return np.sort(rng.random((DRAWS, n)).argsort(1)[:, :k], 1)


def report(
    records: dict[str, list[list[dict]]], sames: list[Callable[[str, str], bool]], at: list[int]
) -> str:
    """A line for each method and k, of records[method][problem][sample]; sames: of each problem.

    A method with fewer samples than k has no line; UserError if none has as many.
    """
    lines = [["method", "k", "pass@k", "majority@k"]]
    samples = {method: len(of[0]) for method, of in records.items()}
    if max(at) > max(samples.values()):
        there = ", ".join(f"{method} {n}" for method, n in samples.items())
        raise UserError(f"--at {max(at)}: there are not so many samples of a problem ({there})")
    for method, of in records.items():
        for k in (k for k in at if k <= samples[method]):
            correct = [[record["correct"] for record in those] for those in of]
            answers = [[record["extracted"] for record in those] for those in of]
            passed = [pass_at(k, right) for right in correct]
            voted = [majority_at(k, *sample) for sample in zip(answers, correct, sames)]
            # n samples hold n / k that share none.
            most = len(of) * samples[method] / k
            lines.append([method, str(k), share(passed, most), share(voted, most)])
    widest = max(math.comb(n, k) for n in samples.values() for k in at)
    how = f"over {DRAWS} random choices where there are more" if widest > DRAWS else "exact"
    about = "pass@k: one of k samples is right, unbiased (Chen et al. 2021)\n"
    about += f"majority@k: the vote of k samples is, {how}; intervals: Wilson, clustered by problem"
    return "\n".join([about, "", *aligned(lines)])


def share(values: list[float], records: float) -> str:
    """The mean of the problems' values as text, with its interval."""
    low, high = clustered(values, records)
    return f"{sum(values) / len(values):.1%} ({low:.1%} to {high:.1%})"
