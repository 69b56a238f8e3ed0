"""`flexgen-ray eval ...`: scores a text with an offloaded model.

Parses and shows; imports no torch until a command runs.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flexgen_ray.cli.app import App
from flexgen_ray.cli.options import FILES, JsonOption, with_llm_options

app = App(no_args_is_help=True)
_EVALUATION = "Evaluation"


class Phase(StrEnum):
    prefill = "prefill"
    decode = "decode"


ScoredInOption = Annotated[
    Phase,
    typer.Option(
        rich_help_panel=_EVALUATION,
        help="Phase whose computation is scored. prefill: many tokens at a time, which is faster. "
        "decode: token by token, as generation computes them.",
    ),
]


@app.command(short_help="Perplexity of a text.")
@with_llm_options
def perplexity(
    engine: dict[str, Any],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE", rich_help_panel=FILES, help="Text file (UTF-8), scored as one text."
        ),
    ],
    json_file: JsonOption = None,
    context: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", rich_help_panel=_EVALUATION, help="Length of a window in tokens."
        ),
    ] = 1024,
    stride: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_EVALUATION,
            help="Tokens from the start of one window to the start of the next.",
        ),
    ] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_EVALUATION,
            help="Score only the first N tokens of the text. [default: all of it]",
        ),
    ] = None,
    scored_in: ScoredInOption = Phase.prefill,
) -> None:
    """Measure the perplexity of a text: each token is scored once, after a sliding window.

    Use it to see what a lossy option, such as --weight-bits 4, costs.

    \b
    Example: flexgen-ray eval perplexity --model ./opt-30b --data wiki.txt --gpu-memory 16GiB
    """
    from flexgen_ray.evaluation.perplexity import describe, measure
    from flexgen_ray.evaluation.run import evaluate

    settings = {
        "context": context, "stride": stride, "max_tokens": max_tokens,
        "scored_in": scored_in.value,
    }  # fmt: skip
    evaluate(measure, describe, engine, data, settings, json_file)


@app.command(short_help="Accuracy of predicted last words.")
@with_llm_options
def cloze(
    engine: dict[str, Any],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            rich_help_panel=FILES,
            help='JSONL file of {"text": ...} lines, such as LAMBADA.',
        ),
    ],
    json_file: JsonOption = None,
    max_texts: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_EVALUATION,
            help="Score only the first N texts. [default: all of them]",
        ),
    ] = None,
    scored_in: ScoredInOption = Phase.prefill,
) -> None:
    """Measure how often greedy decoding gives a text's last word (as LAMBADA does).

    Use it to see what a lossy option, such as --cache-bits 4, costs.

    \b
    Example: flexgen-ray eval cloze --model ./opt-30b --data lambada.jsonl --gpu-memory 16GiB
    """
    from flexgen_ray.evaluation.cloze import describe, measure
    from flexgen_ray.evaluation.run import evaluate

    settings = {"max_texts": max_texts, "scored_in": scored_in.value}
    evaluate(measure, describe, engine, data, settings, json_file)
