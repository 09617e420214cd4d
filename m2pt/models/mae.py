"""Masked-autoencoder pretraining of every modality: reconstruct what the transformer did not see.

MAE (CVPR 2022), AudioMAE (NeurIPS 2022), VideoMAE (NeurIPS 2022), Point-MAE (ECCV 2022).
"""

from typing import NamedTuple

import torch
from timm.layers import LayerNorm
from timm.models import VisionTransformer, checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_kind, check_positive, check_sizes
from .grouping import chamfer_distance, select
from .point import PointTransformer, position_mlp, run_blocks
from .positions import sincos_2d, sinusoid


class MaskedAutoencoder(nn.Module):
    """A transformer that sees some of the tokens, and a light decoder that predicts what the others stand for.

    Images, audio and video predict pixels, by mean squared error; video hides the same places in every frame. Points
    predict each group's points, by the Chamfer distance. Only hidden tokens count.

    Args:
        model: made by `create_model`, or any timm VisionTransformer of one input size. It is pretrained in place; its
            head is not used.
        mask_ratio: the part of the tokens that is hidden; published: image .75, audio .8, video .9, point .6.
        decoder_width, decoder_depth, decoder_heads: of the decoder; MAE's by default.
        normalize_targets: whether pixels are normalised by the mean and standard deviation of their own patch.

    Raises:
        TypeError: a model of another class, or a ratio that is not a number.
        ValueError: a ratio that hides nothing or everything, or a decoder whose heads do not divide its width.
    """

    def __init__(
        self,
        model: VisionTransformer | PointTransformer,
        mask_ratio: float,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalize_targets: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, (VisionTransformer, PointTransformer)):
            raise TypeError(f"model: expected a VisionTransformer or PointTransformer, got {type(model).__name__}")
        check_kind((int, float), "a number", mask_ratio=mask_ratio)
        check_positive(decoder_width=decoder_width, decoder_heads=decoder_heads)
        check_sizes(decoder_depth=decoder_depth)
        if decoder_width % decoder_heads:
            raise ValueError(f"decoder_width: expected a multiple of {decoder_heads} heads, got {decoder_width}")
        self.domain: Patches | Groups
        if isinstance(model, PointTransformer):
            self.domain = Groups(model, decoder_width)
        else:
            self.domain = Patches(model, decoder_width, normalize_targets)
        self.num_hidden = int(mask_ratio * self.domain.num_places) if 0 < mask_ratio < 1 else 0
        if not 0 < self.num_hidden < self.domain.num_places:
            raise ValueError(f"mask_ratio: expected a part of {self.domain.num_places} tokens, got {mask_ratio}")
        self.norm = LayerNorm(model.embed_dim) if isinstance(model.norm, nn.Identity) else nn.Identity()
        self.embed = nn.Linear(model.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, decoder_width), std=0.02))
        self.decoder = nn.Sequential(
            *(Block(decoder_width, decoder_heads, qkv_bias=True) for _ in range(decoder_depth))
        )
        self.predict = nn.Sequential(LayerNorm(decoder_width), nn.Linear(decoder_width, self.domain.num_values))

    @property
    def model(self) -> VisionTransformer | PointTransformer:
        """The transformer that is pretrained."""
        return self.domain.model

    def freeze_unused(self) -> "MaskedAutoencoder":
        """Freeze what gets no gradient here, such as the normalisation before the head; the autoencoder itself."""
        for name, parameter in self.model.named_parameters():
            if name.partition(".")[0] in self.domain.unused:
                parameter.requires_grad_(False)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """The reconstruction error of the hidden tokens, a scalar, for the model's input."""
        prefix, tokens, places, targets = self.domain.tokenize(input)
        seen, hidden = self.draw(len(tokens), tokens.device)
        encoded = self.domain.encode(prefix, select(tokens, seen), select(places, seen))
        encoded = self.embed(self.norm(self.model.norm(encoded)))
        masked = self.mask_token.expand(*hidden.shape, -1)
        decoded = self.domain.decode(
            self.decoder, torch.cat([encoded, masked], dim=1), select(places, torch.cat([seen, hidden], dim=1))
        )
        predicted = self.predict(decoded[:, -hidden.shape[1] :])
        return self.domain.loss(predicted.float(), select(targets, hidden))

    def draw(self, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices (B, seen tokens) and (B, hidden tokens), drawn anew for every sample, alike in all slices."""
        order = torch.rand(batch_size, self.domain.num_places, device=device).argsort(1)
        slices = torch.arange(self.domain.num_slices, device=device)[:, None] * self.domain.num_places
        hidden, seen = (
            (places.unsqueeze(1) + slices).flatten(1) for places in order.tensor_split([self.num_hidden], dim=1)
        )
        return seen, hidden


class Tokens(NamedTuple):
    """A tokenized batch: the class token if there is one (B, 0 or 1, width), tokens (B, T, width), what is known of
    their places (B, T, ...), and what they stand for (B, T, values)."""

    prefix: Tensor
    tokens: Tensor
    places: Tensor
    targets: Tensor


class Patches(nn.Module):
    """Images, audio, video: tokens on a grid, with fixed positions in the decoder."""

    unused = ("attn_pool", "fc_norm", "head")
    positions: Tensor

    def __init__(self, model: VisionTransformer, decoder_width: int, normalize_targets: bool) -> None:
        super().__init__()
        self.model = model
        *slices, rows, columns = model.patch_embed.grid_size
        self.num_slices = slices[0] if slices else 1
        self.num_places = rows * columns
        self.num_values = model.patch_embed.proj.weight[0].numel()
        self.normalize_targets = normalize_targets
        tokens = self.num_slices * self.num_places
        positions = sinusoid(tokens, decoder_width) if slices else sincos_2d((rows, columns), decoder_width)
        self.register_buffer("positions", positions, persistent=False)

    def tokenize(self, input: Tensor) -> Tokens:
        model = self.model
        embedded = model.norm_pre(model._pos_embed(model.patch_embed(input)))
        prefix, tokens = embedded.tensor_split([model.num_prefix_tokens], dim=1)
        targets = pixels(input, model.patch_embed.patch_size)
        if self.normalize_targets:
            variance, mean = torch.var_mean(targets, dim=2, keepdim=True)
            targets = (targets - mean) / (variance + 1e-6).sqrt()
        return Tokens(prefix, tokens, self.positions.expand(len(tokens), -1, -1), targets)

    def encode(self, prefix: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        model, tokens = self.model, torch.cat([prefix, tokens], dim=1)
        tokens = checkpoint_seq(model.blocks, tokens) if model.grad_checkpointing else model.blocks(tokens)
        return tokens[:, model.num_prefix_tokens :]

    def decode(self, decoder: nn.Sequential, tokens: Tensor, places: Tensor) -> Tensor:
        return decoder(tokens + places)

    def loss(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(predicted, targets)


def pixels(input: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """The values (B, patches, channels * pixels) of each patch of input (B, channels, ...), in the grid's order."""
    for dim, size in enumerate(patch_size, start=2):
        input = input.unfold(dim, size, size)
    return input.flatten(2, 1 + len(patch_size)).transpose(1, 2).flatten(2)


class Groups(nn.Module):
    """Point clouds: tokens at the centers of groups, positions by an MLP at every block of the decoder, too."""

    unused = ("cls_token", "cls_pos", "head")
    num_slices = 1

    def __init__(self, model: PointTransformer, decoder_width: int) -> None:
        super().__init__()
        self.model = model
        self.num_places = model.num_groups
        self.num_values = 3 * model.group_size
        self.pos_embed = position_mlp(decoder_width)

    def tokenize(self, points: Tensor) -> Tokens:
        centers, neighborhoods = self.model.group(points)
        tokens = self.model.patch_embed(neighborhoods)
        return Tokens(tokens[:, :0], tokens, centers, neighborhoods.flatten(2))

    def encode(self, prefix: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        return self.model.encode(tokens, self.model.pos_embed(places))[-1]

    def decode(self, decoder: nn.Sequential, tokens: Tensor, places: Tensor) -> Tensor:
        return run_blocks(decoder, tokens, self.pos_embed(places))[-1]

    def loss(self, predicted: Tensor, targets: Tensor) -> Tensor:
        groups = (tensor.flatten(0, 1).unflatten(1, (-1, 3)) for tensor in (predicted, targets))
        return chamfer_distance(*groups)
