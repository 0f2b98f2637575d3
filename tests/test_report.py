"""lab/report.py and its parts: pages, pictures and exchange, read back from what was written."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
import zlib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_cli import reason, records_of, think

import softcot
from baselines import lora, prompts
from lab import charts, costs, page, pictures, report, soft_thoughts, softcot_cli, tables, traces
from lab.concepts import concepts
from lab.pictures import Entry
from lab.tasks import TASKS
from model import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ROOT / "tiny" / "base"


def evaluates(arguments):
    """python softcot.py eval, in this process, with the bundled models."""
    return softcot_cli.command(["eval", *arguments], softcot, lora, prompts)


# ----------------------------------------------------------------------------------------- reading

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """A tree of SimpleNamespace(tag, attrs, children), children being elements and texts."""

    def __init__(self, text):
        super().__init__()
        self.root = SimpleNamespace(tag="", attrs={}, children=[])
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        made = SimpleNamespace(tag=tag, attrs=dict(attrs), children=[])
        self.open[-1].children.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def all(self, tag=None, of=None, **attrs):
        """Elements of a tag and with attributes, a class among them being enough, in order."""
        for child in (of or self.root).children:
            if not isinstance(child, str):
                there = {name: (child.attrs.get(name) or "") for name in attrs}
                fits = all(
                    want == there[name] or (name == "class" and want in there[name].split())
                    for name, want in attrs.items()
                )
                if fits and tag in (None, child.tag):
                    yield child
                yield from self.all(tag, child, **attrs)


def said(element):
    """An element's text, without its scripts'."""
    parts = (x if isinstance(x, str) else said(x) for x in element.children if not is_script(x))
    return "".join(parts)


def is_script(x):
    return not isinstance(x, str) and x.tag in ("script", "style")


def made(folder, *files, **options):
    """The page of these files, read back; options: flags of lab.report."""
    out = folder / "page.html"
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert report.command([*map(str, files), "-o", str(out), *flags]) == 0
    return Page(out.read_text(encoding="utf-8"))


def rows_of(table, of):
    return [
        [said(cell).strip() for cell in row.children if not isinstance(cell, str)]
        for row in of.all("tr", table)
    ]


# ------------------------------------------------------------------------------------ tiny's runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Files of all three methods' records on tiny, and a training's folder."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)
    files = {name: folder / f"{name}.jsonl" for name in ("think", "reason", "softcot")}
    tiny = ["--task", "tiny", "--limit"]
    assert (
        think([*tiny, "3", "--methods", "soft,cot", "--trace", "--output", str(files["think"])])
        == 0
    )
    few = ["--k", "3", "--rounds", "2", "--num-samples", "4", "--stop-threshold", "0"]
    methods = ["--methods", "soft,greedy,sc", "--output", str(files["reason"])]
    assert reason([*tiny, "2", *few, *methods]) == 0
    methods = ["--methods", "zero-shot-cot,softcot", "--output", str(files["softcot"])]
    assert evaluates([*tiny, "2", *methods, "--trace"]) == 0
    torch.set_num_threads(threads)
    log = folder / "trained" / "log.jsonl"
    log.parent.mkdir()
    lines = [{"step": 0, "epoch": 0, "dev_loss": 2.0, "dev_accuracy": 0.25}]
    lines += [{"step": i, "epoch": 0, "loss": 2 / i, "lr": 1e-3 / i} for i in range(1, 5)]
    lines += [{"step": 4, "epoch": 1, "dev_loss": 1.0, "dev_accuracy": None}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(**files, trained=log.parent)


@pytest.mark.parametrize("name", ["think", "reason", "softcot"])
def test_the_table_is_that_of_the_records(runs, name, tmp_path):
    file = getattr(runs, name)
    of, html = records_of(file), made(tmp_path, file)
    methods = list(dict.fromkeys(record["method"] for record in of))
    head, *rows = rows_of(next(html.all("table")), html)
    assert [row[0] for row in rows] == methods and head[4] == f"difference to {methods[0]}"
    first = {
        record["problem"]: record["correct"] for record in of if record["method"] == methods[0]
    }
    for row in rows:
        own = [record for record in of if record["method"] == row[0]]
        right = [record["correct"] for record in own]
        low, high = tables.wilson(sum(right) / len(own), len(own))
        assert row[1] == str(len(own)) and row[2] == f"{100 * sum(right) / len(own):.1f} %"
        assert row[3] == f"{100 * low:.1f} to {100 * high:.1f}"
        gaps = [record["correct"] - first[record["problem"]] for record in own]
        wanted = f"{100 * sum(gaps) / len(gaps):+.1f} ("
        assert row[4].startswith(wanted) if row[0] != methods[0] else row[4] == ""
        tokens = [record.get("thought_tokens", 0) + record["answer_tokens"] for record in own]
        assert row[5] == f"{sum(tokens) / len(tokens):.1f}"
        assert row[7] == str(sum(record["extracted"] is None for record in own))


@pytest.mark.parametrize("name", ["think", "reason", "softcot"])
def test_every_record_is_there_and_every_mark_leads_to_one(runs, name, tmp_path):
    file = getattr(runs, name)
    of, html = records_of(file), made(tmp_path, file)
    articles = {article.attrs["id"]: article for article in html.all("article")}
    assert sorted(articles) == sorted(f"r{i}" for i in range(len(of)))
    methods = list(dict.fromkeys(record["method"] for record in of))
    for i, record in enumerate(of):
        (mark,) = html.all("a", **{"class": "mark", "href": f"#r{i}"})
        assert mark.attrs["data-label"] == str(methods.index(record["method"]))
        assert (mark.attrs["data-outcome"] == "right") == record["correct"]
        assert mark.attrs["data-end"] == (record.get("stopped_by") or "")
        assert record["answer_text"] in said(articles[f"r{i}"])
    ids = {element.attrs["id"] for element in html.all() if "id" in element.attrs}
    links = [a.attrs["href"] for a in html.all("a")]
    assert {f"#r{i}" for i in range(len(of))} <= set(links) <= {f"#{name}" for name in ids}
    drawn = [a.attrs["href"] for svg in html.all("svg") for a in html.all("a", svg)]
    assert all(drawn.count(f"#r{i}") == 1 for i in range(len(of)))  # of the lengths


def test_a_large_page_keeps_its_records_packed_as_the_same_elements(
    runs, hostile, tmp_path, monkeypatch
):
    for files in ([hostile], [runs.think]):
        whole = made(tmp_path, *files)
        monkeypatch.setattr(page, "LARGE", 0)
        large = made(tmp_path, *files)
        monkeypatch.undo()
        assert not list(large.all("article")) and list(large.all("noscript"))
        kept = [said(x) for x in large.all("script", **{"class": "packed"})]
        built = Page("".join(zlib.decompress(base64.b64decode(x)).decode() for x in kept))
        for name in ("article", "script", "svg", "p"):
            there = [(e.attrs, said(e)) for e in built.all(name)]
            inside = [(e.attrs, said(e)) for x in whole.all(**{"class": "entries"})
                      for e in whole.all(name, x)]  # fmt: skip
            assert there == inside
        assert len(list(large.all("a", **{"class": "mark"}))) == len(list(built.all("article")))


def test_the_page_asks_nothing_of_a_network_and_runs_no_script_but_its_own(runs, tmp_path):
    html = made(tmp_path, runs.think, runs.reason, runs.softcot, runs.trained)
    assert not {"src", "srcset", "action", "onclick"} & {
        name for e in html.all() for name in e.attrs
    }
    assert [link.attrs["href"] for link in html.all("link")] == ["data:,"]
    text = (tmp_path / "page.html").read_text()
    assert "http:" not in text and "https:" not in text and "@import" not in text
    policy = next(html.all("meta", **{"http-equiv": "Content-Security-Policy"})).attrs["content"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    scripts = [x.attrs.get("type") for x in html.all("script")]
    assert scripts.count(None) == 1 and set(scripts) == {None, "application/json"}


def test_a_thought_holds_the_components_of_its_record(runs, tmp_path):
    of, html = records_of(runs.think), made(tmp_path, runs.think)
    tokenizer = Tokenizer(TINY)
    (names,) = json.loads("".join(next(html.all("script", id="names")).children))
    for i, record in enumerate(of):
        (article,) = html.all("article", id=f"r{i}")
        (thought,) = html.all("div", article, **{"class": "thought"})
        data = json.loads("".join(next(html.all("script", thought)).children))
        assert len(data["c"]) == len(data["H"]) == len(record["steps"])
        for parts, H, step in zip(data["c"], data["H"], record["steps"]):
            flat = parts if isinstance(parts, list) else [parts, 10_000]
            assert flat[::2] == step["ids"] and H == round(step["entropy"], 5)
            assert np.allclose(np.array(flat[1::2]) / 1e4, step["probs"], atol=6e-5)
        known = {str(token) for step in record["steps"] for token in step["ids"]}
        assert {token: names[token] for token in known} == {
            token: tokenizer.decode(tokenizer.encode("a") + [int(token)])[1:] for token in known
        }
        text = "".join(said(piece) for piece in html.all("p", thought, **{"class": "piece"}))
        assert text == tokenizer.decode(record["thought_ids"])
        assert sum(data["n"]) == len(text)
        greedy = {t: step["ids"][0] for t, step in enumerate(record["steps"])}
        own = dict(enumerate(record["thought_ids"]))
        assert {int(t): token for t, token in data["t"].items()} == {
            t: own[t] for t in own if own[t] != greedy[t]
        }
        if record["method"] == "soft":  # the same problem's CoT is beside it
            beside = next(
                r for r in of if r["method"] == "cot" and r["problem"] == record["problem"]
            )
            there = " ".join(said(p) for p in html.all("p", thought, **{"class": "beside"}))
            assert there.split() == beside["thought_text"].split()


def test_a_search_shows_its_candidates_round_by_round(runs, tmp_path):
    of, html = records_of(runs.reason), made(tmp_path, runs.reason)
    searches = [(i, record) for i, record in enumerate(of) if "points" in record]
    assert searches
    for i, record in searches:
        (article,) = html.all("article", id=f"r{i}")
        (rounds,) = html.all("div", article, **{"class": "rounds"})
        columns = list(html.all("section", rounds))
        assert len(columns) == record["rounds"] == 2
        best = -math.inf
        for number, column in enumerate(columns):
            points = [point for point in record["points"] if point["round"] == number]
            cards = list(html.all("div", column, **{"class": "candidate"}))
            for card, point in zip(cards, points, strict=True):
                numbers = [said(dd) for dd in html.all("dd", card)]
                gain = f"{max(0, point['reward'] - best):.4f}" if number else "–"
                ei = "–" if point["ei"] is None else f"{point['ei']:.4f}"
                wanted = [f"{point['reward_verifier']:.0f}", f"{point['reward_coherence']:.4f}"]
                assert numbers == [*wanted, ei, gain] and point["text"] in said(card)
            best = max([best, *(point["reward"] for point in points)])


def test_soft_thoughts_are_drawn_and_named(runs, tmp_path):
    of, html = records_of(runs.softcot), made(tmp_path, runs.softcot)
    tokenizer = Tokenizer(TINY)
    for i, record in enumerate(of):
        (article,) = html.all("article", id=f"r{i}")
        pictures = [svg.attrs["aria-label"] for svg in html.all("svg", article)]
        if record["method"] != "softcot":
            assert not pictures
            continue
        found = record["soft_thoughts"]
        assert len(found["norms"]) == 16 and pictures[0].startswith("Norms")
        tips = [said(title) for c in html.all("circle", article) for title in html.all("title", c)]
        assert tips == [f"thought {k}: norm {norm:.2f}" for k, norm in enumerate(found["norms"], 1)]
        pairs = [cosine for row in found["cosines"] for cosine in row]
        assert pictures[1].endswith(f"mean {sum(pairs) / len(pairs):+.2f}")
        assert len(pairs) == 16 * 15 / 2
        _, *rows = rows_of(next(html.all("table", article)), html)
        for row, near in zip(rows, found["nearest"], strict=True):
            wanted = [f"{traces.Names(tokenizer).name(i)} {cosine:+.2f}" for i, cosine in near]
            assert row[2].split() == " ".join(wanted).split()


def test_a_heat_map_has_a_cell_for_each_two_thoughts():
    chart = soft_thoughts.heat_map(0, [[], [0.5], [-0.5, 0.04]])
    cells = re.findall(r'class="cell (c\d)" fill-opacity="([\d.]+)" d="([^"]+)"', chart.svg())
    counts = {(look, depth): path.count("M") for look, depth, path in cells}
    assert counts == {("c1", "1.0"): 3, ("c1", "0.5"): 2, ("c0", "0.5"): 2, ("c1", "0.0"): 2}
    boxes = [re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)", path) for *_, path in cells]
    corners = [list(map(float, box)) for of in boxes for box in of]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in corners]
    wide, tall = 640 - chart.left - chart.right, chart.height - chart.top - chart.bottom
    assert sum(areas) == pytest.approx(wide * tall, rel=1e-3)
    same = soft_thoughts.heat_map(0, [[1.0] * i for i in range(8)])  # collapsed
    assert same.svg().count('class="cell') == 1


def test_a_training_is_drawn_from_its_log(runs, tmp_path):
    svg = tmp_path / "svg"
    html = made(tmp_path, runs.trained, svg=svg)
    titles = [svg.attrs["aria-label"] for svg in html.all("svg")]
    wanted = ["Loss, held-out with dots", "Held-out accuracy", "Learning rate"]
    assert titles == wanted
    assert len(list(svg.glob("training-*.svg"))) == 3


def test_pictures_are_files_of_their_own(runs, tmp_path):
    made(tmp_path, runs.think, runs.reason, svg=tmp_path / "svg")
    files = sorted((tmp_path / "svg").iterdir())
    names = [file.stem for file in files]
    assert {"accuracy", "differences", "costs", "lengths"} <= set(names)
    assert sum(name.startswith("entropy-") for name in names) == 6
    assert sum(name.startswith("plane-") for name in names) == 2
    for file in files:
        root = ET.fromstring(file.read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{*}title").text and root.find("{*}desc").text
        assert root.find(".//{*}a") is None  # there is nothing that it could lead to


def test_logprobs_are_in_the_form_of_openai(runs, tmp_path):
    made(tmp_path, runs.think, logprobs=tmp_path / "out.jsonl")
    tokenizer = Tokenizer(TINY)
    for line, record in zip(
        records_of(tmp_path / "out.jsonl"), records_of(runs.think), strict=True
    ):
        (choice,) = line["choices"]
        assert choice["message"]["content"] == tokenizer.decode(record["thought_ids"])
        content = choice["logprobs"]["content"]
        for token, step, own in zip(content, record["steps"], record["thought_ids"], strict=True):
            found = [top["logprob"] for top in token["top_logprobs"]]
            assert np.allclose(np.exp(found), step["probs"])
            assert found == sorted(found, reverse=True)
            share = dict(zip(step["ids"], step["probs"])).get(own)
            assert token["logprob"] == (math.log(share) if share else -9999.0)
            assert bytes(token["bytes"]).decode() == token["token"]


def test_several_files_are_side_by_side_and_named_where_they_share_a_method(runs, tmp_path):
    html = made(tmp_path, runs.think, runs.reason)
    rows = rows_of(next(html.all("table")), html)[1:]
    labels = [row[0] for row in rows]
    assert labels == ["soft (think)", "cot", "soft (reason)", "greedy", "sc"]
    # Two of the three problems are in both files: the difference is over those.
    of = [records_of(runs.think), records_of(runs.reason)]
    right = [{r["problem"]: r["correct"] for r in f if r["method"] == "soft"} for f in of]
    both = right[0].keys() & right[1].keys()
    gap = sum(right[1][p] - right[0][p] for p in both) / len(both)
    assert len(both) == 2 and rows[2][4].startswith(f"{100 * gap:+.1f} (")


def test_every_program_writes_a_page_of_its_run(runs, tmp_path):
    out = tmp_path / "run.html"
    for program, methods in ((think, "soft"), (reason, "greedy"), (evaluates, "zero-shot-cot")):
        few = ["--task", "tiny", "--limit", "1", "--methods", methods]
        assert program([*few, "--html", str(out)]) == 0
        html = Page(out.read_text(encoding="utf-8"))
        assert len(rows_of(next(html.all("table")), html)) - 1 == len(list(html.all("article")))
        out.unlink()
    out, file = tmp_path / "one.html", ["--output", str(tmp_path / "one.jsonl")]
    asked = ["--question", "Anna has 2 eggs. She buys 3 eggs.", "--html", str(out), "--trace"]
    assert think(["--question", "Another one.", "--trace", *file]) == 0
    for _ in range(2):  # the second time the file has the answer
        assert think([*asked, *file]) == 0
        html = Page(out.read_text(encoding="utf-8"))
        assert len(list(html.all("article"))) == len(list(html.all(**{"class": "thought"}))) == 1
        assert not list(html.all("table", id="methods"))
        out.unlink()


def test_a_page_of_a_run_has_what_its_table_has_and_not_the_rest_of_the_file(tmp_path):
    out, file = tmp_path / "run.html", ["--output", str(tmp_path / "run.jsonl")]
    whole = ["--task", "tiny", "--limit", "2", "--max-new-tokens", "9", "--num-samples", "2"]
    assert think([*whole, *file, "--methods", "soft,greedy"]) == 0
    part = ["--task", "tiny", "--limit", "1", "--max-new-tokens", "9", "--methods", "soft"]
    assert think([*part, *file, "--html", str(out)]) == 0
    html = Page(out.read_text(encoding="utf-8"))
    assert len(list(html.all("article"))) == 1


# --------------------------------------------------------------------------------------- mistakes


def failing(arguments, capsys):
    capsys.readouterr()
    assert report.command([*map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lab.report: ") and "\n" not in error
    return error


def test_a_mistake_is_one_line(runs, tmp_path, capsys):
    out, file = ["-o", tmp_path / "x.html"], tmp_path / "bad.jsonl"
    assert "cannot read" in failing([tmp_path / "none.jsonl", *out], capsys)
    assert "cannot read" in failing([tmp_path, *out], capsys)  # a folder without a log
    for text in ("", "\n", "{\n", "[1]\n", "7\n", '{"method": 1, "settings": {}}\n', '{"a": 1}\n'):
        file.write_text(text)
        error = failing([file, *out], capsys)
        assert "holds no records" in error if not text else "line 1: not a record" in error
    one = next(r for r in records_of(runs.softcot) if "soft_thoughts" in r)
    for name, value in (("norms", []), ("cosines", [[1]]), ("nearest", [[[1]]]), ("norms", "x")):
        bad = one | {"soft_thoughts": one["soft_thoughts"] | {name: value}}
        file.write_text(json.dumps(bad) + "\n")
        assert "line 1: not a record" in failing([file, *out], capsys)
    assert "cannot write" in failing([runs.think, "-o", tmp_path / "no" / "x.html"], capsys)
    assert "cannot write" in failing([runs.think, "-o", tmp_path], capsys)
    assert "cannot write" in failing([runs.think, *out, "--svg", runs.think], capsys)
    error = failing([runs.reason, *out, "--logprobs", tmp_path / "l.jsonl"], capsys)
    assert "--trace" in error
    other = records_of(runs.softcot)
    for record in other:
        record["settings"]["task"] = "gsm8k"
    file.write_text("".join(json.dumps(record) + "\n" for record in other))
    assert "mixed tasks (gsm8k, tiny)" in failing([runs.think, file, *out], capsys)
    for record in other:
        record["settings"]["task"] = "tiny"
        record["question"] += " And why?"
    file.write_text("".join(json.dumps(record) + "\n" for record in other))
    assert "tiny-00000 is another problem there" in failing([runs.think, file, *out], capsys)
    assert not (tmp_path / "x.html").exists() and not (tmp_path / "l.jsonl").exists()


POINT = {"text": "2", "answer": "2", "round": 0, "reward": 1.0, "tokens": 1, "u": [0.0]}
POINT |= {"reward_verifier": None, "reward_coherence": 1.0, "ei": None}
SEARCH = {"points": [POINT], "verdicts": [], "answers": ["2"], "rounds": 1}
VOTE = {"texts": ["2", "3"], "answers": ["2", "3"], "weights": [0.5, 1]}
STRANGE = {
    "method": [None],
    "problem": [7, ["a"], None],
    "sample": ["0", None],
    "choices": ["abc", ["a"]],
    "correct": ["yes", None],
    "seconds": ["fast", float("inf")],
    "thought_tokens": ["x"],
    "answer_tokens": [-5, 10**400],
    "stopped_by": [{}],
    "settings": [{"task": 5}, [], None],
    "steps": [{"a": 1}, [{}], 7],
    "thought_ids": [[], ["a"], [-1] * 99, [10**30] * 99],
    "texts": ["abc", ["a"]],
    "points": [[{}], {"a": 1}],
    "soft_thoughts": [[1], {"norms": [1.0]}],
}


def test_a_record_of_strange_values_is_not_a_record(runs, tmp_path, capsys):
    record, file = records_of(runs.think)[0], tmp_path / "strange.jsonl"
    for name, values in STRANGE.items():
        for value in values:
            file.write_text(json.dumps(record | {name: value}) + "\n")
            error = failing([file, "-o", tmp_path / "x.html"], capsys)
            assert error.endswith("line 1: not a record; delete the line"), name
    wrong = [VOTE | {"texts": texts} for texts in ([], ["2"], ["2", 3], "ab", None)]
    wrong += [VOTE | {"weights": weights} for weights in ([1.0], ["a", "b"], 7)]
    wrong.append(VOTE | {"texts": [], "weights": []})
    for name in ("text", "round", "reward", "tokens", "u"):
        wrong.append(SEARCH | {"points": [POINT | {name: None}]})
    wrong.append(SEARCH | {"verdicts": [{"text": "2", "tokens": 1}]})  # no answer
    for part in (SEARCH, VOTE):
        report.check(record | part)
    for part in wrong:
        with pytest.raises((ValueError, TypeError, KeyError)):
            report.check(record | part)
    for line in ('{"step": null, "loss": 1}', '{"step": 1, "loss": NaN}', '{"step": 1e999}'):
        file.write_text(line + "\n")
        assert "not a record" in failing([file, "-o", tmp_path / "x.html"], capsys)
    os.mkfifo(tmp_path / "pipe")
    assert "is a named pipe" in failing([tmp_path / "pipe", "-o", tmp_path / "x.html"], capsys)
    assert "cannot read" in failing(["x" * 5000, "-o", tmp_path / "x.html"], capsys)
    assert traces.tokenizer_of("x" * 5000) is traces.tokenizer_of("~nobody-here/x") is None


def test_a_damaged_tokenizer_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{}")
    error = failing([runs.think, "-o", tmp_path / "x.html", "--model", tmp_path], capsys)
    assert f"{tmp_path}/tokenizer.json" in error


def test_a_folder_without_a_name_makes_report_html(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    monkeypatch.chdir(tmp_path)
    assert report.command(["."]) == 0 and (tmp_path / "report.html").exists()


def test_a_half_written_last_line_is_left_out_with_a_note(runs, tmp_path, capsys):
    file = tmp_path / "half.jsonl"
    file.write_bytes(runs.think.read_bytes()[:-100])
    html = made(tmp_path, file)
    assert len(list(html.all("article"))) == len(records_of(runs.think)) - 1
    note = f"{file}: the last line is half-written and left out"
    assert note in capsys.readouterr().err
    assert [said(p) for p in html.all("p", **{"class": "note"})] == [note]


HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202eevil\u2066"
    " \x00\x07\x1b[31m \ud800 '\"&amp; {{7*7}} {% raise %} --> ]]>"
)
SHOWN = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>⟨U+202E⟩evil"
    "⟨U+2066⟩ ␀␇␛[31m ⟨U+D800⟩ '\"&amp; {{7*7}} {% raise %} --> ]]>"
)


@pytest.fixture
def hostile(runs, tmp_path):
    """Every text of the records is HOSTILE, and one is a million characters long."""
    thought, search = (
        records_of(runs.think)[0],
        next(r for r in records_of(runs.reason) if "points" in r),
    )
    vote = next(r for r in records_of(runs.reason) if "texts" in r)
    names = ["problem", "question", "gold", "answer_text", "thought_text", "extracted"]
    names += ["stopped_by", "prompt"]
    for record in (thought, search, vote):
        record |= dict.fromkeys(names, HOSTILE) | {"choices": {HOSTILE: HOSTILE}}
    thought["method"] = HOSTILE
    for point in search["points"] + search["verdicts"]:
        point |= {"text": HOSTILE, "answer": HOSTILE}
    vote["texts"] = [HOSTILE] * len(vote["texts"])
    vote["answers"] = [HOSTILE] * len(vote["answers"])
    long = vote | {"problem": "long", "answer_text": "<b>" * 333_334, "question": "q" * 1_000_000}
    strange = thought | {"problem": "ids", "thought_ids": [10**7] * len(thought["thought_ids"])}
    file = tmp_path / "hostile.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (thought, search, vote, long, strange)))
    return file


def test_hostile_text_is_shown_as_text(runs, hostile, tmp_path):
    tags = {e.tag for e in made(tmp_path, runs.think, runs.reason).all()}
    html = made(tmp_path, hostile, svg=tmp_path / "svg", logprobs=tmp_path / "l.jsonl")
    assert {e.tag for e in html.all()} <= tags | {"ul", "li"}
    assert [x.attrs.get("type") for x in html.all("script")].count(None) == 1
    texts = ["".join(map(said, html.all("div", div))) for div in html.all(**{"class": "text"})]
    assert texts.count(SHOWN) > 10
    assert "<b>" * 333_334 in texts and "q" * 1_000_000 in texts
    assert charts.UNSEEN.search("".join(map(said, html.all("body")))) is None
    for file in (tmp_path / "svg").iterdir():
        ET.fromstring(file.read_text(encoding="utf-8"))
    assert len(records_of(tmp_path / "l.jsonl")) == 2


# ----------------------------------------------------------------------------------------- pieces


def record_of(entropies, ids=None, **changes):
    """A thought with a step for each entropy, each of one component."""
    ids = ids or [5] * len(entropies)
    steps = [{"entropy": H, "ids": [i], "probs": [1.0]} for H, i in zip(entropies, ids)]
    settings = {"model": str(TINY), "cold_stop": True, "cold_stop_entropy": 0.01}
    record = {"method": "soft", "settings": settings | {"cold_stop_steps": 3}, "question": "?"}
    return record | {"thought_ids": ids, "steps": steps, "stopped_by": "think_end"} | changes


def test_where_cold_stop_counted_and_where_it_struck():
    entropies = [0.0, 0.005, 1.0, 0.001, 0.0, 0.0, 2.0]
    trace = traces.Trace(record_of(entropies, stopped_by="cold_stop"), traces.Names(None))
    assert trace.streak == [1, 2, 0, 1, 2, 3, 0]
    assert trace.strike == 5  # the third sure step in a row is the one that it replaces
    looks = [trace.token(t)[0].split() for t in range(7)]
    assert ["f" in look for look in looks] == [False] * 5 + [True] * 2
    assert [look[:1] for look in looks[2:3] + looks[6:]] == [["h4"], ["h6"]]
    assert traces.Trace(record_of(entropies), traces.Names(None)).strike is None


def test_a_token_that_is_not_the_most_probable_one_says_which_is():
    record = record_of([1.0, 1.0], [5, 6])
    record["steps"][1] = {"entropy": 1.0, "ids": [5, 6], "probs": [0.75, 0.25]}
    trace = traces.Trace(record, traces.Names(Tokenizer(TINY)))
    assert trace.greedy == {1: 5}
    look, _, tip = trace.token(1)
    assert "d" in look.split() and tip.endswith(Tokenizer(TINY).decode([5]))
    record["settings"]["noise"] = "dirichlet"
    assert trace.greedy == {1: 5}  # kept
    assert traces.Trace(record, trace.names).greedy == {}


def test_concept_tokens_are_drawn_where_a_thought_is_least_sure():
    """Bars as long as the shares; none for a thought of single tokens."""
    record = record_of([0.0] * 4 + [1.0] * 3 + [0.0] * 4)
    for t, probs in ((4, [0.5, 0.5]), (5, [0.7, 0.2, 0.1])):
        record["steps"][t] |= {"ids": list(range(7, 7 + len(probs))), "probs": probs}
    chart = concepts(traces.Trace(record, traces.Names(None)))
    assert (chart.x.low, chart.x.high) == (2.5, 7.5)  # the first five that hold all three
    bars = re.findall(r'class="area c0" d="M([\d.]+) [\d.]+L([\d.]+) ', chart.svg())
    wide = 0.94 * (640 - chart.left - chart.right) / 5
    shares = [(float(end) - float(start)) / wide for start, end in bars]
    assert shares == pytest.approx([1, 1, 0.5, 0.5, 0.7, 0.2, 0.1, 1], abs=0.01)
    assert chart.svg().count("#8") == 2 and ">70%<" in chart.svg()
    assert concepts(traces.Trace(record_of([1.0] * 3), traces.Names(None))) is None


def test_characters_of_several_tokens_are_whole(folder_of):
    """The tokenizer of golden models has a token for each byte."""
    tokenizer = Tokenizer(folder_of("qwen3"))
    text = "naïve 思考 🙂 a"
    ids = tokenizer.encode(text)
    texts = traces.Names(tokenizer).texts(ids)
    assert "".join(texts) == text and len(texts) == len(ids) == len(text.encode())
    assert traces.Names(None).texts([3, 4]) == ["#3 ", "#4 "]
    broken = traces.Names(tokenizer).texts(tokenizer.encode("é")[:1] + tokenizer.encode("abcd"))
    assert "".join(broken).endswith("abcd")


def test_a_long_thought_is_laid_out_piece_by_piece():
    """32,768 steps: rows of at most 200 tokens, and an element only where there is a shade."""
    rng = np.random.default_rng(0)
    entropies = np.where(rng.random(32768) < 0.1, 1.0, 0.0).tolist()
    ids = rng.integers(5, 500, 32768).tolist()
    trace = traces.Trace(record_of(entropies, ids), traces.Names(Tokenizer(TINY)))
    pieces = trace.pieces()
    assert [t for piece in pieces for t in piece] == list(range(32768))
    assert max(map(len, pieces)) <= traces.PIECE
    runs = [run for row in trace.rows() for run in row["runs"]]
    assert "".join(text for _, text, _ in runs) == "".join(trace.texts)
    assert sum(look.startswith("h") for look, _, _ in runs) == sum(entropies)
    assert sum(not look for look, _, _ in runs) < 32768 / 5


def test_alignment_keeps_both_orders_and_puts_equal_texts_side_by_side():
    a, b = list("xabcyd"), list("abzcd")
    rows = traces.aligned(a, b)
    assert [i for i, _ in rows if i is not None] == list(range(len(a)))
    assert [j for _, j in rows if j is not None] == list(range(len(b)))
    same = [a[i] for i, j in rows if i is not None and j is not None and a[i] == b[j]]
    assert same == list("abcd")
    assert traces.sentences("One is 3.5. Two:\nthree!  Four") == [
        "One is 3.5.",
        "Two:",
        "three!",
        "Four",
    ]


def test_contours_of_a_cone_are_circles():
    x, y = np.meshgrid(np.linspace(-1, 1, 81), np.linspace(-1, 1, 81))
    ends = [p for pair in charts.contours(np.hypot(x, y), 0.5) for p in pair]
    radii = [math.hypot(c / 40 - 1, r / 40 - 1) for c, r in ends]
    assert len(ends) > 100 and max(abs(r - 0.5) for r in radii) < 1e-3
    assert charts.contours(np.hypot(x, y), 2.0) == []


def test_the_plane_is_that_of_the_points():
    """Points of a plane in 9 dimensions keep all their distances in the picture."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(9, 2)))[0]
    U = rng.normal(size=(7, 2)) @ basis.T + 3.0
    points = [
        {"round": i % 3, "u": u.tolist(), "reward": float(u[0]), "answer": "1"}
        for i, u in enumerate(U)
    ]
    chart = pictures.plane(Entry({"points": points}, 0, 0))
    pairs = re.findall(
        r'<circle class="dot c\d" cx="([\d.]+)" cy="([\d.]+)" r="(?:4.5|7)"', chart.svg()
    )
    pixels = np.array(pairs, dtype=float)[-7:]
    across = 640 - chart.left - chart.right
    down = chart.height - chart.top - chart.bottom
    scale = [(chart.x.high - chart.x.low) / across, (chart.y.high - chart.y.low) / down]
    there = pixels * scale
    apart = lambda P: np.linalg.norm(P[:, None] - P[None], axis=-1)
    assert np.allclose(apart(there), apart(U), atol=0.02)
    assert "hold 100% of the variance" in chart.svg()
    assert pictures.plane(Entry({"points": points[:2]}, 0, 0)) is None


