"""lab/checkpoint.py, and what model.py itself refuses: everything a user can get wrong."""

import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, ROOT, edit

import model as M
from lab import checkpoint
from lab.fast import load
from model import UserError

# What would be computed wrongly: model.load refuses it, too.
WRONG = [
    (
        {"model_type": "gemma2"},
        "unsupported architecture: found gemma2; supported: llama, qwen2, qwen3, mistral",
    ),
    ({"model_type": "qwen3_moe"}, "found qwen3_moe"),
    ({"hidden_act": "gelu"}, "unsupported activation: found gelu; supported: silu"),
    (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "unsupported RoPE type: found longrope; supported: default",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "unsupported quantisation: found gptq",
    ),
    (
        {"model_type": "mistral", "sliding_window": 16, "use_sliding_window": "DELETE"},
        "sliding window of 16",
    ),
    ({"use_sliding_window": True, "sliding_window": 16}, "sliding window of 16"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
        "unsupported YaRN option: found truncate",
    ),
    ({"quantization_config": "gptq"}, "unsupported quantisation: found gptq"),
]
# The same, by the tensors: what fast.load says, and what model.load does.
TENSORS = [
    (
        {"num_hidden_layers": 3},
        r"12 missing \(model.layers.2.input_layernorm.weight, .*, \.\.\.\)",
        "12 tensors missing, one is model.layers.2.input_layernorm.weight",
    ),
    (
        {"num_hidden_layers": 1},
        r"12 unexpected \(model.layers.1",
        r"model.layers.1.\S+ is BF16 \[.*\], unlike config.json",
    ),
    (
        {"vocab_size": 300},
        r"1 misshapen \(model.embed_tokens.weight \[272, 32\] instead of \[300, 32\]\)",
        r"model.embed_tokens.weight is BF16 \[272, 32\], unlike config.json",
    ),
]
# What would not run at all: said in one line before.
BROKEN = [
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        "llama3 lacks low_freq_factor, high_freq_factor",
    ),
    ({"rope_scaling": {"type": "yarn"}}, "yarn lacks factor"),
    (
        {"rope_scaling": {"type": "linear", "factor": 0}},
        r"rope_scaling.factor is 0, not a number from 1e-09 to 1e\+09",
    ),
    ({"rope_scaling": {"type": "linear", "factor": "two"}}, "rope_scaling.factor is 'two', not a"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
    ({"hidden_size": None}, "config.json lacks hidden_size"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"hidden_size": "DELETE"}, "config.json lacks hidden_size"),
]


@pytest.mark.parametrize("changes, said", WRONG + BROKEN + [case[:2] for case in TENSORS])
def test_a_configuration_that_does_not_fit_is_refused(changes, said, folder_of):
    folder = folder_of("qwen2")
    edit(folder, **changes)
    with pytest.raises(UserError, match=said) as refusal:
        load(str(folder), "cpu")
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("changes, said", WRONG + [case[::2] for case in TENSORS])
def test_model_load_itself_refuses_what_it_would_compute_wrongly(changes, said, folder_of):
    folder = folder_of("qwen2")
    edit(folder, **changes)
    with pytest.raises(UserError, match=said):
        M.load(str(folder), "cpu")


@pytest.mark.parametrize("changes, said", BROKEN)
def test_model_load_does_not_run_what_is_broken(changes, said, folder_of):
    folder = folder_of("qwen2")
    edit(folder, **changes)
    with pytest.raises(Exception):  # noqa: B017 (of any class: fast.load says it in a line)
        model, _ = M.load(str(folder), "cpu")
        # In fewer than 16 positions PyTorch's causal kernel on a CPU overlooks keys that are NaN.
        M.Prompt(model.embed(torch.arange(40))).prefill(model)


def test_folders_that_lack_something_are_refused(folder_of, tmp_path):
    for name, said in (
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", r"has no \*.safetensors weights"),
    ):
        folder = folder_of("qwen2", name=name + "-gone")
        (folder / name).unlink()
        with pytest.raises(UserError, match=said):
            load(str(folder), "cpu")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    said = r"only pickle weights \(pytorch_model.bin\): refused, since a pickle can run any code"
    with pytest.raises(UserError, match=said):
        load(str(folder), "cpu")
    with pytest.raises(UserError, match="26 tensors missing"):
        M.load(str(folder), "cpu")
    with pytest.raises(UserError, match="no folder"):
        load(str(tmp_path / "nowhere"))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        load(str(folder), "cpu")
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json is not a JSON object"):
        load(str(folder), "cpu")
    (folder / "tokenizer.json").write_text("{}")
    shutil.copy(GOLDEN / "qwen2/config.json", folder)
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        load(str(folder), "cpu")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_weights_are_named(damage, folder_of):
    folder = folder_of("qwen2")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    damaged = {"truncated": data[:-100], "header": b"\xff" * 8 + data[8:], "empty": b""}
    file.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupt"):
        load(str(folder), "cpu")
    with pytest.raises(Exception):  # noqa: B017 (safetensors has a class of its own)
        M.load(str(folder), "cpu")


