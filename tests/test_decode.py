"""model.py's cache and decoding loop: what a method sees, and bits that depend on nobody else."""

import dataclasses
import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import DTYPES, GOLDEN, close, edit, record_steps
from make_golden import FAMILIES

import model as M
from lab import fast, steps
from model import (
    KVCache,
    Prompt,
    Request,
    Transformer,
    UserError,
    decode,
    draw,
    load,
)

COMPILED = pytest.param(
    "compiled", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
)

# -------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("load", [M.load, fast.load])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_the_cache_equals_the_whole_sequence_at_once(family, load, folder_of):
    model, _ = load(str(folder_of(family)), "cpu", "float32")
    expected = safetensors.torch.load_file(GOLDEN / family / "expected.safetensors")
    embeds = model.embed(expected["ids"])
    whole = model(embeds[None])[0]
    for chunks in ([23], [1, 22], [10, 10, 3]):
        prefilled, hidden, T = KVCache(model, 1, 4), [], 0  # starts too small: it must grow
        for n in chunks:
            prefilled.reserve(T + n)
            hidden.append(model(embeds[None, T : T + n], prefilled)[0])
            T += n
        cache = KVCache(model, 3, 4)
        for row in range(3):
            cache.take(row, prefilled, 23)
        for t in range(23, 40):
            cache.reserve(t + 1)
            hidden.append(model(embeds[None, t : t + 1].expand(3, 1, -1), cache)[1])
        assert close(torch.cat(hidden), whole, 1e-5)
        assert cache.lengths.tolist() == [40, 40, 40]


def test_rows_of_very_different_lengths_share_a_cache_that_grows(folder_of):
    folder = folder_of("llama2")
    edit(folder, max_position_embeddings=700)
    model, _ = load(str(folder), "cpu", "float32")
    ids = torch.randint(0, 272, (2, 690), generator=torch.Generator().manual_seed(0))
    embeds = model.embed(ids)
    whole, cache, lengths = model(embeds), KVCache(model, 3, 128), (100, 3)
    for row, T in enumerate(lengths):
        prefilled = KVCache(model, 1, T)
        prefilled.reserve(T)
        model(embeds[row : row + 1, :T], prefilled)
        cache.take(row, prefilled, T)
    sizes = set()
    for t in range(590):
        cache.reserve(101 + t)
        sizes.add(cache.S)
        fed = [embeds[row, T + t] for row, T in enumerate(lengths)] + [embeds[0, 0]]
        hidden = model(torch.stack(fed)[:, None], cache)
        if t % 97 == 0 or t == 589:
            for row, T in enumerate(lengths):
                assert close(hidden[row, 0], whole[row, T + t], 1e-4)
    assert sizes == set(range(128, 705, 64))  # what attention reads is what is in use
    assert all(x.shape[2] == 705 for x in cache.keys)


