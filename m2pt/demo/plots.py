"""The results in pictures."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..checkpoints import written_whole
from ..checks import require
from .experiment import Results, Run
from .summary import accuracies

figures = require("matplotlib.figure", "train")

COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377")
GREY = "#999999"


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)


def plot_accuracy(results: Results, path: Path) -> None:
    """Every seed's accuracy, a line through the variants of a seed, and mean and standard deviation of each variant."""
    by_variant = accuracies(results.runs)
    figure = figures.Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for of_one_seed in zip(*by_variant.values(), strict=True):
        axes.plot(range(len(by_variant)), of_one_seed, color=GREY, linewidth=0.8, alpha=0.6)
    for place, (percent, color) in enumerate(zip(by_variant.values(), COLORS, strict=False)):
        axes.plot([place] * len(percent), percent, "o", color=color, markersize=5, alpha=0.6)
        axes.errorbar(
            place + 0.15, fmean(percent), stdev(percent), fmt="D", color=color, markersize=7, capsize=5, linewidth=1.8
        )
    axes.set_xticks(range(len(by_variant)), list(by_variant))
    axes.set_xlim(-0.5, len(by_variant) - 0.5)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(
        f"Which of nine speakers: {results.settings.seeds} seeds\n"
        "dots and lines: single seeds; diamonds: mean and standard deviation",
        fontsize=10,
    )
    _tidy(axes)
    with written_whole(path) as temporary:
        figure.savefig(temporary)


def plot_scales(results: Results, path: Path) -> None:
    """Learned scales by block and layer, mean and standard deviation over seeds; pathway left, control right."""
    figure = figures.Figure(figsize=(9, 4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, variant in zip(panels, ("pathway", "control"), strict=True):
        layers = _scales_by_layer([run for run in results.runs if run.variant == variant])
        for number, (layer, blocks) in enumerate(layers.items()):
            axes.errorbar(
                [block + 0.08 * (number - (len(layers) - 1) / 2) for block in blocks],
                [fmean(scales) for scales in blocks.values()],
                [stdev(scales) for scales in blocks.values()],
                fmt="o-",
                color=COLORS[number],
                markersize=5,
                linewidth=1.2,
                capsize=3,
                label=layer,
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(list(blocks))
        axes.set_xlabel("block")
        axes.set_title(variant, fontsize=10)
        _tidy(axes)
    panels[0].set_ylabel("cross-modal scale")
    figure.suptitle(f"Learned scales: mean and standard deviation over {results.settings.seeds} seeds", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(layers), frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary)


def _scales_by_layer(runs: list[Run]) -> dict[str, dict[int, list[float]]]:
    """Scales of all runs by layer of a block and number of the block, from names such as `blocks.0.attn.qkv`."""
    layers: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for name, scale in run.scales.items():
            _, block, layer = name.split(".", 2)
            layers.setdefault(layer, {}).setdefault(int(block), []).append(scale)
    return layers
