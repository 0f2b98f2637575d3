"""lab/attention.cpp: softmax attention over what a row may see, and over nothing else."""

import math
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from conftest import PROCESSORS, close, compiled_whole
from test_decode import Greedy, greedy, prompts, same_bits

from lab import attention, native, steps
from model import Prompt, Request, load

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
ROUNDING = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
LAST = (0, 6, 254, 255, 256, 699)  # the last positions of rows, in one, two and three chunks


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


def check_exact(attend, q, keys, values):
    y = attend(q, keys, values, positions_of(LAST, q.device), 768)
    assert y.dtype == q.dtype and y.shape == q.shape
    expected = exact(q, keys, values)
    assert (y.cpu() - expected).abs().max() < ROUNDING[str(q.dtype)[6:]] * expected.abs().max()


def check_bits(attend, q, keys, values):
    """A row's bits depend on no size and on no neighbour."""
    together = attend(q, keys, values, positions_of(LAST, q.device), 768)
    for row, last in enumerate(LAST):  # in a cache that is just large enough
        alone = (x[row : row + 1, :, : last + 1].contiguous() for x in (keys, values))
        y = attend(q[row : row + 1], *alone, positions_of([last], q.device), last + 1)
        assert torch.equal(y[0], together[row])
    flipped = (x.flip(0) for x in (q, keys, values))
    again = attend(*flipped, positions_of(LAST[::-1], q.device), 900)
    assert torch.equal(again.flip(0), together)


HEADS = [(1, 1, 8), (2, 3, 40), (2, 3, 96), (1, 2, 80), (1, 7, 128), (1, 8, 64)]


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("K, G, h", HEADS)
def test_attention_is_softmax_over_what_a_row_may_see(K, G, h, processor, dtype, as_on):
    as_on(processor)
    attend, name = attention.build(dtype, G, h), str(dtype)[6:]
    check_exact(attend, *drawn(K, G, h, name))


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("h", [80, 96])
def test_a_rows_bits_depend_on_no_size_no_neighbour_and_no_number_of_threads(h, dtype, one_thread):
    attend, parts = attention.build(dtype, 3, h), drawn(2, 3, h, str(dtype)[6:])
    check_bits(attend, *parts)
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        found.append(attend(*parts, positions_of(LAST), 768))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("scale", [0, 1e-20, 30, 300])
def test_it_is_exact_where_weights_are_equal_and_where_one_is_all(scale):
    q, keys, values = drawn(1, 1, 8, "float32")
    check_exact(attention.build(q.dtype, 1, 8), scale * q, keys, values)


def test_what_is_not_finite_stays_so():
    attend, (q, keys, values) = attention.build(torch.float32, 1, 8), drawn(1, 1, 8, "float32")
    for part, place in ((q, (5, 0, 0, 1)), (keys, (4, 0, 100, 3)), (values, (3, 0, 255, 0))):
        part[place] = math.nan
    y = attend(q, keys, values, positions_of(LAST), 768)
    assert [bool(row.isfinite().all()) for row in y] == [True, True, True, False, False, False]


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even():
    attend, values = attention.build(torch.bfloat16, 1, 8), torch.ones(1, 1, 2, 8)
    values[0, 0, :, 0] += torch.tensor([0, 2**-7])  # their mean lies between 1 and 1 + 2^-7
    values[0, 0, :, 1] += torch.tensor([2**-7, 2**-6])
    q, keys = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
    y = attend(q.bfloat16(), keys.bfloat16(), values.bfloat16(), positions_of([1]), 2)
    assert y[0, 0, 0].tolist() == [1, 1 + 2**-6, *6 * [1]]


def test_the_process_still_computes_with_the_smallest_numbers():
    attention.build(torch.float32, 1, 8)
    smallest = torch.tensor(1e-40)
    assert (smallest / 2).item() > 0 and smallest.item() * 0.5 > 0


def logits_of(model):
    """Request -> the logits of its 3 steps."""
    requests = [Request(Prompt(x), data=(i, 3)) for i, x in enumerate(prompts(model))]
    return {i: logits for i, _, logits in greedy(model, requests, Greedy(model, 2), 2)}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3"])
def test_decoding_with_it_says_what_plain_decoding_says(family, folder_of, capsys):
    model, _ = load(str(folder_of(family)), "cpu", "float32")
    expected = logits_of(model)
    steps.use_attention(model)
    assert model.attention is not None and not capsys.readouterr().err
    found = logits_of(model)
    assert all(torch.equal(found[i].argmax(-1), x.argmax(-1)) for i, x in expected.items())
    assert all(close(found[i], x, 1e-5) for i, x in expected.items())


def test_to_a_compiled_step_it_is_one_operation(folder_of, monkeypatch):
    model, _ = load(str(folder_of("qwen2")), "cpu", "float32")
    steps.use_attention(model)
    expected = logits_of(model)
    with compiled_whole(monkeypatch) as graphs:
        model.step = steps.CompiledStep(model)
        assert same_bits(logits_of(model), expected)
    (names,) = graphs  # compiled once
    assert names.count("lab.attend_on_cpu") == 2


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own
def test_the_operation_tells_pytorch_the_truth_about_itself():
    _, kernel = native.build("attention", BFLOAT16=0, G=1, WIDTH=8)
    arguments = *drawn(1, 1, 8, "float32"), positions_of(LAST), 700, kernel
    kinds = ("test_schema", "test_faketensor")  # it has no gradient
    torch.library.opcheck(torch.ops.lab.attend_on_cpu.default, arguments, test_utils=kinds)


def test_where_it_cannot_be_used_a_line_says_so(folder_of, monkeypatch, capsys):
    folder = str(folder_of("qwen2"))

    def said(dtype="float32"):
        model, _ = load(folder, "cpu", dtype)
        steps.use_attention(model)
        assert model.attention is None and len(logits_of(model)) == 9
        line, begins = (
            capsys.readouterr().err,
            "attention in C++ cannot be used here, PyTorch's is (",
        )
        assert line.startswith(begins) and line.endswith(")\n") and line.count("\n") == 1
        return line.removeprefix(begins)

    assert said("float16").startswith("ValueError: none for torch.float16")
    with monkeypatch.context() as patch:
        patch.setattr(attention, "build", lambda *_: lambda q, *_: F.normalize(q))
        assert said().startswith("ArithmeticError: attention in float32 is off by")

    def fails(*_, **__):
        raise subprocess.CalledProcessError(1, "g++")

    monkeypatch.setattr(native, "build", fails)
    assert said().startswith("CalledProcessError")
