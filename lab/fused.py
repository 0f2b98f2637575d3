"""Blocks with fused matrices: q, k and v are one product, and so are gate and up."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as plain
from model import KVCache, Transformer, causal_attention, rotate


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
