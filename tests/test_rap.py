"""baselines/rap.py: a tree by hand, rewards of made-up outcomes, and steps of whole models."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, edit

from baselines.rap import Action, Node, Settings, Steps, back_propagate, reason, search, select
from lab import tasks
from model import At, Prompt, Request, UserError, decode, load
from soft_reasoning import Generation, Outcome, encoded, generate_one


@pytest.fixture
def tiny_model(folder_of):
    folder = folder_of("qwen3")
    edit(folder, max_position_embeddings=1024)
    return load(str(folder), "cpu", "float32")


@pytest.fixture(scope="module")
def bundled():
    return load(str(ROOT / "tiny" / "base"), "cpu", "float32")


def asked(i):
    return tasks.ask(tasks.load("tiny", limit=i + 1)[i], tasks.TASKS["tiny"])


# ---------------------------------------------------------------------------------- a tree by hand


def test_uct_follows_the_best_mean_return_and_what_was_tried_seldom():
    """Rewards 0.9 and 0.5 under the root; below the first 0.1 (ended), below the second 0.7."""
    root = Node([], [])
    a, b = Node([1], [0.9]), Node([2], [0.5])
    a.children = [Node([1, 1], [0.9, 0.1], ended=True)]
    b.children = [Node([2, 1], [0.5, 0.7], ended=True)]
    assert select(root, 1.0) == [root]
    root.children = [a, b]
    for path in ([root, a, a.children[0]], [root, b, b.children[0]]):
        back_propagate(path)
    assert root.returns == pytest.approx([0.5, 0.6])
    assert a.returns == pytest.approx([0.5]) and b.returns == pytest.approx([0.6])
    assert a.children[0].returns == [0.1] and b.children[0].returns == [0.7]
    assert a.Q == pytest.approx(0.5)  # of the returns, no longer the reward alone
    assert a.uct(root, 2.0) == pytest.approx(0.5 + 2 * math.sqrt(math.log(2)))
    assert select(root, 1.0) == [root, b, b.children[0]]
    back_propagate([root, b, b.children[0]])
    # Now b has two of three visits: 0.6 + sqrt(ln 3 / 2) = 1.341, a: 0.5 + sqrt(ln 3) = 1.548.
    assert b.uct(root, 1.0) == pytest.approx(1.3411, abs=1e-4)
    assert a.uct(root, 1.0) == pytest.approx(1.5481, abs=1e-4)
    assert select(root, 1.0)[1] is a and select(root, 0.1)[1] is b
    # A state that nobody has visited counts as visited once, with its reward.
    new = Node([3], [0.45])
    root.children.append(new)
    assert new.uct(root, 1.0) == pytest.approx(0.45 + math.sqrt(math.log(3)))
    # Q is the largest of a state's returns.
    a.children.append(Node([1, 2], [0.9, 0.8], ended=True))
    back_propagate([root, a, a.children[1]])
    assert a.Q == pytest.approx(0.85)


# -------------------------------------------------------------------------------- made-up outcomes


def drive(model, tokenizer, settings, reply, seed=0, question="q"):
    """Run a search on made-up outcomes: reply(Action) -> Outcome. Its record, what it asked for."""
    searching = search(model, tokenizer, tasks.ask_number(question), settings, seed)
    wanted, outcomes = [], None
    while True:
        try:
            wanted.append(searching.send(outcomes))
        except StopIteration as end:
            return end.value, wanted
        outcomes = [reply(action) for action in wanted[-1]]


def made_up(tokenizer, text, p, ended):
    """A text of that probability per token; its end is the model's own, or a cut."""
    ids = [*tokenizer.encode(text), 257]
    return Outcome(text, ids, [p] * (len(ids) - 1) + [p if ended else 0.0])


def scripted(tokenizer, steps, useful):
    """Reply with these steps and P(yes), one after another."""
    steps, useful = iter(steps), iter(useful)

    def reply(action):
        if action.kind == "judge":
            return Outcome("", [257], [next(useful)])
        text, p, ended = next(steps)
        return made_up(tokenizer, text, p, ended)

    return reply


