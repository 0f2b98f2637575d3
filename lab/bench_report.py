"""One report of everything: the tests that use a GPU, then the benches, by importance.

    python -m lab.bench --device cuda --report report.jsonl      # report.md is written beside it

The models are random weights in the shapes of Qwen2.5-7B and Qwen2.5-0.5B, written here: nothing is
downloaded. On a CPU all sizes are small, which tries the report and measures nothing. Each section
is a process of its own, so that one that fails takes nothing along; its record is in the file when
it is finished, and the same command goes on behind it. A run lasts nine minutes at most.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lab import checkpoint, files, flags, identity, random_weights, timing
from model import UserError

SECONDS = 9 * 60  # of a run
LEAST = 15  # with fewer seconds left no section is begun
MODELS = "7b", "0.5b"  # of random weights

# ----------------------------------------------------------------------------------------- sections


def sections(large: bool) -> dict[str, tuple[float, str]]:
    """Name -> the seconds that it may take, and its arguments; the most important ones first."""
    if not large:
        size = "--batch 1 2 --tokens 8 --repeats 1"
        return {
            "tests": (120, "tests/test_cuda.py"),
            "7b": (60, f"--model 7b --prompt 20 {size}"),
            "7b, long thoughts": (60, f"--model 7b --prompt 30 90 {size}"),
            "7b, int8": (60, f"--model 7b --prompt 20 {size} --quantize int8"),
            "7b, SoftCoT": (60, f"--model 7b --assistant 0.5b --prompt 20 {size}"),
            "7b, transformers": (60, f"--model 7b --prompt 20 {size} --against transformers"),
        }
    every, two = "--batch 1 5 16 64 --repeats 3", "--batch 1 16 --repeats 3"
    thoughts = "--prompt 960 8128 32704 --batch 1 4 16 --tokens 24 --repeats 2"
    prefills = "--prompt 1024 4096 --batch 1 --tokens 8 --repeats 3 --against transformers"
    return {
        "tests": (240, "tests/test_cuda.py tests/test_kernels.py"),
        "7b": (150, f"--model 7b {every}"),
        "7b, long thoughts": (210, f"--model 7b {thoughts}"),
        "7b, compiled": (240, f"--model 7b {two} --compile"),
        "7b, int8": (90, f"--model 7b {two} --quantize int8"),
        "7b, SoftCoT": (90, "--model 7b --assistant 0.5b --batch 1 --tokens 8 --repeats 3"),
        "7b, transformers": (150, f"--model 7b {two} --against transformers"),
        "0.5b": (120, f"--model 0.5b {every} --against transformers"),
        "7b, prefill": (120, f"--model 7b {prefills}"),
        "0.5b, compiled": (180, f"--model 0.5b {two} --compile"),
        "0.5b, long thoughts": (150, f"--model 0.5b {thoughts}"),
    }


# ---------------------------------------------------------------------------------------- processes


def apart(function: Callable[[], int | None], seconds: float) -> tuple[int | None, str, str]:
    """function() in a process of its own: its exit code, output, and errors.

    The code is None where it was stopped because it took longer. The process is a fork, which need
    not import PyTorch again.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = out.fileno(), err.fileno()
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=run_apart, args=(function, *streams))
        sys.stdout.flush()
        process.start()
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        for file in (out, err):
            file.seek(0)
        return code, *(file.read().decode(errors="replace") for file in (out, err))


def run_apart(function: Callable[[], int | None], out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    streams = (open(i, "w", errors="replace", closefd=False) for i in (1, 2))  # noqa: SIM115
    sys.stdout, sys.stderr = streams
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: none that goes on without the report
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    sys.exit(function())


def start_anew(*arguments: str) -> None:
    """Become a new Python with these arguments if this fork cannot use a GPU.

    PyTorch refuses it where the parent has counted the devices, as some modules do when imported.
    """
    if torch.cuda._is_in_bad_fork():
        os.chdir(flags.ROOT)
        os.execv(sys.executable, [sys.executable, *arguments])


DESCRIBE = "import sys; from lab.bench_report import describe; sys.exit(describe(*sys.argv[1:]))"


def describe(device: str | None = None) -> int:
    """Prints what a report belongs to, as JSON: machine, versions, and the code."""
    start_anew("-c", DESCRIBE, *([device] if device else []))
    try:
        device = checkpoint.choose(device, None)[0]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    about = {"machine": timing.hardware(device), "device": device.type}
    about |= {"torch": torch.__version__, "CUDA": torch.version.cuda}
    about |= {"Python": platform.python_version(), "commit": commit()}
    print(json.dumps(about | {"code": identity.code()}))
    return 0


def commit() -> str:
    """Of the repository; empty for a copy without its history."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(flags.ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def section(arguments: str, device: str, command: Callable[[list[str]], int]) -> int:
    words, large = arguments.split(), device == "cuda"
    if words[0].startswith("tests"):
        os.chdir(flags.ROOT)
        pytest = [sys.executable, "-m", "pytest", "-rfEs", "--tb=line"]
        os.execv(sys.executable, [*pytest, "-p", "no:cacheprovider", *words])
    there = {name: str(random_weights.write(name, large)) for name in MODELS if name in words}
    words = ["--device", device, *(there.get(word, word) for word in words)]
    start_anew("-m", "lab.bench", *words)
    return command(words)


# ------------------------------------------------------------------------------------------- report


def measure(args: argparse.Namespace, command: Callable[[list[str]], int]) -> None:
    """Run what is not in args.report yet. command: lab.bench's own, which runs a section.

    Raises UserError for a file of another machine, version, or state of the code.
    """
    begin, path = time.monotonic(), Path(args.report)
    if args.model:
        raise UserError("--report brings its own models: leave --model out")
    files.check_place(path)
    if path.suffix == ".md":
        raise UserError("--report names a file of JSON lines, report.jsonl: the .md is made of it")
    code, said, errors = apart(partial(describe, args.device), SECONDS)
    if code:
        raise UserError(errors.strip().splitlines()[-1])
    about = json.loads(said)
    done = files.resume(path, {"report": about}, ("section",), flag="--report")
    wanted = sections(about["device"] == "cuda")
    for name, (limit, arguments) in wanted.items():
        if (name,) in done:
            continue
        start = time.monotonic()
        left = SECONDS - (start - begin)
        if left < LEAST:
            break
        body = partial(section, arguments, about["device"], command)
        code, said, errors = apart(body, min(limit, left))
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
    for name in MODELS:
        shutil.rmtree(random_weights.folder_of(name, about["device"] == "cuda"), ignore_errors=True)
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
    shapes = "Random weights in the shapes of Qwen2.5-7B (`7b`) and Qwen2.5-0.5B (`0.5b`)"
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
