"""Speed and memory: decoding beside the memory's limit, concept tokens beside greedy, and peers.

    python -m lab.bench --model smollm2-135m --against transformers,llama.cpp --json bench.json
    python -m lab.bench --model smollm2-135m --compile --against transformers,llama.cpp
    python -m lab.bench --model smollm2-135m --quantize int8
    torchrun --nproc-per-node 2 -m lab.bench --model r1-llama-70b --tensor-parallel 2
    python -m lab.bench --model smollm2-135m --assistant tiny/assistant --against transformers
    python -m lab.bench --gp --against botorch
    python -m lab.bench --regret --against botorch --repeats 20
    python -m lab.bench --search --against botorch --repeats 100
    python -m lab.bench --device cuda --report report.jsonl

Decoding one sequence reads every weight once, so bytes read per step / memory bandwidth is the
least time that a step can take. Machines are noisy: what is compared runs in turns, A B C A B C,
each behind a reading of the memory, and printed are medians with least and most. Peers are optional
and never needed by the project.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import soft_reasoning
import softcot
from lab import bench_int8, bench_landscapes, bench_report, bench_search, bench_training
from lab import checkpoint, cli, cpu, fast, files, flags, peers, random_weights, ranks, timing
from lab.linear import bytes_read
from lab.timing import Clock
from model import Prompt, Request, Tokenizer, Transformer, UserError, check_prompt, decode
from model import weight_paths
from soft_reasoning import Generation, Perturbed
from soft_thinking import Settings, SoftThinking

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps. "  # of the prompts

# ---------------------------------------------------------------------------------- what is timed


class Timed:
    """decode's step, recorded or not, with a clock; a watch would wait for the device each time."""

    def __init__(self, clock: Clock, recorder: Callable | None, *parts: Any):
        """parts: what decode hands to a recorder, (model, step, cache, live)."""
        self.clock, self.live = clock, parts[3]
        self.step = recorder(*parts) if recorder else parts[1]
        self.late = self.step.late if recorder else 0

    def __call__(self) -> list[bool]:
        self.clock()
        alive = self.step()
        return alive if self.late else self.live.tolist()


def ours(
    model: Transformer, tokenizer: Tokenizer, way: tuple, prompt: Prompt, batch: int, tokens: int
) -> float:
    """Seconds per decoding step of `batch` rows that share a prompt; way: method and attention."""
    method, attention = way
    s, clock = Settings(method=method, max_new_tokens=tokens, cold_stop=False), Clock()
    recorder, kernel = model.recorder, model.attention
    requests = [Request(prompt, (0, row)) for row in range(batch)]
    model.recorder, model.attention = partial(Timed, clock, recorder), attention
    for _ in decode(model, requests, SoftThinking(model, tokenizer, s, batch), batch, tokens, 1):
        pass
    model.recorder, model.attention = recorder, kernel
    return clock.per_step()


def prefill(model: Transformer, prompt: Tensor) -> None:
    whole = Prompt(torch.cat([prompt, prompt[:1]]))  # the last one is fed by the first step
    while not whole.ready:
        whole.prefill(model)


def candidates(model: Transformer, prompt: Tensor, number: int, tokens: int) -> float:
    """Seconds for that many Soft Reasoning candidates of one prompt: one prefill, one batch."""
    shared, d = Prompt(prompt), model.config.d
    wanted = [Generation(shared, offset=torch.randn(d)) for _ in range(number)]
    requests = [Request(shared, data=(0, i, g)) for i, g in enumerate(wanted)]
    outputs = decode(model, requests, Perturbed(model, number), number, tokens)
    return timing.seconds(lambda: list(outputs), prompt.device)


@torch.inference_mode(False)  # weights that are made in it are not packed
def loading(args: argparse.Namespace) -> tuple[Transformer, Tokenizer, str]:
    """The model, and how fast it came, beside reading the same files: in the page cache, both."""
    cli.load(args)
    start = time.perf_counter()
    model, tokenizer = cli.load(args)
    timing.synchronise(model.device)
    took = time.perf_counter() - start
    paths, buffer = weight_paths(checkpoint.find_folder(args.model)), bytearray(1 << 26)
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    read, size = time.perf_counter() - start, sum(path.stat().st_size for path in paths) / 1e9
    beside = f"{took / read:.2f} x the time of reading the files ({size / read:.2f} GB/s)"
    said = f"loaded {size:.2f} GB in {took:.2f} s ({size / took:.2f} GB/s), {beside}"
    return model, tokenizer, said


# --------------------------------------------------------------------------------------- decoding


