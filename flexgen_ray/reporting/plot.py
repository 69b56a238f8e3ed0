"""Draws results that people would rather look at than read. Needs matplotlib: `.[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgen_ray.files.output_files import atomic_write


def draw_scaling(result: dict, path: Path) -> None:
    """Decode throughput over stages, against as many copies of one stage; result: of bench scaling.

    One panel a model; the format follows the path's ending. Raises ImportError without matplotlib.
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
    for panel, (name, found) in zip(axes[0], models.items(), strict=True):
        counts = [int(count) for count in found["stages"]]
        rates = [run["decode_tokens_per_s"] for run in found["stages"].values()]
        alone = rates[counts.index(1)] if 1 in counts else rates[0] / counts[0]
        panel.plot(counts, rates, "o-", label="pipeline" + said)
        panel.plot(counts, [alone * it for it in counts], ":", color="grey", label="copies of one")
        if found.get("paper"):
            panel.plot((1, 4), found["paper"]["decode"], "s--", color="tab:red", label="FlexGen")
        panel.set(title=name, xlabel=machines, xticks=counts, xlim=(0.4, None), ylim=(0, None))
        for count, rate in zip(counts, rates, strict=True):
            label = f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"
            panel.annotate(label, (count, rate), (-4, 4), textcoords="offset points", ha="right")
    axes[0][0].set_ylabel("decode tokens/s")
    axes[0][0].legend()
    _save(figure, path)
    plt.close(figure)


def draw_frontier(title: str, frontiers: dict[str, list], path: Path) -> None:
    """Throughput over a block's latency, both logarithmic; frontiers: of cost/frontier.py.

    The format follows the path's ending. Raises ImportError without matplotlib.
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
    """Perplexity against the checkpoint's, a bar a variant; result: of bench accuracy.

    The format follows the path's ending. Raises ImportError without matplotlib.
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
