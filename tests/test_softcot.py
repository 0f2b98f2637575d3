"""softcot.py: positions, hidden states, loss and gradient, answers; one sequence equals the batch.

golden/softcot.json holds what `transformers` computes for the same sequences: the assistant's
hidden states, the loss, and its gradient with respect to the projection. `python
tests/test_softcot.py` made it (transformers 5.23.0, float32, eager attention; checkpoints
golden/qwen3 and golden/llama2): it builds ids, embeddings and labels by itself and shares nothing
with softcot.py.
"""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, record_steps, write_tokenizer
from softcot_pair import PAIRS, PROBLEMS, loaded, pair, projection_of, sequences_of, states

import model as plain
import softcot
from lab import fast
from lab.grading import extract
from model import Prompt, Request, Tokenizer, UserError, decode
from softcot import (
    Sampler,
    Settings,
    Training,
    answer,
    input_embeddings,
    input_one,
    loss_one,
    negative_log_likelihood,
    placeholder,
    projection,
    prompt_texts,
    sequence,
    shuffled,
    soft_thoughts,
    target_text,
    think_one,
    train,
)

__all__ = ["loaded", "pair"]  # fixtures


def asked(monkeypatch, model, tokenizer, question, n, think=None):
    """What `answer` gives to `decode`: the prompt's embeddings; and the prompt as text."""
    prompts, real = [], softcot.decode

    def watched(model, requests, *rest):
        for request in requests:
            prompts.append(request.prompt.embeds)
            yield from real(model, [request], *rest)

    s = Settings(thoughts=n, max_new_tokens=1)
    with monkeypatch.context() as patch:
        patch.setattr(softcot, "decode", watched)
        ((_, record),) = answer(model, tokenizer, [question], s, think)
    return prompts[0], record["prompt"]


# ------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("llm, assistant", PAIRS)
def test_thoughts_stand_where_the_placeholders_would_and_nothing_else_changes(
    llm, assistant, thinking, loaded, monkeypatch
):
    model, tokenizer, small, small_tokenizer = loaded(llm, assistant, thinking=thinking)
    assert tokenizer.render("x") != small_tokenizer.render("x")
    question, n = "Why ✓ 2<3?", 3
    # The plain prompt, made in one piece: the placeholders' text in the question.
    unk = placeholder(tokenizer)
    whole = tokenizer.render(f"{question}\n" + tokenizer.decode([unk]) * n)
    whole += "<think>\n" if thinking else ""
    ids = tokenizer.encode(whole)
    plain = model.embed(torch.tensor(ids))
    first = len(tokenizer.encode(whole[: whole.index(question) + len(question)] + "\n"))
    assert ids[first : first + n] == [unk] * n
    think = partial(think_one, small, small_tokenizer, projection_of())
    embeds, text = asked(monkeypatch, model, tokenizer, question, n, think)
    changed = (embeds != plain).any(-1).nonzero()[:, 0].tolist()
    assert changed == list(range(first, first + n))
    assert torch.equal(embeds[first : first + n], think(question, n))
    assert text.replace(f"<{n} soft thoughts>", tokenizer.decode([unk]) * n) == whole
    # Without a projection (CoT-Unk as it is) the prompt is the plain one.
    assert torch.equal(asked(monkeypatch, model, tokenizer, question, n)[0], plain)


def test_no_thoughts_are_the_plain_question(loaded, monkeypatch):
    model, tokenizer, small, small_tokenizer = loaded()
    think = partial(think_one, small, small_tokenizer, projection_of())
    plain = model.embed(torch.tensor(tokenizer.chat("Why?") + tokenizer.encode("<think>\n")))
    for thinking in (think, None):
        embeds, text = asked(monkeypatch, model, tokenizer, "Why?", 0, thinking)
        assert torch.equal(embeds, plain) and text == tokenizer.open("Why?")


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


