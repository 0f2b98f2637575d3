"""README: what a machine can check of its links, functions, flags, aliases, code, and size."""

import ast
import re

import pytest
import torch
from conftest import ROOT

import model
from baselines import sampling
from lab import flags
from model import Prompt, Request, decode
from soft_thinking import Settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("lab/RESULTS.md", "lab/SPEED.md")}
TABLE = README[README.index("## Paper and code") : README.index("## In Python")]


def functions(file):
    """Every function, class and method (Class.method) of a file."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else ()
            found |= {f"{node.name}.{x.name}" for x in inner if isinstance(x, ast.FunctionDef)}
    return found


def test_it_is_short():
    assert README.count("\n") <= 150


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert link.startswith("https://arxiv.org/abs/") or (ROOT / link).exists()


def test_every_function_of_the_table_stands_in_its_file():
    file, named = None, 0
    for row in TABLE.splitlines():
        cells = row.split("|")
        if not row.startswith("| ") or len(cells) != 4:
            continue
        if link := re.search(r"\]\((\w+\.py)\)", cells[2]):
            file = link[1]
        for name in re.findall(r"`([\w.]+)`", cells[2]):
            assert name in functions(file), f"{name} is not in {file}"
            named += 1
        if file == "gp.py":  # its row names it for itself alone
            file = "soft_reasoning.py"
    assert named > 15


@pytest.mark.parametrize("file", ["README.md", *DOCUMENTS])
def test_every_flag_that_is_named_exists(file):
    known = set(re.findall(r'"--?([a-z][\w-]*)"', "".join(p.read_text() for p in source_files())))
    bench = (ROOT / "lab" / "bench.py").read_text()
    known |= set(re.findall(r'"([a-z]+)"', bench[bench.index("def read_arguments") :]))
    known |= {name.replace("_", "-") for name in fields_of_settings()} | set(flags.FLAGS) | {"help"}
    known |= {"nproc-per-node", "nnodes"}  # of torchrun
    known |= {f"no-{name}" for name in known}
    text = (ROOT / file).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    assert named - known == set()


def source_files():
    return [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), ROOT / "tiny" / "make.py"]


def fields_of_settings():
    """Of every Settings and Training of a method or baseline."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in ("Settings", "Training"):
                yield from (x.target.id for x in node.body if isinstance(x, ast.AnnAssign))


def test_every_alias_that_is_named_exists():
    named = set(re.findall(r"--(?:model|assistant) ([\w.-]+)", README))
    assert named and all(name in model.ALIASES for name in named)


def test_the_method_that_it_shows_decodes(folder_of):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class" in b)
    names = {}
    exec(block, names)  # noqa: S102 (our own README)
    transformer, _ = model.load(str(folder_of("qwen3")), "cpu", "float32")
    prompt = Prompt(transformer.embed(torch.tensor([5, 80, 70])))
    (out,) = decode(transformer, [Request(prompt)], names["Greedy"](transformer), 2, 6)
    embeds = prompt.embeds
    for token in out.ids:
        assert token == transformer.logits(transformer(embeds[None])[0, -1]).argmax()
        embeds = torch.cat([embeds, transformer.embed.weight[token][None]])


def test_the_defaults_are_the_papers():
    s = Settings()
    assert (s.temperature, s.top_k, s.top_p, s.max_topk) == (0.6, 30, 0.95, 10)
    assert (s.cold_stop_entropy, s.cold_stop_steps, s.max_new_tokens) == (0.01, 256, 32768)
    assert (sampling.Settings().k, sampling.Settings().dimension) == (5, 50)


FIGURES = sorted((ROOT / "lab" / "figures").glob("*"))


@pytest.mark.parametrize("path", [ROOT / "lab" / "seam.svg", *FIGURES], ids=lambda path: path.name)
def test_the_pictures_are_well_formed_and_know_both_colour_schemes(path):
    import xml.dom.minidom

    text = path.read_text(encoding="utf-8")
    xml.dom.minidom.parseString(text)
    assert "prefers-color-scheme: dark" in text and "<title" in text
    assert "href" not in text and "<script" not in text


def test_the_figures_are_small():
    assert FIGURES and sum(path.stat().st_size for path in FIGURES) < 150_000
    assert all(f"figures/{p.name}" in README + "".join(DOCUMENTS.values()) for p in FIGURES)
