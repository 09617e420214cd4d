"""What the kernels share: which tile a program computes, how int4 is read, how a tile of gradients is written."""

import triton
import triton.language as tl

from .quantization import GROUP_SIZE

GROUP_SIZE = tl.constexpr(GROUP_SIZE)


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
    aux_scale_ptr,
):
    """Write of a float32 tile of G = grad^T x what has a pointer.

    G to grad_weight, scale * G to grad_aux, and to partial, one number per row of the tile, <G, aux>. The scales of a
    quantised aux, if any, are one a row, or one a group of int4.
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
        aux = tl.load(
            aux_ptr + row[:, None] * stride_aux_row + aux_column[None, :] * stride_aux_column, mask, other=0.0
        )
        if PACKED:
            group = row[:, None] * (columns // GROUP_SIZE) + column[None, :] // GROUP_SIZE
            aux = unpack(aux, column[None, :]) * tl.load(aux_scale_ptr + group, mask, other=0.0)
        sums = tl.sum(accumulator * aux.to(tl.float32), 1)
        if aux_scale_ptr is not None and not PACKED:
            sums *= tl.load(aux_scale_ptr + row, row < rows, other=0.0)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), sums)
    if grad_aux_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
        tl.store(grad_aux_ptr + offsets, (scale * accumulator).to(grad_aux_ptr.dtype.element_ty), mask=mask)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + offsets, accumulator.to(grad_weight_ptr.dtype.element_ty), mask=mask)
