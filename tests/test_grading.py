"""lab/grading.py: what is read from a text, which answers are the same, and who wins a vote."""

import math
import random
import time

import pytest

from lab import grading
from lab.grading import extract, grade, read_answer, reader, vote
from lab.tasks import TASKS, Problem

CHOICES = {"A": "$61", "B": "12 km", "C": "120 km", "D": "x + 1", "E": "None of these"}

# --------------------------------------------------------------------------------------- extraction

NUMBERS = [  # text, what is read
    (r"so \boxed{18}.", "18"),
    (r"\boxed{3} no, \boxed{\text{about } 4}", "4"),
    (r"\boxed{7} and \boxed{8", "7"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"first \boxed{6}, put it in \boxed{}", "6"),
    (r"\fbox{9} of 10", "9"),
    (r"$\boxed{x = -3}$ since 5", "-3"),
    (r"\boxed{3 + 4 = 7}", "7"),
    (r"\boxed{- 3}", "-3"),
    ("She makes 9 * 2 = 18 dollars.\n#### 1,018", "1,018"),
    ("#### Step 1: add\n2 + 2 = 4", "4"),
    ("The answer is 12 of the 50.", "12"),
    ("**Answer:** 42.", "42"),
    ("Answer:\n\n$-5$ degrees", "-5"),
    ("The answer is 5. Wait: the final answer is: 6. I am sure of all 3 steps.", "6"),
    ("answer is unclear; 4", "4"),
    ("It costs $1,234.50 in all.", "1,234.50"),
    ("16 - 3 - 4 = 9", "9"),
    ("10-3", "3"),
    ("it fell to -3", "-3"),
    ("it fell to −$3.5.", "-3.5"),
    ("about 50 % of it", "50 %"),
    ("3 1/2 cups", "3 1/2"),
    ("1{,}000", "1,000"),
    ("10,\\!080", "10,080"),
    ("a rate of 2.5e-7", "2.5e-7"),
    (r"3 \times 10^{8} m", "3 * 10^{8}"),
    ("none", None),
    ("", None),
    (r"\boxed{.5}", ".5"),
    ("The answer is $3 million dollars.", "3 million"),
    (r"\boxed{3 \text{ million dollars}}", "3 million"),
    ("#### 5 thousand miles", "5 thousand"),
    ("#### 5 miles", "5"),
    ("The answer is 20 percent of it", "20 percent"),
    ("The answer is not 7 but 8.", "8"),
    ("It is 9. The answer is not 7, as we saw.", "7"),  # the last number, for want of another
    ("The answer is Rs. 750", "750"),
    ("She needs 5 hundred-dollar bills", "5"),
    ("**Answer:** In 2 days, she makes $36.", "36"),
]


