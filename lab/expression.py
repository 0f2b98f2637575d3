r"""The value of an arithmetic expression, written as LaTeX or plainly: '\sqrt{16}', '5!', '10^6'.

Nothing is executed, and every step is bounded: what would be a huge number has no value.
"""

import math
import re
from fractions import Fraction

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d{1,400}(?:\.\d{1,400})?|\.\d{1,400})"
MIXED = re.compile(
    rf"({DIGITS}) ?\\[dt]?frac ?(?:\{{(\d+)\}}\{{(\d+)\}}|(\d) ?(\d))|(\d+) (\d+)/(\d+)"
)
SCIENTIFIC = re.compile(rf"({DIGITS})[eE]([-+]?\d{{1,3}})(?!\d)")
NUMERAL = re.compile(DIGITS)
# What may stand behind a factor with no sign between: 2(3), 2\sqrt{3}.
JUXTAPOSED = re.compile(r"(?=\(|\\sqrt| ?\\pi| ?\\[dtc]?frac|√|π)")
TIMES = re.compile(r" ?(\*|×|·|\\times|\\cdot|/|÷|\\div|x(?= ?\d)) ?")
CLOSING = {"(": ")", "[": "]", "{": "}"}
BITS = 20_000  # of the largest number that is computed
DEEPEST = 20  # brackets within each other
LONGEST = 200  # characters that are read

Value = Fraction | float  # a float is irrational, or was computed from what is


class NoValueError(ValueError):
    """What is read is no expression."""


def value(text: str) -> Value | None:
    """The value of a text that is an expression as a whole, or None."""
    text = text.strip()
    found = beginning(text, 0)
    return found[0] if found and found[1] == len(text) else None


def beginning(text: str, at: int) -> tuple[Value, int] | None:
    """The value of the longest expression that begins there, and where it ends; None for none."""
    reader = Reader(text[: at + LONGEST], at)
    try:
        found = reader.sum()
        exact = isinstance(found, Fraction)  # and may be larger than any float
        return (found, reader.at) if exact or math.isfinite(found) else None
    except (NoValueError, ZeroDivisionError, OverflowError):
        return None


def power(base: Value, exponent: Value) -> Value:
    if isinstance(base, float) or isinstance(exponent, float):
        if base < 0:
            raise NoValueError
        return float(base) ** float(exponent)
    if exponent.denominator > 1:
        base, exponent = root(base, exponent.denominator), Fraction(exponent.numerator)
        return power(base, exponent)
    size = max(abs(base.numerator), base.denominator).bit_length()
    if abs(exponent) * size > BITS:
        raise NoValueError
    return base ** int(exponent)


def root(base: Value, degree: int) -> Value:
    """Exact where it is rational."""
    if base < 0 and degree % 2:
        return -root(-base, degree)
    if base < 0 or degree < 1:
        raise NoValueError
    if isinstance(base, Fraction):
        parts = [round(float(part) ** (1 / degree)) for part in (base.numerator, base.denominator)]
        if degree == 2:
            parts = [math.isqrt(base.numerator), math.isqrt(base.denominator)]
        if degree < 100 and Fraction(parts[0] ** degree, parts[1] ** degree) == base:
            return Fraction(*parts)
    return float(base) ** (1 / degree)


def whole(x: Value, most: int) -> int:
    if isinstance(x, float) or x.denominator > 1 or not 0 <= x <= most:
        raise NoValueError
    return int(x)


class Reader:
    """Recursive descent: each method reads its part from `at` on, and leaves `at` behind it."""

    def __init__(self, text: str, at: int):
        self.text, self.at, self.depth = text, at, 0

    def take(self, pattern: str | re.Pattern) -> re.Match | None:
        match = re.compile(pattern).match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match

    def attempt(self, part) -> Value | None:
        """What `part` reads; None, and nothing is read, where it fails."""
        start = self.at, self.depth
        try:
            return part()
        except NoValueError:
            self.at, self.depth = start
            return None

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NoValueError
        total = self.product()
        while True:
            start = self.at
            sign = self.take(" ?([-+]) ?")
            term = self.attempt(self.product) if sign else None
            if term is None:
                self.at = start
                self.depth -= 1
                return total
            total = total + term if sign[1] == "+" else total - term

    def product(self) -> Value:
        sign = self.take(" ?([-+]) ?")
        total = self.raised()
        while True:
            start = self.at
            times = self.take(TIMES)
            factor = None
            if times or self.take(JUXTAPOSED):
                minus = self.take("-") if times else None
                factor = self.attempt(self.raised)
            if factor is None:
                self.at = start
                return -total if sign and sign[1] == "-" else total
            factor = -factor if minus else factor
            total = total / factor if times and times[1] in ("/", "÷", "\\div") else total * factor
            if isinstance(total, Fraction) and total.numerator.bit_length() > BITS:
                raise NoValueError

    def raised(self) -> Value:
        """A factor with its factorial and exponent; 2^3^2 is 2^(3^2)."""
        base = self.factor()
        if self.take(" ?!(?![!=])"):
            base = Fraction(math.factorial(whole(base, 500)))
        start = self.at
        if self.take(r" ?(?:\^|\*\*) ?"):
            sign = self.take("[-+]")
            exponent = self.attempt(self.raised)
            if exponent is None:
                self.at = start
                return base
            return power(base, -exponent if sign and sign[0] == "-" else exponent)
        return base

    def factor(self) -> Value:
        if match := self.take(MIXED):
            whole_, *parts = [part for part in match.groups() if part]
            return Fraction(whole_.replace(",", "")) + Fraction(int(parts[0]), int(parts[1]))
        if match := self.take(SCIENTIFIC):
            return Fraction(match[1].replace(",", "")) * Fraction(10) ** int(match[2])
        if match := self.take(NUMERAL):
            return Fraction(match[0].replace(",", ""))
        if match := self.take(r"[(\[{] ?"):
            inside = self.sum()
            if not self.take(rf" ?\{CLOSING[match[0][0]]}"):
                raise NoValueError
            return inside
        if self.take(r"\\[dtc]?frac ?"):
            over, under = self.argument(), self.argument()
            return over / under
        if match := self.take(r"\\sqrt ?(?:\[ ?(\d{1,2}) ?\])? ?|√ ?"):
            degree = int(match[1]) if match.lastindex else 2
            return root(self.factor(), degree)
        if self.take(r"\\[dt]?binom ?"):
            n, k = whole(self.argument(), 1000), whole(self.argument(), 1000)
            return Fraction(math.comb(n, k))
        if self.take(r"\\log ?_ ?"):
            base = self.argument()
            self.take(" ")
            return self.logarithm(base, self.factor())
        if self.take(r"\\pi(?![a-z]) ?|π"):
            return math.pi
        if self.take("e(?![a-zA-Z])"):
            return math.e
        if self.take(r"\| ?"):
            inside = self.sum()
            if not self.take(r" ?\|"):
                raise NoValueError
            return abs(inside)
        raise NoValueError

    def argument(self) -> Value:
        """What LaTeX gives to a command: a digit, or what stands in braces."""
        if match := self.take(r" ?(\d)"):
            return Fraction(match[1])
        self.take(" ")
        if not self.text.startswith("{", self.at):
            raise NoValueError
        return self.factor()

    def logarithm(self, base: Value, x: Value) -> Value:
        if base <= 0 or base == 1 or x <= 0:
            raise NoValueError
        found = math.log(x) / math.log(base)
        n = round(found)
        exact = abs(n) < 1000 and isinstance(base, Fraction) and power(base, Fraction(n)) == x
        return Fraction(n) if exact else found
