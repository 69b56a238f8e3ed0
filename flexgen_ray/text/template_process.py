"""The process that renders chat templates: `python -m flexgen_ray.text.template_process SECONDS`.

A chat template is a program that comes with the model, so it is not trusted. Three walls stand
around it: jinja2's sandbox, which gives it no attributes of Python objects; a process of its own,
so that nothing of the run can be reached; and limits of CPU time and memory for this process, set
by the kernel, so that an endless or exploding template ends this process alone.

Reads one JSON object a line from standard input, {"template": source, "variables": {...}, "now":
ISO time}, and writes {"text": ...} or {"error": ...} to standard output. Imports nothing heavier
than jinja2, since the first chat waits for this process to start.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MEMORY = 2**30
# Limit of a text: this many characters for each of its input line, plus a constant.
MAX_GROWTH, MAX_MORE_CHARACTERS = 4, 2**20


class _Generation(Extension):
    """The block `{% generation %}`, which marks answers for training: its content is kept as is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        """Parse the block up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return caller()


class _PlainNamespace(Namespace):
    """jinja2's namespace(), which refuses names with a leading underscore, Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:  # no parameter `self`: a value may be so named
        self, *more = args
        values = dict(*more, **values)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't have a {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """Return a value as JSON without the HTML escapes of jinja2's own filter tojson."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """Compile a template in the sandbox, with the functions that transformers provides."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _PlainNamespace
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], now: datetime) -> str:
    """Return the text that a template renders from its variables; `now` is the time it sees."""
    return _compile(source).render({"strftime_now": now.strftime} | variables)


def _reply(line: bytes) -> dict[str, str]:
    """Render one input line. Whatever the template raises becomes the reply's error."""
    asked = json.loads(line)
    most = MAX_GROWTH * len(line) + MAX_MORE_CHARACTERS
    try:
        text = render(asked["template"], asked["variables"], datetime.fromisoformat(asked["now"]))
    except MemoryError:
        return {"error": f"it takes more than {MAX_MEMORY} bytes of memory"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}
    if len(text) > most:
        return {
            "error": f"it makes {len(text)} characters of {len(line)}; {most} at most are allowed"
        }
    return {"text": text}


def main(max_seconds: float) -> None:
    """Render chats until standard input ends. max_seconds: limit of CPU time for one chat."""
    # Ctrl-C reaches all processes of a terminal; the one that asks for chats decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The default action of SIGPROF ends the process. It can't be caught by the template, nor wait
    # for Python, as a handler would while a long call in C runs.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Memory: allocations beyond the limit fail with MemoryError, which `_reply` answers.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MAX_MEMORY if hard == resource.RLIM_INFINITY else min(hard, MAX_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        # ITIMER_PROF counts CPU time of this process, so a busy machine fails no chat.
        signal.setitimer(signal.ITIMER_PROF, max_seconds)
        reply = json.dumps(_reply(line)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
