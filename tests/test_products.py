"""lab/products.cpp: x Wᵀ + b, each row's as if it were alone."""

import math
import shutil
from ctypes import c_int64, c_void_p

import pytest
import torch
from conftest import PROCESSORS
from torch import nn

from lab import cpu, native
from lab.linear import Int8Linear

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
SHAPES = [(1, 2), (16, 256), (33, 258), (100, 700)]  # [N, K]: of panels and blocks, full or not
ROWS = [1, 5, 6, 7, 12, 13, 49, 110]  # groups of rows, full or not; more than are summed at once
KINDS = [(quantised, dtype) for quantised in (False, True) for dtype in native.DTYPES]
each_kind = pytest.mark.parametrize("quantised, dtype", KINDS)


def drawn(quantised, dtype, N=100, K=700, bias=True):
    """A layer, and rows for it."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(K, N, bias).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer = Int8Linear(layer.to(dtype)) if quantised else layer.to(dtype)
    return layer, torch.randn(max(ROWS), K, generator=generator).to(dtype)


def product_of(layer):
    """Rows -> the product in C++, in a team of one thread: test_cpu.py has more."""
    scale, (N, K) = getattr(layer, "scale", None), layer.weight.shape
    dtype = layer.weight.dtype if scale is None else scale.dtype
    sizes = {"BFLOAT16": int(dtype == torch.bfloat16), "T": "X" if scale is None else "int8_t"}
    library = native.library("products", **sizes)
    weights = cpu.in_panels(library, layer.weight), scale, layer.bias
    library.run.restype, library.run.argtypes = None, [*5 * [c_void_p], *3 * [c_int64]]

    def product(x):
        x, y = x.contiguous(), x.new_empty(len(x), N)
        tensors = x, *weights, y
        library.run(*(t if t is None else t.data_ptr() for t in tensors), len(x), K, N)
        return y

    return product


def exact(layer, x):
    scale = layer.scale.double()[:, None] if hasattr(layer, "scale") else 1
    y = x.double() @ (layer.weight.double() * scale).T
    return y if layer.bias is None else y + layer.bias.double()


@each_kind
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("N, K", SHAPES)
def test_a_product_is_the_sums_of_the_products(N, K, processor, quantised, dtype, as_on):
    as_on(processor)
    for bias in (False, True):
        layer, x = drawn(quantised, dtype, N, K, bias)
        product, expected = product_of(layer), exact(layer, x)
        # bfloat16 is rounded once, to 8 bits.
        most = 2e-6 * expected.abs().max() + (dtype == torch.bfloat16) * expected.abs() / 256
        for rows in ROWS:
            assert ((product(x[:rows]) - expected[:rows]).abs() <= most[:rows]).all()


@each_kind
def test_a_rows_bits_depend_on_no_neighbour(quantised, dtype):
    layer, x = drawn(quantised, dtype)
    product = product_of(layer)
    expected = product(x)
    for rows in ROWS:
        assert torch.equal(product(x[-rows:]), expected[-rows:])


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_what_is_not_finite_stays_where_it_is(dtype):
    layer, x = drawn(False, dtype)
    x[3, 5], layer.weight[99, 0] = math.nan, math.inf
    finite = product_of(layer)(x).isfinite()
    assert not finite[3].any() and not finite[:, 99].any()
    assert finite[[*range(3), *range(4, len(x))], :99].all()
