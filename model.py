"""A Llama/Qwen transformer that is driven by embeddings: from a model's name to its logits.

    model, tokenizer = load("qwen2.5-7b")                     # alias, Hugging Face id, or folder
    hidden = model(model.embed(torch.tensor([[1, 2, 3]])))    # [1, 3] -> [1, 3, d] -> [1, 3, d]
    logits = model.logits(hidden[:, -1])                      # [1, d] -> float32 [1, V]

In this order: Config, Transformer, KVCache, decode, Tokenizer, load. B rows, T positions, d model
width, H query and K key-value heads, h head width, V vocabulary, S positions that attention reads.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import huggingface_hub
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox
from safetensors import safe_open
from torch import Tensor, nn

KINDS = ("llama", "qwen2", "qwen3", "mistral")  # architectures
NOT_FINITE = "not finite: its weights are damaged, or float16 overflows (use --dtype bfloat16)"


class UserError(Exception):
    """A mistake the user can fix: one line that names the thing and the remedy."""


@dataclass(frozen=True)
class Config:  # what the transformer needs to know of a config.json
    model_type: str
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
    attention_bias: bool
    mlp_bias: bool
    eos_ids: tuple[int, ...] = ()


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """Frequencies of the rotary embedding, float32 [h/2], and the factor on cosines and sines."""
    # RoFormer 2104.09864; linear: 2306.15595; YaRN: 2309.00071; llama3: Meta's Llama 3.1 code.
    h, base, rope = config.head_dim, config.rope_theta, config.rope
    freq = 1.0 / base ** (torch.arange(0, h, 2, dtype=torch.float32, device="cpu") / h)
    s = 1.0 if rope["rope_type"] == "default" else rope["factor"]
    if rope["rope_type"] in ("default", "linear"):
        return freq / s, 1.0
    original = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        # Wavelengths under original / high stay, over original / low are stretched s times.
        turns = original * freq / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / s, 1.0
    # The ramp lies between the pairs that turn so often in the old context; h - 1: YaRN's code.
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    first, last = (h * math.log(original / (n * 2 * math.pi)) / (2 * math.log(base)) for n in turns)
    first, last = max(math.floor(first), 0), min(math.ceil(last), h - 1)
    index = torch.arange(h // 2, device="cpu") - first
    stretch = (index / max(last - first, 0.001)).clamp(0, 1)
    factor = rope.get("attention_factor") or (0.1 * math.log(s) + 1 if s > 1 else 1.0)
    return stretch * freq / s + (1 - stretch) * freq, factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs half a head apart: (x1 cos - x2 sin, x2 cos + x1 sin); sin carries the minus."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [B, T, H, h], k and v [B, S, K, h] -> [B, T, H, h]. Causal where no mask is given."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped, causal = q.shape[1] != k.shape[1], mask is None  # grouped: H / K queries share keys
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.h, qwen2 = c.head_dim, c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.d, c.heads * self.h, bias=c.attention_bias or qwen2)
        self.k_proj = nn.Linear(c.d, c.kv_heads * self.h, bias=c.attention_bias or qwen2)
        self.v_proj = nn.Linear(c.d, c.kv_heads * self.h, bias=c.attention_bias or qwen2)
        self.o_proj = nn.Linear(c.heads * self.h, c.d, bias=c.attention_bias and not qwen2)
        if c.model_type == "qwen3":
            self.q_norm = nn.RMSNorm(self.h, c.norm_eps)
            self.k_norm = nn.RMSNorm(self.h, c.norm_eps)

    def forward(self, x: Tensor, rotation: tuple, layer: int, cache: "KVCache | None") -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.h) for f in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = causal_attention(q, k, v) if cache is None else cache.attend(layer, q, k, v)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.d, c.ffn, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.d, c.ffn, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.ffn, c.d, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(c.d, c.norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(c.d, c.norm_eps), MLP(c)

    def forward(self, x: Tensor, rotation: tuple, layer: int, cache: "KVCache | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embeddings in, hidden states out; differentiable. Modules are named as in checkpoints."""

    # Set by lab/fast.py, which may replace `step` too:
    planner: Callable | None = None  # refuses rows that do not fit in memory
    recorder: Callable | None = None  # a step that is recorded once and replayed
    agree: Callable | None = None  # one process decides a step for all
    attention: Callable | None = None  # a kernel, in place of masked_attention

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.d)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        if not weight.is_meta:  # drawing it on meta would import sympy for a second
            self.embed_tokens.reset_parameters()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d, config.norm_eps)
        self.lm_head = nn.Linear(config.d, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        freq, self.scale = rope_frequencies(config)
        self.freq = torch.cat([-freq, freq])  # [h], always float32: cos is even, sin takes the sign

    @property
    def embed(self) -> nn.Embedding:  # LongTensor [...] -> [..., d]
        return self.embed_tokens

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, embeds: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Hidden states after the final norm: [B, T, d] -> [B, T, d]; causal, padding on the right.

        With a cache of B rows, reserved for T more positions, each goes on from where it stands.
        """
        T = embeds.shape[1]
        positions = cache.advance(T) if cache else torch.arange(T, device=embeds.device)[None]
        x, rotation = embeds, self.rotation(positions)
        for layer, block in enumerate(self.layers):
            x = block(x, rotation, layer, cache)
        return self.norm(x)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at positions [B, T]: float32 [B, T, 1, h], half of sin negated."""
        self.freq = self.freq.to(positions.device)
        # Float32's cosine may depend, in its last bit, on which others share a vector (on ARM).
        angles = (positions[:, :, None, None] * self.freq).double()
        return (angles.cos() * self.scale).float(), (angles.sin() * self.scale).float()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> float32 [..., V] (float64 from float64)."""
        return self.lm_head(hidden).to(torch.promote_types(hidden.dtype, torch.float32))

    def step(self, embeds: Tensor, cache: "KVCache") -> tuple[Tensor, Tensor]:
        """Each row goes on by one embedding: [B, d] -> hidden [B, d], float32 logits [B, V]."""
        hidden = self(embeds[:, None], cache)[:, 0]
        return hidden, self.logits(hidden)

    def plan(self, rows: int, prompt: int, new: int) -> int:
        """The rows; UserError of the planner where so many positions in each do not fit."""
        return self.planner(self, rows, prompt, new) if self.planner else rows


def masked_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Queries [B, T, H, h] over the first S positions of a cache's k, v [B, K, capacity, h]."""
    # mask [B, 1, G T, S]: 0, or -inf for what a query does not see. positions [B, T], the last that
    # it sees, are for kernels. A group's G heads stand where positions would: keys are read once.
    (B, T, H, h), K, S = q.shape, k.shape[1], mask.shape[-1]
    q = q.view(B, T, K, -1, h).permute(0, 2, 3, 1, 4).reshape(B, K, -1, h)
    y = F.scaled_dot_product_attention(q, k[:, :, :S], v[:, :, :S], attn_mask=mask)
    return y.view(B, K, -1, T, h).permute(0, 3, 1, 2, 4).reshape(B, T, H, h)


class KVCache:
    """Keys and values of `rows` sequences, each at its own length: [rows, K, capacity, h] a layer.

    Before a pass, reserve(the longest length after it): attention reads the first S positions, that
    rounded up. So shapes are few. empty: no row has begun. live [rows]: steps may skip others.
    """

    def __init__(self, model: Transformer, rows: int, capacity: int):
        c, weight = model.config, model.embed.weight
        self.K, self.G = c.kv_heads, c.heads // c.kv_heads  # G query heads share keys and values
        self.rows, self.live = torch.arange(rows, device=weight.device)[:, None], None
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)
        # Zeros, because what is masked is still multiplied (by 0), and 0 * NaN is NaN.
        shape = (rows, self.K, self.rounded(capacity, weight.device) + 1, c.head_dim)
        self.keys, self.values = ([weight.new_zeros(shape) for _ in model.layers] for _ in range(2))
        self.S, self.empty, self.mask, self.positions = 0, True, None, None
        self.attention, self.most = model.attention or masked_attention, 0
        self.checked = weight.device.type == "cpu" and not model.recorder  # else it would wait

    @staticmethod
    def rounded(longest: int, device: torch.device) -> int:
        """S: on a CPU eight sizes a doubling, multiples of 64; on CUDA four, multiples of 256."""
        least, parts = (64, 8) if device.type == "cpu" else (256, 4)
        step = max(least, (1 << longest.bit_length()) // (2 * parts))
        return -(-longest // step) * step

    def reserve(self, longest: int) -> None:
        """Have room for rows of up to that many positions; grows to twice, `most` at most."""
        self.S, old = self.rounded(longest, self.lengths.device), self.keys[0].shape[2]
        # One more, never read: if attention read whole tensors, it would be compiled anew.
        room = max(self.S, min(2 * old, self.rounded(self.most, self.lengths.device))) + 1
        for tensors in (self.keys, self.values) if self.S >= old else ():
            for layer, x in enumerate(tensors):  # one by one: only one of them is there twice
                tensors[layer] = x.new_zeros(len(x), self.K, room, x.shape[3])
                tensors[layer][:, :, :old] = x

    def take(self, row: int, source: "KVCache | None", T: int) -> None:
        """Begin a row with the first T positions of another cache's only row; None: with none."""
        self.reserve(T)
        for layer, x in enumerate(self.keys + self.values):
            x[row] = 0  # what is behind T is masked, but a NaN would not be
            if source:
                x[row, :, :T] = (source.keys + source.values)[layer][0, :, :T]
        self.lengths[row], self.empty = T, self.empty and T == 0

    def advance(self, T: int) -> Tensor:
        """Every row is T positions longer: the new positions, LongTensor [rows, T]."""
        steps = torch.arange(self.S, device=self.lengths.device)
        self.positions, self.mask = self.lengths[:, None] + steps[:T], None
        self.lengths += T
        if self.checked and self.lengths.max() > self.S:
            raise ValueError("no room: reserve(longest length after the pass) before it")
        if T == 1 or not self.empty:  # a first pass is causal without a mask
            later = steps > self.positions.repeat(1, self.G)[:, None, :, None]  # [rows, 1, G T, S]
            self.mask = self.keys[0].new_zeros(later.shape).masked_fill_(later, -math.inf)
        self.empty = False
        return self.positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v [rows, T, K, h]; attend with q [rows, T, H, h]: [rows, T, H, h]."""
        for x, new in ((self.keys[layer], k), (self.values[layer], v)):
            x.transpose(1, 2).index_put_((self.rows, self.positions), new)
        if self.mask is None:  # not every kernel has groups of heads: all scores would be kept
            return causal_attention(q, *(x.repeat_interleave(self.G, 2) for x in (k, v)))
        return self.attention(q, self.keys[layer], self.values[layer], self.positions, self.mask)


@dataclass(eq=False)
class Prompt:
    """Embeddings that requests begin with. All but the last are prefilled, once for all of them."""

    FIRST, CHUNK = 4096, 512  # positions of the first pass, which needs no mask, and of later ones
    embeds: Tensor  # [T, d], T >= 1
    like: "Prompt | None" = None  # a prefilled one: what both begin with is taken from it
    cache: KVCache | None = None  # their keys and values, one row
    done: int = 0  # positions that are in it

    @property
    def ready(self) -> bool:
        return self.done == len(self.embeds) - 1

    def prefill(self, model: Transformer) -> int:
        """Prefill the next chunk; how many positions it had."""
        if self.cache is None:
            self.cache = KVCache(model, 1, len(self.embeds) - 1)
            if self.like:
                n = min(self.like.done, len(self.embeds) - 2)
                alike = (self.embeds[:n] == self.like.embeds[:n]).all(-1)
                self.done = int(alike.cumprod(0).sum())
                self.cache.take(0, self.like.cache, self.done)
                self.like = None  # its memory is free
        chunk = self.embeds[self.done : -1][: self.CHUNK if self.done else self.FIRST]
        self.cache.reserve(self.done + len(chunk))
        if not model(chunk[None], self.cache).isfinite().all():
            raise UserError(f"the model's hidden states are {NOT_FINITE}")
        self.done += len(chunk)
        return len(chunk)


@dataclass(eq=False)
class Request:  # one sequence for decode
    prompt: Prompt
    seeds: tuple[int, ...] = (0,)
    data: Any = None  # the caller's
    rng: np.random.Generator | None = None  # made by decode of the seeds: the row's randomness


@dataclass(eq=False)
class Output:  # what came of a request
    request: Request  # with its prompt's keys and values: keep an Output no longer than needed
    ids: list[int]  # tokens, the end-of-sequence token included
    notes: list[Tensor]  # of the method, each [len(ids), ...]; for autograd, clone() them
    seconds: float  # since its prompt was ready
    finite: bool  # False: its last step's logits were not, and ended it


@dataclass(eq=False)
class At:  # where each row stands: what a method is shown beside the logits
    t: Tensor  # LongTensor [rows]: tokens so far
    live: Tensor  # bool [rows]: in use
    u: Tensor | None = None  # float32 [rows]: this step's uniform draw from [0, 1)
    hidden: Tensor | None = None  # [rows, d]: the last hidden state


@torch.inference_mode()
def decode(
    model: Transformer,
    requests: Iterable[Request | None],
    method: Any,
    rows: int,
    max_new_tokens: int,
    keep: int = 0,
    watch: Callable | None = None,
) -> Iterator[Output]:
    """Decode requests in `rows` slots; yields each Output as soon as it is finished.

    A method keeps its state per row, on the device, and has two functions:

        method.begin(row, request)    a request has taken this row
        method.step(logits, at) -> token [rows], embeds [rows, d], *notes

    logits are float32 [rows, V], of unused rows too; token, a LongTensor, is the step's name: it is
    recorded, and an end-of-sequence id ends its row; embeds its content, fed next; the first `keep`
    notes [rows, ...] are kept. A method that needs the host in its steps has method.host = True.

    A free slot takes the next request at once; None: there is none before the next step, or, if no
    slot is in use, the end. Neither slot nor neighbours change a bit of what a request yields where
    products give equal rows equal bits (README, Limits). watch(token, *kept notes): slot 0's steps.
    """
    c, device, N = model.config, model.device, min(max_new_tokens, model.config.context)
    cache, every = KVCache(model, rows, 256), torch.arange(rows, device=device)
    embeds = model.embed.weight.new_zeros(rows, c.d)  # what each row is fed next
    at = At(t=torch.zeros_like(every), live=torch.zeros_like(every, dtype=torch.bool))
    cache.live, eos = at.live, torch.tensor(c.eos_ids, device=device)
    # Per step; the last place is for rows that have ended.
    u = torch.zeros(rows, N + 1, device=device)
    tokens, limit = every.new_zeros(rows, N + 1), every.new_zeros(rows)
    kept: list[Tensor] = []

    def step() -> Tensor:
        """One position further in every row: all on the device, nothing waits for it. -> live"""
        at.u = u[every, at.t]
        at.hidden, logits = model.step(embeds, cache)
        known = logits.sum(-1).isfinite()  # or else the row ends; the method sees finite ones
        decided = known, *method.step(logits.nan_to_num_(0, 0, 0), at)
        known, token, following, *notes = model.agree(decided) if model.agree else decided
        token = token.masked_fill(~known, (c.eos_ids or (0,))[0])
        limit.masked_fill_(at.live & ~known, -1)
        if not kept:
            kept.extend(x.new_zeros(rows, N + 1, *x.shape[1:]) for x in notes[:keep])
        for buffer, x in zip((tokens, *kept), (token, *notes)):
            buffer[every, at.t] = x
        embeds.copy_(following)
        at.t.add_(at.live)
        at.live.logical_and_(~((token[:, None] == eos).any(-1) | (at.t >= limit)))
        cache.lengths.mul_(at.live)  # what is not in use stays at the first position
        return at.live

    recorded = model.recorder and not getattr(method, "host", False)
    replay = model.recorder(model, step, cache, at.live) if recorded else None
    late = replay.late if replay else 0  # steps after which the end of a sequence is noticed
    slots, lengths, started = [None] * rows, [0] * rows, [0.0] * rows
    waiting, coming = iter(requests), None
    while True:
        budget = Prompt.CHUNK  # prompt positions before the next step; one pass may be longer
        while None in slots and (budget > 0 or not any(slots)):
            coming = coming or next(waiting, None)
            if coming is None:
                break
            if not coming.prompt.ready:
                budget -= coming.prompt.prefill(model)
                continue
            row, T = slots.index(None), len(coming.prompt.embeds) - 1
            cache.most = max(cache.most, min(T + 1 + N, c.context))  # positions that a row may need
            cache.take(row, coming.prompt.cache, T)
            coming.rng = np.random.default_rng(coming.seeds)
            u[row] = torch.from_numpy(coming.rng.random(N + 1, dtype=np.float32))
            embeds[row], at.live[row], at.t[row] = coming.prompt.embeds[-1], True, 0
            limit[row] = max(0, min(N, c.context - len(coming.prompt.embeds)))
            slots[row], lengths[row], started[row] = coming, T, time.perf_counter()
            method.begin(row, coming)
            coming = None
        if not any(slots):
            return
        lengths = [n + 1 if request else 0 for n, request in zip(lengths, slots)]
        cache.reserve(max(lengths))
        seen = int(at.t[0]) if watch else 0
        alive = replay() if replay else step().tolist()
        if watch and int(at.t[0]) > seen:
            watch(*(buffer[0, seen].clone() for buffer in (tokens, *kept)))
        for row, request in enumerate(slots):
            # `alive` is `late` steps old: in a request's first steps it tells of the one before.
            if request and not alive[row] and lengths[row] >= len(request.prompt.embeds) + late:
                t, elapsed = int(at.t[row]), time.perf_counter() - started[row]
                notes, finite = [x[row, :t].clone() for x in kept], bool(limit[row] >= 0)
                yield Output(request, tokens[row, :t].tolist(), notes, elapsed, finite)
                slots[row] = None


def draw(probs: Tensor, u: Tensor, ids: Tensor | None = None) -> Tensor:
    """Ordinary sampling: one of ids [B, n] (None: 0 to n - 1) by probs [B, n], of any sum, -> [B].

    u [B] is uniform on [0, 1): the distribution function of each row is inverted.
    """
    mass = probs.cumsum(-1)
    index = (mass <= u[:, None] * mass[:, -1:]).sum(-1)
    return index if ids is None else ids.gather(-1, index[:, None])[:, 0]


def check_truncation(
    t: float, top_k: int, top_p: float, min_p: float, max_topk: int = 1, prefix: str = ""
) -> None:
    """ValueError for a temperature or a cut of the distribution that is out of range."""
    for name, value, fits, wanted in (
        ("temperature", f"{t} (for argmax use method greedy)", 1e-30 <= t <= 1e30, "above 0"),
        ("top_k", top_k, top_k >= 0, "at least 1, or 0 for all tokens"),
        ("top_p", top_p, 1e-30 <= top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "between 0 and 1"),
        ("max_topk", max_topk, max_topk >= 1, "at least 1"),
    ):
        if not fits:
            raise ValueError(f"{prefix}{name} must be {wanted}, not {value}")


def check_ranges(settings: Any, positive: str, **least: float) -> None:
    """ValueError unless fields are above 0 (`positive`), at least a number, of their Literal."""
    values = vars(settings)
    ranges = [(name, 1e-30, 1e30, "above 0") for name in positive.split()]
    ranges += [(name, low, 2**31, f"at least {low}") for name, low in least.items()]
    for name, low, high, wanted in ranges:
        if not low <= values[name] <= high:
            raise ValueError(f"{name} must be {wanted}, not {values[name]} ({low} to {high})")
    for name, hint in get_type_hints(type(settings)).items():
        known = [x for kind in (hint, *get_args(hint)) for x in get_args(kind)]
        if isinstance(values[name], str) and values[name] not in known:
            raise ValueError(f"{name} must be of {hint}, not {values[name]!r}")


def text_seed(text: str) -> int:
    """A number made of a text: a question's draws depend on it, and not on its place in a list."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class Tokenizer:
    """Text to ids and back, no token added or left out, and chats by the model's own template."""

    def __init__(self, folder: Path):
        self.core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.core.no_truncation()
        self.core.no_padding()
        file, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        text = config.get("chat_template")
        if isinstance(text, list):  # several, by name
            text = {t["name"]: t["template"] for t in text}.get("default")
        if jinja.exists():
            text = jinja.read_text(encoding="utf-8", errors="replace")
        # bos_token, eos_token, ...: templates ask for them by these names.
        tokens = {k: v for k, v in config.items() if k.endswith("_token") and v and v is not True}
        self.special = {k: v["content"] if isinstance(v, dict) else v for k, v in tokens.items()}
        # {% generation %}: what is learned from, for training tools. A block of its own, like with.
        text = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", text or "")
        # Anybody can write a template: it runs in the sandbox, without Python's internals.
        env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False} | how)
        env.globals |= {"raise_exception": refuse_chat, "strftime_now": time.strftime}
        self.template = env.from_string(text) if text else None

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.core.decode(ids, skip_special_tokens=False)

    def render(self, messages: str | list[dict], **arguments: Any) -> str:
        """The prompt as text: a chat that is ready to be answered. A str is one user message."""
        if self.template is None:
            raise UserError("no chat template (a base model?): use an instruct or reasoning model")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        usual = {"tools": None, "documents": None, "add_generation_prompt": True} | self.special
        try:
            return self.template.render(messages=messages, **usual | arguments)
        except Exception as error:  # noqa: BLE001 (somebody else's program can raise anything)
            raise UserError(f"the chat template refuses these messages: {error}") from None

    def chat(self, messages: str | list[dict], **template_arguments: Any) -> list[int]:
        """Token ids of `render`; template arguments such as enable_thinking=False."""
        return self.encode(self.render(messages, **template_arguments))

    def open(self, message: str) -> str:
        """The chat of one message as text; a model that has a token for <think> begins to think."""
        text = self.render(message, date_string="26 Jul 2024")  # some templates print today's date
        text = re.sub(r"<think>\s*</think>\s*$", "", text)  # of a template that skips the thought
        thinks = self.core.token_to_id("<think>") is not None
        return text if text.rstrip().endswith("<think>") or not thinks else text + "<think>\n"

    def automaton(self, text: str, vocab_size: int) -> Tensor:
        """Recognises a text in a stream of tokens: uint8 [len(text), V], next = table[matched, id].

        `matched` counts the characters of the text that the stream ends with; a token may run past
        its end. The text's first character may not come again in it.
        """
        table = torch.zeros(len(text), vocab_size, dtype=torch.uint8)
        if (whole := self.core.token_to_id(text)) is not None:
            table[:, whole] = len(text)
            return table
        for token, i in self.core.get_vocab().items():  # in pieces, ASCII stands for itself
            for matched in range(len(text)):
                if i < vocab_size and (token[:1] == text[matched] or text[0] in token):
                    seen = text[:matched] + token
                    ends = [m for m in range(len(text)) if seen.endswith(text[:m])]
                    table[matched, i] = len(text) if text in seen else max(ends)
        return table


