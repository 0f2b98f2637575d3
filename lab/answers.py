r"""What a text gives as its answer.

An answer is the content of the last \boxed{}; else what stands in a last line '#### 18'; else what
follows 'the answer is', '"answer":' or '<answer>'; else the last value in the text, in LaTeX the
formula that it is in (lab/formulas.py). Every pattern is bounded, or reads a text from which runs
of spaces are gone: time grows as the text does.
"""

import re

from lab.expression import beginning, value
from lab.formulas import last_formula, read_formula
from lab.latex import NUMBER, bare, normalise, plain, readings, tidy
from lab.programs import program
from lab.verdicts import verdict_in, yes_or_no

IS = r"(?:is|was|must\sbe|would\sbe|should\sbe|will\sbe|has\sto\sbe)"
ANSWER = re.compile(
    rf"""
    (?: answer (?: [\s_] (?: choice | option | letter | key ) )? ["'`*_\\]{{0,4}}
        (?: \s (?: to | for ) \s [^.\n]{{1,60}}? )?
      | \\?["'] (?: choice | option | letter | result | prediction | solution ) \\?["'] (?= \s?: ) )
    (?: \s {IS} \b (?: \s (?: therefore | thus | then ) \b )? | \s? [:=] )
    \s? [:=]? \s?
    (?= ( \\\[ (?s:.{{1,300}}?) \\\] | \$\$ [^$]{{1,300}} \$\$ | [^\n]{{1,300}} ) )
  | < \s? (?: final_? )? (?: answer | ans | choice | option | result | solution | final ) \s? > \s?
    (?= ( [^<]{{1,300}} ) )""",
    re.IGNORECASE | re.VERBOSE,
)
DENIED = re.compile(
    r"(?:\b(?:not|never|cannot|can't|don't|doesn't|isn't|wouldn't)\b[^.!?\n]{0,30}\b(?:that|think|"
    r"believe|say|mean)|\b(?:wrong|false|incorrect|untrue) (?:to say|that|if))[^.!?\n]{0,30}$",
    re.IGNORECASE,
)
FEW = 9  # places of an answer that are tried, the last first: a repetitive text has thousands
LONG = 2000  # characters of a place that are read


def extract(text: str, kind: str, choices: dict[str, str] | None = None) -> str | None:
    """Find the answer that a text gives, or None.

    kind: 'number' (the answer is the number as written), 'math' (LaTeX), 'choice' (the letter of
    one of `choices`, letter -> text), 'yesno' ('yes' or 'no') or 'code' (see lab/programs.py).
    """
    if kind == "code":
        return program(text)
    for place in boxed(text):
        answer = read(place[:LONG], kind, choices, True)
        if answer is not None:
            return answer
    text = re.sub(r"\n[\n ]*", "\n", re.sub(r"[^\S\n]+", " ", text.replace("’", "'"))).strip()
    last_line = re.search(r"####\s?([^\n]+)\Z", text[-400:])  # elsewhere, #### is a heading
    answer = read(last_line[1], kind, choices) if last_line else None
    if answer is not None:
        return answer
    unmarked = text.replace("**", "")
    for match in list(ANSWER.finditer(unmarked))[: -FEW - 1 : -1]:
        place, inside = unquoted(match[1] or match[2], unmarked[: match.start(1)][-1:])
        denied = DENIED.search(unmarked[max(0, match.start() - 80) : match.start()])
        if kind in ("number", "math"):
            place = re.sub(r"^not\b[^\n]{0,300}?(?: but |$)", "", place)  # 'is not 7 but 8'
        if denied and kind != "yesno":
            continue
        answer = read(place, kind, choices, inside)
        if answer is not None:
            return {"yes": "no", "no": "yes"}[answer] if denied else answer
    if kind == "choice":
        return choice_in(plain(text), choices)
    if kind == "yesno":
        return verdict_in(plain(text).lower())
    return (last_formula(text) if kind == "math" else None) or last_number(text)


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


def unquoted(place: str, before: str) -> tuple[str, bool]:
    """A place without the quotes, brackets or JSON around it, and whether there were any."""
    place = place.strip(" \n")
    if match := re.match(r"\[? ?(\\?[\"“'`]{1,3})(?=[^\"”'`])", place):
        inside, end, _ = place[match.end() :].partition(match[1].replace("“", "”"))
        if end:
            return inside.replace("\\\\", "\\").strip(), True
    match = re.match(r"\[?([^][{}\",\n]{1,40}?)\s?(?:[]}]|, ?\\?\"|,?$)", place)
    if match and before in ': "' and ("}" in place or '"' in place):
        return match[1].strip(), True
    return place, False


