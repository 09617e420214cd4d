"""Point clouds: the transformer of Point-MAE (ECCV 2022) and its classifier; blocks are timm's."""

from typing import Any

import torch
from timm.models import checkpoint
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from .grouping import group
from .shapes import require_shape


class GroupEmbed(nn.Module):
    """A small PointNet (CVPR 2017): neighbourhoods (B, G, n, 3) to tokens (B, G, embed_dim), in any order of n."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1))
        self.second_conv = nn.Sequential(
            nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, embed_dim, 1)
        )

    def forward(self, neighborhoods: Tensor) -> Tensor:
        features = self.first_conv(neighborhoods.flatten(0, 1).mT)
        whole = features.amax(2, keepdim=True).expand_as(features)
        return self.second_conv(torch.cat([whole, features], dim=1)).amax(2).unflatten(0, neighborhoods.shape[:2])


def position_mlp(width: int) -> nn.Sequential:
    """Coordinates (..., 3) to position embeddings (..., width)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))


def run_blocks(blocks: nn.Sequential, tokens: Tensor, positions: Tensor, checkpointing: bool = False) -> list[Tensor]:
    """The output of every block; the positions are added before each."""
    outputs = []
    for block in blocks:
        tokens = tokens + positions
        tokens = checkpoint(block, tokens) if checkpointing else block(tokens)
        outputs.append(tokens)
    return outputs


class PointTransformer(nn.Module):
    """Groups of points to tokens, and the blocks over them: what classifier, segmenter and pretraining share.

    Args:
        embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: as in timm's VisionTransformer.
        num_groups: tokens that a cloud is divided into.
        group_size: points of a group.

    Raises:
        ValueError: no groups, or empty ones.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_groups: int,
        group_size: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if min(num_groups, group_size) < 1:
            raise ValueError(f"num_groups, group_size: expected 1 or more of each, got {num_groups}, {group_size}")
        self.embed_dim = embed_dim
        self.num_groups = num_groups
        self.group_size = group_size
        self.grad_checkpointing = False
        self.patch_embed = GroupEmbed(embed_dim)
        self.pos_embed = position_mlp(embed_dim)
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, num_heads, mlp_ratio, drop_path=rate, norm_layer=nn.LayerNorm)
                for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
            )
        )
        self.norm = nn.LayerNorm(embed_dim)

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Centers (B, G, 3) and neighbourhoods (B, G, n, 3) of points (B, N, 3).

        Raises:
            ValueError: points of another shape, or too few.
        """
        require_shape("points", points, ("B", "N", 3))
        return group(points, self.num_groups, self.group_size)

    def encode(self, tokens: Tensor, positions: Tensor) -> list[Tensor]:
        """The output of every block, each (B, T, embed_dim), of tokens and positions of that shape."""
        return run_blocks(self.blocks, tokens, positions, self.grad_checkpointing)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether the blocks' activations are recomputed in backward; as in timm."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay; as in timm."""
        return {"cls_token", "cls_pos"}

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[tuple[str, tuple[int] | None]]]:
        """Patterns of the parameters of each layer, for layer-wise learning rates; as in timm."""
        return {
            "stem": r"^cls_token|cls_pos|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_weights_vit_timm(module)


class PointClassifier(PointTransformer):
    """Points (B, N, 3) to logits (B, num_classes), from the class token and the maximum of the others.

    Args:
        num_classes: 0 leaves the head out.
        num_groups: 64 for 1024 points, 128 for 2048.
        settings: as in `PointTransformer`.
    """

    def __init__(self, num_classes: int, num_groups: int = 64, group_size: int = 32, **settings: Any) -> None:
        super().__init__(num_groups=num_groups, group_size=group_size, **settings)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.embed_dim), std=0.02))
        self.cls_pos = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.embed_dim), std=0.02))
        self.head = _classification_head(2 * self.embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def forward_features(self, points: Tensor) -> Tensor:
        """Tokens (B, 1 + num_groups, embed_dim), the class token first."""
        centers, neighborhoods = self.group(points)
        tokens = torch.cat([self.cls_token.expand(len(points), -1, -1), self.patch_embed(neighborhoods)], dim=1)
        positions = torch.cat([self.cls_pos.expand(len(points), -1, -1), self.pos_embed(centers)], dim=1)
        return self.norm(self.encode(tokens, positions)[-1])

    def forward(self, points: Tensor) -> Tensor:
        features = self.forward_features(points)
        return self.head(torch.cat([features[:, 0], features[:, 1:].amax(1)], dim=1))


def _classification_head(in_features: int, num_classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (in_features, 256):
        layers += [nn.Linear(size, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(256, num_classes))
