"""Attention on a CPU in C++, compiled for a model's heads: of a decoding step, and of a prompt.

In a long thought keys and values are much of what a step reads, and PyTorch's kernel takes far
longer than reading them (lab/attention.cpp). In a long prompt attention is most of what there is to
compute, and PyTorch's kernel computes slowly (lab/prefill.cpp).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lab import native
from model import masked_attention


def build(dtype: torch.dtype, G: int, h: int) -> Callable:
    """model.masked_attention's like, for G query heads of width h to a KV head.

    ValueError for what it does not compute, CalledProcessError where it does not compile.
    """
    if dtype not in native.DTYPES or h % 8:
        raise ValueError(f"none for {dtype} and heads of width {h}")
    sizes = {"BFLOAT16": int(dtype == torch.bfloat16), "G": G, "WIDTH": h}
    tiles = native.has_tiles(dtype)
    step, prompt = (native.build(name, **sizes)[1] for name in ("attention", "prefill"))

    def attend(q: Tensor, keys: Tensor, values: Tensor, at: Tensor, mask: Tensor) -> Tensor:
        """As model.masked_attention; sums are float32.

        Where the processor multiplies bfloat16 in pairs, a softmax's weights are rounded to it.
        keys and values have the same strides; at [B, T] is the last position that each query sees.
        """
        T, S = q.shape[1], mask.shape[-1]  # S as a size of a tensor: compiled once for all
        if T > 1 and tiles:
            return masked_attention(q, keys, values, at, mask)
        return torch.ops.lab.attend_on_cpu(q, keys, values, at, S, step if T == 1 else prompt)

    return attend
