"""The problems of each benchmark, and the prompts that ask for their answers.

    problems = load("gsm8k", limit=100)         # downloaded, checked, cached
    text = prompt(problems[0], TASKS["gsm8k"])  # what the user says to the model

A task is a file (lab/sources.py), a way to read its rows, and a kind of answer (lab/grading.py).
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import grading, programs
from lab.grading import readings
from lab.rows import aqua_row, bigbench_row, chat_row, gsm8k_row, gzipped_lines, humaneval_row
from lab.rows import json_document, json_lines, livecodebench_row, mbpp_row, plain_row
from lab.sources import ROOT, SOURCES, fetch
from model import UserError

# -------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """A benchmark: which file, how its rows are read, and how its answers are judged."""

    name: str
    kind: str | None  # kind of every answer; None: judged from each gold answer
    file: str  # a name in SOURCES, or a path in this repository; '': the user's own --data FILE
    rows: Callable[[Path], Iterator[tuple[str, Any]]] = json_lines
    parse: Callable[[dict], tuple] = plain_row
    tolerance: float = 0  # of numbers, see `grade`; 0 is exact
    part: tuple[float, float] = (0, 1)  # the fraction of the file that is used
    instruct: bool = True  # False: the prompt is the bare question


ALL = (
    Task("tiny", "number", "tiny/test.jsonl", instruct=False),
    Task("tiny-train", "number", "tiny/train.jsonl", instruct=False),
    Task("facts", "number", "tiny/facts/test.jsonl", instruct=False),
    Task("facts-train", "number", "tiny/facts/train.jsonl", instruct=False),
    Task("gsm8k", "number", "gsm8k_test.jsonl", parse=gsm8k_row),
    Task("gsm8k-train", "number", "gsm8k_train.jsonl", parse=gsm8k_row),
    Task("math500", "math", "math500.json", json_document, chat_row),
    Task("aime2024", "number", "aime2024.json", json_document, chat_row),
    Task("aime2025", "number", "aime2025.json", json_document, chat_row),
    Task("amc23", "number", "amc23.json", json_document, chat_row),
    Task("gpqa_diamond", "choice", "gpqa_diamond.json", json_document, chat_row),
    # gsm_hard's gold answers are rounded floats.
    Task("gsm_hard", "number", "gsm_hard.json", json_document, tolerance=1e-2),
    Task("svamp", "number", "svamp.json", json_document),
    Task("strategyqa", "yesno", "strategyqa_test.json", json_document),
    Task(
        "strategyqa-softcot-train", "yesno", "strategyqa_train.json", json_document, part=(0, 0.8)
    ),
    Task("strategyqa-softcot-test", "yesno", "strategyqa_train.json", json_document, part=(0.8, 1)),
    Task("aqua", "choice", "aqua_test.json", parse=aqua_row),
    Task("aqua-dev", "choice", "aqua_dev.json", parse=aqua_row),
    Task("aqua-train", "choice", "aqua_train.json", parse=aqua_row),
    Task("asdiv-aug", "number", "asdiv_aug_test.jsonl", parse=gsm8k_row, tolerance=1e-2),
    Task("asdiv-aug-train", "number", "asdiv_aug_train.jsonl", parse=gsm8k_row, tolerance=1e-2),
    Task("date_understanding", "choice", "date_understanding.json", json_document, bigbench_row),
    Task("humaneval", "code", "humaneval.jsonl.gz", gzipped_lines, humaneval_row),
    Task("mbpp", "code", "mbpp.json", json_document, mbpp_row),
    Task("livecodebench", "code", "", parse=livecodebench_row),  # graded by its own evaluator
    Task("graph", "choice", "tiny/graph/test.jsonl", instruct=False),
    Task("graph-train", "choice", "tiny/graph/train.jsonl", instruct=False),
    Task("data", None, ""),  # the user's own --data FILE without a task
)
TASKS = {task.name: task for task in ALL}
TRAINING = [name for name in TASKS if name.endswith("-train")]  # the others are tests


def training(name: str, data: str | Path | None = None) -> str:
    """Name the task to train on where `name` is asked for: gsm8k-train for gsm8k.

    data: the user's own file. Raises UserError for problems that an evaluation scores.
    """
    if data:
        tests = {task.file: task.name for task in ALL if task.name not in TRAINING and task.file}
        same = [test for file, test in tests.items() if same_file(Path(data), file)]
        if not same:
            return name
        name, what = same[0], f"--data {data} is the file of the test {same[0]}"
    elif name in ("data", *TRAINING) or name not in TASKS:  # unknown: `load` says so
        return name
    elif f"{name}-train" in TASKS:  # the task's own name is its test set
        return f"{name}-train"
    else:
        what = f"{name} is a test, which `eval` scores"
    near = [train for train in TRAINING if train.split("-")[0] == name.split("-")[0]] or TRAINING
    raise UserError(f"{what}: train on {' or '.join(near)}")


def same_file(path: Path, name: str) -> bool:
    """Tell whether a file is the one of a name in SOURCES, or of a path in this repository."""
    if not path.is_file():
        return False
    source = SOURCES.get(name)
    if source:
        known = source.sha256 and path.stat().st_size == source.bytes
        return bool(known) and hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256
    return path.read_bytes() == (ROOT / name).read_bytes()


# ----------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A question and its gold answer."""

    id: str  # 'gsm8k-00017': the task and the place in its file
    question: str
    answer: str  # gold: number, LaTeX, letter, yes/no, or tests, according to `kind`
    kind: str  # 'number', 'math', 'choice', 'yesno' or 'code': how an answer is read and judged
    choices: dict[str, str] | None = None  # letter -> text
    steps: list[str] | None = None  # worked reasoning, line by line, for training


