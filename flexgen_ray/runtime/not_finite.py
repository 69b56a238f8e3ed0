"""Names the numbers that leave a dtype: why, and what to do. Knows names; no tensors."""

from __future__ import annotations

_WIDER = {
    "float16": "use --dtype bfloat16 or float32",
    "bfloat16": "use --dtype float32",
    "float32": "its weights may be damaged, or the prompt be one that they can't take",
}


def not_finite(place: int, dtype: str = "float32", cache_bits: int | None = None) -> str:
    """The sentence for a request of which hidden states or logits are NaN or infinite.

    place: of the token that was to be chosen or scored, in the prompt and the answer together.
    """
    remedy = _WIDER[dtype]
    if cache_bits is not None:
        remedy += ", or leave out --cache-bits"
    return (
        f"activations are not finite (NaN or infinite) in {dtype} at token {place}, the prompt's "
        f"counted; {remedy}"
    )
