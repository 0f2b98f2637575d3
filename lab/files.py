"""Result files: JSON lines that a killed run goes on with, and whole files that appear at once.

Only files that are new, or recognisably ours, are written; one process at a time writes to a file
of records (those that share a run write a part each).
"""

import fcntl
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lab.schema import check_record
from model import UserError

START = b'{"settings": {'  # every record begins with it, so that a half-written one is recognised
PAGE = b'<meta name="generator" content="lab.report">'  # in the head of lab/page.html.jinja
TABLE = ("task", "problems", "methods", "interval")  # fields of what `lab.tables.report` makes


def plain_json(settings: dict) -> dict:
    """Settings as they come back from a file: tuples as lists, paths as text."""
    return json.loads(json.dumps(settings, default=str))


# --------------------------------------------------------------------------- before the work begins


def check_place(path: str | Path) -> None:
    """UserError, before the work is done, where no file can be written."""
    try:
        folder = os.path.dirname(os.path.realpath(path))
    except FileNotFoundError:
        raise UserError(f"cannot write {path}: the working directory is gone") from None
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise UserError(f"cannot write {path}: make its folder first, and give a file's name")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot write {path}: it is a device or a pipe; give a file's name")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "give a name in a folder of yours"
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from None


def check_table(path: str | Path, fields: Sequence[str]) -> None:
    """UserError where `path` cannot be written, or is a file that is not ours.

    Ours are an empty file, and JSON: an object, or an array of some, with at least these fields.
    """
    check_place(path)
    try:
        content = Path(path).read_bytes() if os.path.exists(path) else b""
        found = json.loads(content or "null")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give another name") from None
    except (ValueError, RecursionError):
        found = None
    rows = found if isinstance(found, list) else [found]
    ours = rows and all(isinstance(row, dict) and row.keys() >= set(fields) for row in rows)
    if content and not ours:
        raise UserError(f"{path} is a file of something else: give another name, or delete it")


def check_start(path: str | Path, ours: bytes = PAGE) -> None:
    """UserError where `path` cannot be written, or is a file that does not begin as ours do."""
    check_place(path)
    if os.path.exists(path):
        with open(path, "rb") as file:
            start = file.read(1000)
        if start and ours not in start:
            raise UserError(f"{path} is a file of something else: give another name")


@contextmanager
def reserved(
    output: str | Path | None, table: str | Path | None = None, page: str | Path | None = None
) -> Iterator[None]:
    """A run's files for this process alone: they can be written, and are ours or new.

    Raises UserError, which names the process that writes to `output` if there is one.
    """
    if table:
        check_table(table, TABLE)
    if page:
        check_start(page)
    if output:
        check_place(output)
    given = [os.path.realpath(path) for path in (output, table, page) if path]
    if len(set(given)) < len(given):
        raise UserError("two of --output, --json and --html name the same file: give each its own")
    with locked(output) if output else nullcontext():
        yield


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """`path` for this process alone, however it ends, by a lock on a file beside it."""
    name = f"{os.path.realpath(path)}.lock"
    another = "give --output another name"
    try:
        while True:
            handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
            holder = os.read(handle, 1000).decode(errors="replace")
            if holder and not re.fullmatch(r"process \d+ on \S+", holder):
                raise UserError(f"{name} is a file of something else: {another}")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may just have deleted it: then it is not the file of that name.
            if os.path.exists(name) and os.path.samestat(os.stat(name), os.fstat(handle)):
                break
            os.close(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{holder or 'another process'} writes to {path}: {another}") from None
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; {another}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(name)
        os.close(handle)


# ----------------------------------------------------------------------------------------- records


def read(path: str | Path) -> bytes:
    """A file's content. UserError where it cannot be read."""
    try:
        if Path(path).is_fifo() and Path(path).parent != Path("/dev/fd"):
            raise UserError(f"{path} is a named pipe: give a file")  # nobody may ever write to it
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None


def part(path: str | Path, number: int) -> str:
    """The file of one of several processes: FILE.jsonl, FILE.part1.jsonl, FILE.part2.jsonl, ..."""
    path = Path(path)
    return str(path.with_name(f"{path.stem}.part{number}{path.suffix}") if number else path)


def parts(path: str | Path) -> list[str]:
    """The first one's file, there or not, and the others that are there."""
    path = Path(path)
    pattern = rf"{re.escape(path.stem)}\.part\d+{re.escape(path.suffix)}"
    found = [str(x) for x in path.parent.glob("*") if re.fullmatch(pattern, x.name)]
    return [str(path), *sorted(found)]


def append(path: str | Path, record: dict) -> None:
    """Write one JSON line at the end of a file; it is on its way to the disk when this returns."""
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(record, default=str).encode() + b"\n")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; what it holds is safe, and the same command "
            "goes on from there"
        ) from None


