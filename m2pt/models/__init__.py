"""Models of the four modalities: a tokenizer, timm's blocks, a head. Blocks of one size fit in any modality."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

from timm.models import VisionTransformer
from torch import nn

from ..checks import check_sizes, nearest
from .mae import MaskedAutoencoder
from .part_segmentation import PartSegmenter
from .point import PointClassifier
from .video import video_transformer
from .vit import audio_transformer, mean_pooled_transformer

__all__ = ["MODALITIES", "SIZES", "MaskedAutoencoder", "create_model"]

MODALITIES = ("image", "audio", "point", "video")

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 4304 / 1152},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
    "22b": {"embed_dim": 6144, "depth": 48, "num_heads": 48},
}
"""timm's ViTs; "22b" has the sizes of ViT-22B (Dehghani et al., ICML 2023) in plain blocks, one after the other."""

PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("image", "huge"): {"patch_size": 14},
    ("image", "so400m"): {"patch_size": 14},
    ("image", "giant"): {"patch_size": 14},
    ("image", "gigantic"): {"patch_size": 14},
    ("image", "22b"): {"patch_size": 14},
    ("point", "base"): {"num_heads": 6},
}
"""Settings of a modality and size whose published model is not `SIZES` with the modality's own defaults."""

BUILDERS: dict[tuple[str, str], Callable[..., nn.Module]] = {
    ("image", "classification"): mean_pooled_transformer,
    ("audio", "classification"): audio_transformer,
    ("point", "classification"): PointClassifier,
    ("point", "segmentation"): PartSegmenter,
    ("video", "classification"): video_transformer,
}


def create_model(
    modality: str, size: str = "base", task: str = "classification", *, num_classes: int, **overrides: Any
) -> nn.Module:
    """A randomly initialised model of one modality.

    Every model has `blocks` (an `nn.Sequential` of timm Blocks), `head`, `forward_features`, and what timm's optimizer
    factory and checkpointing ask for: `no_weight_decay`, `group_matcher`, `set_grad_checkpointing`.

    Args:
        modality: with its input, float32:
            "image": (B, 3, 224, 224) (MAE);
            "audio": (B, 1, 1024 frames, 128 mel bins) (AudioMAE);
            "point": (B, N, 3), N points (Point-MAE); for segmentation the tuple of it and categories (B,), int64;
            "video": (B, 3, 16, 224, 224) (VideoMAE).
        size: a key of `SIZES`.
        task: "classification", logits (B, num_classes); for points also "segmentation", logits (B, N, num_classes).
        num_classes: 0 leaves the head out, for pretraining and auxiliary models.
        overrides: image, audio, video: arguments of timm's VisionTransformer, such as `img_size` (for audio frames and
            mel bins), `drop_path_rate`, `depth`; audio: `time_masking`, `frequency_masking`; video: `num_frames`,
            `tubelet_size`; point: `num_groups`, `group_size`, `drop_path_rate`, `depth`, for segmentation
            `num_categories`.

    Raises:
        ValueError: an unknown modality, size or task, a negative number of classes, or overrides that do not fit each
            other.
        TypeError: the number of classes is not an integer, or an override has another type or is unknown to the model.
    """
    if modality not in MODALITIES:
        raise ValueError(
            f"modality: expected one of {', '.join(MODALITIES)}, got {modality!r}{nearest(modality, MODALITIES)}"
        )
    if size not in list(SIZES):
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}{nearest(size, SIZES)}")
    if (modality, task) not in list(BUILDERS):
        tasks = [known for of, known in BUILDERS if of == modality]
        expected = f"expected one of {', '.join(tasks)} for {modality!r}"
        raise ValueError(f"task: {expected}, got {task!r}{nearest(task, tasks)}")
    check_sizes(num_classes=num_classes)
    settings = {**SIZES[size], **PUBLISHED.get((modality, size), {}), **overrides}
    build = BUILDERS[modality, task]
    try:
        return build(num_classes=num_classes, **settings)
    except TypeError as error:
        known = _argument_names(build)
        unknown = (f"there is no {name!r}{nearest(name, known)}" for name in overrides if name not in known)
        raise TypeError(f"overrides: {overrides}: {next(unknown, error)}") from error
    except (ArithmeticError, AssertionError, RuntimeError) as error:  # from timm and torch, for impossible sizes
        raise ValueError(f"overrides: {overrides}: {error}") from error


def _argument_names(build: Callable[..., nn.Module]) -> set[str]:
    """The arguments of a class and its bases, or of a function that makes a VisionTransformer."""
    kinds: tuple[Any, ...] = inspect.getmro(build) if isinstance(build, type) else (build, VisionTransformer)
    own = itertools.takewhile(lambda kind: kind is not nn.Module, kinds)
    return {name for kind in own for name in inspect.signature(kind).parameters}
