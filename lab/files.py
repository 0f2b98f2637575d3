"""Result files: JSON lines that a killed run goes on with, and whole files that appear at once."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import UserError


def plain_json(settings: dict) -> dict:
    """Settings as they come back from a file: tuples as lists, paths as text."""
    return json.loads(json.dumps(settings, default=str))


def check_place(path: str | Path) -> None:
    """UserError, before the work is done, where no file can be written."""
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise UserError(f"cannot write {path}: make its folder first, and give a file's name")


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
    path: str | Path, settings: dict[str, dict], key: Sequence[str], flag: str = "--output"
) -> dict[tuple, dict]:
    """Read the records of a result file, by their values for the names in `key`.

    {} if there is no file. A half-written last line, which a killed process leaves, is cut off.

    settings: method -> settings; flag: the one that names the file. Raises UserError for a record
    of one of these methods with other settings, and for a file that is damaged or no result file.
    """
    path, done = Path(path), {}
    another = f"give {flag} another name"
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for n, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                there, method = record["settings"], record["method"]
                done[tuple(record[name] for name in key)] = record
            except KeyError as error:
                raise UserError(
                    f"{path}, line {n}: a record of something else (it has no {error}); {another}"
                ) from None
            except (ValueError, TypeError):
                raise UserError(
                    f"{path}, line {n}: not a record; delete the line, and it is done again; or "
                    f"{another}"
                ) from None
            here = plain_json(settings.get(method, there))
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
        if not whole and not b'{"'.startswith(rest[:2]):
            raise UserError(f"{path} is not a result file; {another}")
        # Opened even where nothing is cut: better to fail now than after the first problem.
        with open(path, "ab") as file:
            file.truncate(len(whole))
        if rest:
            cut = f"cutting its {len(rest)} bytes"
            print(f"{path}: the last line is half-written; {cut}", file=sys.stderr)
    except OSError as error:
        raise UserError(f"cannot read and write {path}: {error.strerror}; {another}") from None
    if done:
        print(f"{path}: going on after {len(done)} finished records", file=sys.stderr)
    return done


def write_json(path: str | Path, result: Any) -> None:
    write(path, json.dumps(result, indent=1) + "\n")


def write(path: str | Path, text: str) -> None:
    """Write beside `path`, then put the file in its place at once.

    Readers see the old file or the new one, never a half.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
