"""ModelConfig: a model's sizes and the order of its maths, whatever its family. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexgen_ray.models.rope import Rope

SINKS = "attention.sinks"  # a decoder layer's weight: a score of each head
# Added to routers' scores for the choice alone; in float32 whatever the dtype of other weights.
ROUTER_CORRECTION = "router.e_score_correction_bias"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: its sizes, and the options in the order of its maths.

    embedding_size: width of the embedding table; OPT-350M projects it to hidden_size.
    dtype: dtype in which the checkpoint was saved.
    norm_weight, norm_bias: norms have a weight, a bias.
    pre_norm: norms come before attention and MLP, not after.
    final_norm: the head norms hidden states first.
    gated_mlp: the MLP has a gate projection beside the up projection.
    attention_bias: projections of queries, keys and values have a bias.
    output_bias: the projection after attention has a bias.
    attention_sinks: each head has a score besides those of tokens, learned and without a value,
    which takes its share of attention (`SINKS`).
    qk_norm: queries and keys are normed before they are rotated: "heads" each head by itself,
    "all" all heads of a token together; None not at all.
    query_scale: factor of queries in addition to 1 / sqrt(head_dim).
    norm_offset: added to norms' weights, which then multiply in float32; None for plain weights,
    which multiply in the dtype.
    branch_norms: outputs of attention and MLP are normed too, before they are added (Gemma 3).
    num_experts: experts of a mixture's decoder layers; 0 if the model is no mixture.
    experts_per_token: experts that each token chooses. expert_size: elements between the two
    products of an expert. norm_topk: the chosen experts' shares are scaled to sum to one.
    shared_expert_size: elements of an expert that every token takes besides; 0 without one.
    expert_bias: the router and the products of experts have a bias.
    swiglu_limit: gate and up projection of experts are clamped to this, and the up projection is
    counted from -1; None for plain ones. swiglu_alpha: factor of the gate in its sigmoid then.
    shared_expert_gate: a gate says how far each token takes it.
    corrects_choice: routers score experts by a sigmoid, not a softmax, and choose by corrected
    scores (`ROUTER_CORRECTION`). expert_groups, chosen_groups: a token's experts are of so many
    groups, if these are fewer than all. routed_scale: factor of the chosen experts' shares.
    dense_layers: numbers of decoder layers, from 1, with a plain MLP in place of experts.
    position_table: number of rows of the learned position embedding; 0 without one.
    sliding_window: number of tokens, itself included, that a token attends in decoder layers other
    than full_attention_layers; None if all layers attend everything.
    window_rope: rotary embedding of layers with a sliding window, if it differs.
    full_attention_layers: numbers of decoder layers, from 1.
    weight_bits, embedding_bits: bits of a quantized checkpoint (quant/packing.py): of its decoder
    layers, and of its embedding and head.
    expert_format: format in which a checkpoint has its experts, such as "mxfp4"
    (quant/formats.FORMATS); None if it has values.
    overflows_float16: activations of this family exceed 65504, float16's largest, or it was trained
    in bfloat16 and nothing shows that they don't.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_seq_len: int
    embedding_size: int
    dtype: str
    tie_word_embeddings: bool
    activation: str
    norm_eps: float
    norm_weight: bool = True
    norm_bias: bool = False
    pre_norm: bool = True
    final_norm: bool = True
    gated_mlp: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    attention_sinks: bool = False
    qk_norm: str | None = None
    query_scale: float = 1.0
    norm_offset: float | None = None
    branch_norms: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm_topk: bool = False
    shared_expert_size: int = 0
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    shared_expert_gate: bool = False
    corrects_choice: bool = False
    expert_groups: int = 1
    chosen_groups: int = 1
    routed_scale: float = 1.0
    dense_layers: tuple[int, ...] = ()
    position_table: int = 0
    rope: Rope | None = None
    window_rope: Rope | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    weight_bits: int | None = None
    embedding_bits: int | None = None
    expert_format: str | None = None
    overflows_float16: bool = False

    @property
    def embedding_layer(self) -> int:
        """Number of the embedding layer. Decoder layers are numbered 1 to num_layers."""
        return 0

    @property
    def head_layer(self) -> int:
        """Number of the head, the last layer."""
        return self.num_layers + 1

    @property
    def q_size(self) -> int:
        """Elements of all query heads of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key heads of one token, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    def with_end_tokens(self, *token_ids: int | None) -> ModelConfig:
        """Return a config with these end tokens added;

        None and ids outside the vocabulary aren't.
        """
        ends = dict.fromkeys((*self.eos_token_ids, *token_ids))
        inside = [it for it in ends if it is not None and 0 <= it < self.vocab_size]
        return replace(self, eos_token_ids=tuple(inside))

    def within(self, context: int) -> ModelConfig:
        """Return a config for requests of so many tokens at most, by which longrope is chosen."""
        rope, of_windows = (it and it.within(context) for it in (self.rope, self.window_rope))
        return replace(self, rope=rope, window_rope=of_windows)

    def window(self, layer: int) -> int | None:
        """Number of tokens, itself included, that a token attends in a decoder layer;

        None for all.
        """
        return None if layer in self.full_attention_layers else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        """True for decoder layers whose tokens choose among experts."""
        is_decoder = self.embedding_layer < layer < self.head_layer
        return is_decoder and self.num_experts > 0 and layer not in self.dense_layers

    def rope_of(self, layer: int) -> Rope | None:
        """Rotary embedding of a decoder layer; None if the model has none."""
        return self.rope if self.window(layer) is None else self.window_rope or self.rope

    def attended_tokens(self, layer: int, tokens: int) -> int:
        """Number of tokens that the last of `tokens` tokens attends in a decoder layer."""
        return min(tokens, self.window(layer) or tokens)

    def stacked(self, module: str) -> tuple[int, ...]:
        """Rows of each of the weights that lie one above the other in a weight of a decoder layer.

        Queries, keys and values are one product, and so are the MLP's gate and up projection; empty
        for all other weights. qk_norm: one weight for each element of all query and key heads.
        """
        stacked = {
            "qkv_proj": (self.q_size, self.kv_size, self.kv_size),
            "qk_norm": (self.q_size, self.kv_size),
            "gate_up_proj": (self.intermediate_size,) * 2,
            "gate_up_experts": (self.expert_size,) * 2,
            "shared_gate_up_proj": (self.shared_expert_size,) * 2,
        }
        return stacked.get(module, ())

    def tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight of a layer, by this project's names.

        layer: 0 for the embedding, 1 to num_layers for decoder layers, then the head. A tied head
        shares "embed_tokens.weight" with the embedding. Matrices of experts are stacked, [experts,
        out, in], and so are their biases, [experts, 1, out].
        """
        if layer == self.embedding_layer:
            return self._embedding_tensors()
        if layer == self.head_layer:
            return self._head_tensors()
        has_experts = self.has_experts(layer)
        return self._attention_tensors() | (
            self._expert_tensors() if has_experts else self._mlp_tensors()
        )

    def _embedding_tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab_size, self.embedding_size)
        }
        if self.position_table:
            shapes["embed_positions.weight"] = (self.position_table, self.hidden_size)
        if self.embedding_size != self.hidden_size:
            shapes["project_in.weight"] = (self.hidden_size, self.embedding_size)
        return shapes

    def _attention_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a decoder layer's weights but for its MLP or experts."""
        hidden = self.hidden_size
        shapes = self._norm("attention_norm")
        shapes |= _linear("qkv_proj", sum(self.stacked("qkv_proj")), hidden, self.attention_bias)
        if self.qk_norm is not None:
            shapes["qk_norm.weight"] = (sum(self.stacked("qk_norm")),)
        if self.attention_sinks:
            shapes[SINKS] = (self.num_heads,)
        shapes |= _linear("o_proj", hidden, self.q_size, self.output_bias)
        shapes |= self._norm("mlp_norm")
        if self.branch_norms:
            shapes |= self._norm("attention_post_norm") | self._norm("mlp_post_norm")
        return shapes

    def _mlp_tensors(self) -> dict[str, tuple[int, ...]]:
        hidden, mlp = self.hidden_size, self.intermediate_size
        up = "gate_up_proj" if self.gated_mlp else "up_proj"
        shapes = _linear(up, sum(self.stacked(up)) or mlp, hidden, self.mlp_bias)
        return shapes | _linear("down_proj", hidden, mlp, self.mlp_bias)

    def _expert_tensors(self) -> dict[str, tuple[int, ...]]:
        count, hidden, size = self.num_experts, self.hidden_size, self.expert_size
        shapes: dict[str, tuple[int, ...]] = {
            **_linear("router", count, hidden, self.expert_bias),
            "gate_up_experts.weight": (count, 2 * size, hidden),
            "down_experts.weight": (count, hidden, size),
        }
        if self.expert_bias:
            shapes["gate_up_experts.bias"] = (count, 1, 2 * size)
            shapes["down_experts.bias"] = (count, 1, hidden)
        if self.corrects_choice:
            shapes[ROUTER_CORRECTION] = (count,)
        if self.shared_expert_size:
            shared = self.shared_expert_size
            if self.shared_expert_gate:
                shapes["shared_gate.weight"] = (1, hidden)
            shapes["shared_gate_up_proj.weight"] = (2 * shared, hidden)
            shapes["shared_down_proj.weight"] = (hidden, shared)
        return shapes

    def _head_tensors(self) -> dict[str, tuple[int, ...]]:
        shapes = self._norm("final_norm") if self.final_norm else {}
        if self.embedding_size != self.hidden_size:
            shapes["project_out.weight"] = (self.embedding_size, self.hidden_size)
        name = "embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"
        return shapes | {name: (self.vocab_size, self.embedding_size)}

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a norm's weight and bias, if this model has them."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.norm_weight:
            shapes[f"{name}.weight"] = (self.hidden_size,)
        if self.norm_bias:
            shapes[f"{name}.bias"] = (self.hidden_size,)
        return shapes


def experts_from(name: str, first: int) -> str:
    """Return the name of a part of a stacked weight, whose first expert has this number."""
    return f"{name}@{first}"


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear layer: a matrix [rows, columns], and perhaps a bias [rows]."""
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes
