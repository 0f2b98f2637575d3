"""Runs of methods on problems: graded records in a file, and a table of what came out.

    run(problems, TASKS["gsm8k"], {"cot": ({"seed": 0}, solve)}, output="gsm8k.jsonl")

A result file is JSON lines: one graded record per (problem, method, sample), with the settings that
made it, in the order in which they finished. Two runs of the same settings hold the same records,
compared after sorting by that key and without `seconds`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from lab.files import append, plain_json, resume, write_json
from lab.grading import extract, grade, grader
from lab.tasks import Problem, Task, prompt
from model import UserError

Job = tuple[Problem, int]  # a problem and the index of a sample
Solve = Callable[[list[Job]], Iterable[tuple[Problem, int, dict]]]

# -------------------------------------------------------------------------------------------- runs

KEY = ("problem", "method", "sample")  # what tells the records of a task apart


def run(
    problems: list[Problem],
    task: Task,
    methods: dict[str, tuple[dict, Solve]],
    num_samples: int = 1,
    output: str | Path | None = None,
    json_path: str | Path | None = None,
) -> tuple[dict, dict[tuple, dict]]:
    """Run methods one after the other on the same problems, grade, record, and print the table.

    Returns what --json writes, and the records by (problem id, method, sample index).

    methods: name -> (settings, solve). settings: everything that changes what the method answers;
    records in `output` are taken over if theirs are equal. solve(jobs) gets the (problem, sample
    index) pairs still to be done and yields (problem, sample, record) as they finish. record:
    answer_text, optional thought_text, thought_tokens, answer_tokens, seconds, stopped_by, prompt,
    answers (of several candidates), and whatever else the method wants to keep.

    Raises UserError for a file that cannot be written, or is of other settings or problems.
    KeyboardInterrupt and errors of the method pass through; what was finished is in the file.
    """
    for path in filter(None, (output, json_path)):
        if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
            raise UserError(f"cannot write {path}: make its folder first, and give a file's name")
    common = {"task": task.name, "grader": grader(task)}
    settings = {method: plain_json({**common, **own}) for method, (own, _) in methods.items()}
    done = resume(output, settings, KEY) if output else {}
    check_problems(output, done, problems, methods)
    wanted = [(problem, sample) for problem in problems for sample in range(num_samples)]
    rows, first = [], None
    for method, (_, solve) in methods.items():
        jobs = [job for job in wanted if (job[0].id, method, job[1]) not in done]
        keys = [(problem.id, method, sample) for problem, sample in wanted]
        right = sum(done[key]["correct"] for key in keys if key in done)
        start, tokens = time.perf_counter(), 0
        with tqdm(desc=method, total=len(wanted), initial=len(wanted) - len(jobs)) as bar:
            for problem, sample, record in solve(jobs) if jobs else ():
                record = record | {"settings": settings[method]}
                record = graded(problem, task, method, sample, record)
                if output:
                    append(output, record)
                done[problem.id, method, sample] = record
                right, tokens = right + record["correct"], tokens + (length(record) or 0)
                bar.set_postfix_str(f"accuracy {right / (bar.n + 1):.1%}", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        records = [[done[p.id, method, i] for i in range(num_samples)] for p in problems]
        row, first = summarise(method, records, first)
        if tokens:
            row.tokens_per_second, row.timed_records = tokens / seconds, len(jobs)
        rows.append(row)
    result = {
        "task": task.name,
        "problems": len(problems),
        "samples": num_samples,
        "grader": grader(task),
        "interval": "Wilson" if num_samples == 1 else "Wilson, clustered by problem",
        "settings": settings,
        "methods": [asdict(row) for row in rows],
    }
    print(table(result, rows))
    if json_path:
        write_json(json_path, result)
    return result, done


def check_problems(
    output: str | Path | None, done: dict[tuple, dict], problems: list[Problem], methods: dict
) -> None:
    """Raise UserError if a record of these methods is of another problem with the same id."""
    facts = {
        problem.id: [problem.question, problem.choices, problem.answer] for problem in problems
    }
    for (problem, method, _), record in done.items():
        fact = [record["question"], record["choices"], record["gold"]]
        if method in methods and facts.get(problem, fact) != fact:
            raise UserError(
                f"{output}: {problem} is another problem there than in the data; give --output "
                "another name, or delete it"
            )


def graded(problem: Problem, task: Task, method: str, sample: int, record: dict) -> dict:
    """The record of a method with its grade, and all that a reader needs to audit it."""

    def correct(answer: str | None) -> bool:
        return grade(answer, problem.answer, problem.kind, task.tolerance)

    for source in ("answer_text", "thought_text"):
        extracted = extract(record.get(source) or "", problem.kind, problem.choices)
        if extracted is not None:
            break
    whole = {
        "prompt": prompt(problem, task),
        **record,
        "problem": problem.id,
        "method": method,
        "sample": sample,
        "question": problem.question,
        "choices": problem.choices,
        "gold": problem.answer,
        "extracted": extracted,
        "extracted_from": source if extracted is not None else None,
        "correct": correct(extracted),
    }
    if "answers" in record:
        whole["any_correct"] = any(correct(answer) for answer in record["answers"])
    return whole


# ------------------------------------------------------------------------------------------ tables

Z = 1.959964  # of a two-sided 95 % interval


@dataclass
class Row:
    """A method's line in the table."""

    method: str
    accuracy: float
    accuracy_interval: list[float]
    difference: float | None  # to the first method, problem by problem
    difference_interval: list[float] | None
    tokens: float | None  # mean of thinking and answer, all records
    tokens_correct: float | None  # the same of the right ones
    no_answer: int  # records from which nothing could be extracted
    stops: dict[str, int]  # what ended the thinking -> records
    # Wall clock of this process, over the `timed_records` that it finished.
    tokens_per_second: float | None = None
    timed_records: int = 0


