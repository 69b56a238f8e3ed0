"""Runs of an engine on tiny models, and how to compare them with transformers."""

from __future__ import annotations

import torch

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.runtime.worker import Worker

MAX_TOKENS = 12


def greedy(folder, prompts, policy, device="cpu", **options):
    """Outputs of greedy generation, MAX_TOKENS tokens each."""
    with LLM(folder, policy=policy, dtype="float32", device=device, **options) as llm:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
        return [output.outputs[0] for output in llm.generate(prompts, params)]


def assert_same(outputs, references) -> None:
    """Tokens equal the references' up to the first that is too close to call."""
    for output, reference in zip(outputs, references, strict=True):
        certain = reference.certain_len()
        assert output.token_ids[:certain] == reference.tokens[:certain]
        assert len(output.token_ids) == MAX_TOKENS
        assert output.finish_reason == "length"


def generate(
    folder, prompts, policy, executor, monkeypatch, **options
) -> tuple[list, list[torch.Tensor]]:
    """Tokens and all their logits, by sequence."""
    options = {"policy": policy, "executor": executor, "use_ray": False} | options
    seen: dict[int, list[torch.Tensor]] = {}

    def collect(indices, logits):
        for index, row in zip(indices, logits, strict=True):
            seen.setdefault(index, []).append(row.clone())

    run = Worker.run
    params = [SamplingParams(max_tokens=6 + i, temperature=i % 2) for i in range(len(prompts))]
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", lambda self: run(self, collect))
        with LLM(folder, dtype="float32", **options) as llm:
            outputs = llm.generate(prompts, params)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return tokens, [torch.stack(seen[index]) for index in sorted(seen)]
