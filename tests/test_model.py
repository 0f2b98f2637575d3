"""model.py against golden tensors of transformers, hand-written expectations, and everything a user can get wrong."""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, record_steps, write_tokenizer
from make_golden import FAMILIES
from tqdm import tqdm

import model as M
from model import (
    Config,
    Int8Linear,
    KVCache,
    Linear,
    Prompt,
    Request,
    Tokenizer,
    Transformer,
    UserError,
    check_prompt,
    decode,
    hf_tensors,
    load,
)

NATIVE = M.choose("cpu", None)[1] == torch.bfloat16


def close(a, b, tolerance):
    return ((a - b).norm() / b.norm()).item() < tolerance


# ------------------------------------------------------------------------------------------------------ the transformer


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_are_those_of_transformers(family, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "float32")
    expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
    hidden = model(model.embed(expected["ids"])[None])
    assert close(hidden[0], expected["hidden"], 1e-5)
    logits = model.logits(hidden[0, -8:])
    assert logits.dtype == torch.float32 and close(logits, expected["logits"], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_the_cache_equals_the_whole_sequence_at_once(family, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "float32")
    embeds = model.embed(safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")["ids"])
    whole = model(embeds[None])[0]
    for chunks in ([23], [1, 22], [10, 10, 3]):
        prefilled, steps, T = KVCache(model, 1, 4), [], 0  # starts too small: it must grow
        for n in chunks:
            prefilled.reserve(T + n)
            steps.append(model(embeds[None, T : T + n], prefilled)[0])
            T += n
        cache = KVCache(model, 3, 4)
        for row in range(3):
            cache.take(row, prefilled, 23)
        for t in range(23, 40):
            cache.reserve(t + 1)
            steps.append(model(embeds[None, t : t + 1].expand(3, 1, -1), cache)[1])
        assert close(torch.cat(steps), whole, 1e-5)
        assert cache.lengths.tolist() == [40, 40, 40]


def test_rows_of_very_different_lengths_share_a_cache_that_grows(folder_of):
    folder = folder_of("llama2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    model, _ = load(str(folder), "cpu", "float32")
    embeds = model.embed(torch.randint(0, 272, (2, 690), generator=torch.Generator().manual_seed(0)))
    whole, cache, lengths = model(embeds), KVCache(model, 3, 128), (100, 3)
    for row, T in enumerate(lengths):
        prefilled = KVCache(model, 1, T)
        prefilled.reserve(T)
        model(embeds[row : row + 1, :T], prefilled)
        cache.take(row, prefilled, T)
    cache.lengths[2] = 5000  # a row that nobody uses points anywhere
    sizes = set()
    for t in range(590):
        cache.reserve(101 + t)
        sizes.add(cache.S)
        hidden = model(torch.stack([embeds[row, T + t] for row, T in enumerate(lengths)] + [embeds[0, 0]])[:, None], cache)
        if t % 97 == 0 or t == 589:
            for row, T in enumerate(lengths):
                assert close(hidden[row, 0], whole[row, T + t], 1e-4)
    assert sizes == set(range(128, 705, 64))  # what attention reads is what is in use
    assert all(x.shape[1] == 705 for x in cache.keys)


def test_what_a_row_held_before_does_not_come_back(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    cache, short, embeds = KVCache(model, 1, 128), KVCache(model, 1, 5), model.embed(torch.arange(30))[None]
    for x in cache.keys + cache.values:
        x.fill_(float("nan"))
    short.reserve(5)
    model(embeds[:, :5], short)
    cache.take(0, short, 5)
    cache.reserve(6)
    assert close(model(embeds[:, 5:6], cache)[0, 0], model(embeds[:, :6])[0, 5], 1e-5)


def test_as_many_rows_as_fit_and_a_line_where_none_does(folder_of, monkeypatch, capsys):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    c = model.config
    position = 2 * c.layers * c.kv_heads * c.head_dim * 4
    row = position * (64 + 20) + 32 * c.vocab_size  # 50 positions take up 64
    for rows_of_memory, rows in ((100, 8), (8.01, 8), (7.99, 7), (1.01, 1)):
        monkeypatch.setattr(M, "free_memory", lambda device, n=rows_of_memory: (n * row + 20 * position) / 0.9)
        assert KVCache.fitting(model, 8, 20, 30) == rows
        assert capsys.readouterr().err.count("\n") == (rows < 8)
    assert KVCache.fitting(model, 1, 20, 10**9) == 1  # no longer than the context, which is 64 here
    monkeypatch.setattr(M, "free_memory", lambda device: (0.99 * row + 20 * position) / 0.9)
    with pytest.raises(UserError, match="a sequence of 50 positions needs .* lower --max-new-tokens"):
        KVCache.fitting(model, 8, 20, 30)


@pytest.mark.parametrize("device, least", [("cpu", 64), ("cuda", 256)])
def test_sizes_of_the_cache_are_few_and_close(device, least):
    sizes = [KVCache.rounded(n, torch.device(device)) for n in range(1, 40000)]
    assert all(n <= s <= max(least, n * (1.13 if device == "cpu" else 1.26)) + least for n, s in enumerate(sizes, 1))
    assert all(s % least == 0 and s <= t for s, t in itertools.pairwise(sizes)) and len(set(sizes)) == {"cpu": 58, "cuda": 25}[device]


def test_right_padding_and_later_positions_change_nothing_before(folder_of):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    a, b = torch.randn(1, 20, 32), torch.randn(1, 20, 32)
    mixed = torch.cat([a[:, :11], b[:, 11:]], 1)
    assert torch.equal(model(mixed)[:, :11], model(a)[:, :11])


def test_the_gradient_with_respect_to_the_embeddings_is_a_finite_difference():
    config = Config.from_json(FAMILIES["qwen2"])
    torch.manual_seed(0)
    model = Transformer(config).double()
    x, direction = torch.randn(1, 6, 32).double().requires_grad_(), torch.randn(1, 6, 32).double()

    def loss(e):
        return model.logits(model(e))[0, -1].log_softmax(-1)[7]

    (gradient,) = torch.autograd.grad(loss(x), x)
    h = 1e-4
    numeric = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    # The rotary angles are float32, a constant of the function: the difference quotient is exact in float64 all the same.
    assert abs(((gradient * direction).sum() - numeric) / numeric) < 1e-6


def test_a_bfloat16_model_keeps_its_rotary_frequencies_in_float32():
    model = Transformer(Config.from_json(FAMILIES["llama3"])).to(torch.bfloat16)
    model(torch.zeros(1, 3, 32, dtype=torch.bfloat16))
    assert model.cos.dtype == torch.float32
    assert model.logits(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- decoding


class Greedy:
    """The smallest method that keeps all its state on the device: argmax, a limit per request, and every row's logits."""

    def __init__(self, model, rows):
        self.model, self.data, self.began = model, [None] * rows, []
        self.t, self.limit = torch.zeros(2, rows, dtype=torch.long)
        self.tokens, self.logits = torch.zeros(rows, 64, dtype=torch.long), torch.zeros(rows, 64, model.config.vocab_size)

    def begin(self, row, request):
        self.data[row], self.t[row], self.limit[row] = request.data[0], 0, request.data[1]
        self.began.append((row, request.data[0]))

    def step(self, logits, live):
        tokens, rows = logits.argmax(-1), torch.arange(len(logits))
        self.tokens[rows, self.t], self.logits[rows, self.t] = tokens, logits
        self.t += live
        return self.model.embed(tokens), self.t >= self.limit

    def end(self, row):
        t = int(self.t[row])
        return self.data[row], self.tokens[row, :t].tolist(), self.logits[row, :t].clone()


LIMITS = (20, 5, 13, 1, 9, 20, 2, 7, 16)


def prompts(model, count=9):
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 30, 8, 2, 25, 11, 5][:count]
    return [model.embed(torch.randint(0, 272, (n,), generator=generator)) for n in lengths]


def run(model, rows, order=range(9), method=None):
    """Request -> its tokens, and its logits [tokens, V]."""
    embeds = prompts(model)
    requests = [Request(Prompt(embeds[i]), (i, LIMITS[i])) for i in order]
    outs = list(decode(model, requests, method or Greedy(model, rows), rows))
    assert sorted(out[0] for out in outs) == sorted(order)
    return {out[0]: out[1] for out in outs}, {out[0]: out[2] for out in outs}


def same_bits(a, b):
    return all(torch.equal(a[i], b[i]) for i in a)


DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.skipif(not NATIVE, reason="no bfloat16 instructions"))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_a_request_yields_depends_to_the_bit_on_no_slot_neighbour_or_order(dtype, quantize, folder_of):
    model, _ = load(str(folder_of("qwen2")), "cpu", dtype, quantize)
    tokens, logits = run(model, 4)
    assert [len(tokens[i]) for i in range(9)] == list(LIMITS)
    for order in ([8, 2, 5, 0, 7, 1, 3, 6, 4], [4, 0], [6, 3], [0], [3], [5, 8, 5 - 3, 1]):
        assert same_bits(run(model, 4, order)[1], logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_neighbour_of_another_length_changes_no_bit(dtype, folder_of):
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    model, _ = load(str(folder), "cpu", dtype)
    ids = torch.randint(0, 250, (3000,), generator=torch.Generator().manual_seed(0))
    for mine in (3, 60, 130):
        alone = None
        for other in (1, 100, 500, 1100, 3000):
            requests = [Request(Prompt(model.embed(ids[:other])), (1, 12)), Request(Prompt(model.embed(ids[-mine:])), (0, 12))]
            for ordered in (requests, requests[::-1]):
                for i, _, logits in decode(model, ordered, Greedy(model, 2), 2):
                    if i == 0:
                        alone = logits if alone is None else alone
                        assert torch.equal(logits, alone), (mine, other)


def test_decoding_is_greedy_decoding_of_the_whole_sequence(folder_of):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    for rows in (1, 4):
        outs, _ = run(model, rows)
        for i, prompt in enumerate(prompts(model)):
            embeds = torch.cat([prompt, model.embed(torch.tensor(outs[i]))])
            logits = model.logits(model(embeds[None])[0])
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == outs[i]


def test_a_finished_rows_place_is_taken_at_once(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    method, steps = Greedy(model, 4), []
    method.step = lambda logits, live: (steps.append(live.sum().item()), Greedy.step(method, logits, live))[1]
    run(model, 4, method=method)
    assert steps[: len(steps) - max(LIMITS)] == [4] * (len(steps) - max(LIMITS)) and sum(steps) == sum(LIMITS)
    assert method.began[:5] == [(0, 0), (1, 1), (2, 2), (3, 3), (3, 4)]  # the fourth request has one step to make


@pytest.mark.parametrize("late", [1, 2, 5])
def test_an_end_may_be_noticed_some_steps_late(late, folder_of, monkeypatch):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    tokens, logits = run(model, 4)
    monkeypatch.setitem(M.LATE, "cpu", late)
    found, its = run(model, 4)
    assert found == tokens and same_bits(its, logits)


def test_steps_can_be_recorded_and_replayed(folder_of, monkeypatch):
    folder = folder_of("llama3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    model, _ = load(str(folder), "cpu", "float32")
    expected = run(model, 4)
    replays = record_steps(monkeypatch)
    found = run(model, 4)
    assert found[0] == expected[0] and same_bits(found[1], expected[1]) and len(replays) > 10



def test_where_steps_cannot_be_recorded_they_run_one_by_one(folder_of, monkeypatch, capsys):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    expected = run(model, 4)

    def record(graphs):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(M, "RECORDED", {"cpu"})
    monkeypatch.setattr(M.Graphs, "record", record)
    found = run(model, 4)
    assert found[0] == expected[0] and same_bits(found[1], expected[1])
    assert capsys.readouterr().err == "steps cannot be recorded here, and run one by one (operation not permitted)\n"


def test_a_recording_keeps_the_rotary_table_that_it_reads(monkeypatch):
    model = Transformer(Config.from_json(FAMILIES["llama3"]))
    cache, tables = SimpleNamespace(S=1000, moves=0), []

    def record(graphs):
        tables.append(weakref.ref(model.cos))
        return SimpleNamespace(replay=lambda: None)

    monkeypatch.setattr(M.Graphs, "record", record)
    graphs = M.Graphs(model, lambda: model.rotation(torch.zeros(1, 1, dtype=torch.long), cache.S), cache)
    for cache.S in (1000, 5000, 1000):
        graphs()
    gc.collect()
    assert len(tables) == 2 and tables[0]() is not None and tables[1]() is model.cos
    cache.moves += 1
    graphs()
    gc.collect()
    assert len(tables) == 3 and tables[0]() is None


def test_requests_may_wait_for_results(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    alone, _ = run(model, 2)
    embeds, got = prompts(model), {}

    def requests():
        yield Request(Prompt(embeds[0]), (0, 20))
        while 0 not in got:
            yield None
        yield Request(Prompt(embeds[1]), (1, 5))
        yield Request(Prompt(embeds[2]), (2, 13))

    for i, tokens, _ in decode(model, requests(), Greedy(model, 2), 2):
        got[i] = tokens
    assert got == {i: alone[i] for i in range(3)}


def forwards(monkeypatch):
    """The lengths of what goes through the model, steps aside."""
    lengths, forward = [], Transformer.forward

    def spy(self, embeds, cache=None):
        lengths.append(embeds.shape[1])
        return forward(self, embeds, cache)

    monkeypatch.setattr(Transformer, "forward", spy)
    return lengths


def test_requests_of_one_prompt_share_its_prefill(folder_of, monkeypatch):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    lengths, prompt = forwards(monkeypatch), Prompt(prompts(model)[3])
    outs = [out[1] for out in decode(model, [Request(prompt, (i, 6)) for i in range(5)], Greedy(model, 3), 3)]
    assert lengths == [29] and all(out == outs[0] for out in outs)  # the thirtieth is fed in the first step


def test_a_long_prompt_is_taken_in_by_chunks_between_the_steps_of_the_others(folder_of, monkeypatch):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    whole, _ = run(model, 2, [0, 3])
    monkeypatch.setattr(Prompt, "CHUNK", 7)
    lengths, embeds, log = forwards(monkeypatch), prompts(model), []
    method = Greedy(model, 2)
    method.step = lambda logits, live: (log.append(len(lengths)), Greedy.step(method, logits, live))[1]
    requests = [Request(Prompt(embeds[0]), (0, 20)), Request(Prompt(embeds[3]), (3, 1))]
    assert {i: tokens for i, tokens, _ in decode(model, requests, method, 2)} == whole
    assert lengths == [2, 7, 7, 7, 7, 1] and log[:4] == [2, 3, 4, 5]  # one chunk between two steps


# ------------------------------------------------------------------------------------------------------ other layouts


@pytest.mark.skipif(not NATIVE, reason="this processor has no bfloat16 instructions")
@pytest.mark.parametrize("family", ["llama3", "qwen2", "llama-bias"])
def test_packed_weights_multiply_as_the_weights_do_and_follow_their_changes(family, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "bfloat16")
    x, linear = torch.randn(5, 1, 32).bfloat16(), model.blocks[0].attention.qkv
    model.pack()
    for _ in range(2):
        exact = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
        with torch.inference_mode():
            assert close(linear(x).double(), exact, 4e-3)
        with torch.no_grad():
            assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))  # only decoding uses them
            linear.weight.mul_(-0.5)
        model.pack()
    whole, _ = run(model, 3)
    for m in model.modules():
        if isinstance(m, Linear):
            assert m.packed is not None
    assert len(whole) == 9


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="Inductor of torch 2.6 writes C++ that does not compile")
def test_a_compiled_step_is_the_step(folder_of, capsys):
    folder = folder_of("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    (plain, _), (compiled, _) = load(str(folder), "cpu", "float32"), load(str(folder), "cpu", "float32", compile=True)
    ids = torch.randint(0, 250, (300,), generator=torch.Generator().manual_seed(0))

    def outs(model, order=(3, 60, 130, 300, 25)):
        requests = [Request(Prompt(model.embed(ids[:n])), (n, 20)) for n in order]
        return {n: (tokens, logits) for n, tokens, logits in decode(model, requests, Greedy(model, 3), 3)}

    graphs = torch._dynamo.utils.counters["stats"]
    before, expected, found = graphs["unique_graphs"], outs(plain), outs(compiled)
    for n, (tokens, logits) in expected.items():
        assert found[n][0] == tokens and close(found[n][1], logits, 1e-5)
    again = outs(compiled, (25, 300, 60, 3, 130))
    assert all(torch.equal(again[n][1], found[n][1]) for n in found)
    assert graphs["unique_graphs"] == before + 1  # compiled once, for lengths of 64 to 320 and a cache that grew
    assert capsys.readouterr().err.count("compiled the step for 3 sequences in ") == 1


def test_without_a_compiler_there_is_a_line(folder_of):
    ran = subprocess.run([sys.executable, ROOT / "soft_thinking.py", "--compile", "--device", "cpu"], check=False, text=True,
                         capture_output=True, env=os.environ | {"CXX": "no-such-compiler"})
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert "compiling for a CPU needs a C++ compiler, and none was found" in ran.stderr
    with pytest.raises(UserError, match="unknown quantisation int4: use int8"):
        load(str(folder_of("llama3")), "cpu", quantize="int4")


def test_int8_by_hand():
    linear = Linear(3, 2, bias=True)
    linear.weight.data = torch.tensor([[127.0, -64.0, 0.4], [0.0, 0.0, 0.0]])
    linear.bias.data = torch.tensor([1.0, 2.0])
    q = Int8Linear(linear)
    assert q.weight.tolist() == [[127, -64, 0], [0, 0, 0]] and q.scale[0] == 1
    assert q(torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[64.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_are_off_by_half_a_step_at_most(dtype, folder_of):
    folder = str(folder_of("qwen3"))
    (model, _), (small, _) = load(folder, "cpu", dtype), load(folder, "cpu", dtype, "int8")
    for a, b in zip([m for m in model.modules() if isinstance(m, Linear)], [m for m in small.modules() if isinstance(m, Int8Linear)], strict=True):
        step = b.scale[:, None].double()
        assert ((b.weight.double() * step - a.weight.double()).abs() <= step * (0.5 + 1e-4)).all() and b.weight.abs().max() == 127
        x = torch.randn(4, 7, a.in_features).to(a.weight.dtype)
        exact = F.linear(x.double(), b.weight.double() * step)
        with torch.inference_mode():  # the kernel of decoding, then that of everything else
            assert close(b(x).double(), exact, 4e-3)
        assert close(b(x).double(), exact, 8e-3)
    assert torch.equal(model.embed.weight, small.embed.weight)
    x = model.embed(torch.arange(20))[None]
    assert close(small(x).float(), model(x).float(), 0.05)


# ----------------------------------------------------------------------------------------------------------- loading


def test_shards_and_one_file_load_the_same(folder_of):
    folder = folder_of("qwen3")
    whole, _ = load(str(folder), "cpu", "float32")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[::2], names[1::2])):
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded, _ = load(str(folder), "cpu", "float32")
    for name, tensor in hf_tensors(whole).items():
        assert torch.equal(tensor, hf_tensors(sharded)[name])
        assert torch.equal(tensor, tensors[name].float())  # and every tensor is at its place
    os.remove(folder / files[1])
    with pytest.raises(UserError, match="1 of 2 shards missing, first model-00002-of-00002"):
        load(str(folder))


def test_small_chunks_and_the_file_s_own_dtype_read_the_same_bytes(folder_of):
    folder = folder_of("llama3")
    model, _ = load(str(folder), "cpu", "bfloat16")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    views = hf_tensors(model)
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    places = M.check_tensors([folder / "model.safetensors"], views, tied=True)
    for view in views.values():
        view.zero_()
    M.read_weights(places, views, tqdm(disable=True), chunk=64)
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)


def test_loading_takes_hardly_more_memory_than_the_weights(tmp_path):
    config = FAMILIES["llama2"] | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 50000}
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in hf_tensors(Transformer(Config.from_json(config))).items()}
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    size = sum(w.nbytes for w in weights.values())
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path, True)
    script = ("import resource, sys, model, torch; rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
              "torch.zeros(1000).sum(); before = rss(); m, _ = model.load(sys.argv[1], 'cpu', 'bfloat16'); print(rss() - before)")
    used = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert size > 150e6 and int(used.stdout) < 1.15 * size


def test_end_of_sequence_ids_come_from_both_files(folder_of):
    model, _ = load(str(folder_of("qwen2")), "cpu")
    assert model.config.eos_ids == (257, 261)


def test_version_4_and_5_configurations_read_the_same():
    four, five = Config.from_json(FAMILIES["llama3"]), Config.from_json(FAMILIES["llama3-v5"])
    assert four.rope_theta == five.rope_theta
    assert {k: five.rope[k] for k in four.rope} == four.rope


def test_yarn_lengthens_the_context_and_linear_leaves_it():
    assert Config.from_json(FAMILIES["qwen2"] | {"rope_scaling": {"type": "yarn", "factor": 4.0}}).context == 256
    assert Config.from_json(FAMILIES["llama-linear"]).context == 64


def test_aliases_name_the_instruct_and_reasoning_repositories():
    assert M.ALIASES["qwen2.5-0.5b"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert M.ALIASES["qwen3-32b"] == "Qwen/Qwen3-32B"
    assert M.ALIASES["r1-qwen-1.5b"] == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert M.ALIASES["smollm2-135m"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert M.ALIASES["smollm2-1.7b"] == "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    assert len(M.ALIASES) == 7 + 6 + 1 + 4 + 2 + 1 + 2 + 1 + 1 + 3


def test_a_cached_model_works_without_a_network(folder_of, tmp_path):
    snapshot = tmp_path / "hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder_of("llama3"), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    script = "import model; m, t = model.load('smollm2-135m', 'cpu'); print(m.config.vocab_size)"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "272"


@pytest.mark.parametrize("error, said", [
    ("GatedRepoError", "is gated: accept its terms at https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct, then run `hf auth login`"),
    ("RepositoryNotFoundError", "no repository meta-llama/Llama-3.1-8B-Instruct on Hugging Face"),
    ("LocalEntryNotFoundError", "cannot download meta-llama/Llama-3.1-8B-Instruct, and it is not in the cache"),
    (None, "cannot download meta-llama/Llama-3.1-8B-Instruct"),
])
def test_what_the_hub_answers_is_one_line_with_a_remedy(error, said, monkeypatch):
    kind = getattr(M.hub_errors, error) if error else TimeoutError

    def download(*args, **options):
        assert options["allow_patterns"] == ["*.safetensors", "*.json", "chat_template.jinja"]
        raise kind.__new__(kind)

    monkeypatch.setattr(M.huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=said):
        load("llama-3.1-8b")


def test_float16_loads_and_damaged_weights_are_noticed_at_the_first_prompt(folder_of):
    folder = folder_of("qwen2")
    model, _ = load(str(folder), "cpu", "float16")
    prompt = Prompt(model.embed(torch.tensor([1, 2, 3])))
    prompt.prefill(model)
    assert prompt.cache.keys[0].dtype == torch.float16
    model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        Prompt(model.embed(torch.tensor([1, 2, 3]))).prefill(model)


# --------------------------------------------------------------------------------------------------------- tokenizer


def test_chats_render_as_the_template_says(folder_of):
    tokenizer = Tokenizer(folder_of("llama3"))
    assert tokenizer.render("héllo") == "<|im_start|>user\nhéllo<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    assert ids[0] == 256 and ids.count(257) == 2
    assert tokenizer.decode(ids) == "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("ab") == [tokenizer.core.token_to_id("a"), tokenizer.core.token_to_id("b")]


TEMPLATES = [  # features that published templates use, and what they must render for [{role: user, content: 'a < "é"'}]
    ("{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}", "<|im_start|>|<|im_end|>|a < \"é\""),
    ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a < \\"é\\""}'),
    ("{%- if tools is none and not documents %}\n    none\n{%- endif %}\n", "    none"),
    ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
    ("{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = 5 %}{% endfor %}{{ ns.x }}", "5"),
    ("{{ 'off' if enable_thinking is defined and not enable_thinking else 'on' }}", "off"),
    ("{{ strftime_now('%Y') | length }}", "4"),
]


@pytest.mark.parametrize("template, expected", TEMPLATES)
def test_template_features(template, expected, tmp_path):
    write_tokenizer(tmp_path, True, template)
    messages = [{"role": "user", "content": 'a < "é"'}]
    assert Tokenizer(tmp_path).render(messages, enable_thinking=False) == expected


def test_the_template_file_goes_before_the_configuration_and_lists_have_a_default(tmp_path):
    write_tokenizer(tmp_path, True, [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert Tokenizer(tmp_path).render("x") == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer(tmp_path).render("x") == "file"


@pytest.mark.parametrize("template, said", [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages.append(1) }}", "unsafe|not safely"),
    ("{{ 1 + 'x' }}", "unsupported operand"),
])
def test_templates_run_in_the_sandbox_and_may_refuse(template, said, tmp_path):
    write_tokenizer(tmp_path, True, template)
    with pytest.raises(UserError, match=said):
        Tokenizer(tmp_path).chat("x")


# --------------------------------------------------------------------------------------------------------- bad input


def edit(folder: Path, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | changes).items() if v != "DELETE"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes, said", [
    ({"model_type": "gemma2"}, "unsupported architecture: found gemma2; supported are llama, qwen2, qwen3, mistral"),
    ({"model_type": "qwen3_moe"}, "found qwen3_moe"),
    ({"hidden_act": "gelu"}, "unsupported activation: found gelu; supported is silu"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "unsupported RoPE type: found longrope; supported are default"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3 lacks low_freq_factor, high_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "gptq"}}, "unsupported quantisation: found gptq"),
    ({"model_type": "mistral", "sliding_window": 16, "use_sliding_window": "DELETE"}, "sliding window of 16"),
    ({"use_sliding_window": True, "sliding_window": 16}, "sliding window of 16"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "unsupported YaRN option: found truncate"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "the RoPE factor is 0"),
    ({"rope_scaling": {"type": "linear", "factor": "two"}}, "a value of the wrong kind"),
    ({"rope_scaling": "yarn"}, "a value of the wrong kind"),
    ({"hidden_size": None}, "hidden_size is None, not a positive whole number"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"quantization_config": "gptq"}, "unsupported quantisation: found gptq"),
    ({"hidden_size": "DELETE"}, "config.json lacks hidden_size"),
    ({"num_hidden_layers": 3}, r"12 missing \(model.layers.2.input_layernorm.weight, .*, \.\.\.\)"),
    ({"num_hidden_layers": 1}, r"12 unexpected \(model.layers.1"),
    ({"vocab_size": 300}, r"1 misshapen \(model.embed_tokens.weight \[272, 32\] instead of \[300, 32\]\)"),
])
def test_a_configuration_that_does_not_fit_is_refused(changes, said, folder_of):
    folder = folder_of("qwen2")
    edit(folder, **changes)
    with pytest.raises(UserError, match=said):
        load(str(folder), "cpu")


