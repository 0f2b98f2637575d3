"""The bundled reasoning model, made from nothing: problems, tokenizers, training, accuracies.

    python tiny/make.py                 # the two models and their problems: 12 minutes on two cores

Top to bottom: the stories and their exclusion keys, the prompts, the tokenizers, the models, the
training, the decoding, the measuring. Same seed and same device give the same weights: every random
choice comes from a seeded generator, and training stops after a number of steps, never after a
time.
"""

import argparse
import copy
import json
import math
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lab import fast, fused
from model import Prompt, Request, Tokenizer, Transformer, config_from_json, decode

# ----------------------------------------------------------------------------------------- problems
# A story follows one number, x, from sentence to sentence. It is generated together with its
# program: a list of (target, a, sign, b), where a and b are numbers or the names "x" and "t" (t: a
# value needed on the way to x).

MOST = 800  # no value in any solution is larger

WOMEN = ["Anna", "Beth", "Clara", "Diana", "Emma", "Fiona", "Grace", "Helen"]
MEN = ["Adam", "Ben", "Carl", "David", "Eric", "Frank", "George", "Henry"]
ITEMS = ["apples", "balls", "beads", "books", "buttons", "cards", "coins", "cookies", "eggs"]
ITEMS += ["flowers", "marbles", "pears", "pencils", "shells", "stamps", "stones"]
PACKS = ["bags", "boxes", "packs", "jars"]
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}

OPENINGS = [
    "{name} has {x} {items}.",
    "{name} starts with {x} {items}.",
    "There are {x} {items} in {name}'s room.",
    "{name} collects {x} {items}.",
    "In the morning {name} counts {x} {items}.",
]

# Kind of step -> (wordings, program). {he} is the name or the pronoun, {a} and {b} are numbers.
STEPS = {
    "gain": (
        [
            "{he} buys {a} more {items}.",
            "{friend} gives {name} {a} {items}.",
            "Then {he} finds {a} {items}.",
            "{a} more {items} arrive by mail.",
            "{he} wins {a} {items} in a game.",
        ],
        [("x", "x", "+", "a")],
    ),
    "lose": (
        [
            "{he} gives {a} {items} to {friend}.",
            "Then {he} loses {a} {items}.",
            "{he} sells {a} of the {items}.",
            "{friend} borrows {a} {items} from {name}.",
            "{a} {items} break and are thrown away.",
        ],
        [("x", "x", "-", "a")],
    ),
    "times": (
        [
            "By summer {he} has {times} as many.",
            "The next day there are {times} as many {items}.",
            "After a lucky week {he} owns {times} as many {items}.",
        ],
        [("x", "x", "*", "a")],
    ),
    "share": (
        [
            "{he} splits them evenly into {a} piles and keeps one pile.",
            "{he} keeps only {part} of the {items}.",
            "The {items} are shared equally by {a} people, {name} being one of them.",
        ],
        [("x", "x", "/", "a")],
    ),
    "packs": (
        [
            "{he} buys {a} {packs} with {b} {items} each.",
            "{friend} brings {a} {packs} of {b} {items}.",
            "Then {he} gets {b} {items} from each of {a} friends.",
        ],
        [("t", "a", "*", "b"), ("x", "x", "+", "t")],
    ),
    "treat": (
        [
            "{he} gives {b} {items} to each of {a} friends.",
            "{a} children take {b} {items} each.",
            "Then {he} fills {a} {packs} with {b} {items} each and sells them.",
        ],
        [("t", "a", "*", "b"), ("x", "x", "-", "t")],
    ),
    "join": (
        [
            "{friend} has {a} {items} more than that, and they put all their {items} together.",
            "{friend}, who owns {a} more {items} than {name}, adds them all to the heap.",
        ],
        [("t", "x", "+", "a"), ("x", "x", "+", "t")],
    ),
    "part": (
        [
            "{he} gives {part} of the {items} to {friend}.",
            "Then {part} of the {items} get lost.",
            "{friend} takes {part} of them.",
        ],
        [("t", "x", "/", "a"), ("x", "x", "-", "t")],
    ),
}
QUESTIONS = {
    "total": (
        [
            "How many {items} does {name} have now?",
            "How many {items} are there at the end?",
            "How many {items} are left?",
        ],
        [],
    ),
    "money": (
        [
            "Each one is sold for {a} dollars. How many dollars is that?",
            "How many dollars are they worth at {a} dollars each?",
        ],
        [("x", "x", "*", "a")],
    ),
    "goal": (
        [
            "{he} wants {a} {items}. How many are missing?",
            "How many more {items} are needed to reach {a}?",
        ],
        [("x", "a", "-", "x")],
    ),
}
DISTRACTORS = [
    "{friend} is {d} years old.",
    "It is {d} degrees outside.",
    "{he} also has {d} {others}.",
    "{friend} has {d} {others}.",
    "The walk home takes {d} minutes.",
    "There are {d} chairs in the room.",
    "{d} {others} lie on the table.",
    "The bus number is {d}.",
]


