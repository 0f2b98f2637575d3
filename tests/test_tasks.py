"""tasks.py: every count, verdict, interval and file that it promises, and every mistake that a user can make.

TASK_DATA=folder names copies of the benchmark files (as in sources.json); without it the counts are skipped.
"""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tasks
from tasks import TASKS, Problem, UserError, extract, grade, load, prompt, run

CHOICES = {"A": "$61", "B": "12 km", "C": "120 km", "D": "x + 1", "E": "None of these"}


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
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def put(monkeypatch, folder, name, content):
    """Puts content into the cache as the file `name`, and makes its checksum the pinned one."""
    (folder / name).write_bytes(content)
    source = tasks.SOURCES[name]
    monkeypatch.setitem(tasks.SOURCES, name, tasks.Source(source.repository, source.commit, source.path, len(content),
                                                          hashlib.sha256(content).hexdigest()))


# ---------------------------------------------------------------------------------------------------------- problems

COUNTS = {"gsm8k": 1319, "gsm8k-train": 7473, "math500": 500, "aime2024": 30, "gpqa_diamond": 198, "gsm_hard": 1306,
          "svamp": 300, "strategyqa": 687, "strategyqa-softcot-train": 1648, "strategyqa-softcot-test": 413,
          "aqua": 254, "aqua-dev": 254, "date_understanding": 369}


@pytest.mark.parametrize("name", COUNTS)
def test_every_file_parses_to_the_number_of_problems_that_its_paper_reports(name, cache):
    source = Path(os.environ.get("TASK_DATA", "/nowhere")) / TASKS[name].file
    if not source.exists():
        pytest.skip(f"set TASK_DATA to a folder that holds {TASKS[name].file}")
    shutil.copy(source, cache)
    problems = load(name)
    assert len(problems) == COUNTS[name] == len({problem.id for problem in problems})
    for problem in problems:
        text = prompt(problem, TASKS[name])
        assert problem.question in text and "\\boxed{}" in text
        assert all(choice in text for choice in (problem.choices or {}).values())
        answer = extract(f"3 steps. So it is \\boxed{{{problem.answer}}}.", problem.kind, problem.choices)
        assert grade(answer, problem.answer, problem.kind, TASKS[name].tolerance)


def test_the_formats_of_the_files(cache, monkeypatch):
    put(monkeypatch, cache, "gsm8k_test.jsonl", json.dumps(
        {"question": "Two and two, 500 times?", "answer": "It is 2+2=<<2+2=4>>4.\nThen 2,000.\n#### 2,000"}).encode())
    assert load("gsm8k") == [Problem("gsm8k-00000", "Two and two, 500 times?", "2,000", "number", None,
                                     ["It is 2+2=4.", "Then 2,000."])]
    put(monkeypatch, cache, "math500.json",
        json.dumps([{"prompt": [{"from": "user", "value": "Half?"}], "final_answer": "\\frac12"}]).encode())
    assert load("math500") == [Problem("math500-00000", "Half?", "\\frac12", "math")]
    put(monkeypatch, cache, "gpqa_diamond.json", json.dumps(
        [{"prompt": [{"from": "user", "value": "Which?"}], "final_answer": "B", "choices": {"A": "this", "B": "that"}}]
    ).encode())
    assert load("gpqa_diamond") == [Problem("gpqa_diamond-00000", "Which?", "B", "choice", {"A": "this", "B": "that"})]
    put(monkeypatch, cache, "gsm_hard.json", json.dumps(
        [{"index": 0, "question": "Q?", "answer": -5.0}, {"index": 1, "question": "R?", "answer": 5e-07}]).encode())
    assert [problem.answer for problem in load("gsm_hard")] == ["-5", "5e-07"]
    put(monkeypatch, cache, "strategyqa_train.json", json.dumps(
        [{"question": f"{i}?", "answer": i % 2 == 0, "facts": ["One.", "Two."]} for i in range(10)]).encode())
    train, test = load("strategyqa-softcot-train"), load("strategyqa-softcot-test")
    assert [problem.question for problem in train + test] == [f"{i}?" for i in range(10)] and len(train) == 8
    assert train[0].answer == "yes" and train[1].answer == "no" and train[0].steps == ["One.", "Two."]
    put(monkeypatch, cache, "aqua_test.json", json.dumps(
        {"question": "Q?", "options": ["A)1", "B) 2"], "rationale": "So B.", "correct": "B"}).encode())
    assert load("aqua") == [Problem("aqua-00000", "Q?", "B", "choice", {"A": "1", "B": "2"}, ["So B."])]


