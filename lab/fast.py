"""The fast paths, which plug into model.py from outside: `load` is model.load with all of them in.

    model, tokenizer = load("qwen2.5-7b", quantize="int8", compile=True)

Fused matrices (lab/fused.py), weights laid out for a CPU's products or kept in 8 bits
(lab/linear.py), prompts and steps in C++ (lab/cpu.py), our own kernels for CUDA (lab/kernels.py),
steps compiled by Inductor or recorded as CUDA graphs (lab/steps.py), a plan of what fits in memory.
Each can be read by itself; none is needed to understand a method.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

import model as plain
from lab import checkpoint, cpu, parallel, steps, template
from lab.fused import fuse
from lab.linear import Int8Linear, PackedLinear, PanelLinear, exchange, packs
from lab.ranks import Place
from model import KVCache, Prompt, Tokenizer, Transformer, UserError


def load(
    name: str,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    place: Place | None = None,
) -> tuple[Transformer, Tokenizer]:
    """As model.load, fast.

    quantize: "int8" keeps the matrices, but not the embeddings, in 8 bits: half the bytes of
    bfloat16; not for training. compile: steps are compiled by Inductor, which takes a minute or
    two; on a CPU prompts and steps are in C++, which needs a compiler, takes some seconds the first
    time, and computes no gradients. place: this process's among those that hold the model between
    them. Raises UserError for whatever the user can fix, before memory is asked for.
    """
    N = place.parts if place else 1
    if quantize not in (None, "int8"):
        raise UserError(f"unknown quantisation {quantize}: use int8")
    device, dtype = checkpoint.choose(device, dtype)
    if compile and N > 1:
        raise UserError("--compile is for a model on one device: leave it out")
    in_cpp = compile and device.type == "cpu"
    if in_cpp:
        checkpoint.check_compiler()
    folder = checkpoint.find_folder(name)
    config = checkpoint.check_config(folder)
    needed, free = weight_bytes(config, dtype, quantize, N), checkpoint.free_memory(device)
    in_cpp = in_cpp and cpu.usable(config, dtype, quantize, needed, free)
    if in_cpp:
        needed = weight_bytes(config, dtype, quantize, in_panels=True)
    checkpoint.check_memory(needed, device, dtype, quantize)
    pack = packs(device, dtype) and free > 3 * needed  # weights, oneDNN's copy, as much to spare
    kinds = [Int8Linear] if quantize else [PackedLinear] if pack else []
    kinds += [PanelLinear] if in_cpp else []
    read = partial(parallel.load, place=place) if N > 1 else plain.load
    with tqdm(desc="loading layers", total=config.layers, delay=1, leave=False) as bar:

        def convert(module: nn.Module) -> None:  # block by block: the whole is not there twice
            fuse(module)
            for kind in kinds:
                exchange(module, kind)
            bar.update()

        try:
            model, tokenizer = read(str(folder), str(device), dtype, convert)
        except Exception:
            checkpoint.check_files(folder, config)  # says in one line what is wrong with them
            raise
    template.limit(tokenizer)
    for kind in kinds:
        model.lm_head = kind(model.lm_head)
    model.planner = plan  # not bound to the model: a cycle would keep its memory
    if device.type == "cpu":
        cpu.keep_freed_memory()
    if device.type == "cuda":
        model.recorder = steps.Recorder
        steps.use_kernels(model, [m for m in model.modules() if isinstance(m, Int8Linear)])
    if in_cpp:
        cpu.use(model)
    elif compile and device.type == "cuda":
        model.step = steps.CompiledStep(model)
    if N > 1:
        parallel.join(model, place)
        model.planner = partial(plan, least=place.least)
    return model, tokenizer


def weight_bytes(
    c: plain.Config,
    dtype: torch.dtype,
    quantize: str | None,
    parts: int = 1,
    in_panels: bool = False,
) -> int:
    """Bytes of a model's weights, or of a part's; its embeddings are never in 8 bits or panels."""
    with torch.device("meta"):
        model = Transformer(replace(c, layers=1))
    embeddings, layer = (
        sum(p.numel() for p in x.parameters()) for x in (model.embed, model.layers)
    )
    rest = sum(p.numel() for p in model.parameters()) - embeddings + (c.layers - 1) * layer
    if quantize or in_panels:  # a tied head is no longer the embeddings
        size = 1 if quantize else dtype.itemsize
        return embeddings * dtype.itemsize + (embeddings * c.tied + rest) // parts * size
    return (embeddings + rest // parts) * dtype.itemsize


# ----------------------------------------------------------------------------------------- memory


def row_bytes(
    c: plain.Config, itemsize: int, device: torch.device, prompt: int, new: int
) -> tuple[int, int]:
    """Bytes that a prompt takes while it is prefilled, and that a row takes while it is decoded."""
    positions = KVCache.rounded(min(prompt + new, c.context), device)
    position = 2 * c.layers * c.kv_heads * c.head_dim * itemsize  # of its keys and values
    held = position * min(prompt, c.context)
    # Of a layer: gate and up, silu of gate, their product, and some of width d.
    passing = 4 * (c.d + c.ffn) * itemsize * min(prompt, Prompt.FIRST)
    # A prompt keeps what was made of it; and float32 logits, and what a method makes of them.
    return held + passing, position * positions + held + 32 * c.vocab_size


def plan(
    model: Transformer, rows: int, prompt: int, new: int, least: Callable[[float], float] = float
) -> int:
    """The rows, if they fit in what is free, with prompts and new tokens so long at most.

    least: of what is free on several ranks. UserError where those are fewer: bits may depend on how
    many are decoded side by side, so that the number is the user's to lower.
    """
    c, positions = model.config, min(prompt + new, model.config.context)
    prefill, row = row_bytes(c, model.embed.weight.itemsize, model.device, prompt, new)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    coming = sum(m.weight.nbytes for m in layers if m.packs and m.packed is None)  # oneDNN's copies
    free = 0.9 * least(checkpoint.free_memory(model.device) - coming)
    # There is one more prompt: the one to come.
    fit = int(min(rows, (free - prefill) / row))
    there = f"{free / 1e9:.1f} GB are free"
    if fit < 1:
        needs = f"needs {row / 1e9:.1f} GB, and {prefill / 1e9:.2f} GB while its prompt is read"
        remedy = "lower --max-new-tokens, or shorten the prompt"
        raise UserError(
            f"a sequence of {positions} positions {needs}, {there} on {model.device}: {remedy}"
        )
    if fit < rows:
        need = f"sequences of {positions} positions may need {row / 1e9:.2f} GB each"
        need += f", a prompt {prefill / 1e9:.2f} GB while it is read"
        remedy = f"pass --batch-size {fit}, or lower --max-new-tokens"
        raise UserError(f"{rows} {need}, {there} on {model.device}: {remedy}")
    return rows