def test_quantised_tensors_and_shards_outside_the_folder_are_refused(folder_of):
    folder = folder_of("qwen2")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    for either, said in ((load, "; supported: bfloat16"), (M.load, " .*, unlike config.json")):
        with pytest.raises(UserError, match="model.norm.weight is I8" + said):
            either(str(folder), "cpu")
    (folder / "model.safetensors").rename(folder.parent / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        load(str(folder), "cpu")
    assert M.weight_paths(folder) == [folder / "a.safetensors"]  # never outside of it
    for wrong in ([], {"weight_map": []}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="not a JSON object|no weight_map of file names"):
            load(str(folder), "cpu")


def test_a_tied_head_and_old_rotary_tensors_in_the_file_are_no_error(folder_of):
    folder = folder_of("qwen2")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    for either in (load, M.load):
        model, _ = either(str(folder), "cpu")
        assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize(
    "name, said",
    [
        ("qwen2.5-7", "unknown model qwen2.5-7: nearest aliases are qwen2.5-7b"),
        ("Qwen3-8", "nearest aliases are qwen3-8b"),
        ("a/b/c", "no folder a/b/c"),
        ("~nobody-of-that-name/x", "no folder ~nobody"),
        ("x" * 5000, "no folder xxx"),
    ],
)
def test_misspelt_names_get_the_nearest(name, said):
    with pytest.raises(UserError, match=said):
        load(name)


LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    "error, said",
    [
        (
            "GatedRepoError",
            f"is gated: accept its terms at https://huggingface.co/{LLAMA}, then run `hf auth",
        ),
        ("RepositoryNotFoundError", f"no repository {LLAMA} on Hugging Face"),
        ("LocalEntryNotFoundError", f"cannot download {LLAMA}, and it is not in the cache"),
        (None, f"cannot download {LLAMA}"),
    ],
)
def test_what_the_hub_answers_is_one_line_with_a_remedy(error, said, monkeypatch):
    kind = getattr(checkpoint.hub_errors, error) if error else TimeoutError

    def download(*args, **options):
        wanted = ["*.safetensors", "*.json", "chat_template.jinja"]
        assert options["allow_patterns"] == wanted
        raise kind.__new__(kind)

    monkeypatch.setattr(checkpoint.huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=said):
        load("llama-3.1-8b")


def test_devices_dtypes_and_memory(folder_of, monkeypatch):
    folder = str(folder_of("qwen2"))
    with pytest.raises(UserError, match="unknown device"):
        load(folder, "tpu9")
    with pytest.raises(UserError, match="unknown dtype"):
        load(folder, "cpu", "int3")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"no device cuda: .* sees 0 CUDA"):
            load(folder, "cuda")
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1000)
    needed = r"weights need 0.0 GB in float32, 0.0 GB are free on cpu: use --dtype bfloat16"
    with pytest.raises(UserError, match=needed):
        load(folder, "cpu", "float32")


@pytest.mark.parametrize(
    "dtype, quantize, half",
    [
        ("float32", None, r"--dtype bfloat16 \(half of it\), a smaller --model"),
        ("bfloat16", None, "use --quantize int8, a smaller --model"),
        ("bfloat16", "int8", "use a smaller --model"),
        ("float32", "int8", "use a smaller --model"),
    ],
)
def test_what_does_not_fit_is_told_what_would(dtype, quantize, half, folder_of, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=half):
        load(str(folder_of("qwen2")), "cpu", dtype, quantize)


def test_memory_is_unlimited_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "Path", lambda name: tmp_path / "nothing")
    assert checkpoint.free_memory(torch.device("cpu")) == math.inf


def test_without_a_compiler_there_is_a_line(folder_of):
    ran = subprocess.run(
        [sys.executable, ROOT / "soft_thinking.py", "--compile", "--device", "cpu"],
        check=False,
        text=True,
        capture_output=True,
        env=os.environ | {"CXX": "no-such-compiler"},
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    needs = "a compiler of C++20 with OpenMP, and no-such-compiler is not one: install"
    assert needs in ran.stderr
    with pytest.raises(UserError, match="unknown quantisation int4: use int8"):
        load(str(folder_of("llama3")), "cpu", quantize="int4")


def test_a_compiler_that_hangs_is_a_line(tmp_path, monkeypatch):
    hanging = tmp_path / "g++"
    hanging.write_text("#!/bin/sh\nsleep 30\n")
    hanging.chmod(0o755)
    start = time.monotonic()
    monkeypatch.setenv("CXX", str(hanging))
    with pytest.raises(UserError, match="gave no answer within 1 s: name another one"):
        checkpoint.check_compiler(1)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("command", ["false", " ", 'g++ "', "/"])
def test_what_is_no_compiler_is_a_line(command, monkeypatch):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(UserError, match="needs a compiler of C..20 with OpenMP, and .* is not one"):
        checkpoint.check_compiler()