def refuse_chat(message: str) -> None:
    raise UserError(message)


def split_thought(text: str) -> tuple[str, str]:
    """(thought, what is said after it); a model without thinking tokens only says."""
    thought, marker, said = text.rpartition("</think>")
    return (thought.removeprefix("<think>").strip(), said.strip()) if marker else ("", text.strip())


def check_prompt(c: Config, ids: list[int], question: str = "", whose: str = "the") -> None:
    """UserError where a prompt fills the context window or leaves the vocabulary."""
    if len(ids) >= c.context:
        of = f" (of the question {question[:60]!r})" if question else ""
        found = f"{len(ids)} tokens, the context window {c.context}{of}"
        raise UserError(f"{whose} prompt has {found}: shorten it")
    if max(ids) >= c.vocab_size:
        found = f"id {max(ids)}, the model has {c.vocab_size} embeddings"
        raise UserError(f"{whose} tokenizer gives {found}: it is of another model")


R1 = ("Qwen-1.5", "Qwen-7", "Qwen-14", "Qwen-32", "Llama-8", "Llama-70")
LLAMA, SMOLLM = ("3.1-8", "3.2-1", "3.2-3", "3.3-70"), ("135M", "360M", "1.7B")
ALIASES = {
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in (0.5, 1.5, 3, 7, 14, 32, 72)},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in (0.6, 1.7, 4, 8, 14, 32)},
    "qwq-32b": "Qwen/QwQ-32B",
    **{f"r1-{x.lower()}b": f"deepseek-ai/DeepSeek-R1-Distill-{x}B" for x in R1},
    **{f"llama-{x}b": f"meta-llama/Llama-{x}B-Instruct" for x in LLAMA},
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    **{f"smollm2-{x.lower()}": f"HuggingFaceTB/SmolLM2-{x}-Instruct" for x in SMOLLM},
}
FILES = ["*.safetensors", "*.json", "chat_template.jinja"]  # not in folders of other formats
WANTED = {"allow_patterns": FILES, "ignore_patterns": ["*/*", "consolidated*"]}  # a second copy


