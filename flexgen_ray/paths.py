"""Where files lie: models, and what this project makes in a user's folders."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def find_model(name: str | Path) -> Path:
    """A model's folder on this node: a path, or a name such as `facebook/opt-30b` whose files lie
    in the Hugging Face cache. Nothing is downloaded.

    Raises FileNotFoundError, naming the node, if it has neither.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{socket.gethostname()} has no folder {name}, nor a model of that name in its Hugging "
            "Face cache; every node needs the model's files at the same path, or in its cache"
        ) from error


def user_cache_dir() -> Path:
    """`$XDG_CACHE_HOME` or `~/.cache`, and this project's folder in it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexgen_ray"


def default_offload_dir() -> Path:
    """Not in /tmp, which is often memory."""
    return user_cache_dir() / "offload"


def calibration_dir() -> Path:
    """What was measured of this machine, and need not be measured again."""
    return user_cache_dir() / "calibration"


def hardware_file() -> Path:
    """Where `flexgen-ray calibrate` keeps what it measured of this node."""
    return calibration_dir() / f"hardware-{socket.gethostname()}.yaml"
