"""lab/cpu.py, lab/step.cpp: a step in C++ is the step, in bits of its own."""

import copy
import math
import shutil

import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, PROCESSORS, close, edit
from make_golden import FAMILIES
from test_decode import Greedy, greedy, run

from lab import checkpoint, cpu, fast, native
from model import KVCache, Prompt, Request, Transformer
from soft_thinking import Settings, think

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
BEGINS = "steps in C++ cannot be used here, PyTorch's are used ("


@pytest.fixture
def no_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def compiled(folder, dtype="float32", quantize=None, used=True):
    model, _ = fast.load(str(folder), "cpu", dtype, quantize, compile=True)
    assert isinstance(model.step, cpu.Step) == used
    return model


def steps_of(model, ids, rows=1):
    """Hidden states [T, d] and logits [T, V] of the last of so many rows, which go alike."""
    cache, found = KVCache(model, rows, 1), []
    for t, embeds in enumerate(model.embed(ids)):  # from an empty cache that has to grow
        cache.reserve(t + 1)
        found.append(model.step(embeds.expand(rows, -1), cache))
    assert cache.lengths.tolist() == rows * [len(ids)]
    return tuple(torch.stack([x[-1] for x in part]) for part in zip(*found))


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_transformers(family, folder_of, capsys):
    model = compiled(folder_of(family))
    assert (
        isinstance(model.step, cpu.Step)
        and model.attention
        and BEGINS not in capsys.readouterr().err
    )
    expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
    hidden, logits = steps_of(model, expected["ids"], 3)
    assert close(hidden, expected["hidden"], 1e-5)
    assert logits.dtype == torch.float32 and close(logits[-8:], expected["logits"], 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-bias"])
def test_a_step_says_what_the_plain_step_says(
    family, dtype, tolerance, quantize, folder_of, no_amx
):
    folder, ids = str(folder_of(family)), torch.arange(50, 80)
    plain, _ = fast.load(folder, "cpu", dtype, quantize)
    model = compiled(folder, dtype, quantize)
    for one, other in zip(steps_of(model, ids), steps_of(plain, ids)):
        assert one.dtype == other.dtype and close(one, other, tolerance)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-bias"])
def test_what_is_checked_is_right_on_every_processor(
    family, processor, dtype, quantize, folder_of, as_on
):
    model, _ = fast.load(str(folder_of(family)), "cpu", dtype, quantize)
    as_on(processor)
    cpu.check(model)


@pytest.mark.parametrize("part", ["cos", "sin", "positions", "keys", "values", "norms", "matrices"])
def test_what_is_checked_is_found_out(part, folder_of, monkeypatch):
    """A step that reads one thing wrongly is off by more than rounding, in bfloat16, too."""
    model, _ = fast.load(str(folder_of("qwen3")), "cpu", "bfloat16")
    place = {"positions": 2, "cos": 3, "sin": 4, "keys": 5, "values": 6}.get(part)
    ran, address, in_panels = cpu.LaidOut.run, cpu.LaidOut.address, cpu.in_panels

    def wrong(self, *arguments):
        arguments, zeros = list(arguments), torch.zeros(16, dtype=torch.long)
        if place == 2:
            arguments[2] = zeros.data_ptr()
        elif place in (3, 4):  # one of them in place of both
            arguments[3] = arguments[4] = arguments[place]
        else:  # those of the layers change places
            arguments[place] = type(arguments[place])(*list(arguments[place])[::-1])
        ran(self, *arguments)

    def unlike(self, x):
        return address(self, 1.1 * x if x is not None and x.dim() == 1 else x)

    if part == "matrices":
        monkeypatch.setattr(cpu, "in_panels", lambda library, W: in_panels(library, 1.1 * W))
    else:
        monkeypatch.setattr(cpu.LaidOut, *(("run", wrong) if place else ("address", unlike)))
    with pytest.raises(ArithmeticError, match="a step in bfloat16 is off by"):
        cpu.check(model)


# ------------------------------------------------------------------------------------ bits, memory


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_a_rows_bits_depend_on_no_number_of_rows_or_threads(
    dtype, quantize, folder_of, one_thread, no_amx
):
    folder = folder_of("qwen3")
    edit(folder, max_position_embeddings=1024)
    model = compiled(folder, dtype, quantize)
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randn(17, 2, 900, 16, generator=generator) for _ in range(4)]
    lengths = torch.randint(900, (17,), generator=generator)
    x = model.embed(torch.arange(17))

    @torch.inference_mode()
    def step(rows):
        cache = KVCache(model, len(rows), 900)
        cache.reserve(900)
        for own, theirs in zip(cache.keys + cache.values, kept):
            own[:, :, :900] = theirs[rows].to(own.dtype)
        cache.lengths.copy_(lengths[rows])
        out = model.step(x[rows], cache)
        at = torch.arange(len(rows)), slice(None), lengths[rows]
        return *out, *(y[at] for y in cache.keys + cache.values)  # and what it has stored

    expected = step(torch.arange(17))
    for threads in 1, 2, 5:
        torch.set_num_threads(threads)
        for rows in torch.tensor([3]), torch.tensor([16, 0, 9]), torch.arange(17).flip(0):
            assert all(torch.equal(a, b[rows]) for a, b in zip(step(rows), expected))


