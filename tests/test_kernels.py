"""lab/kernels.py: what PyTorch computes, of what a row may see alone; on a GPU, or interpreted."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, close, compiled_whole, record_steps
from test_attention import LAST, check_bits, check_exact, drawn, positions_of
from test_decode import Greedy, greedy, prompts, same_bits

from lab import fast, steps
from lab.linear import Int8Linear
from model import Prompt, Request

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
if DEVICE == "cpu" and not RECENT:
    pytest.skip("older interpreters of Triton know older NumPys", allow_module_level=True)

from lab import kernels

BFLOAT16 = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter lacks bfloat16"),
)
DTYPES = ["float32", "float16", BFLOAT16]

# ---------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, G, h", [(1, 1, 64), (2, 3, 96), (1, 7, 128), (1, 8, 64)])
def test_attention_is_softmax_over_what_a_row_may_see(K, G, h, dtype):
    check_exact(kernels.attend, *drawn(K, G, h, dtype, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_depend_on_no_size_and_no_neighbour(dtype):
    check_bits(kernels.attend, *drawn(1, 7, 64, dtype, DEVICE))


# -------------------------------------------------------------------------------- weights in 8 bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, m, n", [(1, 7, 33), (3, 32, 128), (16, 50, 300), (17, 97, 64)])
def test_a_product_in_8_bits_is_rounded_once(rows, m, n, bias, dtype):
    check_product(rows, m, n, bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_as_many_rows_as_may_be(dtype):
    check_product(kernels.MOST, 70, 200, True, dtype)


def check_product(rows, m, n, bias, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, n, generator=generator)
    scale, b = torch.rand(m, generator=generator) / 100, torch.randn(m, generator=generator)
    x, scale, b = (t.to(DEVICE, getattr(torch, dtype)) for t in (x, scale, b))
    weight = torch.randint(-127, 128, (m, n), generator=generator).to(torch.int8)
    y = kernels.int8_linear(x, weight.to(DEVICE), scale, b if bias else None).cpu()
    expected = x.double().cpu() @ (weight.double() * scale.double().cpu()[:, None]).T
    expected = expected + b.double().cpu() if bias else expected
    assert y.shape == (rows, 1, m) and y.dtype == x.dtype
    half = torch.finfo(x.dtype).eps / 2  # and the sums are float32
    assert ((y - expected).abs() <= half * expected.abs() + 5e-5).all()


# ----------------------------------------------------------------------------------------- decoding


def quantised(model):
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def use(model, attention, product):
    model.attention = attention
    for layer in quantised(model):
        layer.product = product
    return model


def logits_of(model, order=(0, 4)):
    """Request -> the logits of its 3 steps."""
    embeds = prompts(model)
    requests = [Request(Prompt(embeds[i]), data=(i, 3)) for i in order]
    return {i: logits for i, _, logits in greedy(model, requests, Greedy(model, 2), 2)}


@pytest.mark.parametrize("family, quantize", [("qwen3", None), ("qwen2", "int8")])
def test_decoding_with_the_kernels_says_what_plain_decoding_says(
    family, quantize, folder_of, capsys
):
    model, _ = fast.load(str(folder_of(family)), DEVICE, "float32", quantize)
    expected = logits_of(use(model, None, None))
    steps.use_kernels(model, quantised(model))
    assert model.attention is kernels.attend and not capsys.readouterr().err
    assert {x.product for x in quantised(model)} == ({kernels.int8_linear} if quantize else set())
    found = logits_of(model)
    assert all(torch.equal(found[i].argmax(-1), x.argmax(-1)) for i, x in expected.items())
    assert all(close(found[i], x, 1e-5) for i, x in expected.items())


@pytest.fixture
def model(folder_of):
    model, _ = fast.load(str(folder_of("qwen2")), DEVICE, "float32", "int8")
    model.recorder = None
    return use(model, kernels.attend, kernels.int8_linear)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_cuda.py has it")
def test_recorded_steps_with_the_kernels_are_the_steps(model, monkeypatch):
    expected = logits_of(model, [4])
    del model.recorder  # an instance's own hides what is put in the class
    replays = record_steps(monkeypatch)
    assert same_bits(logits_of(model, [4]), expected) and replays


def test_to_a_compiled_step_the_kernels_are_one_operation_each(model, monkeypatch):
    expected = logits_of(model, [4])
    graphs, model.step = compiled_whole(monkeypatch), steps.CompiledStep(model)
    assert same_bits(logits_of(model, [4]), expected)
    (names,) = graphs  # compiled once
    assert [names.count(f"lab.{name}.default") for name in ("attend", "int8_linear")] == [2, 9]


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own
def test_the_operations_tell_pytorch_the_truth_about_themselves():
    q, keys, values = drawn(2, 2, 16, "float32", DEVICE, 1000)
    x, weight, scale = torch.randn(2, 1, 20), torch.ones(5, 20, dtype=torch.int8), torch.ones(5)
    for bias in (None, torch.ones(5)):
        product = [y if y is None else y.to(DEVICE) for y in (x, weight, scale, bias)]
        torch.library.opcheck(kernels.int8_linear, product)
    positions = positions_of(LAST, DEVICE)
    torch.library.opcheck(kernels.attend_one, (q, keys, values, positions, 700))


def failing(*arguments):
    raise RuntimeError("out of resource: shared memory\nand what to do")


@pytest.mark.parametrize(
    "name, kernel, said",
    [
        ("attend", failing, "RuntimeError: out of resource: shared memory"),
        (
            "attend",
            lambda q, *_: q * math.nan,
            "ArithmeticError: attention in float32 is off by nan",
        ),
        ("attend", lambda q, *_: q, "ArithmeticError: attention in float32 is off by .*"),
        (
            "int8_linear",
            lambda x, weight, scale, bias: 1.001 * F.linear(x, weight * scale[:, None], bias),
            "ArithmeticError: a product in 8 bits in float32 is off by 0.001",
        ),
    ],
)
def test_a_kernel_that_fails_or_computes_something_else_is_not_used(
    name, kernel, said, model, monkeypatch, capsys
):
    use(model, None, None)
    monkeypatch.setattr(kernels, name, kernel)
    steps.use_kernels(model, quantised(model))
    assert model.attention is None
    assert {x.product for x in quantised(model)} == {None}
    line = f"Triton's kernels cannot be used here, PyTorch's are used \\({said}\\)\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    assert len(logits_of(model)) == 2


# ------------------------------------------------------------------------------ code for real GPUs

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lab import kernels

def shared(kernel, numbers, **options):
    names = kernel.arg_names
    kinds = {name: types.get(name, "i32") for name in names} | dict.fromkeys(numbers, "constexpr")
    free = [i for i, name in enumerate(names) if name not in numbers and name != "rows"]
    numbers = {(names.index(name),): value for name, value in numbers.items()}
    source = ASTSource(kernel, kinds, numbers, {(i,): [["tt.divisibility", 16]] for i in free})
    code = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "cubin" in code.asm
    return code.metadata.shared

types = dict.fromkeys("q keys values out x scale bias y".split(), "*bf16")
types |= {"positions": "*i64", "parts": "*fp32", "lse": "*fp32", "weight": "*i8"}
whole = {"h": 128, "CHUNK": 256, "WIDTH": 128}
part = whole | {"G": 7, "BLOCK": 64, "HEADS": 16}
print(shared(kernels.attend_chunk, part, num_stages=3))
print(shared(kernels.merge_chunks, whole | {"TILE": 32}))
print(shared(kernels.multiply, {"ROWS": kernels.MOST, "M": 32, "N": 128}, num_stages=4))
"""


@pytest.mark.skipif(not RECENT, reason="an older Triton compiles another way without a GPU")
def test_the_kernels_compile_for_an_h100_and_fit_into_the_shared_memory_of_less(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    where = {"cwd": ROOT, "env": environment}
    done = subprocess.run(command, **where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # What a block has on consumers' GPUs.
    assert len(done.stdout.split()) == 3 and max(map(int, done.stdout.split())) <= 99 * 1024
