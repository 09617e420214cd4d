"""The two transformers: plain timm VisionTransformers that differ in their tokens and heads only."""

from typing import cast

import timm
from timm.models import VisionTransformer

from .data import FRAMES


def _transformer(img_size: tuple[int, int], patch_size: tuple[int, int], num_classes: int) -> VisionTransformer:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=img_size,
        patch_size=patch_size,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=96,
        depth=4,
        num_heads=3,
        global_pool="avg",
        fc_norm=False,
    )
    return cast(VisionTransformer, model)


def speech_transformer(num_classes: int) -> VisionTransformer:
    """(N, 1, 12, 30) to (N, num_classes), a token per three frames; no head if num_classes is 0."""
    return _transformer((12, FRAMES), (12, 3), num_classes)


def digit_transformer() -> VisionTransformer:
    """(N, 1, 8, 8) to (N, 96), a token per 2x2 pixels, without a head."""
    return _transformer((8, 8), (2, 2), 0)
