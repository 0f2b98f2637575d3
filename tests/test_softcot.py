"""softcot.py: positions, hidden states, loss and gradient, LoRA, training that can be interrupted, evaluation, mistakes.

golden/softcot.json holds what `transformers` computes for the same sequences: the assistant's hidden states, the loss,
and its gradient with respect to the projection.  It was made by `python tests/test_softcot.py` (transformers 5.23.0,
float32, eager attention; checkpoints golden/qwen3 and golden/llama2), which builds ids, embeddings and labels by itself
and shares nothing with softcot.py.
"""

import errno
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, record_steps, write_tokenizer
from safetensors.torch import load_file, save_file

import softcot
import tasks
from model import Tokenizer, UserError, load
from softcot import (
    Settings,
    Way,
    answers,
    assistant_ids,
    build,
    checkpointed,
    epoch_order,
    hidden_after,
    hidden_states,
    input_embeddings,
    lora_hooks,
    lora_merged,
    lora_name,
    lora_start,
    main,
    negative_log_likelihood,
    placeholder,
    prompt_texts,
    sequence,
    soft_thoughts,
    target_text,
    vote,
)

OTHER = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} <|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}[assistant]{% endif %}")
PAIRS = [("qwen3", "llama2"), ("llama3", "qwen2"), ("mistral", "qwen3"), ("qwen2", "llama-bias")]


