"""lab/coconut_cli.py, lab/coconut_eval.py and tiny/graph.py: commands, files, the graph task."""

import importlib.util
import json
import re
import shutil
import sys
from collections import Counter
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from softcot_pair import assert_same, data, lengthen, outcome, pair

import softcot
from baselines import coconut, lora
from lab import coconut_cli, coconut_eval, sources, tasks, trained
from lab.coconut_eval import distances, group
from model import Tokenizer, load

__all__ = ["data", "pair"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")
GRAPH = ROOT / "tiny" / "graph"
SPEC = importlib.util.spec_from_file_location("graph", ROOT / "tiny" / "graph.py")
graph = importlib.util.module_from_spec(SPEC)
sys.modules["graph"] = graph
SPEC.loader.exec_module(graph)
KINDS = list(product((1, 2, 3), (False, True)))  # edges to the answer, dead ends


def main(*arguments):
    """What `python -m baselines.coconut` does with these arguments; its exit code."""
    return coconut_cli.command(list(map(str, arguments)), coconut, lora, softcot)


def trains(folder, *more, data=GRAPH / "test.jsonl", model=GRAPH, epochs=4):
    """A few problems; one stage after another; each step changes something."""
    common = ["--folder", folder, "--model", model, "--device", "cpu", "--data", data]
    common += ["--task", "data", "--limit", 18, "--stages", 2, "--first-epochs", 1]
    common += ["--stage-epochs", 1]
    common += ["--epochs", epochs, "--batch-size", 4, "--dev", 6, "--dev-limit", 1, "--lr", 0.01]
    return main("train", *common, *more)


@pytest.fixture(scope="module")
def problems_file(tmp_path_factory):
    """Problems of the graph task that are no test."""
    path = tmp_path_factory.mktemp("graph") / "some.jsonl"
    graph.write_problems(path, graph.make("some", 30, KINDS, set()))
    return path


# ------------------------------------------------------------------------------------- graph task


def reached(edges, name):
    """Names that edges lead to from a name, by following them as often as there are any."""
    found = {name}
    for _ in edges:
        found |= {b for a, b in edges if a in found}
    return found


def test_one_of_the_offered_names_can_be_reached_and_nothing_else_tells_them_apart():
    problems = graph.make("any", 300, KINDS, set())
    kinds = Counter((len(p.path) - 1, len(p.edges) > 2 * (len(p.path) - 1)) for p in problems)
    assert kinds == dict.fromkeys(KINDS, 50)
    for p in problems:
        (root, *_, right), hops = p.path, len(p.path) - 1
        (wrong,) = set(p.offered) - {right}
        assert right in reached(p.edges, root) and wrong not in reached(p.edges, root)
        assert all(step in p.edges for step in pairwise(p.path))
        into = Counter(b for _, b in p.edges)
        (other,) = {a for a, _ in p.edges} - {root, *into}
        assert set(into.values()) == {1} and wrong in reached(p.edges, other)  # two trees
        assert len(reached(p.edges, root)) == len(reached(p.edges, other)) == len(p.edges) / 2 + 1
        # Every way, wrong or right, is as long as that to the answer; one leaves each step.
        ends = {b for _, b in p.edges} - {a for a, _ in p.edges}
        away, dead_ends = distances(p.row["question"]), len(p.edges) > 2 * hops
        assert {away[end] for end in ends & reached(p.edges, root)} == {hops}
        for t in range(1, hops + 1):
            assert list(away.values()).count(t) == (t + 1 if dead_ends else 1)
        assert away[right] == hops and away[wrong] is None
        assert p.row["choices"] == p.offered and p.row["answer"] == right
    firsts = Counter(p.offered[0] == p.path[-1] for p in problems)
    assert min(firsts.values()) > 100


def facts(p):
    return p.question.partition(". Is every")[0].split(". ")


def test_the_bundled_files_are_what_the_script_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["graph.py", "--out", str(tmp_path), "--train", "600"])
    graph.main()
    for path in tmp_path.iterdir():
        if path.name != "train.jsonl":
            assert path.read_bytes() == (GRAPH / path.name).read_bytes(), path.name
    test, train = (tasks.load("data", tmp_path / f"{name}.jsonl") for name in ("test", "train"))
    test, train = ({(*sorted(facts(p)), p.steps[0]) for p in ps} for ps in (test, train))
    assert not test & train and len(test) > 250
    assert sum(path.stat().st_size for path in GRAPH.iterdir() if path.name != "train.jsonl") < 2e5