def read(place: str, kind: str, choices: dict[str, str] | None, inside: bool = False) -> str | None:
    """Find the answer as `extract` does, in a few words that are known to hold it.

    inside: they are all of the answer, as in a box or in quotes; else a sentence may go on.
    """
    if kind == "math":
        return read_formula(place, inside)
    if kind == "number":
        return read_number(place, inside)
    place = plain(place).strip(" :*\n\"'`_").rstrip(" .")
    if kind == "yesno":
        return yes_or_no(place.lower())
    return read_choice(place, choices)


# ----------------------------------------------------------------------------------------- numbers

EXPLAINS = r";|(?<![-+*/^=]) ?\((?=[^()]*[a-z ])|,(?!\d)|\b(?:since|because|given|where|as)\b"
BEGINS = re.compile(
    r"[-+]?(?:\.?\d|\\sqrt|√|\\[dtc]?frac|\\[dt]?binom|\\log|\\pi|π|[(\[]+[-\d\\(])"
)
# What shows, behind what was read, that it was part of something greater.
GLUED = re.compile(
    r":\d| ?(?:[\^_*/!]|[-+] ?[\d\\(a-z]|[({] ?\d"
    r"|\\(?:pi|sqrt|cdot|times|[dtc]?frac|ln|log|sin|cos|pm))"
    r"| ?[abcfijknpqrtuvwxyz](?:[-+*^=]| [-+*=] ?\d|$)"
)


def read_number(place: str, inside: bool) -> str | None:
    """The number or expression that a place gives; of what has no value, all of it."""
    text = tidy(place).strip(" :*\n\"'`").rstrip(" .")
    if not inside:
        text = re.sub(r"^(?:In|After|For|Over|With|At|On|By)\b[^,.=]{1,40}, (?=.*\d)", "", text)
        bare_sentence = "$" not in place and "\\" not in place
        text = re.sub(r"!+(?= |$)", "", text) if bare_sentence else text
    text = re.sub(r"(?<!\d )\b(?:negative|minus) (?=\d)", "-", text)
    clause = re.split(EXPLAINS, text)[0]
    for part in (clause, text):
        parts = re.split(r"=|\\approx|≈|\\implies|\\Rightarrow", part)
        left, right = parts[0], parts[-1]
        # 'x = 5', '3 + 4 = 7', but '36 = 6^2'
        worked = NUMBER.fullmatch(plain(left)) and re.search(r"\d\s*[-+*^/!]\s*\d|[!√\\]", right)
        found = number_of(left if worked and len(parts) > 1 else right)
        if found:
            return found
    return None


def number_of(side: str) -> str | None:
    """The number or expression in a few words; all of them where it has no value."""
    side = re.sub(r"^ ?([-+]) (?=[.\d])", r"\1", side.strip())  # - 3
    short = plain(side)
    if NUMBER.fullmatch(short):
        return short
    if value(bare(side)) is not None:
        return bare(side)
    begins = BEGINS.search(side)
    if not begins:
        return None
    at = begins.start()
    found = beginning(side, at)
    before = side[:at].rstrip(" {")[-1:]
    signed = re.search(r"\\(?!approx|text|[a-z]*arrow)[a-zA-Z]+ ?$", side[:at])  # \pm 3
    if not found or signed or before in tuple("^_/*!") or GLUED.match(side, found[1]):
        number = NUMBER.search(short)
        plain_number = number and NUMBER.match(side, at) and not re.search(r"[\\^_!{]", side)
        return number[0].strip() if plain_number and not glued(short, number) else side
    number = NUMBER.search(plain(side[at:]))
    read_on = side[at : found[1]].strip()
    if number and (NUMBER.fullmatch(plain(read_on)) or readings(number[0]) >= {found[0]}):
        return number[0].strip()
    return read_on


def glued(text: str, number: re.Match) -> bool:
    """Whether a number stands beside a variable or an operator."""
    return bool(GLUED.match(text, number.end())) or text[: number.start()][-1:] in tuple("^_/*")


def last_number(text: str) -> str | None:
    """The last number of a text, with the power or root that it belongs to."""
    short = plain(text)
    found = None
    for found in NUMBER.finditer(short):
        pass
    if not found:
        return None
    tail = tidy(text)[-200:]
    raised = list(re.finditer(r"(?:(?<![\d.,])\d[\d.,]*|[)}]) ?\^|\\sqrt|√|\\[dt]?binom", tail))
    if raised and not re.search(r"\^|[eE]", found[0]):
        at = raised[-1].start()
        ends = beginning(tail, at)
        if ends and not NUMBER.search(tail, ends[1]):
            return tail[at : ends[1]].strip()
    return found[0].strip()


# ----------------------------------------------------------------------------------------- choices

NOT = re.compile(
    r"\b(?:not|isn't|never|cannot be|can't be)(?: (?:likely|necessarily|option|choice|the|answer))*"
    r" \(?[A-Z]\b\)?(?:(?:,| or| nor|, nor) \(?[A-Z]\b\)?)*"
)


