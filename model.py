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
import json
import math
import re
from collections.abc import Iterable, Iterator
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., n] times weight [m, n] transposed -> [..., m].

    On a CPU PyTorch sums the products of a single row in another order than those of several.  A single row is therefore
    multiplied as two: then a row's bits (in bfloat16) do not depend on how many rows stand beside it.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]:
        return F.linear(torch.cat([x, x]), weight, bias)[:1]
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, K, T, h]
        if cache is None or cache.empty:
            if cache is not None:
                cache.write(layer, k, v)
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=H != K)  # [B, H, T, h]
            y = y.transpose(1, 2)
        else:  # T = 1: the H / K query heads of a group stand where positions would, so keys are read once for all
            cache.write(layer, k, v)
            k, v = cache.read(layer, B)  # [B, K, S, h]
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, h), k, v, attn_mask=cache.mask)
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


class Transformer(nn.Module):
    """Embeddings in, hidden states out; differentiable.  `model.embed(ids)` and `model.logits(hidden)` are its ends."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d)  # LongTensor [...] -> [..., d]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d, config.norm_eps)
        self.head = None if config.tied else Linear(config.d, config.vocab_size, bias=False)
        # cos and sin of every position so far, [positions, h].  No buffers: they stay float32 whatever the weights become.
        self.cos = self.sin = torch.empty(0, config.head_dim)

    def forward(self, embeds: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Hidden states after the final norm.

        embeds [B, T, d] -> [B, T, d] in the weights' dtype.  Causal from position 0.  Shorter rows are padded on the
        right with anything: causality keeps it from what stands before.  With a cache: an empty one takes in the T
        positions of a prompt; afterwards each of its first B rows goes on by one position (T = 1).
        """
        B, T, _ = embeds.shape
        if cache is None or cache.empty:
            positions, longest = torch.arange(T, device=embeds.device)[None], T  # [1, T]
        else:
            positions, longest = cache.advance(B), cache.S  # [B, 1]
        cos, sin = self.rotation(positions, longest)
        x = embeds
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, layer, cache)
        if cache is not None and cache.empty:
            cache.lengths.fill_(T)
            cache.host_lengths = [T] * len(cache.host_lengths)
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
        logits = linear(hidden, self.embed.weight if self.head is None else self.head.weight)
        return logits if logits.dtype == torch.float64 else logits.float()


# --------------------------------------------------------------------------------------------------------- decoding