def lengthen(folder):
    """The golden models' context is 64, less than one question of bytes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.fixture
def pair(folder_of):
    """pair("qwen3", "llama2"): an LLM's and an assistant's folder, with different templates, context 512."""

    def make(llm="qwen3", assistant="llama2", thinking=True):
        folders = lengthen(folder_of(llm, thinking, "llm")), lengthen(folder_of(assistant, False, "assistant"))
        write_tokenizer(folders[1], False, OTHER)
        return [str(folder) for folder in folders]

    return make


@pytest.fixture
def loaded(pair):
    def make(*families, **options):
        return *load((folders := pair(*families, **options))[0], "cpu", "float32"), *load(folders[1], "cpu", "float32")

    return make


PROBLEMS = [("1+1?", "2", ["1+1=2."]), ("2*3+1?", "7", ["2*3=6.", "6+1=7."]), ("9-4?", "5", ["9-4=5."]),
            ("8/2?", "4", ["8/2=4."]), ("What is 3+3?", "6", ["3+3=6."]), ("5*5?", "25", ["5*5=25."]), ("7?", "7", ["It is 7."]),
            ("6-6+1?", "1", ["6-6=0.", "0+1=1."])]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a, "steps": s}) + "\n" for q, a, s in PROBLEMS))
    return str(path)


def sequences_of(tokenizer, n, count=3):
    return [sequence(tokenizer, q, n, tokenizer.encode(" ".join(s))) for q, _, s in PROBLEMS[:count]]


def states(assistant, tokenizer, questions, n, **options):
    ids = [assistant_ids(tokenizer, q, n) for q in questions]
    return hidden_states(assistant, ids, n, torch.empty(len(ids), n, assistant.config.d), **options)


# ---------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("llm, assistant", PAIRS)
def test_thoughts_stand_where_the_placeholders_would_and_nothing_else_changes(llm, assistant, thinking, loaded):
    model, tokenizer, small, its = loaded(llm, assistant, thinking=thinking)
    assert tokenizer.render("x") != its.render("x")
    question, n = "Why ✓ 2<3?", 3
    way = Way("softcot", n, dict(torch.nn.Linear(32, 32).named_parameters()), (small, its))
    prompt, text, thoughts = build(model, tokenizer, way, question)
    # The plain prompt, made in one piece: the placeholders' text in the question.
    unk = placeholder(tokenizer)
    whole = tokenizer.render(f"{question}\n" + tokenizer.decode([unk]) * n) + ("<think>\n" if thinking else "")
    ids = tokenizer.encode(whole)
    plain = model.embed(torch.tensor(ids))
    first = len(tokenizer.encode(whole[: whole.index(question) + len(question)] + "\n"))
    assert ids[first : first + n] == [unk] * n
    changed = (prompt.embeds != plain).any(-1).nonzero()[:, 0].tolist()
    assert changed == list(range(first, first + n))
    assert torch.equal(prompt.embeds[first : first + n], thoughts)
    assert text.replace(f"<{n} soft thoughts>", tokenizer.decode([unk]) * n) == whole
    # Without a projection (CoT-Unk as it is) the prompt is the plain one.
    assert torch.equal(build(model, tokenizer, Way("cot-unk", n, {}), question)[0].embeds, plain)


def test_no_thoughts_are_the_plain_question(loaded):
    model, tokenizer, small, its = loaded()
    trained = dict(torch.nn.Linear(32, 32).named_parameters())
    asked = [build(model, tokenizer, way, "Why?")[0].embeds
             for way in (Way("softcot", 0, trained, (small, its)), Way("cot-unk", 0, {}), Way("zero-shot-cot", 0, {}))]
    plain = model.embed(torch.tensor(tokenizer.chat("Why?") + tokenizer.encode("<think>\n")))
    assert all(torch.equal(x, plain) for x in asked)


def test_the_placeholder_is_unk_or_what_the_tokenizer_has(folder_of):
    folder = folder_of("qwen2")
    tokenizer = Tokenizer(folder)
    assert placeholder(tokenizer) == 257  # the end of a turn: it has nothing else
    tokenizer.special["pad_token"] = "<|im_start|>"
    assert placeholder(tokenizer) == 256
    tokenizer.core.add_tokens(["[UNK]"])
    assert tokenizer.decode([placeholder(tokenizer)]) == "[UNK]"
    tokenizer.special = {}
    tokenizer.core = Tokenizer(folder).core
    with pytest.raises(UserError, match="has no"):
        placeholder(tokenizer)


def test_a_template_that_hides_the_message_or_already_closed_the_thought(folder_of):
    folder = folder_of("qwen2")
    write_tokenizer(folder, True, "{{ messages[0]['content'] | upper }}{{ messages[0]['content'] }}{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="repeat"):
        prompt_texts(Tokenizer(folder), "a", 2)
    write_tokenizer(folder, True, "{{ messages[0]['content'] }} <think>\n\n</think>\n\n")
    assert prompt_texts(Tokenizer(folder), "a", 2) == ("a\n", " <think>\n")


def test_labels_start_right_after_the_prompt(folder_of):
    tokenizer = Tokenizer(folder_of("qwen2"))
    labels = tokenizer.encode("6</think>7") + [257]
    s = sequence(tokenizer, "Why?", 4, labels)
    assert s.ids[s.prompt :] == labels and s.prompt == len(tokenizer.encode(prompt_texts(tokenizer, "Why?", 0)[0])) + 1 + 4  # \n
    assert s.ids[: s.prompt] == s.left + [s.unk] * 4 + s.right


def test_targets_follow_the_prompt_s_form(folder_of):
    thinking, plain = Tokenizer(folder_of("qwen2")), Tokenizer(folder_of("qwen2", False, "plain"))
    problem = tasks.Problem("x", "q", "7", "number", steps=["2*3=6.", "6+1=7."])
    assert target_text(thinking, problem, False) == "2*3=6. 6+1=7.</think>The answer is 7."
    assert target_text(plain, problem, True) == "2*3=6.\n6+1=7.\nThe answer is \\boxed{7}."
    assert tasks.extract(target_text(plain, problem, True), "number") == "7"


# ------------------------------------------------------------------------------------------ hidden states, loss, gradient


@pytest.mark.parametrize("llm, assistant", PAIRS)
def test_hidden_states_are_the_final_norm_s_at_the_placeholders(llm, assistant, loaded):
    _, _, small, its = loaded(llm, assistant)
    questions = [q for q, _, _ in PROBLEMS]
    seen = []
    handle = small.norm.register_forward_hook(lambda module, inputs, out: seen.append(out[0]))
    direct = []
    for q in questions:
        text = its.render(f"Note the steps.\n{q}\n", date_string="26 Jul 2024")  # trimmed by this template
        ids = its.encode(text[: text.index(q) + len(q)] + "\n") if "[assistant]" in text else None
        small(small.embed(torch.tensor([ids + [placeholder(its)] * 3])))
        direct.append(seen[-1][len(ids) : len(ids) + 3])
    handle.remove()
    for batch_tokens in (1, 150, 10**6):  # alone, in a few batches, all in one
        assert torch.allclose(states(small, its, questions, 3, batch_tokens=batch_tokens), torch.stack(direct), atol=1e-4)


def test_the_first_rows_of_many_placeholders_are_those_of_few(loaded):
    _, _, small, its = loaded()
    assert torch.allclose(states(small, its, ["a", "bc"], 8)[:, :3], states(small, its, ["a", "bc"], 3), atol=1e-5)


def test_the_loss_is_the_sum_over_labels_of_a_slow_computation(loaded):
    model, tokenizer, small, its = loaded()
    sequences = sequences_of(tokenizer, 3)
    h, trained = states(small, its, [q for q, _, _ in PROBLEMS[:3]], 3), dict(torch.nn.Linear(32, 32).named_parameters())
    expected = 0.0
    for i, s in enumerate(sequences):
        left, rest = model.embed(torch.tensor(s.left)), model.embed(torch.tensor(s.right + s.labels))
        e = torch.cat([left, h[i] @ trained["weight"].T + trained["bias"], rest])
        log_p = model.logits(model(e[None])[0]).log_softmax(-1)
        for k, y in enumerate(s.labels):
            expected -= log_p[len(s.left) + 3 + len(s.right) + k - 1, y]
    together = negative_log_likelihood(model, sequences, soft_thoughts(trained, h, 3, 3))
    assert torch.allclose(together, expected, rtol=1e-5)
    # What stands beside a row, hence the padding, does not matter: neither for the loss nor for the gradient.
    alone = sum(negative_log_likelihood(model, [s], soft_thoughts(trained, h[i : i + 1], 1, 3)) for i, s in enumerate(sequences))
    assert torch.allclose(together, alone, rtol=1e-5)
    g, g_alone = (torch.autograd.grad(x, trained["weight"])[0] for x in (together, alone))
    assert torch.allclose(g, g_alone, rtol=1e-4, atol=1e-4 * g.abs().max())


@pytest.mark.parametrize("family", ["qwen3", "llama3", "llama2", "mistral", "qwen2-yarn", "llama-bias"])
def test_positions_before_the_first_thought_are_computed_without_autograd(family, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "float32")
    embeds = model.embed(torch.randint(0, 250, (2, 20)))
    for L in (0, 1, 7, 19):
        before, after = embeds[:, :L].clone().requires_grad_(), embeds[:, L:].clone().requires_grad_()
        x = torch.cat([before, after], 1)
        expected, found = model(x)[:, L:], hidden_after(model, x, L)
        assert torch.allclose(found, expected, atol=1e-4)
        g, g_found = (torch.autograd.grad(y.square().sum(), after)[0] for y in (expected, found))
        assert torch.allclose(g, g_found, rtol=1e-3, atol=1e-3 * g.abs().max())
        assert not L or not torch.autograd.grad(hidden_after(model, x, L).square().sum(), before)[0].any()
        with checkpointed(model):
            assert torch.equal(torch.autograd.grad(hidden_after(model, x, L).square().sum(), after)[0], g_found)
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize("llm, assistant", PAIRS)
def test_the_gradient_is_a_finite_difference(llm, assistant, loaded):
    model, tokenizer, small, its = loaded(llm, assistant)
    model, small = model.double(), small.double()
    sequences = sequences_of(tokenizer, 2, 2)
    h = states(small, its, [q for q, _, _ in PROBLEMS[:2]], 2).double()
    torch.manual_seed(0)
    trained = {name: p.double().detach().requires_grad_() for name, p in torch.nn.Linear(32, 32).named_parameters()}

    def loss(weight, bias):
        return negative_log_likelihood(model, sequences, soft_thoughts({"weight": weight, "bias": bias}, h, 2, 2))

    gradients = torch.autograd.grad(loss(**trained), trained.values())
    for _ in range(3):
        directions = [torch.randn_like(g) for g in gradients]
        up, down = (loss(*(p + sign * 1e-6 * v for p, v in zip(trained.values(), directions))) for sign in (1, -1))
        expected = sum((g * v).sum() for g, v in zip(gradients, directions))
        assert (up - down).item() / 2e-6 == pytest.approx(expected.item(), rel=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in (*model.parameters(), *small.parameters()))


QUESTIONS, TARGETS, N = ["What is 17 * 24?", "Why?"], ["17*24=408.</think>The answer is 408.", "No."], 3


def golden_projection():
    w = torch.arange(32 * 32, dtype=torch.float32).view(32, 32)
    return torch.sin(w) / 5, torch.cos(torch.arange(32.0)) / 5


def test_hidden_states_loss_and_gradient_are_those_of_transformers(loaded):
    expected = json.loads((GOLDEN / "softcot.json").read_text())
    model, tokenizer, small, its = loaded()
    h = states(small, its, QUESTIONS, N)
    assert torch.allclose(h, torch.tensor(expected["hidden"]), atol=2e-5)
    sequences = [sequence(tokenizer, q, N, tokenizer.encode(y) + [257]) for q, y in zip(QUESTIONS, TARGETS)]
    weight, bias = (x.requires_grad_() for x in golden_projection())
    thoughts = soft_thoughts({"weight": weight, "bias": bias}, h, 2, N)
    sums = input_embeddings(model, sequences, thoughts).sum(-1)[0]
    assert torch.allclose(sums, torch.tensor(expected["embedding_sums"]), atol=1e-4)
    loss = negative_log_likelihood(model, sequences, thoughts) / sum(len(s.labels) for s in sequences)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    for gradient, value in ((weight.grad, expected["weight_gradient"]), (bias.grad, expected["bias_gradient"])):
        value = torch.tensor(value)
        assert (gradient - value).abs().max() < 1e-4 * value.abs().max()


def make_golden():
    import tempfile

    import transformers
    from tokenizers import Tokenizer as Core

    def opened(family):
        return transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / family, dtype=torch.float32,
                                                                 attn_implementation="eager").eval()

    llm, assistant = opened("qwen3"), opened("llama2")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), True)
        encode = Core.from_file(f"{folder}/tokenizer.json").encode
        write_tokenizer(Path(folder), False)
        encode_small = Core.from_file(f"{folder}/tokenizer.json").encode
    end = "<|im_end|>"
    weight, bias = (x.requires_grad_() for x in golden_projection())
    hidden, total, count, sums = [], 0.0, 0, None
    for q, y in zip(QUESTIONS, TARGETS):
        ids = encode_small(f"<|im_start|>[user] Note the steps.\n{q}\n{end * N}").ids
        with torch.no_grad():
            hidden.append(assistant(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -N:])
        ids = encode(f"<|im_start|>user\n{q}\n{end * N}{end}\n<|im_start|>assistant\n<think>\n{y}{end}").ids
        labels = [-100] * (len(ids) - len(encode(y + end).ids)) + encode(y + end).ids
        at = ids.index(257)
        embeds = llm.get_input_embeddings()(torch.tensor([ids])).detach().clone()
        embeds[0, at : at + N] = hidden[-1] @ weight.T + bias
        sums = embeds[0].sum(-1).tolist() if sums is None else sums
        n = sum(x >= 0 for x in labels)
        total, count = total + llm(inputs_embeds=embeds, labels=torch.tensor([labels])).loss * n, count + n
    (total / count).backward()
    golden = {"hidden": torch.stack(hidden).tolist(), "embedding_sums": sums, "loss": (total / count).item(),
              "weight_gradient": weight.grad.tolist(), "bias_gradient": bias.grad.tolist()}
    rounded = json.loads(json.dumps(golden), parse_float=lambda x: float(f"{float(x):.7g}"))
    (GOLDEN / "softcot.json").write_text(json.dumps(rounded) + "\n")


# --------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_begins_as_nothing_and_merged_is_what_the_hooks_compute(loaded):
    model = loaded()[0]
    torch.manual_seed(0)
    trained = lora_start(model, 4)
    x = model.embed(torch.randint(0, 250, (2, 20)))
    plain = model(x)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad(), lora_hooks(model, trained, 2.0, 0.1):
        assert torch.equal(model(x), plain)
    with lora_merged(model, trained, 2.0):
        assert torch.equal(model(x), plain)
    for name in trained:
        trained[name] = torch.randn_like(trained[name]) * 0.2
    with torch.no_grad(), lora_hooks(model, trained, 2.0, 0.1):  # without gradients there is no dropout
        hooked = model(x)
    with lora_merged(model, trained, 2.0):
        assert torch.allclose(model(x), hooked, atol=1e-4) and not torch.allclose(hooked, plain, atol=1e-2)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {f"blocks.{i}.attention.qkv.weight" for i in range(2)}
        q, kv = 4 * 16, 2 * 16
        name = "blocks.0.attention.qkv.weight"
        assert torch.equal(model.get_parameter(name)[q : q + kv], before[name][q : q + kv])  # k
    assert torch.equal(model(x), plain) and all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_lora_s_dropout_is_in_force_while_training(loaded):
    model, _, _, _ = loaded()
    trained = {name: torch.randn_like(x).requires_grad_() for name, x in lora_start(model, 4).items()}
    x = model.embed(torch.randint(0, 250, (1, 20)))
    with lora_hooks(model, trained, 2.0, 0.5):
        assert not torch.equal(model(x), model(x))
        model(x).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in trained.values())


# ----------------------------------------------------------------------------------------------------------- training


def trains(pair_of_folders, data, folder, *more, method="softcot", epochs=2):
    """Five problems to learn from, three held out; settings under which a step changes something."""
    return main(["train", "--model", pair_of_folders[0], "--assistant", pair_of_folders[1], "--device", "cpu",
                 "--dtype", "float32", "--data", data, "--folder", str(folder), "--method", method, "--thoughts", "2",
                 "--lr", "0.01", "--epochs", str(epochs), "--batch-size", "2", "--dev", "3", "--dev-limit", "2",
                 "--max-new-tokens", "4", "--rank", "2", "--dropout", "0.3", *more])


def outcome(folder):
    """All tensors by file, and the log without speeds."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors") if path.name != "hidden.safetensors"}
    return files, [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in log]


