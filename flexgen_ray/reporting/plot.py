"""Plots of benchmark results and of plans. Needs matplotlib: `pip install flexgen-ray[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgen_ray.files.output_files import atomic_write


def draw_scaling(result: dict, path: Path) -> None:
    """Plot tokens/s of decoding and of generation over the number of stages, beside copies of one.

    result: of benchmarks.scaling; a column of two panels for each model. Marked runs are hollow,
    and neither they nor copies of one are compared. The path's suffix gives the format.
    Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = result["models"]
    is_emulated = result.get("emulated", False)
    pipeline = "pipeline (emulated)" if is_emulated else "pipeline"
    figure, axes = plt.subplots(
        2, len(models), figsize=(4 * len(models), 6.4), squeeze=False, layout="constrained"
    )
    for row, phase in zip(axes, ("decode", "generation"), strict=True):
        for panel, (name, model) in zip(row, models.items(), strict=True):
            _draw_stages(panel, model, phase, pipeline)
            panel.set(title=name, xlabel="T4 machines" if is_emulated else "pipeline stages")
        row[0].set_ylabel(f"{phase} tokens/s")
    axes[0][0].legend()
    _save(figure, path)
    plt.close(figure)


def _draw_stages(panel: Any, model: dict, phase: str, label: str) -> None:
    """Draw a model's tokens/s in a phase over its numbers of stages; label: of the curve."""
    rates = {int(it): run[f"{phase}_tokens_per_s"] for it, run in model["stages"].items()}
    marked = {int(it) for it, run in model["stages"].items() if run.get("doubtful")}
    sound = {it: rate for it, rate in rates.items() if rate is not None and it not in marked}
    panel.plot([*sound], [*sound.values()], "o-", label=label)
    for count in marked:
        if rates[count] is not None:
            panel.plot(count, rates[count], "o", color="grey", fillstyle="none")
            panel.annotate("doubtful", (count, rates[count]), (4, 4), textcoords="offset points")
    if 1 in sound:
        alone = [sound[1] * count for count in rates]
        panel.plot([*rates], alone, ":", color="grey", label="independent copies")
    if model.get("paper"):
        panel.plot((1, 4), model["paper"][phase], "s--", color="tab:red", label="FlexGen")
    panel.margins(y=0.2)  # for the text above the highest point
    panel.set(xticks=[*rates], xlim=(0.4, None), ylim=(0, None))
    for count, rate in sound.items():
        text = f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
        ratio = model.get(f"{phase}_of_copies", {}).get(str(count))
        if ratio is not None and count > 1:
            text += f"\n{ratio:.2f} x copies"
        panel.annotate(text, (count, rate), (-4, 4), textcoords="offset points", ha="right")


def draw_frontier(title: str, frontiers: dict[str, list], path: Path) -> None:
    """Plot throughput over the latency of a block, both logarithmic.

    frontiers: {name of a curve: points with `seconds` and `tokens_per_s`}. The path's suffix gives
    the format. Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for (name, points), style in zip(frontiers.items(), ("o-", "s--"), strict=True):
        axes.plot(
            [it.seconds for it in points], [it.tokens_per_s for it in points], style, label=name
        )
    axes.set(title=f"{title}, predicted", xscale="log", yscale="log")
    axes.set(xlabel="latency of a block, s", ylabel="generated tokens/s")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)
    plt.close(figure)


def draw_accuracy(result: dict, path: Path) -> None:
    """Plot the perplexity of each variant against the checkpoint's, as bars.

    result: of benchmarks.accuracy. The path's suffix gives the format. Raises ImportError without
    matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    runs = result["runs"][::-1]
    losses = [100 * (run["against the checkpoint"] - 1) for run in runs]
    colours = ["grey" if run["scored_in"] == "transformers" else "tab:blue" for run in runs]
    figure, axes = plt.subplots(figsize=(7.2, 0.28 * len(runs) + 1), layout="constrained")
    bars = axes.barh([run["name"] for run in runs], losses, color=colours)
    axes.bar_label(bars, [f"{run['perplexity']:.2f}" for run in runs], padding=3)
    figure.suptitle(f"{result['model']}, {result['data']}: perplexity\ngrey: in transformers")
    axes.set(xlabel="% above the checkpoint", xscale="symlog")
    axes.margins(x=0.15)
    _save(figure, path)
    plt.close(figure)


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=150, format=path.suffix.removeprefix(".") or None)
