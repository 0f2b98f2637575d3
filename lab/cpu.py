"""Prompts and steps on a CPU in C++: the whole transformer in one call (lab/layers.cpp).

A step of few rows should take what reading weights, keys and values once takes. If Python called
nine or more operations for each layer, a small model's step would take their calls' time as well.
"""

import copy
import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import replace

import torch
from torch import Tensor

from lab import native, steps
from lab.fused import fuse
from lab.linear import Int8Linear, PanelLinear, exchange
from model import Config, KVCache, Transformer


def usable(c: Config, dtype: torch.dtype, quantize: str | None, needed: float, free: float) -> bool:
    """Whether C++ gives what PyTorch does for such a model; else a line says why not.

    needed: the bytes of its weights, of which there are several copies with AMX; free: the bytes
    of memory that are free.
    """
    try:
        if dtype not in native.DTYPES:
            raise ValueError(f"not in {str(dtype)[6:]}: use bfloat16 or float32")
        copies = 3 if quantize else 4  # PyTorch's (two in bfloat16), ours, and as much to spare
        if native.has_amx(dtype) and free <= copies * needed:
            wanted = f"with AMX copies of the weights want {copies * needed / 1e9:.1f} GB"
            raise MemoryError(f"{wanted}, {free / 1e9:.1f} GB are free")
        check(c, dtype, quantize)
    except Exception as error:  # noqa: BLE001 (of the compiler, of the system)
        steps.refuse("prompts and steps in C++ cannot be used here", error)
        return False
    return True


def use(model: Transformer) -> None:
    """Compute prompts and steps in C++ from now on.

    The model's blocks are fused, its linear layers PanelLinear.
    """
    model.__class__, model.table = InCpp, Table(model)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 1 GB at the end of its heap, in blocks of up to 32 MB.

    Each step needs again what the last one freed, such as the probabilities of all words. The
    system would clear the pages first, which takes longer than computing with them (lab/SPEED.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


# -------------------------------------------------------------------------------------- the layers


class Matrix(ctypes.Structure):  # these three are lab/layers.cpp's, member by member
    _fields_ = [(name, c_void_p) for name in ("panels", "scale", "bias")]
    _fields_ += [("K", c_int64), ("N", c_int64)]


class Layer(ctypes.Structure):
    _fields_ = [(name, Matrix) for name in ("qkv", "o", "gate_up", "down")]
    _fields_ += [(name, c_void_p) for name in ("norm", "q_norm", "k_norm", "mlp_norm")]


class Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(Layer)), ("head", Matrix), ("norm", c_void_p)]
    _fields_ += [(name, c_int64) for name in ("count", "d", "H", "K", "h", "F")]
    _fields_ += [("eps", c_float)]
    _fields_ += [(name, c_void_p) for name in ("multiply", "attend", "prefill")]


