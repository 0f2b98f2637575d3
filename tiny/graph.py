"""The graph task: is every dax a wug or a blick? Problems and tokenizer, made from nothing.

    python tiny/graph.py                # everything in tiny/graph, in a few seconds

In the manner of ProsQA (Hao et al., arXiv 2412.06769): facts "Every X is a Y." are the edges of a
directed graph; of two names that are offered, one can be reached from the question's name.
"""

import argparse
import json
import random
import re
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------- problems

NAMES = ["dax", "wug", "blick", "toma", "fep", "zorp", "mib", "kiv", "lorp", "nace"]
NAMES += ["sput", "gorm", "tupa", "rell", "yim", "bosk", "hule", "prin", "quag", "vell"]
HOPS = (1, 2, 3)  # edges from the question's name to the answer


@dataclass(frozen=True)
class Problem:
    edges: list[tuple[str, str]]  # in the order of the facts
    path: list[str]  # from the question's name to the answer
    offered: list[str]  # the answer and a name that cannot be reached, in the question's order

    @property
    def key(self) -> tuple:
        """Near duplicates share this: the facts and what is asked about, in whatever order."""
        return *sorted(self.edges), self.path[0]

    @property
    def row(self) -> dict:
        facts = [f"Every {a} is a {b}." for a, b in self.edges]
        question = f"Is every {self.path[0]} a {self.offered[0]} or a {self.offered[1]}?"
        return {
            "question": " ".join([*facts, question]),
            "answer": self.path[-1],
            "choices": self.offered,
            "steps": [f"Every {a} is a {b}." for a, b in pairwise(self.path)],
        }


def problem(rng: random.Random, hops: int, dead_ends: bool) -> Problem:
    """Two trees of one shape, the facts of both in any order: paths, and ways that leave them."""
    names = iter(rng.sample(NAMES, len(NAMES)))
    paths, edges = [], []
    for _ in range(2):
        path = [next(names) for _ in range(hops + 1)]
        paths.append(path)
        edges += pairwise(path)
        for depth in range(hops if dead_ends else 0):  # each as long as what is left of the path
            edges += pairwise([path[depth], *(next(names) for _ in range(hops - depth))])
    path, astray = paths
    return Problem(rng.sample(edges, len(edges)), path, rng.sample([path[-1], astray[-1]], 2))


def make(seed: str, count: int, kinds: list[tuple[int, bool]], taken: set) -> list[Problem]:
    """Draw problems, of one kind (edges, dead ends) after the other, none with a key in taken."""
    rng, made = random.Random(seed), []
    while len(made) < count:
        p = problem(rng, *kinds[len(made) % len(kinds)])
        made += [] if p.key in taken else [p]
    return made


# -------------------------------------------------------------------------------- a model's folder

PIECES = [*(f"Every {name} is a" for name in NAMES), *(f"Is every {name} a" for name in NAMES)]
PIECES += [*(f" {name}" for name in NAMES), " or a", "?", ".", ". ", ".\n", "The answer is"]
SPECIAL = ["<|end|>", "[UNK]"]
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": len(SPECIAL) + len(PIECES),
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 192,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def tokenizer() -> tokenizers.Tokenizer:
    """Make one that knows the pieces, the longest first, and a token for all other text."""
    vocab = {text: i for i, text in enumerate([*SPECIAL, *PIECES])}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, "[UNK]"))
    longest = sorted(PIECES, key=len, reverse=True)
    pattern = "|".join(re.escape(piece) for piece in longest)
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    return core


def write_json(path: Path, what: dict) -> None:
    path.write_text(json.dumps(what, indent=1) + "\n")


def write_problems(path: Path, problems: list[Problem]) -> None:
    path.write_text("".join(json.dumps(p.row) + "\n" for p in problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=40200, help="problems (default: 40200)")
    parser.add_argument("--out", type=Path, default=HERE / "graph", help="where the files go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    test = make(f"test {args.seed}", 300, [(hops, True) for hops in HOPS], set())
    write_problems(args.out / "test.jsonl", test)
    taken = {p.key for p in test}
    kinds = list(product(HOPS, (False, True)))  # what has no dead ends is learnt first
    write_problems(args.out / "train.jsonl", make(f"train {args.seed}", args.train, kinds, taken))
    write_json(args.out / "config.json", CONFIG)
    tokenizer().save(str(args.out / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    names = {"eos_token": "<|end|>", "unk_token": "[UNK]", "chat_template": template}
    write_json(args.out / "tokenizer_config.json", names)


if __name__ == "__main__":
    main()
