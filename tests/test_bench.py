"""lab.bench: it runs, counts bytes as by hand, and says what is wrong in one line."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lab import bench as program
from lab import bench_landscapes, bench_training, tasks
from model import UserError


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
        assert result["seconds_per_step"][0] > 0
    assert [(r["batch"], r["method"]) for r in found["results"]] == [
        (b, m) for b in (1, 3) for m in ("greedy", "concept tokens")
    ]
    assert "| 3 | concept tokens | " in ran.stdout
    assert "five candidates of one prompt" in ran.stdout and "perplexity" in found["int8"]
    assert "SoftCoT training step of tiny/base" in ran.stdout and "| ours | " in ran.stdout


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
def test_mistakes_are_one_line(arguments, expected):
    ran = bench(*arguments)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and expected in ran.stderr


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