def test_accuracy_at_fewer_tokens():
    """Worked by hand: votes of 1, 2 and 4 answers, and a search after its first round."""
    about = {"problem": "p", "question": "?", "gold": "7", "choices": None, "method": "sc"}
    about |= {"settings": {"select": "best"}, "extracted": "7", "correct": True}
    vote = about | {"answers": ["8", "7", "7", "8"], "texts": ["", "", "", ""], "weights": None}
    vote |= {"tokens": [10, 20, 30, 40], "answer_tokens": 100, "correct": False}
    other = vote | {"answers": ["7", "7", "8", None], "tokens": [1, 1, 1, 1], "answer_tokens": 4}
    other |= {"correct": True}
    found = costs.curve([Entry(vote, 0, 0), Entry(other, 1, 0)], TASKS["tiny"])
    ones, twos = (5.5, 0.5, "1 of 4 answers"), (16.0, 0.5, "2 of 4 answers")
    assert found == [ones, twos, (52.0, 0.5, "in the end")]
    points = [
        {"round": r, "answer": a, "reward": f, "tokens": 10}
        for r, a, f in ((0, "8", 1.0), (0, None, 3.0), (1, "7", 2.0))
    ]
    search = about | {"points": points, "rounds": 2, "answer_tokens": 36}
    search |= {"verdicts": [{"tokens": 5, "answer": "8"}, {"tokens": 1, "answer": "7"}]}
    found = costs.curve([Entry(search, 0, 0)], TASKS["tiny"])
    assert found == [(25.0, 0.0, "after round 0"), (36.0, 1.0, "in the end")]
    search["settings"] = {"select": "vote"}  # 8 and the verdict's 8
    assert costs.curve([Entry(search, 0, 0)], TASKS["tiny"])[0][1] == 0.0