def load(
    name: str, device: str | None = None, dtype: Any = None, convert: Callable | None = None
) -> tuple[Transformer, Tokenizer]:
    """A model, its weights frozen, and its tokenizer by alias, Hugging Face id, or local folder.

    device: by default CUDA where there is one. dtype: torch's or its name; by default bfloat16 on
    CUDA and on processors that multiply it natively, else float32. convert(block) is called as each
    block has its weights. UserError for what is not computed here, and tensors unlike config.json.
    """
    device, dtype = choose(device, dtype)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = Path(huggingface_hub.snapshot_download(ALIASES.get(name.lower(), name), **WANTED))
    config, tokenizer = read_config(folder), Tokenizer(folder)
    with torch.device("meta"):  # shapes only
        model = Transformer(config).to(dtype).requires_grad_(False)
    files = tensor_files(folder, model)
    if device.type == "cuda":  # there partial sums, too, shall be float32
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    for i, block in enumerate(model.layers):
        read_weights(block.to_empty(device=device), f"layers.{i}.", files)
        if convert:
            convert(block)
    blocks, model.layers = model.layers, nn.ModuleList()
    model.to_empty(device=device)
    if config.tied:
        model.lm_head.weight = model.embed.weight
    read_weights(model, "", files)
    model.layers = blocks
    return model.eval(), tokenizer


