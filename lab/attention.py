"""Attention of a decoding step on a CPU in C++: lab/attention.cpp, compiled for a model's heads.

In a long thought keys and values are much of what a step reads, and PyTorch's kernel takes far
longer than reading them. To torch.compile this one is one opaque operation.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

NUMBERS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
# Not -ffast-math: by some compilers that flushes the smallest numbers of the whole process to 0.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
ARGUMENTS = 5 * [ctypes.c_void_p] + 5 * [ctypes.c_int64] + [ctypes.c_int]
built: dict[tuple, Callable] = {}  # (dtype, G, h) -> the function


def build(dtype: torch.dtype, G: int, h: int) -> Callable:
    """`attend` for G query heads of width h to a KV head, which takes a second.

    ValueError for what it does not compute, CalledProcessError where it does not compile.
    """
    if dtype not in NUMBERS or h % 8:
        raise ValueError(f"none for {dtype} and heads of width {h}")
    if (dtype, G, h) not in built:
        from torch._inductor.cpp_builder import get_cpp_compiler

        sizes = [f"-DT={NUMBERS[dtype]}", f"-DG={G}", f"-DWIDTH={h}"]
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/attention.so"
            files = [Path(__file__).with_suffix(".cpp"), "-o", library]
            subprocess.run(
                [get_cpp_compiler(), *FLAGS, *sizes, *files], check=True, capture_output=True
            )
            function = ctypes.CDLL(library).attend  # which keeps it, though its file goes
        function.argtypes, function.restype = ARGUMENTS, None
        built[dtype, G, h] = function
    return attend


def compute(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, S: int) -> Tensor:
    (B, _, H, h), K = q.shape, keys.shape[1]
    q, (row, head, _, _) = q.contiguous(), keys.stride()
    out, threads = torch.empty_like(q), torch.get_num_threads()
    tensors = (q.data_ptr(), keys.data_ptr(), values.data_ptr(), positions.data_ptr())
    built[q.dtype, H // K, h](*tensors, out.data_ptr(), B, K, S, row, head, threads)
    return out


# Not torch.library.custom_op: what that does at each call takes longer than a short attention.
library = torch.library.Library("lab", "FRAGMENT")
library.define("attend_on_cpu(Tensor q, Tensor k, Tensor v, Tensor positions, SymInt S) -> Tensor")
library.impl("attend_on_cpu", compute, "CPU")
library.impl("attend_on_cpu", lambda q, *_: q.new_empty(q.shape), "Meta")


def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, S: int) -> Tensor:
    """KVCache.attend for one query per row, [B, 1, H, h] -> [B, 1, H, h]; sums are float32.

    keys, values [B, K, capacity, h], of strides alike; positions, LongTensor [B, 1] < S: the last
    one that each row sees.
    """
    return torch.ops.lab.attend_on_cpu(q, keys, values, positions, S)
