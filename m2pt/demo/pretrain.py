"""Masked-autoencoder pretraining (MAE, CVPR 2022): reconstruct the patches that the transformer did not see."""

from collections.abc import Callable

import torch
from timm.layers import PatchDropoutWithIndices
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .settings import TrainingSettings
from .training import train

DECODER_WIDTH = 64
DECODER_HEADS = 2


class MaskedAutoencoder(nn.Module):
    """A timm VisionTransformer that sees some of the patches, and a one-block decoder that predicts all of them.

    Args:
        encoder: the transformer to pretrain, in place; its head is not used.
        mask_ratio: the part of the patches that is hidden.
    """

    def __init__(self, encoder: VisionTransformer, mask_ratio: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask = PatchDropoutWithIndices(mask_ratio, num_prefix_tokens=1)
        self.embed = nn.Linear(encoder.embed_dim, DECODER_WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        tokens = encoder.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, DECODER_WIDTH), std=0.02))
        self.decoder = Block(DECODER_WIDTH, DECODER_HEADS, qkv_bias=True)
        self.predict = nn.Sequential(
            nn.LayerNorm(DECODER_WIDTH), nn.Linear(DECODER_WIDTH, encoder.patch_embed.proj.weight[0].numel())
        )

    def forward(self, images: Tensor) -> Tensor:
        """The mean squared error of the hidden patches' pixels, for images (N, 1, height, width)."""
        tokens, seen = self.mask(self.encoder._pos_embed(self.encoder.patch_embed(images)))
        cls, patches = self.embed(self.encoder.norm(self.encoder.blocks(tokens))).tensor_split([1], dim=1)
        target = F.unfold(images, self.encoder.patch_embed.patch_size, stride=self.encoder.patch_embed.patch_size).mT
        everywhere = self.mask_token.expand(*target.shape[:2], -1)
        everywhere = everywhere.scatter(1, seen.unsqueeze(-1).expand_as(patches), patches)
        predicted = self.predict(self.decoder(torch.cat([cls, everywhere], dim=1) + self.pos_embed)[:, 1:])
        hidden = torch.ones(target.shape[:2], dtype=torch.bool).scatter(1, seen, False)
        return F.mse_loss(predicted[hidden], target[hidden])


def pretrain(
    build: Callable[[], VisionTransformer],
    images: Tensor,
    mask_ratio: float,
    settings: TrainingSettings,
    seed: int,
    description: str,
) -> tuple[VisionTransformer, float]:
    """The transformer that `build` makes, pretrained on images (N, 1, height, width), and its reconstruction error.

    The error is the last epoch's mean squared error of hidden patches, as a fraction of the images' variance.
    """
    torch.manual_seed(seed)
    encoder = build()
    autoencoder = MaskedAutoencoder(encoder, mask_ratio)
    error = train(autoencoder, lambda batch: autoencoder(images[batch]), len(images), settings, seed, description)
    return encoder, error / images.var().item()