@torch.inference_mode()
def test_rows_that_are_not_in_use_are_left_out(folder_of):
    model = compiled(folder_of("llama3"))
    caches, x = [KVCache(model, 5, 8) for _ in range(2)], model.embed(torch.arange(5))
    caches[1].live = torch.tensor([False, True, False, False, True])
    for cache in caches:
        cache.reserve(1)
    none = KVCache(model, 5, 8)
    none.reserve(1)
    none.live = torch.zeros(5, dtype=torch.bool)
    assert not any(y.any() for y in (*model.step(x, none), *none.keys))
    whole, part = (model.step(x, cache) for cache in caches)
    for some in zip(*(cache.keys + cache.values for cache in caches)):
        whole, part = (*whole, some[0]), (*part, some[1])
    for one, other in zip(whole, part):
        assert torch.equal(one[[1, 4]], other[[1, 4]]) and one[1].any()
        assert not other[[0, 2, 3]].any() and one[0].any()


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_a_thoughts_bits_depend_on_no_batch_size(dtype, folder_of, no_amx):
    model, tokenizer = fast.load(str(folder_of("qwen3")), "cpu", dtype, compile=True)
    settings, found = Settings(max_new_tokens=20), []
    questions, samples = 2 * ["What", "is 17", "* 24?"], 3 * [0] + 3 * [1]
    for rows in 1, 2, 5, 7:
        records = dict(think(model, tokenizer, questions, settings, 0, samples, rows, trace=True))
        found.append([records[i] | {"seconds": 0} for i in range(6)])
    assert all(x == found[0] for x in found) and all(r["steps"] for r in found[0])


def test_lengths_of_any_kind_and_order_share_a_cache_that_grows(folder_of):
    folder = folder_of("qwen3")
    edit(folder, max_position_embeddings=512)
    plain, model = fast.load(str(folder), "cpu", "float32")[0], compiled(folder)
    ids = torch.randint(0, 250, (300,), generator=torch.Generator().manual_seed(0))

    def outs(model, order=(3, 60, 130, 300, 25), rows=3):
        requests = [Request(Prompt(model.embed(ids[:n])), data=(n, 20)) for n in order]
        found = greedy(model, requests, Greedy(model, rows), rows)
        return {n: (tokens, logits) for n, tokens, logits in found}

    expected, found = outs(plain), outs(model)
    for n, (tokens, logits) in expected.items():
        assert found[n][0] == tokens and close(found[n][1], logits, 1e-5)
    for again in outs(model, (25, 300, 60, 3, 130)), outs(model, rows=2):
        assert all(torch.equal(again[n][1], found[n][1]) for n in found)


@torch.inference_mode()
def test_what_is_not_finite_stays_in_its_row(folder_of):
    model = compiled(folder_of("qwen2"))
    cache, x = KVCache(model, 3, 8), model.embed(torch.arange(3)).clone()
    cache.reserve(1)
    x[1, 5] = math.nan
    hidden, logits = model.step(x, cache)
    assert (
        hidden.isfinite().all(1).tolist()
        == [True, False, True]
        == logits.isfinite().all(1).tolist()
    )
    assert not logits[1].isfinite().any()


def test_weights_may_change_and_a_copy_has_its_own(folder_of):
    folder, ids = folder_of("qwen3"), torch.arange(5)
    plain, model = fast.load(str(folder), "cpu", "float32")[0], compiled(folder)
    for part in "mlp.gate_up", "self_attn.o_proj":
        for m in plain, model:  # as an adapter does that is merged
            m.layers[0].get_submodule(part).weight.mul_(-1)
        with torch.inference_mode():
            hidden, logits = steps_of(model, ids)
            assert close(logits, steps_of(plain, ids)[1], 1e-5)
    other = copy.deepcopy(model)
    other.lm_head.weight.mul_(-1)
    with torch.inference_mode():
        found = steps_of(other, ids)
        assert torch.equal(found[0], hidden) and torch.equal(found[1], -logits)
        assert torch.equal(steps_of(model, ids)[1], logits)


