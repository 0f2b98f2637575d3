"""lab/products.cpp: x Wᵀ + b, each row's as if it were alone."""

import math
import shutil

import pytest
import torch
from conftest import close, compiled_whole
from test_attention import logits_of

from lab import fast, native, products
from model import load

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
SHAPES = [(1, 1), (16, 256), (33, 257), (100, 700)]  # [N, K]: of panels and blocks, full or not
ROWS = [1, 5, 6, 7, 48, 49, 110]  # groups of rows, full or not; more rows than are summed at once


def drawn(N, K):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((max(ROWS), K), (N, K), (N,))]


@pytest.mark.parametrize("sizes", [{}, {"__AVX512F__": 1}])  # whose vectors are twice as wide
@pytest.mark.parametrize("N, K", SHAPES)
def test_a_product_is_the_sums_of_the_products(N, K, sizes, monkeypatch):
    build = native.build
    monkeypatch.setattr(native, "build", lambda name: build(name, **sizes))
    (lay_out, multiply), (x, weight, bias) = products.build(), drawn(N, K)
    panels, plain = lay_out(weight), x.double() @ weight.double().T
    for b, exact in (None, plain), (bias, plain + bias.double()):
        for rows in ROWS:
            y = multiply(x[:rows], panels, b, N)
            assert y.dtype == torch.float32 and y.shape == (rows, N)
            assert (y - exact[:rows]).abs().max() <= 2e-6 * exact.abs().max()


def test_rows_may_have_any_shape_and_lie_anywhere():
    (lay_out, multiply), (x, weight, bias) = products.build(), drawn(100, 700)
    panels = lay_out(weight)
    expected = multiply(x, panels, bias, 100)
    strided = torch.stack([x, x + 1], dim=2)[:, :, 0]
    assert torch.equal(multiply(strided, panels, bias, 100), expected)
    assert torch.equal(multiply(x.view(11, 10, 700), panels, bias, 100).view(-1, 100), expected)


def test_a_rows_bits_depend_on_no_neighbour_and_no_number_of_threads():
    (lay_out, multiply), (x, weight, bias) = products.build(), drawn(100, 700)
    panels, threads = lay_out(weight), torch.get_num_threads()
    expected = multiply(x, panels, bias, 100)
    for rows in ROWS:
        assert torch.equal(multiply(x[-rows:], panels, bias, 100), expected[-rows:])
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        assert torch.equal(multiply(x, panels, bias, 100), expected)
    torch.set_num_threads(threads)


def test_what_is_not_finite_stays_where_it_is():
    (lay_out, multiply), (x, weight, _) = products.build(), drawn(100, 700)
    x[3, 5], weight[99, 0] = math.nan, math.inf
    finite = multiply(x, lay_out(weight), None, 100).isfinite()
    assert not finite[3].any() and not finite[:, 99].any()
    assert finite[[*range(3), *range(4, len(x))], :99].all()


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own
def test_the_operation_tells_pytorch_the_truth_about_itself():
    (lay_out, _), (x, weight, bias) = products.build(), drawn(100, 700)
    _, kernel = native.build("products")
    kinds = ("test_schema", "test_faketensor")  # it has no gradient
    for b in (None, bias):
        arguments = x[:4, None], lay_out(weight), b, 100, kernel
        torch.library.opcheck(torch.ops.lab.multiply_on_cpu.default, arguments, test_utils=kinds)


@pytest.mark.parametrize("family", ["qwen2", "llama3"])  # with biases, and without
def test_in_a_compiled_step_all_products_are_these(family, folder_of, monkeypatch, capsys):
    folder = str(folder_of(family))
    plain, _ = load(folder, "cpu", "float32")
    with compiled_whole(monkeypatch) as graphs:
        model, _ = fast.load(folder, "cpu", "float32", compile=True)
        with torch.no_grad():  # between loading and the first step, as a merged adapter does
            for m in (plain.layers[0].mlp.down_proj, model.layers[0].mlp.down_proj):
                m.weight.mul_(2)
        expected, found = logits_of(plain), logits_of(model)
    assert all(close(found[i], x, 1e-5) for i, x in expected.items())
    (names,) = graphs
    assert names.count("lab.multiply_on_cpu") == 4 * model.config.layers + 1
    assert not any("mm" in name or "linear" in name for name in names)
    assert "products" not in capsys.readouterr().err


def test_where_they_cannot_be_used_a_line_says_so(folder_of, monkeypatch, capsys):
    folder, begins = str(folder_of("qwen2")), "products in C++ cannot be used here, PyTorch's are ("

    def said():
        model, _ = fast.load(folder, "cpu", "float32", compile=True)
        assert model.step.layers == []
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("products"))
        assert line.startswith(begins) and line.endswith(")")
        return line.removeprefix(begins)

    with monkeypatch.context() as patch:
        wrong = products.build()[0], lambda x, panels, bias, N: x[:, :N]
        patch.setattr(products, "build", lambda: wrong)
        assert said().startswith("ArithmeticError: a product in float32 is off by")
    monkeypatch.setattr(native, "build", native.build.__wrapped__)  # which remembers nothing
    monkeypatch.setattr(native, "FLAGS", ["-no-such-flag"])
    assert said().startswith("CalledProcessError")
