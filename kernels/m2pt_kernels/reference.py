"""Compute the products in plain torch, on devices without Triton and to test the kernels.

Everything is accumulated in float32, or in float64 where the operands are float64. A quantised aux weight exists
dequantised a block of rows at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .combined import BLOCK_ENTRIES, CombinedWeight, blocks_of_rows, cast, wide_dtype
from .products import GradParameters


def combined_matmul(left: Tensor, combined: CombinedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x (W + s * W_aux)^T + b` or `dY (W + s * W_aux)`, in the dtype of `left`."""
    weight = combined.sum(left.dtype)
    bias = None if bias is None else cast(bias, left.dtype)
    if combined.transposed:
        return F.linear(left, weight, bias)
    return torch.mm(left, weight) if bias is None else torch.addmm(bias, left, weight)


def grad_parameters(product: GradParameters) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of weight, aux weight and cross-modal scale; None for what is not wanted."""
    grad_output, x, aux_weight, scale, weight_dtype, aux_dtype, aux_weight_scale = product
    accumulator = grad_weight(grad_output, x)
    return (
        None if weight_dtype is None else cast(accumulator, weight_dtype),
        None if aux_dtype is None else cast(grad_aux(accumulator, scale), aux_dtype),
        None if aux_weight is None else grad_scale(accumulator, aux_weight, aux_weight_scale),
    )


def grad_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """Return `G = dY^T x`, (N, K): the unrounded accumulator, in float32 at least."""
    wide = wide_dtype(x.dtype)
    if x.is_cuda and x.dtype != wide:
        return torch.mm(grad_output.t(), x, out_dtype=wide)
    return torch.mm(cast(grad_output, wide).t(), cast(x, wide))


def grad_aux(accumulator: Tensor, cross_modal_scale: Tensor) -> Tensor:
    """Return `s * G`, (N, K) or (n, N, K), in the dtype of the accumulator `G`."""
    scale = cast(cross_modal_scale, accumulator.dtype)
    return accumulator * (scale if scale.shape == (1,) else scale[:, None, None])


def grad_scale(accumulator: Tensor, aux_weight: Tensor, aux_weight_scale: Tensor | None = None) -> Tensor:
    """Return `<G, W_aux>` of each auxiliary model, (n,), in the dtype of the accumulator `G`.

    It is summed by rows first: one float32 dot product over all of `G` is off by up to 1e-4 of the result.
    """
    dtype = accumulator.dtype
    if aux_weight_scale is None and aux_weight.dtype == dtype and accumulator.numel() <= BLOCK_ENTRIES:
        sums = torch.linalg.vecdot(accumulator, aux_weight)  # as below, without what takes longer in a small layer
    else:
        blocks = blocks_of_rows(aux_weight, aux_weight_scale)
        sums = torch.cat([torch.linalg.vecdot(accumulator[rows], cast(aux, dtype)) for rows, aux in blocks], 1)
    return sums.sum(-1, keepdim=sums.dim() == 1)
