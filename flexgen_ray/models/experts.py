"""Mixtures of experts: each token chooses a few of a layer's MLPs, by the scores of a router.

Tokens are sorted by expert, so that each expert multiplies its own rows at once, and a token's
outputs are summed in the order of its choices: results don't depend on how threads are timed. A
layer's experts come in one part or several, each a range of them with stacked matrices, as far as
they lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_ray.models.config import ModelConfig, experts_from
from flexgen_ray.models.layers import (
    Weights,
    add_linear,
    gate,
    product,
    rms_norm,
    takes_onednn,
)
from flexgen_ray.models.routing import add_shared, choose

RUN_ROWS = 128  # rows that a CPU takes through some experts before it begins the next ones


class Experts(NamedTuple):
    """A range of a layer's experts.

    first: number of the first. gate_up: [experts, 2 * size, hidden]; down: [experts, hidden, size].
    Their biases, [experts, 1, out], are None in most families.
    """

    first: int
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Routed(NamedTuple):
    """Rows on their way through experts.

    x: [tokens, hidden], what experts take, and then the sum of what they gave. shares, chosen:
    [tokens, experts_per_token], of the experts that each token chose.
    """

    x: Tensor
    shares: Tensor
    chosen: Tensor

    def part(self, tokens: slice) -> Routed:
        """Some of the rows."""
        return Routed(*(each[tokens] for each in self))


def route(
    config: ModelConfig, weights: Weights, hidden: Tensor, attention: Tensor, routed: Routed
) -> None:
    """Do what comes after attention and before experts: output projection, norm, and their choice.

    hidden: [tokens, hidden], changed in place. attention: [tokens, q_size]. routed: the tokens'
    place among rows on their way. An expert that every token takes is added to hidden states here.
    """
    add_linear(weights, "o_proj", attention, hidden)
    x = routed.x.copy_(rms_norm(config, weights, "mlp_norm", hidden))
    shares, chosen = choose(config, weights, x)
    routed.shares.copy_(shares)
    routed.chosen.copy_(chosen)
    if config.shared_expert_size:
        add_shared(config, weights, x, hidden)


def mix(config: ModelConfig, weights: Weights, routed: Routed) -> None:
    """Replace each row's x by the sum of its experts' outputs, each times its share."""
    x, shares, chosen = routed
    out = _outputs(config, weights, x, chosen)
    torch.bmm(shares[:, None], out, out=x[:, None])


def add_group(
    config: ModelConfig, weights: Weights, routed: Routed, sums: Tensor, begins: bool
) -> None:
    """Add the outputs of a group of experts to the sums [tokens, hidden] of each row's experts.

    weights: of this group alone. begins: True if it is the first one.
    """
    x, shares, chosen = routed
    out = _outputs(config, weights, x, chosen)
    torch.baddbmm(sums[:, None], shares[:, None], out, beta=float(not begins), out=sums[:, None])


def _outputs(config: ModelConfig, weights: Weights, x: Tensor, chosen: Tensor) -> Tensor:
    """Outputs of the chosen experts, [tokens, experts_per_token, hidden]; 0 of any not in weights.

    x: [tokens, hidden]; chosen: [tokens, experts_per_token].
    """
    by_expert, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(config.num_experts, device=x.device)
    ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
    del by_expert
    parts = list(_parts(weights))
    compute = _outputs_on_gpu if _groups_on_gpu(parts) else _outputs_in_turn
    out = compute(config, parts, x, order, ends)
    return out.view(*chosen.shape, x.shape[-1])


def _empty_outputs(config: ModelConfig, parts: list[Experts], x: Tensor, count: int) -> Tensor:
    """Memory for the outputs of `count` choices, zeros if these parts don't have all experts."""
    is_whole = sum(len(part.gate_up) for part in parts) == config.num_experts
    return (x.new_empty if is_whole else x.new_zeros)(count, x.shape[-1])


def _parts(weights: Weights) -> Iterator[Experts]:
    """Yield the parts in which a layer's experts come."""
    name = experts_from("gate_up_experts.weight", 0).removesuffix("0")
    for key, gate_up in weights.items():
        if key.startswith(name):
            first = int(key.removeprefix(name))
            down = weights[experts_from("down_experts.weight", first)]
            names = "gate_up_experts.bias", "down_experts.bias"
            biases = (weights.get(experts_from(it, first)) for it in names)
            yield Experts(first, gate_up, down, *biases)


