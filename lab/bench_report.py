"""One report of what a GPU decides: the tests that use one, then the benches, by importance.

    python -m lab.bench --device cuda --report report.jsonl      # report.md is written beside it

The models are random weights in the shapes of Qwen2.5-7B and Qwen2.5-0.5B, written here: nothing is
downloaded. On a CPU all sizes are small, which tries the report and measures nothing. Each section
is a process of its own, so that one that fails takes nothing along; its record is in the file when
it is finished, and the same command goes on behind it. A run lasts nine minutes at most.
"""

import argparse
import ctypes
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lab import checkpoint, files, flags, identity, random_weights, timing
from model import UserError

SECONDS = 9 * 60  # of a run
LEAST = 15  # with fewer seconds left no section is begun

# ----------------------------------------------------------------------------------------- sections


def sections(cuda: bool) -> dict[str, tuple[float, str]]:
    """Name -> the seconds that it may take, and its arguments; the most important ones first."""
    if not cuda:
        model, size = "--model random-7b-tiny", "--batch 1 2 --tokens 8 --repeats 1"
        return {
            "tests": (120, "tests/test_cuda.py"),
            "7b": (60, f"{model} --prompt 20 {size}"),
            "7b, long thoughts": (60, f"{model} --prompt 30 90 {size}"),
            "7b, int8": (60, f"{model} --prompt 20 {size} --quantize int8"),
            "7b, SoftCoT": (60, f"{model} --assistant random-0.5b-tiny --prompt 20 {size}"),
            "7b, transformers": (60, f"{model} --prompt 20 {size} --against transformers"),
        }
    large, small = "--model random-7b", "--model random-0.5b"
    every, two = "--batch 1 5 16 64 --repeats 3", "--batch 1 16 --repeats 3"
    thoughts = "--prompt 960 8128 32704 --batch 1 4 16 --tokens 24 --repeats 2"
    prefills = "--prompt 1024 4096 --batch 1 --tokens 8 --repeats 3 --against transformers"
    return {
        "tests": (240, "tests/test_cuda.py tests/test_kernels.py"),
        "7b": (150, f"{large} {every}"),
        "7b, long thoughts": (210, f"{large} {thoughts}"),
        "7b, compiled": (240, f"{large} {two} --compile"),
        "7b, int8": (90, f"{large} {two} --quantize int8"),
        "7b, SoftCoT": (90, f"{large} --assistant random-0.5b --batch 1 --tokens 8 --repeats 3"),
        "7b, transformers": (150, f"{large} {two} --against transformers"),
        "0.5b": (120, f"{small} {every} --against transformers"),
        "7b, prefill": (120, f"{large} {prefills}"),
        "0.5b, compiled": (180, f"{small} {two} --compile"),
        "0.5b, long thoughts": (150, f"{small} {thoughts}"),
    }


# ---------------------------------------------------------------------------------------- processes


def apart(words: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Python with these arguments, in the repository: its exit code, output, and errors.

    The code is None where it was stopped because it took longer.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # Not pipes: what a section leaves running would keep them open.
        options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "cwd": flags.ROOT}
        options |= {"preexec_fn": end_with_parent, "timeout": seconds}
        try:
            code = subprocess.run([sys.executable, *words], check=False, **options).returncode
        except subprocess.TimeoutExpired:
            code = None
        for file in (out, err):
            file.seek(0)
        return code, *(file.read().decode(errors="replace") for file in (out, err))


def end_with_parent() -> None:
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: none that goes on without the report
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def section(arguments: str, device: str) -> list[str]:
    """What Python is given for a section."""
    if arguments.startswith("tests"):
        pytest = ["-m", "pytest", "-rfEs", "--tb=line", "-p", "no:cacheprovider"]
        return [*pytest, *arguments.split()]
    return ["-m", "lab.bench", "--device", device, *arguments.split()]


def describe(device: str | None) -> dict[str, str | None]:
    """What a report belongs to: machine, versions, and the code. UserError for no such device."""
    device = checkpoint.choose(device, None)[0]
    about = {"machine": timing.hardware(device), "device": device.type}
    about |= {"torch": torch.__version__, "CUDA": torch.version.cuda}
    about |= {"Python": platform.python_version(), "commit": commit()}
    return about | {"code": identity.code()}


