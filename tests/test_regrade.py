"""lab/regrade.py and lab/at_k.py: result files graded again, pass@k and majority@k."""

import itertools
import json
import math
import random
from fractions import Fraction

import pytest
from softcot_pair import data, evaluates, loaded, pair
from test_cli import long_context, reason, records_of, think

from lab import at_k, grading, regrade, tables
from lab.programs import with_tests
from lab.results import run
from lab.tasks import TASKS, Problem

__all__ = ["data", "loaded", "pair"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------------- the same rules


def table_of(printed):
    """Its lines with the numbers, without the speed, which only the run itself knows."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method"))
    head, *rows = (line.split() for line in lines[start : lines.index("", start)])
    where = head.index("tokens/s") if "tokens/s" in head else None
    return [row[:3] for row in rows], where is None


def ours(program, arguments, folder, rows):
    """Score `rows` by a program, with a golden model that knows nothing; the file of records."""
    file, out = folder.parent / "data.jsonl", folder.parent / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(long_context(folder)), "--device", "cpu", "--data", str(file)]
    assert program([*common, "--max-new-tokens", "6", "--output", str(out), *arguments]) == 0
    return out


@pytest.mark.parametrize(
    "program, arguments",
    [
        (think, ["--methods", "soft,greedy,cot", "--num-samples", "2"]),
        (
            reason,
            ["--methods", "soft,greedy,sc,fire,cot-decoding", "--num-samples", "3", "--k", "2"]
            + ["--rounds", "2", "--dimension", "8"],
        ),
    ],
)
def test_by_the_same_rules_nothing_changes(program, arguments, folder_of, tmp_path, capsys):
    """Every method's records: byte for byte the same file, and the same table."""
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(2)]
    out, new = ours(program, arguments, folder_of("qwen3"), rows), tmp_path / "new.jsonl"
    by_run, timed = table_of(capsys.readouterr().out)
    before = out.read_bytes()
    assert regrade.command([str(out), "--task", "data", "--output", str(new)]) == 0
    printed = capsys.readouterr().out
    assert table_of(printed) == (by_run, True) and not timed
    assert new.read_bytes() == before == out.read_bytes()
    assert printed.count(" records changed; 0 right -> wrong, 0 wrong -> right") == len(by_run)
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["data.jsonl", "new.jsonl", "out.jsonl"]


def test_by_the_same_rules_nothing_changes_of_softcot(pair, data, tmp_path):
    out, new = tmp_path / "out.jsonl", tmp_path / "new.jsonl"
    arguments = ["--methods", "zero-shot-cot,assist-cot", "--num-samples", "2", "--seeds", "2"]
    assert evaluates(pair(), data, *arguments, "--temperature", "1.5", "--output", str(out)) == 0
    assert all(len(record["texts"]) == 2 for record in records_of(out))
    assert regrade.command([str(out), "--output", str(new)]) == 0
    assert new.read_bytes() == out.read_bytes()


# ------------------------------------------------------------------------------------ other rules

PROBLEMS = [Problem(f"tiny-{i:05d}", f"{i} + {i}?", str(2 * i), "number") for i in range(3)]


def recorded(path, **methods):
    """A result file of records by method: name -> a function from the problem's number to one."""

    def solver(record):
        return lambda jobs: ((p, sample, record(int(p.id[-5:]), sample)) for p, sample in jobs)

    solvers = {name: ({"seed": 0}, solver(record)) for name, record in methods.items()}
    run(PROBLEMS, TASKS["tiny"], solvers, 2, path)
    return records_of(path)