def read_choice(place: str, choices: dict[str, str]) -> str | None:
    """Find the letter of the choice that a few plain words name by its letter or by its text."""
    letters = "".join(choices)
    letter = re.fullmatch(rf"\W{{0,3}}([{letters}])\W*", place, re.IGNORECASE)
    if letter:
        return letter[1].upper()
    place = NOT.sub(" ", place).strip(" ,;:.")

    def equal(choice: str) -> bool:
        return bool(readings(place) & readings(choice)) or normalise(place) == normalise(choice)

    same = [key for key, choice in choices.items() if equal(choice)]
    if len(same) == 1:
        return same[0]
    if re.match(rf"\(?[{letters}]\)?(?:, ?|,? (?:and|or) )\(?[{letters}](?:[).,;:?]|$)", place):
        return None  # 'A or C'
    texts = {key: re.escape(plain(choice)) for key, choice in choices.items()}
    named = [key for key, text in texts.items() if re.search(rf"(?<!\w){text}(?!\w)", place)]
    head = r"(?:(?:(?i:definitely|clearly|likely|probably|the|indeed|but|rather|letter) )*"
    head += rf"(?i:option|choice|letter|answer)?\s?)?\W{{0,2}}([{letters}])"
    article = re.match(rf"{head} [a-z]", place)  # 'A train', unlike 'A because'
    because = r" (?:because|since|as|and|which|for|is|with|by|due|given|where|but|so|not)\b"
    if article and article[1] == "A" and not re.match(rf"{head}{because}", place):
        return named[0] if len(named) == 1 else None
    letter = re.match(rf"{head}(?:[).:,;\s\"'\]]|$)", place)
    letter = letter or re.search(rf"\(([{letters}])\)", place)
    if letter:
        return letter[1]
    letter = re.search(rf"\b(?i:option|choice|letter)\s([{letters}])\b", place)
    lower = rf"\b(?i:(?:option|choice|letter)\s\(?([{letters}]))(?:[).,:;]|$)"
    letter = letter or re.search(lower, place)
    if letter:
        return letter[1].upper()
    return named[0] if len(named) == 1 else None


def choice_in(text: str, choices: dict[str, str]) -> str | None:
    """The choice that prose settles on: the last one said to be right, or else named."""
    text = NOT.sub(" ", text.replace('"', "").replace("`", ""))
    letter = rf"(?<!\w)\(?[{''.join(choices)}]\)?"
    text = re.sub(rf"{letter}(?:, ?{letter}){{0,8}},? or {letter}(?!\w)", " ", text)  # 'A or B'
    one, around = f"([{''.join(choices)}])", r"[^\w\n]*"  # on one line: else time is quadratic
    sure = "".join(key for key in choices if key != "A")  # 'is A' may begin 'is A train'
    strong = (
        rf"\b{one}\)?\s(?i:is|must be|would be|seems|looks|has to be)\s(?:(?i:the|clearly|indeed|"
        r"definitely|most|therefore|thus)\s){0,3}(?i:correct|right|best|true|answer|only|likely)"
        rf"|\b{one}\)?\s(?:(?:best|only|clearly)\s)?(?:fits|works|matches|follows|holds|remains)\b"
        rf"|\b(?i:thus|hence|so|therefore|leaves|leaving|only),?\s\(?{one}(?=[.!)\n]|$)"
        r"|(?i:\b(?:is|be|choose|chose|pick|picked|select|selected|with|for|on|to|gives|matches|say"
        r"|answer|final|choice|option|take|was)|'s|\bno,|\bwait,|=>|[→⇒:])"
        rf"\s?(?i:answer|option|choice|letter)?\s?"
        rf"(?:\({one}\)|([{sure}])\b(?!')|(A)(?=[.,;!?\n]|$))"
        rf"|(?m:^{around}{one}{around}$)|\[\[?{one}\]"
    )
    weak = (
        rf"(?m)\({one}\)|\b(?i:option|choice)(?i:\sis)?\s{one}\b"
        rf"|^{around}{one}(?:{around}$|[).:]\s)"
        rf"|\b{one}\s(?i:is\s(?:the\s)?(?:correct|right))"
    )
    wrong = re.compile(
        r"\)? (?:is|was|must be|can be|looks|seems) "
        r"(?:not|wrong|incorrect|false|too|out|ruled|elimin)"
        r"|\)? (?:isn't|cannot|can't|doesn't|does not|fails|contradicts)"
    )
    for pattern in (strong, weak):
        found = None
        for match in re.finditer(pattern, text):
            if not wrong.match(text, match.end()):
                found = "".join(part or "" for part in match.groups()) or found
        if found:
            return found[0]
    last = text.rpartition("\n")[2][-300:]
    sentence = re.split(r"[.!?] ", last.rstrip(" .!?"))[-1]
    texts = {key: re.escape(plain(choice)) for key, choice in choices.items()}
    named = [key for key, words in texts.items() if re.search(rf"(?<!\w){words}(?!\w)", sentence)]
    return named[0] if len(named) == 1 else None
