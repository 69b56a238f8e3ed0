"""What a model is: sizes, and the order of its maths, with no torch behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; `type` is one of default, linear, llama3."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, as far as sizes and the order of its maths are concerned.

    attention_bias: of queries, keys and values; output_bias: of what follows attention; qk_norm:
    "heads" if each head's query and key is normed before it is rotated, "all" if those of all heads
    are together; query_scale: by which queries are multiplied beside 1 / sqrt(head_dim);
    norm_offset: added to norms' weights, which then multiply in float32; None: in the dtype;
    branch_norms: what attention and MLP add is normed, beside what they take. sliding_window:
    tokens that one attends, itself included, in decoder layers other than full_attention_layers;
    window_rope: of those with a window, where theirs is another. weight_bits, embedding_bits: of a
    checkpoint that holds packed weights (quant/packing.py), of the layers' and of both ends'.
    overflows_float16: the family's activations are known to exceed 65504, where float16 ends.
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
    qk_norm: str | None = None
    query_scale: float = 1.0
    norm_offset: float | None = None
    branch_norms: bool = False
    mlp_bias: bool = False
    position_table: int = 0
    rope: Rope | None = None
    window_rope: Rope | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    weight_bits: int | None = None
    embedding_bits: int | None = None
    overflows_float16: bool = False

    @property
    def embedding_layer(self) -> int:
        return 0

    @property
    def head_layer(self) -> int:
        return self.num_layers + 1

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def with_end_tokens(self, *token_ids: int | None) -> ModelConfig:
        """With more end tokens; None and ids outside the vocabulary end nothing."""
        ends = dict.fromkeys((*self.eos_token_ids, *token_ids))
        inside = [it for it in ends if it is not None and 0 <= it < self.vocab_size]
        return replace(self, eos_token_ids=tuple(inside))

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, one attends in a decoder layer; None for all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def attended_tokens(self, layer: int, tokens: int) -> int:
        """How many tokens the last of so many attends in a decoder layer."""
        return min(tokens, self.window(layer) or tokens)

    def tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's weights by our names; layer 0 embeds, the last is the head.

        A tied head shares "embed_tokens.weight" with the embedding.
        """
        if layer == self.embedding_layer:
            return self._embedding_tensors()
        return self._head_tensors() if layer == self.head_layer else self._decoder_tensors()

    def _embedding_tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab_size, self.embedding_size)
        }
        if self.position_table:
            shapes["embed_positions.weight"] = (self.position_table, self.hidden_size)
        if self.embedding_size != self.hidden_size:
            shapes["project_in.weight"] = (self.hidden_size, self.embedding_size)
        return shapes

    def _decoder_tensors(self) -> dict[str, tuple[int, ...]]:
        hidden, mlp = self.hidden_size, self.intermediate_size
        shapes = self._norm("attention_norm")
        for name, rows in (("q", self.q_size), ("k", self.kv_size), ("v", self.kv_size)):
            shapes |= _linear(f"{name}_proj", rows, hidden, self.attention_bias)
        if self.qk_norm is not None:
            sizes = (self.q_size, self.kv_size) if self.qk_norm == "all" else (self.head_dim,) * 2
            shapes |= {"q_norm.weight": (sizes[0],), "k_norm.weight": (sizes[1],)}
        shapes |= _linear("o_proj", hidden, self.q_size, self.output_bias)
        shapes |= self._norm("mlp_norm")
        if self.branch_norms:
            shapes |= self._norm("attention_post_norm") | self._norm("mlp_post_norm")
        if self.gated_mlp:
            shapes |= _linear("gate_proj", mlp, hidden, self.mlp_bias)
        shapes |= _linear("up_proj", mlp, hidden, self.mlp_bias)
        return shapes | _linear("down_proj", hidden, mlp, self.mlp_bias)

    def _head_tensors(self) -> dict[str, tuple[int, ...]]:
        shapes = self._norm("final_norm") if self.final_norm else {}
        if self.embedding_size != self.hidden_size:
            shapes["project_out.weight"] = (self.embedding_size, self.hidden_size)
        name = "embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"
        return shapes | {name: (self.vocab_size, self.embedding_size)}

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.norm_weight:
            shapes[f"{name}.weight"] = (self.hidden_size,)
        if self.norm_bias:
            shapes[f"{name}.bias"] = (self.hidden_size,)
        return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes
