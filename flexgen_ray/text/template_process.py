"""The process that renders chat templates: `python -m flexgen_ray.text.template_process SECONDS`.

A template is a program from whoever made the model, so it runs in a sandbox, in a process of its
own, whose time and memory the kernel limits. Reads one JSON object a line, {"template": source,
"variables": {...}, "now": ISO time}, and writes {"text": ...} or {"error": ...}. Imports nothing
but jinja2, for it starts with the first chat.
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
# A chat's text may be longer than what it is made of by this.
MAX_GROWTH, MAX_MORE_CHARACTERS = 4, 2**20


class _Generation(Extension):
    """`{% generation %}` marks answers in transformers' templates, for training; only a mark."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return caller()


class _PlainNamespace(Namespace):
    """Refuses names that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:  # a value may be called self
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
    """Without the escapes that HTML needs."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A template with what transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _PlainNamespace
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], now: datetime) -> str:
    """The text that a template makes of its variables at a time of day."""
    return _compile(source).render({"strftime_now": now.strftime} | variables)


def _reply(line: bytes) -> dict[str, str]:
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
        return {"error": f"it makes {len(text)} characters of {len(line)}; {most} are the most"}
    return {"text": text}


def main(max_seconds: float) -> None:
    """Renders until its standard input ends; the kernel ends it if a chat takes too long.

    max_seconds: of CPU time, for one chat.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MAX_MEMORY if hard == resource.RLIM_INFINITY else min(hard, MAX_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, max_seconds)
        reply = json.dumps(_reply(line)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
