"""bench.py: it runs, counts bytes as by hand, and says what is wrong in one line."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def bench(*arguments):
    return subprocess.run([sys.executable, ROOT / "bench.py", *arguments], check=False, capture_output=True, text=True, cwd=ROOT)


def test_the_bundled_model_is_measured(tmp_path):
    ran = bench("--model", "tiny/base", "--device", "cpu", "--dtype", "float32", "--batch", "1", "3", "--prompt", "20", "--tokens", "8",
                "--repeats", "1", "--quantize", "int8", "--json", str(tmp_path / "bench.json"))
    assert ran.returncode == 0, ran.stderr
    c = json.loads((ROOT / "tiny" / "base" / "config.json").read_text())
    d, h, layers, ffn, V = c["hidden_size"], c["head_dim"], c["num_hidden_layers"], c["intermediate_size"], c["vocab_size"]
    qkv = (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * h
    matrices = [(qkv, d), (d, c["num_attention_heads"] * h), (2 * ffn, d), (d, ffn)] * layers + [(V, d)]
    weights = sum(m * n + 4 * m for m, n in matrices)  # a byte for each weight, a float32 scale for each row
    found = json.loads((tmp_path / "bench.json").read_text())
    for result in found["results"]:
        keys_and_values = result["batch"] * (20 + 8 // 2) * layers * 2 * c["num_key_value_heads"] * h * 4
        assert result["bytes_per_step"] == weights + keys_and_values and result["seconds_per_step"][0] > 0
    assert [(r["batch"], r["method"]) for r in found["results"]] == [(b, m) for b in (1, 3) for m in ("greedy", "concept tokens")]
    assert "| 3 | concept tokens | " in ran.stdout and "five candidates of one prompt" in ran.stdout and "perplexity" in found["int8"]


@pytest.mark.parametrize("arguments, expected", [
    ([], "nothing to measure: pass --model NAME"),
    (["--model", "tiny/base", "--against", "vllm"], "no peer 'vllm' here; there is transformers, llama.cpp"),
    (["--gp", "--against", "transformers"], "no peer 'transformers' here; there is botorch"),
    (["--model", "tiny/base", "--tokens", "2"], "--tokens must be at least 8, not 2"),
    (["--model", "tiny/base", "--quantize", "int4"], "invalid choice: 'int4'"),
])
def test_mistakes_are_one_line(arguments, expected):
    ran = bench(*arguments)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and expected in ran.stderr
