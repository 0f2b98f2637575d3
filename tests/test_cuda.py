"""On a GPU everything is what it is on a CPU: one file to run where one is borrowed.

Without a GPU what needs one is skipped, and a few of the same tests run on the CPU.
"""

import dataclasses
import re
import subprocess
import sys
from functools import partial

import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, ROOT, close, edit, record_steps
from make_golden import FAMILIES
from softcot_pair import PROBLEMS, projection_of
from test_decode import Greedy, greedy, run, same_bits

import model as M
import softcot
from baselines import sampling
from lab import checkpoint, fast, steps, tasks, training
from lab.linear import Int8Linear
from lab.steps import Flags
from model import KVCache, Prompt, Request, UserError
from soft_thinking import Settings, think

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
EITHER = ["cpu", pytest.param("cuda", marks=cuda)]
either = pytest.mark.parametrize("device", EITHER)


@pytest.fixture
def loaded(folder_of, tmp_path):
    """loaded("qwen3", device): a golden model with room for long sequences, and its tokenizer."""

    def make(family, device, dtype="float32", **options):
        if not (folder := tmp_path / family).exists():
            edit(folder_of(family), max_position_embeddings=4096)
        return fast.load(str(folder), device, dtype, **options)

    return make


# --------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("load", [M.load, fast.load])
@pytest.mark.parametrize(
    "family, device", [("qwen2", "cpu"), *(pytest.param(f, "cuda", marks=cuda) for f in FAMILIES)]
)
def test_hidden_states_and_logits_are_those_of_transformers(
    family, device, load, dtype, tolerance, folder_of
):
    model, _ = load(str(folder_of(family)), device, dtype)
    file = GOLDEN / family / "expected.safetensors"
    expected = safetensors.torch.load_file(file, device)
    embeds = model.embed(expected["ids"])[None]
    assert close(model(embeds)[0], expected["hidden"], tolerance)
    cache, hidden = KVCache(model, 1, 40), []
    for part in (embeds[:, :23], embeds[:, 23:39], embeds[:, 39:]):
        cache.reserve(int(cache.lengths) + part.shape[1])
        hidden.append(model(part, cache)[0])
    assert close(torch.cat(hidden), expected["hidden"], tolerance)
    assert close(model.logits(torch.cat(hidden)[-8:]), expected["logits"], tolerance)


@either
def test_decoding_on_a_device_says_what_plain_decoding_on_a_cpu_says(device, folder_of):
    folder = str(folder_of("qwen3"))
    tokens, logits = run(M.load(folder, "cpu", "float32")[0], 4)
    found, its = run(fast.load(folder, device, "float32")[0], 4)
    assert found == tokens and all(close(its[i].cpu(), logits[i], 1e-5) for i in logits)


@either
def test_int8_weights_are_off_by_little(device, folder_of):
    folder = str(folder_of("qwen3"))
    plain, small = (fast.load(folder, device, "float32", q)[0] for q in (None, "int8"))
    for layer, exact in zip(small.modules(), plain.modules(), strict=True):
        if isinstance(layer, Int8Linear):
            x = torch.randn(4, 7, exact.in_features, device=device)
            made = layer.weight.double() * layer.scale[:, None].double()
            with torch.inference_mode():
                assert close(layer(x).double(), x.double() @ made.T, 1e-5)
    x = plain.embed(torch.arange(20, device=device))[None]
    assert close(small(x), plain(x), 0.05) and not torch.equal(small(x), plain(x))


# ----------------------------------------------------------------------------------- recorded steps


def recorded(model, monkeypatch):
    """From now on steps are recorded and replayed; the list of recordings, on a CPU of replays."""
    if model.device.type == "cpu":
        return record_steps(monkeypatch)
    made = []

    class Counted(steps.Recorder):
        def capture(self):
            made.append(super().capture())
            return made[-1]

    model.recorder = Counted
    return made


def soft_thinking(model, tokenizer, **options):
    questions, samples = ["a", "bcd", "a", "efghij", "bcd"], [0, 0, 1, 0, 3]
    s = Settings(max_new_tokens=25, **options)
    return think(model, tokenizer, questions, s, 5, samples, 2, trace=True)


def soft_reasoning(model, tokenizer, method):
    options = {"max_new_tokens": 8, "rounds": 2, "k": 3, "dimension": 8, "num_samples": 6}
    s = sampling.Settings(method=method, stop_threshold=0, **options)
    questions = [tasks.ask_number(text) for text in ("one?", "and two?", "what of three?")]
    return sampling.reason(model, tokenizer, questions, s, 7, batch_size=6)


def softcot_answers(model, tokenizer):
    s = softcot.Settings(thoughts=2, num_samples=3, temperature=1.0, max_new_tokens=20)
    return softcot.answer(model, tokenizer, ["1+1?", "What is 3+3?"], s, batch_size=4)