def load(
    name: str, data: str | Path | None = None, limit: int | None = None, run_code: bool = False
) -> list[Problem]:
    """Load the first `limit` problems of a task.

    data: the user's own JSON lines (`question`, `answer` or `tests`, optional `choices`, `steps`),
    read in the place of the task's file; the task 'data' judges each answer's kind by itself.
    run_code: whether generated programs may be run, which is the only way to grade some tasks.
    Raises UserError for an unknown task, a file that cannot be had, a row that is no problem, and
    programs that may not, or cannot, be run.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UserError(f"no task {name!r}{hint}; the tasks are {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give a number of problems, 1 or more")
    task = TASKS[name]
    if task.kind == "code" and task.file:  # before anything is downloaded
        programs.permitted(str(data or name), run_code)
    if data:
        parse = plain_row if task.file else task.parse
        path, rows, part = Path(data), json_lines, (0, 1)
    elif not task.file:
        raise UserError(f"the task {name!r} reads your own file: name it with --data FILE")
    else:
        path, rows, parse, part = fetch(task.file), task.rows, task.parse, task.part
    if path.is_fifo() and path.parent != Path("/dev/fd"):  # nobody may ever write to it
        raise UserError(f"{path} is a named pipe: give a file")
    try:
        rows = list(rows(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except ValueError:  # a NUL in its name
        raise UserError(f"cannot read {str(path)!r}: no such name") from None
    start, stop = (int(fraction * len(rows)) for fraction in part)
    if start == stop:
        raise UserError(f"{path} holds no problems")
    problems = [
        make_problem(task, n, row, parse, f"{path}, {place}")
        for n, (place, row) in enumerate(rows[start:stop][:limit], start)
    ]
    if any(problem.kind == "code" and programs.HERE in problem.answer for problem in problems):
        programs.permitted(str(data or name), run_code)
    return problems


def make_problem(task: Task, n: int, row: Any, parse: Callable, where: str) -> Problem:
    """Make a Problem of row n of a file.

    Raises UserError that begins with `where` if the row makes none.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{where}: {what}")

    try:
        question, answer, choices, steps = parse(row)
    except KeyError as error:
        raise wrong(f"the field {error} is missing") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise wrong(f"not in the form that the task {task.name} needs ({error})") from None
    if not isinstance(question, str) or not question.strip():
        raise wrong("'question' is not a text, or empty")
    if not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise wrong("'answer' is not a text or a number, or empty")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    answer = str(answer).strip()
    if isinstance(choices, list):
        choices = {chr(ord("A") + i): choice for i, choice in enumerate(choices)}
    if choices is not None:
        lettered = isinstance(choices, dict) and all(re.fullmatch("[A-Z]", key) for key in choices)
        if not lettered or not choices:
            raise wrong("'choices' is not a list of texts, or texts by letter A, B, ...")
        choices = {letter: str(choice).strip() for letter, choice in choices.items()}
    if isinstance(steps, str):
        steps = steps.splitlines()
    if steps is not None:
        if not isinstance(steps, list):
            raise wrong("'steps' is not a text or a list of texts")
        steps = [str(step).strip() for step in steps if str(step).strip()]
    if re.search(
        "[\ud800-\udfff]", "".join([question, answer, *(choices or {}).values(), *(steps or [])])
    ):
        raise wrong("a text in it is not valid Unicode")

    verdict = {"true": "yes", "false": "no"}.get(answer.lower(), answer.lower())
    if choices:
        kind = "choice"
    elif task.kind:
        kind = task.kind
    elif programs.HERE in answer:
        kind = "code"
    elif verdict in ("yes", "no"):
        kind = "yesno"
    else:
        kind = "number" if readings(answer) else "math"
    if kind == "choice":
        if not choices:
            raise wrong("'choices' is missing")
        if answer not in choices:  # then it is the text of one
            letter = next((key for key, text in choices.items() if text == answer), None)
            if letter is None:
                raise wrong(f"the answer {answer!r} is none of the choices")
            answer = letter
    elif kind == "yesno":
        if verdict not in ("yes", "no"):
            raise wrong(f"the answer {answer!r} is not yes, no, true or false")
        answer = verdict
    elif kind == "code" and task.parse is not livecodebench_row and programs.HERE not in answer:
        raise wrong("'tests' is missing")
    elif kind == "number" and not readings(answer):
        raise wrong(f"the answer {answer!r} is not a number")
    return Problem(f"{task.name}-{n:05d}", question.strip(), answer, kind, choices, steps)


