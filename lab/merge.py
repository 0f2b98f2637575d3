"""One result file of those that several processes have written between them.

python -m lab.merge math500.jsonl     # takes in math500.part1.jsonl, math500.part2.jsonl, ...
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from lab import cli, files, flags
from lab.results import KEY
from model import UserError


def merge(path: str) -> str:
    """Take the records of all parts into the file, each once, and remove them; what was done.

    Killed at any time, it loses nothing. UserError where a part is in use, or of other settings.
    """
    _, *parts = files.parts(path)
    if not parts:
        missing = f"there is no {files.part(path, 1)}, nor another part of {path}"
        raise UserError(f"{missing}: nothing to take in")
    done, settings = {}, {}
    with ExitStack() as stack:
        for name in (path, *parts):
            stack.enter_context(files.locked(name))
        for name in (path, *parts):
            for key, record in files.records(name, settings, KEY)[0].items():
                done.setdefault(key, record)
                settings.setdefault(record["method"], record["settings"])
        files.write(path, "".join(json.dumps(record) + "\n" for record in done.values()))
        for name in parts:
            Path(name).unlink()
    return f"{path}: {len(done)} records, {len(parts)} parts taken in"


def command(arguments: list[str]) -> int:
    parser = flags.new_parser("lab.merge", __doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="what the run's --output named")
    args = parser.parse_args(arguments)
    return cli.guarded("lab.merge", lambda: print(merge(args.file)))


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
