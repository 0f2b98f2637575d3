"""The rows of SoftCoT's table: what each method was trained on, and how it answers problems."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from lab import soft_thoughts, tasks
from lab.flags import ROOT, TINY
from lab.fast import load
from lab.grading import reader, vote
from lab.ranks import ALONE, Place
from lab.results import Job
from lab.tasks import Task
from lab.trained import digest, identity, read_adapter, read_trained
from model import Tokenizer, Transformer, UserError, check_prompt, split_thought

TINY_ASSISTANT = str(ROOT / "tiny" / "assistant")
BUNDLED = ROOT / "tiny" / "softcot.safetensors"  # a projection for the bundled models
METHODS = ("zero-shot-cot", "cot-unk", "assist-cot", "softcot", "lora")
MAKE_BUNDLED = (
    "python softcot.py train --thoughts 16 --epochs 3 --batch-size 8 --lr 3e-3 --folder out "
    "&& cp out/projection.safetensors tiny/softcot.safetensors"
)


def bundled(args: argparse.Namespace) -> bool:
    """Whether --model and --assistant are the bundled models, by whatever path."""
    given = [str(Path(name).resolve()) for name in (args.model, args.assistant)]
    return given == [TINY, TINY_ASSISTANT]


@dataclass(frozen=True)
class Variant:
    """A row of the table: one method, with so many thoughts, and what was trained for it."""

    method: str
    n: int  # soft thoughts, placeholders, or tokens of the hint
    trained: dict[str, Tensor]  # the projection, the soft prompt, or LoRA; {}: nothing
    assistant: tuple[Transformer, Tokenizer] | None = None
    scale: float = 0.0  # LoRA's alpha / r
    name: str = ""  # of the assistant
    file: str = ""  # digest of what was trained
    task: str = ""  # that it was trained on


# -------------------------------------------------------------------------------------- from flags


def with_assistants(
    args: argparse.Namespace, model: Transformer, method: ModuleType
) -> list[Variant]:
    """What --assistant and --projection name, one by one; n = 0 without a projection."""
    names = args.assistant.split(",")
    paths = args.projection.split(",") if args.projection else []
    if not paths and bundled(args) and BUNDLED.exists():
        paths = [str(BUNDLED)]
    if len(names) == 1:
        names *= max(1, len(paths))
    if paths and len(paths) != len(names):
        raise UserError(
            f"--projection names {len(paths)} files and --assistant {len(names)} models: name one "
            "of them for each"
        )
    device = args.assistant_device or args.device
    loaded = {name: load(name, device, args.dtype) for name in dict.fromkeys(names)}
    for assistant, _ in loaded.values():
        assistant.agree = model.agree  # whole on every rank, which have to agree on its hints, too
    found = []
    for name, path in zip_longest(names, paths):
        variant = Variant("softcot", 0, {}, loaded[name], name=name)
        if path:
            here = identity(method.PROMPT_VERSION, args.model, model, name, loaded[name][0])
            trained, there = read_trained(Path(path), "softcot", here)
            trained = {key: x.to(model.device) for key, x in trained.items()}
            n, task = int(there.get("thoughts", 0)), there.get("task", "")
            file = digest(Path(path))
            variant = replace(variant, n=n, trained=trained, file=file, task=task)
        found.append(variant)
    return found


def variants(
    args: argparse.Namespace,
    model: Transformer,
    methods: list[str],
    numbers: list[int],
    method: ModuleType,
    lora: ModuleType,
) -> dict[str, tuple[dict, Variant]]:
    """Row of the table -> its own settings for the records, and the variant.

    One for each method, number of thoughts, and pair of models.
    """
    here, prompt, prompt_file = {}, {}, {}
    if args.prompt or "lora" in methods:
        here = identity(method.PROMPT_VERSION, args.model, model)
    if args.prompt:
        prompt, there = read_trained(Path(args.prompt), "cot-unk", here)
        prompt = {"prompt": prompt["prompt"].to(model.device)}
        prompt_file = {"prompt": digest(Path(args.prompt))}
        most, trained = max(numbers, default=0), int(there["thoughts"])
        if most > trained:
            found = f"--thoughts {most}, but {args.prompt} was trained with {trained}"
            raise UserError(f"{found}: lower it")
    pairs = []
    if {"softcot", "assist-cot"} & set(methods):
        pairs = with_assistants(args, model, method)
    if "softcot" in methods and not all(pair.trained for pair in pairs):
        command = MAKE_BUNDLED if bundled(args) else "python softcot.py train"
        raise UserError(f"softcot needs a projection, --projection FILE: make one with `{command}`")
    usual = max((pair.n for pair in pairs), default=0) or method.Settings.thoughts
    trained_prompt = len(prompt.get("prompt", []))
    rows = {}

    def add(variant: Variant, own: dict, trained: int, words: str, mark: str = "") -> None:
        n = variant.n
        row = variant.method + (f" {n}" if len(numbers) > 1 else "") + mark
        rows[row] = own, variant
        if trained and n != trained:
            print(f"{row}: trained with {trained} {words}, answers with {n}", file=sys.stderr)

    for name in methods:
        if name == "lora":
            if args.place.parts > 1:
                raise UserError("lora is for a model on one device: leave --tensor-parallel out")
            trained, scale, adapter = read_adapter(Path(args.lora), model, here, lora.start)
            rows[name] = {"adapter": adapter}, Variant(name, 0, trained, scale=scale)
        elif name == "zero-shot-cot":
            rows[name] = {}, Variant(name, 0, {})
        elif name == "cot-unk":
            for n in numbers or [trained_prompt or usual]:
                own = {"thoughts": n} | prompt_file
                add(Variant(name, n, prompt), own, trained_prompt, "placeholders")
        else:
            soft = name == "softcot"
            each = pairs if soft else list({pair.name: pair for pair in pairs}.values())
            for i, pair in enumerate(each, 1):
                mark = f" #{i}" if len(each) > 1 else ""
                for n in numbers or [pair.n if soft else usual]:
                    own = {"thoughts": n, "assistant": pair.name}
                    own |= {"projection": pair.file} if soft else {}
                    trained = pair.trained if soft else {}
                    variant = replace(pair, method=name, n=n, trained=trained)
                    add(variant, own, pair.n if soft else 0, "thoughts", mark)
    if len(pairs) > 1:
        for i, pair in enumerate(pairs, 1):
            print(f"#{i}: assistant {pair.name}, projection {pair.file}")
    return rows


# ---------------------------------------------------------------------------------------- answering


@dataclass(frozen=True)
class Answering:
    """How problems are answered and their draws voted on, whatever the variant."""

    method: ModuleType  # softcot
    lora: ModuleType
    prompts: ModuleType
    model: Transformer
    tokenizer: Tokenizer
    task: Task
    s: Any  # softcot.Settings, but for the number of thoughts
    seed: int
    batch_size: int
    place: Place = ALONE
    trace: bool = False  # what is fed in the thoughts' places is measured, too

    def by(self, variant: Variant) -> Callable[[list[Job]], Iterator[tuple]]:
        """A solver for lab.results.run."""
        return partial(self.answers, variant)

    def answers(
        self, variant: Variant, jobs: list[Job]
    ) -> Iterator[tuple[tasks.Problem, int, dict]]:
        """(problem, seed, record) as they are finished: the majority of the draws.

        A record's seconds count from when the first of its draws began. UserError, before anything
        is answered, for a prompt that is too long.
        """
        method, lora, s = self.method, self.lora, self.s
        questions, ask, think, n = [tasks.prompt(p, self.task) for p, _ in jobs], str, None, 0
        if variant.method in ("softcot", "cot-unk"):
            n = variant.n
        if variant.method == "softcot":
            think = partial(method.think_one, *variant.assistant, variant.trained)
        elif variant.trained and variant.method == "cot-unk":
            think = lambda question, n: variant.trained["prompt"][:n]
        elif variant.method == "assist-cot" and variant.n:
            hints = self.prompts.hints(*variant.assistant, questions, variant.n, self.batch_size)
            ask = lambda q: self.prompts.HINT.format(question=q, hint=hints[q])
        self.check(variant, [(q, ask(q)) for q in dict.fromkeys(questions)], n)
        seen: dict[str, dict] = {}  # question -> what a trace keeps of its thoughts

        def thought(question: str, n: int) -> Tensor:
            T = think(question, n)
            if self.trace:
                seen[question] = {"soft_thoughts": soft_thoughts.measured(self.model, T)}
            return T

        numbered = ((i, jobs[i][1]) for i in self.place.shares(len(jobs)))
        drawn: dict[int, dict[int, dict]] = {}  # job -> number of the draw -> its record
        began: dict[int, float] = {}
        merged = nullcontext()
        if variant.method == "lora":
            merged = lora.merged(self.model, variant.trained, variant.scale)
        with merged:
            for (j, _, i), record in method.answer(
                self.model,
                self.tokenizer,
                questions,
                replace(s, thoughts=n),
                think and thought,
                self.seed,
                numbered,
                self.batch_size,
                ask,
            ):
                now = time.perf_counter()
                began[j] = min(began.get(j, now), now - record["seconds"])
                drawn.setdefault(j, {})[i] = record
                if len(drawn[j]) == s.num_samples:
                    draws = [drawn[j][i] for i in range(s.num_samples)]
                    whole = voted(draws, jobs[j][0], self.task.tolerance)
                    whole |= seen.get(questions[j], {})
                    yield *jobs[j], whole | {"seconds": now - began[j]}
                    del drawn[j]

    def check(self, variant: Variant, asked: list[tuple[str, str]], n: int) -> None:
        """UserError for a question whose prompt is too long, as the models read it."""
        method = self.method
        for question, message in asked:
            ids = method.sequence(self.tokenizer, message, n, []).ids
            check_thoughts(self.model, ids, question)
            if variant.method == "softcot" and n:
                assistant, tokenizer = variant.assistant
                ids = method.assistant_ids(tokenizer, question, n)
                check_thoughts(assistant, ids, question, "the assistant's")


def check_thoughts(model: Transformer, ids: list[int], question: str, whose: str = "the") -> None:
    """As model.check_prompt, with one remedy more."""
    try:
        check_prompt(model.config, ids, question, whose)
    except UserError as error:
        said = str(error).replace(": shorten it", ": shorten it, or lower --thoughts")
        raise UserError(said) from None


def voted(draws: list[dict], problem: tasks.Problem, tolerance: float) -> dict:
    """The record of a problem: all texts that were drawn, and the majority's as its answer."""
    read, same = reader(problem, tolerance)
    texts = [record["text"] for record in draws]
    found = [read(text) for text in texts]
    thought, said = split_thought(texts[vote(found, same) or 0])
    return {
        "prompt": draws[0]["prompt"],
        "thought_text": thought,
        "answer_text": said,
        "answers": found,
        "texts": texts,
        "answer_tokens": sum(record["answer_tokens"] for record in draws),
        "not_finite": sum(record["not_finite"] for record in draws),
    }
