"""Speed and memory: decoding beside the memory's limit, concept tokens beside greedy, and both beside a peer.

    python bench.py --model smollm2-135m --against transformers,llama.cpp --json bench.json
    python bench.py --model smollm2-135m --compile --against transformers,llama.cpp
    python bench.py --model smollm2-135m --quantize int8
    python bench.py --model smollm2-135m --assistant tiny/assistant --against transformers
    python bench.py --gp --against botorch
    python bench.py --regret --against botorch --repeats 20

Decoding one sequence reads every weight once, so bytes read per step / memory bandwidth is the least time that a step
can take; the bandwidth is measured in the same run.  What is compared runs in turns, A B C A B C, because machines are
noisy; printed are medians with least and most.  Peers are optional and never needed by the project.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import soft_reasoning
import softcot
import tasks
from gp import GP, suggest
from model import (
    Int8Linear,
    Linear,
    Prompt,
    Request,
    Transformer,
    UserError,
    check_prompt,
    decode,
    find_folder,
    hf_tensors,
    load,
    weight_files,
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
        return statistics.median(b - a for a, b in zip(self.times[3:], self.times[4:]))


def ours(model: Transformer, tokenizer, method: str, prompt: torch.Tensor, batch: int, tokens: int) -> float:
    """Seconds per decoding step of `batch` rows."""
    settings, clock = Settings(method=method, max_new_tokens=tokens, cold_stop=False), Clock()
    shared = Prompt(prompt)
    requests = [Request(shared, Job(0, "", "", row, (0, row))) for row in range(batch)]
    for _ in decode(model, requests, SoftThinking(model, tokenizer, settings, batch), batch, clock):
        pass
    return clock.per_step()


def prefill(model: Transformer, prompt: torch.Tensor) -> None:
    taken = Prompt(torch.cat([prompt, prompt[:1]]))  # the last one is fed by the first step
    while not taken.ready:
        taken.prefill(model)


@dataclass
class Peer:
    """Another implementation of the same model: seconds per step (None: not at this batch size), and its prefill."""

    version: str
    step: Callable[[int], float | None]
    prefill: Callable[[], None]


def transformers_peer(folder: Path, model: Transformer, ids: list[int], tokens: int) -> Peer:
    """transformers' generate, greedy."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weight = model.embed.weight
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype).to(weight.device).eval()

    def step(batch: int) -> float:
        clock = Clock()

        def tick(*_, **__):
            clock()
            return torch.zeros(batch, dtype=torch.bool, device=weight.device)

        peer.generate(torch.tensor([ids] * batch, device=weight.device),
                      attention_mask=torch.ones(batch, len(ids), device=weight.device), max_new_tokens=tokens,
                      min_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                      stopping_criteria=transformers.StoppingCriteriaList([tick]))
        return clock.per_step()

    return Peer(f"transformers {transformers.__version__}", step, lambda: peer.model(torch.tensor([ids], device=weight.device)))


