"""`--protocol paper`: a run as it was published, as far as public material tells.

    python soft_reasoning.py --task gsm8k --protocol paper --shots 8 --model llama-3.1-8b

The switch stands for the settings below; a flag of the command line still overrides its own. They
are printed and recorded. Soft Reasoning's prompts and worked examples are files of its repository,
fetched and checked like those of the tasks (lab/sources.py). The prompts of the other two papers
stand in program code only: ours are used there, and the record says so. What still differs from the
published runs is listed in lab/RESULTS.md.
"""

import argparse
import copy
import functools
import json
from dataclasses import replace
from typing import Any

import yaml

from lab import tasks
from lab.sources import SOURCES, fetch
from model import Tokenizer, UserError

PAPER: dict[str, dict[str, Any]] = {  # program -> flag -> value
    "soft_thinking.py": {
        "temperature": 0.6,
        "top_k": 30,
        "top_p": 0.95,
        "max_topk": 10,
        "cold_stop_entropy": 0.01,
        "cold_stop_steps": 256,
        "cold_stop_answer": True,
        "answer_min_p": 0.0,
        "max_new_tokens": 32768,
    },
    "soft_reasoning.py": {
        "completion": True,
        "limit": 200,
        "k": 5,
        "rounds": 5,
        "dimension": 50,
        "acquisition": "ei",
        "reward": "both",
        "coherence": "prob",
        "select": "vote",
        "stop_on": "gain",
        "stop_threshold": 0.01,
        "max_new_tokens": 300,
    },
    "softcot.py": {
        "thinking": False,
        "thoughts": "4",
        "seed": 41,
        "seeds": 5,
        "temperature": 1.0,
        "max_new_tokens": 1024,
    },
}


def parse(
    parser: argparse.ArgumentParser, program: str, arguments: list[str]
) -> argparse.Namespace:
    """Parse the arguments, with the protocol's settings as defaults where one is asked for."""
    args = parser.parse_args(arguments)
    if getattr(args, "protocol", None):
        parser.set_defaults(**PAPER[program])
        args = parser.parse_args(arguments)
        values = {name: getattr(args, name) for name in PAPER[program]}
        flags = (f"{name.replace('_', '-')} {value}" for name, value in values.items())
        print(f"protocol {args.protocol}: {', '.join(flags)}")
    return args


def judged(task: tasks.Task, args: argparse.Namespace) -> tasks.Task:
    """The task with Soft Reasoning's tolerance, of 0.01 for all numbers, under its protocol."""
    if args.protocol and "shots" in args and task.kind == "number":
        return replace(task, tolerance=0.01)
    return task


def recorded(args: argparse.Namespace, task: tasks.Task) -> dict[str, Any]:
    """What of this decides what is generated, for the records; {} for a run of our own."""
    names = "shots", "completion", "protocol"
    found = {name: getattr(args, name) for name in names if getattr(args, name, None)}
    if not getattr(args, "thinking", True):
        found["thinking"] = False
    if args.protocol:
        own = "ours; the published ones stand in program code, or there are none"
        whose = (
            f"{SOURCES[FILE].repository}, {FILE}" if "shots" in args and published(task) else own
        )
        found["prompts"] = whose
    return found


# ----------------------------------------------------------------------------------------- prompts

FILE = "soft_reasoning_prompts.yaml"
NAMES = {"gsm8k": "gsm8k", "gsm_hard": "gsm_hard", "svamp": "svamp", "strategyqa": "strategyqa"}
NAMES |= {"aime2024": "aime_2024"}  # task -> its name in the files of Soft Reasoning
ENDS = "Question", "Here are some examples:", "Final Answer:", "Please let me"  # of an answer
STEPS = "Let’s think step by step. "


@functools.cache
def prompts() -> dict[str, str]:
    """Name -> text: what is asked of a task (NAME_zero_shot), and of its verifier (NAME)."""
    return yaml.safe_load(fetch(FILE).read_text(encoding="utf-8"))


@functools.cache
def worked_examples() -> dict[str, list[dict[str, str]]]:
    """Name -> examples, each a Question, a Thought and an Answer."""
    return json.loads(fetch("soft_reasoning_examples.json").read_text(encoding="utf-8"))


def examples(task: tasks.Task, shots: int) -> list[dict[str, str]]:
    """The first `shots` of the published examples. UserError where there are not so many."""
    there = worked_examples().get(NAMES.get(task.name), []) if shots else []
    if not 0 <= shots <= len(there):
        raise UserError(f"--shots {shots}: there are {len(there)} worked examples of {task.name}")
    return there[:shots]


def published(task: tasks.Task) -> bool:
    """Tell whether Soft Reasoning's repository has prompts for a task."""
    return f"{NAMES.get(task.name)}_zero_shot" in prompts() and NAMES[task.name] in prompts()


def ask(problem: tasks.Problem, task: tasks.Task, shots: int, paper: bool) -> tasks.Asked:
    """The question after worked examples, in our words or (paper) in the published ones."""
    asked, shown = tasks.ask(problem, task), examples(task, shots)
    if paper and published(task):
        texts = [
            f"Question:\n{e['Question']}\nThought:\n{e['Thought']}\nAnswer:\n{e['Answer']}\n\n"
            for e in shown
        ]
        question = f"Question:\n{problem.question}\nThought:\n{STEPS}"
        text = "".join([prompts()[f"{NAMES[task.name]}_zero_shot"], "\n", *texts, question])
        return replace(asked, text=text, judge=functools.partial(judge, problem, task))
    words = {"True": "yes", "False": "no"} if problem.kind == "yesno" else {}
    texts = []
    for e in shown:
        answer = words.get(e["Answer"], e["Answer"])
        texts.append(f"Question: {e['Question']}\n{e['Thought']}\n\\boxed{{{answer}}}")
    return replace(asked, text="\n\n".join([*texts, f"Question: {asked.text}"])) if texts else asked


def judge(
    problem: tasks.Problem,
    task: tasks.Task,
    asked: tasks.Asked,
    texts: list[str],
    verdicts: list[dict],
) -> str:
    """The published verifier's prompt: earlier verdicts and candidates that give an answer."""
    texts = [verdict["text"] for verdict in verdicts] + texts
    thoughts = [text for text in texts if asked.read(text) is not None]
    lines = [f"{i}. Thought: {' '.join(text.split())}\n" for i, text in enumerate(thoughts)]
    asking = prompts()[NAMES[task.name]].replace("{question}", problem.question)
    return "".join([asking, "\n", *lines, f"\nAnalysis:\n{STEPS}"])


def completion(tokenizer: Tokenizer) -> Tokenizer:
    """One that asks by bare text, after the beginning-of-sequence token if the tokenizer adds one.

    An answer ends where another question begins: what follows is not decoded.
    """
    start = tokenizer.decode(tokenizer.core.encode("").ids)
    bare = copy.copy(tokenizer)
    bare.open = lambda message: start + message

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids)
        return text[: min((text.find(end) for end in ENDS if end in text), default=None)]

    bare.decode = decode
    return bare


def without_thinking(tokenizer: Tokenizer) -> Tokenizer:
    """One whose chats are opened for an answer at once, where the template knows how (Qwen3)."""
    plain = copy.copy(tokenizer)
    arguments = {"date_string": "26 Jul 2024", "enable_thinking": False}
    plain.open = lambda message: tokenizer.render(message, **arguments)
    return plain