@pytest.mark.parametrize(
    "added, special, expected",
    [
        # Llama 3.1 and 3.2, Qwen2.5 and Qwen3, Llama 2, and an older tokenizer
        (["<|end_of_text|>"], {"eos_token": "<|im_end|>"}, "<|end_of_text|>"),
        (["<|end_of_text|>", "<|pad|>"], {"pad_token": "<|pad|>"}, "<|end_of_text|>"),
        ([], {"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}, "<|im_start|>"),
        (["<unk>"], {"unk_token": "<unk>", "pad_token": "<|im_start|>"}, "<unk>"),
        (["<unk>", "<|end_of_text|>"], {"unk_token": "<unk>"}, "<unk>"),
        (["[UNK]", "<unk>", "<|end_of_text|>"], {"unk_token": "<unk>"}, "[UNK]"),
    ],
)
def test_the_placeholder_is_the_published_one(added, special, expected, folder_of):
    tokenizer = Tokenizer(folder_of("qwen2"))
    tokenizer.core.add_special_tokens(added)
    tokenizer.special = special
    assert tokenizer.core.id_to_token(placeholder(tokenizer)) == expected


def test_a_template_that_hides_the_message_or_already_closed_the_thought(folder_of):
    folder = folder_of("qwen2")
    content = "messages[0]['content']"
    thrice = f"{{{{ {content} | upper }}}}{{{{ {content} }}}}{{{{ {content} }}}}"
    write_tokenizer(folder, True, thrice)
    with pytest.raises(UserError, match="repeat"):
        prompt_texts(Tokenizer(folder), "a", 2)
    write_tokenizer(folder, True, "{{ messages[0]['content'] }} <think>\n\n</think>\n\n")
    assert prompt_texts(Tokenizer(folder), "a", 2) == ("a\n", " <think>\n")


def test_labels_start_right_after_the_prompt(folder_of):
    tokenizer = Tokenizer(folder_of("qwen2"))
    labels = tokenizer.encode("6</think>7") + [257]
    s = sequence(tokenizer, "Why?", 4, labels)
    without = tokenizer.encode(prompt_texts(tokenizer, "Why?", 0)[0])
    assert s.ids[s.start :] == labels
    assert s.start == len(without) + 1 + 4  # a line break
    assert s.ids[: s.start] == s.left + [s.unk] * 4 + s.right


def test_targets_follow_the_prompt_s_form(folder_of):
    thinking, plain = Tokenizer(folder_of("qwen2")), Tokenizer(folder_of("qwen2", False, "plain"))
    steps = ["2*3=6.", "6+1=7."]
    assert target_text(thinking, "7", steps) == "2*3=6. 6+1=7.</think>The answer is 7."
    boxed = target_text(plain, "7", steps, boxed=True)
    assert boxed == "2*3=6.\n6+1=7.\nThe answer is \\boxed{7}."
    assert extract(boxed, "number") == "7"


# -------------------------------------------------------------------- hidden states, loss, gradient


@pytest.mark.parametrize("llm, assistant", PAIRS)
def test_hidden_states_are_the_final_norm_s_at_the_placeholders(llm, assistant, loaded):
    _, _, small, tokenizer = loaded(llm, assistant)
    questions = [q for q, _, _ in PROBLEMS]
    seen, direct = [], []
    handle = small.norm.register_forward_hook(lambda module, inputs, out: seen.append(out[0]))
    for q in questions:
        text = tokenizer.render(f"Note the steps.\n{q}\n", date_string="26 Jul 2024")
        assert "[assistant]" in text  # this template trims the message
        ids = tokenizer.encode(text[: text.index(q) + len(q)] + "\n")
        small(small.embed(torch.tensor([ids + [placeholder(tokenizer)] * 3])))
        direct.append(seen[-1][len(ids) : len(ids) + 3])
    handle.remove()
    sizes = []
    handle = small.norm.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape))
    for most in (1, 150, 10**6):  # alone, in a few batches, all in one
        found = states(small, tokenizer, questions, 3, most=most)
        assert torch.allclose(found, torch.stack(direct), atol=1e-4)
        assert all(B * T <= most or B == 1 for B, T, _ in sizes)
        assert (len(sizes) == 1) == (most == 10**6)
        assert (max(B for B, _, _ in sizes) == 1) == (most == 1)
        assert sum(B for B, _, _ in sizes) == len(questions)
        sizes.clear()
    handle.remove()


