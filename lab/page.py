"""Records as one page: a table, pictures, and every record behind them; see lab/report.py.

The page is lab/page.html.jinja with its style and script inlined: it asks nothing of a network.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lab import costs, files, pictures, soft_thoughts, tables
from lab.charts import CSS, Chart, short, visible
from lab.concepts import concepts
from lab.pictures import Entry
from lab.tasks import TASKS
from lab.traces import Names, Trace, in_script, sentences, tokenizer_of
from model import UserError

HERE = Path(__file__).parent
STRETCH = 20_000  # characters of a text that are laid out together
LARGE = 50_000  # steps, and 100 for each record, from which on records are built when opened

# ------------------------------------------------------------------------------------------ groups


def grouped(named: dict[str, list[dict]]) -> tuple[list[str], list[Entry]]:
    """Labels of the methods, and all records; a method that several files have is named with them.

    named: file -> its records. UserError where they are of several tasks, or other problems have
    the same names.
    """
    found = {str(r["settings"].get("task", "")) for records in named.values() for r in records}
    if len(found) > 1:
        said = ", ".join(name or "single questions" for name in sorted(found))
        raise UserError(f"{' and '.join(named)}: mixed tasks ({said}): one page for each, please")
    files_of: dict[str, set] = {}
    facts: dict[str, tuple] = {}
    for file, records in named.items():
        for record in records:
            files_of.setdefault(record["method"], set()).add(file)
            name = Entry(record, 0, 0).problem
            fact = [record["question"], record.get("gold"), record.get("choices")]
            known, other = facts.setdefault(name, (fact, file))
            if known != fact:
                raise UserError(f"{file}: {name} is another problem there than in {other} before")
    stems = {file: Path(file).stem for file in named}
    if len(set(stems.values())) < len(stems):
        stems = {file: file for file in named}
    labels: list[str] = []
    entries: list[Entry] = []
    for file, records in named.items():
        for record in records:
            method = record["method"]
            label = method if len(files_of[method]) == 1 else f"{method} ({stems[file]})"
            if label not in labels:
                labels.append(label)
            entries.append(Entry(record, len(entries), labels.index(label)))
    return labels, entries


def by_problem(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (e.problem, e.group, e.record.get("sample", 0))):
        found.setdefault(entry.problem, []).append(entry)
    return found


def compared(labels: Sequence[str], entries: Sequence[Entry]) -> list[tables.Row]:
    """The table's rows: each method over its own problems, its difference over those of both."""
    rows, first = [], {}
    for group, label in enumerate(labels):
        own = by_problem([entry for entry in entries if entry.group == group])
        of = {problem: [entry.record for entry in those] for problem, those in own.items()}
        row, means = tables.summarise(label, list(of.values()), None)
        if not rows:
            first = dict(zip(of, means))
        elif both := [problem for problem in of if problem in first]:
            there = [of[problem] for problem in both]
            paired, _ = tables.summarise(label, there, [first[problem] for problem in both])
            row.difference, row.difference_interval = paired.difference, paired.difference_interval
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------- records


class Records:
    """What the page says of each record, and the names of the tokens in its thoughts."""

    def __init__(self, labels: Sequence[str], entries: Sequence[Entry], model: str | None):
        self.labels, self.model, self.names = labels, model, {}
        self.charts: list[Chart] = []
        self.problems = [self.problem(of) for of in by_problem(entries).values()]

    def problem(self, entries: list[Entry]) -> dict:
        record = entries[0].record
        about = {"name": entries[0].problem, "question": record["question"]}
        about |= {"gold": record.get("gold"), "choices": record.get("choices")}
        return about | {"entries": [self.entry(entry, entries) for entry in entries]}

    def entry(self, entry: Entry, others: list[Entry]) -> dict:
        record = entry.record
        about = {"number": entry.number, "label": self.labels[entry.group]}
        about |= {"outcome": pictures.outcome(entry)}
        about |= {"colour": pictures.colour(entry.group), "record": record, "href": entry.href}
        about |= {"length": tables.length(record)}
        if record.get("steps"):
            about["thought"] = self.thought(entry, others)
        if record.get("points"):
            about["search"] = self.search(entry, others)
        if record.get("soft_thoughts"):
            about["soft_thoughts"] = self.soft_thoughts(entry)
        return about

    def names_of(self, record: dict) -> Names:
        name = self.model or str(record["settings"].get("model"))
        if name not in self.names:
            self.names[name] = Names(tokenizer_of(name))
        return self.names[name]

    def thought(self, entry: Entry, others: list[Entry]) -> dict:
        trace, beside = Trace(entry.record, self.names_of(entry.record), entry.number), None
        if entry.record["method"] == "soft":
            beside = next((e for e in others if e.record["method"] in ("cot", "greedy")), None)
        said = sentences(beside.record["thought_text"]) if beside else ()
        self.charts.append(chart := pictures.entropy(trace))
        if mixed := concepts(trace):  # the page itself shows every step's
            self.charts.append(mixed)
        about = {"chart": drawn(chart), "rows": trace.rows(said), "data": Markup(trace.data())}
        about |= {"least_sure": trace.least_sure(), "strike": trace.strike}
        about |= {"steps": len(trace.steps), "model": list(self.names.values()).index(trace.names)}
        about["beside"] = beside and {"label": self.labels[beside.group], "href": beside.href}
        return about

    def search(self, entry: Entry, others: list[Entry]) -> dict:
        charts = [pictures.best_so_far(entry, others), pictures.plane(entry)]
        charts = [chart for chart in charts if chart]
        self.charts += charts
        points, verdicts = entry.record["points"], entry.record["verdicts"]
        best = max(points, key=lambda point: point["reward"])
        rounds = []
        for number in dict.fromkeys(point["round"] for point in points):
            before = [point["reward"] for point in points if point["round"] < number]
            candidates = []
            for point in (point for point in points if point["round"] == number):
                gain = max(0.0, point["reward"] - max(before)) if before else None
                candidates.append({"point": point, "gain": gain, "best": point is best})
            verdict = verdicts[number] if number < len(verdicts) else None
            rounds.append({"number": number, "candidates": candidates, "verdict": verdict})
        return {"charts": [drawn(chart) for chart in charts], "rounds": rounds}

    def soft_thoughts(self, entry: Entry) -> dict:
        found, names = entry.record["soft_thoughts"], self.names_of(entry.record)
        self.charts += (charts := soft_thoughts.charts(entry.number, found))
        near = [[(names.name(i), cosine) for i, cosine in of] for of in found["nearest"]]
        rows = list(zip(found["norms"], near))
        return {"charts": [drawn(chart) for chart in charts], "rows": rows}

    def names_json(self) -> Markup:
        known = [{i: visible(text) for i, text in n.known.items()} for n in self.names.values()]
        return Markup(in_script(known))


