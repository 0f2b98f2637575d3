"""Problems, prompts, answer extraction, grading, result files and tables. Knows nothing of models or torch.

    problems = load("gsm8k", limit=100)                 # downloaded, checked by SHA-256, cached
    text = prompt(problems[0], TASKS["gsm8k"])           # what the user says to the model
    answer = extract(generated_text, problems[0].kind)   # '18', or None
    grade(answer, problems[0].answer, problems[0].kind)  # True
    run(problems, TASKS["gsm8k"], {"cot": ({"seed": 0}, solve)}, output="gsm8k.jsonl")

Files are cached in $XDG_CACHE_HOME/soft-reasoning-reference (~/.cache/soft-reasoning-reference if that is unset).

A result file is JSON lines: one graded record per (problem, method, sample), with the settings that made it, in the
order in which they finished. Two runs of the same settings hold the same records, compared after sorting by that key
and without `seconds`.
"""
import difflib
import functools
import hashlib
import http.client
import json
import math
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, and the remedy."""


# ---- Problems: where each file comes from, and how a row of it becomes a Problem

@dataclass(frozen=True)
class Problem:
    id: str                      # 'gsm8k-00017': the task and the place in its file
    question: str
    answer: str                  # gold: number, LaTeX, letter of a choice, or yes/no, according to `kind`
    kind: str                    # 'number', 'math', 'choice' or 'yesno': how an answer is read and compared
    choices: dict | None = None  # letter -> text
    steps: list | None = None    # worked reasoning, line by line, for training


@dataclass(frozen=True)
class Source:
    repository: str
    commit: str
    path: str
    bytes: int | None = None
    sha256: str | None = None    # None: no checksum is known, and the user is told so

    @property
    def url(self):
        if self.repository.startswith("datasets/"):
            return f"https://huggingface.co/{self.repository}/resolve/{self.commit}/{self.path}"
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.path}"


GSM8K = "openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c"
SOFT_THINKING = "eric-ai-lab/Soft-Thinking", "b97407c60d5e971da4a4fe76f405d6e236d0ddfa"
SOFT_REASONING = "alickzhu/Soft-Reasoning", "229b5f7803d930e685b4902fcef40c15daa193e2"
STRATEGYQA = "eladsegal/strategyqa", "1ba1e97452e189569357876f2854b01357ffbe37"
AQUA = "google-deepmind/AQuA", "26b64ed1f22208c6742f47df547dfd65088ec30d"
ZERO_SHOT_COT = "kojima-takeshi188/zero_shot_cot", "5ef330fcdeec0cd26aee27943504f91f8ec1c33c"
ASDIV_AUG = "datasets/xuyige/ASDiv-Aug", "main"

SOURCES = {  # name in the cache folder -> origin
    "gsm8k_test.jsonl": Source(*GSM8K, "grade_school_math/data/test.jsonl", 749738,
                               "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "gsm8k_train.jsonl": Source(*GSM8K, "grade_school_math/data/train.jsonl", 4166206,
                                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "math500.json": Source(*SOFT_THINKING, "datasets/math500.json", 183569,
                           "236bd0cc329ee3efaf045a150e6473e4f420e7e7e17051a4e77a1f2688599e63"),
    "aime2024.json": Source(*SOFT_THINKING, "datasets/aime2024.json", 14742,
                            "d7e2deccb589c973cffabb5d36e8e428a9c9c595dae6b6c95beb2ee2cfa870c3"),
    "gpqa_diamond.json": Source(*SOFT_THINKING, "datasets/gpqa_diamond.json", 200369,
                                "a24a0e376dcf6d1ea515ed6810c3918293406655ea760b6c2ab76e8b96af88da"),
    "gsm_hard.json": Source(*SOFT_REASONING, "data/gsm_hard.json", 411978,
                            "d698bce4c0192e954115d4c319e96e7f24c90b0013baabc50da56a83c896cdad"),
    "svamp.json": Source(*SOFT_REASONING, "data/svamp.json", 68388,
                         "c96981cf2fe2a3a5395157122d8996b8f6393acebe68b863a4e1061a9960b789"),
    "strategyqa_test.json": Source(*SOFT_REASONING, "data/strategyqa.json", 261677,
                                   "fb96d55e1e039c8d14d1d776ba50f8f2cf495aedeb2d3dc65fc5e415aa94c63f"),
    "strategyqa_train.json": Source(*STRATEGYQA, "data/strategyqa/train.json", 3857762,
                                    "0f72560b8a6fad3db847d2f1a7524fb087297843bb45a8d3245ffd68cbe0de12"),
    "aqua_dev.json": Source(*AQUA, "dev.json", 132008,
                            "4a52301d8a49ae0b286f8e697f9c5da1b109b247b825b47b4c6de34312dceec5"),
    "aqua_test.json": Source(*AQUA, "test.json", 130192,
                             "de41581881ef95c5588c44ddc701c77fd480839241dd422a0d181262af24520c"),
    "aqua_train.json": Source(*AQUA, "train.json"),
    "date_understanding.json": Source(*ZERO_SHOT_COT, "dataset/Bigbench_Date/task.json", 119336,
                                      "ff716f0e399109146db3a998281c39954907b78268a9b633a95582d63847822f"),
    "asdiv_aug_train.jsonl": Source(*ASDIV_AUG, "aug-train.jsonl"),
    "asdiv_aug_test.jsonl": Source(*ASDIV_AUG, "aug-dev.jsonl"),
}


def json_lines(path):
    """Path -> (place, row) pairs, place 'line 7'. Raises UserError on a line that is not JSON."""
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {n}", json.loads(line)
                except ValueError as error:  # covers text that is not UTF-8, too
                    raise UserError(f"{path}, line {n}: not a JSON object ({error}); mend or delete the line") from None


def json_document(path):
    """As json_lines, for one JSON array, or one BIG-bench task with its `examples`."""
    try:
        document = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    for n, row in enumerate(document["examples"] if isinstance(document, dict) else document, 1):
        yield f"entry {n}", row


def plain_row(row):
    """`question`, `answer`, optional `choices` and `steps` (StrategyQA's files call them `facts` or `thought`)."""
    return row["question"], row["answer"], row.get("choices"), row.get("steps", row.get("facts", row.get("thought")))


def gsm8k_row(row):
    work, _, answer = row["answer"].rpartition("####")
    return row["question"], answer, None, re.sub(r"<<.*?>>", "", work)  # <<16-3=13>> are calculator marks


def chat_row(row):
    return row["prompt"][0]["value"], row["final_answer"], row.get("choices"), None


def aqua_row(row):
    return row["question"], row["correct"], {option[0]: option[2:] for option in row["options"]}, row["rationale"]


def bigbench_row(row):
    # The file lists the right option first, so the options are put in an order that looks random and never changes.
    options = sorted(row["target_scores"], key=lambda o: hashlib.sha256((row["input"] + o).encode()).digest())
    right, = [option for option in options if row["target_scores"][option]]
    return row["input"], right, options, None


@dataclass(frozen=True)
class Task:
    name: str
    kind: str | None             # kind of every answer; None: judged from each gold answer
    file: str                    # a name in SOURCES, or a path beside this file
    rows: Callable = json_lines  # path -> (place, row) pairs
    parse: Callable = plain_row  # row -> question, answer, choices, steps
    tolerance: float = 0         # of numbers, see `grade`; 0 is exact
    part: tuple = (0, 1)         # the fraction of the file that is used
    instruct: bool = True        # False: the prompt is the bare question


TASKS = {task.name: task for task in (
    Task("tiny", "number", "tiny/test.jsonl", instruct=False),
    Task("tiny-train", "number", "tiny/train.jsonl", instruct=False),
    Task("gsm8k", "number", "gsm8k_test.jsonl", parse=gsm8k_row),
    Task("gsm8k-train", "number", "gsm8k_train.jsonl", parse=gsm8k_row),
    Task("math500", "math", "math500.json", json_document, chat_row),
    Task("aime2024", "number", "aime2024.json", json_document, chat_row),
    Task("gpqa_diamond", "choice", "gpqa_diamond.json", json_document, chat_row),
    Task("gsm_hard", "number", "gsm_hard.json", json_document, tolerance=1e-2),  # gold answers are rounded floats
    Task("svamp", "number", "svamp.json", json_document),
    Task("strategyqa", "yesno", "strategyqa_test.json", json_document),
    Task("strategyqa-softcot-train", "yesno", "strategyqa_train.json", json_document, part=(0, 0.8)),
    Task("strategyqa-softcot-test", "yesno", "strategyqa_train.json", json_document, part=(0.8, 1)),
    Task("aqua", "choice", "aqua_test.json", parse=aqua_row),
    Task("aqua-dev", "choice", "aqua_dev.json", parse=aqua_row),
    Task("aqua-train", "choice", "aqua_train.json", parse=aqua_row),
    Task("asdiv-aug", "number", "asdiv_aug_test.jsonl", parse=gsm8k_row, tolerance=1e-2),
    Task("asdiv-aug-train", "number", "asdiv_aug_train.jsonl", parse=gsm8k_row, tolerance=1e-2),
    Task("date_understanding", "choice", "date_understanding.json", json_document, bigbench_row),
    Task("data", None, ""),      # the user's own --data FILE without a task
)}


def load(name, data=None, limit=None):
    """Task name -> its problems, the first `limit` of them.

    data: the user's own JSON lines (`question`, `answer`, optional `choices`, `steps`), read in the place of the
    task's file; name 'data' judges each answer's kind by itself.
    Raises UserError for an unknown task, a file that cannot be had, and a row that makes no problem.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3)
        raise UserError(f"no task {name!r}{' (did you mean ' + ' or '.join(near) + '?)' if near else ''}; "
                        f"the tasks are {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give a number of problems, 1 or more")
    task = TASKS[name]
    if data:
        path, rows, parse, part = Path(data), json_lines, plain_row, (0, 1)
    elif name == "data":
        raise UserError("the task 'data' reads your own problems: name their file with --data FILE")
    else:
        path, rows, parse, part = fetch(task.file), task.rows, task.parse, task.part
    try:
        rows = list(rows(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    start, stop = (int(fraction * len(rows)) for fraction in part)
    if start == stop:
        raise UserError(f"{path} holds no problems")
    return [make_problem(task, n, row, parse, f"{path}, {place}")
            for n, (place, row) in enumerate(rows[start:stop][:limit], start)]


def make_problem(task, n, row, parse, where):
    """A row of a file -> Problem. Raises UserError that begins with `where` if the row makes none."""
    def wrong(what):
        return UserError(f"{where}: {what}")

    try:
        question, answer, choices, steps = parse(row)
    except KeyError as error:
        raise wrong(f"the field {error} is missing") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise wrong(f"not in the form that the task {task.name} needs ({error})") from None
    if not isinstance(question, str) or not question.strip():
        raise wrong("'question' is not a text, or empty")
    if not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise wrong("'answer' is not a text or a number, or empty")
    answer = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer).strip()
    if isinstance(choices, list):
        choices = {chr(ord("A") + i): choice for i, choice in enumerate(choices)}
    if choices is not None:
        if not isinstance(choices, dict) or not choices or not all(re.fullmatch("[A-Z]", key) for key in choices):
            raise wrong("'choices' is not a list of texts, or texts by letter A, B, ...")
        choices = {letter: str(choice).strip() for letter, choice in choices.items()}
    if isinstance(steps, str):
        steps = steps.splitlines()
    if steps is not None:
        if not isinstance(steps, list):
            raise wrong("'steps' is not a text or a list of texts")
        steps = [str(step).strip() for step in steps if str(step).strip()]
    verdict = {"true": "yes", "false": "no"}.get(answer.lower(), answer.lower())
    kind = ("choice" if choices else task.kind or
            ("yesno" if verdict in ("yes", "no") else "number" if readings(answer) else "math"))
    if kind == "choice":
        if not choices:
            raise wrong("'choices' is missing")
        letter = answer if answer in choices else next((k for k, text in choices.items() if text == answer), None)
        if letter is None:
            raise wrong(f"the answer {answer!r} is none of the choices")
        answer = letter
    elif kind == "yesno":
        if verdict not in ("yes", "no"):
            raise wrong(f"the answer {answer!r} is not yes, no, true or false")
        answer = verdict
    elif kind == "number" and not readings(answer):
        raise wrong(f"the answer {answer!r} is not a number")
    return Problem(f"{task.name}-{n:05d}", question.strip(), answer, kind, choices, steps)


# ---- Downloads

def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soft-reasoning-reference"


def fetch(name):
    """Name in SOURCES, or path beside this file -> path of the file, downloaded on first use.

    Raises UserError: no network, a checksum that differs (the file is kept aside, unused), a folder that cannot be
    written to, a bundled file that is missing.
    """
    if name not in SOURCES:
        path = Path(__file__).resolve().parent / name
        if not path.exists():
            raise UserError(f"{path} is missing; it comes with the repository: git checkout {name}")
        return path
    source, path = SOURCES[name], cache_folder() / name
    if not path.exists():
        path = download(source, path)
    if source.sha256 is None:
        print(f"{name}: no checksum is known for this file, it is used unverified", file=sys.stderr)
        return path
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        aside = path.with_name(path.name + ".wrong-checksum")
        try:
            os.replace(path, aside)
            kept = f"kept aside as {aside}"
        except OSError:
            kept = f"left at {path}, which cannot be renamed"
        raise UserError(f"{name} is not the file it should be: SHA-256 {found} instead of {source.sha256}; it is "
                        f"{kept} and not used. Start again to download it anew from {source.url}")
    return path


def download(source, path):
    """Source -> path of its file: `path`, or Hugging Face's own cache. Either complete or not there at all."""
    by_hand = f"get {source.url} by hand and put it at {path}"
    if source.repository.startswith("datasets/"):
        import huggingface_hub  # half a second, and needed by one task only
        try:
            return Path(huggingface_hub.hf_hub_download(source.repository.removeprefix("datasets/"), source.path,
                                                        repo_type="dataset", revision=source.commit))
        except (OSError, ValueError) as error:  # its network errors are OSErrors
            reason = str(error).partition("\n")[0]
            raise UserError(f"Hugging Face gave no {source.path} ({reason}); {by_hand}") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    except OSError as error:
        raise UserError(f"cannot write to the cache folder {path.parent} ({error.strerror}); make it writable, or set "
                        f"XDG_CACHE_HOME to a folder that is, or {by_hand}") from None
    try:
        with open(handle, "wb") as file, urllib.request.urlopen(source.url, timeout=30) as response:
            length = response.headers["Content-Length"]
            size = int(length) if length else source.bytes
            with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
                while block := response.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
                if length and bar.n != size:
                    raise OSError(f"the connection broke after {bar.n} of {size} bytes")
        os.replace(temporary, path)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise UserError(f"cannot download {source.url} to {path} ({error}); {by_hand}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


# ---- Prompts

INSTRUCTION = {
    "number": "Think step by step. Then write the final answer, a number without its unit, inside \\boxed{}.",
    "math": "Think step by step. Then write the final answer, in its simplest form, inside \\boxed{}.",
    "choice": "Think step by step. Then write the letter of the right choice inside \\boxed{}.",
    "yesno": "Think step by step. Then write yes or no inside \\boxed{}.",
}


def prompt(problem, task):
    """Problem, Task -> text of the user's message: question, choices one a line, and what form the answer takes."""
    if not task.instruct:
        return problem.question
    choices = "\n".join(f"{letter}) {text}" for letter, text in (problem.choices or {}).items())
    return "\n\n".join(part for part in (problem.question, choices, INSTRUCTION[problem.kind]) if part)


# ---- Extraction: the last \boxed{}, else a last line '#### 18', else 'the answer is 18', else the last value

NUMBER = re.compile(r"""
    (?P<sign> (?<![\w.)\]}]) [-+] )?                        # after a digit or bracket, '-' is the operator
    (?: (?P<whole> \d+ ) \s+ (?= \d+ / \d ) )?              # of a mixed number: 1 4/5
    (?P<digits> \d{1,3} (?: ,\d{3} )+ (?!\d) (?: \.\d+ )? | \d+ (?: \.\d+ )? | \.\d+ )
    (?: \s? / \s? (?P<over> -?\d+ (?: \.\d+ )? )            # a fraction
      | \s? \* \s? 10 \s? \^ \s? \{? (?P<power> -?\d{1,3} ) (?!\d) \}?
      | [eE] (?P<exponent> [-+]?\d{1,3} ) (?!\d) )?         # 3 digits: 10**999999999 would not end
    (?P<percent> \s? (?: % | per\s?cent\b ) )?""", re.VERBOSE)
ANSWER = re.compile(r"""
    answer (?: \s+ (?: choice | option ) )? (?: \s+ (?: to | for ) \s [^.\n]{1,60}? )?
    (?: \s+ (?: is | must\sbe | would\sbe | should\sbe | will\sbe ) \b (?: \s+ (?: therefore | thus | then ) \b )? | \s*[:=] )
    \s* [:=]? \s* (?= ( [^\n]{1,300} ) )""", re.IGNORECASE | re.VERBOSE)
FEW = 9  # phrases are tried from the last backwards, no more than this: a text that repeats itself has thousands
FRACTION = re.compile(r"([-+]?)\s*\\[dtc]?frac\s*(?:\{\s*(-?)([\d.]+)\s*\}|(\d))\s*(?:\{\s*(-?)([\d.]+)\s*\}|(\d))")


def flat_fraction(match):
    r"""-\frac{-1}{2} -> ' 1/2': one sign in front, and a space that keeps a mixed number's whole part apart."""
    sign, sign_over, over, digit_over, sign_under, under, digit_under = match.groups("")
    minus = "-" if (sign == "-") ^ bool(sign_over) ^ bool(sign_under) else ""
    return f" {minus}{over or digit_over}/{under or digit_under}"


def plain(text):
    """LaTeX or prose -> text in which numbers, letters and words stand bare: no currency, markup, thin spaces."""
    text = re.sub(r"\n[\n ]*", "\n", re.sub(r"[^\S\n]+", " ", text))  # first: runs of spaces make the rest quadratic
    text = re.sub(r"[\u2212\u2013]", "-", text)  # minus sign, en dash
    text = re.sub(r"\\!|\\left|\\right|\\displaystyle|\*\*|__", "", text)
    text = re.sub(r"\{,\}|(?<=\d)\\[,;](?=\d{3})", ",", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:times|cdot)(?![a-z])|×", "*", text).replace("\\%", "%")
    text = re.sub(r"(?<![\w)\]}])([-+]?)\s?(?:\\?\$|[€£¥₹])\s*(?=[-+.\d])", r"\1", text)  # -$5 -> -5
    text = re.sub(r"(?:\\?\$|\\[()\[\],; ]| )+", " ", text)
    text = re.sub(" +", " ", FRACTION.sub(flat_fraction, text)).strip()
    return re.sub(r"(^|=) ?([-+]) (?=[.\d])", r"\1\2", text)  # 'x = - 3'


def boxed(text):
    r"""Contents of the last few complete \boxed{...}, braces nested to any depth, the last opened first."""
    stack, found = [], []
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):  # one pass; \{ is no brace
        if token[0] == "}" and stack:
            start = stack.pop()
            found += [(start, token.start())] if start else []
        elif token[0][-1] == "{" and token[0] != "\\{":
            stack.append(token.end() if token[0] != "{" else None)
    return [text[start:end] for start, end in sorted(found, reverse=True)[:FEW]]


def extract(text, kind, choices=None):
    """What a text gives as its answer: a number as written, LaTeX, a choice's letter, 'yes' or 'no'; None if nothing.

    kind: 'number', 'math', 'choice' (then `choices`, letter -> text) or 'yesno'.
    """
    last_line = re.search(r"####\s*([^\n]+)\s*\Z", text)  # elsewhere, #### is a heading
    places = boxed(text) + ([last_line[1]] if last_line else [])
    places += [match[1] for match in list(ANSWER.finditer(text.replace("**", "")))[:-FEW:-1]]
    for place in places:
        answer = read(place, kind, choices)
        if answer is not None:
            return answer
    text = plain(text)
    if kind == "choice":
        letters = "".join(choices)
        found = re.findall(rf"(?m)\(([{letters}])\)|\b(?i:option|choice)(?i:\sis)?\s([{letters}])\b|^\W*([{letters}])(?:\W*$|[).:]\s)"
                           rf"|\b([{letters}])\s(?i:is\s(?:the\s)?(?:correct|right))", text)
        return "".join(found[-1]) if found else None
    if kind == "yesno":
        verdicts = re.findall(r"(?:^|[.!?\n]|\b(?:so|thus|therefore|hence)\b,?)\s*(yes|no|true|false)\b", text.lower())
        return yes_or_no(verdicts[-1:] or re.findall(r"\b(?:yes|no|true|false)\b", text.lower())[-1:])
    numbers = [match[0].strip() for match in NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def read(place, kind, choices):
    """As extract, of a few words that are known to hold the answer."""
    if kind == "math":
        inside = re.search(r"^[^$\\]*(?:\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\))", place)  # 'the answer is $x$, since ...'
        place = inside[1] or inside[2] if inside else re.split(r"\.(?:\s|$)", place)[0]
        return place.strip(" *$\n").rstrip(" .").rstrip(" *$") or None
    place = plain(place).strip(" :*\n").rstrip(" .")
    if kind == "number":
        clause = re.split(r"[;(]|,(?!\d)|\b(?:since|because|given|where|as)\b", place)[0]  # what follows only explains
        left, _, right = clause.rpartition("=")  # 'x = 5', '3 + 4 = 7', but '36 = 6^2'
        worked = NUMBER.fullmatch(left.strip()) and re.search(r"\d\s*[-+*^/]\s*\d", right)
        number = NUMBER.search(left if worked else right) or NUMBER.search(place)
        return number[0].strip() if number else None
    if kind == "yesno":
        return yes_or_no(re.findall(r"\b(?:yes|no|true|false)\b", place.lower())[:1])
    letters = "".join(choices)
    letter = re.fullmatch(rf"\(?([{letters}])\W*", place, re.IGNORECASE)
    if letter:
        return letter[1].upper()
    same = [key for key, choice in choices.items() if grade(place, choice, "number") or
            normalise(place) == normalise(choice)]
    if len(same) == 1:
        return same[0]
    letter = (re.match(rf"(?:(?i:option|choice)\s)?\(?([{letters}])(?:[).:,\s]|$)", place)
              or re.search(rf"\(([{letters}])\)", place))
    if letter:
        return letter[1]
    inside = [key for key, choice in choices.items() if re.search(rf"(?<!\w){re.escape(plain(choice))}(?!\w)", place)]
    return inside[0] if len(inside) == 1 else None


def yes_or_no(words):
    return {"true": "yes", "false": "no"}.get(words[0], words[0]) if words else None


# ---- Grading

@functools.cache
def math_verify():
    """The optional module, or None. Imported at the first LaTeX answer: it takes a second."""
    try:
        import math_verify
        return math_verify
    except ImportError:
        return None


def grader(task):
    """Who judges a task's answers, for the table and the result file."""
    latex = "math-verify" if math_verify() else "normalised string equality (math-verify is not installed)"
    numbers = f"numbers within {task.tolerance}" if task.tolerance else "numbers, exact"
    return {"number": numbers, "math": latex, "choice": "letters", "yesno": "yes/no",
            None: f"{numbers}; letters; yes/no; LaTeX by {latex}"}[task.kind]


def readings(text):
    """A number's text -> the set of values it can stand for: '1,000' {1000}, '50%' {50, 1/2}, 'two' {}."""
    match = NUMBER.fullmatch(plain(text).rstrip(" .")) if len(text) < 4000 else None  # int() reads 4300 digits at most
    if not match:
        return set()
    try:
        value = Fraction(match["digits"].replace(",", "")) / Fraction(match["over"] or 1)
    except ZeroDivisionError:
        return set()
    value = (value + int(match["whole"] or 0)) * Fraction(10) ** int(match["power"] or match["exponent"] or 0)
    value = -value if match["sign"] == "-" else value
    return {value, value / 100} if match["percent"] else {value}


def normalise(latex):
    """LaTeX -> a string in which the usual ways to write one answer are the same."""
    text = latex.strip(" $\n").rstrip(" .").rstrip(" $")
    text = re.sub(r"(?<!\\)\\(?:left|right|displaystyle|[!,;: ])|\\?[$%]|\^\s*\{?\s*\\circ\s*\}?|°", "", text)
    text = re.sub(r"(?<=[^\s{(])\s*\\(?:text|mbox|mathrm)\s*\{\s*[a-z ]+\}(?:\^\d)?\s*$", "", text)  # a unit
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


def grade(extracted, gold, kind, tolerance=0):
    """Is `extracted` (None: no answer) the same answer as `gold`? Also tells whether two samples agree.

    number: |extracted - gold| <= tolerance * min(1, |gold|), so that 0 is no answer to 5e-7 and a large number has
            to be right to the hundredth; 50 % counts as 50 and as 0.5
    math:   equal as numbers, as normalised strings, or (if it is installed) by math-verify
    choice, yesno: equal
    """
    if extracted is None:
        return False
    if kind in ("choice", "yesno"):
        return extracted == gold
    slack = Fraction(str(tolerance))
    if any(abs(a - b) <= slack * min(1, abs(b)) for a in readings(extracted) for b in readings(gold)):
        return True
    if kind == "number":
        return False
    if normalise(extracted) == normalise(gold):
        return True
    judge = math_verify() if len(extracted) < 1000 else None  # longer is no answer, and keeps it busy for seconds
    return bool(judge) and judge.verify(judge.parse(f"${gold}$"), judge.parse(f"${extracted}$"))


# ---- Runs and result files

KEY = ("problem", "method", "sample")  # what tells the records of a task apart


def run(problems, task, methods, num_samples=1, output=None, json_path=None):
    """Runs methods one after the other on the same problems, grades, records, prints the table.

    Returns what --json writes, and the records by (problem id, method, sample index).

    methods: name -> (settings, solve). settings: everything that changes what the method answers; records in `output`
             are taken over if theirs are equal. solve(jobs) gets the (problem, sample index) pairs still to be done and
             yields (problem, sample, record) as they finish. record: answer_text, optional thought_text,
             thought_tokens, answer_tokens, seconds, stopped_by, prompt, answers (of several candidates), and whatever
             else the method wants to keep.
    Raises UserError: a file that cannot be written, or is of other settings or problems. KeyboardInterrupt and errors
    of the method pass through; what was finished is in the file.
    """
    for path in filter(None, (output, json_path)):
        if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
            raise UserError(f"cannot write {path}: make its folder first, and give a file's name")
    settings = {method: plain_json({"task": task.name, "grader": grader(task), **own})
                for method, (own, _) in methods.items()}
    done = resume(output, settings, KEY) if output else {}
    facts = {problem.id: [problem.question, problem.choices, problem.answer] for problem in problems}
    for (problem, method, _), record in done.items():
        fact = [record["question"], record["choices"], record["gold"]]
        if method in methods and facts.get(problem, fact) != fact:
            raise UserError(f"{output}: {problem} is another problem there than in the data; give --output another "
                            "name, or delete it")
    wanted = [(problem, sample) for problem in problems for sample in range(num_samples)]
    rows, first = [], None
    for method, (_, solve) in methods.items():
        jobs = [(problem, sample) for problem, sample in wanted if (problem.id, method, sample) not in done]
        right = sum(done[problem.id, method, sample]["correct"] for problem, sample in wanted
                    if (problem.id, method, sample) in done)
        start, tokens = time.perf_counter(), 0
        with tqdm(desc=method, total=len(wanted), initial=len(wanted) - len(jobs)) as bar:
            for problem, sample, record in solve(jobs) if jobs else ():
                record = graded(problem, task, method, sample, {**record, "settings": settings[method]})
                if output:
                    append(output, record)
                done[problem.id, method, sample] = record
                right, tokens = right + record["correct"], tokens + (length(record) or 0)
                bar.set_postfix_str(f"accuracy {right / (bar.n + 1):.1%}", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        records = [[done[problem.id, method, sample] for sample in range(num_samples)] for problem in problems]
        row, first = summarise(method, records, first)
        if tokens:
            row.tokens_per_second, row.timed_records = tokens / seconds, len(jobs)
        rows.append(row)
    result = {"task": task.name, "problems": len(problems), "samples": num_samples, "grader": grader(task),
              "interval": "Wilson" if num_samples == 1 else "Wilson, clustered by problem", "settings": settings,
              "methods": [asdict(row) for row in rows]}
    print(table(result, rows))
    if json_path:
        write_json(json_path, result)
    return result, done


def plain_json(settings):
    """Settings as they come back from a file: tuples as lists, paths as text."""
    return json.loads(json.dumps(settings, default=str))


def graded(problem, task, method, sample, record):
    """The record of a method, with all that a reader needs to audit its grade."""
    for source in ("answer_text", "thought_text"):
        extracted = extract(record.get(source) or "", problem.kind, problem.choices)
        if extracted is not None:
            break
    return {"prompt": prompt(problem, task), **record, "problem": problem.id, "method": method, "sample": sample,
            "question": problem.question, "choices": problem.choices, "gold": problem.answer,
            "extracted": extracted, "extracted_from": source if extracted is not None else None,
            "correct": grade(extracted, problem.answer, problem.kind, task.tolerance),
            **({"any_correct": any(grade(answer, problem.answer, problem.kind, task.tolerance)
                                   for answer in record["answers"])} if "answers" in record else {})}


def append(path, record):
    """One JSON line at the end of a file, on its way to the disk when this returns."""
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(record, default=str).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what it holds is safe, and the same command goes on "
                        f"from there") from None


def resume(path, settings, key):
    """Result file -> its records, by the values that they have for the names in `key`; {} if there is no file.

    settings: method -> settings. A record of one of these methods with others raises UserError, as does a file that is
    no result file or is damaged. A half-written last line, which a killed process leaves, is cut off.
    """
    path, done = Path(path), {}
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[:content.rfind(b"\n") + 1]
        for n, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                there, method = record["settings"], record["method"]
                done[tuple(record[name] for name in key)] = record
            except KeyError as error:
                raise UserError(f"{path}, line {n}: a record of something else (it has no {error}); give --output another "
                                "name") from None
            except (ValueError, TypeError):
                raise UserError(f"{path}, line {n}: not a record; delete the line, and it is done again; or give "
                                "--output another name") from None
            here = plain_json(settings.get(method, there))
            differing = [f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
                         for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
            if differing:
                raise UserError(f"{path} holds results of other settings: {', '.join(differing)}; give --output another "
                                "name, or delete it")
        rest = content[len(whole):]
        if not whole and not b'{"'.startswith(rest[:2]):
            raise UserError(f"{path} is not a result file; give --output another name")
        with open(path, "ab") as file:  # also where nothing is cut: better to fail now than after the first problem
            file.truncate(len(whole))
        if rest:
            print(f"{path}: the last line is half-written; cutting its {len(rest)} bytes", file=sys.stderr)
    except OSError as error:
        raise UserError(f"cannot read and write {path}: {error.strerror}; give --output another name") from None
    if done:
        print(f"{path}: going on after {len(done)} finished records", file=sys.stderr)
    return done


def write_json(path, result):
    """Written beside `path`, then put in its place at once: readers see the old file or the new one, never a half."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


# ---- Tables

Z = 1.959964  # of a two-sided 95 % interval


@dataclass
class Row:
    method: str
    accuracy: float
    accuracy_interval: list
    difference: float | None            # to the first method, problem by problem
    difference_interval: list | None
    tokens: float | None                # mean of thinking and answer, all records
    tokens_correct: float | None        # the same of the right ones
    no_answer: int                      # records from which nothing could be extracted
    stops: dict                         # what ended the thinking -> records
    tokens_per_second: float | None = None  # wall clock of this process, over the `timed_records` it finished
    timed_records: int = 0


def length(record):
    """Tokens of thinking and answer together, None if the method did not count."""
    counts = [record[key] for key in ("thought_tokens", "answer_tokens") if record.get(key) is not None]
    return sum(counts) if counts else None


def wilson(p, n):
    """Proportion p of n independent trials -> [low, high] (Wilson 1927)."""
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + Z * Z / n)), min(1.0, (centre + half) / (1 + Z * Z / n))]


def summarise(method, records, first):
    """records[problem][sample], and the first method's means (None: this is it) -> Row, the first method's means.

    Several samples of a problem are not independent, so Wilson's n is then the number of independent records that
    would have the variance seen between the problems' means.
    """
    means = [sum(record["correct"] for record in samples) / len(samples) for samples in records]
    n, flat = len(means), [record for samples in records for record in samples]
    p = sum(means) / n
    size = n
    if len(flat) > n > 1:
        variance = sum((mean - p) ** 2 for mean in means) / (n - 1) / n
        size = min(p * (1 - p) / variance, len(flat)) if variance else n
    difference = interval = None
    if first is not None:
        # Bonett & Price (2012): one more problem won and one more lost; never an empty interval
        gaps = [a - b for a, b in zip(means, first)]
        difference, centre = sum(gaps) / n, sum(gaps) / (n + 2)
        half = Z * math.sqrt(((sum(gap * gap for gap in gaps) + 2) / (n + 2) - centre ** 2) / (n + 2))
        interval = [max(-1.0, centre - half), min(1.0, centre + half)]

    def mean_length(records):
        lengths = [length(record) for record in records if length(record) is not None]
        return sum(lengths) / len(lengths) if lengths else None

    return Row(method, p, wilson(p, size), difference, interval, mean_length(flat),
               mean_length([record for record in flat if record["correct"]]),
               sum(record["extracted"] is None for record in flat),
               dict(Counter(record["stopped_by"] for record in flat if record.get("stopped_by")).most_common()),
               ), means if first is None else first


def table(result, rows):
    """The result of `run` and its rows -> text, one line a method."""
    lines = [["method", "accuracy", "95 % interval", "difference to " + rows[0].method, "tokens", "if correct",
              "tokens/s", "no answer", "ended by"]]
    for row in rows:
        low, high = row.accuracy_interval
        gap = ""
        if row.difference is not None:
            gap = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in (row.difference, *row.difference_interval)))
        numbers = ["-" if x is None else f"{x:.1f}" for x in (row.tokens, row.tokens_correct, row.tokens_per_second)]
        stops = ", ".join(f"{cause} {count}" for cause, count in row.stops.items()) or "-"
        lines.append([row.method, f"{row.accuracy:.1%}", f"{low:.1%} to {high:.1%}", gap, *numbers, str(row.no_answer),
                      stops])
    columns = [column for column in zip(*lines) if any(column[1:])]  # no differences with one method
    widths = [max(map(len, column)) for column in columns]
    text = ["{task}: {problems} problems, {samples} sample(s) each; graded by {grader}; interval: {interval}"
            .format(**result), ""]
    text += ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in zip(*columns)]
    records = result["problems"] * result["samples"]
    if any(row.timed_records < records for row in rows):
        text += ["", "tokens/s: of what this process did, " +
                 ", ".join(f"{row.method} {row.timed_records} of {records} records" for row in rows)]
    if len(rows) > 1:
        text += ["", "difference: percentage points, paired by problem, with 95 % interval (Bonett and Price)"]
    return "\n".join(text)
