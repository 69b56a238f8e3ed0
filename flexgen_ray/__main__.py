"""The `flexgen-ray` command, as a script and as `python -m flexgen_ray`."""

from __future__ import annotations

import sys

from flexgen_ray.signals import EXIT_STOPPED, Stopped, raise_on_stop


def main() -> None:
    """A stop while the command is imported ends it as one later does."""
    raise_on_stop()
    try:
        from flexgen_ray.cli import main as command
    except Stopped:
        sys.exit(EXIT_STOPPED)
    command()


if __name__ == "__main__":
    main()