def test_date_understanding_does_not_always_list_the_right_option_first(cache, monkeypatch):
    rows = [{"input": f"Day {i}?", "target_scores": {"right": 1, "wrong": 0, "worse": 0}} for i in range(30)]
    put(monkeypatch, cache, "date_understanding.json", json.dumps({"name": "made up", "examples": rows}).encode())
    problems = load("date_understanding")
    assert {problem.answer for problem in problems} == {"A", "B", "C"}
    assert all(problem.choices[problem.answer] == "right" for problem in problems)
    assert problems == load("date_understanding")


def test_own_problems_and_prompts(tmp_path):
    path = write_lines(tmp_path / "own.jsonl",
                       {"question": "1 + 1?", "answer": 2, "steps": "One.\nTwo."}, "",
                       {"question": "Sky?", "answer": "blue", "choices": ["red", "blue"]},
                       {"question": "Wet?", "answer": True},
                       {"question": "Half?", "answer": "\\frac{x}{2}"})
    problems = load("data", path)
    assert [(problem.kind, problem.answer) for problem in problems] == [
        ("number", "2"), ("choice", "B"), ("yesno", "yes"), ("math", "\\frac{x}{2}")]
    assert problems[0].steps == ["One.", "Two."]
    assert "A) red\nB) blue" in prompt(problems[1], TASKS["data"])
    assert load("data", path, limit=2) == problems[:2]
    assert prompt(load("tiny", path, limit=1)[0], TASKS["tiny"]) == "1 + 1?"


@pytest.mark.parametrize("line, what", [
    ("{", "not a JSON object"), ("[1]", "not in the form"), ('{"question": "Q?"}', "'answer' is missing"),
    ('{"question": 3, "answer": 4}', "'question' is not a text"), ('{"question": "Q?", "answer": []}', "'answer' is"),
    ('{"question": "Q?", "answer": "c", "choices": ["a", "b"]}', "none of the choices"),
    ('{"question": "Q?", "answer": "a", "choices": "ab"}', "'choices' is not"),
    ('{"question": "Q?", "answer": "a", "steps": 3}', "'steps' is not")])
def test_a_malformed_line_is_named(tmp_path, line, what):
    path = write_lines(tmp_path / "own.jsonl", {"question": "Q?", "answer": "1"}, line)
    with pytest.raises(UserError) as error:
        load("data", path)
    assert f"{path}, line 2: " in str(error.value) and what in str(error.value) and "\n" not in str(error.value)


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


# --------------------------------------------------------------------------------------------------------- downloads

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
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url) or Response(ROWS, len(ROWS)))
    assert load("svamp") == load("svamp") and asked == [tasks.SOURCES["svamp.json"].url]
    assert asked[0].startswith("https://raw.githubusercontent.com/alickzhu/Soft-Reasoning/229b5f78")
    assert os.listdir(cache) == ["svamp.json"]


def test_a_broken_download_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(ROWS[:20], len(ROWS)))
    with pytest.raises(UserError, match="broke after 20 of"):
        load("svamp")
    assert os.listdir(cache) == []


def test_a_wrong_checksum_is_kept_aside_and_not_used(cache):
    (cache / "svamp.json").write_bytes(ROWS)
    with pytest.raises(UserError) as error:
        load("svamp")
    for piece in (hashlib.sha256(ROWS).hexdigest(), tasks.SOURCES["svamp.json"].sha256):
        assert piece in str(error.value)
    assert os.listdir(cache) == ["svamp.json.wrong-checksum"]


