"""Grade a result file again, without generating: another grader, or newer rules.

    python -m lab.regrade math500.jsonl --output regraded.jsonl --at 1,4,16

What is read anew is the text that a record keeps:

- answer_text, or else thought_text: every record's `extracted` and `correct`.
- texts (sc, fire, cot-decoding, SoftCoT's draws): each text's answer is read, and the vote is held
  again; a text that did not win before may be the record's answer now. CoT-decoding's weights stay
  the recorded ones, since a margin at another place of the text is not in the record: a text in
  which no answer was found has weight 0.
- points (Soft Reasoning): each point's answer is read anew, for `any_correct`. The chosen point
  stays: rewards and later points come from the answers as the search read them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace

from lab import at_k, cli, files, flags, grading, programs, tables, tasks
from lab.results import KEY, graded
from lab.schema import check_record
from lab.tasks import TASKS, Problem, Task
from model import UserError, split_thought

FIELDS = (*KEY, "settings", "question", "choices", "gold", "answer_text", "extracted", "correct")
SHOWN = 5  # changed records that are listed

# ----------------------------------------------------------------------------------------- reading


def read(path: str) -> list[dict]:
    """The records of a result file, in its order; a half-written last line is left out.

    Raises UserError for a file that cannot be read or holds something else, or a record twice.
    """
    content = files.read(path)
    whole, records = content[: content.rfind(b"\n") + 1], {}
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            lacking = [name for name in FIELDS if name not in record]
            lacking += [] if lacking or "task" in record["settings"] else ["settings.task"]
            _ = lacking or check_record(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}, line {n}: not a record; delete the line") from None
        if lacking:
            of = "only a run with --task or --data makes records that can be graded"
            raise UserError(f"{path}, line {n}: no {lacking[0]!r} in this record; {of}")
        key = key_of(record)
        if key in records:
            raise UserError(f"{path}, line {n}: {' '.join(map(str, key))} is there twice")
        records[key] = record
    if rest := len(content) - len(whole):
        said = f"its {rest} bytes are left out"
        print(f"{path}: the last line is half-written; {said}", file=sys.stderr)
    if not records:
        raise UserError(f"{path} holds no records")
    return list(records.values())


def key_of(record: dict) -> tuple:
    return tuple(record[name] for name in KEY)


def only_task(path: str, records: list[dict], wanted: str | None) -> Task:
    """The task of all records. UserError for several, for an unknown one, or one not wanted."""
    names = sorted({str(record["settings"]["task"]) for record in records})
    if len(names) > 1:
        raise UserError(f"{path} mixes the tasks {', '.join(names)}: one file for each, please")
    if wanted and wanted != names[0]:
        raise UserError(f"{path} is of the task {names[0]}, not of {wanted}")
    if names[0] not in TASKS:
        raise UserError(f"{path} is of an unknown task, {names[0]!r}; known: {', '.join(TASKS)}")
    return TASKS[names[0]]


def only_settings(path: str, records: list[dict], grader: str) -> dict[str, dict]:
    """Method -> its settings, with this grader. UserError for a method with several."""
    found: dict[str, dict] = {}
    for record in records:
        method, there = record["method"], record["settings"] | {"grader": grader}
        if found.setdefault(method, there) != there:
            raise UserError(f"{path}: {method} has records of different settings")
    return found


def problems_of(path: str, records: list[dict], task: Task) -> dict[str, Problem]:
    """Id -> problem. UserError for a record that holds none, or another one of the same id."""
    found: dict[str, Problem] = {}
    for record in records:
        name = record["problem"]
        problem = replace(tasks.of_record(task, record, f"{path}, {name}"), id=name)
        if found.setdefault(name, problem) != problem:
            raise UserError(f"{path}: records of two different problems are named {name}")
    return found


# ----------------------------------------------------------------------------------------- grading


def regraded(record: dict, problem: Problem, task: Task) -> dict:
    """The record with its answers read, voted on, and graded anew."""
    method, sample = record["method"], record["sample"]
    settings = record["settings"] | {"grader": grading.grader(task)}
    read_anew = candidates(record, *grading.reader(problem, task.tolerance))
    return graded(problem, task, method, sample, record | read_anew | {"settings": settings})


def candidates(record: dict, read_answer: Callable, same: Callable) -> dict:
    """What changes in a record of several candidates: their answers, and which text is chosen."""
    if "texts" in record:
        answers = [read_answer(text) for text in record["texts"]]
        i = grading.vote(answers, same, record.get("weights"))
        thought, said = split_thought(record["texts"][i or 0])
        return {"answers": answers, "thought_text": thought, "answer_text": said}
    if "points" in record:
        return {"answers": [read_answer(point["text"]) for point in record["points"]]}
    if len(record.get("answers", ())) == 1:  # the candidate is the answer itself
        text = f"{record.get('thought_text', '')}</think>{record['answer_text']}"
        return {"answers": [read_answer(text)]}
    return {}


def changes(old: list[dict], new: list[dict]) -> list[str]:
    """What regrading changed: a line for each method, and the first records."""
    names, lines = ("extracted", "correct", "any_correct"), []
    pairs = [(a, b) for a, b in zip(old, new) if any(a.get(x) != b.get(x) for x in names)]
    for method in dict.fromkeys(record["method"] for record in old):
        mine = [(a, b) for a, b in pairs if a["method"] == method]
        n = sum(record["method"] == method for record in old)
        lost = sum(a["correct"] and not b["correct"] for a, b in mine)
        won = sum(b["correct"] and not a["correct"] for a, b in mine)
        turned = f"{lost} right -> wrong, {won} wrong -> right"
        lines.append(f"{method}: {len(mine)} of {n} records changed; {turned}")
    for a, b in pairs[:SHOWN]:
        graded_as = [("wrong", "right")[record["correct"]] for record in (a, b)]
        name = f"{b['problem']} {b['method']} {b['sample']}"
        line = f"  {name}: {a['extracted']!r} -> {b['extracted']!r}, {' -> '.join(graded_as)}"
        if a.get("any_correct") != b.get("any_correct"):
            line += "; now a candidate is right" if b["any_correct"] else "; now no candidate is"
        lines.append(line)
    return lines + ([f"  and {len(pairs) - SHOWN} more"] if len(pairs) > SHOWN else [])


# ----------------------------------------------------------------------------------------- program


def finished(path: str, records: list[dict]) -> tuple[dict[str, list[list[dict]]], list[str]]:
    """records[method][problem][sample], and the problems' ids, as a finished run has them.

    Left out are problems of which some method has fewer samples than of another problem.
    """
    found: dict[str, dict[str, list[dict]]] = {}
    for record in sorted(records, key=lambda record: record["sample"]):
        found.setdefault(record["method"], {}).setdefault(record["problem"], []).append(record)
    methods = list(dict.fromkeys(record["method"] for record in records))
    samples = {method: max(map(len, found[method].values())) for method in methods}
    names = sorted({record["problem"] for record in records})
    whole = [
        name
        for name in names
        if all(len(found[method].get(name, [])) == samples[method] for method in methods)
    ]
    if not whole:
        raise UserError(f"{path}: no problem has all samples of all methods; finish the run first")
    if less := len(names) - len(whole):
        said = f"{less} of {len(names)} problems, which not every method has finished"
        print(f"{path}: left out of the table: {said}", file=sys.stderr)
    return {method: [found[method][name] for name in whole] for method in methods}, whole


def regrade(
    path: str, output: str | None, wanted: str | None, at: list[int], run_code: bool = False
) -> None:
    old = read(path)
    task = only_task(path, old, wanted)
    settings = only_settings(path, old, grading.grader(task))
    problems = problems_of(path, old, task)
    if any(problem.kind == "code" for problem in problems.values()):
        programs.permitted(path, run_code)
    new = [regraded(record, problems[record["problem"]], task) for record in old]
    records, names = finished(path, new)
    shown = tables.report(task, settings, records, {})[1]
    if at:
        sames = [grading.reader(problems[name], task.tolerance)[1] for name in names]
        shown += "\n\n" + at_k.report(records, sames, at)
    if output:
        check_replaced(output, {key_of(record) for record in new})
        files.write(output, "".join(json.dumps(record) + "\n" for record in new).encode())
    print(shown)
    before = dict.fromkeys(str(record["settings"].get("grader")) for record in old)
    print(f"\nbefore: graded by {' and '.join(before)}", *changes(old, new), sep="\n")


def check_replaced(output: str, keys: set[tuple]) -> None:
    """UserError where a file is there that is no result file, or has other records than these."""
    if os.path.exists(output) and os.path.getsize(output):
        try:
            lost = [record for record in read(output) if key_of(record) not in keys]
        except UserError:
            lost = [output]
        if lost:
            fault = "holds something else than these records"
            raise UserError(f"{output} {fault}: give --output another name, or delete it")


def numbers(text: str) -> list[int]:
    """'1,4,16' as numbers, for argparse."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        form = "numbers from 1 on, with commas between them"
        raise argparse.ArgumentTypeError(f"takes {form}, not {text!r}")
    return [int(part) for part in parts]


def command(arguments: list[str]) -> int:
    parser = flags.new_parser("lab.regrade", __doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="result file of a run's --output")
    output = {"help": "write the records there, graded anew (FILE itself: in its place)"}
    task = {"help": "refuse a file of another task than this one"}
    flags.add_flags(parser, "task output run-generated-code", task=task, output=output)
    k = "also pass@k and majority@k, for these k: 1,4,16"
    parser.add_argument("--at", type=numbers, metavar="K,K", default=[], help=k)
    args: argparse.Namespace = parser.parse_args(arguments)

    def body() -> None:
        flags.check_given(args)
        with files.reserved(args.output):
            regrade(args.file, args.output, args.task, args.at, args.run_generated_code)

    return cli.guarded("lab.regrade", body)


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
