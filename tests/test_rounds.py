"""lab/rounds.py: what each round of a search was worth, counted by hand."""

import json

import pytest
from test_cli import reason, records_of
from test_regrade import ours

from lab import rounds
from lab.programs import with_tests

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{"question": f"What is {i}?", "answer": str(i)} for i in (7, 8)]


@pytest.fixture
def file(folder_of):
    arguments = ["--methods", "soft,greedy", "--k", "2", "--rounds", "2", "--dimension", "8"]
    return ours(reason, arguments, folder_of("qwen3"), ROWS)


def point(round, answer, agrees, reward):
    text = "no answer" if answer is None else f"The answer is {answer}."
    found = {"round": round, "u": [0.0], "reward_verifier": agrees, "reward_coherence": 0.5}
    return found | {"reward": reward, "ei": None, "answer": answer, "text": text, "tokens": 4}


def verdict(answer):
    """Of a verifier that names a candidate: the search takes the candidate's answer."""
    return {"answer": answer, "text": "Candidate 2 is right.", "tokens": 4}


def write(file, change=lambda record: record, **found):
    """Give the search for the number 7, and for 8, other points and verdicts."""
    records = records_of(file)
    for record in records:
        if record["method"] == "soft":
            points, verdicts = found["of" + record["gold"]]
            record.update(points=points, verdicts=verdicts)
    file.write_text("".join(json.dumps(change(record)) + "\n" for record in records))


def cells(line):
    return [cell for cell in line.replace(" (", "(").replace(" to ", "to").split() if cell]


# The first search: its verifier errs at first, and the wrong point keeps the largest reward. The
# second: nothing is verified in its first round, and later a right point is, by a wrong verdict.
SEVEN = [point(0, "1", 1.0, 1.5), point(0, None, 0.0, 1.9)]
SEVEN += [point(1, "7", 1.0, 1.4), point(1, "7", 0.0, 0.4)]
EIGHT = [point(0, "3", 0.0, 0.5), point(0, "4", 0.0, 0.6)]
EIGHT += [point(1, "8", 1.0, 1.6), point(1, "5", 0.0, 0.3)]
FOUND = {"of7": (SEVEN, [verdict("1"), verdict("7")]), "of8": (EIGHT, [verdict("8"), verdict("9")])}
# Per round: searches, points, right, verified, of these right; and after it, over both searches,
# those with a right point, a right answer, a right latest verdict.
ALL = [
    ["1", "2", "4", "0(0.0%)", "1(25.0%)", "0(0.0%)", "0(0.0%)", "0(0.0%)", "1(50.0%)"],
    ["2", "2", "4", "3(75.0%)", "2(50.0%)", "2(100.0%)", "2(100.0%)", "1(50.0%)", "1(50.0%)"],
]
LATE = [
    ["1", "1", "2", "0(0.0%)", "0(0.0%)", "-", "0(0.0%)", "0(0.0%)", "1(100.0%)"],
    ["2", "1", "2", "1(50.0%)", "1(50.0%)", "1(100.0%)", "1(100.0%)", "1(100.0%)", "0(0.0%)"],
]


def test_rounds_are_counted(file, capsys):
    write(file, **FOUND)
    capsys.readouterr()
    assert rounds.command([str(file)]) == 0
    everything, late = capsys.readouterr().out.split("\n\n")
    assert [cells(line) for line in everything.splitlines()[1:]] == ALL
    said, _, *lines = late.splitlines()
    assert said == (
        "No point of the first round is verified in 1 of the searches, a later one in 1 of them:"
    )
    assert [cells(line) for line in lines] == LATE


def test_a_vote_is_the_answer_where_it_was(file, capsys):
    """Of the first search: 1, none, 7, 7 and the verdicts 1 and 7; of the second 8 has most."""

    def voting(record):
        return record | {"settings": record["settings"] | {"select": "vote"}}

    write(file, voting, **FOUND)
    capsys.readouterr()
    assert rounds.command([str(file)]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    # After the first round 1 and 1 win, and of 3, 4 and 8 the earliest; in the end 7, and 8.
    assert [cells(line)[7] for line in lines] == ["0(0.0%)", "2(100.0%)"]


def test_later_rounds_are_also_counted_together(file, capsys):
    found = [point(t, "1", None, 0.5) for t in range(3) for _ in range(2)]
    # One search ends after the first round. There is no verifier: --reward coherence.
    write(file, of7=(found, []), of8=(found[:2], []))
    capsys.readouterr()
    assert rounds.command([str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cells(line)[:3] for line in lines[1:]] == [
        ["1", "2", "4"],
        ["2", "1", "2"],
        ["3", "1", "2"],
        ["2to3", "1", "4"],
    ]
    assert all([cells(line)[i] for i in (4, 5, 8)] == ["-"] * 3 for line in lines[1:])


def test_a_file_without_searches_is_refused(folder_of, tmp_path, capsys):
    out = ours(reason, ["--methods", "greedy"], folder_of("qwen3"), ROWS)
    capsys.readouterr()
    for path, said in ((out, "holds no searches"), (tmp_path / "none.jsonl", "none.jsonl")):
        assert rounds.command([str(path)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_what_cannot_be_graded_is_named(file, capsys):
    def of_a_word(record):
        settings = record["settings"] | {"task": "gsm8k"}
        return record | {"settings": settings, "gold": "abc"}

    write(file, of_a_word, **FOUND)
    capsys.readouterr()
    assert rounds.command([str(file)]) == 2
    error = capsys.readouterr().err
    assert "'abc'" in error and "programs" not in error and error.count("\n") == 1


def test_programs_are_not_run(file, capsys):
    def of_programs(record):
        settings = record["settings"] | {"task": "mbpp"}
        return record | {"settings": settings, "gold": with_tests("assert f() == 1")}

    write(file, of_programs, **FOUND)
    capsys.readouterr()
    assert rounds.command([str(file)]) == 2
    assert "is of programs, which would have to be run" in capsys.readouterr().err
