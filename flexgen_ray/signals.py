"""What a signal does to a command. Imports next to nothing, so that it holds from the start."""

from __future__ import annotations

import signal

EXIT_STOPPED = 130
_STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ends the job. Not KeyboardInterrupt itself: if that passes code run from a string,
    as much of what is imported does, Python ends by the signal, whatever the exit status is."""


def raise_on_stop() -> None:
    """Of the first signal; the next ends the process at once."""
    for number in _STOPS:
        signal.signal(number, _stop)


def _stop(*_: object) -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
    raise Stopped
