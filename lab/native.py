"""C++ of this folder, compiled for the processor at hand: the kernels, and how PyTorch calls them.

To torch.compile a kernel is one opaque operation.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

import torch

# Not -ffast-math: by some compilers that flushes the smallest numbers of the whole process to 0.
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"]
SHAPES = {  # operation -> the shape of what it gives
    "attend_on_cpu": lambda q, *_: q.new_empty(q.shape),
    "multiply_on_cpu": lambda x, w, scale, bias, N, kernel: x.new_empty(*x.shape[:-1], N),
}
DTYPES = torch.float32, torch.bfloat16  # which lab/vectors.h has


def has_amx(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies by AMX: there our products for many rows were not timed."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


@cache
def build(name: str, **sizes: str | int) -> tuple[ctypes.CDLL, int]:
    """The library of lab/{name}.cpp for these sizes, and the number that torch.ops.lab knows it by.

    CalledProcessError where it does not compile. That takes a second or two, and for native.cpp ten
    more; Inductor's cache keeps both.
    """
    kernel = compiled(name, "-march=native", *(f"-D{k}={v}" for k, v in sizes.items()))
    return kernel, operations().keep(kernel.run)


@cache
def operations() -> ctypes.CDLL:
    """torch.ops.lab, which calls a kernel by the number that `keep` gives it."""
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    library = compiled("native", *folders, "-lc10", "-ltorch_cpu")
    library.keep.argtypes, library.keep.restype = [ctypes.c_void_p], ctypes.c_int64
    for name, shape in SHAPES.items():
        torch.library.register_fake(f"lab::{name}", shape)
    return library


def compiled(name: str, *options: str) -> ctypes.CDLL:
    """The library of lab/{name}.cpp, which Inductor's cache keeps for the next time."""
    from torch._inductor.codecache import cache_dir
    from torch._inductor.cpp_builder import get_cpp_compiler

    source, header = (Path(__file__).with_name(x) for x in (f"{name}.cpp", "vectors.h"))
    command = [get_cpp_compiler(), *FLAGS, source, *options]
    run = partial(subprocess.run, check=True, capture_output=True)
    # What the compiler defines tells its version, and what the processor can.
    told = run([command[0], "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).stdout
    texts = source.read_text(), header.read_text()
    key = repr((told, texts, command, torch.__version__)).encode()
    library = Path(cache_dir(), "lab", f"{name}-{hashlib.sha256(key).hexdigest()}.so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder, library.name)
            run([*command, "-o", made])
            made.replace(library)  # whole, or not at all
    return ctypes.CDLL(library)
