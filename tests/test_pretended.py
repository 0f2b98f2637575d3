"""What a GPU would refuse, and a CPU lets pass: programs and tests on one that is pretended."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from make_golden import FAMILIES

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


BEGIN = """
import sys
sys.path.insert(0, "tests")
import pretended, torch
pretended.start()
x, cpu, one = torch.ones(3, device="cuda"), torch.ones(3), torch.tensor(1.0)
i, ids, here = torch.tensor(1), torch.arange(2), torch.arange(2, device="cuda")
"""


def test_tensors_of_two_devices_do_not_mix():
    refused = """
for way in [
    lambda: x + cpu,
    lambda: torch.stack([x, cpu]),
    lambda: torch.stack([one, x[0]]),
    lambda: cpu[here],
    lambda: cpu.index_put_((here,), x[:2]),
    lambda: x.index_put_((here,), cpu[:2]),
    lambda: x.index_select(0, ids),
    lambda: x.index_select(0, i),
    lambda: torch.nn.functional.embedding(i, x[:, None]),
    lambda: one.add_(x[0]),
    lambda: torch.add(x, x, out=cpu),
]:
    try:
        print(way())
    except RuntimeError as error:
        print(str(error).split(":")[0])
print((x + one).tolist(), (one * x)[ids].tolist(), x.fill_(one + 1).tolist(), x.device)
"""
    ran = run("-c", BEGIN + refused)
    *found, last = ran.stdout.splitlines()
    assert found == ["Expected all tensors to be on the same device"] * 11, ran.stderr
    assert last == "[2.0, 2.0, 2.0] [1.0, 1.0] [2.0, 2.0, 2.0] cuda:0"


def test_a_recording_reads_and_moves_nothing_and_is_undone_and_replayed():
    refused = """
graph = torch.cuda.CUDAGraph()
for way in [
    x[0].item,
    x.tolist,
    x.cpu,
    x.nonzero,
    x.unique,
    lambda: bool(x[0]),
    lambda: x[ids],
    lambda: x[x > 0],
    lambda: x.masked_select(x > 0),
    lambda: x.copy_(one),
    lambda: torch.tensor(1.0, device="cuda"),
    lambda: torch.where(x > 0, x, one),
    lambda: torch.allclose(x, x),
    lambda: here.repeat_interleave(here),
]:
    try:
        with torch.cuda.graph(graph):
            print(way())
    except RuntimeError as error:
        print(str(error).split(":")[0])
z = torch.zeros(3, device="cuda")
with torch.cuda.graph(graph):
    y = x.add_(1) * 2
    torch.add(x, y[1:2].sum() * one, out=z)
before = x.tolist(), z.tolist()
for _ in range(2):
    graph.replay()
print(before, x.tolist(), y.tolist(), z.tolist())
"""
    ran = run("-c", BEGIN + refused)
    *found, last = ran.stdout.splitlines()
    assert found == ["operation not permitted when stream is capturing"] * 14, ran.stderr
    before, after = "([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])", "[3.0, 3.0, 3.0] [6.0, 6.0, 6.0]"
    assert last == f"{before} {after} [9.0, 9.0, 9.0]"


ASKED = [
    ("soft_thinking.py --num-samples 2 --noise gumbel --quantize int8", "--- sample 1"),
    ("soft_reasoning.py --rounds 2 --k 3 --stop-threshold 0", "<- best"),
    ("soft_reasoning.py --method cot-decoding", "The answer is "),
    ("soft_reasoning.py --method rap --rap-iterations 2", "The answer is "),
    ("softcot.py eval --limit 2 --methods assist-cot,softcot", "assist-cot "),
]
BENCH = (
    "-m lab.bench --model tiny/base --batch 2 --tokens 8 --repeats 1 --prompt 20",
    "| 2 | greedy",
)


@pytest.mark.parametrize(
    "command, answer", [*((f"{c} --max-new-tokens 60", said) for c, said in ASKED), BENCH]
)
def test_programs_run(command, answer):
    ran = run("tests/pretended.py", *command.split(), "--device", "cuda")
    assert ran.returncode == 0 and answer in ran.stdout, ran.stderr
    assert "cannot be" not in ran.stderr  # steps are recorded, and kernels used


def test_replayed_steps_are_the_steps_and_numbers_are_those_of_a_cpu():
    names = "(recorded_steps or hidden_states or int8_weights) and not cpu"
    asked = "tests/pretended.py", "-m", "pytest", "tests/test_cuda.py", "-k", names
    ran = run(*asked)
    assert ran.returncode == 0, ran.stdout
    of_methods, families = 7, 4 * len(FAMILIES)
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) == of_methods + families + 1