def commit() -> str:
    """Of the repository; empty for a copy without its history."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(flags.ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# ------------------------------------------------------------------------------------------- report


def measure(args: argparse.Namespace) -> None:
    """Run what is not in args.report yet.

    Raises UserError for a file of another machine, version, or state of the code.
    """
    begin, path = time.monotonic(), Path(args.report)
    if args.model:
        raise UserError("--report brings its own models: leave --model out")
    files.check_place(path)
    if path.suffix == ".md":
        raise UserError("--report names a file of JSON lines, report.jsonl: the .md is made of it")
    about = describe(args.device)
    done = files.resume(path, {"report": about}, ("section",), flag="--report")
    wanted = sections(about["device"] == "cuda")
    for name, (limit, arguments) in wanted.items():
        if (name,) in done:
            continue
        start = time.monotonic()
        left = SECONDS - (start - begin)
        if left < LEAST:
            break
        code, said, errors = apart(section(arguments, about["device"]), min(limit, left))
        if code is None and left < limit:
            break  # it has its whole time in the next run
        of_tests = name == "tests"
        why = failure(code, errors + said if of_tests else errors, limit)
        record = {"settings": about, "method": "report", "section": name, "arguments": arguments}
        record |= {"seconds": time.monotonic() - start, "failed": why}
        record |= {"lines": [] if why and not of_tests else lines_of(said, errors, of_tests)}
        files.append(path, record)
        done[(name,)] = record
        files.write(path.with_suffix(".md"), markdown(about, wanted, done))
        print(f"{name}: {why or 'done'}, {record['seconds']:.0f} s", flush=True)
    missing = [name for name in wanted if (name,) not in done]
    if missing:
        print(f"the time is up before {', '.join(missing)}: start the same command again")
        return
    used = {word for _, arguments in wanted.values() for word in arguments.split()}
    for name in used & random_weights.SHAPES.keys():
        shutil.rmtree(random_weights.folder_of(name), ignore_errors=True)
    print(f"the report is complete: {path.with_suffix('.md')}")


def failure(code: int | None, said: str, limit: float) -> str:
    """Why a section failed, in one line; "" if it did not. said: its last line tells why."""
    if code is None:
        return f"failed: it took longer than {limit} s"
    if code < 0:
        return f"failed: stopped by {signal.Signals(-code).name}"
    last = ["it said nothing", *said.strip().splitlines()][-1]
    return f"failed: {last}" if code else ""


def lines_of(said: str, errors: str, of_tests: bool) -> list[str]:
    """The Markdown that a section printed, and what it said beside it, progress bars aside."""
    lines = said.splitlines()
    if of_tests:
        kinds = "FAILED", "ERROR", "SKIPPED"
        return [f"- {line}" for line in lines[:-1] if line.startswith(kinds)] + lines[-1:]
    beside = [line for line in errors.replace("\r", "\n").splitlines() if line.strip()]
    beside = [f"- {line}" for line in beside if "%|" not in line and "it/s]" not in line]
    return [*lines, "", *beside[-5:]] if beside else lines


def markdown(about: dict, wanted: dict[str, tuple[float, str]], done: dict[tuple, dict]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in about.items() if value)
    shapes = "Random weights in the shapes of Qwen2.5-7B and Qwen2.5-0.5B"
    if about["device"] == "cpu":
        shapes = "Random weights, all sizes small: a trial of the report, not a measurement"
    lines = ["# Report", "", f"{facts}.", "", f"{shapes}."]
    for name in wanted:
        if record := done.get((name,)):
            took = f"{record['failed'] or 'done'}, {record['seconds']:.0f} s"
            program = "pytest" if name == "tests" else "lab.bench"
            lines += ["", f"## {name}", "", f"    python -m {program} {record['arguments']}"]
            lines += ["", f"{took}.", "", *record["lines"]]
    if missing := [name for name in wanted if (name,) not in done]:
        lines += ["", f"Not yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"
