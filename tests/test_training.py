"""lab/training.py, lab/trained.py, baselines/lora.py: training that goes on wherever it was cut."""

import errno
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from softcot_pair import assert_same, data, loaded, outcome, pair, trains

import model as plain
import softcot
from baselines import lora
from lab import fast, files, trained
from lab.training import checkpointed, epoch_order, hidden_after
from softcot import Training

__all__ = ["data", "loaded", "pair"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small are slower on two


# ----------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize(
    "family", ["qwen3", "llama3", "llama2", "mistral", "qwen2-yarn", "llama-bias"]
)
def test_positions_before_the_first_thought_are_computed_without_autograd(family, folder_of):
    model, _ = fast.load(str(folder_of(family)), "cpu", "float32")
    embeds = model.embed(torch.randint(0, 250, (2, 20)))
    for L in (0, 1, 7, 19):
        before = embeds[:, :L].clone().requires_grad_()
        after = embeds[:, L:].clone().requires_grad_()
        x = torch.cat([before, after], 1)
        expected, found = model(x)[:, L:], hidden_after(model, x, L)
        assert torch.allclose(found, expected, atol=1e-4)
        g, g_found = (torch.autograd.grad(y.square().sum(), after)[0] for y in (expected, found))
        assert torch.allclose(g, g_found, rtol=1e-3, atol=1e-3 * g.abs().max())
        if L:
            assert not torch.autograd.grad(hidden_after(model, x, L).square().sum(), before)[
                0
            ].any()
        with checkpointed(model):
            again = torch.autograd.grad(hidden_after(model, x, L).square().sum(), after)[0]
        assert torch.equal(again, g_found)
    assert all("forward" not in vars(block) for block in model.layers)


def test_an_epoch_s_order_is_a_function_of_seed_and_epoch():
    lengths, s = [(i * 37) % 91 for i in range(103)], Training(batch_size=4, accumulate=2)
    orders = [epoch_order(lengths, epoch, s) for epoch in (0, 1)]
    other = epoch_order(lengths, 1, Training(seed=1, accumulate=2))
    assert orders[0] == epoch_order(lengths, 0, s) != orders[1] != other
    for order in orders:
        assert sorted(i for step in order for i in step) == list(range(103)) and len(order) == 13
        assert sorted(map(len, order)) == [7, *[8] * 12]
        spread = [max(of := [lengths[i] for i in step]) - min(of) for step in order]
        assert sum(spread) / len(spread) < 20  # of 90: batches hold what is of similar length


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama2", "llama-bias"])
def test_a_fingerprint_is_of_the_weights_however_they_lie(family, folder_of):
    folder = str(folder_of(family))
    (one, _), (two, _) = plain.load(folder, "cpu", "float32"), fast.load(folder, "cpu", "bfloat16")
    assert trained.fingerprint(one) == trained.fingerprint(two)
    one.layers[1].mlp.up_proj.weight.data += 1  # not among the first numbers of its matrix
    assert trained.fingerprint(one) == trained.fingerprint(two)
    one.layers[1].mlp.gate_proj.weight.data += 1
    assert trained.fingerprint(one) != trained.fingerprint(two)


# ------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("load", [plain.load, fast.load])
def test_lora_begins_as_nothing_and_merged_is_what_the_hooks_compute(load, loaded):
    model = loaded(load=load)[0]
    torch.manual_seed(0)
    tensors = lora.start(model, 4)
    drawn = torch.cat([A.flatten() for name, A in tensors.items() if name.endswith("A.weight")])
    # PEFT's: kaiming_uniform_ with a = sqrt(5), so of bound 1 / sqrt(d), here d = 32.
    assert drawn.abs().max() <= 32**-0.5 and drawn.std() == pytest.approx(96**-0.5, rel=0.1)
    x = model.embed(torch.randint(0, 250, (2, 20)))
    unchanged = model(x)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad(), lora.hooks(model, tensors, 2.0, 0.1):
        assert torch.equal(model(x), unchanged)
    with lora.merged(model, tensors, 2.0):
        assert torch.equal(model(x), unchanged)
    for name in tensors:
        tensors[name] = torch.randn_like(tensors[name]) * 0.2
    with torch.no_grad(), lora.hooks(model, tensors, 2.0, 0.1):  # no gradients, no dropout
        hooked = model(x)
    with lora.merged(model, tensors, 2.0):
        assert torch.allclose(model(x), hooked, atol=1e-4)
        assert not torch.allclose(hooked, unchanged, atol=1e-2)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        of_layer = ["q_proj", "v_proj"] if load is plain.load else ["qkv"]
        assert changed == {
            f"layers.{i}.self_attn.{name}.weight" for i in range(2) for name in of_layer
        }
        if load is fast.load:
            q, kv, name = 4 * 16, 2 * 16, "layers.0.self_attn.qkv.weight"
            k = slice(q, q + kv)
            assert torch.equal(model.get_parameter(name)[k], before[name][k])
    assert torch.equal(model(x), unchanged)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("load", [plain.load, fast.load])
