"""One page of what was recorded: thoughts, searches, trainings, and how the methods compare.

    python -m lab.report gsm8k.jsonl                        # gsm8k.html
    python -m lab.report soft.jsonl cot.jsonl out/log.jsonl --output page.html

A FILE is what a run's --output wrote, or the log.jsonl of a training's folder. Records made with
--trace show every concept token, or every soft thought. --svg writes all pictures as files;
--logprobs the thoughts as JSON lines in the form of OpenAI's chat completions with `top_logprobs`.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from lab import cli, files, flags, page, traces
from lab.charts import Chart
from lab.schema import IDS, check_record, misfit
from model import UserError

FIELDS = ("method", "settings", "question", "answer_text")
GRADES = ("problem", "sample", "gold", "choices", "extracted")
RUN = "a run with --output FILE, or a training's folder, writes one"


def read(path: str) -> tuple[list[dict], str]:
    """A file's records, or a log's lines, in its order; and a note, '' or what was left out.

    Raises UserError for a file that cannot be read, holds something else, or no record.
    """
    content = files.read(path)
    whole, records = content[: content.rfind(b"\n") + 1], []
    for n, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            check(record)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise UserError(f"{path}, line {n}: not a record; delete the line") from None
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no records: {RUN}")
    rest = len(content) - len(whole)
    return records, f"{path}: the last line is half-written and left out" if rest else ""


def check(record: dict) -> None:
    """Raise what a line raises that is neither a record nor a line of a log."""
    if "step" in record and "method" not in record:
        finite(record["step"], *(value for value in record.values() if value is not None))
        return
    for name in FIELDS + (GRADES if "correct" in record else ()):
        record[name]
    check_record(record)
    for point in record.get("points") or ():
        finite(*point["u"], point["reward"], point["tokens"], point["round"])
        finite(*(point[name] or 0 for name in ("reward_verifier", "reward_coherence", "ei")))
        finite(*(verdict["tokens"] for verdict in record["verdicts"]))
    steps = record.get("steps") or ()
    for token, step in zip(record["thought_ids"] if steps else (), steps, strict=True):
        finite(*step["probs"], step["entropy"])
        check_ids(token, *step["ids"])
    if found := record.get("soft_thoughts"):
        norms, cosines, nearest = (found[name] for name in ("norms", "cosines", "nearest"))
        finite(*norms, *(cosine for row in cosines for cosine in row))
        finite(*(cosine for near in nearest for _, cosine in near))
        check_ids(*(token for near in nearest for token, _ in near))
        if [len(row) for row in cosines] != list(range(len(norms))) or not norms:
            raise ValueError


def finite(*numbers: float) -> None:
    """ValueError for one that no picture can show, TypeError for what is none."""
    if not all(-1e300 < number < 1e300 for number in numbers):
        raise ValueError


def check_ids(*tokens: int) -> None:
    if misfit("ids", list(tokens), IDS):
        raise ValueError


def log_of(path: str) -> str:
    """A training's folder stands for its log."""
    return os.path.join(path, "log.jsonl") if os.path.isdir(path) else path


def write_pictures(folder: str, charts: list[Chart]) -> None:
    """Each as an SVG file of its own. UserError where they cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    for chart in charts:
        name = re.sub(r"[^\w.-]+", "-", chart.name)
        files.write(Path(folder) / f"{name}.svg", chart.svg(alone=True) + "\n")
    print(f"{folder}: {len(charts)} pictures")


def write_logprobs(path: str, records: list[dict], model: str | None) -> None:
    """A JSON line for each record with a trace. UserError where there is none."""
    traced = [record for record in records if "steps" in record]
    if not traced:
        make = "run soft_thinking.py with --output FILE --trace"
        raise UserError(f"--logprobs needs records with a trace: {make}")
    names = {}
    lines = []
    for record in traced:
        name = model or str(record["settings"].get("model"))
        if name not in names:
            names[name] = traces.Names(traces.tokenizer_of(name))
        line = traces.logprobs(traces.Trace(record, names[name]))
        lines.append(json.dumps(line) + "\n")
    files.write(path, "".join(lines))
    print(f"{path}: {len(lines)} thoughts")


def report(args: argparse.Namespace) -> None:
    paths = list(dict.fromkeys(args.files))
    first = Path(paths[0])
    stem = first if first.name.strip(".") else Path("report")  # . and .. have no name
    output = args.output or str(stem.with_suffix(".html"))
    files.check_start(output)
    if args.logprobs:
        files.check_start(args.logprobs, b'{"object": "chat.completion"')
    named, logs, notes = {}, {}, []
    for path in paths:
        records, note = read(log_of(path))
        lines = [record for record in records if "method" not in record]
        if lines:
            logs[path] = lines
        if len(lines) < len(records):
            named[path] = [record for record in records if "method" in record]
        if note:
            print(note, file=sys.stderr)
            notes.append(note)
    text, charts = page.build(named, logs, notes, args.model)
    if args.logprobs:
        write_logprobs(args.logprobs, [r for of in named.values() for r in of], args.model)
    if args.svg:
        write_pictures(args.svg, charts)
    files.write(output, text)
    print(f"{output}: {len(text.encode()) / 1e6:.1f} MB")


def command(arguments: list[str]) -> int:
    parser = flags.new_parser("lab.report", __doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "files", metavar="FILE", nargs="+", help="records of a run, a training's log, or its folder"
    )
    add("-o", "--output", metavar="PAGE", help="(default: the first FILE's name, with .html)")
    add("--svg", metavar="FOLDER", help="also every picture as an SVG file")
    add("--logprobs", metavar="FILE", help="also the thoughts, as OpenAI's top_logprobs")
    add("--model", help="whose tokenizer names the tokens (default: the records' own)")
    args = parser.parse_args(arguments)
    return cli.guarded("lab.report", lambda: report(args))


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