def test_no_network_names_the_address_and_the_place(cache):
    with pytest.raises(UserError) as error:
        load("svamp")
    assert tasks.SOURCES["svamp.json"].url in str(error.value) and str(cache / "svamp.json") in str(error.value)


def test_asdiv_aug_comes_from_hugging_face_or_by_hand(cache, monkeypatch, tmp_path, capsys):
    row = {"question": "Q?", "answer": "<<1+1=2>>\n#### 2"}
    hub = write_lines(tmp_path / "hub.jsonl", row)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(hub))
    assert load("asdiv-aug")[0].answer == "2"
    assert asked == [(("xuyige/ASDiv-Aug", "aug-dev.jsonl"), {"repo_type": "dataset", "revision": "main"})]
    assert "no checksum is known" in capsys.readouterr().err

    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match="https://huggingface.co/datasets/xuyige/ASDiv-Aug/resolve/main/aug-dev.jsonl"):
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


# -------------------------------------------------------------------------------------------- extraction and grading

NUMBERS = [  # text, what is read
    (r"so \boxed{18}.", "18"), (r"\boxed{3} no, \boxed{\text{about } 4}", "4"), (r"\boxed{7} and \boxed{8", "7"),
    (r"\boxed{\frac{1}{2}}", "1/2"), (r"\boxed{\boxed{5}}", "5"), (r"first \boxed{6}, put it in \boxed{}", "6"),
    (r"\fbox{9} of 10", "9"), (r"$\boxed{x = -3}$ since 5", "-3"), (r"\boxed{3 + 4 = 7}", "7"), (r"\boxed{- 3}", "-3"),
    ("She makes 9 * 2 = 18 dollars.\n#### 1,018", "1,018"), ("#### Step 1: add\n2 + 2 = 4", "4"),
    ("The answer is 12 of the 50.", "12"), ("**Answer:** 42.", "42"), ("Answer:\n\n$-5$ degrees", "-5"),
    ("The answer is 5. Wait: the final answer is: 6. I am sure of all 3 steps.", "6"), ("answer is unclear; 4", "4"),
    ("It costs $1,234.50 in all.", "1,234.50"), ("16 - 3 - 4 = 9", "9"), ("10-3", "3"), ("it fell to -3", "-3"),
    ("it fell to −$3.5.", "-3.5"), ("about 50 % of it", "50 %"), ("3 1/2 cups", "3 1/2"), ("1{,}000", "1,000"),
    ("10,\\!080", "10,080"), ("a rate of 2.5e-7", "2.5e-7"), (r"3 \times 10^{8} m", "3 * 10^{8}"), ("none", None),
    ("", None), (r"\boxed{.5}", ".5")]


@pytest.mark.parametrize("text, expected", NUMBERS)
def test_numbers_are_read(text, expected):
    assert extract(text, "number") == expected


@pytest.mark.parametrize("text, expected", [
    (r"\boxed{B}", "B"), (r"\boxed{\text{B}}", "B"), (r"\boxed{\text{(B) 12 km}}", "B"), ("The answer is (C).", "C"),
    ("Answer: D) x + 1", "D"), ("the answer is b", "B"), (r"\boxed{61}", "A"), (r"\boxed{12 \text{ km}}", "B"),
    (r"\boxed{120\,\text{km}}", "C"), ("the answer is 12 km, which is option (B)", "B"),
    ("So we choose (A), no, (E)", "E"),
    ("I take option D now", "D"), ("It must be\nC.", "C"), ("A good question about Bob", None),
    ("the answer choice is None of these", "E"), (r"the answer is \(\textbf{C}\)", "C")])
def test_choices_are_read(text, expected):
    assert extract(text, "choice", CHOICES) == expected


@pytest.mark.parametrize("text, expected", [
    (r"\boxed{Yes}", "yes"), (r"\boxed{\text{no}}", "no"), ("So the answer is True, not false.", "yes"),
    ("Answer: **No**", "no"), ("There is no doubt: yes.", "yes"), ("Nothing known.", None)])