def rewrite(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_what_another_grader_changes_is_written_and_listed(tmp_path, capsys):
    """Grades of a grader that read '99' everywhere; ours is right but in problem 2."""
    old, new, right = (tmp_path / name for name in ("old.jsonl", "new.jsonl", "right.jsonl"))
    expected = recorded(
        right,
        cot=lambda i, sample: {"answer_text": f"The answer is {2 * i if i < 2 else 99}"},
        soft=lambda i, sample: {"answer_text": "", "thought_text": f"it is {2 * i}"},
    )
    records = [dict(record) for record in expected]
    for record in records:
        record["settings"] = record["settings"] | {"grader": "another"}
    for i, changes in (
        (0, {"extracted": "99", "correct": False}),
        (4, {"extracted": "4", "correct": True}),
        (7, {"extracted": None, "extracted_from": None, "correct": False}),
    ):
        records[i] |= changes
    rewrite(old, records)
    before = old.read_bytes()
    capsys.readouterr()
    assert regrade.command([str(old)]) == 0
    without = capsys.readouterr().out
    assert regrade.command([str(old), "--output", str(new)]) == 0
    assert capsys.readouterr().out == without
    assert old.read_bytes() == before and new.read_bytes() == right.read_bytes()
    assert without.splitlines()[-6:] == [
        "before: graded by another",
        "cot: 2 of 6 records changed; 1 right -> wrong, 1 wrong -> right",
        "soft: 1 of 6 records changed; 0 right -> wrong, 1 wrong -> right",
        "  tiny-00000 cot 0: '99' -> '0', wrong -> right",
        "  tiny-00002 cot 0: '4' -> '99', right -> wrong",
        "  tiny-00000 soft 1: None -> '0', wrong -> right",
    ]
    # In place, where that is what is asked for.
    assert regrade.command([str(old), "--output", str(old)]) == 0
    assert old.read_bytes() == right.read_bytes()


def test_more_changes_than_are_listed_are_counted(tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    records = recorded(path, cot=lambda i, sample: {"answer_text": str(2 * i)})
    wrong = {"extracted": None, "correct": False}
    rewrite(path, [record | wrong for record in records])
    capsys.readouterr()
    assert regrade.command([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  and 1 more" and sum(line.startswith("  tiny") for line in lines) == 5


def test_a_vote_is_held_again_over_all_texts(tmp_path):
    """The old rules found no answer in texts that say 2; the new majority is another text."""
    path, new = tmp_path / "out.jsonl", tmp_path / "new.jsonl"
    texts = ["I take 9", "<think>so</think>It is 2.", "Then 2."]
    old = {"texts": texts, "answers": ["9", None, None], "weights": None, "answer_text": texts[0]}
    records = recorded(
        path,
        sc=lambda i, sample: old | {"thought_text": ""},
        branches=lambda i, sample: old | {"thought_text": "", "weights": [0.5, 0.2, 0.4]},
        unread=lambda i, sample: old | {"thought_text": "", "weights": [0.5, 0.0, 0.0]},
    )
    assert not any(record["correct"] for record in records)
    assert regrade.command([str(path), "--output", str(new)]) == 0
    found = {r["method"]: r for r in records_of(new) if r["problem"] == "tiny-00001"}
    chosen = {"answers": ["9", "2", "2"], "extracted": "2", "correct": True, "any_correct": True}
    chosen |= {"thought_text": "so", "answer_text": "It is 2.", "extracted_from": "answer_text"}
    for name in ("sc", "branches"):
        assert found[name].items() >= chosen.items()
    # CoT-decoding's margin at an answer that was not found is not in the record.
    assert found["unread"]["answer_text"] == "I take 9" and not found["unread"]["correct"]
    assert found["unread"]["any_correct"] and found["unread"]["answers"] == ["9", "2", "2"]
    assert not any(r["correct"] or r["any_correct"] for r in records_of(new) if r["gold"] == "4")


def test_a_search_keeps_its_choice_and_its_points_are_read_anew(tmp_path, capsys):
    path, new = tmp_path / "out.jsonl", tmp_path / "new.jsonl"
    points = [{"text": "It is 9.", "answer": "9", "reward": 2.0, "round": 0, "tokens": 4}]
    points += [{"text": "It is 2.", "answer": None, "reward": 1.0, "round": 0, "tokens": 4}]
    old = {"points": points, "answers": ["9", None], "answer_text": "It is 9.", "thought_text": ""}
    recorded(path, soft=lambda i, sample: dict(old))
    capsys.readouterr()
    assert regrade.command([str(path), "--output", str(new)]) == 0
    listed = "  tiny-00001 soft 0: '9' -> '9', wrong -> wrong; now a candidate is right"
    assert listed in capsys.readouterr().out.splitlines()
    for record in records_of(new):
        assert record["answer_text"] == "It is 9." and not record["correct"]
        assert record["answers"] == ["9", "2"] and record["points"] == points
        assert record["any_correct"] == (record["gold"] == "2")


def test_the_only_candidate_is_read_from_the_answer_and_others_without_texts_stay(tmp_path):
    path, new = tmp_path / "out.jsonl", tmp_path / "new.jsonl"
    greedy = {"thought_text": "The answer is 9.", "answer_text": "It is 2.", "answers": ["2"]}
    several = {"answer_text": "It is 9.", "answers": ["9", "2"]}
    recorded(path, greedy=lambda i, sample: greedy, m=lambda i, sample: several)
    assert regrade.command([str(path), "--output", str(new)]) == 0
    assert new.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "Is it?", "answer": "yes"}, {"question": "Half?", "answer": "1/2"}],
        [{"question": "Which?", "answer": "B", "choices": ["red", "blue"]}],
        [{"question": "Which interval?", "answer": "(1, 2]"}],
    ],
)
def test_problems_of_every_kind_are_those_of_the_run(rows, folder_of, tmp_path):
    out = ours(think, ["--method", "greedy"], folder_of("qwen3"), rows)
    records = records_of(out)
    for record, row in zip(sorted(records, key=lambda r: r["problem"]), rows):
        record["answer_text"] = f"The answer is \\boxed{{{row['answer']}}}."
    rewrite(out, records)
    new = tmp_path / "new.jsonl"
    assert regrade.command([str(out), "--output", str(new)]) == 0
    assert all(record["correct"] for record in records_of(new))