def test_a_cache_grows_to_twice_its_room_but_not_beyond_what_rows_may_come_to(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    cache, rooms = KVCache(model, 2, 60), [65]
    cache.most = 700  # rounded up: 704
    for longest in range(1, 701):
        cache.reserve(longest)
        if cache.keys[0].shape[2] != rooms[-1]:
            rooms.append(cache.keys[0].shape[2])
    assert rooms == [65, 131, 263, 527, 705]


def test_decoding_grows_its_cache_seldom_and_within_the_plan(folder_of, monkeypatch):
    folder = folder_of("llama2")
    edit(folder, max_position_embeddings=4096)
    model, _ = load(str(folder), "cpu", "float32")

    class Late(steps.Recorder):  # notices an end one step late
        def record(self, S):
            pass

    model.recorder, rooms, reserve = Late, [], KVCache.reserve

    def spy(cache, longest):
        reserve(cache, longest)
        if len(cache.lengths) == 2 and cache.keys[0].shape[2] not in rooms:
            rooms.append(cache.keys[0].shape[2])

    monkeypatch.setattr(KVCache, "reserve", spy)
    embeds = prompts(model)
    requests = [Request(Prompt(embeds[i]), data=(i, 300)) for i in (0, 3)]
    assert len(list(greedy(model, requests, Greedy(model, 2), 2, 300))) == 2
    # The longer prompt has 30 tokens; the plan counts on 384 positions for 330.
    assert rooms == [257, 385] and KVCache.rounded(330, model.device) == 384


def test_what_a_row_held_before_does_not_come_back(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    cache, short = KVCache(model, 1, 128), KVCache(model, 1, 5)
    embeds = model.embed(torch.arange(30))[None]
    for x in cache.keys + cache.values:
        x.fill_(float("nan"))
    short.reserve(5)
    model(embeds[:, :5], short)
    cache.take(0, short, 5)
    cache.reserve(6)
    assert close(model(embeds[:, 5:6], cache)[0, 0], model(embeds[:, :6])[0, 5], 1e-5)


@pytest.mark.parametrize("device, least", [("cpu", 64), ("cuda", 256)])
def test_sizes_of_the_cache_are_few_and_close(device, least):
    sizes = [KVCache.rounded(n, torch.device(device)) for n in range(1, 40000)]
    more = 1.13 if device == "cpu" else 1.26
    assert all(n <= s <= max(least, n * more) + least for n, s in enumerate(sizes, 1))
    assert all(s % least == 0 and s <= t for s, t in itertools.pairwise(sizes))
    assert len(set(sizes)) == {"cpu": 58, "cuda": 25}[device]


# --------------------------------------------------------------------------------------- the seam

END = 272  # what Greedy ends with: behind the vocabulary, so that argmax never is


class Greedy:
    """The smallest method with an end per request: argmax, END at its own limit, each logits."""

    def __init__(self, model, rows):
        model.config = dataclasses.replace(model.config, eos_ids=(END,))
        self.E, self.began = model.embed.weight, []
        self.limit = torch.zeros(rows, device=model.device)

    def begin(self, row, request):
        self.limit[row] = request.data[1]
        self.began.append((row, request.data[0]))

    def step(self, logits, at):
        token = logits.argmax(-1)
        ended = torch.full_like(token, END)
        return torch.where(at.t + 1 < self.limit, token, ended), self.E[token], logits


def greedy(model, requests, method, rows, max_new_tokens=64):
    """(name, tokens, logits [tokens, V]) of each request as it ends."""
    for output in decode(model, requests, method, rows, max_new_tokens, keep=1):
        (logits,) = output.notes
        tokens = logits.argmax(-1).tolist()
        assert output.ids == tokens[:-1] + [END]
        yield output.request.data[0], tokens, logits


LIMITS = (20, 5, 13, 1, 9, 20, 2, 7, 16)


def prompts(model, count=9):
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 30, 8, 2, 25, 11, 5][:count]
    ids = [torch.randint(0, 272, (n,), generator=generator) for n in lengths]
    return [model.embed(x.to(model.device)) for x in ids]


def run(model, rows, order=range(9), method=None):
    """Request -> its tokens, and its logits [tokens, V]."""
    embeds = prompts(model)
    requests = [Request(Prompt(embeds[i]), data=(i, LIMITS[i])) for i in order]
    outs = list(greedy(model, requests, method or Greedy(model, rows), rows))
    assert sorted(out[0] for out in outs) == sorted(order)
    return {out[0]: out[1] for out in outs}, {out[0]: out[2] for out in outs}


def same_bits(a, b):
    return all(torch.equal(a[i], b[i]) for i in a)


class Seen:
    """A method that notes all that it is shown."""

    def __init__(self, model):
        self.model = model

    def begin(self, row, request):
        pass

    def step(self, logits, at):
        assert torch.equal(self.model.logits(at.hidden), logits)
        token = logits.argmax(-1)
        return token, self.model.embed(token), at.t.clone(), at.u, at.hidden, logits


@pytest.mark.parametrize("load", [M.load, fast.load])
def test_what_a_method_is_shown_and_what_comes_back(load, folder_of):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    model.config = dataclasses.replace(model.config, eos_ids=())
    seeds, embeds = ((7,), (7, 3), (2**63, 0, 1)), prompts(model)
    requests = [Request(Prompt(embeds[i]), seeds[i], data=i) for i in range(3)]
    outputs = list(decode(model, requests, Seen(model), 2, 11, keep=4))
    assert {output.request.data for output in outputs} == {0, 1, 2}
    for output in outputs:
        i = output.request.data
        t, u, hidden, logits = output.notes
        drawn = np.random.default_rng(seeds[i])
        assert len(output.ids) == 11 and t.tolist() == list(range(11))
        assert u.tolist() == drawn.random(12, dtype=np.float32)[:11].tolist()
        assert output.request.rng.random() == drawn.random()  # what a method draws goes on there
        assert close(model.logits(hidden), logits, 1e-5) and hidden.shape == (11, 32)
        assert logits.argmax(-1).tolist() == output.ids and output.seconds > 0
        fed = torch.cat([embeds[i], model.embed(torch.tensor(output.ids[:-1]))])
        assert close(hidden, model(fed[None])[0, len(embeds[i]) - 1 :], 1e-5)
    for keep in (0, 1):
        requests = [Request(Prompt(embeds[0]), data=0)]
        (output,) = decode(model, requests, Seen(model), 1, 11, keep)
        assert [note.tolist() for note in output.notes] == [list(range(11))][:keep]


def test_a_sequence_ends_by_a_token_or_the_limit_or_the_context(folder_of):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    model.config = dataclasses.replace(model.config, eos_ids=())
    embeds = prompts(model)

    def tokens(i, most):
        (output,) = decode(model, [Request(Prompt(embeds[i]))], Seen(model), 1, most)
        return output.ids

    whole = tokens(3, 10**9)
    assert len(whole) == 64 - 30 == model.config.context - len(embeds[3])
    assert tokens(3, 5) == whole[:5] and len(tokens(0, 1000)) == 61
    model.config = dataclasses.replace(model.config, eos_ids=(whole[4], 271))
    assert tokens(3, 64) == whole[: whole.index(whole[4]) + 1]  # the end is one of its tokens
    for length in 64, 65, 70:  # nothing is left of the context; the logits are finite nevertheless
        prompt = Prompt(torch.randn(length, 32))
        (output,) = decode(model, [Request(prompt)], Seen(model), 1, 9)
        assert len(output.ids) == 1 and output.finite


def test_whoever_watches_sees_each_step_of_the_first_row(folder_of, monkeypatch):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    seen, embeds = [], prompts(model)
    requests = [Request(Prompt(embeds[i]), data=(i, LIMITS[i])) for i in range(9)]

    def watch(token, logits):
        assert logits.shape == (272,)
        seen.append(token)  # its own: slot 0's next request does not change it

    first = Greedy(model, 3)
    outputs = list(decode(model, requests, first, 3, 64, 1, watch))
    in_row = [name for row, name in first.began if row == 0]
    ids = {output.request.data[0]: output.ids for output in outputs}
    assert [int(token) for token in seen] == [token for name in in_row for token in ids[name]]
    one, seen[:] = list(seen), []
    record_steps(monkeypatch)  # ends are noticed late: nothing is shown twice
    requests = [Request(Prompt(embeds[i]), data=(i, LIMITS[i])) for i in in_row]
    list(decode(model, requests, Greedy(model, 1), 1, 64, 1, watch))
    assert seen == one


def test_a_cache_that_was_not_reserved_far_enough_is_refused(folder_of):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    model.config = dataclasses.replace(model.config, context=200)
    embeds = model.embed(torch.arange(90))
    with torch.inference_mode():
        whole, cache = model(embeds[None])[0], KVCache(model, 1, 90)
        cache.reserve(60)  # 64 positions
        found = [model(embeds[None, :60], cache)[0]]
        found += [model.step(embeds[t : t + 1], cache)[0] for t in range(60, 64)]
        assert close(torch.cat(found), whole[:64], 1e-5)
        with pytest.raises(ValueError, match="reserve"):
            model.step(embeds[64:65], cache)


def test_drawing_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    for u, index in ((0.0, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (0.9999999, 2)):
        assert draw(probs, torch.tensor([u])).tolist() == [index]
        assert draw(7 * probs, torch.tensor([u])).tolist() == [index]  # of any positive sum
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert draw(rows, torch.tensor([0.9, 0.1, 0.6])).tolist() == [0, 1, 1]
    # Nothing of probability 0 is drawn: not by the smallest u, and not by the largest below 1.
    rare = torch.tensor([[0.0, 0.7, 0.3, 0.0]]).expand(2, -1)
    assert draw(rare, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]
    ids = torch.tensor([[9, 8], [7, 6], [5, 4]])
    assert draw(rows, torch.tensor([0.9, 0.1, 0.6]), ids).tolist() == [9, 6, 4]
    generator = torch.Generator().manual_seed(0)
    drawn = draw(probs.expand(20000, -1), torch.rand(20000, generator=generator))
    assert close(drawn.bincount(minlength=4) / 20000, probs[0], 0.03)


# ------------------------------------------------------------------------------- bits, slots, order


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["plain", "fused", "int8", COMPILED])
def test_what_a_request_yields_depends_to_the_bit_on_no_slot_neighbour_or_order(
    dtype, way, folder_of
):
    options = {"int8": {"quantize": "int8"}, "compiled": {"compile": True}}.get(way, {})
    load = M.load if way == "plain" else fast.load
    model, _ = load(str(folder_of("qwen2")), "cpu", dtype, **options)
    assert (type(model) is not Transformer) == (way == "compiled")
    tokens, logits = run(model, 4)
    assert [len(tokens[i]) for i in range(9)] == list(LIMITS)
    for order in ([8, 2, 5, 0, 7, 1, 3, 6, 4], [4, 0], [6, 3], [0], [3], [5, 8, 5 - 3, 1]):
        assert same_bits(run(model, 4, order)[1], logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("load", [M.load, fast.load])
def test_a_neighbour_of_another_length_changes_no_bit(dtype, load, folder_of):
    folder = folder_of("qwen3")
    edit(folder, max_position_embeddings=4096)
    model, _ = load(str(folder), "cpu", dtype)
    ids = torch.randint(0, 250, (3000,), generator=torch.Generator().manual_seed(0))
    for mine in (3, 60, 130):
        alone = None
        for other in (1, 100, 500, 1100, 3000):
            requests = [
                Request(Prompt(model.embed(ids[:other])), data=(1, 12)),
                Request(Prompt(model.embed(ids[-mine:])), data=(0, 12)),
            ]
            for ordered in (requests, requests[::-1]):
                for i, _, logits in greedy(model, ordered, Greedy(model, 2), 2):
                    if i == 0:
                        alone = logits if alone is None else alone
                        assert torch.equal(logits, alone), (mine, other)


def test_decoding_is_greedy_decoding_of_the_whole_sequence(folder_of):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    for rows in (1, 4):
        outs, _ = run(model, rows)
        for i, prompt in enumerate(prompts(model)):
            embeds = torch.cat([prompt, model.embed(torch.tensor(outs[i]))])
            logits = model.logits(model(embeds[None])[0])
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == outs[i]


def spied(model, rows, log):
    """Greedy that calls log(at) before each step."""
    method = Greedy(model, rows)

    def step(logits, at):
        log(at)
        return Greedy.step(method, logits, at)

    method.step = step
    return method


def test_a_row_that_has_ended_reads_nothing_any_more(folder_of, monkeypatch):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    seen, attend = [], KVCache.attend

    def spy(cache, layer, q, k, v):
        if layer == 0 and q.shape[1] == 1 and len(q) == 2:
            seen.append(cache.positions[:, 0].tolist())
        return attend(cache, layer, q, k, v)

    monkeypatch.setattr(KVCache, "attend", spy)
    run(model, 2, [1, 2])  # prompts of 17 and 1 tokens, 5 and 13 new ones
    assert seen == [[16 + t if t < 5 else 0, t] for t in range(13)]


def test_a_finished_rows_place_is_taken_at_once(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    live = []
    method = spied(model, 4, lambda at: live.append(at.live.sum().item()))
    run(model, 4, method=method)
    full = len(live) - max(LIMITS)
    assert live[:full] == [4] * full and sum(live) == sum(LIMITS)
    # The fourth request has one step to make.
    assert method.began[:5] == [(0, 0), (1, 1), (2, 2), (3, 3), (3, 4)]


# --------------------------------------------------------------------------- late ends, recordings


@pytest.mark.parametrize("late", [1, 2, 5])
def test_an_end_may_be_noticed_some_steps_late(late, folder_of):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    tokens, logits = run(model, 4)

    class Late(steps.Recorder):
        def record(self, S):  # runs its steps one by one
            pass

    Late.late, model.recorder = late, Late
    found, its = run(model, 4)
    assert found == tokens and same_bits(its, logits)


@pytest.mark.parametrize("load", [M.load, fast.load])
def test_steps_can_be_recorded_and_replayed(load, folder_of, monkeypatch):
    folder = folder_of("llama3")
    edit(folder, max_position_embeddings=512)
    model, _ = load(str(folder), "cpu", "float32")
    expected = run(model, 4)
    replays = record_steps(monkeypatch)
    found = run(model, 4)
    assert found[0] == expected[0] and same_bits(found[1], expected[1]) and len(replays) > 10


def test_steps_that_need_the_host_are_not_recorded(folder_of, monkeypatch):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    expected = run(model, 4)
    replays = record_steps(monkeypatch)
    for read in (lambda at: int(at.t[0]), lambda at: at.t.tolist(), lambda at: any(at.live)):
        with pytest.raises(AssertionError, match="waits for the device"):
            run(model, 4, method=spied(model, 4, read))
    method = spied(model, 4, lambda at: int(at.t[0]))
    method.host = True
    found = run(model, 4, method=method)
    assert found[0] == expected[0] and same_bits(found[1], expected[1]) and not replays


def test_where_steps_cannot_be_recorded_they_run_one_by_one(folder_of, monkeypatch, capsys):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    expected = run(model, 4)

    class Refused(steps.Recorder):
        def capture(self):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model.recorder = Refused
    found = run(model, 4)
    assert found[0] == expected[0] and same_bits(found[1], expected[1])
    said = "steps cannot be recorded here, and run one by one (operation not permitted)\n"
    assert capsys.readouterr().err == said


def test_steps_are_recorded_once_for_each_length_and_anew_where_the_cache_has_moved():
    cache, done = SimpleNamespace(S=256, keys=[torch.zeros(1, 1, 769)]), []

    class Counted(steps.Recorder):
        def capture(self):
            done.append(f"recorded {cache.S}")
            return SimpleNamespace(replay=lambda S=cache.S: done.append(f"replayed {S}"))

    recorder = Counted(None, lambda: done.append("step"), cache, torch.ones(1, dtype=torch.bool))
    for S, capacity in (256, 768), (256, 768), (512, 768), (256, 768), (512, 1024), (512, 1024):
        cache.S, cache.keys = S, [torch.zeros(1, 1, capacity + 1)]
        recorder()
    expected = "step, recorded 256, replayed 256, step, recorded 512, replayed 256"
    assert ", ".join(done) == f"{expected}, step, recorded 512, replayed 512"


# ------------------------------------------------------------------------------------ requests


def test_requests_may_wait_for_results(folder_of):
    model, _ = load(str(folder_of("llama2")), "cpu", "float32")
    alone, _ = run(model, 2)
    embeds, got = prompts(model), {}

    def requests():
        yield Request(Prompt(embeds[0]), data=(0, 20))
        while 0 not in got:
            yield None
        yield Request(Prompt(embeds[1]), data=(1, 5))
        yield Request(Prompt(embeds[2]), data=(2, 13))

    for i, tokens, _ in greedy(model, requests(), Greedy(model, 2), 2):
        got[i] = tokens
    assert got == {i: alone[i] for i in range(3)}


def forwards(monkeypatch):
    """The lengths of what goes through the model, steps aside."""
    lengths, forward, step = [], Transformer.forward, Transformer.step

    def spy(self, embeds, cache=None):
        lengths.append(embeds.shape[1])
        return forward(self, embeds, cache)

    def quiet(self, embeds, cache):
        before = len(lengths)
        out = step(self, embeds, cache)
        del lengths[before:]
        return out

    monkeypatch.setattr(Transformer, "forward", spy)
    monkeypatch.setattr(Transformer, "step", quiet)
    return lengths


def test_requests_of_one_prompt_share_its_prefill(folder_of, monkeypatch):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    lengths, prompt = forwards(monkeypatch), Prompt(prompts(model)[3])
    requests = [Request(prompt, data=(i, 6)) for i in range(5)]
    outs = [out[1] for out in greedy(model, requests, Greedy(model, 3), 3)]
    assert len(outs) == 5 and all(out == outs[0] for out in outs)
    assert lengths == [29]  # the thirtieth is fed in the first step


@pytest.mark.parametrize(
    "ids, alone, beside",  # positions that are prefilled; the last is fed in the first step
    [
        ([5, 6, 7, 8, 9, 10], [5], [1]),
        ([5, 6, 7, 30, 9, 10], [5], [2]),
        ([5, 6, 7, 8], [3], [1]),  # all of it is there, but one is always computed
        ([30, 6, 7, 8], [3], [3]),
        ([5, 6], [1], [1]),
        ([5], [], []),
    ],
)
def test_what_a_prompt_begins_with_is_taken_from_one_that_begins_alike(
    ids, alone, beside, folder_of, monkeypatch
):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    other = Prompt(model.embed(torch.tensor([5, 6, 7, 8, 20])))
    other.prefill(model)  # 5, 6, 7 and 8
    embeds, outs = model.embed(torch.tensor(ids)), []
    for like, prefilled in ((None, alone), (other, beside)):
        lengths = forwards(monkeypatch)
        requests = [Request(Prompt(embeds, like), data=(0, 6))]
        outs.append([tokens for _, tokens, _ in greedy(model, requests, Greedy(model, 1), 1)])
        assert lengths == prefilled
        monkeypatch.undo()
    assert outs[0] == outs[1]


def test_positions_that_begin_all_rows_need_no_mask_and_all_others_have_one(folder_of):
    model, _ = load(str(folder_of("qwen3")), "cpu", "float32")
    x = model.embed(torch.arange(24).view(2, 12))
    exact = model(x)
    first = KVCache(model, 1, 12)
    for cache in (first, KVCache(model, 2, 12)):
        cache.reserve(12)
        rows = len(cache.rows)
        assert close(model(x[:rows, :4], cache), exact[:rows, :4], 1e-5) and cache.mask is None
    for T in (4, 3, 1):  # with room from before
        done = int(cache.lengths[0])
        assert close(model(x[:, done : done + T], cache), exact[:, done : done + T], 1e-5)
        assert cache.mask is not None
    for T, masked in ((0, False), (4, True)):
        cache = KVCache(model, 1, 12)
        cache.take(0, first, T)
        cache.reserve(12)
        assert close(model(x[:1, T : T + 4], cache), exact[:1, T : T + 4], 1e-5)
        assert (cache.mask is not None) == masked
    cache = KVCache(model, 2, 12)  # a step, which may be recorded, always has one
    cache.reserve(1)
    assert close(model(x[:, :1], cache), exact[:, :1], 1e-5) and cache.mask is not None


def test_a_long_prompt_is_prefilled_by_chunks_between_the_steps_of_the_others(
    folder_of, monkeypatch
):
    model, _ = load(str(folder_of("llama3")), "cpu", "float32")
    whole, _ = run(model, 2, [0, 3])
    monkeypatch.setattr(Prompt, "CHUNK", 7)
    monkeypatch.setattr(Prompt, "FIRST", 9)
    lengths, embeds, log = forwards(monkeypatch), prompts(model), []
    method = spied(model, 2, lambda at: log.append(len(lengths)))
    requests = [Request(Prompt(embeds[i]), data=(i, LIMITS[i])) for i in (0, 3)]
    assert {i: tokens for i, tokens, _ in greedy(model, requests, method, 2)} == whole
    assert lengths == [2, 9, 7, 7, 6]
    assert log[:4] == [2, 3, 4, 5]  # one chunk between two steps


def test_float16_loads_and_damaged_weights_are_noticed_at_the_first_prompt(folder_of):
    model, _ = load(str(folder_of("qwen2")), "cpu", "float16")
    prompt = Prompt(model.embed(torch.tensor([1, 2, 3])))
    prompt.prefill(model)
    assert prompt.cache.keys[0].dtype == torch.float16
    model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        Prompt(model.embed(torch.tensor([1, 2, 3]))).prefill(model)