def test_rewards_paths_and_tokens_by_hand(tiny_model):
    """Two iterations of width 2 and depth 2."""
    _, tokenizer = tiny_model
    settings = Settings(rap_iterations=2, rap_width=2, rap_depth=2)
    steps = [("a 1.", 0.81, False), ("b 2.", 0.36, False)]  # rewards 0.9 * 0.6, 0.6 * 0.9
    steps += [(" So 3", 0.25, True), (" So 4", 0.64, True)]  # 0.5 * 0.2, 0.8 * 1.0
    reply = scripted(tokenizer, steps, [0.36, 0.81, 0.04, 1.0])
    record, wanted = drive(*tiny_model, settings, reply)
    kinds = [[action.kind for action in actions] for actions in wanted]
    step, judge = ["step", "step"], ["judge", "judge"]
    assert kinds == [step, judge, ["rest"], judge[:1], ["rest"], judge[:1]]
    # The first path ends with 0.1: (0.54 + 0.1) / 2 is less than 0.54, so the second is b's.
    texts = [path["text"] for path in record["paths"]]
    assert texts == ["a 1. So 3", "b 2. So 4"] and record["answers"] == ["3", "4"]
    assert record["paths"][0]["rewards"] == pytest.approx([0.54, 0.1])
    assert record["paths"][1]["rewards"] == pytest.approx([0.54, 0.8])
    assert record["answer_text"] == "b 2. So 4"
    assert record["tokens"] == [5, 5, 6, 6]
    counts = record["generation_tokens"], record["verification_tokens"], record["answer_tokens"]
    assert counts == (22, 4, 26)
    for alpha, expected in ((1.0, [0.81, 0.04]), (0.0, [0.81, 0.25])):
        reply = scripted(tokenizer, steps, [0.36, 0.81, 0.04, 1.0])
        record, _ = drive(*tiny_model, replace(settings, rap_alpha=alpha), reply)
        assert [path["rewards"] for path in record["paths"]] == [pytest.approx(expected)]


def test_a_step_starts_from_the_steps_before_it_and_equal_ones_are_one(tiny_model):
    model, tokenizer = tiny_model
    settings = Settings(rap_iterations=1, rap_width=3, rap_depth=3)
    steps = [("x 1.", 0.5, False), ("y 2.", 0.9, False), ("x 1.", 0.5, False)]
    steps += [(" z 3.", 0.9, False)] * 3 + [(" end 4", 0.9, True)]
    record, wanted = drive(*tiny_model, settings, scripted(tokenizer, steps, [0.5] * 9))
    assert [len(actions) for actions in wanted] == [3, 2, 3, 1, 1, 1]
    prompts = [actions[0].prompt.embeds for actions in wanted[::2]]
    start = model.embed(torch.tensor(tokenizer.encode(tokenizer.open("q"))))
    for prompt, text in zip(prompts, ("", "y 2.", "y 2. z 3.")):
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
        assert torch.equal(prompt, torch.cat([start, model.embed(ids)]))
    message = "q\n\nSolution so far: y 2.\n\nNext step: z 3.\n\nIs the next step right, and does it"
    message += " help to find the answer? Say Yes or No."
    judged = tokenizer.encode(tokenizer.open(message) + "</think>\n\n")
    assert torch.equal(wanted[3][0].prompt.embeds, model.embed(torch.tensor(judged)))
    assert record["answers"] == ["4"] and len({a.seeds for a in wanted[0] + wanted[2]}) == 6
    other, _ = drive(*tiny_model, settings, scripted(tokenizer, steps, [0.5] * 9), seed=1)
    again = drive(*tiny_model, settings, scripted(tokenizer, steps, [0.5] * 9))[1]
    assert [a.seeds for a in again[0]] == [a.seeds for a in wanted[0]] and other == record