def _outputs_in_turn(
    config: ModelConfig, parts: list[Experts], x: Tensor, order: Tensor, ends: Tensor
) -> Tensor:
    """Outputs of all choices, [choices, hidden], one part after the other.

    On a GPU the groups' ends are waited for. order: numbers of the choices, sorted by expert;
    ends: of each expert's choices among them.
    """
    out = _empty_outputs(config, parts, x, len(order))
    bounds = [0, *ends.tolist()]
    runs = parts if x.is_cuda else [run for part in parts for run in _runs(part, bounds)]
    for part in runs:
        low, *high = bounds[part.first : part.first + len(part.down) + 1]
        if low < high[-1]:
            own, inside = order[low : high[-1]], [end - low for end in high]
            rows = x[own // config.experts_per_token]
            inner = _add_biases(_grouped(rows, part.gate_up, inside), part.gate_up_bias, inside)
            del rows
            rows = _grouped(gate(config, inner), part.down, inside)
            out.index_copy_(0, own, _add_biases(rows, part.down_bias, inside))
    return out


def _runs(part: Experts, bounds: list[int]) -> Iterator[Experts]:
    """Yield experts side by side that have at most RUN_ROWS rows together, or one with more.

    A CPU's cache then holds what one step computes for the next. bounds: of each expert's choices,
    of all experts.
    """
    first, end = part.first, part.first + len(part.down)
    for expert in range(part.first, end):
        if expert + 1 == end or bounds[expert + 2] - bounds[first] > RUN_ROWS:
            run = slice(first - part.first, expert + 1 - part.first)
            gate_up_bias, down_bias = (
                None if each is None else each[run] for each in (part.gate_up_bias, part.down_bias)
            )
            yield Experts(first, part.gate_up[run], part.down[run], gate_up_bias, down_bias)
            first = expert + 1


def _grouped(x: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
    """Multiply each group of rows by its own transposed matrix.

    x: [rows, in]; matrices: [groups, out, in]; ends: of each group among the rows, the last of
    which is that of all rows. Returns [rows, out].

    On a CPU torch's grouped product is a loop over groups, as fast as one written here; for large
    matrices of float32 oneDNN takes a quarter less time. Padding groups to one length is slower.
    """
    if len(matrices) == 1:
        return product(x, matrices[0])
    if not x.is_cuda and not takes_onednn(x, matrices[0]) and _takes_groups(matrices):
        offsets = torch.tensor(ends, dtype=torch.int32)
        return F.grouped_mm(x, matrices.transpose(1, 2), offs=offsets)
    out = x.new_empty(len(x), matrices.shape[1])
    low = 0
    for matrix, high in zip(matrices, ends, strict=True):
        if low < high:
            product(x[low:high], matrix, out=out[low:high])
        low = high
    return out


def _add_biases(x: Tensor, biases: Tensor | None, ends: list[int]) -> Tensor:
    """Add its own bias to each group of rows, in place; biases: [groups, 1, out], None for none."""
    if biases is not None:
        low = 0
        for bias, high in zip(biases, ends, strict=True):
            if low < high:
                x[low:high] += bias
            low = high
    return x


def _takes_groups(matrices: Tensor) -> bool:
    """True if torch multiplies ragged groups at once: rows of 16 bytes, as it needs."""
    return hasattr(F, "grouped_mm") and matrices.shape[-1] * matrices.element_size() % 16 == 0


def _groups_on_gpu(parts: list[Experts]) -> bool:
    """True if the device multiplies ragged groups whose ends the host doesn't know."""
    gate_up, down = parts[0].gate_up, parts[0].down
    return (
        gate_up.is_cuda
        and gate_up.dtype == torch.bfloat16
        and _takes_groups(gate_up)
        and _takes_groups(down)
        and torch.cuda.get_device_capability(gate_up.device) >= (8, 0)
    )


def _outputs_on_gpu(
    config: ModelConfig, parts: list[Experts], x: Tensor, order: Tensor, ends: Tensor
) -> Tensor:
    """Outputs of all choices, as `_outputs_in_turn`; the host waits for nothing.

    A part's rows are moved to the front, for products begin there, and what is behind them is
    undefined; a row beyond the others takes that.
    """
    count, choices_of_token = len(order), config.experts_per_token
    out = _empty_outputs(config, parts, x, count + 1)
    if len(parts) == 1 and len(parts[0].down) == config.num_experts:
        out[order] = _on_gpu(config, parts[0], x[order // choices_of_token], ends)
        return out[:count]
    places = torch.arange(count, device=x.device)
    for part in parts:
        first, number = part.first, len(part.down)
        low = ends[first - 1 : first] if first else 0
        offsets = ends[first : first + number] - low
        moved = order[(places + low) % count]
        rows = torch.where(places < offsets[-1:], moved, count)
        out[rows] = _on_gpu(config, part, x[moved // choices_of_token], offsets)
    return out[:count]


def _on_gpu(config: ModelConfig, part: Experts, rows: Tensor, ends: Tensor) -> Tensor:
    """Outputs of a range of experts for rows, [rows, hidden], in groups that end at `ends`."""
    group = None
    if part.down_bias is not None:
        # Rows behind the last group are of no use; any bias will do.
        places = torch.arange(len(rows), dtype=ends.dtype, device=rows.device)
        group = torch.searchsorted(ends, places, right=True).clamp_(max=len(ends) - 1)
    inner = F.grouped_mm(rows, part.gate_up.transpose(1, 2), offs=ends)
    del rows
    if part.gate_up_bias is not None:
        inner += part.gate_up_bias[:, 0][group]
    inner = gate(config, inner)
    out = F.grouped_mm(inner, part.down.transpose(1, 2), offs=ends)
    if part.down_bias is not None:
        out += part.down_bias[:, 0][group]
    return out
