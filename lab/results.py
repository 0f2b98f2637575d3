"""Runs of methods on problems: graded records in a file, and a table of what came out.

    run(problems, TASKS["gsm8k"], {"cot": ({"seed": 0}, solve)}, output="gsm8k.jsonl")

A result file is JSON lines: one graded record per (problem, method, sample), with the settings that
made it, in the order in which they finished. Two runs of the same settings hold the same records,
compared after sorting by that key and without `seconds`.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from lab import files
from lab.files import append, check_place, plain_json, publish
from lab.grading import extract, grade, grader
from lab.ranks import ALONE, Place
from lab.tables import length, report
from lab.tasks import Problem, Task, prompt
from model import UserError

Job = tuple[Problem, int]  # a problem and the index of a sample
Solve = Callable[[list[Job]], Iterable[tuple[Problem, int, dict]]]

# -------------------------------------------------------------------------------------------- runs

KEY = ("problem", "method", "sample")  # what tells the records of a task apart
FACTS = ("question", "choices", "gold", "extracted", "correct")  # what else is read of them


def run(
    problems: list[Problem],
    task: Task,
    methods: dict[str, tuple[dict, Solve]],
    num_samples: int | dict[str, int] = 1,
    output: str | Path | None = None,
    json_path: str | Path | None = None,
    place: Place = ALONE,
) -> tuple[dict, dict[tuple, dict]]:
    """Run methods one after the other on the same problems, grade, record, and print the table.

    Returns what --json writes, and the records by (problem id, method, sample index).

    methods: name -> (settings, solve). settings: everything that changes what the method answers;
    records in `output` are taken over if theirs are equal. solve(jobs) gets the (problem, sample
    index) pairs still to be done and yields (problem, sample, record) as they finish. record:
    answer_text, optional thought_text, thought_tokens, answer_tokens, seconds, stopped_by, prompt,
    answers (of several candidates), and whatever else the method wants to keep.

    num_samples: of each problem, for all methods or by method; records in `output` of more samples
    are left out of the table.

    place: this process's among several that share the jobs. Each appends to a file of its own
    (files.part); rank 0 alone returns, when all are done, with the records of all.

    Raises UserError for a file that cannot be written, or is of other settings or problems.
    KeyboardInterrupt and errors of the method pass through; what was finished is in the file.
    """
    for path in filter(None, (output, json_path)):
        check_place(path)
    common = {"task": task.name, "grader": grader(task)}
    settings = {method: plain_json({**common, **own}) for method, (own, _) in methods.items()}
    done, own = {}, place.file(output)
    if own:
        files.resume(own, settings, KEY, FACTS)
        done = together(output, settings)
    check_problems(output, done, problems, methods)
    samples = num_samples
    if not isinstance(samples, dict):
        samples = dict.fromkeys(methods, num_samples)
    records, speeds = {}, {}
    for method, (_, solve) in methods.items():
        wanted = [(problem, sample) for problem in problems for sample in range(samples[method])]
        keys = [(problem.id, method, sample) for problem, sample in wanted]
        jobs = place.same([job for job, key in zip(wanted, keys) if key not in done])
        right = sum(done[key]["correct"] for key in keys if key in done)
        start, tokens, made = time.perf_counter(), 0, 0
        with tqdm(desc=method, total=len(wanted), initial=len(wanted) - len(jobs)) as bar:
            for problem, sample, record in solve(jobs) if jobs else ():
                record = record | {"settings": settings[method]}
                record = graded(problem, task, method, sample, record)
                if own:
                    append(own, record)
                done[problem.id, method, sample] = record
                right, tokens = right + record["correct"], tokens + (length(record) or 0)
                made += 1
                bar.set_postfix_str(f"accuracy {right / (bar.n + 1):.1%}", refresh=False)
                bar.update()
        if tokens:
            speeds[method] = tokens / (time.perf_counter() - start), made
    place.first_goes_on()
    if place.replicas > 1:
        done = together(output, settings)
    for method in methods:
        numbers = range(samples[method])
        records[method] = [[done[p.id, method, i] for i in numbers] for p in problems]
    result, table = report(task, settings, records, speeds)
    publish(table, result, json_path)
    shown = [(p.id, m, i) for m in methods for p in problems for i in range(samples[m])]
    return result, {key: done[key] for key in shown}


def together(output: str | Path, settings: dict[str, dict]) -> dict[tuple, dict]:
    """The records of all parts of a result file."""
    done = {}
    for name in files.parts(output):
        done |= files.records(name, settings, KEY, FACTS)[0]
    return done


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
        "settings": record["settings"],  # first: lab/files.py knows a half-written record by it
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


def over_seeds(
    result: dict,
    records: dict[tuple, dict],
    problems: list[Problem],
    samples: dict[str, int],
    json_path: str | Path | None,
) -> None:
    """Add each method's mean and standard deviation to the result of `run`; print and write them.

    A sample is a seed; of a method with one only the accuracy is known.
    """
    lines, result["seeds"] = ["\naccuracy, mean ± standard deviation over the seeds"], {}
    for method, n in samples.items():
        right = [[records[p.id, method, k]["correct"] for p in problems] for k in range(n)]
        each = [mean(grades) for grades in right]
        std = stdev(each) if n > 1 else None
        result["seeds"][method] = {"accuracies": each, "mean": mean(each), "std": std}
        spread = "(one seed is all)" if std is None else f"± {100 * std:.1f}"
        lines.append(f"{method:24} {mean(each):.1%} {spread}")
    publish("\n".join(lines), result, json_path)
