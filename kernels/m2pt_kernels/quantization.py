"""Quantise a frozen weight symmetrically, with one float32 scale per output row or per group of 64 columns.

A matrix (N, K), or each of n in (n, N, K), becomes `data` and `scale`; `dequantize` returns their value in float32:

int8            data (N, K) int8, scale (N, 1)
float8_e4m3fn   data (N, K) float8_e4m3fn, scale (N, 1)
int4            data (N, K / 2) uint8, scale (N, K / 64). Byte j of a group holds entry j in its low half and entry
                j + 32 in its high half, each plus 8: 32 neighbours in memory are 32 neighbours of the matrix.

The kernels read plain data and scales; torchao stores both in tensor subclasses, whose int4 packing needs one more
package.
"""

import torch
from torch import Tensor

from .checks import GEMM_DTYPES, check_tensor
from .divided import check_whole

GROUP_SIZE = 64
"""How many columns of an int4 matrix share a scale."""

_LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}
DTYPES = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "float8_e4m3fn"}
"""The names of storage formats, by the dtype of their data."""


def quantize(weight: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Return the nearest entries to `weight`, and scales that map the largest of a row or group to the largest entry.

    Args:
        weight: (N, K) or (n, N, K), any floating dtype of 16 bits or more, finite in float32 and not empty.
        dtype: "int8", "int4" (K a multiple of 64) or "float8_e4m3fn".

    Returns:
        The data and the quantisation scale, as described at the top of this file.

    Raises:
        TypeError: a weight that is not a tensor of such a dtype.
        ValueError: another dtype, a weight that is sparse, nested, empty, divided among processes, not divisible into
            groups or not finite in float32, or float8_e4m3fn on a GPU that is not CUDA with compute capability 8.9.
    """
    check_tensor("weight", weight)
    check_whole("weight", weight)
    if weight.dtype not in GEMM_DTYPES:
        raise TypeError(f"weight: expected a floating dtype among {GEMM_DTYPES}, got {weight.dtype}")
    if dtype not in tuple(_LARGEST):
        raise ValueError(f"dtype: expected one of {', '.join(_LARGEST)}, got {dtype!r}")
    if weight.dim() not in (2, 3) or weight.numel() == 0 or (dtype == "int4" and weight.shape[-1] % GROUP_SIZE):
        columns = f"in_features, a multiple of {GROUP_SIZE}" if dtype == "int4" else "in_features"
        raise ValueError(f"weight: expected shape (out_features, {columns}), got {tuple(weight.shape)}")
    if dtype == "float8_e4m3fn" and not supports_float8(weight.device):
        raise ValueError(f"dtype: float8_e4m3fn needs CUDA and compute capability 8.9, got {weight.device}")
    groups = weight.detach().float().unflatten(-1, (-1, GROUP_SIZE) if dtype == "int4" else (1, weight.shape[-1]))
    largest = groups.abs().amax(-1)
    # divided by a tensor: CUDA multiplies by the reciprocal of a number, which gives other scales than on a CPU
    aux_weight_scale = largest / largest.new_tensor(_LARGEST[dtype])
    if not weight.is_meta and not (aux_weight_scale * _LARGEST[dtype]).isfinite().all():
        raise ValueError("weight: there are NaN or infinite entries, or ones beyond float32's range")
    aux_weight_scale.masked_fill_(aux_weight_scale == 0, 1)
    entries = (groups / aux_weight_scale[..., None]).clamp_(-_LARGEST[dtype], _LARGEST[dtype])
    if dtype == "float8_e4m3fn":
        return entries.flatten(-2).to(torch.float8_e4m3fn), aux_weight_scale
    entries = entries.round_().to(torch.int8)
    return (_pack(entries) if dtype == "int4" else entries.flatten(-2)), aux_weight_scale


def dequantize(data: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 matrix that `data` and its quantisation scale stand for; any block of rows will do.

    `quantize` returns `data` and `scale`; `cross_modal_linear` takes them as aux_weight and aux_weight_scale.

    Raises:
        TypeError: not tensors, or dtypes that `quantize` does not return.
        ValueError: sparse, nested or divided tensors, or shapes or devices that do not fit each other.
    """
    for name, tensor in (("data", data), ("scale", scale)):
        check_tensor(name, tensor)
        check_whole(name, tensor)
    if data.dtype not in DTYPES:
        raise TypeError(f"data: expected a dtype among {tuple(DTYPES)}, got {data.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale: expected torch.float32, got {scale.dtype}")
    if data.dim() == 0 or (data.dtype == torch.uint8 and data.shape[-1] % (GROUP_SIZE // 2)):
        raise ValueError(
            f"data: expected shape (..., bytes), with int4 a multiple of {GROUP_SIZE // 2}, got {tuple(data.shape)}"
        )
    _check_aux_weight_scale("scale", scale, data)
    groups = _unpack(data) if data.dtype == torch.uint8 else data.float().unsqueeze(-2)
    return (groups * scale[..., None]).flatten(-2)


def check_aux_weight(aux_weight: Tensor, aux_weight_scale: Tensor | None, shape: torch.Size) -> None:
    """Check that `aux_weight` is a matrix of `shape`, or several: floating without scales, or quantised with them.

    Raises:
        TypeError: not a tensor, a dtype that is neither, or one that does not fit the other argument.
        ValueError: a shape, layout or device that does not fit, or a quantised matrix that requires a gradient.
    """
    dtype, packed = aux_weight.dtype, aux_weight.dtype == torch.uint8
    if aux_weight_scale is None:
        if dtype not in GEMM_DTYPES:
            raise TypeError(f"aux_weight: expected a dtype among {GEMM_DTYPES} without aux_weight_scale, got {dtype}")
    else:
        check_tensor("aux_weight_scale", aux_weight_scale)
        if dtype not in DTYPES or aux_weight_scale.dtype != torch.float32:
            raise TypeError(
                f"aux_weight_scale: expected float32 scales for an aux_weight of {tuple(DTYPES)},"
                f" got {aux_weight_scale.dtype} with {dtype}"
            )
    rows, columns = shape
    if packed and columns % GROUP_SIZE:
        raise ValueError(f"aux_weight: expected in_features to be a multiple of {GROUP_SIZE} with int4, got {columns}")
    expected = rows, columns // 2 if packed else columns
    of_several = aux_weight.dim() == 3 and len(aux_weight) > 1
    if aux_weight.shape[of_several:] != expected:
        raise ValueError(
            f"aux_weight: expected shape {expected} to fit weight, or (n, {expected[0]}, {expected[1]}) for several"
            f" auxiliary models, got {tuple(aux_weight.shape)} of {dtype}"
        )
    if aux_weight_scale is not None:
        _check_aux_weight_scale("aux_weight_scale", aux_weight_scale, aux_weight)
        if aux_weight.requires_grad or aux_weight_scale.requires_grad:
            raise ValueError("aux_weight: a quantised matrix and its scales cannot require a gradient")


def _check_aux_weight_scale(name: str, aux_weight_scale: Tensor, data: Tensor) -> None:
    expected = (*data.shape[:-1], data.shape[-1] * 2 // GROUP_SIZE if data.dtype == torch.uint8 else 1)
    if aux_weight_scale.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(aux_weight_scale.shape)}")
    if aux_weight_scale.device != data.device:
        device = f"the device of the quantised matrix, {data.device}"
        raise ValueError(f"{name}: expected {device}, got {aux_weight_scale.device}")


def supports_float8(device: torch.device) -> bool:
    """Return whether float8_e4m3fn can be read on a device: by the kernels, or on a CPU by plain torch."""
    return device.type != "cuda" or reads_float8(cuda_capability(device))


def reads_float8(capability: int | None) -> bool:
    """Return whether kernels can read float8_e4m3fn; a capability of 89 means 8.9, None means no CUDA."""
    return capability is not None and capability >= 89


def cuda_capability(device: torch.device) -> int | None:
    """Return ten times the compute capability of a GPU; None without CUDA."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _pack(entries: Tensor) -> Tensor:
    """Map (..., groups, 64) int8 to (..., groups * 32) uint8."""
    low, high = (entries + 8).view(torch.uint8).chunk(2, -1)
    return (low | high << 4).flatten(-2)


def _unpack(data: Tensor) -> Tensor:
    """Map (..., groups * 32) uint8 to (..., groups, 64) float32."""
    groups = data.unflatten(-1, (-1, GROUP_SIZE // 2))
    return torch.cat((groups & 15, groups >> 4), -1).float() - 8
