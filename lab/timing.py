"""What the benches measure with: clocks, runs in turns, the memory's speed, the machine's name."""

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def in_turns(
    contenders: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each, A B C A B C, because machines are noisy; a first round is not counted."""
    times = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            took = seconds(contender, device)
            if repeat:
                times[name].append(took)
    return times


class Clock:
    """Notes the time at every step: the time of a step is that between two of them."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def per_step(self) -> float:
        """Median seconds per step, without the first ones, which pay for warming up."""
        return statistics.median(b - a for a, b in zip(self.times[3:], self.times[4:]))


def read_speed(x: torch.Tensor) -> float:
    """Bytes per second of reading x, best of three: 1 GB, or more than any cache holds."""
    return x.nbytes / min(seconds(lambda: torch.max(x), x.device) for _ in range(3))


def peak_memory(device: torch.device) -> float:
    """GB so far, of the GPU or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo, name, flags = Path("/proc/cpuinfo"), platform.processor(), ""
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        lines = [line for line in text.splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
        flags = " ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in text)
    counts = f"{os.cpu_count()} processors, {torch.get_num_threads()} threads"
    return f"{name}, {counts} {flags}".strip()