def test_the_tokenizer_gives_a_fact_three_tokens_and_its_text_back():
    tokenizer, p = Tokenizer(GRAPH), tasks.load("graph", limit=3)[2]
    text = "\n".join([*p.steps, f"The answer is {p.choices[p.answer]}."])
    facts = p.question.count("Every")
    for said, tokens in ((p.question, 3 * facts + 5), (text, 3 * len(p.steps) + 3)):
        ids = tokenizer.encode(said)
        assert len(ids) == tokens and tokenizer.decode(ids) == said
        assert max(ids) < json.loads((GRAPH / "config.json").read_text())["vocab_size"]


def test_distances_and_groups():
    question = (
        "Every a is a b. Every b is a c. Every x is a y. Every a is a c. Is every a a c or a y?"
    )
    away = distances(question)
    assert away == {"a": 0, "b": 1, "c": 1, "x": None, "y": None}
    assert [group(away[name], 1) for name in "abcxy"] == ["passed", *["frontier"] * 2] + [
        "out of reach"
    ] * 2
    assert [group(2, t) for t in (1, 2, 3)] == ["ahead", "frontier", "passed"]


# --------------------------------------------------------------------------------- train and eval


@pytest.mark.parametrize("method", ["coconut", "pause", "cot", "no-cot"])
def test_a_training_from_nothing_is_evaluated(method, tmp_path, problems_file, capsys):
    page = tmp_path / "page.html"
    options = ["--from-nothing", "--method", method, "--html", page]
    assert trains(tmp_path / "a", *options, data=problems_file) == 0
    assert "Held-out accuracy" in page.read_text(encoding="utf-8")
    files, log = outcome(tmp_path / "a")
    thoughts = [line["thoughts"] for line in log if "dev_loss" in line]
    assert thoughts == {"coconut": [0, 0, 1, 2, 2], "pause": [2] * 5}.get(method, [0] * 5)
    own = {"coconut": {"bot", "eot"}, "pause": {"pause"}}.get(method, set())
    best = files["coconut.safetensors"]
    assert {name for name in best if "." not in name} == own
    assert all(torch.isfinite(x).all() for x in best.values())
    path, table = tmp_path / "a" / "coconut.safetensors", tmp_path / "table.json"
    few = ["--limit", 5, "--max-new-tokens", 9]
    code = main("eval", "--trained", path, *few, "--json", table, "--html", page)
    assert page.read_text(encoding="utf-8").count("<article") == 5
    row = json.loads(table.read_text())["methods"][0]
    assert code == 0 and row["method"] == method and row["tokens"] > len(own)


