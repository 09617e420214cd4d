"""What the kernels share: which tile a program computes, and how a tile of gradients is written."""

import triton
import triton.language as tl


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
):
    """Write of a float32 tile of G = grad^T x what has a pointer.

    G to grad_weight, scale * G to grad_aux, and to partial, one number per row of the tile, <G, aux>.
    """
    ROWS: tl.constexpr = accumulator.shape[0]
    COLUMNS: tl.constexpr = accumulator.shape[1]
    row = tile_row * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS).to(tl.int64)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    offsets = row[:, None] * columns + column[None, :]
    if partial_ptr is not None:
        aux_ptrs = aux_ptr + row[:, None] * stride_aux_row + column[None, :] * stride_aux_column
        products = accumulator * tl.load(aux_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.sum(products, 1))
    if grad_aux_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
        tl.store(grad_aux_ptr + offsets, (scale * accumulator).to(grad_aux_ptr.dtype.element_ty), mask=mask)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + offsets, accumulator.to(grad_weight_ptr.dtype.element_ty), mask=mask)
