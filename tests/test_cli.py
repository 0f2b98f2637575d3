"""The command lines of soft_thinking.py and soft_reasoning.py: flags, views, mistakes, resuming."""

import argparse
import io
import json
import signal
import subprocess
import sys
import time
import typing
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import soft_reasoning
import soft_thinking
from baselines import sampling
from lab import cli, flags, show, tasks
from model import Tokenizer, load


def think(arguments):
    """python soft_thinking.py, in this process."""
    settings = soft_thinking.Settings
    return cli.command(
        arguments, soft_thinking.__doc__, settings, soft_thinking.think, show.Thought
    )


def reason(arguments):
    """python soft_reasoning.py, in this process."""
    settings = sampling.Settings
    return cli.command(arguments, soft_reasoning.__doc__, settings, sampling.reason, show.Search)


def outcome(record):
    return {k: v for k, v in record.items() if k != "seconds"}


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def long_context(folder, positions=1024):
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------------------------- flags

SETTINGS = [soft_thinking.Settings, soft_reasoning.Settings, sampling.Settings]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_has_a_comment_of_its_own_which_is_its_help(settings):
    said = {}
    for base in reversed(settings.__mro__[:-1]):
        said |= flags.comments(base)
    names = [field.name for field in fields(settings)]
    assert set(said) == set(names)
    parser = flags.new_parser("x.py", "")
    flags.add_settings(parser, settings)
    helps = {action.dest: action.help for action in parser._actions if action.dest != "help"}
    assert list(helps) == names
    for field in fields(settings):
        assert len(said[field.name].split()) > 1 and "#" not in said[field.name], field.name
        text = helps[field.name].replace("%%", "%")
        assert text.startswith(said[field.name])
        assert field.default is None or text.endswith(f" (default: {field.default})")


def test_a_comment_of_several_lines_is_read_whole_and_belongs_to_one_field():
    assert flags.comments(soft_reasoning.Settings)["k"] == "k: points evaluated in each round"
    said = flags.comments(sampling.Settings)
    assert said["method"].startswith("soft: the paper; greedy; sc: self-consistency; ")
    assert said["method"].endswith("most probable first tokens; rap: a tree search over steps")
    assert said["num_samples"] == "answers that sc, fire and cot-decoding vote over"


@pytest.mark.parametrize(
    "main, settings", [(think, soft_thinking.Settings), (reason, sampling.Settings)]
)
def test_a_flag_is_of_its_fields_type_and_takes_its_choices(main, settings, capsys):
    """What is on the command line reaches the field, and nothing else changes."""
    parser = flags.new_parser("x.py", "")
    flags.add_settings(parser, settings)
    types, default = typing.get_type_hints(settings), settings()
    assert flags.settings_of(parser.parse_args([]), settings) == default
    for field in fields(settings):
        flag, hint = "--" + field.name.replace("_", "-"), types[field.name]
        kinds = [t for t in typing.get_args(hint) if t is not type(None)] or [hint]
        choices = [
            c for kind in [hint, *kinds] for c in typing.get_args(kind) if isinstance(c, str)
        ]
        if choices:
            for choice in choices:
                args = parser.parse_args([flag, choice])
                assert getattr(flags.settings_of(args, settings), field.name) == choice
            with pytest.raises(SystemExit):
                parser.parse_args([flag, "nonsense"])
            capsys.readouterr()
        elif bool in kinds:
            off = "--no-" + field.name.replace("_", "-")
            assert (
                getattr(flags.settings_of(parser.parse_args([flag]), settings), field.name) is True
            )
            assert (
                getattr(flags.settings_of(parser.parse_args([off]), settings), field.name) is False
            )
        else:
            value = kinds[0](1)
            got = getattr(
                flags.settings_of(parser.parse_args([flag, str(value)]), settings), field.name
            )
            assert got == value and type(got) is kinds[0]


