"""SoftCoT: soft thoughts from a small frozen assistant, through one trained projection (Xu et al., arXiv 2502.12134).

    python softcot.py                                                              one problem, with and without thoughts
    python softcot.py train --model qwen2.5-7b --assistant qwen2.5-1.5b --task gsm8k --folder out
    python softcot.py eval --model qwen2.5-7b --assistant qwen2.5-1.5b --task gsm8k --projection out/projection.safetensors

    h = assistant(instruction, question, N placeholders)    final-norm hidden states at the placeholders, [N, d_a]
    T = h W^T + b                                           the soft thoughts, [N, d]
    input = E(left) T E(right)                              the LLM's prompt; left ends with the question
    loss = -sum_i log p(y_i | input, y_<i) / |y|            y: reasoning steps, answer, end of sequence, of all in a step

Both models are frozen; only W and b are trained, in float32 (AdamW without decay, gradients clipped to norm 1: what the
Trainer that the official code uses does by default).  The assistant is causal: h is computed once per problem, and its
first n rows are what n placeholders would give.  The LLM runs under autograd from the first thought on (for LoRA from the
start), and makes logits for the labels only.  Positions come from how a sequence is put together, never from counting back.  The official code
trains 32 thoughts and evaluates 4; ours evaluates as many as were trained, and says so where `eval --thoughts 4` asks
for others.

Baselines: zero-shot-cot; cot-unk (the placeholders' own embeddings, or a soft prompt trained in their place: `train
--method cot-unk`); assist-cot (N tokens that the assistant says, as a hint); lora (`train --method lora`).
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from textwrap import wrap

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tasks
from model import (
    ALIASES,
    KVCache,
    Prompt,
    Request,
    Tokenizer,
    Transformer,
    UserError,
    causal_attention,
    check_prompt,
    decode,
    hf_tensors,
    load,
)

# ------------------------------------------------------------------------------------------------------------ prompts

PROMPT_VERSION = 1  # of everything in this section; a projection remembers with which one it was trained
INSTRUCTION = "Note the steps.\n{question}"  # for the assistant
HINT = "{question}\nHint: {hint}"  # for assist-cot
SLOT = "\ue000soft thoughts\ue000"  # stands in the rendered chat where the thoughts go; private use: nobody types it


def placeholder(tokenizer: Tokenizer) -> int:
    """The id of [UNK], or of what the tokenizer has in its place."""
    for token in ("[UNK]", *(tokenizer.special.get(name) for name in ("unk_token", "pad_token", "eos_token"))):
        if token is not None and (i := tokenizer.core.token_to_id(token)) is not None:
            return i
    raise UserError("the tokenizer has no [UNK], unknown, padding or end token to hold a thought's place: use another model")


def split_at_slot(text: str) -> tuple[str, str]:
    if text.count(SLOT) != 1:
        raise UserError("the chat template does not repeat the user's message once, as it is: use another model")
    left, _, right = text.partition(SLOT)
    return left, right


def prompt_texts(tokenizer: Tokenizer, question: str, n: int) -> tuple[str, str]:
    """The LLM's chat, ready to be answered, before and after n thoughts; a model that knows <think> begins to think."""
    message = f"{question}\n{SLOT}" if n else question
    text = tokenizer.render(message, date_string="26 Jul 2024")  # some Llama templates would print today's date
    text = re.sub(r"<think>\s*</think>\s*$", "", text)  # a template that skips the thought is not followed in that
    if tokenizer.core.token_to_id("<think>") is not None and not text.rstrip().endswith("<think>"):
        text += "<think>\n"
    return split_at_slot(text) if n else (text, "")


def assistant_ids(tokenizer: Tokenizer, question: str, n: int) -> list[int]:
    """What the assistant reads, n placeholders last: it is causal, so what the template puts behind them is not needed."""
    text = tokenizer.render(INSTRUCTION.format(question=question) + "\n" + SLOT, date_string="26 Jul 2024")
    return tokenizer.encode(split_at_slot(text)[0]) + [placeholder(tokenizer)] * n


def target_text(tokenizer: Tokenizer, problem: tasks.Problem, boxed: bool) -> str:
    """y without its end-of-sequence token: steps and answer, in the form that the prompt asks for."""
    answer = f"The answer is \\boxed{{{problem.answer}}}." if boxed else f"The answer is {problem.answer}."
    if tokenizer.core.token_to_id("</think>") is not None:
        return f"{' '.join(problem.steps)}</think>{answer}"
    return "\n".join([*problem.steps, answer])


def split_thought(text: str) -> tuple[str, str]:
    """(thought, what is said after it); a model without thinking tokens only says."""
    thought, marker, said = text.rpartition("</think>")
    return (thought.removeprefix("<think>").strip(), said.strip()) if marker else ("", text.strip())


@dataclass(frozen=True)
class Sequence:
    """Token ids of the LLM's input: left, n placeholders where the thoughts go, right; in training then the labels y."""

    left: list[int]
    n: int
    right: list[int]
    labels: list[int]
    unk: int

    @property
    def ids(self) -> list[int]:
        return self.left + [self.unk] * self.n + self.right + self.labels

    @property
    def prompt(self) -> int:
        """Length of the prompt: the first label's position."""
        return len(self.left) + self.n + len(self.right)


def sequence(tokenizer: Tokenizer, question: str, n: int, labels: list[int]) -> Sequence:
    left, right = prompt_texts(tokenizer, question, n)
    if not n:
        return Sequence(tokenizer.encode(left), 0, [], labels, 0)
    # Right is encoded behind a placeholder, as it will stand: some tokenizers put a space before a text's first word.
    unk = placeholder(tokenizer)
    first, *behind = tokenizer.encode(tokenizer.core.id_to_token(unk) + right)
    assert first == unk
    return Sequence(tokenizer.encode(left), n, behind, labels, unk)


# --------------------------------------------------------------------------------------- soft thoughts and their loss


