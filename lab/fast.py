"""The fast paths, which plug into model.py from outside: `load` is model.load with all of them in.

    model, tokenizer = load("qwen2.5-7b", quantize="int8", compile=True)

Fused matrices (q, k, v and gate, up are one product each), weights laid out for a CPU's products or
kept in 8 bits (lab/linear.py), our own kernels, a step compiled by Inductor, a step recorded as a
CUDA graph, and a plan of what fits in memory. Each can be read by itself; none is needed to
understand a method.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import model as plain
from lab import checkpoint, native, parallel, steps, template
from lab.linear import Int8Linear, PackedLinear, exchange, packs
from lab.ranks import Place
from model import KVCache, Tokenizer, Transformer, UserError, causal_attention, rotate


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
    bfloat16; not for training. compile: decoding is compiled by Inductor; on a CPU, which needs a
    C++ compiler for it, attention is in C++, too, also of prompts. It takes a minute or two at the
    first step, and seconds if Inductor's cache has it, which needs products in C++
    (lab/products.py). place: this process's among those that hold the model between them. Raises
    UserError for whatever the user can fix, before memory is asked for.
    """
    N = place.parts if place else 1
    if quantize not in (None, "int8"):
        raise UserError(f"unknown quantisation {quantize}: use int8")
    device, dtype = checkpoint.choose(device, dtype)
    if compile and N > 1:
        raise UserError("--compile is for a model on one device: leave it out")
    on_cpu = compile and device.type == "cpu"
    if on_cpu:
        checkpoint.check_compiler()
    folder = checkpoint.find_folder(name)
    config = checkpoint.check_config(folder)
    needed = weight_bytes(config, dtype, quantize, N)
    checkpoint.check_memory(needed, device, dtype, quantize)
    # The weights, oneDNN's copy, a compiled step's copy, and one to spare.
    copies = (1 if quantize else 2) + compile
    spare = checkpoint.free_memory(device) - (copies + 1) * needed
    pack = not quantize and (on_cpu or packs(device, dtype)) and spare > 0
    layer = Int8Linear if quantize else PackedLinear if pack else None
    read = partial(parallel.load, place=place) if N > 1 else plain.load
    with tqdm(desc="loading layers", total=config.layers, delay=1, leave=False) as bar:

        def convert(module: nn.Module) -> None:  # block by block: the whole is not there twice
            fuse(module)
            if layer:
                exchange(module, layer)
            bar.update()

        try:
            model, tokenizer = read(str(folder), str(device), dtype, convert)
        except Exception:
            checkpoint.check_files(folder, config)  # says in one line what is wrong with them
            raise
    template.limit(tokenizer)
    if layer:
        model.lm_head = layer(model.lm_head)
    model.planner = plan  # not bound to the model: a cycle would keep its memory
    if device.type == "cuda":
        model.recorder = steps.Recorder
        steps.use_kernels(model, [m for m in model.modules() if isinstance(m, Int8Linear)])
    if compile:
        model.step = steps.CompiledStep(model)
    if on_cpu:
        steps.use_attention(model)
        if spare > 0 and (quantize or pack and not native.has_amx(dtype)):
            layers = [m for m in model.modules() if isinstance(m, layer)]
            steps.use_products(model.step, layers, dtype)
    if N > 1:
        parallel.join(model, place)
        model.planner = partial(plan, least=place.least)
    return model, tokenizer


