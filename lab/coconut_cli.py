"""Coconut's commands: train, eval, and probe, what its thoughts are read as.

The modules of the method (baselines.coconut), of LoRA and of SoftCoT are handed over.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from lab import cli, fast, files, flags, page, ranks, tasks
from lab.coconut_eval import ALPHA, DROPOUT, RANK, bare, probe, score
from lab.folder import locked
from lab.grading import grade, read_answer
from lab.tasks import Problem, Task
from lab.trained import BEST, identity, write_tensors
from lab.training import Trainer
from model import Tokenizer, UserError, check_prompt

PROG = "baselines.coconut"
GRAPH = str(flags.ROOT / "tiny" / "graph")  # a configuration and a tokenizer, without weights
FILE = BEST["coconut"]

# ------------------------------------------------------------------------------------------- flags


def command_line(name: str, method: ModuleType) -> argparse.ArgumentParser:
    titles = {"train": "Train Coconut, or what it is compared with.", "eval": "Score files."}
    titles |= {"probe": "What the thoughts are read as, step by step, on the graph task."}
    parser = flags.new_parser(f"{PROG} {name}", titles[name])
    add, task = parser.add_argument, {"help": f"(default: graph) one of {flags.TASKS}"}
    usual = "float32; with LoRA what the device is fast at"
    dtype = {"help": f"bfloat16, float16, or float32 (default: {usual})"}
    whose = "alias, Hugging Face id, or folder (default: {})"
    if name == "train":
        flags.add_flags(
            parser, "model", model={"default": GRAPH, "help": whose.format("tiny/graph")}
        )
        add("--from-nothing", action="store_true", help="draw all weights: the model has none")
        add("--lora", action="store_true", help="train LoRA, rank 16, in place of all weights")
        written = "where everything is written; started again, it goes on"
        add("--folder", required=True, help=written)
        losable = "steps that an interruption costs at most (default: 50)"
        add("--save-every", type=int, default=50, help=losable)
        flags.add_flags(parser, "device dtype task data limit html", task=task, dtype=dtype)
        flags.add_settings(parser, method.Training)
        return parser
    made = "made by train" + ("; several, with commas, one row each" if name == "eval" else "")
    add("--trained", metavar="FILE", required=True, help=made)
    model = {"default": None, "help": whose.format("what the file was trained from")}
    flags.add_flags(
        parser, "model device dtype task data limit", model=model, task=task, dtype=dtype
    )
    if name == "eval":
        flags.add_flags(parser, "batch-size output json html run-generated-code")
        add("--max-new-tokens", type=int, default=256, help="of each answer (default: 256)")
    return parser


def command(arguments: list[str], *modules: ModuleType) -> int:
    """What python -m baselines.coconut does; modules: coconut, lora, softcot. The exit code."""
    commands = {"train": train, "eval": score, "probe": probe}
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(modules[0].__doc__)
        return 0
    if name not in commands:
        return flags.fail(PROG, f"no command {name!r}: use train, eval or probe, each has --help")
    args = command_line(name, modules[0]).parse_args(arguments[1:])
    kept = getattr(args, "folder", getattr(args, "output", None))

    def body() -> None:
        ranks.check_alone()
        flags.check_given(args)
        flags.at_least(args, save_every=1, batch_size=1, max_new_tokens=1)
        given = vars(args).get
        with files.reserved(given("output"), given("json"), given("html")):
            commands[name](args, *modules)

    keeps = f"{kept} keeps what was saved, and the same command goes on" if kept else ""
    memory = "lower --batch-size (in training, raise --accumulate as much)"
    return cli.guarded(PROG, body, keeps, memory)


def main(*modules: ModuleType) -> NoReturn:
    cli.leave(command, sys.argv[1:], *modules)


# ------------------------------------------------------------------------------------------- train


class Staged(Trainer):
    """A training in a folder, in stages; what is best is the best of the last stage."""

    def loss(self, indices: list[int], n: int, k: int | None) -> Tensor:
        batch = [self.sequences[i] for i in indices]
        questions, labels = [e.question for e in batch], [e.labels(k) for e in batch]
        return self.method.negative_log_likelihood(self.model, self.trained, questions, n, labels)

    def steps(self, checkpointing: bool) -> Iterator[tuple[int, float, float, list[int]]]:
        """The method's training, from where this one stands."""
        yield from self.method.train(
            self.trained, self.loss, self.train, self.s, self.step, self.optimizer
        )

    @property
    def stage(self) -> tuple[int, int | None]:
        """That of the last step so far."""
        return self.method.stage(self.s, max(self.step - 1, 0) // self.per_epoch)

    @torch.no_grad()
    def validate(self) -> None:
        """Loss of the held-out problems, and accuracy of some, with this stage's thoughts."""
        s, (n, k) = self.s, self.stage
        by_length = sorted(self.dev, key=lambda i: len(self.sequences[i].ids))
        batches = [by_length[i : i + s.batch_size] for i in range(0, len(by_length), s.batch_size)]
        total = sum(self.loss(batch, n, k).item() for batch in batches)
        self.dev_loss = total / sum(len(self.sequences[i].labels(k)) for i in self.dev)
        if not self.dev_loss < float("inf"):
            raise self.diverged(f"the held-out loss is {self.dev_loss} after step {self.step}")
        asked = self.dev[: s.dev_limit]
        right = sum(self.answered_right(asked))
        line = {"epoch": self.step // self.per_epoch, "thoughts": n, "dev_loss": self.dev_loss}
        self.log(self.step, **line, dev_accuracy=right / len(asked) if asked else None)
        last = self.stage == self.method.stage(s, s.epochs - 1)
        best = " (the best)" if last and self.dev_loss < self.best else ""
        shown = f"{n} thoughts, held-out loss {self.dev_loss:.4f}"
        tqdm.write(f"step {self.step}: {shown}, accuracy {right}/{len(asked)}{best}")
        if best:
            self.best = self.dev_loss
            write_tensors(self.folder / FILE, self.trained, self.metadata())
        self.save()

    def answered_right(self, asked: range) -> Iterator[bool]:
        questions, (n, _) = [self.sequences[i].question for i in asked], self.stage
        for i, ids, _, _ in self.method.answer(self.model, self.trained, questions, n):
            problem = self.problems[asked[i]]
            kept = [t for t in ids if t not in self.model.config.eos_ids]
            found = read_answer(self.tokenizer.decode(kept), problem)
            yield grade(found, problem.answer, problem.kind, self.task.tolerance)

    def metadata(self) -> dict:
        return super().metadata() | {"thoughts": self.stage[0]}


def train(
    args: argparse.Namespace, method: ModuleType, lora: ModuleType, softcot: ModuleType
) -> None:
    """Train what --method names in a folder, or go on."""
    s = flags.settings_of(args, method.Training)
    if args.lora and args.from_nothing:
        raise UserError("--lora changes weights, --from-nothing has none: pass one of them")
    if args.lora and args.model == GRAPH:
        raise UserError("--lora is trained beside a model's weights: pass --model")
    if args.dtype not in (None, "float32") and not args.lora:
        raise UserError("all weights are trained in float32: leave --dtype out, or pass --lora")
    name = "data" if args.data and not args.task else args.task or "graph"
    name = tasks.training(name, args.data)
    problems, task = tasks.load(name, args.data, args.limit), tasks.TASKS[name]
    if without := [p.id for p in problems if not p.steps]:
        raise UserError(
            f"{len(without)} of {len(problems)} problems of {args.data or task.name} have no steps "
            f"that thoughts could stand for ({without[0]} is the first): use "
            f"{', '.join(tasks.TRAINING)}, or --data FILE with `steps`"
        )
    with locked(Path(args.folder)) as folder:
        torch.manual_seed(s.seed)
        if args.lora:
            model, tokenizer = fast.load(args.model, args.device, args.dtype)
        else:
            model, tokenizer = bare(args.model, args.device, not args.from_nothing)
        if not model.config.eos_ids:
            lacks = "names no end-of-sequence token in its config.json"
            raise UserError(f"{args.model} {lacks}: add eos_token_id there")
        n = method.stage(s, s.epochs - 1)[0]
        examples, fitting = [], []
        for p in problems:
            e = example(method, softcot, tokenizer, model.config.eos_ids, p, task)
            if len(e.ids) + n + 2 <= model.config.context:
                examples.append(e), fitting.append(p)
        if len(fitting) <= s.dev:
            raise UserError(
                f"{len(fitting)} of {len(problems)} problems fit the context window, and --dev "
                f"holds out {s.dev}: lower --dev, --c or --stages, or raise --limit"
            )
        if len(fitting) < len(problems):
            left_out = f"{len(problems) - len(fitting)} of {len(problems)} problems"
            print(f"left out: {left_out}, too long for the context window", file=sys.stderr)
        check_prompt(model.config, [max(max(e.ids) for e in examples)])  # of the vocabulary
        text = json.dumps([[e.question, e.targets] for e in examples]).encode()
        about = {"made_by": PROG, "method": s.method, "task": task.name}
        about |= {"weights": "lora" if args.lora else "all"}
        about |= {"start": "nothing" if args.from_nothing else "model"}
        about |= {"data": hashlib.sha256(text).hexdigest()[:16]}
        about |= {"dtype": str(model.embed.weight.dtype)[6:]}
        about |= identity(0, args.model, model)
        trained = method.markers(s.method, model.embed.weight.detach())
        trained |= lora.start(model, RANK) if args.lora else dict(model.named_parameters())
        trainer = Staged(
            method, folder, model, tokenizer, task, fitting, examples, about, s, trained
        )
        adapted = nullcontext()
        if args.lora:
            adapted = lora.hooks(model, trainer.trained, ALPHA / RANK, DROPOUT)
        if trainer.saved != trainer.total:
            with adapted:
                trainer.run(args.save_every, checkpointing=False)
        last = folder / "last.safetensors"
        print(f"{folder / FILE}: smallest held-out loss of the last stage; {last}: last step")
        if args.html:
            page.write_training(args.html, folder)


def example(
    method: ModuleType,
    softcot: ModuleType,
    tokenizer: Tokenizer,
    eos: tuple[int, ...],
    p: Problem,
    task: Task,
) -> Any:
    """A problem as the method's Example, in the form in which SoftCoT is trained, too."""
    end = tokenizer.core.token_to_id(tokenizer.special.get("eos_token", ""))
    end = end if end in eos else eos[0]
    # Where no letters are asked for, a choice is its text.
    answer = p.choices[p.answer] if p.kind == "choice" and not task.instruct else p.answer
    texts = [
        softcot.target_text(tokenizer, answer, p.steps[k:], task.instruct)
        for k in range(len(p.steps) + 1)
    ]
    question = tokenizer.encode(tokenizer.open(tasks.prompt(p, task)))
    return method.Example(question, [[*tokenizer.encode(text), end] for text in texts])
