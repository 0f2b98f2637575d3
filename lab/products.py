"""The matrix products of a decoding step on a CPU in C++: lab/products.cpp, for weights laid out.

A step of few rows should take what reading the weights once takes, and oneDNN's products take far
longer.
"""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lab import native


def build() -> tuple[Callable, Callable]:
    """`lay_out` and `multiply`, for float32; CalledProcessError where they do not compile."""
    library, kernel = native.build("products")
    C = ctypes.c_int.in_dll(library, "columns").value

    def lay_out(weight: Tensor) -> Tensor:
        """[N, K] -> panels [ceil(N / C), K, C] of C rows each, the last filled up with zeros."""
        N, K = weight.shape
        return F.pad(weight, (0, 0, 0, -N % C)).view(-1, C, K).transpose(1, 2).contiguous()

    def multiply(x: Tensor, panels: Tensor, bias: Tensor | None, N: int) -> Tensor:
        """x [..., K] times a weight [N, K] that is laid out -> [..., N]."""
        return torch.ops.lab.multiply_on_cpu(x, panels, bias, N, kernel)

    return lay_out, multiply
