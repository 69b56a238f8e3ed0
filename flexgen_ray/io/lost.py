"""Files that would be lost on a cluster: Ray deletes the folder that a submitted job runs in.

Knows paths and environment variables; not Ray.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from flexgen_ray.io.lines import STANDARD

_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a submitted job's own process
_PACKAGES = re.compile(r"/session_[^/]+/runtime_resources/")


def check_kept(written: Mapping[str, Path], environment: Mapping[str, str]) -> None:
    """Refuses files, by the option that gives them, that a Ray job would lose.

    Those are relative paths in a submitted job, and all paths in Ray's folders for packages. Raises
    ValueError with the whole path, the node and the remedy.
    """
    for option, path in written.items():
        place = os.path.realpath(path)
        is_package = _PACKAGES.search(place) is not None
        is_relative = _IN_JOB in environment and not path.is_absolute()
        if path != STANDARD and (is_package or is_relative):
            fate = "Ray deletes after the job" if is_package else "the job was started in by Ray"
            raise ValueError(
                f"{option} {path} would be {place} on node {socket.gethostname()}, in a folder "
                f"that {fate}; give an absolute path on a disk that stays, best a shared one"
            )
