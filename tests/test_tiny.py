"""The bundled model: its problems, its files, its answers."""

import json
import random
import re
from fractions import Fraction

import pytest
import torch

from model import Tokenizer, load
from tiny import make

TINY = make.HERE
WORDS = {
    "half": 2,
    "twice": 2,
    "third": 3,
    "three": 3,
    "quarter": 4,
    "four": 4,
    "fifth": 5,
    "five": 5,
}


pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small are slower on two


def rows(name):
    with open(TINY / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def stream(n, seed=1, taken=frozenset()):
    rng = random.Random(seed)
    return [make.fresh(rng, taken) for _ in range(n)]


def check_reasoning(question, equations, answer):
    """Every equation holds, and its numbers come from the question or from equations before it."""
    known = {int(n) for n in re.findall(r"\d+", question)} | {
        v for w, v in WORDS.items() if w in question
    }
    assert 2 <= len(equations) <= 6
    for equation in equations:
        a, sign, b, value = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", equation).groups()
        a, b, value = int(a), int(b), int(value)
        exact = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[sign]
        assert exact == value and {a, b} <= known and value <= make.MOST, (question, equations)
        known.add(value)
    assert value == answer


def skeleton(question):
    """The question without names, things and pronouns, its numbers kept."""
    names = "|".join([*make.MEN, *make.WOMEN, *make.ITEMS, *make.PACKS, "he", "she"])
    return re.sub(rf"\b({names})\b", "_", question, flags=re.IGNORECASE)


def test_problems_are_reproducible_and_varied():
    questions = [p.question for p in stream(300)]
    assert questions == [p.question for p in stream(300)]
    assert len(set(questions)) == 300
    assert {len(p.program) for p in stream(300)} == {2, 3, 4, 5, 6}


def test_right_solutions_are_right_and_wrong_ones_wrong():
    rng = random.Random(2)
    for p in stream(2000):
        equations, answer = p.work()
        check_reasoning(p.question, equations, answer)
        assert make.wrong(rng, p)[1] != answer


@pytest.mark.parametrize("name, count", [("test.jsonl", 300), ("train.jsonl", 3000)])
def test_files_hold_right_problems(name, count):
    problems = rows(name)
    assert len(problems) == count
    for row in problems:
        equations = [step.split()[-1].rstrip(".") for step in row["steps"] if "=" in step]
        check_reasoning(row["question"], equations, int(row["answer"]))


def test_training_never_sees_a_test_problem():
    test = make.make_test(0)
    assert [p.question for p in test] == [row["question"] for row in rows("test.jsonl")]
    keys, skeletons = {p.key for p in test}, {skeleton(p.question) for p in test}
    assert len(keys) == len(skeletons) == 300
    assert not keys & {p.key for p in stream(5000, taken=keys)}
    # The same, by the text alone and not by the key.
    assert not skeletons & {skeleton(row["question"]) for row in rows("train.jsonl")}
    assert not skeletons & {skeleton(p.question) for p in stream(5000, taken=keys)}


def test_the_folder_is_complete_and_small():
    files = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    expected = {"make.py", "README.md", "test.jsonl", "train.jsonl"}
    expected |= {f"{model}/{file}" for model in ("base", "assistant", "ways") for file in files}
    expected |= {f"graph/{file}" for file in ("config.json", "tokenizer.json", "test.jsonl")}
    made = TINY / "graph" / "train.jsonl"  # by graph.py, and not in the repository
    found = {
        str(p.relative_to(TINY)): p.stat().st_size
        for p in TINY.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p != made
    }
    assert expected <= set(found)
    assert sum(found.values()) < 13_000_000


@pytest.mark.parametrize(
    "name, markers, opening",
    [
        (
            "base",
            ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "[UNK]"],
            "<|im_start|>assistant\n<think>",
        ),
        (
            "assistant",
            ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", "[UNK]"],
            "<|assistant|>",
        ),
    ],
)
def test_tokenizers(name, markers, opening):
    tokenizer = Tokenizer(TINY / name)
    for marker in markers:
        assert len(tokenizer.encode(marker)) == 1
    assert len(tokenizer.encode("[UNK]" * 7)) == 7
    assert len(tokenizer.encode("1234567890")) == 10
    for text in (
        "Anna has 14 apples.\nTwo  spaces, tab\t, ümlaut, 數, 🙂",
        "14+9=23. </think>The answer is 23.",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.render("Hello").endswith(
        "Hello" + markers[1 if name == "base" else 3] + ("\n" if name == "base" else "") + opening
    )
    vocabulary = json.loads((TINY / name / "config.json").read_text())["vocab_size"]
    assert tokenizer.core.get_vocab_size() == vocabulary


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="tiny/make.py needs torch 2.9")
def test_same_seed_same_weights():
    tokenizer = Tokenizer(TINY / "assistant")
    first, second, other = (
        make.train(make.ASSISTANT, tokenizer, 3, seed, frozenset(), "cpu") for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_the_model_answers():
    model, tokenizer = load(str(TINY / "base"), device="cpu")
    problems = rows("test.jsonl")[::12]  # 25, of every length
    responses = make.generate(
        model, tokenizer, [make.question_prompt(p["question"]) for p in problems]
    )
    assert all(response.count("</think>") == 1 for response in responses)
    right = sum(
        make.answer_of(response) == int(p["answer"]) for response, p in zip(responses, problems)
    )
    assert right >= 0.4 * len(problems)
