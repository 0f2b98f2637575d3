"""One command line for all methods: one question in the terminal, or a benchmark."""

import argparse
import errno
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from lab import fast, files, page, protocols, ranks, results, tasks
from lab.flags import FLAGS, TINY, add_flags, add_settings, at_least, check_given, fail
from lab.flags import new_parser, settings_of
from lab.identity import identified
from model import Tokenizer, Transformer, UserError

# ------------------------------------------------------------------------------ errors and the end


def guarded(
    prog: str,
    body: Callable[[], None],
    kept: str = "",
    memory: str = "lower --batch-size or --max-new-tokens",
) -> int:
    """Run the body; 0, 2 for what the user can fix, or 130. kept: what an interruption left."""
    try:
        body()
    except UserError as error:
        return fail(prog, str(error))
    except torch.OutOfMemoryError:
        return fail(prog, f"out of GPU memory: {memory}, or use a smaller --model")
    except KeyboardInterrupt:
        print("\ninterrupted" + (f"; {kept}" if kept else ""), file=sys.stderr)
        return 130
    return 0


def leave(command: Callable[..., int], *arguments: Any) -> NoReturn:
    """Run a command as the program. Left at once: unloading PyTorch takes most of a second.

    Exit code 141 where nobody reads on (`| head`), as of a program that SIGPIPE ends.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: else a file of ours would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it stays open)
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets question marks
    if sys.flags.optimize > 1:
        lacking = "python -OO takes out the docstrings that --help is made of: leave it out"
        sys.exit(fail(Path(sys.argv[0]).name, lacking))
    try:
        try:
            with ranks.one_voice():
                code = command(*arguments)
        except SystemExit as end:  # argparse's, or lab/ranks.py's
            code = end.code
        sys.stdout.flush()
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # not of a stream: our fault
        code, said = 2, f"cannot print what was found: {error.strerror}"
        with suppress(OSError):  # where standard error is as full
            fail(Path(sys.argv[0]).name, said)
    os._exit(code)


# ------------------------------------------------------------------------------ one for each method


def main(doc: str, settings: type, run: Callable, view: type) -> NoReturn:
    leave(command, sys.argv[1:], doc, settings, run, view)


def command(arguments: list[str], doc: str, settings: type, run: Callable, view: type) -> int:
    """A method's program; view, of lab/show.py, is what is particular to it. The exit code."""
    prog = re.search(r"python (\S+)", doc)[1]
    methods = typing.get_args(typing.get_type_hints(settings)["method"])
    parser = new_parser(prog, doc.splitlines()[0])
    default = ",".join(method for method in methods if method not in view.extra)
    named = {"help": FLAGS["methods"]["help"].format(methods=default)}
    add_flags(parser, view.flags, methods=named)
    add_settings(parser, settings)
    args = protocols.parse(parser, prog, arguments)

    def body() -> None:
        check_given(args)
        at_least(args, seed=0, seeds=1, num_samples=1, batch_size=1, tensor_parallel=1)
        many = args.task or args.data
        if args.question is not None and many:
            both = "--question asks one question, --task and --data score many"
            raise UserError(f"{both}: pass one of them")
        for name in ("protocol", "shots", "limit", "shard", "methods", "json"):
            if getattr(args, name, None) is not None and not many:
                raise UserError(f"--{name} goes with --task or --data")
        if getattr(args, "trace", False):
            check_trace(args)
        view.check(args)
        with ranks.joined(args), reserved(args):
            if many:
                score(args, settings, run, view, methods)
            else:
                answer(args, settings, run, view)

    return guarded(prog, body, f"what was finished is in {args.output}" if args.output else "")


def check_trace(args: argparse.Namespace) -> None:
    if not (args.output or args.html):
        raise UserError("--trace goes with --output or --html, which it is written to")


def reserved(args: argparse.Namespace) -> AbstractContextManager[None]:
    """The files that this process writes, for it alone."""
    given = vars(args).get
    return files.reserved(args.place.file(given("output")), given("json"), given("html"))