def test_axes_have_round_numbers():
    assert charts.Axis(0, 10).ticks() == [0, 2, 4, 6, 8, 10]
    assert charts.Axis(0.0, 0.12).ticks() == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert charts.Axis(1e-4, 3.0, log=True).ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])
    assert charts.Axis(1, 100, log=True).place(10) == 0.5 and charts.Axis(2, 4).place(9) == 1


# ---------------------------------------------------------------------------------------- browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")
DRIVE = """(async () => {
const said = {};
const panel = document.getElementById("panel");
const read = () => [...panel.querySelectorAll("div")].map((row) =>
  [row.firstChild.textContent, row.lastChild.textContent]);
for (const details of document.querySelectorAll("details.problem")) {
  details.open = true;
  details.dispatchEvent(new Event("toggle")); // else it comes later
  await build(details);
}
await new Promise((done) => setTimeout(done));
said.steps = [...document.querySelectorAll("article .thought")].map((thought) => {
  thought.querySelector(".piece[data-start='0']").focus();
  const steps = [];
  for (let token = document.activeElement; token; ) {
    steps.push([token.textContent, read(), document.activeElement === token]);
    token.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
    token = document.activeElement === token ? null : document.activeElement;
  }
  return [thought.closest("article").id, steps];
});
const token = document.querySelector(".piece i");
panel.hidden = true;
token.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
said.hover = panel.hidden ? null : read();
document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
said.escaped = panel.hidden;
const form = document.getElementById("filter");
said.counts = {};
for (const [name, value] of CASES) {
  form.reset();
  form.elements[name].value = value;
  form.dispatchEvent(new Event("input", {bubbles: true}));
  const shown = [...document.querySelectorAll("article")].filter((a) => a.checkVisibility());
  said.counts[name + "=" + value] = [document.getElementById("count").textContent, shown.length];
}
location.hash = "r1";
addEventListener("hashchange", () => setTimeout(() => {
  said.revealed = document.getElementById(location.hash.slice(1)).checkVisibility();
  said.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const out = document.createElement("pre");
  out.id = "said";
  out.textContent = JSON.stringify(said);
  document.body.append(out);
}));
})();
"""


