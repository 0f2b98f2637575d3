"""lab/native.py: what is compiled is kept, and is made anew where anything of it changes."""

import ctypes
import shutil
import subprocess

import pytest

from lab import native

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
SIZES = {"T": "X", "BFLOAT16": 0}
library = native.library.__wrapped__  # without what this process has already


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """The commands that made a library in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda x, **kw: (made.append(x) if "-o" in x else None, run(x, **kw))[1]
    )
    return made


def test_a_library_is_compiled_once_for_its_sizes(compilations, tmp_path, capsys):
    for _ in range(2):
        assert library("products", **SIZES).run
    assert len(compilations) == 1 == len(list(tmp_path.glob("*/cpp/products-*.so")))
    assert library("products", **SIZES | {"T": "int8_t"}).run and len(compilations) == 2
    assert all(path.suffix == ".so" for path in tmp_path.glob("*/cpp/*"))  # nothing else is left
    assert capsys.readouterr().err.count("compiled products.cpp in ") == 2


def test_another_compiler_or_other_flags_compile_anew(compilations, monkeypatch):
    library("products", **SIZES)
    monkeypatch.setenv("CXX", "g++ -DMORE")
    library("products", **SIZES)
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-O1"])
    library("products", **SIZES)
    assert len(compilations) == 3


def test_a_changed_file_is_compiled_anew(compilations, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    for number, more in (1, 0), (1, 0), (2, 0), (2, 5):
        (tmp_path / "vectors.h").write_text(f"constexpr int more = {more};")
        code = f'#include "vectors.h"\nextern "C" const int number = {number} + more;'
        (tmp_path / "own.cpp").write_text(code)
        assert ctypes.c_int.in_dll(library("own"), "number").value == number + more
    assert len(compilations) == 3


def test_what_does_not_compile_leaves_nothing(compilations, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "vectors.h").touch()
    (tmp_path / "own.cpp").write_text("no C++")
    with pytest.raises(RuntimeError, match=r"own.cpp does not compile: .*own.cpp:1:1: error: "):
        library("own")
    assert list(tmp_path.glob("*/cpp/*")) == []
