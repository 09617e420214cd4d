"""The Triton GEMMs, by pointers: any shape, any stride, float32, float16 and bfloat16, W_aux quantised or not.

Two kernels make the three products. Forward and input gradient are one GEMM that differs in strides only,
`left (W + s * W_aux)` with the combined weight formed tile by tile; the parameter gradients are the other.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import gemm_tma, records, reference
from .configs import (
    EAGER,
    GROUP,
    INTERPRETED,
    MOST_UNTUNED,
    TUNED,
    UNTUNED,
    CombinedTileConfig,
    Plan,
    TileConfig,
    active_target,
    architecture,
    ceil_div,
    input_precision,
    is_aligned,
    is_small,
    problem,
    tile_configs,
    variant,
)
from .tiles import (
    GROUP_SIZE,
    aux_strides,
    indices_inside,
    offset_of,
    packed_index,
    store_gradients,
    tile_of_program,
    unpack,
)
from .versions import CROWDED_TILES, HAS_HOPPER_LOOPS, OPTIONS

gemm_hopper = import_module(".gemm_hopper", __package__) if HAS_HOPPER_LOOPS else None

# Triton's interpreter multiplies the bits of bfloat16 as integers.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)

OLDEST_CAPABILITY = 80
"""Of CUDA: what is older has no tensor cores that Triton knows, and would spill; there plain torch is faster."""


@cache
def supports(device: torch.device) -> bool:
    """Whether a GPU can run the kernels well."""
    if torch.version.hip is not None:
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= OLDEST_CAPABILITY


@triton.jit
def combined_matmul_kernel(
    left_ptr,
    weight_ptr,
    aux_ptr,
    scale_ptr,
    bias_ptr,
    output_ptr,
    rows,
    columns,
    depth,
    stride_left_row,
    stride_left_depth,
    stride_weight_depth,
    stride_weight_column,
    stride_aux_depth,
    stride_aux_column,
    stride_aux_model,
    aux_scale_ptr,
    stride_aux_scale,
    stride_aux_scale_model,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMBINE_IN_WARPS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DEPTH_FIRST: tl.constexpr,
    MODELS: tl.constexpr,
):
    """output = left (weight + sum of scale * aux) + bias: left (rows, depth), weight and each aux (depth, columns).

    A quantised aux has scales, stride_aux_scale for each of its rows, which are numbered by depth if DEPTH_FIRST and by
    columns otherwise, and of int4 for each group of a row, of which no tile touches two.
    """
    # A mask of rows and columns in the loop would cost registers that the largest tiles do not have.
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = indices_inside(tile_row, rows, BLOCK_M)
    column = indices_inside(tile_column, columns, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left_ptrs = left_ptr + row[:, None] * stride_left_row + k[None, :] * stride_left_depth
    weight_ptrs = weight_ptr + k[:, None] * stride_weight_depth + column[None, :] * stride_weight_column
    PACKED: tl.constexpr = aux_ptr.dtype.element_ty == tl.uint8
    aux_column = packed_index(column) if PACKED and DEPTH_FIRST else column
    aux_ptrs = aux_ptr + k[:, None] * stride_aux_depth + aux_column[None, :] * stride_aux_column
    step = tl.full((), BLOCK_K, tl.int64)
    if aux_scale_ptr is not None:
        if DEPTH_FIRST:
            aux_scale_ptrs = aux_scale_ptr + k[:, None] * stride_aux_scale
            if PACKED:
                aux_scale_ptrs += tile_column * BLOCK_N // GROUP_SIZE
        else:
            aux_scale_ptrs = aux_scale_ptr + column[None, :] * stride_aux_scale
    scales = tl.tuple([])
    for model in tl.static_range(MODELS):
        if COMBINE_IN_WARPS:
            scale = tl.load(scale_ptr + model + tl.zeros((1, 1), tl.int32)).to(tl.float32)
        else:
            scale = tl.load(scale_ptr + model).to(tl.float32)
        if aux_scale_ptr is not None and not (DEPTH_FIRST or PACKED):
            scale *= tl.load(aux_scale_ptrs + offset_of(model, stride_aux_scale_model))
        scales += (scale,)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K):
        if PACKED and not DEPTH_FIRST:
            aux_depth = packed_index(start + k)
            aux_ptrs = aux_ptr + aux_depth[:, None] * stride_aux_depth + column[None, :] * stride_aux_column
        if EVEN_K:
            left, weight = tl.load(left_ptrs), tl.load(weight_ptrs)
        else:
            left = tl.load(left_ptrs, mask=k[None, :] < depth - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=k[:, None] < depth - start, other=0.0)
        combined = weight.to(tl.float32)
        for model in tl.static_range(MODELS):
            model_ptrs = aux_ptrs + offset_of(model, stride_aux_model)
            aux = tl.load(model_ptrs) if EVEN_K else tl.load(model_ptrs, mask=k[:, None] < depth - start, other=0.0)
            if PACKED:
                aux = unpack(aux, column[None, :] if DEPTH_FIRST else (start + k)[:, None])
            aux_scale = scales[model]
            if aux_scale_ptr is not None and (PACKED or DEPTH_FIRST):
                model_scale_ptrs = aux_scale_ptrs + offset_of(model, stride_aux_scale_model)
                if DEPTH_FIRST:
                    aux_scale *= tl.load(model_scale_ptrs, mask=k[:, None] < depth - start, other=0.0)
                else:
                    aux_scale *= tl.load(model_scale_ptrs + start // GROUP_SIZE)
            combined += aux_scale * aux.to(tl.float32)
        accumulator = tl.dot(left, combined.to(left.dtype), accumulator, input_precision=INPUT_PRECISION)
        left_ptrs += step * stride_left_depth
        weight_ptrs += step * stride_weight_depth
        aux_ptrs += step * stride_aux_depth
        if aux_scale_ptr is not None and DEPTH_FIRST:
            aux_scale_ptrs += step * stride_aux_scale
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + column[None, :]).to(tl.float32)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    tl.store(
        output_ptr + row[:, None] * columns + column[None, :],
        accumulator.to(output_ptr.dtype.element_ty),
        mask=(row[:, None] < rows) & (column[None, :] < columns),
    )


@triton.jit
def grad_parameters_kernel(
    grad_ptr,
    x_ptr,
    aux_ptr,
    scale_ptr,
    grad_weight_ptr,
    grad_aux_ptr,
    partial_ptr,
    rows,
    columns,
    depth,
    stride_grad_depth,
    stride_grad_row,
    stride_x_depth,
    stride_x_column,
    stride_aux_row,
    stride_aux_column,
    stride_aux_model,
    aux_scale_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MODELS: tl.constexpr,
):
    """G = grad^T x, with grad (depth, rows) and x (depth, columns), in float32; `store_gradients` writes it."""
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = row[:, None] < rows
    column_mask = column[None, :] < columns
    grad_ptrs = grad_ptr + row[:, None] * stride_grad_row + k[None, :] * stride_grad_depth
    x_ptrs = x_ptr + k[:, None] * stride_x_depth + column[None, :] * stride_x_column
    step = tl.full((), BLOCK_K, tl.int64)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K):
        if EVEN_K:
            grad_mask, x_mask = row_mask, column_mask
        else:
            grad_mask = row_mask & (k[None, :] < depth - start)
            x_mask = column_mask & (k[:, None] < depth - start)
        grad = tl.load(grad_ptrs, mask=grad_mask, other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        accumulator = tl.dot(grad, x, accumulator, input_precision=INPUT_PRECISION)
        grad_ptrs += step * stride_grad_depth
        x_ptrs += step * stride_x_depth
    store_gradients(
        accumulator,
        tile_row,
        tile_column,
        rows,
        columns,
        aux_ptr,
        scale_ptr,
        grad_weight_ptr,
        grad_aux_ptr,
        partial_ptr,
        stride_aux_row,
        stride_aux_column,
        stride_aux_model,
        aux_scale_ptr,
        MODELS,
    )


KERNELS = (
    combined_matmul_kernel,
    grad_parameters_kernel,
    gemm_tma.combined_matmul_tma_kernel,
    gemm_tma.grad_parameters_tma_kernel,
    *([] if gemm_hopper is None else [gemm_hopper.combined_matmul_hopper_kernel]),
)


def forward(
    x: Tensor,
    weight: Tensor,
    aux_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    aux_weight_scale: Tensor | None = None,
) -> Tensor:
    """`x (W + s * W_aux)^T + b`: x (M, K), weights (N, K) -> (M, N) in x's dtype."""
    return _computed("forward", x, weight, aux_weight, scale, bias, aux_weight_scale)


