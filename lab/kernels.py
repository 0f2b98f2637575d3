"""Triton kernels of decoding on CUDA: attention of one query per row, and products in 8 bits.

`lab/steps.py` plugs them in where Triton is there and they compute what PyTorch does. A grid
depends on shapes alone, so that a step can be recorded as a CUDA graph; to torch.compile a kernel
is one opaque operation, so that a compiled step runs the same code. Nothing is tuned at run time:
two runs give the same bits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from lab.steps import compare
from model import masked_attention

CHUNK = 256  # positions of a program, at any length: a row's bits depend on no other row
MOST = 64  # rows of a product in 8 bits; with more, reading the weights is not what takes long

# ---------------------------------------------------------------------------------------- attention


@triton.jit
def attend_chunk(
    q,  # [B, 1, H, h], with strides
    keys,  # [B, K, capacity, h], with strides
    values,  # as keys
    positions,  # int64 [B, 1]: the last one that a row sees
    parts,  # float32 [chunks, B, H, h]: attention to each chunk alone
    lse,  # float32 [chunks, B, H]: the logarithm of its sum of exponentials
    q_row,
    q_head,
    kv_row,
    kv_head,
    kv_n,
    h: tl.constexpr,
    G: tl.constexpr,  # query heads of a KV head
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,  # positions at once
    HEADS: tl.constexpr,  # G and h, made large enough for tl.dot
    WIDTH: tl.constexpr,
):
    """The query heads of one KV head over one chunk of a row's positions, none behind its last."""
    # In 64 bits: a cache may have more than 2^31 numbers.
    row, head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    last = tl.load(positions + row).to(tl.int32)
    first = chunk * CHUNK
    if first > last:
        return
    g, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    heads, wide = head * G + g, d < h
    mine = (g < G)[:, None] & wide[None, :]
    x = tl.load(q + row * q_row + heads[:, None] * q_head + d[None, :], mask=mine, other=0.0)
    keys += row * kv_row + head.to(tl.int64) * kv_head
    values += row * kv_row + head.to(tl.int64) * kv_head
    m = tl.full([HEADS], -float("inf"), tl.float32)  # the largest score so far
    total = tl.zeros([HEADS], tl.float32)
    y = tl.zeros([HEADS, WIDTH], tl.float32)
    # Every block has a position to be seen: m is a number after the first one.
    for start in range(first, tl.minimum(first + CHUNK, last + 1), BLOCK):
        n = start + tl.arange(0, BLOCK)
        seen = n <= last
        there = seen[:, None] & wide[None, :]
        k = tl.load(keys + n[:, None] * kv_n + d[None, :], mask=there, other=0.0)
        v = tl.load(values + n[:, None] * kv_n + d[None, :], mask=there, other=0.0)
        s = tl.dot(x, tl.trans(k), input_precision="ieee") * h**-0.5
        s = tl.where(seen[None, :], s, -float("inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p, decay = tl.exp(s - new[:, None]), tl.exp(m - new)
        y = y * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(p, 1)
        m = new
    H = tl.num_programs(1) * G
    at = (chunk * tl.num_programs(0) + row) * H + heads
    tl.store(lse + at, m + tl.log(total), mask=g < G)
    tl.store(parts + at[:, None] * h + d[None, :], y / total[:, None], mask=mine)


@triton.jit
def merge_chunks(
    parts,
    lse,
    positions,
    out,  # [B, 1, H, h]
    h: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,  # chunks at once
    WIDTH: tl.constexpr,
):
    """One query head's chunks, weighted by their sums of exponentials."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, every = row * tl.num_programs(1) + head, tl.num_programs(0) * tl.num_programs(1)
    chunks = tl.load(positions + row).to(tl.int32) // CHUNK + 1
    d = tl.arange(0, WIDTH)
    m, total, y = -float("inf"), 0.0, tl.zeros([WIDTH], tl.float32)
    for start in range(0, chunks, TILE):
        c = start + tl.arange(0, TILE)
        place, there = at + c * every, c < chunks
        s = tl.load(lse + place, mask=there, other=-float("inf"))
        x = tl.load(
            parts + place[:, None] * h + d[None, :],
            mask=there[:, None] & (d < h)[None, :],
            other=0.0,
        )
        new = tl.maximum(m, tl.max(s, 0))
        w, decay = tl.exp(s - new), tl.exp(m - new)
        y = y * decay + tl.sum(w[:, None] * x, 0)
        total = total * decay + tl.sum(w, 0)
        m = new
    tl.store(out + at * h + d, y / total, mask=d < h)


def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """What stands in for model.masked_attention, of which prompts, several queries, remain."""
    if q.shape[1] > 1:
        return masked_attention(q, k, v, positions, mask)
    return attend_one(q, k, v, positions, mask.shape[-1])


@torch.library.custom_op("lab::attend", mutates_args=())
def attend_one(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, S: int) -> Tensor:
    """[B, 1, H, h] -> [B, 1, H, h], contiguous.

    keys, values [B, K, capacity, h]; positions, LongTensor [B, 1] < S: the last one that each row
    sees. Flash-Decoding (Dao et al., 2023): chunks of positions in parallel, merged by their sums
    of exponentials. In float32, but that 16-bit values are weighed by a softmax in 16 bits.
    """
    (B, _, H, h), K, chunks = q.shape, keys.shape[1], triton.cdiv(S, CHUNK)
    parts = q.new_empty(chunks, B, H, h, dtype=torch.float32)
    lse = q.new_empty(chunks, B, H, dtype=torch.float32)
    out, strides = q.new_empty(q.shape), (q.stride(0), q.stride(2), *keys.stride()[:3])
    WIDTH, HEADS = (max(16, triton.next_power_of_2(n)) for n in (h, H // K))
    BLOCK = 128 // q.element_size()  # three of keys, and of values, fit on every GPU
    with torch.cuda.device_of(q):
        attend_chunk[(B, K, chunks)](
            *(q, keys, values, positions, parts, lse, *strides),
            *(h, H // K, CHUNK, BLOCK, HEADS, WIDTH),
            num_warps=4,
            num_stages=3,
        )
        merge_chunks[(B, H)](parts, lse, positions, out, h, CHUNK, 32, WIDTH, num_warps=4)
    return out


@attend_one.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, S: int) -> Tensor:
    return q.new_empty(q.shape)


# -------------------------------------------------------------------------------- weights in 8 bits


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x,  # [rows, n]
    weight,  # int8 [m, n]
    scale,  # [m]
    bias,  # [m] or None
    y,  # [rows, m]
    rows,
    m,
    n,
    ROWS: tl.constexpr,  # rows, made large enough for tl.dot
    M: tl.constexpr,  # outputs of a program
    N: tl.constexpr,  # inputs at once
):
    """M outputs of all rows; each weight is read once, as the 8 bits that it is."""
    r, o, i = tl.arange(0, ROWS), tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, N)
    mine, inside = (r < rows)[:, None], o < m
    x += r[:, None] * n + i[None, :]
    weight += o[None, :].to(tl.int64) * n + i[:, None]
    total = tl.zeros([ROWS, M], tl.float32)
    for start in range(0, n, N):
        there = start + i < n
        a = tl.load(x + start, mask=mine & there[None, :], other=0.0)
        b = tl.load(weight + start, mask=there[:, None] & inside[None, :], other=0)
        total += tl.dot(a, b.to(a.dtype), input_precision="ieee")
    total *= tl.load(scale + o, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + r[:, None] * m + o[None, :], total, mask=mine & inside[None, :])


@torch.library.custom_op("lab::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., n], of MOST rows at most -> [..., m]: x (weight * scale)^T + bias.

    weight int8 [m, n], scale and bias [m]. Rounded once, at the end: PyTorch's way rounds the
    product of weight and scale too.
    """
    m, n = weight.shape
    rows, y = x.reshape(-1, n).contiguous(), x.new_empty(*x.shape[:-1], m)
    ROWS, N = max(16, triton.next_power_of_2(len(rows))), 256 // x.element_size()
    with torch.cuda.device_of(x):
        multiply[(triton.cdiv(m, 32),)](
            *(rows, weight, scale, bias, y, len(rows), m, n, ROWS, 32, N), num_warps=4, num_stages=4
        )
    return y


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.inference_mode()
def check_products(layers: list[nn.Module]) -> None:
    """Compile the product for layers with weights in 8 bits, and compare it with PyTorch's.

    Raises ArithmeticError where the two differ by more than rounding, and whatever Triton raises
    where it cannot compile a kernel, or run it.
    """
    for layer in layers:
        parts = layer.weight, layer.scale, layer.bias
        weight, scale, bias = (None if x is None else x[-1024:].float() for x in parts)
        generator = torch.Generator(weight.device).manual_seed(0)
        for rows in (1, 32, MOST):  # each is compiled for itself
            x = torch.randn(rows, weight.shape[1], generator=generator, device=weight.device)
            x = x.to(layer.scale.dtype)
            exact = F.linear(x.float(), weight * scale[:, None], bias)
            compare("a product in 8 bits", int8_linear(x, *parts)[:, -1024:], exact)
