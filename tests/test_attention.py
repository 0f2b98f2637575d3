"""lab/attention.cpp, lab/prefill.cpp: softmax over what a query may see, and over nothing else."""

import math
import shutil
from ctypes import c_int64, c_void_p

import pytest
import torch
from conftest import PROCESSORS

from lab import native

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
ROUNDING = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
LAST = (0, 6, 254, 255, 256, 699)  # the last positions of rows, in one, two and three chunks


def attention_of(dtype, G, h):
    """A step's attention in C++, in a team of one thread: test_cpu.py has more."""
    sizes = {"BFLOAT16": int(dtype == torch.bfloat16), "G": G, "WIDTH": h}
    run = native.library("attention", **sizes).run
    run.restype, run.argtypes = None, [*6 * [c_void_p], *5 * [c_int64], *2 * [c_void_p]]

    def attend(q, keys, values, positions, mask):
        (B, K), S, q = keys.shape[:2], mask.shape[-1], q.contiguous()
        y, rows, queries = torch.empty_like(q), torch.arange(B), B * K * G * -(-S // 256)
        parts, sums = torch.empty(queries * h), torch.empty(queries)
        tensors = (x.data_ptr() for x in (q, rows, positions, keys, values, y))
        run(*tensors, B, K, S, *keys.stride()[:2], parts.data_ptr(), sums.data_ptr())
        return y

    return attend


def drawn(K, G, h, dtype, device="cpu", capacity=900):
    """q as it is within q and k, keys, values; what no row may see is NaN or infinite."""
    generator = torch.Generator().manual_seed(0)
    B, H = len(LAST), G * K
    q, keys, values = (
        torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))
        for shape in ((B, 1, H + K, h), (B, K, capacity, h), (B, K, capacity, h))
    )
    for row, last in enumerate(LAST):
        keys[row, :, last + 1 :], values[row, :, last + 1 :] = math.nan, math.inf
    return q.split([H, K], dim=2)[0], keys, values


