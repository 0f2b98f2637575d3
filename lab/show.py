"""What is particular to a method's program, and its view of one question in the terminal."""

import argparse
import os
import sys
from collections.abc import Callable
from itertools import zip_longest
from textwrap import wrap
from typing import Any, ClassVar

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from lab import protocols, study, tables, tasks
from lab.timing import peak_memory
from lab.traces import Names
from model import Tokenizer, Transformer, UserError

FIRST = "model question task data protocol limit shard run-generated-code methods seed"
DEVICES = "device dtype tensor-parallel quantize"


class Thought:
    """Soft Thinking: the thought streams as its most probable tokens, with alternatives."""

    flags = f"{FIRST} num-samples batch-size {DEVICES} compile output trace json html"
    key = ("question", "method", "seed", "sample")
    extra = ()  # methods of a benchmark only where --methods names them
    form = False  # whether a question is told which form its answer takes
    MATTERS = 0.1  # an alternative is shown from this probability on
    WHY: ClassVar = {
        "think_end": "ended by the model",
        "cold_stop": "ended by Cold Stop",
        "length": "cut by the length",
        "not finite": "cut: logits are not finite",
    }

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        pass

    @staticmethod
    def samples(args: argparse.Namespace, s: Any) -> int:
        """How many answers are wanted of a question: one, where nothing is drawn."""
        drawn = s.top_k != 1 if s.method == "cot" else bool(s.noise)  # in the thought
        if s.method != "greedy" and (drawn or s.answer_top_k != 1):
            return args.num_samples
        if args.num_samples > 1:
            print(f"{s.method} is deterministic: one sample of each question", file=sys.stderr)
        return 1

    @staticmethod
    def by_seed(jobs: list, seed: int) -> list[tuple[int, list]]:
        """(problem, sample) pairs by seed: here the sample's number is part of the randomness."""
        return [(seed, jobs)]

    @staticmethod
    def ask(problem: tasks.Problem, task: tasks.Task, args: argparse.Namespace) -> tasks.Asked:
        return tasks.ask(problem, task)

    @staticmethod
    def other(*_: Any) -> bool:
        return False

    @staticmethod
    def after(*_: Any) -> None:
        pass

    @staticmethod
    def arguments(asked: list, samples: list[int], args: argparse.Namespace) -> dict:
        """What `think` is given beside what every method is."""
        questions = [a.text for a in asked]
        return {"questions": questions, "samples": samples, "trace": args.trace}

    def __init__(self, tokenizer: Tokenizer, s: Any):
        self.tokenizer, self.out, self.was_thinking = tokenizer, sys.stdout, True
        self.mixtures, self.names = s.method == "soft", Names(tokenizer)
        colour = self.out.isatty() and not os.environ.get("NO_COLOR")
        self.dim, self.bold, self.plain = ["\x1b[2m", "\x1b[1m", "\x1b[0m"] if colour else [""] * 3
        self.stream = DecodeStream(skip_special_tokens=True)
        self.head = f"{self.bold}<think>{self.plain}\n"

    def __call__(self, token: Tensor, phase: Tensor, H: Tensor, ids: Tensor, ct: Tensor) -> None:
        """One step of row 0. phase is 0 where a concept token is fed, 3 where the answer is."""
        self.out.write(self.head)  # once there is a thought: a prompt may be refused
        self.head = ""
        if self.was_thinking and phase == 3:
            self.was_thinking, self.stream = False, DecodeStream(skip_special_tokens=True)
            print(file=self.out)
        # A character may need several tokens.
        self.out.write(self.stream.step(self.tokenizer.core, int(token)) or "")
        pairs = zip(ct.tolist(), ids.tolist()) if phase == 0 and self.mixtures else ()
        others = [(p, i) for p, i in pairs if p >= self.MATTERS and i != int(token)]
        if others:
            said = [f"{self.names.name(i)!r} {p:.2f}" for p, i in sorted(others)[::-1]]
            self.out.write(f"{self.dim}[{', '.join(said)}]{self.plain}")
        self.out.flush()

    @classmethod
    def close(
        cls, record: dict, view: "Thought | None", device: torch.device, gold: str | None
    ) -> None:
        """The answer, if it has not been streamed; and what it took."""
        if view is None:
            said = record["answer_text"] or record["thought_text"]
            print(f"--- sample {record['sample']}\n{said}")
        elif not record["answer_ids"]:
            print("\n(no answer: the thought was never closed)", end="")
        tokens = record["thought_tokens"] + record["answer_tokens"]
        why, speed = cls.WHY[record["stopped_by"]], tokens / record["seconds"]
        print(
            f"\n{record['thought_tokens']} thinking tokens ({why}), "
            f"{record['answer_tokens']} answer tokens ({record['finish_reason']}), "
            f"{speed:.1f} tokens/s, peak memory {peak_memory(device):.2f} GB",
            flush=True,
        )
        if gold:
            print(f"(the right answer is {gold})")
        tables.warn([record])


