"""What each round of Soft Reasoning's searches was worth: of the points and verdicts in a file.

    python soft_reasoning.py --task tiny --method soft --output searches.jsonl
    python -m lab.rounds searches.jsonl

Of each round: the searches that came to it, their points, how many of these are right, with how
many the verifier agrees, and how many of those are right. Of all searches, as they stand after it:
in how many some point is right, the best point, and the verifier's latest answer. Then the same of
the searches in which the verifier agrees with no point of the first round: there, Expected
Improvement has everything still to find. Answers are read and graded anew, as in lab/regrade.py.
"""

import sys

from lab import cli, flags, grading, regrade
from lab.tables import aligned
from model import UserError

HEAD = ["round", "searches", "points", "right", "verified", "and right"]
HEAD += ["a right point", "best point right", "verifier right"]


def read(path: str) -> list[tuple[list[dict], list[dict]]]:
    """Each search's points and verdicts, with `right` in each. UserError where there are none."""
    records = regrade.read(path)
    task = regrade.only_task(path, records, None)
    regrade.only_settings(path, records, grading.grader(task))
    problems, searches = regrade.problems_of(path, records, task), []
    for record in (record for record in records if record.get("points")):
        problem = problems[record["problem"]]
        read_answer, _ = grading.reader(problem, task.tolerance)
        points, verdicts = record["points"], record["verdicts"]
        for said in points + verdicts:
            answer = read_answer(said["text"])
            said["right"] = grading.grade(answer, problem.answer, problem.kind, task.tolerance)
        searches.append((points, verdicts))
    if not searches:
        raise UserError(f"{path} holds no searches: --method soft of soft_reasoning.py makes them")
    return searches


def best(points: list[dict]) -> dict:
    """The point whose answer is taken: of those that give one, the first of the largest reward."""
    given = [point for point in points if point["answer"] is not None] or points
    return max(given, key=lambda point: point["reward"])


def line(searches: list[tuple], first: int, last: int) -> list[str]:
    """The rounds from first to last, and all searches as they stood after the last."""
    made = [[p for p in points if first <= p["round"] <= last] for points, _ in searches]
    until = [[p for p in points if p["round"] <= last] for points, _ in searches]
    points = [point for those in made for point in those]
    verified = [point for point in points if point["reward_verifier"]]
    judged = [verdicts[: last + 1][-1] for _, verdicts in searches if verdicts]
    name = f"{first + 1}" if first == last else f"{first + 1} to {last + 1}"
    return [
        *(name, str(sum(map(bool, made))), str(len(points))),
        share([point["right"] for point in points]),
        share([bool(point["reward_verifier"]) for point in points]),
        share([point["right"] for point in verified]),
        share([any(point["right"] for point in those) for those in until]),
        share([best(those)["right"] for those in until]),
        share([verdict["right"] for verdict in judged]),
    ]


def share(of: list[bool]) -> str:
    return f"{sum(of)} ({sum(of) / len(of):.1%})" if of else "-"


def table(searches: list[tuple]) -> str:
    last = max(point["round"] for points, _ in searches for point in points)
    lines = [line(searches, t, t) for t in range(last + 1)]
    lines += [line(searches, 1, last)] if last > 1 else []
    return "\n".join(aligned([HEAD, *lines]))


def report(path: str) -> None:
    searches = read(path)
    print(table(searches))
    verified = [[p["round"] for p in points if p["reward_verifier"]] for points, _ in searches]
    unverified = [search for search, at in zip(searches, verified) if 0 not in at]
    if any(verified) and unverified:
        later = sum(bool(at) and 0 not in at for at in verified)
        said = f"{len(unverified)} searches in which no point of the first round is verified"
        print(f"\n{said}; in {later} one is, later:\n{table(unverified)}")


def command(arguments: list[str]) -> int:
    parser = flags.new_parser("lab.rounds", __doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="result file of soft_reasoning.py's --output")
    args = parser.parse_args(arguments)
    return cli.guarded("lab.rounds", lambda: report(args.file))


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
