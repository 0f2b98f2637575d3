"""lab/sandbox.py: what a program cannot do there, and that it cannot pretend to have ended well."""

import os
import socket
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from lab import sandbox
from model import UserError


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """The folders of the programs are in one where nothing is left."""
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    yield
    assert os.listdir(tmp_path / "runs") == []


def needs_namespaces():
    if "without network" not in sandbox.way()[1]:
        pytest.skip("this machine has no namespaces for this user")


def test_a_program_that_comes_to_its_end_has_finished():
    assert sandbox.finished("print('x' * 10**6)\nassert sum(range(4)) == 6")
    assert sandbox.finished("open('own', 'w').write('text')\nassert open('own').read() == 'text'")
    data = (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1"
    )
    assert sandbox.finished(data)
    assert sandbox.finished("if __name__ == '__main__':\n    input()")
    assert sandbox.finished("x = '" + "a" * 10**6 + "'")  # more than a pipe holds
    assert sandbox.finished(f"import sys; assert sys.version == {sys.version!r}")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "1 +",
        "\0",
        "x = '\udcff'",
        "input()",  # there is none
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise KeyboardInterrupt",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.closerange(0, 100)",
        "import os; os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['true'])",
        "x = bytearray(1 << 31)",
        "f = open('own', 'wb')\nfor _ in range(20): f.write(bytes(1 << 20))",
        "import os; os.environ['HOME']",
    ],
)
def test_what_fails_or_leaves_early_has_not(program):
    assert not sandbox.finished(program)


DEAF = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: time.sleep(1)
"""
BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(99)", DEAF, BOMB])
def test_what_does_not_end_is_ended(program, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "SECONDS", 1)
        start = time.monotonic()
        assert not sandbox.finished(program)
        assert time.monotonic() - start < 3
    assert sandbox.finished("pass")  # the next is run as ever


NUMBER = "0123456789abcdef" * 2  # in the form of another run's


@pytest.mark.parametrize("way", [0, -1])
@pytest.mark.parametrize(
    "said",
    [
        f"b'{NUMBER}\\n'",
        "b'True\\n'",
        # all that it can find, in every frame below its own
        "''.join(map(str, sys._getframe(1).f_globals.values())).encode() + b'\\n'",
    ],
)
def test_no_program_can_say_that_it_has_ended(said, way):
    """It leaves with success, after it has written to all files that are open."""
    way = sandbox.ways()[way]  # the safest and the last
    lines = ["import os, sys", "for fd in range(100):", f"    try: os.write(fd, {said})"]
    program = "\n".join([*lines, "    except OSError: pass"])
    assert not sandbox.attempt(way, program)
    assert not sandbox.attempt(way, program + "\nos._exit(0)")


def test_the_number_is_made_after_the_end(monkeypatch):
    """What does not exist cannot be found."""
    made = []
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda n: made.append(n) or NUMBER)
    assert not sandbox.finished("import os; os._exit(0)") and made == []
    assert sandbox.finished("pass") and made == [16]


def test_its_parent_and_its_group_are_not_ours():
    for target in ("os.getppid()", "0"):
        sandbox.finished(f"import os; os.kill({target}, 9)")
    assert sandbox.finished("pass")  # we are still here


def test_nothing_of_ours_is_in_its_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "of ours")
    assert sandbox.finished("import os; assert 'SECRET' not in os.environ")
    needs_namespaces()
    read = "from pathlib import Path\nfor p in Path('/proc').glob('[0-9]*'):\n"
    read += (
        "    try: assert b'of ours' not in (p / 'environ').read_bytes()\n    except OSError: pass"
    )
    assert sandbox.finished(read)


def test_nothing_is_written_outside_its_folder(tmp_path):
    needs_namespaces()
    tmp_path.chmod(0o777)
    for place in (tmp_path / "new", "/tmp/new", "/dev/shm/new", Path.home() / "new", __file__):
        refused = f"try: open({str(place)!r}, 'a')\nexcept OSError: pass\nelse: assert False"
        assert sandbox.finished(refused), place
    assert not (tmp_path / "new").exists()


def test_there_is_no_network():
    needs_namespaces()
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
        socket.create_connection(where, timeout=2).close()  # from here it can be reached
        assert not sandbox.finished(f"import socket; socket.create_connection({where}, timeout=2)")


def test_what_was_started_does_not_outlive_the_program(monkeypatch):
    """Were a process let through, it would end with the program, even in a session of its own."""
    needs_namespaces()
    mark = uuid.uuid4().hex
    monkeypatch.setattr(sandbox, "DRIVER", f"# {mark}\n{sandbox.DRIVER}")
    monkeypatch.setattr(sandbox, "LIMITS", {})

    def running():
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if mark.encode() in file.read_bytes():
                    yield file
            except OSError:
                pass

    program = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(60)"
    assert sandbox.finished(program)
    deadline = time.monotonic() + 5
    while list(running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(running()) == []


def test_root_without_setpriv_runs_nothing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="not run as root without `setpriv`"):
        sandbox.ways()


def test_where_no_way_works_it_is_said(monkeypatch):
    sandbox.way.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(sandbox, "attempt", lambda *_: False)
        with pytest.raises(UserError, match="cannot be run here"):
            sandbox.way()