def test_yes_and_no_are_read(text, expected):
    assert extract(text, "yesno") == expected


@pytest.mark.parametrize("text, expected", [
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left(3, \frac{\pi}{2}\right)"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"The answer is $\frac{1}{2}$, since $x = 3$.", r"\frac{1}{2}"), (r"The answer is \(x^2\).", "x^2"),
    ("The answer is 0.5. Good.", "0.5"), (r"the answer is $\$18.90$.", r"\$18.90"), ("the answer is $.35$.", ".35"),
    ("we get 3 and then 4", "4")])
def test_latex_is_read(text, expected):
    assert extract(text, "math") == expected


def test_a_text_that_repeats_itself_is_read_in_linear_time():
    start = time.perf_counter()
    for piece in ("0", "1,", " ", "\n", "\\boxed{", "\\boxed{1}", "answer is ", "1 1 ", "\\frac{", "$", "_", "("):
        for kind in ("number", "choice", "yesno"):
            grade(extract(piece * 20000, kind, CHOICES), "5", "number")
    assert time.perf_counter() - start < 10  # a quadratic pattern takes minutes


SAME = [("18", "18.00"), ("1,234", "1234"), ("$18", "18"), ("-3", "−3"), ("1/2", "0.5"), ("\\frac12", "0.5"),
        ("\\dfrac{3}{4}", "3/4"), ("1\\frac{4}{5}", "9/5"), ("1 4/5", "1.8"), ("-\\frac{1}{2}", "\\frac{-1}{2}"),
        ("-\\frac{-1}{2}", ".5"), ("50%", "50"), ("50\\%", "0.5"), ("10,\\!080", "10080"), ("1{,}000", "1,000"),
        ("90^\\circ", "90"), ("-1 1/2", "-1.5"), ("3 \\times 10^{4}", "30000"), ("1e-3", "0.001"), ("\\$-5", "-5")]
OTHER = [("18", "81"), ("3", "-3"), ("1,234", "1.234"), ("1/3", "0.33"), (".5", "5"), ("2", "2/0"), ("", "0"),
         ("50%", "5"), ("1 1/2", "11/2"), ("3", "three"), ("9" * 5000, "1")]


@pytest.mark.parametrize("kind", ["number", "math"])
def test_numbers_are_compared_by_value(kind, monkeypatch):
    monkeypatch.setattr(tasks, "math_verify", lambda: None)
    for a, b in SAME:
        assert grade(a, b, kind) and grade(b, a, kind), (a, b)
    for a, b in OTHER:
        assert not grade(a, b, kind) and not grade(b, a, kind), (a, b)
    assert not grade(None, "1", kind)


def test_tolerance():
    assert grade("388147.41", "388147.4117647059", "number", 1e-2)
    assert not grade("388147.41", "388147.4117647059", "number")
    assert not grade("388147.5", "388147.4117647059", "number", 1e-2) and not grade("0", "5.158e-07", "number", 1e-2)
    assert grade("5.16e-7", "5.158e-07", "number", 1e-2) and grade("0", "0", "number", 1e-2)
    assert {name for name, task in TASKS.items() if task.tolerance} == {"gsm_hard", "asdiv-aug", "asdiv-aug-train"}


@pytest.mark.parametrize("a, b, equal", [
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", False),  # equal, but only math-verify sees it
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\dfrac{\\pi}{2})", True),
    ("\\text{Evelyn}", "Evelyn", True),
    ("\\text{(C)}", "C", True), (".5x", "5x", False), ("5.4 \\text{ cents}", "5.4", True),
    ("864 \\mbox{ inches}^2", "864", True),
    ("x=5", "5", True), ("x \\in [-2,7]", "[-2, 7]", True),
    ("11\\sqrt2", "11\\sqrt{2}", True), ("(3,4]", "(3,4)", False),
    ("p - q", "q - p", False),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
    ("\\sqrt{35}", "\\sqrt{53}", False), ("6 - 5i", "6-5i", True), ("\\$36", "36", True)])