def test_folders_that_lack_something_are_refused(folder_of, tmp_path):
    for name, said in (("config.json", "has no config.json"), ("tokenizer.json", "has no tokenizer.json"),
                       ("model.safetensors", r"has no \*.safetensors weights")):
        folder = folder_of("qwen2", name=name + "-gone")
        (folder / name).unlink()
        with pytest.raises(UserError, match=said):
            load(str(folder), "cpu")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only pickle weights \(pytorch_model.bin\): refused, since a pickle can run any code"):
        load(str(folder), "cpu")
    with pytest.raises(UserError, match="no folder"):
        load(str(tmp_path / "nowhere"))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        load(str(folder), "cpu")
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json is not a JSON object"):
        load(str(folder), "cpu")
    (folder / "tokenizer.json").write_text("{}")
    shutil.copy(GOLDEN / "qwen2/config.json", folder)
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        load(str(folder), "cpu")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_weights_are_named(damage, folder_of):
    folder = folder_of("qwen2")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes({"truncated": data[:-100], "header": b"\xff" * 8 + data[8:], "empty": b""}[damage])
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupt"):
        load(str(folder), "cpu")


def test_quantised_tensors_and_shards_outside_the_folder_are_refused(folder_of):
    folder = folder_of("qwen2")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight is I8; supported are bfloat16"):
        load(str(folder), "cpu")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        load(str(folder), "cpu")


