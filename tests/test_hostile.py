"""Files, folders, templates and texts of strangers: refused in one line, or read in no time."""

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TEMPLATE, edit, write_tokenizer

from baselines import lora
from lab import checkpoint, tasks, template
from lab.fast import load
from lab.grading import extract, grade, vote
from lab.steps import CompiledStep
from model import KVCache, Tokenizer, UserError

# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2, not a whole number from 1"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 keys and values"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"head_dim": 7}, "a head is 7 wide, not an even number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, not .* to 1000"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, "rope_scaling.factor is -1"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', not a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"eos_token_id": ["a"]}, "eos_token_id is 'a'"),
    ],
)
def test_values_of_config_json_that_are_out_of_range(changes, said, folder_of):
    folder = folder_of("qwen3")
    edit(folder, **changes)
    with pytest.raises(UserError, match=said):
        load(str(folder), "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"chat_template": 7},
        {"chat_template": ["x"]},
        {"eos_token": 7},
        {"eos_token": {"content": 1}},
    ],
)
def test_values_of_tokenizer_config_json_of_the_wrong_kind(changes, folder_of):
    folder = folder_of("qwen3")
    (folder / "tokenizer_config.json").write_text(json.dumps(changes))
    with pytest.raises(UserError, match=next(iter(changes))):
        load(str(folder), "cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "x.safetensors"])
def test_what_is_no_file_is_named(name, folder_of):
    for kind, make in (
        ("pipe", os.mkfifo),
        ("folder", os.mkdir),
        ("loop", lambda path: os.symlink(path, path)),
    ):
        folder = folder_of("qwen3", name=f"{kind}-{name}")
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(UserError, match="is not a regular file"):
            load(str(folder), "cpu")


def test_deep_nesting_is_a_line(folder_of, tmp_path):
    folder, deep = folder_of("qwen3"), 100_000
    (folder / "generation_config.json").write_text('{"a":' * deep + "1" + "}" * deep)
    with pytest.raises(UserError, match="nested too deeply"):
        load(str(folder), "cpu")
    (folder / "generation_config.json").unlink()
    write_tokenizer(folder, True, "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}")
    with pytest.raises(UserError, match="does not parse"):
        load(str(folder), "cpu")
    (tmp_path / "rows").write_text("[" * deep)
    with pytest.raises(UserError, match="rows, line 1: not a JSON object"):
        tasks.load("data", tmp_path / "rows")


def test_rows_that_are_no_unicode_are_named_and_a_pipe_is_refused(tmp_path):
    row = {"question": "a?", "answer": "1"}
    for name in row:
        lines = [row, row | {name: "\udcff"}]
        (tmp_path / "rows").write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(UserError, match="rows, line 2: a text in it is not valid Unicode"):
            tasks.load("data", tmp_path / "rows")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a named pipe"):
        tasks.load("data", tmp_path / "pipe")


@pytest.mark.parametrize("rank", [-16, 0, 10**12])
def test_a_rank_that_no_adapter_has(rank, folder_of):
    model, _ = load(str(folder_of("qwen3")), "cpu")
    with pytest.raises(UserError, match=f"rank {rank}: use 1 to 32"):
        lora.start(model, rank)


def test_a_compiler_that_fails_is_a_line(folder_of, monkeypatch):
    def fails(*_):
        raise RuntimeError("CppCompileError: C++ compile error\nand its output")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    cache = KVCache(model, 1, 8)
    cache.reserve(1)
    with pytest.raises(UserError, match="CppCompileError: C.. compile error.: leave --compile out"):
        CompiledStep(model)(model.embed(torch.tensor([1])), cache)


def test_python_without_docstrings_is_a_line():
    command = [sys.executable, "-OO", "soft_thinking.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch("soft_thinking.py: python -OO takes out .*: leave it out\n", done.stderr)


# --------------------------------------------------------------------------------------- templates

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "text, said",
    [
        (ENDLESS, "does not end within"),
        ("{{ 9 ** (9 ** 9) }}", "does not end within"),
        ("{{ 'a' * 10 ** 10 }}", "takes more than 1 GiB"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "does not end"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "drops the user's message"),
    ],
)
def test_templates_that_hang_grow_or_drop_the_message_are_refused(
    text, said, folder_of, monkeypatch
):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    folder = folder_of("qwen3")
    write_tokenizer(folder, True, text)
    began = time.perf_counter()
    with pytest.raises(UserError, match=said):
        load(str(folder), "cpu")
    assert time.perf_counter() - began < 10


def test_blocks_for_training_tools_are_read(tmp_path):
    marked = TEMPLATE.replace(
        "{{ m['content'] }}", "{%- generation -%}{{ m.content }}{% endgeneration %}"
    )
    for text in (TEMPLATE, marked):
        write_tokenizer(tmp_path, True, text)
        rendered = Tokenizer(tmp_path).render("a")
        assert "a<|im_end|>" in rendered and "generation" not in rendered


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "line, inside, names, cached",
    [
        ("0::/a/b", "", ("memory.max", "memory.current"), "inactive_file"),
        (
            "4:memory:/a/b",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_inactive_file",
        ),
    ],
)
def test_free_memory_is_also_what_the_container_leaves(line, inside, names, cached, tmp_path):
    process, group = tmp_path / "cgroup", tmp_path / inside / "a"
    process.write_text(f"9:cpu:/c\n{line}\n")
    found = lambda: checkpoint.left_to_container(str(process), str(tmp_path))
    assert found() == float("inf")
    (group / "b").mkdir(parents=True)
    for folder, most in ((group, "1000"), (group / "b", "max")):  # the parent's limit holds, too
        for name, text in zip((*names, "memory.stat"), (most, "700", f"anon 5\n{cached} 200\n")):
            (folder / name).write_text(text)
    assert found() == 500
    (group / names[0]).write_text("100")
    assert found() == 0


# ----------------------------------------------------------------------------------------- reading

PIECES = [
    "The answer is",
    "\n",
    " ",
    "1",
    "1,",
    "-",
    "- ",
    "\\frac{",
    "\\boxed{",
    "}",
    "{",
    "((",
    "a",
]
PIECES += [
    "not ",
    "it is ",
    "$",
    "\\text{",
    "```\n",
    "```python\n",
    '"',
    "'",
    "<answer>",
    "answer: ",
]
PIECES += [
    "#### ",
    "*",
    "\\left",
    "1e",
    "1 /",
    "A",
    "option ",
    "A or ",
    "=",
    "½",
    "%",
    "\r",
    "x ",
    "^{",
]
CHOICES = {"A": "1", "B": "two words"}


def test_no_text_keeps_its_reader_busy():
    """As long as 32,768 tokens: in no more than a few times what a hundredth part suggests."""
    draw = random.Random(0)
    texts = ["The answer is" + "\n" * 40_000]
    for _ in range(25):
        pieces = draw.sample(PIECES, draw.choice((1, 2, 3)))
        texts.append(draw.choice(PIECES) + "".join(pieces) * (60_000 // len("".join(pieces))))
    slowest = 0.0
    for text in texts:
        kind = draw.choice(("number", "math", "choice", "yesno", "code"))
        began = time.process_time()
        extract(text, kind, CHOICES if kind == "choice" else None)
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 0.5


@pytest.mark.parametrize("kind, form", [("number", "\\frac{{{}}}{{7}}"), ("math", "({0},{0})")])
def test_a_vote_of_hundreds_reads_each_answer_once(kind, form):
    answers, began = [form.format(i) for i in range(300)], time.process_time()
    assert vote([*answers, answers[7]], lambda a, b: grade(a, b, kind)) == 7
    assert time.process_time() - began < 3
