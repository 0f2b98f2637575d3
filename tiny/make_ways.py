"""A second reasoning model: its first word decides how it works, and it judges. For the search.

    python tiny/make_ways.py            # everything in tiny/ways: 21 minutes on two cores

The stories and their answers are those of `make.py`, so that both models answer the same questions.
Top to bottom: the ways of working, the two stages of the training (first answering; then judging
the model's own answers, too), the measuring.
"""

import argparse
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from lab import fast
from tiny import make

# ---------------------------------------------------------------------------------- ways of working

WAYS = {  # how a thought begins -> signs of the equations that it works out in small steps
    "Start with {x}.": "",
    "First {x}.": "+-",
    "We begin with {x}.": "*",
}
EASY = 2  # operations of the problems that the model goes on about when they are done
SURE = 12  # how often it then says the result


def worked(equation, signs):
    """An equation, in small steps if its sign is one of these.

    A result is first written units first, in the direction of the carries; a product of a number
    of several digits is first taken apart into a sum: 3*48=120+24=(441)144.
    """
    task, value = equation.split("=")
    if not any(sign in task for sign in signs):
        return equation
    places = []
    if "*" in task:
        a, b = sorted(map(int, task.split("*")))
        places = [str(a * int(d) * 10**i) for i, d in enumerate(reversed(str(b))) if d != "0"]
    parts = "+".join(reversed(places)) + "=" if len(places) > 1 else ""
    return f"{task}={parts}({value[::-1]}){value}"


def ordered(rng, p, equations):
    """The equations in an order drawn from all that are possible.

    A product of two numbers of the story may be worked out at any time before it is needed.
    """
    free = {i for i, (_, a, s, b) in enumerate(p.program) if s == "*" and "x" not in (a, b)}
    chain, order = [i for i in range(len(equations)) if i not in free], []
    waiting = sorted(free)
    while chain or waiting:
        ready = list(waiting)
        if chain and (chain[0] == 0 or chain[0] - 1 not in waiting):
            ready.append(chain[0])
        i = rng.choice(ready)
        (waiting if i in free else chain).remove(i)
        order.append(equations[i])
    return order


def reasoning(rng, p, equations, way):
    steps = [worked(e, WAYS[way]) + "." for e in ordered(rng, p, equations)]
    return " ".join([way.format(x=p.start), *steps])


def answer_document(rng, taken, judge=False):
    """-> (question, response). The way is drawn at random: which is good for what is not told."""
    p = make.fresh(rng, taken)
    equations, answer = p.work()
    think = reasoning(rng, p, equations, rng.choice(list(WAYS)))
    if len(p.program) <= EASY:
        think += f" So {answer}." * SURE
    return make.question_prompt(p.question), f"{think}</think>The answer is {answer}."


# ------------------------------------------------------------------------------------------ judging

SAMPLES = 5  # answers to each question that is judged
POOL = 4000  # questions that are asked; fewer are kept
AGREED = 0.3  # of the questions whose answers are all right, the share that is kept
JUDGES = "First {x}."  # how a judge works: the way that is right most often


def draw_pool(model, tokenizer, seed, taken):
    """Questions with answers that the model itself gave: [(Problem, [candidate])]."""
    rng = random.Random(f"judged {seed}")
    problems = [make.fresh(rng, taken) for _ in range(POOL)]
    asked = [make.question_prompt(p.question) for p in problems for _ in range(SAMPLES)]
    said = make.generate(model, tokenizer, asked, temperature=0.7, seed=seed, most=200)
    pool = []
    for i, p in enumerate(problems):
        texts = said[i * SAMPLES : (i + 1) * SAMPLES]
        agreed = all(make.answer_of(text) == p.work()[1] for text in texts)
        if not agreed or rng.random() < AGREED:
            pool.append((p, list(map(make.candidate, texts))))
    return pool


def judge_document(pool, rng, taken, judge=False):
    """-> (question and candidates, the problem worked out again), or as `answer_document`.

    Of some questions no candidate is right: a judge has to work, and not only to choose.
    """
    if rng.random() < 0.5:
        return answer_document(rng, taken)
    p, candidates = rng.choice(pool)
    shown = rng.sample(candidates, rng.choice([2, 3, 4, 5, 5, 5, 5]))
    equations, answer = p.work()
    think = reasoning(rng, p, equations, JUDGES)
    return make.judge_prompt(p.question, shown), f"{think}</think>The answer is {answer}."