def assert_same(a, b):
    (files, log), (others, other_log) = outcome(a), outcome(b)
    assert log == other_log and files.keys() == others.keys()
    for name, tensors in files.items():
        assert tensors.keys() == others[name].keys() and all(torch.equal(x, others[name][k]) for k, x in tensors.items()), name


def test_an_epoch_s_order_is_a_function_of_seed_and_epoch():
    lengths, s = [(i * 37) % 91 for i in range(103)], Settings(batch_size=4, accumulate=2)
    orders = [epoch_order(lengths, epoch, s) for epoch in (0, 1)]
    assert orders[0] == epoch_order(lengths, 0, s) != orders[1] != epoch_order(lengths, 1, Settings(seed=1, accumulate=2))
    for order in orders:
        assert sorted(i for step in order for i in step) == list(range(103)) and len(order) == 13
        assert sorted(map(len, order)) == [7, *[8] * 12]
        spread = [max(of := [lengths[i] for i in step]) - min(of) for step in order]
        assert sum(spread) / len(spread) < 20  # of 90: batches hold what is of similar length


def test_training_lowers_the_loss_and_keeps_best_and_last(pair, data, tmp_path):
    folder = tmp_path / "run"
    assert trains(pair(), data, folder, epochs=6) == 0
    log = outcome(folder)[1]
    dev = {line["step"]: line["dev_loss"] for line in log if "dev_loss" in line}
    assert sorted(dev) == [0, 3, 6, 9, 12, 15, 18] and dev[18] < dev[0]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 19))
    assert all(line.keys() == {"step", "epoch", "loss", "gradient_norm", "lr"} for line in log if "loss" in line)
    assert [line["lr"] for line in log if "loss" in line] == pytest.approx([0.01 * (18 - i) / 18 for i in range(18)])
    tensors, about = softcot.read_tensors(folder / "projection.safetensors")
    assert int(about["step"]) == min(dev, key=dev.get) and float(about["loss"]) == min(dev.values())
    assert {"model", "assistant", "d", "d_a", "thoughts", "task", "prompt_version", "settings"} <= about.keys()
    assert (about["d"], about["d_a"], about["thoughts"], about["method"]) == ("32", "32", "2", "softcot")
    _, about = softcot.read_tensors(folder / "last.safetensors")
    assert int(about["step"]) == 18
    assert tensors["weight"].dtype == torch.float32 and tensors["weight"].shape == (32, 32)


