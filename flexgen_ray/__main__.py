"""The `flexgen-ray` command, as a script and as `python -m flexgen_ray`: its start and its end."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from flexgen_ray.signals import EXIT_STOPPED, Stopped, raise_on_stop


def main() -> None:
    """Run the command; a signal to stop ends it cleanly, even while its modules are imported."""
    raise_on_stop()
    try:
        from flexgen_ray.cli.main import main as command
    except Stopped:
        print("flexgen-ray: stopped", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    try:
        command()
    except SystemExit as end:
        if "ray" in sys.modules and isinstance(end.code, int):
            _leave(end.code)
        raise


def _leave(status: int) -> NoReturn:
    """End the process without the C library's exit handlers.

    During these, a thread that Ray left behind may use memory that is gone, and a command that has
    done all its work would end with a segmentation fault.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or 1
    os._exit(status)


if __name__ == "__main__":
    main()
