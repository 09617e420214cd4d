"""The products in plain torch, for devices without Triton and for testing the kernels.

Everything is accumulated in float32, or in float64 where the operands are float64. A quantised aux weight is
dequantised one block of rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .combined import CombinedWeight
from .products import GradParameters
from .quantization import dequantize

BLOCK_ENTRIES = 2**18
"""Entries of a block of rows: 1 MiB in float32, which stays in a CPU's cache."""


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Call `tensor.to(dtype)` only if needed, as it takes microseconds even when there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of a dtype are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def combined_sum(combined: CombinedWeight, dtype: torch.dtype) -> Tensor:
    """Compute the sum, (N, K) and not transposed, in float32 at least, and round it once."""
    weight, aux_weight, cross_modal_scale, aux_weight_scale, _ = combined
    wide = wide_dtype(dtype)
    # Makes torch compute in that dtype, in one pass where the device converts as it reads.
    cross_modal_scale = cast(cross_modal_scale, wide)
    one_pass = aux_weight_scale is None and aux_weight.dim() == 2
    if dtype == wide and one_pass:
        return torch.addcmul(weight, aux_weight, cross_modal_scale)
    rounded = torch.empty_like(weight, dtype=dtype)
    if one_pass:
        return torch.addcmul(weight, aux_weight, cross_modal_scale, out=rounded)
    for rows, blocks in _blocks_of_rows(aux_weight, aux_weight_scale):
        total = weight[rows]
        for block, scale in zip(blocks, cross_modal_scale.split(1), strict=True):
            total = torch.addcmul(total, block, scale)
        rounded[rows] = total
    return rounded


def _blocks_of_rows(aux_weight: Tensor, aux_weight_scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few rows at a time, with the auxiliary models' entries in them, (n, rows, K)."""
    size = max(1, BLOCK_ENTRIES // max(1, aux_weight.shape[-1]))
    for start in range(0, max(1, aux_weight.shape[-2]), size):
        rows = slice(start, start + size)
        blocks = aux_weight[..., rows, :]
        if aux_weight_scale is not None:
            blocks = dequantize(blocks, aux_weight_scale[..., rows, :])
        yield rows, blocks if blocks.dim() == 3 else blocks.unsqueeze(0)


def combined_matmul(left: Tensor, combined: CombinedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x (W + s * W_aux)^T + b` or `dY (W + s * W_aux)`, in the dtype of `left`."""
    weight = combined_sum(combined, left.dtype)
    if combined.transposed:
        return F.linear(left, weight, None if bias is None else cast(bias, left.dtype))
    return torch.mm(left, weight)


def grad_parameters(product: GradParameters) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of weight, aux weight and cross-modal scale; None for what is not wanted."""
    grad_output, x, aux_weight, scale, weight_dtype, aux_dtype, aux_weight_scale = product
    accumulator = grad_weight(grad_output, x)
    return (
        None if weight_dtype is None else cast(accumulator, weight_dtype),
        None if scale is None or aux_dtype is None else cast(grad_aux(accumulator, scale), aux_dtype),
        None if aux_weight is None else grad_scale(accumulator, aux_weight, aux_weight_scale),
    )


def grad_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """Return `G = dY^T x`, (N, K): the unrounded accumulator, in float32 at least."""
    wide = wide_dtype(x.dtype)
    if grad_output.dtype == x.dtype == wide:
        return torch.mm(grad_output.t(), x)
    if x.is_cuda and x.dtype != wide:
        return torch.mm(grad_output.t(), x, out_dtype=wide)
    return torch.mm(grad_output.to(wide).t(), x.to(wide))


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
        sums = torch.linalg.vecdot(accumulator, aux_weight)  # as below, with less overhead for a small layer
    else:
        blocks = _blocks_of_rows(aux_weight, aux_weight_scale)
        sums = torch.cat([torch.linalg.vecdot(accumulator[rows], cast(aux, dtype)) for rows, aux in blocks], 1)
    return sums.sum(-1, keepdim=sums.dim() == 1)
