"""The number, order and offsets of tiles, for all kernels."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

GROUP = 8
"""How many rows of tiles are computed together: their operands stay in L2."""


class GradTile(NamedTuple):
    """The output tile of a gradient kernel is BLOCK_M x BLOCK_N, a k-step's depth BLOCK_K."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Its rows and columns, and a k-step's depth."""
        return self.BLOCK_M, self.BLOCK_N, self.BLOCK_K


def ceil_div(size: int, block: int) -> int:
    """Divide and round up; `triton.cdiv` takes microseconds on the host."""
    return -(-size // block)


def count_tiles(tile: Any, rows: int, columns: int) -> int:
    """Return how many tiles cover a result."""
    height, width, _ = tile.shape
    return ceil_div(rows, height) * ceil_div(columns, width)


def share_of(depth: int, splits: int, block: int) -> int | None:
    """Return how much of the depth each split reduces, in whole k-steps of `block`; None if there is one split."""
    return None if splits == 1 else ceil_div(ceil_div(depth, block), splits) * block


@triton.jit
def tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Return this program's tile, in bands of GROUP rows of tiles so that neighbours in time share operands in L2."""
    # As `tl.cdiv`, without its overflow close to 2**31.
    row_tiles = (rows - 1) // BLOCK_ROWS + 1
    per_band = GROUP * ((columns - 1) // BLOCK_COLUMNS + 1)
    program = tl.program_id(0)
    first_row = program // per_band * GROUP
    band_rows = min(row_tiles - first_row, GROUP)
    return first_row + program % per_band % band_rows, program % per_band // band_rows


@triton.jit
def offset_of(index, stride):
    """Return the 64-bit offset of an auxiliary model's matrix, or of a row, from its index and stride."""
    # Not `index.to`: an argument that is 1 is a Python integer here.
    return tl.cast(index, tl.int64) * stride