def test_lora_s_dropout_is_in_force_while_training(load, loaded):
    model = loaded(load=load)[0]
    start = lora.start(model, 4)
    tensors = {name: torch.randn_like(x).requires_grad_() for name, x in start.items()}
    x = model.embed(torch.randint(0, 250, (1, 20)))
    with lora.hooks(model, tensors, 2.0, 0.5):
        assert not torch.equal(model(x), model(x))
        model(x).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in tensors.values())


def test_lora_s_files_are_in_peft_s_format(pair, data, tmp_path):
    assert trains(pair(), data, tmp_path / "run", method="lora") == 0
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 32.0)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2 and tensors[lora.tensor_name(0, "q", "A")].shape == (2, 32)
    B = tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    assert B.shape == (32, 2)


# --------------------------------------------------------------------------------------- folders


def test_training_lowers_the_loss_and_keeps_best_and_last(pair, data, tmp_path):
    folder = tmp_path / "run"
    assert trains(pair(), data, folder, epochs=6) == 0
    log = outcome(folder)[1]
    dev = {line["step"]: line["dev_loss"] for line in log if "dev_loss" in line}
    assert sorted(dev) == [0, 3, 6, 9, 12, 15, 18] and dev[18] < dev[0]
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 19))
    assert all(line.keys() == {"step", "epoch", "loss", "gradient_norm", "lr"} for line in steps)
    rates = [0.01 * (18 - i) / 18 for i in range(18)]
    assert [line["lr"] for line in steps] == pytest.approx(rates)
    tensors, about = trained.read_tensors(folder / "projection.safetensors")
    assert int(about["step"]) == min(dev, key=dev.get) and float(about["loss"]) == min(dev.values())
    names = {"model", "assistant", "d", "d_a", "thoughts", "task", "prompt_version", "settings"}
    assert names <= about.keys()
    found = (about["d"], about["d_a"], about["thoughts"], about["method"])
    assert found == ("32", "32", "2", "softcot")
    _, about = trained.read_tensors(folder / "last.safetensors")
    assert int(about["step"]) == 18
    assert tensors["weight"].dtype == torch.float32 and tensors["weight"].shape == (32, 32)


def test_warm_up_rises_then_falls(pair, data, tmp_path):
    assert trains(pair(), data, tmp_path / "run", "--warmup", "2") == 0
    rates = [line["lr"] for line in outcome(tmp_path / "run")[1] if "lr" in line]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("method", ["softcot", "cot-unk", "lora"])
def test_interrupted_anywhere_and_continued_is_as_undisturbed_to_the_bit(
    method, pair, data, tmp_path, monkeypatch
):
    folders = pair()
    assert trains(folders, data, tmp_path / "whole", method=method) == 0
    # Log lines before the interruption: in the first validation, in steps, at an epoch's end.
    for place in (1, 3, 4, 6, 8):
        written, append = [0], files.append

        def interrupting(path, record, written=written, append=append, place=place):
            if written[0] == place:
                raise KeyboardInterrupt
            written[0] += 1
            append(path, record)

        folder = tmp_path / f"cut{place}"
        with monkeypatch.context() as patch:
            patch.setattr(files, "append", interrupting)
            assert trains(folders, data, folder, "--save-every", "2", method=method) == 130
        (folder / "log.jsonl").open("a").write('{"step": 1, "lo')  # what a kill leaves
        assert trains(folders, data, folder, method=method) == 0
        assert_same(tmp_path / "whole", folder)
    assert trains(folders, data, folder, method=method) == 0  # finished: nothing is done again
    assert_same(tmp_path / "whole", folder)