def weight_bytes(c: plain.Config, dtype: torch.dtype, quantize: str | None, parts: int = 1) -> int:
    """Bytes of a model's weights, or of a part's; in 8 bits all but the embeddings."""
    with torch.device("meta"):
        model = Transformer(replace(c, layers=1))
    embeddings, layer = (
        sum(p.numel() for p in x.parameters()) for x in (model.embed, model.layers)
    )
    rest = sum(p.numel() for p in model.parameters()) - embeddings + (c.layers - 1) * layer
    if quantize:
        return embeddings * dtype.itemsize + (embeddings * c.tied + rest) // parts
    return (embeddings + rest // parts) * dtype.itemsize


# --------------------------------------------------------------------------------- fused matrices


class FusedAttention(nn.Module):
    """model.Attention with one matrix for q, k and v: one read, one launch."""

    def __init__(self, a: plain.Attention):
        super().__init__()
        self.h = a.h
        self.H, self.K = (p.out_features // a.h for p in (a.q_proj, a.k_proj))
        # In the order of their use: whoever sums over parameters gets the bits of that order.
        self.qkv, self.o_proj = joined(a.q_proj, a.k_proj, a.v_proj), a.o_proj
        self.q_norm, self.k_norm = getattr(a, "q_norm", None), getattr(a, "k_norm", None)

    def forward(self, x: Tensor, rotation: tuple, layer: int, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        H, K, h = self.H, self.K, self.h
        qk, v = self.qkv(x).view(B, T, H + 2 * K, h).split([H + K, K], dim=2)
        if self.q_norm is not None:
            q, k = qk.split([H, K], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        q, k = rotate(qk, *rotation).split([H, K], dim=2)
        y = causal_attention(q, k, v) if cache is None else cache.attend(layer, q, k, v)
        return self.o_proj(y.reshape(B, T, H * h))


class FusedMLP(nn.Module):
    """model.MLP with one matrix for gate and up."""

    def __init__(self, m: plain.MLP):
        super().__init__()
        self.gate_up, self.down_proj = joined(m.gate_proj, m.up_proj), m.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def joined(*linears: nn.Linear) -> nn.Linear:
    """One linear layer whose outputs are those of all, one after another."""
    weight = torch.cat([x.weight.data for x in linears])
    linear = nn.Linear(*weight.shape[::-1], bias=linears[0].bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(torch.cat([x.bias.data for x in linears]), requires_grad=False)
    return linear


def fuse(block: plain.Block) -> None:
    block.self_attn, block.mlp = FusedAttention(block.self_attn), FusedMLP(block.mlp)


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Each tensor of a fused model by its Hugging Face name, as a view into its parameters.

    Writing to the views changes the model; saving them saves it.
    """
    c, views = model.config, {}
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    parts = {"qkv": (["q_proj", "k_proj", "v_proj"], [q, kv, kv])}
    parts["gate_up"] = (["gate_proj", "up_proj"], [c.ffn, c.ffn])
    for name, parameter in model.named_parameters():
        *path, kind = plain.hf_name(name).split(".")
        names, sizes = parts.get(path[-1], (path[-1:], [len(parameter)]))
        for part, view in zip(names, parameter.split(sizes)):
            views[".".join([*path[:-1], part, kind])] = view
    return views


# ----------------------------------------------------------------------------------------- memory


def row_bytes(
    c: plain.Config, itemsize: int, device: torch.device, prompt: int, new: int
) -> tuple[int, int]:
    """Bytes of a prompt's keys and values, and of all that a row takes while it is decoded."""
    positions = KVCache.rounded(min(prompt + new, c.context), device)
    position = 2 * c.layers * c.kv_heads * c.head_dim * itemsize  # of its keys and values
    held = position * min(prompt, c.context)
    # A prompt keeps what was made of it; and float32 logits, and what a method makes of them.
    return held, position * positions + held + 32 * c.vocab_size


def plan(
    model: Transformer, rows: int, prompt: int, new: int, least: Callable[[float], float] = float
) -> int:
    """The rows, if they fit in what is free, with prompts and new tokens so long at most.

    least: of what is free on several ranks. UserError where those are fewer: bits depend on how
    many are decoded side by side, so that the number is the user's to lower.
    """
    c, positions = model.config, min(prompt + new, model.config.context)
    held, row = row_bytes(c, model.embed.weight.itemsize, model.device, prompt, new)
    # There is one more prompt: the one to come.
    free = 0.9 * least(checkpoint.free_memory(model.device)) - held
    fit = int(min(rows, free / row))
    there = f"{free / 1e9:.1f} GB are free"
    if fit < 1:
        needs = f"needs {row / 1e9:.1f} GB for its keys and values"
        remedy = "lower --max-new-tokens"
        raise UserError(
            f"a sequence of {positions} positions {needs}, {there} on {model.device}: {remedy}"
        )
    if fit < rows:
        need = f"sequences of {positions} positions may need {row / 1e9:.2f} GB each"
        remedy = f"pass --batch-size {fit}, or lower --max-new-tokens"
        raise UserError(f"{rows} {need}, {there} on {model.device}: {remedy}")
    return rows
