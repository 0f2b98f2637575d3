"""Attention on a CPU in C++, compiled for a model's heads: of a decoding step, and of a prompt.

In a long thought keys and values are much of what a step reads, and PyTorch's kernel takes far
longer than reading them (lab/attention.cpp). In a long prompt it takes most of the time, though it
has the smaller part of the arithmetic (lab/prefill.cpp). lab/SPEED.md has the numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lab import native
from model import masked_attention


def build(dtype: torch.dtype, G: int, h: int) -> Callable:
    """What stands in for model.masked_attention, for G query heads of width h to a KV head.

    ValueError for what it does not compute, CalledProcessError where it does not compile.
    """
    if dtype not in native.DTYPES or h % 8:
        raise ValueError(f"none for {dtype} and heads of width {h}")
    sizes = {"BFLOAT16": int(dtype == torch.bfloat16), "G": G, "WIDTH": h}
    amx = native.has_amx(dtype)
    _, step = native.build("attention", **sizes)
    _, prompt = (None, None) if amx else native.build("prefill", **sizes)

    def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """As model.masked_attention, but with sums in float32, and k and v of the same strides.

        Where the processor multiplies bfloat16 in pairs, a softmax's weights are rounded to it.
        """
        T, S = q.shape[1], mask.shape[-1]  # S as a size of a tensor: compiled once for all
        if T > 1 and amx:
            return masked_attention(q, k, v, positions, mask)
        kernel = step if T == 1 else prompt
        return torch.ops.lab.attend_on_cpu(q, k, v, positions, S, kernel)

    return attend
