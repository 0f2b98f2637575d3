"""lab/cpu.py, lab/layers.cpp: prompts and steps in C++ are what they are, in bits of their own."""

import copy
import ctypes
import gc
import math
import shutil
import weakref

import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, PROCESSORS, close, edit
from make_golden import FAMILIES
from test_decode import Greedy, greedy, run
from torch import nn

from lab import checkpoint, cpu, fast, linear, native
from model import KVCache, Prompt, Request, Transformer
from soft_thinking import Settings, think

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
PARTS = ["x", "rows", "positions", "cos", "sin", "keys", "values", "places"]  # as C++ takes them
BEGINS = "prompts and steps in C++ cannot be used here, PyTorch's are used ("


@pytest.fixture
def no_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def compiled(folder, dtype="float32", quantize=None, used=True):
    model, _ = fast.load(str(folder), "cpu", dtype, quantize, compile=True)
    assert type(model) is (cpu.InCpp if used else Transformer)
    return model


def steps_of(model, ids, rows=1):
    """Hidden states [T, d] and logits [T, V] of the last of so many rows, which go alike."""
    cache, found = KVCache(model, rows, 1), []
    for t, embeds in enumerate(model.embed(ids)):  # from an empty cache that has to grow
        cache.reserve(t + 1)
        found.append(model.step(embeds.expand(rows, -1), cache))
    assert cache.lengths.tolist() == rows * [len(ids)]
    return tuple(torch.stack([x[-1] for x in part]) for part in zip(*found))