@pytest.mark.parametrize(
    "main, settings", [(think, soft_thinking.Settings), (reason, sampling.Settings)]
)
def test_help_names_every_flag_its_comment_and_its_default(main, settings, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in fields(settings):
        assert f"--{field.name.replace('_', '-')} " in text
        assert field.default is None or f"(default: {field.default})" in text
    own = {"num-samples", "trace", "seeds", "analyse", "shots", "completion"}  # of one program
    names = flags.FLAGS.keys() - own
    assert all(f"--{name} " in text for name in names)


@pytest.mark.parametrize("program", ["soft_thinking.py", "soft_reasoning.py"])
def test_the_programs_say_what_they_take(program):
    command = [sys.executable, program, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: {program}")
    for settings in (soft_thinking if "thinking" in program else sampling).Settings.__mro__[:-1]:
        for field in fields(settings):
            assert f"--{field.name.replace('_', '-')}" in done.stdout


# -------------------------------------------------------------------------------- soft_thinking.py


def test_one_question_prints_the_thought_the_answer_and_a_summary(folder_of, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder_of("qwen3")), "--question", "Why?", "--max-new-tokens", "9"]
    arguments += ["--device", "cpu", "--output", str(out), "--trace", "--temperature", "2"]
    assert think(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("<think>\n") and "\033[" not in printed
    assert " tokens/s, peak memory " in printed
    (record,) = records_of(out)
    names = "question prompt method settings seed sample thought_ids thought_text answer_ids "
    names += "answer_text stopped_by finish_reason thought_tokens answer_tokens seconds steps"
    assert set(record) == set(names.split())
    assert len(record["steps"]) == record["thought_tokens"]
    assert record["settings"]["temperature"] == 2.0
    for step in record["steps"]:
        assert sum(step["probs"]) == pytest.approx(1, abs=1e-5)
        assert len(step["ids"]) == len(step["probs"]) <= 10


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_the_view_shows_what_is_fed_and_colours_a_terminal_only(no_color, folder_of, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", Terminal())
    view = show.Thought(Tokenizer(folder_of("qwen2")), soft_thinking.Settings())
    a, b = 65, 66  # single bytes; which letters they are does not matter

    def step(token, phase, ids, ct):
        view(
            torch.tensor(token),
            torch.tensor(phase),
            torch.tensor(0.5),
            *map(torch.tensor, (ids, ct)),
        )

    step(a, 0, [a, b, 67], [0.6, 0.35, 0.05])
    step(a, 0, [a, b], [1.0, 0.0])
    step(b, 3, [b], [1.0])
    text = sys.stdout.getvalue()
    letter = view.tokenizer.decode([a]), view.tokenizer.decode([b])
    assert f"[{letter[1]!r} 0.35]" in text and text.count("[") - text.count("\033[") == 1
    assert ("\033[" in text) == (no_color == "")


@pytest.mark.parametrize("phase, method", [(1, "soft"), (2, "soft"), (3, "soft"), (0, "cot")])
def test_the_view_shows_no_alternatives_where_a_token_is_fed(phase, method, folder_of, capsys):
    """The model's own end, Cold Stop's marker, the answer, and the discrete baselines."""
    view = show.Thought(Tokenizer(folder_of("qwen2")), soft_thinking.Settings(method=method))
    ids, ct = torch.tensor([65, 66]), torch.tensor([0.6, 0.4])
    view(torch.tensor(65), torch.tensor(phase), torch.tensor(0.5), ids, ct)
    assert "[" not in capsys.readouterr().out


def test_started_again_it_goes_on_and_other_settings_are_refused(folder_of, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder_of("qwen3")), "--question", "Why?", "--max-new-tokens", "9"]
    arguments += ["--device", "cpu", "--output", str(out), "--method", "cot"]
    assert think([*arguments, "--num-samples", "4"]) == 0
    whole = {record["sample"]: outcome(record) for record in records_of(out)}
    lines = out.read_text().splitlines()
    out.write_text(lines[0] + "\n" + lines[1][:40])  # what a kill leaves
    assert think([*arguments, "--num-samples", "4"]) == 0
    assert {record["sample"]: outcome(record) for record in records_of(out)} == whole
    capsys.readouterr()
    assert think([*arguments, "--seed", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--question", ""], "the question is empty"),
        (["--question", "\udcff"], "not valid UTF-8"),
        (
            ["--question", "x", "--gumbel-temperature", "inf"],
            "--gumbel-temperature must be above 0, not inf",
        ),
        (["--question", "x", "--model", "a\nb"], "unknown model a b"),
        (["--model", "no such model"], "unknown model no such model"),
        (["--question", "x", "--top-p", "0"], "--top-p must be above 0 and at most 1, not 0.0"),
        (["--question", "x", "--temperature", "-1"], "--temperature must be above 0, not -1.0"),
        (
            ["--question", "x", "--answer-min-p", "7"],
            "--answer-min-p must be between 0 and 1, not 7.0",
        ),
        (["--question", "x", "--max-topk", "0"], "--max-topk must be at least 1, not 0"),
        (["--question", "x", "--num-samples", "0"], "--num-samples must be at least 1, not 0"),
        (["--question", "x", "--seed", "-3"], "--seed must be at least 0, not -3"),
        (["--question", "x", "--method", "hard"], "argument --method: invalid choice: 'hard'"),
        (
            ["--question", "x", "--noise", "gumbel", "--method", "cot"],
            "needs method soft, not cot",
        ),
        (["--question", "x" * 99], "tokens, the context window 64"),
        (
            ["--question", "x", "--output", "/nowhere/x.jsonl"],
            "cannot write /nowhere/x.jsonl: make its folder first",
        ),
        (["--question", "x", "--limit", "3"], "--limit goes with --task or --data"),
        (["--question", "x", "--task", "tiny"], "--question asks one question"),
        (["--task", "gsm9k"], "no task 'gsm9k' (did you mean gsm8k"),
        (
            ["--task", "tiny", "--methods", "soft,hard"],
            "--methods: no method 'hard'; there are soft, cot, greedy",
        ),
        (["--data", "/nowhere/x.jsonl"], "cannot read /nowhere/x.jsonl"),
    ],
)
def test_mistakes_of_soft_thinking_are_one_line_and_exit_code_2(arguments, said, folder_of, capsys):
    try:
        code = think(["--model", str(folder_of("qwen3")), "--device", "cpu", *arguments])
    except SystemExit as exit:
        code = exit.code
    out, error = capsys.readouterr()
    assert out == "" and code == 2 and error.count("\n") == 1 and said in error
    assert error.startswith("soft_thinking.py: ")


TESTED = {"question": "One?", "tests": "assert one() == 1"}


@pytest.mark.parametrize("main", [think, reason])
def test_code_is_not_run_without_leave_and_the_model_is_not_loaded(main, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(TESTED) + "\n")
    arguments = ["--model", "no such model", "--device", "cpu", "--data", str(data)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "permit it with --run-generated-code" in error and error.count("\n") == 1
    assert main([*arguments, "--run-generated-code"]) == 2
    assert "unknown model no such model" in capsys.readouterr().err


def test_code_is_scored_where_it_may_be_run(folder_of, capsys, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps(TESTED) + "\n")
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--device", "cpu"]
    arguments += ["--data", str(data), "--method", "greedy", "--max-new-tokens", "7"]
    assert think([*arguments, "--output", str(out), "--run-generated-code"]) == 0
    assert "programs by running the tests" in capsys.readouterr().out
    (record,) = records_of(out)
    assert record["correct"] is False and "assert one() == 1" in record["gold"]


def test_control_c_ends_within_a_second_and_keeps_what_was_finished(folder_of, tmp_path):
    folder, out = long_context(folder_of("qwen3"), 100000), tmp_path / "out.jsonl"
    command = [sys.executable, "soft_thinking.py", "--model", str(folder), "--question", "x"]
    command += ["--num-samples", "99", "--batch-size", "1", "--max-new-tokens", "300"]
    command += ["--device", "cpu", "--output", str(out), "--method", "cot", "--temperature", "3"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    while not out.exists() or not out.read_text().count("\n"):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    start = time.time()
    process.wait()
    assert time.time() - start < 1 and process.returncode == 130
    assert "Traceback" not in process.stderr.read()
    text = out.read_text()
    assert text.endswith("\n")
    assert all("thought_ids" in json.loads(line) for line in text.splitlines())


def test_problems_are_scored_by_several_methods_and_a_run_goes_on(folder_of, capsys, tmp_path):
    """Noise is of method soft alone, and stops no other method."""
    data, out, table = (tmp_path / name for name in ("data.jsonl", "out.jsonl", "table.json"))
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--device", "cpu"]
    arguments += ["--data", str(data), "--methods", "soft,cot", "--num-samples", "2"]
    arguments += ["--max-new-tokens", "7", "--noise", "gumbel", "--output", str(out)]
    assert think([*arguments, "--json", str(table)]) == 0
    printed = capsys.readouterr().out
    assert "data: 3 problems, 2 sample(s) each" in printed and "\ncot " in printed
    assert [row["method"] for row in json.loads(table.read_text())["methods"]] == ["soft", "cot"]
    whole = {(r["problem"], r["method"], r["sample"]): outcome(r) for r in records_of(out)}
    assert len(whole) == 12
    assert {r["settings"]["noise"] for r in whole.values() if r["method"] == "cot"} == {None}
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:30])
    assert think(arguments) == 0
    again = {(r["problem"], r["method"], r["sample"]): outcome(r) for r in records_of(out)}
    assert again == whole
    assert think([*arguments, "--top-k", "5"]) == 2


def test_a_deterministic_method_is_decoded_once(folder_of, capsys, tmp_path):
    data, out, table = (tmp_path / name for name in ("data.jsonl", "out.jsonl", "table.json"))
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--device", "cpu"]
    arguments += ["--data", str(data), "--methods", "greedy,cot", "--max-new-tokens", "5"]
    arguments += ["--output", str(out), "--json", str(table), "--num-samples", "3"]
    assert think(arguments) == 0
    found = [(r["problem"][-1], r["method"], r["sample"]) for r in records_of(out)]
    expected = [(str(i), "cot", k) for i in range(2) for k in range(3)]
    assert sorted(found) == sorted([*expected, ("0", "greedy", 0), ("1", "greedy", 0)])
    assert [row["samples"] for row in json.loads(table.read_text())["methods"]] == [1, 3]
    printed = capsys.readouterr()
    assert "greedy is deterministic: one sample of each question\n" in printed.err
    assert "cot is" not in printed.err
    # A file of a version that repeated it: the repetitions stay there and are not counted.
    (greedy, *_) = [record for record in records_of(out) if record["method"] == "greedy"]
    with open(out, "a") as file:
        file.write(json.dumps(greedy | {"sample": 1}) + "\n")
    before = out.read_text()
    assert think(arguments) == 0 and out.read_text() == before
    assert [row["samples"] for row in json.loads(table.read_text())["methods"]] == [1, 3]


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"method": "greedy"}, 1),
        ({"method": "cot"}, 7),
        ({"method": "cot", "top_k": 1}, 1),  # and of the answer, by default
        ({"method": "cot", "top_k": 1, "answer_top_k": 2}, 7),
        ({"method": "cot", "answer_top_k": 1}, 7),
        ({"method": "soft"}, 7),  # its thought is deterministic, its answer is drawn
        ({"method": "soft", "answer_top_k": 1}, 1),
        ({"method": "soft", "answer_top_k": 1, "noise": "gumbel"}, 7),
    ],
)
def test_as_many_samples_as_are_asked_for_where_something_is_drawn(changes, wanted, folder_of):
    # Cold Stop after four steps, for an answer.
    common = {"cold_stop": True, "cold_stop_entropy": 99, "cold_stop_steps": 4}
    s = soft_thinking.Settings(max_new_tokens=20, temperature=2, **common, **changes)
    assert show.Thought.samples(argparse.Namespace(num_samples=7), s) == wanted
    model, tokenizer = load(str(long_context(folder_of("qwen3"))), "cpu", "float32")
    found = soft_thinking.think(model, tokenizer, ["Why?"] * 7, s, samples=list(range(7)))
    different = {(*record["thought_ids"], -1, *record["answer_ids"]) for _, record in found}
    assert (len(different) == 1) == (wanted == 1)


