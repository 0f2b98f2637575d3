"""Speed and memory: decoding beside the memory's limit, concept tokens beside greedy, and both beside a peer.

    python bench.py --model smollm2-135m --against transformers --json bench.json
    python bench.py --gp --against botorch
    python bench.py --regret --against botorch --repeats 20
    python bench.py --model smollm2-135m --assistant tiny/assistant --against transformers

Decoding one sequence reads every weight once, so bytes read per step / memory bandwidth is the least time that a step
can take; the bandwidth is measured in the same run.  What is compared runs in turns, A B C A B C, because machines are
noisy; printed are medians with least and most.  Peers are optional and never needed by the project.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import soft_reasoning
import softcot
import tasks
from gp import GP, suggest
from model import (
    KVCache,
    Prompt,
    Request,
    Transformer,
    UserError,
    check_prompt,
    decode,
    find_folder,
    load,
)
from soft_thinking import Job, Settings, SoftThinking


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def bandwidth(device: torch.device) -> dict[str, float]:
    """GB/s of reading 1 GB, and of copying it (read and write counted), best of seven: what the memory can do."""
    x = torch.ones(1 << 28, device=device)  # float32
    y = torch.empty_like(x)
    read = min(seconds(lambda: torch.max(x), device) for _ in range(7))
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(7))
    return {"read": x.nbytes / read / 1e9, "copy": 2 * x.nbytes / copy / 1e9}


class Clock:
    """Notes the time at every step: the time of a step is that between two of them."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, *_) -> None:
        self.times.append(time.perf_counter())

    def per_step(self) -> float:
        """Median seconds per step, without the first ones, which pay for warming up."""
        steps = [b - a for a, b in zip(self.times[3:], self.times[4:])]
        return statistics.median(steps)


def ours(model: Transformer, tokenizer, method: str, prompt: torch.Tensor, batch: int, tokens: int) -> float:
    """Seconds per decoding step of `batch` rows."""
    settings, clock = Settings(method=method, max_new_tokens=tokens, cold_stop=False), Clock()
    state = SoftThinking(model, tokenizer, settings, batch, watch=clock)
    shared = Prompt(prompt)
    requests = [Request(shared, Job(0, "", "", row, (0, row))) for row in range(batch)]
    for _ in decode(model, requests, state, batch):
        pass
    return clock.per_step()


def transformers_step(folder: Path, device: torch.device, dtype: torch.dtype):
    """The same by transformers' generate: a function (prompt ids, batch, tokens) -> seconds per step."""
    import transformers

    transformers.logging.set_verbosity_error()
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def step(ids: list[int], batch: int, tokens: int) -> float:
        clock = Clock()

        def tick(*_, **__):
            clock()
            return torch.zeros(batch, dtype=torch.bool, device=device)

        with torch.no_grad():
            peer.generate(torch.tensor([ids] * batch, device=device), attention_mask=torch.ones(batch, len(ids), device=device),
                          max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, temperature=None, top_p=None,
                          top_k=None, stopping_criteria=transformers.StoppingCriteriaList([tick]))
        return clock.per_step()

    return step


def candidates(model: Transformer, tokenizer, prompt: torch.Tensor, number: int, tokens: int) -> float:
    """Seconds for that many Soft Reasoning candidates of one prompt: one prefill, one batch, greedy to the end."""
    settings = soft_reasoning.Settings(max_new_tokens=tokens)

    def run() -> None:
        shared = Prompt(prompt)
        wanted = [soft_reasoning.Generation(shared, offset=torch.randn(model.config.d)) for _ in range(number)]
        requests = [Request(shared, (0, i, g)) for i, g in enumerate(wanted)]
        for _ in decode(model, requests, soft_reasoning.Rollouts(model, tokenizer, settings, number), number):
            pass

    return seconds(run, prompt.device)


