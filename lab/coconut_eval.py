"""What was trained by baselines.coconut: loaded, scored side by side, and its thoughts read."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

import torch
from torch import Tensor, nn

import model as plain
from lab import checkpoint, fast, flags, page, results, tasks
from lab.files import write_json
from lab.identity import identified
from lab.results import Job
from lab.tables import aligned
from lab.tasks import Problem
from lab.traces import Names
from lab.trained import check_made_for, digest, identity, read_tensors
from model import Tokenizer, Transformer, UserError, check_prompt, split_thought

RANK, ALPHA, DROPOUT = 16, 32.0, 0.1  # of LoRA, as in SoftCoT's table

# ----------------------------------------------------------------------------------------- loading


def bare(
    name: str, device: str | None, weights: bool, dtype: str | None = None
) -> tuple[Transformer, Tokenizer]:
    """A model with its modules as they are (lab/fast.py changes them), by default in float32.

    weights: its own; else they are drawn. Raises UserError for whatever the user can fix.
    """
    device, dtype = checkpoint.choose(device, dtype or "float32")
    folder = checkpoint.find_folder(name)
    config = checkpoint.check_config(folder)
    checkpoint.check_tokenizer(folder)
    if weights:
        checkpoint.check_weights(folder, config)
        return plain.load(str(folder), str(device), dtype)
    model = Transformer(config)
    # So that thoughts and embeddings are as long, and the first logits near 1.
    nn.init.normal_(model.embed.weight, std=config.d**-0.25)
    nn.init.constant_(model.norm.weight, config.d**-0.25)
    return model.to(device, dtype), Tokenizer(folder)


@dataclass(frozen=True)
class Trained:
    """What `train` saved for use: a model, and what is fed to it beside embeddings."""

    method: str
    n: int  # thoughts, or pause tokens
    c: int  # of them, for each step
    tensors: dict[str, Tensor]  # the markers, and LoRA's, if it is LoRA
    lora: bool
    model: Transformer
    tokenizer: Tokenizer
    name: str  # of the model
    file: str  # digest
    seed: int  # of the training
    kind: tuple  # what else made the file


def read(
    path: Path,
    args: argparse.Namespace,
    method: ModuleType,
    lora: ModuleType,
    loaded: dict[str, tuple],
) -> Trained:
    """Load a file and its model; loaded: base models so far, which LoRA's files share.

    Raises UserError where the file is none of these, or of another model.
    """
    tensors, there = read_tensors(path)
    remedy = "give coconut.safetensors or last.safetensors"
    if there.get("made_by") != "baselines.coconut":
        raise UserError(f"{path} was not made by `python -m baselines.coconut train`: {remedy}")
    name, is_lora = args.model or there["model"], there["weights"] == "lora"
    if not args.model and (flags.ROOT / name).is_dir():
        name = str(flags.ROOT / name)
    if is_lora:
        if name not in loaded:
            loaded[name] = fast.load(name, args.device, args.dtype)
        model, tokenizer = loaded[name]
        check_made_for(path, there, identity(there["prompt_version"], name, model))
        weights = lora.start(model, RANK)
    else:
        model, tokenizer = bare(name, args.device, False, args.dtype)
        weights = dict(model.named_parameters())
    markers = method.markers(there["method"], model.embed.weight.detach())
    expected = {key: x.shape for key, x in (weights | markers).items()}
    if {key: x.shape for key, x in tensors.items()} != expected:
        made_for = f"{there['model']} (width {there['d']})"
        raise UserError(f"{path} is not of {name}: pass --model {made_for}, or {remedy}")
    if not is_lora:
        for key, x in weights.items():
            x.data.copy_(tensors[key])
        model.requires_grad_(False)
        tensors = {key: tensors[key] for key in markers}
    tensors = {key: x.to(model.device) for key, x in tensors.items()}
    n, settings = int(there["thoughts"]), json.loads(there["settings"])
    own = {key: value for key, value in settings.items() if key != "seed"}
    kind = json.dumps(own), is_lora, name, there["task"], there["data"], there["start"]
    about = tensors, is_lora, model, tokenizer, name, digest(path), settings["seed"], kind
    return Trained(there["method"], n, settings["c"], *about)


# -------------------------------------------------------------------------------------------- eval


def score(
    args: argparse.Namespace, method: ModuleType, lora: ModuleType, softcot: ModuleType
) -> None:
    """A task: every file on the same problems, graded, recorded, compared; the same of one kind."""
    loaded: dict[str, tuple] = {}
    files = [read(Path(path), args, method, lora, loaded) for path in args.trained.split(",")]
    name = "data" if args.data and not args.task else args.task or "graph"
    problems = tasks.load(name, args.data, args.limit, args.run_generated_code)
    task = tasks.TASKS[name]

    def solver(it: Trained) -> Callable:
        def solve(jobs: list[Job]) -> Iterator[tuple[Problem, int, dict]]:
            decode, eos = it.tokenizer.decode, it.model.config.eos_ids
            name = Names(it.tokenizer).name
            prompts = [it.tokenizer.open(tasks.prompt(p, task)) for p, _ in jobs]
            questions = [it.tokenizer.encode(prompt) for prompt in prompts]
            for (p, _), ids in zip(jobs, questions):
                check_prompt(it.model.config, [*ids, *[0] * (it.n + 2)], p.question)
            most = args.max_new_tokens
            scale = ALPHA / RANK
            with lora.merged(it.model, it.tensors, scale) if it.lora else nullcontext():
                for i, said, names, output in method.answer(
                    it.model, it.tensors, questions, it.n, most, args.batch_size
                ):
                    thought, text = split_thought(decode([t for t in said if t not in eos]))
                    record = {"prompt": prompts[i], "thought_text": thought, "answer_text": text}
                    record |= {"thoughts": [name(t) for t in names], "thought_tokens": it.n}
                    record |= {"answer_tokens": len(said), "seconds": output.seconds}
                    yield *jobs[i], record | {"not_finite": int(not output.finite)}

        return solve

    solvers, same, count = {}, {}, Counter()
    several = Counter(it.method for it in files)
    for it in files:
        count[it.method] += 1
        row = it.method + (f" #{count[it.method]}" if several[it.method] > 1 else "")
        same.setdefault(it.kind, {})[row] = it.seed
        own = {"model": it.name, "trained": it.file, "thoughts": it.n}
        own |= {"device": it.model.device.type, "dtype": str(it.model.embed.weight.dtype)[6:]}
        own |= {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
        solvers[row] = own | (identified(it.name) if it.lora else {}), solver(it)
    result, records = results.run(problems, task, solvers, 1, args.output, args.json)
    if args.html:
        page.write(args.html, list(records.values()))
    same = {kind: rows for kind, rows in same.items() if len({*rows.values()}) == len(rows) > 1}
    if not same:
        return
    print("\naccuracy, mean ± standard deviation over trainings that differ in their seed")
    result["trainings"] = {}
    for rows in same.values():
        each = [row["accuracy"] for row in result["methods"] if row["method"] in rows]
        spread, kind = stdev(each), ", ".join(rows)
        result["trainings"][kind] = {"accuracies": each, "mean": mean(each), "std": spread}
        print(f"{kind}: {mean(each):.1%} ± {100 * spread:.1f} ({len(rows)})")
    if args.json:
        write_json(args.json, result)


# ------------------------------------------------------------------------------------------- probe

GROUPS = ("frontier", "passed", "ahead", "out of reach")  # of the graph's names


def distances(question: str) -> dict[str, int | None]:
    """Name -> edges from the question's name to it, None where it cannot be reached."""
    edges = re.findall(r"Every (\w+) is a (\w+)\.", question)
    asked = re.search(r"Is every (\w+) a ", question)
    if not edges or not asked:
        raise UserError("probe reads facts 'Every X is a Y.' and 'Is every X a': use --task graph")
    found: dict[str, int | None] = {name: None for edge in edges for name in edge}
    found[asked[1]], queue = 0, [asked[1]]
    for name in queue:  # which grows
        for a, b in edges:
            if a == name and found[b] is None:
                found[b] = found[a] + 1
                queue.append(b)
    return found


