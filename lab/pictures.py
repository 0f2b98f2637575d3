"""The pictures of a report: what lab/charts.py draws of records, searches and trainings."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch

from gp import GP
from lab.charts import COLOURS, Axis, Chart, around, contours, short
from lab.tables import Row, length
from lab.traces import Trace

MANY = 300  # points of a curve at most; of more, the smallest and largest of each stretch


@dataclass(frozen=True)
class Entry:
    """A record, its number on the page, and that of its method."""

    record: dict
    number: int
    group: int

    @property
    def href(self) -> str:
        return f"#r{self.number}"

    @property
    def problem(self) -> str:
        return self.record.get("problem") or self.record["question"]

    @property
    def name(self) -> str:
        parts = (self.problem, self.record["method"], f"sample {self.record.get('sample', 0)}")
        return ", ".join(short(part, 40) for part in parts)


def colour(group: int) -> str:
    return f"c{group % COLOURS}"


# ----------------------------------------------------------------------------------------- methods


def intervals(name: str, title: str, about: str, rows: Sequence[tuple], x: Axis) -> Chart:
    """A whisker for each row (label, value, low, high, group): its method, value and interval."""
    chart = Chart(name, title, about, x, None, 70 + 40 * len(rows))
    for i, (label, value, low, high, group) in enumerate(rows):
        y = 1 - (i + 0.68) / len(rows)
        said = f"{x.style.format(value)} ({x.style.format(low)} to {x.style.format(high)})"
        chart.line([(low, y), (high, y)], f"line {colour(group)}")
        tip, href = f"{label}: {said}", f"#m{group}"
        chart.mark(value, y, f"dot {colour(group)}", tip, href, 5.5)
        chart.text(x.low, 1 - (i + 0.25) / len(rows), f"{short(label, 34)}  {said}", dx=2)
    return chart


def accuracy(rows: Sequence[Row]) -> Chart:
    marks = [(r.method, r.accuracy, *r.accuracy_interval, i) for i, r in enumerate(rows)]
    ends = [value for mark in marks for value in mark[2:4]]
    x = around(ends, "share of the problems, with 95 % interval", "{:.1%}")
    x = Axis(max(0.0, x.low), min(1.0, x.high), x.label, x.style)
    return intervals("accuracy", "Accuracy", "Accuracy of each method.", marks, x)


def differences(rows: Sequence[Row]) -> Chart:
    """Of the rows that have one, to the first."""
    marks = [
        (r.method, 100 * r.difference, *(100 * x for x in r.difference_interval), i)
        for i, r in enumerate(rows)
        if r.difference is not None
    ]
    ends = [0.0] + [value for mark in marks for value in mark[2:4]]
    label = "percentage points, paired by problem, with 95 % interval (Bonett and Price)"
    title = f"Difference to {short(rows[0].method, 34)}"
    about = "Of each method the accuracy, less that of the first."
    chart = intervals("differences", title, about, marks, around(ends, label, "{:+.1f}"))
    chart.line([(0, 0), (0, 1)], "dash ink")
    return chart


def costs(curves: Sequence[tuple[str, int, list[tuple]]]) -> Chart:
    """Accuracy against tokens. curves: label, group, points (tokens, accuracy, what it is)."""
    points = [point for _, _, of in curves for point in of]
    x = around([tokens for tokens, _, _ in points], "tokens per problem, mean", "{:.0f}", low=0)
    y = around([share for _, share, _ in points], style="{:.1%}")
    y = Axis(max(0.0, y.low), min(1.0, y.high), style=y.style)
    about = "A search after each round, a vote after so many answers, and each method in the end."
    chart = Chart("costs", "Accuracy against tokens", about, x, y, 300)
    chart.legend([(short(label, 30), colour(group)) for label, group, _ in curves])
    for label, group, of in curves:
        chart.line([point[:2] for point in of], f"thin {colour(group)}")
        for i, (tokens, share, what) in enumerate(of):
            last = i + 1 == len(of)
            tip = f"{label}, {what}: {share:.1%} with {tokens:.0f} tokens"
            look = f"{'dot' if last else 'ring'} {colour(group)}"
            chart.mark(tokens, share, look, tip, f"#m{group}", 5 if last else 3)
    return chart


def lengths(labels: Sequence[str], entries: Sequence[Entry]) -> Chart:
    """Every record at its length: above the line of its method where right, below where wrong."""
    known = [entry for entry in entries if length(entry.record) is not None]
    x = around([length(entry.record) for entry in known], "tokens of a record", "{:.0f}", low=0)
    about = "A dot for each record: above its method's line right, below it wrong or no answer."
    chart = Chart(
        "lengths",
        "Lengths, right above the line and wrong below",
        about,
        x,
        None,
        70 + 74 * len(labels),
    )
    for i, label in enumerate(labels):
        middle, tall = 1 - (i + 0.58) / len(labels), 1 / len(labels)
        chart.line([(x.low, middle), (x.high, middle)], "thin ink")
        chart.text(x.low, middle + 0.44 * tall, short(label, 34), dx=2)
        seen: dict[tuple, int] = {}
        for entry in (entry for entry in known if entry.group == i):
            n, right = length(entry.record), entry.record["correct"]
            slot = round(100 * x.place(n)), right  # those at one place are piled up
            seen[slot] = level = seen.get(slot, -1) + 1
            y = middle + (1 if right else -1) * tall * min(0.33, 0.07 + 0.06 * level)
            look = f"{'dot' if right else 'ring'} {colour(i)}"
            chart.mark(n, y, look, f"{entry.name}: {n} tokens, {outcome(entry)}", entry.href, 3)
    return chart


# ----------------------------------------------------------------------------------------- thought


def entropy(trace: Trace) -> Chart:
    """H of each step, tau_H, how far Cold Stop had counted, and where it struck."""
    settings, n = trace.record["settings"], len(trace.steps)
    floor, values = 1e-4, [max(step["entropy"], 1e-4) for step in trace.steps]
    x = Axis(0.5, n + 0.5, "step", "{:.0f}")
    y = Axis(floor, max(3.0, *values) * 1.2, style="{:g}", log=True)
    size = -(-n // MANY)
    about = f"{n} steps; values under {floor} are drawn there. "
    about += f"Of each {size} steps the smallest and the largest." if size > 1 else ""
    chart = Chart(f"entropy-{trace.number}", "Entropy of each step, in nats", about, x, y, 210)
    threshold, needed = settings.get("cold_stop_entropy", 0), settings.get("cold_stop_steps", 1)
    counts = settings.get("cold_stop") and threshold > floor
    if counts:
        said = f"τ_H {threshold:g}; area: sure steps in a row, of {needed} for Cold Stop"
        chart.legend([("entropy", colour(0)), (said, colour(1))])
    stretches = [(t, values[t : t + size]) for t in range(0, n, size)]
    if size > 1:
        ends = [(t + 1 + size / 2, min(of), max(of)) for t, of in stretches]
        chart.area(ends, colour(0))
    chart.line([(t + (1 + len(of)) / 2, max(of)) for t, of in stretches], f"line {colour(0)}")
    if counts:
        chart.line([(x.low, threshold), (x.high, threshold)], f"dash {colour(1)}")
        counted = [max(trace.streak[t : t + size]) / needed for t, _ in stretches]
        top = y.high / floor  # the count, as a share of k, on a scale that the axis has as a log
        path = [(t + 1, floor, floor * top ** min(1, c)) for (t, _), c in zip(stretches, counted)]
        chart.area(path, colour(1))
    if trace.strike is not None:
        chart.line([(trace.strike + 1, floor), (trace.strike + 1, y.high)], f"line {colour(4)}")
        chart.text(trace.strike + 1, y.high / 2, "Cold Stop", colour(4), "end", -4)
    return chart


# ------------------------------------------------------------------------------------------ search


def best_so_far(entry: Entry, others: Sequence[Entry]) -> Chart:
    """The best reward against the tokens spent on candidates and verdicts, with each point.

    others: records of the same problem, which have no reward: what they spent, and their answer.
    """
    points, verdicts = entry.record["points"], entry.record["verdicts"]
    spent, best, dots, path = 0, -float("inf"), [], []
    for i, point in enumerate(points):
        spent += point["tokens"]
        if i + 1 == len(points) or points[i + 1]["round"] != point["round"]:
            spent += sum(v["tokens"] for v in verdicts[point["round"] : point["round"] + 1])
        path += [(spent, best)] if path else []
        best = max(best, point["reward"])
        path.append((spent, best))
        dots.append((spent, point))
    beside = [e for e in others if e.group != entry.group and length(e.record) is not None]
    most = max([spent, *(length(e.record) for e in beside)])
    x = around([0, most], "tokens, verification included", "{:.0f}", low=0)
    y = around([point["reward"] for point in points])
    about = "A step line: the best reward so far; a dot for each candidate; dashes: other methods."
    chart = Chart(f"best-{entry.number}", "Best reward so far", about, x, y, 220)
    methods = [(f"{short(e.record['method'], 20)} {outcome(e)}", colour(e.group)) for e in beside]
    chart.legend([(f"round {i}", colour(i)) for i in by_round(points)] + methods)
    for other in beside:
        at = length(other.record)
        chart.line([(at, y.low), (at, y.high)], f"dash {colour(other.group)}")
    chart.line(path, "line ink")
    for spent, point in dots:
        tip = (
            f"round {point['round']}: answer {short(point['answer'])}, reward {point['reward']:.4f}"
        )
        chart.mark(spent, point["reward"], f"dot {colour(point['round'])}", tip)
    return chart


def by_round(points: Sequence[dict]) -> list[int]:
    return list(dict.fromkeys(point["round"] for point in points))


def outcome(entry: Entry) -> str:
    """right, wrong, no answer, or '' of a record that is not graded."""
    if "correct" not in entry.record:
        return ""
    if entry.record["correct"]:
        return "right"
    return "no answer" if entry.record["extracted"] is None else "wrong"


def plane(entry: Entry, cells: int = 22) -> Chart | None:
    """The points u in the plane of their first two principal components, and the GP's mean there.

    The plane goes through the points' mean; a contour is where the mean of a GP fitted to all
    points and rewards has one value. None for fewer than three points, which have no plane.
    """
    points = entry.record["points"]
    U = torch.tensor([point["u"] for point in points], dtype=torch.float64)
    if len(U) < 3 or U.shape[1] < 2:
        return None
    centre = U.mean(0)
    _, S, Vh = torch.linalg.svd(U - centre, full_matrices=False)
    xy = ((U - centre) @ Vh[:2].T).numpy()  # [points, 2]
    share = (S[:2].square().sum() / S.square().sum().clamp(min=1e-300)).item()
    x = around(xy[:, 0].tolist(), f"first component; the two hold {share:.0%} of the variance")
    y = around(xy[:, 1].tolist())
    rewards = [point["reward"] for point in points]
    about = "Candidates of all rounds; contours: the Gaussian process's mean of the reward."
    chart = Chart(
        f"plane-{entry.number}", "The points u, and what the GP expects", about, x, y, 340
    )
    chart.legend([(f"round {i}", colour(i)) for i in by_round(points)])
    grid = torch.cartesian_prod(
        torch.linspace(y.low, y.high, cells, dtype=torch.float64),
        torch.linspace(x.low, x.high, cells, dtype=torch.float64),
    )
    mean_there, _ = GP.fit(U, rewards).posterior(centre + grid.flip(1) @ Vh[:2])
    heights = mean_there.reshape(cells, cells).numpy()
    steps = (x.high - x.low) / (cells - 1), (y.high - y.low) / (cells - 1)
    flat = np.ptp(heights) < 1e-9
    for level in () if flat else np.linspace(heights.min(), heights.max(), 9)[1:-1]:
        ends = [
            [(x.low + column * steps[0], y.low + row * steps[1]) for column, row in pair]
            for pair in contours(heights, float(level))
        ]
        chart.segments(ends, "thin ink")
    best = rewards.index(max(rewards))
    for i, (point, (px, py)) in enumerate(zip(points, xy.tolist())):
        tip = (
            f"round {point['round']}: answer {short(point['answer'])}, reward {point['reward']:.4f}"
        )
        look = f"dot {colour(point['round'])}"
        chart.mark(
            px, py, look, tip + (", the best" if i == best else ""), "", 7 if i == best else 4.5
        )
    return chart


# ---------------------------------------------------------------------------------------- training


def training(name: str, log: Sequence[dict]) -> list[Chart]:
    """Loss and held-out loss, held-out accuracy, learning rate and gradient norm, by step."""

    def curve(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in log if line.get(key) is not None]

    found = []
    x = Axis(0, max(1, *(line["step"] for line in log)), "step", "{:.0f}")
    panels = (("Loss", "loss", "dev_loss"), ("Held-out accuracy", "dev_accuracy"))
    for title, *keys in (*panels, ("Learning rate", "lr"), ("Gradient norm", "gradient_norm")):
        curves = {key: points for key in keys if (points := curve(key))}
        if not curves:
            continue
        values = [value for points in curves.values() for _, value in points]
        style = "{:.1%}" if "accuracy" in title else "{:.4g}"
        file = f"training-{name}-{title.lower().replace(' ', '-')}"
        also = ", held-out with dots" if len(curves) > 1 else ""
        about = f"{len(values)} values, the last {style.format(values[-1])}."
        chart = Chart(file, title + also, about, x, around(values, style=style), 200)
        for key, points in curves.items():
            size, held_out = -(-len(points) // MANY), key.startswith("dev")
            means = [
                (points[i][0], mean(v for _, v in points[i : i + size]))
                for i in range(0, len(points), size)
            ]
            chart.line(means, f"line {colour(int(held_out))}")
            for step, value in points if held_out else ():
                chart.mark(step, value, f"dot {colour(1)}", f"step {step}: {style.format(value)}")
        found.append(chart)
    return found
