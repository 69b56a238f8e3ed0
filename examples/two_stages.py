"""A pipeline of two stages, each a Ray actor with its part of the layers.

    python examples/two_stages.py [MODEL_FOLDER]

Without a folder the demo's SmolLM2-135M-Instruct is used. A Ray cluster is started for the run; set
RAY_ADDRESS to run on another one, where pipeline_parallel_size="auto" takes every GPU.
"""

import sys

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.cli.demo import prepare_model

PROMPTS = ["The capital of France is", "Once upon a time", "2, 4, 6, 8,", "Hello"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else prepare_model()
    # A stage whose process or machine is lost is replaced; its requests continue from their tokens.
    with LLM(model, pipeline_parallel_size=2, max_restarts=3) as llm:
        params = SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=1)
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            print(f"{prompt!r} -> {output.outputs[0].text!r}")
        print("\n".join(llm.report.lines()))


if __name__ == "__main__":
    main()
