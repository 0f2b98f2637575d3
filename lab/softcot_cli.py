"""SoftCoT's commands: train, eval, and one question in the terminal.

The modules of the method (softcot) and of its baselines (lora, prompts) are handed over.
"""

import argparse
import hashlib
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from lab import cli, flags, page, protocols, ranks, results, show, soft_thoughts
from lab import softcot_variants, tables, tasks
from lab.fast import load
from lab.folder import locked
from lab.identity import identified
from lab.replica import Replica
from lab.softcot_variants import METHODS, Answering, variants
from lab.traces import Names
from lab.trained import BEST, identity, kept_hidden
from lab.training import Trainer
from model import UserError, check_prompt

PROG = "softcot.py"

# ------------------------------------------------------------------------------------------- flags


def command_line(command: str | None, method: ModuleType) -> argparse.ArgumentParser:
    """The flags of `train`, of `eval`, or of one question: each refuses what others know."""
    titles = {"train": "Train the projection, a soft prompt, or LoRA."}
    titles |= {"eval": "Score methods on a task.", None: method.__doc__.splitlines()[0]}
    epilog = None if command else "See also: softcot.py train --help, softcot.py eval --help"
    parser = flags.new_parser(
        f"{PROG} {command or ''}".strip(),
        titles[command],
        epilog=epilog,
        conflict_handler="resolve",
    )
    add, bundled = parser.add_argument, {"model": {"default": softcot_variants.TINY}}
    flags.add_flags(parser, "model device dtype", **bundled)
    several = "likewise; eval takes several, with commas (default: bundled)"
    add("--assistant", default=softcot_variants.TINY_ASSISTANT, help=several)
    add("--assistant-device", help="as --device, of the assistant (default: the same)")
    if command:
        task = {"help": f"(default: tiny) one of {flags.TASKS}"}
        flags.add_flags(parser, "task data limit", task=task)
    if command == "train":
        add(
            "--folder", required=True, help="where everything is written; started again, it goes on"
        )
        losable = "steps that an interruption costs at most (default: 50)"
        add("--save-every", type=int, default=50, help=losable)
        less = "recompute layers in the backward pass: less memory, more time"
        add("--checkpointing", action="store_true", help=less)
        flags.add_flags(parser, "html")
        flags.add_settings(parser, method.Training)
        return parser
    flags.add_flags(parser, "tensor-parallel")
    made = "made by train; eval takes several, with commas, one row each (default: bundled)"
    add("--projection", metavar="FILE", help=made)
    if command is None:
        flags.add_flags(parser, "question")
        default = method.Settings.max_new_tokens
        add("--max-new-tokens", type=int, help=f"of each answer (default: {default})")
        parser.set_defaults(prompt=None, max_new_tokens=default)  # only eval has --prompt
        return parser
    flags.add_settings(parser, method.Settings)
    number = "N, or several with commas, one row each (default: as many as were trained)"
    add("--thoughts", default=None, help=number)
    chosen = f"of {', '.join(METHODS)} (default: all, lora only with --lora)"
    names = "protocol shard run-generated-code methods seed batch-size output trace json html"
    traced = "with --output or --html: norms, cosines and nearest tokens of the soft thoughts too"
    flags.add_flags(parser, names, methods={"help": chosen}, trace={"help": traced})
    told = "--no-thinking answers at once, where the model's template knows how (Qwen3)"
    add("--thinking", action=argparse.BooleanOptionalAction, default=True, help=told)
    own = "of cot-unk, made by train (default: the placeholders' own embeddings)"
    add("--prompt", metavar="FILE", help=own)
    add("--lora", metavar="FOLDER", help="of lora: an adapter, made by train or by PEFT")
    return parser


def command(arguments: list[str], *modules: ModuleType) -> int:
    """What softcot.py does with these arguments; modules: softcot, lora, prompts."""
    name = arguments[0] if arguments and arguments[0] in ("train", "eval") else None
    parser = command_line(name, modules[0])
    args = protocols.parse(parser, PROG, arguments[1:] if name else arguments)
    kept = getattr(args, "folder", getattr(args, "output", None))

    def body() -> None:
        flags.check_given(args)
        ones = "num_samples", "seeds", "batch_size", "save_every", "tensor_parallel"
        flags.at_least(args, **dict.fromkeys(ones, 1), max_new_tokens=1, seed=0)
        run = {"train": train, "eval": score, None: answer}[name]
        if vars(args).get("trace"):
            cli.check_trace(args)
        with ranks.joined(args), cli.reserved(args):
            run(args, *modules)

    keeps = f"{kept} keeps what was saved, and the same command goes on" if kept else ""
    memory = "(in training, raise --accumulate as much, or pass --checkpointing)"
    return cli.guarded(PROG, body, keeps, f"lower --batch-size {memory}")