class Search:
    """Soft Reasoning: round by round the candidates, what chose them, and what they earned."""

    flags = f"{FIRST} shots completion seeds batch-size {DEVICES} compile"
    flags += " output json html analyse"
    key = ("question", "method", "seed")
    extra = ("rap",)
    form = True
    WHY: ClassVar = {
        "ei": "no point is expected to improve by the threshold",
        "gain": "the last round gained less than the threshold",
        "rounds": "the rounds are over",
    }

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        if args.seeds > 1 and not (args.task or args.data):
            raise UserError("--seeds goes with --task or --data")
        if args.analyse and (args.task or args.data or args.output):
            with_none = "it goes with none of --task, --data, --output"
            raise UserError(f"--analyse studies one question and prints: {with_none}")
        if args.analyse and (args.compile or args.tensor_parallel > 1):
            gone = "which --compile passes by, and --tensor-parallel divides"
            raise UserError(f"--analyse looks into the layers, {gone}: leave them out")

    @staticmethod
    def samples(args: argparse.Namespace, s: Any) -> int:
        """One for each seed, or one in all where nothing is drawn."""
        return 1 if s.method in ("greedy", "cot-decoding") else args.seeds

    @staticmethod
    def ask(problem: tasks.Problem, task: tasks.Task, args: argparse.Namespace) -> tasks.Asked:
        return protocols.ask(problem, task, args.shots or 0, args.protocol == "paper")

    @staticmethod
    def by_seed(jobs: list, seed: int) -> list[tuple[int, list]]:
        """Sample i is of the i-th seed."""
        numbers = sorted({number for _, number in jobs})
        return [(seed + i, [job for job in jobs if job[1] == i]) for i in numbers]

    @staticmethod
    def other(
        args: argparse.Namespace, s: Any, reason: Callable, model: Transformer, tokenizer: Tokenizer
    ) -> bool:
        """--analyse, where it is asked for."""
        if args.analyse:
            print(study.analyse(model, tokenizer, args.question, s, args.seed, reason))
        return args.analyse

    @staticmethod
    def after(records: dict, methods: list, problems: list, task: Any, seeds: int) -> None:
        study.compare(records, methods, problems, task, seeds)

    @staticmethod
    def arguments(asked: list, samples: list[int], args: argparse.Namespace) -> dict:
        return {"questions": asked}

    def __init__(self, tokenizer: Tokenizer, s: Any):
        self.points: list[dict] = []

    def __call__(self, number: int, points: list[dict], verdict: dict | None) -> None:
        """One round."""
        self.points += points
        best = max(self.points, key=lambda point: point["reward"])
        print(f"round {number}" + (f": the verifier says {verdict['answer']}" if verdict else ""))
        for point in points:
            verifier = (
                "-" if point["reward_verifier"] is None else f"{point['reward_verifier']:.0f}"
            )
            ei = "" if point["ei"] is None else f"  EI {point['ei']:.4f}"
            print(
                f"  answer {point['answer'] or 'none':>8}  verifier {verifier}  "
                f"coherence {point['reward_coherence']:.4f}  reward {point['reward']:.4f}{ei}"
                f"{'  <- best' if point is best else ''}",
                flush=True,
            )

    @classmethod
    def close(
        cls, record: dict, view: "Search | None", device: torch.device, gold: str | None
    ) -> None:
        if "rounds" in record:
            print(f"stopped after round {record['rounds'] - 1}: {cls.WHY[record['stopped_by']]}")
        print(record["answer_text"] or record["thought_text"])
        if not any(record["answers"]):
            print("unanswered: no candidate gives an answer that can be read")
        right = f"  (the right answer is {gold})" if gold else ""
        print(
            f"{len(record['tokens'])} generations of {record['generation_tokens']} tokens, "
            f"{record['verification_tokens']} tokens to verify, "
            f"{record['answer_tokens'] / record['seconds']:.1f} tokens/s{right}"
        )
        tables.warn([record])


def side_by_side(texts: list[str], heads: list[str], width: int = 56) -> str:
    """Two texts as two columns."""
    columns = [
        [line for part in t.splitlines() for line in wrap(part, width) or [""]] for t in texts
    ]
    pairs = zip_longest(*([head, "", *lines] for head, lines in zip(heads, columns)), fillvalue="")
    return "\n".join(f"{left:{width + 2}}{right}".rstrip() for left, right in pairs)