def load(args: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    place = vars(args).get("place")
    return fast.load(args.model, args.device, args.dtype, args.quantize, args.compile, place)


def recorded(args: argparse.Namespace, model: Transformer, batch_size: int) -> dict:
    """With the method's settings, all that decides what is generated and kept.

    Records with other settings are not mixed in one file.
    """
    weight = model.embed.weight
    here = {"model": args.model} | identified(args.model)
    here |= {"device": weight.device.type, "dtype": str(weight.dtype)[6:]}
    here |= {"quantize": args.quantize, "compile": args.compile, "seed": args.seed}
    here |= {"batch_size": batch_size}
    here |= args.place.recorded()
    return here | ({"trace": args.trace} if hasattr(args, "trace") else {})


def answer(args: argparse.Namespace, settings: type, run: Callable, view: type) -> None:
    """One question in the terminal; what is finished is in the file at once."""
    s, gold = settings_of(args, settings), None
    samples = view.samples(args, s)
    if args.question is None:
        problem = tasks.load("tiny", limit=1)[0]
        args.question, gold = problem.question, problem.answer
    check_question(args.question)
    model, tokenizer = load(args)
    if gold is not None:
        print(args.question)
    if view.other(args, s, run, model, tokenizer):
        return
    # One answer needs no more rows than it can use; for several they do not depend on how many.
    at_once = getattr(s, "at_once", 1)
    rows = min(args.batch_size, at_once) if samples == 1 else args.batch_size
    kept = recorded(args, model, rows) | asdict(s)
    done, texts, output = {}, ("answer_text", "thought_text"), args.place.file(args.output)
    if output:
        done = files.resume(output, {s.method: kept}, view.key, texts)
    done = args.place.same(done)
    about = {"question": args.question, "method": s.method, "seed": args.seed}
    keys = {i: tuple((about | {"sample": i})[name] for name in view.key) for i in range(samples)}
    todo = [i for i in keys if keys[i] not in done]
    for i in sorted(keys.keys() - set(todo)):
        said = done[keys[i]]["answer_text"] or done[keys[i]]["thought_text"]
        print(f"--- sample {i}, as {args.output} holds it\n{said}")
    records = [done[key] for key in keys.values() if key in done]
    if not todo:
        if args.html:
            page.write(args.html, records)
        return
    # The bundled models know their own stories only; others are told the form of the answer.
    bundled = Path(TINY).parent in Path(args.model).resolve().parents
    form = tasks.INSTRUCTION["number"] if view.form and not bundled else ""
    text = "\n\n".join(part for part in (args.question, form) if part)
    asked = [tasks.ask_number(text, form)] * len(todo)
    watch = view(tokenizer, s) if len(todo) == 1 else None
    options = {"settings": s, "seed": args.seed, "batch_size": rows, "watch": watch}
    options |= view.arguments(asked, todo, args)
    for _, record in run(model, tokenizer, **options):
        records.append(about | record | {"settings": kept})
        if output:
            # The run's settings, not the method's own; first, as lab/files.py knows a record.
            files.append(output, {"settings": kept} | records[-1])
        view.close(record, watch, model.device, gold)
    if args.html:
        page.write(args.html, records)


def check_question(question: str) -> None:
    if not question.strip():
        raise UserError("the question is empty: pass --question TEXT")
    if any("\ud800" <= c <= "\udfff" for c in question):
        raise UserError("the question is not valid UTF-8 text")


def score(
    args: argparse.Namespace, settings: type, run: Callable, view: type, there: tuple[str, ...]
) -> None:
    """A benchmark: every method on the same problems, graded, recorded, and compared in a table."""
    default = [method for method in there if method not in view.extra]
    methods = [args.method] if hasattr(args, "method") else default
    methods = args.methods.split(",") if args.methods else methods
    if wrong := [method for method in methods if method not in there]:
        raise UserError(f"--methods: no method {wrong[0]!r}; there are {', '.join(there)}")
    wanted = {}
    for method in methods:  # noise is of method soft alone
        only_soft = {"noise": None} if method != "soft" and hasattr(args, "noise") else {}
        wanted[method] = settings_of(args, settings, method=method, **only_soft)
    name, samples = args.task or "data", {m: view.samples(args, s) for m, s in wanted.items()}
    problems = tasks.load(name, args.data, args.limit, args.run_generated_code)
    problems = args.place.problems(problems)
    task = protocols.judged(tasks.TASKS[name], args)
    asked = {problem.id: view.ask(problem, task, args) for problem in problems}
    model, tokenizer = load(args)
    if getattr(args, "completion", False):
        tokenizer = protocols.completion(tokenizer)

    def solver(s: Any) -> Callable:
        def solve(todo: list[tuple[tasks.Problem, int]]) -> Iterator[tuple]:
            for seed, jobs in view.by_seed(todo, args.seed):
                questions = [asked[problem.id] for problem, _ in jobs]
                numbers = [sample for _, sample in jobs]
                options = {"settings": s, "seed": seed, "batch_size": args.batch_size}
                options["order"] = args.place.shares(len(jobs))
                options |= view.arguments(questions, numbers, args)
                for i, record in run(model, tokenizer, **options):
                    yield *jobs[i], {"prompt": questions[i].text} | record

        return solve

    common = recorded(args, model, args.batch_size) | protocols.recorded(args, task)
    solvers = {m: (common | asdict(s), solver(s)) for m, s in wanted.items()}
    result, records = results.run(
        problems, task, solvers, samples, args.output, args.json, args.place
    )
    view.after(records, methods, problems, task, max(samples.values()))
    if getattr(args, "seeds", 1) > 1:
        results.over_seeds(result, records, problems, samples, args.json)
    if args.html:
        page.write(args.html, list(records.values()))