@dataclass
class Problem:
    question: str
    name: str
    start: int
    program: list  # (target, a, sign, b)
    spare: list  # numbers of the distractors: a wrong solution may use one

    def work(self, program=None, slips=None):
        """-> (equations, answer). `slips`: index of an operation -> what its result is off by."""
        env, equations = {"x": self.start}, []
        for i, (target, a, sign, b) in enumerate(program or self.program):
            a, b = env.get(a, a), env.get(b, b)
            if sign == "/" and (b == 0 or a % b):
                raise ValueError("not a whole number")
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[sign] + (
                slips or {}
            ).get(i, 0)
            if not 0 <= value <= 999:
                raise ValueError("out of range")
            equations.append(f"{a}{sign}{b}={value}")
            env[target] = value
        return equations, env["x"]

    @property
    def key(self):
        """Near duplicates share this: the numbers that the solution uses and the answer.

        Names, things, wordings, distractors, and the order of the story play no part in it.
        """
        numbers = [v for _, a, _, b in self.program for v in (a, b) if isinstance(v, int)]
        return (*sorted([self.start, *numbers]), "->", self.work()[1])


def draw_numbers(rng, kind, x):
    """Numbers (a, b) with which a step of this kind keeps x a whole number in 1..MOST, or None."""
    a = b = 0
    if kind == "gain":
        a = rng.randint(5, 250)
        new = x + a
    elif kind == "lose":
        a = rng.randint(5, 250)
        new = x - a
    elif kind in ("times", "money"):
        a = rng.randint(2, 5)
        new = x * a
    elif kind in ("share", "part"):
        a = rng.randint(2, 5)
        new = -1 if x % a else x // a if kind == "share" else x - x // a
    elif kind in ("packs", "treat"):
        a, b = rng.randint(3, 9), rng.randint(3, 40)
        new = x + a * b if kind == "packs" else x - a * b
    elif kind == "join":
        a = rng.randint(5, 150)
        new = 2 * x + a
    elif kind == "goal":
        a = rng.randint(x + 2, MOST) if x + 2 <= MOST else 0
        new = a - x
    else:
        new = x
    return (a, b, new) if 1 <= new <= MOST else None


def problem(rng, operations):
    """One story whose solution has this many operations (2 to 6)."""
    made = None
    while made is None:
        made = attempt(rng, operations)
    return made


