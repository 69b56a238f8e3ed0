"""Completion of commands and options in shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_s_script_is_printed_and_read_by_it(run_here, shell):
    done = run_here("--show-completion", shell)
    assert done.returncode == 0 and "_FLEXGEN_RAY_COMPLETE=complete_" + shell in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


def test_another_shell_is_refused_by_name(run_here):
    done = run_here("--show-completion", "cmd")
    assert done.returncode == 64 and "'bash', 'zsh', 'fish'" in done.stderr


@pytest.mark.parametrize(
    ("typed", "found"), [("gen", "generate"), ("generate --keep", "--keep-order")]
)
def test_a_shell_gets_the_commands_and_options_that_fit(typed, found):
    words = f"flexgen-ray {typed}"
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    asked["_FLEXGEN_RAY_COMPLETE"] = "complete_bash"
    code = "import sys; sys.argv = ['flexgen-ray']; from flexgen_ray.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == [found], done.stderr
