"""What a text says: yes or no. All texts are in lower case, a run of spaces is one space."""

import re

SAYS = {"yes": "yes", "true": "yes", "yep": "yes", "yeah": "yes", "correct": "yes"}
SAYS |= {"affirmative": "yes", "no": "no", "false": "no", "untrue": "no", "nope": "no"}
SAYS |= {"incorrect": "no", "wrong": "no", "negative": "no"}
FILL = r"(?: (?:a|an|the|be|been|say|said|to|quite|really|entirely|actually|always|strictly|simply"
FILL += r"|it's|that|way|one can|necessarily|completely|exactly|generally|at all|answer|it|is"
FILL += r"|considered|clearly)){0,5}"
NEGATION = r"(?:(?:\b(?:not|never|hardly|cannot|neither|nobody can|far from|no(?= way| one can)"
NEGATION += rf"|(?<!no )doubt(?:ful)?)\b|n't\b){FILL} )"
# 'no' before a noun is no verdict: no doubt, no evidence.
NO = r"no\b(?! (?!because|since|as\b|it\b|they|he\b|she\b|the\b|this|that|there|you|we\b|i\b"
NO += r"|but|and)[a-z])"
MAIN = rf"(?:yes|true|false|untrue|yep|yeah|nope|{NO})"
SURE = r"(?:certainly|definitely|probably|absolutely|of course|clearly|surely|likely) not\b"
VERDICT = re.compile(rf"({NEGATION}?)\b({MAIN}\b)|(\b{SURE})(?! (?:true|false|yes|no)\b)")
STARTS = r"(?:^|[.!?\n]|\b(?:so|thus|therefore|hence|conclusion|final)\b[,:]?)\s?[\"'(]?"
SUBJECT = r"(?:(?:it|this|that|which|the (?:statement|claim|answer|assertion|premise|response|"
SUBJECT += r"sentence|conclusion))(?: is therefore| is|'s| would be| must be)? ?)?"
OPENING = re.compile(
    rf"{STARTS}{SUBJECT}({NEGATION}?)(?<![a-z])({MAIN}\b)(?! that)|{STARTS}({SURE})"
)
OTHER = re.compile(
    rf"({NEGATION}?)\b(correct|incorrect|wrong|affirmative|negative)\b"
    r"(?! (?:answer|option|choice|to|that|number|one))"
)
EITHER = re.compile(
    r"\b(?:yes|true)(?: ?/ ?| or (?:not )?)(?:no|false)\b|\b(?:no|false) or (?:yes|true)\b"
)


def yes_or_no(text: str) -> str | None:
    """'yes' or 'no' for the first verdict of a few words in lower case; None for none."""
    text = re.sub(EITHER, " ", text)
    match = VERDICT.search(text) or OTHER.search(text)
    if not match:
        return {"not": "no", "it is not": "no"}.get(text.strip(" .!"))
    return meaning(match)


def verdict_in(text: str) -> str | None:
    """The last verdict that opens a sentence or a conclusion, or else the last one."""
    text = re.sub(EITHER, " ", text)
    for pattern in (OPENING, VERDICT, OTHER):
        match = None
        for match in pattern.finditer(text):
            pass
        if match:
            return meaning(match)
    return None


def meaning(match: re.Match) -> str:
    groups = [group for group in match.groups() if group]
    word = SAYS.get(groups[-1])
    if word is None:  # 'certainly not'
        return "no"
    return {"yes": "no", "no": "yes"}[word] if len(groups) > 1 and groups[0].strip() else word