def last_word(step: str, names: dict) -> str:
    last = (re.findall(r"\w+", step) or [""])[-1]
    if last not in names:
        raise UserError(f"probe: the step {step!r} does not end with one of the question's names")
    return last


def group(distance: int | None, edges: int) -> str:
    """Where a name lies for a thought of that step (from 1 on): the frontier is so far away."""
    if distance is None:
        return "out of reach"
    return "frontier" if distance == edges else "passed" if distance < edges else "ahead"


def read_thoughts(it: Trained, method: ModuleType, question: str) -> list[dict[str, float]]:
    """Thought by thought: name -> its probability by the output matrix, all its tokens together.

    In tiny/graph a name has two: as it stands first in a fact, and as it stands last.
    """
    encode = it.tokenizer.encode
    tokens = {name: set(encode(f"Every {name} is a {name}")) for name in distances(question)}
    shared = set.intersection(*tokens.values())  # where tokens are words
    ids = encode(it.tokenizer.open(question))
    check_prompt(it.model.config, [*ids, *[0] * (it.n + 2)], question)
    before, n, _ = method.framed(it.model, it.tensors, ids, it.n)
    cache = method.Past(torch.zeros(1, dtype=torch.long, device=it.model.device))
    thoughts, _ = method.thoughts_one(it.model, before, n, cache)
    ps = [it.model.logits(thought).softmax(-1) for thought in thoughts]
    return [{name: p[[*ids - shared]].sum().item() for name, ids in tokens.items()} for p in ps]


