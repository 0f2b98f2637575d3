"""The table of a run: of each method accuracy, its difference to the first one's, and lengths."""

import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from lab.grading import grader
from lab.tasks import Task
from model import NOT_FINITE

Z = 1.959964  # of a two-sided 95 % interval


@dataclass
class Row:
    """A method's line in the table."""

    method: str
    samples: int  # of each problem
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


def clustered(means: list[float], records: float) -> list[float]:
    """The interval [low, high] of the mean of the problems' means, of so many records in all.

    Several samples of a problem are not independent, so Wilson's n is then the number of
    independent records that would have the variance seen between the problems' means.
    """
    n, p = len(means), sum(means) / len(means)
    size = n
    if records > n > 1:
        variance = sum((mean - p) ** 2 for mean in means) / (n - 1) / n
        size = min(p * (1 - p) / variance, records) if variance > 1e-12 else n
    return wilson(p, size)


def summarise(
    method: str, records: list[list[dict]], first: list[float] | None
) -> tuple[Row, list[float]]:
    """Make a method's Row of records[problem][sample]; returns the first method's means as well.

    first: the means of the first method, problem by problem; None if this is the first.
    """
    means = [sum(record["correct"] for record in samples) / len(samples) for samples in records]
    n, flat = len(means), [record for samples in records for record in samples]
    p = sum(means) / n
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
        samples=len(records[0]),
        accuracy=p,
        accuracy_interval=clustered(means, len(flat)),
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
    equal = len({row.samples for row in rows}) == 1
    timed = any(row.timed_records for row in rows)  # else none of these was made just now
    head = ["method", "samples", "accuracy", "95 % interval", versus, "tokens", "if correct"]
    lines = [[*head, "tokens/s", "no answer", "ended by"]]
    for row in rows:
        low, high = row.accuracy_interval
        gap = ""
        if row.difference is not None:
            points = [100 * x for x in (row.difference, *row.difference_interval)]
            gap = "{:+.1f} ({:+.1f} to {:+.1f})".format(*points)
        numbers = (row.tokens, row.tokens_correct, row.tokens_per_second)
        numbers = ["-" if x is None else f"{x:.1f}" for x in numbers]
        numbers[2] = numbers[2] if timed else ""
        stops = ", ".join(f"{cause} {count}" for cause, count in row.stops.items()) or "-"
        accuracy = [f"{row.accuracy:.1%}", f"{low:.1%} to {high:.1%}"]
        samples = "" if equal else str(row.samples)
        lines.append([row.method, samples, *accuracy, gap, *numbers, str(row.no_answer), stops])
    each = "{samples} sample(s) each" if equal else "up to {samples} samples each"
    title = f"{{task}}: {{problems}} problems, {each}; graded by {{grader}}; interval: {{interval}}"
    text = [title.format(**result), "", *aligned(lines)]
    whole = [result["problems"] * row.samples for row in rows]
    if timed and any(row.timed_records < n for row, n in zip(rows, whole)):
        parts = [f"{row.method} {row.timed_records} of {n} records" for row, n in zip(rows, whole)]
        text += ["", "tokens/s: of what this process did, " + ", ".join(parts)]
    if len(rows) > 1:
        explained = "percentage points, paired by problem, with 95 % interval (Bonett and Price)"
        text += ["", f"difference: {explained}"]
    return "\n".join(text)


def aligned(lines: list[list[str]]) -> list[str]:
    """Lines of cells as text in columns; one that is empty below its head is left out."""
    columns = [column for column in zip(*lines) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns)
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]


def report(
    task: Task,
    settings: dict[str, dict],
    records: dict[str, list[list[dict]]],
    speeds: dict[str, tuple[float, int]],
) -> tuple[dict, str]:
    """Of records[method][problem][sample]: what --json writes, and the table as text.

    All methods have the same problems, each its own number of samples. speeds: method -> tokens
    per second, and of how many records, where this process made some.
    """
    rows, first = [], None
    for method, of in records.items():
        row, first = summarise(method, of, first)
        row.tokens_per_second, row.timed_records = speeds.get(method, (None, 0))
        rows.append(row)
    samples = max(row.samples for row in rows)
    result = {
        "task": task.name,
        "problems": len(of),
        "samples": samples,
        "grader": grader(task),
        "interval": "Wilson" if samples == 1 else "Wilson, clustered by problem",
        "settings": settings,
        "methods": [asdict(row) for row in rows],
    }
    warn(record for of in records.values() for samples in of for record in samples)
    return result, table(result, rows)


def warn(records: Iterable[dict]) -> None:
    """A line on standard error where logits were not finite and ended an answer."""
    records = list(records)
    cut = [r for r in records if r.get("not_finite") or r.get("finish_reason") == "not finite"]
    if cut:
        of = f"in {len(cut)} of {len(records)} records an answer ends early"
        print(f"warning: {of}, since the model's logits are {NOT_FINITE}", file=sys.stderr)
