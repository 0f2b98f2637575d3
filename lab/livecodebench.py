"""Writes the programs of a result file as LiveCodeBench's own evaluator reads them.

    python soft_thinking.py --task livecodebench --data problems.jsonl --output out.jsonl
    python -m lab.livecodebench out.jsonl -o programs.json
    python -m lcb_runner.runner.custom_evaluator --custom_output_file programs.json

problems.jsonl are LiveCodeBench's own rows, one a line, of which `question_id`, `question_content`
and `starter_code` are read. The last command is LiveCodeBench's; it wants all problems of its
--release_version. Programs are run there, not here: the table of the first command counts what is
Python.
"""

import sys
from pathlib import Path

from lab import cli, files, flags, regrade
from model import UserError


def exported(path: str | Path, method: str | None = None) -> list[dict]:
    """[{"question_id", "code_list"}] of a result file, "" where an answer holds no program.

    UserError for a file that holds no records of the task livecodebench and of one method, with
    as many samples of each question.
    """
    records = [r for r in regrade.read(path) if r["settings"]["task"] == "livecodebench"]
    if not records:
        raise UserError(f"{path} holds no records of --task livecodebench")
    methods = list(dict.fromkeys(r["method"] for r in records))
    if method is None and len(methods) > 1:
        raise UserError(f"{path} holds several methods: pass --method, one of {', '.join(methods)}")
    if method not in (None, *methods):
        raise UserError(f"{path} holds no method {method!r}; there are {', '.join(methods)}")
    programs: dict[str, dict[int, str]] = {}  # question -> sample -> program
    for r in records:
        if r["method"] == (method or methods[0]):
            programs.setdefault(r["gold"], {})[r["sample"]] = r["extracted"] or ""
    most = max(map(len, programs.values()))
    if short := [question for question, codes in programs.items() if len(codes) < most]:
        few = f"{len(programs[short[0]])} samples of {short[0]} and {most} of others"
        raise UserError(f"{path} holds {few}: let the run finish first")
    return [
        {"question_id": question, "code_list": [codes[i] for i in sorted(codes)]}
        for question, codes in sorted(programs.items())
    ]


def command(arguments: list[str]) -> int:
    parser = flags.new_parser("lab.livecodebench", __doc__.splitlines()[0])
    parser.add_argument("results", metavar="FILE.jsonl", help="written by --output")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="what is written")
    parser.add_argument("--method", help="whose programs, where the file holds several")
    args = parser.parse_args(arguments)

    def export() -> None:
        flags.check_given(args)
        files.check_table(args.output, ("question_id", "code_list"))
        files.write_json(args.output, exported(args.results, args.method))

    return cli.guarded(parser.prog, export)


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