# Names in a checkpoint -> llama.cpp's in a GGUF file.
GGUF = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def write_gguf(model: Transformer, file: Path) -> None:
    """The model as llama.cpp reads it, the same bfloat16 numbers, without a vocabulary."""
    import gguf

    c = model.config
    if c.rope["rope_type"] != "default" or model.embed.weight.dtype != torch.bfloat16:
        raise UserError("llama.cpp is measured on bfloat16 models with plain RoPE only: leave it out of --against")
    kind = "llama" if c.model_type == "mistral" else c.model_type
    w = gguf.GGUFWriter(file, kind)
    for add, value in ((w.add_context_length, c.context), (w.add_embedding_length, c.d), (w.add_block_count, c.layers),
                       (w.add_feed_forward_length, c.ffn), (w.add_head_count, c.heads), (w.add_head_count_kv, c.kv_heads),
                       (w.add_key_length, c.head_dim), (w.add_value_length, c.head_dim), (w.add_layer_norm_rms_eps, c.norm_eps),
                       (w.add_rope_freq_base, c.rope_theta), (w.add_rope_dimension_count, c.head_dim),
                       (w.add_vocab_size, c.vocab_size), (w.add_tokenizer_model, "no_vocab")):
        add(value)
    for name, x in hf_tensors(model).items():
        stem, _, what = name.rpartition(".")
        x = x.detach().cpu()
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            renamed = f"blk.{layer}.{GGUF[part]}.{what}"
        else:
            renamed = f"{GGUF[stem]}.{what}"
        if kind == "llama" and stem.endswith(("q_proj", "k_proj")):  # there rotary pairs stand side by side
            x = x.view(-1, 2, c.head_dim // 2, x[0].numel()).transpose(1, 2).reshape(x.shape)
        if x.ndim == 1:
            w.add_tensor(renamed, x.float().numpy())
        else:
            w.add_tensor(renamed, x.contiguous().view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama_peer(folder: Path, model: Transformer, ids: list[int], tokens: int) -> Peer:
    """llama.cpp on as many threads, greedy, one sequence."""
    import llama_cpp

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        write_gguf(model, file := Path(temporary) / "model.gguf")
        peer = llama_cpp.Llama(str(file), n_ctx=len(ids) + tokens, n_batch=512, n_threads=threads, n_threads_batch=threads,
                               n_gpu_layers=0 if model.embed.weight.device.type == "cpu" else -1, verbose=False, use_mmap=False)

    def read() -> None:
        peer.reset()
        peer.eval(ids)

    def step(batch: int) -> float | None:
        if batch > 1:
            return None
        read()
        clock = Clock()
        for _ in range(tokens):
            logits = peer._ctx.get_logits()  # of the last position: the public way copies those of all of them
            peer.eval([int(np.ctypeslib.as_array(logits, (model.config.vocab_size,)).argmax())])
            clock()
        return clock.per_step()

    return Peer(f"llama-cpp-python {llama_cpp.__version__}", step, read)


PEERS = {"transformers": transformers_peer, "llama.cpp": llama_peer}
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama-cpp-python gguf", "botorch": "botorch"}


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


def bench_gp(against: list[str], repeats: int) -> str:
    """What one round of Soft Reasoning asks of gp.py, on one thread: fit, EI over 5,000 candidates, five picks."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(25, 50, generator=generator).double(), torch.randn(25, generator=generator).double()
    pool = torch.randn(5000, 50, generator=generator).double()
    contenders = {"gp.py": lambda: suggest(GP.fit(x, y), 5, pool, generator=generator)}
    if "botorch" in against:
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


def bench_regret(against: list[str], seeds: int) -> str:
    """Does the search search?  Median simple regret over the seeds, quartiles in brackets."""
    torch.set_num_threads(1)
    contenders = {"random": at_random, "gp.py": by_gp}
    if "botorch" in against:
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
    if "transformers" in args.against:
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


def loading(args: argparse.Namespace) -> tuple[Transformer, object, str]:
    """The model, and how fast it came, beside reading the same files: in the page cache, both."""
    def get():
        return load(args.model, args.device, args.dtype, args.quantize, args.compile)

    get()
    start = time.perf_counter()
    model, tokenizer = get()
    synchronise(model.embed.weight.device)
    took = time.perf_counter() - start
    files = weight_files(find_folder(args.model))
    buffer, start = bytearray(1 << 26), time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    read, size = time.perf_counter() - start, sum(file.stat().st_size for file in files) / 1e9
    return model, tokenizer, (f"loaded {size:.2f} GB in {took:.2f} s ({size / took:.2f} GB/s), {took / read:.2f} x the time of "
                              f"reading the files ({size / read:.2f} GB/s)")


@torch.inference_mode()
def quality(model: Transformer, tokenizer, exact: Transformer) -> str:
    """What 8 bits cost: on the text of the README, in pieces of 512 tokens, perplexity and agreement of the greedy tokens."""
    text = (Path(__file__).resolve().parent / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text), device=model.embed.weight.device)
    loss, same, count = [0.0, 0.0], 0, 0
    for piece in ids.split(512):
        logits = [m.logits(m(m.embed(piece[None]))[0, :-1]) for m in (exact, model)]
        loss = [a + torch.nn.functional.cross_entropy(x, piece[1:], reduction="sum").item() for a, x in zip(loss, logits)]
        same, count = same + (logits[0].argmax(-1) == logits[1].argmax(-1)).sum().item(), count + len(piece) - 1
    return (f"int8 on {count} tokens of the README: perplexity {math.exp(loss[1] / count):.3f}, without it "
            f"{math.exp(loss[0] / count):.3f}; greedy tokens agree at {same / count:.1%} of the positions")


def peak_memory(device: torch.device) -> float:
    """GB so far, of the GPU or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@torch.inference_mode()
def bench_decoding(args: argparse.Namespace) -> tuple[list[str], dict]:
    """Load, prefill and decode: lines of Markdown, and the numbers behind them."""
    model, tokenizer, loaded = loading(args)
    device, dtype, c = model.embed.weight.device, model.embed.weight.dtype, model.config
    model.config = replace(c, eos_ids=())  # every row runs to its end
    ids = (tokenizer.encode("The quick brown fox jumps over the lazy dog, and then it sleeps. ") * args.prompt)[: args.prompt]
    check_prompt(c, ids + [0] * args.tokens)
    prompt = model.embed(torch.tensor(ids, device=device))
    weights = sum(x.nbytes for m in model.modules() if isinstance(m, (Linear, Int8Linear)) for x in m.state_dict().values())
    lost = compiling = ""
    contenders = {"greedy": lambda b: ours(model, tokenizer, "greedy", prompt, b, args.tokens),
                  "concept tokens": lambda b: ours(model, tokenizer, "soft", prompt, b, args.tokens)}
    prefills, versions = {"ours": lambda: prefill(model, prompt)}, [f"torch {torch.__version__}"]
    greedy = {batch: partial(contenders["greedy"], batch) for batch in args.batch}
    starts = [seconds(run, device) - seconds(run, device) for run in greedy.values()]  # what the first one pays for
    if args.compile:
        compiling = "; compiling took " + ", ".join(f"{t:.0f} s at batch {b}" for b, t in zip(args.batch, starts))
    for batch in args.batch:  # all our memory is in use once, before a peer takes some
        contenders["concept tokens"](batch)
    peak, limit = peak_memory(device), bandwidth(device)
    exact = load(args.model, args.device, args.dtype)[0] if args.quantize else model  # the peers' weights are not in 8 bits
    if args.quantize:
        lost = quality(model, tokenizer, exact)
    for name in args.against:
        try:
            peer = PEERS[name](find_folder(args.model), exact, ids, args.tokens)
        except ImportError as error:
            print(f"{error.name} is not installed: {name} is skipped (pip install {PACKAGES[name]})", file=sys.stderr)
            continue
        contenders[name], prefills[name] = peer.step, peer.prefill
        versions.append(peer.version)
    kind = f"{str(dtype)[6:]}{', weights in int8' if args.quantize else ''}{', compiled' if args.compile else ''}"
    lines = [f"{args.model}, {kind}, {hardware(device)}; {', '.join(versions)}",
             f"{loaded}; peak memory {peak:.2f} GB{compiling}",
             f"memory reads {limit['read']:.1f} GB/s, copies {limit['copy']:.1f} GB/s",
             f"prompt {args.prompt} tokens, {args.tokens} decoded, {args.repeats} repetitions in turns: median (least to most)", "",
             "| batch | method | tokens/s | ms per step | MB per step | share of read bandwidth | time beside greedy |",
             "|---|---|---|---|---|---|---|"]
    results = []
    for batch in args.batch:
        times = {name: [] for name in contenders}
        for _ in range(args.repeats):
            for name, contender in contenders.items():
                if (t := contender(batch)) is not None:
                    times[name].append(t)
        length = args.prompt + args.tokens // 2
        read = weights + batch * length * c.layers * 2 * c.kv_heads * c.head_dim * dtype.itemsize
        for name, t in times.items():
            if not t:
                continue
            step = statistics.median(t)
            # Pair by pair, because the machine's speed drifts.
            ratio = statistics.median(a / b for a, b in zip(t, times["greedy"]))
            results.append({"batch": batch, "method": name, "seconds_per_step": t, "bytes_per_step": read, "beside_greedy": ratio})
            lines.append(f"| {batch} | {name} | {batch / step:.1f} ({batch / max(t):.1f} to {batch / min(t):.1f}) | {step * 1e3:.1f} | "
                         f"{read / 1e6:.0f} | {read / step / limit['read'] / 1e9:.0%} | {ratio:.3f} |")
    took = {name: [] for name in prefills}
    for _ in range(args.repeats + 1):
        for name, function in prefills.items():
            took[name].append(seconds(function, device))
    said = [f"{name} {statistics.median(t[1:]) * 1e3:.0f} ms ({args.prompt / statistics.median(t[1:]):.0f} tokens/s)" for name, t in took.items()]
    pairs = [[candidates(model, tokenizer, prompt, number, args.tokens) for number in (1, 5)] for _ in range(args.repeats + 1)]
    five = statistics.median(b / a for a, b in pairs[1:])
    lines += ["", f"prefill of {args.prompt} tokens: {', '.join(said)}",
              f"Soft Reasoning: five candidates of one prompt in one batch take {five:.2f} x the time of one"]
    if lost:
        lines.append(lost)
    return lines, {"header": lines[:4], "bandwidth": limit, "prefill": took, "five_candidates": five, "int8": lost, "results": results}


def bench_model(args: argparse.Namespace) -> str:
    lines, numbers = bench_decoding(args)
    if args.assistant:
        lines += ["", bench_training(args)]
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args)} | numbers | {"text": lines}, indent=1) + "\n")
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
    parser.add_argument("--assistant", help="a SoftCoT training step with this assistant, too")
    parser.add_argument("--gp", action="store_true", help="the Gaussian process instead of a model: time")
    parser.add_argument("--regret", action="store_true", help="the Gaussian process instead of a model: how well it searches")
    parser.add_argument("--against", default="", help="peers, with commas, to run in turns with ours where they are installed: "
                        "transformers, llama.cpp; with --gp and --regret botorch")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 5, 16, 64], help="batch sizes (default: 1 5 16 64)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt length in tokens (default: 128)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens decoded per repetition (default: 48)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each, in turns, or seeds (default: 5)")
    parser.add_argument("--device", help="cpu, cuda, or cuda:N")
    parser.add_argument("--dtype", help="bfloat16, float16, or float32")
    parser.add_argument("--quantize", choices=["int8"], help="weights in 8 bits, and what that costs in quality")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step, and say how long that takes")
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
        args.against = [name for name in args.against.split(",") if name]
        there = ["botorch"] if args.gp or args.regret else list(PEERS)
        if wrong := [name for name in args.against if name not in there]:
            raise UserError(f"--against: no peer {wrong[0]!r} here; there is {', '.join(there)}")
        print(bench_gp(args.against, args.repeats) if args.gp else bench_regret(args.against, args.repeats) if args.regret else bench_model(args))
    except UserError as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail("out of GPU memory: lower --batch or --tokens")
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
