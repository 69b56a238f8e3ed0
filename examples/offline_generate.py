"""Offline generation in Python, with the names that vLLM's users know.

    python examples/offline_generate.py [MODEL_FOLDER]

Without a folder the demo's SmolLM2-135M-Instruct is used.
"""

import sys

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.cli.demo import prepare_model

PROMPTS = ["The capital of France is", "Once upon a time", "2, 4, 6, 8,", "Hello"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else prepare_model()
    # Without a policy the placement is planned, or memory is filled; this one uses all three tiers.
    policy = Policy(
        gpu_batch_size=2,
        num_gpu_batches=2,
        weights=Placement(gpu=0.4, cpu=0.3, disk=0.3),
        cache=Placement(gpu=0.5, cpu=0.5),
        cpu_attention=1.0,
    )
    with LLM(model, policy=policy) as llm:
        params = SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=1)
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            print(f"{prompt!r} -> {output.outputs[0].text!r}")
        print("\n".join(llm.report.lines()))


if __name__ == "__main__":
    main()
