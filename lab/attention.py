"""Attention of a decoding step on a CPU in C++: lab/attention.cpp, compiled for a model's heads.

In a long thought keys and values are much of what a step reads, and PyTorch's kernel takes far
longer than reading them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lab import native


def build(dtype: torch.dtype, G: int, h: int) -> Callable:
    """`attend` for G query heads of width h to a KV head.

    ValueError for what it does not compute, CalledProcessError where it does not compile.
    """
    if dtype not in native.DTYPES or h % 8:
        raise ValueError(f"none for {dtype} and heads of width {h}")
    _, kernel = native.build("attention", BFLOAT16=int(dtype == torch.bfloat16), G=G, WIDTH=h)

    def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, S: int) -> Tensor:
        """KVCache.attend for one query per row, [B, 1, H, h] -> [B, 1, H, h]; sums are float32.

        Where the processor multiplies bfloat16 in pairs, a softmax's weights are rounded to it.
        keys, values [B, K, capacity, h], of strides alike; positions, LongTensor [B, 1] < S: the
        last one that each row sees.
        """
        return torch.ops.lab.attend_on_cpu(q, keys, values, positions, S, kernel)

    return attend
