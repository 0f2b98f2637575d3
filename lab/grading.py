r"""What a text gives as its answer, and whether two answers are the same.

    answer = extract(generated_text, problem.kind, problem.choices)  # '18', or None
    grade(answer, problem.answer, problem.kind)                      # True

An answer is the content of the last \boxed{}; else what stands in a last line '#### 18'; else what
follows 'the answer is'; else the last value in the text.
"""

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING

from model import split_thought

if TYPE_CHECKING:
    from lab.tasks import Problem, Task  # which import this file

# -------------------------------------------------------------------------------------- plain text

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w.)\]}]) [-+] )?         # after a digit or bracket it is an operator
    (?: (?P<whole> \d+ ) \s+ (?= \d+ / \d ) )?  # of a mixed number: 1 4/5
    (?P<digits> \d{1,3} (?: ,\d{3} )+ (?!\d) (?: \.\d+ )? | \d+ (?: \.\d+ )? | \.\d+ )
    (?: \s? / \s? (?P<over> -?\d+ (?: \.\d+ )? )  # a fraction
      | \s? \* \s? 10 \s? \^ \s? \{? (?P<power> -?\d{1,3} ) (?!\d) \}?
      | [eE] (?P<exponent> [-+]?\d{1,3} ) (?!\d) )?  # 3 digits: 10**999999999 would not end
    (?P<percent> \s? (?: % | per\s?cent\b ) )?""",
    re.VERBOSE,
)
ANSWER = re.compile(
    r"""
    answer (?: \s+ (?: choice | option ) )? (?: \s+ (?: to | for ) \s [^.\n]{1,60}? )?
    (?: \s+ (?: is | must\sbe | would\sbe | should\sbe | will\sbe ) \b
        (?: \s+ (?: therefore | thus | then ) \b )?
      | \s*[:=] )
    \s* [:=]? \s* (?= ( [^\n]{1,300} ) )""",
    re.IGNORECASE | re.VERBOSE,
)
FRACTION = re.compile(
    r"([-+]?)\s*\\[dtc]?frac\s*(?:\{\s*(-?)([\d.]+)\s*\}|(\d))\s*(?:\{\s*(-?)([\d.]+)\s*\}|(\d))"
)
FEW = 9  # places of an answer that are tried, the last first: a repetitive text has thousands


def flat_fraction(match: re.Match) -> str:
    r"""-\frac{-1}{2} -> ' 1/2'. The space keeps the whole part of a mixed number apart."""
    sign, sign_over, over, digit_over, sign_under, under, digit_under = match.groups("")
    minus = "-" if (sign == "-") ^ bool(sign_over) ^ bool(sign_under) else ""
    return f" {minus}{over or digit_over}/{under or digit_under}"


def plain(text: str) -> str:
    """Strip LaTeX or prose of currency, markup and thin spaces: numbers and words stand bare."""
    # Spaces come first: runs of them would make the other patterns quadratic.
    text = re.sub(r"\n[\n ]*", "\n", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"[\u2212\u2013]", "-", text)  # minus sign, en dash
    text = re.sub(r"\\!|\\left|\\right|\\displaystyle|\*\*|__", "", text)
    text = re.sub(r"\{,\}|(?<=\d)\\[,;](?=\d{3})", ",", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:times|cdot)(?![a-z])|×", "*", text).replace("\\%", "%")
    # -$5 -> -5
    text = re.sub(r"(?<![\w)\]}])([-+]?)\s?(?:\\?\$|[€£¥₹])\s*(?=[-+.\d])", r"\1", text)
    text = re.sub(r"(?:\\?\$|\\[()\[\],; ]| )+", " ", text)
    text = re.sub(" +", " ", FRACTION.sub(flat_fraction, text)).strip()
    return re.sub(r"(^|=) ?([-+]) (?=[.\d])", r"\1\2", text)  # 'x = - 3'


# -------------------------------------------------------------------------------------- extraction


def extract(text: str, kind: str, choices: dict[str, str] | None = None) -> str | None:
    """Find the answer that a text gives, or None.

    kind: 'number' (the answer is the number as written), 'math' (LaTeX), 'choice' (the letter of
    one of `choices`, letter -> text) or 'yesno' ('yes' or 'no').
    """
    last_line = re.search(r"####\s*([^\n]+)\s*\Z", text)  # elsewhere, #### is a heading
    places = boxed(text) + ([last_line[1]] if last_line else [])
    phrases = list(ANSWER.finditer(text.replace("**", "")))
    places += [match[1] for match in phrases[:-FEW:-1]]
    for place in places:
        answer = read(place, kind, choices)
        if answer is not None:
            return answer
    text = plain(text)
    if kind == "choice":
        letter = f"([{''.join(choices)}])"
        found = re.findall(
            rf"(?m)\({letter}\)|\b(?i:option|choice)(?i:\sis)?\s{letter}\b"
            rf"|^\W*{letter}(?:\W*$|[).:]\s)"
            rf"|\b{letter}\s(?i:is\s(?:the\s)?(?:correct|right))",
            text,
        )
        return "".join(found[-1]) if found else None
    if kind == "yesno":
        text = text.lower()
        opening = r"(?:^|[.!?\n]|\b(?:so|thus|therefore|hence)\b,?)\s*"
        verdicts = re.findall(rf"{opening}(yes|no|true|false)\b", text)
        return yes_or_no(verdicts[-1:] or re.findall(r"\b(?:yes|no|true|false)\b", text)[-1:])
    numbers = [match[0].strip() for match in NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def boxed(text: str) -> list[str]:
    r"""Contents of the last few complete \boxed{...}, however nested, the last opened first."""
    stack, found = [], []  # stack: where each open brace's content begins, None if it is no box
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):  # \{ is no brace
        if token[0] == "}" and stack:
            start = stack.pop()
            found += [(start, token.start())] if start else []
        elif token[0][-1] == "{" and token[0] != "\\{":
            stack.append(token.end() if token[0] != "{" else None)
    return [text[start:end] for start, end in sorted(found, reverse=True)[:FEW]]


def read(place: str, kind: str, choices: dict[str, str] | None) -> str | None:
    """Find the answer as `extract` does, in a few words that are known to hold it."""
    if kind == "math":
        # 'the answer is $x$, since ...'
        inside = re.search(r"^[^$\\]*(?:\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\))", place)
        place = inside[1] or inside[2] if inside else re.split(r"\.(?:\s|$)", place)[0]
        return place.strip(" *$\n").rstrip(" .").rstrip(" *$") or None
    place = plain(place).strip(" :*\n").rstrip(" .")
    if kind == "number":
        # What follows these only explains.
        clause = re.split(r"[;(]|,(?!\d)|\b(?:since|because|given|where|as)\b", place)[0]
        left, _, right = clause.rpartition("=")  # 'x = 5', '3 + 4 = 7', but '36 = 6^2'
        worked = NUMBER.fullmatch(left.strip()) and re.search(r"\d\s*[-+*^/]\s*\d", right)
        number = NUMBER.search(left if worked else right) or NUMBER.search(place)
        return number[0].strip() if number else None
    if kind == "yesno":
        return yes_or_no(re.findall(r"\b(?:yes|no|true|false)\b", place.lower())[:1])
    return read_choice(place, choices)


def read_choice(place: str, choices: dict[str, str]) -> str | None:
    """Find the letter of the choice that a few plain words name by its letter or by its text."""
    letters = "".join(choices)
    letter = re.fullmatch(rf"\(?([{letters}])\W*", place, re.IGNORECASE)
    if letter:
        return letter[1].upper()

    def equal(choice: str) -> bool:
        return grade(place, choice, "number") or normalise(place) == normalise(choice)

    same = [key for key, choice in choices.items() if equal(choice)]
    if len(same) == 1:
        return same[0]
    letter = re.match(rf"(?:(?i:option|choice)\s)?\(?([{letters}])(?:[).:,\s]|$)", place)
    letter = letter or re.search(rf"\(([{letters}])\)", place)
    if letter:
        return letter[1]
    texts = {key: re.escape(plain(choice)) for key, choice in choices.items()}
    inside = [key for key, text in texts.items() if re.search(rf"(?<!\w){text}(?!\w)", place)]
    return inside[0] if len(inside) == 1 else None


def yes_or_no(words: list[str]) -> str | None:
    """'yes' or 'no' for the first of the words, which may be 'true' or 'false'; None for none."""
    return {"true": "yes", "false": "no"}.get(words[0], words[0]) if words else None


def read_answer(text: str, problem: "Problem") -> str | None:
    """Find the answer in what a model says after its thought, or else anywhere in the text."""
    _, said = split_thought(text)
    form = problem.kind, problem.choices
    return extract(said, *form) or extract(text, *form)


# ----------------------------------------------------------------------------------------- grading


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
    own = f"{numbers}; letters; yes/no; LaTeX by {latex}"  # of problems that are of any kind
    names = {"number": numbers, "math": latex, "choice": "letters", "yesno": "yes/no", None: own}
    return names[task.kind]


def readings(text: str) -> set[Fraction]:
    """The values a number's text can stand for: '1,000' {1000}, '50%' {50, 1/2}, 'two' none."""
    if len(text) >= 4000:  # int() reads 4300 digits at most
        return set()
    match = NUMBER.fullmatch(plain(text).rstrip(" ."))
    if not match:
        return set()
    try:
        value = Fraction(match["digits"].replace(",", "")) / Fraction(match["over"] or 1)
    except ZeroDivisionError:
        return set()
    power = int(match["power"] or match["exponent"] or 0)
    value = (value + int(match["whole"] or 0)) * Fraction(10) ** power
    value = -value if match["sign"] == "-" else value
    return {value, value / 100} if match["percent"] else {value}


