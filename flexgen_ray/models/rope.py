"""Rotary position embedding as a config.json describes it. Without torch.

`Rope` holds its settings, and `parse_rope` reads them; rotation.py computes with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_CORRECT = "correct config.json"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021).

    theta: base of the frequencies. type: "default", "linear", "llama3", "yarn" or "longrope".
    share: part of each head, from its first element, that is rotated.
    factor: linear divides all frequencies by it, llama3 and yarn the low ones.
    low_freq_factor, high_freq_factor: llama3 scales wavelengths above original_max_seq_len /
    low_freq_factor, leaves those below original_max_seq_len / high_freq_factor, and interpolates
    between.
    beta_fast, beta_slow: yarn (Peng et al. 2023) leaves frequencies that turn more often than
    beta_fast in original_max_seq_len tokens, scales those that turn less often than beta_slow, and
    interpolates between; truncate widens that range to whole numbers of frequencies.
    short_factors, long_factors: longrope (Ding et al. 2024) divides each frequency by a factor of
    its own; is_long takes those for contexts longer than original_max_seq_len.
    attention_factor: yarn and longrope multiply queries and keys by it.
    """

    theta: float = 10000.0
    type: str = "default"
    share: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    is_long: bool = False
    attention_factor: float = 1.0

    def rotated_size(self, head_dim: int) -> int:
        """Elements of a head that are rotated."""
        return int(head_dim * self.share)

    def within(self, context: int) -> Rope:
        """Return the rope for a context of so many tokens, which chooses longrope's factors."""
        is_long = self.type == "longrope" and context > self.original_max_seq_len
        return replace(self, is_long=is_long)

    @property
    def context(self) -> int | None:
        """Tokens to which yarn stretches a model's context; None for other types."""
        return int(self.original_max_seq_len * self.factor) if self.type == "yarn" else None


def parse_rope(hf: dict, may_be_partial: bool = False) -> Rope:
    """Parse rope_scaling and rope_theta, or rope_parameters, as transformers 5 names both.

    may_be_partial: the family can rotate a part of each head. Raises KeyError for a missing field
    and ValueError, naming it, for a wrong one, an unknown type or an unsupported partial rotation.
    """
    fields = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if hf.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as it was named before
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}")
    outside = {name: hf[name] for name in ("rope_theta", "partial_rotary_factor") if name in hf}
    fields = outside | {name: it for name, it in fields.items() if it is not None}
    theta = _optional(fields, "rope_theta", Rope.theta)
    rope = Rope(theta, kind, _share(hf, fields, may_be_partial))
    if kind == "linear":
        return replace(rope, factor=_number(fields, "factor"))
    parse = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}.get(kind)
    return parse(rope, hf, fields) if parse else rope


def _share(hf: dict, fields: dict, may_be_partial: bool) -> float:
    """Return the part of each head that is rotated."""
    name = "partial_rotary_factor"
    share = _optional(fields, name, 1.0)
    if share == 1:
        return 1.0
    if not may_be_partial:
        raise ValueError(f"{name} {share} is not supported; only 1 is")
    size = int(_head_dim(hf) * share)
    if share > 1 or size < 2 or size % 2:
        raise ValueError(
            f"{name} is {share}, which rotates {size} of a head's {_head_dim(hf)} elements; they "
            f"must be an even number, all of them at most: {_CORRECT}"
        )
    return share


def _llama3(rope: Rope, hf: dict, fields: dict) -> Rope:
    low, high = (_number(fields, name) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ValueError(
            f"high_freq_factor is {high} and low_freq_factor {low}; the first must be the larger: "
            f"{_CORRECT}"
        )
    return replace(
        rope,
        factor=_number(fields, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_seq_len=_original_max_seq_len(hf, fields),
    )


def _yarn(rope: Rope, hf: dict, fields: dict) -> Rope:
    original = _original_max_seq_len(hf, fields)
    factor = _factor(hf, fields, original)
    fast = _optional(fields, "beta_fast", Rope.beta_fast)
    slow = _optional(fields, "beta_slow", Rope.beta_slow)
    if fast < slow:
        raise ValueError(
            f"beta_fast is {fast} and beta_slow {slow}; the first must not be the smaller: "
            f"{_CORRECT}"
        )
    if not rope.theta > 1:
        raise ValueError(f"rope_theta is {rope.theta}; yarn needs one above 1: {_CORRECT}")
    truncate = fields.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate is {truncate!r}; it must be true or false: {_CORRECT}")
    scale, scale_all = (_optional(fields, name, 0) for name in ("mscale", "mscale_all_dim"))
    inferred = _yarn_scale(factor, 1)
    if scale and scale_all:
        inferred = _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all)
    return replace(
        rope,
        factor=factor,
        original_max_seq_len=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        attention_factor=_attention_factor(fields, inferred),
    )


def _yarn_scale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Rope, hf: dict, fields: dict) -> Rope:
    original = _original_max_seq_len(hf, fields)
    factor = _factor(hf, fields, original)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    count = rope.rotated_size(_head_dim(hf)) // 2
    short, long = (_factors(fields, name, count) for name in ("short_factor", "long_factor"))
    return replace(
        rope,
        factor=factor,
        original_max_seq_len=original,
        short_factors=short,
        long_factors=long,
        attention_factor=_attention_factor(fields, inferred),
    )


def _head_dim(hf: dict) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def _original_max_seq_len(hf: dict, fields: dict) -> int:
    """Return original_max_position_embeddings; one outside of the rope's fields is preferred."""
    name = "original_max_position_embeddings"
    inside = 4096 if hf.get("model_type") == "phi3" else fields.get(name)
    length = hf.get(name) or inside or hf["max_position_embeddings"]
    if type(length) is not int or length < 2:
        raise ValueError(f"{name} is {length!r}; it must be an integer, 2 or more: {_CORRECT}")
    return length


def _factor(hf: dict, fields: dict, original: int) -> float:
    """Return "factor", or else how much longer the context is than the original one."""
    if "factor" in fields:
        return _number(fields, "factor")
    return hf["max_position_embeddings"] / original


def _factors(fields: dict, name: str, count: int) -> tuple[float, ...]:
    """Return a list of longrope's factors, one for each rotated pair of a head's elements."""
    factors = fields[name]
    if not isinstance(factors, list) or len(factors) != count:
        size = f"a list of {len(factors)}" if isinstance(factors, list) else repr(factors)
        raise ValueError(
            f"{name} is {size}; it must be a list of {count} numbers, one for each rotated pair of "
            f"a head's elements: {_CORRECT}"
        )
    named = {f"{name}[{index}]": factor for index, factor in enumerate(factors)}
    return tuple(_number(named, each) for each in named)


def _attention_factor(fields: dict, inferred: float) -> float:
    name = "attention_factor"
    return _number(fields, name) if name in fields else inferred


def _optional(fields: dict, name: str, default: float) -> float:
    """Return a field that must be a number above 0; the default if it is absent or 0."""
    return _number(fields, name) if fields.get(name) not in (None, 0) else default


def _number(fields: dict, name: str) -> float:
    """Return a field that must be a number above 0."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0: {_CORRECT}")
    return value
