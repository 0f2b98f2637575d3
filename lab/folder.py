"""A training's folder: one process has it, and nothing of somebody else in it is replaced."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.trained import BEST, read_tensors
from model import UserError

LOG = b'{"step": 0, "epoch": 0, "dev_loss": '  # how a training's log begins


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """The folder, made where there is none, for this process alone, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"cannot use the folder {folder}: {error.strerror}; give --folder another name"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, or give --folder another name"
            raise UserError(f"another training writes to {folder}: {remedy}") from None
        except OSError as error:
            raise UserError(
                f"cannot lock {folder} ({error.strerror}): give a --folder on a local disk"
            ) from None
        yield folder
    finally:
        os.close(handle)


def check_own(folder: Path, best: str, metadata: dict) -> None:
    """UserError where a training with this metadata would replace what is not its own.

    A folder without a saved state may hold what a first validation that was cut off leaves: files
    of tensors with the metadata, up to the loss, and one line of the log.
    """
    start = {key: str(value) for key, value in metadata.items() if key != "loss"}
    state, log = folder / "state.safetensors", folder / "log.jsonl"
    if state.exists():  # which settings it has is another question
        wanted, paths = {"made_by": start["made_by"]}, [state]
    else:
        wanted, paths = start, [folder / best, folder / "last.safetensors"]
    tensors = [path for path in paths if path.exists()]
    foreign = [path for path in tensors if not read_tensors(path)[1].items() >= wanted.items()]
    if not state.exists():
        config, lines = folder / "adapter_config.json", log.read_bytes() if log.exists() else b""
        if best == BEST["lora"] and config.exists() and not (folder / best).exists():
            foreign.append(config)
        if lines[: len(LOG)] != LOG[: len(lines)] or lines.count(b"\n") > 1:
            foreign.append(log)
    if foreign:
        fault = "is not of this training, which would replace it"
        raise UserError(f"{foreign[0]} {fault}: give --folder another name")


def log_until(path: Path, step: int) -> bytes:
    """The lines of a log up to a step, but for a half-written last one."""
    lines = path.read_bytes().splitlines(keepends=True)
    try:
        whole = [line for line in lines if line.endswith(b"\n")]
        return b"".join(line for line in whole if json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is not the log of a training: move it away") from None