# ------------------------------------------------------------------------------- soft_reasoning.py


def test_a_question_in_the_terminal_and_its_record(folder_of, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--question", "2?"]
    arguments += ["--device", "cpu", "--max-new-tokens", "9", "--rounds", "2", "--dimension", "8"]
    arguments += ["--output", str(out)]
    assert reason(arguments) == 0
    printed = capsys.readouterr().out
    assert "round 0: the verifier says" in printed and "<- best" in printed
    assert "stopped after round" in printed
    (record,) = records_of(out)
    names = "round u reward_verifier reward_coherence reward ei answer text tokens"
    assert set(names.split()) == set(record["points"][0])
    assert len(record["points"][0]["u"]) == 8 and record["settings"]["sigma"] == 1.0
    assert reason(arguments) == 0 and len(out.read_text().splitlines()) == 1
    assert reason([*arguments, "--sigma", "0.5"]) == 2
    assert reason([*arguments[:-2], "--analyse"]) == 0
    printed = capsys.readouterr().out
    assert "layer  perturbed" in printed and "distance to the best point" in printed


@pytest.mark.parametrize("model", [flags.TINY, "tiny/base", "tiny/ways", "golden"])
def test_the_bundled_models_are_asked_as_they_were_trained(model, folder_of, monkeypatch):
    """Others are told in which form to answer."""
    asked = []

    def run(model, tokenizer, questions, **options):
        asked.extend(questions)
        return iter(())

    monkeypatch.chdir(ROOT)
    name = str(long_context(folder_of("qwen3"))) if model == "golden" else model
    arguments = ["--model", name, "--question", "How many?", "--device", "cpu"]
    assert cli.command(arguments, soft_reasoning.__doc__, sampling.Settings, run, show.Search) == 0
    (question,) = asked
    form = tasks.INSTRUCTION["number"] if model == "golden" else ""
    assert question.form == form and question.text == f"How many?\n\n{form}".strip()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--sigma", "0"], "--sigma must be above 0, not 0.0"),
        (["--k", "0"], "--k must be at least 1, not 0"),
        (["--seeds", "0", "--task", "tiny"], "--seeds must be at least 1, not 0"),
        (["--seeds", "2"], "--seeds goes with --task or --data"),
        (["--kappa", "-1"], "--kappa must be above 0, not -1.0"),
        (["--kappa", "inf"], "--kappa must be above 0, not inf"),
        (["--position", "-1"], "--position must be at least 0, not -1"),
        (["--position", "9", "--max-new-tokens", "9"], "--position must be below max-new-tokens"),
        (["--dimension", "33"], "--dimension 33 is larger than the embedding's 32"),
        (["--question", " "], "the question is empty"),
        (["--dimension", "8", "--question", "x" * 200], "the context window 64"),
        (["--acquisition", "magic"], "invalid choice: 'magic'"),
        (["--stop-threshold", "-1"], "--stop-threshold must be at least 0"),
        (["--question", "x", "--json", "t.json"], "--json goes with --task or --data"),
        (["--analyse", "--task", "tiny"], "--analyse studies one question"),
        (["--task", "nothing"], "no task 'nothing'"),
    ],
)
def test_mistakes_of_soft_reasoning_are_one_line_and_exit_code_2(
    arguments, said, folder_of, capsys
):
    question = [] if {"--question", "--task"} & set(arguments) else ["--question", "2?"]
    folder = str(folder_of("qwen3"))
    try:
        code = reason(["--model", folder, "--device", "cpu", *question, *arguments])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error


