"""lab.bench: it runs, counts bytes as by hand, and says what is wrong in one line."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest import ROOT, edit

from lab import bench as program
from lab import bench_landscapes, bench_report, bench_training, fast, random_weights, tasks
from lab.fused import hf_tensors
from model import Transformer, UserError


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lab.bench", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_the_bundled_model_is_measured(tmp_path):
    file = tmp_path / "bench.json"
    options = "--model tiny/base --device cpu --dtype float32 --batch 1 3 --prompt 20 --tokens 8"
    options += " --repeats 1 --quantize int8 --assistant tiny/assistant"
    ran = bench(*options.split(), "--json", str(file))
    assert ran.returncode == 0, ran.stderr
    c = json.loads((ROOT / "tiny" / "base" / "config.json").read_text())
    d, h, layers, V = c["hidden_size"], c["head_dim"], c["num_hidden_layers"], c["vocab_size"]
    ffn, heads, kv_heads = (
        c[name] for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    qkv = (heads + 2 * kv_heads) * h
    matrices = [(qkv, d), (d, heads * h), (2 * ffn, d), (d, ffn)] * layers + [(V, d)]
    # A byte for each weight, a float32 scale for each row.
    weights = sum(m * n + 4 * m for m, n in matrices)
    found = json.loads(file.read_text())
    for result in found["results"]:
        keys_and_values = result["batch"] * (20 + 8 // 2) * layers * 2 * kv_heads * h * 4
        assert result["bytes_per_step"] == weights + keys_and_values
        (seconds,), (share,) = result["seconds_per_step"], result["shares"]
        limit = result["bytes_per_step"] / seconds / share
        assert any(limit == pytest.approx(x) for x in found["bandwidth"])
    assert [(r["batch"], r["method"]) for r in found["results"]] == [
        (b, m) for b in (1, 3) for m in ("greedy", "concept tokens")
    ]
    assert "| 3 | concept tokens | " in ran.stdout
    assert "five candidates of one prompt" in ran.stdout and "perplexity" in found["int8"]
    assert "SoftCoT training step of tiny/base" in ran.stdout and "| ours | " in ran.stdout


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("against, loads", [([], 2), (["transformers"], 3)])
def test_a_compiled_model_is_loaded_in_rows_only_for_peers(against, loads, monkeypatch):
    options = "--model tiny/base --device cpu --dtype float32 --batch 2 --prompt 20 --tokens 8"
    args = program.read_arguments([*options.split(), "--repeats", "1", "--compile"])
    args.against, args.place, load, loaded = against, None, fast.load, []

    def peer(name, make, folder, model, *_):
        assert type(model) is Transformer

    monkeypatch.setattr(program.peers, "made", peer)
    monkeypatch.setattr(fast, "load", lambda *x, **how: loaded.append(x) or load(*x, **how))
    lines, found = program.bench_decoding(args)
    assert len(loaded) == loads and ", compiled, " in lines[0] and len(found["results"]) == 2


def test_what_is_timed_has_the_weights_that_users_have():
    """Weights made in inference mode would not be packed for the processor's products."""
    args = argparse.Namespace(
        model="tiny/base", device="cpu", dtype=None, quantize=None, compile=False
    )
    with torch.inference_mode():
        model, _, _ = program.loading(args)
        assert not any(p.is_inference() for p in model.parameters())


def test_the_search_is_measured_beside_random(tmp_path):
    file = tmp_path / "search.json"
    options = "--search --repeats 2 --against botorch --device cpu --dtype float32 --json"
    ran = bench(*options.split(), str(file))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text())["found"]
    assert {"random", "search"} <= set(found) and {len(x) for x in found.values()} == {2 * 8}
    rows = [line for line in ran.stdout.splitlines() if "informative |" in line]
    assert len(rows) == 8 and "| random, landscapes | 25.0 | 5.0 | 0.0% |" in ran.stdout
    searches = [line for line in ran.stdout.splitlines() if line.startswith("| search, ")]
    assert len(searches) == 2 and all(line.endswith("| 0.0% |") for line in searches)


