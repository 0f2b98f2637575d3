"""Soft Thinking: a language model thinks in concept tokens (Zhang et al., arXiv 2505.15778).

    python soft_thinking.py --model qwen2.5-7b --question "What is 17 * 24?"

Each thinking step feeds back not one sampled token, but the expectation of the next embedding.
`truncated` to `think_one` are the paper; `SoftThinking` is the same for a batch. The truncation's
order (top-k, top-p, min-p, max-topk, each renormalised) is the official code's; the paper says
top-n. The baselines of its table are `--method cot` and `greedy`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model import At, KVCache, Output, Prompt, Request, Tokenizer, Transformer, UserError
from model import check_prompt, check_ranges, check_truncation, decode, draw, text_seed


def truncated(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(logits / tau), its entropy H(p), then top-k, top-p, min-p, each renormalised.

    logits [B, V] -> ids [B, K] by falling probability, probs [B, K] that sum to 1 (0: cut off),
    H [B] in nats. K = top_k, or V where that is 0.
    """
    z = logits.float()
    z = (z - z.amax(-1, keepdim=True)).div_(temperature)
    p = torch.softmax(z, dim=-1)
    # H(p) = -sum p log p, and log p = z + log max p, since max z = 0: no logarithm per token. A
    # masked one's 0 * -inf is left out. One row is summed as two: alone it has another order.
    pz = z.mul_(p).expand(max(2, len(z)), -1).nansum(-1)[: len(z)]
    p, ids = p.topk(min(top_k or p.shape[-1], p.shape[-1]))
    H = -p[:, 0].log() - pz
    p = renormalised(p)
    if top_p < 1:  # a token stays if those before it do not reach the mass
        p = renormalised(p * (p.cumsum(-1) - p < top_p))
    return ids, above(p, min_p), H


def renormalised(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)


def above(p: Tensor, min_p: float) -> Tensor:
    return renormalised(p * (p >= min_p * p[:, :1])) if min_p else p


def concept_token(
    logits: Tensor,
    temperature: float = 0.6,
    top_k: int = 30,
    top_p: float = 0.95,
    min_p: float = 0.001,
    max_topk: int = 10,
) -> tuple[Tensor, Tensor, Tensor]:
    """The concept token ct of each row, and the entropy H(p) that Cold Stop watches.

    logits float [B, V] -> ids LongTensor [B, n] by falling probability, probs float [B, n] that
    sum to 1 (0 where fewer remain), entropy float [B] in nats, before truncation. top_k = 0 keeps
    all; n = min(max_topk, top_k, V). ValueError for what is out of range.
    """
    check_truncation(temperature, top_k, top_p, min_p, max_topk)
    ids, probs, H = truncated(logits, temperature, top_k, top_p, min_p)
    return ids[:, :max_topk], renormalised(probs[:, :max_topk]), H