@torch.no_grad()
def probe(
    args: argparse.Namespace, method: ModuleType, lora: ModuleType, softcot: ModuleType
) -> None:
    """What the thoughts are read as, step by step, for problems of each length."""
    it = read(Path(args.trained), args, method, lora, {})
    if it.method != "coconut" or not it.n:
        raise UserError(f"{args.trained} is of {it.method} with {it.n} thoughts: give Coconut's")
    if args.task not in (None, "graph"):
        raise UserError("probe reads the facts of --task graph, or of --data with such facts")
    name = "data" if args.data and not args.task else "graph"
    problems, task = tasks.load(name, args.data, args.limit), tasks.TASKS[name]
    texts = [tasks.prompt(p, task) for p in problems]
    with lora.merged(it.model, it.tensors, ALPHA / RANK) if it.lora else nullcontext():
        chains = [read_thoughts(it, method, text) for text in texts]
    aways = [distances(text) for text in texts]
    lines = [["hops", "thought", *GROUPS, "other tokens", "right name", "likeliest is frontier"]]
    for hops, t in product(sorted({len(p.steps or []) for p in problems}), range(it.n)):
        those = [i for i, p in enumerate(problems) if len(p.steps or []) == hops]
        mass, count, right, hits = Counter(), Counter(), 0.0, 0
        edges = t // it.c + 1  # the step that this thought, counted from 0, is of
        for i in those:
            thought = chains[i][t]
            lies = {name: group(distance, edges) for name, distance in aways[i].items()}
            for name, where in lies.items():
                mass[where] += thought[name] / len(those)
                count[where] += 1 / len(those)
            hits += lies[max(thought, key=thought.get)] == "frontier"
            if edges <= hops:  # the name that this step leads to
                right += thought[last_word(problems[i].steps[edges - 1], thought)] / len(those)
        cells = [f"{mass[where]:.3f} ({count[where]:.1f})" for where in GROUPS]
        cells += [f"{1 - mass.total():.3f}", f"{right:.3f}", f"{hits / len(those):.0%}"]
        lines.append([str(hops), str(t + 1), *cells])
    print("probability mass of the names by where they lie (how many there are), by problem length")
    print("\n".join(aligned(lines)))