def test_an_answer_counts_before_any_visit_and_votes_weigh_as_much_as_their_rewards(tiny_model):
    _, tokenizer = tiny_model
    steps = [("is 7", 0.9, True), ("is 8", 0.6, True), ("8 it is", 0.5, True), ("who", 1.0, True)]
    steps += [(text, 0.3, True) for text in ("is 9", "9 it is", "or 9")]  # the most frequent
    answers = ["7", "8", "8", None, "9", "9", "9"]
    for select_by, answer in (("best", "is 7"), ("vote", "is 8")):
        options = {"rap_iterations": 1, "rap_width": 7, "rap_depth": 3, "rap_alpha": 0.0}
        settings = Settings(select=select_by, **options)
        record, _ = drive(*tiny_model, settings, scripted(tokenizer, steps, [0.5] * 7))
        assert record["answer_text"] == answer and record["answers"] == answers


def test_a_long_path_is_no_better_for_being_long(tiny_model):
    """What counts is the mean of its rewards: here 0.5 twice, and 0.6 once."""
    _, tokenizer = tiny_model
    options = {"rap_iterations": 3, "rap_width": 2, "rap_depth": 2, "rap_alpha": 0.0}
    steps = [("a 1.", 0.5, False), ("is 7", 0.6, True), (" is 8", 0.5, True)]
    record, wanted = drive(*tiny_model, Settings(**options), scripted(tokenizer, steps, [0.5] * 3))
    assert record["answers"] == ["8", "7"] and record["answer_text"] == "is 7"
    # The third selection: 0.5 + sqrt(ln 2) for a state without visits, 0.6 + sqrt(ln 2 / 2).
    assert [len(actions) for actions in wanted] == [2, 2, 1, 1]


def test_a_step_that_leaves_no_room_to_ask_is_neither_right_nor_wrong(tiny_model):
    _, tokenizer = tiny_model
    settings = Settings(rap_iterations=1, rap_width=1, rap_depth=2)
    steps = [("x" * 500, 0.25, False), ("y" * 500, 0.25, True)]
    record, wanted = drive(*tiny_model, settings, scripted(tokenizer, steps, [1.0]))
    assert [actions[0].kind for actions in wanted] == ["step", "judge", "rest"]
    assert record["paths"][0]["rewards"] == pytest.approx([0.5, math.sqrt(0.125)])
    assert record["verification_tokens"] == 1


def test_no_step_follows_when_the_answer_has_all_its_tokens(tiny_model):
    _, tokenizer = tiny_model
    settings = Settings(rap_iterations=1, rap_width=1, rap_depth=9, max_new_tokens=8)
    steps = [("abc 1.", 0.5, False), (" d.", 0.5, False)]  # 6 + 3 tokens
    record, _ = drive(*tiny_model, settings, scripted(tokenizer, steps, [0.5] * 2))
    assert record["answers"] == ["1"] and record["tokens"] == [7, 4]


# ------------------------------------------------------------------------------- with whole models


def outcomes(model, tokenizer, actions, most=60, rows=4):
    requests = [Request(a.prompt, a.seeds, (0, i, a)) for i, a in enumerate(actions)]
    found = [None] * len(actions)
    for output in decode(model, requests, Steps(model, rows, tokenizer), rows, most, 1):
        text = tokenizer.decode([t for t in output.ids if t not in model.config.eos_ids])
        found[output.request.data[1]] = Outcome(text, output.ids, output.notes[0].tolist())
    return found


def test_greedy_steps_one_after_another_are_the_greedy_answer(bundled):
    model, tokenizer = bundled
    prompt = encoded(model, tokenizer, asked(0).text)
    greedy = generate_one(model, tokenizer, Generation(prompt), 60)
    ids, texts, probs = [], [], []
    while not probs or probs[-1] == 0:
        so_far = model.embed(torch.tensor(ids, dtype=torch.long))
        action = Action(Prompt(torch.cat([prompt.embeds, so_far])), kind="step")
        (step,) = outcomes(model, tokenizer, [action])
        ids, probs = ids + step.ids[:-1], probs[: len(ids)] + step.probs
        texts.append(step.text)
    assert [*ids, step.ids[-1]] == greedy.ids and probs == pytest.approx(greedy.probs, abs=1e-4)
    assert texts == re.split(r"(?<=\.)(?= )", greedy.text) and len(texts) == 3
    (rest,) = outcomes(model, tokenizer, [Action(prompt)])
    assert rest.ids == greedy.ids