def test_searches_are_scored_and_compared_at_equal_cost(folder_of, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--device", "cpu"]
    arguments += ["--data", str(data), "--methods", "soft,greedy,sc,cot-decoding,rap"]
    arguments += ["--rap-iterations", "2", "--rap-width", "2", "--k", "2"]
    arguments += ["--max-new-tokens", "5", "--rounds", "1", "--dimension", "8"]
    assert reason([*arguments, "--num-samples", "3"]) == 0
    printed = capsys.readouterr().out
    assert "soft: 0.0% have a right candidate (pass@k)" in printed
    assert "stopped after 1, 2, ... rounds: 100%" in printed
    for method in ("sc", "cot-decoding"):
        for by in ("generations", "tokens"):
            assert f"{method}, on each question no more {by} than soft: " in printed
    assert "rap: 0.0% have a right candidate (pass@k); tokens per question: " in printed
    assert "fire" not in printed and "greedy, on" not in printed


def test_seeds_are_runs_of_their_own_in_one_file(folder_of, capsys, tmp_path):
    data, out, whole = tmp_path / "data.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--device", "cpu"]
    arguments += ["--data", str(data), "--methods", "soft,greedy,sc", "--k", "2", "--rounds", "1"]
    arguments += ["--max-new-tokens", "9", "--dimension", "8", "--num-samples", "2"]
    assert reason([*arguments, "--seed", "3", "--output", str(out)]) == 0
    assert "over the seeds" not in capsys.readouterr().out
    seeds = [*arguments, "--seed", "3", "--seeds", "2"]
    assert reason([*seeds, "--output", str(out), "--json", str(tmp_path / "t.json")]) == 0
    assert "greedy                   0.0% (one seed is all)" in capsys.readouterr().out
    assert reason([*seeds, "--output", str(whole)]) == 0
    assert reason([*arguments, "--seed", "4", "--output", str(tmp_path / "4.jsonl")]) == 0

    def by_key(path):
        names = ("method", "problem", "sample")
        return {tuple(r[name] for name in names): outcome(r) for r in records_of(path)}

    def texts(record):
        return (
            [point["text"] for point in record["points"]] if "points" in record else record["texts"]
        )

    found, four = by_key(out), by_key(tmp_path / "4.jsonl")
    assert found == by_key(whole) and len(found) == len(records_of(out)) == 2 * (2 + 1 + 2)
    problems = {problem for _, problem, _ in found}
    for method, problem in ((m, p) for m in ("soft", "sc") for p in problems):
        third, fourth = (texts(found[method, problem, i]) for i in (0, 1))
        assert fourth == texts(four[method, problem, 0]) != third
    table = json.loads((tmp_path / "t.json").read_text())
    counts = {method: len(row["accuracies"]) for method, row in table["seeds"].items()}
    assert counts == {"soft": 2, "greedy": 1, "sc": 2}


def test_rap_is_compared_only_where_it_is_named(folder_of, capsys, tmp_path):
    out, data = tmp_path / "out.jsonl", tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "2?", "answer": "2"}) + "\n")
    arguments = ["--model", str(long_context(folder_of("qwen3"))), "--device", "cpu"]
    arguments += ["--data", str(data), "--max-new-tokens", "3", "--rounds", "1", "--dimension", "8"]
    assert reason([*arguments, "--num-samples", "2", "--output", str(out)]) == 0
    default = ["soft", "greedy", "sc", "fire", "cot-decoding"]
    assert [record["method"] for record in records_of(out)] == default
    capsys.readouterr()
    with pytest.raises(SystemExit):
        reason(["--help"])
    assert f"(default: {','.join(default)})" in " ".join(capsys.readouterr().out.split())
    assert reason([*arguments, "--method", "rap"]) == 0
    assert "rap" in capsys.readouterr().out
