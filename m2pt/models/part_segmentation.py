"""Part segmentation of point clouds, as Point-MAE (ECCV 2022) does it on ShapeNetPart."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .grouping import interpolate
from .point import PointTransformer
from .shapes import require_shape


class PartSegmenter(PointTransformer):
    """Points (B, N, 3) and their object's category (B,), int64, to logits (B, N, num_classes).

    Args:
        num_classes: parts of all categories together, 50 in ShapeNetPart; 0 leaves the head out.
        num_categories: 16 in ShapeNetPart.
        settings: as in `PointTransformer`.
    """

    def __init__(
        self, num_classes: int, num_categories: int = 16, num_groups: int = 128, group_size: int = 32, **settings: Any
    ) -> None:
        super().__init__(num_groups=num_groups, group_size=group_size, **settings)
        self.head = PartHead(self.embed_dim, num_categories, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def forward_features(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Centers (B, G, 3), and features (B, G, 3 * embed_dim) after a third, two thirds and all of the blocks."""
        centers, neighborhoods = self.group(points)
        outputs = self.encode(self.patch_embed(neighborhoods), self.pos_embed(centers))
        levels = [self.norm(outputs[math.ceil(len(outputs) * third / 3) - 1]) for third in (1, 2, 3)]
        return centers, torch.cat(levels, dim=2)

    def forward(self, input: tuple[Tensor, Tensor]) -> Tensor:
        if not isinstance(input, (tuple, list)):
            raise TypeError(f"input: expected points and categories, got {type(input).__name__}")
        points, category = input
        require_shape("points", points, ("B", "N", 3))
        require_shape("category", category, (len(points),))
        centers, features = self.forward_features(points)
        return self.head(points, centers, features, category)


class PartHead(nn.Module):
    """Classifies points by the features of groups near them, and the object's pooled features and category."""

    def __init__(self, width: int, num_categories: int, num_classes: int) -> None:
        super().__init__()
        self.category = nn.Sequential(nn.Embedding(num_categories, 64), nn.BatchNorm1d(64), nn.LeakyReLU(0.2))
        self.propagation = nn.Sequential(*_pointwise(3 + 3 * width, 4 * width), *_pointwise(4 * width, 1024))
        self.classifier = nn.Sequential(
            *_pointwise(1024 + 6 * width + 64, 512),
            nn.Dropout(0.5),
            *_pointwise(512, 256),
            nn.Conv1d(256, num_classes, 1),
        )

    def forward(self, points: Tensor, centers: Tensor, features: Tensor, category: Tensor) -> Tensor:
        near = self.propagation(torch.cat([points, interpolate(points, centers, features)], dim=2).mT)
        whole = torch.cat([features.amax(1), features.mean(1), self.category(category)], dim=1)
        whole = whole.unsqueeze(2).expand(-1, -1, points.shape[1])
        return self.classifier(torch.cat([near, whole], dim=1)).mT


def _pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv1d(in_channels, out_channels, 1), nn.BatchNorm1d(out_channels), nn.ReLU()]