@torch.inference_mode()
def bench_decoding(args: argparse.Namespace) -> tuple[list[str], dict]:
    """Load, prefill and decode: lines of Markdown, and the numbers behind them."""
    model, tokenizer, loaded = loading(args)
    device, dtype, c = model.device, model.embed.weight.dtype, model.config
    model.config = replace(c, eos_ids=())  # every row runs to its end
    ids = (tokenizer.encode(SENTENCE) * max(args.prompt))[: max(args.prompt)]
    check_prompt(c, ids + [0] * args.tokens)
    embeds = model.embed(torch.tensor(ids, device=device))
    prompts = {length: Prompt(embeds[:length]) for length in args.prompt}
    first, longest = args.prompt[0], max(args.prompt)
    weights = bytes_read(model)
    kernel = model.attention
    ways = {"greedy": ("greedy", kernel), "concept tokens": ("soft", kernel)}
    if kernel and not args.compile:  # what the kernel saves
        ways["greedy, PyTorch's attention"] = "greedy", None
    contenders: dict[str, Callable[[int, int], float | None]] = {
        name: lambda length, batch, way=way: ours(
            model, tokenizer, way, prompts[length], batch, args.tokens
        )
        for name, way in ways.items()
    }
    compiling = []
    for batch in args.batch:  # what the first run of a batch size pays for
        run = partial(contenders["greedy"], first, batch)
        cold, warm = (timing.seconds(run, device) for _ in range(2))
        compiling.append(f"{max(0, cold - warm):.0f} s at batch {batch}")
    for batch in args.batch:  # all our memory is in use once, before a peer takes some
        contenders["concept tokens"](longest, batch)
    peak = timing.peak_memory(device)
    exact = model
    if args.quantize or args.against and type(model) is cpu.InCpp:  # not peers' weights
        exact = fast.load(args.model, args.device, args.dtype, place=args.place)[0]
    lost = bench_int8.quality(model, tokenizer, exact) if args.quantize else ""
    prefills = {"ours": lambda length: prefill(model, embeds[:length])}
    versions = [f"torch {torch.__version__}"]
    folder = checkpoint.find_folder(args.model)
    for name in args.against:
        if peer := peers.made(name, peers.PEERS[name], folder, exact, ids, args.tokens):
            contenders[name], prefills[name] = peer.step, peer.prefill
            versions.append(peer.version)
    kind = str(dtype)[6:] + (", weights in int8" if args.quantize else "")
    kind += ", compiled" if "step" in vars(model) or type(model) is cpu.InCpp else ""
    kind += ", Triton's kernels" if kernel else ""
    took = f"; the first run took {', '.join(compiling)} more" if args.compile else ""
    runs = f"{args.repeats} repetitions in turns"
    header = [
        f"{args.model}, {kind}, {timing.hardware(device)}; {', '.join(versions)}",
        f"{loaded}; peak memory {peak:.2f} GB{took}",
        f"{args.tokens} tokens decoded, {runs}: median (least to most)",
    ]
    columns = ["prompt", "batch", "method", "tokens/s", "ms per step", "MB per step"]
    columns += ["share of read bandwidth", "time beside greedy"]
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    results, position = [], c.layers * 2 * c.kv_heads * c.head_dim * dtype.itemsize
    gigabyte, limits = torch.ones(1 << 28, device=device), []  # bytes per second
    for length, batch in itertools.product(args.prompt, args.batch):
        read = weights + batch * (length + args.tokens // 2) * position
        times, shares = {name: [] for name in contenders}, {name: [] for name in contenders}
        for _ in range(args.repeats):
            for name, contender in contenders.items():
                limits.append(timing.read_speed(gigabyte))
                seconds = contender(length, batch)
                if seconds is not None:  # llama.cpp decodes one sequence
                    times[name].append(seconds)
                    shares[name].append(read / seconds / limits[-1])
        for name, t in times.items():
            if not t:
                continue
            step, share = statistics.median(t), statistics.median(shares[name])
            # Pair by pair, because the machine's speed drifts.
            ratio = statistics.median(a / b for a, b in zip(t, times["greedy"]))
            row = {"prompt": length, "batch": batch, "method": name, "seconds_per_step": t}
            row |= {"bytes_per_step": read, "shares": shares[name], "beside_greedy": ratio}
            results.append(row)
            speed = f"{batch / step:.1f} ({batch / max(t):.1f} to {batch / min(t):.1f})"
            cells = [f"{step * 1e3:.1f}", f"{read / 1e6:.0f}", f"{share:.0%}", f"{ratio:.3f}"]
            lines.append(f"| {length} | {batch} | {name} | {speed} | {' | '.join(cells)} |")
    usual, least, most = (f(limits) / 1e9 for f in (statistics.median, min, max))
    header.append(f"memory reads {usual:.1f} GB/s ({least:.1f} to {most:.1f}) before these")
    took, lines = {}, [*header, *lines, ""]
    for length in args.prompt:
        runs = {name: partial(run, length) for name, run in prefills.items()}
        took[length], said = timing.in_turns(runs, args.repeats, device), []
        for name, t in took[length].items():
            middle = statistics.median(t)
            said.append(f"{name} {middle * 1e3:.0f} ms ({length / middle:.0f} tokens/s)")
        lines.append(f"prefill of {length} tokens: {', '.join(said)}")
    rounds = range(args.repeats + 1)  # the first is for warming up
    prompt = embeds[:first]
    pairs = [[candidates(model, prompt, k, args.tokens) for k in (1, 5)] for _ in rounds]
    five = statistics.median(b / a for a, b in pairs[1:])
    one = f"five candidates of one prompt of {first} tokens in one batch take"
    lines += [f"Soft Reasoning: {one} {five:.2f} x the time of one", *([lost] if lost else [])]
    numbers = {"header": header, "bandwidth": limits, "prefill": took, "five_candidates": five}
    return lines, numbers | {"int8": lost, "results": results}


# ---------------------------------------------------------------------------------- command line


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = flags.new_parser("lab.bench", __doc__.splitlines()[0])
    add, switch = parser.add_argument, {"action": "store_true"}
    drawn = " and ".join(random_weights.LARGE) + " are random weights in Qwen2.5's shapes"
    add("--model", help=f"alias, Hugging Face id, or folder; {drawn}, kept in the temporary folder")
    add("--assistant", help="a SoftCoT training step with this assistant, too")
    add("--gp", **switch, help="the Gaussian process instead of a model: time")
    add("--regret", **switch, help="the Gaussian process instead of a model: how well it searches")
    add("--report", metavar="FILE", help="a report, of random weights, of what a GPU decides")
    add("--search", **switch, help="Soft Reasoning's search: how often it finds what is rare")
    which = "transformers, llama.cpp; with --gp, --regret and --search botorch"
    add("--against", default="", help=f"peers, with commas, where they are installed: {which}")
    sizes = {"type": int, "nargs": "+", "default": [1, 5, 16, 64]}
    add("--batch", **sizes, help="batch sizes (default: 1 5 16 64)")
    lengths = {"type": int, "nargs": "+", "default": [128]}
    add("--prompt", **lengths, help="prompt lengths in tokens (default: 128)")
    for name, default, what in (
        ("tokens", 48, "tokens decoded per repetition"),
        ("repeats", 5, "repetitions of each, in turns, or seeds"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    names = "device dtype tensor-parallel quantize compile json"
    flags.add_flags(parser, names, json={"help": "every number"})
    return parser.parse_args(arguments)


def command(arguments: list[str]) -> int:
    args = read_arguments(arguments)

    def body() -> None:
        flags.check_given(args)
        of_gp = args.gp or args.regret or args.search
        if args.report:
            bench_report.measure(args)
            return
        if not of_gp and not args.model:
            there = "--model NAME, --gp, --regret, --search, or --report FILE"
            raise UserError(f"nothing to measure: pass {there}")
        flags.at_least(args, tokens=8, repeats=1, tensor_parallel=1)
        for name, numbers in (("batch", args.batch), ("prompt", args.prompt)):
            if min(numbers) < 1:
                raise UserError(f"--{name} must be at least 1, not {min(numbers)}")
        if args.json is not None:
            files.check_table(args.json, ("arguments", "text"))
        args.against = [name for name in args.against.split(",") if name]
        there = ["botorch"] if of_gp else list(peers.PEERS)
        if wrong := [name for name in args.against if name not in there]:
            raise UserError(f"--against: no peer {wrong[0]!r} here; there is {', '.join(there)}")
        given, numbers = dict(vars(args)), {}
        if args.gp:
            lines = bench_search.measure_gp(args.against, args.repeats)
        elif args.regret:
            lines = bench_search.measure_regret(args.against, args.repeats)
        elif args.search:
            lines, numbers = bench_landscapes.measure(soft_reasoning, args)
        else:
            with ranks.joined(args):
                with args.place.first_before():
                    args.model = random_weights.made(args.model)
                    args.assistant = random_weights.made(args.assistant)
                lines, numbers = bench_decoding(args)
            lines += ["", *bench_training.measure(softcot, args)] if args.assistant else []
        result = {"arguments": given} | numbers | {"text": lines}
        files.publish("\n".join(lines), result, args.json)

    return cli.guarded("lab.bench", body, memory="lower --batch or --tokens")


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
