"""Hostile starts: whatever files and flags hold, a program ends with 0 or 2, soon, in a line."""

import json
import random
import time

import pytest
from test_cli import long_context, reason, think

VALUES = (None, True, -1, 0, 1, 2, 3, 1.5, -0.5, 1e-320, 1e308, 10**30, -(10**30), 2**63)
VALUES += ("", "7", "x" * 99, "\x00", "{{", "\udcff", [], [1], [[]], ["a", {}], {}, {"a": 1})
NAMES = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
NAMES += "intermediate_size max_position_embeddings rms_norm_eps rope_theta rope_scaling "
NAMES += "rope_parameters sliding_window use_sliding_window tie_word_embeddings attention_bias "
NAMES += "mlp_bias eos_token_id model_type hidden_act architectures quantization_config"
ROPE = "rope_type type factor low_freq_factor high_freq_factor beta_fast beta_slow rope_theta "
ROPE += "attention_factor original_max_position_embeddings partial_rotary_factor mscale"
TOKENIZER = "chat_template bos_token eos_token pad_token unk_token add_bos_token other_token"


def start(capsys, program, arguments):
    """A start of a program: its exit code is 0 or 2, it says one line, and is soon over."""
    began = time.perf_counter()
    try:
        code = program([*map(str, arguments)])
    except SystemExit as end:
        code = end.code
    out = capsys.readouterr()
    assert code in (0, 2), code
    assert code == 0 or out.err.splitlines()[-1].startswith(("soft_thinking", "soft_reasoning"))
    assert time.perf_counter() - began < 20
    return code


def short(folder):
    return ["--model", folder, "--device", "cpu", "--max-new-tokens", 2, "--question", "2?"]


@pytest.mark.parametrize("seed", range(2))
def test_whatever_config_json_holds(seed, folder_of, capsys):
    draw, folder = random.Random(seed), long_context(folder_of("qwen3"), 256)
    path, codes = folder / "config.json", [start(capsys, think, short(folder))]
    whole = json.loads(path.read_text())
    for _ in range(30):
        changed = {name: draw.choice(VALUES) for name in draw.sample(NAMES.split(), 1)}
        if draw.random() < 0.4:
            rope = {name: draw.choice(VALUES) for name in draw.sample(ROPE.split(), 3)}
            kind = draw.choice(["linear", "llama3", "yarn", "default"])
            changed = {"rope_scaling": {"type": kind, "factor": 2.0} | rope}
        path.write_text(json.dumps(whole | changed))
        codes.append(start(capsys, think, short(folder)))
    assert {0, 2} == set(codes)


def test_whatever_the_tokenizer_s_files_hold(folder_of, capsys):
    draw, folder = random.Random(0), long_context(folder_of("qwen3"), 256)
    path, codes = folder / "tokenizer_config.json", []
    whole = json.loads(path.read_text())
    for name in ("tokenizer_config.json", "generation_config.json"):
        for _ in range(15):
            names = TOKENIZER if name == "tokenizer_config.json" else "eos_token_id a"
            changed = {name: draw.choice(VALUES) for name in draw.sample(names.split(), 1)}
            (folder / name).write_text(json.dumps(whole | changed))
            codes.append(start(capsys, think, short(folder)))
        (folder / name).write_text(json.dumps(whole))
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    first, *rest = whole["added_tokens"]
    for name in whole:
        path.write_text(json.dumps(whole | {name: draw.choice(VALUES)}))
        codes.append(start(capsys, think, short(folder)))
    for name in first:
        tokens = [first | {name: draw.choice(VALUES)}, *rest]
        path.write_text(json.dumps(whole | {"added_tokens": tokens}))
        codes.append(start(capsys, think, short(folder)))
    assert {0, 2} == set(codes)


def test_whatever_the_data_holds(folder_of, capsys, tmp_path):
    draw, folder = random.Random(0), long_context(folder_of("qwen3"), 256)
    data, row = tmp_path / "data.jsonl", {"question": "2?", "answer": "2", "choices": ["2", "3"]}
    arguments = ["--model", folder, "--device", "cpu", "--max-new-tokens", 2, "--data", data]
    lines = [json.dumps(row | {draw.choice([*row, "steps", "tests"]): v}).encode() for v in VALUES]
    lines += [b"[" * 100_000, b"\xff", b'"x"', b"1" * 5000, b"NaN", b"\x00", b"{}", b""]
    codes = []
    for line in lines:
        data.write_bytes(line + b"\n")
        codes.append(start(capsys, think, [*arguments, "--methods", "greedy"]))
    assert {0, 2} == set(codes)


NUMBERS = ("-1", "0", "1", "nan", "inf", "-inf", "1e-46", "1e-320", "1e300", "9" * 30, "9" * 5000)


@pytest.mark.parametrize("program", [think, reason])
def test_whatever_a_flag_is_given(program, folder_of, capsys):
    draw, folder, codes = random.Random(0), long_context(folder_of("qwen3"), 256), []
    flags = "temperature top-k top-p min-p max-topk cold-stop-entropy cold-stop-steps seed"
    flags += " gumbel-temperature dirichlet-alpha num-samples batch-size limit"
    if program is reason:
        flags = "k rounds dimension sigma position kappa stop-threshold num-samples temperature"
        flags += " seed seeds batch-size first-top-k rap-iterations rap-width rap-alpha"
    for flag in flags.split():
        for number in draw.sample(NUMBERS, 3):
            changed = [*short(folder), f"--{flag}={number}"]
            changed += ["--rounds=1", "--dimension=4"] if program is reason else []
            codes.append(start(capsys, program, changed))
    assert {0, 2} == set(codes)
