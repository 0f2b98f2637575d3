"""How the files of the benchmarks are read: what a row is, and where it holds a problem."""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab.programs import HERE, fenced, with_tests
from model import UserError


def json_lines(path: Path, opened: Callable = open) -> Iterator[tuple[str, Any]]:
    """Read a file of JSON lines: pairs of a place ('line 7') and a row.

    Raises UserError on a line that is not JSON.
    """
    with opened(path, "rb") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {n}", json.loads(line)
                except (ValueError, RecursionError) as error:  # text that is not UTF-8, too
                    raise UserError(
                        f"{path}, line {n}: not a JSON object ({error}); fix or delete the line"
                    ) from None


def gzipped_lines(path: Path) -> Iterator[tuple[str, Any]]:
    return json_lines(path, gzip.open)


def json_document(path: Path) -> Iterator[tuple[str, Any]]:
    """Read one JSON array, or one BIG-bench task with its `examples`: pairs as json_lines gives."""
    try:
        document = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    rows = document["examples"] if isinstance(document, dict) else document
    for n, row in enumerate(rows, 1):
        yield f"entry {n}", row


# Each of the next takes a row and returns its question, answer, choices and steps as they stand
# there.


def plain_row(row: dict) -> tuple:
    """`question`, `answer`, and optional `choices` and `steps`; or `question` and `tests`.

    StrategyQA's files call the steps `facts` or `thought`. Tests are one text, or several.
    """
    question, tests = row["question"], row.get("tests")
    if tests is not None:
        tests = "\n".join(tests) if isinstance(tests, list) else tests
        if not tests.strip() or HERE in tests:
            raise ValueError(f"'tests' are empty, or hold the line {HERE!r}")
    answer = row["answer"] if tests is None else with_tests(tests)
    steps = row.get("steps", row.get("facts", row.get("thought")))
    return question, answer, row.get("choices"), steps


def gsm8k_row(row: dict) -> tuple:
    work, _, answer = row["answer"].rpartition("####")
    steps = re.sub(r"<<.*?>>", "", work)  # <<16-3=13>> are calculator marks
    return row["question"], answer, None, steps


def chat_row(row: dict) -> tuple:
    return row["prompt"][0]["value"], row["final_answer"], row.get("choices"), None


def aqua_row(row: dict) -> tuple:
    question, answer = row["question"], row["correct"]
    choices = {option[0]: option[2:] for option in row["options"]}
    return question, answer, choices, row["rationale"]


def bigbench_row(row: dict) -> tuple:
    def place(option: str) -> bytes:
        return hashlib.sha256((row["input"] + option).encode()).digest()

    # The file lists the right option first. This order looks random and never changes.
    options = sorted(row["target_scores"], key=place)
    (right,) = [option for option in options if row["target_scores"][option]]
    return row["input"], right, options, None


def humaneval_row(row: dict) -> tuple:
    """The program may be the body of the prompt's function, or the function once more."""
    check = f"{row['test']}\ncheck({row['entry_point']})"
    question = f"Complete this function.\n\n{fenced(row['prompt'])}"
    return question, with_tests(check, row["prompt"]), None, None


def mbpp_row(row: dict) -> tuple:
    """The tests are shown: nothing else says how the function is called."""
    question, gold = row["prompt"][0]["value"], row["final_answer"]
    tests = "\n".join(gold["test_list"])
    question = f"{question}\n\nThe program must pass these tests.\n\n{fenced(tests)}"
    return question, with_tests("\n".join([*gold["test_import"], tests])), None, None


def livecodebench_row(row: dict) -> tuple:
    """A row of LiveCodeBench's own files; in the answer's place its `question_id`."""
    start = "The program reads standard input and prints the answer."
    if row["starter_code"].strip():
        start = f"Complete this.\n\n{fenced(row['starter_code'])}"
    return f"{row['question_content']}\n\n{start}", row["question_id"], None, None