@torch.no_grad()
def hidden_states(assistant: Transformer, ids: list[list[int]], n: int, out: Tensor, batch_tokens: int = 8192) -> Tensor:
    """h: the assistant's final-norm hidden states at the last n positions of each row, into out [rows, n, d_a].

    Rows of similar length share a batch, padded on the right, where causality keeps the padding from mattering.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with tqdm(desc="assistant", total=len(ids), delay=1, leave=False) as bar:
        while order:
            B = next((b for b in range(1, len(order)) if len(ids[order[b]]) * (b + 1) > batch_tokens), len(order))
            rows, order = order[:B], order[B:]
            T = len(ids[rows[-1]])
            padded = torch.tensor([ids[i] + [0] * (T - len(ids[i])) for i in rows], device=assistant.embed.weight.device)
            hidden = assistant(assistant.embed(padded))  # [B, T, d_a]
            for i, h in zip(rows, hidden):
                assert ids[i][len(ids[i]) - n :] == [ids[i][-1]] * n  # the placeholders, which `assistant_ids` puts last
                out[i] = h[len(ids[i]) - n : len(ids[i])]
            bar.update(B)
    return out


def soft_thoughts(trained: dict[str, Tensor], h: Tensor | None, B: int, n: int) -> Tensor | None:
    """T [B, n, d] in the trained tensors' dtype, from h [B, >= n, d_a] or from a trained soft prompt.

    None where nothing takes the placeholders' place: LoRA, or n = 0.
    """
    if "prompt" in trained and n:
        return trained["prompt"][:n].expand(B, -1, -1)
    if "weight" in trained and n:
        return F.linear(h[:, :n].to(trained["weight"]), trained["weight"], trained["bias"])
    return None


def input_embeddings(model: Transformer, sequences: list[Sequence], thoughts: Tensor | None) -> Tensor:
    """[B, T, d], padded on the right: the sequences' embeddings, and thoughts [B, n, d] in the placeholders' places."""
    T = max(len(s.ids) for s in sequences)
    ids = torch.tensor([s.ids + [0] * (T - len(s.ids)) for s in sequences])
    embeds = model.embed(ids.to(model.embed.weight.device))
    if thoughts is None:
        return embeds
    rows = torch.tensor([[b] * s.n for b, s in enumerate(sequences)])  # [B, n]
    places = torch.tensor([list(range(len(s.left), len(s.left) + s.n)) for s in sequences])
    assert thoughts.shape[:2] == places.shape and (ids[rows, places] == sequences[0].unk).all()
    return embeds.index_put((rows, places), thoughts.to(embeds.dtype))


class Past:
    """A cache for training: the keys and values that a first pass leaves are constants of the second."""

    def __init__(self, device: torch.device):
        self.device, self.L, self.kept, self.mask = device, 0, {}, None

    def advance(self, T: int) -> tuple[Tensor, int]:
        L, self.L = self.L, self.L + T
        self.mask = causal_lower_right(T, L + T) if L else None  # the last query attends to every key
        return torch.arange(L, L + T, device=self.device)[None], L + T

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.kept[layer], (k, v)))
        else:
            self.kept[layer] = k, v
        return causal_attention(q, k, v, self.mask)


def hidden_after(model: Transformer, embeds: Tensor, L: int) -> Tensor:
    """What model(embeds)[:, L:] is, [B, T, d] -> [B, T - L, d], but the first L positions are no part of the gradient.

    Before the first thought nothing depends on what is trained: there the model runs without autograd, and leaves the
    keys and values that the positions from L on attend to.
    """
    if not L:
        return model(embeds)
    past = Past(embeds.device)
    with torch.no_grad():
        model(embeds[:, :L], past)
    return model(embeds[:, L:], past)


@contextmanager
def checkpointed(model: Transformer) -> Iterator[None]:
    """While inside: a layer's activations are computed again in the backward pass, instead of being kept for it."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward


def negative_log_likelihood(model: Transformer, sequences: list[Sequence], thoughts: Tensor | None) -> Tensor:
    """-sum_i log p(y_i | input, y_<i) over all labels of all rows; float32 scalar (float64 from float64).

    Logits are made at the labels' positions only: with a vocabulary of 150,000 the others would need more memory than
    the model.
    """
    L = 0 if thoughts is None else min(len(s.left) for s in sequences)
    hidden = hidden_after(model, input_embeddings(model, sequences, thoughts), L)
    # Position t predicts token t + 1, so the prompt's last position predicts the first label.
    rows = torch.tensor([b for b, s in enumerate(sequences) for _ in s.labels])
    places = torch.tensor([t for s in sequences for t in range(s.prompt - 1 - L, s.prompt - 1 - L + len(s.labels))])
    labels = torch.tensor([y for s in sequences for y in s.labels], device=hidden.device)
    return F.cross_entropy(model.logits(hidden[rows, places]), labels, reduction="sum")


# --------------------------------------------------------------------------------------------------------------- LoRA