def test_latex_is_compared_without_math_verify(a, b, equal, monkeypatch):
    monkeypatch.setattr(tasks, "math_verify", lambda: None)
    assert grade(a, b, "math") is grade(b, a, "math") is equal
    assert "not installed" in tasks.grader(TASKS["math500"])


def spelled(rng, numerator, denominator):
    """One of the ways to write a fraction whose decimals end. No Unicode minus: math-verify does not know it."""
    value, sign = numerator / denominator, "-" if numerator < 0 else ""
    top, whole = abs(numerator), abs(numerator) // denominator
    ways = [f"{value:.4f}", f"\\frac{{{numerator}}}{{{denominator}}}", f"{sign}\\dfrac{{{top}}}{{{denominator}}}",
            f"{sign}{top}/{denominator}", f"{value * 100:g}\\%"]
    if top > denominator and top % denominator:
        ways.append(f"{sign}{whole}\\frac{{{top % denominator}}}{{{denominator}}}")
    if denominator == 1:
        ways = [f"{value:.0f}", f"{sign}{top:,}", f"{sign}\\${top:,}.00", f"{sign}{top:,}".replace(",", "{,}"),
                f"{value:.1f}", f"{value:.0f}^\\circ", f"{value:.0f} \\text{{ apples}}"]
    return rng.choice(ways)


def test_grading_agrees_with_math_verify_on_generated_pairs():
    judge = pytest.importorskip("math_verify", reason="math-verify is an optional extra: pip install math-verify")
    rng, equal = random.Random(0), 0
    for _ in range(400):
        numerator, denominator = rng.randint(-3000, 3000), rng.choice([1, 1, 2, 4, 5, 8, 20])
        other = rng.choice([0, 0, 1, -1, numerator, 10 * denominator])
        gold, answer = spelled(rng, numerator, denominator), spelled(rng, numerator + other, denominator)
        expected = judge.verify(judge.parse(f"${gold}$"), judge.parse(f"${answer}$"))
        found = grade(extract(f"So it is \\boxed{{{answer}}}.", "number"), extract(gold, "number"), "number")
        assert found == expected, (gold, answer)
        assert grade(extract(f"So it is \\boxed{{{answer}}}.", "math"), gold, "math") == expected
        equal += expected
    assert 100 < equal < 300
    assert grade("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt{3}}{3}", "math")
    assert not grade("(" * 1000, "1", "math")  # no exception
    assert tasks.grader(TASKS["math500"]) == "math-verify"


# -------------------------------------------------------------------------------------------------------------- runs

PROBLEMS = [Problem(f"tiny-{i:05d}", f"{i} + {i}?", str(2 * i), "number") for i in range(6)]


def adder(wrong=(), order=1):
    """A method that answers, but for the problems in `wrong`, rightly; order -1 finishes the last job first."""
    def solve(jobs):
        for problem, sample in jobs[::order]:
            i = int(problem.id[-5:])
            yield problem, sample, {"thought_text": f"{i} + {i} = {2 * i}", "thought_tokens": 5 + i, "answer_tokens": 3,
                                    "answer_text": "The answer is 99" if i in wrong else f"The answer is {2 * i}",
                                    "seconds": random.random(), "stopped_by": "marker" if i else "cold stop"}
    return solve


def methods(settings, **solvers):
    return {name: (settings, solve) for name, solve in solvers.items()}


def records(path):
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return sorted(({**row, "seconds": 0} for row in rows), key=lambda r: (r["problem"], r["sample"], r["method"]))


