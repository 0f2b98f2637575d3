"""Runs a program that nobody has read, and tells whether it came to its end.

    finished("assert 1 + 1 == 2")  # True

A fresh `python -I` in a session and a temporary folder of its own, with an empty input and next to
no environment, may use SECONDS (of clock and of processor), MEMORY, and files of FILE bytes; it may
start no process and no thread. Then all of its process group is killed and the folder is removed.

Whether it came to its end is not read from its exit code. After its last line it is sent a random
number that it has to send back; until then this number does not exist, so that a program cannot
find it, nor leave early with success.

What else holds depends on the machine, and is printed once. The safest of these is used:

- Linux with `unshare`, as root or with user namespaces: no network, no other process in sight,
  what is mounted is read-only, but for a folder in memory, and nothing that was started outlives
  the program.
- Otherwise a program can do what its user can: use the network, write files, and end whatever else
  that user runs, this process included.
- Root's programs are run as `nobody`, who may read root's files where Python is one of them. They
  are refused where `setpriv` is missing, since Linux limits no processes of root's.
- Elsewhere than on Linux, limits that the system does not know are left out.

This guards against accidents, not against an attacker: a program shares its process with the tests
behind it, and one that was written to deceive this file can. Use a machine that you can lose.
"""

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from model import UserError

SECONDS, MEMORY, FILE = 10, 1 << 30, 1 << 24
LIMITS = {
    "RLIMIT_CPU": SECONDS,
    "RLIMIT_AS": MEMORY,
    "RLIMIT_FSIZE": FILE,
    "RLIMIT_NPROC": 0,
    "RLIMIT_CORE": 0,
}
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # else `import numpy` starts threads, and fails
NOBODY = 65534
PYTHON = sys.version, sys.base_prefix

# Reads the program before it is run. A module that is not __main__: what stands under
# `if __name__ == "__main__"` reads input or ends the process.
DRIVER = """
import json, os, resource, sys, types
messages, out = os.fdopen(os.dup(0), "rb"), os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
job = json.loads(messages.readline())
for name, most in job["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (most, most))
    except (ValueError, OSError, AttributeError):
        pass
module = sys.modules["program"] = types.ModuleType("program")
exec(compile(job["program"], "program.py", "exec"), module.__dict__)
os.write(out, b"end\\n")
os.write(out, messages.readline())
"""

# Every mount becomes read-only, with the options that it has; the folder is one in memory. The
# shell stays: it is the parent that a program sees.
INSIDE = """
while read -r _ place _ options _; do
    mount -o "remount,bind,$options,ro" "$place" 2>/dev/null
done < /proc/self/mounts
mount -t tmpfs -o size=64m none . && cd "$PWD" && "$@"
:
"""
NAMESPACES = "--mount --net --ipc --pid --fork --kill-child --mount-proc"
OWN = "--user --map-root-user"  # who is not root is so in a namespace of its own
NO_ROOT = f"--reuid={NOBODY} --regid={NOBODY} --clear-groups --no-new-privs"
CAPABILITIES = ("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all")

# It is this Python: one whose library the user cannot read may find another's instead.
PROBE = f"import decimal, sys\nassert (sys.version, sys.base_prefix) == {PYTHON}"

Way = tuple[list[str], str]  # what stands before Python's command, what holds


def ways() -> list[Way]:
    """All ways to run a program, the safest first. UserError where none can be safe."""
    sh, unshare, setpriv = (shutil.which(name) for name in ("sh", "unshare", "setpriv"))
    namespaces, found = NAMESPACES.split(), []
    if os.geteuid() == 0:
        if not setpriv:
            raise UserError(
                "generated programs are not run as root without `setpriv` of util-linux: install "
                "it, or start this as another user"
            )
        no_root = [setpriv, *NO_ROOT.split()]
        # The second for a Python that lies in root's own folder: it may read what is root's.
        kept = ("", ",+dac_read_search")
        inside = outside = [[*no_root, *(name + more for name in CAPABILITIES)] for more in kept]
    else:
        namespaces += OWN.split()
        # A second user namespace has no power over the mounts of the first.
        inside, outside = [[unshare, "--user"]], [[]]
    if unshare:
        holds = "without network, and they can write in their folder alone"
        command = [unshare, *namespaces, sh, "-c", INSIDE, "sh"]
        found += [([*command, *drop], holds) for drop in inside]
    holds = "WITH network, and with the files and processes of their user: `unshare` fails here"
    return found + [([sh, "-c", '"$@"; :', "sh", *drop], holds) for drop in outside]


@functools.cache
def way() -> Way:
    """The safest way that works on this machine; says so once. UserError where none does."""
    for found in ways():
        if attempt(found, PROBE):
            print(f"generated programs are run {found[1]}", file=sys.stderr)
            return found
    raise UserError("generated programs cannot be run here: no sandbox of lab/sandbox.py works")


def finished(program: str) -> bool:
    """Run a program; whether it came to its end, without an error and within the limits."""
    return attempt(way(), program)


def attempt(way: Way, program: str) -> bool:
    """As `finished`, in one way."""
    before, _ = way
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        process = subprocess.Popen(
            [*before, sys.executable, "-I", "-c", DRIVER],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + SECONDS
        try:
            send(process, json.dumps({"program": program, "limits": LIMITS}))
            if reply(process, deadline) != b"end\n":
                return False
            number = secrets.token_hex(16)
            send(process, number)
            return reply(process, deadline) == f"{number}\n".encode()
        except BrokenPipeError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # what was not sent
                process.stdin.close()


def send(process: subprocess.Popen, line: str) -> None:
    process.stdin.write(line.encode() + b"\n")
    process.stdin.flush()


def reply(process: subprocess.Popen, deadline: float) -> bytes:
    """The next line that a process writes; b"" where it ends or the time is over."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 100:
        left = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([process.stdout], [], [], left)
        block = os.read(process.stdout.fileno(), 100) if ready else b""
        if not block:
            return b""
        line += block
    return line
