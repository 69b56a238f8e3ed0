"""What a signal does to a command. Imports next to nothing, so that it holds from the start."""

from __future__ import annotations

import signal

EXIT_STOPPED = 130
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ends the job. Not KeyboardInterrupt itself: if that passes code run from a string,
    as much of what is imported does, Python ends by the signal, whatever the exit status is."""


def raise_on_stop() -> None:
    """Makes the first signal an exception; the next ends the process at once.

    An ignored SIGHUP stays ignored: so nohup lets a command outlive its terminal.
    """
    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def was_stopped() -> bool:
    """True if a signal to stop came, though some library may have swallowed the exception."""
    return signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def _stop(*_: object) -> None:
    for number in STOPS:
        if number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
        elif signal.getsignal(number) is _stop:
            # A terminal that is closed sends it twice, by the kernel and by the shell.
            signal.signal(number, signal.SIG_IGN)
    raise Stopped