def exact(q, keys, values):
    """Softmax attention in float64, row by row and head by head."""
    out, G = torch.zeros(q.shape, dtype=torch.float64), q.shape[2] // keys.shape[1]
    q, keys, values = (x.double().cpu() for x in (q, keys, values))
    for row, last in enumerate(LAST):
        for head in range(q.shape[2]):
            k, v = (x[row, head // G, : last + 1] for x in (keys, values))
            weights = torch.softmax(k @ q[row, 0, head] / math.sqrt(q.shape[3]), 0)
            out[row, 0, head] = weights @ v
    return out


def positions_of(last, device="cpu"):
    return torch.tensor(last, device=device)[:, None]


def sized(S):
    """A mask of which a kernel takes the size."""
    return torch.empty(1, 1, 1, S)


def check_exact(attend, q, keys, values):
    y = attend(q, keys, values, positions_of(LAST, q.device), sized(768))
    assert y.dtype == q.dtype and y.shape == q.shape
    expected = exact(q, keys, values)
    assert (y.cpu() - expected).abs().max() < ROUNDING[str(q.dtype)[6:]] * expected.abs().max()


def check_bits(attend, q, keys, values):
    """A row's bits depend on no size and on no neighbour."""
    together = attend(q, keys, values, positions_of(LAST, q.device), sized(768))
    for row, last in enumerate(LAST):  # in a cache that is just large enough
        alone = (x[row : row + 1, :, : last + 1].contiguous() for x in (keys, values))
        y = attend(q[row : row + 1], *alone, positions_of([last], q.device), sized(last + 1))
        assert torch.equal(y[0], together[row])
    flipped = (x.flip(0) for x in (q, keys, values))
    again = attend(*flipped, positions_of(LAST[::-1], q.device), sized(900))
    assert torch.equal(again.flip(0), together)


HEADS = [(1, 1, 8), (2, 3, 40), (2, 3, 96), (1, 2, 80), (1, 7, 128), (1, 8, 64)]


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("K, G, h", HEADS)
def test_attention_is_softmax_over_what_a_row_may_see(K, G, h, processor, dtype, as_on):
    as_on(processor)
    check_exact(attention_of(dtype, G, h), *drawn(K, G, h, str(dtype)[6:]))


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("h", [80, 96])
def test_a_rows_bits_depend_on_no_size_and_no_neighbour(h, dtype):
    check_bits(attention_of(dtype, 3, h), *drawn(2, 3, h, str(dtype)[6:]))


@pytest.mark.parametrize("scale", [0, 1e-20, 30, 300])
def test_it_is_exact_where_weights_are_equal_and_where_one_is_all(scale):
    q, keys, values = drawn(1, 1, 8, "float32")
    check_exact(attention_of(q.dtype, 1, 8), scale * q, keys, values)


def test_what_is_not_finite_stays_so():
    attend, (q, keys, values) = attention_of(torch.float32, 1, 8), drawn(1, 1, 8, "float32")
    for part, place in ((q, (5, 0, 0, 1)), (keys, (4, 0, 100, 3)), (values, (3, 0, 255, 0))):
        part[place] = math.nan
    y = attend(q, keys, values, positions_of(LAST), sized(768))
    assert [bool(row.isfinite().all()) for row in y] == [True, True, True, False, False, False]


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    attend, values = attention_of(torch.bfloat16, 1, 8), torch.ones(1, 1, 2, 8)
    values[0, 0, :, 0] += torch.tensor([0, 2**-7])  # their mean lies between 1 and 1 + 2^-7
    values[0, 0, :, 1] += torch.tensor([2**-7, 2**-6])
    q, keys = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
    y = attend(q.bfloat16(), keys.bfloat16(), values.bfloat16(), positions_of([1]), sized(2))
    assert y[0, 0, 0].tolist() == [1, 1 + 2**-6, *6 * [1]]


def test_the_process_still_computes_with_the_smallest_numbers():
    attention_of(torch.float32, 1, 8)
    smallest = torch.tensor(1e-40)
    assert (smallest / 2).item() > 0 and smallest.item() * 0.5 > 0


# ---------------------------------------------------------------------------------------- prompts


def prompt_attention_of(dtype, G, h):
    """A prompt's attention in C++, in a team of one thread: test_cpu.py has more."""
    sizes = {"BFLOAT16": int(dtype == torch.bfloat16), "G": G, "WIDTH": h}
    run = native.library("prefill", **sizes).run
    run.restype, run.argtypes = None, [*6 * [c_void_p], *5 * [c_int64]]

    def attend(q, keys, values, positions):
        (B, T), q, y = positions.shape, q.contiguous(), torch.empty(q.shape, dtype=dtype)
        rows = torch.arange(B).repeat_interleave(T)
        tensors = (x.data_ptr() for x in (q, rows, positions, keys, values, y))
        run(*tensors, B, T, keys.shape[1], *keys.stride()[:2])
        return y

    return attend


PROMPTS = ((0, 1), (0, 6), (0, 70), (200, 110), (255, 2), (100, 512))  # first position, queries


def prompt_of(first, T, K, G, h, dtype):
    """q, keys, values of two rows, the second 5 positions further; their positions."""
    generator, S = torch.Generator().manual_seed(T), first + T + 5
    q, keys, values = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((2, T, G * K, h), (2, K, S + 60, h), (2, K, S + 60, h))
    )
    for row in range(2):
        last = first + 5 * row + T - 1
        keys[row, :, last + 1 :], values[row, :, last + 1 :] = math.nan, math.inf
    return q, keys, values, first + 5 * torch.arange(2)[:, None] + torch.arange(T)


def exact_prompt(q, keys, values, positions):
    """Softmax attention in float64, the same of the values' sizes, and the scores."""
    q, G, S = q.double(), q.shape[2] // keys.shape[1], int(positions.max()) + 1
    k, v = (x[:, :, :S].double().repeat_interleave(G, 1) for x in (keys, values))  # [2, H, S, h]
    later = torch.arange(S) > positions[:, None, :, None]  # [2, 1, T, S]
    unseen = later.all(2)[:, :, :, None]  # by every query of a row: NaN
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    scores = q.transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2), (weights @ v.abs()).transpose(1, 2), scores


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("K, G, h", HEADS)
def test_a_prompts_queries_see_what_stands_before_them_and_themselves(
    K, G, h, processor, dtype, as_on
):
    as_on(processor)
    attend = prompt_attention_of(dtype, G, h)
    for first, T in PROMPTS:
        parts = prompt_of(first, T, K, G, h, dtype)
        y, (expected, size, _) = attend(*parts), exact_prompt(*parts)
        assert y.shape == expected.shape and y.dtype == dtype
        assert ((y - expected).abs() < ROUNDING[str(dtype)[6:]] * size).all()


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("K, G, h", [(2, 3, 80), (1, 7, 64)])
def test_a_querys_bits_depend_on_no_other_query(K, G, h, processor, dtype, as_on):
    as_on(processor)
    attend = prompt_attention_of(dtype, G, h)
    q, keys, values, positions = prompt_of(200, 110, K, G, h, dtype)
    together = attend(q, keys, values, positions)
    for first, last in ((0, 2), (1, 60), (57, 110)):
        some = positions[:, first:last].contiguous()
        part = attend(q[:, first:last], keys, values, some)
        assert torch.equal(part, together[:, first:last])
    for row in range(2):
        alone = attend(*(x[row : row + 1] for x in (q, keys, values, positions)))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("scale", [0, 1e-20, 30, 300])
def test_a_prompts_scores_may_be_of_any_size(scale):
    q, keys, values, positions = prompt_of(255, 110, 1, 1, 8, torch.float32)
    keys[:, :, :300:7] *= 5  # larger ones come late, too
    y = prompt_attention_of(q.dtype, 1, 8)(scale * q, keys, values, positions)
    expected, size, scores = exact_prompt(scale * q, keys, values, positions)
    most = 2e-6 + 2e-7 * scores.abs().amax(-1).transpose(1, 2)[..., None]  # they are rounded, too
    assert ((y - expected).abs() < most * size).all()


@pytest.mark.parametrize("part, place", [(0, (0, 50, 0)), (1, (0, 0, 290)), (2, (0, 0, 290))])
def test_in_a_prompt_what_is_not_finite_stays_so(part, place):
    *parts, positions = prompt_of(200, 110, 1, 1, 8, torch.float32)
    parts[part][place] = math.nan
    y = prompt_attention_of(torch.float32, 1, 8)(*parts, positions)
    finite, t = y[0].isfinite().all((1, 2)), torch.arange(110)
    if part == 0:
        assert torch.equal(finite, t != 50)
    else:  # what is seen later is multiplied by 0, and not all of it is left out
        assert not finite[90:].any() and finite[: 64 if part == 2 else 90].all()
    assert y[1].isfinite().all()
