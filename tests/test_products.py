"""lab/products.cpp: x Wᵀ + b, each row's as if it were alone."""

import copy
import math
import shutil
import subprocess

import pytest
import torch
from conftest import PROCESSORS, close, compiled_whole
from test_attention import logits_of
from torch import nn

from lab import checkpoint, fast, linear, native, products

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
SHAPES = [(1, 1), (16, 256), (33, 257), (100, 700)]  # [N, K]: of panels and blocks, full or not
ROWS = [1, 5, 6, 7, 12, 13, 49, 110]  # groups of rows, full or not; more than are summed at once
KINDS = [
    (linear.PackedLinear, torch.float32),
    (linear.PackedLinear, torch.bfloat16),
    (linear.Int8Linear, torch.float32),
    (linear.Int8Linear, torch.bfloat16),
]
each_kind = pytest.mark.parametrize("kind, dtype", KINDS)


def drawn(kind, dtype, N=100, K=700, bias=True):
    """A layer, and rows for it."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(K, N, bias).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return kind(layer.to(dtype)), torch.randn(max(ROWS), K, generator=generator).to(dtype)


def exact(layer, x):
    scale = layer.scale.double()[:, None] if hasattr(layer, "scale") else 1
    y = x.double() @ (layer.weight.double() * scale).T
    return y if layer.bias is None else y + layer.bias.double()


@each_kind
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("N, K", SHAPES)
def test_a_product_is_the_sums_of_the_products(N, K, processor, kind, dtype, as_on):
    as_on(processor)
    for bias in (False, True):
        layer, x = drawn(kind, dtype, N, K, bias)
        panels, expected = products.Panels(layer), exact(layer, x)
        # bfloat16 is rounded once, to 8 bits.
        most = 2e-6 * expected.abs().max() + (dtype == torch.bfloat16) * expected.abs() / 256
        for rows in ROWS:
            y = panels(x[:rows])
            assert y.dtype == dtype and y.shape == (rows, N)
            assert ((y - expected[:rows]).abs() <= most[:rows]).all()


@each_kind
def test_rows_may_have_any_shape_and_lie_anywhere(kind, dtype):
    layer, x = drawn(kind, dtype)
    panels = products.Panels(layer)
    expected = panels(x)
    strided = torch.stack([x, x + 1], dim=2)[:, :, 0]
    assert torch.equal(panels(strided), expected)
    assert torch.equal(panels(x.view(11, 10, 700)).view(-1, 100), expected)


@each_kind
def test_a_rows_bits_depend_on_no_neighbour_and_no_number_of_threads(kind, dtype, one_thread):
    layer, x = drawn(kind, dtype)
    panels = products.Panels(layer)
    expected = panels(x)
    for rows in ROWS:
        assert torch.equal(panels(x[-rows:]), expected[-rows:])
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        assert torch.equal(panels(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_where_it_is(dtype):
    layer, x = drawn(linear.PackedLinear, dtype)
    x[3, 5], layer.weight[99, 0] = math.nan, math.inf
    finite = products.Panels(layer)(x).isfinite()
    assert not finite[3].any() and not finite[:, 99].any()
    assert finite[[*range(3), *range(4, len(x))], :99].all()


@each_kind
@pytest.mark.filterwarnings("ignore")  # of PyTorch's own
def test_the_operation_tells_pytorch_the_truth_about_itself(kind, dtype):
    for bias in (False, True):
        layer, x = drawn(kind, dtype, bias=bias)
        p = products.Panels(layer)
        arguments = x[:4, None], p.panels, p.scale, p.bias, 100, p.kernel
        kinds = ("test_schema", "test_faketensor")  # it has no gradient
        torch.library.opcheck(torch.ops.lab.multiply_on_cpu.default, arguments, test_utils=kinds)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("family", ["qwen2", "llama3"])  # with biases, and without
def test_in_a_compiled_step_all_products_are_these(
    family, dtype, tolerance, quantize, folder_of, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    folder = str(folder_of(family))
    plain, _ = fast.load(folder, "cpu", dtype, quantize)
    with compiled_whole(monkeypatch) as graphs:
        model, _ = fast.load(folder, "cpu", dtype, quantize, compile=True)
        with torch.no_grad():  # between loading and the first step, as a merged adapter does
            for m in (plain.layers[0].mlp.down_proj, model.layers[0].mlp.down_proj):
                m.weight.mul_(-1)
        expected, found = logits_of(plain), logits_of(model)
    # In bfloat16 the next token may be another one.
    steps = 3 if dtype == "float32" else 1
    assert all(close(found[i][:steps], x[:steps], tolerance) for i, x in expected.items())
    (names,) = graphs
    assert names.count("lab.multiply_on_cpu") == 4 * model.config.layers + 1
    assert not any("mm" in name or "linear" in name for name in names)
    assert "products" not in capsys.readouterr().err


@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16_is_left_to_onednn_where_it_has_tiles(tiles, folder_of, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    folder = str(folder_of("qwen3"))
    for dtype, ours in ("bfloat16", not tiles), ("float32", True):
        model, _ = fast.load(folder, "cpu", dtype, compile=True)
        assert bool(model.step.layers) == ours


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_weights_are_laid_out_where_there_is_room_for_it(
    quantize, folder_of, monkeypatch, capsys
):
    folder = folder_of("qwen3")
    needed = fast.weight_bytes(checkpoint.check_config(folder), torch.float32, quantize)
    for copies in (2, 5):
        there = copies * needed
        monkeypatch.setattr(checkpoint, "free_memory", lambda device, there=there: there)
        model, _ = fast.load(str(folder), "cpu", "float32", quantize, compile=True)
        assert bool(model.step.layers) == (copies == 5)
        assert "products" not in capsys.readouterr().err


def test_a_copy_of_a_compiled_model_decodes_with_its_own_weights(folder_of, monkeypatch):
    with compiled_whole(monkeypatch):
        model, _ = fast.load(str(folder_of("qwen3")), "cpu", "float32", compile=True)
        expected = logits_of(model)
        other = copy.deepcopy(model)
        other.lm_head.weight.mul_(-1)
        found, again = logits_of(other), logits_of(model)
    assert all(torch.equal(again[i], x) for i, x in expected.items())
    # Its first logits are those of the same prompts, with the other sign.
    assert all(close(found[i][0], -x[0], 1e-5) for i, x in expected.items())


def test_where_they_cannot_be_used_a_line_says_so(folder_of, monkeypatch, capsys):
    folder, begins = str(folder_of("qwen2")), "products in C++ cannot be used here, PyTorch's are ("

    def said(dtype="float32", quantize=None):
        model, _ = fast.load(folder, "cpu", dtype, quantize, compile=True)
        assert model.step.layers == []
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("products"))
        assert line.startswith(begins) and line.endswith(")")
        return line.removeprefix(begins)

    assert said("float16", "int8").startswith("ValueError: none for torch.float16")
    with monkeypatch.context() as patch:
        patch.setattr(products.Panels, "forward", lambda self, x: x[:, :100])
        assert said().startswith("ArithmeticError: a product in float32 is off by")

    def fails(*_, **__):
        raise subprocess.CalledProcessError(1, "g++")

    monkeypatch.setattr(native, "build", fails)
    assert said().startswith("CalledProcessError")