def main(*modules: ModuleType) -> NoReturn:
    cli.leave(command, sys.argv[1:], *modules)


# ------------------------------------------------------------------------------------------- train


def train(
    args: argparse.Namespace, method: ModuleType, lora: ModuleType, prompts: ModuleType
) -> None:
    """Train what --method names in a folder, or go on."""
    s = flags.settings_of(args, method.Training)
    name = "data" if args.data and not args.task else args.task or "tiny"
    name = tasks.training(name, args.data)
    problems, task = tasks.load(name, args.data, args.limit), tasks.TASKS[name]
    if without := [p.id for p in problems if not p.steps]:
        raise UserError(
            f"{len(without)} of {len(problems)} problems of {args.data or name} have no worked "
            f"steps to learn from ({without[0]} is the first): use {', '.join(tasks.TRAINING)}, "
            "or --data FILE with `steps`"
        )
    path = Path(args.folder)
    with nullcontext(path) if args.place.rank else locked(path) as folder:
        model, tokenizer = load(args.model, args.device, args.dtype)
        assistant = assistant_tokenizer = None
        if s.method == "softcot":
            device = args.assistant_device or args.device
            assistant, assistant_tokenizer = load(args.assistant, device, args.dtype)
        eos = model.config.eos_ids
        if not eos:
            lacks = "names no end-of-sequence token in its config.json"
            raise UserError(f"{args.model} {lacks}: add eos_token_id there")
        n = 0 if s.method == "lora" else s.thoughts
        end = tokenizer.core.token_to_id(tokenizer.special.get("eos_token", ""))
        end = end if end in eos else eos[0]
        sequences, asked, fitting = [], [], []
        for p in problems:
            question = tasks.prompt(p, task)
            target = method.target_text(tokenizer, p.answer, p.steps, task.instruct)
            q = method.sequence(tokenizer, question, n, tokenizer.encode(target) + [end])
            a = method.assistant_ids(assistant_tokenizer, question, n) if assistant else []
            fits = not assistant or len(a) <= assistant.config.context
            if fits and len(q.ids) <= model.config.context:
                sequences.append(q), asked.append(a), fitting.append(p)
        if len(fitting) <= s.dev:
            raise UserError(
                f"{len(fitting)} of {len(problems)} problems fit the context windows with {n} "
                f"thoughts, and --dev holds out {s.dev}: lower --thoughts or --dev, or raise "
                "--limit"
            )
        if len(fitting) < len(problems):
            left_out = f"{len(problems) - len(fitting)} of {len(problems)} problems"
            print(f"left out: {left_out}, too long for the context windows", file=sys.stderr)
        check_prompt(model.config, [max(max(q.ids) for q in sequences)])  # of the vocabulary
        if assistant:
            check_prompt(assistant.config, [max(map(max, asked))], whose="the assistant's")
        text = json.dumps([[q.ids for q in sequences], asked]).encode()
        about = {"made_by": PROG, "method": s.method, "task": name}
        about |= {"prompt_version": str(method.PROMPT_VERSION), "thoughts": str(n)}
        about["dtype"] = str(model.embed.weight.dtype)[6:]
        about["data"] = hashlib.sha256(text).hexdigest()[:16]
        about |= identity(method.PROMPT_VERSION, args.model, model, args.assistant, assistant)
        torch.manual_seed(s.seed)
        adapter, adapted = None, nullcontext()
        if s.method == "softcot":
            trained = method.projection(assistant.config.d, model.config.d)
        elif s.method == "cot-unk":
            trained = prompts.soft_prompt(model, sequences[0].unk, n)
        else:
            trained = lora.start(model, s.rank)
            adapter = lora.adapter_config(args.model, s.rank, s.alpha, s.dropout)
        made = Trainer if args.place.size == 1 else partial(Replica, args.place)
        trainer = made(
            method, folder, model, tokenizer, task, fitting, sequences, about, s, trained, adapter
        )
        if s.method == "lora":
            adapted = lora.hooks(model, trainer.trained, s.alpha / s.rank, s.dropout)
        if trainer.saved != trainer.total:
            if assistant:
                path = folder / "hidden.safetensors"
                with args.place.first_before():
                    trainer.hidden = kept_hidden(method, assistant, asked, n, path, about)
                assistant = assistant_tokenizer = None  # its memory is wanted
            with adapted:
                trainer.run(args.save_every, args.checkpointing)
        args.place.first_goes_on()
        best, last = folder / BEST[s.method], folder / "last.safetensors"
        print(f"{best}: smallest held-out loss; {last}: last step")
        if args.html:
            page.write_training(args.html, folder)


# -------------------------------------------------------------------------------------------- eval


