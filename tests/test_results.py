"""lab/results.py, lab/tables.py, lab/files.py: records, resumption, tables, intervals of runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import tables
from lab.results import over_seeds, run
from lab.tasks import TASKS, Problem
from model import UserError

# --------------------------------------------------------------------------------------------- runs

PROBLEMS = [Problem(f"tiny-{i:05d}", f"{i} + {i}?", str(2 * i), "number") for i in range(6)]


def adder(wrong=(), order=1):
    """A method that answers rightly, but for the problems in `wrong`.

    With order -1 it finishes the last job first.
    """

    def solve(jobs):
        for problem, sample in jobs[::order]:
            i = int(problem.id[-5:])
            yield (
                problem,
                sample,
                {
                    "thought_text": f"{i} + {i} = {2 * i}",
                    "thought_tokens": 5 + i,
                    "answer_tokens": 3,
                    "answer_text": "The answer is 99" if i in wrong else f"The answer is {2 * i}",
                    "seconds": random.random(),
                    "stopped_by": "marker" if i else "cold stop",
                },
            )

    return solve


def methods(settings, **solvers):
    return {name: (settings, solve) for name, solve in solvers.items()}


def records(path):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return sorted(
        ({**row, "seconds": 0} for row in rows),
        key=lambda r: (r["problem"], r["sample"], r["method"]),
    )


def test_a_run_is_recorded_and_tabulated(tmp_path, capsys):
    output, table = tmp_path / "out.jsonl", tmp_path / "table.json"
    result, _ = run(
        PROBLEMS,
        TASKS["tiny"],
        methods({"seed": 0}, soft=adder(), cot=adder(wrong=(2, 4))),
        output=output,
        json_path=table,
    )
    captured = capsys.readouterr()
    assert json.loads(table.read_text()) == result and sorted(os.listdir(tmp_path)) == [
        "out.jsonl",
        "table.json",
    ]
    assert json.loads(output.read_text().splitlines()[0])["settings"] == {
        "task": "tiny",
        "grader": "numbers, exact",
        "seed": 0,
    }
    rows = records(output)
    assert len(rows) == 12 and rows[4]["problem"] == "tiny-00002"
    assert {
        key: rows[4][key]
        for key in (
            "method",
            "sample",
            "question",
            "prompt",
            "gold",
            "extracted",
            "extracted_from",
            "correct",
        )
    } == {
        "method": "cot",
        "sample": 0,
        "question": "2 + 2?",
        "prompt": "2 + 2?",
        "gold": "4",
        "extracted": "99",
        "extracted_from": "answer_text",
        "correct": False,
    }
    soft, cot = result["methods"]
    assert soft["accuracy"] == 1 and cot["accuracy"] == pytest.approx(4 / 6)
    assert soft["tokens"] == 10.5 and cot["tokens_correct"] == pytest.approx((8 + 9 + 11 + 13) / 4)
    assert soft["stops"] == {"marker": 5, "cold stop": 1} and soft["tokens_per_second"] > 0
    assert cot["difference"] == pytest.approx(-1 / 3)
    for piece in (
        "numbers, exact",
        "Wilson",
        "100.0%",
        "66.7%",
        "-33.3 (",
        "marker 5, cold stop 1",
    ):
        assert piece in captured.out
    assert "accuracy 66.7%" in captured.err


def test_of_several_candidates_it_is_recorded_whether_any_is_right():
    def solve(jobs):
        for problem, sample in jobs:
            yield (
                problem,
                sample,
                {
                    "answer_text": "The answer is 99",
                    "answers": [None, "99", "2" if sample == 0 else "3"],
                },
            )

    _, records = run(PROBLEMS[:2], TASKS["tiny"], methods({}, m=solve))
    assert [record["any_correct"] for record in records.values()] == [False, True]
    assert not any(record["correct"] for record in records.values())


def test_what_the_answer_lacks_is_looked_for_in_the_thought():
    def solve(jobs):
        for problem, sample in jobs:
            yield (
                problem,
                sample,
                {"answer_text": "", "thought_text": "it is 0" if problem.id[-1] == "0" else "hm"},
            )

    result, _ = run(PROBLEMS[:2], TASKS["tiny"], methods({}, m=solve))
    assert result["methods"][0]["accuracy"] == 0.5 and result["methods"][0]["no_answer"] == 1
    assert result["methods"][0]["tokens"] is None


def test_resumption_finishes_what_is_missing(tmp_path, capsys):
    whole, halved = tmp_path / "whole.jsonl", tmp_path / "halved.jsonl"
    both = methods({"seed": 0}, soft=adder(), cot=adder(wrong=(1,), order=-1))
    expected, _ = run(PROBLEMS, TASKS["tiny"], both, num_samples=2, output=whole)
    content = whole.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == 10]
    for cut in (0, 7, ends[0] - 3, ends[0] + 1, ends[7] + 1, ends[7] + 30, ends[-1], len(content)):
        halved.write_bytes(content[:cut])
        capsys.readouterr()
        result, _ = run(PROBLEMS, TASKS["tiny"], both, num_samples=2, output=halved)
        captured = capsys.readouterr()
        assert records(halved) == records(whole)
        assert [row["accuracy"] for row in result["methods"]] == [
            row["accuracy"] for row in expected["methods"]
        ]
        assert ("half-written" in captured.err) == (
            cut not in (0, ends[0] + 1, ends[7] + 1, len(content))
        )
        # Nothing is said of the speed of what was all there.
        assert ("of 12 records" in captured.out) == (ends[0] < cut < len(content))
        assert ("tokens/s" in captured.out) == (cut < len(content))


def test_more_problems_samples_and_methods_go_on_in_the_same_file(tmp_path):
    output, fresh = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run(PROBLEMS[:3], TASKS["tiny"], methods({"seed": 0}, soft=adder()), output=output)
    for path in (output, fresh):
        run(
            PROBLEMS,
            TASKS["tiny"],
            methods({"seed": 0}, soft=adder(), cot=adder()),
            num_samples=2,
            output=path,
        )
    assert records(output) == records(fresh)


def test_each_method_has_its_own_number_of_samples(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    both = methods({"seed": 0}, soft=adder(), cot=adder(wrong=(2, 4)))
    result, _ = run(PROBLEMS, TASKS["tiny"], both, {"soft": 1, "cot": 3}, output)
    assert len(records(output)) == 6 + 18
    soft, cot = result["methods"]
    assert (soft["samples"], cot["samples"], result["samples"]) == (1, 3, 3)
    assert soft["accuracy_interval"] == tables.wilson(1, 6)
    # Samples that always agree: n = p (1 - p) / (s^2 / 6) with s^2 = 6/5 p (1 - p).
    assert cot["accuracy_interval"] == pytest.approx(tables.wilson(2 / 3, 5))
    assert cot["difference"] == pytest.approx(-1 / 3)
    title, _, head, *rows = capsys.readouterr().out.splitlines()[:5]
    assert title.startswith("tiny: 6 problems, up to 3 samples each; ")
    assert [line.split()[:2] for line in (head, *rows)] == [
        ["method", "samples"],
        ["soft", "1"],
        ["cot", "3"],
    ]
    # More samples in the file than are asked for are left out of the table.
    again, _ = run(PROBLEMS, TASKS["tiny"], both, {"soft": 1, "cot": 1}, output)
    assert [row["samples"] for row in again["methods"]] == [1, 1]
    assert again["methods"][1]["accuracy_interval"] == tables.wilson(4 / 6, 6)
    assert len(records(output)) == 24


def test_a_table_is_this_text():
    rows = [
        tables.Row("soft", 1, 0.5, [0.25, 0.75], None, None, 12.34, None, 1, {"length": 4}),
        tables.Row("greedy", 1, 0.75, [0.5, 0.9], 0.25, [-0.1, 0.6], 10, 9, 0, {}, 55.5, 2),
    ]
    result = {"task": "tiny", "problems": 4, "samples": 1, "grader": "exact", "interval": "Wilson"}
    title, _, *lines, _, timed, _, explained = tables.table(result, rows).splitlines()
    assert title == "tiny: 4 problems, 1 sample(s) each; graded by exact; interval: Wilson"
    head = "method accuracy 95 % interval difference to soft tokens if correct tokens/s no answer"
    assert [" ".join(line.split()) for line in lines] == [
        f"{head} ended by",
        "soft 50.0% 25.0% to 75.0% 12.3 - - 1 length 4",
        "greedy 75.0% 50.0% to 90.0% +25.0 (-10.0 to +60.0) 10.0 9.0 55.5 0 -",
    ]
    starts = [line.rindex(word) for line, word in zip(lines, (" tokens ", " 12.3 ", " 10.0 "))]
    assert len(set(starts)) == 1  # a column
    assert timed == "tokens/s: of what this process did, soft 0 of 4 records, greedy 2 of 4 records"
    paired = "percentage points, paired by problem, with 95 % interval (Bonett and Price)"
    assert explained == f"difference: {paired}"


def test_other_settings_are_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    run(PROBLEMS, TASKS["tiny"], methods({"seed": 0, "model": "a"}, soft=adder()), output=output)
    before = output.read_bytes()
    with pytest.raises(
        UserError, match="seed is 0 there and 1 here, top_k is None there and 30 here"
    ):
        run(
            PROBLEMS,
            TASKS["tiny"],
            methods({"seed": 1, "model": "a", "top_k": 30}, soft=adder()),
            output=output,
        )
    with pytest.raises(UserError, match="task is 'tiny' there and 'svamp' here"):
        run(
            PROBLEMS,
            TASKS["svamp"],
            methods({"seed": 0, "model": "a"}, soft=adder()),
            output=output,
        )
    other = [Problem("tiny-00000", "another?", "0", "number")]
    with pytest.raises(UserError, match="tiny-00000 is another problem"):
        run(other, TASKS["tiny"], methods({"seed": 0, "model": "a"}, soft=adder()), output=output)
    assert output.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(tmp_path):
    diary = tmp_path / "diary.txt"
    diary.write_text("Dear diary, no newline")
    with pytest.raises(UserError, match="not a result file"):
        run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=diary)
    assert diary.read_text() == "Dear diary, no newline"
    with pytest.raises(UserError, match="make its folder first"):
        run(
            PROBLEMS,
            TASKS["tiny"],
            methods({}, soft=adder()),
            json_path=tmp_path / "none" / "table.json",
        )
    output = tmp_path / "out.jsonl"
    run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=output)
    lines = output.read_text().splitlines()
    strange = json.dumps(json.loads(lines[2]) | {"answer_tokens": "3"})
    for third in ("{damaged", strange):
        output.write_text("\n".join([*lines[:2], third, *lines[3:]]) + "\n")
        with pytest.raises(UserError, match="line 3: not a record; delete the line"):
            run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=output)


def test_a_working_directory_that_is_gone_is_a_line(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="cannot write out.jsonl: the working directory is gone"):
        run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output="out.jsonl")


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    def solve(jobs):
        yield from adder()(jobs[:2])
        raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(PROBLEMS, TASKS["tiny"], methods({}, soft=solve), output=output)
    assert len(records(output)) == 2
    run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=output)
    assert len(records(output)) == 6


SLOW = """
import sys, time
sys.path[:0] = [{folder!r}, {tests!r}]
from test_results import PROBLEMS, TASKS, adder, methods, run