def test_a_made_landscape_is_as_rare_as_it_says_and_coherence_points_to_it_or_not():
    g = torch.Generator().manual_seed(0)
    for name, share in zip(bench_landscapes.LANDSCAPES, (0.05, 0.05, 0.05, 0.1)):
        x, shares, slopes = torch.randn(4000, bench_landscapes.D, generator=g), [], {}
        for informative in (True, False):
            slopes[informative] = 0.0
            for seed in range(10):
                right, coherence = bench_landscapes.landscape(name, informative, seed)(x)
                assert (coherence > 0).all() and (coherence <= 1).all()
                shares.append(right.float().mean())
                gap = coherence[right].mean() - coherence[~right].mean()
                slopes[informative] += gap.item() / 10
        assert sum(shares) / 20 == pytest.approx(share, abs=0.015)
        assert slopes[True] > 0.01 and abs(slopes[False]) < 0.005


# --------------------------------------------------------------------------------------- the report

SMALL_REPORT = """
import sys
from lab import bench, bench_report
wanted = bench_report.sections(False)
del wanted["7b, long thoughts"], wanted["7b, transformers"]  # each section imports PyTorch
tests = {"tests": (60, "tests/test_cuda.py -k plan_refuses")}
wrong = {"wrong": (60, "--model smolm2-135m"), "endless": (0.01, wanted["7b"][1])}
bench_report.sections = lambda large: tests | wrong | wanted | tests
sys.exit(bench.command(sys.argv[1:]))
"""


def records_of(file):
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_report_that_is_killed_goes_on_where_it_stopped(tmp_path):
    file = tmp_path / "report.jsonl"
    command = [sys.executable, "-c", SMALL_REPORT, "--device", "cpu", "--report", str(file)]
    options = {"cwd": ROOT, "text": True, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    options["env"] = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, **options) as running:
        while len(records_of(file)) < 3 and running.poll() is None:
            time.sleep(0.05)
        running.kill()
    killed = records_of(file)
    assert running.returncode == -signal.SIGKILL and 3 <= len(killed) < 6
    markdown = file.with_suffix(".md")
    assert "Not yet: " in markdown.read_text()
    ran = subprocess.run(command, **options, check=False)
    assert ran.returncode == 0, ran.stderr
    assert f"going on after {len(killed)} finished records" in ran.stderr
    records = {record["section"]: record for record in records_of(file)}
    assert list(records) == ["tests", "wrong", "endless", "7b", "7b, int8", "7b, SoftCoT"]
    assert [records[record["section"]] for record in killed] == killed
    failed = {name: record["failed"] for name, record in records.items() if record["failed"]}
    assert failed == {
        "wrong": "failed: lab.bench: unknown model smolm2-135m: nearest aliases are smollm2-135m, "
        "smollm2-360m, smollm2-1.7b; or pass a Hugging Face id (owner/name) or a folder",
        "endless": "failed: it took longer than 0.01 s",
    }
    text = markdown.read_text()
    assert "Not yet" not in text and all(f"\n## {name}\n" in text for name in records)
    assert " passed" in records["tests"]["lines"][-1]
    assert any(line.startswith("| 20 | 2 | greedy | ") for line in records["7b"]["lines"])
    assert any("weights in int8" in line for line in records["7b, int8"]["lines"])
    assert any("SoftCoT training step" in line for line in records["7b, SoftCoT"]["lines"])
    assert not list(tmp_path.glob("lab-bench-*"))  # the weights


