"""lab/fast.py: every fast path computes what the plain model does."""

import copy
import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import DTYPES, GOLDEN, ROOT, close, compiled_whole, edit, write_tokenizer
from make_golden import FAMILIES
from test_decode import Greedy, greedy, run, same_bits
from torch import nn

import model as M
from lab import checkpoint, fast, fused, steps
from lab.fast import load
from lab.fused import hf_tensors
from lab.linear import Int8Linear, PackedLinear, packs
from lab.native import has_amx
from model import KVCache, Prompt, Request, Transformer, UserError, config_from_json, decode
from softcot import Sampler

# --------------------------------------------------------------------------------- fused matrices


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_are_those_of_transformers(family, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "float32")
    assert isinstance(model.layers[0].self_attn, fused.FusedAttention)
    assert isinstance(model.layers[0].mlp, fused.FusedMLP)
    expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
    hidden = model(model.embed(expected["ids"])[None])
    assert close(hidden[0], expected["hidden"], 1e-5)
    logits = model.logits(hidden[0, -8:])
    assert logits.dtype == torch.float32 and close(logits, expected["logits"], 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_models_tensors_are_the_files(family, dtype, folder_of):
    folder = folder_of(family)
    model, _ = load(str(folder), "cpu", dtype)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    views = hf_tensors(model)
    assert set(views) == set(tensors)
    for name, view in views.items():
        assert torch.equal(view, tensors[name].to(view.dtype)), name
    before = model(model.embed(torch.arange(9))[None])
    for view in views.values():  # views: writing to them changes the model
        view.mul_(0.5)
    assert not torch.equal(model(model.embed(torch.arange(9))[None]), before)
    assert all(torch.equal(hf_tensors(model)[name], views[name]) for name in views)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "llama-bias"])
def test_fused_decoding_says_what_plain_decoding_says(family, folder_of):
    folder = str(folder_of(family))
    (plain, _), (fused, _) = M.load(folder, "cpu", "float32"), load(folder, "cpu", "float32")
    (tokens, logits), (found, its) = run(plain, 3), run(fused, 3)
    assert found == tokens and all(close(its[i], logits[i], 1e-5) for i in logits)


def test_gradients_through_a_fused_model_are_those_of_the_plain_one(folder_of):
    folder, gradients = str(folder_of("qwen3")), []
    for either in (M.load, load):
        model, _ = either(folder, "cpu", "float32")
        x = model.embed(torch.arange(9))[None].clone().requires_grad_()
        model.logits(model(x))[0, -1].log_softmax(-1)[7].backward()
        gradients.append(x.grad)
    assert close(gradients[1], gradients[0], 1e-5)


# ---------------------------------------------------------------------------------- other layouts


native = pytest.mark.skipif(
    not packs(torch.device("cpu"), torch.bfloat16),
    reason="this processor has no bfloat16 instructions",
)


@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), pytest.param("bfloat16", 4e-3, marks=native)]
)
@pytest.mark.parametrize("family", ["llama3", "qwen2", "llama-bias"])
def test_packed_weights_multiply_as_the_weights_do_and_follow_their_changes(
    family, dtype, tolerance, folder_of
):
    model, _ = load(str(folder_of(family)), "cpu", dtype)
    x, linear = torch.randn(5, 1, 32), model.layers[0].self_attn.qkv
    x = x.to(linear.weight.dtype)
    assert isinstance(linear, PackedLinear)
    for _ in range(2):
        bias = None if linear.bias is None else linear.bias.double()
        exact = F.linear(x.double(), linear.weight.double(), bias)
        with torch.inference_mode():
            assert close(linear(x).double(), exact, tolerance)
        with torch.no_grad():  # only decoding uses what is packed
            assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
            linear.weight.mul_(-0.5)
    whole, _ = run(model, 3)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            assert isinstance(m, PackedLinear) and m.packed is not None
    assert len(whole) == 9