def test_the_first_rows_of_many_placeholders_are_those_of_few(loaded):
    _, _, small, tokenizer = loaded()
    many, few = (states(small, tokenizer, ["a", "bc"], n) for n in (8, 3))
    assert torch.allclose(many[:, :3], few, atol=1e-5)


def test_the_loss_is_the_sum_over_labels_of_a_slow_computation(loaded):
    model, tokenizer, small, small_tokenizer = loaded()
    sequences, trained = sequences_of(tokenizer, 3), projection_of()
    h = states(small, small_tokenizer, [q for q, _, _ in PROBLEMS[:3]], 3)
    expected = 0.0
    for i, s in enumerate(sequences):
        left, rest = (
            model.embed(torch.tensor(s.left)),
            model.embed(torch.tensor(s.right + s.labels)),
        )
        e = torch.cat([left, h[i] @ trained["weight"].T + trained["bias"], rest])
        log_p = model.logits(model(e[None])[0]).log_softmax(-1)
        for k, y in enumerate(s.labels):
            expected -= log_p[len(s.left) + 3 + len(s.right) + k - 1, y]
    together = negative_log_likelihood(model, sequences, soft_thoughts(trained, h))
    assert torch.allclose(together, expected, rtol=1e-5)
    # What stands beside a row, hence the padding, does not matter: neither for the loss nor for the
    # gradient.
    alone = sum(
        negative_log_likelihood(model, [s], soft_thoughts(trained, h[i : i + 1]))
        for i, s in enumerate(sequences)
    )
    assert torch.allclose(together, alone, rtol=1e-5)
    g, g_alone = (torch.autograd.grad(x, trained["weight"])[0] for x in (together, alone))
    assert torch.allclose(g, g_alone, rtol=1e-4, atol=1e-4 * g.abs().max())


@pytest.mark.parametrize("load", [plain.load, fast.load])
@pytest.mark.parametrize("llm, assistant", PAIRS)
def test_one_sequence_equals_the_batch(llm, assistant, load, loaded):
    model, tokenizer, small, small_tokenizer = loaded(llm, assistant, load=load)
    questions, trained = [q for q, _, _ in PROBLEMS], projection_of()
    sequences = sequences_of(tokenizer, 3, len(PROBLEMS))
    batch = soft_thoughts(trained, states(small, small_tokenizer, questions, 3))
    T = [think_one(small, small_tokenizer, trained, q, 3) for q in questions]
    assert torch.allclose(torch.stack(T), batch, atol=1e-5)
    embeds = input_embeddings(model, sequences, torch.stack(T))
    for row, s, t in zip(embeds, sequences, T):
        assert torch.equal(row[: len(s.ids)], input_one(model, s, t))
    one = sum(loss_one(model, s, t) * len(s.labels) for s, t in zip(sequences, T))
    many = negative_log_likelihood(model, sequences, batch)
    assert torch.allclose(one, many, rtol=1e-5)
    g, g_many = (torch.autograd.grad(x, trained["weight"])[0] for x in (one, many))
    assert torch.allclose(g, g_many, rtol=1e-4, atol=1e-4 * g_many.abs().max())
    # And without thoughts: the placeholders' own embeddings.
    one = sum(loss_one(model, s) * len(s.labels) for s in sequences)
    assert torch.allclose(one, negative_log_likelihood(model, sequences, None), rtol=1e-5)


