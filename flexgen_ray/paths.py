"""Where a user's files lie that this project makes."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """`$XDG_CACHE_HOME` or `~/.cache`, and this project's folder in it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexgen_ray"


def default_offload_dir() -> Path:
    """Not in /tmp, which is often memory."""
    return user_cache_dir() / "offload"


def calibration_dir() -> Path:
    """What was measured of this machine, and need not be measured again."""
    return user_cache_dir() / "calibration"
