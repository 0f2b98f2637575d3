r"""Which formula a text gives as its answer: '$x = 2$ or $x = 3$' is 2,3, '\[a = 3 + 4\]' 3 + 4."""

import re

from lab.latex import near, readings

FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\$((?:\\.|[^$\\\n])+)\$|\\\((.+?)\\\)|\\\[((?s:.+?))\\\]"
    r"|\\begin\{(?:align|equation|gather)\*?\}((?s:.+?))\\end\{(?:align|equation|gather)\*?\}"
)
ONE = r"(?:\$(?:\\.|[^$\\\n])+\$|\\\((?:\\[^)\n]|[^\\\n])+\\\))"
SEVERAL = re.compile(rf"[^$\\]*{ONE}(?:(?:,|,?\s(?:and|or))\s{ONE})+(?=\W*$|[.;])")
EXPLAINED = (
    r"\d(?: [a-z]+){0,3}(?:(?:,|:| -)\s(?=[a-z]{2})| \((?=[^()]*[a-z$])"
    r"| (?:since|because|as|for|where|when|if|with|from)\b)"
)
# With '$x$ is' or other words before it, but with no number: 'is 5, since $x = 3$'.
FIRST = re.compile(
    rf"(?!-?[\d.,/]*{EXPLAINED})"
    rf"(?:[^$\\]*{ONE}\s(?:is|are|equals)\b)?[^$\\]*(?:{FORMULA.pattern})"
)
LINES = r"\\(?:begin|end)\{(?:align|gather|split|multline|eqnarray)[a-z]*\*?\}|\\tag\{[^{}]*\}"


def read_formula(place: str, inside: bool) -> str | None:
    """The formula, or the plain words, in a few words that are known to hold an answer.

    inside: they are all of the answer, as in a box; else a sentence may go on.
    """
    first, several = FIRST.match(place), SEVERAL.match(place)
    if several:
        found = ["".join(match.groups("")) for match in FORMULA.finditer(several[0])]
        pairs = [(a, b) for a in readings(found[0]) for b in readings(found[-1])]
        off = 0.01 if "." in found[-1] else 1e-9
        twice = any(near(a, b, off) for a, b in pairs)  # '$\frac{2}{3}$, or $0.667$'
        values = [re.sub(r"^\s*[a-z](?:_\d)?\s*=", "", part) for part in found]
        place = found[0] if twice else ",".join(values)
    elif first:
        place = "".join(first.groups(""))
    else:
        explained = None if inside else re.match(rf"(-?[\d.,/]*)(?={EXPLAINED})(\d)", place)
        place = "".join(explained.groups()) if explained else re.split(r"\.(?:\s|$)", place)[0]
    place = last_side(place) if re.search(LINES, place) else place
    place = re.sub(r"(?<!\\),$", "", place.strip(" *$\n").rstrip(" ."))
    return place.rstrip(" *$") or None


def last_side(formula: str) -> str:
    """What stands behind the last '=' of a formula of several lines or sides."""
    formula = re.sub(r"^\s*[a-z] ?\\[gl]eq?(?![a-z])", "", re.sub(LINES, "", formula))
    last = re.split(r"=|\\approx|≈|\\(?:implies|Rightarrow|to)(?![a-z])", formula)[-1]
    return re.sub(r"[\\\s]+$", "", re.split(r"\\q?quad(?![a-z])|\\checkmark", last)[0])


def last_formula(text: str) -> str | None:
    """The formula that has the last digit of a text, behind its last '='; None where none has.

    One without a digit is read where a text ends with it.
    """
    tail = text if len(text) <= 300 else text[-300:].partition("\n")[2]
    if text[: len(text) - len(tail)].count("$$") % 2:  # they have to be in pairs
        tail = tail.partition("$$")[2]
    for match in FORMULA.finditer(tail):
        formula = re.sub(LINES, "", "".join(match.groups("")))
        before, behind = tail[: match.start()].rstrip(), tail[match.end() :]
        words = re.sub(r"\\(?:text|mbox|mathrm)\s?\{[^{}]*\}", "", formula)
        if re.search(r"\d", behind) or re.search(r" [a-z]{2,} ", words):  # no formula, but prose
            continue
        says = re.search(r"(?:\b(?:is|to|equals|get|gives|becomes|be)|:|\*)$", before)
        ends = not re.search(r"\w", behind) and (says or match[0][1] in "[$")
        if re.search(r"\d", words) or ends:
            return read_formula(last_side(formula), True)
    return None
