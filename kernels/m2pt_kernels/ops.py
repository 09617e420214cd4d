"""The kernels as torch operators: dispatch, autocast, autograd, shapes for tracing, FLOP counts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .checks import GEMM_DTYPES, check_operand
from .combined import CombinedWeight, check_weights
from .divided import check_whole
from .products import GradParameters
from .quantization import DTYPES as QUANTIZED

if find_spec("triton"):
    from . import devices, gemm
else:
    devices = gemm = None  # type: ignore[assignment]

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "mps": "AutocastMPS", "xpu": "AutocastXPU"}

_library = torch.library.Library("m2pt_kernels", "DEF")
_library.define(
    "cross_modal_linear(Tensor x, Tensor weight, Tensor aux_weight, Tensor scale, Tensor? bias=None,"
    " Tensor? aux_weight_scale=None) -> Tensor"
)
_library.define(
    "grad_input(Tensor grad_output, Tensor weight, Tensor aux_weight, Tensor scale, Tensor? aux_weight_scale=None)"
    " -> Tensor"
)
_library.define(
    "grad_parameters(Tensor grad_output, Tensor x, Tensor? aux_weight, Tensor? scale,"
    " ScalarType? weight_dtype, ScalarType? aux_dtype, Tensor? aux_weight_scale=None) -> (Tensor, Tensor, Tensor)"
)
_cross_modal_linear = torch.ops.m2pt_kernels.cross_modal_linear.default
_grad_input = torch.ops.m2pt_kernels.grad_input.default
_grad_parameters = torch.ops.m2pt_kernels.grad_parameters.default


def cross_modal_linear(
    x: Tensor,
    weight: Tensor,
    aux_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    aux_weight_scale: Tensor | None = None,
) -> Tensor:
    """Compute `x (W + s * W_aux)^T + b` (M2PT, CVPR 2024, eq. 2) without ever storing `W + s * W_aux` on a GPU.

    With n auxiliary models it is `x (W + sum of s_i * W_aux_i)^T + b`.

    On other devices, and for float64, plain torch computes it, and the sum exists during a product.

    Args:
        x: (..., in_features); its dtype, or autocast's, is the dtype of the multiplication and of the result.
        weight: (out_features, in_features), of x's dtype, or float32 with a half-precision x.
        aux_weight: (out_features, in_features), or (n, out_features, in_features) with n > 1, any floating dtype of 16
            bits or more; or data from `quantize`.
        scale: the cross-modal scale, (1,) or (n,), any floating dtype; read on the device, so changing it costs neither
            a sync nor a recompilation.
        bias: (out_features,), any floating dtype, or None.
        aux_weight_scale: the quantisation scale that `quantize` returned with `aux_weight`; None if there is none.

    Returns:
        (..., out_features), contiguous. Differentiable once, with respect to every tensor that requires a gradient.
        Nothing of size out_features x in_features is saved for backward except `weight` and `aux_weight` themselves.

    Raises:
        TypeError: not a tensor, a dtype that is not floating (for x: float16, bfloat16, float32 or float64), a weight
            whose dtype does not fit x's, or a quantised aux_weight without its scales or vice versa.
        ValueError: a sparse or nested tensor, a shape or a device that does not fit the others, or a quantised
            aux_weight or its scales that require a gradient.
    """
    operands = x, weight, aux_weight, scale, bias, aux_weight_scale
    key = dtype = None
    if _is_unobserved():
        try:
            dtype = _PASSED.get(key := _checked_metadata(*operands))
        except (AttributeError, RuntimeError, TypeError):  # not a tensor, a nested one, or symbolic sizes
            key = None
    if dtype is None:
        check_weights(weight, aux_weight, scale, aux_weight_scale)
        dtype = _checked_dtype(x, weight, bias)
        if key is None or not _are_ordinary(operands):
            return _cross_modal_linear(*operands)
        if len(_PASSED) >= MOST_PASSED:  # of sizes that keep changing
            _PASSED.clear()
        _PASSED[key] = dtype
    return _CrossModalLinear.apply(reference.cast(x, dtype), weight, aux_weight, scale, bias, aux_weight_scale, _matmul)


_PASSED: dict[tuple[Any, ...], torch.dtype] = {}
"""All that the checks look at, of ordinary tensors that passed them, and the dtype to multiply in."""
MOST_PASSED = 2**10

_metadata = attrgetter("__class__", "dtype", "shape", "device", "layout")


def _checked_metadata(x, weight, aux_weight, scale, bias, aux_weight_scale):
    """Return everything that the checks look at."""
    return (
        torch._C._is_any_autocast_enabled() and _gemm_dtype(x),
        _metadata(x),
        _metadata(weight),
        _metadata(aux_weight),
        _metadata(scale),
        bias is None or _metadata(bias),
        aux_weight_scale is None
        or (_metadata(aux_weight_scale), aux_weight.requires_grad, aux_weight_scale.requires_grad),
    )


def _checked_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check that x and bias fit the weight, and return the dtype to multiply in."""
    out_features, in_features = weight.shape
    device = weight.device
    check_operand("x", x, device)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x: expected shape (..., {in_features}) to fit weight, got {tuple(x.shape)}")
    if bias is not None:
        check_operand("bias", bias, device)
        if bias.shape != (out_features,):
            raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
    dtype = _gemm_dtype(x)
    if dtype not in GEMM_DTYPES:
        raise TypeError(f"x: expected a dtype among {GEMM_DTYPES}, got {dtype}")
    if weight.dtype != dtype and not (weight.dtype == torch.float32 and dtype.itemsize == 2):
        raise TypeError(f"weight: expected {dtype}, or float32 with a half-precision x, got {weight.dtype}")
    return dtype


