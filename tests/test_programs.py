"""lab/programs.py and lab/livecodebench.py: programs read out of texts, graded, and handed on."""

import json
import os

import pytest

from lab import livecodebench, programs, sandbox, tasks
from lab.grading import extract, grade, grader, read_answer, reader, vote
from lab.programs import HERE, passes, permitted, program, with_tests
from lab.results import run
from lab.tasks import TASKS, Problem, load
from model import UserError

# ------------------------------------------------------------------------------------------ reading

ADD, READS = "def add(a, b):\n    return a + b", "print(add(1, int(input())))"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"Here:\n```python\n{ADD}\n```\nIt adds.", ADD),
        (f"```python\nx\n```\nNo, wait.\n```py\n{ADD}\n```", ADD),
        (f"```python\n{ADD}\n```\nIt prints\n```\n3\n```", ADD),  # the last that says it is Python
        (f"```python\n{ADD}\n```\n```bash\npython add.py\n```", ADD),
        (f"```python\n{ADD}\n```\nUsage:\n```python\nprint(add(2, 3))\n```", ADD),
        (f"```python\n{ADD}\n```\n```python\ndef test():\n    assert add(1, 1) == 2\n```", ADD),
        (f"```python\n{ADD}\n```\nso\n```python\nprint(add(1, int(input())))\n```", READS),
        (f"```\n{ADD}\n```", ADD),
        (f"```python\n{ADD}\n```\n```python\ndef main():\n    add(1, 1)\n\nmain()\n```", ADD),
        ("```python\n    return a + b\n```\nso\n```python\nadd(1, 1)\n```", "    return a + b"),
        (f"``` Python 3\n{ADD}\n```", ADD),
        (f"```python\n{ADD}", ADD),  # cut by the length
        (f"1. So:\n   ```python\n   {ADD.replace(chr(10), chr(10) + '   ')}\n   ```", ADD),
        ("```python\n    return a + b\n```", "    return a + b"),  # a function's body
        (f"```python\ns = '```'\n{ADD}\n```", f"s = '```'\n{ADD}"),
        (ADD, ADD),
        (f"\n  {ADD.replace(chr(10), chr(10) + '  ')}\n", ADD),
        ("n = int(input())\nprint(n)", "n = int(input())\nprint(n)"),
        ("Yes", None),
        ("I cannot write this.", None),
        ("```python\n```", None),
        ("", None),
        ("(" * 100000, None),
        ("x = '\0'", None),
    ],
)
def test_programs_are_read(text, expected):
    assert program(text) == extract(text, "code") == expected


@pytest.mark.parametrize(
    "last, is_program",
    [
        ("x = open(0).read()", True),
        ("x = list(sys.stdin)", True),
        ("add = lambda a, b: 0", True),
        ("class A:\n    x = 1", True),
        ("class TestAdd:\n    x = 1", False),
        ("def test():\n    return add(1, 1) == 2", False),
        ("def check(f):\n    f(1, 1)", False),
        ("    return a + b", False),
    ],
)
def test_the_last_block_that_is_a_program_counts(last, is_program):
    found = program(f"```python\n{ADD}\n```\nand\n```python\n{last}\n```")
    assert found == (last if is_program else ADD)


def test_the_program_is_what_is_said_after_the_thought_or_else_anywhere():
    problem = Problem("x", "q", with_tests("assert add(1, 2) == 3"), "code")
    block = f"```python\n{ADD}\n```"
    assert read_answer(f"<think>```python\nx\n```</think>{block}", problem) == ADD
    assert read_answer(f"<think>Hm.\n{block}\n</think>I am done.", problem) == ADD


# ------------------------------------------------------------------------------------------ grading


def test_the_body_the_whole_function_and_wrong_ones():
    gold = with_tests("assert add(1, 2) == 3", 'def add(a, b):\n    """Sum."""\n')
    assert gold.splitlines()[2] == HERE
    assert grade("    return a + b", gold, "code")
    assert grade(ADD, gold, "code")
    assert grade(f"import math\n\n{ADD}\n\nprint(add(1, 1))", gold, "code")
    for wrong in ("    return a - b", "return a + b", "def plus(a, b): return a + b", "pass", None):
        assert not grade(wrong, gold, "code"), wrong


def test_a_program_is_run_once_for_each_gold_answer(monkeypatch):
    asked = []
    monkeypatch.setattr(sandbox, "finished", lambda text: asked.append(text) or True)
    passes.cache_clear()
    assert passes("once = 1", with_tests("assert once")) and passes(
        "once = 1", with_tests("assert once")
    )
    assert asked == ["once = 1\n\nassert once"]
    passes.cache_clear()


def test_programs_agree_and_vote_by_their_text_and_none_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "finished", None)
    read, same = reader(Problem("x", "q", with_tests("assert f() == 1"), "code"))
    assert same(ADD, ADD) and not same(ADD, ADD + " ")
    assert not same(None, None) and not same(None, ADD)
    answers = [read(f"```python\n{code}\n```") for code in ("x = 1", ADD, "", ADD)]
    assert vote(answers, same) == 1


