"""lab/products.cpp: x Wᵀ + b, each row's as if it were alone."""

import copy
import math
import shutil

import pytest
import torch
from conftest import PROCESSORS
from torch import nn

from lab import native
from lab.linear import Int8Linear, PanelLinear

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
        product, expected = PanelLinear(layer), exact(layer, x)
        # bfloat16 is rounded once, to 8 bits.
        most = 2e-6 * expected.abs().max() + (dtype == torch.bfloat16) * expected.abs() / 256
        for rows in ROWS:
            assert ((product(x[:rows]) - expected[:rows]).abs() <= most[:rows]).all()


@each_kind
def test_a_rows_bits_depend_on_no_neighbour_and_no_number_of_threads(quantised, dtype, one_thread):
    layer, x = drawn(quantised, dtype)
    product = PanelLinear(layer)
    expected = product(x)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in ROWS:
            assert torch.equal(product(x[-rows:]), expected[-rows:])
    assert torch.equal(product(x.view(2, 55, -1)), expected.view(2, 55, -1))
    assert torch.equal(copy.deepcopy(product)(x.T.contiguous().T), expected)


def test_what_it_does_not_multiply_is_refused():
    layer, x = drawn(False, torch.float32)
    for wrong in x.clone().requires_grad_(), x.double(), x.to("meta"), x[:, ::2], x.view(-1, 1400):
        with pytest.raises(ValueError, match="700. in torch.float32 on a CPU, without gradients"):
            PanelLinear(layer)(wrong)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_what_is_not_finite_stays_where_it_is(dtype):
    layer, x = drawn(False, dtype)
    x[3, 5], layer.weight[99, 0] = math.nan, math.inf
    finite = PanelLinear(layer)(x).isfinite()
    assert not finite[3].any() and not finite[:, 99].any()
    assert finite[[*range(3), *range(4, len(x))], :99].all()
