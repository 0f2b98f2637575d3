"""model.py's transformer, plain loading and tokenizer, against golden tensors of transformers."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, ROOT, close, write_tokenizer
from make_golden import FAMILIES, ROPES, rope_config
from torch import nn

import model as M
from lab import checkpoint, fast
from lab.fused import hf_tensors
from model import (
    Tokenizer,
    Transformer,
    UserError,
    check_prompt,
    check_ranges,
    config_from_json,
    load,
    rope_frequencies,
)

# -------------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_are_those_of_transformers(family, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "float32")
    expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
    hidden = model(model.embed(expected["ids"])[None])
    assert close(hidden[0], expected["hidden"], 1e-5)
    logits = model.logits(hidden[0, -8:])
    assert logits.dtype == torch.float32 and close(logits, expected["logits"], 1e-5)


@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_of_real_models_are_those_of_transformers(name):
    expected = safetensors.torch.load_file(GOLDEN / "rope.safetensors")
    found, factor = rope_frequencies(config_from_json(rope_config(name)))
    assert torch.allclose(found, expected[name], rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected[f"{name}, factor"].item(), rel=1e-6)


def test_right_padding_and_later_positions_change_nothing_before(folder_of):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    a, b = torch.randn(1, 20, 32), torch.randn(1, 20, 32)
    mixed = torch.cat([a[:, :11], b[:, 11:]], 1)
    assert torch.equal(model(mixed)[:, :11], model(a)[:, :11])


def test_the_gradient_with_respect_to_the_embeddings_is_a_finite_difference():
    config = config_from_json(FAMILIES["qwen2"])
    torch.manual_seed(0)
    model = Transformer(config).double()
    x, direction = torch.randn(1, 6, 32).double().requires_grad_(), torch.randn(1, 6, 32).double()

    def loss(e):
        return model.logits(model(e))[0, -1].log_softmax(-1)[7]

    (gradient,) = torch.autograd.grad(loss(x), x)
    h = 1e-4
    numeric = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    # The rotary angles are float32, but a constant of the function: the quotient is float64's.
    assert abs(((gradient * direction).sum() - numeric) / numeric) < 1e-6


def test_a_bfloat16_model_keeps_its_rotary_frequencies_in_float32():
    model = Transformer(config_from_json(FAMILIES["llama3"])).to(torch.bfloat16)
    model(torch.zeros(1, 3, 32, dtype=torch.bfloat16))
    positions = torch.tensor([[0, 1000]])
    exact = Transformer(model.config).rotation(positions)
    assert all(map(torch.equal, model.rotation(positions), exact))
    assert model.logits(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_rotary_cosines_and_sines_are_rounded_once_so_that_no_neighbour_decides_a_bit():
    model = Transformer(config_from_json(FAMILIES["llama3"]))
    positions = torch.arange(0, 2000, 7).view(2, -1)
    angles = (positions[..., None, None] * model.freq).flatten().tolist()  # float32's
    for function, found in zip((math.cos, math.sin), model.rotation(positions)):
        exact = torch.tensor([function(angle) for angle in angles], dtype=torch.float64)
        assert found.dtype == torch.float32 and torch.equal(found.flatten(), exact.float())


def test_a_new_model_is_drawn_as_pytorch_draws_it():
    torch.manual_seed(0)
    model = Transformer(config_from_json(FAMILIES["llama2"]))
    torch.manual_seed(0)
    assert torch.equal(model.embed.weight, nn.Embedding(272, 32).weight)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------- loading


def test_shards_and_one_file_load_the_same(folder_of):
    folder = folder_of("qwen3")
    whole, _ = load(str(folder), "cpu", "float32")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file, part in zip(files, (names[::2], names[1::2])):
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded, _ = load(str(folder), "cpu", "float32")
    fused, _ = fast.load(str(folder), "cpu", "float32")
    views, parameters = hf_tensors(fused), dict(sharded.named_parameters())
    assert {M.hf_name(name) for name in parameters} == set(views) == set(tensors)
    for name, parameter in whole.named_parameters():  # every tensor is at its place
        assert torch.equal(parameter, parameters[name])
        assert torch.equal(parameter, tensors[M.hf_name(name)].float())
        assert torch.equal(parameter, views[M.hf_name(name)])
    os.remove(folder / files[1])
    with pytest.raises(UserError, match="1 of 2 shards missing, first model-00002-of-00002"):
        fast.load(str(folder))
    with pytest.raises(Exception, match="00002-of-00002"):
        load(str(folder))


def test_the_file_s_own_dtype_reads_the_same_bytes(folder_of):
    folder = folder_of("llama3")
    model, _ = load(str(folder), "cpu", "bfloat16")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    views = {M.hf_name(name): p for name, p in model.named_parameters()}
    assert set(views) == set(tensors)
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    for view in views.values():
        view.zero_()
    M.read_weights(model, "", M.tensor_files(folder, model))
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)


def test_blocks_are_converted_one_by_one_as_each_arrives(folder_of, monkeypatch):
    folder, log = folder_of("llama3"), []
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    read = M.read_weights

    def spy(module, prefix, files):
        log.append(prefix)
        read(module, prefix, files)

    def convert(block):
        log.append(block.self_attn.q_proj.weight.clone())
        block.mlp = nn.Identity()

    monkeypatch.setattr(M, "read_weights", spy)
    model, _ = load(str(folder), "cpu", "float32", convert)
    assert log[::2] == ["layers.0.", "layers.1.", ""] and len(log) == 5
    for i in (0, 1):
        assert torch.equal(log[2 * i + 1], tensors[f"model.layers.{i}.self_attn.q_proj.weight"])
        assert isinstance(model.layers[i].mlp, nn.Identity)


def test_end_of_sequence_ids_come_from_both_files(folder_of):
    model, _ = load(str(folder_of("qwen2")), "cpu")
    assert model.config.eos_ids == (257, 261)


def test_version_4_and_5_configurations_read_the_same():
    four, five = config_from_json(FAMILIES["llama3"]), config_from_json(FAMILIES["llama3-v5"])
    assert four.rope_theta == five.rope_theta
    assert {k: five.rope[k] for k in four.rope} == four.rope


def test_yarn_lengthens_the_context_and_linear_leaves_it():
    yarn = FAMILIES["qwen2"] | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert config_from_json(yarn).context == 256
    assert config_from_json(FAMILIES["llama-linear"]).context == 64


def test_aliases_name_the_instruct_and_reasoning_repositories():
    assert M.ALIASES["qwen2.5-0.5b"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert M.ALIASES["qwen3-32b"] == "Qwen/Qwen3-32B"
    assert M.ALIASES["r1-qwen-1.5b"] == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert M.ALIASES["smollm2-135m"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert M.ALIASES["smollm2-1.7b"] == "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    assert len(M.ALIASES) == 7 + 6 + 1 + 4 + 2 + 1 + 2 + 1 + 1 + 3


@pytest.mark.parametrize("module", ["model", "lab.fast"])
def test_a_cached_model_works_without_a_network(module, folder_of, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repository / "snapshots").mkdir(parents=True)
    shutil.copytree(folder_of("llama3"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    script = f"from {module} import load; m, t = load('smollm2-135m', 'cpu')"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", script + "; print(m.config.vocab_size)"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "272"


def test_model_py_stands_alone(folder_of, tmp_path):
    folder, empty = folder_of("qwen2"), tmp_path / "empty"
    empty.mkdir()
    shutil.copy(ROOT / "model.py", empty)
    script = "import model; m, t = model.load({!r}, 'cpu'); print(m.config.d, model.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.run(
        [sys.executable, "-c", script.format(str(folder))],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == ["32", str(empty / "model.py")]


# ---------------------------------------------------------------------------------------- settings


def test_ranges_of_settings():
    settings = SimpleNamespace(a=1.0, b=0.0, n=2)
    check_ranges(settings, "a", b=0, n=2)
    check_ranges(settings, "")
    with pytest.raises(ValueError, match="b must be above 0, not 0.0"):
        check_ranges(settings, "a b")
    with pytest.raises(ValueError, match="n must be at least 3, not 2"):
        check_ranges(settings, "a", n=3)
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="a must be above 0"):
            check_ranges(SimpleNamespace(a=wrong), "a")
    with pytest.raises(ValueError, match="n must be at least 0, not nan"):
        check_ranges(SimpleNamespace(n=math.nan), "", n=0)


def test_a_text_s_seed_is_the_same_on_every_machine():
    empty = bytes.fromhex("e3b0c44298fc1c14")  # SHA-256 of nothing begins with it
    assert M.text_seed("") == int.from_bytes(empty, "little")
    assert M.text_seed("a") != M.text_seed("b")


# ---------------------------------------------------------------------------------------- tokenizer


def test_chats_render_as_the_template_says(folder_of):
    tokenizer = Tokenizer(folder_of("llama3"))
    rendered = "<|im_start|>user\nhéllo<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render("héllo") == rendered
    ids = tokenizer.chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    assert ids[0] == 256 and ids.count(257) == 2
    system, user = "<|im_start|>system\na<|im_end|>\n", "<|im_start|>user\nb<|im_end|>\n"
    assert tokenizer.decode(ids) == system + user + "<|im_start|>assistant\n"
    assert tokenizer.encode("ab") == [tokenizer.core.token_to_id(token) for token in "ab"]


# Features that published templates use, and what they render for one user message, a < "é".
TEMPLATES = [
    (
        "{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}",
        '<|im_start|>|<|im_end|>|a < "é"',
    ),
    ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
    ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a < \\"é\\""}'),
    ("{%- if tools is none and not documents %}\n    none\n{%- endif %}\n", "    none"),
    ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
    (
        "{% set ns = namespace(x=1) %}{% for m in 'ab' %}{% set ns.x = 5 %}{% endfor %}{{ ns.x }}",
        "5",
    ),
    ("{{ 'off' if enable_thinking is defined and not enable_thinking else 'on' }}", "off"),
    ("{{ strftime_now('%Y') | length }}", "4"),
]


@pytest.mark.parametrize("template, expected", TEMPLATES)
def test_template_features(template, expected, tmp_path):
    write_tokenizer(tmp_path, True, template)
    messages = [{"role": "user", "content": 'a < "é"'}]
    assert Tokenizer(tmp_path).render(messages, enable_thinking=False) == expected


def test_the_template_file_goes_before_the_configuration_and_lists_have_a_default(tmp_path):
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_tokenizer(tmp_path, True, several)
    assert Tokenizer(tmp_path).render("x") == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer(tmp_path).render("x") == "file"


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ 1 + 'x' }}", "unsupported operand"),
    ],
)
def test_templates_run_in_the_sandbox_and_may_refuse(template, said, tmp_path):
    write_tokenizer(tmp_path, True, template)
    with pytest.raises(UserError, match=said):
        Tokenizer(tmp_path).chat("x")


def test_templates_that_are_missing_or_do_not_parse_are_a_line(tmp_path):
    write_tokenizer(tmp_path, True, "{% if %}")
    with pytest.raises(UserError, match="the chat template does not parse"):
        checkpoint.check_tokenizer(tmp_path)
    write_tokenizer(tmp_path, True, None)
    with pytest.raises(UserError, match="no chat template .a base model.*: use an instruct"):
        Tokenizer(tmp_path).chat("x")


def test_a_chat_opens_with_thinking_where_the_model_has_a_token_for_it(tmp_path):
    for template, thinking, expected in (
        ("{{ messages[0].content }}:", True, "x:<think>\n"),
        ("{{ messages[0].content }}:", False, "x:"),
        ("{{ messages[0].content }}:<think>\n", True, "x:<think>\n"),
        ("{{ messages[0].content }}:<think>\n\n</think>\n\n", True, "x:<think>\n"),
        ("{{ date_string }}:", False, "26 Jul 2024:"),
    ):
        write_tokenizer(tmp_path, thinking, template)
        assert Tokenizer(tmp_path).open("x").rstrip("\n") == expected.rstrip("\n")


def test_a_thought_is_split_from_what_is_said():
    assert M.split_thought("<think>\na b\n</think>\n\nc ") == ("a b", "c")
    assert M.split_thought("a</think>b</think>c") == ("a</think>b", "c")
    assert M.split_thought(" c ") == ("", "c")


def test_prompts_must_fit_context_and_vocabulary(folder_of):
    model, _ = load(str(folder_of("qwen2")), "cpu")
    check_prompt(model.config, [271] * 63)
    with pytest.raises(UserError, match="the prompt has 64 tokens, the context window 64"):
        check_prompt(model.config, [1] * 64)
    with pytest.raises(UserError, match=r"window 64 \(of the question 'Why\?'\): shorten it"):
        check_prompt(model.config, [1] * 64, "Why?")
    with pytest.raises(UserError, match="gives id 272, the model has 272"):
        check_prompt(model.config, [272])