def test_a_tied_head_and_old_rotary_tensors_in_the_file_are_no_error(folder_of):
    folder = folder_of("qwen2")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    load(str(folder), "cpu")


@pytest.mark.parametrize("name, said", [
    ("qwen2.5-7", "unknown model qwen2.5-7: nearest aliases are qwen2.5-7b"),
    ("Qwen3-8", "nearest aliases are qwen3-8b"),
    ("a/b/c", "no folder a/b/c"),
    ("~nobody-of-that-name/x", "no folder ~nobody"),
    ("x" * 5000, "no folder xxx"),
])
def test_misspelt_names_get_the_nearest(name, said):
    with pytest.raises(UserError, match=said):
        load(name)


def test_devices_dtypes_and_memory(folder_of, monkeypatch):
    folder = str(folder_of("qwen2"))
    with pytest.raises(UserError, match="unknown device"):
        load(folder, "tpu9")
    with pytest.raises(UserError, match="unknown dtype"):
        load(folder, "cpu", "int3")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"no device cuda: .* sees 0 CUDA"):
            load(folder, "cuda")
    monkeypatch.setattr(M, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"weights need 0.0 GB in float32, 0.0 GB are free on cpu: use --dtype bfloat16"):
        load(folder, "cpu", "float32")


def test_prompts_must_fit_context_and_vocabulary(folder_of):
    model, _ = load(str(folder_of("qwen2")), "cpu")
    check_prompt(model.config, [271] * 63)
    with pytest.raises(UserError, match="the prompt has 64 tokens, the context window 64"):
        check_prompt(model.config, [1] * 64)
    with pytest.raises(UserError, match=r"window 64 \(of the question 'Why\?'\): shorten it"):
        check_prompt(model.config, [1] * 64, "Why?")
    with pytest.raises(UserError, match="gives id 272, the model has 272"):
        check_prompt(model.config, [272])