@torch.inference_mode()
def test_what_does_not_belong_together_is_refused(folder_of):
    model, other = compiled(folder_of("qwen3")), compiled(folder_of("qwen2"), "bfloat16")
    cache, x = KVCache(model, 2, 70), model.embed(torch.arange(2))
    for embeds, reserved in (x, 0), (x[:1], 1), (x[:, :-1], 1), (x.bfloat16(), 1):
        cache.S = KVCache.rounded(reserved, x.device) if reserved else 0
        with pytest.raises(ValueError, match="are unlike the model, or the cache is full"):
            model.step(embeds, cache)
    with pytest.raises(ValueError, match="are unlike the model"):
        other.step(x.bfloat16(), cache)
    cache.reserve(64)
    for _ in range(64):
        model.step(x, cache)
    with pytest.raises(ValueError, match="or the cache is full"):
        model.step(x, cache)
    cache.reserve(65)
    model.step(x, cache)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="are unlike the model"):
        model.step(x.bfloat16(), cache)


def test_it_computes_no_gradients(folder_of):
    model = compiled(folder_of("qwen3"))
    x = model.embed(torch.arange(6))[None].requires_grad_()
    cache = KVCache(model, 1, 8)
    cache.reserve(6)
    with pytest.raises(ValueError, match="no gradients"):
        model(x, cache)
    model(x).sum().backward()  # without a cache
    assert x.grad.isfinite().all()


# --------------------------------------------------------------------------------- where it is not


def test_with_amx_prompts_and_many_rows_are_pytorchs(folder_of, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    plain, ran = Transformer.step, []
    monkeypatch.setattr(Transformer, "step", lambda *x: ran.append(len(x[1])) or plain(*x))
    kinds = ("bfloat16", None, [17]), ("bfloat16", "int8", []), ("float32", None, [])
    for dtype, quantize, expected in kinds:
        model = compiled(folder_of("qwen3", name=f"{dtype}{quantize}"), dtype, quantize)
        assert (model.attention is None) == (dtype == "bfloat16")
        ran.clear()
        with torch.inference_mode():
            for rows in 1, 16, 17:
                steps_of(model, torch.arange(2), rows)
        assert ran == 2 * expected


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_are_laid_out_where_there_is_room_for_it(quantize, folder_of, monkeypatch, capsys):
    folder = folder_of("qwen3")
    needed = fast.weight_bytes(checkpoint.check_config(folder), torch.float32, quantize)
    wants = f"{BEGINS}MemoryError: with a second copy of the weights they want 0.0 GB, 0.0 GB are"
    for copies in 2, 3, 3.1:
        there = copies * needed
        monkeypatch.setattr(checkpoint, "free_memory", lambda device, there=there: there)
        model = compiled(folder, "float32", quantize, used=copies == 3.1)
        assert model.attention and (wants in capsys.readouterr().err) == (copies < 3.1)


def test_where_it_cannot_be_used_a_line_says_so(folder_of, monkeypatch, capsys):
    folder = folder_of("qwen2")

    def said(dtype="float32", quantize=None):
        capsys.readouterr()
        model = compiled(folder, dtype, quantize, used=False)
        assert len(run(model, 2, [0])[0]) == 1
        (line,) = (x for x in capsys.readouterr().err.splitlines() if "compiled" not in x)
        assert line.startswith(BEGINS) and line.endswith(")")
        return line.removeprefix(BEGINS)

    assert said("float16", "int8") == "ValueError: not in float16: use bfloat16 or float32)"
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "prompt_attention", lambda *_: lambda q, *_: 2 * q)
        assert said().startswith("ArithmeticError: attention in float32 is off by")
    with monkeypatch.context() as patch:
        ran = cpu.LaidOut.run
        patch.setattr(cpu.LaidOut, "run", lambda self, *x: ran(self, *x[:4], x[3], *x[5:]))
        assert said().startswith("ArithmeticError: a step in float32 is off by")

    def fails(*_, **__):
        raise RuntimeError("step.cpp does not compile")

    monkeypatch.setattr(native, "library", fails)
    assert said().startswith("RuntimeError: step.cpp does not compile")