def test_warm_up_rises_then_falls(pair, data, tmp_path):
    assert trains(pair(), data, tmp_path / "run", "--warmup", "2") == 0
    rates = [line["lr"] for line in outcome(tmp_path / "run")[1] if "lr" in line]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("method", ["softcot", "cot-unk", "lora"])
def test_interrupted_anywhere_and_continued_is_as_undisturbed_to_the_bit(method, pair, data, tmp_path, monkeypatch):
    folders = pair()
    assert trains(folders, data, tmp_path / "whole", method=method) == 0
    for place in (1, 3, 4, 6, 8):  # log lines before the interruption: in the first validation, in steps, at an epoch's end
        written, append = [0], tasks.append

        def interrupting(path, record, written=written, append=append, place=place):
            if written[0] == place:
                raise KeyboardInterrupt
            written[0] += 1
            append(path, record)

        folder = tmp_path / f"cut{place}"
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "append", interrupting)
            assert trains(folders, data, folder, "--save-every", "2", method=method) == 130
        (folder / "log.jsonl").open("a").write('{"step": 1, "lo')  # what a kill leaves
        assert trains(folders, data, folder, method=method) == 0
        assert_same(tmp_path / "whole", folder)
    assert trains(folders, data, folder, method=method) == 0  # finished: nothing is done again
    assert_same(tmp_path / "whole", folder)