def test_a_report_of_another_machine_version_or_code_is_refused(tmp_path, capsys):
    file, about = tmp_path / "report.jsonl", {"torch": "2.6.0", "machine": "NVIDIA H100 80GB HBM3"}
    record = {"section": "7b", "method": "report", "settings": about, "lines": []}
    file.write_text(json.dumps(record) + "\n")
    before = file.read_bytes()
    assert program.command(["--device", "cpu", "--report", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "give --report another name" in said
    for name in ("torch is '2.6.0' there and ", "machine is 'NVIDIA H100", "code is None there"):
        assert name in said
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nowhere/report.jsonl"], "cannot write nowhere/report.jsonl: make its folder first"),
        (["report.md"], "--report names a file of JSON lines, report.jsonl: the .md is made of it"),
        (["report.jsonl", "--device", "tpu"], "unknown device: use cpu, cuda, or cuda:N"),
        (["report.jsonl", "--model", "tiny/base"], "--report brings its own models: leave --model"),
    ],
)
def test_mistakes_with_a_report_are_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.command(["--report", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lab.bench: {expected}") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_happens_to_a_section_is_told():
    code, said, errors = bench_report.apart(["-c", "print('printed'); int('one')"], 60)
    assert (code, said) == (1, "printed\n") and errors.startswith("Traceback")
    last = "ValueError: invalid literal for int() with base 10: 'one'"
    assert bench_report.failure(code, errors, 60) == f"failed: {last}"
    start = time.monotonic()
    # What it has started keeps its output open.
    sleeps = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    assert bench_report.apart(["-c", sleeps], 1)[0] is None
    assert time.monotonic() - start < 30
    kills = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    code, said, errors = bench_report.apart(["-c", kills], 60)
    assert bench_report.failure(code, errors, 60) == "failed: stopped by SIGKILL"


@pytest.mark.parametrize("name", ["random-7b-tiny", "random-0.5b-tiny"])
def test_random_weights_are_a_model_in_files_that_others_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(random_weights.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = random_weights.write(name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for path in folder.glob("*.safetensors"):
        shard = safetensors.torch.load_file(path)
        assert {index["weight_map"][tensor] for tensor in shard} == {path.name}
        tensors |= shard
    assert tensors.keys() == index["weight_map"].keys() and len(list(folder.glob("*-?.*"))) == 2
    for tensor, x in tensors.items():
        assert x.dtype == torch.bfloat16
        mean, spread = (1, 0) if "norm" in tensor else (0, 0.02)
        assert x.float().mean() == pytest.approx(mean, abs=0.02)
        assert x.float().std() == pytest.approx(spread, abs=0.01)
    model, _ = fast.load(str(folder), "cpu", "float32")
    assert all(torch.equal(x, tensors[k].float()) for k, x in hf_tensors(model).items())
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert random_weights.write(name) == folder  # it is there already
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    edit(folder, vocab_size=99)  # of another version
    random_weights.write(name)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 2048
    (folder / "model.safetensors.index.json").unlink()  # a killed one left no index
    random_weights.write(name)
    assert (folder / "model.safetensors.index.json").exists()


def test_the_large_sections_are_benches_of_these_models_within_their_context():
    sections = bench_report.sections(cuda=True)
    (test_file, *_), context = sections.pop("tests")[1].split(), 32768
    assert (ROOT / test_file).exists() and random_weights.QWEN2[
        "max_position_embeddings"
    ] == context
    for _, arguments in sections.values():
        args = program.read_arguments(arguments.split())
        assert args.model in random_weights.LARGE and max(args.prompt) + args.tokens < context


def test_large_shapes_are_those_of_the_models():
    """Parameters as their model cards count them, in billions."""
    for name, billions in (("random-7b", 7.62), ("random-0.5b", 0.49)):
        config = random_weights.QWEN2 | random_weights.LARGE[name]
        size = fast.weight_bytes(fast.plain.config_from_json(config), torch.bfloat16, None)
        assert size / 2e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "nothing to measure: pass --model NAME"),
        (
            ["--model", "tiny/base", "--against", "vllm"],
            "no peer 'vllm' here; there is transformers, llama.cpp",
        ),
        (["--search", "--against", "vllm"], "no peer 'vllm' here; there is botorch"),
        (["--gp", "--against", "transformers"], "no peer 'transformers' here; there is botorch"),
        (["--model", "tiny/base", "--tokens", "2"], "--tokens must be at least 8, not 2"),
        (["--model", "tiny/base", "--quantize", "int4"], "invalid choice: 'int4'"),
        (["--model", "smolm2-135m"], "unknown model smolm2-135m: nearest aliases are smollm2-135m"),
        (["--model", "tiny/base", "--prompt", "9999"], "the prompt has 10047 tokens"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        code = program.command(arguments)
    except SystemExit as error:  # argparse's
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and expected in said


def test_a_mistake_that_the_tasks_find_is_one_line(monkeypatch, capsys):
    def load(*_, **__):
        raise UserError("cannot read train.jsonl: check the path")

    monkeypatch.setattr(program, "bench_decoding", lambda args: ([], {}))
    assert bench_training.tasks is tasks
    monkeypatch.setattr(tasks, "load", load)
    options = ["--model", "tiny/base", "--assistant", "tiny/assistant"]
    assert program.command([*options, "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.err == "lab.bench: cannot read train.jsonl: check the path\n" and not said.out