@pytest.mark.parametrize("text, expected", NUMBERS)
def test_numbers_are_read(text, expected):
    assert extract(text, "number") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\text{(B) 12 km}}", "B"),
        ("The answer is (C).", "C"),
        ("Answer: D) x + 1", "D"),
        ("the answer is b", "B"),
        (r"\boxed{61}", "A"),
        (r"\boxed{12 \text{ km}}", "B"),
        (r"\boxed{120\,\text{km}}", "C"),
        ("the answer is 12 km, which is option (B)", "B"),
        ("So we choose (A), no, (E)", "E"),
        ("I take option D now", "D"),
        ("the answer is option d)", "D"),
        ("the correct answer is choice d.", "D"),
        (r"\boxed{A, C}", None),
        (r"\boxed{B and D}", None),
        ("The answer is (B) or (C).", None),
        ("It is A, B or D. B fails, and D too. So A.", "A"),
        (r"\boxed{C, since 120 is more}", "C"),
        ("The answer is option (d).", "D"),
        ("The answer is the choice a passenger would see: 12 km", "B"),
        ("It must be\nC.", "C"),
        ("A good question about Bob", None),
        ("the answer choice is None of these", "E"),
        (r"the answer is \(\textbf{C}\)", "C"),
    ],
)
def test_choices_are_read(text, expected):
    assert extract(text, "choice", CHOICES) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{Yes}", "yes"),
        (r"\boxed{\text{no}}", "no"),
        ("So the answer is True, not false.", "yes"),
        ("Answer: **No**", "no"),
        ("There is no doubt: yes.", "yes"),
        ("Nothing known.", None),
    ],
)
def test_yes_and_no_are_read(text, expected):
    assert extract(text, "yesno") == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left(3, \frac{\pi}{2}\right)"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"The answer is $\frac{1}{2}$, since $x = 3$.", r"\frac{1}{2}"),
        (r"The answer is \(x^2\).", "x^2"),
        ("The answer is 0.5. Good.", "0.5"),
        (r"the answer is $\$18.90$.", r"\$18.90"),
        ("the answer is $.35$.", ".35"),
        ("we get 3 and then 4", "4"),
        # A formula at the end is read as a whole, behind its last '='.
        ("The area is $25\\pi$.", "25\\pi"),
        ("**Final Answer**\n\n$\\frac{3\\sqrt{3}}{4}$", "\\frac{3\\sqrt{3}}{4}"),
        ("so\n\\[\n z = 6+9i \\]", "6+9i"),
        ("$$52_8$$", "52_8"),
        ("We have $n = 4$ of the 12 left", "12"),
        ("It costs $5 and then $12 in all", "12"),
        ("The answer is $x = 1$ or $x = -2$.", "1, -2"),
        ("The answer is $3$, and $5$ of them are blue.", "3"),
        ("The answer is $5$ $\\text{cm}^2$.", "5"),
        ("The answer is $\\frac12$, or $50\\%$.", "\\frac12"),
        ("The answer is $\\frac{14}{3}$ or $4.67$.", "\\frac{14}{3}"),
        ("**Answer:** The area is $12\\pi$ square units.", "12\\pi"),
        ("The answer is clearly \\(\\frac{3\\sqrt3}{4}\\).", "\\frac{3\\sqrt3}{4}"),
        ("The final answer is:\n\n\\[\n\\frac12\n\\]", "\\frac12"),
        ("The answer is 5, since $x = 3$.", "5"),
        ("**Answer:** The smallest integer $n$ is $42$.", "42"),
        ("\n\\[\n\\begin{aligned}\nx &= 3+4 \\\\\n&= \\frac72\n\\end{aligned}\n\\]", "\\frac72"),
        ("Thus the value is $\\pi$.", "\\pi"),
        ("It is 12, for every $n$.", "12"),
        ("The volume is $288\\pi \\text{ cubic inches}$.", "288\\pi \\text{ cubic inches}"),
        ("x" * 250 + "\n$$\nx = \\frac{3\\sqrt3}{4}\n$$", "\\frac{3\\sqrt3}{4}"),
    ],
)
def test_latex_is_read(text, expected):
    assert extract(text, "math") == expected


