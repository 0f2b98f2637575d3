"""lab/tasks.py and lab/sources.py: every count and file that they promise, and every mistake.

TASK_DATA=folder names copies of the benchmark files (named as in lab/sources.py); without it the
counts are skipped.
"""

import gzip
import hashlib
import json
import os
import shutil
import urllib.error
from pathlib import Path

import pytest

from lab import sources
from lab.grading import extract, grade
from lab.programs import HERE
from lab.tasks import TASKS, TRAINING, Problem, load, prompt, training
from model import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refuse(url, timeout):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    folder = tmp_path / "soft-reasoning-reference"
    folder.mkdir()
    return folder


def write_lines(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def put(monkeypatch, folder, name, content):
    """Puts content into the cache as the file `name`, and makes its checksum the pinned one."""
    (folder / name).write_bytes(content)
    source = sources.SOURCES[name]
    monkeypatch.setitem(
        sources.SOURCES,
        name,
        sources.Source(
            source.repository,
            source.commit,
            source.path,
            len(content),
            hashlib.sha256(content).hexdigest(),
        ),
    )


# ----------------------------------------------------------------------------------------- problems

COUNTS = {
    "gsm8k": 1319,
    "gsm8k-train": 7473,
    "math500": 500,
    "aime2024": 30,
    "aime2025": 30,
    "amc23": 40,
    "humaneval": 164,
    "mbpp": 257,
    "gpqa_diamond": 198,
    "gsm_hard": 1306,
    "svamp": 300,
    "strategyqa": 687,
    "strategyqa-softcot-train": 1648,
    "strategyqa-softcot-test": 413,
    "aqua": 254,
    "aqua-dev": 254,
    "date_understanding": 369,
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_file_parses_to_the_number_of_problems_that_its_paper_reports(name, cache):
    source = Path(os.environ.get("TASK_DATA", "/nowhere")) / TASKS[name].file
    if not source.exists():
        pytest.skip(f"set TASK_DATA to a folder that holds {TASKS[name].file}")
    shutil.copy(source, cache)
    problems = load(name, run_code=True)
    assert len(problems) == COUNTS[name] == len({problem.id for problem in problems})
    for problem in problems:
        text = prompt(problem, TASKS[name])
        assert problem.question in text
        if problem.kind == "code":
            assert problem.answer.count(HERE) == 1 and text.count("```python\n") == 1
            continue
        assert "\\boxed{}" in text
        assert all(choice in text for choice in (problem.choices or {}).values())
        answer = extract(
            f"3 steps. So it is \\boxed{{{problem.answer}}}.", problem.kind, problem.choices
        )
        assert grade(answer, problem.answer, problem.kind, TASKS[name].tolerance)


def test_the_formats_of_the_files(cache, monkeypatch):
    put(
        monkeypatch,
        cache,
        "gsm8k_test.jsonl",
        json.dumps(
            {
                "question": "Two and two, 500 times?",
                "answer": "It is 2+2=<<2+2=4>>4.\nThen 2,000.\n#### 2,000",
            }
        ).encode(),
    )
    assert load("gsm8k") == [
        Problem(
            "gsm8k-00000",
            "Two and two, 500 times?",
            "2,000",
            "number",
            None,
            ["It is 2+2=4.", "Then 2,000."],
        )
    ]
    put(
        monkeypatch,
        cache,
        "math500.json",
        json.dumps(
            [{"prompt": [{"from": "user", "value": "Half?"}], "final_answer": "\\frac12"}]
        ).encode(),
    )
    assert load("math500") == [Problem("math500-00000", "Half?", "\\frac12", "math")]
    put(
        monkeypatch,
        cache,
        "gpqa_diamond.json",
        json.dumps(
            [
                {
                    "prompt": [{"from": "user", "value": "Which?"}],
                    "final_answer": "B",
                    "choices": {"A": "this", "B": "that"},
                }
            ]
        ).encode(),
    )
    assert load("gpqa_diamond") == [
        Problem("gpqa_diamond-00000", "Which?", "B", "choice", {"A": "this", "B": "that"})
    ]
    put(
        monkeypatch,
        cache,
        "gsm_hard.json",
        json.dumps(
            [
                {"index": 0, "question": "Q?", "answer": -5.0},
                {"index": 1, "question": "R?", "answer": 5e-07},
            ]
        ).encode(),
    )
    assert [problem.answer for problem in load("gsm_hard")] == ["-5", "5e-07"]
    put(
        monkeypatch,
        cache,
        "strategyqa_train.json",
        json.dumps(
            [
                {"question": f"{i}?", "answer": i % 2 == 0, "facts": ["One.", "Two."]}
                for i in range(10)
            ]
        ).encode(),
    )
    train, test = load("strategyqa-softcot-train"), load("strategyqa-softcot-test")
    assert [problem.question for problem in train + test] == [f"{i}?" for i in range(10)] and len(
        train
    ) == 8
    assert (
        train[0].answer == "yes" and train[1].answer == "no" and train[0].steps == ["One.", "Two."]
    )
    put(
        monkeypatch,
        cache,
        "aqua_test.json",
        json.dumps(
            {"question": "Q?", "options": ["A)1", "B) 2"], "rationale": "So B.", "correct": "B"}
        ).encode(),
    )
    assert load("aqua") == [
        Problem("aqua-00000", "Q?", "B", "choice", {"A": "1", "B": "2"}, ["So B."])
    ]


def test_the_numbers_of_aime_and_amc(cache):
    """AMC's answers may be floats, or fractions; the files' checksums are not known."""
    answers = [70, "27.0", 27.0, "-1/2", "-1", "\\frac{1}{2}"]
    rows = [
        {"prompt": [{"from": "user", "value": "How many?"}], "final_answer": a} for a in answers
    ]
    right = ["70", "27", "27.0", "-0.5", "-1.0", "0.5"]
    for name in ("aime2025", "amc23"):
        (cache / f"{name}.json").write_text(json.dumps(rows))
        problems = load(name)
        assert [problem.kind for problem in problems] == ["number"] * 6
        for problem, said in zip(problems, right):
            answer = extract(f"So it is \\boxed{{{said}}}.", "number")
            assert grade(answer, problem.answer, "number"), (said, problem.answer)
            assert not grade("26", problem.answer, "number")


HUMANEVAL = {
    "task_id": "Made/0",
    "prompt": 'from typing import List\n\n\ndef largest(xs: List[int]) -> int:\n    """Which?"""\n',
    "entry_point": "largest",
    "canonical_solution": "    return max(xs)\n",
    "test": "\n\ndef check(candidate):\n    assert candidate([1, 3, 2]) == 3\n",
}
MBPP = {
    "prompt": [{"from": "user", "value": "Write a function for the area of a circle."}],
    "final_answer": {
        "task_id": 7,
        "code": "import math\ndef area(r):\n    return math.pi * r * r",
        "test_list": ["assert math.isclose(area(1), math.pi)", "assert area(0) == 0"],
        "test_import": ["import math"],
    },
}


def test_the_rows_of_code_and_what_is_asked(cache, monkeypatch):
    """Each prompt says how the function is called, once, and never shows how it is solved."""
    line = json.dumps(HUMANEVAL).encode()
    put(monkeypatch, cache, "humaneval.jsonl.gz", gzip.compress(line + b"\n" + line + b"\n"))
    put(monkeypatch, cache, "mbpp.json", json.dumps([MBPP]).encode())
    problems = load("humaneval", run_code=True)
    assert [problem.id for problem in problems] == ["humaneval-00000", "humaneval-00001"]
    text = prompt(problems[0], TASKS["humaneval"])
    assert text.count("def largest(xs: List[int]) -> int:") == text.count("largest") == 1
    assert "return max" not in text and "candidate" not in text
    assert text.endswith("without tests or examples.")
    (problem,) = load("mbpp", run_code=True)
    text = prompt(problem, TASKS["mbpp"])
    assert text.startswith("Write a function for the area of a circle.\n")
    assert all(text.count(test) == 1 for test in MBPP["final_answer"]["test_list"])
    assert "import math" not in text and "r * r" not in text
    with pytest.raises(UserError, match="mbpp.json, entry 1: the field 'test_list' is missing"):
        bad = MBPP | {"final_answer": {"tests": []}}
        put(monkeypatch, cache, "mbpp.json", json.dumps([bad]).encode())
        load("mbpp", run_code=True)


def test_code_is_loaded_only_where_it_may_be_run(cache, monkeypatch, tmp_path):
    put(monkeypatch, cache, "mbpp.json", json.dumps([MBPP]).encode())
    own = write_lines(tmp_path / "own.jsonl", {"question": "Q?", "tests": "assert f() == 1"})
    for arguments in (("mbpp",), ("mbpp", own), ("data", own), ("tiny", own)):
        if arguments[0] == "tiny":  # its answers are numbers
            with pytest.raises(UserError, match="is not a number"):
                load(*arguments, run_code=True)
            continue
        with pytest.raises(UserError, match="running the programs .*--run-generated-code"):
            load(*arguments)
        assert load(*arguments, run_code=True)[0].kind == "code"
    with pytest.raises(UserError, match="'tests' is missing"):
        own = write_lines(tmp_path / "no.jsonl", {"question": "Q?", "answer": "1"})
        load("mbpp", own, run_code=True)


def test_livecodebench_reads_its_own_rows_and_runs_nothing(tmp_path):
    rows = [
        {"question_id": "1873_A", "question_content": "Sort.", "starter_code": ""},
        {"question_id": "2727", "question_content": "Add.", "starter_code": "class Solution:\n"},
    ]
    path = write_lines(tmp_path / "problems.jsonl", *rows)
    problems = load("livecodebench", path)
    assert [problem.answer for problem in problems] == ["1873_A", "2727"]
    first, second = (prompt(problem, TASKS["livecodebench"]) for problem in problems)
    assert "standard input" in first and first.count("Sort.") == 1
    assert second.count("class Solution:") == 1 and "standard input" not in second
    with pytest.raises(UserError, match="'livecodebench' reads your own file: .*--data FILE"):
        load("livecodebench")


def test_date_understanding_does_not_always_list_the_right_option_first(cache, monkeypatch):
    rows = [
        {"input": f"Day {i}?", "target_scores": {"right": 1, "wrong": 0, "worse": 0}}
        for i in range(30)
    ]
    put(
        monkeypatch,
        cache,
        "date_understanding.json",
        json.dumps({"name": "made up", "examples": rows}).encode(),
    )
    problems = load("date_understanding")
    assert {problem.answer for problem in problems} == {"A", "B", "C"}
    assert all(problem.choices[problem.answer] == "right" for problem in problems)
    assert problems == load("date_understanding")


def test_own_problems_and_prompts(tmp_path):
    path = write_lines(
        tmp_path / "own.jsonl",
        {"question": "1 + 1?", "answer": 2, "steps": "One.\nTwo."},
        "",
        {"question": "Sky?", "answer": "blue", "choices": ["red", "blue"]},
        {"question": "Wet?", "answer": True},
        {"question": "Half?", "answer": "\\frac{x}{2}"},
    )
    problems = load("data", path)
    assert [(problem.kind, problem.answer) for problem in problems] == [
        ("number", "2"),
        ("choice", "B"),
        ("yesno", "yes"),
        ("math", "\\frac{x}{2}"),
    ]
    assert problems[0].steps == ["One.", "Two."]
    assert "A) red\nB) blue" in prompt(problems[1], TASKS["data"])
    assert load("data", path, limit=2) == problems[:2]
    assert prompt(load("tiny", path, limit=1)[0], TASKS["tiny"]) == "1 + 1?"


def test_choices_that_the_question_lists_are_not_listed_again():
    choices = {"A": "red light", "B": "12.5 $\\mu$m", "C": "A. and B."}
    task = TASKS["gpqa_diamond"]
    for mark in (".", ")", ":"):
        lines = "\n".join(f"{letter}{mark}  {text}" for letter, text in choices.items())
        question = f"What is seen?\n{lines}"
        text = prompt(Problem("x", question, "A", "choice", choices), task)
        assert text.startswith(question + "\n\nThink") and text.count("red light") == 1
    # Some of them, or their texts without their letters, are no list of them.
    for question in (
        "Which is it?\nA. red light\nB. blue",
        "Is red light, 12.5 $\\mu$m or A. and B.?",
    ):
        text = prompt(Problem("x", question, "A", "choice", choices), task)
        assert "A) red light\nB) 12.5 $\\mu$m\nC) A. and B." in text


def test_each_choice_of_gpqa_stands_once_in_its_prompt(cache):
    source = Path(os.environ.get("TASK_DATA", "/nowhere")) / "gpqa_diamond.json"
    if not source.exists():
        pytest.skip("set TASK_DATA to a folder that holds gpqa_diamond.json")
    shutil.copy(source, cache)
    for problem in load("gpqa_diamond"):
        said = prompt(problem, TASKS["gpqa_diamond"]).removeprefix(problem.question)
        assert not any(f"{letter}) " in said for letter in problem.choices), problem.id


def test_what_is_trained_on_is_never_a_test(cache, tmp_path, monkeypatch):
    for name in TRAINING:
        assert training(name) == name
    short = "gsm8k", "aqua", "asdiv-aug", "tiny", "facts", "graph"
    assert [training(name) for name in short] == [f"{name}-train" for name in short]
    assert (
        training("data", tmp_path / "mine.jsonl") == "data" and training("nonsense") == "nonsense"
    )
    right = {"strategyqa": "strategyqa-softcot-train", "aqua-dev": "aqua-train"}
    right["strategyqa-softcot-test"] = "strategyqa-softcot-train"
    for name in set(TASKS) - {*TRAINING, *short, "data"}:
        with pytest.raises(UserError) as error:
            training(name)
        remedy = right.get(name, " or ".join(TRAINING))
        assert str(error.value) == f"{name} is a test, which `eval` scores: train on {remedy}"
    # A copy of a test's file is that test, under any name.
    put(monkeypatch, cache, "strategyqa_test.json", ROWS)
    tests = {"tiny-train": sources.ROOT / "tiny" / "test.jsonl"}
    tests["strategyqa-softcot-train"] = cache / "strategyqa_test.json"
    for remedy, file in tests.items():
        copy = shutil.copy(file, tmp_path / "mine.jsonl")
        with pytest.raises(UserError, match=f"is the file of the test .*: train on {remedy}$"):
            training("data", copy)
    assert training("tiny", sources.ROOT / "tiny" / "train.jsonl") == "tiny"


@pytest.mark.parametrize(
    "line, what",
    [
        ("{", "not a JSON object"),
        ("[1]", "not in the form"),
        ('{"question": "Q?"}', "'answer' is missing"),
        ('{"question": 3, "answer": 4}', "'question' is not a text"),
        ('{"question": "Q?", "answer": []}', "'answer' is"),
        ('{"question": "Q?", "answer": "c", "choices": ["a", "b"]}', "none of the choices"),
        ('{"question": "Q?", "answer": "a", "choices": "ab"}', "'choices' is not"),
        ('{"question": "Q?", "answer": "a", "steps": 3}', "'steps' is not"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, what):
    path = write_lines(tmp_path / "own.jsonl", {"question": "Q?", "answer": "1"}, line)
    with pytest.raises(UserError) as error:
        load("data", path)
    assert (
        f"{path}, line 2: " in str(error.value)
        and what in str(error.value)
        and "\n" not in str(error.value)
    )


def test_mistakes_in_what_to_load(tmp_path):
    with pytest.raises(UserError, match="did you mean gsm8k.*aime2024"):
        load("gsm8")
    with pytest.raises(UserError, match="--limit 0"):
        load("gsm8k", limit=0)
    with pytest.raises(UserError, match="--data FILE"):
        load("data")
    with pytest.raises(UserError, match="cannot read.*No such file"):
        load("data", tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no problems"):
        load("data", write_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="line 1: the answer 'two' is not a number"):
        load("gsm8k", write_lines(tmp_path / "words.jsonl", {"question": "Q?", "answer": "two"}))


# ---------------------------------------------------------------------------------------- downloads


class Response:
    """What urlopen gives back, of a content that may stop before its announced length."""

    def __init__(self, content, length):
        self.content, self.headers = content, {"Content-Length": str(length)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, n):
        block, self.content = self.content[:n], self.content[n:]
        return block


ROWS = json.dumps([{"index": 0, "question": "Q?", "answer": "7"}]).encode()


def test_a_download_is_verified_and_kept(cache, monkeypatch):
    put(monkeypatch, cache, "svamp.json", ROWS)
    (cache / "svamp.json").unlink()
    asked = []
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda url, timeout: asked.append(url) or Response(ROWS, len(ROWS)),
    )
    assert load("svamp") == load("svamp") and asked == [sources.SOURCES["svamp.json"].url]
    assert asked[0].startswith("https://raw.githubusercontent.com/alickzhu/Soft-Reasoning/229b5f78")
    assert os.listdir(cache) == ["svamp.json"]


def test_a_broken_download_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda url, timeout: Response(ROWS[:20], len(ROWS))
    )
    with pytest.raises(UserError, match="broke after 20 of"):
        load("svamp")
    assert os.listdir(cache) == []


def test_a_wrong_checksum_is_kept_aside_and_not_used(cache):
    (cache / "svamp.json").write_bytes(ROWS)
    with pytest.raises(UserError) as error:
        load("svamp")
    for piece in (hashlib.sha256(ROWS).hexdigest(), sources.SOURCES["svamp.json"].sha256):
        assert piece in str(error.value)
    assert os.listdir(cache) == ["svamp.json.wrong-checksum"]


def test_no_network_names_the_address_and_the_place(cache):
    with pytest.raises(UserError) as error:
        load("svamp")
    assert sources.SOURCES["svamp.json"].url in str(error.value) and str(
        cache / "svamp.json"
    ) in str(error.value)


def test_only_the_files_that_the_documents_name_are_pinned_by_less_than_a_checksum(capsys, cache):
    loose = {name for name, source in sources.SOURCES.items() if source.sha256 is None}
    known = {"aqua_train.json", "asdiv_aug_train.jsonl", "asdiv_aug_test.jsonl"}
    known |= {"soft_reasoning_prompts.yaml", "soft_reasoning_examples.json"}
    assert loose == known | {"aime2025.json", "amc23.json"}
    moving = {name for name, source in sources.SOURCES.items() if len(source.commit) != 40}
    assert moving == {"asdiv_aug_train.jsonl", "asdiv_aug_test.jsonl"}
    (cache / "aqua_train.json").write_text("")
    sources.fetch("aqua_train.json")
    assert "used unverified (pinned by its commit)" in capsys.readouterr().err


def test_asdiv_aug_comes_from_hugging_face_or_by_hand(cache, monkeypatch, tmp_path, capsys):
    row = {"question": "Q?", "answer": "<<1+1=2>>\n#### 2"}
    hub = write_lines(tmp_path / "hub.jsonl", row)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(hub)
    )
    assert load("asdiv-aug")[0].answer == "2"
    assert asked == [
        (("xuyige/ASDiv-Aug", "aug-dev.jsonl"), {"repo_type": "dataset", "revision": "main"})
    ]
    error = capsys.readouterr().err
    assert "no checksum is known" in error and "pinned by nothing" in error

    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(
        UserError,
        match="https://huggingface.co/datasets/xuyige/ASDiv-Aug/resolve/main/aug-dev.jsonl",
    ):
        load("asdiv-aug")
    write_lines(cache / "asdiv_aug_test.jsonl", row)
    assert len(load("asdiv-aug")) == 1


def test_a_cache_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # root may write to read-only folders, but nobody into a file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to the cache folder .*XDG_CACHE_HOME"):
        load("svamp")


def test_a_read_only_cache_folder(cache, monkeypatch):
    def refuse(**_):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match="Read-only file system.*make it writable"):
        load("svamp")
