"""lab/protocols.py: published prompts from files in their form, and what a protocol stands for."""

import argparse
import inspect
import json

import pytest
import torch

import soft_reasoning
import soft_thinking
import softcot
from baselines import coconut, sampling
from lab import cli, protocols, show, tasks
from model import Prompt, Tokenizer, UserError, load

PROMPTS = """\
# Prompts
gsm8k_zero_shot: |-
  Solve it in English.

gsm8k: |-
  Look at the answers so far.

  Question:
  {question}

  Answers so far:

strategyqa_zero_shot: |-
  Say True or False.

strategyqa: |-
  Look at {question} once more:

svamp_zero_shot: |-
  Only half of what is needed.
"""
EXAMPLE = {"Question": "1 + {0}?", "Thought": "Let’s think. It is {1}.", "Answer": "{1}"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Soft Reasoning's two files, made up, where downloads are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "soft-reasoning-reference"
    folder.mkdir()
    (folder / "soft_reasoning_prompts.yaml").write_text(PROMPTS, encoding="utf-8")
    eight = [{key: text.format(n, n + 1) for key, text in EXAMPLE.items()} for n in range(8)]
    yesno = [{"Question": "Is it?", "Thought": "It is not.", "Answer": "False"}]
    (folder / "soft_reasoning_examples.json").write_text(
        json.dumps({"gsm8k": eight, "strategyqa": yesno}), encoding="utf-8"
    )
    protocols.prompts.cache_clear()
    protocols.worked_examples.cache_clear()
    yield
    protocols.prompts.cache_clear()
    protocols.worked_examples.cache_clear()


# What the papers and their code run with, written down from these.
PUBLISHED = [
    (soft_thinking.Settings, "temperature 0.6 top_k 30 top_p 0.95 min_p 0.001 max_topk 10"),
    (soft_thinking.Settings, "cold_stop 1 cold_stop_entropy 0.01 cold_stop_steps 256"),
    (soft_thinking.Settings, "answer_temperature 0.6 answer_top_k 30 answer_top_p 0.95"),
    (soft_thinking.Settings, "answer_min_p 0 gumbel_temperature 0.5 max_new_tokens 32768"),
    (soft_thinking.concept_token, "temperature 0.6 top_k 30 top_p 0.95 min_p 0.001 max_topk 10"),
    (soft_reasoning.Settings, "k 5 rounds 5 dimension 50 sigma 1 stop_threshold 0.01"),
    (sampling.Settings, "first_temperature 30 first_top_k 16 rap_iterations 10 rap_width 4"),
    (sampling.Settings, "rap_depth 5 rap_exploration 1 rap_alpha 0.5 rap_temperature 0.8"),
    (softcot.Training, "thoughts 32 lr 2e-5 warmup 0 epochs 10 batch_size 4 accumulate 1"),
    (softcot.Training, "rank 16 alpha 32 dropout 0.1"),
    (coconut.Training, "stages 3 first_epochs 6 stage_epochs 3 lr 1e-4"),
]


@pytest.mark.parametrize("made, published", PUBLISHED)
def test_defaults_are_the_published_ones(made, published):
    if isinstance(made, type):
        found = vars(made())
    else:
        found = {key: p.default for key, p in inspect.signature(made).parameters.items()}
    words = published.split()
    published = dict(zip(words[::2], map(float, words[1::2])))
    assert {key: found[key] for key in published} == published


def test_cot_is_not_cut_by_min_p_and_has_no_cold_stop():
    for method in ("cot", "greedy"):
        s = soft_thinking.Settings(method=method)
        assert (s.min_p, s.cold_stop) == (0, False)


def a_problem(kind="number", question="How many?", answer="7"):
    return tasks.Problem("p", question, answer, kind)


@pytest.mark.parametrize("shots", [0, 1, 8])
def test_the_published_prompt_is_instruction_examples_and_the_question_begun(files, shots):
    asked = protocols.ask(a_problem(), tasks.TASKS["gsm8k"], shots, paper=True)
    lines = ["Solve it in English."]
    for n in range(shots):
        lines += ["Question:", f"1 + {n}?", "Thought:", f"Let’s think. It is {n + 1}."]
        lines += ["Answer:", str(n + 1), ""]
    lines += ["Question:", "How many?", "Thought:", "Let’s think step by step. "]
    assert asked.text == "\n".join(lines)


def test_the_published_verifier_sees_earlier_verdicts_and_whoever_gives_an_answer(files):
    asked = protocols.ask(a_problem(), tasks.TASKS["gsm8k"], 0, paper=True)
    texts = ["2 and 5:\nAnswer: 7", "I do not know", "  Answer: 8 "]
    verdicts = [{"text": "It is 7.\n\nAnswer:\n7"}, {"text": "nothing"}]
    message = asked.judge(asked, texts, verdicts)
    assert message == (
        "Look at the answers so far.\n\nQuestion:\nHow many?\n\nAnswers so far:\n"
        "0. Thought: It is 7. Answer: 7\n"
        "1. Thought: 2 and 5: Answer: 7\n"
        "2. Thought: Answer: 8\n"
        "\nAnalysis:\nLet’s think step by step. "
    )


@pytest.mark.parametrize("name", ["math500", "svamp", "tiny", "data"])
def test_where_nothing_whole_is_published_our_prompt_is_used(files, name):
    task = tasks.TASKS[name]
    assert not protocols.published(task)
    asked = protocols.ask(a_problem(), task, 0, paper=True)
    assert asked.text == tasks.prompt(a_problem(), task) and asked.judge is None


def test_our_prompt_takes_worked_examples_in_the_form_that_it_asks_for(files):
    asked = protocols.ask(a_problem(), tasks.TASKS["gsm8k"], 2, paper=False)
    first, second, question = asked.text.split("\n\n", 2)
    assert first == "Question: 1 + 0?\nLet’s think. It is 1.\n\\boxed{1}"
    assert second.startswith("Question: 1 + 1?")
    assert question == "Question: " + tasks.prompt(a_problem(), tasks.TASKS["gsm8k"])
    asked = protocols.ask(a_problem("yesno"), tasks.TASKS["strategyqa"], 1, paper=False)
    assert "It is not.\n\\boxed{no}\n\nQuestion: How many?" in asked.text


@pytest.mark.parametrize(
    "name, shots, there", [("gsm8k", 9, 8), ("strategyqa", 2, 1), ("tiny", 1, 0), ("gsm8k", -1, 8)]
)
def test_more_shots_than_examples_are_refused(files, name, shots, there):
    with pytest.raises(UserError, match=f"--shots {shots}: there are {there} worked examples"):
        protocols.ask(a_problem(), tasks.TASKS[name], shots, paper=False)


def test_a_completion_is_bare_text_that_ends_where_another_question_begins(folder_of):
    tokenizer = Tokenizer(folder_of("qwen2"))
    bare = protocols.completion(tokenizer)
    assert bare.open("Question:\nWhy?") == "Question:\nWhy?"  # this tokenizer adds no token
    assert tokenizer.open("Why?") != "Why?"  # and the original is as it was
    said = "It is 7. Answer: 7\n\nQuestion:\nWhat else? Answer: 8"
    assert bare.decode(tokenizer.encode(said)) == "It is 7. Answer: 7\n\n"
    assert bare.decode(tokenizer.encode("Final Answer: 3 Question")) == ""
    assert bare.decode(tokenizer.encode("7.")) == "7." and tokenizer.decode([]) == ""


def test_a_completion_begins_as_the_tokenizer_begins_texts(folder_of):
    import tokenizers

    tokenizer = Tokenizer(folder_of("qwen2"))
    start = tokenizer.special["eos_token"]
    known = tokenizer.core.token_to_id(start)
    template = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, known)]
    )
    tokenizer.core.post_processor = template
    assert protocols.completion(tokenizer).open("Why?") == start + "Why?"
    ids = tokenizer.encode(protocols.completion(tokenizer).open("Why?"))
    assert ids == tokenizer.core.encode("Why?").ids and ids[0] == known


