"""Linear layers for decoding: weights laid out for a CPU's products, or kept in 8 bits."""

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lab import native


def exchange(module: nn.Module, layer: Callable[[nn.Module], nn.Module]) -> None:
    """Every linear layer inside becomes another one."""
    for name, child in list(module.named_children()):
        if isinstance(child, (nn.Linear, Int8Linear)):
            setattr(module, name, layer(child))
        else:
            exchange(child, layer)


def bytes_read(module: nn.Module) -> int:
    """Bytes of weights that all linear layers inside read for a product of few rows."""
    if isinstance(module, (nn.Linear, Int8Linear, PanelLinear)):
        own = *module.parameters(recurse=False), *module.buffers(recurse=False)
        return sum(x.nbytes for x in own)
    return sum(bytes_read(child) for child in module.children())


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decoding is faster with weights that are laid out for oneDNN's products."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.float32:
        return torch.backends.mkldnn.is_available()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Linear):
    """x [..., n] -> [..., m] on a CPU: in decoding with the weight laid out for oneDNN's product.

    PyTorch's own product lays it out each time, or is slower. In float32 a product of one row on
    one thread stays PyTorch's.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(1, 1, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.packs = packs(self.weight.device, self.weight.dtype)
        self.packed, self.version = None, None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        one = x.dtype == torch.float32 and rows == 1 and torch.get_num_threads() == 1
        decoding = self.packs and torch.is_inference_mode_enabled()
        # A weight made in inference mode does not tell when it changes.
        if not decoding or self.weight.is_inference() or one:
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


class PanelLinear(nn.Module):
    """x [..., K] -> [..., N] on a CPU by lab/products.cpp, with the weight in panels; no gradients.

    It takes the place of a linear layer, in 8 bits or not, and keeps no other weight. With AMX it
    keeps that layer, too, and leaves products of more than `few` rows to it: those are arithmetic,
    which AMX is for, while fewer rows wait for memory. It was not timed with AMX.
    """

    few = 16  # rows

    def __init__(self, linear: nn.Linear | Int8Linear):
        super().__init__()
        W, scale, bias = linear.weight.detach(), getattr(linear, "scale", None), linear.bias
        self.out_features, self.in_features = W.shape
        self.dtype = W.dtype if scale is None else scale.dtype
        self.many = linear if native.has_amx(self.dtype) else None
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias if bias is None else bias.detach())
        self.register_buffer("panels", in_panels(self.products(), W))

    def products(self) -> ctypes.CDLL:  # no attribute: a library cannot be copied
        kind = "X" if self.scale is None else "int8_t"
        library = native.library("products", BFLOAT16=int(self.dtype == torch.bfloat16), T=kind)
        library.product.restype = None
        library.product.argtypes = [*5 * [c_void_p], *3 * [c_int64], c_int]
        return library

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if self.many is not None and rows > self.few:
            return self.many(x)
        alike = x.is_cpu and x.dtype == self.dtype and x.shape[-1] == self.in_features
        if not alike or x.requires_grad:
            wanted = f"[..., {self.in_features}] in {self.dtype} on a CPU"
            raise ValueError(f"weights in panels take {wanted}, without gradients")
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], self.out_features)
        tensors = x, self.panels, self.scale, self.bias, y
        addresses = (t if t is None else t.data_ptr() for t in tensors)
        sizes = rows, self.in_features, self.out_features, torch.get_num_threads()
        self.products().product(*addresses, *sizes)
        return y


def in_panels(products: ctypes.CDLL, W: Tensor) -> Tensor:
    """W [N, K] as [ceil(N / C), K / P, C]: C rows each, P of their columns at a time as one number.

    What is not there is 0. products: lab/products.cpp, which knows C and P.
    """
    C, P = (c_int.in_dll(products, name).value for name in ("columns", "pairs"))
    W = W.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[P * W.itemsize])
    (N, K), full = W.shape, len(W) // C
    panels = W.new_zeros(-(-N // C), K, C)
    panels[:full] = W[: full * C].view(full, C, K).transpose(1, 2)
    panels[full:, :, : N - full * C] = W[full * C :].T
    return panels
