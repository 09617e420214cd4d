"""The mathematics in plain torch: the path of devices without Triton, and the oracle of every test.

Shapes: `x` (M, K), `weight` and `aux_weight` (N, K), `scale` (1,), `bias` (N,), `grad_output` (M, N); with several
auxiliary models `aux_weight` (n, N, K) and `scale` (n,). Everything is accumulated in float32, or in float64 where the
inputs are float64. An aux weight that comes with an `aux_weight_scale` is quantised and means `dequantize` of the two,
which exists a block of rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import GEMM_DTYPES, check_operand, check_tensor
from .divided import check_whole
from .quantization import check_aux_weight, dequantize

BLOCK_ENTRIES = 2**18
"""Entries of a block of rows: 1 MiB in float32, which stays in a CPU's cache."""


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes microseconds even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def combined_weight(
    weight: Tensor, aux_weight: Tensor, scale: Tensor, dtype: torch.dtype, aux_weight_scale: Tensor | None = None
) -> Tensor:
    """`W + s * W_aux` (M2PT eq. 2), computed in float32 at least and rounded once, to `dtype`; without gradients.

    With several auxiliary models, the sum over them all. Shapes and dtypes as `cross_modal_linear` takes them.

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
        return _combined_weight(weight, aux_weight, scale, dtype, aux_weight_scale)


def check_weights(weight: Tensor, aux_weight: Tensor, scale: Tensor, aux_weight_scale: Tensor | None) -> None:
    """That these can be combined.

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


def _combined_weight(
    weight: Tensor, aux_weight: Tensor, scale: Tensor, dtype: torch.dtype, aux_weight_scale: Tensor | None
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    scale = cast(scale, wide)  # makes torch compute in that dtype, in one pass where the device converts as it reads
    one_pass = aux_weight_scale is None and aux_weight.dim() == 2
    if dtype == wide and one_pass:
        return torch.addcmul(weight, aux_weight, scale)
    combined = torch.empty_like(weight, dtype=dtype)
    if one_pass:
        return torch.addcmul(weight, aux_weight, scale, out=combined)
    for rows, blocks in _blocks_of_rows(aux_weight, aux_weight_scale):
        total = weight[rows]
        for block, own_scale in zip(blocks, scale.split(1), strict=True):
            total = torch.addcmul(total, block, own_scale)
        combined[rows] = total
    return combined


def _blocks_of_rows(aux_weight: Tensor, aux_weight_scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and what the auxiliary models have in them, (n, rows, K)."""
    size = max(1, BLOCK_ENTRIES // max(1, aux_weight.shape[-1]))
    for start in range(0, max(1, aux_weight.shape[-2]), size):
        rows = slice(start, start + size)
        blocks = aux_weight[..., rows, :]
        if aux_weight_scale is not None:
            blocks = dequantize(blocks, aux_weight_scale[..., rows, :])
        yield rows, blocks if blocks.dim() == 3 else blocks.unsqueeze(0)


def forward(
    x: Tensor,
    weight: Tensor,
    aux_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    aux_weight_scale: Tensor | None = None,
) -> Tensor:
    """`x (W + s * W_aux)^T + b`, shape (M, N), in the dtype of `x`."""
    bias = None if bias is None else cast(bias, x.dtype)
    return F.linear(x, _combined_weight(weight, aux_weight, scale, x.dtype, aux_weight_scale), bias)


def grad_input(
    grad_output: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, aux_weight_scale: Tensor | None = None
) -> Tensor:
    """`dY (W + s * W_aux)`, shape (M, K), in the dtype of `grad_output`."""
    return grad_output @ _combined_weight(weight, aux_weight, scale, grad_output.dtype, aux_weight_scale)


def grad_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """`G = dY^T x`, shape (N, K): the unrounded accumulator, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda and x.dtype != wide:
        return torch.mm(grad_output.t(), x, out_dtype=wide)
    return cast(grad_output, wide).t() @ cast(x, wide)


def grad_scale(accumulator: Tensor, aux_weight: Tensor, aux_weight_scale: Tensor | None = None) -> Tensor:
    """`<G, W_aux>` of each auxiliary model, shape (n,), in the dtype of the accumulator `G`.

    Summed by rows first: one float32 dot product over all of `G` is off by up to 1e-4 of the result.
    """
    dtype = accumulator.dtype
    if aux_weight_scale is None and aux_weight.dtype == dtype and accumulator.numel() <= BLOCK_ENTRIES:
        sums = torch.linalg.vecdot(accumulator, aux_weight)  # as below, without what takes longer in a small layer
    else:
        blocks_of_rows = _blocks_of_rows(aux_weight, aux_weight_scale)
        sums = torch.cat([torch.linalg.vecdot(accumulator[rows], cast(aux, dtype)) for rows, aux in blocks_of_rows], 1)
    return sums.sum(-1).view(-1)


def models_in(aux_weight: Tensor | None, scale: Tensor | None = None) -> int:
    """How many auxiliary models there are, by their aux weight (N, K) or (n, N, K), or else by their scales."""
    if aux_weight is None:
        return 1 if scale is None else len(scale)
    return 1 if aux_weight.dim() == 2 else len(aux_weight)


def aux_shape(weight_shape: tuple[int, ...], scale: Tensor) -> tuple[int, ...]:
    """The shape of the aux weight that goes with these scales, one for each auxiliary model."""
    return tuple(weight_shape) if len(scale) == 1 else (len(scale), *weight_shape)


def grad_aux(accumulator: Tensor, scale: Tensor) -> Tensor:
    """`s * G`, shape (N, K) or (n, N, K), in the dtype of the accumulator `G`."""
    scale = cast(scale, accumulator.dtype)
    return accumulator * (scale if scale.shape == (1,) else scale[:, None, None])


def grad_parameters(
    grad_output: Tensor,
    x: Tensor,
    aux_weight: Tensor | None,
    scale: Tensor | None,
    weight_dtype: torch.dtype | None,
    aux_dtype: torch.dtype | None,
    aux_weight_scale: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of weight, aux weight and scale that were asked for; None for the others.

    `weight_dtype` asks for the weight's, `scale` with `aux_dtype` for the aux weight's, `aux_weight` for the scale's.
    """
    accumulator = grad_weight(grad_output, x)
    return (
        None if weight_dtype is None else cast(accumulator, weight_dtype),
        None if scale is None or aux_dtype is None else cast(grad_aux(accumulator, scale), aux_dtype),
        None if aux_weight is None else grad_scale(accumulator, aux_weight, aux_weight_scale),
    )
