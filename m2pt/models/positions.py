"""Fixed position embeddings for tokens on a grid, and for tokens in a line."""

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor


def sincos_2d(grid_size: tuple[int, int], width: int) -> Tensor:
    """(rows * columns, width): sine and cosine of the column, then of the row (MAE, CVPR 2022).

    Raises:
        ValueError: the width cannot be divided by 4.
    """
    if width % 4:
        raise ValueError(f"width: expected a multiple of 4 for sine and cosine of two coordinates, got {width}")
    row_first = build_sincos2d_pos_embed(list(grid_size), width, interleave_sin_cos=True)
    return row_first.roll(width // 2, dims=1)


def sinusoid(length: int, width: int) -> Tensor:
    """(length, width): alternating sine and cosine of the index (Attention Is All You Need, 2017; VideoMAE, 2022).

    Raises:
        ValueError: the width is odd.
    """
    if width % 2:
        raise ValueError(f"width: expected an even number for pairs of sine and cosine, got {width}")
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64).outer(frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()
