"""Decoding on a CPU in C++: a whole step in one call, and a prompt's attention.

A step of few rows should take what reading weights, keys and values once takes. Called one by one,
a model's operations take the time of calling them as well: some 300 for a small model.
"""

import copy
import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab import native, steps
from lab.fused import fuse
from lab.linear import Int8Linear, exchange
from model import KVCache, Transformer


def use(model: Transformer, room: bool) -> None:
    """Decode in C++, if it gives what PyTorch does; else a line says why not.

    The model's blocks are fused, its linear layers all in 8 bits or none. room: for a second copy
    of the weights.
    """
    c, dtype = model.config, model.embed.weight.dtype
    try:
        step = Step(model)
        if not native.has_amx(dtype):  # with it PyTorch's attention of a prompt was not timed
            attend = prompt_attention(dtype, c.heads // c.kv_heads, c.head_dim)
            steps.check_attention(attend, model, 30)
            model.attention = attend
        if not room:
            raise MemoryError("no room for a second copy of the weights")
        check(model)
        model.step = step
        keep_freed_memory()
    except Exception as error:  # noqa: BLE001 (of the compiler, of the system)
        steps.refuse("steps in C++ cannot be used here, PyTorch's are", error)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, 1 GB at most, in blocks of up to 32 MB.

    Each step needs again what the last one freed, such as a concept token's probabilities of all
    words. The system's pages are cleared first, which takes longer than the step's arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other libraries have none
    if mallopt:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


# ----------------------------------------------------------------------------------------- a step


class Panels(ctypes.Structure):  # these three are lab/step.cpp's, member by member
    _fields_ = [("panels", c_void_p), ("scale", c_void_p), ("bias", c_void_p)]
    _fields_ += [("K", c_int64), ("N", c_int64)]


class Layer(ctypes.Structure):
    _fields_ = [(name, Panels) for name in ("qkv", "o", "gate_up", "down")]
    _fields_ += [(name, c_void_p) for name in ("norm", "q_norm", "k_norm", "mlp_norm")]


class Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(Layer)), ("head", Panels), ("norm", c_void_p)]
    _fields_ += [(name, c_int64) for name in ("count", "d", "H", "K", "h", "F")]
    _fields_ += [("eps", c_float), ("multiply", c_void_p), ("attend", c_void_p)]


