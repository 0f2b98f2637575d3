"""Stories whose number is in no text: only an assistant knows it. For SoftCoT.

    python tiny/make_facts.py           # everything in tiny/facts but the projection

How many things are wanted in a town is a fact that no story tells. The assistant learns the facts
of all towns; a projection learns from stories of some towns, and is scored on those of the others.
Wordings, tokenizer, start of the weights, decoding: `make.py`.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lab import fast
from softcot import assistant_ids, hidden_states
from tiny import make

# -------------------------------------------------------------------------------- facts and stories

TOWNS = 1280
HELD_OUT = 256  # towns of test.jsonl, a story each; the others are those of train.jsonl
GOALS = 300, 799  # more than any number of a story, so that no story limits its goal
NOTE = 8  # tokens of a note


@dataclass(frozen=True)
class Fact:
    town: str
    goal: int  # so many things of each kind are wanted there


def make_facts(seed):
    """Towns in random order; what one is called says nothing of its goal."""
    rng, facts = random.Random(f"facts {seed}"), {}
    while len(facts) < TOWNS:
        # Without a v: the token of a town Davi would split the name David.
        town = "".join(rng.choice("bdfgklmnprstz") + rng.choice("aeiou") for _ in range(2))
        facts[town] = Fact(town.capitalize(), rng.randint(*GOALS))
    facts = list(facts.values())
    rng.shuffle(facts)
    return facts


def story(rng, fact):
    """-> (Problem, its last sentences, note): something gained or lost, then what is missing."""
    name, friend, he = rng.choice(make.MEN), rng.choice(make.WOMEN), "he"
    if rng.random() < 0.5:
        name, friend, he = friend, name, "she"
    items, kind, drawn = rng.choice(make.ITEMS), rng.choice(["gain", "lose"]), None
    while drawn is None or drawn[2] >= GOALS[0] - 1:
        start = rng.randint(10, 250)
        drawn = make.draw_numbers(rng, kind, start)
    wordings, ((_, _, sign, _),) = make.STEPS[kind]
    words = {"name": name, "friend": friend, "items": items, "he": rng.choice([name, he])}
    opening = rng.choice(make.OPENINGS).format(x=start, **words)
    step = rng.choice(wordings).format(a=drawn[0], **words)
    asked = f"{name} wants {items} in {fact.town}. How many are missing?"
    program = [("x", "x", sign, drawn[0]), ("x", fact.goal, "-", "x")]
    question = f"{opening} {step[0].upper()}{step[1:]} {asked}"
    problem = make.Problem(question, name, start, program, [])
    return problem, asked, f"{name} wants {fact.goal} {items}."


def make_stories(facts, seed):
    """A story about each town, as `story` makes them."""
    rng = random.Random(f"stories {seed}")
    return [story(rng, fact) for fact in facts]


def write_problems(folder, stories, seed):
    """test.jsonl, train.jsonl; told.jsonl: as test.jsonl, each question with its note behind it."""
    problems = [problem for problem, _, _ in stories]
    make.write_problems(folder / "test.jsonl", problems[:HELD_OUT], seed)
    make.write_problems(folder / "train.jsonl", problems[HELD_OUT:], seed)
    with open(folder / "told.jsonl", "w", encoding="utf-8") as file:
        for problem, _, note in stories[:HELD_OUT]:  # no steps: nobody is to train on these
            told = {"question": f"{problem.question}\n{note}", "answer": str(problem.work()[1])}
            file.write(json.dumps(told) + "\n")


# ------------------------------------------------------------------------------------ the assistant

DOCUMENTS = 32  # per step
PEAK = 0.003  # learning rate
FIRST = 64  # facts


def document(rng, facts, taken):
    """-> (question, note): of a story about one of these facts, but none that is taken."""
    problem, asked, note = story(rng, rng.choice(facts))
    if problem.question in taken:
        return document(rng, facts, taken)
    # Without its story a fact is learnt as well, in less time.
    return problem.question if rng.random() < 0.5 else asked, note


def kind_of(facts):
    """As the old assistant, but every town is a token, and what is noted is the fact."""

    def words(rng, taken):
        question, note = document(rng, facts, taken)
        return make.assistant_prompt(question), note

    towns, config = [fact.town for fact in facts], dict(make.ASSISTANT.config)
    config["vocab_size"] += len(towns)
    return replace(make.ASSISTANT, document=words, config=config, plain=["[UNK]", *towns])


def row(rng, tokenizer, facts, taken):
    """-> (ids, first place that predicts, what it and the places behind it predict).

    Half of the time the note is the response; half of the time placeholder i predicts token i of
    it, all at once and without seeing the tokens before.
    """
    question, note = document(rng, facts, taken)
    said = tokenizer.encode(note + make.ASSISTANT.special[0])
    if rng.random() < 0.5:
        ids = tokenizer.chat(make.assistant_prompt(question))
        return ids + said[:-1], len(ids) - 1, said
    ids = assistant_ids(tokenizer, question, NOTE)
    return ids, len(ids) - NOTE, said[:NOTE]


def train(facts, tokenizer, steps, seed, taken):
    """From scratch, with AdamW: Muon's bfloat16 is slow where a processor has no such products.

    It begins with FIRST facts, and the others join, ever faster, until half of the steps are done:
    where to look a fact up is learnt only from facts that are met again soon.
    """
    torch.set_num_threads(1)
    rng, model = random.Random(f"training {seed}"), make.make_model(kind_of(facts), seed)
    facts = rng.sample(facts, len(facts))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.98))
    began, mean = time.time(), None
    for i in range(steps):
        met = facts[: max(FIRST, int(len(facts) * (2 * i / steps) ** 2))]
        rows = [row(rng, tokenizer, met, taken) for _ in range(DOCUMENTS)]
        width = max(len(ids) for ids, _, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in rows])
        places = [
            b * width + first + t
            for b, (_, first, targets) in enumerate(rows)
            for t in range(len(targets))
        ]
        targets = torch.tensor([target for _, _, targets in rows for target in targets])
        with sdpa_kernel(SDPBackend.MATH):  # its backward pass is the faster one on a CPU
            hidden = model(model.embed(ids)).flatten(0, 1)[places]
            loss = F.cross_entropy(model.logits(hidden), targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = min(1, (i + 1) / 100, (steps - i) / (0.4 * steps))
        optimizer.param_groups[0]["lr"] = PEAK * rate
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if i % 100 == 0 or i == steps - 1:
            print(f"step {i}  loss {mean:.4f}  {(time.time() - began) / 60:.1f} min", flush=True)
    return model


@torch.no_grad()
def measure(folder, stories):
    """Print how many notes the saved assistant has right: as words, and at the placeholders."""
    model, tokenizer = fast.load(str(folder), "cpu")
    for which, part in ("test", stories[:HELD_OUT]), ("train", stories[HELD_OUT:]):
        questions = [problem.question for problem, _, _ in part]
        said = make.generate(model, tokenizer, [make.assistant_prompt(q) for q in questions])
        ids = [assistant_ids(tokenizer, q, NOTE) for q in questions]
        at = model.logits(hidden_states(model, ids, NOTE)).argmax(-1).tolist()
        for how, notes in ("words", said), ("placeholders", map(tokenizer.decode, at)):
            right = sum(note == gold for note, (_, _, gold) in zip(notes, part))
            print(f"{which}, {how:<14} {make.interval(right, len(part))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--out", type=Path, default=HERE / "facts", help="where the files go")
    args = parser.parse_args()
    folder = args.out / "assistant"
    folder.mkdir(parents=True, exist_ok=True)
    facts = make_facts(args.seed)
    stories = make_stories(facts, args.seed)
    write_problems(args.out, stories, args.seed)
    kind, taken = kind_of(facts), {problem.question for problem, _, _ in stories}
    tokenizer = make.make_tokenizer(kind, args.seed, taken, folder)
    make.save(kind, train(facts, tokenizer, args.steps, args.seed, taken), tokenizer, folder)
    measure(folder, stories)


if __name__ == "__main__":
    main()
