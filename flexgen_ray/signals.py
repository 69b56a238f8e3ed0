"""Signals that stop a command. Imports almost nothing, so that it works from the very start."""

from __future__ import annotations

import signal

EXIT_STOPPED = 130
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal to stop, as an exception.

    Not a KeyboardInterrupt itself: if that passes through code that runs from a string, as in many
    imports, Python ends by the signal, whatever the exit status should be.
    """


def raise_on_stop() -> None:
    """Raise Stopped in the main thread at the first signal; the second ends the process directly.

    An ignored SIGHUP stays ignored, so that nohup lets a command outlive its terminal.
    """
    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def was_stopped() -> bool:
    """True if a signal to stop has come, even if some library swallowed the exception."""
    return signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def _stop(*_: object) -> None:
    for number in STOPS:
        if number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
        elif signal.getsignal(number) is _stop:
            # A terminal that is closed sends it twice, by the kernel and by the shell.
            signal.signal(number, signal.SIG_IGN)
    raise Stopped