def attempt(rng, operations):
    """As `problem`, or None when the numbers do not work out."""
    # A man and a woman: "he" and "she" are never in doubt.
    name, friend, he = rng.choice(MEN), rng.choice(WOMEN), "he"
    if rng.random() < 0.5:
        name, friend, he = friend, name, "she"
    items, others = rng.sample(ITEMS, 2)
    words = {
        "name": name,
        "friend": friend,
        "items": items,
        "others": others,
        "packs": rng.choice(PACKS),
    }

    def say(wordings, **more):
        text = rng.choice(wordings).format(**words, he=rng.choice([name, he]), **more)
        return text[0].upper() + text[1:]

    def bind(code, a, b):
        return [
            (target, {"a": a}.get(p, p), sign, {"a": a, "b": b}.get(q, q))
            for target, p, sign, q in code
        ]

    start = x = rng.randint(10, 300)
    program, sentences = [], [say(OPENINGS, x=start)]
    asked = rng.choices(list(QUESTIONS), [6, 1, 1])[0]
    final_wordings, final_code = QUESTIONS[asked]
    left, kinds = operations - len(final_code), list(STEPS)
    for _ in range(40):
        kind = rng.choice(kinds)
        wordings, code = STEPS[kind]
        drawn = draw_numbers(rng, kind, x)
        if drawn is None or len(code) > left:
            continue
        a, b, x = drawn
        if kind in ("join", "times"):
            kinds.remove(kind)  # twice in one story would contradict itself
        sentences.append(say(wordings, a=a, b=b, times=TIMES.get(a), part=PARTS.get(a)))
        program += bind(code, a, b)
        left -= len(code)
    drawn = draw_numbers(rng, asked, x)
    if left or drawn is None:
        return None
    a, b, x = drawn
    program += bind(final_code, a, b)
    spare = []
    for distractor in rng.sample(DISTRACTORS, rng.choice([0, 0, 1, 1, 2])):
        spare.append(rng.randint(2, 99))
        sentences.insert(rng.randint(1, len(sentences)), say([distractor], d=spare[-1]))
    made = Problem(" ".join([*sentences, say(final_wordings, a=a)]), name, start, program, spare)
    equations, _ = made.work()
    return made if all(int(e.split("=")[1]) <= MOST for e in equations) else None


def fresh(rng, taken=frozenset()):
    """A problem of 2 to 6 operations whose key is not taken."""
    while True:
        made = problem(rng, rng.randint(2, 6))
        if made.key not in taken:
            return made


def wrong(rng, p):
    """-> (equations, answer) of a plausible wrong solution.

    A slip, a wrong sign, a step left out, or a wrong number.
    """
    right = p.work()[1]
    while True:
        program, slips, i = list(p.program), {}, rng.randrange(len(p.program))
        target, a, sign, b = program[i]
        fault = rng.choice(["slip", "slip", "sign", "omission", "number"])
        if fault == "slip":
            slips[i] = rng.choice([-10, -2, -1, 1, 2, 10])
        elif fault == "sign":
            program[i] = (target, a, {"+": "-", "-": "+", "*": "+", "/": "-"}[sign], b)
        elif fault == "omission" and target == "x" and b != "t" and len(program) > 1:
            del program[i]
        elif fault == "number" and isinstance(b, int) and sign in "+-*":
            program[i] = (target, a, sign, rng.choice([*p.spare, rng.randint(5, 250)]))
        try:
            equations, answer = p.work(program, slips)
        except ValueError:
            continue
        if answer != right:
            return equations, answer


# ---------------------------------------------------------------------------- prompts and reasoning
# What is in a prompt here must be in it, letter for letter, wherever the model is used.


def question_prompt(question):
    return question


def placeholder_prompt(question, n):
    """The question and n placeholder tokens: where soft thoughts go."""
    return question + "\n" + "[UNK]" * n


def hint_prompt(question, hint):
    """The question and somebody's notes, which may be wrong and may break off."""
    return f"{question}\nHint: {hint}"


def judge_prompt(question, candidates):
    """The question and worked candidates: each its reasoning and its answer as one line."""
    lines = [f"Candidate {i}: {text}" for i, text in enumerate(candidates, 1)]
    return "\n".join([question, *lines, "Which answer is right?"])


def assistant_prompt(question, n=0):
    """What the assistant reads: an instruction, the question, and n placeholder tokens."""
    return "Note the steps.\n" + (placeholder_prompt(question, n) if n else question)


BEGINNINGS = [
    "Start with {x}.",
    "{name} has {x}.",
    "First {x}.",
    "We begin with {x}.",
    "At the start {x}.",
]
LINKS = ["Then ", "Next ", "So ", "Now ", ""]