def bench_gp(against: str | None, repeats: int) -> str:
    """What one round of Soft Reasoning asks of gp.py, on one thread: fit, EI over 5,000 candidates, five picks."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(25, 50, generator=generator).double(), torch.randn(25, generator=generator).double()
    pool = torch.randn(5000, 50, generator=generator).double()
    contenders = {"gp.py": lambda: suggest(GP.fit(x, y), 5, pool, generator=generator)}
    if against == "botorch":
        try:
            contenders["botorch"] = botorch_picks(x, y, pool)
        except ImportError:
            print("botorch is not installed: skipped (pip install botorch)", file=sys.stderr)
    times = {name: [] for name in contenders}
    for name, contender in contenders.items():
        contender()  # warm
    for _ in range(repeats):
        for name, contender in contenders.items():
            times[name].append(seconds(contender, torch.device("cpu")))
    lines = [(f"GP fit, EI over 5,000 candidates and 5 picks, 25 points in 50 dimensions, one thread; torch {torch.__version__}; "
             f"{hardware(torch.device('cpu'))}"), "", "| | ms: median (least to most) |", "|---|---|"]
    lines += [f"| {name} | {statistics.median(t) * 1e3:.1f} ({min(t) * 1e3:.1f} to {max(t) * 1e3:.1f}) |" for name, t in times.items()]
    return "\n".join(lines)


def branin(x: torch.Tensor) -> torch.Tensor:
    """[m, 2] in the unit square -> [m]; maximum -0.397887."""
    a, b = 15 * x[:, 0] - 5, 15 * x[:, 1]
    bowl = (b - 5.1 / (4 * math.pi**2) * a**2 + 5 / math.pi * a - 6) ** 2
    return -(bowl + 10 * (1 - 1 / (8 * math.pi)) * a.cos() + 10)


def hartmann6(x: torch.Tensor) -> torch.Tensor:
    """[m, 6] in the unit cube -> [m]; maximum 3.322368."""
    A = torch.tensor([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]).to(x)
    P = torch.tensor([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                      [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]]).to(x) / 1e4
    return torch.exp(-(A * (x[:, None] - P) ** 2).sum(-1)) @ torch.tensor([1.0, 1.2, 3.0, 3.2]).to(x)


def bowl50(x: torch.Tensor) -> torch.Tensor:
    """[m, 50] in the unit cube -> [m]: a bowl in 4 directions, none along an axis, the rest without effect; maximum 0."""
    directions = torch.randn(50, 4, generator=torch.Generator().manual_seed(123), dtype=torch.float64)
    u = (x - 0.5) * math.sqrt(12)  # of variance 1
    return -(u @ torch.linalg.qr(directions)[0] - torch.tensor([1.0, -1.0, 1.0, -1.0]).to(x)).square().sum(1)


FUNCTIONS = {"Branin": (branin, 2, -0.39788735772973816), "Hartmann-6": (hartmann6, 6, 3.32236801141551), "4-d bowl in 50-d": (bowl50, 50, 0.0)}


def regret(name: str, seed: int, propose) -> float:
    """Simple regret after 40 evaluations: 5 random ones and 7 batches of 5 from propose(x, y, generator)."""
    (f, d, maximum), g = FUNCTIONS[name], torch.Generator().manual_seed(seed)
    x = torch.rand(5, d, generator=g, dtype=torch.float64)
    while len(x) < 40:
        x = torch.cat([x, propose(x, f(x), g)])
    return maximum - f(x).max().item()


def at_random(x: torch.Tensor, y: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return torch.rand(5, x.shape[1], generator=g, dtype=torch.float64)


def by_gp(x: torch.Tensor, y: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    return suggest(GP.fit(x, y), 5, torch.rand(5000, x.shape[1], generator=g, dtype=torch.float64), generator=g)[0]


def botorch_batch():
    """BoTorch's own way: its default model and qLogEI, five points optimised together (8 restarts, 256 raw samples)."""
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    def propose(x: torch.Tensor, y: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=g)))
        gp = SingleTaskGP(x, y[:, None])
        fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
        cube = torch.stack([torch.zeros(x.shape[1]), torch.ones(x.shape[1])]).to(x)
        return optimize_acqf(qLogExpectedImprovement(gp, best_f=y.max()), bounds=cube, q=5, num_restarts=8, raw_samples=256)[0]

    return propose


def bench_regret(against: str | None, seeds: int) -> str:
    """Does the search search?  Median simple regret over the seeds, quartiles in brackets."""
    torch.set_num_threads(1)
    contenders = {"random": at_random, "gp.py": by_gp}
    if against == "botorch":
        try:
            contenders["BoTorch qLogEI"] = botorch_batch()
        except ImportError:
            print("botorch is not installed: skipped (pip install botorch)", file=sys.stderr)
    lines = [f"simple regret after 40 evaluations in batches of 5, {seeds} seeds: median (quartiles); torch {torch.__version__}", "",
             "| function | " + " | ".join(contenders) + " |", "|---" * (len(contenders) + 1) + "|"]
    for name in FUNCTIONS:
        cells = []
        for propose in contenders.values():
            low, middle, high = np.quantile([regret(name, seed, propose) for seed in range(seeds)], [0.25, 0.5, 0.75])
            cells.append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def botorch_picks(x: torch.Tensor, y: torch.Tensor, pool: torch.Tensor):
    """The same by BoTorch: fit, log EI over the pool, the best point believed; five times, one fit."""
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    def run() -> None:
        gp = SingleTaskGP(x, y[:, None])
        fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
        with torch.no_grad():
            for _ in range(5):
                best = pool[LogExpectedImprovement(gp, best_f=y.max())(pool[:, None]).argmax()][None]
                gp = gp.condition_on_observations(best, gp.posterior(best).mean)

    return run