def grad_input(
    grad_output: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, aux_weight_scale: Tensor | None = None
) -> Tensor:
    """`dY (W + s * W_aux)`: grad_output (M, N), weights (N, K) -> (M, K) in grad_output's dtype."""
    return _computed("grad_input", grad_output, weight, aux_weight, scale, aux_weight_scale)


def grad_parameters(
    grad_output: Tensor,
    x: Tensor,
    aux_weight: Tensor | None,
    scale: Tensor | None,
    weight_dtype: torch.dtype | None,
    aux_dtype: torch.dtype | None,
    aux_weight_scale: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of weight, aux weight and scale that were asked for, as `reference.grad_parameters`.

    The scale's is reduced in two stages of fixed order, a sum per row of a tile and the sum of those, without atomics:
    repeated runs give the same bits.
    """
    arguments = grad_output, x, aux_weight, scale, weight_dtype, aux_dtype, aux_weight_scale
    return _computed("grad_parameters", *arguments)


def _computed(product: str, *arguments: Tensor | torch.dtype | None) -> Any:
    with device_of(arguments[0]):
        arguments = prepared(product, *arguments)
        key = problem(product, *arguments)
        plan = TUNED.get(key) or UNTUNED.get(key)
        if plan is None:
            if len(UNTUNED) >= MOST_UNTUNED:  # of sizes that keep changing
                UNTUNED.clear()
            plan = UNTUNED[key] = next(usable_plans(key, *arguments))
        return compute(plan, product, *arguments)


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Inside, the current device is the tensor's: Triton compiles for the current one and launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def prepared(product: str, *arguments: Tensor | torch.dtype | None) -> tuple:
    """The arguments of "forward", "grad_input" or "grad_parameters" as the functions below and the kernels take them.

    Tensors hold their entries in memory, vectors and scales are contiguous; what the product does not read is None.
    """
    first, second, aux_weight, scale, *others, aux_weight_scale = map(_stored, arguments)
    if product == "forward":
        (bias,) = others
        others = [None if bias is None else bias.contiguous()]
    elif product == "grad_parameters":
        scale = None if others[1] is None else scale
        aux_weight_scale = None if aux_weight is None else aux_weight_scale
    scale = None if scale is None else scale.contiguous()
    aux_weight_scale = None if aux_weight_scale is None else aux_weight_scale.contiguous()
    return first, second, aux_weight, scale, *others, aux_weight_scale


def _stored(argument: Tensor | torch.dtype | None) -> Tensor | torch.dtype | None:
    """A tensor whose memory holds its entries, as that of one negated lazily, or of zeros not stored, does not."""
    if isinstance(argument, Tensor) and (argument.is_neg() or argument._is_zerotensor()):
        return argument.clone()
    return argument


def plans(product: str, *arguments: Any) -> Iterator[Plan]:
    """The ways to compute a product of such arguments on the current device, the untuned choice first."""
    if product == "grad_parameters":
        return _grad_parameters_plans(*arguments)
    left, weight, aux_weight, _, *bias, aux_weight_scale = arguments
    if product == "forward":
        return _combined_matmul_plans(left, weight.t(), aux_weight.mT, aux_weight_scale, False, *bias)
    return _combined_matmul_plans(left, weight, aux_weight, aux_weight_scale, True)


def usable_plans(key: tuple, *arguments: Any) -> Iterator[Plan]:
    """`plans` of a `problem`, then plain torch; those found faulty on such a GPU are left out, with a warning."""
    product, device, *_ = key
    faults = records.faults(device, KERNELS)
    left_out = []
    for plan in chain(plans(product, *arguments), [EAGER]):
        name = variant(plan, key)
        if name in faults:
            left_out.append(f"{name} was found faulty on this GPU ({faults[name]}) and is not used")
            continue
        while left_out:
            forget = f"delete {records.path_of('findings', device, KERNELS)} to try it again"
            _warn_once(f"{left_out.pop(0)}: next is {plan}; {forget}")
        yield plan


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def compute(plan: Plan, product: str, *arguments: Any) -> Any:
    """A product, by one of its plans, on the current device."""
    if plan == EAGER:
        return getattr(reference, product)(*arguments)
    if product == "grad_parameters":
        return _grad_parameters(plan, *arguments)
    left, weight, aux_weight, scale, *bias, aux_weight_scale = arguments
    if product == "forward":
        return _combined_matmul(plan, left, weight.t(), aux_weight.mT, scale, *bias, aux_weight_scale, False)
    return _combined_matmul(plan, left, weight, aux_weight, scale, None, aux_weight_scale, True)


def _combined_matmul_plans(
    left: Tensor,
    weight: Tensor,
    aux_weight: Tensor,
    aux_weight_scale: Tensor | None,
    depth_first: bool,
    bias: Tensor | None = None,
) -> Iterator[Plan]:
    target = active_target()
    _require_readable(aux_weight, target)
    operands = left, weight, aux_weight, aux_weight_scale, depth_first, bias
    if gemm_hopper is not None and gemm_hopper.takes(target, *operands):
        yield from (Plan("hopper", tile) for tile in gemm_hopper.tiles(left, weight, aux_weight))
    if gemm_tma.takes_combined_matmul(target, *operands):
        yield from (Plan("tma", tile) for tile in gemm_tma.combined_tiles(target, weight, aux_weight))
    (rows, depth), columns = left.shape, weight.shape[1]
    packed, models = aux_weight.dtype == torch.uint8, reference.models_in(aux_weight)
    weight_bytes = weight.itemsize + models * aux_weight.itemsize
    tiles = tile_configs(
        "combined_matmul",
        target,
        left.dtype,
        4 if packed or models > 1 else max(weight.itemsize, aux_weight.itemsize),
        input_precision(left.dtype, target),
        is_aligned((depth, columns), left, weight, aux_weight) and weight_bytes <= 8,
        is_small(rows, columns) or packed,
    )
    for tile in tiles:
        spills = tile.BLOCK_N > 32 if packed else tile.COMBINE_IN_WARPS
        if not spills or (models == 1 and aux_weight_scale is None):
            yield Plan("pointers", tile)


def _require_readable(aux_weight: Tensor | None, target: GPUTarget | None) -> None:
    if aux_weight is None or aux_weight.dtype != torch.float8_e4m3fn or target is None:
        return
    if target.backend != "cuda" or target.arch < 89:
        raise ValueError(f"aux_weight: float8_e4m3fn needs CUDA and compute capability 8.9, this is {target.arch}")


def _combined_matmul(
    plan: Plan,
    left: Tensor,
    weight: Tensor,
    aux_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    aux_weight_scale: Tensor | None,
    depth_first: bool,
) -> Tensor:
    output = left.new_empty(left.shape[0], weight.shape[1])
    arguments = plan.tile, left, weight, aux_weight, scale, bias, aux_weight_scale, output
    if plan.by == "hopper":
        gemm_hopper.combined_matmul(*arguments)
    elif plan.by == "tma":
        gemm_tma.combined_matmul(*arguments)
    else:
        _combined_matmul_by_pointers(*arguments, depth_first)
    return output


def _combined_matmul_by_pointers(
    tile: CombinedTileConfig,
    left: Tensor,
    weight: Tensor,
    aux_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    aux_weight_scale: Tensor | None,
    output: Tensor,
    depth_first: bool,
) -> None:
    rows, depth = left.shape
    columns = weight.shape[1]
    combined_matmul_kernel[(ceil_div(rows, tile.BLOCK_M) * ceil_div(columns, tile.BLOCK_N),)](
        left,
        weight,
        aux_weight,
        scale,
        bias,
        output,
        rows,
        columns,
        depth,
        *left.stride(),
        *weight.stride(),
        *aux_strides(aux_weight),
        aux_weight_scale,
        0 if aux_weight_scale is None else aux_weight_scale.stride(-2),
        0 if aux_weight_scale is None else aux_strides(aux_weight_scale)[-1],
        **tile._asdict(),
        GROUP=GROUP,
        EVEN_K=depth % tile.BLOCK_K == 0,
        INPUT_PRECISION=input_precision(left.dtype, active_target()),
        DEPTH_FIRST=depth_first and aux_weight_scale is not None,
        MODELS=reference.models_in(aux_weight),
        **OPTIONS,
    )


def _grad_parameters(
    plan: Plan,
    grad_output: Tensor,
    x: Tensor,
    aux_weight: Tensor | None,
    scale: Tensor | None,
    weight_dtype: torch.dtype | None,
    aux_dtype: torch.dtype | None,
    aux_weight_scale: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    shape = (grad_output.shape[1], x.shape[1])
    grad_weight = None if weight_dtype is None else x.new_empty(shape, dtype=weight_dtype)
    grad_aux = None if scale is None else x.new_empty(reference.aux_shape(shape, scale), dtype=aux_dtype)
    launch = gemm_tma.grad_parameters if plan.by == "tma" else _grad_parameters_by_pointers
    partial = launch(plan.tile, grad_output, x, aux_weight, scale, aux_weight_scale, grad_weight, grad_aux)
    return grad_weight, grad_aux, None if partial is None else partial.sum(1)


def _grad_parameters_plans(
    grad_output: Tensor,
    x: Tensor,
    aux_weight: Tensor | None,
    scale: Tensor | None,
    weight_dtype: torch.dtype | None,
    aux_dtype: torch.dtype | None,
    aux_weight_scale: Tensor | None,
) -> Iterator[Plan]:
    target = active_target()
    _require_readable(aux_weight, target)
    rows, columns = grad_output.shape[1], x.shape[1]
    if gemm_tma.takes_grad_parameters(target, grad_output, x, aux_weight, aux_weight_scale):
        trained_aux = None if scale is None else aux_dtype
        tiles = gemm_tma.grad_tiles(target, (rows, columns), aux_weight, weight_dtype, trained_aux)
        yield from (Plan("tma", tile) for tile in tiles)
    aligned = is_aligned((rows, columns), grad_output, x)
    has_own_tiles = aligned and architecture(target) != "portable"
    if CROWDED_TILES and has_own_tiles and x.itemsize == 2 and _is_crowded(aux_weight, weight_dtype):
        yield from (Plan("pointers", TileConfig(*tile)) for tile in CROWDED_TILES)
        return
    tiles = tile_configs(
        "grad_parameters",
        target,
        x.dtype,
        x.itemsize,
        input_precision(x.dtype, target),
        aligned,
        is_small(rows, columns),
    )
    yield from (Plan("pointers", tile) for tile in tiles)


def _is_crowded(aux_weight: Tensor | None, weight_dtype: torch.dtype | None) -> bool:
    """Whether the epilogue reads several auxiliary models, int4, or elements wider than it writes."""
    if aux_weight is None:
        return False
    wider = weight_dtype is not None and aux_weight.itemsize > weight_dtype.itemsize
    return wider or aux_weight.dtype == torch.uint8 or reference.models_in(aux_weight) > 1


def _grad_parameters_by_pointers(
    tile: TileConfig,
    grad_output: Tensor,
    x: Tensor,
    aux_weight: Tensor | None,
    scale: Tensor | None,
    aux_weight_scale: Tensor | None,
    grad_weight: Tensor | None,
    grad_aux: Tensor | None,
) -> Tensor | None:
    depth, rows = grad_output.shape
    columns = x.shape[1]
    tiles = ceil_div(rows, tile.BLOCK_M) * ceil_div(columns, tile.BLOCK_N)
    models = reference.models_in(aux_weight, scale)
    partial = None if aux_weight is None else x.new_empty(models, tiles * tile.BLOCK_M, dtype=torch.float32)
    grad_parameters_kernel[(tiles,)](
        grad_output,
        x,
        aux_weight,
        scale,
        grad_weight,
        grad_aux,
        partial,
        rows,
        columns,
        depth,
        *grad_output.stride(),
        *x.stride(),
        *((0, 0, 0) if aux_weight is None else aux_strides(aux_weight)),
        aux_weight_scale,
        **tile._asdict(),
        GROUP=GROUP,
        EVEN_K=depth % tile.BLOCK_K == 0,
        INPUT_PRECISION=input_precision(x.dtype, active_target()),
        MODELS=models,
        **OPTIONS,
    )
    return partial
