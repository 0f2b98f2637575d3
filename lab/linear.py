"""Linear layers for decoding: weights laid out for a CPU's products, or kept in 8 bits."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def exchange(module: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> None:
    """Every linear layer inside becomes another one."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, layer(child))
        else:
            exchange(child, layer)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decoding is faster with weights that are laid out for oneDNN's products."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.float32:
        return torch.backends.mkldnn.is_available()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Linear):
    """x [..., n] -> [..., m] on a CPU: in decoding with the weight laid out for oneDNN's product.

    PyTorch lays it out in every product otherwise, which takes longer than a product of few rows.
    In float32 it pays for 2 to 256 rows, and for one on several threads (lab/SPEED.md); in another
    dtype where `packs` says so.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(1, 1, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packs = packs(self.weight.device, self.weight.dtype)
        self.packed, self.version = None, None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        few = rows <= 256 and (rows > 1 or torch.get_num_threads() > 1)
        decoding = self.packs and torch.is_inference_mode_enabled()
        # A weight made in inference mode does not tell when it changes.
        if not decoding or self.weight.is_inference() or x.dtype == torch.float32 and not few:
            return F.linear(x, self.weight, self.bias)
        if self.version != self.weight._version:  # LoRA changes it between two decodings
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self.version = self.weight._version
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def __getstate__(self) -> dict:  # what is packed cannot be copied; a copy packs for itself
        return self.__dict__ | {"packed": None, "version": None}


class Int8Linear(nn.Module):
    """x [..., n] -> [..., m] from a weight in 8 bits, int8 [m, n], with one scale for each row.

    The scale is rounded first, and the weight then to its multiples, so that only the second
    rounding is an error: at most half a scale, 1/254 of the row's largest weight. Decoding on a CPU
    and `product` multiply the integers as they are; elsewhere, and where so many rows are decoded
    that it is faster, the weight is made again for each product, with one rounding more.
    """

    product: Callable | None = None  # lab/kernels.py's: of 64 rows at most

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1)
        if hasattr(linear, "over"):  # a row lies on several ranks (lab/parallel.py)
            dist.all_reduce(largest, dist.ReduceOp.MAX, linear.over)
        scale = (largest / 127).clamp(min=1e-6).to(linear.weight.dtype)
        integers = (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        # Not whether inference mode is on: asked for that, a compiled step falls into pieces.
        constant, row = not x.requires_grad, x.shape[-1]
        if self.product and constant and x.numel() <= 64 * row:
            return self.product(x, self.weight, self.scale, self.bias)
        # PyTorch's kernel takes 16 numbers at once, and reads beyond rows that end in between.
        if x.device.type == "cpu" and constant and x.numel() <= 24 * row and row % 16 == 0:
            rows = x.reshape(-1, x.shape[-1])
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight * self.scale[:, None], self.bias)