def test_an_answer_is_what_one_sequence_says_token_for_token(loaded):
    model, tokenizer, small, small_tokenizer = loaded()
    think = partial(think_one, small, small_tokenizer, projection_of())
    questions = [q for q, _, _ in PROBLEMS]
    texts = {}
    for (index, _, _), record in answer(
        model, tokenizer, questions, Settings(thoughts=3, max_new_tokens=12), think
    ):
        texts[index] = record["text"]
    for i, question in enumerate(questions):
        x = input_one(model, sequence(tokenizer, question, 3, []), think(question, 3))
        said = []
        while len(said) < 12:
            token = int(model.logits(model(x[None])[0, -1]).argmax())
            if token in model.config.eos_ids:
                break
            said.append(token)
            x = torch.cat([x, model.embed(torch.tensor([token]))])
        assert tokenizer.decode(said) == texts[i]


@pytest.mark.parametrize("llm, assistant", PAIRS)
def test_the_gradient_is_a_finite_difference(llm, assistant, loaded):
    model, tokenizer, small, small_tokenizer = loaded(llm, assistant)
    model, small = model.double(), small.double()
    sequences = sequences_of(tokenizer, 2, 2)
    h = states(small, small_tokenizer, [q for q, _, _ in PROBLEMS[:2]], 2).double()
    torch.manual_seed(0)
    trained = {name: p.double().detach().requires_grad_() for name, p in projection_of().items()}

    def loss(weight, bias):
        thoughts = soft_thoughts({"weight": weight, "bias": bias}, h)
        return negative_log_likelihood(model, sequences, thoughts)

    gradients = torch.autograd.grad(loss(**trained), trained.values())
    for _ in range(3):
        directions = [torch.randn_like(g) for g in gradients]
        up, down = (
            loss(*(p + sign * 1e-6 * v for p, v in zip(trained.values(), directions)))
            for sign in (1, -1)
        )
        expected = sum((g * v).sum() for g, v in zip(gradients, directions))
        assert (up - down).item() / 2e-6 == pytest.approx(expected.item(), rel=1e-3)
    frozen = (*model.parameters(), *small.parameters())
    assert all(p.grad is None and not p.requires_grad for p in frozen)


QUESTIONS = ["What is 17 * 24?", "Why?"]
TARGETS = ["17*24=408.</think>The answer is 408.", "No."]
N = 3


def golden_projection():
    w = torch.arange(32 * 32, dtype=torch.float32).view(32, 32)
    return torch.sin(w) / 5, torch.cos(torch.arange(32.0)) / 5


@pytest.mark.parametrize("load", [plain.load, fast.load])
def test_hidden_states_loss_and_gradient_are_those_of_transformers(load, loaded):
    expected = json.loads((GOLDEN / "softcot.json").read_text())
    model, tokenizer, small, small_tokenizer = loaded(load=load)
    h = states(small, small_tokenizer, QUESTIONS, N)
    assert torch.allclose(h, torch.tensor(expected["hidden"]), atol=2e-5)
    sequences = [
        sequence(tokenizer, q, N, tokenizer.encode(y) + [257]) for q, y in zip(QUESTIONS, TARGETS)
    ]
    weight, bias = (x.requires_grad_() for x in golden_projection())
    thoughts = soft_thoughts({"weight": weight, "bias": bias}, h)
    sums = input_embeddings(model, sequences, thoughts).sum(-1)[0]
    assert torch.allclose(sums, torch.tensor(expected["embedding_sums"]), atol=1e-4)
    loss = negative_log_likelihood(model, sequences, thoughts)
    loss = loss / sum(len(s.labels) for s in sequences)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    for gradient, value in (
        (weight.grad, expected["weight_gradient"]),
        (bias.grad, expected["bias_gradient"]),
    ):
        value = torch.tensor(value)
        assert (gradient - value).abs().max() < 1e-4 * value.abs().max()


