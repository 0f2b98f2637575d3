"""lab/rounds.py: what each round of a search was worth, counted by hand."""

import json

import pytest
from test_cli import reason, records_of
from test_regrade import ours

from lab import rounds

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
    return {"answer": answer, "text": f"The answer is {answer}.", "tokens": 4}


def write(file, **found):
    """What search number i of the file is to have found instead."""
    records = records_of(file)
    for record in records:
        if record["method"] == "soft":
            points, verdicts = found[record["problem"][-1]]
            record.update(points=points, verdicts=verdicts)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def cells(line):
    return [cell.strip() for cell in line.replace(" (", "_(").split("  ") if cell.strip()]


def test_rounds_are_counted(file, capsys):
    names = [r["problem"][-1] for r in records_of(file) if r["method"] == "soft"]
    golds = dict(zip(names, ("7", "8")))
    one, two = sorted(names)
    one_right, two_right = golds[one], golds[two]
    # The first: agreed with by mistake, and better rewarded than the right one of the next round.
    first = [point(0, "1", 1.0, 1.5), point(0, None, 0.0, 1.9)]
    first += [point(1, one_right, 1.0, 1.4), point(1, one_right, 0.0, 0.4)]
    # The second: nothing verified in the first round, then a right one.
    second = [point(0, "3", 0.0, 0.5), point(0, "4", 0.0, 0.6)]
    second += [point(1, two_right, 1.0, 1.6), point(1, "5", 0.0, 0.3)]
    found = {one: (first, [verdict("1"), verdict(one_right)])}
    write(file, **found, **{two: (second, [verdict(two_right), verdict("9")])})
    assert rounds.command([str(file)]) == 0
    everything, unverified = capsys.readouterr().out.split("\n\n")
    head, *lines = everything.splitlines()
    assert head.split("  ")[0] == "round" and len(lines) == 2
    assert cells(lines[0]) == (
        ["1", "2", "4", "0_(0.0%)", "1_(25.0%)", "0_(0.0%)"] + ["0_(0.0%)", "0_(0.0%)", "1_(50.0%)"]
    )
    assert cells(lines[1]) == (
        ["2", "2", "4", "3_(75.0%)", "2_(50.0%)", "2_(100.0%)"]
        + ["2_(100.0%)", "1_(50.0%)", "1_(50.0%)"]
    )
    said, _, *lines = unverified.splitlines()
    assert said == (
        "1 searches in which no point of the first round is verified; in 1 one is, later:"
    )
    assert cells(lines[0])[:6] == ["1", "1", "2", "0_(0.0%)", "0_(0.0%)", "-"]
    assert cells(lines[1])[3:] == (
        ["1_(50.0%)", "1_(50.0%)", "1_(100.0%)", "1_(100.0%)", "1_(100.0%)", "0_(0.0%)"]
    )


def test_later_rounds_are_also_counted_together(file, capsys):
    found = [point(t, "1", None, 0.5) for t in range(3) for _ in range(2)]
    names = [r["problem"][-1] for r in records_of(file) if r["method"] == "soft"]
    # One search ends after the first round. There is no verifier: --reward coherence.
    write(file, **{names[0]: (found, []), names[1]: (found[:2], [])})
    assert rounds.command([str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cells(line)[:3] for line in lines[1:]] == [
        ["1", "2", "4"],
        ["2", "1", "2"],
        ["3", "1", "2"],
        ["2 to 3", "1", "4"],
    ]
    assert all(cells(line)[-1] == "-" for line in lines[1:])


def test_a_file_without_searches_is_refused(folder_of, tmp_path, capsys):
    out = ours(reason, ["--methods", "greedy"], folder_of("qwen3"), ROWS)
    capsys.readouterr()
    for path, said in ((out, "holds no searches"), (tmp_path / "none.jsonl", "none.jsonl")):
        assert rounds.command([str(path)]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
