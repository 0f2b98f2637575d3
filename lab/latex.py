r"""LaTeX and prose as plain text: the numbers they stand for, and one way to write each."""

import functools
import re
from fractions import Fraction

from lab.expression import Value, value

NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w.)\]}]) [-+] )?         # after a digit or bracket it is an operator
    (?: (?P<whole> \d+ ) \s+ (?= \d+ / \d ) )?  # of a mixed number: 1 4/5
    (?P<digits> \d{1,3} (?: ,\d{3} )+ (?!\d) (?: \.\d+ )? | \d+ (?: \.\d+ )? | \.\d+ )
    (?: \s? / \s? (?P<over> -?\d+ (?: \.\d+ )? )  # a fraction
      | \s? \* \s? 10 \s? \^ \s? \{? (?P<power> -?\d{1,3} ) (?!\d) \}?
      | [eE] (?P<exponent> [-+]?\d{1,3} ) (?!\d) )?  # 3 digits: 10**999999999 would not end
    (?: (?P<percent> \s? (?: % | per\s?cent\b ) )
      | \s (?P<scale> hundred | thousand | million | billion | trillion ) \b
        (?! -\w | \s dollar\s bill ) )?""",
    re.VERBOSE | re.IGNORECASE,
)
FRACTION = re.compile(
    r"([-+]?)\s*\\[dtc]?frac\s*(?:\{\s*(-?)([\d.]+)\s*\}|(\d))\s*(?:\{\s*(-?)([\d.]+)\s*\}|(\d))"
)
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALES["trillion"] = 10**12
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


def flat_fraction(match: re.Match) -> str:
    r"""-\frac{-1}{2} -> ' 1/2'. The space keeps the whole part of a mixed number apart."""
    sign, sign_over, over, digit_over, sign_under, under, digit_under = match.groups("")
    minus = "-" if (sign == "-") ^ bool(sign_over) ^ bool(sign_under) else ""
    return f" {minus}{over or digit_over}/{under or digit_under}"


def plain(text: str) -> str:
    """As `tidy`, and fractions of numbers are written 1/2."""
    text = re.sub(" +", " ", FRACTION.sub(flat_fraction, tidy(text))).strip()
    return re.sub(r"(^|=) ?([-+]) (?=[.\d])", r"\1\2", text)  # 'x = - 3'


def tidy(text: str) -> str:
    """Strip LaTeX or prose of currency, markup and thin spaces: numbers and words stand bare."""
    # Spaces come first: runs of them would make the other patterns quadratic.
    text = re.sub(r"\n[\n ]*", "\n", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"[\u2212\u2013]", "-", text)  # minus sign, en dash
    text = re.sub("[⁰¹²³⁴-⁹]+", lambda m: f"^{{{m[0].translate(RAISED)}}}", text)
    text = text.replace("½", " 1/2").replace("¼", " 1/4").replace("¾", " 3/4")
    text = re.sub(r"\\!|\\left|\\right|\\displaystyle|\*\*|__", "", text)
    text = re.sub(r"\{,\}|(?<=\d)\\[,;](?=\d{3})", ",", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:times|cdot)(?![a-z])|×", "*", text).replace("\\%", "%")
    text = re.sub(r"\b(?:Rs\.?|INR|USD) ?(?=\d)", "", text)
    # -$5 -> -5
    text = re.sub(r"(?<![\w)\]}])([-+]?)\s?(?:\\?\$|[€£¥₹])\s*(?=[-+.\d])", r"\1", text)
    text = re.sub(r"(?:\\?\$|\\[()\[\],; ]| )+", " ", text)
    return text.strip()


@functools.lru_cache(10_000)  # a vote compares every pair of many answers
def readings(text: str) -> frozenset[Value]:
    """The values a number's text can stand for: '1,000' {1000}, '50%' {50, 1/2}, 'two' none.

    An expression has its value, a float where it is irrational: '2^{10}' {1024}.
    """
    if len(text) >= 4000:  # int() reads 4300 digits at most
        return frozenset()
    match = NUMBER.fullmatch(plain(text).rstrip(" ."))
    if not match:
        found = value(bare(text))
        return frozenset() if found is None else frozenset([found])
    try:
        number = Fraction(match["digits"].replace(",", "")) / Fraction(match["over"] or 1)
    except ZeroDivisionError:
        return frozenset()
    power = int(match["power"] or match["exponent"] or 0)
    number = (number + int(match["whole"] or 0)) * Fraction(10) ** power
    number = -number if match["sign"] == "-" else number
    if match["scale"]:
        return frozenset([number * SCALES[match["scale"].lower()]])
    return frozenset([number, number / 100 if match["percent"] else number])


def near(a: Value, b: Value, tolerance: float) -> bool:
    try:
        return abs(a - b) <= tolerance * min(1, abs(b))
    except OverflowError:  # one is irrational, the other larger than any float
        return False


NO_UNIT = r"(?!\s*(?:hundred|thousand|million|billion|trillion|per ?cent)\b)"
SHORT = r"[mck]m|k?g|m[gl]|in|ft|yds?|lbs?|oz|mph|[ap]m|hrs?|yrs?|min|sec|th|st|nd|rd|deg"
UNIT = re.compile(  # 3xy has none
    rf"(?<=[\d)}}!%])(?: {NO_UNIT}(?:[a-zA-Z]{{2,20}}|[hmsgl]\b)|[a-zA-Z]{{4,20}}|(?:{SHORT})\b)"
    r"(?: [a-zA-Z]{2,20}){0,3}(?: ?/ ?[a-zA-Z]{1,20})?(?:\^\{?-?\d\}?)?$"
)
TEXT = re.compile(
    rf"\s*\\(?:text|textbf|mbox|mathrm)\s*\{{{NO_UNIT}[^{{}}]*\}}(?:\s?\^\s?\{{?-?\d\}}?)?[\s.$]*$"
)


def bare(text: str) -> str:
    """Strip an expression of 'x =' and of a unit behind it; '' for what is too long to be one."""
    if len(text) > 300:
        return ""
    text = tidy(TEXT.sub("", text)).rstrip(" .")
    return UNIT.sub("", re.sub(r"^[a-zA-Z] ?= ?", "", text))


@functools.lru_cache(10_000)
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
