"""The two products that kernels compute, as values to plan, time, verify and launch."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .combined import CombinedWeight, models_in


class CombinedMatmul(NamedTuple):
    """Left times a combined weight, plus a bias: "forward" multiplies by the transpose, "grad_input" does not.

    Attributes:
        left: x (M, K), or dY (M, N).
        combined: a factor (K, N), or (N, K).
        bias: (N,) or None; None without transposing.
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
        """Return the product as kernels read it: entries stored in memory, vectors and scales contiguous."""
        left, (weight, aux_weight, cross_modal_scale, aux_weight_scale, transposed), bias = self
        scales = _contiguous(cross_modal_scale), _contiguous(aux_weight_scale)
        combined = CombinedWeight(_stored(weight), _stored(aux_weight), *scales, transposed)
        return CombinedMatmul(_stored(left), combined, _contiguous(bias))


class GradParameters(NamedTuple):
    """The gradients made from `G = dY^T x`.

    Attributes:
        grad_output: dY (M, N).
        x: (M, K).
        aux_weight: asks for the cross-modal scale's gradient, `<G, W_aux>`; None if it is not wanted.
        cross_modal_scale: s, for the aux weight's gradient; None if that is not wanted.
        weight_dtype: asks for the weight's gradient, G, in this dtype.
        aux_dtype: asks for the aux weight's gradient, `s * G`, in this dtype.
        aux_weight_scale: the scale of a quantised aux_weight.
    """

    grad_output: Tensor
    x: Tensor
    aux_weight: Tensor | None
    cross_modal_scale: Tensor | None
    weight_dtype: torch.dtype | None
    aux_dtype: torch.dtype | None
    aux_weight_scale: Tensor | None = None

    @property
    def name(self) -> str:
        return "grad_parameters"

    @property
    def operands(self) -> tuple[Tensor | torch.dtype | None, ...]:
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape, (N, K)."""
        return self.grad_output.shape[-1], self.x.shape[-1]

    @property
    def models(self) -> int:
        if self.aux_weight is None:
            return 1 if self.cross_modal_scale is None else len(self.cross_modal_scale)
        return models_in(self.aux_weight)

    @property
    def aux_shape(self) -> tuple[int, ...]:
        """The aux weight's shape, (N, K) or (n, N, K)."""
        return self.shape if self.models == 1 else (self.models, *self.shape)

    @property
    def of_splits(self) -> "GradParameters":
        """The product for each split of the tokens: G alone, in float32."""
        return GradParameters(self.grad_output, self.x, None, None, torch.float32, None)

    def prepared(self) -> "GradParameters":
        """Return the product as kernels read it: entries stored in memory, scales contiguous."""
        grad_output, x, aux_weight, cross_modal_scale, weight_dtype, aux_dtype, aux_weight_scale = self
        matrices = _stored(grad_output), _stored(x), _stored(aux_weight)
        scales = _contiguous(cross_modal_scale), _contiguous(aux_weight_scale)
        return GradParameters(*matrices, scales[0], weight_dtype, aux_dtype, scales[1])


Product = CombinedMatmul | GradParameters

_Operand = TypeVar("_Operand", Tensor, Tensor | None)


def _stored(tensor: _Operand) -> _Operand:
    """Materialise a tensor that is lazily negated, or of zeros that are not stored."""
    return tensor.clone() if tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()) else tensor


def _contiguous(tensor: _Operand) -> _Operand:
    return None if tensor is None else _stored(tensor).contiguous()
