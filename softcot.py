"""SoftCoT: soft thoughts of a small frozen assistant, by one projection (Xu et al., 2502.12134).

    python softcot.py                                            # one problem, with and without
    python softcot.py train --model qwen2.5-7b --assistant qwen2.5-1.5b --task gsm8k --folder out
    python softcot.py eval --projection out/projection.safetensors    # --model and so on as above

Read `soft_thoughts`, `think_one`, `input_one` and `loss_one`: that is the paper. Both models are
frozen. AdamW without decay, gradients clipped to norm 1 and a linear fall are the official code's;
its W and b are bfloat16, ours float32. It trains 32 thoughts and evaluates 4 (`eval --thoughts 4`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model import At, Prompt, Request, Tokenizer, Transformer, UserError
from model import check_prompt, check_ranges, decode, draw, text_seed

# ---------------------------------------------------------------------------------------- prompts

PROMPT_VERSION = 1  # of this section; a projection remembers with which one it was trained
INSTRUCTION = "Note the steps.\n{question}"  # for the assistant
SLOT = "\ue000soft thoughts\ue000"  # where the thoughts go in the rendered chat; nobody types it


def placeholder(tokenizer: Tokenizer) -> int:
    """The id of [UNK], or of what the tokenizer has in its place."""
    unk, pad, eos = (tokenizer.special.get(f"{name}_token") for name in ("unk", "pad", "eos"))
    names = "[UNK]", unk, "<|end_of_text|>", pad, eos  # the third as published, for Llama 3
    ids = [tokenizer.core.token_to_id(name) for name in names if name]
    if known := [i for i in ids if i is not None]:
        return known[0]
    raise UserError("the tokenizer has no unknown, padding or end token: use another model")


def split_at_slot(text: str) -> tuple[str, str]:
    left, slot, right = text.partition(SLOT)
    if not slot or SLOT in right:
        raise UserError("the chat template does not repeat messages as they are: use another model")
    return left, right


def prompt_texts(tokenizer: Tokenizer, question: str, n: int) -> tuple[str, str]:
    """The LLM's chat, ready to be answered, before and after n thoughts."""
    if not n:
        return tokenizer.open(question), ""
    return split_at_slot(tokenizer.open(f"{question}\n{SLOT}"))


def assistant_ids(tokenizer: Tokenizer, question: str, n: int) -> list[int]:
    """What the assistant reads: n placeholders last, since nothing behind them changes theirs."""
    message = INSTRUCTION.format(question=question) + "\n" + SLOT
    left, _ = split_at_slot(tokenizer.render(message, date_string="26 Jul 2024"))
    return tokenizer.encode(left) + [placeholder(tokenizer)] * n


def target_text(tokenizer: Tokenizer, answer: str, steps: list[str], boxed: bool = False) -> str:
    """y without its end (in training eos_token's id): steps and answer, as the prompt asks for."""
    said = f"The answer is \\boxed{{{answer}}}." if boxed else f"The answer is {answer}."
    if tokenizer.core.token_to_id("</think>") is not None:
        return f"{' '.join(steps)}</think>{said}"
    return "\n".join([*steps, said])


@dataclass(frozen=True)
class Sequence:
    """Token ids of the LLM's input: left, n placeholders, right; in training then the labels y."""

    left: list[int]
    n: int
    right: list[int]
    labels: list[int]
    unk: int

    @property
    def ids(self) -> list[int]:
        return self.left + [self.unk] * self.n + self.right + self.labels

    @property
    def start(self) -> int:  # of the labels: the length of the prompt
        return len(self.left) + self.n + len(self.right)


def sequence(tokenizer: Tokenizer, question: str, n: int, labels: list[int]) -> Sequence:
    left, right = prompt_texts(tokenizer, question, n)
    if not n:
        return Sequence(tokenizer.encode(left), 0, [], labels, 0)
    # Encoded behind a placeholder, as it will stand: some tokenizers put a space before a text.
    unk = placeholder(tokenizer)
    first, *behind = tokenizer.encode(tokenizer.core.id_to_token(unk) + right)
    assert first == unk
    return Sequence(tokenizer.encode(left), n, behind, labels, unk)


