"""What a GPU would refuse, and a CPU lets pass: programs and tests on one that is pretended."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_tensors_of_two_devices_do_not_mix_and_a_recording_reads_and_moves_nothing():
    refused = """
import pretended, torch
pretended.start()
x, ids, graph = torch.ones(3, device="cuda"), torch.arange(2), torch.cuda.CUDAGraph()
ways = [lambda: x + torch.ones(3)]
def recorded(what):
    def way():
        with torch.cuda.graph(graph):
            what()
    return way
whats = [x[0].item, x.tolist, x.nonzero, lambda: x[ids], lambda: x[x > 0], lambda: x.copy_(ids[0])]
whats += [lambda: torch.tensor(1.0, device="cuda"), x.cpu]
for way in [*ways, *map(recorded, whats)]:
    try:
        way()
    except RuntimeError as error:
        print(str(error).split(":")[0])
with torch.cuda.graph(graph):
    y = x.add_(1) * 2
before = x.tolist()
graph.replay()
print(before, x.tolist(), y.tolist(), x.device, (x + torch.tensor(1.0)).is_cuda)
"""
    ran = run("-c", refused)
    capturing = ["operation not permitted when stream is capturing"] * 8
    expected = ["Expected all tensors to be on the same device", *capturing]
    after = "[1.0, 1.0, 1.0] [2.0, 2.0, 2.0] [4.0, 4.0, 4.0] cuda:0 True"
    assert ran.stdout.splitlines() == [*expected, after], ran.stderr


@pytest.mark.parametrize(
    "options",
    [
        "soft_thinking.py --num-samples 2 --noise gumbel --quantize int8",
        "soft_reasoning.py --rounds 2 --k 3 --stop-threshold 0",
        "soft_reasoning.py --method cot-decoding",
        "soft_reasoning.py --method rap --rap-iterations 2",
        "softcot.py eval --limit 2 --methods zero-shot-cot,cot-unk,assist-cot,softcot",
        "-m lab.bench --model tiny/base --batch 2 --tokens 8 --repeats 1 --prompt 20",
    ],
)
def test_programs_run(options):
    small = ["--max-new-tokens", "60"] if "bench" not in options else []
    ran = run("tests/pretended.py", *options.split(), *small, "--device", "cuda")
    assert ran.returncode == 0, ran.stderr
    assert "cannot be recorded" not in ran.stderr
    assert "The answer is " in ran.stdout or "softcot" in ran.stdout or "greedy" in ran.stdout


def test_numbers_are_those_of_a_cpu_and_neighbours_change_no_bit():
    names = "hidden_states or what_plain or int8_weights or neighbour"
    ran = run("tests/pretended.py", "-m", "pytest", "tests/test_cuda.py", "-k", names)
    assert ran.returncode == 0, ran.stdout
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) > 40 and "skipped" not in ran.stdout