def reasoning(rng, p, equations):
    """Words carry no information: they are there so that thoughts can be worded differently."""
    steps = [rng.choice(BEGINNINGS).format(x=p.start, name=p.name)]
    return " ".join(steps + [rng.choice(LINKS) + e + "." for e in equations])


def notes(equations, answer):
    return " ".join([e + "." for e in equations] + [f"The answer is {answer}."])


def base_document(rng, taken, judge=True):
    """-> (user message, response) to train the base on; judge: is judging one of the forms?"""
    p = fresh(rng, taken)
    equations, answer = p.work()
    think, form = reasoning(rng, p, equations), rng.random()
    if form < 0.2 and judge:
        candidates, verdicts = [], []
        for i in range(rng.choices([1, 2, 3, 4, 5], [1, 3, 4, 2, 2])[0]):
            e, a = (equations, answer) if rng.random() < 0.5 else wrong(rng, p)
            candidates.append(f"{reasoning(rng, p, e)} The answer is {a}.")
            verdicts.append(f"{i + 1} {'right' if a == answer else 'wrong'}")
        prompt = judge_prompt(p.question, candidates)
        think += f" Candidates: {', '.join(verdicts)}."
    elif form < 0.4:
        hint = notes(*((equations, answer) if rng.random() < 0.5 else wrong(rng, p)))
        prompt = hint_prompt(p.question, hint[: rng.randint(1, len(hint))])
    elif form < 0.55:
        prompt = placeholder_prompt(p.question, rng.randint(1, 32))
    else:
        prompt = question_prompt(p.question)
    return prompt, f"{think}</think>The answer is {answer}."


def assistant_document(rng, taken, judge=False):
    p = fresh(rng, taken)
    return assistant_prompt(p.question, rng.choice([0, 0, 0, rng.randint(1, 32)])), notes(*p.work())


# ----------------------------------------------------------------------------------- the two models
# What goes into their Hugging Face folders.


@dataclass
class Kind:
    document: object  # (rng, taken, judge) -> (user message, response)
    config: dict  # config.json
    special: list  # special tokens, the end of a turn first
    plain: list  # further tokens of their own: text to a reader, one token to the model
    template: str


COMMON = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
BASE = Kind(
    base_document,
    {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 752,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "intermediate_size": 640,
    },
    ["<|im_end|>", "<|im_start|>"],
    ["<think>", "</think>", "[UNK]"],
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
)
ASSISTANT = Kind(
    assistant_document,
    {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 640,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 256,
        "mlp_bias": False,
    },
    ["<|end|>", "<|begin|>", "<|user|>", "<|assistant|>"],
    ["[UNK]"],
    "<|begin|>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
)


def make_tokenizer(kind, seed, taken, folder):
    """Byte-level BPE, trained on documents of this kind, saved into the folder.

    Every digit is a token of its own.
    """
    rng = random.Random(f"tokenizer {seed}")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    texts = [
        re.sub(r"\[UNK\]|</?think>", "", "\n".join(kind.document(rng, taken))) for _ in range(5000)
    ]
    core.train_from_iterator(
        [*texts, *["user\nassistant\nsystem"] * 2000],
        trainers.BpeTrainer(
            vocab_size=kind.config["vocab_size"] - len(kind.plain),
            special_tokens=kind.special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    core.add_tokens([AddedToken(token, normalized=False) for token in kind.plain])
    core.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": kind.config["max_position_embeddings"],
            "eos_token": kind.special[0],
            "pad_token": kind.special[0],
            "clean_up_tokenization_spaces": False,
            "chat_template": kind.template,
        },
    )
    return Tokenizer(folder)


