"""Decoding on a CPU in C++: a whole step in one call, and a prompt's attention.

A step of few rows should take what reading weights, keys and values once takes. If Python called
nine or more operations for each layer, a small model's step would take their calls' time as well.
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
from model import KVCache, Transformer, masked_attention


def use(model: Transformer, needed: float, free: float) -> None:
    """Decode in C++, if it gives what PyTorch does; else a line says why not.

    The model's blocks are fused, its linear layers all in 8 bits or none. needed: the bytes of its
    weights; free: those that were free before it was loaded.
    """
    c, dtype, what = model.config, model.embed.weight.dtype, "steps in C++ cannot be used here"
    try:
        if dtype not in native.DTYPES:
            raise ValueError(f"not in {str(dtype)[6:]}: use bfloat16 or float32")
        if not native.has_amx(dtype):
            attend = prompt_attention(dtype, c.heads // c.kv_heads, c.head_dim)
            steps.check_attention(attend, model, 30)
            model.attention = attend
        if free <= 3 * needed:  # the weights, a second copy, and as much to spare
            wanted = f"with a second copy of the weights they want {3 * needed / 1e9:.1f} GB"
            raise MemoryError(f"{wanted}, {free / 1e9:.1f} GB are free")
        check(model)
        model.step = Step(model)
    except Exception as error:  # noqa: BLE001 (of the compiler, of the system)
        steps.refuse(what, error)
        return
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 1 GB at the end of its heap, in blocks of up to 32 MB.

    Each step needs again what the last one freed, such as the probabilities of all words. The
    system would clear the pages first, which takes longer than computing with them (lab/SPEED.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD


# ----------------------------------------------------------------------------------------- a step


class Matrix(ctypes.Structure):  # these three are lab/step.cpp's, member by member
    _fields_ = [(name, c_void_p) for name in ("panels", "scale", "bias")]
    _fields_ += [("K", c_int64), ("N", c_int64)]


class Layer(ctypes.Structure):
    _fields_ = [(name, Matrix) for name in ("qkv", "o", "gate_up", "down")]
    _fields_ += [(name, c_void_p) for name in ("norm", "q_norm", "k_norm", "mlp_norm")]


class Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(Layer)), ("head", Matrix), ("norm", c_void_p)]
    _fields_ += [(name, c_int64) for name in ("count", "d", "H", "K", "h", "F")]
    _fields_ += [("eps", c_float), ("multiply", c_void_p), ("attend", c_void_p)]


class Step:
    """Transformer.step in C++ (lab/step.cpp), without gradients and without a module's hooks.

    The weights are laid out for its products: a second copy, made anew where they have changed in
    place (those made in inference mode do not tell). A row's bits depend on no other row, and not
    on how many there are: rows that are not in use are left out, and get zeros. With AMX in
    bfloat16 more than 16 rows are PyTorch's, all of them.
    """

    def __init__(self, model: Transformer):
        self.model, self.laid_out = model, LaidOut(model)
        few = native.has_amx(self.laid_out.dtype) and isinstance(model.lm_head, nn.Linear)
        self.most = 16 if few else None  # it was not timed there; few rows wait for memory

    def __getstate__(self) -> dict:  # a copy lays its own weights out
        return self.__dict__ | {"laid_out": None}

    def __call__(self, embeds: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        if self.most and len(embeds) > self.most:
            return Transformer.step(self.model, embeds, cache)
        if not self.laid_out or self.laid_out.changed():
            self.laid_out = None  # its memory is free
            self.laid_out = LaidOut(self.model)
        c, keys = self.model.config, cache.keys[0]
        rows = cache.rows[:, 0] if cache.live is None else cache.live.nonzero()[:, 0]
        positions, B = cache.lengths[rows], len(rows)
        alike = embeds.is_cpu and embeds.dtype == keys.dtype == self.laid_out.dtype
        if not alike or embeds.shape != (len(keys), c.d) or (positions >= cache.S).any():
            raise ValueError("embeddings or cache are unlike the model, or the cache is full")
        cache.lengths += 1
        x = embeds[rows].contiguous()
        cos, sin = self.model.rotation(positions[:, None], cache.S)
        new = embeds.new_empty if B == len(embeds) else embeds.new_zeros
        hidden, logits = new(embeds.shape), new(len(embeds), c.vocab_size, dtype=torch.float32)
        tensors = (x, rows, positions, cos, sin), cache.keys, cache.values, (hidden, logits)
        given, keys_at, values_at, out = ([t.data_ptr() for t in some] for some in tensors)
        Pointers = c_void_p * c.layers
        self.laid_out.run(
            *given, Pointers(*keys_at), Pointers(*values_at), *out, B, cache.S, *keys.stride()[:2]
        )
        return hidden, logits


class LaidOut:
    """A model as lab/step.cpp takes it, each matrix in panels of lab/products.cpp.

    ValueError for shapes that it does not compute, RuntimeError where it does not compile.
    """

    def __init__(self, model: Transformer):
        c, int8 = model.config, hasattr(model.lm_head, "scale")
        if c.head_dim % 8 or c.d % 2 or c.ffn % 2:
            found = f"{c.d} and {c.ffn}, and {c.head_dim}"
            raise ValueError(f"widths must be even, and heads multiples of 8: found {found}")
        self.dtype = model.embed.weight.dtype
        sizes = {"BFLOAT16": int(self.dtype == torch.bfloat16)}
        heads = {"G": c.heads // c.kv_heads, "WIDTH": c.head_dim}
        self.products = native.library("products", **sizes, T="int8_t" if int8 else "X")
        attention = native.library("attention", **sizes, **heads)
        self.kept: list[Tensor] = []  # what C++ has the addresses of
        self.versions: list[tuple[Tensor, int]] = []  # of weights, as they were laid out
        layers = (Layer * c.layers)()
        for place, block in enumerate(model.layers):
            a, m = block.self_attn, block.mlp
            matrices = a.qkv, a.o_proj, m.gate_up, m.down_proj
            norms = block.input_layernorm, a.q_norm, a.k_norm, block.post_attention_layernorm
            layers[place] = Layer(
                *(self.matrix(x) for x in matrices), *(self.address(x and x.weight) for x in norms)
            )
        kernels = (ctypes.cast(x.run, c_void_p) for x in (self.products, attention))
        head, norm = self.matrix(model.lm_head), self.address(model.norm.weight)
        numbers = c.layers, c.d, c.heads, c.kv_heads, c.head_dim, c.ffn, c.norm_eps
        self.whole = Model(layers, head, norm, *numbers, *kernels)
        self.step = native.library("step", **sizes).run
        self.step.restype, self.step.argtypes = None, [*10 * [c_void_p], *4 * [c_int64], c_int]

    def run(self, *arguments: int | ctypes.Array) -> None:
        self.step(ctypes.addressof(self.whole), *arguments, torch.get_num_threads())

    def changed(self) -> bool:
        """Whether a weight is another one by now, as by an adapter that was merged."""
        return any(W._version != version for W, version in self.versions)

    def address(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self.kept.append(x)
        return x.data_ptr()

    def matrix(self, layer: nn.Module) -> Matrix:
        W = layer.weight.detach()
        if not W.is_inference():  # one made in inference mode does not tell when it changes
            self.versions.append((W, W._version))
        tensors = in_panels(self.products, W), getattr(layer, "scale", None), layer.bias
        return Matrix(*(self.address(x) for x in tensors), *W.shape[::-1])


def in_panels(products: ctypes.CDLL, W: Tensor) -> Tensor:
    """W [N, K] as [ceil(N / C), K / P, C]: C rows each, P of their columns at a time as one number.

    What is not there is 0. products: lab/products.cpp, which knows C and P.
    """
    C, P = (c_int.in_dll(products, name).value for name in ("columns", "pairs"))
    N = len(W)
    W = F.pad(W, (0, 0, 0, -N % C)) if N % C else W
    W = W.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[P * W.itemsize])
    return W.view(-1, C, W.shape[1]).transpose(1, 2).contiguous()


@torch.inference_mode()
def check(model: Transformer) -> None:
    """ArithmeticError where a step in C++ and PyTorch's differ by more than rounding.

    In a small random model with the same kernels, whose panels, blocks and groups of rows are not
    all full; its rows stand in their first chunk of 256 positions, the second and the third.
    """
    dtype, generator = model.embed.weight.dtype, torch.Generator().manual_seed(0)
    c, G = model.config, model.config.heads // model.config.kv_heads
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
    if isinstance(model.lm_head, Int8Linear):
        exchange(small, Int8Linear)
    exact, step = copy.deepcopy(small).float(), Step(small)
    for rows, longest in (1, 700), (7, 700), (99, 7):
        lengths = torch.tensor([256, 3, 700] * 33)[:rows].clamp(max=longest)
        caches = [KVCache(x, rows, longest + 1) for x in (small, exact)]
        for own, theirs in zip(*(x.keys + x.values for x in caches)):
            own.copy_(3 * torch.randn(own.shape, generator=generator))
            theirs.copy_(own)
        for cache in caches:
            cache.reserve(longest + 1)
            cache.lengths.copy_(lengths)
        x = small.embed(torch.arange(rows))
        found, expected = step(x, caches[0]), Transformer.step(exact, x.float(), caches[1])
        for one, other in zip(found, expected):
            steps.compare("a step", one.to(dtype), other)


# -------------------------------------------------------------------------------------- a prompt


def prompt_attention(dtype: torch.dtype, G: int, h: int) -> Callable:
    """What stands in for model.masked_attention, for G query heads of width h to a KV head.

    PyTorch's takes more than half of the time of a prompt of 4,096 tokens (lab/SPEED.md).
    ValueError for what it does not compute, RuntimeError where it does not compile.
    """
    if h % 8:
        raise ValueError(f"heads must be multiples of 8: found {h}")
    sizes = {"BFLOAT16": int(dtype == torch.bfloat16), "G": G, "WIDTH": h}
    run = native.library("prefill", **sizes).run
    run.restype, run.argtypes = None, [*5 * [c_void_p], *5 * [c_int64], c_int]

    def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """As model.masked_attention, but with sums in float32, and k and v of the same strides.

        Where the processor multiplies bfloat16 in pairs, a softmax's weights are rounded to it.
        """
        if q.shape[1] == 1:  # for a step it would lay all keys and values out
            return masked_attention(q, k, v, positions, mask)
        if q.requires_grad or not q.dtype == k.dtype == dtype:
            raise ValueError("no gradients, and no other dtype than the model had")
        q = q.contiguous()
        (B, T), K, y = q.shape[:2], k.shape[1], torch.empty_like(q)
        tensors = (x.data_ptr() for x in (q, k, v, positions, y))
        run(*tensors, B, T, K, *k.stride()[:2], torch.get_num_threads())
        return y

    return attend