def test_killed_and_continued_is_as_undisturbed(pair, data, tmp_path):
    folders = pair()
    assert trains(folders, data, tmp_path / "whole", "--dtype", "bfloat16", epochs=60) == 0
    code = ("import sys; sys.path[:0] = ['tests']; from test_softcot import trains;"
            "trains(sys.argv[1:3], sys.argv[3], sys.argv[4], '--save-every', '1', '--dtype', 'bfloat16', epochs=60)")
    command = [sys.executable, "-c", code, *folders, data, str(tmp_path / "cut")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 20:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert trains(folders, data, tmp_path / "cut", "--dtype", "bfloat16", epochs=60) == 0
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_accumulated_passes_are_one_batch_and_checkpointing_changes_nothing(pair, data, tmp_path):
    folders = pair()
    for name, more in (("one", "--batch-size 4"), ("two", "--accumulate 2"), ("again", "--batch-size 4 --checkpointing")):
        assert trains(folders, data, tmp_path / name, *more.split()) == 0
    (one, log), (two, _), (again, again_log) = (outcome(tmp_path / name) for name in ("one", "two", "again"))
    assert all(torch.allclose(x, two["last.safetensors"][k], atol=1e-4) for k, x in one["last.safetensors"].items())
    assert all(torch.equal(x, again["last.safetensors"][k]) for k, x in one["last.safetensors"].items())
    assert log == again_log


def test_checkpointing_draws_the_same_dropout(pair, data, tmp_path):
    folders = pair()
    assert trains(folders, data, tmp_path / "a", method="lora") == 0
    assert trains(folders, data, tmp_path / "b", "--checkpointing", method="lora") == 0
    assert_same(tmp_path / "a", tmp_path / "b")


def test_hidden_states_in_a_file_train_the_same_and_are_found_again(pair, data, tmp_path, monkeypatch):
    folders = pair()
    assert trains(folders, data, tmp_path / "memory") == 0
    monkeypatch.setattr(softcot, "CACHE_LIMIT", 0)
    assert trains(folders, data, tmp_path / "file") == 0
    assert_same(tmp_path / "memory", tmp_path / "file")
    kept = load_file(tmp_path / "file" / "hidden.safetensors")["hidden"]
    assert kept.shape == (8, 2, 32) and not list((tmp_path / "file").glob("*.part"))
    monkeypatch.setattr(softcot, "hidden_states", None)  # not needed a second time
    assert trains(folders, data, tmp_path / "file") == 0

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert trains(folders, data, tmp_path / "other") == 2


def test_one_folder_has_one_training(pair, data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert trains(pair(), data, tmp_path / "run") == 2
    assert "another training writes to" in (error := capsys.readouterr().err) and error.count("\n") == 1
    os.close(handle)


def test_other_settings_or_data_in_a_folder_are_refused(pair, data, tmp_path, capsys):
    folders = pair()
    assert trains(folders, data, tmp_path / "run") == 0
    capsys.readouterr()
    assert trains(folders, data, tmp_path / "run", "--seed", "1", "--lr", "0.5") == 2
    assert "lr is 0.01 there and 0.5 here, seed is 0 there and 1 here" in capsys.readouterr().err
    Path(data).write_text(Path(data).read_text().replace("1+1=2.", "1+1=2!"))
    assert trains(folders, data, tmp_path / "run") == 2
    assert "data is " in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_and_says_where(pair, data, tmp_path, capsys, monkeypatch):
    folders = pair()
    real = softcot.negative_log_likelihood
    calls = []

    def failing(model, sequences, thoughts):
        calls.append(torch.is_grad_enabled())
        return real(model, sequences, thoughts) * (math.nan if sum(calls) == 5 else 1)  # the fifth step

    monkeypatch.setattr(softcot, "negative_log_likelihood", failing)
    assert trains(folders, data, tmp_path / "run", "--save-every", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"the loss is nan .* step 5 \(epoch 2, problems data-0000\d[^)]*\): .* keeps step 3; lower --lr", error)
    tensors, about = softcot.read_tensors(tmp_path / "run" / "last.safetensors")
    assert about["step"] == "3" and all(x.isfinite().all() for x in tensors.values())
    monkeypatch.setattr(softcot, "negative_log_likelihood", real)
    assert trains(folders, data, tmp_path / "run") == 0 and trains(folders, data, tmp_path / "whole") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_is_one_line_and_harms_nothing(pair, data, tmp_path, capsys, monkeypatch):
    folders = pair()
    assert trains(folders, data, tmp_path / "whole") == 0
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert trains(folders, data, tmp_path / "run") == 2
    assert re.search(r"softcot.py: cannot write .*: No space left on device", capsys.readouterr().err.splitlines()[-1])
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert trains(folders, data, tmp_path / "run") == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_lora_s_files_are_in_peft_s_format(pair, data, tmp_path):
    assert trains(pair(), data, tmp_path / "run", method="lora") == 0
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 32.0)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2 and tensors[lora_name(0, "q", "A")].shape == (2, 32)
    assert tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].shape == (32, 2)