def slow(jobs):
    for job in adder()(jobs):
        time.sleep(0.05)
        yield job

run(PROBLEMS, TASKS["tiny"], methods({{"seed": 0}}, soft=slow), num_samples=20, output=sys.argv[1])
"""


def test_kill_9_and_resume_give_the_file_of_an_undisturbed_run(tmp_path):
    tests = Path(__file__).resolve().parent
    script = SLOW.format(folder=str(tests.parent), tests=str(tests))
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(killed)], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 60
    while not killed.exists() or killed.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(killed, "ab") as file:
        file.write(
            b'{"problem": "tiny-0000'
        )  # the kill itself seldom falls into the middle of a write
    finished = len(killed.read_bytes().splitlines()) - 1
    assert 9 <= finished < 120
    run(PROBLEMS, TASKS["tiny"], methods({"seed": 0}, soft=adder()), num_samples=20, output=killed)
    run(PROBLEMS, TASKS["tiny"], methods({"seed": 0}, soft=adder()), num_samples=20, output=whole)
    assert records(killed) == records(whole) and len(records(whole)) == 120


# ------------------------------------------------------------------------------------------- tables


def verdicts(*samples):
    return [[{"correct": correct, "extracted": "1"} for correct in problem] for problem in samples]


def test_intervals():
    assert tables.wilson(0.5, 10) == pytest.approx(
        [0.2366, 0.7634], abs=1e-4
    )  # e.g. R: prop.test(5, 10, correct = F)
    assert (
        tables.wilson(1, 20)[0] == pytest.approx(20 / (20 + 1.959964**2))
        and tables.wilson(1, 20)[1] == 1
    )
    single, means = tables.summarise("a", verdicts([1], [1], [0], [1]), None)
    assert single.accuracy_interval == tables.wilson(0.75, 4) and single.difference is None
    # Four samples that always agree tell no more than one: n is 3 = p (1 - p) / (s^2 / 4), and
    # s^2 = 4/3 p (1 - p).
    agreeing, _ = tables.summarise("a", verdicts([1] * 4, [1] * 4, [0] * 4, [1] * 4), None)
    assert agreeing.accuracy == 0.75 and agreeing.accuracy_interval == pytest.approx(
        tables.wilson(0.75, 3)
    )
    mixed, _ = tables.summarise("a", verdicts([1, 0], [0, 1], [1, 0], [0, 1]), None)
    assert mixed.accuracy_interval == tables.wilson(0.5, 4)
    # Bonett and Price (2012): of 4 problems one is lost, none won: (0 + 1 - 1 - 1) / (4 + 2) and
    # its variance.
    worse, _ = tables.summarise("b", verdicts([1], [0], [0], [1]), means)
    half = 1.959964 * ((3 / 6 - 1 / 36) / 6) ** 0.5
    assert worse.difference == -0.25 and worse.difference_interval == pytest.approx(
        [-1 / 6 - half, -1 / 6 + half]
    )


def test_the_spread_over_seeds_by_hand(tmp_path, capsys):
    grades = {"soft": [[1, 1, 0, 0], [1, 1, 1, 0]], "greedy": [[1, 0, 0, 0]]}
    records = {
        (problem.id, method, seed): {"correct": bool(grade)}
        for method, seeds in grades.items()
        for seed, row in enumerate(seeds)
        for problem, grade in zip(PROBLEMS, row)
    }
    result, path = {}, tmp_path / "table.json"
    over_seeds(result, records, PROBLEMS[:4], {"soft": 2, "greedy": 1}, path)
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split() for line in lines] == [
        ["soft", "62.5%", "±", "17.7"],  # 0.25 / sqrt(2)
        ["greedy", "25.0%", "(one", "seed", "is", "all)"],
    ]
    soft = result["seeds"]["soft"]
    assert soft["accuracies"] == [0.5, 0.75] and soft["std"] == pytest.approx(0.1767767)
    assert result["seeds"]["greedy"]["std"] is None and json.loads(path.read_text()) == result