def test_a_text_that_repeats_itself_is_read_in_linear_time():
    start = time.perf_counter()
    for piece in (
        "0",
        "1,",
        " ",
        "\n",
        "\\boxed{",
        "\\boxed{1}",
        "answer is ",
        "1 1 ",
        "\\frac{",
        "$",
        "_",
        "(",
        "-\n",
        "| | |\n",
        "---\n\n",
        "```\n",
        "A, ",
        "(A), ",
        "\\(1\\), ",
        "The answer is \\(1\\), \\(2\\), ",
        "```python\n" + "\n" * 50,
        "```python\n" + "\n    " * 50,
    ):
        for kind in ("number", "math", "choice", "yesno", "code"):
            grade(extract(piece * (50_000 // len(piece)), kind, CHOICES), "5", "number")
    assert time.perf_counter() - start < 20  # a quadratic pattern takes minutes


# --------------------------------------------------------------- closings that models like to write

CLOSING = {"A": "21", "B": "21.5", "C": "22", "D": "22.5", "E": "23"}


@pytest.mark.parametrize(
    "text, kind, expected",
    [
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
    ],
)
def test_closings(text, kind, expected):
    assert extract(text, kind, CLOSING if kind == "choice" else None) == expected


# ------------------------------------------------------------------------------------------ grading

SAME = [
    ("18", "18.00"),
    ("1,234", "1234"),
    ("$18", "18"),
    ("-3", "−3"),
    ("1/2", "0.5"),
    ("\\frac12", "0.5"),
    ("\\dfrac{3}{4}", "3/4"),
    ("1\\frac{4}{5}", "9/5"),
    ("1 4/5", "1.8"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("-\\frac{-1}{2}", ".5"),
    ("50%", "50"),
    ("50\\%", "0.5"),
    ("10,\\!080", "10080"),
    ("1{,}000", "1,000"),
    ("90^\\circ", "90"),
    ("-1 1/2", "-1.5"),
    ("3 \\times 10^{4}", "30000"),
    ("1e-3", "0.001"),
    ("\\$-5", "-5"),
]
OTHER = [
    ("18", "81"),
    ("3", "-3"),
    ("1,234", "1.234"),
    ("1/3", "0.33"),
    (".5", "5"),
    ("2", "2/0"),
    ("", "0"),
    ("50%", "5"),
    ("1 1/2", "11/2"),
    ("3", "three"),
    ("9" * 5000, "1"),
    ("3 million", "3"),
    ("3 million people", "3"),
    ("3xy", "3"),
    ("6xyz", "6"),
]


@pytest.mark.parametrize("kind", ["number", "math"])
def test_numbers_are_compared_by_value(kind, monkeypatch):
    monkeypatch.setattr(grading, "math_verify", lambda: None)
    for a, b in SAME:
        assert grade(a, b, kind) and grade(b, a, kind), (a, b)
    for a, b in OTHER:
        assert not grade(a, b, kind) and not grade(b, a, kind), (a, b)
    assert not grade(None, "1", kind)


def test_integers_larger_than_any_float_are_compared_exactly_and_end_no_run():
    huge = str(math.factorial(200))
    assert grade("200!", huge, "number") and not grade("200!", huge[:-1] + "1", "number")
    assert grade("2^{2000}", str(2**2000), "number")
    for a, b in (("1e400", r"\sqrt{2}"), (r"\sqrt{2}", "1e400"), ("200!", r"\pi")):
        assert not grade(a, b, "number")


def test_tolerance():
    assert grade("388147.41", "388147.4117647059", "number", 1e-2)
    assert not grade("388147.41", "388147.4117647059", "number")
    assert not grade("388147.5", "388147.4117647059", "number", 1e-2) and not grade(
        "0", "5.158e-07", "number", 1e-2
    )
    assert grade("5.16e-7", "5.158e-07", "number", 1e-2) and grade("0", "0", "number", 1e-2)
    assert {name for name, task in TASKS.items() if task.tolerance} == {
        "gsm_hard",
        "asdiv-aug",
        "asdiv-aug-train",
    }


@pytest.mark.parametrize(
    "a, b, equal",
    [
        (
            "\\frac{\\sqrt{3}}{3}",
            "\\frac{1}{\\sqrt{3}}",
            False,
        ),  # equal, but only math-verify sees it
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\dfrac{\\pi}{2})", True),
        ("\\text{Evelyn}", "Evelyn", True),
        ("\\text{(C)}", "C", True),
        (".5x", "5x", False),
        ("5.4 \\text{ cents}", "5.4", True),
        ("864 \\mbox{ inches}^2", "864", True),
        ("x=5", "5", True),
        ("x \\in [-2,7]", "[-2, 7]", True),
        ("11\\sqrt2", "11\\sqrt{2}", True),
        ("(3,4]", "(3,4)", False),
        ("p - q", "q - p", False),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
        ("\\sqrt{35}", "\\sqrt{53}", False),
        ("6 - 5i", "6-5i", True),
        ("2ab", "2xy", False),
        ("12cm", "12", True),
        ("12 m", "12", True),
        ("3 miles per hour", "3mph", True),
        ("\\$36", "36", True),
    ],
)
def test_latex_is_compared_without_math_verify(a, b, equal, monkeypatch):
    monkeypatch.setattr(grading, "math_verify", lambda: None)
    assert grade(a, b, "math") is grade(b, a, "math") is equal
    assert "not installed" in grading.grader(TASKS["math500"])


class Judge:
    """In the place of math-verify: it fails in a way of the test's choice."""

    def __init__(self, parse=None, verify=None):
        self.errors = {"parse": parse, "verify": verify}

    def parse(self, text):
        return self.answer("parse", text)

    def verify(self, gold, answer):
        return self.answer("verify", True)

    def answer(self, name, value):
        if self.errors[name]:
            raise self.errors[name]
        return value


class TimeoutException(BaseException):
    """As math-verify's own, which is no Exception."""


@pytest.mark.parametrize("error", [TimeoutException(), ValueError("signal"), RecursionError()])
def test_what_math_verify_has_no_answer_to_is_wrong_and_ends_no_run(error, monkeypatch):
    pair = "\\frac{1}{\\sqrt{3}}x", "\\frac{\\sqrt{3}}{3}x"
    monkeypatch.setattr(grading, "math_verify", Judge)
    assert grade(*pair, "math") and grade("52", "52_8", "math")
    for a, b in (("52_8", "52_9"), ("11_2", "11"), ("52_{10}", "52_8"), ("11_{16}", "11_2")):
        assert not grade(a, b, "math")  # which this judge, as the real one, takes for equal
    for a, b in (("42_{10}", "42"), ("x_2 + x_1", "x_1 + x_2")):
        assert grade(a, b, "math")
    for where in ("parse", "verify"):
        monkeypatch.setattr(grading, "math_verify", lambda where=where: Judge(**{where: error}))
        assert not grade(*pair, "math")
    monkeypatch.setattr(grading, "math_verify", lambda: Judge(verify=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        grade(*pair, "math")


def spelled(rng, numerator, denominator):
    """One of the ways to write a fraction whose decimals end.

    None has a Unicode minus, which math-verify does not know.
    """
    value, sign = numerator / denominator, "-" if numerator < 0 else ""
    top, whole = abs(numerator), abs(numerator) // denominator
    ways = [
        f"{value:.4f}",
        f"\\frac{{{numerator}}}{{{denominator}}}",
        f"{sign}\\dfrac{{{top}}}{{{denominator}}}",
        f"{sign}{top}/{denominator}",
        f"{value * 100:g}\\%",
    ]
    if top > denominator and top % denominator:
        ways.append(f"{sign}{whole}\\frac{{{top % denominator}}}{{{denominator}}}")
    if denominator == 1:
        ways = [
            f"{value:.0f}",
            f"{sign}{top:,}",
            f"{sign}\\${top:,}.00",
            f"{sign}{top:,}".replace(",", "{,}"),
            f"{value:.1f}",
            f"{value:.0f}^\\circ",
            f"{value:.0f} \\text{{ apples}}",
        ]
    return rng.choice(ways)


def test_grading_agrees_with_math_verify_on_generated_pairs():
    judge = pytest.importorskip(
        "math_verify", reason="math-verify is an optional extra: pip install math-verify"
    )
    rng, equal = random.Random(0), 0
    for _ in range(400):
        numerator, denominator = rng.randint(-3000, 3000), rng.choice([1, 1, 2, 4, 5, 8, 20])
        other = rng.choice([0, 0, 1, -1, numerator, 10 * denominator])
        gold, answer = (
            spelled(rng, numerator, denominator),
            spelled(rng, numerator + other, denominator),
        )
        expected = judge.verify(judge.parse(f"${gold}$"), judge.parse(f"${answer}$"))
        found = grade(
            extract(f"So it is \\boxed{{{answer}}}.", "number"), extract(gold, "number"), "number"
        )
        assert found == expected, (gold, answer)
        assert grade(extract(f"So it is \\boxed{{{answer}}}.", "math"), gold, "math") == expected
        equal += expected
    assert 100 < equal < 300
    assert grade("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt{3}}{3}", "math")
    assert not grade("(" * 1000, "1", "math")  # no exception
    assert grading.grader(TASKS["math500"]) == "math-verify"


# ------------------------------------------------------------------------------------------- voting


def same_number(a, b):
    return grade(a, b, "number")


def old_vote(answers, same, weights=None):
    """The voter of the first Soft Reasoning: groups as lists of an answer and its weight."""
    groups = []
    for answer, weight in zip(answers, weights or [1.0] * len(answers)):
        if answer is not None:
            group = next((g for g in groups if same(answer, g[0])), None)
            if group is None:
                groups.append([answer, weight])
            else:
                group[1] += weight
    return max(groups, key=lambda g: g[1])[0] if groups else None


def test_equal_answers_vote_together():
    assert vote(["18", "7", "18.00", "$18"], same_number) == 0
    assert vote(["7", "1/2", "18", "0.5"], same_number) == 1
    assert vote(["7", "1/2", "18", "0.5"], lambda a, b: a == b) == 0
    assert vote(["7"], same_number) == 0


def test_the_earliest_of_equal_groups_wins():
    assert vote(["1", "2", "3"], same_number) == 0
    assert vote(["3", "2", "1", "2", "1"], same_number) == 1
    assert vote(["1", "2", "2", "1.0"], same_number, [1, 2, 2, 3]) == 0


def test_weights_are_summed():
    assert vote(["1", "2", "1"], same_number, [0.1, 0.5, 0.1]) == 1
    assert vote(["1", "2", "1"], same_number, [0.3, 0.5, 0.3]) == 0
    assert vote(["1", "2"], same_number, [-2.0, -1.0]) == 1
    assert vote(["1", "2"], same_number, [0.0, 0.0]) == 0


def test_none_is_no_answer_and_never_counts():
    assert vote([None, None, None, "4"], same_number) == 3
    assert vote([None, "4", None, "5", "5"], same_number, [9, 1, 9, 1, 1]) == 3
    assert vote([None, None], same_number) is None and vote([], same_number) is None


def test_an_answer_joins_the_earliest_group_that_it_agrees_with():
    # 50 % may mean 50 or 0.5, so it agrees with both groups, which do not agree with each other.
    assert vote(["50", "0.5", "0.50", "50%", "50 %"], same_number) == 0
    assert vote(["50%", "50", "0.5", "7", "7"], same_number) == 0


def test_votes_are_those_of_the_first_implementation():
    rng = random.Random(0)
    pool = [None, "1", "1.0", "2", "2.00", "1/2", "0.5", "50%", "50", "-3", "x"]
    for _ in range(300):
        answers = rng.choices(pool, k=rng.randint(0, 12))
        weights = rng.choice([None, [rng.choice([0.25, 0.5, 1.0]) for _ in answers]])
        index = vote(answers, same_number, weights)
        chosen = None if index is None else answers[index]
        assert chosen == old_vote(answers, same_number, weights), (answers, weights)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>It is 5.</think>The answer is 6.", "6"),
        ("<think>The answer is 5.</think>I am sure.", "5"),
        ("The answer is 5.", "5"),
        ("<think>Hm.</think>No idea.", None),
    ],
)
def test_the_answer_is_what_is_said_after_the_thought_or_else_anywhere(text, expected):
    problem = Problem("x", "q", "6", "number")
    read, _ = reader(problem)
    assert read_answer(text, problem) == read(text) == expected


def test_a_reader_knows_the_kind_the_choices_and_the_tolerance():
    read, same = reader(Problem("x", "q", "B", "choice", CHOICES))
    assert read("I think it is 12 km: the answer is 12 km.") == "B"
    assert same("B", "B") and not same("B", "C")
    _, same = reader(Problem("x", "q", "1.00", "number"), 1e-2)
    assert same("1.005", "1.00") and not same("1.02", "1.00")
    assert not same(None, "1") and not same("1", None) and not same(None, None)