def normalise(latex: str) -> str:
    """Rewrite LaTeX so that the usual ways to write one answer become the same string."""
    text = latex.strip(" $\n").rstrip(" .").rstrip(" $")
    text = re.sub(
        r"(?<!\\)\\(?:left|right|displaystyle|[!,;: ])|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|°", "", text
    )
    unit = r"(?<=[^\s{(])\s*\\(?:text|mbox|mathrm)\s*\{\s*[a-z ]+\}(?:\^\d)?\s*$"
    text = re.sub(unit, "", text)
    text = re.sub(r"\\(?:text|textbf|mbox|mathrm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in(?![a-z]))\s*", "", text)  # x = 5
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"_\{(\w)\}", r"_\1", text)
    text = re.sub(r"\\frac\s*(\d)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).lower()  # 1 1/2 is not 11/2
    text = re.sub(r"(?<![\w}])(\d+)/(\d+)", r"\\frac{\1}{\2}", text)
    return re.sub(r"^\(([a-z])\)$", r"\1", text)


def grade(extracted: str | None, gold: str, kind: str, tolerance: float = 0) -> bool:
    """Tell whether an extracted answer (None: no answer) is `gold`, or two samples agree.

    number: |extracted - gold| <= tolerance * min(1, |gold|), so that 0 is no answer to 5e-7 and
            a large number has to be right to the hundredth; 50 % counts as 50 and as 0.5
    math:   equal as numbers, as normalised strings, or (if it is installed) by math-verify
    choice, yesno: equal
    """
    if extracted is None:
        return False
    if kind in ("choice", "yesno"):
        return extracted == gold
    slack = Fraction(str(tolerance))
    values = readings(gold)
    if any(abs(a - b) <= slack * min(1, abs(b)) for a in readings(extracted) for b in values):
        return True
    if kind == "number":
        return False
    if normalise(extracted) == normalise(gold):
        return True
    if len(extracted) >= 1000:  # no answer is as long, and it keeps math-verify busy for seconds
        return False
    judge = math_verify()
    return bool(judge) and judge.verify(judge.parse(f"${gold}$"), judge.parse(f"${extracted}$"))


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
    None agrees with nothing.
    """

    def same(a: str | None, b: str | None) -> bool:
        return a is not None and b is not None and grade(a, b, problem.kind, tolerance)

    return functools.partial(read_answer, problem=problem), same