def test_a_run_is_recorded_and_tabulated(tmp_path, capsys):
    output, table = tmp_path / "out.jsonl", tmp_path / "table.json"
    result, _ = run(PROBLEMS, TASKS["tiny"], methods({"seed": 0}, soft=adder(), cot=adder(wrong=(2, 4))), output=output,
                 json_path=table)
    captured = capsys.readouterr()
    assert json.loads(table.read_text()) == result and sorted(os.listdir(tmp_path)) == ["out.jsonl", "table.json"]
    assert json.loads(output.read_text().splitlines()[0])["settings"] == {"task": "tiny", "grader": "numbers, exact", "seed": 0}
    rows = records(output)
    assert len(rows) == 12 and rows[4]["problem"] == "tiny-00002"
    assert {key: rows[4][key] for key in ("method", "sample", "question", "prompt", "gold", "extracted",
                                          "extracted_from", "correct")} == {
        "method": "cot", "sample": 0, "question": "2 + 2?", "prompt": "2 + 2?", "gold": "4", "extracted": "99",
        "extracted_from": "answer_text", "correct": False}
    soft, cot = result["methods"]
    assert soft["accuracy"] == 1 and cot["accuracy"] == pytest.approx(4 / 6)
    assert soft["tokens"] == 10.5 and cot["tokens_correct"] == pytest.approx((8 + 9 + 11 + 13) / 4)
    assert soft["stops"] == {"marker": 5, "cold stop": 1} and soft["tokens_per_second"] > 0
    assert cot["difference"] == pytest.approx(-1 / 3)
    for piece in ("numbers, exact", "Wilson", "100.0%", "66.7%", "-33.3 (", "marker 5, cold stop 1"):
        assert piece in captured.out
    assert "accuracy 66.7%" in captured.err


def test_of_several_candidates_it_is_recorded_whether_any_is_right():
    def solve(jobs):
        for problem, sample in jobs:
            yield problem, sample, {"answer_text": "The answer is 99", "answers": [None, "99", "2" if sample == 0 else "3"]}

    _, records = run(PROBLEMS[:2], TASKS["tiny"], methods({}, m=solve))
    assert [record["any_correct"] for record in records.values()] == [False, True]
    assert not any(record["correct"] for record in records.values())


def test_what_the_answer_lacks_is_looked_for_in_the_thought():
    def solve(jobs):
        for problem, sample in jobs:
            yield problem, sample, {"answer_text": "", "thought_text": "it is 0" if problem.id[-1] == "0" else "hm"}

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
        assert [row["accuracy"] for row in result["methods"]] == [row["accuracy"] for row in expected["methods"]]
        assert ("half-written" in captured.err) == (cut not in (0, ends[0] + 1, ends[7] + 1, len(content)))
        assert ("of 12 records" in captured.out) == (cut > ends[0])


def test_more_problems_samples_and_methods_go_on_in_the_same_file(tmp_path):
    output, fresh = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run(PROBLEMS[:3], TASKS["tiny"], methods({"seed": 0}, soft=adder()), output=output)
    for path in (output, fresh):
        run(PROBLEMS, TASKS["tiny"], methods({"seed": 0}, soft=adder(), cot=adder()), num_samples=2, output=path)
    assert records(output) == records(fresh)


