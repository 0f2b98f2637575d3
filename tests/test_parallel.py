"""lab/parallel.py, lab/ranks.py: several processes do what one does, and all of them end."""

import json
import os
import re
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import softcot_pair
import test_cli
import test_decode
import torch
from conftest import GOLDEN, close, edit
from gloo import Run, joined
from lab.steps import Recorder
from make_golden import FAMILIES
from safetensors.torch import load_file

from softcot_pair import data, pair  # noqa: F401 (fixtures)

import softcot
from baselines import coconut, lora
from lab import checkpoint, coconut_cli, fast, files, merge, parallel, results, trained
from lab import ranks as R
from lab.training import Trainer
from model import Transformer, UserError


@pytest.fixture
def ranks(tmp_path):
    """ranks(size, function, *arguments): what each process returns."""

    def run(size, function, *arguments):
        return Run(tmp_path, size, function, *arguments).results()

    return run


INT8 = "qwen2", "llama-bias", "llama2"  # the tied one, the one with all biases, four parts


def logits_of(folders, N):
    """Of each family: hidden states, logits, fingerprint; and hidden states, logits in 8 bits."""
    context, args = joined(N)
    found = {}
    with context, torch.no_grad():
        for family, folder in folders.items():
            expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
            for quantize in (None, "int8") if family in INT8 else (None,):
                model, _ = fast.load(folder, "cpu", "float32", quantize, place=args.place)
                hidden = model(model.embed(expected["ids"])[None])[0]
                own = hidden, model.logits(hidden[-8:])
                if not quantize:
                    found[family] = *own, trained.fingerprint(model)
                else:
                    found[family] += own
    return found


@pytest.mark.parametrize("N, families", [(2, tuple(FAMILIES)), (4, ("llama2",))])
def test_logits_are_those_of_transformers(N, families, folder_of, ranks):
    folders = {family: str(folder_of(family)) for family in families}
    for found in ranks(N, logits_of, folders, N):
        for family, (hidden, logits, fingerprint, *int8) in found.items():
            expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
            assert close(hidden, expected["hidden"], 1e-5), family
            assert close(logits, expected["logits"], 1e-5), family
            one, _ = fast.load(folders[family], "cpu", "float32")
            assert trained.fingerprint(one) == fingerprint, family
            if int8:
                one, _ = fast.load(folders[family], "cpu", "float32", "int8")
                with torch.no_grad():
                    whole = one(one.embed(expected["ids"])[None])[0]
                    assert close(int8[0], whole, 1e-5), family
                    assert close(int8[1], one.logits(whole[-8:]), 1e-5), family


# ---------------------------------------------------------------------------------- the programs

QUESTIONS = ["1+1?", "What is 3+3?", "7?", "Why?", "9-4?", "5*5?"]


@pytest.fixture
def folder(folder_of):
    folder = folder_of("qwen3")
    edit(folder, max_position_embeddings=512)
    return str(folder)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": q, "answer": str(i)} for i, q in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def program(name, arguments):
    """What a program does with these arguments, in a process of its own; its exit code."""
    main = {"think": test_cli.think, "reason": test_cli.reason, "softcot": softcot_pair.main}
    return main[name](arguments)


def read(*paths):
    """Key -> record, without what differs from run to run; every key once."""
    found = {}
    for line in "".join(path.read_text() for path in paths).splitlines():
        record = json.loads(line)
        key = tuple(record[name] for name in results.KEY)
        assert key not in found
        record["settings"].pop("tensor_parallel", None)
        found[key] = {k: v for k, v in record.items() if k != "seconds"}
    return found


