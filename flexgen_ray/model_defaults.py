"""How a model is to be sampled where nobody says: the part of its generation_config.json that
vLLM heeds too. Its end tokens are in ModelConfig. Knows the file; no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexgen_ray.request import SamplingParams

# Its names, and ours.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def model_defaults(folder: Path) -> dict[str, Any]:
    """Fields of SamplingParams that the model folder sets; none without the file.

    do_sample false is temperature 0. ValueError, naming the file, for what can't be.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it must hold a JSON object")
        found = {ours: values[its] for its, ours in _FIELDS.items() if values.get(its) is not None}
        if values.get("do_sample") is False:
            found["temperature"] = 0.0
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct the file, or take it away") from error
    return found
