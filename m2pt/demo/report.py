"""The report of the results, with a table and a plot: first what they demonstrate, then the accuracies."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import timm
import torch

from ..checkpoints import written_whole
from ..checks import require
from ..matrix import markdown as table_of
from ..train.files import write_json
from .experiment import LABELLED, Results

figures = require("matplotlib.figure", "train")

ATTRIBUTION = (
    'Speech data: UCI Machine Learning Repository, "Japanese Vowels", M. Kudo, J. Toyama, M. Shimbo (1999), CC BY 4.0. '
    "Handwritten digits: scikit-learn's `load_digits`."
)
KIB = 1024
Scales = Mapping[str, Sequence[Mapping[str, float]]]
"""The scale of every layer, by variant and seed."""


def markdown(results: Results) -> str:
    """The report without its plot."""
    seeds = len(results.random_features)
    stored = ""
    if results.quantization_error is not None:
        error = f"{100 * results.quantization_error:.2f} %"
        stored = f" Auxiliary weights are stored as {results.aux_dtype}, with a relative error of {error} at most."
    saved = [
        f"| {precision} | " + " | ".join(f"{size / KIB:,.0f}" for size in sizes.values()) + " |"
        for precision, sizes in results.saved_bytes.items()
    ]
    learned = {name: fmean(abs(s) for run in runs for s in run.values()) for name, runs in results.scales.items()}
    over = results.digits_over_shuffled
    return "\n".join(
        [
            "# Multimodal pathway from handwritten digits to speech",
            "",
            "A transformer tells nine speakers apart, with the frozen weights of a digit transformer added to its"
            f" layers. The control has the same weights with their entries shuffled.{stored}",
            "",
            f"1. Merged into a plain timm model, logits differ by {results.merge_difference:.1e} at most.",
            "2. KiB that the forward of a training batch saves for backward:",
            "",
            "   | precision | plain model | fused pathway | published formulation |",
            "   |---|---:|---:|---:|",
            *(f"   {row}" for row in saved),
            "",
            f"3. {len(results.scales['pathway'][0])} scales were learned, from 0 to an absolute value of"
            f" {learned['pathway']:.3f} on average; the control's to {learned['control']:.3f}.",
            "",
            f"Test accuracy with {LABELLED} labelled utterances per speaker, over {seeds} seeds:",
            "",
            table_of([results.digits, results.shuffled]),
            "",
            "Standard deviation and standard error are those of the gain; the accuracy without an auxiliary model has a"
            f" standard deviation of {stdev(results.digits.alone):.2f} points. The digit weights gain {over.mean:+.2f}"
            f" points over shuffled ones, with a standard error of {over.standard_error:.2f}.",
            "",
            "What these accuracies are worth: logistic regression on a frozen random transformer already reaches"
            f" {fmean(results.random_features):.1f} % on this task.",
            "",
            ATTRIBUTION,
            "",
            f"torch {torch.__version__}, timm {timm.__version__}.",
        ]
    )


def write_report(results: Results, folder: Path) -> None:
    """Write `results.json`, `report.md`, and `scales.png`, which the report shows.

    Raises:
        OSError: one of them cannot be written, or the disk is full.
    """
    write_json(folder / "results.json", asdict(results))
    with written_whole(folder / "report.md") as temporary:
        temporary.write_text(f"{markdown(results)}\n\n![Learned scales](scales.png)\n", encoding="utf-8")
    plot_scales(results.scales, folder / "scales.png")


def plot_scales(scales: Scales, path: Path) -> None:
    """Learned scales by block and layer, mean and standard deviation over seeds; a panel for each variant."""
    figure = figures.Figure(figsize=(9, 4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True)
    for axes, (variant, runs) in zip(panels, scales.items(), strict=True):
        layers: dict[str, dict[int, list[float]]] = {}
        for name in runs[0]:
            _, block, layer = name.split(".", 2)
            layers.setdefault(layer, {})[int(block)] = [run[name] for run in runs]
        for number, (layer, blocks) in enumerate(layers.items()):
            places = [block + 0.08 * (number - (len(layers) - 1) / 2) for block in blocks]
            means, deviations = ([of(values) for values in blocks.values()] for of in (fmean, stdev))
            axes.errorbar(places, means, deviations, fmt="o-", markersize=5, linewidth=1.2, capsize=3, label=layer)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(list(blocks))
        axes.set_xlabel("block")
        axes.set_title(variant, fontsize=10)
        axes.grid(axis="y", color="#e6e6e6")
    panels[0].set_ylabel("cross-modal scale")
    figure.suptitle(f"Learned scales: mean and standard deviation over {len(runs)} seeds", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(layers), frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary)
