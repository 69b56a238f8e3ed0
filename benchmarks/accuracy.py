"""Do quantization and sparse attention cost no more accuracy than they must? Perplexity, measured.

Claim: our 4-bit and 8-bit weights and caches, and sparse attention, raise perplexity no more than
the same rounding in plain torch, or other libraries' rounding. The engine scores every variant on
the same windows of a text; peers are transformers' model with rounded weights, a rounding cache, or
sparse attention (rounding.py).

Good: `against the checkpoint` near 1, and each variant equal to its peer in plain torch.
docs/results/accuracy-smollm2.json: python -m benchmarks.accuracy --model SmolLM2-135M-Instruct
--data wikitext2_raw_test.txt --max-tokens 21000 --plot FILE --json FILE
docs/results/accuracy-opt-6m.json: the same with --model opt-6m-gsm8k --data gsm8k_test.jsonl
--context 512 --stride 256 --max-tokens 40000
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import run_as_command
from benchmarks.rounding import PEERS, peer_perplexity
from flexgen_ray.cli.options import JsonOption, PlotOption
from flexgen_ray.evaluation.perplexity import measure
from flexgen_ray.files import text_files
from flexgen_ray.llm import LLM
from flexgen_ray.paths import find_model
from flexgen_ray.reporting.result import finish
from flexgen_ray.reporting.terminal import say

CHECKPOINT = "the checkpoint"


@dataclass(frozen=True)
class Variant:
    """A way to run the model: its name, and the lossy options of LLM."""

    name: str
    lossy: dict[str, Any] = field(default_factory=dict)

    @property
    def scored_in(self) -> str:
        """Phase in which the variant is scored: decode if it is sparse, else prefill.

        Only decode is sparse; a quantized cache counts in prefill too, which attends it as stored.
        """
        return "decode" if "attention_sparsity" in self.lossy else "prefill"


W4, C4, SPARSE = {"weight_bits": 4}, {"cache_bits": 4}, {"attention_sparsity": 0.1}
VARIANTS = (
    Variant(CHECKPOINT),
    Variant("8-bit weights", {"weight_bits": 8}),
    Variant("4-bit weights", W4),
    Variant("8-bit cache", {"cache_bits": 8}),
    Variant("4-bit cache", C4),
    Variant("8-bit weights and cache", {"weight_bits": 8, "cache_bits": 8}),
    Variant("4-bit weights and cache", W4 | C4),
    Variant("sparse 0.1", SPARSE),
    Variant("4-bit weights and cache, sparse 0.1", W4 | C4 | SPARSE),
    Variant("8-bit embedding and head", {"embedding_bits": 8}),
    Variant("4-bit embedding and head", {"embedding_bits": 4}),
)


def accuracy(
    model: Annotated[str, typer.Option(metavar="MODEL", help="Model folder, with a tokenizer.")],
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Text, or .jsonl of GSM8K's questions and answers."),
    ],
    context: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a window.")] = 1024,
    stride: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Tokens from a window's start to the next one's."),
    ] = 512,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of the text to score, at most.")
    ] = 21_000,
    plot: PlotOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure a model's perplexity in every format, and with the same rounding in plain torch.

    Example: python -m benchmarks.accuracy --model ./smollm2 --data wiki.txt
    """
    text, folder = read_text(data), find_model(model)
    windows = {"context": context, "stride": stride, "max_tokens": max_tokens}
    runs = list(_scored(folder, text, windows)) + list(_peers(folder, text, windows))
    plain = runs[0]["perplexity"]
    for run in runs:
        run["against the checkpoint"] = round(run["perplexity"] / plain, 5)
    result = {"model": folder.name, "data": data.name, "settings": windows, "runs": runs}
    finish(result, "CPU", json_file)
    if plot is not None:
        from flexgen_ray.reporting.plot import draw_accuracy

        draw_accuracy(result, plot)


def read_text(path: Path) -> str:
    """Text of a file, or of JSON lines with questions and answers.

    GSM8K's calculator annotations, such as <<1+1=2>>, are left out.
    """
    text = text_files.read_text(path)
    if path.suffix != ".jsonl":
        return text
    rows = map(json.loads, filter(str.strip, text.split("\n")))
    pairs = (f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows)
    return re.sub(r"<<.*?>>", "", "".join(pairs))


def _scored(folder: Path, text: str, windows: dict[str, int]) -> Iterator[dict]:
    """Figures of each variant, scored by the engine."""
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "use_ray": False}
    for variant in VARIANTS:
        with LLM(folder, **options, **variant.lossy) as llm:
            figures = measure(llm, text, **windows, scored_in=variant.scored_in)
        run = {"name": variant.name, "scored_in": variant.scored_in} | figures
        say(str(run))
        yield run


def _peers(folder: Path, text: str, windows: dict[str, int]) -> Iterator[dict]:
    """Figures of each peer whose package is installed, scored by transformers."""
    for name, peer in PEERS.items():
        figures = peer_perplexity(folder, text, peer, **windows)
        if figures is not None:
            run = {"name": name, "scored_in": "transformers"} | figures
            say(str(run))
            yield run


if __name__ == "__main__":
    run_as_command(accuracy)
