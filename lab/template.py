"""Chat templates of strangers: limits on their time and memory, and that they say the message.

jinja2's sandbox keeps a template from Python's internals, but not from a loop that does not end.
"""

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import jinja2.sandbox

from model import Tokenizer, UserError

SECONDS = 5  # of the processor; a template takes a millisecond
MEMORY = 1 << 30  # bytes, beside what the process has
PROBE = "message"

# A constant 9 ** 9 ** 9 is then computed when it is rendered, within the limits, not when parsed.
jinja2.sandbox.SandboxedEnvironment.intercepted_binops = frozenset(["*", "**"])


class Limited:
    """A template that may take so long and so much. Outside the main thread only so much."""

    def __init__(self, template: jinja2.Template):
        self.template = template

    def render(self, **values: Any) -> str:
        limits, timed = resource.getrlimit(resource.RLIMIT_AS), is_main_thread()
        before = signal.signal(signal.SIGVTALRM, give_up) if timed else None
        try:
            resource.setrlimit(resource.RLIMIT_AS, (most(limits[0]), limits[1]))
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            return self.template.render(**values)
        except MemoryError:
            raise jinja2.TemplateError(f"it takes more than {MEMORY >> 30} GiB") from None
        except RecursionError:
            raise jinja2.TemplateError("it does not end") from None
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, before)
            resource.setrlimit(resource.RLIMIT_AS, limits)


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def most(limit: int) -> int:
    """The address space that a template leaves to the process: what it has, and MEMORY."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return limit
    wanted = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
    return wanted if limit == resource.RLIM_INFINITY else min(wanted, limit)


def give_up(*_: Any) -> None:
    raise jinja2.TemplateError(f"it does not end within {SECONDS} s")


def limit(tokenizer: Tokenizer) -> None:
    """From now on the tokenizer's template is limited. UserError where it drops what is asked."""
    if tokenizer.template is None:
        return
    tokenizer.template = Limited(tokenizer.template)
    if PROBE not in tokenizer.render(PROBE):
        raise UserError("the chat template drops the user's message: use another model")