# --------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def projection(pair, data, tmp_path):
    folders = pair()
    assert trains(folders, data, tmp_path / "run", epochs=1) == 0
    return folders, str(tmp_path / "run" / "projection.safetensors")


def evaluates(folders, data, *more):
    return main(["eval", "--model", folders[0], "--assistant", folders[1], "--device", "cpu", "--dtype", "float32",
                 "--data", data, "--max-new-tokens", "5", "--limit", "3", *more])


def records(path):
    return {(r["problem"], r["method"], r["sample"]): {k: v for k, v in r.items() if k != "seconds"}
            for r in map(json.loads, Path(path).read_text().splitlines())}


def test_every_method_with_votes_and_seeds_goes_on_where_it_was_cut(projection, data, tmp_path, capsys):
    folders, file = projection
    lora, unk, out, table = (tmp_path / name for name in ("lora", "unk", "out.jsonl", "table.json"))
    assert trains(folders, data, lora, method="lora") == 0 and trains(folders, data, unk, method="cot-unk") == 0
    arguments = ["--projection", file, "--lora", str(lora), "--prompt", str(unk / "prompt.safetensors"), "--num-samples", "3",
                 "--seeds", "2", "--temperature", "1.5", "--output", str(out), "--json", str(table)]
    capsys.readouterr()
    assert evaluates(folders, data, *arguments) == 0
    assert "mean ± standard deviation" in capsys.readouterr().out
    methods = ["zero-shot-cot", "cot-unk", "assist-cot", "softcot", "lora"]
    result = json.loads(table.read_text())
    assert [row["method"] for row in result["methods"]] == methods == list(result["seeds"])
    assert all(len(row["accuracies"]) == 2 for row in result["seeds"].values())
    whole = records(out)
    assert len(whole) == 3 * 5 * 2 and all(len(r["answers"]) == len(r["texts"]) == 3 for r in whole.values())
    assert "Hint: " in whole["data-00000", "assist-cot", 0]["prompt"]
    assert "<2 soft thoughts>" in whole["data-00000", "softcot", 1]["prompt"]
    assert whole["data-00000", "softcot", 0]["texts"] != whole["data-00000", "softcot", 1]["texts"]
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:13]) + "\n" + lines[13][:50])
    assert evaluates(folders, data, *arguments, "--batch-size", "2") == 0
    assert records(out) == whole
    capsys.readouterr()
    assert evaluates(folders, data, *arguments, "--thoughts", "1") == 2
    assert "thoughts is 2 there and 1 here" in capsys.readouterr().err


def test_several_numbers_of_thoughts_and_several_assistants_are_a_row_each(projection, data, tmp_path, capsys):
    folders, file = projection
    table = tmp_path / "table.json"

    def rows(folders, *more):
        assert evaluates(folders, data, "--json", str(table), *more) == 0
        return [row["method"] for row in json.loads(table.read_text())["methods"]]

    capsys.readouterr()
    numbers = rows(folders, "--projection", file, "--methods", "zero-shot-cot,softcot", "--thoughts", "0,1,4")
    assert numbers == ["zero-shot-cot", "softcot 0", "softcot 1", "softcot 4"]
    assert "softcot 4: trained with 2 thoughts, answers with 4" in capsys.readouterr().err
    files = f"{file},{Path(file).parent / 'last.safetensors'}"
    twice = [folders[0], f"{folders[1]},{folders[1]}"]
    assert rows(twice, "--projection", files, "--methods", "softcot") == ["softcot #1", "softcot #2"]


def test_an_answer_does_not_depend_on_its_neighbours_and_steps_can_be_replayed(loaded, monkeypatch):
    model, tokenizer, small, its = loaded()
    torch.manual_seed(1)
    way = Way("softcot", 2, dict(torch.nn.Linear(32, 32).named_parameters()), (small, its))
    problems = [tasks.Problem(q, q, a, "number") for q, a, _ in PROBLEMS]
    jobs = [(p, sample) for p in problems for sample in range(2)]

    def texts(jobs, rows=5):
        return {(p.id, sample): r["texts"] for p, sample, r in
                answers(model, tokenizer, way, jobs, tasks.TASKS["tiny"], 2, 1.0, 6, 0, rows)}

    many = texts(jobs)
    assert len(many) == 16 and len({str(t) for t in many.values()}) > 8
    for job in jobs[::5]:
        assert texts([job]) == {(job[0].id, job[1]): many[job[0].id, job[1]]}
    replays = record_steps(monkeypatch)
    assert texts(jobs) == many and len(replays) > 10