def concept_embedding(embedding_weight: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    """The next input embedding, e~ = sum_k ct[k] e(k), summed in float32 (probs' dtype).

    embedding_weight [V, d], ids [B, n], probs float32 [B, n] -> [B, d] in the weight's dtype.
    """
    return (embedding_weight[ids] * probs[..., None]).sum(-2).to(embedding_weight.dtype)


def mixture(ids: Tensor, p: Tensor, s: "Settings", g: Tensor, rngs: list) -> tuple[Tensor, Tensor]:
    """Of all kept tokens [B, K], the concept token ids, ct [B, n]; with noise (2508.03440).

    g [B, n]: standard Gumbel; rngs: one a row, for Dirichlet(alpha p), drawn before the cut to n.
    """
    if s.noise == "dirichlet":
        alphas = s.dirichlet_alpha * p.double().cpu().numpy()
        drawn = np.stack([rng.dirichlet(alpha) for rng, alpha in zip(rngs, alphas)])
        p, order = torch.from_numpy(drawn).to(p).sort(descending=True)
        ids = ids.gather(1, order)
    ids, ct = ids[:, : s.max_topk], renormalised(p[:, : s.max_topk])
    if s.noise == "gumbel":
        ct = torch.softmax((ct.log() + g) / s.gumbel_temperature, dim=-1)
    return ids, ct


TRUNCATION = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Settings:
    """What decides what is generated, beside the seed. ValueError for nonsense."""

    method: Literal["soft", "cot", "greedy"] = "soft"  # concept tokens, sampled ones, or argmax
    temperature: float = 0.6  # tau while thinking
    top_k: int = 30  # so many most probable tokens are kept (0: all)
    top_p: float = 0.95  # then the smallest set with this mass
    min_p: float | None = None  # then those above this share of max p (default: 0.001; cot: 0)
    max_topk: int = 10  # n: then at most this many (paper: 5 to 20)
    cold_stop: bool | None = None  # end thinking when sure (default: on for soft, else off)
    cold_stop_entropy: float = 0.01  # tau_H: below it, in nats, a step is sure (paper: 0 to 0.1)
    cold_stop_steps: int = 256  # k: so many sure steps in a row stop it (paper: 256 to 1024)
    noise: Literal["gumbel", "dirichlet"] | None = None  # stochastic: 2508.03440
    gumbel_temperature: float = 0.5  # tau_g of softmax((log ct + g) / tau_g)
    dirichlet_alpha: float = 1.0  # alpha of Dirichlet(alpha p): larger: closer to p
    answer_temperature: float | None = None  # of the answer (default: the same)
    answer_top_k: int | None = None  # of the answer (default: the same)
    answer_top_p: float | None = None  # of the answer (default: the same)
    answer_min_p: float = 0.0  # of the answer
    cold_stop_answer: bool = False  # so many sure steps end the answer, too
    max_new_tokens: int = 32768  # thought and answer, within the context

    def __post_init__(self):
        soft = self.method == "soft"
        defaults = {"cold_stop": soft, "min_p": 0.001 if soft else 0.0}
        defaults |= {f"answer_{name}": getattr(self, name) for name in TRUNCATION[:3]}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_truncation(*self.truncation(), self.max_topk)
        check_truncation(*self.truncation("answer_"), prefix="answer_")
        least = {"cold_stop_entropy": 0, "cold_stop_steps": 1, "max_new_tokens": 1}
        check_ranges(self, "gumbel_temperature dirichlet_alpha", **least)
        if self.noise and not soft:
            raise ValueError(f"noise needs method soft, not {self.method}")

    def truncation(self, prefix: str = "") -> tuple:
        return tuple(getattr(self, prefix + name) for name in TRUNCATION)

    def gumbels(self, V: int) -> int:
        return min(self.max_topk, self.top_k or V, V) if self.noise == "gumbel" else 0


THINK, END = "<think>", "</think>"
INSTRUCTION = f"Reason step by step between {THINK} and {END}. After {END}, give the final answer."


def build_prompt(tokenizer: Tokenizer, question: str) -> str:
    """The chat with thinking opened; a model without tokens for the tags is told of them."""
    knows = tokenizer.core.token_to_id(END) is not None
    text = tokenizer.open(question if knows else f"{question}\n\n{INSTRUCTION}")
    return text if text.rstrip().endswith(THINK) else text + THINK + "\n"


# -------------------------------------------------------------------------- the paper, one sequence


@torch.inference_mode()
def think_one(
    model: Transformer, tokenizer: Tokenizer, question: str, s: Settings = Settings(), seed: int = 0
) -> tuple[list[int], list[int]]:
    """Ids of the thought (the most probable components) and of the answer."""
    E, eos, context = model.embed.weight, model.config.eos_ids, model.config.context
    prompt = tokenizer.encode(build_prompt(tokenizer, question))
    marker, automaton = tokenizer.encode(END), tokenizer.automaton(END, len(E))
    steps, n = min(s.max_new_tokens, context), s.gumbels(len(E))
    rng = np.random.default_rng((seed, text_seed(question), 0))
    u = torch.from_numpy(rng.random(steps + 1, dtype=np.float32)).to(E.device)
    g = torch.from_numpy(rng.gumbel(size=(steps + 1, n))).float().to(E.device)
    x, cache = model.embed(torch.tensor(prompt, device=E.device)), KVCache(model, 1, len(prompt))
    thought, answer, closed, entropy_streak, matched, forced = [], [], False, 0, 0, 0
    for t in range(min(steps, context - len(prompt))):
        cache.reserve(len(prompt) + t)
        logits = model.logits(model(x[None], cache)[:, -1])  # x [T, d], later [1, d] -> [1, V]
        ids, p, H = truncated(logits, *s.truncation())
        ids, ct = mixture(ids, p, s, g[t : t + 1], [rng])
        entropy_streak = entropy_streak + 1 if H < s.cold_stop_entropy else 0
        sure = s.cold_stop and entropy_streak >= s.cold_stop_steps
        if closed:  # the answer: ordinary sampling
            ids, p, _ = truncated(logits, *s.truncation("answer_"))
            token = int(draw(p, u[t : t + 1], ids))
            if sure and s.cold_stop_answer:
                token = eos[0]
            answer.append(token)
            x = E[[token]]
        else:
            token = int(ids[0, ct.argmax()])
            matched = int(automaton[matched, token])
            closed = matched == len(END) and not forced  # by the model itself
            x = E[[token]] if closed else concept_embedding(E, ids, ct)
            # Cold Stop: after k sure steps </think> is fed, token by token.
            if (sure or forced) and not closed:
                token, forced, matched = marker[forced], forced + 1, 0
                x, closed = E[[token]], forced == len(marker)
            entropy_streak = 0 if closed else entropy_streak
            thought.append(token)
        if token in eos:
            break
    return thought, answer


# ----------------------------------------------------------------------------- the same for a batch

THINKING, CLOSING, FORCED, ANSWERING, ENDED = range(5)  # phases of a step


class SoftThinking:
    """`think_one` for every row, `where` for `if`; and the discrete baselines.

    Notes: phase, entropy [rows]; ids, ct [rows, n]: what soft feeds, and others choose from.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, s: Settings, rows: int, noted: bool = False
    ):
        self.E, self.s, self.host = model.embed.weight, s, s.noise == "dirichlet"
        self.distribution = s.method != "greedy" or s.cold_stop or noted
        V, device, N = len(self.E), model.device, min(s.max_new_tokens, model.config.context)
        self.automaton = tokenizer.automaton(END, V).to(device)
        self.marker = torch.tensor(tokenizer.encode(END), device=device)
        self.counters = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.entropy_streak, self.matched, self.forced = self.counters
        self.thinking = self.entropy_streak.bool()
        self.eos = model.config.eos_ids[0] if s.cold_stop_answer else None
        self.rows, self.rngs = torch.arange(rows, device=device), [np.random.default_rng()] * rows
        self.g = torch.zeros(rows, N + 1, s.gumbels(V), device=device)

    def begin(self, row: int, request: Request) -> None:
        self.rngs[row] = request.rng
        self.g[row] = torch.from_numpy(request.rng.gumbel(size=self.g.shape[1:]))
        self.counters[:, row] = 0
        self.thinking[row] = True

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, ...]:
        s, thinking = self.s, self.thinking.clone()
        if s.method == "greedy":
            token = logits.argmax(-1)
            ids, ct, H = token[:, None], torch.ones_like(logits[:, :1]), logits[:, 0]
        if self.distribution:
            kept, nucleus, H = truncated(logits, *s.truncation()[:3])
            p = above(nucleus, s.min_p)
            ids, ct = mixture(kept, p, s, self.g[self.rows, at.t], self.rngs)
        if s.method != "greedy":
            if s.method == "soft":  # the most probable component names the step
                thought = ids.gather(1, ct.argmax(-1, keepdim=True))[:, 0]
            else:
                thought = draw(p, at.u, kept)
            if s.truncation("answer_")[:3] != s.truncation()[:3]:
                kept, nucleus, _ = truncated(logits, *s.truncation("answer_")[:3])
            said = draw(above(nucleus, s.answer_min_p), at.u, kept)
            token = torch.where(thinking, thought, said)
        matched = self.automaton[self.matched, token].long()
        closing = thinking & (matched == len(END)) & (self.forced == 0)
        force = ended = torch.zeros_like(thinking)
        if s.cold_stop:
            self.entropy_streak.add_(1).mul_(H < s.cold_stop_entropy)
            sure = self.entropy_streak >= s.cold_stop_steps
            force = thinking & ~closing & (sure | (self.forced > 0))
            marker = self.marker[self.forced.clamp(max=len(self.marker) - 1)]
            token = torch.where(force, marker, token)
            self.forced += force
            if s.cold_stop_answer:
                ended = sure & ~thinking
                token = token.masked_fill(ended, self.eos)
        # A discrete token is a concept token of one component.
        discrete = (~thinking | closing | force)[:, None]
        first = (torch.arange(ct.shape[1], device=ct.device) == 0).to(ct)
        ids, ct = torch.where(discrete, token[:, None], ids), torch.where(discrete, first, ct)
        embeds = concept_embedding(self.E, ids, ct) if s.method == "soft" else self.E[token]
        self.thinking.logical_and_(~closing & ~(force & (self.forced == len(self.marker))))
        self.matched.copy_(matched * (self.thinking & ~force))
        self.entropy_streak.mul_(self.thinking == thinking)  # counted anew in the answer
        phase = (closing * CLOSING + force * FORCED).masked_fill(~thinking, ANSWERING) + ended
        return token, embeds, phase, H, ids, ct


def think(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[str],
    settings: Settings = Settings(),
    seed: int = 0,
    samples: list[int] | None = None,
    batch_size: int = 16,
    trace: bool = False,
    watch: Callable | None = None,
    order: Iterator[int] | None = None,
) -> Iterator[tuple[int, dict]]:
    """Answer questions; yields (index, record) as each ends.

    samples[i] numbers questions[i]'s sample (default 0); batch_size sequences are decoded
    side by side, independently of each other (README, Limits). order: which i (None: all).
    trace adds the steps; watch(token, *notes) sees row 0's. UserError: too long.
    """
    if type(questions) is str:
        raise ValueError("questions must be a list, not a text")
    prompts, tokens = {}, {}
    for question in dict.fromkeys(questions):
        if not question.strip():
            raise UserError("the question is empty")
        prompts[question] = text = build_prompt(tokenizer, question)
        tokens[question] = ids = tokenizer.encode(text)
        check_prompt(model.config, ids, question)
    samples = [k for _, k in zip(questions, samples or [0] * len(questions), strict=True)]

    def requests() -> Iterator[Request]:
        last = prompt = None
        for i in order or range(len(questions)):
            if questions[i] != last:  # its samples share a prefill
                last = questions[i]
                prompt = Prompt(model.embed(torch.tensor(tokens[last], device=model.device)))
            yield Request(prompt, (seed, text_seed(last), samples[i]), i)

    rows = model.plan(batch_size, max([0, *map(len, tokens.values())]), settings.max_new_tokens)
    keep = 4 if trace or watch else 1
    method = SoftThinking(model, tokenizer, settings, rows, keep > 1)
    for output in decode(model, requests(), method, rows, settings.max_new_tokens, keep, watch):
        i = output.request.data
        about = {"question": questions[i], "prompt": prompts[questions[i]], "seed": seed}
        about |= {"sample": samples[i], "method": settings.method, "settings": asdict(settings)}
        yield i, about | record(model, tokenizer, output, trace)


def record(model: Transformer, tokenizer: Tokenizer, output: Output, trace: bool) -> dict:
    """What was thought and said."""
    phase, eos = output.notes[0], model.config.eos_ids
    n = int((phase < ANSWERING).sum())
    finish = "cold_stop" if phase[-1] == ENDED else "stop" if output.ids[-1] in eos else "length"
    finish = finish if output.finite else "not finite"
    stopped_by = finish if phase[-1] in (THINKING, FORCED) and finish != "stop" else "think_end"
    if (phase == FORCED).sum() == len(tokenizer.encode(END)):
        stopped_by = "cold_stop"
    thought, said = output.ids[:n], output.ids[n:]
    texts = [tokenizer.decode([i for i in ids if i not in eos]) for ids in (thought, said)]
    found = {"thought_ids": thought, "thought_text": texts[0].split(END)[0].strip()}
    found |= {"answer_ids": said, "answer_text": texts[1].strip(), "stopped_by": stopped_by}
    found |= {"finish_reason": finish, "thought_tokens": n, "answer_tokens": len(said)}
    found["seconds"] = output.seconds
    if trace:
        found["steps"] = []
        for H, ids, ct in zip(*(note[:n].tolist() for note in output.notes[1:])):
            ids, ct = [i for i, p in zip(ids, ct) if p > 0], [p for p in ct if p > 0]
            found["steps"].append({"entropy": H, "ids": ids, "probs": ct})
    return found


if __name__ == "__main__":
    from lab import cli, show

    cli.main(__doc__, Settings, think, show.Thought)
