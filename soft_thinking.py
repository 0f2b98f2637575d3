"""Soft Thinking: a language model that thinks in concept tokens (Zhang et al., arXiv 2505.15778).

    python soft_thinking.py --model qwen2.5-7b --question "What is 17 * 24?"

Instead of one sampled token, each thinking step feeds back the expectation of the next token's embedding:

    p    = softmax(logits / tau)                     distribution over the vocabulary
    ct   = p, truncated and renormalised             the concept token
    e~   = sum_k ct[k] e(k)                          the next input embedding
    H(p) = -sum_k p[k] log p[k] < tau_H              for k steps in a row: Cold Stop
    answer: ordinary sampling after </think>

The truncation's order (top-k, top-p, min-p, max-topk, each renormalised) is the official code's; the paper only says
top-n.  Baselines of the paper's table: `--method cot` (the same settings, discrete tokens) and `--method greedy`.
Stochastic variants (arXiv 2508.03440): `--noise gumbel` and `--noise dirichlet`.
"""

import argparse
import hashlib
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

import tasks
from model import (
    KVCache,
    Prompt,
    Request,
    Tokenizer,
    Transformer,
    UserError,
    check_prompt,
    decode,
    load,
)

# ----------------------------------------------------------------------------------------------------------- settings


def flag(default, help: str, **options):
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class Settings:
    """Everything that changes what is generated, but for the seed.  Each field is a flag.  ValueError for nonsense."""

    method: str = flag("soft", "soft: concept tokens; cot: sampled tokens; greedy: argmax", choices=("soft", "cot", "greedy"))
    temperature: float = flag(0.6, "tau of the thinking phase")
    top_k: int = flag(30, "keep this many most probable tokens (0: all)")
    top_p: float = flag(0.95, "then the smallest set with this mass")
    min_p: float = flag(0.001, "then those with at least this share of the largest probability")
    max_topk: int = flag(10, "n: then at most this many make the concept token (paper: 5 to 20)")
    cold_stop: bool | None = flag(None, "end thinking when the model has become sure (default: on for soft, else off)")
    cold_stop_entropy: float = flag(0.01, "tau_H: entropy in nats that counts as sure (paper: 0 to 0.1)")
    cold_stop_steps: int = flag(256, "k: that many sure steps in a row stop it (paper: 256 to 1024)")
    noise: str | None = flag(None, "stochastic concept tokens (arXiv 2508.03440)", choices=("gumbel", "dirichlet"))
    gumbel_temperature: float = flag(0.5, "tau_g of softmax((log ct + g) / tau_g)")
    dirichlet_alpha: float = flag(1.0, "alpha of Dirichlet(alpha ct): larger is closer to ct")
    answer_temperature: float | None = flag(None, "temperature of the answer phase (default: as while thinking)")
    answer_top_k: int | None = flag(None, "top-k of the answer phase (default: as while thinking)")
    answer_top_p: float | None = flag(None, "top-p of the answer phase (default: as while thinking)")
    answer_min_p: float | None = flag(None, "min-p of the answer phase (default: as while thinking)")
    max_new_tokens: int = flag(32768, "thinking and answer together; the context window ends it too")

    def __post_init__(self):
        for name in ("cold_stop", "answer_temperature", "answer_top_k", "answer_top_p", "answer_min_p"):
            if getattr(self, name) is None:
                default = self.method == "soft" if name == "cold_stop" else getattr(self, name.removeprefix("answer_"))
                object.__setattr__(self, name, default)
        for prefix in ("", "answer_"):
            check_truncation(*(getattr(self, prefix + name) for name in ("temperature", "top_k", "top_p", "min_p")), prefix)
        for name, low in (("max_topk", 1), ("cold_stop_entropy", 0), ("cold_stop_steps", 1), ("max_new_tokens", 1)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("gumbel_temperature", "dirichlet_alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.noise and self.method != "soft":
            raise ValueError(f"noise changes concept tokens: it needs method soft, not {self.method}")


def check_truncation(temperature: float, top_k: int, top_p: float, min_p: float, prefix: str = "") -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{prefix}temperature must be above 0, not {temperature} (for argmax use method greedy)")
    if top_k < 0:
        raise ValueError(f"{prefix}top_k must be at least 1, or 0 for all tokens, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{prefix}top_p must be above 0 and at most 1, not {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"{prefix}min_p must be between 0 and 1, not {min_p}")


# ----------------------------------------------------------------------------------------------------- concept tokens


def truncated(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k, then top-p, then min-p, each renormalised.

    logits [B, V] -> ids [B, K] by falling probability, probs [B, K] that sum to 1 (0 where cut off), and the entropy
    [B] in nats of softmax(logits / temperature) over the whole vocabulary.  K = top_k, or V where top_k is 0.
    """
    z = logits.float()
    z = ((z - z.amax(-1, keepdim=True)) / temperature).clamp_(min=-1e4)  # finite: a masked token adds 0 to H, not NaN
    p = torch.softmax(z, dim=-1)
    # log p = z - log sum exp z, and log sum exp z = -log max p, since max z = 0: no logarithm per token.  One row is
    # summed as two, since PyTorch sums a single row in another order, and a row must not depend on its batch.
    entropy = -p.amax(-1).log() - (p * z).expand(max(2, len(z)), -1).sum(-1)[: len(z)]
    p, ids = p.topk(min(top_k or p.shape[-1], p.shape[-1]))
    p = p / p.sum(-1, keepdim=True)
    if top_p < 1:  # a token stays when the ones before it have not reached the mass
        p = p * (p.cumsum(-1) - p < top_p)
        p = p / p.sum(-1, keepdim=True)
    p = p * (p >= min_p * p[:, :1])
    return ids, p / p.sum(-1, keepdim=True), entropy


def concept_token(logits: Tensor, temperature: float = 0.6, top_k: int = 30, top_p: float = 0.95, min_p: float = 0.001,
                  max_topk: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """The concept token ct of each row, and the entropy H(p) that Cold Stop watches.

    logits float [B, V] -> ids LongTensor [B, n] by falling probability, probs float [B, n] that sum to 1 (0 where
    fewer than n remain), entropy float [B] in nats, taken before truncation.  n = min(max_topk, top_k, V); top_k = 0
    keeps all.  ValueError for a temperature, top_k, top_p, min_p or max_topk out of range.
    """
    check_truncation(temperature, top_k, top_p, min_p)
    if max_topk < 1:
        raise ValueError(f"max_topk must be at least 1, not {max_topk}")
    ids, probs, entropy = truncated(logits, temperature, top_k, top_p, min_p)
    probs = probs[:, :max_topk]
    return ids[:, :max_topk], probs / probs.sum(-1, keepdim=True), entropy


def concept_embedding(embedding_weight: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """The next input embedding, e~ = sum_k ct[k] e(k), summed in float32 (probs' dtype).

    embedding_weight [V, d], ids [B, n], probs float32 [B, n] -> [B, d] in embedding_weight's dtype.
    """
    return (embedding_weight[ids] * probs[..., None]).sum(-2).to(embedding_weight.dtype)


def dirichlet(rng: np.random.Generator, ct: np.ndarray, alpha: float) -> np.ndarray:
    """A draw from Dirichlet(alpha ct), ct [n] -> [n]: normalised Gamma draws.  Where alpha is so small that all of them
    underflow, its limit: one component, drawn from ct."""
    gamma = rng.standard_gamma(alpha * ct)
    return gamma / gamma.sum() if gamma.any() else rng.multinomial(1, ct / ct.sum()).astype(float)


def draw(ids: Tensor, probs: Tensor, u: Tensor) -> Tensor:
    """Ordinary sampling by inverting the distribution function: ids, probs [B, K], u [B] uniform on [0, 1) -> [B]."""
    mass = probs.cumsum(-1)
    index = (mass < u[:, None] * mass[:, -1:]).sum(-1)
    return ids.gather(-1, index[:, None])[:, 0]


# -------------------------------------------------------------------------------------------- the end of thinking, as text


THINK, END = "<think>", "</think>"
INSTRUCTION = f"Reason step by step between {THINK} and {END}. After {END}, give the final answer."


def build_prompt(tokenizer: Tokenizer, question: str) -> str:
    """The chat with thinking opened.

    A reasoning model knows the tags as tokens and is given the question alone; an instruct model is told about them.
    """
    knows = tokenizer.core.token_to_id(END) is not None
    # Some Llama templates print today's date; a fixed one keeps a run repeatable.
    text = tokenizer.render(question if knows else f"{question}\n\n{INSTRUCTION}", date_string="26 Jul 2024")
    text = re.sub(rf"{THINK}\s*{END}\s*$", "", text)  # a template that skips the thought is not followed in that
    return text if text.rstrip().endswith(THINK) else text + THINK + "\n"


def marker_automaton(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Recognises </think> in a stream of tokens: uint8 [len(END), V], next = table[matched, id].

    `matched` counts the characters of </think> that the text ends with; len(END) means that it has been completed, be
    it by one token, by several (`</`, `think`, `>`), or by one that runs past it (`>\\n\\n`).
    """
    table = torch.zeros(len(END), vocab_size, dtype=torch.uint8)
    if (end := tokenizer.core.token_to_id(END)) is not None:
        table[:, end] = len(END)
        return table
    for token, i in tokenizer.core.get_vocab().items():  # the pieces' own spelling: ASCII stands for itself in it
        if i >= vocab_size:
            continue
        if "<" in token:  # </think> may begin in this token: it has no other "<", so only the last one counts
            tail = token[token.rindex("<"):]
            if END in token or END.startswith(tail):
                table[:, i] = len(END) if END in token else len(tail)
        for matched in range(1, len(END)):
            rest = END[matched:]
            if token.startswith(rest):
                table[matched, i] = len(END)
            elif rest.startswith(token):
                table[matched, i] = matched + len(token)
    return table


# ------------------------------------------------------------------------------------------------------ the method


class SoftThinking:
    """What `decode` asks at each step: logits in, next embeddings out.  All state is per row and on the device.

    A row thinks until </think> has been fed, whether the model came to it or Cold Stop forced it; then it answers until
    an end-of-sequence token, which ends the row at any time.  The discrete baselines differ in one line.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, settings: Settings, rows: int, trace: bool = False,
                 watched: bool = False):
        self.model, self.settings, self.trace = model, settings, trace
        self.host = settings.noise == "dirichlet"  # drawn by NumPy
        device, N = model.embed.weight.device, min(settings.max_new_tokens, model.config.context)
        n = min(settings.max_topk, settings.top_k or settings.max_topk, model.config.vocab_size)
        self.automaton = marker_automaton(tokenizer, model.config.vocab_size).to(device)
        self.marker = torch.tensor(tokenizer.encode(END), device=device)
        self.eos = torch.tensor(model.config.eos_ids, device=device)
        self.jobs: list[Job | None] = [None] * rows
        self.rngs: list[np.random.Generator | None] = [None] * rows
        self.started = [0.0] * rows

        def per_row(*shape: int, dtype=torch.long) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.t = per_row()  # tokens so far
        self.limit = per_row()  # tokens at most
        self.thinking = per_row(dtype=torch.bool)
        self.thought = per_row()  # tokens fed while thinking, </think> included
        self.calm = per_row()  # steps in a row with H < tau_H
        self.forced = per_row()  # tokens of </think> that Cold Stop has fed
        self.matched = per_row()  # characters of </think> at the end of the thought
        self.tokens = per_row(N + 1)  # most probable component, or token, of each step, and what comes when all is over
        self.u = per_row(N + 1, dtype=torch.float32)  # the uniform draw of each step
        if settings.noise == "gumbel":
            self.g = per_row(N + 1, n, dtype=torch.float32)
        if trace:
            self.steps = (per_row(N + 1, dtype=torch.float32), per_row(N + 1, n), per_row(N + 1, n, dtype=torch.float32))
        # What was fed last, for somebody who watches: live rows, their tokens, whether they thought them, components, probabilities.
        width = n if settings.method == "soft" else 1
        self.shown = watched and (per_row(dtype=torch.bool), per_row(), per_row(dtype=torch.bool), per_row(width),
                                  per_row(width, dtype=torch.float32))

    def begin(self, row: int, request: Request) -> None:
        s, N = self.settings, self.u.shape[1]
        self.jobs[row], self.started[row] = request.data, time.perf_counter()
        # All of a row's randomness comes from its own generator: neighbours, order and batch size do not enter.
        rng = self.rngs[row] = np.random.default_rng(request.data.seeds)
        self.u[row] = torch.from_numpy(rng.random(N, dtype=np.float32))
        if s.noise == "gumbel":
            self.g[row] = torch.from_numpy(rng.gumbel(size=self.g.shape[1:]))
        self.limit[row] = min(s.max_new_tokens, self.model.config.context - len(request.prompt.embeds))
        for counter in (self.t, self.thought, self.calm, self.forced, self.matched):
            counter[row] = 0
        self.thinking[row] = True

    def step(self, logits: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [rows, V] -> next embeddings [rows, d], finished rows [rows]; those not live keep t, thought, thinking."""
        s = self.settings
        rows = torch.arange(len(logits), device=logits.device)
        t, thinking = self.t.clone(), self.thinking & live
        if s.method != "greedy" or s.cold_stop or self.trace:  # argmax alone needs no distribution
            kept_ids, kept, H = truncated(logits, s.temperature, s.top_k, s.top_p, s.min_p)
            ids, ct = kept_ids[:, : s.max_topk], kept[:, : s.max_topk]
            ct = ct / ct.sum(-1, keepdim=True)
        if s.noise == "gumbel":
            ct = torch.softmax((ct.log() + self.g[rows, t]) / s.gumbel_temperature, dim=-1)
        elif s.noise == "dirichlet":
            drawn = [dirichlet(rng, c, s.dirichlet_alpha) if rng else c for rng, c in zip(self.rngs, ct.double().cpu().numpy())]
            ct = torch.tensor(np.stack(drawn), dtype=torch.float32, device=ct.device)

        # The token of this step: of a concept token its most probable component.
        u = self.u[rows, t]
        if s.method == "greedy":
            token = logits.argmax(-1)
        else:
            answer = (s.answer_temperature, s.answer_top_k, s.answer_top_p, s.answer_min_p)
            if answer == (s.temperature, s.top_k, s.top_p, s.min_p):
                spoken = draw(kept_ids, kept, u)
            else:
                spoken = draw(*truncated(logits, *answer)[:2], u)
            thought = ids.gather(-1, ct.argmax(-1, keepdim=True))[:, 0] if s.method == "soft" else draw(kept_ids, kept, u)
            token = torch.where(thinking, thought, spoken)
        matched = self.automaton[self.matched, token].long()
        by_itself = thinking & (matched == len(END)) & (self.forced == 0)

        # Cold Stop: after k sure steps feed </think> instead, token by token where the model has no single one.
        forced = self.forced
        if s.cold_stop:
            self.calm.add_(1).mul_(H < s.cold_stop_entropy)
            force = thinking & ~by_itself & ((self.calm >= s.cold_stop_steps) | (forced > 0))
            token = torch.where(force, self.marker[forced.clamp(max=len(self.marker) - 1)], token)
            forced, matched = forced + force, matched * ~force  # what the model would have said is not fed
        else:
            force = torch.zeros_like(thinking)
        ended = by_itself | (force & (forced == len(self.marker)))

        # What is fed.  A discrete token is a concept token of one component.
        if s.method == "soft":
            discrete = (~thinking | by_itself | force)[:, None]
            one = (torch.arange(ct.shape[1], device=ct.device) == 0).to(ct.dtype)
            fed_ids, fed = torch.where(discrete, token[:, None], ids), torch.where(discrete, one, ct)
            embeds = concept_embedding(self.model.embed.weight, fed_ids, fed)
        else:
            embeds, fed_ids, fed = self.model.embed(token), token[:, None], torch.ones_like(token[:, None])

        self.tokens[rows, t] = token
        if self.trace:
            for buffer, value in zip(self.steps, (H, ids, ct)):
                buffer[rows, t] = value
        if self.shown:
            for buffer, value in zip(self.shown, (live, token, thinking, fed_ids, fed)):
                buffer.copy_(value)
        self.t += live
        self.thought += thinking
        self.thinking.copy_(torch.where(live, thinking & ~ended, self.thinking))
        for buffer, value in ((self.forced, forced), (self.matched, matched * (thinking & ~ended))):
            buffer.copy_(value)
        eos = (token[:, None] == self.eos).any(-1)
        return embeds, eos | (t + 1 >= self.limit)

    def end(self, row: int) -> dict:
        """The row's part of a record: ids, counts, and why it stopped."""
        job, t, thought = self.jobs[row], int(self.t[row]), int(self.thought[row])
        tokens = self.tokens[row, :t].tolist()
        eos = tokens[-1] in self.model.config.eos_ids
        if bool(self.forced[row] == len(self.marker)):
            stopped_by = "cold_stop"
        else:  # the model itself ends its thought: by </think>, or by an end-of-sequence token without it
            stopped_by = "length" if self.thinking[row] and not eos else "think_end"
        record = {"job": job, "thought_ids": tokens[:thought], "answer_ids": tokens[thought:], "stopped_by": stopped_by,
                  "finish_reason": "stop" if eos else "length", "thought_tokens": thought, "answer_tokens": t - thought,
                  "seconds": time.perf_counter() - self.started[row]}
        if self.trace:
            entropy, ids, probs = (x[row, :thought].tolist() for x in self.steps)
            record["steps"] = [{"entropy": h, "ids": [i for i, p in zip(ii, pp) if p > 0], "probs": [p for p in pp if p > 0]}
                               for h, ii, pp in zip(entropy, ids, probs)]
        return record


@dataclass(frozen=True)
class Job:
    """One sample of one question."""

    index: int
    question: str
    prompt: str
    sample: int
    seeds: tuple[int, ...]


def think(model: Transformer, tokenizer: Tokenizer, questions: list[str], settings: Settings = Settings(), seed: int = 0,
          samples: list[int] | None = None, batch_size: int | None = None, trace: bool = False,
          watch: Callable | None = None) -> Iterator[tuple[int, dict]]:
    """Answer questions; yields (index into questions, record) as each is finished.

    samples[i] numbers the sample that is wanted of questions[i] (default 0): name a question several times for several.
    batch_size sequences are decoded side by side (default: as many as there are questions, at most 16).  What comes out
    depends on seed, question, sample number and settings, to the bit not on what else is asked or in which order; with
    another batch_size products may round differently.
    A record holds question, prompt, method, settings, seed, sample, thought_ids, thought_text, answer_ids, answer_text,
    stopped_by ("think_end" | "cold_stop" | "length"), finish_reason ("stop" | "length"), thought_tokens, answer_tokens
    (the end-of-sequence token counted), seconds, and with trace: steps, one {entropy, ids, probs} per thinking step.
    watch(token, thinking, ids, probs) is called at every step with what is fed in row 0, as tensors.
    UserError for an empty question, a prompt that is longer than the context window, or too little memory for one sequence.
    """
    prompts, longest = {}, 0
    for question in dict.fromkeys(questions):  # each once, and all of them before the first is decoded
        if not question.strip():
            raise UserError("the question is empty: pass --question TEXT")
        if any("\ud800" <= c <= "\udfff" for c in question):
            raise UserError("the question is not valid UTF-8 text")
        prompts[question] = build_prompt(tokenizer, question)
        ids = tokenizer.encode(prompts[question])
        check_prompt(model.config, ids, question)
        longest = max(longest, len(ids))
    jobs = []
    for index, (question, sample) in enumerate(zip(questions, samples or [0] * len(questions))):
        seeds = (seed, int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "little"), sample)
        jobs.append(Job(index, question, prompts[question], sample, seeds))

    def requests() -> Iterator[Request]:
        text, prompt = None, None
        for job in jobs:
            if job.prompt != text:  # the samples of one question share the prompt, hence the prefill
                text, ids = job.prompt, tokenizer.encode(job.prompt)
                prompt = Prompt(model.embed(torch.tensor(ids, device=model.embed.weight.device)))
            yield Request(prompt, job)

    if not jobs:
        return
    rows = KVCache.fitting(model, batch_size or min(16, len(jobs)), longest, settings.max_new_tokens)
    method = SoftThinking(model, tokenizer, settings, rows, trace, watch is not None)

    def show() -> None:
        if method.shown[0][0]:
            watch(*(x[0] for x in method.shown[1:]))

    for part in decode(model, requests(), method, rows, show if watch else None):
        job = part.pop("job")
        thought, spoken = ([i for i in part[ids] if i not in model.config.eos_ids] for ids in ("thought_ids", "answer_ids"))
        yield job.index, {
            "question": job.question, "prompt": job.prompt, "method": settings.method, "settings": asdict(settings),
            "seed": seed, "sample": job.sample, "thought_ids": part["thought_ids"],
            "thought_text": tokenizer.decode(thought).split(END)[0].strip(), "answer_ids": part["answer_ids"],
            "answer_text": tokenizer.decode(spoken).strip(), **part}


# ---------------------------------------------------------------------------------------------------- the terminal view


class View:
    """Streams one sample: the thought as its most probable tokens, alternatives where the concept token is spread."""

    MATTERS = 0.1  # an alternative is shown from this probability on

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.out, self.was_thinking = tokenizer, sys.stdout, True
        colour = self.out.isatty() and not os.environ.get("NO_COLOR")
        self.dim, self.bold, self.plain = ("\033[2m", "\033[1m", "\033[0m") if colour else ("", "", "")
        self.stream = DecodeStream(skip_special_tokens=True)
        print(f"{self.bold}{THINK}{self.plain}", file=self.out)

    def __call__(self, token: Tensor, thinking: Tensor, ids: Tensor, probs: Tensor) -> None:
        if self.was_thinking and not thinking:
            self.was_thinking, self.stream = False, DecodeStream(skip_special_tokens=True)
            print(file=self.out)
        text = self.stream.step(self.tokenizer.core, int(token)) or ""  # a character may need several tokens
        self.out.write(text)
        if thinking:
            others = [(p, i) for p, i in zip(probs.tolist(), ids.tolist()) if p >= self.MATTERS and i != int(token)]
            if others:
                said = ", ".join(f"{self.tokenizer.decode([i])!r} {p:.2f}" for p, i in sorted(others, reverse=True))
                self.out.write(f"{self.dim}[{said}]{self.plain}")
        self.out.flush()


WHY = {"think_end": "ended by the model", "cold_stop": "ended by Cold Stop", "length": "cut by the length"}


def summary(record: dict, device: torch.device) -> str:
    """One line: how long it thought, why it stopped, how long it answered, how fast, with how much memory."""
    tokens = record["thought_tokens"] + record["answer_tokens"]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:  # kilobytes on Linux, bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (f"{record['thought_tokens']} thinking tokens ({WHY[record['stopped_by']]}), {record['answer_tokens']} answer "
            f"tokens ({record['finish_reason']}), {tokens / record['seconds']:.1f} tokens/s, peak memory {peak / 1e9:.2f} GB")


# ------------------------------------------------------------------------------------------------------ command line


TINY = str(Path(__file__).resolve().parent / "tiny" / "base")  # the bundled model


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="soft_thinking.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: sys.exit(fail(message))  # one line, without the usage
    parser.add_argument("--model", default=TINY, help="alias such as qwen2.5-7b, Hugging Face id, or folder (default: bundled)")
    parser.add_argument("--question", help="answer this one in the terminal (default: a problem of the task tiny)")
    parser.add_argument("--task", help=f"score a benchmark: {', '.join(tasks.TASKS)}")
    parser.add_argument("--data", metavar="FILE", help="score your own JSON lines: question, answer, optional choices, steps")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--methods", help="with --task: several, compared problem by problem (default: soft,cot,greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    parser.add_argument("--num-samples", type=int, default=1, help="answers per question (default: 1)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences decoded side by side (default: 16)")
    parser.add_argument("--device", help="cpu, cuda, or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", help="bfloat16, float16, or float32 (default: what the device is fast at)")
    parser.add_argument("--quantize", choices=["int8"], help="keep the weights in 8 bits: half the memory of bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step first: for long runs")
    parser.add_argument("--output", metavar="FILE", help="append one JSON line per sample; started again, it goes on")
    parser.add_argument("--trace", action="store_true", help="with --output: every concept token too")
    parser.add_argument("--json", metavar="FILE", help="with --task: the table as JSON")
    for f in fields(Settings):
        kind = next(t for t in (get_args(f.type) or (f.type,)) if t is not type(None))
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "choices": f.metadata.get("choices")}
        said = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=said, **options)
    return parser


def fail(message: str) -> int:
    print("soft_thinking.py:", " ".join(message.split()), file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    args = command_line().parse_args(arguments)
    try:
        for name, low in (("seed", 0), ("num_samples", 1), ("batch_size", 1)):
            if getattr(args, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
        if args.question is not None and (args.task or args.data):
            raise UserError("--question asks one question, --task and --data score many: pass one of them")
        for name in ("limit", "methods", "json"):
            if getattr(args, name) is not None and not (args.task or args.data):
                raise UserError(f"--{name} goes with --task or --data")
        score(args) if args.task or args.data else answer(args)
    except (UserError, tasks.UserError) as error:
        return fail(str(error))
    except torch.OutOfMemoryError:
        return fail("out of GPU memory: lower --batch-size or --max-new-tokens, or use a smaller --model")
    except KeyboardInterrupt:
        print("\ninterrupted" + (f"; what was finished is in {args.output}" if args.output else ""), file=sys.stderr)
        return 130
    return 0


def settings_of(args: argparse.Namespace, method: str | None = None) -> Settings:
    """The settings that the flags ask for; UserError for nonsense.  Noise is of method soft alone."""
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    if method:
        given |= {"method": method} | ({} if method == "soft" else {"noise": None})
    try:
        return Settings(**given)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from None


def recorded(args: argparse.Namespace, settings: Settings, model: Transformer) -> dict:
    """Everything that decides what is generated, for the records: other settings are not mixed in one file."""
    weight = model.embed.weight
    return {"model": args.model, "device": weight.device.type, "dtype": str(weight.dtype)[6:], "quantize": args.quantize,
            "compile": args.compile, "seed": args.seed} | asdict(settings)


def answer(args: argparse.Namespace) -> None:
    """One question in the terminal; what is finished is in the file at once."""
    settings, gold = settings_of(args), None
    if args.question is None:
        problem = tasks.load("tiny", limit=1)[0]
        args.question, gold = problem.question, problem.answer
        print(args.question)
    if not args.question.strip():
        raise UserError("the question is empty: pass --question TEXT")
    model, tokenizer = load(args.model, args.device, args.dtype, args.quantize, args.compile)
    kept = recorded(args, settings, model)
    key = ("question", "method", "seed", "sample")
    done = tasks.resume(args.output, {settings.method: kept}, key) if args.output else {}
    todo = [i for i in range(args.num_samples) if (args.question, settings.method, args.seed, i) not in done]
    view = View(tokenizer) if len(todo) == 1 else None
    for _, record in think(model, tokenizer, [args.question] * len(todo), settings, args.seed, todo,
                           min(args.batch_size, args.num_samples), args.trace, view):
        if args.output:
            tasks.append(args.output, record | {"settings": kept})
        if view is None:
            print(f"--- sample {record['sample']}\n{record['answer_text'] or record['thought_text']}")
        elif not record["answer_ids"]:
            print("\n(no answer: the thought was never closed)", end="")
        print(f"\n{summary(record, model.embed.weight.device)}", flush=True)
    if gold:
        print(f"(the right answer is {gold})")


def score(args: argparse.Namespace) -> None:
    """A benchmark: every method on the same problems, graded, recorded, and compared in a table."""
    methods = args.methods.split(",") if args.methods else [args.method] if hasattr(args, "method") else ["soft", "cot", "greedy"]
    if wrong := [m for m in methods if m not in ("soft", "cot", "greedy")]:
        raise UserError(f"--methods: no method {wrong[0]!r}; there are soft, cot, greedy")
    wanted = {method: settings_of(args, method) for method in methods}
    name = args.task or "data"
    problems = tasks.load(name, args.data, args.limit)
    task = tasks.TASKS[name]
    model, tokenizer = load(args.model, args.device, args.dtype, args.quantize, args.compile)
    slots = min(args.batch_size, len(problems) * args.num_samples)  # the same however many are left after an interruption

    def solver(settings: Settings) -> Callable:
        def solve(jobs: list[tuple[tasks.Problem, int]]) -> Iterator[tuple[tasks.Problem, int, dict]]:
            questions, samples = [tasks.prompt(problem, task) for problem, _ in jobs], [sample for _, sample in jobs]
            for i, record in think(model, tokenizer, questions, settings, args.seed, samples, slots, args.trace):
                yield *jobs[i], record
        return solve

    tasks.run(problems, task, {method: (recorded(args, settings, model), solver(settings)) for method, settings in wanted.items()},
              args.num_samples, args.output, args.json)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets question marks, not a traceback
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: the interpreter would take most of a second to unload PyTorch, also after Ctrl-C