@pytest.mark.parametrize(
    "text, step",
    [
        ("It costs 3.5 dollars. So", "It costs 3.5 dollars."),
        ("1. First we add. Then", "1. First we add."),
        ("We add\nand", "We add\n"),
        ("Oh\nWe add! Then", "Oh\nWe add!"),
        ("a\nWe add? Then", "a\nWe add?"),
        ("\n\nWe add.\n\nThen", "\n\nWe add."),
        ("We add.", None),
        ("We add\n", None),
    ],
)
def test_a_step_ends_with_a_line_or_a_sentence(text, step, tiny_model):
    model, tokenizer = tiny_model
    method, ids = Steps(model, 1, tokenizer), [*tokenizer.encode(text), 257]
    method.begin(0, Request(None, data=(0, 0, Action(None, kind="step"))))
    said, probs = [], []
    while not said or said[-1] != 257:
        at = At(torch.tensor([len(said)]), torch.tensor([True]), torch.tensor([0.5]))
        logits = 40 * torch.nn.functional.one_hot(torch.tensor([ids[len(said)]]), 272).float()
        token, embeds, p = method.step(logits, at)
        said.append(int(token)), probs.append(float(p))
        assert torch.equal(embeds, model.embed(token))
    assert tokenizer.decode(said[:-1]) == (text if step is None else step)
    assert (probs[-1] == 0) == (step is not None) and min(probs[:-1]) > 0.9


def test_a_judgement_is_the_probability_of_yes_against_no(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    (reply,) = outcomes(model, tokenizer, [Action(prompt, kind="judge")])
    p = model.logits(model(prompt.embeds[None])[0, -1]).softmax(-1)
    # A space in front is a token of its own here, and tells nothing.
    ids = [[tokenizer.encode(letter)[0] for letter in letters] for letters in ("Yy", "Nn")]
    yes, no = (p[i].sum().item() for i in ids)
    assert reply.probs == [pytest.approx(yes / (yes + no), abs=1e-5)] and reply.ids == [257]


def test_steps_are_drawn_at_their_temperature(tiny_model):
    model, tokenizer = tiny_model
    prompt = Prompt(model.embed(torch.tensor([5, 80, 70])))
    options = {"kind": "step", "temperature": 2.0}
    actions = [Action(prompt, seeds=(0, i), **options) for i in range(2000)]
    found = outcomes(model, tokenizer, actions, most=1, rows=50)
    p = model.logits(model(prompt.embeds[None])[0, -1])
    expected = (p / 2).softmax(-1)
    counts = torch.bincount(torch.tensor([o.ids[0] for o in found]), minlength=272) / 2000
    likely = expected > 0.01
    assert torch.allclose(counts[likely], expected[likely], atol=0.03)
    first = found[0]
    assert first.probs[0] == pytest.approx(p.softmax(-1)[first.ids[0]].item(), abs=1e-5)


def test_the_bundled_models_search_is_of_its_seed_alone(bundled, one_thread):
    model, tokenizer = bundled
    settings = Settings(rap_iterations=2, rap_width=2, rap_depth=3, max_new_tokens=60)
    questions = [asked(i) for i in range(2)]

    def records(questions, seed, rows=None):
        found = reason(model, tokenizer, questions, settings, seed, rows)
        return {i: {k: v for k, v in r.items() if k != "seconds"} for i, r in found}

    together = records(questions, 1, 8)
    for i, question in enumerate(questions):
        assert records([question], 1, 8)[0] == together[i]
        paths = together[i]["paths"]
        assert all(1 <= len(path["rewards"]) <= 3 for path in paths)
        assert all(0 < reward <= 1 for path in paths for reward in path["rewards"])
        assert len({path["text"] for path in paths}) == len(paths) == len(together[i]["answers"])
        assert any(together[i]["answers"])
    assert records(questions, 2, 8) != together


def test_a_model_without_an_end_is_refused(folder_of):
    folder = folder_of("qwen3")
    edit(folder, eos_token_id="DELETE")
    (folder / "generation_config.json").write_text(json.dumps({}))
    both = load(str(folder), "cpu", "float32")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        list(reason(*both, [tasks.ask_number("q")]))
