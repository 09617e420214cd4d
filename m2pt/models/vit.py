"""Images and audio: timm VisionTransformers, as MAE (CVPR 2022) and AudioMAE (NeurIPS 2022) fine-tune them."""

import math
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from .positions import sincos_2d
from .shapes import require_shape


class FixedSizePatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` for one input size, with an error that says what was expected."""

    def forward(self, x: Tensor) -> Tensor:
        require_shape("input", x, ("B", self.proj.in_channels, *self.img_size))
        return super().forward(x)


def mean_pooled_transformer(**settings: Any) -> VisionTransformer:
    """A timm VisionTransformer with `mean of patch tokens -> fc_norm -> head`, whose logits start near zero.

    Raises:
        ValueError: an input that is smaller than a patch.
    """
    model = VisionTransformer(**{"global_pool": "avg", "embed_layer": FixedSizePatchEmbed, **settings})
    if min(model.patch_embed.grid_size) < 1:
        raise ValueError(f"img_size: expected a patch or more, got a grid of {model.patch_embed.grid_size} patches")
    if isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return model


def audio_transformer(
    img_size: tuple[int, int] = (1024, 128),
    time_masking: float = 0.2,
    frequency_masking: float = 0.2,
    **settings: Any,
) -> VisionTransformer:
    """(B, 1, frames, mel bins) to (B, num_classes).

    Args:
        img_size: frames and mel bins.
        time_masking, frequency_masking: the shares of the token grid that `SpectrogramDropout` drops in training.
        settings: as in timm's VisionTransformer.

    Raises:
        ValueError: a masking ratio outside [0, 1), or a width that is not a multiple of 4.
    """
    model = mean_pooled_transformer(in_chans=1, img_size=img_size, **settings)
    grid_size = model.patch_embed.grid_size
    positions = F.pad(sincos_2d(grid_size, model.embed_dim), (0, 0, model.num_prefix_tokens, 0))
    model.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
    model.set_submodule("patch_drop", SpectrogramDropout(grid_size, time_masking, frequency_masking))
    return model


class SpectrogramDropout(nn.Module):
    """Drop whole time steps and whole frequency bands of the token grid, in training only (AudioMAE's fine-tuning).

    Takes the place of timm's `PatchDropout`: (B, 1 + time * frequency, width) to fewer tokens; the class token stays.
    """

    def __init__(self, grid_size: tuple[int, int], time_masking: float, frequency_masking: float) -> None:
        super().__init__()
        for argument, ratio in (("time_masking", time_masking), ("frequency_masking", frequency_masking)):
            if not 0 <= ratio < 1:
                raise ValueError(f"{argument}: expected a ratio in [0, 1), got {ratio}")
        self.grid_size = grid_size
        self.kept = [
            max(1, int(size * (1 - ratio)))
            for size, ratio in zip(grid_size, (time_masking, frequency_masking), strict=True)
        ]

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training:
            return tokens
        prefix, patches = tokens.tensor_split([tokens.shape[1] - math.prod(self.grid_size)], dim=1)
        batch = torch.arange(len(tokens), device=tokens.device)
        times, bands = (
            torch.rand(len(tokens), size, device=tokens.device).topk(kept).indices
            for size, kept in zip(self.grid_size, self.kept, strict=True)
        )
        patches = patches.unflatten(1, self.grid_size)[batch[:, None, None], times[:, :, None], bands[:, None, :]]
        return torch.cat([prefix, patches.flatten(1, 2)], dim=1)