def test_the_majority_of_equal_answers_wins():
    problem = tasks.Problem("x", "q", "7", "number")
    assert vote([None, "7", "8", "8.0", "1"], problem, 0) == 2
    assert vote(["5", "7"], problem, 0) == 0 and vote([None, None], problem, 0) == 0 and vote([None, "3"], problem, 0) == 1


def test_without_arguments_it_answers_one_problem_twice(projection, monkeypatch, capsys):
    folders, file = projection
    monkeypatch.setattr(softcot, "BUNDLED", Path("/nowhere/softcot.safetensors"))
    assert main([]) == 2
    assert "softcot needs a projection, --projection FILE: make one with `python softcot.py train" in (error := capsys.readouterr().err) and error.count("\n") == 1
    monkeypatch.setattr(softcot, "BUNDLED", Path(file))
    monkeypatch.setattr(softcot, "TINY", folders[0])
    monkeypatch.setattr(softcot, "TINY_ASSISTANT", folders[1])
    assert main(["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^without +with 2 soft thoughts$", printed, re.MULTILINE)
    assert f"the right answer is {tasks.load('tiny', limit=1)[0].answer}" in printed
    assert len(re.findall(r"^ +\d  norm +\d+\.\d\d  (?:'.*' [+-]0\.\d\d *){3}$", printed, re.MULTILINE)) == 2


def test_whispers_name_the_nearest_tokens(loaded):
    model, tokenizer, _, _ = loaded()
    E = model.embed.weight
    (line,) = softcot.whispers(model, tokenizer, 2 * E[40:41], 1)
    norm = (2 * E[40].norm() / E.norm(dim=1).mean()).item()
    assert line == f"  1  norm {norm:7.2f}  {tokenizer.decode([40])!r} +1.00"


# ------------------------------------------------------------------------------------------------------------ mistakes


def said(arguments, capsys):
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    error = re.sub(r"^.*it/s.*\r?\n", "", capsys.readouterr().err, flags=re.MULTILINE)  # a progress bar
    assert code == 2 and error.count("\n") == 1 and error.startswith("softcot.py: "), error
    return error


@pytest.mark.parametrize("arguments, expected", [
    (["train"], "the following arguments are required: --folder"),
    (["train", "--folder", "F", "--lr", "0"], "--lr must be above 0, not 0.0"),
    (["train", "--folder", "F", "--thoughts", "0"], "--thoughts must be at least 1, not 0"),
    (["train", "--folder", "F", "--dropout", "1"], "--dropout must be at least 0 and below 1"),
    (["train", "--folder", "F", "--method", "coconut"], "invalid choice: 'coconut'"),
    (["train", "--folder", "F", "--save-every", "0"], "--save-every must be at least 1"),
    (["train", "--folder", "/proc/nowhere/x"], "cannot use the folder /proc/nowhere/x"),
    (["train", "--folder", "F", "--thoughts", "600"], "0 of 8 problems fit the context windows with 600 thoughts"),
    (["train", "--folder", "F", "--limit", "3"], "--dev holds out 200"),
    (["eval", "--methods", "softcot,coconut"], "--methods: no method 'coconut'; there are zero-shot-cot"),
    (["eval", "--methods", "softcot"], "softcot needs a projection, --projection FILE"),
    (["eval", "--methods", "lora"], "--methods lora needs --lora FOLDER"),
    (["eval", "--methods", "lora", "--lora", "/nowhere"], "no file /nowhere/adapter_model.safetensors"),
    (["eval", "--methods", "softcot", "--projection", "/nowhere/x"], "no file /nowhere/x"),
    (["eval", "--methods", "softcot", "--projection", "DATA"], "is no safetensors file, or damaged"),
    (["eval", "--thoughts", "1,x"], "--thoughts takes numbers from 0 on"),
    (["eval", "--methods", "cot-unk", "--thoughts", "500"], "the context window 512 (of the question"),
    (["eval", "--num-samples", "3", "--temperature", "0"], "greedy answers are the same"),
    (["eval", "--seeds", "3"], "greedy answers are the same"),
    (["eval", "--temperature", "-1"], "--temperature must be at least 0"),
    (["eval", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["--question", " "], "the question is empty"),
    (["--question", "Why?"], "the bundled projection is for the bundled models: pass --projection FILE"),
    (["--thoughts", "4"], "unrecognized arguments: --thoughts 4"),
    (["train", "--folder", "F", "--num-samples", "3"], "unrecognized arguments: --num-samples 3"),
    (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, expected, pair, data, tmp_path, capsys):
    folders = pair()
    arguments = [{"F": str(tmp_path / "F"), "DATA": data}.get(x, x) for x in arguments]
    arguments += ["--model", folders[0], "--assistant", folders[1], "--device", "cpu"]
    if arguments[0] in ("train", "eval"):
        arguments += ["--data", data]
    assert expected in said(arguments, capsys)


def test_training_needs_worked_steps(pair, tmp_path, capsys):
    data = tmp_path / "bare.jsonl"
    data.write_text('{"question": "1+1?", "answer": "2"}\n')
    error = said(["train", "--folder", str(tmp_path / "F"), "--data", str(data)], capsys)
    assert "have no worked steps to learn from (data-00000 is the first)" in error


def test_a_projection_of_other_models_widths_or_methods_is_refused(projection, folder_of, data, tmp_path, capsys):
    folders, file = projection
    other = str(lengthen(folder_of("mistral", name="other")))

    def refused(model, assistant, *more):
        return said(["eval", "--model", model, "--assistant", assistant, "--data", data, "--device", "cpu", *more], capsys)

    llm, assistant = folders
    softcot_of = ("--methods", "softcot", "--projection")
    assert (f"was made for {assistant} (width 32) and {llm} (width 32), not for {assistant} (width 32) and {other} (width 32)"
            in refused(other, assistant, *softcot_of, file))
    assert f"not for {other} (width 32) and {llm}" in refused(llm, other, *softcot_of, file)
    assert trains(folders, data, tmp_path / "unk", method="cot-unk", epochs=1) == 0
    prompt = str(tmp_path / "unk" / "prompt.safetensors")
    assert "does not hold what `train --method softcot` makes" in refused(llm, assistant, *softcot_of, prompt)
    more = refused(llm, assistant, "--methods", "cot-unk", "--prompt", prompt, "--thoughts", "3")
    assert "was trained with 2: lower it" in more
    # The same weights in another dtype, from another folder, are the same models.
    moved = folder_of("qwen3", name="moved")
    for name in ("config.json", "tokenizer_config.json"):
        (moved / name).write_text((Path(llm) / name).read_text())
    assert evaluates([str(moved), assistant], data, *softcot_of, file, "--dtype", "bfloat16") == 0


def test_only_files_that_are_for_use_are_used(projection, folder_of, data, tmp_path, capsys):
    folders, file = projection
    state, start = str(Path(file).parent / "state.safetensors"), ["--model", folders[0], "--assistant", folders[1], "--data", data]
    assert "does not hold what `train --method softcot` makes" in said(["eval", *start, "--methods", "softcot", "--projection", state], capsys)
    assert trains(folders, data, tmp_path / "lora", method="lora", epochs=1) == 0
    # A file is that file, not another one of its folder.
    model, _ = load(folders[0], "cpu", "float32")
    here = softcot.identity(folders[0], model, "", None)
    for path, name in ((tmp_path / "lora", "adapter_model.safetensors"), (tmp_path / "lora" / "last.safetensors", "last.safetensors")):
        trained, scale, digest = softcot.read_adapter(path, model, here)
        assert digest == softcot.digest(tmp_path / "lora" / name) and scale == 16
        assert all(torch.equal(trained[k], x) for k, x in load_file(tmp_path / "lora" / name).items())
    # Other weights of the same shapes.
    llm = folder_of("qwen3", name="copied")
    tensors = load_file(llm / "model.safetensors")
    save_file({k: x + 0.01 for k, x in tensors.items()}, llm / "model.safetensors", {"format": "pt"})
    error = said(["eval", "--model", str(llm), "--data", data, "--methods", "lora", "--lora", str(tmp_path / "lora")], capsys)
    assert "adapter_model.safetensors was made for " in error


def test_a_training_that_is_refused_or_finished_touches_nothing(pair, data, tmp_path, capsys, monkeypatch):
    folders = pair()
    for method in ("softcot", "lora"):
        assert trains(folders, data, tmp_path / method, method=method, epochs=1) == 0
    monkeypatch.setattr(softcot, "hidden_states", None)  # the assistant is not asked again
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    for method in ("softcot", "lora"):
        assert trains(folders, data, tmp_path / method, "--alpha", "64", method=method, epochs=1) == 2
        assert "alpha is 32.0 there and 64.0 here" in capsys.readouterr().err
        assert trains(folders, data, tmp_path / method, method=method, epochs=1) == 0
        assert "this training is finished" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


def test_an_overlong_question_is_named_before_anything_is_answered(projection, tmp_path, capsys):
    folders, file = projection
    long = tmp_path / "long.jsonl"
    long.write_text('{"question": "1+1?", "answer": "2"}\n' + json.dumps({"question": "count " + "x" * 600, "answer": "600"}) + "\n")
    error = said(["eval", "--model", folders[0], "--assistant", folders[1], "--data", str(long), "--methods", "softcot",
                  "--projection", file, "--device", "cpu", "--dtype", "float32"], capsys)
    assert "of the question 'count xxx" in error and "the context window 512" in error


def test_a_projection_of_another_prompt_version_is_used_with_a_warning(projection, data, monkeypatch, capsys):
    folders, file = projection
    monkeypatch.setattr(softcot, "PROMPT_VERSION", 2)
    assert evaluates(folders, data, "--projection", file, "--methods", "softcot") == 0
    assert "was trained with prompt version 1, this is 2: expect worse answers" in capsys.readouterr().err


@pytest.mark.parametrize("asked, used", [("gsm8k", "gsm8k-train"), ("tiny", "tiny-train"), ("strategyqa", "strategyqa")])
def test_training_on_a_task_uses_its_training_set(asked, used, monkeypatch, capsys):
    def load(name, data, limit):
        raise tasks.UserError(f"loading {name}.")

    monkeypatch.setattr(tasks, "load", load)
    assert f"loading {used}." in said(["train", "--task", asked, "--folder", "/nowhere"], capsys)


if __name__ == "__main__":
    make_golden()
