"""The step that runs two stages, each in a Ray actor, on one GPU over gloo, and compares tokens.

Knows a cluster of this process's own and `LLM`; not how stages meet.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from flexgen_ray.config import Placement, Policy
from flexgen_ray.qualification.setting import Figures, Setting, run_step

NUM_ANSWERS, LONGEST, MAX_TOKENS = 7, 40, 12
_THIRD = Placement(0.34, 0.33, 0.33)
POLICY = Policy(3, 2, 16, weights=_THIRD, cache=_THIRD, activations=_THIRD, cpu_attention=0.5)
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def two_actors(setting: Setting, figures: Figures) -> None:
    """Run two stages in actors that share a GPU, over gloo."""
    # Ray then hides no GPU from an actor, and both of them take the first one.
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    if visible := os.environ.get(_VISIBLE):
        # CUDA ignores what follows a negative number, but Ray counts it as a second GPU.
        os.environ[_VISIBLE] = f"{visible.split(',')[0]},-1"
    compare_stages(setting, figures, "gloo")


def compare_stages(setting: Setting, figures: Figures, transport: str) -> None:
    """Answer some prompts with two actors, with one process and with transformers.

    Leaves the numbers of equal answers; AssertionError if any two answers differ.
    """
    from flexgen_ray.distributed.own_cluster import OwnCluster
    from flexgen_ray.qualification.tiny_model import llama, references, save_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_tiny_model(folder, llama())
        expected = references(folder, NUM_ANSWERS, LONGEST, MAX_TOKENS)
        prompts = [each.prompt for each in expected]
        alone = answers(setting, folder, prompts, POLICY, use_ray=False)
        cluster = OwnCluster(num_cpus=2, num_gpus=2 if setting.on_cuda else 0)
        try:
            options = {"pipeline_parallel_size": 2, "transport": transport}
            actors = answers(setting, folder, prompts, POLICY, use_ray=True, **options)
        finally:
            cluster.close()
    theirs = [each.tokens for each in expected]
    equal_alone = sum(map(list.__eq__, actors, alone))
    equal_theirs = sum(map(list.__eq__, actors, theirs))
    figures.add(
        transport=transport, answers=len(actors), equal_to_one_process=equal_alone,
        equal_to_transformers=equal_theirs,
    )  # fmt: skip
    assert equal_alone == equal_theirs == len(actors), (actors, alone, theirs)


def answers(
    setting: Setting, folder: Path, prompts: list[list[int]], policy: Policy, **options: Any
) -> list[list[int]]:
    """Greedy tokens of each prompt; options: of LLM."""
    from flexgen_ray.llm import LLM
    from flexgen_ray.request import SamplingParams

    params = SamplingParams(MAX_TOKENS, 0.0, ignore_eos=True)
    with LLM(
        folder, policy=policy, dtype="float32", device=setting.device, gpu_memory="1GiB",
        cpu_memory="1GiB", offload_dir=folder.parent / "offload", **options,
    ) as llm:  # fmt: skip
        return [answer.outputs[0].token_ids for answer in llm.generate(prompts, params)]


if __name__ == "__main__":
    run_step(two_actors)
