"""lab/softcot_cli.py and lab/softcot_variants.py: evaluation, one question, mistakes."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from conftest import ROOT
from softcot_pair import PROBLEMS, data, evaluates, lengthen, loaded, main, pair, trains

import softcot
from baselines import lora, prompts
from lab import fast, flags, soft_thoughts, softcot_variants, tasks, trained
from lab.softcot_cli import command_line
from lab.softcot_variants import Answering, Variant, voted
from model import UserError
from softcot import Settings, Training

__all__ = ["data", "loaded", "pair"]  # fixtures
DATA = tasks.TASKS["data"]
pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small are slower on two


@pytest.fixture
def projection(pair, data, tmp_path):
    folders = pair()
    assert trains(folders, data, tmp_path / "run", epochs=1) == 0
    return folders, str(tmp_path / "run" / "projection.safetensors")


# ------------------------------------------------------------------------------------ evaluation


def test_code_is_not_run_without_leave(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "One?", "tests": "assert one() == 1"}) + "\n")
    arguments = ["eval", "--model", "no such model", "--data", str(data)]
    assert main(arguments) == 2
    assert "permit it with --run-generated-code" in capsys.readouterr().err
    assert main([*arguments, "--run-generated-code"]) == 2
    assert "unknown model no such model" in capsys.readouterr().err


def records(path):
    return {
        (r["problem"], r["method"], r["sample"]): {k: v for k, v in r.items() if k != "seconds"}
        for r in map(json.loads, Path(path).read_text().splitlines())
    }


def test_every_method_with_votes_and_seeds_goes_on_where_it_was_cut(
    projection, data, tmp_path, capsys
):
    folders, file = projection
    adapter, unk = tmp_path / "lora", tmp_path / "unk"
    out, table = tmp_path / "out.jsonl", tmp_path / "table.json"
    assert trains(folders, data, adapter, method="lora") == 0
    assert trains(folders, data, unk, "--thoughts", "3", method="cot-unk") == 0
    arguments = ["--projection", file, "--lora", str(adapter)]
    arguments += ["--prompt", str(unk / "prompt.safetensors"), "--num-samples", "3"]
    arguments += [
        "--seeds",
        "2",
        "--temperature",
        "1.5",
        "--output",
        str(out),
        "--json",
        str(table),
    ]
    capsys.readouterr()
    assert evaluates(folders, data, *arguments) == 0
    assert "mean ± standard deviation" in capsys.readouterr().out
    methods = ["zero-shot-cot", "cot-unk", "assist-cot", "softcot", "lora"]
    result = json.loads(table.read_text())
    assert [row["method"] for row in result["methods"]] == methods == list(result["seeds"])
    assert all(len(row["accuracies"]) == 2 for row in result["seeds"].values())
    whole = records(out)
    assert len(whole) == 3 * 5 * 2
    assert all(len(r["answers"]) == len(r["texts"]) == 3 for r in whole.values())
    assert "Hint: " in whole["data-00000", "assist-cot", 0]["prompt"]
    assert "<2 soft thoughts>" in whole["data-00000", "softcot", 1]["prompt"]
    numbers = {method: r["settings"].get("thoughts") for (_, method, _), r in whole.items()}
    assert numbers == dict.fromkeys(methods) | {"cot-unk": 3, "assist-cot": 2, "softcot": 2}
    assert whole["data-00000", "softcot", 0]["texts"] != whole["data-00000", "softcot", 1]["texts"]
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:13]) + "\n" + lines[13][:50])
    assert evaluates(folders, data, *arguments, "--batch-size", "2") == 2
    assert "batch_size is 16 there and 2 here" in capsys.readouterr().err
    assert evaluates(folders, data, *arguments) == 0
    assert records(out) == whole
    capsys.readouterr()
    assert evaluates(folders, data, *arguments, "--thoughts", "1") == 2
    assert "thoughts is 3 there and 1 here" in capsys.readouterr().err


def test_several_numbers_of_thoughts_and_several_assistants_are_a_row_each(
    projection, data, tmp_path, capsys
):
    folders, file = projection
    table = tmp_path / "table.json"

    def rows(folders, *more):
        assert evaluates(folders, data, "--json", str(table), *more) == 0
        return [row["method"] for row in json.loads(table.read_text())["methods"]]

    capsys.readouterr()
    numbers = rows(
        folders, "--projection", file, "--methods", "zero-shot-cot,softcot", "--thoughts", "0,1,4"
    )
    assert numbers == ["zero-shot-cot", "softcot 0", "softcot 1", "softcot 4"]
    assert "softcot 4: trained with 2 thoughts, answers with 4" in capsys.readouterr().err
    files = f"{file},{Path(file).parent / 'last.safetensors'}"
    twice = [folders[0], f"{folders[1]},{folders[1]}"]
    both = rows(twice, "--projection", files, "--methods", "softcot")
    assert both == ["softcot #1", "softcot #2"]


def test_a_record_holds_all_draws_and_does_not_depend_on_its_neighbours(loaded):
    model, tokenizer, *assistant = loaded()
    torch.manual_seed(1)
    variant = Variant("softcot", 2, dict(torch.nn.Linear(32, 32).named_parameters()), assistant)
    s = Settings(num_samples=2, temperature=1.0, max_new_tokens=6)
    about = (softcot, lora, prompts, model, tokenizer, tasks.TASKS["tiny"], s, 0, 5)
    problems = [tasks.Problem(q, q, a, "number") for q, a, _ in PROBLEMS]
    jobs = [(p, sample) for p in problems for sample in range(2)]

    def texts(jobs):
        found = Answering(*about).by(variant)(jobs)
        return {(p.id, sample): r["texts"] for p, sample, r in found}

    many = texts(jobs)
    assert len(many) == 16 and len({str(t) for t in many.values()}) > 8
    for job in jobs[::5]:
        assert texts([job]) == {(job[0].id, job[1]): many[job[0].id, job[1]]}


def test_the_majority_of_equal_answers_wins():
    problem = tasks.Problem("x", "q", "7", "number")

    def vote(answers):
        """Which of these texts, each an answer, is the record's; `nothing` is none."""
        texts = ["nothing" if a is None else f"{i}: The answer is {a}." for i, a in answers]
        draw = {"prompt": "", "answer_tokens": 1, "not_finite": 0}
        draws = [{"text": text} | draw for text in texts]
        record = voted(draws, problem, 0)
        assert record["answers"] == [a for _, a in answers] and record["texts"] == texts
        return texts.index(record["answer_text"])

    assert vote(list(enumerate([None, "7", "8", "8.0", "1"]))) == 2
    assert vote(list(enumerate(["5", "7"]))) == 0
    assert vote(list(enumerate([None, None]))) == 0
    assert vote(list(enumerate([None, "3"]))) == 1