def _gemm_dtype(x: Tensor) -> torch.dtype:
    if _autocast_enabled(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _autocast_enabled(tensor: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():
        return False
    device_type = tensor.device.type
    return device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


def combined_weight(
    weight: Tensor, aux_weight: Tensor, scale: Tensor, dtype: torch.dtype, aux_weight_scale: Tensor | None = None
) -> Tensor:
    """Compute `W + s * W_aux` (M2PT eq. 2) in float32 at least, and round it once, to `dtype`; without gradients.

    All auxiliary models are added. Shapes and dtypes are those of `cross_modal_linear`.

    Raises:
        TypeError: not tensors, dtypes that are not floating, or a quantised aux_weight without its scales or vice
            versa.
        ValueError: a shape, layout or device that does not fit the others, or a tensor divided among processes.
    """
    check_weights(weight, aux_weight, scale, aux_weight_scale)
    operands = {"weight": weight, "aux_weight": aux_weight, "scale": scale, "aux_weight_scale": aux_weight_scale}
    for name, tensor in operands.items():
        check_whole(name, tensor)
    if dtype not in GEMM_DTYPES:
        raise TypeError(f"dtype: expected one of {GEMM_DTYPES}, got {dtype!r}")
    with torch.no_grad():
        return reference.combined_sum(CombinedWeight(weight, aux_weight, scale, aux_weight_scale), dtype)


_forced = "auto"


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Choose how every operator called inside the block is computed, in all threads of this process.

    A backward pass is covered if it runs inside the block too. A block inside a compiled function has no effect.

    Args:
        name: "auto" (Triton on GPU tensors, plain torch elsewhere and on CUDA below compute capability 8.0), "triton"
            (Triton on whatever its active driver accepts, its interpreter included) or "eager" (plain torch, which
            stores the combined weight while it runs).

    Raises:
        ValueError: another name.
        RuntimeError: "triton" where Triton is not installed or has no active driver, its interpreter does not work
            with the installed numpy, or the GPU has a compute capability below 8.0.
    """
    global _forced
    if name not in ("auto", "triton", "eager"):
        raise ValueError(f'name: expected "auto", "triton" or "eager", got {name!r}')
    if name == "triton":
        if gemm is None:
            raise RuntimeError('implementation("triton"): Triton is not installed')
        devices.check_runs_kernels()
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def path_of(x: Tensor, *others: Tensor | None) -> ModuleType:
    """Return the module that computes on these tensors."""
    if gemm is None or _forced == "eager" or (_forced == "auto" and not (x.is_cuda and devices.supports(x.device))):
        return reference
    unsupported = {tensor.dtype for tensor in (x, *others) if tensor is not None}.difference(devices.DTYPES, QUANTIZED)
    if unsupported and _forced == "triton":
        raise TypeError(f'implementation("triton"): expected dtypes among {devices.DTYPES}, got {unsupported}')
    return reference if unsupported else gemm


_ORDINARY = frozenset((Tensor, Parameter, NoneType))


def _is_unobserved() -> bool:
    """Return whether no tracer or mode wants to see an operator: dispatching it would waste time."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def _are_ordinary(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether none is of a subclass, which would want to see an operator."""
    return _ORDINARY.issuperset(map(type, tensors))


_shaped = torch.ops.aten._unsafe_view.default
"""Reshape a tensor that nothing else refers to. Other views from an autograd function cannot be changed in place."""


def _flat(tensor: Tensor) -> Tensor:
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def _matmul(left: Tensor, combined: CombinedWeight, bias: Tensor | None = None) -> Tensor:
    if _autocast_enabled(left):
        with torch.autocast(left.device.type, enabled=False):
            return _matmul(left, combined, bias)
    path = path_of(left, combined.weight, combined.aux_weight, combined.cross_modal_scale, bias)
    if left.dim() == 2:
        return path.combined_matmul(left, combined, bias)
    output = path.combined_matmul(_flat(left), combined, bias)
    return _shaped(output, (*left.shape[:-1], output.shape[1]))


def _gradients(product: GradParameters) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x = product.x
    if _autocast_enabled(x):
        with torch.autocast(x.device.type, enabled=False):
            return _gradients(product)
    if x.dim() != 2:
        product = product._replace(grad_output=_flat(product.grad_output), x=_flat(x))
    path = path_of(product.grad_output, x, product.aux_weight, product.cross_modal_scale)
    return path.grad_parameters(product)


def _grad_product(grad_output, x, aux_weight, scale, weight_dtype, aux_dtype, aux_weight_scale=None):
    """Make the operator's product; W_aux's gradient is wanted only if both a scale and a dtype are given."""
    if scale is None or aux_dtype is None:
        scale = aux_dtype = None
    return GradParameters(grad_output, x, aux_weight, scale, weight_dtype, aux_dtype, aux_weight_scale)


def _dispatched_matmul(left: Tensor, combined: CombinedWeight, bias: Tensor | None = None) -> Tensor:
    weight, aux_weight, scale, aux_weight_scale, transposed = combined
    if transposed:
        return _cross_modal_linear(left, weight, aux_weight, scale, bias, aux_weight_scale)
    return _grad_input(left, weight, aux_weight, scale, aux_weight_scale)


def _dispatched_gradients(product: GradParameters) -> tuple[Tensor, Tensor, Tensor]:
    return _grad_parameters(*product)


@torch.library.impl("m2pt_kernels::cross_modal_linear", "default", lib=_library)
def _(x, weight, aux_weight, scale, bias=None, aux_weight_scale=None):
    return _matmul(x, CombinedWeight(weight, aux_weight, scale, aux_weight_scale, transposed=True), bias)


@torch.library.impl("m2pt_kernels::grad_input", "default", lib=_library)
def _(grad_output, *combined):
    return _matmul(grad_output, CombinedWeight(*combined))


@torch.library.impl("m2pt_kernels::grad_parameters", "default", lib=_library)
def _(grad_output, *others):
    gradients = _gradients(_grad_product(grad_output, *others))
    return tuple(grad_output.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake("m2pt_kernels::cross_modal_linear", lib=_library)
def _(x, weight, *_, **__):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("m2pt_kernels::grad_input", lib=_library)
def _(grad_output, weight, *_, **__):
    return grad_output.new_empty(*grad_output.shape[:-1], weight.shape[1])


@torch.library.register_fake("m2pt_kernels::grad_parameters", lib=_library)
def _(grad_output, x, *others, **named):
    product, wide = _grad_product(grad_output, x, *others, **named), reference.wide_dtype(x.dtype)
    return (
        x.new_empty(0 if product.weight_dtype is None else product.shape, dtype=product.weight_dtype),
        x.new_empty(0 if product.aux_dtype is None else product.aux_shape, dtype=product.aux_dtype),
        x.new_empty(0) if product.aux_weight is None else x.new_empty(product.models, dtype=wide),
    )


_UNSUPPORTED = (
    "cross_modal_linear: forward-mode derivatives and torch.func transforms other than vmap are not supported;"
    " differentiate with torch.autograd"
)


class _CrossModalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, aux_weight, scale, bias, aux_weight_scale, compute):
        need_x, need_weight, need_aux, need_scale, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_weight or need_aux or need_scale else None,
            weight if need_x else None,
            aux_weight if need_x or need_scale else None,
            scale if need_x or need_aux else None,
            aux_weight_scale if need_x or need_scale else None,
        )
        ctx.dtypes = weight.dtype, aux_weight.dtype, scale.dtype, None if bias is None else bias.dtype
        return compute(x, CombinedWeight(weight, aux_weight, scale, aux_weight_scale, True), bias)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            raise RuntimeError("cross_modal_linear is differentiable once: create_graph=True is not supported")
        x, weight, aux_weight, scale, aux_weight_scale = saved = ctx.saved_tensors
        weight_dtype, aux_dtype, scale_dtype, bias_dtype = ctx.dtypes
        need_x, need_weight, need_aux, need_scale, need_bias, *_ = ctx.needs_input_grad
        if _is_unobserved() and _are_ordinary((grad_output, *saved)):
            matmul, gradients = _matmul, _gradients
        else:
            matmul, gradients = _dispatched_matmul, _dispatched_gradients
        grad_x = grad_weight = grad_aux = grad_scale = grad_bias = None
        if need_bias:
            # First, because torch takes memory for the sum (32 MiB for 1024 x 4096 on an H200) that others then reuse.
            # Before torch 2.12 a DTensor does not flatten a sharded batch dimension.
            batch = tuple(range(grad_output.dim() - 1))
            grad_bias = grad_output.sum(batch, dtype=bias_dtype) if batch else reference.cast(grad_output, bias_dtype)
        if need_x:
            grad_x = matmul(grad_output, CombinedWeight(weight, aux_weight, scale, aux_weight_scale))
        if need_weight or need_aux or need_scale:
            product = GradParameters(
                grad_output,
                x,
                aux_weight if need_scale else None,
                scale if need_aux else None,
                weight_dtype if need_weight else None,
                aux_dtype if need_aux else None,
                aux_weight_scale if need_scale else None,
            )
            grad_weight, grad_aux, grad_scale = gradients(product)
        # Operators return an empty tensor for a gradient that is not wanted.
        grad_weight, grad_aux = grad_weight if need_weight else None, grad_aux if need_aux else None
        grad_scale = reference.cast(grad_scale, scale_dtype) if need_scale and grad_scale is not None else None
        return grad_x, grad_weight, grad_aux, grad_scale, grad_bias, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_UNSUPPORTED)


def _below_autograd(x: Tensor, combined: CombinedWeight, bias: Tensor | None) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _dispatched_matmul(x, combined, bias)


def _autograd(x, weight, aux_weight, scale, bias=None, aux_weight_scale=None):
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_UNSUPPORTED)
    return _CrossModalLinear.apply(x, weight, aux_weight, scale, bias, aux_weight_scale, _below_autograd)


_library.impl("cross_modal_linear", _autograd, "Autograd")


def _autocast(device_type, x, *others):
    dtype = _gemm_dtype(x)
    with torch.autocast(device_type, enabled=False):
        return _cross_modal_linear(x.to(dtype), *others)


for _device_type, _key in _AUTOCAST_KEYS.items():
    _library.impl("cross_modal_linear", partial(_autocast, _device_type), _key)


@register_flop_formula(_cross_modal_linear.overloadpacket)
def _(x_shape, weight_shape, *_, **__):
    return 2 * x_shape.numel() * weight_shape[0]


@register_flop_formula([_grad_input.overloadpacket, _grad_parameters.overloadpacket])
def _(grad_output_shape, other_shape, *_, **__):
    return 2 * grad_output_shape.numel() * other_shape[-1]