def score(
    args: argparse.Namespace, method: ModuleType, lora: ModuleType, prompts: ModuleType
) -> None:
    """A task: every method on the same problems, graded, recorded, compared; their spread."""
    s = flags.settings_of(args, method.Settings, thoughts=0)  # each row has its own number
    if s.temperature == 0 and max(s.num_samples, s.seeds) > 1:
        raise UserError(
            "greedy answers are the same in every sample and for every seed: pass a --temperature "
            "above 0"
        )
    methods = [m for m in METHODS if m != "lora" or args.lora]
    methods = args.methods.split(",") if args.methods else methods
    if wrong := [m for m in methods if m not in METHODS]:
        known = ", ".join(METHODS)
        raise UserError(f"--methods: no method {wrong[0]!r}; there are {known}")
    if "lora" in methods and not args.lora:
        make = "python softcot.py train --method lora --folder FOLDER"
        raise UserError(f"--methods lora needs --lora FOLDER: `{make}`")
    numbers = args.thoughts.split(",") if args.thoughts else []
    if not all(n.isdecimal() and len(n) < 7 for n in numbers):
        numbers = "numbers from 0 on, below a million, with commas between them"
        raise UserError(f"--thoughts takes {numbers}, not {args.thoughts!r}")
    name = "data" if args.data and not args.task else args.task or "tiny"
    problems = tasks.load(name, args.data, args.limit, args.run_generated_code)
    problems = args.place.problems(problems)
    task = tasks.TASKS[name]
    model, tokenizer = load(args.model, args.device, args.dtype, place=args.place)
    if not args.thinking:
        tokenizer = protocols.without_thinking(tokenizer)
    rows = variants(args, model, methods, [int(n) for n in numbers], method, lora)
    base = protocols.recorded(args, task) | {
        "model": args.model,
        **identified(args.model),
        "device": model.device.type,
        "dtype": str(model.embed.weight.dtype)[6:],
        "seed": args.seed,
        "num_samples": s.num_samples,
        "temperature": s.temperature,
        "max_new_tokens": s.max_new_tokens,
        "prompt_version": method.PROMPT_VERSION,
        "batch_size": args.batch_size,
    }
    base |= args.place.recorded() | ({"trace": True} if args.trace else {})
    about = (method, lora, prompts, model, tokenizer, task, s, args.seed, args.batch_size)
    solve = Answering(*about, args.place, args.trace)
    solvers = {}
    for row, (own, variant) in rows.items():
        assistant = identified(variant.name, "assistant_") if variant.name else {}
        solvers[row] = base | own | assistant, solve.by(variant)
    written = args.output, args.json, args.place
    result, records = results.run(problems, task, solvers, s.seeds, *written)
    if s.seeds > 1:
        seeds = dict.fromkeys(rows, s.seeds)
        results.over_seeds(result, records, problems, seeds, args.json)
    if args.html:
        page.write(args.html, list(records.values()))


# ------------------------------------------------------------------------------------ one question


def answer(
    args: argparse.Namespace, method: ModuleType, lora: ModuleType, prompts: ModuleType
) -> None:
    """One question in the terminal, without and with soft thoughts, and what these are near to."""
    problem, task = tasks.load("tiny", limit=1)[0], tasks.TASKS["tiny"]
    gold = problem.answer if args.question is None else None
    question = problem.question if args.question is None else args.question
    cli.check_question(question)
    if not args.projection and not softcot_variants.bundled(args):
        remedy = "pass --projection FILE, which `train` makes"
        raise UserError(f"the bundled projection is for the bundled models: {remedy}")
    s = flags.settings_of(args, method.Settings)
    model, tokenizer = load(args.model, args.device, args.dtype, place=args.place)
    rows = variants(args, model, ["zero-shot-cot", "softcot"], [], method, lora)
    (_, plain), (_, soft), *_ = rows.values()
    task = tasks.TASKS.get(soft.task, task)  # its prompts are what the projection was trained with
    print(question, end="\n\n")
    problem = tasks.Problem("question", question, "", "number")
    solve, texts = Answering(method, lora, prompts, model, tokenizer, task, s, 0, 1), []
    for variant in (plain, soft):
        ((_, _, record),) = solve.by(variant)([(problem, 0)])
        said = f"{record['thought_text']}\n\n{record['answer_text']}".strip()
        texts.append(f"{said}\n\n{record['answer_tokens']} tokens")
        tables.warn([record])
    print(show.side_by_side(texts, ["without", f"with {soft.n} soft thoughts"]))
    thoughts = method.think_one(*soft.assistant, soft.trained, tasks.prompt(problem, task), soft.n)
    measures = "norm in mean embedding norms, nearest tokens and the cosine of the angle to them"
    print(f"\nsoft thoughts: {measures}")
    name = Names(tokenizer).name
    print("\n".join(soft_thoughts.lines(soft_thoughts.measured(model, thoughts), name)))
    if gold:
        print(f"\nthe right answer is {gold}")