def test_a_training_goes_on_to_the_same_bits(tmp_path, problems_file, monkeypatch, capsys):
    assert trains(tmp_path / "whole", "--from-nothing", data=problems_file) == 0
    real = coconut_cli.Staged.log
    for stop in (2, 4, 8):  # within a stage, at a stage's first step, in the last one

        def log(self, step, stop=stop, **what):
            real(self, step, **what)
            if step == stop and "loss" in what:
                raise KeyboardInterrupt

        monkeypatch.setattr(coconut_cli.Staged, "log", log)
        code = trains(tmp_path / "cut", "--from-nothing", "--save-every", "2", data=problems_file)
        assert code == 130
    monkeypatch.setattr(coconut_cli.Staged, "log", real)
    more = "--from-nothing", "--save-every", "2"
    assert trains(tmp_path / "cut", *more, data=problems_file) == 0
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_lora_trains_beside_the_model_and_is_merged_for_answers(
    tmp_path, pair, folder_of, data, capsys
):
    folder, _ = pair()
    before = load_file(Path(folder) / "model.safetensors")
    small = "--limit", 8, "--dev", 3, "--dev-limit", 0, "--dtype", "float32"
    assert trains(tmp_path / "a", "--lora", *small, data=data, model=folder) == 0
    assert load_file(Path(folder) / "model.safetensors").keys() == before.keys()
    path = tmp_path / "a" / "last.safetensors"
    trained = load_file(path)
    assert {"bot", "eot"} < trained.keys() and all("lora" in x for x in trained if "." in x)
    assert any(x.any() for name, x in trained.items() if name.endswith("lora_B.weight"))
    args = SimpleNamespace(model=None, device="cpu", dtype="float32")
    it = coconut_eval.read(path, args, coconut, lora, {})
    question = it.tokenizer.encode("Why?")
    with torch.no_grad():
        with lora.hooks(it.model, it.tensors, 2.0, 0.1):
            loss = coconut.loss_one(it.model, it.tensors, question, 2, [65, 66])
        with lora.merged(it.model, it.tensors, coconut_eval.ALPHA / coconut_eval.RANK):
            merged = coconut.loss_one(it.model, it.tensors, question, 2, [65, 66])
        plain = coconut.loss_one(it.model, it.tensors, question, 2, [65, 66])
    assert merged.item() == pytest.approx(loss.item(), rel=1e-4)
    assert plain.item() != pytest.approx(loss.item(), rel=1e-4)
    evaluate = "eval", "--trained", path, "--dtype", "float32", "--data", data, "--limit", 2
    assert main(*evaluate, "--max-new-tokens", 4) == 0
    other = lengthen(folder_of("mistral"))
    assert main(*evaluate, "--model", other) == 2
    assert "was made for" in capsys.readouterr().err


def test_several_trainings_of_a_method_are_summed_up(tmp_path, problems_file, capsys):
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        more = "--from-nothing", "--method", "no-cot", "--seed", seed
        assert trains(folder, *more, data=problems_file, epochs=1) == 0
    files = [str(tmp_path / f"{seed}/coconut.safetensors") for seed in (0, 1)]
    few = "--limit", 4, "--max-new-tokens", 4
    capsys.readouterr()
    assert main("eval", "--trained", ",".join(files), *few) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("no-cot #1, no-cot #2: ") and said[-1].endswith(" (2)")
    # What differs in more than its seed is no other training of the same kind.
    path = tmp_path / "2" / "coconut.safetensors"
    more = "--from-nothing", "--method", "no-cot", "--lr", 0.02
    assert trains(tmp_path / "2", *more, data=problems_file, epochs=1) == 0
    capsys.readouterr()
    assert main("eval", "--trained", ",".join([*files, str(path)]), *few) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("no-cot #1, no-cot #2: ") and "standard deviation" in said[-2]
    # Nor is the same one, or its last step beside its best.
    for other in (files[0], files[0].replace("coconut.", "last.")):
        assert main("eval", "--trained", f"{files[0]},{other}", *few) == 0
        assert "standard deviation" not in capsys.readouterr().out


def test_what_is_best_is_of_the_last_stage(tmp_path, problems_file, monkeypatch):
    """Here the held-out loss only rises: the last stage's first one is the best."""
    real = coconut_cli.Staged.loss

    def loss(self, indices, n, k):
        labels = sum(len(self.sequences[i].labels(k)) for i in indices)
        rising = torch.tensor(float(self.step * labels))
        return real(self, indices, n, k) if torch.is_grad_enabled() else rising

    monkeypatch.setattr(coconut_cli.Staged, "loss", loss)
    assert trains(tmp_path / "a", "--from-nothing", data=problems_file, epochs=5) == 0
    with safe_open(tmp_path / "a" / "coconut.safetensors", "pt") as file:
        metadata = file.metadata()
    _, log = outcome(tmp_path / "a")
    stages = {line["epoch"]: line["thoughts"] for line in log if "dev_loss" in line}
    assert stages == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 2}
    assert (metadata["thoughts"], metadata["step"]) == ("2", str(4 * 3))  # the last stage's first