class KVCache:
    """Keys and values of `rows` sequences, each at its own length; grows as they do.

    Per layer one tensor [2, rows, K, capacity, h].  Attention reads the first S positions of it, S being the longest
    length in use rounded up to a multiple of BLOCK.  The rounding keeps a row's arithmetic, hence its bits, the same
    whichever neighbours it has (in bfloat16 on a CPU; elsewhere matrix products of other sizes round otherwise).
    """

    BLOCK = 128

    def __init__(self, model: Transformer, rows: int, capacity: int):
        c, weight = model.config, model.embed.weight
        self.most = -(-c.context // self.BLOCK) * self.BLOCK  # positions that a row can ever hold
        self.shape = (2, rows, c.kv_heads, capacity, c.head_dim)
        # Zeros, because what is masked is still multiplied (by 0), and 0 times an uninitialised NaN is NaN.
        self.layers = [torch.zeros(self.shape, dtype=weight.dtype, device=weight.device) for _ in model.blocks]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.host_lengths = [0] * rows  # the same numbers, to be had without waiting for the device
        self.mask: Tensor | None = None

    @property
    def empty(self) -> bool:
        return not any(self.host_lengths)

    def advance(self, B: int) -> Tensor:
        """Make room for one position in each of the first B rows; their positions, LongTensor [B, 1]."""
        self.rows, self.positions = torch.arange(B, device=self.lengths.device), self.lengths[:B].clone()
        self.lengths[:B] += 1
        self.host_lengths[:B] = [n + 1 for n in self.host_lengths[:B]]
        self.S = -(-max(self.host_lengths[:B]) // self.BLOCK) * self.BLOCK
        self.grow(self.S)
        self.mask = (torch.arange(self.S, device=self.lengths.device) <= self.positions[:, None])[:, None, None]  # [B,1,1,S]
        return self.positions[:, None]

    def grow(self, capacity: int) -> None:
        """Have at least that capacity; doubling, so that copying costs little per token."""
        old = self.shape[3]
        if capacity <= old:
            return
        self.shape = (*self.shape[:3], max(capacity, min(2 * old, self.most)), self.shape[4])
        for layer, kv in enumerate(self.layers):
            self.layers[layer] = torch.zeros(self.shape, dtype=kv.dtype, device=kv.device)
            self.layers[layer][:, :, :, :old] = kv

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [B, K, T, h]: a whole prompt into an empty cache, or (T = 1) one position after `advance`."""
        keys, values = self.layers[layer]
        if self.empty:
            keys[:, :, : k.shape[2]], values[:, :, : v.shape[2]] = k, v
        else:
            keys[self.rows, :, self.positions], values[self.rows, :, self.positions] = k[:, :, 0], v[:, :, 0]

    def read(self, layer: int, B: int) -> Tensor:
        """Keys and values in use, [2, B, K, S, h]."""
        return self.layers[layer][:, :B, :, : self.S]

    def copy_row(self, source: "KVCache", from_row: int, to_row: int) -> None:
        """Take over one row of a cache, which may be this one."""
        T, before = source.host_lengths[from_row], self.host_lengths[to_row]
        self.grow(T)
        for mine, theirs in zip(self.layers, source.layers):
            mine[:, to_row, :, :T] = theirs[:, from_row, :, :T]
            mine[:, to_row, :, T:before] = 0  # what the row held before is masked, but a NaN in it would not be
        self.lengths[to_row], self.host_lengths[to_row] = T, T


@dataclass(eq=False)
class Prompt:
    """A prompt as embeddings [T, d].  However many requests begin with it, it is taken in once, by the first."""

    embeds: Tensor
    cache: KVCache | None = None  # its keys and values, one row
    logits: Tensor | None = None  # [1, V], what follows it

    def prefill(self, model: Transformer) -> None:
        if self.cache is None:
            self.cache = KVCache(model, 1, len(self.embeds))
            self.logits = model.logits(model(self.embeds[None], self.cache)[:, -1])
            if not self.logits.isfinite().all():
                raise UserError("the model's logits are not finite: its weights are damaged, or float16 overflows "
                                "(then use --dtype bfloat16)")


@dataclass(eq=False)
class Request:
    """One sequence for `decode`: how it begins, and whatever the method wants to find again."""

    prompt: Prompt
    data: Any = None


@torch.inference_mode()
def decode(model: Transformer, requests: Iterable[Request | None], method, rows: int) -> Iterator:
    """Decode requests, up to `rows` at a time, and yield `method.end(row)` for each as soon as it is finished.

    A free row takes the next request at once.  Where a request waits for the result of another, a generator may yield
    None: nothing at present, ask again after the next step.  Prompts are prefilled one by one, so their lengths may
    differ and nothing is padded; rows in use stay side by side, so a finished row costs nothing.

    A method keeps its own state per row and has four functions:
        method.begin(row, request)       a request has taken this row
        method.step(logits)              float32 [n, V] of rows 0..n-1 -> next embeddings [n, d], finished: bool [n]
        method.end(row)                  the row is finished: its result
        method.move(from_row, to_row)    what was one row is another now
    """
    cache = KVCache(model, rows, KVCache.BLOCK)
    logits = torch.empty(0, model.config.vocab_size, device=model.embed.weight.device)
    waiting, n = iter(requests), 0  # n rows are in use
    while True:
        while n < rows and (request := next(waiting, None)) is not None:
            request.prompt.prefill(model)
            cache.copy_row(request.prompt.cache, 0, n)
            logits = torch.cat([logits, request.prompt.logits])
            method.begin(n, request)
            n += 1
        if not n:
            return
        embeds, finished = method.step(logits)
        ended = finished.tolist()  # the one wait for the device in a step
        for row in (row for row in reversed(range(n)) if ended[row]):
            yield method.end(row)
            n -= 1
            if row < n:
                cache.copy_row(cache, n, row)
                method.move(n, row)
                embeds[row] = embeds[n]
        logits = model.logits(model(embeds[:n, None], cache)[:, 0]) if n else logits[:0]


def check_prompt(config: Config, ids: list[int], question: str = "") -> None:
    """UserError where a prompt fills the context window or leaves the vocabulary.  A question tells which of many it is."""
    if len(ids) >= config.context:
        which = f" (of the question {question[:60]!r})" if question else ""
        raise UserError(f"the prompt has {len(ids)} tokens, the context window {config.context}{which}: shorten it")
    if max(ids) >= config.vocab_size:
        raise UserError(f"the tokenizer gives id {max(ids)}, the model has {config.vocab_size} embeddings: "
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


def load(name: str, device: str | None = None, dtype: torch.dtype | str | None = None) -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer by alias, Hugging Face id, or local folder.

    device: "cpu", "cuda", "cuda:1"; by default CUDA where there is one.  dtype: "bfloat16", "float16", "float32" or the
    torch dtype; by default bfloat16 on CUDA and on processors that multiply it natively, else float32.
    Weights go from the file to the device in pieces; nothing of a model's own code is run.
    Raises UserError for whatever the user can mend.
    """
    device, dtype = choose(device, dtype)
    folder = find_folder(name)
    config = read_config(folder)
    tokenizer = Tokenizer(folder)
    with torch.device("meta"):  # shapes only: memory is asked for when it is known to suffice
        model = Transformer(config).to(dtype).requires_grad_(False)
    files = weight_files(folder)
    places = check_tensors(files, hf_tensors(model), config.tied)
    check_memory(sum(p.numel() for p in model.parameters()) * dtype.itemsize, device, dtype)
    if device.type == "cuda":  # partial sums too, not only whole ones, are float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    model.to_empty(device=device)
    read_weights(places, hf_tensors(model))
    return model.eval(), tokenizer


def choose(device: str | None, dtype: torch.dtype | str | None) -> tuple[torch.device, torch.dtype]:
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError("unknown device: use cpu, cuda, or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {device}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s)")
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
    c = model.config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    views = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        views["lm_head.weight"] = model.head.weight

    def split(linear: nn.Linear, names: tuple[str, ...], sizes: list[int]) -> None:
        for kind, parameter in linear.named_parameters():  # weight, and bias where there is one
            views.update({f"{name}.{kind}": part for name, part in zip(names, parameter.split(sizes))})

    for i, block in enumerate(model.blocks):
        p, attention, mlp = f"model.layers.{i}.", block.attention, block.mlp
        views[p + "input_layernorm.weight"] = block.norm1.weight
        views[p + "post_attention_layernorm.weight"] = block.norm2.weight
        split(attention.qkv, tuple(p + f"self_attn.{x}_proj" for x in "qkv"), [q, kv, kv])
        split(attention.o, (p + "self_attn.o_proj",), [c.d])
        split(mlp.gate_up, (p + "mlp.gate_proj", p + "mlp.up_proj"), [c.ffn, c.ffn])
        split(mlp.down, (p + "mlp.down_proj",), [c.d])
        if c.qk_norm:
            views[p + "self_attn.q_norm.weight"] = attention.q_norm.weight
            views[p + "self_attn.k_norm.weight"] = attention.k_norm.weight
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
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    return int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024 if meminfo.exists() else math.inf


def check_memory(needed: int, device: torch.device, dtype: torch.dtype) -> None:
    if needed > (free := free_memory(device)):
        half = "--dtype bfloat16 (half of it), " if dtype == torch.float32 else ""
        other = "another --device" if device.type == "cuda" else "a machine with more"
        raise UserError(f"the weights need {needed / 1e9:.1f} GB in {str(dtype)[6:]}, {free / 1e9:.1f} GB are free on "
                        f"{device}: use {half}a smaller --model, or {other}")


def read_weights(places: dict[str, Place], views: dict[str, Tensor], chunk: int = 1 << 26) -> None:
    """Copy each tensor from its file into the model, `chunk` bytes at a time.

    Plain reads, not a memory map: mapped pages count as the process's memory until unmapped.  On a CPU, where the dtype
    is the file's, bytes go straight to their place; otherwise through one staging buffer (pinned for CUDA).
    """
    on_cpu = next(iter(views.values())).device.type == "cpu"
    stage = torch.empty(chunk, dtype=torch.uint8, pin_memory=not on_cpu)
    total = sum(views[name].numel() * place.dtype.itemsize for name, place in places.items())
    with tqdm(desc="loading weights", total=total, unit="B", unit_scale=True, delay=1, leave=False) as bar:
        for name, place in sorted(places.items(), key=lambda item: (item[1].file, item[1].offset)):
            target = views[name].view(-1)
            with open(place.file, "rb", buffering=0) as f:
                f.seek(place.offset)
                for part in target.split(chunk // place.dtype.itemsize):
                    direct = on_cpu and part.dtype == place.dtype
                    raw = part.view(torch.uint8) if direct else stage[: part.numel() * place.dtype.itemsize]
                    if f.readinto(raw.numpy()) != raw.numel():
                        raise UserError(f"{place.file} ended early: download it again")
                    if not direct:
                        part.copy_(raw.view(place.dtype))
                    bar.update(raw.numel())
