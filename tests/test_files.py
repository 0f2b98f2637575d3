"""What is written where, and what a record depends on: files, locks, streams, identities, slots."""

import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, edit
from safetensors.torch import load_file, save_file
from softcot_pair import data, evaluates, pair, trains
from test_cli import long_context, outcome, reason, records_of, think
from test_results import PROBLEMS, TASKS, adder, methods, run

import soft_thinking
from baselines import sampling
from lab import cli, files, identity, livecodebench, regrade
from model import UserError

__all__ = ["data", "pair"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small are slower on two


@pytest.fixture
def asks(folder_of, tmp_path):
    """The arguments of two problems for a small model; its folder."""
    path, folder = tmp_path / "data.jsonl", long_context(folder_of("qwen3"))
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(folder), "--device", "cpu", "--dtype", "float32"]
    arguments += ["--max-new-tokens", "4"]
    return [*arguments, "--data", str(path)], folder


# ------------------------------------------------------------------------------------------- slots


def decoded_with(monkeypatch):
    """The batch sizes that methods are run with from now on."""
    seen = []

    def spy(run):
        def spied(*arguments, batch_size=None, **options):
            seen.append(batch_size)
            return run(*arguments, batch_size=batch_size, **options)

        return spied

    monkeypatch.setattr(soft_thinking, "think", spy(soft_thinking.think))
    monkeypatch.setattr(sampling, "reason", spy(sampling.reason))
    return seen


@pytest.mark.parametrize(
    "program, more",
    [(think, []), (reason, ["--k", "2", "--rounds", "1", "--dimension", "8"])],
)
def test_slots_follow_the_flag_and_not_the_work(program, more, asks, tmp_path, monkeypatch):
    seen, (arguments, _) = decoded_with(monkeypatch), asks
    arguments = [*arguments, "--methods", "greedy,soft", "--batch-size", "7", *more]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert program([*arguments, "--limit", "1", "--output", str(one)]) == 0
    assert program([*arguments, "--output", str(two)]) == 0
    assert seen == [7] * 4
    found, first = records_of(two), [outcome(record) for record in records_of(one)]
    assert [outcome(record) for record in found if record["problem"] == "data-00000"] == first
    assert {record["settings"]["batch_size"] for record in found} == {7}


def test_one_answer_in_the_terminal_needs_one_row_and_its_record_says_so(
    asks, tmp_path, monkeypatch
):
    seen, (arguments, _) = decoded_with(monkeypatch), asks
    out = tmp_path / "out.jsonl"
    arguments = [*arguments[:-2], "--question", "Why?", "--output", str(out)]
    assert think(arguments) == 0 and seen == [1]
    assert records_of(out)[0]["settings"]["batch_size"] == 1
    assert think([*arguments, "--num-samples", "2"]) == 2  # of other bits
    assert think([*arguments, "--num-samples", "2", "--batch-size", "1"]) == 0
    assert seen == [1, 1] and len(records_of(out)) == 2


# -------------------------------------------------------------------------- what must not be mixed


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, folder / "model.safetensors")


def other_template(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("assistant", "model"))