def test_killed_and_continued_is_as_undisturbed(pair, data, tmp_path):
    folders = pair()
    assert trains(folders, data, tmp_path / "whole", "--dtype", "bfloat16", epochs=60) == 0
    program = str(ROOT / "tests" / "softcot_pair.py")
    command = [sys.executable, program, *folders, data, str(tmp_path / "cut")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    log = tmp_path / "cut" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 20:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert trains(folders, data, tmp_path / "cut", "--dtype", "bfloat16", epochs=60) == 0
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_accumulated_passes_are_one_batch_and_checkpointing_changes_nothing(pair, data, tmp_path):
    folders = pair()
    for name, more in (
        ("one", "--batch-size 4"),
        ("two", "--accumulate 2"),
        ("again", "--batch-size 4 --checkpointing"),
    ):
        assert trains(folders, data, tmp_path / name, *more.split()) == 0
    (one, log), (two, _), (again, again_log) = (
        outcome(tmp_path / name) for name in ("one", "two", "again")
    )
    one, two, again = (found["last.safetensors"] for found in (one, two, again))
    assert all(torch.allclose(x, two[k], atol=1e-4) for k, x in one.items())
    assert all(torch.equal(x, again[k]) for k, x in one.items())
    assert log == again_log


def test_checkpointing_draws_the_same_dropout(pair, data, tmp_path):
    folders = pair()
    assert trains(folders, data, tmp_path / "a", method="lora") == 0
    assert trains(folders, data, tmp_path / "b", "--checkpointing", method="lora") == 0
    assert_same(tmp_path / "a", tmp_path / "b")


def test_hidden_states_in_a_file_train_the_same_and_are_found_again(
    pair, data, tmp_path, monkeypatch
):
    folders = pair()
    assert trains(folders, data, tmp_path / "memory") == 0
    monkeypatch.setattr(trained, "CACHE_LIMIT", 0)
    assert trains(folders, data, tmp_path / "file") == 0
    assert_same(tmp_path / "memory", tmp_path / "file")
    kept = load_file(tmp_path / "file" / "hidden.safetensors")["hidden"]
    assert kept.shape == (8, 2, 32) and not list((tmp_path / "file").glob("*.part"))
    monkeypatch.setattr(softcot, "hidden_states", None)  # not needed a second time
    assert trains(folders, data, tmp_path / "file") == 0

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert trains(folders, data, tmp_path / "other") == 2


def test_one_folder_has_one_training(pair, data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert trains(pair(), data, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "another training writes to" in error and error.count("\n") == 1
    os.close(handle)


def test_other_settings_or_data_in_a_folder_are_refused(pair, data, tmp_path, capsys):
    folders = pair()
    assert trains(folders, data, tmp_path / "run") == 0
    capsys.readouterr()
    assert trains(folders, data, tmp_path / "run", "--seed", "1", "--lr", "0.5") == 2
    assert "lr is 0.01 there and 0.5 here, seed is 0 there and 1 here" in capsys.readouterr().err
    Path(data).write_text(Path(data).read_text().replace("1+1=2.", "1+1=2!"))
    assert trains(folders, data, tmp_path / "run") == 2
    assert "data is " in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_says_where(pair, data, tmp_path, capsys, monkeypatch):
    folders = pair()
    real = softcot.negative_log_likelihood
    calls = []

    def failing(*arguments):
        calls.append(torch.is_grad_enabled())
        return real(*arguments) * (math.nan if sum(calls) == 5 else 1)  # the fifth step

    monkeypatch.setattr(softcot, "negative_log_likelihood", failing)
    assert trains(folders, data, tmp_path / "run", "--save-every", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    where = r"step 5 \(epoch 2, problems data-0000\d[^)]*\)"
    assert re.search(rf"the loss is nan .* {where}: .* keeps step 3; lower --lr", error)
    tensors, about = trained.read_tensors(tmp_path / "run" / "last.safetensors")
    assert about["step"] == "3" and all(x.isfinite().all() for x in tensors.values())
    monkeypatch.setattr(softcot, "negative_log_likelihood", real)
    assert trains(folders, data, tmp_path / "run") == 0
    assert trains(folders, data, tmp_path / "whole") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_is_one_line_and_harms_nothing(pair, data, tmp_path, capsys, monkeypatch):
    folders = pair()
    assert trains(folders, data, tmp_path / "whole") == 0
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert trains(folders, data, tmp_path / "run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"softcot.py: cannot write .*: No space left on device; fix that", error)
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert trains(folders, data, tmp_path / "run") == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_training_that_is_refused_or_finished_touches_nothing(
    pair, data, tmp_path, capsys, monkeypatch
):
    folders = pair()
    for method in ("softcot", "lora"):
        assert trains(folders, data, tmp_path / method, method=method, epochs=1) == 0
    monkeypatch.setattr(softcot, "hidden_states", None)  # the assistant is not asked again
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    for method in ("softcot", "lora"):
        other = ["--alpha", "64"]
        assert trains(folders, data, tmp_path / method, *other, method=method, epochs=1) == 2
        assert "alpha is 32.0 there and 64.0 here" in capsys.readouterr().err
        assert trains(folders, data, tmp_path / method, method=method, epochs=1) == 0
        assert "this training is finished" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before
