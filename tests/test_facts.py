"""The stories whose number only an assistant knows: files, separation, assistant, projection."""

import json
import random
import re

import pytest
import torch
from softcot_pair import main

import softcot
from lab import softcot_variants, tasks, trained
from model import Tokenizer, load
from tiny import make, make_facts

FACTS = make_facts.HERE / "facts"
ASSISTANT, PROJECTION = FACTS / "assistant", FACTS / "softcot.safetensors"
FILES = {"test.jsonl": 256, "told.jsonl": 256, "train.jsonl": 1024}

pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small are slower on two


def rows(name):
    with open(FACTS / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def town_of(question):
    return re.search(r" in (\w+)\. How many are missing\?", question)[1]


def note_of(question, goal):
    """What the assistant should note, by the text of a question and its goal."""
    name, items = re.search(r"(\w+) wants (\w+) in ", question).groups()
    return f"{name} wants {goal} {items}."


def goal_of(row):
    return int(re.fullmatch(r"(?:\w+ )?(\d+)-\d+=\d+\.", row["steps"][-1])[1])


# ---------------------------------------------------------------------------------------- problems


def test_the_files_are_what_the_script_writes(tmp_path):
    make_facts.write_problems(tmp_path, make_facts.make_stories(make_facts.make_facts(0), 0), 0)
    for name, count in FILES.items():
        assert (tmp_path / name).read_bytes() == (FACTS / name).read_bytes()
        assert len(rows(name)) == count
    other = make_facts.make_facts(1)
    assert other != make_facts.make_facts(0) and len({fact.town for fact in other}) == 1280


@pytest.mark.parametrize("name", ["test.jsonl", "train.jsonl"])
def test_solutions_are_right_and_their_goal_is_not_in_the_question(name):
    for row in rows(name):
        question = row["question"]
        first, last = (
            re.fullmatch(r".*?(\d+)([-+])(\d+)=(\d+)\.", step) for step in row["steps"][1:]
        )
        a, b, middle = int(first[1]), int(first[3]), int(first[4])
        assert middle == (a + b if first[2] == "+" else a - b)
        assert sorted(map(int, re.findall(r"\d+", question))) == sorted([a, b])
        goal, taken, answer = int(last[1]), int(last[3]), int(last[4])
        assert last[2] == "-" and taken == middle and goal - taken == answer == int(row["answer"])
        # Whatever the goal is, the story could be the same: it says nothing of it.
        assert 300 <= goal <= 799 and max(a, b, middle) < 300


def test_no_town_is_in_both_training_and_test():
    towns = {name: [town_of(row["question"]) for row in rows(name)] for name in FILES}
    assert all(len(set(towns[name])) == count for name, count in FILES.items())  # a story each
    assert not set(towns["test.jsonl"]) & set(towns["train.jsonl"])
    assert towns["told.jsonl"] == towns["test.jsonl"]


def test_what_is_told_is_the_note_and_nobody_trains_on_it(tmp_path, capsys):
    for told, row in zip(rows("told.jsonl"), rows("test.jsonl")):
        question, note = told["question"].split("\n")
        assert question == row["question"] and note == note_of(question, goal_of(row))
        assert told["answer"] == row["answer"]
    command = ["train", "--data", str(FACTS / "told.jsonl"), "--folder", str(tmp_path / "no")]
    assert main(command) == 2
    assert "have no worked steps to learn from" in capsys.readouterr().err
    assert tasks.training("facts") == "facts-train"


# --------------------------------------------------------------------------------------- assistant


def test_every_town_is_a_token_and_every_note_eight():
    tokenizer = Tokenizer(ASSISTANT)
    config = json.loads((ASSISTANT / "config.json").read_text())
    assert tokenizer.core.get_vocab_size() == config["vocab_size"] == 640 + 1280
    for name in ("test.jsonl", "train.jsonl"):
        for row in rows(name):
            assert len(tokenizer.encode(town_of(row["question"]))) == 1
            assert len(tokenizer.encode(note_of(row["question"], goal_of(row)))) == 8


def test_half_of_the_documents_have_their_loss_at_the_placeholders():
    facts, tokenizer, rng = make_facts.make_facts(0), Tokenizer(ASSISTANT), random.Random(3)
    goals, n = {fact.town: fact.goal for fact in facts}, 0
    for _ in range(400):
        ids, first, targets = make_facts.row(rng, tokenizer, facts, set())
        asked, said = tokenizer.decode(ids), tokenizer.decode(targets)
        note = note_of(asked, goals[town_of(asked)])
        (unk,) = tokenizer.encode("[UNK]")
        if unk in ids:
            question = re.search(r"Note the steps\.\n(.*)\n", asked)[1]
            assert ids == softcot.assistant_ids(tokenizer, question, 8)
            assert ids[first:] == [unk] * 8 and said == note
            n += 1
        else:
            assert asked.endswith(f"<|assistant|>{note}") and said == f"{note}<|end|>"
            assert ids[first + 1 :] == targets[:-1]
    assert 160 <= n <= 240


def test_same_seed_same_weights():
    facts, tokenizer = make_facts.make_facts(0), Tokenizer(ASSISTANT)
    first, second, other = (
        make_facts.train(facts, tokenizer, 2, seed, set()) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_the_assistant_knows_the_facts_in_words_and_at_the_placeholders():
    model, tokenizer = load(str(ASSISTANT), device="cpu")
    some = rows("test.jsonl")[::8] + rows("train.jsonl")[::32]
    questions = [row["question"] for row in some]
    notes = [note_of(row["question"], goal_of(row)) for row in some]
    said = make.generate(model, tokenizer, [make.assistant_prompt(q) for q in questions], most=12)
    ids = [softcot.assistant_ids(tokenizer, q, 8) for q in questions]
    at = model.logits(softcot.hidden_states(model, ids, 8)).argmax(-1).tolist()
    for found in said, [tokenizer.decode(tokens) for tokens in at]:
        assert sum(a == b for a, b in zip(found, notes)) >= 0.9 * len(some)


# -------------------------------------------------------------------------------------- projection


def test_the_projection_was_made_for_these_models_on_the_training_towns():
    model, assistant = (load(name, "cpu")[0] for name in (str(make.HERE / "base"), str(ASSISTANT)))
    here = trained.identity(1, "tiny/base", model, "tiny/facts/assistant", assistant)
    tensors, there = trained.read_trained(PROJECTION, "softcot", here)
    assert there["task"] == "facts-train" and there["thoughts"] == "8"
    assert tensors["weight"].shape == (192, 96)


@pytest.mark.parametrize(
    "assistant, projection, other",
    [
        (softcot_variants.TINY_ASSISTANT, PROJECTION, "tiny/facts/assistant"),
        (ASSISTANT, softcot_variants.BUNDLED, "tiny/assistant"),
    ],
)
def test_a_projection_of_the_other_pair_is_refused(assistant, projection, other, capsys):
    arguments = ["--assistant", str(assistant), "--projection", str(projection)]
    assert main(["eval", "--task", "facts", "--methods", "softcot", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"was made for {other} (width 96) and tiny/base (width 192)" in error
    assert error.count("\n") == 1 and "pass those, or train for these" in error


def test_soft_thoughts_tell_the_model_what_it_cannot_know(tmp_path):
    out = tmp_path / "table.json"
    arguments = ["--assistant", str(ASSISTANT), "--projection", str(PROJECTION), "--limit", "24"]
    arguments += ["--methods", "zero-shot-cot,softcot", "--json", str(out)]
    assert main(["eval", "--task", "facts", *arguments]) == 0
    without, soft = (row["accuracy"] for row in json.loads(out.read_text())["methods"])
    assert without <= 0.05 and soft >= 0.15