def lora_name(layer: int, x: str, half: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{x}_proj.lora_{half}.weight"  # as PEFT calls it


def lora_start(model: Transformer, rank: int) -> dict[str, Tensor]:
    """A [r, d] as in PEFT uniform with variance 1 / (3 d), B [out, r] zero: at first nothing is changed."""
    c, tensors = model.config, {}
    for i in range(c.layers):
        for x, out in (("q", c.heads * c.head_dim), ("v", c.kv_heads * c.head_dim)):
            tensors[lora_name(i, x, "A")] = torch.empty(rank, c.d).uniform_(-1, 1) / math.sqrt(c.d)
            tensors[lora_name(i, x, "B")] = torch.zeros(out, rank)
    return tensors


@contextmanager
def lora_hooks(model: Transformer, trained: dict[str, Tensor], scale: float, dropout: float) -> Iterator[None]:
    """While inside: q and v become W x + scale B A dropout(x), differentiable in A and B; no dropout without gradients."""
    kv = model.config.kv_heads * model.config.head_dim

    def add(layer: int, qkv: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        def delta(x: str) -> Tensor:
            A, B = trained[lora_name(layer, x, "A")], trained[lora_name(layer, x, "B")]
            return scale * F.linear(F.linear(F.dropout(inputs[0].to(A), dropout, torch.is_grad_enabled()), A), B)
        return out + torch.cat([delta("q"), out.new_zeros(*out.shape[:-1], kv), delta("v")], -1).to(out)

    handles = [block.attention.qkv.register_forward_hook(partial(add, i)) for i, block in enumerate(model.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def lora_merged(model: Transformer, trained: dict[str, Tensor], scale: float) -> Iterator[None]:
    """While inside: the weights are W + scale B A, so that decoding costs nothing more; afterwards W to the bit."""
    views, kept = hf_tensors(model), {}
    with torch.no_grad():
        for i in range(model.config.layers):
            for x in "qv":
                W = views[f"model.layers.{i}.self_attn.{x}_proj.weight"]
                kept[W] = W.clone()
                W.copy_(W.float() + scale * (trained[lora_name(i, x, "B")] @ trained[lora_name(i, x, "A")]).to(W.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for W, before in kept.items():
                W.copy_(before)


# -------------------------------------------------------------------------------------------------------------- files


def write_file(path: Path, content: bytes) -> None:
    """At once: a reader, or a machine that stops, finds the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; mend that, and the same command goes on from the last "
                        "saved step") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_file(path, to_bytes(tensors, {"format": "pt"} | {k: str(v) for k, v in metadata.items()}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()  # it is no dictionary
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"no file {path}: `python softcot.py train` makes one") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or damaged ({error}): make it again with `train`") from None


def fingerprint(model: Transformer) -> str:
    """The same for the same weights, wherever they lie, loaded in bfloat16 or float32."""
    some = torch.cat([p.detach().flatten()[:256].cpu() for p in model.parameters()]).bfloat16()
    some[some.abs() < 1e-3] = 0
    return hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def portable(name: str) -> str:
    """A bundled model's folder as seen from here; other names as they are."""
    path = Path(name).resolve()
    return str(path.relative_to(HERE)) if path.is_dir() and path.is_relative_to(HERE) else name


def identity(name: str, model: Transformer, assistant_name: str, assistant: Transformer | None) -> dict[str, str]:
    """Whose files these are."""
    own = {"model": portable(name), "model_id": fingerprint(model), "d": str(model.config.d)}
    if assistant is None:
        return own
    return own | {"assistant": portable(assistant_name), "assistant_id": fingerprint(assistant), "d_a": str(assistant.config.d)}


TENSORS = {"softcot": {"weight", "bias"}, "cot-unk": {"prompt"}}  # what a file of that method holds


def read_trained(path: Path, method: str, here: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `train --method` saved for use, and its metadata.  UserError where it was made for other models or another method."""
    trained, there = read_tensors(path)
    if there.get("method") != method or trained.keys() != TENSORS[method]:
        raise UserError(f"{path} does not hold what `train --method {method}` makes for use, {BEST[method]} or last.safetensors: "
                        "give one of these")
    check_made_for(path, there, here)
    return trained, there


def check_made_for(path: Path, there: dict[str, str], here: dict[str, str]) -> None:
    """UserError where a file was made for other models, and a warning where it was for other prompts."""
    if any(there.get(key) != here[key] for key in here if key.endswith("_id") or key.startswith("d")):
        def said(who: dict) -> str:
            both = [(who.get(name), who.get(width)) for name, width in (("assistant", "d_a"), ("model", "d")) if name in here]
            return " and ".join(f"{name} (width {width})" for name, width in both)
        others = said(here) if said(here) != said(there) else "other weights of the same names"
        raise UserError(f"{path} was made for {said(there)}, not for {others}: pass those, or train for these")
    if there["prompt_version"] != str(PROMPT_VERSION):
        print(f"warning: {path} was trained with prompt version {there['prompt_version']}, this is {PROMPT_VERSION}: "
              "expect worse answers", file=sys.stderr)


def read_adapter(path: Path, model: Transformer, here: dict[str, str]) -> tuple[dict[str, Tensor], float, str]:
    """LoRA's tensors and alpha / r, from a folder or file in PEFT's format, ours or another's; and a digest for the records."""
    file = path if path.suffix == ".safetensors" else path / BEST["lora"]
    trained, there = read_tensors(file)
    try:
        config = json.loads((file.parent / "adapter_config.json").read_text())
        rank, scale = int(config["r"]), config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise UserError(f"{file.parent} has no adapter_config.json with r and lora_alpha: give the folder of an adapter") from None
    if kind := [key for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if config.get(key)]:
        raise UserError(f"{file} is an adapter with {kind[0]}, supported is plain LoRA: use another")
    if {name: tuple(x.shape) for name, x in trained.items()} != {name: tuple(x.shape) for name, x in lora_start(model, rank).items()}:
        raise UserError(f"{file} is no adapter of q_proj and v_proj for this model, but one made for "
                        f"{there.get('model', config.get('base_model_name_or_path'))}: pass that as --model")
    if "model_id" in there:  # ours
        check_made_for(file, there, here)
    device = model.embed.weight.device
    return {name: x.float().to(device) for name, x in trained.items()}, scale, digest(file)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- training


def flag(default, help: str, **options):
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class Settings:
    """Everything that changes a training or its log, but for models and data.  Each field is a flag.  ValueError for nonsense."""

    method: str = flag("softcot", "softcot: the projection; cot-unk: a soft prompt in its place; lora",
                       choices=("softcot", "cot-unk", "lora"))
    thoughts: int = flag(32, "N: soft thoughts")
    lr: float = flag(2e-5, "peak learning rate")
    warmup: int = flag(0, "steps in which the learning rate rises; then it falls linearly to 0")
    epochs: int = flag(10, "times that each problem is seen")
    batch_size: int = flag(4, "problems in one pass through the model")
    accumulate: int = flag(1, "passes whose gradients make one step")
    rank: int = flag(16, "r of LoRA")
    alpha: float = flag(32.0, "alpha of LoRA: B A is scaled by alpha / r")
    dropout: float = flag(0.1, "of LoRA's input")
    dev: int = flag(200, "problems, the last ones, that are held out for the validation loss")
    dev_limit: int = flag(50, "of these, how many are answered greedily for the accuracy")
    max_new_tokens: int = flag(1024, "of each such answer")
    seed: int = flag(0, "of the start, the order and the dropout")

    def __post_init__(self):
        for name, low in (("thoughts", 1), ("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("rank", 1), ("dev", 1),
                          ("max_new_tokens", 1), ("warmup", 0), ("dev_limit", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ValueError(f"seed must be below 2^63, not {self.seed}")
        for name in ("lr", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


BEST = {"softcot": "projection.safetensors", "cot-unk": "prompt.safetensors", "lora": "adapter_model.safetensors"}
CACHE_LIMIT = 8 << 30  # bytes of hidden states that are kept in memory; more are kept in a file


def start(model: Transformer, unk: int, d_a: int, s: Settings) -> dict[str, Tensor]:
    """What is trained, float32, as it is before training."""
    torch.manual_seed(s.seed)
    if s.method == "softcot":
        trained = {name: p.data for name, p in nn.Linear(d_a, model.config.d).named_parameters()}
    elif s.method == "cot-unk":
        trained = {"prompt": model.embed.weight[unk].detach().float().repeat(s.thoughts, 1)}
    else:
        trained = lora_start(model, s.rank)
    return {name: x.to(model.embed.weight.device).requires_grad_() for name, x in trained.items()}


def epoch_order(lengths: list[int], epoch: int, s: Settings) -> list[list[int]]:
    """The steps of an epoch, each a list of indices by length: a function of seed and epoch, so a step's number is all
    that going on needs.  Sixteen steps' worth of problems are sorted together, so that a batch holds little padding."""
    rng, size = np.random.default_rng((s.seed, epoch)), s.batch_size * s.accumulate
    order, steps = rng.permutation(len(lengths)).tolist(), []
    for i in range(0, len(order), 16 * size):
        bucket = sorted(order[i : i + 16 * size], key=lambda j: lengths[j])
        steps += [bucket[j : j + size] for j in range(0, len(bucket), size)]
    return [steps[i] for i in rng.permutation(len(steps))]


class Trainer:
    """A training in a folder: one step after another, from wherever the folder stands."""

    def __init__(self, folder: Path, model: Transformer, tokenizer: Tokenizer, task: tasks.Task, problems: list[tasks.Problem],
                 sequences: list[Sequence], about: dict[str, str], s: Settings, adapter: dict | None = None):
        """problems and sequences belong together, and with them what `hidden` is to be before `run`, [problems, N, d_a]; the
        last s.dev of them are held out.  UserError where the folder holds a training of other settings."""
        self.folder, self.model, self.tokenizer, self.task, self.s, self.about = folder, model, tokenizer, task, s, about
        self.problems, self.sequences, self.hidden, self.adapter = problems, sequences, None, adapter
        self.train, self.dev = range(len(problems) - s.dev), range(len(problems) - s.dev, len(problems))
        self.trained = start(model, sequences[0].unk, int(about.get("d_a", 0)), s)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=s.lr, weight_decay=0.0)
        self.per_epoch = -(-len(self.train) // (s.batch_size * s.accumulate))
        self.total = s.epochs * self.per_epoch
        self.step, self.best, self.dev_loss = 0, math.inf, math.nan
        self.resume()

    def thoughts(self, indices: list[int]) -> Tensor | None:
        h = None if self.hidden is None else self.hidden[indices].to(self.model.embed.weight.device)
        return soft_thoughts(self.trained, h, len(indices), self.sequences[0].n)

    def loss(self, indices: list[int]) -> Tensor:
        return negative_log_likelihood(self.model, [self.sequences[i] for i in indices], self.thoughts(indices))

    def gradient(self, indices: list[int], checkpointing: bool) -> float:
        """Leaves the gradient of the mean loss per label; accumulated, it is that of all passes' problems in one."""
        labels, total, weight = sum(len(self.sequences[i].labels) for i in indices), 0.0, self.model.embed.weight
        self.optimizer.zero_grad()
        for i in range(0, len(indices), self.s.batch_size):
            # In bfloat16 on a CPU fused attention is slower than plain attention.
            plain = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
            less = checkpointed(self.model) if checkpointing else nullcontext()
            with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(), less:
                loss = self.loss(indices[i : i + self.s.batch_size]) / labels
                loss.backward()
            total += loss.item()
        return total

    def rate(self, step: int) -> float:
        s = self.s
        return s.lr * ((step + 1) / s.warmup if step < s.warmup else (self.total - step) / (self.total - s.warmup))

    def run(self, save_every: int, checkpointing: bool) -> None:
        """All steps that are left.  UserError where the loss is no number: what is saved by then has a finite loss."""
        s = self.s
        adapted = lora_hooks(self.model, self.trained, s.alpha / s.rank, s.dropout) if s.method == "lora" else nullcontext()
        with adapted, tqdm(desc=f"train {s.method}", total=self.total, initial=self.step) as bar:
            if self.saved is None:
                self.validate()
            first = self.step
            while self.step < self.total:
                began, (epoch, place) = time.perf_counter(), divmod(self.step, self.per_epoch)
                if self.step == first or place == 0:
                    order = epoch_order([len(self.sequences[i].ids) for i in self.train], epoch, s)
                torch.manual_seed(int(np.random.default_rng((s.seed, self.step)).integers(2**63)))  # for the dropout
                loss = self.gradient(order[place], checkpointing)
                norm = nn.utils.clip_grad_norm_(self.trained.values(), 1.0).item()
                if not math.isfinite(loss + norm):
                    where = ", ".join(self.problems[i].id for i in order[place])
                    raise self.diverged(f"the loss is {loss} and its gradient's norm {norm} at step {self.step + 1} "
                                        f"(epoch {epoch + 1}, problems {where})")
                if self.step % save_every == 0 and self.step > self.saved:  # only now is this state known to be good
                    self.save()
                lr = self.optimizer.param_groups[0]["lr"] = self.rate(self.step)
                self.optimizer.step()
                self.step += 1
                speed = sum(len(self.sequences[i].ids) for i in order[place]) / (time.perf_counter() - began)
                self.log(epoch=epoch, loss=loss, gradient_norm=norm, lr=lr, tokens_per_second=round(speed, 1))
                bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {speed:.0f} tokens/s", refresh=False)
                bar.update()
                if self.step % self.per_epoch == 0:
                    self.validate()

    @torch.no_grad()
    def validate(self) -> None:
        """Loss of the held-out problems, accuracy of some; the best loss so far is kept as BEST."""
        s, right = self.s, 0
        by_length = sorted(self.dev, key=lambda i: len(self.sequences[i].ids))
        total = sum(self.loss(by_length[i : i + s.batch_size]).item() for i in range(0, len(by_length), s.batch_size))
        self.dev_loss = total / sum(len(self.sequences[i].labels) for i in self.dev)
        if not math.isfinite(self.dev_loss):
            raise self.diverged(f"the held-out loss is {self.dev_loss} after step {self.step}")
        asked = self.dev[: s.dev_limit]
        longest = max((self.sequences[i].prompt for i in asked), default=1)
        slots = KVCache.fitting(self.model, max(1, min(16, len(asked))), longest, s.max_new_tokens)

        def requests() -> Iterator[Request]:
            for i in asked:
                q = replace(self.sequences[i], labels=[])
                yield Request(Prompt(input_embeddings(self.model, [q], self.thoughts([i]))[0]), (i, ()))

        for (i, _), ids in decode(self.model, requests(), Sampler(self.model, slots, s.max_new_tokens), slots):
            p, text = self.problems[i], self.tokenizer.decode([t for t in ids if t not in self.model.config.eos_ids])
            right += tasks.grade(read_answer(text, p), p.answer, p.kind, self.task.tolerance)
        accuracy = right / len(asked) if asked else None
        self.log(epoch=self.step // self.per_epoch, dev_loss=self.dev_loss, dev_accuracy=accuracy)
        tqdm.write(f"step {self.step}: held-out loss {self.dev_loss:.4f}"
                   + (f", accuracy {right}/{len(asked)}" if asked else "") + (" (the best)" if self.dev_loss < self.best else ""))
        if self.dev_loss < self.best:
            self.best = self.dev_loss
            write_tensors(self.folder / BEST[s.method], self.trained, self.metadata())
            if self.adapter:
                write_file(self.folder / "adapter_config.json", json.dumps(self.adapter, indent=1).encode())
        self.save()

    def diverged(self, what: str) -> UserError:
        kept = "holds no state yet" if self.saved is None else f"keeps step {self.saved}"
        return UserError(f"{what}: {self.folder} {kept}; lower --lr or use --dtype float32, with another --folder")

    def metadata(self) -> dict:
        return self.about | {"step": self.step, "loss": self.dev_loss, "settings": json.dumps(asdict(self.s))}

    def log(self, **what) -> None:
        tasks.append(self.folder / "log.jsonl", {"step": self.step} | what)

    def save(self) -> None:
        """last.safetensors for use, and state.safetensors to go on from.  The second alone counts when going on."""
        write_tensors(self.folder / "last.safetensors", self.trained, self.metadata())
        state = {f"trained.{name}": x for name, x in self.trained.items()}
        for name, x in self.trained.items():
            state |= {f"{key}.{name}": value for key, value in self.optimizer.state[x].items()}  # step, exp_avg, exp_avg_sq
        write_tensors(self.folder / "state.safetensors", state, self.metadata() | {"best": self.best})
        self.saved = self.step

    def resume(self) -> None:
        """Go back to the last saved step, the log with it.  UserError where that was of other settings."""
        self.saved, path, log = None, self.folder / "state.safetensors", self.folder / "log.jsonl"
        if path.exists():
            state, there = read_tensors(path)
            was = json.loads(there.pop("settings")) | there
            now = asdict(self.s) | {key: str(value) for key, value in self.about.items()}
            differing = [f"{key} is {was.get(key)} there and {now[key]} here" for key in now if was.get(key) != now[key]]
            if differing:
                raise UserError(f"{self.folder} holds a training with other settings: {', '.join(differing)}; "
                                "give --folder another name")
            for name, x in self.trained.items():
                x.data.copy_(state[f"trained.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if (value := state.get(f"{key}.{name}")) is not None:  # there is none before the first step
                        self.optimizer.state[x][key] = value.to(x.device) if value.ndim else value
            self.step = self.saved = int(there["step"])
            self.best, self.dev_loss = float(there["best"]), float(there["loss"])
            says = f"going on after step {self.step}" if self.step < self.total else "this training is finished"
            print(f"{self.folder}: {says}", file=sys.stderr)
        if log.exists():
            lines = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            write_file(log, b"".join(line for line in lines if path.exists() and json.loads(line)["step"] <= self.step))


# -------------------------------------------------------------------------------------------------------------- answers


class Sampler:
    """What `decode` asks at each step: the most probable token, or (temperature > 0) a draw by inverting the distribution
    function, from uniforms that belong to the row's own seeds.  request.data = (key, seeds)."""

    def __init__(self, model: Transformer, rows: int, max_new_tokens: int, temperature: float = 0.0):
        self.model, self.temperature, self.max_new_tokens = model, temperature, max_new_tokens
        device, N = model.embed.weight.device, min(max_new_tokens, model.config.context)
        self.eos = torch.tensor(model.config.eos_ids, device=device)
        self.requests: list[Request | None] = [None] * rows
        self.t, self.limit = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, N + 1, dtype=torch.long, device=device)  # the last place: what comes when all is over
        self.u = torch.zeros(rows, N + 1, device=device)

    def begin(self, row: int, request: Request) -> None:
        self.requests[row] = request
        self.t[row], self.limit[row] = 0, min(self.max_new_tokens, self.model.config.context - len(request.prompt.embeds))
        if self.temperature:
            self.u[row] = torch.from_numpy(np.random.default_rng(request.data[1]).random(self.u.shape[1], dtype=np.float32))

    def step(self, logits: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [rows, V] -> next embeddings [rows, d], finished rows [rows]; those not live stay at their t."""
        rows, t = torch.arange(len(logits), device=logits.device), self.t.clone()
        if self.temperature:
            mass = torch.softmax(logits / self.temperature, -1).cumsum(-1)
            token = (mass < self.u[rows, t, None] * mass[:, -1:]).sum(-1)
        else:
            token = logits.argmax(-1)
        self.tokens[rows, t] = token
        self.t += live
        return self.model.embed(token), (token[:, None] == self.eos).any(-1) | (t + 1 >= self.limit)

    def end(self, row: int) -> tuple[tuple, list[int]]:
        return self.requests[row].data, self.tokens[row, : int(self.t[row])].tolist()


def read_answer(text: str, problem: tasks.Problem) -> str | None:
    """The answer in what is said after the thought, or else anywhere."""
    return (tasks.extract(split_thought(text)[1], problem.kind, problem.choices)
            or tasks.extract(text, problem.kind, problem.choices))


def vote(answers: list[str | None], problem: tasks.Problem, tolerance: float) -> int:
    """Index of the most frequent answer's first occurrence; the earliest among equals, 0 where there is no answer."""
    same = [[a is not None and b is not None and tasks.grade(a, b, problem.kind, tolerance) for a in answers] for b in answers]
    return max(range(len(answers)), key=lambda i: sum(same[i]))


@dataclass(frozen=True)
class Way:
    """One way to answer: a row of the table."""

    method: str
    n: int  # soft thoughts, placeholders, or tokens of the hint
    trained: dict[str, Tensor]  # of the projection, the soft prompt, or LoRA; {}: nothing
    assistant: tuple[Transformer, Tokenizer] | None = None
    scale: float = 0.0  # LoRA's alpha / r
    name: str = ""  # of the assistant
    file: str = ""  # digest of what was trained
    task: str = ""  # that it was trained on


def hints(way: Way, questions: list[str], rows: int) -> dict[str, str]:
    """Question -> the first n tokens that the assistant says, greedily."""
    assistant, tokenizer = way.assistant
    asked = {q: tokenizer.chat(INSTRUCTION.format(question=q), date_string="26 Jul 2024") for q in questions}
    for question, ids in asked.items():
        check_prompt(assistant.config, ids, question, "the assistant's")
    rows = KVCache.fitting(assistant, rows, max(map(len, asked.values())), way.n)

    def requests() -> Iterator[Request]:
        for question, ids in asked.items():
            yield Request(Prompt(assistant.embed(torch.tensor(ids, device=assistant.embed.weight.device))), (question, ()))

    return {question: tokenizer.decode([t for t in ids if t not in assistant.config.eos_ids])
            for (question, _), ids in decode(assistant, requests(), Sampler(assistant, rows, way.n), rows)}


def inputs(tokenizer: Tokenizer, way: Way, question: str, hint: str) -> Sequence:
    """What the LLM reads of a question that is asked this way."""
    if way.method == "assist-cot" and way.n:
        question = HINT.format(question=question, hint=hint)
    return sequence(tokenizer, question, way.n if way.method in ("softcot", "cot-unk") else 0, [])


@torch.no_grad()
def build(model: Transformer, tokenizer: Tokenizer, way: Way, question: str, hint: str = "") -> tuple[Prompt, str, Tensor | None]:
    """A question as this way asks it: its prompt, the same as text, and the soft thoughts [n, d] in it, if any.

    One question at a time, so that what is answered does not depend on the neighbours.
    """
    asked, h = inputs(tokenizer, way, question, hint), None
    if way.method == "softcot" and asked.n:
        assistant, its = way.assistant
        ids, weight = assistant_ids(its, question, asked.n), assistant.embed.weight
        out = torch.empty(1, asked.n, assistant.config.d, dtype=weight.dtype, device=weight.device)
        h = hidden_states(assistant, [ids], asked.n, out)
    thoughts = soft_thoughts(way.trained, h, 1, asked.n)
    between = f"<{asked.n} {'placeholders' if thoughts is None else 'soft thoughts'}>" if asked.n else ""
    text = tokenizer.decode(asked.left) + between + tokenizer.decode(asked.right)
    return Prompt(input_embeddings(model, [asked], thoughts)[0]), text, None if thoughts is None else thoughts[0]


def answers(model: Transformer, tokenizer: Tokenizer, way: Way, jobs: list[tuple[tasks.Problem, int]], task: tasks.Task,
            num_samples: int, temperature: float, max_new_tokens: int, seed: int,
            rows: int) -> Iterator[tuple[tasks.Problem, int, dict]]:
    """(problem, sample, record) as they are finished; a record's answer is the majority of num_samples draws, and its seconds
    count from when the first of them was asked for.  UserError, before anything is answered, for a prompt that is too long."""
    said = [tasks.prompt(problem, task) for problem, _ in jobs]
    hint = hints(way, said, rows) if way.method == "assist-cot" and way.n else {}
    longest = 0
    for question in dict.fromkeys(said):
        ids = inputs(tokenizer, way, question, hint.get(question, "")).ids
        check_prompt(model.config, ids, question, remedy="shorten it, or lower --thoughts")
        if way.method == "softcot" and way.n:
            assistant, its = way.assistant
            check_prompt(assistant.config, assistant_ids(its, question, way.n), question, "the assistant's", "shorten it, or lower --thoughts")
        longest = max(longest, len(ids))
    rows = KVCache.fitting(model, rows, longest, max_new_tokens)
    open_jobs: dict[int, list] = {}  # index -> [when it began, text of the prompt, ids of each draw]

    def requests() -> Iterator[Request]:
        built = {}  # of the last question alone: the samples of a problem follow one another
        for j, (_, sample) in enumerate(jobs):
            if said[j] not in built:
                built = {said[j]: build(model, tokenizer, way, said[j], hint.get(said[j], ""))}
            prompt, text, _ = built[said[j]]
            open_jobs[j] = [time.perf_counter(), text, [None] * num_samples]
            own = int.from_bytes(hashlib.sha256(said[j].encode()).digest()[:8], "little")
            for i in range(num_samples):
                yield Request(prompt, ((j, i), (seed, sample, own, i)))

    with lora_merged(model, way.trained, way.scale) if way.method == "lora" else nullcontext():
        for ((j, i), _), ids in decode(model, requests(), Sampler(model, rows, max_new_tokens, temperature), rows):
            began, prompt, drawn = open_jobs[j]
            drawn[i] = ids
            if None in drawn:
                continue
            problem, sample = jobs[j]
            texts = [tokenizer.decode([t for t in ids if t not in model.config.eos_ids]) for ids in drawn]
            found = [read_answer(text, problem) for text in texts]
            thought, answer = split_thought(texts[vote(found, problem, task.tolerance)])
            yield problem, sample, {"prompt": prompt, "thought_text": thought, "answer_text": answer, "answers": found,
                                    "texts": texts, "answer_tokens": sum(map(len, drawn)), "seconds": time.perf_counter() - began}
            del open_jobs[j]


def whispers(model: Transformer, tokenizer: Tokenizer, thoughts: Tensor, k: int = 3) -> list[str]:
    """For each soft thought [n, d]: the vocabulary tokens whose embeddings are nearest to it by angle, and its norm."""
    E, T = model.embed.weight.float(), thoughts.float()
    cosine, ids = (F.normalize(T, dim=-1) @ F.normalize(E, dim=-1).T).topk(k)
    norms = T.norm(dim=-1) / E.norm(dim=-1).mean()
    return [f"{i:3}  norm {norm:7.2f}  " + "  ".join(f"{tokenizer.decode([t])!r} {c:+.2f}" for t, c in zip(near, angles))
            for i, (norm, near, angles) in enumerate(zip(norms.tolist(), ids.tolist(), cosine.tolist()), 1)]


# ------------------------------------------------------------------------------------------------------- command line


HERE = Path(__file__).resolve().parent
TINY, TINY_ASSISTANT = str(HERE / "tiny" / "base"), str(HERE / "tiny" / "assistant")  # the bundled models
BUNDLED = HERE / "tiny" / "softcot.safetensors"  # and a projection for them
METHODS = ("zero-shot-cot", "cot-unk", "assist-cot", "softcot", "lora")
MAKE_BUNDLED = ("python softcot.py train --thoughts 16 --epochs 3 --batch-size 8 --lr 3e-3 --folder out "
                "&& cp out/projection.safetensors tiny/softcot.safetensors")


def command_line(command: str | None) -> argparse.ArgumentParser:
    """The flags of `train`, of `eval`, or of the terminal view: each refuses what only another knows."""
    said = {"train": "Train the projection, a soft prompt, or LoRA.", "eval": "Score methods on a task."}
    parser = argparse.ArgumentParser(prog=f"softcot.py {command or ''}".strip(),
                                     description=said.get(command, __doc__.splitlines()[0]),
                                     epilog=None if command else "See also: softcot.py train --help, softcot.py eval --help")
    parser.error = lambda message: sys.exit(fail(message))  # one line, without the usage
    add = parser.add_argument
    add("--model", default=TINY, help="alias such as qwen2.5-7b, Hugging Face id, or folder (default: bundled)")
    add("--assistant", default=TINY_ASSISTANT, help="likewise; eval takes several, with commas (default: bundled)")
    add("--device", help="cpu, cuda, or cuda:N (default: cuda where there is one)")
    add("--dtype", help="of the frozen weights: bfloat16, float16, or float32 (default: what the device is fast at)")
    if command:
        add("--task", help=f"(default: tiny) one of {', '.join(tasks.TASKS)}")
        add("--data", metavar="FILE", help="your own JSON lines: question, answer, optional choices, steps")
        add("--limit", type=int, help="only the first so many problems")
    if command == "train":
        add("--folder", required=True, help="where everything is written; started again, it goes on")
        add("--save-every", type=int, default=50, help="steps that an interruption costs at most (default: 50)")
        add("--checkpointing", action="store_true", help="recompute layers in the backward pass: less memory, more time")
        for f in fields(Settings):
            add("--" + f.name.replace("_", "-"), type=f.type, choices=f.metadata.get("choices"), default=argparse.SUPPRESS,
                help=f"{f.metadata['help']} (default: {f.default})")
        return parser
    add("--projection", metavar="FILE", help="made by train; eval takes several, with commas, one row each (default: bundled)")
    add("--max-new-tokens", type=int, default=4096, help="of each answer (default: 4096)")
    if command is None:
        add("--question", help="answer this one (default: a problem of the task tiny)")
        parser.set_defaults(prompt=None)  # only eval has it
        return parser
    add("--methods", help=f"of {', '.join(METHODS)} (default: all, lora only with --lora)")
    add("--thoughts", help="N, or several with commas, one row each (default: as many as were trained)")
    add("--prompt", metavar="FILE", help="of cot-unk, made by train (default: the placeholders' own embeddings)")
    add("--lora", metavar="FOLDER", help="of lora: an adapter, made by train or by PEFT")
    add("--num-samples", type=int, default=1, help="draws whose majority is the answer (default: 1, greedy)")
    add("--seeds", type=int, default=1, help="times that everything is answered (default: 1)")
    add("--temperature", type=float, help="0 is greedy (default: 0 for one sample, 0.7 for several)")
    add("--seed", type=int, default=0, help="of all draws (default: 0)")
    add("--batch-size", type=int, default=16, help="sequences decoded side by side (default: 16)")
    add("--output", metavar="FILE", help="append one JSON line per answer; started again, it goes on")
    add("--json", metavar="FILE", help="the table as JSON, with mean and standard deviation over the seeds")
    return parser


def fail(message: str) -> int:
    print("softcot.py:", " ".join(message.split()), file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and arguments[0] in ("train", "eval") else None
    args = command_line(command).parse_args(arguments[1:] if command else arguments)
    kept = getattr(args, "folder", getattr(args, "output", None))
    try:
        for name in ("num_samples", "seeds", "batch_size", "save_every", "max_new_tokens", "seed"):
            if getattr(args, name, 1) < (low := int(name != "seed")):
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
        {"train": train, "eval": score, None: answer}[command](args)
    except (UserError, tasks.UserError) as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail("out of GPU memory: lower --batch-size (in training, raise --accumulate as much, or pass --checkpointing), "
                    "or use a smaller --model")
    except KeyboardInterrupt:
        print("\ninterrupted" + (f"; {kept} keeps what was saved, and the same command goes on" if kept else ""), file=sys.stderr)
        return 130
    return 0


# -- python softcot.py train


def train(args: argparse.Namespace) -> None:
    try:
        s = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)})
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from None
    name = "data" if args.data and not args.task else args.task or "tiny"
    if not args.data and f"{name}-train" in tasks.TASKS:
        name = f"{name}-train"  # the task's own name is its test set
    problems, task = tasks.load(name, args.data, args.limit), tasks.TASKS[name]
    if without := [p.id for p in problems if not p.steps]:
        raise UserError(f"{len(without)} of {len(problems)} problems of {args.data or name} have no worked steps to learn from "
                        f"({without[0]} is the first): use gsm8k, aqua, asdiv-aug or tiny, or --data FILE with `steps`")
    with locked(Path(args.folder)) as folder:
        model, tokenizer = load(args.model, args.device, args.dtype)
        assistant, its = load(args.assistant, args.device, args.dtype) if s.method == "softcot" else (None, None)
        if not model.config.eos_ids:
            raise UserError(f"{args.model} names no end-of-sequence token in its config.json: add eos_token_id there")
        n = 0 if s.method == "lora" else s.thoughts
        end = tokenizer.core.token_to_id(tokenizer.special.get("eos_token", ""))
        end = end if end in model.config.eos_ids else model.config.eos_ids[0]
        sequences, asked, fitting = [], [], []
        for p in problems:
            question = tasks.prompt(p, task)
            labels = tokenizer.encode(target_text(tokenizer, p, task.instruct)) + [end]
            q, a = sequence(tokenizer, question, n, labels), assistant_ids(its, question, n) if assistant else []
            if len(q.ids) <= model.config.context and (not assistant or len(a) <= assistant.config.context):
                sequences.append(q), asked.append(a), fitting.append(p)
        if len(fitting) <= s.dev:
            raise UserError(f"{len(fitting)} of {len(problems)} problems fit the context windows with {n} thoughts, and "
                            f"--dev holds out {s.dev}: lower --thoughts or --dev, or raise --limit")
        if len(fitting) < len(problems):
            print(f"left out: {len(problems) - len(fitting)} of {len(problems)} problems, too long for the context windows",
                  file=sys.stderr)
        check_prompt(model.config, [max(max(q.ids) for q in sequences)])  # of the vocabulary
        if assistant:
            check_prompt(assistant.config, [max(map(max, asked))], whose="the assistant's")
        text = json.dumps([[q.ids for q in sequences], asked]).encode()
        about = {"made_by": "softcot.py", "method": s.method, "task": name, "prompt_version": str(PROMPT_VERSION),
                 "thoughts": str(n), "dtype": str(model.embed.weight.dtype)[6:], "data": hashlib.sha256(text).hexdigest()[:16],
                 **identity(args.model, model, args.assistant, assistant)}
        adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": s.rank, "lora_alpha": s.alpha, "lora_dropout": s.dropout,
                   "base_model_name_or_path": ALIASES.get(args.model.lower(), args.model), "bias": "none",
                   "target_modules": ["q_proj", "v_proj"], "inference_mode": True} if s.method == "lora" else None
        trainer = Trainer(folder, model, tokenizer, task, fitting, sequences, about, s, adapter)
        if trainer.saved != trainer.total:
            if assistant:
                trainer.hidden = kept_hidden(assistant, asked, n, folder / "hidden.safetensors", about)
                assistant = its = None  # its memory is wanted
            trainer.run(args.save_every, args.checkpointing)
        print(f"{folder / BEST[s.method]}: smallest held-out loss; {folder / 'last.safetensors'}: last step")


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """The folder, made where there is none, for this process alone.  The lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot use the folder {folder}: {error.strerror}; give --folder another name") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError:
        raise UserError(f"another training writes to {folder}: wait for it, or give --folder another name") from None
    except OSError as error:
        raise UserError(f"cannot lock {folder} ({error.strerror}): give a --folder on a local disk") from None
    finally:
        os.close(handle)


def kept_hidden(assistant: Transformer, ids: list[list[int]], n: int, path: Path, about: dict[str, str]) -> Tensor:
    """h of all problems, [len(ids), n, d_a], on the CPU: in memory, or (above CACHE_LIMIT) in a safetensors file that is
    mapped into memory, and found again when the training goes on."""
    dtype, shape = assistant.embed.weight.dtype, (len(ids), n, assistant.config.d)
    size, about = math.prod(shape) * dtype.itemsize, {k: about[k] for k in ("data", "assistant_id", "dtype", "thoughts")}
    if size <= CACHE_LIMIT:
        return hidden_states(assistant, ids, n, torch.empty(shape, dtype=dtype))
    if path.exists():
        tensors, there = read_tensors(path)
        if there == about:
            return tensors["hidden"]
    short = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    header = json.dumps({"__metadata__": about, "hidden": {"dtype": short, "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers behind it are aligned
    header, part = len(header).to_bytes(8, "little") + header, path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            file.write(header)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, len(header) + size)  # a full disk is an error here, and a crash in a mapping
            whole = torch.from_file(str(part), shared=True, size=len(header) + size, dtype=torch.uint8)
            hidden_states(assistant, ids, n, whole[len(header) :].view(dtype).view(shape))
            os.fsync(file.fileno())  # what was written by the mapping, too
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {size / 1e9:.1f} GB of hidden states to {path}: {error.strerror}; free some, "
                        "or lower --thoughts") from None
    os.replace(part, path)
    return read_tensors(path)[0]["hidden"]


# -- python softcot.py eval, and python softcot.py


def open_pairs(args: argparse.Namespace, model: Transformer) -> list[Way]:
    """What --assistant and --projection name, one by one; n = 0 without a projection."""
    names, files = args.assistant.split(","), args.projection.split(",") if args.projection else []
    if not files and (args.model, args.assistant) == (TINY, TINY_ASSISTANT) and BUNDLED.exists():
        files = [str(BUNDLED)]
    if len(names) == 1:
        names *= max(1, len(files))
    if files and len(files) != len(names):
        raise UserError(f"--projection names {len(files)} files and --assistant {len(names)} models: name one of them for each")
    loaded, pairs = {name: load(name, args.device, args.dtype) for name in dict.fromkeys(names)}, []
    for name, file in zip_longest(names, files):
        trained, there = read_trained(Path(file), "softcot", identity(args.model, model, name, loaded[name][0])) if file else ({}, {})
        pairs.append(Way("softcot", int(there.get("thoughts", 0)), {key: x.to(model.embed.weight.device) for key, x in trained.items()},
                         loaded[name], name=name, file=digest(Path(file)) if file else "", task=there.get("task", "")))
    return pairs


def score(args: argparse.Namespace) -> None:
    """A task: every method on the same problems, graded, recorded, compared, and its spread over the seeds."""
    temperature = args.temperature if args.temperature is not None else 0.7 if args.num_samples > 1 else 0.0
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature must be at least 0, not {temperature}")
    if temperature == 0 and max(args.num_samples, args.seeds) > 1:
        raise UserError("greedy answers are the same in every sample and for every seed: pass a --temperature above 0")
    methods = args.methods.split(",") if args.methods else [m for m in METHODS if m != "lora" or args.lora]
    if wrong := [m for m in methods if m not in METHODS]:
        raise UserError(f"--methods: no method {wrong[0]!r}; there are {', '.join(METHODS)}")
    if "lora" in methods and not args.lora:
        raise UserError("--methods lora needs --lora FOLDER: `python softcot.py train --method lora --folder FOLDER`")
    numbers = args.thoughts.split(",") if args.thoughts else []
    if not all(n.isdecimal() for n in numbers):
        raise UserError(f"--thoughts takes numbers from 0 on, with commas between them, not {args.thoughts!r}")
    name = "data" if args.data and not args.task else args.task or "tiny"
    problems, task = tasks.load(name, args.data, args.limit), tasks.TASKS[name]
    model, tokenizer = load(args.model, args.device, args.dtype)
    ways = ways_of(args, model, methods, [int(n) for n in numbers])
    base = {"model": args.model, "device": model.embed.weight.device.type, "dtype": str(model.embed.weight.dtype)[6:],
            "seed": args.seed, "num_samples": args.num_samples, "temperature": temperature,
            "max_new_tokens": args.max_new_tokens, "prompt_version": PROMPT_VERSION}

    def solver(way: Way) -> Callable:
        return lambda jobs: answers(model, tokenizer, way, jobs, task, args.num_samples, temperature, args.max_new_tokens,
                                    args.seed, min(args.batch_size, len(problems) * args.num_samples))

    result, records = tasks.run(problems, task, {row: (base | own, solver(way)) for row, (own, way) in ways.items()},
                                args.seeds, args.output, args.json)
    if args.seeds > 1:
        print("\naccuracy, mean ± standard deviation over the seeds")
        result["seeds"] = {}
        for row in ways:
            each = [mean(records[p.id, row, seed]["correct"] for p in problems) for seed in range(args.seeds)]
            result["seeds"][row] = {"accuracies": each, "mean": mean(each), "std": stdev(each)}
            print(f"{row:24} {mean(each):.1%} ± {100 * stdev(each):.1f}")
        if args.json:
            tasks.write_json(args.json, result)


def ways_of(args: argparse.Namespace, model: Transformer, methods: list[str], numbers: list[int]) -> dict[str, tuple[dict, Way]]:
    """Row of the table -> its own settings, and the way: one for each method, number of thoughts, and pair of models."""
    prompt, which = {}, {}
    if args.prompt:
        prompt, there = read_trained(Path(args.prompt), "cot-unk", identity(args.model, model, "", None))
        prompt, which = {"prompt": prompt["prompt"].to(model.embed.weight.device)}, {"prompt": digest(Path(args.prompt))}
        if max(numbers, default=0) > int(there["thoughts"]):
            raise UserError(f"--thoughts {max(numbers)}, but {args.prompt} was trained with {there['thoughts']}: lower it")
    pairs = open_pairs(args, model) if {"softcot", "assist-cot"} & set(methods) else []
    if "softcot" in methods and not all(pair.trained for pair in pairs):
        command = MAKE_BUNDLED if (args.model, args.assistant) == (TINY, TINY_ASSISTANT) else "python softcot.py train"
        raise UserError(f"softcot needs a projection, --projection FILE: make one with `{command}`")
    usual = len(prompt.get("prompt", [])) or max((pair.n for pair in pairs), default=0) or Settings.thoughts
    ways = {}
    for method in methods:
        if method == "lora":
            trained, scale, adapter = read_adapter(Path(args.lora), model, identity(args.model, model, "", None))
            ways[method] = {"adapter": adapter}, Way(method, 0, trained, scale=scale)
        elif method == "zero-shot-cot":
            ways[method] = {}, Way(method, 0, {})
        elif method == "cot-unk":
            for n in numbers or [usual]:
                row = method + (f" {n}" if len(numbers) > 1 else "")
                ways[row] = {"thoughts": n} | which, Way(method, n, prompt)
                if prompt and n != usual:
                    print(f"{row}: trained with {usual} placeholders, answers with {n}", file=sys.stderr)
        else:
            assistants = pairs if method == "softcot" else list({pair.name: pair for pair in pairs}.values())
            for i, pair in enumerate(assistants, 1):
                for n in numbers or [pair.n if method == "softcot" else usual]:
                    row = method + (f" {n}" if len(numbers) > 1 else "") + (f" #{i}" if len(assistants) > 1 else "")
                    own = {"thoughts": n, "assistant": pair.name} | ({"projection": pair.file} if method == "softcot" else {})
                    ways[row] = own, replace(pair, method=method, n=n, trained=pair.trained if method == "softcot" else {})
                    if method == "softcot" and n != pair.n:
                        print(f"{row}: trained with {pair.n} thoughts, answers with {n}", file=sys.stderr)
    if len(pairs) > 1:
        print("\n".join(f"#{i}: assistant {pair.name}, projection {pair.file}" for i, pair in enumerate(pairs, 1)))
    return ways


def answer(args: argparse.Namespace) -> None:
    """One question in the terminal, without and with soft thoughts side by side, and what the assistant whispers."""
    problem, task = tasks.load("tiny", limit=1)[0], tasks.TASKS["tiny"]
    gold = problem.answer if args.question is None else None
    question = problem.question if args.question is None else args.question
    if not question.strip():
        raise UserError("the question is empty: pass --question TEXT")
    if not args.projection and (args.model, args.assistant) != (TINY, TINY_ASSISTANT):
        raise UserError("the bundled projection is for the bundled models: pass --projection FILE, which `train` makes")
    model, tokenizer = load(args.model, args.device, args.dtype)
    (_, plain), (_, soft), *_ = ways_of(args, model, ["zero-shot-cot", "softcot"], []).values()
    task = tasks.TASKS.get(soft.task, task)  # its prompts are those that the projection was trained with
    print(question, end="\n\n")
    problem = tasks.Problem("question", question, "", "number")
    texts = []
    for way in (plain, soft):
        ((_, _, record),) = answers(model, tokenizer, way, [(problem, 0)], task, 1, 0.0, args.max_new_tokens, 0, 1)
        texts.append(f"{record['thought_text']}\n\n{record['answer_text']}".strip() + f"\n\n{record['answer_tokens']} tokens")
    columns = [[line for part in text.splitlines() for line in wrap(part, 56) or [""]] for text in texts]
    heads = "without", f"with {soft.n} soft thoughts"
    for left, right in zip_longest(*([head, "", *lines] for head, lines in zip(heads, columns)), fillvalue=""):
        print(f"{left:58}{right}".rstrip())
    _, _, thoughts = build(model, tokenizer, soft, tasks.prompt(problem, task))
    print("\nsoft thoughts: norm in mean embedding norms, nearest tokens and the cosine of the angle to them")
    print("\n".join(whispers(model, tokenizer, thoughts)) + (f"\n\nthe right answer is {gold}" if gold else ""))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets question marks, not a traceback
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: the interpreter would take most of a second to unload PyTorch, also after Ctrl-C
