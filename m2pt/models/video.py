"""Video: a timm VisionTransformer on tubes of pixels, as VideoMAE (NeurIPS 2022) fine-tunes it."""

from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import VisionTransformer
from torch import Tensor, nn

from .positions import sinusoid
from .shapes import require_shape
from .vit import mean_pooled_transformer


def video_transformer(num_frames: int = 16, tubelet_size: int = 2, **settings: Any) -> VisionTransformer:
    """(B, 3, num_frames, 224, 224) to (B, num_classes), a token per `tubelet_size` frames of a patch.

    Args:
        settings: as in timm's VisionTransformer.

    Raises:
        ValueError: a clip that cannot be divided into tubes.
    """
    embed_layer = partial(TubeEmbed, num_frames=num_frames, tubelet_size=tubelet_size)
    return mean_pooled_transformer(embed_layer=embed_layer, class_token=False, pos_embed="none", **settings)


class TubeEmbed(nn.Module):
    """Tubes of pixels to tokens with their fixed positions, which are not in the state dict: (B, tubes, embed_dim)."""

    positions: Tensor

    def __init__(
        self,
        num_frames: int,
        tubelet_size: int,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        bias: bool,
        dynamic_img_pad: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.clip_size = (num_frames, *to_2tuple(img_size))
        self.patch_size = (tubelet_size, *to_2tuple(patch_size))
        if dynamic_img_pad or any(size % patch for size, patch in zip(self.clip_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size: expected a clip of whole tubes of {self.patch_size}, got {self.clip_size}")
        self.grid_size = tuple(size // patch for size, patch in zip(self.clip_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1] * self.grid_size[2]
        self.proj = nn.Conv3d(
            in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype
        )
        positions = sinusoid(self.num_patches, embed_dim).to(self.proj.weight)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        require_shape("input", clips, ("B", self.proj.in_channels, *self.clip_size))
        return self.proj(clips).flatten(2).mT + self.positions