def test_weights_are_packed_where_decoding_asks_for_them_and_when_they_change(monkeypatch):
    packed = []

    def reorder(weight):  # what mkldnn does on a processor with bfloat16 instructions
        packed.append(weight.clone())
        return packed[-1]

    def product(x, weight, bias, *rest):
        return F.linear(x, weight, bias)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", reorder, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product, raising=False)
    linear = nn.Linear(3, 2).requires_grad_(False)
    layer, x = PackedLinear(linear), torch.randn(4, 3)
    assert layer.weight is linear.weight and "packed" not in layer.state_dict()
    assert torch.equal(layer(x), linear(x)) and not packed  # training: as it is
    with torch.inference_mode():
        assert torch.equal(layer(x), linear(x)) and len(packed) == 1
        assert torch.equal(layer(x), linear(x)) and len(packed) == 1
    linear.weight.mul_(-0.5)
    with torch.inference_mode():
        assert torch.equal(layer(x), linear(x)) and len(packed) == 2
        made = PackedLinear(nn.Linear(3, 2))  # its weight does not tell when it changes
        assert torch.equal(made(x), F.linear(x, made.weight, made.bias)) and len(packed) == 2


def test_a_model_that_has_decoded_can_be_copied(folder_of):
    model, _ = load(str(folder_of("qwen2")), "cpu", "float32")
    expected = run(model, 3)[1]
    again = copy.deepcopy(model)
    assert again.lm_head.packed is None and model.lm_head.packed is not None
    assert same_bits(run(again, 3)[1], expected)


