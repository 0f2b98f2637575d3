"""Flags of the programs: those of a run, and one for each field of a method's Settings."""

import argparse
import inspect
import re
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from lab import tasks
from model import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tiny" / "base")  # the bundled model
TASKS = ", ".join(tasks.TASKS)


def shard(text: str) -> tuple[int, int]:
    """'0/4' as numbers, for argparse."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        form = "I/N, I from 0 to N - 1"
        raise argparse.ArgumentTypeError(f"takes {form}, not {text!r}")
    return int(match[1]), int(match[2])


FLAGS = {  # those that are no settings of a method
    "model": {
        "default": TINY,
        "help": "alias such as qwen2.5-7b, Hugging Face id, or folder (default: bundled)",
    },
    "question": {"help": "answer this one in the terminal (default: a problem of the task tiny)"},
    "task": {"help": f"score a benchmark: {TASKS}"},
    "data": {
        "metavar": "FILE",
        "help": "your own problems, JSON lines: question, answer (or tests); choices, steps",
    },
    "run-generated-code": {
        "action": "store_true",
        "help": "permit tasks whose answers are programs: they are run (see lab/sandbox.py)",
    },
    "protocol": {
        "choices": ["paper"],
        "help": "with --task: as the published runs were made, see lab/protocols.py",
    },
    "shots": {"type": int, "help": "with --task: worked examples before the question (default: 0)"},
    "completion": {
        "action": argparse.BooleanOptionalAction,
        "default": False,
        "help": "with --task: ask by bare text, without the chat template",
    },
    "limit": {"type": int, "help": "only the first so many problems"},
    "methods": {"help": "with --task: several, compared problem by problem (default: {methods})"},
    "seed": {"type": int, "default": 0, "help": "of all randomness (default: 0)"},
    "seeds": {
        "type": int,
        "default": 1,
        "help": "with --task: so many, from --seed on; their mean and spread (default: 1)",
    },
    "num-samples": {
        "type": int,
        "default": 1,
        "help": "answers per question (default: 1); a deterministic method gives one",
    },
    "batch-size": {
        "type": int,
        "default": 16,
        "help": "sequences side by side; the last bits may depend on it (default: 16)",
    },
    "device": {"help": "cpu, cuda, or cuda:N (default: cuda where there is one)"},
    "dtype": {"help": "bfloat16, float16, or float32 (default: what the device is fast at)"},
    "tensor-parallel": {
        "type": int,
        "metavar": "N",
        "default": 1,
        "help": "under torchrun: N processes hold a model between them (default: 1)",
    },
    "shard": {
        "type": shard,
        "metavar": "I/N",
        "help": "only every N-th problem from the I-th on, 0/4 to 3/4: for job arrays",
    },
    "quantize": {
        "choices": ["int8"],
        "help": "keep the matrices, but not the embeddings, in 8 bits",
    },
    "compile": {
        "action": "store_true",
        "help": "faster decoding: C++ on a CPU (seconds), Inductor on CUDA (a minute or two)",
    },
    "output": {
        "metavar": "FILE",
        "help": "append one JSON line per record; started again, it goes on",
    },
    "trace": {"action": "store_true", "help": "with --output or --html: every concept token too"},
    "html": {"metavar": "PAGE", "help": "also one page to look at, see lab/report.py"},
    "json": {"metavar": "FILE", "help": "with --task: the table as JSON"},
    "analyse": {"action": "store_true", "help": "the paper's mechanism study, on the question"},
}


def add_flags(parser: argparse.ArgumentParser, names: str, **changes: dict) -> None:
    """Those of FLAGS that are named, in this order; changes replace some of their options."""
    for name in names.split():
        options = FLAGS[name] | changes.get(name.replace("-", "_"), {})
        parser.add_argument(f"--{name}", **options)


def comments(settings: type) -> dict[str, str]:
    """Field -> its comment: behind it, or on the lines above it."""
    said, above = {}, []
    for line in inspect.getsource(settings).splitlines():
        code, _, comment = line.partition("  # ")
        field = re.match(r"    (\w+): ", code)
        if line.strip().startswith("# "):
            above.append(line.strip()[2:])
        elif field:
            said[field[1]] = " ".join([*above, *([comment.strip()] if comment else [])])
        if not line.strip().startswith("# "):
            above = []
    return said


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """A flag for each field: type, choices, default and help are the field's."""
    said = {}
    for base in reversed(settings.__mro__[:-1]):
        said |= comments(base)
    types = typing.get_type_hints(settings)
    for field in fields(settings):
        default = "" if field.default is None else f" (default: {field.default})"
        options = {"help": said[field.name].replace("%", "%%") + default}
        kinds = [t for t in typing.get_args(types[field.name]) if t is not type(None)]
        kind = types[field.name]
        if typing.get_origin(kind) is not typing.Literal and kinds:
            kind = kinds[0]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options["type"] = kind
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)


def settings_of(args: argparse.Namespace, settings: type, **fixed: Any) -> Any:
    """The settings that the flags ask for; UserError for nonsense."""
    given = {f.name: getattr(args, f.name) for f in fields(settings) if hasattr(args, f.name)}
    try:
        return settings(**given | fixed)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from None


def at_least(args: argparse.Namespace, **least: int) -> None:
    """UserError where one of these flags, if the command has it, is below its number, or absurd."""
    for name, low in least.items():
        most = {"seed": 2**63 - 1, "max_new_tokens": 2**31}.get(name, 10**6)
        flag, value = name.replace("_", "-"), getattr(args, name, low)
        if value < low:
            raise UserError(f"--{flag} must be at least {low}, not {value}")
        if value > most:
            raise UserError(f"--{flag} must be at most {most}, not {value}")


def check_given(args: argparse.Namespace) -> None:
    """UserError for a flag with nothing behind it, such as an unset variable of a script."""
    for name, value in vars(args).items():
        if value == "" and name not in ("question", "against"):  # these say it themselves
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is empty: give it a value, or leave it out")


def new_parser(prog: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """One whose mistakes are one line, without the usage."""
    parser = argparse.ArgumentParser(prog=prog, description=description, **options)
    parser.error = lambda message: sys.exit(fail(prog.split()[0], message))
    return parser


def fail(prog: str, message: str) -> int:
    print(f"{prog}:", " ".join(message.split()), file=sys.stderr)
    return 2