def make_golden():
    import tempfile

    import transformers
    from tokenizers import Tokenizer as Core

    def opened(family):
        return transformers.AutoModelForCausalLM.from_pretrained(
            GOLDEN / family, dtype=torch.float32, attn_implementation="eager"
        ).eval()

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
            hidden.append(
                assistant(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -N:]
            )
        ids = encode(
            f"<|im_start|>user\n{q}\n{end * N}{end}\n<|im_start|>assistant\n<think>\n{y}{end}"
        ).ids
        labels = [-100] * (len(ids) - len(encode(y + end).ids)) + encode(y + end).ids
        at = ids.index(257)
        embeds = llm.get_input_embeddings()(torch.tensor([ids])).detach().clone()
        embeds[0, at : at + N] = hidden[-1] @ weight.T + bias
        sums = embeds[0].sum(-1).tolist() if sums is None else sums
        n = sum(x >= 0 for x in labels)
        total, count = (
            total + llm(inputs_embeds=embeds, labels=torch.tensor([labels])).loss * n,
            count + n,
        )
    (total / count).backward()
    golden = {
        "hidden": torch.stack(hidden).tolist(),
        "embedding_sums": sums,
        "loss": (total / count).item(),
        "weight_gradient": weight.grad.tolist(),
        "bias_gradient": bias.grad.tolist(),
    }
    rounded = json.loads(json.dumps(golden), parse_float=lambda x: float(f"{float(x):.7g}"))
    (GOLDEN / "softcot.json").write_text(json.dumps(rounded) + "\n")


# -------------------------------------------------------------------------------------- training


def test_training_yields_before_each_update_and_can_be_stopped_and_gone_on_with(loaded):
    model, tokenizer, small, small_tokenizer = loaded()
    sequences = sequences_of(tokenizer, 2, len(PROBLEMS))
    h = states(small, small_tokenizer, [q for q, _, _ in PROBLEMS], 2)
    s = Training(lr=0.01, epochs=3, batch_size=2, accumulate=2, warmup=2)

    def run(stops):
        torch.manual_seed(0)
        trained = projection(32, 32)

        def loss(indices):
            thoughts = soft_thoughts(trained, h[indices])
            return negative_log_likelihood(model, [sequences[i] for i in indices], thoughts)

        optimizer, seen, begin = torch.optim.AdamW(trained.values(), weight_decay=0.0), [], 0
        for stop in stops:
            for step, mean, norm, indices in train(trained, loss, sequences, s, begin, optimizer):
                begin = step
                if step == stop:
                    break
                labels = sum(len(sequences[i].labels) for i in indices)
                assert mean == pytest.approx(loss(indices).item() / labels, rel=1e-4)
                seen.append((step, mean, norm, indices, optimizer.param_groups[0]["lr"]))
        return trained, seen

    trained, seen = run([None])
    assert [step for step, *_ in seen] == list(range(6)) and seen[-1][1] < seen[0][1]
    for epoch in range(3):
        steps = [indices for _, _, _, indices, _ in seen[2 * epoch : 2 * epoch + 2]]
        assert steps == shuffled([0] * 8, epoch, s)
        assert sorted(i for indices in steps for i in indices) == list(range(8))
    assert [lr for *_, lr in seen] == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    again, seen_again = run([2, 3, None])
    assert seen_again == seen and all(torch.equal(x, again[k]) for k, x in trained.items())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
        ({"thoughts": 0}, "thoughts must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
    ],
)
def test_settings_refuse_nonsense(settings, said):
    with pytest.raises(ValueError, match=said):
        Training(**settings)


def test_temperature_follows_the_number_of_samples():
    assert Settings().temperature == 0 and Settings(num_samples=3).temperature == 0.7
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0, not"):
            Settings(temperature=wrong)


# --------------------------------------------------------------------------------------- answers


