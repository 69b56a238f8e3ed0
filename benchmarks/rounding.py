"""Reference rounding in plain torch, inside transformers' own model; for accuracy.py and tests.

Holds our rounding of weights and caches, sparse attention by query head, and the rounding of other
libraries where they are installed. Knows nothing of tiers or of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexgen_ray.config import kept_tokens
from flexgen_ray.evaluation.perplexity import windows
from flexgen_ray.kernels import pack_plain as plain
from flexgen_ray.kernels.pack_search import TURNS, WIDTHS
from flexgen_ray.models.config_files import load_config
from flexgen_ray.models.registry import checkpoint_names
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.packing import GROUP, PackedRows, packed_bytes

Round = Callable[[Tensor, int], Tensor]  # (matrix, bits) -> rounded matrix


@dataclass(frozen=True)
class Peer:
    """A way to round transformers' model.

    weights: rounding of the decoder layers' matrices. cache_bits: bits of keys and values.
    sparsity: share of tokens that each query head attends, independent of the other heads.
    package: library that it needs.
    """

    weights: Round | None = None
    cache_bits: int | None = None
    sparsity: float = 1.0
    package: str = "torch"


class RoundingCache(DynamicCache):
    """transformers' KV cache with keys and values rounded as our quantized cache rounds them."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = (rounded(x, self._bits) for x in (key_states, value_states))
        return super().update(keys, values, layer_idx, *args, **kwargs)


def rounded(x: Tensor, bits: int) -> Tensor:
    """The tensor after quantizing and dequantizing in plain torch, by each group's extremes."""
    packed = x.new_empty((*x.shape[:-1], packed_bytes(x.shape[-1], bits)), dtype=torch.uint8)
    plain.pack(x.float(), bits, packed)
    out = torch.empty_like(x)
    plain.unpack(packed, bits, out)
    return out


def searched(weight: Tensor, bits: int) -> Tensor:
    """The matrix rounded with the lines of least squared error that our search finds.

    Does the host kernel's search (kernels/pack_search.py) from the same starts in plain torch, for
    whole groups; the rest of each row is as in `rounded`. weight: [rows, columns], float32.
    """
    best, levels = rounded(weight, bits), 2**bits - 1
    whole = weight.shape[-1] // GROUP * GROUP
    groups, nearest = (x[..., :whole].unflatten(-1, (-1, GROUP)).double() for x in (weight, best))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    for part in (1.0, *WIDTHS):
        start = (low + high) / 2 - (high - low) * part / 2
        step = ((high - low) * part / levels).half().double()
        for _ in range(TURNS):
            start = start.half().double()
            codes = ((groups - start) / step).round().clamp(0, levels)
            line = codes * step + start
            errors = ((each - groups).square().sum(-1, keepdim=True) for each in (line, nearest))
            nearest = torch.where(torch.lt(*errors), line, nearest)
            centred = codes - codes.mean(-1, keepdim=True)
            slope = (centred * groups).sum(-1, keepdim=True) / centred.square().sum(
                -1, keepdim=True
            )
            start = (groups - slope * codes).mean(-1, keepdim=True).half().double()
            rest = ((groups - start) * codes).sum(-1, keepdim=True)
            step = (rest / codes.square().sum(-1, keepdim=True)).half().double()
    best[..., :whole] = nearest.flatten(-2).float()
    return best


def peer_perplexity(
    folder: Path, text: str, peer: Peer, context: int, stride: int, max_tokens: int
) -> dict | None:
    """Perplexity of a peer by transformers, on the windows that the engine scores.

    context, stride, max_tokens: see evaluation.perplexity.windows. Returns {"perplexity", "nll",
    "tokens"}, or None if the peer's package isn't installed.
    """
    if find_spec(peer.package) is None:
        return None
    sparse = SparseAttention(peer.sparsity)
    ALL_ATTENTION_FUNCTIONS.register("sparse", sparse)
    attends = {"attn_implementation": "sparse"} if peer.sparsity < 1 else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attends).eval()
    if peer.weights is not None:
        round_weights(model, folder, WeightFormat("float32", bits=4), peer.weights)
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:max_tokens]
    scores: list[float] = []
    with torch.inference_mode():
        for window in windows(len(tokens), context, stride):
            cache = RoundingCache(peer.cache_bits) if peer.cache_bits else DynamicCache()
            ids = torch.tensor([tokens[window.start : window.stop]])
            sparse.first = window.first - window.start
            logits = model(ids, past_key_values=cache).logits[
                0, window.first - window.start - 1 : -1
            ]
            wanted = ids[0, window.first - window.start :, None]
            scores += logits.float().log_softmax(-1).gather(1, wanted)[:, 0].tolist()
    nll = -math.fsum(scores) / len(scores)
    return {"perplexity": math.exp(nll), "nll": nll, "tokens": len(scores)}


