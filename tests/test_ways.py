"""The model whose first word decides how it works, and which judges: documents, files, answers."""

import random
import re
from collections import Counter
from itertools import permutations

import pytest

from model import load
from tiny import make, make_ways

WAYS = make.HERE / "ways"
BRIEF, SUMS, PRODUCTS = make_ways.WAYS

pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small are slower on two


@pytest.fixture(scope="module")
def bundled():
    return load(str(WAYS), device="cpu")


@pytest.mark.parametrize(
    "equation, brief, sums, products",
    [
        ("295+222=517", "295+222=517", "295+222=(715)517", "295+222=517"),
        ("30-29=1", "30-29=1", "30-29=(1)1", "30-29=1"),
        ("3*48=144", "3*48=144", "3*48=144", "3*48=120+24=(441)144"),
        ("155*5=775", "155*5=775", "155*5=775", "155*5=500+250+25=(577)775"),
        ("5*40=200", "5*40=200", "5*40=200", "5*40=(002)200"),
        ("492/4=123", "492/4=123", "492/4=123", "492/4=123"),
    ],
)
def test_each_way_works_its_own_signs_out(equation, brief, sums, products):
    done = [make_ways.worked(equation, make_ways.WAYS[way]) for way in (BRIEF, SUMS, PRODUCTS)]
    assert done == [brief, sums, products]


def test_every_possible_order_is_drawn_and_no_other():
    """Of 3*8 and 4*5, used by the third and fifth equation: all orders that use what is known."""
    program = [("x", "x", "+", 7), ("t", 3, "*", 8), ("x", "x", "-", "t")]
    program += [("t", 4, "*", 5), ("x", "x", "+", "t")]
    p = make.Problem("", "Anna", 50, program, [])
    equations, _ = p.work()
    assert equations == ["50+7=57", "3*8=24", "57-24=33", "4*5=20", "33+20=53"]
    needs = {2: {0, 1}, 4: {2, 3}}  # by their numbers
    possible = {
        order
        for order in permutations(range(5))
        if all(needs.get(i, set()) <= set(order[:at]) for at, i in enumerate(order))
    }
    rng = random.Random(0)
    drawn = [make_ways.ordered(rng, p, equations) for _ in range(500)]
    assert {tuple(map(equations.index, order)) for order in drawn} == possible


def test_documents_hold_true_equations_in_the_way_that_they_begin_with():
    rng, ways, sure = random.Random(1), Counter(), 0
    for _ in range(300):
        _, response = make_ways.answer_document(rng, frozenset())
        thought, answer = response.split("</think>The answer is ")
        ways[way := next(w for w in make_ways.WAYS if thought.startswith(w.split()[0]))] += 1
        for text in re.findall(r"\S+=\S+(?=\.)", thought):
            task, *between, value = text.split("=")
            backwards, value = re.fullmatch(r"(?:\((\d+)\))?(\d+)", value).groups()
            exact = eval(task)
            assert exact == int(value) and all(eval(sum_) == exact for sum_ in between)
            assert backwards in (None, value[::-1])
            assert (backwards is not None) == any(s in task for s in make_ways.WAYS[way])
        assert thought.count(f" So {answer}") in (0, make_ways.SURE)
        sure += f" So {answer}" in thought
    assert min(ways.values()) > 60 and sure > 30


def test_all_questions_are_judged_but_many_whose_answers_are_all_right(monkeypatch):
    rng = random.Random("judged 7")
    problems = [make.fresh(rng) for _ in range(300)]
    right = [5, 4, 0] * 100  # of each question's five answers, the first ones

    def said(i):
        answer = problems[i].work()[1]
        return [f"Hm.</think>The answer is {answer + (k >= right[i])}." for k in range(5)]

    def generate(model, tokenizer, questions, **how):
        assert questions == [p.question for p in problems for _ in range(5)]
        assert how == {"temperature": 0.7, "seed": 7, "most": 200}
        return [text for i in range(300) for text in said(i)]

    monkeypatch.setattr(make, "generate", generate)
    monkeypatch.setattr(make_ways, "POOL", 300)
    pool = make_ways.draw_pool(None, None, 7, frozenset())
    kept = [problems.index(p) for p, _ in pool]
    assert [i for i in kept if right[i] < 5] == [i for i in range(300) if right[i] < 5]
    assert 20 <= sum(right[i] == 5 for i in kept) <= 40  # 30 of 100 on average
    for i, (_, candidates) in zip(kept, pool):
        assert candidates == [text.replace("</think>", " ") for text in said(i)]


def test_a_judge_works_the_problem_out_again():
    rng = random.Random(2)
    problems = [make.fresh(rng) for _ in range(20)]
    pool = [(p, [f"Text {i}." for i in range(5)]) for p in problems]
    shown = Counter()
    for _ in range(400):
        prompt, response = make_ways.judge_document(pool, rng, frozenset())
        candidates = re.findall(r"Candidate \d: Text (\d)\.", prompt)
        shown[len(candidates)] += 1
        if candidates:
            p = next(p for p in problems if prompt.startswith(p.question))
            equations, answer = p.work()
            assert len(set(candidates)) == len(candidates)
            assert response.startswith(f"First {p.start}. ")
            assert response.endswith(f".</think>The answer is {answer}.")
            worked = [make_ways.worked(e, "+-") for e in equations]
            assert sorted(re.findall(r"\S+=\S+(?=\.)", response)) == sorted(worked)
            assert " So " not in response  # it does not go on
    assert 180 < shown[0] < 220 and shown[5] > 80 and min(shown[n] for n in (2, 3, 4)) > 10


def test_the_folder_speaks_the_first_model_s_tokens(bundled):
    for name in "tokenizer.json", "tokenizer_config.json", "config.json":
        assert (WAYS / name).read_bytes() == (make.HERE / "base" / name).read_bytes()
    assert (WAYS / "model.safetensors").stat().st_size < 4_200_000


def test_the_first_word_decides_how_the_model_works(bundled):
    test = make.make_test(0)[::6]  # 50, of every length
    right = {}
    for way, signs in make_ways.WAYS.items():
        said = make_ways.begun(*bundled, [p.question for p in test], way)
        worked = Counter()
        for text in said:
            for task, backwards in re.findall(r"(\d+[-+*/]\d+)=[\d+=]*(\(?)", text):
                worked[any(s in task for s in signs), backwards == "("] += 1
        assert worked[True, True] >= 0.95 * (worked[True, True] + worked[True, False])
        assert worked[False, False] >= 0.95 * (worked[False, True] + worked[False, False])
        right[way] = [make.answer_of(text) == p.work()[1] for text, p in zip(said, test)]
    best = max(map(sum, right.values()))
    assert sum(map(any, zip(*right.values()))) >= best + 2  # none is best for all problems


@pytest.mark.parametrize("right, least", [(3, 0.7), (0, 0.5)])
def test_the_judge_is_right_with_right_candidates_and_without(bundled, right, least):
    """So many right ones and, up to five, others with one fault each, in whatever order.

    Repeating the majority is always right with three, and never with none.
    """
    rng, messages, gold = random.Random(3), [], []
    for p in make.make_test(0)[::12]:
        equations, answer = p.work()
        shown = [(equations, answer)] * right + [make.wrong(rng, p) for _ in range(5 - right)]
        ways = [rng.choice(list(make_ways.WAYS)) for _ in shown]
        texts = [
            f"{make_ways.reasoning(rng, p, e, w)} The answer is {a}."
            for (e, a), w in zip(shown, ways)
            if len(e) == len(equations)
        ]
        messages.append(make.judge_prompt(p.question, rng.sample(texts, len(texts))))
        gold.append(answer)
    said = make.generate(*bundled, messages, most=200)
    assert sum(make.answer_of(text) == a for text, a in zip(said, gold)) >= least * len(gold)