# ------------------------------------------------------------------------- the paper, one problem


def soft_thoughts(trained: dict[str, Tensor], h: Tensor) -> Tensor:
    """T = h W^T + b: [..., n, d_a] -> [..., n, d], in the dtype of what is trained."""
    W, b = trained["weight"], trained["bias"]  # [d, d_a], [d]
    return F.linear(h.to(W), W, b)


def think_one(
    assistant: Transformer, tokenizer: Tokenizer, trained: dict[str, Tensor], question: str, n: int
) -> Tensor:
    """A question's soft thoughts T [n, d]; the tokenizer is the assistant's."""
    ids = assistant_ids(tokenizer, question, n)
    hidden = assistant(assistant.embed(torch.tensor([ids], device=assistant.device)))  # frozen
    h = hidden[0, len(ids) - n :]  # [n, d_a], after the final norm, at the placeholders
    return soft_thoughts(trained, h)


def input_one(model: Transformer, s: Sequence, T: Tensor | None = None) -> Tensor:
    """[E(left), T, E(right)], then E(y) in training: [len(s.ids), d]. T None: E(placeholders)."""
    parts = s.left, [s.unk] * s.n, s.right + s.labels
    ids = (torch.tensor(part, dtype=torch.long, device=model.device) for part in parts)
    left, unk, right = map(model.embed, ids)
    return torch.cat([left, unk if T is None else T.to(unk), right])


def loss_one(model: Transformer, s: Sequence, T: Tensor | None = None) -> Tensor:
    """-sum_i log p(y_i | input, y_<i) / |y|: float32 scalar."""
    log_p = model.logits(model(input_one(model, s, T)[None])[0]).log_softmax(-1)  # [len(s.ids), V]
    first = s.start - 1  # position t predicts token t + 1, the prompt's last one the first label
    return -sum(log_p[first + i, y] for i, y in enumerate(s.labels)) / len(s.labels)


# ----------------------------------------------------------------------------- the same for a batch


@torch.no_grad()
def hidden_states(
    assistant: Transformer, ids: list[list[int]], n: int, h: Tensor | None = None, most: int = 8192
) -> Tensor:
    """h: the assistant's hidden states at the last n positions of each row, [rows, n, d_a].

    Rows of similar length share a batch of at most so many tokens, padded on the right, where
    causality keeps the padding from mattering. h may be given, to be filled, on any device.
    """
    if h is None:
        h = torch.empty(len(ids), n, assistant.config.d, dtype=assistant.embed.weight.dtype)
    batches: list[list[int]] = []
    for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if not batches or len(ids[i]) * (len(batches[-1]) + 1) > most:
            batches.append([])
        batches[-1].append(i)
    for rows in tqdm(batches, desc="assistant", delay=1, leave=False):
        padded = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)
        hidden = assistant(assistant.embed(padded.to(assistant.device)))  # [B, T, d_a]
        for i, row in zip(rows, hidden):
            h[i] = row[len(ids[i]) - n : len(ids[i])]
    return h