def prompt_of(model, ids, chunks, rows=1):
    """Hidden states [T, d] of the last of so many rows, which go alike, so many at once."""
    cache, found = KVCache(model, rows, 1), []
    for part in model.embed(ids).split(chunks):
        cache.reserve(int(cache.lengths[0]) + len(part))
        found.append(model(part.expand(rows, -1, -1), cache)[-1])
    assert cache.lengths.tolist() == rows * [len(ids)]
    return torch.cat(found)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_and_prompts_are_those_of_transformers(family, folder_of, capsys):
    model = compiled(folder_of(family))
    assert BEGINS not in capsys.readouterr().err
    expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
    ids = expected["ids"]
    hidden, logits = steps_of(model, ids, 3)
    assert close(hidden, expected["hidden"], 1e-5)
    assert logits.dtype == torch.float32 and close(logits[-8:], expected["logits"], 1e-5)
    for rows, chunks in (1, len(ids)), (3, [1, 7, len(ids) - 8]):
        assert close(prompt_of(model, ids, chunks, rows), expected["hidden"], 1e-5)
    turned, cache = model.embed(ids).T.contiguous().T[None], KVCache(model, 1, len(ids))
    cache.reserve(len(ids))
    assert close(model(turned, cache)[0], expected["hidden"], 1e-5)
    whole = model(model.embed(ids)[None])[0]  # without a cache
    assert close(whole, expected["hidden"], 1e-5)
    assert close(model.logits(whole[-8:]), expected["logits"], 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-bias"])
def test_steps_and_prompts_say_what_the_plain_ones_say(
    family, dtype, tolerance, quantize, folder_of, no_amx
):
    folder, ids = str(folder_of(family)), torch.arange(50, 110)
    plain, _ = fast.load(folder, "cpu", dtype, quantize)
    model = compiled(folder, dtype, quantize)
    expected = *steps_of(plain, ids), prompt_of(plain, ids, [40, 20])
    for one, other in zip((*steps_of(model, ids), prompt_of(model, ids, [40, 20])), expected):
        assert one.dtype == other.dtype and close(one, other, tolerance)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-bias"])
def test_what_is_checked_is_right_on_every_processor(
    family, processor, dtype, quantize, folder_of, as_on
):
    as_on(processor)
    cpu.check(checkpoint.check_config(folder_of(family)), dtype, quantize)


def check_finds(what, folder):
    with pytest.raises(ArithmeticError, match=f"{what} in bfloat16 is off by"):
        cpu.check(checkpoint.check_config(folder), torch.bfloat16, None)


@pytest.mark.parametrize("what", ["a step", "a prompt"])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_checked_is_found_out(part, what, folder_of, no_amx, monkeypatch):
    """What reads one thing wrongly is off by more than rounding, in bfloat16, too."""
    place, ran = PARTS.index(part), cpu.Table.run

    def wrong(self, *arguments):
        arguments, zeros = list(arguments), torch.zeros(3000, dtype=torch.long)
        if (arguments[9] is None) != (what == "a prompt"):
            return ran(self, *arguments)
        if part == "x":  # the first embedding alone
            (ctypes.c_uint16 * 304).from_address(arguments[0])[:] = 304 * [0x3F80]
        elif part in ("rows", "positions"):
            arguments[place] = zeros.data_ptr()
        elif part in ("cos", "sin"):  # one of them in place of both
            arguments[3] = arguments[4] = arguments[place]
        elif part in ("keys", "values"):  # those of the layers change places
            arguments[place] = type(arguments[place])(*list(arguments[place])[::-1])
        elif arguments[10] * arguments[11] > 98:  # the last row's go where the first row's are
            numbers = (ctypes.c_int64 * (arguments[10] * arguments[11])).from_address(arguments[7])
            numbers[-1], numbers[0] = numbers[0], numbers[-1]
        ran(self, *arguments)

    monkeypatch.setattr(cpu.Table, "run", wrong)
    check_finds(what, folder_of("qwen3"))


def test_norms_and_matrices_that_are_wrong_are_found_out(folder_of, no_amx, monkeypatch):
    address, in_panels = cpu.Table.address, linear.in_panels

    def unlike(self, x):
        return address(self, 1.1 * x if x is not None and x.dim() == 1 else x)

    with monkeypatch.context() as patch:
        patch.setattr(cpu.Table, "address", unlike)
        check_finds("a step", folder_of("qwen3"))
    monkeypatch.setattr(linear, "in_panels", lambda library, W: in_panels(library, 1.1 * W))
    check_finds("a step", folder_of("qwen2"))


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
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_a_prompts_bits_depend_on_no_chunks_other_rows_or_threads(
    dtype, quantize, folder_of, one_thread, no_amx
):
    folder, ids = folder_of("qwen3"), torch.arange(400) % 250
    edit(folder, max_position_embeddings=1024)
    model = compiled(folder, dtype, quantize)
    expected = prompt_of(model, ids, 400)
    for threads in 1, 2, 5:
        torch.set_num_threads(threads)
        for chunks, rows in ([150, 250], 1), ([1, 7, 300, 92], 1), (400, 3), ([399, 1], 2):
            assert torch.equal(prompt_of(model, ids, chunks, rows), expected)


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


@torch.inference_mode()
def test_a_copy_has_weights_of_its_own(folder_of):
    model, ids = compiled(folder_of("qwen3")), torch.arange(5)
    expected = *steps_of(model, ids), prompt_of(model, ids, 5)
    other = copy.deepcopy(model)
    other.lm_head.panels.view(torch.float32).neg_()
    hidden, logits = steps_of(other, ids)
    assert torch.equal(hidden, expected[0]) and torch.equal(logits, -expected[1])
    other.norm.weight.neg_()
    assert torch.equal(prompt_of(other, ids, 5), -expected[2])
    for one, other in zip((*steps_of(model, ids), prompt_of(model, ids, 5)), expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("family", ["qwen2", "llama2"])
def test_weights_are_there_once(family, quantize, folder_of, no_amx):
    model = compiled(folder_of(family), "bfloat16", quantize)
    said = fast.weight_bytes(model.config, torch.bfloat16, quantize, in_panels=True)
    there, filled = {x.data_ptr(): x.nbytes for x in [*model.parameters(), *model.buffers()]}, 0
    for m in model.modules():  # the last panel is filled up
        if isinstance(m, linear.PanelLinear):
            filled += m.panels[0, :, 0].nbytes * (-m.out_features % m.panels.shape[2])
    plain, _ = fast.load(str(folder_of(family, name="plain")), "cpu", "bfloat16", quantize)
    assert linear.bytes_read(model) == linear.bytes_read(plain) + filled
    if quantize is None:
        assert said == sum(there.values()) - filled
    else:  # norms, scales and biases aside, which are little in a real model
        assert abs(said - sum(there.values()) + filled) < 0.1 * said


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_other_weights_are_not_kept(quantize, folder_of, no_amx, monkeypatch):
    laid_out, weights = linear.in_panels, []

    def watched(products, W):
        weights.append(weakref.ref(W.untyped_storage()))
        return laid_out(products, W)

    monkeypatch.setattr(linear, "in_panels", watched)
    model = compiled(folder_of("qwen3"), "bfloat16", quantize)
    gc.collect()
    tied = model.config.tied and not quantize
    assert len(weights) >= 9 and [x() is not None for x in weights] == (len(weights) - 1) * [
        False
    ] + [tied]
    found = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert found() is None  # at once: nothing refers to it in a circle
    finally:
        gc.enable()


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
    with pytest.raises(ValueError, match="or the cache is full"):
        model(x[:, None], cache)
    cache.reserve(66)
    model.step(x, cache)
    with pytest.raises(ValueError, match="or the cache is full"):
        model(x[:, None].expand(-1, 70, -1), cache)
    model(x[:, None], cache)
    again = KVCache(model, 2, 70)
    again.reserve(1)
    expected = model.step(x, again)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="are unlike the model"):
        model.step(x.bfloat16(), cache)
    again.lengths.zero_()  # C++ has the numbers that it was given
    assert all(torch.equal(a, b) for a, b in zip(model.step(x, again), expected))
    assert model(x[:, None, :].expand(-1, 0, -1), again).shape == (2, 0, x.shape[1])


def test_it_computes_no_gradients(folder_of):
    model = compiled(folder_of("qwen3"))
    x = model.embed(torch.arange(6))[None].requires_grad_()
    cache = KVCache(model, 1, 8)
    cache.reserve(6)
    for given in (x, cache), (x,):
        with pytest.raises(ValueError, match="no gradients|without gradients"):
            model(*given)
    with pytest.raises(ValueError, match="no gradients"):
        model.step(x[0, :1], cache)


# --------------------------------------------------------------------------------- where it is not


def test_with_amx_prompts_and_many_rows_are_pytorchs(folder_of, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    plain, ran = Transformer.forward, []
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, x, cache=None: ran.append(x.shape[:2]) or plain(self, x, cache),
    )
    took = []
    for dtype, quantize, amx in (
        ("bfloat16", None, True),
        ("bfloat16", "int8", True),
        ("float32", None, False),
    ):
        model = compiled(folder_of("qwen3", name=f"{dtype}{quantize}"), dtype, quantize)
        many = model.layers[0].mlp.down_proj.many
        assert isinstance(many, (nn.Linear, linear.Int8Linear)) == amx
        if amx:
            many.register_forward_hook(
                lambda m, x, y: took.append(x[0].numel() // m.weight.shape[1])
            )
        ran.clear()
        took.clear()
        with torch.inference_mode():
            for rows in 1, 16, 17:
                steps_of(model, torch.arange(2), rows)
            prompt_of(model, torch.arange(33), [17, 16])
        assert ran == amx * [(17, 1), (17, 1), (1, 17), (1, 16)] and took == amx * [17, 17, 17]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_with_amx_more_copies_need_room(quantize, folder_of, monkeypatch, no_amx, capsys):
    folder = folder_of("qwen3")
    c = checkpoint.check_config(folder)
    needed = fast.weight_bytes(c, torch.bfloat16, quantize)
    wants = f"{BEGINS}MemoryError: with AMX copies of the weights want 0.0 GB, 0.0 GB are"
    least = 3 if quantize else 4
    for amx in False, True:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        for copies in least - 1, least, least + 0.1:
            there = copies * needed
            monkeypatch.setattr(checkpoint, "free_memory", lambda device, there=there: there)
            compiled(folder, "bfloat16", quantize, used=not amx or copies > least)
            assert (wants in capsys.readouterr().err) == (amx and copies <= least)


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
        ran = cpu.Table.run
        patch.setattr(cpu.Table, "run", lambda self, *x: ran(self, *x[:4], x[3], *x[5:]))
        assert said().startswith("ArithmeticError: a step in float32 is off by")

    def fails(*_, **__):
        raise RuntimeError("layers.cpp does not compile")

    monkeypatch.setattr(native, "library", fails)
    assert said().startswith("RuntimeError: layers.cpp does not compile")
