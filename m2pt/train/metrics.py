"""Metrics of a test split: top-1 and top-5, mean average precision, mean intersection over union."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import accuracy
from torch import Tensor

from ..checks import require

sklearn_metrics = require("sklearn.metrics", "train")


@dataclass(frozen=True)
class Metric:
    """How a test split is summarised.

    Attributes:
        rows: maps logits, input and target of a batch to what is kept of its samples (B, ...) and targets (B, ...).
        summary: rows and targets of the whole split to metrics in percent; runs are compared by the first.
    """

    rows: Callable[[Tensor, Any, Tensor], tuple[Tensor, Tensor]]
    summary: Callable[[Tensor, Tensor], dict[str, float]]


def metric_of(dataset: Any) -> Metric:
    """The metric of a dataset's task."""
    if hasattr(dataset, "parts"):
        ranges = [dataset.parts[name] for name in dataset.category_names]
        return Metric(lambda logits, input, target: part_ious(logits, input[1], target, ranges), mious)
    if dataset.multi_label:
        return Metric(lambda logits, input, target: (logits, target), mean_average_precision)
    return Metric(lambda logits, input, target: (logits, target), top_accuracies)


def top_accuracies(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Percent of samples whose class has the largest, or one of the five largest, of logits (N, classes)."""
    top1, top5 = accuracy(logits, target, topk=(1, 5))
    return {"top1": top1.item(), "top5": top5.item()}


def mean_average_precision(scores: Tensor, target: Tensor) -> dict[str, float]:
    """Average precision of scores (N, classes), averaged over the classes that occur in target (N, classes).

    Raises:
        ValueError: no class occurs.
    """
    present = target.any(0)
    if not present.any():
        raise ValueError("target: no sample has a class, so there is no average precision")
    found, given = (values[:, present].numpy() for values in (target, scores))
    precision = sklearn_metrics.average_precision_score(found, given, average="macro")
    return {"map": 100 * float(precision)}


def part_ious(logits: Tensor, category: Tensor, target: Tensor, parts: Sequence[range]) -> tuple[Tensor, Tensor]:
    """Each shape's mean intersection over union of its category's parts, (B, 1), and the categories (B,).

    A point's prediction is the largest of its category's logits (B, points, all parts). A part that is neither there
    nor predicted counts as 1 (ShapeNetPart; Yi et al., SIGGRAPH Asia 2016).
    """
    means = []
    for shape_logits, index, labels in zip(logits, category.tolist(), target, strict=True):
        own = parts[index]
        predicted = shape_logits[:, own.start : own.stop].argmax(1) + own.start
        labelled, guessed = (
            points.unsqueeze(1) == torch.tensor(own, device=points.device) for points in (labels, predicted)
        )
        union = (labelled | guessed).sum(0)
        iou = torch.where(union == 0, 1.0, (labelled & guessed).sum(0) / union)
        means.append(iou.mean())
    return torch.stack(means).unsqueeze(1), category


def mious(ious: Tensor, category: Tensor) -> dict[str, float]:
    """The mean over shapes, and the mean over categories of the mean over their shapes, of ious (N, 1), in percent."""
    by_category = [ious[category == index].mean() for index in category.unique()]
    return {"instance_miou": 100 * ious.mean().item(), "class_miou": 100 * torch.stack(by_category).mean().item()}
