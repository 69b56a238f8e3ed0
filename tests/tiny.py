"""Tiny random models, their greedy continuations by transformers, and how to compare with ours."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 97
CONTEXT = 160
CONFIGS = {
    "opt": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        ffn_dim=64, max_position_embeddings=CONTEXT, word_embed_proj_dim=32,
    ),
    "opt-350m-like": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=48, max_position_embeddings=CONTEXT, word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    ),
    "llama3-like": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=1, head_dim=16, intermediate_size=40, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 40,
        },
    ),
    "llama-linear": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "mistral": MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=CONTEXT,
        sliding_window=6, tie_word_embeddings=False,
    ),
    "qwen2": Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=1,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 4,
        },
    ),
    "qwen3": Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    ),
    "olmo2": Olmo2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=CONTEXT,
        pad_token_id=0,
    ),
    "phi3": Phi3Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=CONTEXT,
        sliding_window=30, pad_token_id=0, original_max_position_embeddings=CONTEXT,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0,
            "partial_rotary_factor": 0.5, "short_factor": [1.1, 2.5], "long_factor": [3.0, 40.0],
        },
    ),
    "gemma": GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, intermediate_size=48, max_position_embeddings=CONTEXT,
    ),
    "gemma3": Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=CONTEXT,
        query_pre_attn_scalar=24, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}  # fmt: skip
# Mixtures of experts, in some of whose layers there are none.
MIXTURES = {
    "qwen2-moe": Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=CONTEXT,
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, decoder_sparse_step=2,
    ),
    "qwen3-moe": Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=CONTEXT,
        num_experts=9, num_experts_per_tok=4, moe_intermediate_size=12, norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "mixtral": MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=CONTEXT,
        num_local_experts=4, num_experts_per_tok=2,
    ),
    "olmoe": OlmoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=16, max_position_embeddings=CONTEXT,
        num_experts=8, num_experts_per_tok=3,
    ),
    "gpt-oss": GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=24, max_position_embeddings=CONTEXT,
        num_local_experts=6, num_experts_per_tok=2, sliding_window=7, swiglu_limit=1.5,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "truncate": False,
            "original_max_position_embeddings": 20,
        },
    ),
    "glm4-moe": Glm4MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=CONTEXT,
        n_routed_experts=12, num_experts_per_tok=3, moe_intermediate_size=12, n_group=4,
        topk_group=2, first_k_dense_replace=2, routed_scaling_factor=1.5, use_qk_norm=True,
        attention_bias=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """One prompt's greedy continuation by transformers, and the logits behind each token."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    routed_len: int | None = None  # tokens before a router's choice is too close to call

    def certain_len(self, close_by: float = 1e-4) -> int:
        """Tokens before the first whose two best logits are too close to call (docs/design.md): by
        this much of their standard deviation."""
        best = self.logits.topk(2, dim=-1).values
        close = (best[:, 0] - best[:, 1]) < close_by * self.logits.std(dim=-1)
        certain = int(close.float().argmax()) if close.any() else len(self.tokens)
        return certain if self.routed_len is None else min(certain, self.routed_len)


def save(name: str, folder: Path, max_shard_size: str = "5GB", **changes) -> Path:
    """A model folder with random weights, large enough that its tokens are diverse.

    changes: to the config of that name.
    """
    torch.manual_seed(len(name))
    config = copy.deepcopy((CONFIGS | MIXTURES)[name])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise, is_gemma = torch.randn_like(parameter), "gemma" in name
            if is_gemma and "embed" in key:  # the model itself scales it, by hidden_size**0.5
                parameter.copy_(noise / 4 / config.hidden_size**0.5)
            elif "embed" in key or "lm_head" in key:
                parameter.copy_(noise)
            elif key.endswith("sinks"):
                parameter.copy_(noise + 1)
            elif parameter.dim() in (2, 3):
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                is_norm = "norm" in key and key.endswith("weight")
                parameter.copy_(0.1 * noise + (is_norm and not is_gemma))
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def add_tokenizer(folder: Path) -> None:
    """One token a printable ASCII character: just what the vocabulary has room for."""
    characters = {chr(code): code - 30 for code in range(32, 127)}
    tokenizer = Tokenizer(BPE({"¤": 0, "¦": 1} | characters, [], unk_token="¤"))
    tokenizer.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Ragged prompts of 1 to `longest` random tokens."""
    rng = random.Random(seed)
    return [
        [rng.randrange(4, VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


def references(
    folder: Path, some_prompts: list[list[int]], max_tokens: int, **options
) -> list[Reference]:
    """transformers' greedy generate, one prompt at a time, without end tokens.

    options: of from_pretrained.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    made = [generate(model, prompt, max_tokens) for prompt in some_prompts]
    return with_routes(model, made)


def with_routes(model, made: list[Reference]) -> list[Reference]:
    """References with `routed_len`, if the model is a mixture.

    By float64, a choice of experts is too close to call if the last one chosen is ahead of the next
    by less than 1e-6 of the scores' deviation.
    """
    if not hasattr(model.config, "num_experts_per_tok"):
        return made
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # others have no float64
    scores: list[torch.Tensor] = []
    routers = [it for it in model.modules() if type(it).__name__.lower().endswith("topkrouter")]
    for router in routers:
        router.register_forward_hook(lambda router, __, out: scores.append(ranks(router, out[0])))
    for number, reference in enumerate(made):
        scores.clear()
        with torch.no_grad():
            model(torch.tensor([reference.prompt + reference.tokens[:-1]]))
        closest = torch.full((len(scores[0]),), torch.inf, dtype=torch.float64)
        for router, of_layer in zip(routers, scores, strict=True):
            for choice, count in choices(router, of_layer):
                best = choice.topk(count + 1, dim=-1).values
                closest = closest.minimum((best[:, -2] - best[:, -1]) / of_layer.std(dim=-1))
        close = (closest < 1e-6).nonzero().flatten().tolist()
        first = close[0] if close else len(closest)
        length = min(max(first - len(reference.prompt) + 1, 0), len(reference.tokens))
        made[number] = replace(reference, routed_len=length)
    return made


def ranks(router, scores: torch.Tensor) -> torch.Tensor:
    """The scores by which a router chooses."""
    correction = getattr(router, "e_score_correction_bias", None)
    return scores.double() if correction is None else scores.double().sigmoid() + correction


def choices(router, scores: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """(scores, how many of them are taken): of experts, and perhaps of their groups before."""
    count = getattr(router, "num_group", 1)
    if count == 1 or router.topk_group == count:
        return [(scores, router.top_k)]
    groups = scores.unflatten(-1, (count, -1))
    best = groups.topk(2, dim=-1).values.sum(dim=-1)
    inside = best.topk(router.topk_group, dim=-1).indices
    taken = groups.gather(1, inside[..., None].expand(-1, -1, groups.shape[-1])).flatten(1)
    return [(best, router.topk_group), (taken, router.top_k)]


def generate(model, prompt: list[int], max_tokens: int, **options) -> Reference:
    """One prompt's greedy continuation."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens, do_sample=False, output_logits=True, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, **options,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :].tolist()
    return Reference(prompt, tokens, torch.cat(out.logits).float())