def choose(device: str | None, dtype: torch.dtype | str | None) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that `load` uses."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:  # bfloat16 halves the bytes, but not every processor multiplies it
        cpuinfo = Path("/proc/cpuinfo")
        native = cpuinfo.exists() and re.search("avx512_bf16|amx_bf16", cpuinfo.read_text())
        dtype = torch.bfloat16 if device.type == "cuda" or native else torch.float32
    return device, getattr(torch, dtype) if isinstance(dtype, str) else dtype


def read_config(folder: Path) -> Config:
    """config.json, and the end-of-sequence ids of generation_config.json too."""
    files, eos_ids = [folder / "config.json", folder / "generation_config.json"], set()
    sources = [json.loads(f.read_bytes()) for f in files if f == files[0] or f.exists()]
    for ids in (source.get("eos_token_id") for source in sources):
        eos_ids |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return config_from_json(sources[0], tuple(sorted(eos_ids)))


def config_from_json(c: dict, eos_ids: tuple[int, ...] = ()) -> Config:
    """Read a `config.json` of transformers 4 or 5; UserError for what is not computed here."""
    kind = c.get("model_type")
    require("architecture", kind or ", ".join(c.get("architectures") or ["nothing"]), *KINDS)
    if quantised := c.get("quantization_config"):
        found = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        require("quantisation", found, "bfloat16", "float16", "float32 weights")
    require("activation", c.get("hidden_act", "silu"), "silu")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    rope = {"rope_type": rope.get("type", "default")} | rope
    require("RoPE type", rope["rope_type"], "default", "linear", "llama3", "yarn")
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("unsupported RoPE: partial_rotary_factor other than 1")
    theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    heads, d, context = c["num_attention_heads"], c["hidden_size"], c["max_position_embeddings"]
    if rope["rope_type"] == "yarn":
        if odd := {"mscale", "mscale_all_dim", "truncate"} & rope.keys():
            raise UserError(f"unsupported YaRN option: found {', '.join(sorted(odd))}")
        rope.setdefault("original_max_position_embeddings", context)
        context = max(context, int(rope["factor"] * rope["original_max_position_embeddings"]))
    # A window as long as the context is no window. Only Mistral's is in force without a switch.
    window = c.get("use_sliding_window", kind == "mistral") and c.get("sliding_window")
    if window and window < context:
        require("attention", f"sliding window of {window} positions", "full attention")
    found = {"d": d, "ffn": c["intermediate_size"], "layers": c["num_hidden_layers"]}
    found |= {"vocab_size": c["vocab_size"], "norm_eps": c.get("rms_norm_eps", 1e-6)}
    found |= {"heads": heads, "kv_heads": c.get("num_key_value_heads") or heads, "rope": rope}
    found |= {"head_dim": c.get("head_dim") or d // heads, "rope_theta": float(theta)}
    found |= {"context": context, "tied": bool(c.get("tie_word_embeddings"))}
    bias = {key: bool(c.get(key)) for key in ("attention_bias", "mlp_bias")}
    return Config(kind, eos_ids=eos_ids, **found, **bias)


def require(what: str, found: Any, *supported: str) -> None:
    if found not in supported:
        raise UserError(f"unsupported {what}: found {found}; supported: {', '.join(supported)}")


def hf_name(name: str) -> str:  # of a parameter of Transformer, in a checkpoint
    return name if name.startswith("lm_head") else f"model.{name}"


def weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return [folder / Path(shard).name for shard in sorted(shards)]
    return sorted(path for path in folder.glob("*.safetensors") if "consolidated" not in path.name)


def tensor_files(folder: Path, model: Transformer) -> dict[str, Path]:
    """The file of each tensor. UserError unless they are exactly the model's, in its shapes."""
    shapes = {hf_name(name): list(p.shape) for name, p in model.named_parameters()}
    files = {}
    for path in weight_paths(folder):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (it is no dictionary)
                # Old files hold what config.json says too; a tied head is the embedding matrix.
                tied = name == "lm_head.weight" and model.config.tied
                if tied or name.endswith("rotary_emb.inv_freq"):
                    continue
                shape, dtype = f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()
                if shape != shapes.get(name) or dtype not in ("BF16", "F16", "F32"):
                    raise UserError(f"{path}: {name} is {dtype} {shape}, unlike config.json")
                files[name] = path
    if lacking := shapes.keys() - files.keys():
        raise UserError(f"{folder}: {len(lacking)} tensors missing, one is {min(lacking)}")
    return files


def read_weights(module: nn.Module, prefix: str, files: dict[str, Path]) -> None:
    """Copy tensors to their place; a file is mapped into memory for one tensor at a time."""
    for name, parameter in module.named_parameters():
        name = hf_name(prefix + name)
        with safe_open(files[name], "pt", device=str(parameter.device)) as f:
            parameter.copy_(f.get_tensor(name))