def input_embeddings(model: Transformer, batch: list[Sequence], T: Tensor | None) -> Tensor:
    """T [B, n, d] in the placeholders' places -> [B, len, d], padded on the right."""
    rows = [input_one(model, s, None if T is None else T[b]) for b, s in enumerate(batch)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def negative_log_likelihood(
    model: Transformer,
    batch: list[Sequence],
    T: Tensor | None,
    forward: Callable = lambda model, x, L: model(x)[:, L:],
) -> Tensor:
    """-sum_i log p(y_i | input, y_<i) over all labels of all rows; float32 scalar.

    Logits only for the labels: of 150,000 tokens the others would need more memory than the model.
    forward(model, x, L) may take the first L positions, before every thought, as constants.
    """
    L = 0 if T is None else min(len(s.left) for s in batch)
    hidden = forward(model, input_embeddings(model, batch, T), L)  # [B, len - L, d]
    # Position t predicts token t + 1, so the prompt's last position predicts the first label.
    at = [(b, s.start - 1 - L + i, y) for b, s in enumerate(batch) for i, y in enumerate(s.labels)]
    rows, places, labels = torch.tensor(at, device=hidden.device).T
    return F.cross_entropy(model.logits(hidden[rows, places]), labels, reduction="sum")


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Training:
    """What changes a training or its log, but for models and data. ValueError for nonsense."""

    method: Literal["softcot", "cot-unk", "lora"] = "softcot"  # cot-unk: a soft prompt instead
    thoughts: int = 32  # N: soft thoughts
    lr: float = 2e-5  # peak learning rate
    warmup: int = 0  # steps in which the learning rate rises; then it falls linearly to 0
    epochs: int = 10  # times that each problem is seen
    batch_size: int = 4  # problems in one pass through the model
    accumulate: int = 1  # passes whose gradients make one step
    rank: int = 16  # r of LoRA
    alpha: float = 32.0  # alpha of LoRA: B A is scaled by alpha / r
    dropout: float = 0.1  # of LoRA's input
    dev: int = 200  # problems, the last ones, that are held out for the validation loss
    dev_limit: int = 50  # of these, how many are answered greedily for the accuracy
    max_new_tokens: int = 1024  # of each such answer: a limit of its own, lower than eval's
    seed: int = 0  # of the start, the order and the dropout

    def __post_init__(self):
        ones = "thoughts", "epochs", "batch_size", "accumulate", "rank", "dev", "max_new_tokens"
        check_ranges(self, "lr alpha", **dict.fromkeys(ones, 1), warmup=0, dev_limit=0, seed=0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


def projection(d_a: int, d: int) -> dict[str, Tensor]:
    """W [d, d_a] and b [d] before training, float32, as nn.Linear draws them."""
    return {name: p.data for name, p in nn.Linear(d_a, d).named_parameters()}


def shuffled(lengths: list[int], epoch: int, s: Training) -> list[list[int]]:
    """The steps of an epoch, each a list of indices: a function of seed and epoch."""
    order = np.random.default_rng((s.seed, epoch)).permutation(len(lengths)).tolist()
    size = s.batch_size * s.accumulate
    return [order[i : i + size] for i in range(0, len(order), size)]


def train(
    trained: dict[str, Tensor],
    loss: Callable[[list[int]], Tensor],
    sequences: list[Sequence],
    s: Training = Training(),
    step: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    order: Callable[[list[int], int, Training], list[list[int]]] = shuffled,
) -> Iterator[tuple[int, float, float, list[int]]]:
    """Train the tensors in place; yields (step, loss, norm, indices) BEFORE each update.

    step: updates so far; loss: the mean per label; norm: its gradient's. Who iterates may log, save
    or stop, and go on later. loss(indices) sums over labels, as `negative_log_likelihood` does.
    """
    weights = [x.requires_grad_() for x in trained.values()]
    optimizer = optimizer or torch.optim.AdamW(weights, weight_decay=0.0)
    lengths = [len(q.ids) for q in sequences]
    steps = [indices for epoch in range(s.epochs) for indices in order(lengths, epoch, s)]
    total = len(steps)
    for done in range(step, total):
        indices, mean = steps[done], 0.0
        # A step's own seed, for LoRA's dropout: going on needs no state but the step's number.
        torch.manual_seed(int(np.random.default_rng((s.seed, done)).integers(2**63)))
        labels = sum(len(sequences[i].labels) for i in indices)
        optimizer.zero_grad()
        for i in range(0, len(indices), s.batch_size):  # accumulated: as of one larger batch
            part = loss(indices[i : i + s.batch_size]) / labels
            part.backward()
            mean += part.item()
        norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
        rate = (done + 1) / s.warmup if done < s.warmup else (total - done) / (total - s.warmup)
        optimizer.param_groups[0]["lr"] = s.lr * rate
        yield done, mean, norm, indices
        optimizer.step()


# -------------------------------------------------------------------------------------- answering


@dataclass(frozen=True)
class Settings:
    """What decides what is answered, beside the seed. ValueError for nonsense."""

    thoughts: int = 32  # N: soft thoughts; 0: the plain prompt
    num_samples: int = 1  # draws whose majority is the answer
    seeds: int = 1  # times that everything is answered
    temperature: float | None = None  # 0 is greedy (default: 0 for one sample, 0.7 for several)
    max_new_tokens: int = 4096  # of each answer (while training, --max-new-tokens of `train`)

    def __post_init__(self):
        if self.temperature is None:
            object.__setattr__(self, "temperature", 0.7 if self.num_samples > 1 else 0.0)
        positive = "temperature" if self.temperature else ""
        check_ranges(self, positive, thoughts=0, num_samples=1, seeds=1, max_new_tokens=1)


class Sampler:
    """The most probable token, or (temperature > 0) a draw; what is fed is its embedding."""

    def __init__(self, model: Transformer, temperature: float = 0.0):
        self.model, self.temperature = model, temperature

    def begin(self, row: int, request: Request) -> None: ...

    def step(self, logits: Tensor, at: At) -> tuple[Tensor, Tensor]:
        token = logits.argmax(-1)
        if self.temperature:
            token = draw(torch.softmax(logits / self.temperature, -1), at.u)
        return token, self.model.embed(token)


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[str],
    s: Settings = Settings(),
    think: Callable[[str, int], Tensor] | None = None,
    seed: int = 0,
    jobs: list[tuple[int, int]] | None = None,
    batch_size: int = 16,
    ask: Callable[[str], str] = str,
) -> Iterator[tuple[tuple[int, int, int], dict]]:
    """Yields ((index into questions, number of the seed, draw), record) as they are finished.

    think(question, n) makes T [n, d], as `partial(think_one, assistant, its tokenizer, trained)`;
    None leaves the placeholders' own embeddings. jobs: pairs (index, number of the seed), by
    default all. ask(question) is what the LLM is asked. UserError, first, for a prompt too long.
    """
    if type(questions) is str:
        raise ValueError("questions must be a list, not a text")
    sequences = {x: sequence(tokenizer, ask(x), s.thoughts, []) for x in dict.fromkeys(questions)}
    for question, q in sequences.items():
        check_prompt(model.config, q.ids, question)
    every = [(index, k) for index in range(len(questions)) for k in range(s.seeds)]

    def requests() -> Iterator[Request]:
        last, prompt = None, None
        for index, k in every if jobs is None else jobs:
            question = questions[index]
            if question != last:  # what is asked of one question shares its prompt
                T = think(question, s.thoughts) if think and s.thoughts else None
                last, prompt = question, Prompt(input_one(model, sequences[question], T))
            for i in range(s.num_samples):
                yield Request(prompt, (seed, k, text_seed(question), i), (index, k, i))

    longest = max((len(q.ids) for q in sequences.values()), default=1)
    rows = model.plan(batch_size, longest, s.max_new_tokens)
    for output in decode(model, requests(), Sampler(model, s.temperature), rows, s.max_new_tokens):
        q = sequences[questions[output.request.data[0]]]
        between = f"<{q.n} {'soft thoughts' if think else 'placeholders'}>" if q.n else ""
        text = tokenizer.decode([t for t in output.ids if t not in model.config.eos_ids])
        record = {"prompt": tokenizer.decode(q.left) + between + tokenizer.decode(q.right)}
        record |= {"text": text, "answer_tokens": len(output.ids), "seconds": output.seconds}
        yield output.request.data, record | {"not_finite": int(not output.finite)}


if __name__ == "__main__":
    import softcot  # this file under the name by which the baselines know it
    from baselines import lora, prompts
    from lab import softcot_cli

    softcot_cli.main(softcot, lora, prompts)
