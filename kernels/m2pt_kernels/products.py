"""The two products that kernels compute, as values: what is planned, timed, verified and launched."""

from typing import NamedTuple

import torch
from torch import Tensor

from .combined import CombinedWeight, models_in


class CombinedMatmul(NamedTuple):
    """left times the combined weight, plus a bias: `forward` by its transpose, or `grad_input`.

    Attributes:
        left: x (M, K), or dY (M, N).
        combined: a factor (K, N), or (N, K).
        bias: an entry for each column of the factor, or None.
    """

    left: Tensor
    combined: CombinedWeight
    bias: Tensor | None = None

    @property
    def name(self) -> str:
        return "forward" if self.combined.transposed else "grad_input"

    @property
    def operands(self) -> tuple[Tensor | bool | None, ...]:
        return self.left, *self.combined, self.bias

    def prepared(self) -> "CombinedMatmul":
        """The same as kernels read it: entries in memory, vectors and scales contiguous."""
        weight, aux_weight, scale, aux_weight_scale, transposed = self.combined
        matrices, scales = map(_stored, (weight, aux_weight)), map(_contiguous, (scale, aux_weight_scale))
        combined = CombinedWeight(*matrices, *scales, transposed)
        return CombinedMatmul(_stored(self.left), combined, _contiguous(self.bias))


class GradParameters(NamedTuple):
    """The gradients that are made of `G = dY^T x`, for a combined weight.

    Attributes:
        grad_output: dY (M, N).
        x: (M, K).
        aux_weight: asks for the cross-modal scale's gradient, `<G, W_aux>`; None if it is not wanted.
        cross_modal_scale: s of the aux weight's gradient; None if that is not wanted.
        weight_dtype: asks for the weight's gradient, G, in this dtype.
        aux_dtype: asks for the aux weight's gradient, `s * G`, in this dtype.
        aux_weight_scale: of a quantised aux_weight.
    """

    grad_output: Tensor
    x: Tensor
    aux_weight: Tensor | None
    cross_modal_scale: Tensor | None
    weight_dtype: torch.dtype | None
    aux_dtype: torch.dtype | None
    aux_weight_scale: Tensor | None = None

    name = "grad_parameters"

    @property
    def operands(self) -> tuple[Tensor | torch.dtype | None, ...]:
        return tuple(self)

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's, (N, K)."""
        return self.grad_output.shape[-1], self.x.shape[-1]

    @property
    def models(self) -> int:
        if self.aux_weight is None:
            return 1 if self.cross_modal_scale is None else len(self.cross_modal_scale)
        return models_in(self.aux_weight)

    @property
    def aux_shape(self) -> tuple[int, ...]:
        """The aux weight's, (N, K) or (n, N, K)."""
        return self.shape if self.models == 1 else (self.models, *self.shape)

    def prepared(self) -> "GradParameters":
        """The same as kernels read it: entries in memory, scales contiguous."""
        grad_output, x, aux_weight, scale, *dtypes, aux_weight_scale = self
        matrices = map(_stored, (grad_output, x, aux_weight))
        return GradParameters(*matrices, _contiguous(scale), *dtypes, _contiguous(aux_weight_scale))


Product = CombinedMatmul | GradParameters


def _stored(tensor: Tensor | None) -> Tensor | None:
    """The same entries in memory, where those of one negated lazily, or of zeros not stored, are not."""
    return tensor.clone() if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()) else tensor


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _stored(tensor).contiguous()
