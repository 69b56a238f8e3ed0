"""The `flexgen-ray` command with cuDNN's attention allowed, to measure what it costs.

Runs forbid it (cuDNN makes a plan for each new length of the cache); here that call does nothing.
Ends with a status other than 0 if cuDNN was forbidden nevertheless, since the figures are of a run
with it. Knows torch's switch; nothing of the run.
"""

from __future__ import annotations

import runpy
import sys

import torch

from flexgen_ray.reporting.terminal import say


def allow_cudnn() -> None:
    """Let torch use cuDNN's attention, and ignore later calls that forbid it."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp = _ignore


def _ignore(enabled: bool) -> None:
    """Do nothing with torch's switch."""


def main() -> None:
    """Run the command line of `flexgen-ray`."""
    allow_cudnn()
    try:
        runpy.run_module("flexgen_ray", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    if not torch.backends.cuda.cudnn_sdp_enabled():
        say("cuDNN's attention was forbidden; this run shows nothing of it")
        sys.exit(1)


if __name__ == "__main__":
    main()