def other_end(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')


@pytest.mark.parametrize(
    "change, more, said",
    [
        (other_weights, [], "weights is "),
        (other_end, [], "weights is "),
        (other_template, [], "tokenizer is "),
        (None, ["--batch-size", "3"], "batch_size is 16 there and 3 here"),
        (None, ["--trace"], "trace is False there and True here"),
    ],
)
def test_what_decides_a_record_is_not_mixed_in_a_file(change, more, said, asks, tmp_path, capsys):
    (arguments, folder), out = asks, tmp_path / "out.jsonl"
    arguments = [*arguments, "--method", "greedy", "--methods", "greedy", "--output", str(out)]
    assert think([*arguments, "--limit", "1"]) == 0
    before = out.read_bytes()
    if change:
        change(folder)
    capsys.readouterr()
    assert think([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and out.read_bytes() == before


def test_records_of_older_versions_are_not_gone_on_with(asks, tmp_path, capsys):
    (arguments, _), out = asks, tmp_path / "out.jsonl"
    arguments = [*arguments, "--methods", "greedy", "--output", str(out)]
    assert think([*arguments, "--limit", "1"]) == 0
    (record,) = records_of(out)
    for name in ("weights", "tokenizer", "batch_size", "trace"):
        del record["settings"][name]
    out.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    assert think(arguments) == 2
    error = capsys.readouterr().err
    assert f"{out} is of an older version" in error and error.count("\n") == 1


def test_softcot_s_assistant_is_more_than_its_name(pair, data, tmp_path, capsys):
    folders, out = pair(), tmp_path / "out.jsonl"
    arguments = ["--methods", "assist-cot", "--thoughts", "2", "--output", str(out)]
    assert evaluates(folders, data, *arguments, "--limit", "1") == 0
    (record,) = records_of(out)
    assert record["settings"]["weights"] == identity.weights(Path(folders[0]))
    other_weights(Path(folders[1]))
    capsys.readouterr()
    assert evaluates(folders, data, *arguments) == 2
    assert "assistant_weights is " in capsys.readouterr().err


def test_the_same_tensors_in_other_files_are_the_same_weights(folder_of):
    whole, parts = folder_of("qwen3"), folder_of("qwen3", name="parts")
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    (parts / "model.safetensors").unlink()
    for i, some in enumerate((names[:7], names[7:])):
        save_file({name: tensors[name] for name in some}, parts / f"model-{i}.safetensors")
    assert identity.identified(str(whole)) == identity.identified(str(parts))
    edit(parts, rms_norm_eps=0.01)
    assert identity.weights(whole) != identity.weights(parts)


def test_a_fingerprint_of_weights_reads_little_and_sees_what_it_says(folder_of):
    """Of 8 GB (a sparse file): the first and the last bytes; not what is between the blocks."""
    folder, size = folder_of("qwen3"), 8 << 30
    header = {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    start = 8 + len(header)

    def changed(place):
        with open(path, "r+b") as file:
            file.truncate(start + size)
            file.seek(start + place)
            file.write(b"x")
        began = time.perf_counter()
        found = identity.weights(folder)
        assert time.perf_counter() - began < 1
        with open(path, "r+b") as file:
            file.seek(start + place)
            file.write(b"\0")
        return found

    usual = changed(5000)  # behind the first block, and far from the second
    assert changed(size // 2 + (1 << 20)) == usual
    assert len({usual, changed(0), changed(4095), changed(size - 1)}) == 4


# -------------------------------------------------------------------------------------- one writer

HOLDER = """
import sys
sys.path.insert(0, {root!r})
from lab import files
with files.reserved({path!r}):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_write_to_one_file(asks, tmp_path, capsys):
    (arguments, _), out = asks, tmp_path / "out.jsonl"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    script = HOLDER.format(root=str(ROOT), path=str(out))
    other = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)
    assert other.stdout.readline() == "ready\n"
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    for path in (out, link):
        assert think([*arguments, "--output", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"process {other.pid} on {socket.gethostname()} writes to {path}" in error
        assert error.count("\n") == 1 and not out.exists()
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert think([*arguments, "--methods", "greedy", "--output", str(out)]) == 0
    assert len(records_of(out)) == 2 and not list(tmp_path.glob("*.lock"))


def test_a_lock_file_of_somebody_else_is_left_alone(tmp_path):
    lock = tmp_path / "out.jsonl.lock"
    lock.write_text("poetry")
    with pytest.raises(UserError, match="a file of something else"):
        files.reserved(tmp_path / "out.jsonl").__enter__()
    assert lock.read_text() == "poetry"


# ----------------------------------------------------------- files that are not ours to replace

FOREIGN = [
    '{"question": "What is 1?", "answer": "1"}',
    '{"settings": {"theme": "dark"}}',
    '{"a": 1} and more',
    '{"a": [1, 2',
    "[1, 2]\n",
    "\n",
]


@pytest.mark.parametrize("content", FOREIGN)
def test_no_json_of_somebody_else_is_cut_or_replaced(content, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.json"):
        run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=path)
    with pytest.raises(UserError, match="a file of something else"):
        files.check_table(path, files.TABLE)
    assert path.read_text() == content


def test_a_first_record_that_was_cut_anywhere_is_made_again(tmp_path):
    path = tmp_path / "out.jsonl"
    run(PROBLEMS[:1], TASKS["tiny"], methods({}, soft=adder()), output=path)
    line = path.read_bytes()
    for cut in (0, 1, 9, 14, 15, 40, len(line) - 1):
        path.write_bytes(line[:cut])
        run(PROBLEMS[:1], TASKS["tiny"], methods({}, soft=adder()), output=path)
        assert len(records_of(path)) == 1


@pytest.mark.parametrize("flag", ["--json", "--output"])
def test_only_a_file_is_written_to(flag, asks, tmp_path, capsys):
    (arguments, _), pipe, link = asks, tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        assert think([*arguments, flag, str(path)]) == 2
        assert "it is a device or a pipe" in capsys.readouterr().err
    assert pipe.is_fifo() and link.is_symlink()


def test_one_file_is_not_both_records_and_table(asks, tmp_path, capsys):
    (arguments, _), out = asks, tmp_path / "out.jsonl"
    assert think([*arguments, "--output", str(out), "--json", f"{tmp_path}/./out.jsonl"]) == 2
    assert "--json and --html name the same file" in capsys.readouterr().err
    assert not out.exists()


def test_a_table_is_written_again_and_a_link_to_it_stays(tmp_path):
    table, link = tmp_path / "table.json", tmp_path / "link.json"
    table.touch()
    link.symlink_to(table)
    for n in (1, 2):
        with files.reserved(None, link):
            run(PROBLEMS[:n], TASKS["tiny"], methods({}, soft=adder()), json_path=link)
        assert json.loads(table.read_text())["problems"] == n and link.is_symlink()


def test_regrading_replaces_no_other_records(tmp_path, capsys):
    six, two, notes = (tmp_path / name for name in ("six.jsonl", "two.jsonl", "notes.txt"))
    run(PROBLEMS, TASKS["tiny"], methods({}, soft=adder()), output=six)
    run(PROBLEMS[:2], TASKS["tiny"], methods({}, soft=adder()), output=two)
    notes.write_text("mine")
    before = six.read_bytes()
    for path in (six, notes):
        assert regrade.command([str(two), "--output", str(path)]) == 2
        assert "holds something else" in capsys.readouterr().err
    assert regrade.command([str(six), "--output", str(two)]) == 0
    assert livecodebench.command([str(two), "-o", str(notes)]) == 2
    assert six.read_bytes() == before and notes.read_text() == "mine"


@pytest.mark.parametrize(
    "name, method",
    [
        ("log.jsonl", "softcot"),
        ("projection.safetensors", "softcot"),
        ("last.safetensors", "softcot"),
        ("state.safetensors", "softcot"),
        ("adapter_config.json", "lora"),
        ("adapter_model.safetensors", "lora"),
    ],
)
def test_training_replaces_nothing_of_somebody_else(name, method, pair, data, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({"weight": torch.ones(2)}, path)
    else:
        path.write_text('{"step": 1, "loss": 0.5}\n')
    before = path.read_bytes()
    assert trains(pair(), data, folder, method=method) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{path} is not of this training" in error and path.read_bytes() == before
    assert os.listdir(folder) == [name]


# ----------------------------------------------------------------------------- ignored, or refused


@pytest.mark.parametrize("flag", ["output", "json", "task", "methods", "data", "model"])
def test_a_flag_with_nothing_behind_it_is_refused(flag, asks, capsys):
    assert think([*asks[0], f"--{flag}", ""]) == 2
    assert capsys.readouterr().err.endswith(
        f"--{flag} is empty: give it a value, or leave it out\n"
    )


def test_softcot_s_empty_flags_are_refused(pair, data, capsys):
    folders = pair()
    assert trains(folders, data, "") == 2
    assert "--folder is empty" in capsys.readouterr().err
    for flag in ("output", "json", "task", "methods", "thoughts", "projection"):
        assert evaluates(folders, data, f"--{flag}", "") == 2
        assert f"--{flag} is empty" in capsys.readouterr().err


def test_a_trace_is_asked_for_with_a_file_to_keep_it(asks, capsys):
    for arguments in (asks[0], [*asks[0][:-2], "--question", "Why?"]):
        assert think([*arguments, "--trace"]) == 2
        assert "--trace goes with --output" in capsys.readouterr().err


@pytest.mark.parametrize("program", [think, reason])
def test_a_question_that_is_answered_is_answered_again_from_the_file(
    program, asks, tmp_path, capsys
):
    (arguments, _), out = asks, tmp_path / "out.jsonl"
    more = ["--dimension", "8", "--rounds", "1"] if program is reason else ["--method", "cot"]
    arguments = [*arguments[:-2], "--question", "2?", "--output", str(out), *more]
    assert program(arguments) == 0
    (record,) = records_of(out)
    record["answer_text"] = "as it was kept"
    out.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    assert program(arguments) == 0
    assert "as it was kept" in capsys.readouterr().out and len(records_of(out)) == 1


# ----------------------------------------------------------------------------------------- streams


class Left(Exception):
    """os._exit, in this process."""


@pytest.fixture
def left(monkeypatch):
    """left(stream, command): the exit code of a program with that standard output."""

    def leave(code):
        raise Left(code)

    def make(stream, command=lambda: print("found") or 0):
        with monkeypatch.context() as patch:
            patch.setattr(os, "_exit", leave)
            patch.setattr(sys, "stdout", stream)
            with pytest.raises(Left) as end:
                cli.leave(command)
        return end.value.args[0]

    return make


def unread(buffering):
    """A pipe that nobody reads."""
    r, w = os.pipe()
    os.close(r)
    return os.fdopen(w, "w", buffering=buffering)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_streams_that_take_nothing(left, capsys):
    for buffering in (1, -1):  # it is noticed in print, or at the end
        assert left(unread(buffering)) == 141
    assert left(None) == 0  # closed from the start: nobody wants it
    with tempfile.TemporaryFile("w") as file:
        assert left(file, lambda: 2) == 2

    class Full:
        def reconfigure(self, errors): ...

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    capsys.readouterr()
    assert left(Full()) == 2
    error = capsys.readouterr().err
    assert "cannot print what was found: No space left on device" in error
    assert error.count("\n") == 1


def test_an_error_that_is_no_stream_s_is_not_hidden(left):
    def fails():
        Path("/nowhere/at/all").read_text()

    with pytest.raises(FileNotFoundError):
        cli.leave(fails)


def test_a_table_that_cannot_be_printed_is_written_and_the_other_way_round(
    tmp_path, monkeypatch, capsys
):
    both = methods({}, soft=adder())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", unread(1))
        with pytest.raises(BrokenPipeError):
            run(PROBLEMS, TASKS["tiny"], both, json_path=tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text())["problems"] == 6

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(PROBLEMS, TASKS["tiny"], both, json_path=tmp_path / "other.json")
    assert "tiny: 6 problems" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["table.json"]


def test_a_table_on_a_read_only_disk_is_refused_before_the_model_is_loaded(
    asks, tmp_path, monkeypatch, capsys
):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", read_only)
        table = str(tmp_path / "t.json")
        assert think([*asks[0], "--model", "no such model", "--json", table]) == 2
    error = capsys.readouterr().err
    assert "t.json: Read-only file system" in error and error.count("\n") == 1
    monkeypatch.setattr(os, "unlink", read_only)  # which says so of files that are not there, too
    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        files.write_json(table, {})


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_program_whose_reader_leaves_keeps_everything(buffered, asks, tmp_path):
    out, table = tmp_path / "out.jsonl", tmp_path / "t.json"
    arguments = [*asks[0], "--methods", "greedy", "--output", str(out), "--json", str(table)]
    command = [sys.executable, str(ROOT / "soft_thinking.py"), *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": buffered, "OMP_NUM_THREADS": "1"}
    with unread(-1) as nobody:
        pipes = {"stdout": nobody, "stderr": subprocess.PIPE}
        done = subprocess.run(command, text=True, env=environment, check=False, **pipes)
    assert done.returncode == 141 and "Error" not in done.stderr
    assert len(records_of(out)) == 2 and json.loads(table.read_text())["problems"] == 2
