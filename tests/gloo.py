"""Several processes on this machine, as torchrun starts them, for the tests: run(2, function)."""

import multiprocessing
import os
import pickle
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lab import cli, ranks

CONTEXT = multiprocessing.get_context("forkserver")  # imports PyTorch once, for all of them
CONTEXT.set_forkserver_preload(["conftest", "gloo", "lab.cli", "lab.softcot_cli", "softcot_pair"])


class Run:
    """Processes that have been started; `end` waits for them."""

    def __init__(self, folder: Path, size: int, function: Callable, *arguments: Any, port: int = 0):
        """function(*arguments) in each, its exit code where it returns an int; else a result."""
        if not port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
        world |= {"MASTER_ADDR": "127.0.0.1"}
        self.folder = folder / f"run-{port}"
        self.folder.mkdir()
        self.processes = []
        for rank in range(size):
            own = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = CONTEXT.Process(target=one, args=(self.folder, own, function, arguments))
            process.start()
            self.processes.append(process)

    def end(self, seconds: float = 60) -> list[int]:
        """The exit codes of all; nobody may hang."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, limit - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, self.said()
        return [process.exitcode for process in self.processes]

    def said(self, stream: str = "err") -> str:
        """What all of them printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{stream}-*")))

    def results(self) -> list:
        assert self.end() == [0] * len(self.processes), self.said()
        paths = sorted(self.folder.glob("result-*"))
        return [pickle.loads(path.read_bytes()) for path in paths]


def one(folder: Path, world: dict[str, str], function: Callable, arguments: tuple) -> None:
    os.environ.update(world)
    torch.set_num_threads(1)
    rank = world["RANK"]
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, number)
    # os.dup2 has redirected the streams, which print to the files from now on.

    def command() -> int:
        found = function(*arguments)
        if isinstance(found, int):
            return found
        (folder / f"result-{rank}").write_bytes(pickle.dumps(found))
        return 0

    cli.leave(command)


def joined(tensor_parallel: int = 1):
    """The context of a program's ranks, and its args, whose `place` is set inside."""
    args = Namespace(tensor_parallel=tensor_parallel, device="cpu")
    return ranks.joined(args), args
