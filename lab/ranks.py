"""The processes of a `torchrun`: where each one stands, what is shared, and how all of them end.

    torchrun --nproc-per-node 8 soft_thinking.py --tensor-parallel 2 --task math500 --output m.jsonl

Eight processes with --tensor-parallel 2 are four replicas of a model, each on two devices. All run
the same program. The first rank of a replica decides for it (lab/parallel.py), and rank 0 for all:
it alone prints, and makes the table of what all replicas have written.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lab import files, identity
from model import UserError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
CONNECT, WAIT = timedelta(minutes=2), timedelta(days=1)  # a thought may be waited for for hours


def launched() -> bool:
    return all(name in os.environ for name in LAUNCHED)


def check_alone() -> None:
    """UserError in a program of one process that torchrun has started more than once."""
    if launched() and os.environ["WORLD_SIZE"] != "1":
        raise UserError("this program is one process: start it without torchrun")


@dataclass(frozen=True)
class Place:
    """Where a process stands among all: alone, if nothing else is said."""

    rank: int = 0
    size: int = 1  # processes in all
    parts: int = 1  # processes that hold a model between them
    shard: tuple[int, int] = (0, 1)  # (i, n) of --shard i/n
    group: Any = None  # those that hold this one's
    store: Any = None  # torchrun's, of keys and values
    rounds: Iterator[int] = field(default_factory=itertools.count)  # that were shared out so far

    @property
    def part(self) -> int:
        return self.rank % self.parts

    @property
    def replica(self) -> int:
        return self.rank // self.parts

    @property
    def replicas(self) -> int:
        return self.size // self.parts

    def file(self, output: str | Path | None) -> str | None:
        """Where this process writes the records of --output, if it is the one to write some."""
        if not output or self.part:
            return None
        return files.part(output, self.replica or self.shard[0])

    def recorded(self) -> dict[str, int]:
        """For the records: a model on several devices sums in another order than on one."""
        return {"tensor_parallel": self.parts} if self.parts > 1 else {}

    def problems(self, every: list) -> list:
        """Those of this shard. UserError where it has none."""
        i, n = self.shard
        if not every[i::n]:
            raise UserError(f"--shard {i}/{n}: there are only {len(every)} problems")
        return every[i::n]

    def same(self, x: Any) -> Any:
        """Rank 0's x, which can be pickled, on all ranks."""
        return x if self.size == 1 else broadcast(x, 0, None)

    def least(self, x: float) -> float:
        """The smallest x of the ranks that hold this model."""
        if self.parts == 1:
            return x
        found = torch.tensor([x], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MIN, self.group)
        return found.item()

    def shares(self, n: int) -> Iterable[int]:
        """Numbers below n, each for one replica: one that is free takes the next."""
        return range(n) if self.replicas == 1 else self.taken(n, f"round {next(self.rounds)}")

    def taken(self, n: int, key: str) -> Iterator[int]:
        while True:
            i = self.store.add(key, 1) - 1 if self.part == 0 else None
            i = i if self.parts == 1 else broadcast(i, self.rank - self.part, self.group)
            if i >= n:
                return
            yield i

    def together(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    @contextmanager
    def first_before(self) -> Iterator[None]:
        """Rank 0 is done with it before the others begin."""
        if self.rank:
            self.together()
        yield
        if not self.rank:
            self.together()

    def first_goes_on(self) -> None:
        """Wait until all have done their work; then all but rank 0 have nothing left to do."""
        self.together()
        if self.rank:
            raise SystemExit(0)


ALONE = Place()


def broadcast(x: Any, source: int, group: Any) -> Any:
    held = [x]
    dist.broadcast_object_list(held, source, group, device=torch.device("cpu"))
    return held[0]


# ------------------------------------------------------------------------------ beginning and end


@contextmanager
def one_voice() -> Iterator[None]:
    """All ranks but 0 are silent; what is raised is shown."""
    with ExitStack() as stack:
        if launched() and os.environ["RANK"] != "0":
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(null))
            stack.enter_context(redirect_stderr(null))
        yield


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Join the other processes: sets args.place, and args.device to this process's own.

    --json and --html are rank 0's. Raises UserError for what cannot work; whichever rank finds it,
    one line is printed, and all of them end.
    """
    N, shard = (vars(args).get(name) for name in ("tensor_parallel", "shard"))
    N = N or 1
    if not launched():
        args.place = Place(shard=shard or (0, 1))
        if N > 1:
            start = f"torchrun --nproc-per-node {N} {Path(sys.argv[0]).name} ..."
            raise UserError(f"--tensor-parallel {N} needs {N} processes: start it by `{start}`")
        yield
        return
    store, rank, size = connected()
    with one_line(store, rank, size):
        check_alike(args, store, rank, size)
        check_number(args, size, N)
        cuda = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
        firsts, group = range(0, size, N), None
        if N > 1:
            groups = [dist.new_group(range(first, first + N)) for first in firsts]
            group = groups[rank // N]
        args.place = Place(rank, size, N, group=group, store=store)
        if cuda and args.device != "cpu":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
        if rank:
            vars(args).update(dict.fromkeys({"json", "html"} & vars(args).keys()))
        yield


def connected() -> tuple[Any, int, int]:
    """torchrun's store, this process's rank, and how many there are."""
    # What listens at the port, if it is no such store, may never answer.
    limit = threading.Timer(CONNECT.total_seconds() + 5, os._exit, (2,))
    limit.start()
    try:
        return next(dist.rendezvous("env://", timeout=CONNECT))
    except (dist.DistError, RuntimeError):
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        remedy = "if the port is in use, give torchrun another --master-port"
        raise UserError(f"the processes do not find each other at {where}: {remedy}") from None
    finally:
        limit.cancel()


def check_alike(args: argparse.Namespace, store: Any, rank: int, size: int) -> None:
    """UserError where ranks have other flags, versions, or (sums differ) processors."""
    mine = {f"--{k.replace('_', '-')}": str(v) for k, v in vars(args).items()}
    mine |= {"torch": torch.__version__, "this program": identity.code()}
    mine |= {"processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    store.set(f"rank {rank}", json.dumps(mine))
    first = json.loads(store.get("rank 0"))
    for other in range(1, size):
        there = json.loads(store.get(f"rank {other}"))
        for name in first.keys() | there.keys():
            if first.get(name) != there.get(name):
                found = f"{name} is {there.get(name)} on rank {other}, {first.get(name)} on rank 0"
                raise UserError(f"{found}: start all processes alike")


def check_number(args: argparse.Namespace, size: int, N: int) -> None:
    """UserError where so many processes cannot share the models, the devices, or the work."""
    given = vars(args).get
    if given("shard"):
        raise UserError("--shard is for processes without torchrun, which shares the problems out")
    if size % N:
        raise UserError(f"--tensor-parallel {N} does not divide the {size} processes")
    if size > N and not ((given("task") or given("data")) and given("output") or given("folder")):
        share = f"{size // N} replicas share the problems of --task or --data"
        raise UserError(f"{share}, and write them to --output FILE: pass both")
    if torch.cuda.is_available() and args.device != "cpu":
        local, there = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
        if local > there:
            raise UserError(f"{local} processes, {there} CUDA devices: lower --nproc-per-node")
        if args.device and ":" in args.device:
            raise UserError(f"--device {args.device} is for one process: say cuda")


@contextmanager
def one_line(store: Any, rank: int, size: int) -> Iterator[None]:
    """What the user can fix is said by one rank, by rank 0 if it finds it too; others end silently.

    A process that ends makes the collectives of the others fail: so none of them waits for it.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        if rank == 0:
            speak(store)
            wait(store, [f"rank {other} ends" for other in range(1, size)])  # it may hold the store
        elif wait(store, ["said"]):
            store.set(f"rank {rank} ends", "")
            raise SystemExit(2) from None
        else:
            speak(store)
        raise
    except KeyboardInterrupt:
        if rank == 0:
            speak(store)
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        speak(store)
        lost = "another process of this run has ended, and so do all"
        raise UserError(f"{lost}; what was finished is kept: start it again") from None


def wait(store: Any, keys: list[str]) -> bool:
    """Whether all of the keys are there within a second."""
    try:
        store.wait(keys, timedelta(seconds=1))
    except dist.DistError:
        return False
    return True


def speak(store: Any) -> None:
    """From here on standard error is this rank's; SystemExit where another one has spoken."""
    try:
        first = store.add("said", 1) == 1
    except (dist.DistError, RuntimeError):  # rank 0 held the store, and is gone
        first = True
    if not first:
        raise SystemExit(2)
    sys.stderr = sys.__stderr__