WAYS = {
    "Cold Stop": partial(soft_thinking, cold_stop_entropy=9, cold_stop_steps=4),
    "Gumbel": partial(soft_thinking, noise="gumbel"),
    "cot": partial(soft_thinking, method="cot"),
    "Perturbed": partial(soft_reasoning, method="soft"),
    "sc": partial(soft_reasoning, method="sc"),
    "fire": partial(soft_reasoning, method="fire"),
    "SoftCoT": softcot_answers,
}


@either
@pytest.mark.parametrize("way", WAYS)
def test_recorded_steps_are_the_steps(way, device, loaded, monkeypatch, capsys):
    model, tokenizer = loaded("qwen3", device)

    def records():
        return {i: record | {"seconds": 0} for i, record in WAYS[way](model, tokenizer)}

    model.recorder = None
    one_by_one = records()
    del model.recorder  # an instance's own hides what a test puts in the class
    recordings = recorded(model, monkeypatch)
    assert records() == one_by_one
    assert recordings and not capsys.readouterr().err


@cuda
def test_what_ends_a_sequence_comes_to_memory_that_the_device_copies_to_by_itself():
    live = torch.tensor([True, False, True], device="cuda")
    flags = Flags(live)
    assert flags.host.is_pinned() and flags.list() == [True, False, True]


@cuda
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.03)])
def test_a_compiled_step_is_the_step(dtype, tolerance, loaded, capsys):
    plain, _ = loaded("qwen3", "cuda", dtype)
    compiled, _ = loaded("qwen3", "cuda", dtype, compile=True)
    ids = torch.randint(0, 250, (600,), generator=torch.Generator().manual_seed(0)).cuda()

    def first_logits(model):
        requests = [Request(Prompt(model.embed(ids[:n])), data=(n, 20)) for n in (3, 600, 250)]
        return {n: logits[0] for n, _, logits in greedy(model, requests, Greedy(model, 3), 3)}

    expected, found = first_logits(plain), first_logits(compiled)
    assert all(close(found[n], expected[n], tolerance) for n in expected)
    assert same_bits(first_logits(compiled), found)
    assert capsys.readouterr().err.count("compiled the step for 3 sequences in ") == 1


# -------------------------------------------------------------------------------- Triton's kernels


@cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_kernels_are_used(family, dtype, folder_of, capsys):
    pytest.importorskip("triton", reason="Triton is not installed")
    from lab import kernels

    model, _ = fast.load(str(folder_of(family)), "cuda", dtype, "int8")
    assert model.attention is kernels.attend and not capsys.readouterr().err
    products = [x.product for x in model.modules() if isinstance(x, Int8Linear)]
    assert products == [kernels.int8_linear] * 9


@cuda
@pytest.mark.parametrize(
    "dtype, tolerance, quantize, compile",
    [
        ("float32", 1e-5, None, False),
        ("bfloat16", 0.03, None, False),
        ("float32", 1e-5, "int8", False),
        ("bfloat16", 0.03, "int8", True),
    ],
)
def test_steps_with_the_kernels_are_the_steps(dtype, tolerance, quantize, compile, loaded):
    model, _ = loaded("qwen3", "cuda", dtype, quantize=quantize, compile=compile)
    plain, _ = loaded("qwen3", "cuda", dtype, quantize=quantize)
    plain.attention = plain.recorder = None
    for module in plain.modules():
        if isinstance(module, Int8Linear):
            module.product = None
    ids = torch.randint(0, 250, (1500,), generator=torch.Generator().manual_seed(0)).cuda()

    def outs(model, lengths):
        requests = [Request(Prompt(model.embed(ids[:n])), data=(n, 12)) for n in lengths]
        return {n: logits for n, _, logits in greedy(model, requests, Greedy(model, 3), 3)}

    lengths = (1, 255, 256, 700, 1500)  # several sizes: several recordings
    expected, found = outs(plain, lengths), outs(model, lengths)
    # The first logits: later ones may follow another token where two are as good as equal.
    assert all(close(found[n][0], expected[n][0], tolerance) for n in lengths)
    assert same_bits(outs(model, lengths[::-1]), found)
    model.recorder = None
    assert same_bits(outs(model, lengths), found)


@cuda
def test_a_cache_of_more_than_2_to_the_31_numbers_is_read_where_it_is():
    kernels = pytest.importorskip("lab.kernels", reason="Triton is not installed")
    rows, K, capacity, h = 17, 8, 131073, 128
    if checkpoint.free_memory(torch.device("cuda")) < 2.2 * 2 * rows * K * capacity * h:
        pytest.skip("needs 10 GB")
    keys = torch.zeros(rows, K, capacity, h, device="cuda", dtype=torch.bfloat16)
    values = torch.zeros_like(keys)
    keys[-1, -1, 131000], values[-1, -1, 131000] = 1, 7
    q = torch.zeros(rows, 1, 2 * K, h, device="cuda", dtype=torch.bfloat16)
    q[-1, 0, -1] = 3  # 384 / sqrt(128) above the others: it takes nearly all of the weight
    positions = torch.full((rows, 1), 131071, device="cuda")
    y = kernels.attend_one(q, keys, values, positions, 131072)
    assert torch.allclose(y[-1, 0, -1].float(), torch.full((h,), 7.0, device="cuda"), atol=0.05)
    assert y[:, 0, :-2].abs().max() < 1e-3 and y[:-1].abs().max() < 1e-3


