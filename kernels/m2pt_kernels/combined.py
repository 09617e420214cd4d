"""The combined weight as a value: checks of what it is made of, its layout, and its sum in plain torch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import GEMM_DTYPES, check_operand, check_tensor
from .divided import check_whole
from .quantization import check_aux_weight, dequantize

BLOCK_ENTRIES = 2**18
"""A block of rows has so many entries: 1 MiB in float32, which stays in a CPU's cache."""


class CombinedWeight(NamedTuple):
    """Stands for `W + sum of s_i * W_aux_i` (M2PT eq. 2), or its transpose, as a factor of a product.

    Attributes:
        weight: W, (N, K).
        aux_weight: W_aux, (N, K), or (n, N, K) of n auxiliary models; floating, or what `quantize` made of it.
        cross_modal_scale: s, (1,) or (n,).
        aux_weight_scale: the quantisation scale that `quantize` returned beside aux_weight; None if there is none.
        transposed: whether the factor is the transpose, (K, N), as in the forward pass.
    """

    weight: Tensor
    aux_weight: Tensor
    cross_modal_scale: Tensor
    aux_weight_scale: Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The factor's shape: the depth of the product, and its columns."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def models(self) -> int:
        return models_in(self.aux_weight)

    def strides(self, matrix: Tensor) -> tuple[int, int]:
        """Return how far apart neighbours in weight or aux_weight lie along the depth, and along the columns."""
        row, column = matrix.stride()[-2:]
        return (column, row) if self.transposed else (row, column)

    @property
    def depth_first(self) -> bool:
        """Whether matrices lie in memory as (depth, columns); otherwise they lie as (columns, depth)."""
        return self.weight.stride(1 if self.transposed else 0) != 1

    @property
    def outer(self) -> int:
        """The dimension of matrices that goes from row to row in memory: -2, that of the output features, or -1."""
        return -2 if self.depth_first != self.transposed else -1

    def sum(self, dtype: torch.dtype) -> Tensor:
        """Compute the sum, (N, K) and not transposed, in float32 at least, and round it once."""
        weight, aux_weight, scale, aux_weight_scale, _ = self
        wide = wide_dtype(dtype)
        # Makes torch compute in that dtype, in one pass where the device converts as it reads.
        scale = cast(scale, wide)
        one_pass = aux_weight_scale is None and aux_weight.dim() == 2
        if dtype == wide and one_pass:
            return torch.addcmul(weight, aux_weight, scale)
        combined = torch.empty_like(weight, dtype=dtype)
        if one_pass:
            return torch.addcmul(weight, aux_weight, scale, out=combined)
        for rows, blocks in blocks_of_rows(aux_weight, aux_weight_scale):
            total = weight[rows]
            for block, own_scale in zip(blocks, scale.split(1), strict=True):
                total = torch.addcmul(total, block, own_scale)
            combined[rows] = total
        return combined


def combined_weight(
    weight: Tensor, aux_weight: Tensor, scale: Tensor, dtype: torch.dtype, aux_weight_scale: Tensor | None = None
) -> Tensor:
    """Compute `W + s * W_aux` (M2PT eq. 2) in float32 at least, and round it once, to `dtype`; without gradients.

    Several auxiliary models are all added. Shapes and dtypes as `cross_modal_linear` takes them.

    Raises:
        TypeError: no tensors, dtypes that are not floating, or a quantised aux_weight without its scales or the other
            way round.
        ValueError: a shape, layout or device that does not fit the others, or a tensor divided among processes.
    """
    check_weights(weight, aux_weight, scale, aux_weight_scale)
    operands = {"weight": weight, "aux_weight": aux_weight, "scale": scale, "aux_weight_scale": aux_weight_scale}
    for name, tensor in operands.items():
        check_whole(name, tensor)
    if dtype not in GEMM_DTYPES:
        raise TypeError(f"dtype: expected one of {GEMM_DTYPES}, got {dtype!r}")
    with torch.no_grad():
        return CombinedWeight(*operands.values()).sum(dtype)


def check_weights(weight: Tensor, aux_weight: Tensor, scale: Tensor, aux_weight_scale: Tensor | None) -> None:
    """Check that these can be combined.

    Raises:
        TypeError, ValueError: as `combined_weight`.
    """
    device = getattr(weight, "device", None)
    check_operand("weight", weight, device)
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"weight: expected shape (out_features, in_features), got {tuple(shape)}")
    check_tensor("aux_weight", aux_weight)
    if aux_weight_scale is not None or aux_weight.shape != shape or aux_weight.dtype not in GEMM_DTYPES:
        check_aux_weight(aux_weight, aux_weight_scale, shape)
    if aux_weight.device != device:
        raise ValueError(f"aux_weight: expected weight's device {device}, got {aux_weight.device}")
    check_operand("scale", scale, device)
    if scale.shape != (models := (1,) if aux_weight.dim() == 2 else aux_weight.shape[:1]):
        raise ValueError(f"scale: expected shape {tuple(models)} to fit aux_weight, got {tuple(scale.shape)}")


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Call `tensor.to(dtype)` only where it is needed, as it takes microseconds even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of a dtype are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def models_in(aux_weight: Tensor) -> int:
    """Return how many auxiliary models an aux weight (N, K) or (n, N, K) comes from."""
    return 1 if aux_weight.dim() == 2 else len(aux_weight)


def model_stride(matrices: Tensor) -> int:
    """Return how far apart the matrices of auxiliary models lie; 0 if there is one."""
    return 0 if matrices.dim() == 2 else matrices.stride(0)


def blocks_of_rows(aux_weight: Tensor, aux_weight_scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows at a time, and what the auxiliary models have in them, (n, rows, K)."""
    size = max(1, BLOCK_ENTRIES // max(1, aux_weight.shape[-1]))
    for start in range(0, max(1, aux_weight.shape[-2]), size):
        rows = slice(start, start + size)
        blocks = aux_weight[..., rows, :]
        if aux_weight_scale is not None:
            blocks = dequantize(blocks, aux_weight_scale[..., rows, :])
        yield rows, blocks if blocks.dim() == 3 else blocks.unsqueeze(0)