class SparseAttention:
    """transformers' attention of one sequence, sparse from query `first` on, as if those decoded.

    Each query head attends the tokens of largest weight, the share `sparsity` of them.
    """

    def __init__(self, sparsity: float) -> None:
        self._sparsity = sparsity
        self.first = 0

    def __call__(
        self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs
    ):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        length = scores.shape[-1]
        pairs, window = torch.ones(length, length, dtype=torch.bool), sliding_window or length
        unseen = pairs.triu(1) | pairs.tril(-window)
        weights = scores.masked_fill_(unseen, -torch.inf).softmax(-1)
        for position in range(self.first, length):
            row = weights[0, :, position]
            count = kept_tokens(min(position + 1, window), self._sparsity)
            least = row.topk(count).values[:, -1:]
            row.masked_fill_(row < least, 0.0)
            row /= row.sum(-1, keepdim=True)
        return (weights @ value).transpose(1, 2).contiguous(), None


def round_weights(
    model: torch.nn.Module, folder: Path, weight_format: WeightFormat, rounding: Round
) -> None:
    """Round, in place, each matrix of the model that this format quantizes."""
    config = load_config(folder)
    parameters, rounded_already = dict(model.named_parameters()), set()
    with torch.no_grad():
        for layer in range(config.num_layers + 2):
            for name, shape in config.tensors(layer).items():
                form = weight_format.format_of(name, shape)
                for key in checkpoint_names(config.family, layer, name):
                    # A tied head is the embedding.
                    if key in rounded_already or key not in parameters:
                        continue
                    if isinstance(form, PackedRows):
                        parameters[key].copy_(rounding(parameters[key], form.bits))
                        rounded_already.add(key)


def _torchao(weight: Tensor, bits: int) -> Tensor:
    """torchao's asymmetric rounding to nearest, with float16 scales and integer zero points."""
    from torchao.quantization import quant_primitives as torchao

    block, codes = (1, GROUP), (torch.uint8, 0, 2**bits - 1)
    scale, zero = torchao.choose_qparams_affine(
        weight, torchao.MappingType.ASYMMETRIC, block, *codes, eps=1e-6,
        scale_dtype=torch.float16, zero_point_dtype=torch.int32,
    )  # fmt: skip
    scale = scale.float()
    packed = torchao.quantize_affine(weight, block, scale, zero, *codes)
    return torchao.dequantize_affine(packed, block, scale, zero, *codes, output_dtype=torch.float32)


def _hqq(optimize: bool) -> Round:
    """hqq's rounding, with or without its optimizer; zero points are floats."""

    def rounding(weight: Tensor, bits: int) -> Tensor:
        from hqq.core.quantize import Quantizer

        packed, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=GROUP, axis=1, optimize=optimize, bitpack=False,
            device="cpu", compute_dtype=torch.float32,
        )  # fmt: skip
        return Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32}).float()

    return rounding


PEERS = {
    "transformers": Peer(),
    "4-bit weights in plain torch": Peer(searched),
    "4-bit weights and cache in plain torch": Peer(searched, 4),
    "4-bit weights, extremes kept, in plain torch": Peer(rounded),
    "sparse 0.1, by query head, in plain torch": Peer(sparsity=0.1),
    "torchao's int4, groups of 64": Peer(_torchao, package="torchao"),
    "hqq's int4, round to nearest": Peer(_hqq(False), package="hqq"),
    "hqq's int4, optimized": Peer(_hqq(True), package="hqq"),
}