def test_records_have_what_decides_them_and_say_where_logits_were_not_finite(
    tmp_path, problems_file, capsys
):
    assert trains(tmp_path / "a", "--from-nothing", data=problems_file, epochs=1) == 0
    path, out = tmp_path / "a" / "last.safetensors", tmp_path / "out.jsonl"
    evaluate = "eval", "--limit", 2, "--max-new-tokens", 4, "--trained"
    assert main(*evaluate, path, "--output", out) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["not_finite"] for r in records] == [0, 0]
    for more in (("--max-new-tokens", 5), ("--batch-size", 2)):
        assert main(*evaluate, path, "--output", out, *more) == 2
        assert "there and" in capsys.readouterr().err
    tensors, metadata = trained.read_tensors(path)
    tensors["embed_tokens.weight"][-1] = torch.inf  # a token that no prompt has
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    assert main(*evaluate, tmp_path / "bad.safetensors", "--output", tmp_path / "bad.jsonl") == 0
    assert "warning: in 2 of 2 records an answer ends early" in capsys.readouterr().err


def test_programs_are_graded_only_where_that_is_permitted(tmp_path, problems_file, capsys):
    assert trains(tmp_path / "a", "--from-nothing", data=problems_file, epochs=1) == 0
    data = tmp_path / "code.jsonl"
    data.write_text(json.dumps({"question": "Is it?", "tests": "assert f() == 1"}) + "\n")
    path = tmp_path / "a" / "coconut.safetensors"
    evaluate = "eval", "--trained", path, "--data", data, "--task", "data", "--max-new-tokens", 2
    assert main(*evaluate) == 2
    assert "--run-generated-code" in capsys.readouterr().err
    assert main(*evaluate, "--run-generated-code") == 0


def test_a_target_ends_with_the_tokenizer_s_end_and_names_a_choice_by_its_text(folder_of):
    _, tokenizer = load(str(folder_of("qwen3")), "cpu")
    end = tokenizer.core.token_to_id(tokenizer.special["eos_token"])
    p = tasks.Problem("p", "Why?", "B", "choice", {"A": "wug", "B": "fep"}, ["One.", "Two."])
    made = coconut_cli.example(coconut, softcot, tokenizer, (999, end), p, tasks.TASKS["graph"])
    texts = [tokenizer.decode(target[:-1]) for target in made.targets]
    assert [target[-1] for target in made.targets] == [end] * 3
    assert [text.count("One.") for text in texts] == [1, 0, 0]
    assert [text.count("Two.") for text in texts] == [1, 1, 0]
    assert all(text.endswith("The answer is fep.") for text in texts)
    asked = coconut_cli.example(coconut, softcot, tokenizer, (999,), p, tasks.TASKS["data"])
    assert all(target[-1] == 999 for target in asked.targets)  # eos_token is no end there
    assert tokenizer.decode(asked.targets[2][:-1]).endswith("\\boxed{B}.")


def test_probe_prints_the_mass_of_all_tokens(tmp_path, problems_file, capsys):
    assert trains(tmp_path / "a", "--from-nothing", data=problems_file) == 0
    capsys.readouterr()
    path = tmp_path / "a" / "coconut.safetensors"
    row = json.loads(problems_file.read_text().splitlines()[0])
    own, words = tmp_path / "own.jsonl", "does not end with one of the question's names"
    for change, said in (
        ({"steps": ["So the next one"]}, words),
        ({"steps": ["!!", "?"]}, words),
        ({"question": row["question"] * 60}, "shorten it"),
    ):
        own.write_text(json.dumps(row | change) + "\n")
        assert main("probe", "--trained", path, "--data", own) == 2
        assert said in capsys.readouterr().err
    assert main("probe", "--trained", path, "--task", "humaneval") == 2
    assert "probe reads the facts of --task graph" in capsys.readouterr().err
    assert main("probe", "--trained", path, "--limit", 6) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 3 * 2  # hops, thoughts
    for line in lines:
        hops, thought, *cells = line.split()
        mass = [float(x) for x in cells[:-1] if not x.startswith("(")]
        *mass, right = mass
        assert len(mass) == 5 and sum(mass) == pytest.approx(1, abs=3e-3)
        assert 0 <= right <= mass[0] or int(thought) > int(hops)
        names = [float(x[1:-1]) for x in cells if x.startswith("(")]
        assert sum(names) == (int(hops) + 1) * (int(hops) + 2)  # all names of both trees


