"""Logits that are not finite, and numbers that would make them so: ended, recorded, and said."""

import json
import math

import pytest
import torch
from conftest import record_steps
from test_cli import long_context, records_of, think
from test_decode import prompts

import soft_thinking
import softcot
from baselines.sampling import Settings as Search
from lab import cli, tables
from model import Prompt, Request, check_ranges, decode, load
from soft_thinking import Settings

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_logit_that_is_not_finite_ends_its_sequence_alone(
    wrong, recorded, folder_of, monkeypatch
):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")

    def outputs():
        requests = [Request(Prompt(x), data=i) for i, x in enumerate(prompts(model)[:3])]
        found = decode(model, requests, softcot.Sampler(model), 2, 8)
        return {output.request.data: output for output in found}

    whole, step = outputs(), model.step
    if recorded:
        record_steps(monkeypatch)
    E = model.embed.weight
    fed = next(i for i in whole[1].ids[:-1] if i not in whole[0].ids + whole[2].ids)

    def damaged(embeds, cache):  # after this token, as if its row of the embeddings were damaged
        hidden, logits = step(embeds, cache)
        hit = (embeds == E[fed]).all(-1, keepdim=True)
        first = torch.arange(logits.shape[1]) == 3
        return hidden, torch.where(hit & first, torch.full_like(logits, wrong), logits)

    monkeypatch.setattr(model, "step", damaged)
    found = outputs()
    assert [found[i].finite for i in range(3)] == [True, False, True]
    assert all(found[i].ids == whole[i].ids for i in (0, 2))
    n = whole[1].ids.index(fed) + 1
    assert found[1].ids == [*whole[1].ids[:n], model.config.eos_ids[0]]


def spoilt(folder):
    """A model whose output layer has one weight that is not a number."""
    model, tokenizer = load(str(folder), "cpu", "float32")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = NAN
    return model, tokenizer


@pytest.mark.parametrize("options", [{}, {"method": "cot"}, {"noise": "dirichlet"}])
def test_the_record_of_a_thought_says_it(options, folder_of):
    s = Settings(max_new_tokens=5, **options)
    ((_, record),) = soft_thinking.think(*spoilt(folder_of("qwen3")), ["2?"], s, trace=True)
    assert record["finish_reason"] == record["stopped_by"] == "not finite"
    assert len(record["thought_ids"]) == 1 and not record["answer_text"]
    json.dumps(record, allow_nan=False)


def test_the_record_of_an_answer_after_soft_thoughts_says_it(folder_of):
    s = softcot.Settings(thoughts=0, max_new_tokens=5)
    ((_, record),) = softcot.answer(*spoilt(folder_of("qwen3")), ["2?"], s)
    assert record["not_finite"] == 1 and record["text"] == ""


def test_a_run_says_at_its_end_that_answers_were_cut(folder_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda args: spoilt(long_context(folder_of("qwen3"))))
    out = tmp_path / "out.jsonl"
    arguments = ["--task", "tiny", "--limit", "2", "--methods", "soft", "--max-new-tokens", "9"]
    assert think([*arguments, "--output", str(out)]) == 0
    assert [r["finish_reason"] for r in records_of(out)] == ["not finite"] * 2
    said = "warning: in 2 of 2 records an answer ends early"
    assert said in capsys.readouterr().err
    tables.warn([{"finish_reason": "stop"}, {"not_finite": 0}])
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 1e-46},
        {"temperature": 1e-320},
        {"temperature": 1e300},
        {"answer_temperature": 1e-46},
        {"top_p": 1e-320},
        {"answer_top_p": 1e-46},
        {"gumbel_temperature": 1e-46, "noise": "gumbel"},
        {"dirichlet_alpha": 1e-320, "noise": "dirichlet"},
        {"cold_stop_steps": 10**30},
        {"method": "x"},
        {"noise": "x"},
    ],
)
def test_settings_that_underflow_or_do_not_exist_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("least", [{"temperature": 1e-30}, {"top_p": 1e-30}])
def test_the_smallest_that_are_taken_choose_the_most_probable(least):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    ids, probs, H = soft_thinking.concept_token(logits, **least)
    assert ids[0, 0] == 1 and probs[0, 0] == 1 and H.isfinite()


def test_settings_of_the_others_are_refused_too():
    for settings, wrong in (
        (Search, {"method": "x"}),
        (Search, {"reward": "x"}),
        (Search, {"k": 10**30}),
        (softcot.Settings, {"temperature": 1e-46}),
        (softcot.Training, {"method": "x"}),
        (softcot.Training, {"rank": 10**12}),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings(**wrong)
    check_ranges(Search(method="rap"), "sigma")


def test_one_text_is_not_a_list_and_a_missing_sample_is_an_error(folder_of):
    model, tokenizer = load(str(folder_of("qwen3")), "cpu")
    for answers in (soft_thinking.think, softcot.answer):
        with pytest.raises(ValueError, match="must be a list"):
            next(answers(model, tokenizer, "2+2?"))
    with pytest.raises(ValueError, match="shorter"):
        list(soft_thinking.think(model, tokenizer, ["a", "b"], Settings(max_new_tokens=2), 0, [0]))