def test_other_settings_are_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    run(PROBLEMS, TASKS["tiny"], methods({"seed": 0, "model": "a"}, soft=adder()), output=output)
    before = output.read_bytes()
    with pytest.raises(UserError, match="seed is 0 there and 1 here, top_k is None there and 30 here"):
        run(PROBLEMS, TASKS["tiny"], methods({"seed": 1, "model": "a", "top_k": 30}, soft=adder()), output=output)
    with pytest.raises(UserError, match="task is 'tiny' there and 'svamp' here"):
        run(PROBLEMS, TASKS["svamp"], methods({"seed": 0, "model": "a"}, soft=adder()), output=output)
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
        run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), json_path=tmp_path / "none" / "table.json")
    output = tmp_path / "out.jsonl"
    run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=output)
    lines = output.read_text().splitlines()
    write_lines(output, *lines[:2], "{damaged", *lines[3:])
    with pytest.raises(UserError, match="line 3: not a record; delete the line"):
        run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=output)


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
from test_tasks import PROBLEMS, TASKS, adder, methods, run

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
    process = subprocess.Popen([sys.executable, "-c", script, str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not killed.exists() or killed.read_bytes().count(b"\n") < 10:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(killed, "ab") as file:
        file.write(b'{"problem": "tiny-0000')  # the kill itself seldom falls into the middle of a write
    finished = len(killed.read_bytes().splitlines()) - 1
    assert 9 <= finished < 120
    run(PROBLEMS, TASKS["tiny"], methods({"seed": 0}, soft=adder()), num_samples=20, output=killed)
    run(PROBLEMS, TASKS["tiny"], methods({"seed": 0}, soft=adder()), num_samples=20, output=whole)
    assert records(killed) == records(whole) and len(records(whole)) == 120


# ------------------------------------------------------------------------------------------------------------ tables

def verdicts(*samples):
    return [[{"correct": correct, "extracted": "1"} for correct in problem] for problem in samples]


def test_intervals():
    assert tasks.wilson(0.5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)  # e.g. R: prop.test(5, 10, correct = F)
    assert tasks.wilson(1, 20)[0] == pytest.approx(20 / (20 + 1.959964 ** 2)) and tasks.wilson(1, 20)[1] == 1
    single, means = tasks.summarise("a", verdicts([1], [1], [0], [1]), None)
    assert single.accuracy_interval == tasks.wilson(0.75, 4) and single.difference is None
    # four samples that always agree tell no more than one: n is 3 = p (1 - p) / (s^2 / 4), and s^2 = 4/3 p (1 - p)
    agreeing, _ = tasks.summarise("a", verdicts([1] * 4, [1] * 4, [0] * 4, [1] * 4), None)
    assert agreeing.accuracy == 0.75 and agreeing.accuracy_interval == pytest.approx(tasks.wilson(0.75, 3))
    mixed, _ = tasks.summarise("a", verdicts([1, 0], [0, 1], [1, 0], [0, 1]), None)
    assert mixed.accuracy_interval == tasks.wilson(0.5, 4)
    # Bonett and Price (2012): of 4 problems one is lost, none won: (0 + 1 - 1 - 1) / (4 + 2) and its variance
    worse, _ = tasks.summarise("b", verdicts([1], [0], [0], [1]), means)
    half = 1.959964 * ((3 / 6 - 1 / 36) / 6) ** 0.5
    assert worse.difference == -0.25 and worse.difference_interval == pytest.approx([-1 / 6 - half, -1 / 6 + half])


# --------------------------------------------------------------------------------- closings that models like to write

CLOSING = {"A": "21", "B": "21.5", "C": "22", "D": "22.5", "E": "23"}


@pytest.mark.parametrize("text, kind, expected", [
    ("**Answer**: 18 eggs (3 boxes of 6)", "number", "18"),
    ("Answer: 18 (since x = 3)", "number", "18"),
    ("The answer is 18 because 9 x 2 = 18, given x = 2", "number", "18"),
    ("The answer is 36 = 6^2", "number", "36"),
    (r"\boxed{18 = 9 \times 2}", "number", "18"),
    (r"\boxed{9 \times 2 = 18}", "number", "18"),
    ("The answer must be 18, in 2 days", "number", "18"),
    ("The answer is 1,250 dollars, as 5 * 250 = 1,250", "number", "1,250"),
    ("**Answer**: Yes, there is no problem.", "yesno", "yes"),
    ("Yes, because there is no evidence against it.", "yesno", "yes"),
    ("It has legs. Therefore yes. There is no rule against it.", "yesno", "yes"),
    ("**D) 22.5**", "choice", "D"),
    ("D. 22.5", "choice", "D"),
    ("Therefore, the correct choice is C) 22.", "choice", "C"),
    ("The correct option is D.", "choice", "D"),
    ("The correct answer is therefore D.", "choice", "D"),
    ("The correct answer to the question is D.", "choice", "D"),
    ("Thus, D is the correct answer.", "choice", "D"),
    ("**Answer**: D", "choice", "D"),
])
def test_closings(text, kind, expected):
    assert tasks.extract(text, kind, CLOSING if kind == "choice" else None) == expected
