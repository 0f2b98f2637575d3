"""A small LLM with a small assistant, problems for them, and SoftCoT's commands, for its tests."""

import json
import sys

import pytest
import torch
from conftest import write_tokenizer
from safetensors.torch import load_file

import softcot
from baselines import lora, prompts
from lab import fast, softcot_cli
from softcot import assistant_ids, hidden_states, sequence

OTHER = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} "
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [("qwen3", "llama2"), ("llama3", "qwen2"), ("mistral", "qwen3"), ("qwen2", "llama-bias")]
PROBLEMS = [
    ("1+1?", "2", ["1+1=2."]),
    ("2*3+1?", "7", ["2*3=6.", "6+1=7."]),
    ("9-4?", "5", ["9-4=5."]),
    ("8/2?", "4", ["8/2=4."]),
    ("What is 3+3?", "6", ["3+3=6."]),
    ("5*5?", "25", ["5*5=25."]),
    ("7?", "7", ["It is 7."]),
    ("6-6+1?", "1", ["6-6=0.", "0+1=1."]),
]


def lengthen(folder):
    """The golden models' context is 64, less than one question of bytes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.fixture
def pair(folder_of):
    """pair("qwen3", "llama2"): folders of an LLM and an assistant, with different templates."""

    def make(llm="qwen3", assistant="llama2", thinking=True):
        folders = (
            lengthen(folder_of(llm, thinking, "llm")),
            lengthen(folder_of(assistant, False, "assistant")),
        )
        write_tokenizer(folders[1], False, OTHER)
        return [str(folder) for folder in folders]

    return make


@pytest.fixture
def loaded(pair):
    """loaded(...): the LLM, its tokenizer, the assistant, its tokenizer; load: plain, or fast's."""

    def make(*families, load=fast.load, **options):
        llm, assistant = pair(*families, **options)
        return *load(llm, "cpu", "float32"), *load(assistant, "cpu", "float32")

    return make


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [json.dumps({"question": q, "answer": a, "steps": s}) + "\n" for q, a, s in PROBLEMS]
    path.write_text("".join(rows))
    return str(path)


def projection_of(d_a=32, d=32):
    return dict(torch.nn.Linear(d_a, d).named_parameters())


def sequences_of(tokenizer, n, count=3):
    return [
        sequence(tokenizer, q, n, tokenizer.encode(" ".join(s))) for q, _, s in PROBLEMS[:count]
    ]


def states(assistant, tokenizer, questions, n, **options):
    ids = [assistant_ids(tokenizer, q, n) for q in questions]
    return hidden_states(assistant, ids, n, **options)


# --------------------------------------------------------------------------------------- commands


def main(arguments):
    """What `python softcot.py` does with these arguments; its exit code."""
    return softcot_cli.command(arguments, softcot, lora, prompts)


def trains(pair_of_folders, data, folder, *more, method="softcot", epochs=2):
    """Five problems to learn from, three held out; each step changes something."""
    settings = {
        "--model": pair_of_folders[0],
        "--assistant": pair_of_folders[1],
        "--device": "cpu",
        "--dtype": "float32",
        "--data": data,
        "--folder": str(folder),
        "--method": method,
        "--thoughts": "2",
        "--lr": "0.01",
        "--epochs": str(epochs),
        "--batch-size": "2",
        "--dev": "3",
        "--dev-limit": "2",
        "--max-new-tokens": "4",
        "--rank": "2",
        "--dropout": "0.3",
    }
    return main(["train", *(x for setting in settings.items() for x in setting), *more])


def outcome(folder):
    """All tensors by file, and the log without speeds."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    paths = [path for path in folder.glob("*.safetensors") if path.name != "hidden.safetensors"]
    files = {path.name: load_file(path) for path in paths}
    return files, [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log]


def assert_same(a, b):
    (files, log), (others, other_log) = outcome(a), outcome(b)
    assert log == other_log and files.keys() == others.keys()
    for name, tensors in files.items():
        assert tensors.keys() == others[name].keys()
        assert all(torch.equal(x, others[name][k]) for k, x in tensors.items()), name


def evaluates(folders, data, *more):
    settings = {
        "--model": folders[0],
        "--assistant": folders[1],
        "--device": "cpu",
        "--dtype": "float32",
        "--data": data,
        "--max-new-tokens": "5",
        "--limit": "3",
    }
    return main(["eval", *(x for setting in settings.items() for x in setting), *more])


if __name__ == "__main__":  # a training that a test kills: LLM ASSISTANT DATA FOLDER
    llm, assistant, data, folder = sys.argv[1:]
    more = ["--save-every", "1", "--dtype", "bfloat16"]
    sys.exit(trains([llm, assistant], data, folder, *more, epochs=60))