@pytest.mark.parametrize("threads, expected", [(1, [0, 1, 1]), (2, [1, 1, 1])])
def test_in_float32_packed_weights_are_not_for_one_row_on_one_thread(
    threads, expected, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    used = []
    for rows in (1, 2, 600):
        layer = PackedLinear(nn.Linear(3, 2).requires_grad_(False))
        with torch.inference_mode():
            layer(torch.randn(rows, 1, 3))
        used.append(layer.packed is not None)
    assert used == expected


def test_a_compiled_step_is_the_step(folder_of, monkeypatch):
    folder = folder_of("qwen3")
    edit(folder, max_position_embeddings=512)
    model, _ = M.load(str(folder), "cpu", "float32")
    ids = torch.randint(0, 250, (300,), generator=torch.Generator().manual_seed(0))

    def outs(order=(3, 60, 130, 300, 25)):
        requests = [Request(Prompt(model.embed(ids[:n])), data=(n, 20)) for n in order]
        found = greedy(model, requests, Greedy(model, 2), 2)
        return {n: (tokens, logits) for n, tokens, logits in found}

    expected = outs()
    graphs, model.step = compiled_whole(monkeypatch), steps.CompiledStep(model)
    found, again = outs(), outs((25, 300, 60, 3, 130))
    for n, (tokens, logits) in expected.items():
        assert found[n][0] == tokens and close(found[n][1], logits, 1e-5)
        assert torch.equal(again[n][1], found[n][1])
    assert len(graphs) == 1  # for lengths of 64 to 320, and a cache that grew


def test_what_was_compiled_for_a_model_is_not_taken_for_another(folder_of, tmp_path, monkeypatch):
    folder = folder_of("qwen3")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit(other, rms_norm_eps=0.5)  # their tensors are the same
    plain, found = [], []
    compiled_whole(monkeypatch)
    for path in folder, other:
        model, _ = M.load(str(path), "cpu", "float32")
        plain.append(run(model, 1, [0])[1][0])
        model.step = steps.CompiledStep(model)
        found.append(run(model, 1, [0])[1][0])
    assert all(close(x, y, 1e-5) for x, y in zip(found, plain)) and not close(*plain, 1e-2)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_of_8_bits_is_compiled_whole(rows, folder_of, monkeypatch):
    model, _ = load(str(folder_of("qwen2")), "cpu", "float32", "int8")
    expected = run(model, rows, range(3))[1]
    compiled_whole(monkeypatch)
    model.step = steps.CompiledStep(model)
    found = run(model, rows, range(3))[1]
    assert all(close(found[i], logits, 1e-5) for i, logits in expected.items())


def test_int8_by_hand():
    linear = nn.Linear(3, 2, bias=True)
    linear.weight.data = torch.tensor([[127.0, -64.0, 0.4], [0.0, 0.0, 0.0]])
    linear.bias.data = torch.tensor([1.0, 2.0])
    q = Int8Linear(linear)
    assert q.weight.tolist() == [[127, -64, 0], [0, 0, 0]] and q.scale[0] == 1
    assert q(torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[64.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_are_off_by_half_a_step_at_most(dtype, folder_of):
    folder = str(folder_of("qwen3"))
    (model, _), (small, _) = load(folder, "cpu", dtype), load(folder, "cpu", dtype, "int8")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    quantised = [m for m in small.modules() if isinstance(m, Int8Linear)]
    assert len(quantised) == 2 * 4 + 1
    for a, b in zip(linears, quantised, strict=True):
        scale = b.scale[:, None].double()
        off = (b.weight.double() * scale - a.weight.double()).abs()
        assert (off <= scale * (0.5 + 1e-4)).all() and b.weight.abs().max() == 127
        x = torch.randn(4, 7, a.in_features).to(a.weight.dtype)
        exact = F.linear(x.double(), b.weight.double() * scale)
        with torch.inference_mode():  # the kernel of few rows
            assert close(b(x[:3]).double(), exact[:3], 4e-3)
            assert close(b(x).double(), exact, 4e-3)  # of many
        assert close(b(x).double(), exact, 8e-3)  # and of everything but decoding
    assert torch.equal(model.embed.weight, small.embed.weight)
    x = model.embed(torch.arange(20))[None]
    assert close(small(x).float(), model(x).float(), 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 8, 40, 48, 72, 80, 96])
def test_int8_products_are_right_for_rows_of_any_length(n, dtype):
    """PyTorch's own, with AVX-512, read beyond rows of bfloat16: wrong numbers, or a crash."""
    layer = Int8Linear(nn.Linear(n, 30, dtype=dtype).requires_grad_(False))
    for rows in (1, 2, 3, 16):
        x = torch.randn(rows, n).to(dtype)
        exact = F.linear(x.double(), layer.weight * layer.scale.double()[:, None])
        with torch.inference_mode():
            found = layer(x).double()
        assert close(found, exact + layer.bias.double(), 4 * torch.finfo(dtype).eps)


def test_without_triton_pytorch_decodes_and_a_line_says_so(folder_of, monkeypatch, capsys):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "lab.kernels", raising=False)
    monkeypatch.delattr("lab.kernels", raising=False)
    steps.use_kernels(model, [])
    said = capsys.readouterr().err
    assert said.startswith(
        "Triton's kernels cannot be used here, PyTorch's are used (ModuleNotFound"
    )
    assert said.count("\n") == 1 and model.attention is None and len(run(model, 2, [0])[0]) == 1


# ----------------------------------------------------------------------------------------- memory


def test_rows_that_do_not_fit_are_the_user_s_to_lower(folder_of, monkeypatch):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    c = model.config
    position = 2 * c.layers * c.kv_heads * c.head_dim * 4
    row = position * (64 + 20) + 32 * c.vocab_size  # 50 positions take up 64
    prompt = 20 * (position + 4 * (c.d + c.ffn) * 4)  # of the one to come, with a layer's results
    # Laid out later, a second time.
    matrices = sum(m.weight.nbytes for m in model.modules() if isinstance(m, PackedLinear))

    def free(rows_of_memory):
        there = (rows_of_memory * row + prompt) / 0.9 + matrices
        monkeypatch.setattr(checkpoint, "free_memory", lambda device: there)

    for rows_of_memory in (math.inf, 100, 8.01):
        free(rows_of_memory)
        assert model.plan(8, 20, 30) == 8
    for rows_of_memory, rows in ((7.99, 7), (1.01, 1)):
        free(rows_of_memory)
        with pytest.raises(UserError, match=f"pass --batch-size {rows}, or lower"):
            model.plan(8, 20, 30)
        assert model.plan(rows, 20, 30) == rows
    # No longer than the context, which is 64 here.
    assert model.plan(1, 20, 10**9) == 1
    free(0.99)
    said = "a sequence of 50 positions needs .* lower --max-new-tokens"
    with pytest.raises(UserError, match=said):
        model.plan(8, 20, 30)
    free(math.inf)  # the system does not tell
    assert model.plan(8, 20, 30) == 8
    run(model, 2, [0])
    matrices = 0  # now they are
    free(8.01)
    assert model.plan(8, 20, 30) == 8
    free(7.99)
    with pytest.raises(UserError, match="pass --batch-size 7"):
        model.plan(8, 20, 30)
    plain, _ = M.load(str(folder_of("llama2", name="plain")), "cpu", "float32")
    assert plain.plan(8, 20, 30) == 8  # the plain model plans nothing


def test_the_plan_counts_what_the_cache_takes(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    cache, c = KVCache(model, 3, 50), model.config
    taken = sum(x.nbytes for x in cache.keys + cache.values)
    position = 2 * c.layers * c.kv_heads * c.head_dim * 4
    assert taken == 3 * position * (KVCache.rounded(50, model.device) + 1)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_the_bytes_of_the_weights_are_known_before(family, quantize, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "float16", quantize)
    said = fast.weight_bytes(model.config, torch.float16, quantize)
    unique = {x.data_ptr(): x.nbytes for x in [*model.parameters(), *model.buffers()]}
    if quantize is None:
        assert said == sum(unique.values())
    else:  # norms, scales and biases aside, which are little in a real model
        assert abs(said - sum(unique.values())) < 0.1 * said


COMPILED = pytest.param(
    "lab.fast compiled", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
)
MEMORY = """
import re, sys
from {module} import load
def memory(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load(sys.argv[1], "cpu", "bfloat16"{options})  # what is imported on the way
before = memory()
model, _ = load(sys.argv[2], "cpu", "bfloat16"{options})
assert (type(model).__name__ == "InCpp") == bool("{options}")
print(memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
@pytest.mark.skipif(has_amx(torch.bfloat16), reason="there weights have more copies")
@pytest.mark.parametrize("way", ["model", "lab.fast", COMPILED])
def test_loading_takes_hardly_more_memory_than_the_weights(way, folder_of, tmp_path):
    if way == "lab.fast" and packs(torch.device("cpu"), torch.bfloat16):
        pytest.skip("packed weights are a second copy")
    config = FAMILIES["llama2"] | {"hidden_size": 512, "intermediate_size": 2048}
    config |= {"num_hidden_layers": 12, "vocab_size": 50000}
    with torch.device("meta"):
        shapes = Transformer(config_from_json(config)).named_parameters()
    weights = {M.hf_name(n): torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in shapes}
    size, largest = sum(w.nbytes for w in weights.values()), 50000 * 512 * 2
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path, True)
    module, *compile = way.split()
    program = MEMORY.format(module=module, options=", compile=True" if compile else "")
    used = subprocess.run(
        [sys.executable, "-c", program, folder_of("llama2"), tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # One tensor at a time is mapped from its file.
    assert size > 150e6 and int(used.stdout) < 1.15 * size + largest


def test_a_model_s_memory_is_free_when_nobody_holds_it(folder_of):
    """At once: training lets go of the assistant before it begins."""
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    list(decode(model, [Request(prompt)], Sampler(model), 1, 3))
    weight = weakref.ref(model.layers[0].self_attn.qkv.weight)
    gc.disable()
    try:
        del model, prompt
        assert weight() is None
    finally:
        gc.enable()
