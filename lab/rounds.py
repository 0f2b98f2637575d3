"""What each round of Soft Reasoning's searches was worth: of the points and verdicts in a file.

    python soft_reasoning.py --task tiny --method soft --output searches.jsonl
    python -m lab.rounds searches.jsonl

Of each round: the searches that came to it, their points, how many of these are right, with how
many the verifier agrees, and how many of those are right. After it, over all searches: how many
have a right point, how many would give a right answer, how many a right latest verdict. Then the
same of the searches in which the verifier agrees with no point of the first round: there, Expected
Improvement has everything still to find. Answers are taken as the search read them.
"""

import sys

from lab import cli, costs, flags, grading, regrade, tasks
from lab.tables import aligned
from model import UserError

HEAD = ["round", "searches", "points", "right", "verified", "of these right"]
HEAD += ["right point", "right answer", "right verdict"]


class Search:
    """A record's points and verdicts, with `right` in each, and what it answers after a round."""

    def __init__(self, record: dict, problem: tasks.Problem, tolerance: float):
        self.record, self.form = record, (problem.answer, problem.kind, tolerance)
        self.same = grading.reader(problem, tolerance)[1]
        self.points, self.verdicts = record["points"], record["verdicts"]
        for said in self.points + self.verdicts:
            said["right"] = grading.grade(said["answer"], *self.form)
        self.verified = {p["round"] for p in self.points if p["reward_verifier"]}

    def answers_right(self, last: int) -> bool:
        answer, _ = costs.partial_search(self.record, last, self.same)
        return grading.grade(answer, *self.form)


def read(path: str) -> list[Search]:
    """UserError where there are none, or they cannot be graded, or only by running programs."""
    records = regrade.read(path)
    task = regrade.only_task(path, records, None)
    regrade.only_settings(path, records, grading.grader(task))
    records = [record for record in records if record.get("points")]
    if not records:
        raise UserError(f"{path} holds no searches: --method soft of soft_reasoning.py makes them")
    problems = regrade.problems_of(path, records, task)
    if any(problem.kind == "code" for problem in problems.values()):
        raise UserError(f"{path} is of programs, which would have to be run: not counted here")
    return [Search(r, problems[r["problem"]], task.tolerance) for r in records]


def line(searches: list[Search], first: int, last: int) -> list[str]:
    """The rounds from first to last, and all searches as they stand after the last."""
    made = [[p for p in s.points if first <= p["round"] <= last] for s in searches]
    points = [point for those in made for point in those]
    judged = [point for point in points if point["reward_verifier"] is not None]
    name = f"{first + 1}" if first == last else f"{first + 1} to {last + 1}"
    return [
        *(name, str(sum(map(bool, made))), str(len(points))),
        share([point["right"] for point in points]),
        share([bool(point["reward_verifier"]) for point in judged]),
        share([point["right"] for point in judged if point["reward_verifier"]]),
        share([any(p["right"] for p in s.points if p["round"] <= last) for s in searches]),
        share([s.answers_right(last) for s in searches]),
        share([s.verdicts[: last + 1][-1]["right"] for s in searches if s.verdicts]),
    ]


def share(of: list[bool]) -> str:
    return f"{sum(of)} ({sum(of) / len(of):.1%})" if of else "-"


def table(searches: list[Search]) -> str:
    last = max(point["round"] for s in searches for point in s.points)
    lines = [line(searches, t, t) for t in range(last + 1)]
    lines += [line(searches, 1, last)] if last > 1 else []
    return "\n".join(aligned([HEAD, *lines]))


def report(path: str) -> None:
    searches = read(path)
    print(table(searches))
    late = [s for s in searches if s.verdicts and 0 not in s.verified]
    if late:
        found = sum(bool(s.verified) for s in late)
        said = f"No point of the first round is verified in {len(late)} of the searches"
        print(f"\n{said}, a later one in {found} of them:\n{table(late)}")


def command(arguments: list[str]) -> int:
    parser = flags.new_parser("lab.rounds", __doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="result file of soft_reasoning.py's --output")
    args = parser.parse_args(arguments)
    return cli.guarded("lab.rounds", lambda: report(args.file))


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