def length(record: dict) -> int | None:
    """Tokens of thinking and answer together, None if the method did not count."""
    counts = [record.get(name) for name in ("thought_tokens", "answer_tokens")]
    counts = [count for count in counts if count is not None]
    return sum(counts) if counts else None


def mean_length(records: list[dict]) -> float | None:
    """The mean of all lengths that were counted, None if none was."""
    lengths = [length(record) for record in records]
    lengths = [n for n in lengths if n is not None]
    return sum(lengths) / len(lengths) if lengths else None


def wilson(p: float, n: float) -> list[float]:
    """The interval [low, high] of a proportion p of n independent trials (Wilson 1927)."""
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return [
        max(0.0, (centre - half) / (1 + Z * Z / n)),
        min(1.0, (centre + half) / (1 + Z * Z / n)),
    ]


def summarise(
    method: str, records: list[list[dict]], first: list[float] | None
) -> tuple[Row, list[float]]:
    """Make a method's Row of records[problem][sample]; returns the first method's means as well.

    first: the means of the first method, problem by problem; None if this is the first. Several
    samples of a problem are not independent, so Wilson's n is then the number of independent
    records that would have the variance seen between the problems' means.
    """
    means = [sum(record["correct"] for record in samples) / len(samples) for samples in records]
    n, flat = len(means), [record for samples in records for record in samples]
    p = sum(means) / n
    size = n
    if len(flat) > n > 1:
        variance = sum((mean - p) ** 2 for mean in means) / (n - 1) / n
        size = min(p * (1 - p) / variance, len(flat)) if variance else n
    difference = interval = None
    if first is not None:
        # Bonett & Price (2012): one more problem won and one more lost; never an empty interval.
        gaps = [a - b for a, b in zip(means, first)]
        difference, centre = sum(gaps) / n, sum(gaps) / (n + 2)
        spread = (sum(gap * gap for gap in gaps) + 2) / (n + 2) - centre**2
        half = Z * math.sqrt(spread / (n + 2))
        interval = [max(-1.0, centre - half), min(1.0, centre + half)]
    stops = Counter(record["stopped_by"] for record in flat if record.get("stopped_by"))
    row = Row(
        method=method,
        accuracy=p,
        accuracy_interval=wilson(p, size),
        difference=difference,
        difference_interval=interval,
        tokens=mean_length(flat),
        tokens_correct=mean_length([record for record in flat if record["correct"]]),
        no_answer=sum(record["extracted"] is None for record in flat),
        stops=dict(stops.most_common()),
    )
    return row, means if first is None else first


def table(result: dict, rows: list[Row]) -> str:
    """Write the result of `run` and its rows as text, one line a method."""
    versus = f"difference to {rows[0].method}"
    head = ["method", "accuracy", "95 % interval", versus, "tokens", "if correct", "tokens/s"]
    lines = [[*head, "no answer", "ended by"]]
    for row in rows:
        low, high = row.accuracy_interval
        gap = ""
        if row.difference is not None:
            points = [100 * x for x in (row.difference, *row.difference_interval)]
            gap = "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)
        numbers = (row.tokens, row.tokens_correct, row.tokens_per_second)
        numbers = ["-" if x is None else f"{x:.1f}" for x in numbers]
        stops = ", ".join(f"{cause} {count}" for cause, count in row.stops.items()) or "-"
        accuracy = [f"{row.accuracy:.1%}", f"{low:.1%} to {high:.1%}"]
        lines.append([row.method, *accuracy, gap, *numbers, str(row.no_answer), stops])
    columns = [column for column in zip(*lines) if any(column[1:])]  # no gaps with one method
    widths = [max(map(len, column)) for column in columns]
    title = (
        "{task}: {problems} problems, {samples} sample(s) each; graded by {grader}; "
        "interval: {interval}"
    )
    text = [title.format(**result), ""]
    for cells in zip(*columns):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths))
        text.append(line.rstrip())
    records = result["problems"] * result["samples"]
    if any(row.timed_records < records for row in rows):
        timed = [f"{row.method} {row.timed_records} of {records} records" for row in rows]
        text += ["", "tokens/s: of what this process did, " + ", ".join(timed)]
    if len(rows) > 1:
        explained = "percentage points, paired by problem, with 95 % interval (Bonett and Price)"
        text += ["", f"difference: {explained}"]
    return "\n".join(text)
