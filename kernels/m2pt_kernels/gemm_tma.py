"""Warp-specialised GEMMs for sm_90 and sm_100: one warp loads tensors by TMA, the others compute.

Products of weights are computed transposed, `Y^T = (W + s * W_aux) X^T`. The combined tile is then the A operand, which
wgmma can read from registers and tcgen05 from tensor memory: it is never written to memory, not even to shared memory.
Half-precision activations only; int4 and matrices that TMA cannot address go to `gemm_pointers.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combined import CombinedWeight, model_stride
from .launches import launch
from .products import GradParameters
from .tiles import GROUP, GradTile, ceil_div, count_tiles, offset_of, share_of, tile_of_program
from .versions import TMA_OPTIONS


@triton.jit
def _relabel(tile, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Permute every OUTER * INNER rows as an OUTER x INNER matrix is transposed; (4, 2) and (2, 4) undo each other.

    In wgmma's A operand four lanes share a row, and eight rows a warp: (4, 2) lets them read float32 rows without bank
    conflicts. A lane has rows i and i + 8 of every 16: (8, 2) makes these neighbours in memory. Rows of the weight are
    independent, so nothing else changes.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    BLOCKS: tl.constexpr = ROWS // (OUTER * INNER)
    return tile.reshape([BLOCKS, OUTER, INNER, COLUMNS]).permute((0, 2, 1, 3)).reshape([ROWS, COLUMNS])


@triton.jit
def _halves(tile):
    """Return the left and right halves of a tile's columns; every thread keeps its elements."""
    return tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute((0, 2, 1)).split()


