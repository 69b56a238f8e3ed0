"""A signal ends a command with its own exit status, wherever it comes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flexgen_ray.signals import EXIT_STOPPED

SCRIPT = """
import signal
from flexgen_ray import cli

@cli.app.command()
def wait():
    exec("signal.raise_signal(signal.{name})")  # as dataclasses are made, and kernels compiled

cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_in_code_that_runs_from_a_string_ends_with_the_commands_status(tmp_path, name):
    (tmp_path / "stopped.py").write_text(SCRIPT.format(name=name))
    command = [sys.executable, "-m", "stopped", "wait"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (EXIT_STOPPED, "")


def test_a_stop_while_the_command_is_imported_does_too(tmp_path):
    """As soon as Python has begun to run it, whatever there is to import yet."""
    (tmp_path / "typer.py").write_text("exec('import signal; signal.raise_signal(signal.SIGINT)')")
    (tmp_path / "stopped.py").write_text("from flexgen_ray.__main__ import main; main()")
    command = [sys.executable, "-m", "stopped", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_STOPPED, "", "")


def test_what_ray_leaves_behind_changes_no_status(tmp_path):
    """Its threads may crash in the last steps of the C library, as this does each time."""
    (tmp_path / "stopped.py").write_text(
        "import atexit, ctypes, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.on_exit(libc.abort, None)\n"
        "sys.modules['ray'] = sys\n"
        "atexit.register(print, 'cleaned up')\n"
        "from flexgen_ray.__main__ import main; main()\n"
    )
    command = [sys.executable, "-m", "stopped", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["cleaned up"]