def alike(a, b):
    """Equal, numbers up to the rounding of sums."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == pytest.approx(b, rel=1e-3, abs=1e-4) if isinstance(a, float) else a == b


THINK = ["--methods", "soft,cot,greedy", "--num-samples", "2", "--max-new-tokens", "9", "--trace"]
REASON = ["--methods", "soft,greedy,sc,fire,cot-decoding,rap", "--max-new-tokens", "5"]
REASON += ["--k", "3", "--rounds", "3", "--stop-threshold", "0", "--rap-iterations", "1"]
REASON += ["--num-samples", "2", "--dimension", "8", "--temperature", "0.6"]
SOFTCOT = "zero-shot-cot,cot-unk,assist-cot,softcot"


ONE_ROW = ["--method", "greedy", "--max-new-tokens", "4", "--batch-size", "1"]


@pytest.mark.parametrize("name, more", [("think", THINK), ("think", ONE_ROW), ("reason", REASON)])
def test_two_devices_record_what_one_records(name, more, folder, problems, tmp_path):
    common = ["--model", folder, "--device", "cpu", "--data", problems, "--batch-size", "3"]
    common += ["--dtype", "float32", "--limit", "3", *more]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert program(name, [*common, "--output", str(one)]) == 0
    both = [*common, "--tensor-parallel", "2", "--output", str(two)]
    run = Run(tmp_path, 2, program, name, both)
    assert run.end() == [0, 0], run.said()
    expected, found = read(one), read(two)
    assert found.keys() == expected.keys() and not (tmp_path / "two.part1.jsonl").exists()
    for key, record in expected.items():
        assert alike(found[key], record), key
    assert run.said("out").count("3 problems") == 1  # one table


def test_softcot_on_four_processes_records_the_same(pair, problems, tmp_path):  # noqa: F811
    folders = pair("llama2", "qwen3")
    loaded = [fast.load(folder, "cpu", "float32")[0] for folder in folders]
    here = trained.identity(1, folders[0], loaded[0], folders[1], loaded[1])
    projection = tmp_path / "projection.safetensors"
    torch.manual_seed(0)
    weights = softcot_pair.projection_of()
    trained.write_tensors(projection, weights, here | {"method": "softcot", "thoughts": 2})
    common = ["eval", "--model", folders[0], "--assistant", folders[1], "--projection"]
    common += [str(projection), "--data", problems, "--device", "cpu", "--dtype", "float32"]
    common += ["--assistant-device", "cpu", "--methods", SOFTCOT, "--max-new-tokens", "5"]
    common += ["--num-samples", "2", "--batch-size", "3", "--limit", "4", "--thoughts", "2"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert program("softcot", [*common, "--output", str(one)]) == 0
    both = [*common, "--tensor-parallel", "2", "--output", str(two)]
    run = Run(tmp_path, 4, program, "softcot", both)
    assert run.end() == [0] * 4, run.said()
    parts = [path for path in (two, tmp_path / "two.part1.jsonl") if path.exists()]
    expected, found = read(one), read(*parts)
    assert found.keys() == expected.keys()
    for key, record in expected.items():
        assert alike(found[key], record), key


# ------------------------------------------------------------------------------------- replicas


def arguments_of(folder, problems, output, *more):
    common = ["--model", folder, "--device", "cpu", "--data", problems, "--batch-size", "2"]
    common += ["--method", "soft", "--noise", "gumbel", "--num-samples", "2"]
    return [*common, "--max-new-tokens", "9", "--output", str(output), *more]


def test_replicas_record_what_one_process_records_and_go_on_in_any_number(
    folder, problems, tmp_path, capfd
):
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    assert program("think", arguments_of(folder, problems, one)) == 0
    expected = read(one)
    arguments = arguments_of(folder, problems, many)
    run = Run(tmp_path, 3, program, "think", arguments)
    assert run.end() == [0, 0, 0], run.said()
    parts = [Path(path) for path in files.parts(many)]
    assert len(parts) > 1 and read(*parts) == expected  # the same bits
    # What a kill leaves: records that are missing, and half of one.
    lines = parts[-1].read_text().splitlines(keepends=True)
    parts[-1].write_text("".join(lines[:-1]) + lines[-1][:40])
    first = many.read_text().splitlines(keepends=True)
    many.write_text("".join(first[1:]))
    run = Run(tmp_path, 2, program, "think", arguments)
    assert run.end() == [0, 0], run.said()
    capfd.readouterr()
    assert program("think", arguments) == 0  # alone: there is nothing to do
    assert "tokens/s" not in capfd.readouterr().out
    merged = merge.merge(str(many))
    assert merged.startswith(f"{many}: 12 records") and files.parts(many) == [str(many)]
    assert read(many) == expected
    with pytest.raises(UserError, match="nothing to take in"):
        merge.merge(str(many))


def test_shards_need_no_communication_and_are_merged(folder, problems, tmp_path):
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    assert program("think", arguments_of(folder, problems, one, "--limit", "3")) == 0
    for shard in ("1/2", "0/2", "0/2"):
        arguments = arguments_of(folder, problems, many, "--limit", "3", "--shard", shard)
        assert program("think", arguments) == 0
    assert [len(Path(path).read_text().splitlines()) for path in files.parts(many)] == [4, 2]
    # A merge that was killed before the parts were gone.
    part = tmp_path / "many.part1.jsonl"
    left = part.read_text()
    merge.merge(str(many))
    part.write_text(left)
    merge.merge(str(many))
    assert read(many) == read(one)


# ------------------------------------------------------------------------------------- training


def training(folders, path, folder, *more, method="softcot"):
    more = ["--accumulate", "2", "--save-every", "1", "--dropout", "0", *more]
    return softcot_pair.trains(folders, path, folder, *more, method=method)


@pytest.mark.parametrize("method", ["softcot", "cot-unk", "lora"])
def test_processes_train_what_one_trains(method, pair, data, tmp_path):  # noqa: F811
    folders, one, two = pair(), tmp_path / "one", tmp_path / "two"
    assert training(folders, data, one, method=method) == 0
    run = Run(tmp_path, 2, partial(training, method=method), folders, data, two)
    assert run.end() == [0, 0], run.said()
    (files_one, log_one), (files_two, log_two) = map(softcot_pair.outcome, (one, two))
    assert files_one.keys() == files_two.keys() and alike(log_two, log_one)
    for name, tensors in files_one.items():
        for key, x in tensors.items():
            assert (files_two[name][key] - x).abs().max() <= 1e-6, (name, key)


def stopped(*arguments):
    """A training whose first process is killed after the second step."""
    save = Trainer.save

    def last(trainer):
        save(trainer)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.save = last
    return training(*arguments)


def test_a_training_goes_on_in_another_number_of_processes(pair, data, tmp_path):  # noqa: F811
    folders, one, two = pair(), tmp_path / "one", tmp_path / "two"
    assert training(folders, data, one) == 0
    run = Run(tmp_path, 2, stopped, folders, data, two)
    assert run.end() == [-signal.SIGKILL, 2]
    assert "another process of this run has ended" in run.said()
    assert training(folders, data, two) == 0
    tensors = [load_file(folder / "last.safetensors") for folder in (one, two)]
    assert all((tensors[1][key] - x).abs().max() <= 1e-6 for key, x in tensors[0].items())


@pytest.mark.parametrize(
    "size, more, said",
    [
        (3, (), "3 processes cannot share the 2 passes"),
        (2, ("--method", "lora", "--dropout", "0.1"), "lora's dropout is drawn by one process"),
    ],
)
def test_what_cannot_be_shared_is_refused(size, more, said, pair, data, tmp_path):  # noqa: F811
    run = Run(tmp_path, size, training, pair(), data, tmp_path / "out", *more)
    assert run.end() == [2] * size
    assert run.said().count("softcot.py: ") == 1 and said in run.said()


# ------------------------------------------------------------------------------------- all end


def on_rank_1(change, arguments):
    """A program that is started otherwise, or on another machine, on rank 1."""
    if os.environ["RANK"] == "1":
        if callable(change):
            checkpoint.free_memory = change
        else:
            arguments = [*arguments, *change]
    return program("think", arguments)


def no_memory(device):
    return 0


def little_memory(device):
    return 150_000  # enough for its weights in float32


QUESTION = ("--question", "Why?")


@pytest.mark.parametrize(
    "size, more, change, said",
    [
        (2, (*QUESTION, "--tensor-parallel", "2"), ("--seed", "1"), "--seed is 1 on rank 1, 0 on"),
        (2, (*QUESTION, "--tensor-parallel", "2"), no_memory, "0.0 GB are free on cpu"),
        (2, (*QUESTION, "--tensor-parallel", "2"), little_memory, "needs .* lower --max-new"),
        (2, (*QUESTION, "--tensor-parallel", "2", "--compile"), (), "for a model on one device"),
        (2, QUESTION, (), "2 replicas share the problems of --task or --data"),
        (3, (*QUESTION, "--tensor-parallel", "2"), (), "2 does not divide the 3 processes"),
        (4, (*QUESTION, "--tensor-parallel", "4"), (), "key-value heads .2.: use 1, 2"),
        (2, ("--task", "tiny", "--shard", "0/2"), (), "--shard is for processes without torchrun"),
    ],
)
def test_a_mistake_is_one_line_and_all_ranks_end(size, more, change, said, folder, tmp_path):
    arguments = ["--model", folder, "--device", "cpu", "--dtype", "float32", *more]
    arguments += ["--max-new-tokens", "400"]
    run = Run(tmp_path, size, on_rank_1, change, arguments)
    codes = run.end(30)
    lines = [line for line in run.said().splitlines() if line.startswith("soft_thinking.py: ")]
    assert codes == [2] * size and len(lines) == 1, (codes, run.said())
    assert "Traceback" not in run.said()
    assert re.search(said, lines[0]), lines


def test_without_torchrun_it_is_named(folder, capsys):
    assert program("think", ["--model", folder, "--tensor-parallel", "2"]) == 2
    assert "start it by `torchrun --nproc-per-node 2 " in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "a/b"])
def test_a_shard_is_one_of_so_many(shard, capsys):
    with pytest.raises(SystemExit) as end:
        program("think", ["--task", "tiny", f"--shard={shard}"])
    assert end.value.code == 2 and "I from 0 to N - 1" in capsys.readouterr().err


def test_a_shard_without_problems_and_one_of_a_question_are_refused(folder, problems, capsys):
    one = ["--model", folder, "--shard", "3/4"]
    assert program("think", [*one, "--data", problems, "--limit", "2"]) == 2
    assert program("think", [*one, "--question", "Why?"]) == 2
    said = capsys.readouterr().err
    assert "there are only 2 problems" in said and "--shard goes with --task or --data" in said


def test_a_program_of_one_process_says_so(monkeypatch, tmp_path, capsys):
    for name in R.LAUNCHED:
        monkeypatch.setenv(name, "2")
    arguments = ["train", "--folder", str(tmp_path / "out")]
    assert coconut_cli.command(arguments, coconut, lora, softcot) == 2
    assert "one process: start it without torchrun" in capsys.readouterr().err


def impatient(arguments):
    R.CONNECT = timedelta(seconds=2)
    return program("think", arguments)


def test_a_port_in_use_ends_all_ranks(folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = ["--model", folder, "--tensor-parallel", "2"]
        run = Run(tmp_path, 2, impatient, arguments, port=taken.getsockname()[1])
        assert run.end(30) == [2, 2]
    assert "another --master-port" in run.said() and run.said().count("soft_thinking.py: ") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_rank_is_killed_the_others_end_with_one_line(victim, folder, problems, tmp_path):
    edit(Path(folder), max_position_embeddings=100000)
    out = tmp_path / "out.jsonl"
    arguments = arguments_of(folder, problems, out, "--tensor-parallel", "2")
    arguments += ["--max-new-tokens", "40", "--num-samples", "5000"]
    run = Run(tmp_path, 2, program, "think", arguments)
    while not out.exists() or not out.read_text():
        time.sleep(0.05)
        assert all(process.is_alive() for process in run.processes), run.said()
    os.kill(run.processes[victim].pid, signal.SIGKILL)
    start = time.monotonic()
    codes = run.end(10)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2
    assert time.monotonic() - start < 5
    assert run.said().count("another process of this run has ended") == 1
    assert "Traceback" not in run.said()
    for line in out.read_text().splitlines()[:-1]:
        assert json.loads(line)["thought_ids"]


def stepped(folder, refusing):
    """Tokens, and how many steps were recorded, of ranks of which one cannot record."""
    recorded = []

    class OnCpu(Recorder):
        def capture(self):
            recorded.append(1)
            if os.environ["RANK"] == refusing:
                raise RuntimeError("cannot record")
            return SimpleNamespace(replay=self.step, pool=lambda: None)

    Transformer.recorder = parallel.Recorder = OnCpu
    parallel.Together.__bases__ = (OnCpu,)
    context, args = joined(2)
    with context:
        model, _ = fast.load(folder, "cpu", "float32", place=args.place)
        tokens, _ = test_decode.run(model, 3)
    return tokens, len(recorded)


@pytest.mark.parametrize("refusing", ["1", "nobody"])
def test_steps_are_recorded_by_all_ranks_or_by_none(refusing, folder, ranks):
    expected, _ = test_decode.run(fast.load(folder, "cpu", "float32")[0], 3)
    (first, n), (second, m) = ranks(2, stepped, folder, refusing)
    assert first == second == expected and n == m == 1