def of_record(task: Task, record: dict, where: str) -> Problem:
    """The problem that a record of a result file is of; its id is not the record's."""
    row = {"question": record["question"], "answer": record["gold"], "choices": record["choices"]}
    return make_problem(task, 0, row, plain_row, where)


# ------------------------------------------------------------------------------------------ prompts

INSTRUCTION = {
    "number": "Think step by step. Then write the final answer, a number without its unit, inside "
    "\\boxed{}.",
    "math": "Think step by step. Then write the final answer, in its simplest form, inside "
    "\\boxed{}.",
    "choice": "Think step by step. Then write the letter of the right choice inside \\boxed{}.",
    "yesno": "Think step by step. Then write yes or no inside \\boxed{}.",
    "code": "Think step by step. Then write the whole program in Python, in one code block that "
    "begins with ```python, without tests or examples.",
}


def lists_choices(problem: Problem) -> bool:
    """Tell whether the question itself lists every choice behind its letter, as GPQA's do."""
    question = "".join(problem.question.split())
    return bool(problem.choices) and all(
        any(f"{letter}{mark}{''.join(text.split())}" in question for mark in (".", ")", ":"))
        for letter, text in problem.choices.items()
    )


def prompt(problem: Problem, task: Task) -> str:
    """The user's message: question, choices one a line, and what form the answer takes."""
    if not task.instruct:
        return problem.question
    listed = {} if lists_choices(problem) else problem.choices or {}
    choices = "\n".join(f"{letter}) {text}" for letter, text in listed.items())
    parts = (problem.question, choices, INSTRUCTION[problem.kind])
    return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True, eq=False)
class Asked:
    """A question as a method sees it: its text, and how answers are read, compared and counted."""

    text: str
    read: Callable[[str], str | None]
    same: Callable[[str | None, str | None], bool]
    form: str = ""  # tells a verifier in which form to answer
    vote: Callable[..., int | None] = grading.vote
    judge: Callable[..., str] | None = None  # makes the verifier's message in another way


def ask(problem: Problem, task: Task) -> Asked:
    form = INSTRUCTION[problem.kind] if task.instruct else ""
    return Asked(prompt(problem, task), *grading.reader(problem, task.tolerance), form)


def ask_number(text: str, form: str = "") -> Asked:
    """Somebody's own question, whose answer is read as a number."""
    return Asked(text, *grading.reader(Problem("question", text, "", "number")), form)
