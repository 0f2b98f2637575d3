"""Whether two answers are the same, and which of several wins a vote.

    answer = extract(generated_text, problem.kind, problem.choices)  # '18', or None
    grade(answer, problem.answer, problem.kind)                      # True

How an answer is found in a text is lab/answers.py, what a number's text stands for lab/latex.py,
how a program's tests are run lab/programs.py.
"""

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING

from lab import programs
from lab.answers import extract
from lab.latex import near, normalise, readings
from model import split_thought

if TYPE_CHECKING:
    from lab.tasks import Problem, Task  # which import this file

# ----------------------------------------------------------------------------------------- grading


def read_answer(text: str, problem: "Problem") -> str | None:
    """Find the answer in what a model says after its thought, or else anywhere in the text."""
    _, said = split_thought(text)
    form = problem.kind, problem.choices
    return extract(said, *form) or extract(text, *form)


@functools.cache
def math_verify() -> ModuleType | None:
    """The optional module, or None. Imported at the first LaTeX answer: it takes a second."""
    try:
        import math_verify

        return math_verify
    except ImportError:
        return None


def grader(task: "Task") -> str:
    """Say who judges a task's answers, for the table and the result file."""
    without = "normalised string equality (math-verify is not installed)"
    latex = "math-verify" if math_verify() else without
    numbers = f"numbers within {task.tolerance}" if task.tolerance else "numbers, exact"
    code = programs.grader(bool(task.file))
    # of problems that are of any kind
    own = f"{numbers}; letters; yes/no; LaTeX by {latex}; programs by {programs.grader(True)}"
    names = {"number": numbers, "math": latex, "choice": "letters", "yesno": "yes/no"}
    return (names | {"code": code, None: own})[task.kind]


def grade(extracted: str | None, gold: str, kind: str, tolerance: float = 0) -> bool:
    """Tell whether an extracted answer (None: no answer) is `gold`, or two samples agree.

    number: |extracted - gold| <= tolerance * min(1, |gold|), so that 0 is no answer to 5e-7 and
            a large number has to be right to the hundredth; 50 % counts as 50 and as 0.5; an
            irrational expression, in six digits
    math:   equal as rational numbers, as normalised strings, or (if it is installed) by
            math-verify, whose time-outs and errors count as wrong
    choice, yesno: equal
    code:   gold's tests pass, which are run (lab/programs.py); of two samples see `reader`
    """
    if extracted is None:
        return False
    if kind == "code":
        return programs.passes(extracted, gold)
    if kind in ("choice", "yesno"):
        return extracted == gold
    slack = Fraction(str(tolerance))
    pairs = [(a, b) for a in readings(extracted) for b in readings(gold)]
    exact = [(a, b) for a, b in pairs if isinstance(a, Fraction) and isinstance(b, Fraction)]
    if any(abs(a - b) <= slack * min(1, abs(b)) for a, b in exact):
        return True
    if kind == "number":
        rough = max(tolerance, 1e-6)
        return any(near(a, b, rough) for a, b in pairs if (a, b) not in exact)
    if normalise(extracted) == normalise(gold):
        return True
    base, right = (re.search(r"(?<=\d)_\{?(\d+)\}?$", normalise(x)) for x in (extracted, gold))
    if base and base[1] != (right[1] if right else "10"):  # math-verify reads no bases
        return False
    # No answer is as long or as nested, and it keeps math-verify busy for seconds.
    if len(extracted) >= 1000 or re.search(r"[({\[-]{9}", extracted):
        return False
    judge = math_verify()
    try:
        return bool(judge) and judge.verify(judge.parse(f"${gold}$"), judge.parse(f"${extracted}$"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 (its TimeoutException is no Exception)
        return False


# ------------------------------------------------------------------------------------------ voting


def vote(
    answers: Sequence[str | None],
    same: Callable[[str, str], bool],
    weights: Sequence[float] | None = None,
) -> int | None:
    """Find the answer with the largest weight: the index of its first occurrence.

    Each answer joins the earliest group whose first member it agrees with by `same`. Without
    `weights` every answer weighs 1, so that the most frequent one wins. Among equal groups the
    earliest wins. None is no answer and never counts; where there is no answer, None is returned.
    """
    totals: dict[int, float] = {}  # index of a group's first answer -> weight of the group
    for i, answer in enumerate(answers):
        if answer is not None:
            first = next((j for j in totals if same(answer, answers[j])), i)
            totals[first] = totals.get(first, 0) + (1 if weights is None else weights[i])
    return max(totals, key=totals.get) if totals else None


def reader(
    problem: "Problem", tolerance: float = 0
) -> tuple[Callable[[str], str | None], Callable[[str | None, str | None], bool]]:
    """Two functions for one problem, for a search that knows nothing of tasks: read and same.

    read(text) is the answer in a text, or None; same(a, b) tells whether two answers agree, and
    None agrees with nothing. Programs agree where their texts are equal; none is run.
    """

    def same(a: str | None, b: str | None) -> bool:
        if a is None or b is None or problem.kind == "code":
            return a is not None and a == b
        return grade(a, b, problem.kind, tolerance)

    return functools.partial(read_answer, problem=problem), same
