"""C++ of this folder, compiled for the processor at hand."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from lab import sources

# Not -ffast-math: by some compilers that flushes the smallest numbers of the whole process to 0.
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
DTYPES = torch.float32, torch.bfloat16  # which lab/vectors.h has


def has_amx(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies by AMX: there none of our kernels was timed."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def compiler() -> list[str]:
    """The C++ compiler's command: the environment variable CXX, or g++."""
    return shlex.split(os.environ.get("CXX") or "g++")


@cache
def target(*command: str) -> bytes:
    """What a compiler defines: it tells its version, and what the processor can."""
    asked = *command, "-march=native", "-dM", "-E", "-x", "c++", os.devnull
    return subprocess.run(asked, check=True, capture_output=True).stdout


@cache
def library(name: str, **sizes: str | int) -> ctypes.CDLL:
    """The library of lab/{name}.cpp for these sizes, compiled in a second or two, and then kept.

    RuntimeError where it does not compile.
    """
    source, header = (Path(__file__).with_name(x) for x in (f"{name}.cpp", "vectors.h"))
    options = [*FLAGS, *(f"-D{k}={v}" for k, v in sizes.items())]
    texts = source.read_text(), header.read_text()
    key = repr((target(*compiler()), compiler(), options, texts)).encode()
    folder = sources.cache_folder() / "cpp"
    kept = folder / f"{name}-{hashlib.sha256(key).hexdigest()}.so"
    if not kept.exists():
        start = time.perf_counter()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary, kept.name)
            command = [*compiler(), *options, str(source), "-o", str(made)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                said = [x for x in done.stderr.splitlines() if "error" in x] or [str(done)]
                raise RuntimeError(f"{source.name} does not compile: {said[0]}")
            made.replace(kept)  # whole, or not at all
        print(f"compiled {source.name} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return ctypes.CDLL(kept)