def bench_training(args: argparse.Namespace) -> str:
    """A SoftCoT training step, four problems, 32 thoughts, only the projection trained; the peer is the same step written
    with transformers' modules and the assistant inside the loop, as the official code has it."""
    model, tokenizer = load(args.model, args.device, args.dtype)
    assistant, its = load(args.assistant, args.device, args.dtype)
    device, dtype, n = model.embed.weight.device, model.embed.weight.dtype, 32
    problems = tasks.load("tiny-train", limit=4)
    labels = [tokenizer.encode(softcot.target_text(tokenizer, p, False)) + [model.config.eos_ids[0]] for p in problems]
    sequences = [softcot.sequence(tokenizer, p.question, n, y) for p, y in zip(problems, labels)]
    asked = [softcot.assistant_ids(its, p.question, n) for p in problems]
    projection = torch.nn.Linear(assistant.config.d, model.config.d).to(device)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=2e-5)
    hidden = softcot.hidden_states(assistant, asked, n, torch.empty(4, n, assistant.config.d, dtype=dtype)).to(device)
    count, tokens = sum(map(len, labels)), sum(len(s.ids) for s in sequences)

    def finish(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def ours() -> None:
        thoughts = softcot.soft_thoughts(dict(projection.named_parameters()), hidden, 4, n)
        finish(softcot.negative_log_likelihood(model, sequences, thoughts) / count)

    contenders = {"ours": ours}
    if args.against == "transformers":
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            print("transformers is not installed: skipped (pip install transformers)", file=sys.stderr)
        else:
            llm, small = (AutoModelForCausalLM.from_pretrained(find_folder(name), dtype=dtype).to(device).requires_grad_(False)
                          for name in (args.model, args.assistant))

            def pad(rows: list[list[int]], filler: int) -> torch.Tensor:
                width = max(map(len, rows))
                return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)

            def theirs() -> None:
                x, mask = pad([s.ids for s in sequences], 0), pad([[1] * len(s.ids) for s in sequences], 0)
                y = pad([[-100] * s.prompt + s.labels for s in sequences], -100)
                with torch.no_grad():
                    states = small(pad(asked, 0), attention_mask=pad([[1] * len(a) for a in asked], 0),
                                   output_hidden_states=True).hidden_states[-1]
                embeds = llm.get_input_embeddings()(x).clone()
                for b, (s, a) in enumerate(zip(sequences, asked)):
                    embeds[b, len(s.left) : len(s.left) + n] = projection(states[b, len(a) - n : len(a)].float()).to(dtype)
                finish(llm(inputs_embeds=embeds, attention_mask=mask, labels=y).loss)

            contenders["transformers"] = theirs
    times = {name: [] for name in contenders}
    for repeat in range(args.repeats + 1):
        for name, contender in contenders.items():
            t = seconds(contender, device)
            if repeat:  # the first is for warming up
                times[name].append(t)
    lines = [(f"SoftCoT training step of {args.model} with {args.assistant}, {str(dtype)[6:]}: 4 problems, {tokens} tokens, {n} thoughts "
             f"each; torch {torch.__version__}; {hardware(device)}"), "", "| | tokens/s: median (least to most) | beside ours |", "|---|---|---|"]
    for name, t in times.items():
        ratio = statistics.median(a / b for a, b in zip(t, times["ours"]))
        lines.append(f"| {name} | {tokens / statistics.median(t):.0f} ({tokens / max(t):.0f} to {tokens / min(t):.0f}) | {ratio:.2f} x the time |")
    if device.type == "cuda":
        lines.append(f"\npeak memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
    return "\n".join(lines)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else [platform.processor()]
    flags = " ".join(f for f in ("avx512_bf16", "amx_bf16") if cpuinfo.exists() and f in cpuinfo.read_text())
    return f"{names[0]}, {os.cpu_count()} processors, {torch.get_num_threads()} threads {flags}".strip()


def fail(message: str) -> int:
    print("bench.py:", " ".join(message.split()), file=sys.stderr)
    return 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(fail(message))  # one line, without the usage
    parser.add_argument("--model", help="alias, Hugging Face id, or folder")
    parser.add_argument("--assistant", help="a SoftCoT training step with this assistant instead of decoding")
    parser.add_argument("--gp", action="store_true", help="the Gaussian process instead of a model: time")
    parser.add_argument("--regret", action="store_true", help="the Gaussian process instead of a model: how well it searches")
    parser.add_argument("--against", choices=["transformers", "botorch"], help="a peer to run in turns with ours, where it is installed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 5, 16], help="batch sizes (default: 1 5 16)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt length in tokens (default: 128)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens decoded per repetition (default: 48)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each, in turns, or seeds (default: 5)")
    parser.add_argument("--device", help="cpu, cuda, or cuda:N")
    parser.add_argument("--dtype", help="bfloat16, float16, or float32")
    parser.add_argument("--json", metavar="FILE", help="every number, for machines")
    args = parser.parse_args()
    try:
        if not args.gp and not args.regret and not args.model:
            raise UserError("nothing to measure: pass --model NAME, --gp, or --regret")
        for name, low in (("prompt", 1), ("tokens", 8), ("repeats", 1)):
            if getattr(args, name) < low:
                raise UserError(f"--{name} must be at least {low}, not {getattr(args, name)}")
        if min(args.batch) < 1:
            raise UserError(f"--batch must be at least 1, not {min(args.batch)}")
        if args.json and not Path(args.json).resolve().parent.is_dir():
            raise UserError(f"cannot write {args.json}: make its folder first")
        print(bench_regret(args.against, args.repeats) if args.regret else bench_gp(args.against, args.repeats) if args.gp else bench_training(args) if args.assistant else run(args))
    except UserError as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail("out of GPU memory: lower --batch or --tokens")
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: argparse.Namespace) -> str:
    start = time.perf_counter()
    model, tokenizer = load(args.model, args.device, args.dtype)
    loading = time.perf_counter() - start
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    model.config = replace(model.config, eos_ids=())  # every row runs to its end
    ids = (tokenizer.encode("The quick brown fox jumps over the lazy dog, and then it sleeps. ") * args.prompt)[: args.prompt]
    check_prompt(model.config, ids + [0] * args.tokens)
    prompt = model.embed(torch.tensor(ids, device=device))
    weights = sum(p.nbytes for p in model.parameters()) - (0 if model.config.tied else model.embed.weight.nbytes)
    limit = bandwidth(device)
    contenders = {"greedy": lambda b: ours(model, tokenizer, "greedy", prompt, b, args.tokens),
                  "concept tokens": lambda b: ours(model, tokenizer, "soft", prompt, b, args.tokens)}
    versions = [f"torch {torch.__version__}"]
    if args.against == "transformers":
        try:
            peer = transformers_step(find_folder(args.model), device, dtype)
            contenders["transformers"] = lambda b: peer(ids, b, args.tokens)
            versions.append(f"transformers {metadata.version('transformers')}")
        except ImportError:
            print("transformers is not installed: skipped (pip install transformers)", file=sys.stderr)
    lines = [f"{args.model}, {str(dtype)[6:]}, {hardware(device)}; {', '.join(versions)}",
             f"loaded in {loading:.1f} s; memory reads {limit['read']:.1f} GB/s, copies {limit['copy']:.1f} GB/s",
             f"prompt {args.prompt} tokens, {args.tokens} decoded, {args.repeats} repetitions in turns: median (least to most)", "",
             "| batch | method | tokens/s | ms per step | share of read bandwidth | beside greedy |", "|---|---|---|---|---|---|"]
    results = []
    with torch.inference_mode():
        prefill = statistics.median(
            seconds(lambda: model(prompt[None], KVCache(model, 1, len(prompt))), device) for _ in range(args.repeats))
        for batch in args.batch:
            times = {name: [] for name in contenders}
            for repeat in range(args.repeats):
                for name, contender in contenders.items():
                    times[name].append(contender(batch))
            c, length = model.config, args.prompt + args.tokens // 2
            read = weights + batch * length * c.layers * 2 * c.kv_heads * c.head_dim * dtype.itemsize
            for name, t in times.items():
                step = statistics.median(t)
                # Pair by pair, because the machine's speed drifts.
                ratio = statistics.median(a / b for a, b in zip(t, times["greedy"]))
                results.append({"batch": batch, "method": name, "seconds_per_step": t, "bytes_per_step": read, "beside_greedy": ratio})
                lines.append(f"| {batch} | {name} | {batch / step:.1f} ({batch / max(t):.1f} to {batch / min(t):.1f}) | {step * 1e3:.1f} | "
                             f"{read / step / limit['read'] / 1e9:.0%} | {ratio:.3f} |")
        pairs = [[candidates(model, tokenizer, prompt, number, args.tokens) for number in (1, 5)] for _ in range(args.repeats)]
        five = statistics.median(b / a for a, b in pairs)
    lines.append(f"\nSoft Reasoning: five candidates of one prompt in one batch take {five:.2f} x the time of one")
    lines.append(f"prefill of {args.prompt} tokens: {prefill * 1e3:.0f} ms ({args.prompt / prefill:.0f} tokens/s)")
    if args.json:
        Path(args.json).write_text(json.dumps({"header": lines[:3], "arguments": vars(args), "bandwidth": limit, "prefill": prefill,
                                               "five_candidates": five,
                                               "results": results}, indent=1) + "\n")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