def resume(
    path: str | Path,
    settings: dict[str, dict],
    key: Sequence[str],
    others: Sequence[str] = (),
    flag: str = "--output",
) -> dict[tuple, dict]:
    """As `records`, of a file that is to be written to, and that may not be there.

    A half-written last line, which a killed process leaves, is cut off.
    """
    done, length, rest = records(path, settings, key, others, flag)
    try:
        # Opened even where nothing is cut: better to fail now than after the first problem.
        with open(path, "ab") as file:
            file.truncate(length)
    except OSError as error:
        another = f"give {flag} another name"
        raise UserError(f"cannot read and write {path}: {error.strerror}; {another}") from None
    if rest:
        cut = f"cutting its {rest} bytes"
        print(f"{path}: the last line is half-written; {cut}", file=sys.stderr)
    if done:
        print(f"{path}: going on after {len(done)} finished records", file=sys.stderr)
    return done


def records(
    path: str | Path,
    settings: dict[str, dict],
    key: Sequence[str],
    others: Sequence[str] = (),
    flag: str = "--output",
) -> tuple[dict[tuple, dict], int, int]:
    """The records of a result file, by their values for the names in `key`; {} if there is none.

    Also how many bytes they take, and how many a half-written last line behind them.

    settings: method -> settings. others: what a record must have beside the key; flag: the one that
    names the file. Raises UserError for a record of one of these methods with other settings, and
    for a file that is no result file or is damaged.
    """
    path, done = Path(path), {}
    another = f"give {flag} another name"
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for n, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                there, method = dict(record["settings"]), record["method"]
                done[tuple(record[name] for name in key)] = record
                _ = [record[name] for name in others]
                check_record(record)
            except KeyError as error:
                raise UserError(
                    f"{path}, line {n}: a record of something else (it has no {error}); {another}"
                ) from None
            except (ValueError, TypeError, RecursionError):
                raise UserError(
                    f"{path}, line {n}: not a record; delete the line, and it is done again; or "
                    f"{another}"
                ) from None
            here = plain_json(settings.get(method, there))
            if "weights" in here and "weights" not in there:
                lacks = "do not say of which weights and tokenizer they are"
                raise UserError(f"{path} is of an older version, whose records {lacks}; {another}")
            differing = [
                f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
                for name in sorted(there.keys() | here.keys())
                if there.get(name) != here.get(name)
            ]
            if differing:
                raise UserError(
                    f"{path} holds results of other settings: {', '.join(differing)}; {another}, "
                    "or delete it"
                )
        rest = content[len(whole) :]
        if rest and not whole and not half_written(rest, key):
            raise UserError(f"{path} is not a result file; {another}")
    except OSError as error:
        raise UserError(f"cannot read and write {path}: {error.strerror}; {another}") from None
    return done, len(whole), len(rest)


def half_written(rest: bytes, key: Sequence[str]) -> bool:
    """Whether this is the beginning of a record, or a whole one without its line break."""
    if rest[: len(START)] != START[: len(rest)]:
        return False
    try:
        record = json.loads(rest)
    except ValueError:
        return True
    return all(name in record for name in ("method", *key))


# ------------------------------------------------------------------------------------- whole files


def write_json(path: str | Path, result: Any) -> None:
    write(path, (json.dumps(result, indent=1) + "\n").encode())


def publish(text: str, result: Any, path: str | Path | None) -> None:
    """Print a text, and write the result where there is a path: each even if the other fails."""
    try:
        if path:
            write_json(path, result)
    finally:
        print(text)


def write(
    path: str | Path, content: bytes | str, remedy: str = "free some space, or try again"
) -> None:
    """At once: a reader, or a machine that stops, finds the old file or the new one."""
    path = os.path.realpath(path)  # a link stays one
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from None
    finally:
        with suppress(OSError):  # it is not there any more, or never was
            os.unlink(temporary)