@triton.jit
def _folded_halves(tile):
    """Return `_halves` as (rows, 2, columns / 4) each: the caller reshapes a half where it uses it.

    Triton 3.8 allocates shared memory for a stored tile as soon as the tile is made, and tiles made together do not
    fit.
    """
    return tile.reshape([tile.shape[0], 2, 2, tile.shape[1] // 4]).permute((0, 2, 3, 1)).split()


@triton.jit
def _store_transposed(descriptor, accumulator, row, column, RELABEL: tl.constexpr):
    tile = accumulator.to(descriptor.dtype)
    if RELABEL:
        tile = _relabel(tile, 2, RELABEL)
    descriptor.store([row, column], tile.T)


@triton.jit
def _column_of(vector_ptr, start, size, BLOCK: tl.constexpr, RELABEL: tl.constexpr):
    """Load BLOCK entries of a vector as a column, in float32."""
    # Also by TMA: in the second consumer group, Triton 3.8 offsets the mask of an ordinary load twice.
    column = tl.make_tensor_descriptor(vector_ptr, [size], [1], [BLOCK]).load([start]).to(tl.float32)[:, None]
    if RELABEL:
        column = _relabel(column, RELABEL, 2)
    return column


@triton.jit
def _tile_of_weight(descriptor, k, column, DEPTH_FIRST: tl.constexpr, RELABEL: tl.constexpr):
    """Load a tile of W or W_aux, (columns, depth), in float32 and relabelled."""
    tile = descriptor.load([k, column]).T if DEPTH_FIRST else descriptor.load([column, k])
    if RELABEL:
        tile = _relabel(tile, RELABEL, 2)
    return tile.to(tl.float32)


@triton.jit
def _tile_of_pairs(descriptor, k, column, dtype: tl.constexpr, RELABEL: tl.constexpr):
    """Load the same from an 8-bit W_aux, described as (panels, depth, pairs of columns) of int16."""
    PANELS: tl.constexpr = descriptor.block_shape[0]
    DEPTH: tl.constexpr = descriptor.block_shape[1]
    PAIRS: tl.constexpr = descriptor.block_shape[2]
    panels = descriptor.load([column // (2 * PAIRS), k, 0])
    pairs = panels.permute((0, 2, 1)).reshape([PANELS * PAIRS, DEPTH])
    tile = tl.join(pairs.to(tl.int8), (pairs >> 8).to(tl.int8)).to(dtype, bitcast=True)
    tile = tile.permute((0, 2, 1)).reshape([PANELS * PAIRS * 2, DEPTH])
    return _relabel(tile, RELABEL, 2).to(tl.float32)


@triton.jit
def combined_matmul_tma_kernel(
    left_ptr,
    weight_ptr,
    aux_ptr,
    cross_modal_scale_ptr,
    aux_weight_scale_ptr,
    bias_ptr,
    output_ptr,
    rows,
    columns,
    depth,
    stride_left,
    stride_weight,
    stride_aux,
    stride_aux_model,
    BLOCK_M: tl.constexpr,
    MORE_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH_FIRST: tl.constexpr,
    MODELS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Store left (weight + sum of scale * aux) + bias in tiles of BLOCK_M + MORE_M rows, one accumulator for each.

    left is (rows, depth); weight and each aux lie in memory as (columns, depth), or (depth, columns) if DEPTH_FIRST. A
    quantised aux has a scale for each row in memory; if DEPTH_FIRST, columns is a multiple of PANEL.
    MORE_M is 0 or less than BLOCK_M. The output is stored in pieces, to save shared memory for stages.
    """
    PAIRED: tl.constexpr = DEPTH_FIRST and aux_weight_scale_ptr is not None
    RELABEL: tl.constexpr = 8 if PAIRED else 0 if DEPTH_FIRST else 4
    PIECE: tl.constexpr = BLOCK_M // 2
    left = tl.make_tensor_descriptor(left_ptr, [rows, depth], [stride_left, 1], [BLOCK_M, BLOCK_K])
    output = tl.make_tensor_descriptor(output_ptr, [rows, columns], [columns, 1], [PIECE, BLOCK_N])
    if MORE_M > 0:
        more_left = tl.make_tensor_descriptor(left_ptr, [rows, depth], [stride_left, 1], [MORE_M, BLOCK_K])
        more_output = tl.make_tensor_descriptor(output_ptr, [rows, columns], [columns, 1], [MORE_M, BLOCK_N])
        more = tl.zeros((BLOCK_N, MORE_M), tl.float32)
    if DEPTH_FIRST:
        weight = tl.make_tensor_descriptor(weight_ptr, [depth, columns], [stride_weight, 1], [BLOCK_K, BLOCK_N])
    else:
        weight = tl.make_tensor_descriptor(weight_ptr, [columns, depth], [stride_weight, 1], [BLOCK_N, BLOCK_K])
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M + MORE_M, BLOCK_N, GROUP)
    row = tile_row * (BLOCK_M + MORE_M)
    column = tile_column * BLOCK_N
    auxes = tl.tuple([])
    scales = tl.tuple([])
    aux_weight_scales = tl.tuple([])
    for model in tl.static_range(MODELS):
        matrix_ptr = aux_ptr + offset_of(model, stride_aux_model)
        # A (1, 1) block: a scalar would send the combined tile through shared memory.
        scale = tl.load(cross_modal_scale_ptr + model + tl.zeros((1, 1), tl.int32)).to(tl.float32)
        if PAIRED:
            # In pairs, because warps load 16-bit elements transposed, but not 8-bit ones; in panels, because Triton 3.8
            # gives half of a tile's columns to each of two warp groups and cuts between panels, but not swizzled rows.
            panels = tl.make_tensor_descriptor(
                matrix_ptr.to(tl.pointer_type(tl.int16)),
                [columns // PANEL, depth, PANEL // 2],
                [PANEL // 2, stride_aux // 2, 1],
                [BLOCK_N // PANEL, BLOCK_K, PANEL // 2],
            )
            auxes += (panels,)
            aux_weight_scales += (
                tl.make_tensor_descriptor(aux_weight_scale_ptr + offset_of(model, depth), [depth], [1], [BLOCK_K]),
            )
        elif DEPTH_FIRST:
            auxes += (tl.make_tensor_descriptor(matrix_ptr, [depth, columns], [stride_aux, 1], [BLOCK_K, BLOCK_N]),)
        else:
            auxes += (tl.make_tensor_descriptor(matrix_ptr, [columns, depth], [stride_aux, 1], [BLOCK_N, BLOCK_K]),)
            if aux_weight_scale_ptr is not None:
                scale *= _column_of(aux_weight_scale_ptr + offset_of(model, columns), column, columns, BLOCK_N, RELABEL)
        scales += (scale,)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, depth, BLOCK_K, warp_specialize=True):
        combined = _tile_of_weight(weight, k, column, DEPTH_FIRST, RELABEL)
        for model in tl.static_range(MODELS):
            step_scale = scales[model]
            if PAIRED:
                # Not `[None, :]`: specialisation passes a load on in one layout, and the products would need two.
                step_scale *= aux_weight_scales[model].load([k]).reshape([1, BLOCK_K])
                combined += step_scale * _tile_of_pairs(auxes[model], k, column, aux_ptr.dtype.element_ty, RELABEL)
            else:
                combined += step_scale * _tile_of_weight(auxes[model], k, column, DEPTH_FIRST, RELABEL)
        combined = combined.to(left.dtype)
        accumulator = tl.dot(combined, left.load([row, k]).T, accumulator)
        if MORE_M > 0:
            more = tl.dot(combined, more_left.load([row + BLOCK_M, k]).T, more)
    if bias_ptr is not None:
        bias = _column_of(bias_ptr, column, columns, BLOCK_N, RELABEL)
        accumulator += bias
        if MORE_M > 0:
            more += bias
    first, second = _halves(accumulator)
    _store_transposed(output, first, row, column, RELABEL)
    _store_transposed(output, second, row + PIECE, column, RELABEL)
    if MORE_M > 0:
        _store_transposed(more_output, more, row + BLOCK_M, column, RELABEL)


@triton.jit
def grad_parameters_tma_kernel(
    grad_ptr,
    x_ptr,
    aux_ptr,
    cross_modal_scale_ptr,
    aux_weight_scale_ptr,
    grad_weight_ptr,
    grad_aux_ptr,
    partial_ptr,
    rows,
    columns,
    depth,
    share,
    stride_grad,
    stride_x,
    stride_aux,
    stride_aux_model,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    MODELS: tl.constexpr,
):
    """Compute the same as `grad_parameters_kernel` by TMA; a quantised aux has a scale for each row.

    Tiles are stored in quarters: 64-bit addresses and a whole tile beside the accumulator would not fit into registers.
    """
    begin, end = 0, depth
    if share is not None:
        begin = tl.program_id(1) * share
        end = begin + share  # past the depth all is zero
        grad_weight_ptr += offset_of(tl.program_id(1), offset_of(rows, columns))
    PIECE: tl.constexpr = BLOCK_N // 4
    grad = tl.make_tensor_descriptor(grad_ptr, [depth, rows], [stride_grad, 1], [BLOCK_K, BLOCK_M])
    x = tl.make_tensor_descriptor(x_ptr, [depth, columns], [stride_x, 1], [BLOCK_K, BLOCK_N])
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_row * BLOCK_M
    column = tile_column * BLOCK_N
    column_tiles = (columns - 1) // BLOCK_N + 1
    auxes = tl.tuple([])
    partials = tl.tuple([])
    scales = tl.tuple([])
    grad_auxes = tl.tuple([])
    for model in tl.static_range(MODELS):
        if partial_ptr is not None:
            matrix_ptr = aux_ptr + offset_of(model, stride_aux_model)
            auxes += (tl.make_tensor_descriptor(matrix_ptr, [rows, columns], [stride_aux, 1], [BLOCK_M, PIECE]),)
            # Descriptors skip rows past the matrix, where infinity times zero is NaN; masks fail (see `_column_of`).
            sums_ptr = partial_ptr + offset_of(model * column_tiles + tile_column, rows)
            partials += (tl.make_tensor_descriptor(sums_ptr, [rows], [1], [BLOCK_M]),)
        if grad_aux_ptr is not None:
            matrix_ptr = grad_aux_ptr + offset_of(model, offset_of(rows, columns))
            grad_auxes += (tl.make_tensor_descriptor(matrix_ptr, [rows, columns], [columns, 1], [BLOCK_M, PIECE]),)
            scales += (tl.load(cross_modal_scale_ptr + model).to(tl.float32),)
    if grad_weight_ptr is not None:
        grad_weight = tl.make_tensor_descriptor(grad_weight_ptr, [rows, columns], [columns, 1], [BLOCK_M, PIECE])
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(begin, end, BLOCK_K, warp_specialize=True):
        grad_tile = grad.load([k, row])
        accumulator = tl.dot(grad_tile.T, x.load([k, column]), accumulator)
    left, right = _halves(accumulator)
    pieces = _folded_halves(left) + _folded_halves(right)
    for model in tl.static_range(MODELS):
        if partial_ptr is not None:
            sums = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(4):
            piece = pieces[i].reshape([BLOCK_M, PIECE])
            piece_column = column + i * PIECE
            if partial_ptr is not None:
                product = piece * auxes[model].load([row, piece_column]).to(tl.float32)
                inside = (piece_column + tl.arange(0, PIECE) < columns)[None, :]
                sums += tl.sum(tl.where(inside, product, 0.0), 1)
            if grad_aux_ptr is not None:
                grad_auxes[model].store([row, piece_column], (scales[model] * piece).to(grad_aux_ptr.dtype.element_ty))
            if grad_weight_ptr is not None and model == 0:
                grad_weight.store([row, piece_column], piece.to(grad_weight.dtype))
        if partial_ptr is not None:
            if aux_weight_scale_ptr is not None:
                scales_ptr = aux_weight_scale_ptr + offset_of(model, rows)
                sums *= tl.make_tensor_descriptor(scales_ptr, [rows], [1], [BLOCK_M]).load([row])
            partials[model].store([row], sums)


class CombinedTile(NamedTuple):
    """The output tile is (BLOCK_M + MORE_M) x BLOCK_N, a k-step's depth BLOCK_K."""

    BLOCK_M: int
    MORE_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Its rows and columns, and a k-step's depth."""
        return self.BLOCK_M + self.MORE_M, self.BLOCK_N, self.BLOCK_K


def combined_matmul(
    tile: CombinedTile, left: Tensor, combined: CombinedWeight, bias: Tensor | None, output: Tensor
) -> None:
    """Write a `CombinedMatmul` to a contiguous output. A quantised W_aux has a scale for each row in memory."""
    (rows, depth), columns = left.shape, output.shape[1]
    (weight, aux_weight, *_), (depth_first, outer) = combined, combined.layout
    strides = weight.stride(outer), aux_weight.stride(outer), model_stride(aux_weight)
    provide_descriptor_memory()
    launch(
        combined_matmul_tma_kernel,
        (count_tiles(tile, rows, columns), 1),
        (left, *combined[:4], bias, output),
        (rows, columns, depth, left.stride(0), *strides),
        tile,
        GROUP=GROUP,
        DEPTH_FIRST=depth_first,
        MODELS=combined.models,
        # 32 means fewer rows to copy; 64 would make two panels per tile, and Triton does not divide a dimension of 2.
        PANEL=32 if columns % 32 == 0 else 16,
        **TMA_OPTIONS,
    )


def grad_parameters(
    tile: GradTile, product: GradParameters, grad_weight: Tensor | None, grad_aux: Tensor | None, splits: int = 1
) -> Tensor | None:
    """Write those weight gradients that are not None; return the scale's, if wanted, as partial sums (n, ...).

    With several splits only grad_weight is written: (splits, N, K) in float32, one for each share of the tokens.
    """
    grad_output, x, aux_weight, cross_modal_scale, *_, aux_weight_scale = product
    (rows, columns), depth, models = product.shape, len(x), product.models
    column_tiles = ceil_div(columns, tile.BLOCK_N)
    partial = None if aux_weight is None else x.new_empty(models, column_tiles * rows, dtype=torch.float32)
    aux_strides = (0, 0) if aux_weight is None else (aux_weight.stride(-2), model_stride(aux_weight))
    share = share_of(depth, splits, tile.BLOCK_K)
    provide_descriptor_memory()
    launch(
        grad_parameters_tma_kernel,
        (count_tiles(tile, rows, columns), splits),
        (grad_output, x, aux_weight, cross_modal_scale, aux_weight_scale, grad_weight, grad_aux, partial),
        (rows, columns, depth, share, grad_output.stride(0), x.stride(0), *aux_strides),
        tile,
        GROUP=GROUP,
        MODELS=models,
        **TMA_OPTIONS,
    )
    return partial


def provide_descriptor_memory() -> None:
    """Give Triton, for this thread, an allocator of the descriptors' memory on the current device."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
