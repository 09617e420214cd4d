"""What the kernels share: which tile a program computes, how int4 is read, how a tile of gradients is written."""

import triton
import triton.language as tl
from torch import Tensor

from .quantization import GROUP_SIZE

GROUP_SIZE = tl.constexpr(GROUP_SIZE)


def aux_strides(aux_weight: Tensor) -> tuple[int, int, int]:
    """From row to row, from column to column, from auxiliary model to auxiliary model."""
    return aux_weight.stride(-2), aux_weight.stride(-1), 0 if aux_weight.dim() == 2 else aux_weight.stride(0)


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program, in bands of GROUP rows of tiles so that neighbours in time share operands in L2."""
    # As `tl.cdiv`, without its overflow close to 2**31.
    row_tiles = (rows - 1) // BLOCK_ROWS + 1
    per_band = GROUP * ((columns - 1) // BLOCK_COLUMNS + 1)
    program = tl.program_id(0)
    first_row = program // per_band * GROUP
    band_rows = min(row_tiles - first_row, GROUP)
    return first_row + program % per_band % band_rows, program % per_band // band_rows


@triton.jit
def indices_inside(tile, size, BLOCK: tl.constexpr):
    """The int64 indices of a tile, in which those past `size` repeat those before: they can be read without a mask."""
    start = tile * BLOCK
    return start.to(tl.int64) + tl.arange(0, BLOCK) % tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def offset_of(index, stride):
    """Where an auxiliary model's matrix, or a row, begins: `stride` elements after the one before, in 64 bits."""
    # Not `index.to`: an argument that is 1 is a Python integer here.
    return tl.cast(index, tl.int64) * stride


@triton.jit
def packed_index(column):
    """Where the int4 entry of a column lies in its row, in bytes."""
    return column // GROUP_SIZE * (GROUP_SIZE // 2) + column % (GROUP_SIZE // 2)


@triton.jit
def unpack(data, column):
    """The int4 entries of the columns that bytes were read for."""
    shift = (column // (GROUP_SIZE // 2) % 2 * 4).to(tl.uint8)
    return ((data >> shift) & 15).to(tl.float32) - 8


@triton.jit
def store_gradients(
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
    MODELS: tl.constexpr,
):
    """Write of a float32 tile of G = grad^T x what has a pointer.

    G to grad_weight, and for each auxiliary model scale * G to grad_aux and <G, aux>, one number per row of the tile,
    to partial. The scales of a quantised aux, if any, are one a row, or one a group of int4.
    """
    ROWS: tl.constexpr = accumulator.shape[0]
    COLUMNS: tl.constexpr = accumulator.shape[1]
    row = tile_row * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    offsets = row[:, None] * columns + column[None, :]
    if partial_ptr is not None:
        PACKED: tl.constexpr = aux_ptr.dtype.element_ty == tl.uint8
        aux_column = packed_index(column) if PACKED else column
        aux_ptrs = aux_ptr + row[:, None] * stride_aux_row + aux_column[None, :] * stride_aux_column
        for model in tl.range(MODELS, num_stages=1):
            aux = tl.load(aux_ptrs + offset_of(model, stride_aux_model), mask, other=0.0)
            if PACKED:
                groups = offset_of(offset_of(model, rows) + row[:, None], columns // GROUP_SIZE)
                aux_scale = tl.load(aux_scale_ptr + groups + column[None, :] // GROUP_SIZE, mask, other=0.0)
                aux = unpack(aux, column[None, :]) * aux_scale
            # Past the matrix the accumulator is infinity times zero where an operand is infinite.
            sums = tl.sum(tl.where(mask, accumulator * aux.to(tl.float32), 0.0), 1)
            if aux_scale_ptr is not None and not PACKED:
                sums *= tl.load(aux_scale_ptr + (offset_of(model, rows) + row), row < rows, other=0.0)
            partial = offset_of(offset_of(model, tl.num_programs(0)) + tl.program_id(0), ROWS)
            tl.store(partial_ptr + partial + tl.arange(0, ROWS), sums)
    if grad_aux_ptr is not None:
        for model in tl.range(MODELS, num_stages=1):
            scale = tl.load(scale_ptr + model).to(tl.float32)
            grad_aux = (scale * accumulator).to(grad_aux_ptr.dtype.element_ty)
            tl.store(grad_aux_ptr + offset_of(model, offset_of(rows, columns)) + offsets, grad_aux, mask=mask)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + offsets, accumulator.to(grad_weight_ptr.dtype.element_ty), mask=mask)