class Words:
    """A tokenizer whose tokens are words, the same ones for every name but its own."""

    def __init__(self):
        self.ids = {}

    def open(self, text):
        return text

    def encode(self, text):
        return [self.ids.setdefault(word, len(self.ids)) for word in re.findall(r"\w+", text)]


PROBED = "Every dax is a wug. Every fep is a mib. Is every dax a wug or a mib?"


@pytest.mark.parametrize(
    "tokenizer, given",
    [
        (Tokenizer(GRAPH), {"Every dax is a": 0.2, " dax": 0.3, " wug": 0.4, ".": 0.1}),
        (Words(), {"dax": 0.5, "wug": 0.4, "Every": 0.1}),
    ],
)
def test_a_thought_is_read_as_names(tokenizer, given):
    p = torch.full((99,), 1e-9)
    for text, probability in given.items():
        p[tokenizer.encode(text)] = probability
    method = SimpleNamespace(
        framed=lambda model, trained, ids, n: (ids, n, None),
        Past=coconut.Past,
        thoughts_one=lambda model, before, n, cache: ([p.log()] * n, None),
    )
    config = SimpleNamespace(context=99, vocab_size=99)
    model = SimpleNamespace(logits=lambda thought: thought, device="cpu", config=config)
    it = SimpleNamespace(model=model, tokenizer=tokenizer, tensors={}, n=2)
    for thought in coconut_eval.read_thoughts(it, method, PROBED):
        assert thought == pytest.approx({"dax": 0.5, "wug": 0.4, "fep": 0, "mib": 0}, abs=1e-6)


@pytest.mark.parametrize(
    "c, groups, rest",
    [
        (1, "0.200 (1.0) 0.700 (3.0) 0.000 (0.0) 0.100 (2.0)", "0.000 0.200 0%"),  # of step 2
        (2, "0.600 (2.0) 0.100 (1.0) 0.200 (1.0) 0.100 (2.0)", "0.000 0.500 100%"),  # of step 1
    ],
)
def test_probe_says_where_the_probability_lies(c, groups, rest, tmp_path, monkeypatch, capsys):
    facts = "Every dax is a wug. Every dax is a fep. Every wug is a mib. Every kiv is a toma. "
    row = {"question": facts + "Is every dax a mib or a toma?", "answer": "mib"}
    row |= {"choices": ["mib", "toma"], "steps": ["Every dax is a wug.", "Every wug is a mib."]}
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    thoughts = [
        {"dax": 0.05, "wug": 0.3, "fep": 0.4, "mib": 0.1, "kiv": 0.01, "toma": 0.02},
        {"dax": 0.1, "wug": 0.5, "fep": 0.1, "mib": 0.2, "kiv": 0.0, "toma": 0.1},
    ]
    it = SimpleNamespace(method="coconut", n=2, c=c, lora=False)
    monkeypatch.setattr(coconut_eval, "read", lambda *_: it)
    monkeypatch.setattr(coconut_eval, "read_thoughts", lambda *_: thoughts)
    assert main("probe", "--trained", "any", "--data", path, "--task", "graph") == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    # frontier, passed, ahead, out of reach, (how many each), other tokens, right name, likeliest
    before = "0.700 (2.0) 0.050 (1.0) 0.100 (1.0) 0.030 (2.0)"
    assert " ".join(first.split()) == f"2 1 {before} 0.120 0.300 100%"
    assert " ".join(second.split()) == f"2 2 {groups} {rest}"


