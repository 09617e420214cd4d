"""The results in words and tables: Markdown for reading, JSON with every number."""

from dataclasses import asdict
from pathlib import Path

from ..checkpoints import written_whole
from ..train.files import write_json
from .data import ATTRIBUTION
from .experiment import Results
from .summary import conclusion, summarize

KIB = 1024


def markdown(results: Results) -> str:
    """The report without its pictures."""
    settings, merge, environment = results.settings, results.merge, results.environment
    summaries = summarize(results.runs)
    stored = ""
    if results.quantization_error is not None:
        error = f"{100 * results.quantization_error:.2f} %"
        stored = f" Auxiliary weights are stored as {settings.aux_dtype}, with a relative error of {error} at most."
    errors = ", ".join(f"{name} {error:.3f}" for name, error in results.reconstruction_errors.items())
    accuracy_rows = [
        f"| {s.variant} | {s.mean:.2f} | {s.standard_deviation:.2f} |"
        + (" | |" if s.variant == "baseline" else f" {s.difference:+.2f} | {s.standard_error:.2f} |")
        for s in summaries
    ]
    saved_rows = [
        f"| {saved.precision} | {saved.plain / KIB:,.0f} | {saved.fused / KIB:,.0f} | {saved.published / KIB:,.0f} |"
        for saved in results.saved_bytes
    ]
    return "\n".join(
        [
            "# Multimodal pathway from handwritten digits to speech",
            "",
            f"Which of nine speakers? {settings.labelled_per_speaker} labelled utterances per speaker,"
            f" {settings.seeds} seeds, 370 test utterances.",
            "Every variant of a seed starts from the same pretrained speech transformer and head and sees the same"
            " batches. The pathway adds the frozen weights of a digit transformer, the control the same weights with"
            f" their entries shuffled.{stored}",
            f"Learning rate {settings.fine_tuning.learning_rate:g}, chosen for the baseline on training utterances;"
            f" {settings.fine_tuning.scale_learning_rate:g} for the cross-modal scales.",
            "",
            "| variant | test accuracy, % | standard deviation | difference to baseline, points | standard error |",
            "|---|---:|---:|---:|---:|",
            *accuracy_rows,
            "",
            conclusion(summaries),
            "",
            f"Reconstruction error of the masked autoencoders (1 is the data's variance): {errors}.",
            f"Merged into a plain timm model: accuracy {100 * merge.accuracy:.2f} % as before,"
            f" logits differ by {merge.max_logit_difference:.1e} at most.",
            "",
            f"KiB saved for backward by the forward of one batch of {settings.fine_tuning.batch_size} utterances:",
            "",
            "| precision | plain model | fused pathway | published formulation |",
            "|---|---:|---:|---:|",
            *saved_rows,
            "",
            "Under autocast a plain layer saves a copy of its weight in half precision, the published formulation one"
            " of the combined weight, the fused layer neither.",
            "",
            ATTRIBUTION,
            "",
            f"torch {environment.torch}, timm {environment.timm}, {environment.cpus} CPUs,"
            f" {environment.seconds:.0f} seconds.",
        ]
    )


def write_report(results: Results, folder: Path) -> None:
    """Write `report.md`, which shows the pictures beside it, and `results.json`.

    Raises:
        OSError: one of them cannot be written, or the disk is full.
    """
    pictures = "\n\n![Accuracy](accuracy.png)\n\n![Learned scales](scales.png)\n"
    with written_whole(folder / "report.md") as temporary:
        temporary.write_text(markdown(results) + pictures, encoding="utf-8")
    numbers = asdict(results) | {"summary": [asdict(summary) for summary in summarize(results.runs)]}
    write_json(folder / "results.json", numbers)
