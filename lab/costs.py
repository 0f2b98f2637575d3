"""What a method's accuracy is for fewer tokens: a search that stops earlier, a vote of fewer."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from lab import grading, tasks
from lab.pictures import Entry
from lab.tables import length
from model import UserError


def curve(entries: Sequence[Entry], task: tasks.Task) -> list[tuple[float, float, str]]:
    """Points (mean tokens, accuracy, what it is), the last one the records as they are.

    Empty where no length is known. A search that had stopped by then keeps its answer, and a vote
    is held over the first answers that were drawn.
    """
    records = [entry.record for entry in entries]
    if any(length(record) is None for record in records):
        return []
    n, found, problems = len(records), [], problems_of(records, task)
    whole = sum(map(length, records)) / n, sum(record["correct"] for record in records) / n
    if problems:
        rounds = max(record.get("rounds", 1) for record in records)
        draws = max(len(record.get("texts", ())) for record in records)
        early = [(f"after round {r}", partial_search, r) for r in range(rounds - 1)]
        powers = [2**i for i in range(math.ceil(math.log2(max(1, draws))))]
        early += [(f"{k} of {draws} answers", partial_vote, k) for k in powers]
        for what, part, size in early:
            spent, right = 0, 0
            for record, problem in zip(records, problems):
                _, same = grading.reader(problem, task.tolerance)
                answer, tokens = part(record, size, same)
                spent += tokens
                right += grading.grade(answer, problem.answer, problem.kind, task.tolerance)
            found.append((spent / n, right / n, what))
    return [*found, (*whole, "in the end")]


def problems_of(records: Sequence[dict], task: tasks.Task) -> list[tasks.Problem]:
    """Of each record; none where one is of another making, or programs would have to be run."""
    try:
        found = [tasks.of_record(task, record, "record") for record in records]
    except UserError:
        return []
    return [] if any(problem.kind == "code" for problem in found) else found


def partial_search(record: dict, r: int, same: Callable) -> tuple[str | None, int]:
    """The answer of a search after round r, and the tokens it had spent, verification included."""
    points = [point for point in record["points"] if point["round"] <= r]
    verdicts = record["verdicts"][: r + 1]
    spent = sum(said["tokens"] for said in points + verdicts)
    if record["settings"]["select"] == "vote":
        return winner([said["answer"] for said in points + verdicts], same), spent
    answered = [point for point in points if point["answer"] is not None] or points
    return max(answered, key=lambda point: point["reward"])["answer"], spent


def partial_vote(record: dict, k: int, same: Callable) -> tuple[str | None, int]:
    """The vote of the first k answers, and their tokens, or an equal share where none are known."""
    answers, weights = record["answers"][:k], record.get("weights")
    whole = [*accumulate(record["tokens"])] if "tokens" in record else None
    spent = whole[k - 1] if whole else length(record) * k / len(record["answers"])
    return winner(answers, same, weights and weights[:k]), spent


def winner(answers: list, same: Callable, weights: list | None = None) -> str | None:
    i = grading.vote(answers, same, weights)
    return None if i is None else answers[i]
