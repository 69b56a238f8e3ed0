"""`flexgen-ray eval …`: what an offloaded model, with its policy, makes of given text.

Parses and shows; without torch until a command runs.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.app import App
from flexgen_ray.cli.options import JsonOption, with_engine

app = App(no_args_is_help=True)


class Phase(StrEnum):
    prefill = "prefill"
    decode = "decode"


ScoredInOption = Annotated[
    Phase,
    typer.Option(
        help="prefill: many tokens at a time; decode: one by one, as generation meets them."
    ),
]


@app.command()
@with_engine
def perplexity(
    engine: dict[str, Any],
    data: Annotated[Path, typer.Option(help="A text file, scored as one text.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 1024,
    stride: Annotated[
        int, typer.Option(min=1, help="Tokens from one window's start to the next one's.")
    ] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the text's first tokens.")
    ] = None,
    scored_in: ScoredInOption = Phase.prefill,
    json_file: JsonOption = None,
) -> None:
    """Perplexity of a text, by tokens, each scored once with a sliding window before it.

    Example: flexgen-ray eval perplexity --model ./opt-30b --data wiki.txt --gpu-memory 16GiB
    """
    from flexgen_ray.evaluation.perplexity import measure
    from flexgen_ray.evaluation.run import evaluate

    settings = {
        "context": context, "stride": stride, "max_tokens": max_tokens,
        "scored_in": scored_in.value,
    }  # fmt: skip
    evaluate(measure, engine, data, settings, json_file)


@app.command()
@with_engine
def cloze(
    engine: dict[str, Any],
    data: Annotated[Path, typer.Option(help='JSONL of {"text": ...}, such as LAMBADA.')],
    max_texts: Annotated[
        int | None, typer.Option(min=1, help="Score only the first lines.")
    ] = None,
    scored_in: ScoredInOption = Phase.prefill,
    json_file: JsonOption = None,
) -> None:
    """Accuracy of texts' last words: how often all their tokens are the greedy ones.

    Example: flexgen-ray eval cloze --model ./opt-30b --data lambada.jsonl --gpu-memory 16GiB
    """
    from flexgen_ray.evaluation.cloze import measure
    from flexgen_ray.evaluation.run import evaluate

    settings = {"max_texts": max_texts, "scored_in": scored_in.value}
    evaluate(measure, engine, data, settings, json_file)