def save(kind, model, tokenizer, folder):
    (end,) = tokenizer.encode(kind.special[0])
    write_json(folder / "config.json", {**kind.config, "eos_token_id": end})
    write_json(folder / "generation_config.json", {"eos_token_id": [end], "pad_token_id": end})
    save_file(
        {
            name: t.detach().to("cpu", torch.bfloat16).contiguous()
            for name, t in fused.hf_tensors(model).items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def write_json(path, what):
    path.write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------- training

DOCUMENTS = 32  # per step
PIECE = 2000  # tokens, padding included, that go through the model at once
PEAK = 0.004  # learning rate
WORKERS = 2  # threads that share a step's pieces
JUDGE_FROM = 0.4  # part of the training after which judging, with its long prompts, comes in


def make_model(kind, seed):
    """A Transformer with fused matrices: Muon treats q, k, v as one matrix, and gate, up too."""
    torch.manual_seed(seed)
    model = Transformer(config_from_json(kind.config))
    torch.nn.init.normal_(model.embed.weight, std=0.02)
    for block in model.layers:
        fused.fuse(block)
        a, m = block.self_attn, block.mlp
        # What writes to the residual stream starts small, the rest keeps variance.
        for linear, small in (a.qkv, 1.0), (a.o_proj, 0.2), (m.gate_up, 1.0), (m.down_proj, 0.2):
            torch.nn.init.normal_(linear.weight, std=small * linear.in_features**-0.5)
    return model.requires_grad_(True)


def batches(kind, tokenizer, steps, rng, taken, device):
    """One list per step, of pieces: (ids [B, T], places of the predictions, their targets).

    Only the response is learnt. Documents of similar length share a piece, so that little is
    padded; the model is causal, so padding on the right needs no mask.
    """
    encode, end = tokenizer.encode, kind.special[0]
    for i in range(steps):
        rows = []
        for _ in range(DOCUMENTS):
            prompt, response = kind.document(rng, taken, judge=i >= JUDGE_FROM * steps)
            ids = tokenizer.chat(prompt)
            rows.append((len(ids), ids + encode(response + end)))
        rows.sort(key=lambda row: len(row[1]))
        step = []
        while rows:
            n = 1  # as many rows as fit into PIECE tokens
            while n < len(rows) and (n + 1) * len(rows[n][1]) <= PIECE:
                n += 1
            piece, rows = rows[:n], rows[n:]
            width = len(piece[-1][1])
            ids = torch.tensor([row + [0] * (width - len(row)) for _, row in piece])
            places = [
                b * width + t
                for b, (start, row) in enumerate(piece)
                for t in range(start - 1, len(row) - 1)
            ]
            places = torch.tensor(places)
            step.append((ids.to(device), places.to(device), ids.view(-1)[places + 1].to(device)))
        yield step


def train(kind, tokenizer, steps, seed, taken, device, model=None):
    """Train from scratch: Muon for the matrices of the blocks, AdamW for the rest.

    A model that is given is trained further, by AdamW alone and at half the rate. The rate
    warms up, stays, and decays to zero.
    """
    rng, scratch = random.Random(f"training {seed}"), model is None
    peak = PEAK if scratch else PEAK / 2
    model = make_model(kind, seed).to(device) if scratch else model.requires_grad_(True)
    # One thread per worker: the matrices are too small to be shared out among cores, and what comes
    # out is the same on any number of cores. A replica has its own gradients, the parameters are
    # the model's.
    torch.set_num_threads(1)
    replicas = [model] + [copy.deepcopy(model) for _ in range(WORKERS - 1)]
    for replica in replicas[1:]:
        for mine, common in zip(replica.parameters(), model.parameters()):
            mine.data = common.data
    named = list(model.named_parameters())
    blocks = [scratch and name.startswith("layers") and p.ndim == 2 for name, p in named]
    others = [p for (_, p), block in zip(named, blocks) if not block]
    optimizers = [torch.optim.AdamW(others, lr=peak, weight_decay=0.0, betas=(0.9, 0.98))]
    if scratch:
        matrices = [p for (_, p), block in zip(named, blocks) if block]
        settings = {"weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.insert(0, torch.optim.Muon(matrices, lr=peak, **settings))

    # bfloat16 products only where the processor has instructions for them: else they are slower.
    half = (
        device == "cuda"
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )

    def work(replica, pieces, labels):
        """Add the gradients of these pieces to the replica's; -> their share of the loss."""
        total = 0.0
        for ids, places, targets in pieces:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                hidden = replica(replica.embed(ids)).flatten(0, 1)[places]
                loss = F.cross_entropy(replica.logits(hidden), targets, reduction="sum") / labels
            loss.backward()
            total += loss.item()
        return total

    began, seen, mean = time.time(), 0, None
    # Plain attention: on a CPU the backward pass of the fused one takes twice the time.
    with ThreadPoolExecutor(WORKERS) as pool, sdpa_kernel(SDPBackend.MATH):
        for i, pieces in enumerate(batches(kind, tokenizer, steps, rng, taken, device)):
            labels = sum(len(targets) for _, _, targets in pieces)
            shares = [pieces[w::WORKERS] for w in range(WORKERS)]
            loss = sum(pool.map(work, replicas, shares, [labels] * WORKERS))
            for replica in replicas[1:]:
                for mine, common in zip(replica.parameters(), model.parameters()):
                    if mine.grad is not None:  # None: there was no piece for this worker
                        common.grad += mine.grad
                        mine.grad = None
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * min(1, (i + 1) / 100, (steps - i) / (0.4 * steps))
                optimizer.step()
                optimizer.zero_grad()
            seen += sum(ids.numel() for ids, _, _ in pieces)
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            if i % 100 == 0 or i == steps - 1:
                took = time.time() - began
                print(
                    f"{kind.config['model_type']} step {i}  loss {mean:.4f}  {seen / took:.0f} "
                    f"tokens/s  {took / 60:.1f} min",
                    flush=True,
                )
    return model


# --------------------------------------------------------------------------- decoding and measuring


class Plain:
    """A method for model.decode: the most probable token, or (temperature > 0) a sample."""

    host = True  # one generator draws for all rows, which no recording can repeat

    def __init__(self, model, temperature, seed):
        self.model, self.temperature = model, temperature
        self.generator = torch.Generator(model.device).manual_seed(seed)

    def begin(self, row, request):
        pass

    def step(self, logits, at):
        """logits [rows, V] -> token [rows], embeds [rows, d]."""
        if self.temperature:
            p = (logits / self.temperature).softmax(-1)
            token = torch.multinomial(p, 1, generator=self.generator)[:, 0]
        else:
            token = logits.argmax(-1)
        return token, self.model.embed(token)


def generate(model, tokenizer, messages, temperature=0.0, seed=0, most=160, rows=64):
    """One response per user message, in their order, without the end token."""
    prompts = (model.embed(torch.tensor(tokenizer.chat(m), device=model.device)) for m in messages)
    requests = (Request(Prompt(embeds), data=i) for i, embeds in enumerate(prompts))
    outputs = decode(model, requests, Plain(model, temperature, seed), rows, most)
    done = {output.request.data: output.ids for output in outputs}
    eos = model.config.eos_ids
    return [tokenizer.decode([t for t in done[i] if t not in eos]) for i in range(len(messages))]


def answer_of(text):
    found = re.findall(r"answer is (-?\d+)", text)
    return int(found[-1]) if found else None


def candidate(response):
    """A response as one line of a judge prompt."""
    return response.replace("</think>", " ")


def interval(right, n):
    """Share and its 95 % interval (Wilson), in per cent."""
    p, z = right / n, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:5.1f} %  ({low:.1f} to {high:.1f})  {right} of {n}"


def measure(folder, test, seed, device):
    """Print the accuracies of the saved models on the test problems."""
    base, base_tokenizer = fast.load(str(folder / "base"), device)
    small, small_tokenizer = fast.load(str(folder / "assistant"), device)
    questions, gold = [p.question for p in test], [p.work()[1] for p in test]
    rng = random.Random(seed)

    def verdicts(responses):
        return [answer_of(text) == answer for text, answer in zip(responses, gold)]

    def report(what, right):
        print(f"{what:<44} {interval(sum(right), len(right))}", flush=True)

    def ask(messages, **more):
        return generate(base, base_tokenizer, messages, **more)

    greedy = verdicts(ask([question_prompt(q) for q in questions]))
    report("greedy", greedy)
    for n in range(2, 7):
        report(f"  {n} operations", [v for v, p in zip(greedy, test) if len(p.program) == n])
    samples = [
        ask([question_prompt(q) for q in questions], temperature=0.7, seed=seed + i)
        for i in range(5)
    ]
    right = [verdicts(s) for s in samples]
    report("five samples at 0.7: each", [v for sample in right for v in sample])
    report("five samples at 0.7: at least one", [any(v) for v in zip(*right)])
    votes = [Counter(map(answer_of, s)).most_common(1)[0][0] for s in zip(*samples)]
    report("five samples at 0.7: majority", [v == answer for v, answer in zip(votes, gold)])
    judged = verdicts(
        ask([judge_prompt(q, list(map(candidate, s))) for q, *s in zip(questions, *samples)])
    )
    report("judge, shown these five", judged)
    report(
        "  where at least one of them is right", [j for j, v in zip(judged, zip(*right)) if any(v)]
    )
    report(
        "  where some are right and some wrong",
        [j for j, v in zip(judged, zip(*right)) if any(v) and not all(v)],
    )
    for what, solve in (("right", Problem.work), ("wrong", lambda p: wrong(rng, p))):
        report(
            f"hint: all of a {what} solution",
            verdicts(ask([hint_prompt(p.question, notes(*solve(p))) for p in test])),
        )
    first = [notes(*p.work()) for p in test]
    report(
        "hint: first half of a right solution",
        verdicts(ask([hint_prompt(q, h[: len(h) // 2]) for q, h in zip(questions, first)])),
    )
    for n in (4, 32):
        report(
            f"{n} placeholder tokens", verdicts(ask([placeholder_prompt(q, n) for q in questions]))
        )
    said = generate(small, small_tokenizer, [assistant_prompt(q) for q in questions])
    report("assistant alone, greedy", verdicts(said))
    hints = [small_tokenizer.decode(small_tokenizer.encode(text)[:32]) for text in said]
    report(
        "hint: the assistant's first 32 tokens",
        verdicts(ask([hint_prompt(q, h) for q, h in zip(questions, hints)])),
    )


# --------------------------------------------------------------------------------------- everything


def make_test(seed):
    """300 problems, 60 of each length, no two with the same key."""
    rng, made = random.Random(f"test {seed}"), {}
    for n in range(2, 7):
        while sum(len(p.program) == n for p in made.values()) < 60:
            p = problem(rng, n)
            made.setdefault(p.key, p)
    return list(made.values())


def make_train(seed, taken):
    """3,000 problems, no two with the same key, none with a key that is taken."""
    rng, made = random.Random(f"train {seed}"), {}
    while len(made) < 3000:
        p = fresh(rng, taken)
        made.setdefault(p.key, p)
    return list(made.values())


def write_problems(path, problems, seed):
    rng = random.Random(f"wording {seed}")
    with open(path, "w", encoding="utf-8") as file:
        for p in problems:
            equations, answer = p.work()
            steps = [step + "." for step in reasoning(rng, p, equations)[:-1].split(". ")]
            file.write(
                json.dumps({"question": p.question, "answer": str(answer), "steps": steps}) + "\n"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1150, help="training steps of the base")
    parser.add_argument(
        "--assistant-steps", type=int, default=900, help="training steps of the assistant"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the files go")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    test = make_test(args.seed)
    taken = {p.key for p in test}
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(args.out / "test.jsonl", test, args.seed)
    write_problems(args.out / "train.jsonl", make_train(args.seed, taken), args.seed)
    for name, kind, steps in (
        ("assistant", ASSISTANT, args.assistant_steps),
        ("base", BASE, args.steps),
    ):
        folder = args.out / name
        folder.mkdir(exist_ok=True)
        tokenizer = make_tokenizer(kind, args.seed, taken, folder)
        save(kind, train(kind, tokenizer, steps, args.seed, taken, device), tokenizer, folder)
    measure(args.out, test, args.seed, device)


if __name__ == "__main__":
    main()