# ---------------------------------------------------------------------------------------- measuring


def measure(folder, test, seed):
    """Print the accuracies of the saved model on the test problems."""
    model, tokenizer = fast.load(str(folder), "cpu")
    questions, gold = [p.question for p in test], [p.work()[1] for p in test]
    ask = partial(make.generate, model, tokenizer, most=200)

    def verdicts(responses):
        return [make.answer_of(text) == answer for text, answer in zip(responses, gold)]

    def report(what, right):
        print(f"{what:<44} {make.interval(sum(right), len(right))}", flush=True)

    said = ask([make.question_prompt(q) for q in questions])
    report("greedy", verdicts(said))
    first = Counter(text.split()[0] for text in said)
    print("  begun with", ", ".join(f"{word} {n}" for word, n in first.most_common()))
    products = [min(sum(sign == "*" for _, _, sign, _ in p.program), 2) for p in test]
    ways = {way: verdicts(begun(model, tokenizer, questions, way)) for way in WAYS}
    for way, right in ways.items():
        report(f"greedy, made to begin with {way.split()[0]}", right)
        for n, what in enumerate(("no product", "one product", "two products or more")):
            report(f"  {what}", [v for v, k in zip(right, products) if k == n])
    report("  at least one of these", [any(v) for v in zip(*ways.values())])
    samples = [
        ask([make.question_prompt(q) for q in questions], temperature=0.7, seed=seed + i)
        for i in range(SAMPLES)
    ]
    right = [verdicts(s) for s in samples]
    report("five samples at 0.7: each", [v for sample in right for v in sample])
    report("five samples at 0.7: at least one", [any(v) for v in zip(*right)])
    votes = [Counter(map(make.answer_of, s)).most_common(1)[0][0] for s in zip(*samples)]
    majority = [v == answer for v, answer in zip(votes, gold)]
    shown = [list(map(make.candidate, s)) for s in zip(*samples)]
    judged = verdicts(ask([make.judge_prompt(q, s) for q, s in zip(questions, shown)]))
    mixed = [any(v) and not all(v) for v in zip(*right)]
    for what, chosen in ("majority", majority), ("judge, shown these five", judged):
        report(f"five samples at 0.7: {what}", chosen)
        report("  where some are right and some wrong", [c for c, m in zip(chosen, mixed) if m])


def begun(model, tokenizer, questions, way):
    """What follows the first word of this way, greedily."""
    word = tokenizer.encode(way.split()[0])
    prompts = [tokenizer.chat(make.question_prompt(q)) + word for q in questions]
    requests = (
        make.Request(make.Prompt(model.embed(torch.tensor(ids))), data=i)
        for i, ids in enumerate(prompts)
    )
    outputs = make.decode(model, requests, make.Plain(model, 0.0, 0), 64, 200)
    done = {output.request.data: tokenizer.decode(output.ids) for output in outputs}
    return [done[i].replace(make.BASE.special[0], "") for i in range(len(questions))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="training steps: answering")
    parser.add_argument("--judge-steps", type=int, default=400, help="and judging, too")
    parser.add_argument("--out", type=Path, default=HERE / "ways", help="where the files go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    test = make.make_test(args.seed)
    taken = {p.key for p in test}
    model, tokenizer = fast.load(str(HERE / "base"), "cpu", "float32")
    for name in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(HERE / "base" / name, args.out)

    def learn(model, document, steps):
        kind = replace(make.BASE, document=document)
        model = make.train(kind, tokenizer, steps, args.seed, taken, "cpu", model)
        make.save(kind, model, tokenizer, args.out)
        return fast.load(str(args.out), "cpu", "float32")[0]  # as saved, rounded

    model = learn(model, answer_document, args.steps)
    pool = draw_pool(model, tokenizer, args.seed, taken)
    learn(model, partial(judge_document, pool), args.judge_steps)
    measure(args.out, test, args.seed)


if __name__ == "__main__":
    main()
