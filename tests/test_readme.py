"""The README's claims that a machine can check: every line of code that it points to, every flag, every alias."""

import re

import pytest
from conftest import ROOT

import model
import soft_reasoning
import soft_thinking
import softcot

README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"\[(\w+\.py):(\d+)\]\(\w+\.py#L\d+\) `(.+?)` *\|", README)


def test_there_are_lines_to_check():
    assert len(ROWS) > 20


@pytest.mark.parametrize("file, line, code", ROWS)
def test_each_line_that_the_tables_point_to_holds_that_code(file, line, code):
    text = (ROOT / file).read_text().splitlines()
    where = [i for i, content in enumerate(text, 1) if code in content]
    assert int(line) in where, f"{code} stands in line {where}"
    assert f"[{file}:{line}]({file}#L{line})" in README


def test_every_flag_that_is_named_exists():
    known = set()
    for parser in (soft_thinking.command_line(), soft_reasoning.command_line(),
                   *(softcot.command_line(command) for command in ("train", "eval", None))):
        known |= {option for action in parser._actions for option in action.option_strings}
    known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / "bench.py").read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known == set()


def test_every_alias_that_is_named_exists():
    named = set(re.findall(r"--model ([\w.-]+)", README))
    assert named and all(name in model.ALIASES for name in named)
