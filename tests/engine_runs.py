"""Runs of an engine on tiny models, and how to compare them with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.config import PAGE_TOKENS, Sharing
from flexgen_ray.layout import admission, plan
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.planner import choose
from flexgen_ray.runtime import prefixes
from flexgen_ray.runtime.prefix_book import PrefixBook
from flexgen_ray.runtime.prefixes import Prefix
from flexgen_ray.runtime.worker import Worker

MAX_TOKENS = 12
WHOLE = {"enable_prefix_caching": False}  # options by which prompts are computed whole


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


def placed(stage: StagePlan, tier: str) -> StagePlan:
    return replace(stage, prefix_tier=tier if any(it.cpu for it in stage.splits) else "gpu")


@contextmanager
def sharing(
    tiers: list[str], quota: int = 99, is_short: bool = False, folded: int = 2
) -> Iterator[list[Prefix]]:
    """Runs share every page that they can; yields the list of prefixes that were computed.

    tiers: of each stage's prefixes; quota: pages of all of these. is_short: rows enter without
    looking ahead, where pages are few, so that some are set back. folded: rows below which a prefix
    is folded into their own pages.
    """
    computed: list[Prefix] = []
    complete = PrefixBook.complete

    def completed(book: PrefixBook, key) -> Prefix:
        computed.append(complete(book, key))
        return computed[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "_least_saved", lambda requests: 1)
        patch.setattr(PrefixBook, "complete", completed)
        patch.setattr(plan, "FOLDED_ROWS", folded)
        patch.setattr(Sharing, "pages", lambda it, rows: min(it.tokens // PAGE_TOKENS, quota))
        patch.setattr(
            choose,
            "place_prefixes",
            lambda plans, *others: [*map(placed, plans, tiers * len(plans))],
        )
        if is_short:
            patch.setattr(choose, "with_spare_pages", lambda plans, *others: plans)
            patch.setattr(admission, "peak_pages", lambda *_: 0)
        yield computed
