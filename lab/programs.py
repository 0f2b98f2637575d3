r"""Programs as answers: how one is read out of a text, and how its tests are run.

    code = program("It is:\n```python\ndef f(x):\n    return x + 1\n```")
    passes(code, with_tests("assert f(1) == 2"))  # True

The gold answer of such a problem is a program with a place, the line HERE, for what is tested.
"""

import ast
import functools
import re
import textwrap
import warnings

from lab import sandbox
from model import UserError

HERE = "# ---- the program ----"
FENCED = re.compile(
    r"^([ \t]*)```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
PYTHON = ("python", "python3", "py")
# A program; what follows it may show how it is called, or test it.
WHOLE = re.compile(
    r"^[ \t]*(?:async )?def (?!test|setUp|run_tests|check\(|main\()|^[ \t]*class (?!Test)"
    r"|^\w+ *= *lambda\b|\binput\(|\bstdin\b|\bopen\(0\b",
    re.MULTILINE,
)
BODY = re.compile(r"^[ \t]+return\b", re.MULTILINE)  # of a function


def with_tests(tests: str, before: str = "") -> str:
    """A gold answer: what stands before the program (an opened function, imports), and the tests.

    The program and the tests follow each other in one module.
    """
    return f"{before.rstrip()}\n{HERE}\n{tests}".strip()


def fenced(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def program(text: str) -> str | None:
    """The program that a text gives, or None.

    It is the last code block that says it is Python, or else the last one, closed or not; if any
    defines something or reads its input, the last of those; or else the whole text, where that is
    Python.
    """
    blocks = [(language.lower(), indent, code) for indent, language, code in FENCED.findall(text)]
    blocks = [block for block in blocks if block[0] in PYTHON] or blocks
    whole = [[block for block in blocks if what.search(block[2])] for what in (WHOLE, BODY)]
    blocks = whole[0] or whole[1] or blocks
    if blocks:
        _, indent, code = blocks[-1]
        # A block in a list is indented as its fence is; a function's body keeps what it has more.
        code = re.sub(rf"(?m)^{indent}", "", code).rstrip()
        return code or None
    tree = parsed(textwrap.dedent(text).strip())
    # 'Yes' is an expression.
    if tree is None or all(isinstance(node, ast.Expr) for node in tree.body):
        return None
    return textwrap.dedent(text).strip()


def parsed(code: str) -> ast.Module | None:
    """The syntax tree of a program, None for what is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nesting
            return None


@functools.cache
def passes(code: str, gold: str) -> bool:
    """Whether a program passes the tests of a gold answer; whether it is Python if that has none.

    Runs it. The same question has the same answer, as long as this process lives.
    """
    if HERE not in gold:
        return parsed(code) is not None
    before, after = gold.split(HERE)
    return sandbox.finished(f"{before}{code}\n{after}")


def permitted(task: str, run: bool) -> None:
    """UserError where programs would have to be run that nobody has permitted to run.

    Finds out at once, if they are permitted, whether they can be run here.
    """
    if not run:
        raise UserError(
            f"{task} is graded by running the programs that the model writes: permit it with "
            "--run-generated-code (lab/sandbox.py says what they can do on which machine)"
        )
    sandbox.way()


def grader(runs: bool) -> str:
    """Say how programs are judged."""
    if not runs:
        return "nobody: what is Python counts; lab/livecodebench.py writes it for its evaluator"
    gib = sandbox.MEMORY / (1 << 30)
    return f"running the tests ({sandbox.SECONDS} s, {gib:.0f} GiB)"
