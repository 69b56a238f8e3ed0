"""The step that runs a mixture of experts, and compares its tokens with those of transformers.

Knows policies and `LLM`; not how experts run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from flexgen_ray.config import Placement, Policy
from flexgen_ray.qualification.setting import Figures, Setting, run_step
from flexgen_ray.qualification.two_actors import (
    LONGEST,
    MAX_TOKENS,
    NUM_ANSWERS,
    POLICY,
    answers,
)

_POLICIES = {
    "on the device": Policy(3, 2, 16),
    "on three tiers": POLICY,
    "experts in groups": Policy(3, 2, 16, Placement(0, 1, 0), expert_slots=2),
}


def mixture(setting: Setting, figures: Figures) -> None:
    """Answer some prompts with experts placed in several ways, and with transformers on the CPU.

    Leaves the number of equal answers for each; AssertionError if any answer differs.
    """
    from flexgen_ray.qualification import tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        tiny_model.save_tiny_model(folder, tiny_model.mixture())
        expected = tiny_model.references(folder, NUM_ANSWERS, LONGEST, MAX_TOKENS)
        prompts, theirs = [it.prompt for it in expected], [it.tokens for it in expected]
        for name, policy in _POLICIES.items():
            ours = answers(setting, folder, prompts, policy, use_ray=False)
            equal = sum(map(list.__eq__, ours, theirs))
            figures.add(weights=name, answers=len(ours), equal_to_transformers=equal)
            assert equal == len(ours), (name, ours, theirs)


if __name__ == "__main__":
    run_step(mixture)