# ------------------------------------------------------------------------------- bits of neighbours


@either
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_a_request_yields_depends_to_the_bit_on_no_slot_neighbour_or_order(
    quantize, dtype, device, loaded
):
    model, _ = loaded("qwen2", device, dtype, quantize=quantize)
    _, logits = run(model, 4)
    for order in (range(9), [8, 2, 5, 0, 7, 1, 3, 6, 4], [6, 3], [0], [5, 8, 2, 1]):
        assert same_bits(run(model, 4, order)[1], logits)


@either
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_neighbour_of_another_length_changes_no_bit(dtype, device, loaded):
    model, _ = loaded("qwen3", device, dtype)
    ids = torch.randint(0, 250, (3000,), generator=torch.Generator().manual_seed(0)).to(device)
    alone = None
    for other in (1, 300, 1100, 3000):
        pair = [(1, ids[:other]), (0, ids[-250:])]
        for ordered in (pair, pair[::-1]):
            requests = [Request(Prompt(model.embed(x)), data=(i, 12)) for i, x in ordered]
            found = {i: logits for i, _, logits in greedy(model, requests, Greedy(model, 2), 2)}
            alone = found[0] if alone is None else alone
            assert torch.equal(found[0], alone), other


# ----------------------------------------------------------------------------------------- training


@either
@pytest.mark.parametrize(
    "dtype, of_loss, of_gradient", [("float32", 1e-5, 1e-4), ("bfloat16", 0.01, 0.1)]
)
def test_a_training_step_is_that_of_the_paper_s_formulas_on_a_cpu(
    dtype, of_loss, of_gradient, device, folder_of
):
    n, folders = 2, [folder_of("qwen3"), folder_of("llama2")]
    for folder in folders:
        edit(folder, max_position_embeddings=512)
    torch.manual_seed(0)
    start = projection_of()

    def both(device, dtype):
        pair = [fast.load(str(folder), device, dtype) for folder in folders]
        trained = {k: x.detach().to(device).requires_grad_() for k, x in start.items()}
        return *pair[0], *pair[1], trained

    model, tokenizer, assistant, assistant_tokenizer, trained = both(device, dtype)
    labels = [tokenizer.encode(" ".join(said)) for _, _, said in PROBLEMS[:3]]
    batch = [softcot.sequence(tokenizer, q, n, y) for (q, _, _), y in zip(PROBLEMS, labels)]
    asked = [softcot.assistant_ids(assistant_tokenizer, q, n) for q, _, _ in PROBLEMS[:3]]
    h = softcot.hidden_states(assistant, asked, n).to(device)
    T = softcot.soft_thoughts(trained, h)
    loss = softcot.negative_log_likelihood(model, batch, T, training.hidden_after)
    loss.backward()
    plain, _, small, its, exact = both("cpu", "float32")
    expected = 0
    for (q, _, _), s in zip(PROBLEMS, batch):
        thoughts = softcot.think_one(small, its, exact, q, n)
        expected += softcot.loss_one(plain, s, thoughts) * len(s.labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=of_loss)
    for name, x in trained.items():
        assert x.grad.isfinite().all()
        assert close(x.grad.cpu(), exact[name].grad, of_gradient), name


# ------------------------------------------------------------------------------------------- memory


@either
def test_the_plan_refuses_what_does_not_fit(device, loaded):
    model, _ = loaded("qwen3", device)
    assert model.plan(8, 20, 30) == 8
    model.config = dataclasses.replace(model.config, context=10**12)
    with pytest.raises(UserError, match="a sequence of 1000000000000 positions needs .* GB"):
        model.plan(8, 20, 10**12)
    with pytest.raises(UserError, match="1000000000 sequences of 50 positions may need"):
        model.plan(10**9, 20, 30)
    with pytest.raises(UserError, match="the weights need 1000000.0 GB in float32, .* are free"):
        checkpoint.check_memory(10**15, model.device, torch.float32, None)


@cuda
def test_what_the_plan_allows_fits(loaded):
    model, _ = loaded("qwen3", "cuda")
    model.config = dataclasses.replace(model.config, context=32768)
    free = checkpoint.free_memory(model.device)
    with pytest.raises(UserError) as refused:
        model.plan(10**9, 1000, 31000)
    rows = int(re.search(r"--batch-size (\d+)", str(refused.value))[1])
    assert model.plan(rows, 1000, 31000) == rows
    cache = KVCache(model, rows, 32000)
    taken = sum(x.nbytes for x in cache.keys + cache.values)
    assert 0.5 * free < taken < free
    assert checkpoint.free_memory(model.device) == pytest.approx(free - taken, abs=0.02 * free)
    del cache
    torch.cuda.empty_cache()  # for the program that the next test runs


# --------------------------------------------------------------------------------------- end to end


@either
def test_the_bundled_model_answers(device):
    command = [sys.executable, "soft_thinking.py", "--device", device, "--max-new-tokens", "300"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "The answer is " in ran.stdout
