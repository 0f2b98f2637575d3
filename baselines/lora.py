"""LoRA on q_proj and v_proj (Hu et al., arXiv 2106.09685), the trained baseline of SoftCoT's table.

W x + (alpha / r) B A dropout(x), in PEFT's file format: rank 16, alpha 32 and dropout 0.1 by
default. `hooks` is for training, `merged` for decoding, at no cost.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ALIASES, Transformer, UserError


def tensor_name(layer: int, x: str, half: str) -> str:
    """As PEFT calls it; x is q or v, half is A or B."""
    return f"base_model.model.model.layers.{layer}.self_attn.{x}_proj.lora_{half}.weight"


def start(model: Transformer, rank: int) -> dict[str, Tensor]:
    """A [r, d] as in PEFT uniform with variance 1 / (3 d), B [out, r] zero: it changes nothing.

    UserError where r is not between 1 and d.
    """
    c, tensors = model.config, {}
    if not 1 <= rank <= c.d:
        raise UserError(f"a LoRA of rank {rank}: use 1 to {c.d}, the model's width")
    for i in range(c.layers):
        for x, out in (("q", c.heads * c.head_dim), ("v", c.kv_heads * c.head_dim)):
            A = torch.empty(rank, c.d).uniform_(-1, 1) / math.sqrt(c.d)
            tensors[tensor_name(i, x, "A")] = A
            tensors[tensor_name(i, x, "B")] = torch.zeros(out, rank)
    return tensors


@contextmanager
def hooks(
    model: Transformer, trained: dict[str, Tensor], scale: float, dropout: float
) -> Iterator[None]:
    """While inside: q and v become W x + scale B A dropout(x), differentiable in A and B.

    No dropout where there are no gradients.
    """
    kv = model.config.kv_heads * model.config.head_dim

    def delta(layer: int, x: str, inputs: tuple[Tensor]) -> Tensor:
        A, B = (trained[tensor_name(layer, x, half)] for half in "AB")
        seen = F.dropout(inputs[0].to(A), dropout, torch.is_grad_enabled())
        return scale * F.linear(F.linear(seen, A), B)

    def add(layer: int, x: str, linear: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return out + delta(layer, x, inputs).to(out)

    def add_fused(layer: int, linear: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        q, k = delta(layer, "q", inputs), out.new_zeros(*out.shape[:-1], kv)
        v = delta(layer, "v", inputs)
        return out + torch.cat([q, k, v], -1).to(out)

    handles = []
    for i, block in enumerate(model.layers):
        attention = block.self_attn
        if hasattr(attention, "qkv"):  # lab/fast.py has made one matrix of three
            handles.append(attention.qkv.register_forward_hook(partial(add_fused, i)))
        else:
            handles.append(attention.q_proj.register_forward_hook(partial(add, i, "q")))
            handles.append(attention.v_proj.register_forward_hook(partial(add, i, "v")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights(model: Transformer, layer: int) -> dict[str, Tensor]:
    """W of q and of v, as views into the model's parameters."""
    c, attention = model.config, model.layers[layer].self_attn
    if not hasattr(attention, "qkv"):
        return {"q": attention.q_proj.weight, "v": attention.v_proj.weight}
    q, _, v = attention.qkv.weight.split(
        [c.head_dim * n for n in (c.heads, c.kv_heads, c.kv_heads)]
    )
    return {"q": q, "v": v}


@contextmanager
def merged(model: Transformer, trained: dict[str, Tensor], scale: float) -> Iterator[None]:
    """While inside: the weights are W + scale B A; afterwards W to the bit."""
    kept = []
    with torch.no_grad():
        for i in range(model.config.layers):
            for x, W in weights(model, i).items():
                kept.append((W, W.clone()))
                A, B = (trained[tensor_name(i, x, half)] for half in "AB")
                W.copy_(W.float() + scale * (B @ A).to(W.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for W, before in kept:
                W.copy_(before)


# ------------------------------------------------------------------------------------ PEFT's files


def adapter_config(name: str, rank: int, alpha: float, dropout: float) -> dict:
    """adapter_config.json for the model of that name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "base_model_name_or_path": ALIASES.get(name.lower(), name),
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
    }