def opened(path, *flags):
    """The DOM of a page in a browser without a network, and what its console says."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000", *flags]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
@pytest.mark.parametrize("large", [False, True])
def test_in_a_browser_hover_focus_and_filters_show_what_the_file_holds(
    large, runs, tmp_path, monkeypatch
):
    of = records_of(runs.think)
    monkeypatch.setattr(page, "LARGE", 0 if large else page.LARGE)
    made(tmp_path, runs.think)
    cases = [["outcome", "right"], ["outcome", "wrong"], ["label", "1"], ["end", "think_end"]]
    cases += [["problem", of[0]["problem"]], ["problem", ""]]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    script = f"<script>{DRIVE.replace('CASES', json.dumps(cases))}</script></body>"
    text = re.sub(r'<meta http-equiv="Content-Security[^>]*>', "", text)
    driven = tmp_path / "driven.html"
    driven.write_text(text.replace("</body>", script), encoding="utf-8")
    dom, console = opened(driven)
    assert console == []
    found = json.loads(said(next(Page(repaired(dom)).all("pre", id="said"))))
    names = traces.Names(Tokenizer(TINY))
    seen = lambda token: names.name(token).replace(" ", "␣").replace("\n", "⏎")
    assert len(found["steps"]) == len(of)
    for number, steps in found["steps"]:
        record = of[int(number[1:])]
        assert len(steps) == len(record["steps"])
        for (text, rows, focused), step, own in zip(steps, record["steps"], record["thought_ids"]):
            assert focused and text == names.name(own)
            assert rows == [
                [seen(i), f"{100 * p:.2f} %"] for i, p in zip(step["ids"], step["probs"])
            ]
    assert found["hover"] == found["steps"][0][1][0][1] and found["escaped"]
    expected = [
        sum(record["correct"] for record in of),
        sum(not record["correct"] and record["extracted"] is not None for record in of),
        sum(record["method"] == "cot" for record in of),
        sum(record["stopped_by"] == "think_end" for record in of),
        sum(record["problem"] == of[0]["problem"] for record in of),
        len(of),
    ]
    for (name, value), n in zip(cases, expected):
        assert found["counts"][f"{name}={value}"] == [f"{n} of {len(of)} records", n]
    assert found["revealed"] and found["requests"] == []


def repaired(dom):
    """Chromium's DOM as text, whose only open elements are those without an end."""
    return dom[dom.index("<html") :]


@browser
def test_in_a_browser_no_page_complains_or_is_changed_by_what_it_shows(runs, hostile, tmp_path):
    for files in ([hostile], [runs.reason, runs.softcot, runs.trained]):
        html = made(tmp_path, *files)
        dom, console = opened(tmp_path / "page.html")
        assert console == []
        there = Page(repaired(dom))
        for tag in ("article", "script", "svg", "circle", "img"):
            assert len(list(there.all(tag))) == len(list(html.all(tag)))
        assert said(next(there.all("title"))) == said(next(html.all("title")))