def test_drawn_embeddings_and_thoughts_are_as_long_and_logits_near_one():
    torch.manual_seed(0)
    model, _ = coconut_eval.bare(str(GRAPH), "cpu", False)
    thought = model(model.embed(torch.arange(20)[None]))[0].detach()
    length = model.config.d**0.25
    assert thought.norm(dim=-1).mean().item() == pytest.approx(length, rel=0.01)
    assert model.embed.weight.norm(dim=-1).mean().item() == pytest.approx(length, rel=0.05)
    apart = torch.randn(999, model.config.d).mul(model.config.d**-0.25)  # of that length, too
    assert model.logits(apart).std().item() == pytest.approx(1, rel=0.1)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "use train, eval or probe"),
        (["tarin"], "no command 'tarin': use train, eval or probe"),
        (["train", "--folder", "F", "--task", "graph-test"], "no task 'graph-test'"),
        (["train", "--folder", "F", "--from-nothing", "--lora"], "pass one of them"),
        (["train", "--folder", "F", "--lora"], "beside a model's weights: pass --model"),
        (["train", "--folder", "F", "--dtype", "bfloat16"], "in float32: leave --dtype out"),
        (["train", "--folder", "F", "--c", "0"], "--c must be at least 1"),
        (["train", "--folder", "F", "--method", "coconuts"], "invalid choice"),
        (["train", "--folder", "F", "--data", str(GRAPH / "test.jsonl")], "train on graph-train"),
        (["eval"], "required: --trained"),
        (["eval", "--trained", "no.safetensors"], "no file no.safetensors"),
        (["eval", "--trained", "tiny"], "tiny is a folder: give a file"),
        (["eval", "--trained", "tiny/softcot.safetensors"], "softcot.safetensors was not made by"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tiny", "tiny", ignore=lambda *_: ["base", "assistant", "graph"])
    try:
        code = main(*arguments)
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and said in lines[0], lines


def test_a_model_without_weights_is_trained_from_nothing_only(tmp_path, problems_file, capsys):
    assert trains(tmp_path / "a", data=problems_file) == 2
    assert "has no *.safetensors weights" in capsys.readouterr().err


def test_problems_without_steps_are_refused(tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    rows = [{"question": "1+1?", "answer": 2, "steps": ["2."]}, {"question": "2?", "answer": 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert trains(tmp_path / "a", "--from-nothing", data=path) == 2
    assert "1 of 2 problems" in capsys.readouterr().err


def test_files_of_another_model_or_without_thoughts_are_refused(tmp_path, problems_file, capsys):
    pause = "--from-nothing", "--method", "pause"
    assert trains(tmp_path / "a", *pause, data=problems_file, epochs=1) == 0
    path = tmp_path / "a" / "coconut.safetensors"
    capsys.readouterr()
    assert main("probe", "--trained", path) == 2
    assert "is of pause with 2 thoughts" in capsys.readouterr().err
    assert main("eval", "--trained", path, "--model", ROOT / "tiny" / "assistant") == 2
    assert "pass --model tiny/graph (width 64)" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, path)
    for other, said in ((path, "was not made by"), (tmp_path / "a/state.safetensors", "is not of")):
        assert main("eval", "--trained", other) == 2
        assert said in capsys.readouterr().err


def test_a_folder_with_another_training_is_refused(tmp_path, problems_file, capsys):
    assert trains(tmp_path / "a", "--from-nothing", data=problems_file, epochs=1) == 0
    assert trains(tmp_path / "a", "--from-nothing", "--c", 2, data=problems_file, epochs=1) == 2
    assert "c is 1 there and 2 here" in capsys.readouterr().err


def test_without_the_problems_the_script_that_makes_them_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    assert main("train", "--from-nothing", "--folder", tmp_path / "a") == 2
    assert "train.jsonl is missing; make it with `python tiny/graph.py`" in capsys.readouterr().err