def test_how_code_is_graded_is_said():
    said = "running the tests (10 s, 1 GiB)"
    assert grader(TASKS["humaneval"]) == grader(TASKS["mbpp"]) == said
    assert said in grader(TASKS["data"])
    assert grader(TASKS["livecodebench"]).startswith("nobody")


def test_where_programs_cannot_be_run_that_is_known_before_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox, "ways", list)
    sandbox.way.cache_clear()
    with pytest.raises(UserError, match="cannot be run here"):
        permitted("x", True)


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_without_leave_nothing_is_downloaded_either(name, monkeypatch):
    monkeypatch.setattr(tasks, "fetch", lambda file: pytest.fail(f"{file} is fetched"))
    with pytest.raises(UserError, match=f"{name} is graded by running .* --run-generated-code"):
        load(name)


def test_a_run_of_right_and_wrong_programs(tmp_path, capsys):
    problems = [Problem(f"x-{i}", "q", with_tests(f"assert f() == {i}"), "code") for i in range(3)]

    def solve(jobs):
        for problem, sample in jobs:
            yield problem, sample, {"answer_text": "```python\ndef f():\n    return 1\n```"}

    output = tmp_path / "out.jsonl"
    run(problems, TASKS["mbpp"], {"one": ({}, solve)}, output=output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["correct"] for r in records] == [False, True, False]
    assert records[0]["settings"]["grader"] == "running the tests (10 s, 1 GiB)"
    assert "33.3%" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- livecodebench


@pytest.fixture
def results(tmp_path):
    """A result file of two questions, two samples each, by two methods; one says no program."""
    rows = [{"question_id": name, "question_content": "Sort.", "starter_code": ""} for name in "ba"]
    data, output = tmp_path / "problems.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def solver(method):
        def solve(jobs):
            for problem, sample in jobs[::-1]:
                text = f"```python\n# {method} {problem.answer} {sample}\n```"
                none = (method, problem.answer, sample) == ("soft", "b", 1)
                yield problem, sample, {"answer_text": "None." if none else text}

        return solve

    methods = {method: ({}, solver(method)) for method in ("soft", "cot")}
    problems = load("livecodebench", data)
    run(problems, TASKS["livecodebench"], methods, num_samples=2, output=output)
    return output


def test_livecodebench_reads_what_is_written(results, tmp_path, capsys):
    out = tmp_path / "programs.json"
    assert livecodebench.command([str(results), "-o", str(out), "--method", "soft"]) == 0
    assert json.loads(out.read_text()) == [
        {"question_id": "a", "code_list": ["# soft a 0", "# soft a 1"]},
        {"question_id": "b", "code_list": ["# soft b 0", ""]},
    ]
    expected = livecodebench.exported(results, "cot")
    assert expected[1]["code_list"] == ["# cot b 0", "# cot b 1"]
    capsys.readouterr()
    with results.open("a") as file:  # of a run that was killed
        file.write('{"problem": "livecodebench-00003", "met')
    assert livecodebench.exported(results, "cot") == expected
    assert "the last line is half-written" in capsys.readouterr().err


def test_what_livecodebench_cannot_be_given_is_one_line(results, tmp_path, capsys):
    other, cut = tmp_path / "other.jsonl", tmp_path / "cut.jsonl"
    other.write_text(results.read_text().replace('"task": "livecodebench"', '"task": "gsm8k"'))
    cut.write_text("".join(results.read_text().splitlines(keepends=True)[:3]))
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000 + "\n")
    os.mkfifo(tmp_path / "pipe")
    capsys.readouterr()
    for arguments, said in (
        ([results], "holds several methods: pass --method, one of soft, cot"),
        ([results, "--method", "hard"], "holds no method 'hard'; there are soft, cot"),
        ([other], "holds no records of --task livecodebench"),
        ([cut], "holds 1 samples of b and 2 of others: let the run finish first"),
        ([__file__], "line 1: not a record"),
        ([deep], "line 1: not a record"),
        ([tmp_path / "pipe"], "is a named pipe"),
        ([tmp_path / "none"], "No such file"),
    ):
        arguments = [*map(str, arguments), "-o", str(tmp_path / "x.json")]
        assert livecodebench.command(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_a_program_that_is_no_python_does_not_count_and_is_handed_on_all_the_same():
    assert passes("x = 1", "1873_A") and not passes("x =", "1873_A")
    assert programs.parsed("x = '\\d'") is not None  # and nothing is printed


def test_tests_of_a_users_own_data_are_one_text_or_several_and_can_fail(tmp_path):
    file = tmp_path / "data.jsonl"

    def loaded(tests):
        file.write_text(json.dumps({"question": "Add.", "tests": tests}))
        (problem,) = load("data", file, run_code=True)
        return problem

    for tests in ("assert add(1, 1) == 2", ["assert add(1, 1) == 2", "assert add(1, 2) == 3"]):
        gold = loaded(tests).answer
        assert grade(ADD, gold, "code") and not grade("def add(a, b): return 1", gold, "code")
    for tests in ("", " \n", [], [7], 7, {"a": 1}, f"x\n{HERE}\ny"):
        with pytest.raises(UserError, match=r"^.*data.jsonl, line 1: [^\n]*$"):
            loaded(tests)