def drawn(chart: Chart) -> Markup:
    return Markup(chart.svg())


def parts(text: Any) -> Iterator[str]:
    """A text in stretches: a line of a million characters takes a browser seconds."""
    text = "" if text is None else str(text)
    return (text[i : i + STRETCH] for i in range(0, len(text), STRETCH))


def packed(html: Markup) -> Markup:
    """HTML for lab/page.js to unpack when it is wanted: its elements cost a browser far more time
    than its text, and its text ten times as much as these bytes.
    """
    data = base64.b64encode(zlib.compress(str(html).encode())).decode()
    return Markup(f'<script type="text/plain" class="packed">{data}</script>')


# -------------------------------------------------------------------------------------------- page


def overview(
    labels: Sequence[str], entries: Sequence[Entry]
) -> tuple[list[tables.Row], list[Chart]]:
    """The table and its pictures, of records that are graded."""
    if not entries or not all("correct" in entry.record for entry in entries):
        return [], []
    rows = compared(labels, entries)
    charts = [pictures.accuracy(rows)]
    if any(row.difference is not None for row in rows):
        charts.append(pictures.differences(rows))
    task = TASKS.get(entries[0].record["settings"].get("task"))
    each = [[entry for entry in entries if entry.group == i] for i in range(len(labels))]
    curves = [(labels[i], i, costs.curve(of, task)) for i, of in enumerate(each) if task]
    if curves := [curve for curve in curves if curve[2]]:
        charts.append(pictures.costs(curves))
        charts.append(pictures.lengths(labels, entries))
    return rows, charts


def build(
    named: dict[str, list[dict]],
    logs: dict[str, list[dict]] | None = None,
    notes: Sequence[str] = (),
    model: str | None = None,
) -> tuple[str, list[Chart]]:
    """The page as text, and all its pictures.

    named: file -> records; logs: name -> lines of a training's log.jsonl. notes are shown. model:
    whose tokenizer names the tokens, in the place of the records' own. UserError: mixed tasks.
    """
    labels, entries = grouped(named)
    rows, charts = overview(labels, entries)
    trainings = {name: pictures.training(short(name), log) for name, log in (logs or {}).items()}
    records = Records(labels, entries, model)
    unnamed = [name for name, names in records.names.items() if names.tokenizer is None]
    lacking = "is not here, so tokens are shown by number; --model says where it is"
    notes = [*notes, *(f"the tokenizer of {name} {lacking}" for name in unnamed)]
    ends = dict.fromkeys(entry.record.get("stopped_by") or "" for entry in entries)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(  # every text passes `visible`
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda said: said if isinstance(said, Markup) else visible(said),
    )
    environment.filters |= {"parts": parts, "short": short, "packed": packed}
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    tasks = {str(entry.record["settings"].get("task", "")) for entry in entries} - {""}
    text = environment.get_template("page.html.jinja").render(
        title=", ".join([*tasks, *(short(Path(f).name) for f in (*named, *(logs or ())))]),
        rows=rows,
        colours=[pictures.colour(i) for i in range(len(labels))],
        labels=labels,
        settings=[next(e.record["settings"] for e in entries if e.group == i)
                  for i in range(len(labels))],
        counts=[sum(e.group == i for e in entries) for i in range(len(labels))],
        charts=[drawn(chart) for chart in charts],
        trainings={name: [drawn(chart) for chart in of] for name, of in trainings.items()},
        problems=records.problems,
        total=len(entries),
        large=sum(100 + len(entry.record.get("steps", ())) for entry in entries) > LARGE,
        ends=[end for end in ends if end],
        notes=notes,
        names=records.names_json(),
        style=Markup(CSS + (HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
    )  # fmt: skip
    return text, [*charts, *(c for of in trainings.values() for c in of), *records.charts]


def write(path: str | Path, records: list[dict]) -> None:
    """The page of a command's records in a file. UserError where it cannot be written."""
    text, _ = build({"this run": records})
    files.write(path, text)


def write_training(path: str | Path, folder: Path) -> None:
    """The page of a training's folder, from its log. UserError where it cannot be written."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    text, _ = build({}, {str(folder): [json.loads(line) for line in lines]})
    files.write(path, text)
