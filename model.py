"""A Llama/Qwen transformer that is driven by embeddings, and everything between a model's name and its logits.

Read it from top to bottom: Config, Transformer, KVCache, decode, Tokenizer, load.  The seam to a method is
*embeddings in, logits out*: `decode` shows a method the logits of a step and feeds the embeddings that it returns.

    model, tokenizer = load("qwen2.5-7b")                        # alias, Hugging Face id, or a local folder
    hidden = model(model.embed(torch.tensor([[1, 2, 3]])))       # [1, 3] -> [1, 3, d] -> [1, 3, d]
    logits = model.logits(hidden[:, -1])                         # [1, d] -> float32 [1, V]

Shapes: B rows, T positions, d model width, H query heads, K key-value heads, h head width, V vocabulary, S cache length.
Architectures: Llama 2 to 3.3, Qwen2, Qwen2.5, QwQ, Qwen3 (dense), Mistral without sliding window, SmolLM2, and whatever
else is one of these under another name, such as the DeepSeek-R1 distillations.
"""

import difflib
import itertools
import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import jinja2.ext
import jinja2.sandbox
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
from huggingface_hub import errors as hub_errors
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: one line that names the thing and the remedy.  Command lines exit with 2."""


# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    """What the transformer needs to know of a `config.json`."""

    model_type: str  # llama, qwen2, qwen3 or mistral
    vocab_size: int  # V
    d: int  # model width
    layers: int
    heads: int  # H
    kv_heads: int  # K: each serves H / K query heads
    head_dim: int  # h: not always d / H
    ffn: int  # width of the feed-forward layer
    norm_eps: float
    context: int  # positions that the model was made for
    rope_theta: float
    rope: dict  # rope_type and its own numbers, as in config.json
    tied: bool  # the output layer is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm on every query and key head, as in Qwen3
    eos_ids: tuple[int, ...] = ()

    @staticmethod
    def from_json(c: dict, eos_ids: tuple[int, ...] = ()) -> "Config":
        """Read a `config.json` as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) writes it.

        Raises UserError for what this transformer does not compute: it never runs a model that it only half knows.
        """
        kind = c.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3", "mistral"):
            found = kind or ", ".join(c.get("architectures") or ["nothing"])
            raise UserError(f"unsupported architecture: found {found}; supported are llama, qwen2, qwen3, mistral")
        if quantised := c.get("quantization_config"):
            method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
            raise UserError(f"unsupported quantisation: found {method}; supported are bfloat16, float16, float32 weights")
        if c.get("hidden_act", "silu") != "silu":
            raise UserError(f"unsupported activation: found {c['hidden_act']}; supported is silu")
        try:
            heads, d, context = c["num_attention_heads"], c["hidden_size"], c["max_position_embeddings"]
            rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
            rope = {"rope_type": rope.get("rope_type", rope.get("type", "default"))} | rope
            theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
            if rope["rope_type"] not in ROPE_NEEDS:
                raise UserError(f"unsupported RoPE type: found {rope['rope_type']}; supported are {', '.join(ROPE_NEEDS)}")
            if missing := [key for key in ROPE_NEEDS[rope["rope_type"]] if key not in rope]:
                raise UserError(f"config.json: RoPE type {rope['rope_type']} lacks {', '.join(missing)}")
            if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
                raise UserError("unsupported RoPE: partial_rotary_factor other than 1")
            if rope["rope_type"] == "yarn":
                if odd := {"mscale", "mscale_all_dim", "truncate"} & rope.keys():
                    raise UserError(f"unsupported YaRN option: found {', '.join(sorted(odd))}")
                rope.setdefault("original_max_position_embeddings", context)
                context = max(context, int(rope["factor"] * rope["original_max_position_embeddings"]))
            # A window that is as long as the context is no window.  Only Mistral's needs no switch to be in force.
            window = c.get("sliding_window") if c.get("use_sliding_window", kind == "mistral") else None
            if window and window < context:
                raise UserError(f"unsupported attention: sliding window of {window} positions; supported is full attention")
            attention_bias = bool(c.get("attention_bias", False))
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                         "max_position_embeddings"):
                if not isinstance(c[name], int) or c[name] < 1:
                    raise UserError(f"config.json: {name} is {c[name]!r}, not a positive whole number")
            if not float(rope.get("factor", 1)) > 0:
                raise UserError(f"config.json: the RoPE factor is {rope['factor']}, not above 0")
            return Config(
                model_type=kind, vocab_size=c["vocab_size"], d=d, layers=c["num_hidden_layers"], heads=heads,
                kv_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or d // heads,
                ffn=c["intermediate_size"], norm_eps=c.get("rms_norm_eps", 1e-6), context=context,
                rope_theta=float(theta), rope=rope, tied=bool(c.get("tie_word_embeddings", False)),
                qkv_bias=attention_bias or kind == "qwen2", o_bias=attention_bias and kind != "qwen2",
                mlp_bias=bool(c.get("mlp_bias", False)), qk_norm=kind == "qwen3", eos_ids=eos_ids)
        except KeyError as error:
            raise UserError(f"config.json lacks {error.args[0]}") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"config.json has a value of the wrong kind ({error}): download it again") from None


# What each supported kind of rotary embedding must state in config.json.
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """Angular frequencies of the rotary embedding, float32 [h/2] in radians per position, and the factor on cos and sin.

    Sources: RoFormer (2104.09864); linear: 2306.15595; YaRN: 2309.00071, with its 0.1 ln(s) + 1 put on cos and sin of
    both sides; llama3: the Llama 3.1 reference implementation.
    """
    h, base, rope = config.head_dim, config.rope_theta, config.rope
    freq = 1.0 / base ** (torch.arange(0, h, 2, dtype=torch.float32, device="cpu") / h)
    if rope["rope_type"] == "default":
        return freq, 1.0
    s = rope["factor"]
    if rope["rope_type"] == "linear":
        return freq / s, 1.0
    original = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        # Wavelengths shorter than original / high stay, longer than original / low are stretched by s, in between both.
        turns = original * freq / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / s, 1.0

    def dimension(turns: float) -> float:  # the index at which a dimension makes that many turns over the old context
        return h * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(dimension(rope.get("beta_fast") or 32)), 0)
    last = min(math.ceil(dimension(rope.get("beta_slow") or 1)), h - 1)
    stretch = ((torch.arange(h // 2, device="cpu") - first) / max(last - first, 0.001)).clamp(0, 1)

    factor = rope.get("attention_factor") or (0.1 * math.log(s) + 1 if s > 1 else 1.0)
    return stretch * freq / s + (1 - stretch) * freq, factor


# ------------------------------------------------------------------------------------------------------ transformer


class Linear(nn.Linear):
    """x [..., n] -> [..., m].  Decoding multiplies with `packed`, where `Transformer.pack` has made it: the same weight, laid
    out in the blocks that the processor's matrix instructions read."""

    packed: Tensor | None = None
    version: int | None = None  # of the weight that was packed

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and torch.is_inference_mode_enabled():
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """x [..., n] -> [..., m] from a weight in 8 bits, int8 [m, n], with one scale for each of its m rows.

    The scale is rounded first, and the weight then to its multiples, so that only the second rounding is an error: at most
    half a scale, 1/254 of the largest weight of the row.  Decoding on a CPU multiplies the integers as they are; elsewhere,
    and where so many rows are decoded that it is faster, the weight is made again for each product, with one rounding more.
    """

    def __init__(self, linear: Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-6).to(linear.weight.dtype)
        self.register_buffer("weight", (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_inference_mode_enabled() and x.numel() <= 24 * x.shape[-1]:
            y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.scale).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight * self.scale[:, None], self.bias)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [B, T, H, h], k and v [B, S, K, h] -> [B, T, H, h].  Causal where no mask says otherwise."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]  # each head of keys serves H / K of queries
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.H, self.K, self.h = c.heads, c.kv_heads, c.head_dim
        self.qkv = Linear(c.d, (self.H + 2 * self.K) * self.h, bias=c.qkv_bias)  # one matrix: one read, one launch
        self.o = Linear(self.H * self.h, c.d, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(self.h, c.norm_eps), nn.RMSNorm(self.h, c.norm_eps)
        self.qk_norm = c.qk_norm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: "KVCache | None") -> Tensor:
        B, T, _ = x.shape
        H, K, h = self.H, self.K, self.h
        qkv = self.qkv(x).view(B, T, H + 2 * K, h)
        qk, v = qkv.split([H + K, K], dim=2)
        if self.qk_norm:
            q, k = qk.split([H, K], dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2)
        # Rotate pairs (x1, x2) half a head apart: (x1 cos - x2 sin, x2 cos + x1 sin).  sin carries the minus already.
        qk = torch.addcmul(qk * cos, qk.roll(h // 2, -1), sin).to(x.dtype)  # cos and sin are float32
        q, k = qk.split([H, K], dim=2)
        y = causal_attention(q, k, v) if cache is None else cache.attend(layer, q, k, v)  # [B, T, H, h]
        return self.o(y.reshape(B, T, H * h))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up = Linear(c.d, 2 * c.ffn, bias=c.mlp_bias)
        self.down = Linear(c.ffn, c.d, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(c.d, c.norm_eps), Attention(c)
        self.norm2, self.mlp = nn.RMSNorm(c.d, c.norm_eps), MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: "KVCache | None") -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin, layer, cache)
        return x + self.mlp(self.norm2(x))


def quantise(module: nn.Module) -> None:
    """Every matrix inside in 8 bits."""
    for name, child in list(module.named_children()):
        if isinstance(child, Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantise(child)


class Transformer(nn.Module):
    """Embeddings in, hidden states out; differentiable.  `model.embed(ids)` and `model.logits(hidden)` are its ends."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d)  # LongTensor [...] -> [..., d]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d, config.norm_eps)
        self.head = Linear(config.d, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        # cos and sin of every position so far, [positions, h].  No buffers: they stay float32 whatever the weights become.
        self.cos = self.sin = torch.empty(0, config.head_dim)
        self.compiled: set[int] | None = None  # numbers of rows that a compiled step is there for

    def forward(self, embeds: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Hidden states after the final norm.

        embeds [B, T, d] -> [B, T, d] in the weights' dtype.  Causal.  Shorter rows are padded on the right with anything:
        causality keeps it from what stands before.  With a cache of B rows that has room for T more positions in each,
        every row goes on from where it stands; without one from position 0.
        """
        T = embeds.shape[1]
        positions, longest = (torch.arange(T, device=embeds.device)[None], T) if cache is None else cache.advance(T)
        return self.run(embeds, *self.rotation(positions, longest), cache)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, cache: "KVCache | None") -> Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer, cache)
        return self.norm(x)

    def rotation(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [B, T] below `longest`: float32 [B, T, 1, h], the first half of sin negated."""
        if longest > len(self.cos) or self.cos.device != positions.device:
            freq, scale = rope_frequencies(self.config)
            angles = torch.arange(-(-longest // 1024) * 1024, device="cpu")[:, None] * freq  # [positions, h/2]
            cos, sin = angles.cos() * scale, angles.sin() * scale
            self.cos, self.sin = torch.cat([cos, cos], -1).to(positions.device), torch.cat([-sin, sin], -1).to(positions.device)
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> float32 [..., V] (float64 from float64).

        A bfloat16 product accumulates in float32 and is rounded to bfloat16 once.
        """
        logits = self.head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def step(self, embeds: Tensor, cache: "KVCache") -> Tensor:
        """What `decode` runs: each row of the cache goes on by one embedding.  [B, d] -> float32 logits [B, V]."""
        x, rotation, B = embeds[:, None], self.rotation(*cache.advance(1)), len(embeds)
        if self.compiled is None:
            return self.one(x, *rotation, cache)
        if B in self.compiled:
            return self.one(x, *rotation, cache)
        for tensor, dim in ((cache.mask, 3), *((keys, 1) for keys in cache.keys + cache.values)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)  # compiled once for all lengths and capacities
        start = time.perf_counter()
        logits = self.one(x, *rotation, cache)
        self.compiled.add(B)
        print(f"compiled the step for {B} sequences in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        return logits

    def one(self, x: Tensor, cos: Tensor, sin: Tensor, cache: "KVCache") -> Tensor:
        return self.logits(self.run(x, cos, sin, cache)[:, 0])

    def compile_step(self) -> None:
        """From now on decoding runs `one` compiled by Inductor: what stands between the matrix products is fused.

        On a CPU the weights become constants of it, as they are at the first step, laid out for Inductor's own C++ products:
        a second copy, and up to a minute with a C++ compiler.  These are settings of Inductor itself, so they hold for
        whatever else the process compiles.
        """
        if self.embed.weight.device.type == "cpu":
            inductor = torch._inductor.config
            inductor.freezing, inductor.max_autotune, inductor.max_autotune_gemm_backends = True, True, "CPP"
        self.one, self.compiled = torch.compile(self.one), set()

    def pack(self) -> None:
        """On a CPU that multiplies bfloat16: lay out every matrix for decoding, beside the original.

        PyTorch would do so again in every product, which takes longer than the product of a few rows.
        """
        weight, linears = self.embed.weight, [m for m in self.modules() if isinstance(m, Linear)]
        if self.compiled is not None or weight.device.type != "cpu" or weight.dtype != torch.bfloat16 \
                or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return
        if all(m.version is None for m in linears) and 2 * sum(m.weight.nbytes for m in linears) > free_memory(weight.device):
            return
        for linear in linears:
            version = None if linear.weight.is_inference() else linear.weight._version  # the first do not say when they change
            if version is None or linear.version != version:
                linear.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
                linear.version = version


# --------------------------------------------------------------------------------------------------------- decoding


class KVCache:
    """Keys and values of `rows` sequences, each at its own length; grows as they do.

    Per layer two tensors [rows, capacity, K, h].  Attention reads the first S positions of them, S being the longest
    length in use, rounded up.  The rounding keeps shapes few (on CUDA each needs a recording) and a row's arithmetic,
    hence its bits, the same whichever neighbours it has.

    What the host decides (`reserve`) and what the device computes (`advance`, `attend`) are apart, so that the second can
    be recorded once and replayed.
    """

    def __init__(self, model: "Transformer", rows: int, capacity: int):
        c, weight = model.config, model.embed.weight
        self.K, self.G = c.kv_heads, c.heads // c.kv_heads
        self.rows = torch.arange(rows, device=weight.device)[:, None]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)
        # Zeros, because what is masked is still multiplied (by 0), and 0 times an uninitialised NaN is NaN.
        shape = (rows, self.rounded(capacity, weight.device) + 1, c.kv_heads, c.head_dim)
        self.keys, self.values = ([torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in model.blocks]
                                  for _ in "kv")
        self.S, self.moves, self.mask, self.positions = 0, 0, None, None

    @staticmethod
    def rounded(longest: int, device: torch.device) -> int:
        """S: on a CPU eight sizes in each doubling, and multiples of 64; on CUDA four, and multiples of 256."""
        least, parts = (64, 8) if device.type == "cpu" else (256, 4)
        step = max(least, (1 << longest.bit_length()) // (2 * parts))
        return -(-longest // step) * step

    def reserve(self, longest: int) -> None:
        """Have room for rows of up to that many positions.

        There always is a position more than is read: what attention reads never is a whole tensor, which a compiled step
        would take for another case and compile again.
        """
        self.S = self.rounded(longest, self.lengths.device)
        if self.S >= (old := self.keys[0].shape[1]):
            self.moves += 1
            for tensors in (self.keys, self.values):
                for layer, x in enumerate(tensors):  # one after another, so that only one is there twice
                    tensors[layer] = x.new_zeros(len(x), self.S + 1, *x.shape[2:])
                    tensors[layer][:, :old] = x

    def advance(self, T: int) -> tuple[Tensor, int]:
        """Every row is T positions longer: the positions that are new, LongTensor [rows, T], and what they are below.

        A row that nobody uses (any more) may point behind what is reserved: it stays at the last positions.
        """
        device = self.lengths.device
        self.positions = self.lengths.clamp(max=self.S - T)[:, None] + torch.arange(T, device=device)  # [rows, T]
        self.lengths += T
        later = torch.arange(self.S, device=device) > self.positions.repeat(1, self.G if T > 1 else 1)[:, None, :, None]
        # [rows, 1, G * T, S], for one position [rows, 1, 1, S]: 0, or -inf where a position is not to be seen
        self.mask = torch.zeros(later.shape, dtype=self.keys[0].dtype, device=device).masked_fill_(later, -math.inf)
        return self.positions, self.S

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Put k, v [rows, T, K, h] in their places, and attend with q [rows, T, H, h] to all that is in use: [rows, T, H, h].

        The G = H / K query heads of a group stand where positions would, so that their keys are read once for all of them.
        """
        keys, values, S = self.keys[layer], self.values[layer], self.mask.shape[-1]
        keys.index_put_((self.rows, self.positions), k)
        values.index_put_((self.rows, self.positions), v)
        B, T, H, h = q.shape
        q = q.view(B, T, self.K, self.G, h).permute(0, 2, 3, 1, 4).reshape(B, self.K, self.G * T, h)
        y = F.scaled_dot_product_attention(q, keys[:, :S].transpose(1, 2), values[:, :S].transpose(1, 2), attn_mask=self.mask)
        return y.view(B, self.K, self.G, T, h).permute(0, 3, 1, 2, 4).reshape(B, T, H, h)

    def take(self, row: int, source: "KVCache | None", T: int) -> None:
        """Begin a row with the first T positions of another cache's only row; None: with nothing."""
        self.reserve(T)
        for layer, x in enumerate(self.keys + self.values):
            x[row] = 0  # what is behind T is masked, but a NaN would not be
            if source:
                x[row, :T] = (source.keys + source.values)[layer][0, :T]
        self.lengths[row] = T

    @staticmethod
    def fitting(model: "Transformer", rows: int, prompt: int, new: int) -> int:
        """As many of the rows as fit in what is free, each with a prompt and new tokens of at most these numbers; a line on
        standard error if that is fewer.  UserError where not even one fits.
        """
        c, weight = model.config, model.embed.weight
        model.pack()  # takes memory, too
        prompt, positions = min(prompt, c.context), min(prompt + new, c.context)
        position = 2 * c.layers * c.kv_heads * c.head_dim * weight.itemsize  # bytes of its keys and values
        row = position * (KVCache.rounded(positions, weight.device) + prompt)  # a prompt keeps what was made of it
        row += 32 * c.vocab_size  # float32 logits and what a method makes of them
        free = 0.9 * free_memory(weight.device) - position * prompt  # there is one more prompt: the one to come
        if (fit := min(rows, int(free / row))) < 1:
            raise UserError(f"a sequence of {positions} positions needs {row / 1e9:.1f} GB for its keys and values, "
                            f"{free / 1e9:.1f} GB are free on {weight.device}: lower --max-new-tokens")
        if fit < rows:
            print(f"{fit} instead of {rows} sequences side by side: each may need {row / 1e9:.2f} GB, {free / 1e9:.1f} GB are free",
                  file=sys.stderr)
        return fit


@dataclass(eq=False)
class Prompt:
    """A prompt as embeddings [T, d], T >= 1.  However many requests begin with it, it is taken in once.

    All but its last embedding are: that one a request is fed in its first step.
    """

    CHUNK = 512  # positions taken in at once: a long prompt does not keep the others waiting for long

    embeds: Tensor
    cache: KVCache | None = None  # its keys and values, one row
    taken: int = 0  # positions that are in it

    @property
    def ready(self) -> bool:
        return self.taken == len(self.embeds) - 1

    def prefill(self, model: "Transformer") -> int:
        """Take in the next chunk; how many positions it had."""
        if self.cache is None:
            self.cache = KVCache(model, 1, len(self.embeds) - 1)
        chunk = self.embeds[self.taken : len(self.embeds) - 1][: self.CHUNK]
        self.cache.reserve(self.taken + len(chunk))
        if not model(chunk[None], self.cache).isfinite().all():
            raise UserError("the model's hidden states are not finite: its weights are damaged, or float16 overflows "
                            "(then use --dtype bfloat16)")
        self.taken += len(chunk)
        return len(chunk)


@dataclass(eq=False)
class Request:
    """One sequence for `decode`: how it begins, and whatever the method wants to find again."""

    prompt: Prompt
    data: Any = None


class Flags:
    """A copy of a bool tensor on its way to the host.  On CUDA nobody waits for it before `list` is asked for."""

    def __init__(self, x: Tensor):
        self.host = x.to("cpu", non_blocking=True, copy=True)
        self.event = torch.cuda.Event() if x.is_cuda else None
        if self.event:
            self.event.record()

    def list(self) -> list[bool]:
        if self.event:
            self.event.synchronize()
        return self.host.tolist()


RECORDED = {"cuda"}  # where a step is one recorded graph
LATE = {"cpu": 0, "cuda": 1}  # steps after which the end of a sequence is noticed: the GPU works on while the host looks


@torch.inference_mode()
def decode(model: "Transformer", requests: Iterable[Request | None], method, rows: int, after: Callable | None = None) -> Iterator:
    """Decode requests in `rows` slots, and yield `method.end(row)` for each as soon as it is finished.

    A free slot takes the next request at once.  Where a request waits for the result of another, a generator may yield
    None: nothing at present, ask again after the next step.  Prompts are taken in one by one, by chunks between the steps
    of the others, so their lengths may differ and nothing is padded.  All slots are computed in every step, used or not:
    with the shapes always the same, what a request yields does not depend, to the bit, on its slot, its neighbours, or
    when it came; and on CUDA a step is one recorded graph.

    A method keeps its own state per row, on the device, and has three functions:
        method.begin(row, request)    a request has taken this row
        method.step(logits, live)     float32 [rows, V] -> next embeddings [rows, d], finished: bool [rows].
                                      Only rows that are live, bool [rows], may change their state.
        method.end(row)               the row is finished: its result
    after(), if given, is called after every step.  A method that needs the host in its steps says so by method.host = True.
    """
    device = model.embed.weight.device
    model.pack()
    cache = KVCache(model, rows, 256)
    embeds = torch.zeros(rows, model.config.d, dtype=model.embed.weight.dtype, device=device)  # what each row is fed next
    live = torch.zeros(rows, dtype=torch.bool, device=device)
    slots: list[Request | None] = [None] * rows
    lengths, born = [0] * rows, [0] * rows  # positions of each row; the step before which it began
    waiting, coming, pending = iter(requests), None, deque()

    def step() -> None:
        """One position further in every row: all on the device, nothing waits for it."""
        following, finished = method.step(model.step(embeds, cache), live)
        embeds.copy_(following)
        live.logical_and_(~finished)

    advance = Graphs(model, step, cache) if device.type in RECORDED and not getattr(method, "host", False) else step
    for now in itertools.count():
        budget = Prompt.CHUNK  # positions of prompts that are taken in before the next step
        while None in slots and (budget > 0 or not any(slots)):
            if coming is None and (coming := next(waiting, None)) is None:
                break
            if not coming.prompt.ready:
                budget -= coming.prompt.prefill(model)
                continue
            row, T = slots.index(None), len(coming.prompt.embeds) - 1
            cache.take(row, coming.prompt.cache, T)
            embeds[row], live[row] = coming.prompt.embeds[-1], True
            slots[row], lengths[row], born[row] = coming, T, now
            method.begin(row, coming)
            coming = None
        if not any(slots):
            return
        lengths = [n + 1 if request else 0 for n, request in zip(lengths, slots)]
        cache.reserve(max(lengths))
        advance()
        if after:
            after()
        pending.append((now, Flags(live)))
        if len(pending) > LATE[device.type]:
            then, flags = pending.popleft()
            for row, lives in enumerate(flags.list()):
                if slots[row] and born[row] <= then and not lives:
                    yield method.end(row)
                    slots[row] = None


class Graphs:
    """Runs `step` from a recording, one for each number of positions that attention reads: launching the kernels of a step
    one by one takes the host longer than running them takes the GPU."""

    def __init__(self, model: Transformer, step: Callable[[], None], cache: KVCache):
        self.model, self.step, self.cache, self.moves, self.graphs = model, step, cache, cache.moves, {}
        self.refused = False

    def __call__(self) -> None:
        if self.moves != self.cache.moves:  # a recording knows tensors by their addresses
            self.moves, self.graphs = self.cache.moves, {}
        if self.cache.S in self.graphs:
            self.graphs[self.cache.S][0].replay()
            return
        self.step()  # this step, done at once; the recording, which does nothing yet, is for those to come
        if not self.refused:
            try:
                # With the rotary tables that it reads: longer ones may replace them in the model.
                self.graphs[self.cache.S] = self.record(), self.model.cos, self.model.sin
            except RuntimeError as error:  # a driver or an operation that cannot: what has been done is done, and is right
                self.refused = True
                print(f"steps cannot be recorded here, and run one by one ({str(error).splitlines()[0]})", file=sys.stderr)

    def record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=next(iter(self.graphs.values()))[0].pool() if self.graphs else None):
            self.step()
        return graph


def check_prompt(config: Config, ids: list[int], question: str = "", whose: str = "the", remedy: str = "shorten it") -> None:
    """UserError where a prompt fills the context window or leaves the vocabulary.  A question tells which of many it is."""
    if len(ids) >= config.context:
        which = f" (of the question {question[:60]!r})" if question else ""
        raise UserError(f"{whose} prompt has {len(ids)} tokens, the context window {config.context}{which}: {remedy}")
    if max(ids) >= config.vocab_size:
        raise UserError(f"{whose} tokenizer gives id {max(ids)}, the model has {config.vocab_size} embeddings: "
                        "tokenizer and weights are of different models")


# -------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Text to token ids and back by `tokenizer.json`, chats by the model's own template.

    encode(text) takes the text as it is: special tokens in it count, none is added.  decode(ids) leaves out nothing.
    """

    def __init__(self, folder: Path):
        if not (folder / "tokenizer.json").exists():
            raise UserError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
        try:
            self.core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001 (the class that the library raises for a broken file is Exception itself)
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read ({error}): download it again") from None
        self.core.no_truncation()
        self.core.no_padding()
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        text = config.get("chat_template")
        if isinstance(text, list):  # several, by name
            text = {t["name"]: t["template"] for t in text}.get("default")
        if (folder / "chat_template.jinja").exists():
            text = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
        self.special = {}  # bos_token, eos_token, ...: templates ask for them by these names
        for name, token in config.items():
            if name.endswith("_token") and token and not isinstance(token, bool):
                self.special[name] = token["content"] if isinstance(token, dict) else token
        # A template comes with the model, from anybody: it runs in the sandbox, without access to Python's internals.
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        sandbox.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False} | options)
        sandbox.globals["raise_exception"] = refuse_chat
        sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self.template = sandbox.from_string(text) if text else None
        except jinja2.TemplateError as error:
            raise UserError(f"{folder}: the chat template does not parse: {error}") from None

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.core.decode(ids, skip_special_tokens=False)

    def render(self, messages: str | list[dict], **template_arguments) -> str:
        """The prompt as text: a chat ready to be answered.  A str is one user message."""
        if self.template is None:
            raise UserError("the tokenizer has no chat template (a base model?): use an instruct or reasoning model")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        arguments = {"tools": None, "documents": None, "add_generation_prompt": True} | self.special | template_arguments
        try:
            return self.template.render(messages=messages, **arguments)
        except Exception as error:  # noqa: BLE001 (a template is a program of somebody else's: it can raise anything)
            raise UserError(f"the chat template refuses these messages: {error}") from None

    def chat(self, messages: str | list[dict], **template_arguments) -> list[int]:
        """Token ids of `render`; template arguments such as enable_thinking=False or date_string="26 Jul 2024"."""
        return self.encode(self.render(messages, **template_arguments))


def refuse_chat(message: str):
    raise jinja2.TemplateError(message)


# ---------------------------------------------------------------------------------------------------------- loading


ALIASES = {
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "1.5", "3", "7", "14", "32", "72")},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8", "14", "32")},
    "qwq-32b": "Qwen/QwQ-32B",
    **{f"r1-qwen-{n}b": f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{n}B" for n in ("1.5", "7", "14", "32")},
    **{f"r1-llama-{n}b": f"deepseek-ai/DeepSeek-R1-Distill-Llama-{n}B" for n in ("8", "70")},
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    **{f"llama-3.2-{n}b": f"meta-llama/Llama-3.2-{n}B-Instruct" for n in ("1", "3")},
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    **{f"smollm2-{n.lower()}": f"HuggingFaceTB/SmolLM2-{n}-Instruct" for n in ("135M", "360M", "1.7B")},
}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # as safetensors spells them


def load(name: str, device: str | None = None, dtype: torch.dtype | str | None = None, quantize: str | None = None,
         compile: bool = False) -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer by alias, Hugging Face id, or local folder.

    device: "cpu", "cuda", "cuda:1"; by default CUDA where there is one.  dtype: "bfloat16", "float16", "float32" or the
    torch dtype; by default bfloat16 on CUDA and on processors that multiply it natively, else float32.
    quantize: "int8" keeps the matrices, but not the embeddings, in 8 bits: half the bytes of bfloat16; not for training.
    compile: decoding is compiled by Inductor, which takes about a minute at the first step and needs a compiler.
    Weights go from the file to the device in pieces; nothing of a model's own code is run.
    Raises UserError for whatever the user can mend.
    """
    device, dtype = choose(device, dtype)
    if quantize not in (None, "int8"):
        raise UserError(f"unknown quantisation {quantize}: use int8")
    if compile and device.type == "cpu":
        check_compiler()
    folder = find_folder(name)
    config = read_config(folder)
    tokenizer = Tokenizer(folder)
    with torch.device("meta"):  # shapes only: memory is asked for when it is known to suffice
        model = Transformer(config).to(dtype).requires_grad_(False)
    files, views = weight_files(folder), hf_tensors(model)
    places = check_tensors(files, views, config.tied)
    embeddings = model.embed.weight.numel()
    size = (sum(p.numel() for p in model.parameters()) - embeddings) * (1 if quantize else dtype.itemsize)
    check_memory(size + embeddings * (dtype.itemsize + (config.tied and bool(quantize))), device, dtype, quantize)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Partial sums too, not only whole ones, are float32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    total = sum(math.prod(views[name].shape) * place.dtype.itemsize for name, place in places.items())
    with tqdm(desc="loading weights", total=total, unit="B", unit_scale=True, delay=1, leave=False) as bar:
        for i, block in enumerate(model.blocks):
            read_weights(places, block_tensors(config, i, block.to_empty(device=device)), bar)
            if quantize:  # block by block: the whole model is nowhere in 16 bits
                quantise(block)
        blocks, model.blocks = model.blocks, nn.ModuleList()
        model.to_empty(device=device)
        if config.tied:
            model.head.weight = model.embed.weight
        read_weights(places, hf_tensors(model), bar)
        if quantize:
            quantise(model)
        model.blocks = blocks
    if compile:
        model.compile_step()
    return model.eval(), tokenizer


def check_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError("compiling for a CPU needs a C++ compiler, and none was found: install g++ (or name one in the "
                        "environment variable CXX), or leave --compile out") from None


def choose(device: str | None, dtype: torch.dtype | str | None) -> tuple[torch.device, torch.dtype]:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError("unknown device: use cpu, cuda, or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {device}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:
        # bfloat16 halves the bytes, but is slower on a processor that has no instructions for it.
        cpuinfo = Path("/proc/cpuinfo")
        native = cpuinfo.exists() and re.search("avx512_bf16|amx_bf16", cpuinfo.read_text())
        dtype = torch.bfloat16 if device.type == "cuda" or native else torch.float32
    if isinstance(dtype, str):
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(dtype)
    if dtype is None:
        raise UserError("unknown dtype: use bfloat16, float16, or float32")
    return device, dtype


def find_folder(name: str) -> Path:
    """The folder of a model's files, downloaded first where `name` is no folder.  What is in the cache works offline."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError) as error:  # a name that no file can have, a home folder of nobody
        raise UserError(f"no folder {name[:80]} ({error})") from None
    repo = ALIASES.get(name.lower(), name)
    if path.is_absolute() or name.startswith(".") or repo.count("/") > 1:
        raise UserError(f"no folder {name}: pass a folder with config.json, tokenizer.json and *.safetensors")
    if "/" not in repo:
        near = difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.3)
        raise UserError(f"unknown model {name}: nearest aliases are {', '.join(near) or ', '.join(ALIASES)}; "
                        "or pass a Hugging Face id (owner/name) or a folder")
    try:
        return Path(huggingface_hub.snapshot_download(
            repo, allow_patterns=["*.safetensors", "*.json", "chat_template.jinja"],
            ignore_patterns=["*/*", "consolidated*"]))  # other formats' folders, and Mistral's second copy
    except hub_errors.GatedRepoError:
        raise UserError(f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then run `hf auth login`; "
                        "or pass a folder") from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise UserError(f"no repository {repo} on Hugging Face (misspelt, or private: run `hf auth login`); "
                        "or pass a folder") from None
    except Exception as error:  # noqa: BLE001 (no network, no space, a broken transfer: the classes change with the library)
        raise UserError(f"cannot download {repo}, and it is not in the cache ({type(error).__name__}): "
                        "check the network, or pass a folder") from None


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return content


def read_config(folder: Path) -> Config:
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos_ids = set()
    for source in (config, read_json(generation) if generation.exists() else {}):
        ids = source.get("eos_token_id")
        eos_ids |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    try:
        return Config.from_json(config, tuple(sorted(eos_ids)))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map of file names: download it again")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} names files outside its folder: refused")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise UserError(f"{folder}: {len(missing)} of {len(names)} shards missing, first {missing[0]}: download again")
        if names:
            return [folder / name for name in names]
    if files := sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated")):
        return files
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)):
        raise UserError(f"{folder} has only pickle weights ({pickles[0]}): refused, since a pickle can run any code; "
                        "use a safetensors copy")
    raise UserError(f"{folder} has no *.safetensors weights")


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its Hugging Face name, as a view into the model's own (fused) parameters.

    Writing to a view loads the model; saving the views saves it.
    """
    views = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if not model.config.tied:
        views["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        views |= block_tensors(model.config, i, block)
    return views


def block_tensors(c: Config, i: int, block: Block) -> dict[str, Tensor]:
    """Those of layer i."""
    p, q, kv = f"model.layers.{i}.", c.heads * c.head_dim, c.kv_heads * c.head_dim
    views = {p + "input_layernorm.weight": block.norm1.weight, p + "post_attention_layernorm.weight": block.norm2.weight}

    def split(linear: nn.Linear, names: tuple[str, ...], sizes: list[int]) -> None:
        for kind, parameter in linear.named_parameters():  # weight, and bias where there is one
            views.update({f"{p}{name}_proj.{kind}": part for name, part in zip(names, parameter.split(sizes))})

    split(block.attention.qkv, ("self_attn.q", "self_attn.k", "self_attn.v"), [q, kv, kv])
    split(block.attention.o, ("self_attn.o",), [c.d])
    split(block.mlp.gate_up, ("mlp.gate", "mlp.up"), [c.ffn, c.ffn])
    split(block.mlp.down, ("mlp.down",), [c.d])
    if c.qk_norm:
        views[p + "self_attn.q_norm.weight"] = block.attention.q_norm.weight
        views[p + "self_attn.k_norm.weight"] = block.attention.k_norm.weight
    return views


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: byte `offset` of `file`."""

    file: Path
    offset: int
    dtype: torch.dtype


def check_tensors(files: list[Path], expected: dict[str, Tensor], tied: bool) -> dict[str, Place]:
    """Read the files' headers and compare every name and shape with the model's; nothing is read of the weights."""
    places, problems = {}, {"missing": [], "unexpected": [], "misshapen": []}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt"):  # checks the header, every offset and the file's length
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or corrupt ({error}): download it again") from None
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and tied):
                continue  # old Llama files store what config.json says; a tied head is the embedding matrix
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{file}: {name} is {entry['dtype']}; supported are bfloat16, float16, float32 weights")
            if name not in expected:
                problems["unexpected"].append(name)
            elif tuple(entry["shape"]) != tuple(expected[name].shape):
                problems["misshapen"].append(f"{name} {entry['shape']} instead of {list(expected[name].shape)}")
            places[name] = Place(file, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]])
    problems["missing"] = [name for name in expected if name not in places]
    if any(problems.values()):
        said = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for what, names in problems.items() if names]
        raise UserError(f"{files[0].parent}: the tensors are not those of config.json: {'; '.join(said)}")
    return places


def free_memory(device: torch.device) -> float:
    """Bytes that can be had on the device; infinite where the system does not tell."""
    if device.type == "cuda":  # what PyTorch keeps for itself without using it is free, too
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    return int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024 if meminfo.exists() else math.inf


def check_memory(needed: int, device: torch.device, dtype: torch.dtype, quantize: str | None) -> None:
    if needed > (free := free_memory(device)):
        half = "" if quantize else "--quantize int8, " if dtype != torch.float32 else "--dtype bfloat16 (half of it), "
        other = "another --device" if device.type == "cuda" else "a machine with more"
        raise UserError(f"the weights need {needed / 1e9:.1f} GB in {quantize or str(dtype)[6:]}, {free / 1e9:.1f} GB are free on "
                        f"{device}: use {half}a smaller --model, or {other}")


def read_weights(places: dict[str, Place], views: dict[str, Tensor], bar: tqdm, chunk: int = 1 << 26) -> None:
    """Copy tensors from their files into the model, `chunk` bytes at a time.

    Plain reads, not a memory map: mapped pages count as the process's memory until unmapped.  On a CPU, where the dtype
    is the file's, bytes go straight to their place; otherwise through a staging buffer, for CUDA one that it copies from.
    """
    on_cpu = next(iter(views.values())).device.type == "cpu"
    stage = None
    for name, view in sorted(views.items(), key=lambda item: (places[item[0]].file, places[item[0]].offset)):
        place, target = places[name], view.view(-1)
        with open(place.file, "rb", buffering=0) as f:
            f.seek(place.offset)
            for part in target.split(chunk // place.dtype.itemsize):
                direct = on_cpu and part.dtype == place.dtype
                if not direct and stage is None:
                    stage = torch.empty(chunk, dtype=torch.uint8, pin_memory=not on_cpu)
                raw = part.view(torch.uint8) if direct else stage[: part.numel() * place.dtype.itemsize]
                if f.readinto(raw.numpy()) != raw.numel():
                    raise UserError(f"{place.file} ended early: download it again")
                if not direct:
                    part.copy_(raw.view(place.dtype))
                bar.update(raw.numel())