class Step:
    """Transformer.step in C++ (lab/step.cpp).

    The weights are taken as they are at the first step, laid out for the products: a second copy.
    A row's bits depend on no other row, and not on how many there are. ValueError for what it does
    not compute, CalledProcessError where it does not compile.
    """

    def __init__(self, model: Transformer):
        c, dtype = model.config, model.embed.weight.dtype
        if dtype not in native.DTYPES or c.head_dim % 8 or c.d % 2 or c.ffn % 2:
            raise ValueError(f"none for {dtype}, widths {c.d} and {c.ffn}, heads of {c.head_dim}")
        self.model, self.laid_out = model, None
        # PyTorch's products of many rows are faster there.
        self.most = 16 if native.has_amx(dtype) and isinstance(model.lm_head, nn.Linear) else None

    def __getstate__(self) -> dict:  # a copy lays its own weights out
        return self.__dict__ | {"laid_out": None}

    def __call__(self, embeds: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        c, B, keys = self.model.config, len(embeds), cache.keys[0]
        if self.most and B > self.most:
            return Transformer.step(self.model, embeds, cache)
        assert embeds.dtype == keys.dtype == self.model.embed.weight.dtype
        self.laid_out = self.laid_out or LaidOut(self.model)
        positions = cache.lengths[:, None].clone()
        cache.lengths += 1
        cos, sin = self.model.rotation(positions, cache.S)
        x = embeds.clone(memory_format=torch.contiguous_format)
        hidden, logits = torch.empty_like(x), x.new_empty(B, c.vocab_size, dtype=torch.float32)
        tensors = (x, cos, sin, positions), cache.keys, cache.values, (hidden, logits)
        given, keys_at, values_at, out = ([t.data_ptr() for t in some] for some in tensors)
        Pointers = c_void_p * c.layers
        self.laid_out.run(
            *given, Pointers(*keys_at), Pointers(*values_at), *out, B, cache.S, *keys.stride()[:2]
        )
        return hidden, logits


class LaidOut:
    """A model's weights as lab/step.cpp takes them, each matrix in panels of lab/products.cpp."""

    def __init__(self, model: Transformer):
        c, dtype, int8 = model.config, model.embed.weight.dtype, hasattr(model.lm_head, "scale")
        sizes = {"BFLOAT16": int(dtype == torch.bfloat16)}
        heads = {"G": c.heads // c.kv_heads, "WIDTH": c.head_dim}
        self.products = native.library("products", **sizes, T="int8_t" if int8 else "X")
        attention = native.library("attention", **sizes, **heads)
        self.kept: list[Tensor] = []  # what C++ has the addresses of
        layers = (Layer * c.layers)()
        for place, block in enumerate(model.layers):
            a, m = block.self_attn, block.mlp
            matrices = a.qkv, a.o_proj, m.gate_up, m.down_proj
            norms = block.input_layernorm, a.q_norm, a.k_norm, block.post_attention_layernorm
            layers[place] = Layer(
                *(self.panels(x) for x in matrices), *(self.address(x and x.weight) for x in norms)
            )
        kernels = (ctypes.cast(x.run, c_void_p) for x in (self.products, attention))
        head, norm = self.panels(model.lm_head), self.address(model.norm.weight)
        numbers = c.layers, c.d, c.heads, c.kv_heads, c.head_dim, c.ffn, c.norm_eps
        self.whole = Model(layers, head, norm, *numbers, *kernels)
        self.step = native.library("step", **sizes).run
        self.step.restype, self.step.argtypes = None, [*9 * [c_void_p], *4 * [c_int64], c_int]

    def run(self, *arguments: int | ctypes.Array) -> None:
        self.step(ctypes.addressof(self.whole), *arguments, torch.get_num_threads())

    def address(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self.kept.append(x)
        return x.data_ptr()

    def panels(self, layer: nn.Module) -> Panels:
        panels = in_panels(self.products, layer.weight.detach())
        tensors = panels, getattr(layer, "scale", None), layer.bias
        return Panels(*(self.address(x) for x in tensors), *layer.weight.shape[::-1])


def in_panels(products: ctypes.CDLL, W: Tensor) -> Tensor:
    """W [N, K] as [ceil(N / C), K / P, C, P]: each of C rows, P of their columns at a time.

    What is not there is 0. products: lab/products.cpp, which knows C and P.
    """
    C, P = (c_int.in_dll(products, name).value for name in ("columns", "pairs"))
    N, K = W.shape
    return F.pad(W, (0, 0, 0, -N % C)).view(-1, C, K // P, P).transpose(1, 2).contiguous()


@torch.inference_mode()
def check(model: Transformer) -> None:
    """ArithmeticError where a step in C++ and PyTorch's differ by more than rounding.

    In a small random model of the same kind, whose panels, blocks and groups of rows are not all
    full; its rows stand in their first chunk of 256 positions, the second and the third.
    """
    dtype, generator = model.embed.weight.dtype, torch.Generator().manual_seed(0)
    c = replace(model.config, layers=2, d=304, ffn=100, vocab_size=300, tied=False)
    with torch.device("meta"):
        small = Transformer(c)
    small.to_empty(device="cpu")
    for x in small.parameters():  # norms and biases, and all products, of about 1
        size = x.shape[-1] ** -0.5 if x.dim() > 1 else 1
        x.copy_(size * torch.randn(x.shape, generator=generator))
    small = small.to(dtype).requires_grad_(False)
    for block in small.layers:
        fuse(block)
    if isinstance(model.lm_head, Int8Linear):
        exchange(small, Int8Linear)
    exact, step = copy.deepcopy(small).float(), Step(small)
    for rows in (1, 7, 16):
        lengths = torch.tensor([255, 3, 700] * 6)[:rows]
        caches = [KVCache(x, rows, 800) for x in (small, exact)]
        for own, theirs in zip(*(x.keys + x.values for x in caches)):
            own.copy_(3 * torch.randn(own.shape, generator=generator))
            theirs.copy_(own)
        for cache in caches:
            cache.reserve(701)
            cache.lengths.copy_(lengths)
        x = small.embed(torch.arange(rows))
        found, expected = step(x, caches[0]), Transformer.step(exact, x.float(), caches[1])
        for one, other in zip(found, expected):
            steps.compare("a step", one.to(dtype), other)


# -------------------------------------------------------------------------------------- a prompt


def prompt_attention(dtype: torch.dtype, G: int, h: int) -> Callable:
    """What stands in for model.masked_attention, for G query heads of width h to a KV head.

    In a long prompt attention takes most of the time, though it has the smaller part of the
    arithmetic (lab/prefill.cpp). ValueError for what it does not compute, CalledProcessError where
    it does not compile.
    """
    if dtype not in native.DTYPES or h % 8:
        raise ValueError(f"none for {dtype} and heads of width {h}")
    sizes = {"BFLOAT16": int(dtype == torch.bfloat16), "G": G, "WIDTH": h}
    run = native.library("prefill", **sizes).run
    run.restype, run.argtypes = None, [*5 * [c_void_p], *5 * [c_int64], c_int]

    def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """As model.masked_attention, but with sums in float32, and k and v of the same strides.

        Where the processor multiplies bfloat16 in pairs, a softmax's weights are rounded to it.
        """
        assert q.dtype == k.dtype == dtype
        q = q.contiguous()
        (B, T), K, y = q.shape[:2], k.shape[1], torch.empty_like(q)
        tensors = (x.data_ptr() for x in (q, k, v, positions, y))
        run(*tensors, B, T, K, *k.stride()[:2], torch.get_num_threads())
        return y

    return attend
