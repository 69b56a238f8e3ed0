"""Plots of benchmark results and of plans. Needs matplotlib: `pip install flexgen-ray[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgen_ray.files.output_files import atomic_write


def draw_scaling(result: dict, path: Path) -> None:
    """Plot decode throughput over the number of stages, beside that of independent copies.

    result: of benchmarks.scaling; one panel for each model. The path's suffix gives the format.
    Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = result["models"]
    is_emulated = result.get("emulated", False)
    said, machines = (" (emulated)", "T4 machines") if is_emulated else ("", "pipeline stages")
    figure, axes = plt.subplots(
        1, len(models), figsize=(4 * len(models), 3.6), squeeze=False, layout="constrained"
    )
    for panel, (name, model) in zip(axes[0], models.items(), strict=True):
        counts = [int(count) for count in model["stages"]]
        rates = [run["decode_tokens_per_s"] for run in model["stages"].values()]
        alone = rates[counts.index(1)] if 1 in counts else rates[0] / counts[0]
        panel.plot(counts, rates, "o-", label="pipeline" + said)
        panel.plot(
            counts, [alone * n for n in counts], ":", color="grey", label="independent copies"
        )
        if model.get("paper"):
            panel.plot((1, 4), model["paper"]["decode"], "s--", color="tab:red", label="FlexGen")
        panel.set(title=name, xlabel=machines, xticks=counts, xlim=(0.4, None), ylim=(0, None))
        for count, rate in zip(counts, rates, strict=True):
            label = f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"
            panel.annotate(label, (count, rate), (-4, 4), textcoords="offset points", ha="right")
    axes[0][0].set_ylabel("decode tokens/s")
    axes[0][0].legend()
    _save(figure, path)
    plt.close(figure)


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