def test_thinking_is_left_out_where_the_template_knows_how(folder_of):
    tokenizer = Tokenizer(folder_of("qwen2"))
    text = "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}:"
    tokenizer.template = tokenizer.template.environment.from_string(text)
    assert protocols.without_thinking(tokenizer).open("Why?") == "Why?<think></think>:"


@pytest.mark.parametrize("program", protocols.PAPER)
def test_a_flag_of_the_command_line_overrides_its_own(program, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--protocol", choices=["paper"])
    for name, value in protocols.PAPER[program].items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=None)
    first, *others = protocols.PAPER[program].items()
    args = protocols.parse(parser, program, [])
    assert all(getattr(args, name) is None for name in protocols.PAPER[program])
    given = [f"--{first[0].replace('_', '-')}", "5"]
    args = protocols.parse(parser, program, ["--protocol", "paper", *given])
    assert getattr(args, first[0]) == type(first[1])("5")
    assert all(getattr(args, name) == value for name, value in others)
    printed = capsys.readouterr().out
    assert all(f"{n.replace('_', '-')} {value}" in printed for n, value in others)


# ---------------------------------------------------------------------------------- the programs


def program(module, settings, run, view, folder, data, *more):
    """The exit code; the task is gsm8k, its problems are ours."""
    arguments = ["--model", str(folder), "--device", "cpu", "--task", "gsm8k", "--data", str(data)]
    return cli.command(
        [*arguments, "--protocol", "paper", *more], module.__doc__, settings, run, view
    )