def test_without_arguments_it_answers_one_problem_twice(projection, monkeypatch, capsys):
    folders, file = projection
    monkeypatch.setattr(softcot_variants, "BUNDLED", Path("/nowhere/softcot.safetensors"))
    assert main([]) == 2
    error = capsys.readouterr().err
    needs = "softcot needs a projection, --projection FILE: make one with `python softcot.py train"
    assert needs in error and error.count("\n") == 1
    monkeypatch.setattr(softcot_variants, "BUNDLED", Path(file))
    monkeypatch.setattr(softcot_variants, "TINY", folders[0])
    monkeypatch.setattr(softcot_variants, "TINY_ASSISTANT", folders[1])
    assert main(["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^without +with 2 soft thoughts$", printed, re.MULTILINE)
    assert f"the right answer is {tasks.load('tiny', limit=1)[0].answer}" in printed
    thought = r"^ +\d  norm +\d+\.\d\d  (?:'.*' [+-]0\.\d\d *){3}$"
    assert len(re.findall(thought, printed, re.MULTILINE)) == 2


def test_the_bundled_models_are_known_by_any_path(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = ["--model", "tiny/base", "--assistant", "tiny/../tiny/assistant"]
    assert main([*names, "--device", "cpu", "--max-new-tokens", "5"]) == 0
    assert "with 16 soft thoughts" in capsys.readouterr().out
    assert main(["--model", "tiny/ways", "--device", "cpu"]) == 2
    assert "the bundled projection is for the bundled models" in capsys.readouterr().err


def test_what_is_measured_of_soft_thoughts(loaded):
    """Two embeddings, one of them twice as long, and one turned round."""
    model, tokenizer, _, _ = loaded()
    E = model.embed.weight
    found = soft_thoughts.measured(model, torch.stack([2 * E[40], E[41], -E[41]]))
    mean = E.norm(dim=1).mean()
    norms = [(times * E[i].norm() / mean).item() for times, i in ((2, 40), (1, 41), (1, 41))]
    assert found["norms"] == pytest.approx(norms, abs=0.005)
    cosine = torch.dot(E[40], E[41]) / E[40].norm() / E[41].norm()
    assert found["cosines"][:2] == [[], [pytest.approx(cosine.item(), abs=0.005)]]
    assert found["cosines"][2] == [pytest.approx(-cosine.item(), abs=0.005), -1.0]
    assert [near[0] for near in found["nearest"][:2]] == [[40, 1.0], [41, 1.0]]
    assert [len(near) for near in found["nearest"]] == [3] * 3
    with torch.no_grad():
        E[7] = 0  # of a token that nothing was trained on
    assert 7 not in dict(soft_thoughts.measured(model, E[40:41] + 0.1)["nearest"][0])
    name = lambda token: tokenizer.decode([token])
    line, *_ = soft_thoughts.lines(found, name)
    assert line.startswith(f"  1  norm {norms[0]:7.2f}  {name(40)!r} +1.00  ")


def test_a_training_is_written_as_a_page(pair, data, tmp_path, capsys):
    folders, page = pair(), tmp_path / "page.html"
    page.write_text("mine")
    more = {"method": "cot-unk", "epochs": 1}
    assert trains(folders, data, tmp_path / "run", "--html", str(page), **more) == 2
    assert "is a file of something else" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    page.unlink()
    assert trains(folders, data, tmp_path / "run", "--html", str(page), **more) == 0
    text = page.read_text(encoding="utf-8")
    assert "Loss, held-out with dots" in text and "Held-out accuracy" in text


def test_a_trace_holds_what_stood_in_the_placeholders_places(projection, data, tmp_path, capsys):
    folders, file = projection
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    methods = ["--methods", "zero-shot-cot,cot-unk,softcot", "--projection", file]
    assert evaluates(folders, data, *methods, "--trace") == 2
    assert "--trace goes with --output or --html" in capsys.readouterr().err
    more = ["--output", str(out), "--html", str(page)]
    assert evaluates(folders, data, *methods, *more, "--trace") == 0
    whole = records(out)
    model, _ = fast.load(folders[0], "cpu", "float32")
    assistant = fast.load(folders[1], "cpu", "float32")
    projected = load_file(file)
    for (_, method, _), record in whole.items():
        assert ("soft_thoughts" in record) == (method == "softcot")
        if method == "softcot":
            text = tasks.prompt(tasks.Problem("", record["question"], "", "number"), DATA)
            T = softcot.think_one(*assistant, projected, text, 2)
            assert record["soft_thoughts"] == soft_thoughts.measured(model, T)
    capsys.readouterr()
    assert evaluates(folders, data, *methods, "--output", str(out)) == 2
    assert "trace is True there" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8").count("Cosines between thoughts") >= 4


@pytest.mark.parametrize("command, settings", [("train", Training), ("eval", Settings)])
def test_every_setting_is_a_flag_with_its_comment_as_help(command, settings):
    parser = command_line(command, softcot)
    for name, comment in flags.comments(settings).items():
        flag = parser._option_string_actions["--" + name.replace("_", "-")]
        assert comment and (flag.help.startswith(comment) or name == "thoughts")


# -------------------------------------------------------------------------------------- mistakes


def said(arguments, capsys):
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    bar = r"^.*it/s.*\r?\n"
    error = re.sub(bar, "", capsys.readouterr().err, flags=re.MULTILINE)
    assert code == 2 and error.count("\n") == 1 and error.startswith("softcot.py: "), error
    return error


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["train"], "the following arguments are required: --folder"),
        (["train", "--folder", "F", "--lr", "0"], "--lr must be above 0, not 0.0"),
        (["train", "--folder", "F", "--thoughts", "0"], "--thoughts must be at least 1, not 0"),
        (["train", "--folder", "F", "--dropout", "1"], "--dropout must be at least 0 and below 1"),
        (["train", "--folder", "F", "--method", "coconut"], "invalid choice: 'coconut'"),
        (["train", "--folder", "F", "--save-every", "0"], "--save-every must be at least 1"),
        (["train", "--folder", "/proc/nowhere/x"], "cannot use the folder /proc/nowhere/x"),
        (
            ["train", "--folder", "F", "--thoughts", "600"],
            "0 of 8 problems fit the context windows with 600 thoughts",
        ),
        (["train", "--folder", "F", "--limit", "3"], "--dev holds out 200"),
        (
            ["eval", "--methods", "softcot,coconut"],
            "--methods: no method 'coconut'; there are zero-shot-cot",
        ),
        (["eval", "--methods", "softcot"], "softcot needs a projection, --projection FILE"),
        (["eval", "--methods", "lora"], "--methods lora needs --lora FOLDER"),
        (
            ["eval", "--methods", "lora", "--lora", "/nowhere"],
            "no file /nowhere/adapter_model.safetensors",
        ),
        (["eval", "--methods", "softcot", "--projection", "/nowhere/x"], "no file /nowhere/x"),
        (
            ["eval", "--methods", "softcot", "--projection", "DATA"],
            "is no safetensors file, or damaged",
        ),
        (["eval", "--thoughts", "1,x"], "--thoughts takes numbers from 0 on"),
        (
            ["eval", "--methods", "cot-unk", "--thoughts", "500"],
            "the context window 512 (of the question",
        ),
        (["eval", "--num-samples", "3", "--temperature", "0"], "greedy answers are the same"),
        (["eval", "--seeds", "3"], "greedy answers are the same"),
        (["eval", "--temperature", "-1"], "--temperature must be above 0"),
        (["eval", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--question", " "], "the question is empty"),
        (
            ["--question", "Why?"],
            "the bundled projection is for the bundled models: pass --projection FILE",
        ),
        (["--thoughts", "4"], "unrecognized arguments: --thoughts 4"),
        (
            ["train", "--folder", "F", "--num-samples", "3"],
            "unrecognized arguments: --num-samples 3",
        ),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, expected, pair, data, tmp_path, capsys):
    folders = pair()
    arguments = [{"F": str(tmp_path / "F"), "DATA": data}.get(x, x) for x in arguments]
    arguments += ["--model", folders[0], "--assistant", folders[1], "--device", "cpu"]
    if arguments[0] in ("train", "eval"):
        arguments += ["--data", data]
    assert expected in said(arguments, capsys)


@pytest.mark.parametrize(
    "task, right",
    [("strategyqa", "strategyqa-softcot-train"), ("aqua-dev", "aqua-train")],
)
def test_training_on_a_test_is_refused(task, right, tmp_path, capsys):
    error = said(["train", "--folder", str(tmp_path / "F"), "--task", task], capsys)
    assert error == f"softcot.py: {task} is a test, which `eval` scores: train on {right}\n"
    assert not (tmp_path / "F").exists()


def test_training_needs_worked_steps(pair, tmp_path, capsys):
    data = tmp_path / "bare.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2"}\n')
    error = said(["train", "--folder", str(tmp_path / "F"), "--data", str(data)], capsys)
    assert "have no worked steps to learn from (data-00000 is the first)" in error


def test_a_projection_of_other_models_widths_or_methods_is_refused(
    projection, folder_of, data, tmp_path, capsys
):
    folders, file = projection
    other = str(lengthen(folder_of("mistral", name="other")))

    def refused(model, assistant, *more):
        models = ["--model", model, "--assistant", assistant]
        return said(["eval", *models, "--data", data, "--device", "cpu", *more], capsys)

    llm, assistant = folders
    softcot_of = ("--methods", "softcot", "--projection")
    made_for = f"was made for {assistant} (width 32) and {llm} (width 32)"
    found = refused(other, assistant, *softcot_of, file)
    assert f"{made_for}, not for {assistant} (width 32) and {other} (width 32)" in found
    assert f"not for {other} (width 32) and {llm}" in refused(llm, other, *softcot_of, file)
    assert trains(folders, data, tmp_path / "unk", method="cot-unk", epochs=1) == 0
    prompt = str(tmp_path / "unk" / "prompt.safetensors")
    found = refused(llm, assistant, *softcot_of, prompt)
    assert "does not hold what `train --method softcot` makes" in found
    more = refused(llm, assistant, "--methods", "cot-unk", "--prompt", prompt, "--thoughts", "3")
    assert "was trained with 2: lower it" in more
    # The same weights in another dtype, from another folder, are the same models.
    moved = folder_of("qwen3", name="moved")
    for name in ("config.json", "tokenizer_config.json"):
        (moved / name).write_text((Path(llm) / name).read_text())
    assert evaluates([str(moved), assistant], data, *softcot_of, file, "--dtype", "bfloat16") == 0


def test_only_files_that_are_for_use_are_used(projection, folder_of, data, tmp_path, capsys):
    folders, file = projection
    state, adapter = str(Path(file).parent / "state.safetensors"), tmp_path / "lora"
    start = ["--model", folders[0], "--assistant", folders[1], "--data", data]
    error = said(["eval", *start, "--methods", "softcot", "--projection", state], capsys)
    assert "does not hold what `train --method softcot` makes" in error
    assert trains(folders, data, adapter, method="lora", epochs=1) == 0
    # A file is that file, not another one of its folder.
    model, _ = fast.load(folders[0], "cpu", "float32")
    here = trained.identity(softcot.PROMPT_VERSION, folders[0], model)
    for path, name in (
        (adapter, "adapter_model.safetensors"),
        (adapter / "last.safetensors", "last.safetensors"),
    ):
        tensors, scale, digest = trained.read_adapter(path, model, here, lora.start)
        assert digest == trained.digest(adapter / name) and scale == 16
        assert all(torch.equal(tensors[k], x) for k, x in load_file(adapter / name).items())
    # Other weights of the same shapes.
    llm = folder_of("qwen3", name="copied")
    tensors = {k: x + 0.01 for k, x in load_file(llm / "model.safetensors").items()}
    save_file(tensors, llm / "model.safetensors", {"format": "pt"})
    arguments = ["--model", str(llm), "--data", data, "--methods", "lora", "--lora", str(adapter)]
    assert "adapter_model.safetensors was made for " in said(["eval", *arguments], capsys)


def test_an_overlong_question_is_named_before_anything_is_answered(projection, tmp_path, capsys):
    folders, file = projection
    long = tmp_path / "long.jsonl"
    rows = [{"question": "1+1?", "answer": "2"}]
    rows += [{"question": "count " + "x" * 600, "answer": "600"}]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", folders[0], "--assistant", folders[1], "--data", str(long)]
    arguments += ["--methods", "softcot", "--projection", file]
    error = said(["eval", *arguments, "--device", "cpu", "--dtype", "float32"], capsys)
    assert "of the question 'count xxx" in error and "the context window 512" in error
    assert error.endswith(": shorten it, or lower --thoughts\n")


def test_a_projection_of_another_prompt_version_is_used_with_a_warning(
    projection, data, monkeypatch, capsys
):
    folders, file = projection
    monkeypatch.setattr(softcot, "PROMPT_VERSION", 2)
    assert evaluates(folders, data, "--projection", file, "--methods", "softcot") == 0
    warning = "was trained with prompt version 1, this is 2: expect worse answers"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, used",
    [("gsm8k", "gsm8k-train"), ("tiny", "tiny-train")] + [("strategyqa-softcot-train",) * 2],
)
def test_training_on_a_task_uses_its_training_set(asked, used, monkeypatch, capsys):
    def load(name, data, limit):
        raise UserError(f"loading {name}.")

    monkeypatch.setattr(tasks, "load", load)
    assert f"loading {used}." in said(["train", "--task", asked, "--folder", "/nowhere"], capsys)
