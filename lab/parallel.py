"""One model over several devices: every rank of a `torchrun` holds a part of each matrix.

    torchrun --nproc-per-node 2 soft_thinking.py --model r1-llama-70b --tensor-parallel 2

As Megatron-LM splits it (Shoeybi et al., 1909.08053): the outputs of q, k, v, gate, up and of the
head, whose logits are gathered; the inputs of o and down, whose products are summed, one sum for
attention and one for the MLP. Embeddings are whole, so that a method notices nothing. All ranks run
the same program on the same requests; what the method of the first one decides in a step is
broadcast inside the step, so that a rounding cannot make them part.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

import model as plain
from lab.ranks import Place
from lab.steps import Recorder
from model import Config, Tokenizer, Transformer, UserError

OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")  # are split
INPUTS = ("o_proj", "down_proj")  # are split, and the products summed


# ---------------------------------------------------------------------------------------- loading


def part_of(c: Config, N: int) -> Config:
    """The configuration of one of N parts. UserError where they would not be equal."""
    sizes = {"attention heads": c.heads, "key-value heads": c.kv_heads}
    sizes |= {"feed-forward width": c.ffn, "vocabulary": c.vocab_size}
    if odd := [f"{what} ({n})" for what, n in sizes.items() if n % N]:
        fits = [str(k) for k in range(1, c.kv_heads + 1) if not any(n % k for n in sizes.values())]
        whose = f"the model's {', '.join(odd)}"
        raise UserError(f"--tensor-parallel {N} does not divide {whose}: use {', '.join(fits)}")
    return replace(c, heads=c.heads // N, kv_heads=c.kv_heads // N, ffn=c.ffn // N)


def load(
    folder: str, device: str, dtype: torch.dtype, convert: Callable, place: Place
) -> tuple[Transformer, Tokenizer]:
    """As model.load: only this rank's part of each tensor is read from its file."""
    folder, N = Path(folder), place.parts
    whole = plain.read_config(folder)
    with torch.device("meta"):
        model = Transformer(part_of(whole, N)).to(dtype).requires_grad_(False)
        files = plain.tensor_files(folder, Transformer(whole))
    if device.startswith("cuda"):  # as in model.load
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def fill(module: nn.Module, prefix: str) -> None:
        for inner, parameter in module.to_empty(device=device).named_parameters():
            name = plain.hf_name(prefix + inner)
            with safe_open(files[name], "pt", device=device) as file:
                parameter.copy_(part_of_tensor(file.get_slice(name), name, place))

    for i, block in enumerate(model.layers):
        fill(block, f"layers.{i}.")
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.over = place.group  # that its input is split over
        convert(block)
    blocks, model.layers = model.layers, nn.ModuleList()
    rows = whole.vocab_size // N
    head = nn.Linear(whole.d, rows, bias=False, device="meta", dtype=dtype).requires_grad_(False)
    model.lm_head = nn.Identity() if whole.tied else head
    fill(model, "")
    if whole.tied:
        own = model.embed.weight[place.part * rows : (place.part + 1) * rows]
        model.lm_head, head.weight = head, nn.Parameter(own, requires_grad=False)
    model.layers = blocks
    model.starts = partial(starts, files, dtype)
    return model.eval(), Tokenizer(folder)


def part_of_tensor(tensor: Any, name: str, place: Place) -> Tensor:
    """This rank's part of a safetensors slice; the first rank has the bias of a sum."""
    shape, kind = tensor.get_shape(), name.split(".")[-2]
    if kind in OUTPUTS:
        n = shape[0] // place.parts
        return tensor[place.part * n : (place.part + 1) * n]
    if kind in INPUTS and len(shape) == 1:
        return tensor[:] if place.part == 0 else torch.zeros(shape)
    if kind in INPUTS:
        n = shape[1] // place.parts
        return tensor[:, place.part * n : (place.part + 1) * n]
    return tensor[:]


def starts(files: dict[str, Path], dtype: torch.dtype, numbers: int = 256) -> dict[str, Tensor]:
    """The first numbers of every whole tensor, by which lab/trained.py knows a model."""
    found = {}
    for name, path in files.items():
        with safe_open(path, "pt") as file:
            tensor = file.get_slice(name)
            width = tensor.get_shape()[1] if len(tensor.get_shape()) == 2 else 1
            found[name] = tensor[: -(-numbers // width)].to(dtype)
    return found


# ------------------------------------------------------------------------------------- every step


def join(model: Transformer, place: Place) -> None:
    """Let the parts compute as one model; after all layers have been exchanged."""
    for block in model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.register_forward_hook(partial(summed, place))
    model.lm_head.register_forward_hook(partial(gathered, place))
    model.agree = partial(agreed, place)
    if model.recorder:
        model.recorder = partial(Together, place)


def summed(place: Place, linear: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
    dist.all_reduce(y, group=place.group)
    return y


def gathered(place: Place, head: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
    """[..., V / N] of each rank -> [..., V]"""
    every = [torch.empty_like(y) for _ in range(place.parts)]
    dist.all_gather(every, y.contiguous(), group=place.group)
    return torch.cat(every, dim=-1)


def agreed(place: Place, decided: Iterable[Tensor]) -> list[Tensor]:
    """The first rank's tensors on all ranks that hold the model: one broadcast for all of them."""
    # Of one row anything is contiguous, with whatever strides: a clone has the usual ones.
    copies = [x.clone(memory_format=torch.contiguous_format) for x in decided]
    flat = [x.view(-1).view(torch.uint8) for x in copies]
    whole = torch.cat(flat)
    dist.broadcast(whole, place.rank - place.part, group=place.group)
    parts = whole.split([len(x) for x in flat])
    return [part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, decided)]


class Together(Recorder):
    """A step is recorded by all ranks, or run one by one by all."""

    def __init__(self, place: Place, *parts: Any):
        super().__init__(*parts)
        self.place = place

    def record(self, S: int) -> None:
        super().record(S)
        if self.place.least(not self.refused) == 0:
            self.refused, self.graphs = True, {}
