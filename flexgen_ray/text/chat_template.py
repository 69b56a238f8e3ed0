"""Formats chats with a model's chat template, in a process with limits of time and memory.

Knows templates and messages; nothing of tokens. `template_process.py` is the program of that
process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from datetime import datetime
from threading import Lock
from typing import Any

from flexgen_ray.text.messages import ChatOptions, Messages

_PROGRAM = "flexgen_ray.text.template_process"
# A mark after the final message, to find its end in the text. It ends with a space, which shows
# whether the template trims messages.
_CUT = "CUT THE FINAL MESSAGE HERE "


class ChatTemplate:
    """A model's chat template. Safe to use from any thread.

    The process that renders starts with the first chat, and ends with `close`, with this object, or
    with the interpreter.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, Any], max_seconds: float = 5.0
    ) -> None:
        """source: the jinja2 template. special_tokens: variables that every template gets.

        max_seconds: limit of CPU time for one chat.
        """
        self.source = source
        self.max_seconds = max_seconds
        self._special_tokens = special_tokens
        self._lock = Lock()
        self._process: subprocess.Popen | None = None
        self._end = lambda: None

    def render(self, messages: Messages, options: ChatOptions, now: datetime) -> str:
        """Return the text of a chat up to where the answer begins.

        now: the time that the template sees.
        Raises ValueError if the template refuses the chat, or exceeds its limits.
        """
        if options.tools and "tools" not in self.source:
            raise ValueError(
                "the model's chat template describes no tools; leave tools out, or describe them "
                "in a message"
            )
        # OpenAI's newer name of the role "system".
        if "developer" not in self.source:
            as_system = {"role": "system"}
            messages = [it | as_system if it["role"] == "developer" else it for it in messages]
        final = str(messages[-1]["content"])
        if options.continue_final_message:
            messages = [*messages[:-1], messages[-1] | {"content": final + _CUT}]
        variables = self._special_tokens | {
            "documents": None,
            **options.chat_template_kwargs,
            "messages": messages,
            "tools": options.tools,
            "add_generation_prompt": options.add_generation_prompt,
        }
        text = self._ask({"template": self.source, "variables": variables, "now": now.isoformat()})
        return _cut(text, final) if options.continue_final_message else text

    def close(self) -> None:
        """End the process that renders; the next chat starts another."""
        with self._lock:
            self._stop()

    def _ask(self, asked: dict) -> str:
        """Send one chat to the process, and return its text. Raises ValueError for an error."""
        line = json.dumps(asked, default=str).encode() + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:
                # Interrupted, as by Ctrl-C: the reply would be read as the next chat's.
                self._stop()
                raise
            if not reply.endswith(b"\n"):
                status = process.wait()
                self._stop()
                raise ValueError(f"the model's chat template {self._reason(status)}")
        answer = json.loads(reply)
        if "error" in answer:
            # A template is a program: for messages that it doesn't expect it may raise anything.
            raise ValueError(f"the model's chat template refuses the messages: {answer['error']}")
        return answer["text"]

    def _running(self) -> subprocess.Popen:
        """Return the process that renders, started if need be."""
        if self._process is None:
            paths = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _PROGRAM, str(self.max_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process

    def _reason(self, status: int) -> str:
        """Return why the process ended, from its exit status, as the end of a sentence."""
        if status == -signal.SIGPROF:
            return f"takes more than {self.max_seconds:g} s of CPU time for one chat, its limit"
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"ended its process ({name}); it needs too much memory, or is damaged"

    def _stop(self) -> None:
        self._process = None
        self._end()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # the process ended before it read everything


def _cut(text: str, final: str) -> str:
    """Return the text up to the mark at the end of the final message.

    Spaces before the mark go too if the template trims messages, which shows in the mark's own
    trailing space. Raises ValueError if the template changes the message.
    """
    at = text.rfind(_CUT.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(
            "the model's chat template changes the final message, so it can't be continued"
        )
    return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()
