"""Folders of models, and of the files that this project makes in a user's folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

# Files that a model needs: no pickles, no programs, no second copies of the weights.
_DESCRIPTION = ("*.json", "*.model", "*.txt", "*.jinja")
_WANTED = ("*.safetensors", *_DESCRIPTION)
_UNWANTED = ("consolidated*", "*/*")


def find_config(name: str | Path) -> Path:
    """Folder with a model's config.json (see `find_model`); its weights needn't be there."""
    return find_model(name, wanted=("config.json", "generation_config.json"))


def find_description(name: str | Path) -> Path:
    """Folder with a model's config and tokenizer (see `find_model`), with or without weights."""
    return find_model(name, wanted=_DESCRIPTION)


def find_model(
    name: str | Path,
    announce: Callable[[str], None] | None = None,
    wanted: Sequence[str] = _WANTED,
) -> Path:
    """Folder of a model on this node, downloaded if need be.

    name: a folder's path, or a name on the Hugging Face hub such as "Qwen/Qwen3-32B"; its files are
    taken from the hub's cache, or downloaded to it. announce: called with a line before a download.
    wanted: patterns of the files to download.
    Raises FileNotFoundError, naming the node, if there is neither a folder nor such a model, and
    PermissionError for a gated model.
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
    """This project's folder in the user's cache folder, $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexgen_ray"


def default_offload_dir() -> Path:
    """Default folder for data on disk; not in /tmp, which is often in memory."""
    return user_cache_dir() / "offload"


def calibration_dir() -> Path:
    """Folder with measurements of this machine, so that none has to be made twice."""
    return user_cache_dir() / "calibration"


def hardware_file() -> Path:
    """File in which `flexgen-ray calibrate` stores this node's rates."""
    return calibration_dir() / f"hardware-{socket.gethostname()}.yaml"
