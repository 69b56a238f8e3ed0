"""Where files lie: models, and what this project makes in a user's folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

# What a model needs, and no pickles, programs or second copies of the weights.
_DESCRIPTION = ("*.json", "*.model", "*.txt", "*.jinja")
_WANTED = ("*.safetensors", *_DESCRIPTION)
_UNWANTED = ("consolidated*", "*/*")


def find_config(name: str | Path) -> Path:
    """The folder with a model's config.json, as `find_model`, but its weights needn't be there."""
    return find_model(name, wanted=("config.json", "generation_config.json"))


def find_description(name: str | Path) -> Path:
    """The folder with a model's config and tokenizer, as `find_model`; its weights needn't be
    there."""
    return find_model(name, wanted=_DESCRIPTION)


def find_model(
    name: str | Path,
    announce: Callable[[str], None] | None = None,
    wanted: Sequence[str] = _WANTED,
) -> Path:
    """A model's folder on this node: a path, or a name on the Hugging Face hub such as
    `Qwen/Qwen3-32B`, whose files are taken from its cache, or else downloaded to it.

    announce is called with a line before a download; wanted: patterns of the files. Raises
    FileNotFoundError, naming the node, if neither is to be had; PermissionError for a gated model.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    host = socket.gethostname()
    no_name = (
        f"{host} has no folder {name}; --model takes a Hugging Face model folder, a name on the "
        "hub with its owner, such as Qwen/Qwen3-32B, or with --load-format dummy a built-in shape, "
        "such as opt-30b"
    )
    if "/" not in str(name):
        raise FileNotFoundError(no_name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        if announce and not (Path(HF_HUB_CACHE) / f"models--{name}".replace("/", "--")).exists():
            announce(f"{name} is no folder here: looking for it on the Hugging Face hub")
        return Path(snapshot_download(
            str(name), allow_patterns=list(wanted), ignore_patterns=list(_UNWANTED)
        ))  # fmt: skip
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its licence on its page of the Hugging Face hub, and give "
            f"{host} a token of yours (hf auth login, or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{host} has no folder {name}, nor has the Hugging Face hub a model of that name; if "
            "it is private, give a token (hf auth login, or HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(no_name) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{host} has no folder {name}, nor a model of that name in its Hugging Face cache "
            f"({HF_HUB_CACHE}), and can't ask the hub (no connection, or HF_HUB_OFFLINE is set); "
            "every node needs the model's files at the same path, in its cache, or the hub"
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