# --------------------------------------------------------------------------- unfinished and spoiled


def test_what_an_interruption_left_is_graded_and_tabulated_as_far_as_it_goes(tmp_path, capsys):
    path, new = tmp_path / "out.jsonl", tmp_path / "new.jsonl"
    both = dict.fromkeys(("soft", "cot"), lambda i, sample: {"answer_text": str(2 * i)})
    recorded(path, **both)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:11]) + lines[11][:30])
    capsys.readouterr()
    assert regrade.command([str(path), "--output", str(new)]) == 0
    printed = capsys.readouterr()
    assert f"{path}: the last line is half-written; its 30 bytes are left out" in printed.err
    assert "left out of the table: 1 of 3 problems, which not every method has" in printed.err
    assert printed.out.startswith("tiny: 2 problems, 2 sample(s) each")
    assert "cot: 0 of 5 records changed" in printed.out
    assert new.read_bytes() == b"".join(lines[:11])


def of_programs(records):
    gold = with_tests("assert f() == 1")
    return [r | {"settings": {"task": "mbpp"}, "gold": gold} for r in records]


def spoiled(records, **changes):
    return [records[0], records[1] | changes, *records[2:]]


@pytest.mark.parametrize(
    "spoil, arguments, said",
    [
        (lambda r: r, ["--task", "svamp"], "is of the task tiny, not of svamp"),
        (lambda r: spoiled(r, settings={"task": "aqua"}), [], "mixes the tasks aqua, tiny"),
        (lambda r: spoiled(r, settings={}), [], "line 2: no 'settings.task' in this record"),
        (lambda r: [x | {"settings": {"task": "x"}} for x in r], [], "unknown task, 'x'"),
        (lambda r: [*r, r[0]], [], "line 7: tiny-00000 cot 0 is there twice"),
        (lambda r: spoiled(r, question="x?"), [], "two different problems are named tiny-00000"),
        (lambda r: spoiled(r, gold="two"), [], "tiny-00000: the answer 'two' is not a number"),
        (lambda r: spoiled(r, settings=r[0]["settings"] | {"seed": 1}), [], "different settings"),
        (lambda r: [{k: v for k, v in r[0].items() if k != "gold"}], [], "line 1: no 'gold' in"),
        (lambda r: [5], [], "line 1: not a record; delete the line"),
        (lambda r: [], [], "holds no records"),
        (of_programs, [], "is graded by running the programs that the model writes: permit it"),
        (lambda r: r, ["--output", "/nowhere/new.jsonl"], "cannot write /nowhere/new.jsonl"),
        (lambda r: r, ["--at", "1,0"], "--at: takes numbers from 1 on, with commas between them"),
        (lambda r: r, ["--at", "x"], "--at: takes numbers from 1 on"),
        (lambda r: r, ["--at", "1,3"], "--at 3: there are not so many samples of a problem (cot 2"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(spoil, arguments, said, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    rewrite(path, spoil(recorded(path, cot=lambda i, sample: {"answer_text": str(2 * i)})))
    capsys.readouterr()
    try:
        code = regrade.command([str(path), *arguments])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error
    assert error.startswith("lab.regrade: ")


def test_other_files_are_refused(folder_of, tmp_path, capsys):
    missing, diary, asked = (tmp_path / name for name in ("none", "diary", "asked.jsonl"))
    diary.write_text("Dear diary\n")
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--device", "cpu"]
    arguments += ["--question", "Why?", "--max-new-tokens", "2", "--output", str(asked)]
    assert think(arguments) == 0
    capsys.readouterr()
    for path, said in (
        (missing, f"cannot read {missing}: No such file"),
        (tmp_path, f"cannot read {tmp_path}: Is a directory"),
        (diary, f"{diary}, line 1: not a record"),
        (asked, f"{asked}, line 1: no 'problem' in this record; only a run with --task or --data"),
    ):
        assert regrade.command([str(path)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


# --------------------------------------------------------------------------- pass@k and majority@k


def same(a, b):
    return a.lower() == b.lower()


def test_pass_at_k_by_hand():
    assert [at_k.pass_at(k, [1, 0, 1, 0]) for k in (1, 2, 3, 4)] == [1 / 2, 5 / 6, 1, 1]
    assert [at_k.pass_at(k, [0, 0, 0]) for k in (1, 2, 3)] == [0, 0, 0]
    assert at_k.pass_at(1, [True]) == 1
    # 1 of 2000 samples is right: any is it with chance 1/2000, and C(2000, 1000) is no float.
    assert at_k.pass_at(1000, [1] + [0] * 1999) == 0.5


def test_majority_at_k_by_hand():
    # Of x, y, y: {x, y} and {x, y} tie, and the first, x, wins; {y, y} is y's.
    grades = {"x": [True, False, False], "y": [False, True, True]}
    shares = {"x": [1 / 3, 2 / 3, 0], "y": [2 / 3, 1 / 3, 1]}
    for right, correct in grades.items():
        found = [at_k.majority_at(k, ["x", "y", "y"], correct, same) for k in (1, 2, 3)]
        assert found == pytest.approx(shares[right])
    # No answer never wins against one, and is wrong where it is alone.
    assert at_k.majority_at(3, [None, None, "x"], [False, False, True], same) == 1
    assert at_k.majority_at(1, [None, None, "x"], [False, False, True], same) == pytest.approx(
        1 / 3
    )
    assert at_k.majority_at(2, [None, None], [False, False], same) == 0


def test_both_are_the_means_over_all_choices_of_k_samples():
    rng = random.Random(5)
    for _ in range(40):
        n = rng.randint(1, 7)
        answers = [rng.choice(["a", "A", "b", "c", None]) for _ in range(n)]
        correct = [answer in ("b", "B") for answer in answers]
        for k in range(1, n + 1):
            won, passed = [], []
            for chosen in itertools.combinations(range(n), k):
                i = grading.vote([answers[j] for j in chosen], same)
                won.append(i is not None and correct[chosen[i]])
                passed.append(any(correct[j] for j in chosen))
            expected = [Fraction(sum(x), len(x)) for x in (won, passed)]
            found = at_k.majority_at(k, answers, correct, same), at_k.pass_at(k, correct)
            assert found == pytest.approx([float(x) for x in expected])


def test_a_majority_over_too_many_choices_is_drawn_and_near_the_exact_one():
    """Two answers, 21 of 30 samples right: three or more of five, of C(30, 5) = 142506 choices."""
    answers = random.Random(1).sample(["yes"] * 21 + ["no"] * 9, 30)
    correct = [answer == "yes" for answer in answers]
    exact = sum(math.comb(21, i) * math.comb(9, 5 - i) for i in (3, 4, 5)) / math.comb(30, 5)
    found = at_k.majority_at(5, answers, correct, same)
    assert abs(found - exact) < 4 * (exact * (1 - exact) / at_k.DRAWS) ** 0.5
    at_k.choices.cache_clear()
    assert at_k.majority_at(5, answers, correct, same) == found
    chosen = at_k.choices(30, 5)
    assert chosen.shape == (at_k.DRAWS, 5) and (chosen[:, 1:] > chosen[:, :-1]).all()
    # Every sample is drawn as often as any other: 5/30 of the choices, to four deviations.
    counts = [(chosen == i).sum() / at_k.DRAWS for i in range(30)]
    assert counts == pytest.approx([1 / 6] * 30, abs=4 * (5 / 36 / at_k.DRAWS) ** 0.5)


def test_the_report_has_a_line_for_each_method_and_k_that_it_has_samples_for(tmp_path, capsys):
    path = tmp_path / "out.jsonl"

    def sampled(i, sample):  # of problem 0 none of two is right, of 1 the second, of 2 both
        return {"answer_text": str(2 * i if sample + i > 1 else 99)}

    def solve(jobs):
        return ((p, sample, sampled(int(p.id[-5:]), sample)) for p, sample in jobs)

    solvers = {name: ({}, solve) for name in ("greedy", "cot")}
    run(PROBLEMS, TASKS["tiny"], solvers, {"greedy": 1, "cot": 2}, path)
    capsys.readouterr()
    assert regrade.command([str(path), "--at", "1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(next(line for line in lines if "pass@k" in line and "method" in line))
    assert [line.split()[:3] for line in lines[start + 1 : start + 4]] == [
        ["greedy", "1", "33.3%"],
        ["cot", "1", "50.0%"],
        ["cot", "2", "66.7%"],
    ]
    # Two samples of 1 disagree, and the first, which is wrong, wins.
    assert lines[start + 3].split("%")[3].split()[-1] == "33.3"
    # The means are 0, 1/2 and 1: of k = 1, Wilson's n is 1/2 (1 - 1/2) / (1/4 / 3) = 3.
    for line, p, n in ((1, 1 / 3, 3), (2, 1 / 2, 3), (3, 2 / 3, 3)):
        low, high = tables.wilson(p, n)
        assert f"({low:.1%} to {high:.1%})" in lines[start + line]