def test_an_answer_does_not_depend_on_its_neighbours_and_steps_can_be_replayed(loaded, monkeypatch):
    model, tokenizer, small, small_tokenizer = loaded()
    torch.manual_seed(1)
    think = partial(think_one, small, small_tokenizer, projection_of())
    questions = [q for q, _, _ in PROBLEMS]
    s = Settings(thoughts=2, num_samples=2, seeds=2, temperature=1.0, max_new_tokens=6)

    def texts(jobs, batch_size=5):
        found = answer(model, tokenizer, questions, s, think, 0, jobs, batch_size)
        return {key: record["text"] for key, record in found}

    many = texts(None)
    assert len(many) == 8 * 2 * 2 and len(set(many.values())) > 8
    for index, seed in [(i, seed) for i in range(8) for seed in range(2)][::5]:
        expected = {key: text for key, text in many.items() if key[:2] == (index, seed)}
        assert texts([(index, seed)]) == expected and len(expected) == 2
    assert texts([]) == {}
    replays = record_steps(monkeypatch)
    assert texts(None) == many and len(replays) > 10


def test_a_temperature_near_zero_is_greedy(loaded):
    model, tokenizer, _, _ = loaded()
    greedy, cold = (
        [
            output.ids
            for output in decode(
                model,
                [Request(Prompt(model.embed(torch.tensor(tokenizer.encode("1+1?")))))],
                Sampler(model, temperature),
                2,
                8,
            )
        ]
        for temperature in (0.0, 1e-4)
    )
    assert greedy == cold


def test_a_question_that_is_too_long_is_named(loaded):
    model, tokenizer, _, _ = loaded()
    with pytest.raises(UserError, match=r"the context window 512 \(of the question 'xxx"):
        list(answer(model, tokenizer, ["Why?", "x" * 600]))


ALONE = """
import sys
from functools import partial
import torch
from model import load
from softcot import *

model, tokenizer = load(sys.argv[1], "cpu", "float32")
assistant, assistant_tokenizer = load(sys.argv[2], "cpu", "float32")
trained = projection(assistant.config.d, model.config.d)
trained = {name: x.requires_grad_() for name, x in trained.items()}
labels = tokenizer.encode(target_text(tokenizer, "2", ["1+1=2."]))
s = sequence(tokenizer, "1+1?", 4, labels)
loss = loss_one(model, s, think_one(assistant, assistant_tokenizer, trained, "1+1?", 4))
loss.backward()
assert loss > 0 and trained["weight"].grad.abs().sum() > 0

h = hidden_states(assistant, [assistant_ids(assistant_tokenizer, "1+1?", 4)], 4)
total = lambda i: negative_log_likelihood(model, [s] * len(i), soft_thoughts(trained, h[i]))
steps = [loss for _, loss, _, _ in train(trained, total, [s], Training(lr=0.01, epochs=4))]
assert steps[-1] < steps[0]

think = partial(think_one, assistant, assistant_tokenizer, trained)
((key, record),) = answer(model, tokenizer, ["1+1?"], Settings(thoughts=4, max_new_tokens=5), think)
assert key == (0, 0, 0) and "<4 soft thoughts>" in record["prompt"], record
assert not [name for name in sys.modules if name.split(".")[0] in ("lab", "baselines")]
print("ok")
"""


def test_with_model_py_alone_in_an_empty_folder_it_thinks_trains_and_answers(pair, tmp_path):
    folders, alone = pair(), tmp_path / "alone"
    alone.mkdir()
    for name in ("model.py", "softcot.py"):
        shutil.copy(ROOT / name, alone)
    (alone / "program.py").write_text(ALONE)
    command = [
        sys.executable,
        "-I",
        "-c",
        "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); ",
    ]
    command[-1] += "runpy.run_path(sys.path[0] + '/program.py', run_name='__main__')"
    run = subprocess.run(
        [*command, str(alone), *folders], cwd=alone, capture_output=True, text=True, check=False
    )
    assert run.stdout == "ok\n", run.stderr


if __name__ == "__main__":
    make_golden()