class InCpp(Transformer):
    """`step`, and `forward` with a cache, in C++, without gradients.

    A row's bits depend on no other row, and not on how many there are: steps leave out rows that
    are not in use, whose hidden states and logits are 0. With AMX in bfloat16 only steps of up to
    PanelLinear.few rows are C++ as a whole.
    """

    table: "Table | None"

    def __getstate__(self) -> dict:  # a copy has addresses of its own
        return self.__dict__ | {"table": None}

    def step(self, embeds: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        if self.lm_head.many is not None and len(embeds) > PanelLinear.few:
            return super().step(embeds, cache)
        rows = cache.rows[:, 0] if cache.live is None else cache.live.nonzero()[:, 0]
        new = embeds.new_empty if len(rows) == len(embeds) else embeds.new_zeros
        hidden = new(embeds.shape)
        logits = new(len(embeds), self.config.vocab_size, dtype=torch.float32)
        self.go_on(embeds[:, None], rows, cache, hidden, logits)
        return hidden, logits

    def forward(self, embeds: Tensor, cache: KVCache | None = None) -> Tensor:
        if cache is None or self.lm_head.many is not None:
            return super().forward(embeds, cache)
        hidden = embeds.new_empty(embeds.shape)
        self.go_on(embeds, cache.rows[:, 0], cache, hidden)
        return hidden

    def go_on(
        self,
        embeds: Tensor,
        rows: Tensor,
        cache: KVCache,
        hidden: Tensor,
        logits: Tensor | None = None,
    ) -> None:
        """Rows [n] of the cache go on by theirs of embeds [B, T, d].

        Their hidden states are written to hidden [B, T, d], a step's logits to logits [B, V].
        """
        self.table = self.table or Table(self)
        keys, (B, T, d) = cache.keys[0], embeds.shape
        alike = embeds.is_cpu and embeds.dtype == keys.dtype == self.table.dtype
        t = torch.arange(T)
        positions = cache.lengths[rows, None] + t
        if not alike or (B, d) != (len(keys), self.config.d) or (positions >= cache.S).any():
            raise ValueError("embeddings or cache are unlike the model, or the cache is full")
        if embeds.requires_grad:
            raise ValueError("no gradients are computed in C++")
        cache.lengths += T
        cache.empty = False
        rotation = self.rotation(positions)
        places = (rows[:, None] * T + t).flatten()
        given = embeds[rows].contiguous(), rows.repeat_interleave(T), positions, *rotation
        out = places.data_ptr(), hidden.data_ptr(), None if logits is None else logits.data_ptr()
        layers = pointers(cache.keys), pointers(cache.values)
        sizes = len(rows), T, cache.S, *keys.stride()[:2]
        self.table.run(*pointers(given), *layers, *out, *sizes)


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


class Table:
    """A model's weights as lab/layers.cpp finds them, and its kernels.

    RuntimeError where those do not compile.
    """

    def __init__(self, model: Transformer):
        c, self.dtype = model.config, model.embed.weight.dtype
        bfloat16 = int(self.dtype == torch.bfloat16)
        self.kept: list[Tensor] = []  # what C++ has the addresses of
        layers = (Layer * c.layers)()
        for place, block in enumerate(model.layers):
            a, m = block.self_attn, block.mlp
            matrices = a.qkv, a.o_proj, m.gate_up, m.down_proj
            norms = block.input_layernorm, a.q_norm, a.k_norm, block.post_attention_layernorm
            layers[place] = Layer(
                *(self.matrix(x) for x in matrices), *(self.address(x and x.weight) for x in norms)
            )
        sizes = {"BFLOAT16": bfloat16, "G": c.heads // c.kv_heads, "WIDTH": c.head_dim}
        attention = (native.library(name, **sizes) for name in ("attention", "prefill"))
        kernels = (ctypes.cast(x.run, c_void_p) for x in (model.lm_head.products(), *attention))
        head, norm = self.matrix(model.lm_head), self.address(model.norm.weight)
        numbers = c.layers, c.d, c.heads, c.kv_heads, c.head_dim, c.ffn, c.norm_eps
        self.whole = Model(layers, head, norm, *numbers, *kernels)
        self.layers = native.library("layers", BFLOAT16=bfloat16).run
        self.layers.restype, self.layers.argtypes = None, [*11 * [c_void_p], *5 * [c_int64], c_int]

    def run(self, *arguments: int | ctypes.Array | None) -> None:
        self.layers(ctypes.addressof(self.whole), *arguments, torch.get_num_threads())

    def address(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self.kept.append(x.detach())  # its memory, even if the parameter gets another
        return x.data_ptr()

    def matrix(self, m: PanelLinear) -> Matrix:
        tensors = m.panels, m.scale, m.bias
        return Matrix(*(self.address(x) for x in tensors), m.in_features, m.out_features)


@torch.inference_mode()
def check(c: Config, dtype: torch.dtype, quantize: str | None) -> None:
    """ArithmeticError where prompts or steps in C++ and PyTorch's differ by more than rounding.

    In a small random model with the kernels of one of c, whose panels, blocks and groups of rows
    are not all full; its rows stand in their first chunk of 256 positions, the second and the
    third. ValueError for shapes that C++ does not compute.
    """
    if c.head_dim % 8 or c.d % 2 or c.ffn % 2:
        found = f"{c.d} and {c.ffn}, and {c.head_dim}"
        raise ValueError(f"widths must be even, and heads multiples of 8: found {found}")
    G, generator = c.heads // c.kv_heads, torch.Generator().manual_seed(0)
    c = replace(c, layers=2, d=304, ffn=100, vocab_size=300, tied=False, heads=2 * G, kv_heads=2)
    with torch.device("meta"):
        small = Transformer(c)
    small.to_empty(device="cpu")
    for x in small.parameters():  # norms and biases, and all products, of about 1
        size = x.shape[-1] ** -0.5 if x.dim() > 1 else 1
        x.copy_(size * torch.randn(x.shape, generator=generator))
    small = small.to(dtype).requires_grad_(False)
    for block in small.layers:
        fuse(block)
    if quantize:
        exchange(small, Int8Linear)
    exact = copy.deepcopy(small).float()
    exchange(small, PanelLinear)
    small.__class__, small.table = InCpp, Table(small)
    for rows, longest in (1, 700), (7, 700), (99, 7):
        lengths = torch.tensor([256, 3, 700] * 33)[:rows].clamp(max=longest)
        caches = [KVCache(x, rows, longest + 31) for x in (small, exact)]
        for own, theirs in zip(*(x.keys + x.values for x in caches)):
            own.copy_(3 * torch.randn(own.shape, generator=generator))
            theirs.copy_(own)
        for cache in caches:
            cache.reserve(longest + 31)
            cache.lengths.copy_(lengths)
        x = small.embed(torch.arange(30 * rows).view(rows, 30) % 300)
        found = *small.step(x[:, 0], caches[0]), small(x, caches[0])
        x = x.float()
        expected = *exact.step(x[:, 0], caches[1]), exact(x, caches[1])
        for what, one, other in zip(("a step", "a step", "a prompt"), found, expected):
            steps.compare(what, one.to(dtype), other)
