"""The matrix products of a decoding step on a CPU in C++: lab/products.cpp, for weights laid out.

A step of few rows should take what reading the weights once takes. oneDNN's products take longer,
and so do PyTorch's with 8 bits for several rows.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab import native


class Panels(nn.Module):
    """x [..., K] -> x Wᵀ + b [..., N] as a linear layer, whose weight is laid out in panels.

    panels [ceil(N / C), K / P, C, P]: each of C rows of the weight, P columns at a time; what is
    not there is 0. layer: a linear.PackedLinear, or a linear.Int8Linear for rows in the dtype of
    its scale. ValueError for float16, CalledProcessError where it does not compile.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        W, scale = layer.weight, getattr(layer, "scale", None)
        rows = W.dtype if scale is None else scale.dtype
        if rows not in native.DTYPES:
            raise ValueError(f"none for {rows}")
        sizes = {"T": "X" if scale is None else "int8_t", "BFLOAT16": int(rows == torch.bfloat16)}
        library, self.kernel = native.build("products", **sizes)
        C, P = (ctypes.c_int.in_dll(library, name).value for name in ("columns", "pairs"))
        self.N, K = W.shape
        self.missing = -K % P
        W = F.pad(W.detach(), (0, self.missing, 0, -self.N % C)).view(-(-self.N // C), C, -1, P)
        self.register_buffer("panels", W.transpose(1, 2).contiguous(), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self.missing)) if self.missing else x
        return torch.ops.lab.multiply_on_cpu(
            x, self.panels, self.scale, self.bias, self.N, self.kernel
        )
