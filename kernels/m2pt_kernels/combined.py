"""The combined weight as a value, its layout in memory, and checks of its parts."""

from typing import NamedTuple

from torch import Tensor

from .checks import GEMM_DTYPES, check_operand, check_tensor
from .quantization import check_aux_weight


class CombinedWeight(NamedTuple):
    """Stands for `W + sum of s_i * W_aux_i` (M2PT eq. 2), or its transpose, as a factor of a product.

    Attributes:
        weight: W, (N, K).
        aux_weight: W_aux, (N, K), or (n, N, K) for n auxiliary models; floating, or data from `quantize`.
        cross_modal_scale: s, (1,) or (n,).
        aux_weight_scale: the quantisation scale that `quantize` returned with aux_weight; None if there is none.
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
        """Return the strides of weight or aux_weight along the depth and along the columns."""
        row, column = matrix.stride()[-2:]
        return (column, row) if self.transposed else (row, column)

    @property
    def layout(self) -> tuple[bool, int]:
        """Whether W lies in memory as (depth, columns), and the dimension whose stride is the distance between rows.

        That is -2, the output features, if W is stored by rows, otherwise -1.
        """
        depth_first = self.weight.stride(1 if self.transposed else 0) != 1
        return depth_first, -2 if depth_first != self.transposed else -1


def check_weights(weight: Tensor, aux_weight: Tensor, scale: Tensor, aux_weight_scale: Tensor | None) -> None:
    """Check that these can be combined.

    Raises:
        TypeError, ValueError: as `ops.combined_weight`.
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


def models_in(aux_weight: Tensor) -> int:
    """Return how many auxiliary models an aux weight (N, K) or (n, N, K) comes from."""
    return 1 if aux_weight.dim() == 2 else len(aux_weight)


def model_stride(matrices: Tensor) -> int:
    """Return the stride between the matrices of auxiliary models; 0 if there is one."""
    return 0 if matrices.dim() == 2 else matrices.stride(0)