def reason(folder, data, *more):
    own = soft_reasoning, sampling.Settings, sampling.reason, show.Search
    return program(*own, folder, data, *more)


def think(folder, data, *more):
    own = soft_thinking, soft_thinking.Settings, soft_thinking.think, show.Thought
    return program(*own, folder, data, *more)


@pytest.fixture
def at_hand(files, folder_of, tmp_path):
    """A golden model, two problems, and where records go."""
    folder, data = folder_of("qwen3"), tmp_path / "data.jsonl"
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps({"question": q, "answer": "7"}) for q in ("How many?", "What sum?")]
    data.write_text("\n".join(lines) + "\n")
    return folder, data, tmp_path / "out.jsonl"


def test_a_search_as_published_asks_by_bare_text_in_the_published_words(at_hand, capsys):
    folder, data, out = at_hand
    small = ["--max-new-tokens", "6", "--dimension", "8", "--rounds", "2", "--k", "2"]
    more = ["--methods", "soft,greedy", "--limit", "1", "--shots", "2", "--output", str(out)]
    assert reason(folder, data, *small, *more) == 0
    printed = capsys.readouterr()
    assert "protocol paper: completion True, limit 1, k 2" in printed.out
    assert "soft_reasoning_prompts.yaml: no checksum is known" in printed.err
    soft, greedy = map(json.loads, out.read_text().splitlines())
    for record in (soft, greedy):
        assert record["prompt"].startswith("Solve it in English.\nQuestion:\n1 + 0?\nThought:")
        assert record["prompt"].endswith("How many?\nThought:\nLet’s think step by step. ")
        settings = record["settings"]
        assert (settings["protocol"], settings["shots"]) == ("paper", 2)
        assert "soft_reasoning_prompts.yaml" in settings["prompts"]
        assert (settings["select"], settings["stop_on"], settings["k"]) == ("vote", "gain", 2)
        assert settings["grader"] == "numbers within 0.01"
    # What was decoded is the continuation of that text, without a chat around it.
    model, tokenizer = load(str(folder), "cpu")
    prompt = Prompt(model.embed(torch.tensor(tokenizer.core.encode(greedy["prompt"]).ids)))
    bare, said = protocols.completion(tokenizer), soft_reasoning.Generation(prompt)
    outcome = soft_reasoning.generate_one(model, bare, said, 6)
    assert greedy["thought_text"] + greedy["answer_text"] == outcome.text
    assert reason(folder, data, *small, *more[:-2], "--no-completion") == 0


def test_soft_thinking_as_published_says_whose_words_it_uses(at_hand):
    folder, data, out = at_hand
    assert think(folder, data, "--max-new-tokens", "5", "--output", str(out)) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["method"] for record in records} == {"soft", "cot", "greedy"}
    for record in records:
        settings = record["settings"]
        assert settings["prompts"].startswith("ours") and settings["cold_stop_answer"]
        assert settings["max_new_tokens"] == 5 and "Solve it in English" not in record["prompt"]


@pytest.mark.parametrize(
    "main, flags, said",
    [
        (reason, ["--shots", "9"], "--shots 9: there are 8 worked examples of gsm8k"),
        (reason, ["--protocol", "official"], "argument --protocol: invalid choice: 'official'"),
        (think, ["--protocol", "official"], "argument --protocol: invalid choice: 'official'"),
        (think, ["--shots", "1"], "unrecognized arguments: --shots 1"),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_loaded(main, flags, said, at_hand, capsys):
    try:
        code = main("no such model", at_hand[1], *flags)
    except SystemExit as exit:
        code = exit.code
    errors = [line for line in capsys.readouterr().err.splitlines() if "checksum" not in line]
    assert code == 2 and len(errors) == 1 and said in errors[0]
