"""The persistent GEMM with the combined weight for sm_90, scheduled by hand in Gluon, Triton's lower-level language.

As in `gemm_tma.py` it is computed transposed, `Y^T = (W + s * W_aux) X^T`, with the combined tile in registers as
wgmma's A operand. One warp loads by TMA; two groups of four warps compute half of a tile's columns each. While the
tensor cores multiply a k-step, the group combines the operand of the next one.
"""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .combined import CombinedWeight
from .devices import multiprocessors
from .launches import launch
from .tensor_maps import tensor_map
from .tiles import GROUP, count_tiles
from .versions import TMA_OPTIONS

# Other names before Triton 3.8.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
allocate_barriers = mbarrier.allocate_mbarrier

_GROUPS = gl.constexpr(2)
_COLUMNS = gl.constexpr(64)
"""A group's half of a tile has as many columns as wgmma has rows."""
_UNROLL = gl.constexpr(4)
"""Every so many k-steps all products are waited for: none may be in flight at the end of a loop iteration."""


@gluon.jit
def tile_at(index, rows, columns, BLOCK_ROWS: gl.constexpr, BLOCK_COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """Return where a tile begins, in bands of GROUP rows of tiles, as `tiles.tile_of_program` does."""
    row_tiles = (rows - 1) // BLOCK_ROWS + 1
    per_band = GROUP * ((columns - 1) // BLOCK_COLUMNS + 1)
    first = index // per_band * GROUP
    band = min(row_tiles - first, GROUP)
    return (first + index % per_band % band) * BLOCK_ROWS, index % per_band // band * BLOCK_COLUMNS


@gluon.jit
def _relabel(tile, OUTER: gl.constexpr, INNER: gl.constexpr):
    """Permute every 8 rows, as `gemm_tma` does, so that lanes read float32 without bank conflicts."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    rows = tile.reshape([ROWS // 8, OUTER, INNER, COLUMNS])
    return rows.permute((0, 2, 1, 3)).reshape([ROWS, COLUMNS])


@gluon.constexpr_function
def _to_be_relabelled(depth):
    """Return the layout of a group's operand that `_relabel` by (4, 2) turns into wgmma's."""
    steps = [[0, 16 << i] for i in range((depth // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8], *steps],
        lane_bases=[[0, 2], [0, 4], [2, 0], [4, 0], [1, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[_COLUMNS.value, depth],
    )


@gluon.jit
def _column_of(vector_ptr, column, columns, layout: gl.constexpr, RELABEL: gl.constexpr):
    """Load a group's entries of a vector as a column, in float32."""
    entry = gl.arange(0, _COLUMNS, gl.SliceLayout(1, layout))
    if RELABEL:
        entry = entry // 8 * 8 + entry % 4 * 2 + entry % 8 // 4
    entry += column
    return gl.load(vector_ptr + entry, entry < columns, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def _load_tiles(maps, stages, barriers, sizes, GROUP: gl.constexpr, DEPTH_FIRST: gl.constexpr):
    """Fill one stage after another, each as soon as both groups have read it. Entries past a matrix are zero."""
    left, more_left, weight, aux = maps
    lefts, more_lefts, weights, auxes = stages
    filled, emptied = barriers
    rows, columns, depth = sizes
    STAGES: gl.constexpr = lefts.shape[0]
    BLOCK_M: gl.constexpr = lefts.shape[1]
    MORE_M: gl.constexpr = more_lefts.shape[1]
    BLOCK_K: gl.constexpr = lefts.shape[2]
    steps = _UNROLL * gl.cdiv(depth, _UNROLL * BLOCK_K)
    tiles = gl.cdiv(rows, BLOCK_M + MORE_M) * gl.cdiv(columns, _GROUPS * _COLUMNS)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = tile_at(index, rows, columns, BLOCK_M + MORE_M, _GROUPS * _COLUMNS, GROUP)
        for k in range(0, steps * BLOCK_K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(emptied.index(stage), ((step // STAGES) & 1) ^ 1)
            barrier = filled.index(stage)
            LEFT_BYTES: gl.constexpr = left.nbytes_per_cta + more_left.nbytes_per_cta
            mbarrier.expect(barrier, LEFT_BYTES + weight.nbytes_per_cta + aux.nbytes_per_cta)
            async_load(weight, [k, column] if DEPTH_FIRST else [column, k], barrier, weights.index(stage))
            async_load(aux, [k, column] if DEPTH_FIRST else [column, k], barrier, auxes.index(stage))
            async_load(left, [row, k], barrier, lefts.index(stage))
            async_load(more_left, [row + BLOCK_M, k], barrier, more_lefts.index(stage))
            step += 1


@gluon.jit
def _read(tile, group: gl.constexpr, LAYOUT: gl.constexpr, DEPTH_FIRST: gl.constexpr):
    """Read a group's half of a tile of W or W_aux from shared memory."""
    if DEPTH_FIRST:
        return tile.slice(group * _COLUMNS, _COLUMNS, 1).permute((1, 0)).load(LAYOUT)
    else:
        return tile.slice(group * _COLUMNS, _COLUMNS, 0).load(LAYOUT)


@gluon.jit
def _combine(
    stages,
    filled,
    step,
    scale,
    group: gl.constexpr,
    LAYOUT: gl.constexpr,
    OPERAND: gl.constexpr,
    DEPTH_FIRST: gl.constexpr,
):
    """Combine a k-step's operand once its tiles have arrived."""
    lefts, _, weights, auxes = stages
    stage = step % auxes.shape[0]
    mbarrier.wait(filled.index(stage), (step // auxes.shape[0]) & 1)
    weight = _read(weights.index(stage), group, LAYOUT, DEPTH_FIRST)
    aux = _read(auxes.index(stage), group, LAYOUT, DEPTH_FIRST)
    if LAYOUT != OPERAND:
        weight = gl.convert_layout(_relabel(weight, 4, 2), OPERAND, assert_trivial=True)
        aux = gl.convert_layout(_relabel(aux, 4, 2), OPERAND, assert_trivial=True)
    return (weight.to(gl.float32) + scale * aux.to(gl.float32)).to(lefts.dtype)


@gluon.jit
def _multiply(combined, lefts, more_lefts, step, accumulator, more, MORE_OPERAND: gl.constexpr):
    """Start a k-step's products."""
    stage = step % lefts.shape[0]
    accumulator = warpgroup_mma(combined, lefts.index(stage).permute((1, 0)), accumulator, is_async=True)
    combined = gl.convert_layout(combined, MORE_OPERAND, assert_trivial=True)
    more = warpgroup_mma(combined, more_lefts.index(stage).permute((1, 0)), more, is_async=True)
    return accumulator, more


@gluon.jit
def _wait_for(step, accumulator, more, emptied, LATER: gl.constexpr):
    """Wait for a k-step's products, with LATER k-steps started since, and release its stage to be filled again."""
    accumulator, more = warpgroup_mma_wait(num_outstanding=2 * LATER, deps=(accumulator, more))
    mbarrier.arrive(emptied.index(step % emptied.shape[0]), count=1)
    return accumulator, more


@gluon.jit
def _store_tile(map, tile, buffer, row, column, RELABEL: gl.constexpr):
    """Store a tile through shared memory once the previous store has left it; this store is waited for later."""
    tile = tile.to(map.dtype)
    if RELABEL:
        tile = _relabel(tile, 2, 4)
    tma.store_wait(0)
    gl.barrier()
    buffer.permute((1, 0)).store(tile)
    fence_async_shared()
    gl.barrier()
    async_store(map, [row, column], buffer)


@gluon.jit
def _compute_tiles(
    group: gl.constexpr,
    stages,
    barriers,
    buffers,
    outputs,
    vectors,
    sizes,
    GROUP: gl.constexpr,
    DEPTH_FIRST: gl.constexpr,
):
    """Combine, multiply and store a group's half of every tile."""
    lefts, more_lefts, weights, _auxes = stages
    filled, emptied = barriers
    output, more_output = outputs
    cross_modal_scale_ptr, aux_weight_scale_ptr, bias_ptr = vectors
    rows, columns, depth = sizes
    BLOCK_M: gl.constexpr = lefts.shape[1]
    MORE_M: gl.constexpr = more_lefts.shape[1]
    BLOCK_K: gl.constexpr = lefts.shape[2]
    RELABEL: gl.constexpr = weights.dtype.primitive_bitwidth == 32 and not DEPTH_FIRST
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    MORE_PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    MORE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MORE_PRODUCT, 2)
    LAYOUT: gl.constexpr = _to_be_relabelled(BLOCK_K) if RELABEL else OPERAND
    buffer = buffers.index(group)
    more_buffer = buffer.slice(0, MORE_M, 0)
    turns = gl.cdiv(depth, _UNROLL * BLOCK_K)
    tiles = gl.cdiv(rows, BLOCK_M + MORE_M) * gl.cdiv(columns, _GROUPS * _COLUMNS)
    model_scale = gl.load(cross_modal_scale_ptr).to(gl.float32)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = tile_at(index, rows, columns, BLOCK_M + MORE_M, _GROUPS * _COLUMNS, GROUP)
        column += group * _COLUMNS
        scale = model_scale
        if aux_weight_scale_ptr is not None:
            scale *= _column_of(aux_weight_scale_ptr, column, columns, OPERAND, RELABEL)
        accumulator = gl.zeros((_COLUMNS, BLOCK_M), gl.float32, PRODUCT)
        more = gl.zeros((_COLUMNS, MORE_M), gl.float32, MORE_PRODUCT)
        if bias_ptr is not None:  # here, where registers are free
            accumulator += _column_of(bias_ptr, column, columns, PRODUCT, RELABEL)
            more += _column_of(bias_ptr, column, columns, MORE_PRODUCT, RELABEL)
        combined = _combine(stages, filled, step, scale, group, LAYOUT, OPERAND, DEPTH_FIRST)
        for _ in range(turns - 1):
            for i in gl.static_range(_UNROLL):
                accumulator, more = _multiply(combined, lefts, more_lefts, step, accumulator, more, MORE_OPERAND)
                if i > 0:
                    accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 1)
                step += 1
                combined = _combine(stages, filled, step, scale, group, LAYOUT, OPERAND, DEPTH_FIRST)
            accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 0)
        for i in gl.static_range(_UNROLL):
            accumulator, more = _multiply(combined, lefts, more_lefts, step, accumulator, more, MORE_OPERAND)
            if i > 0:
                accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 1)
            step += 1
            if i < _UNROLL - 1:
                combined = _combine(stages, filled, step, scale, group, LAYOUT, OPERAND, DEPTH_FIRST)
        accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 0)
        first, second = accumulator.reshape([_COLUMNS, 2, BLOCK_M // 2]).permute((0, 2, 1)).split()
        _store_tile(output, first, buffer, row, column, RELABEL)
        _store_tile(output, second, buffer, row + BLOCK_M // 2, column, RELABEL)
        _store_tile(more_output, more, more_buffer, row + BLOCK_M, column, RELABEL)
    tma.store_wait(0)


@gluon.jit
def combined_matmul_hopper_kernel(
    left_map,
    more_left_map,
    weight_map,
    aux_map,
    output_map,
    more_output_map,
    cross_modal_scale_ptr,
    aux_weight_scale_ptr,
    bias_ptr,
    rows,
    columns,
    depth,
    BLOCK_M: gl.constexpr,
    MORE_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    DEPTH_FIRST: gl.constexpr,
):
    """Store left (weight + scale * aux) + bias in tiles of BLOCK_M + MORE_M rows and 128 columns.

    left is (rows, depth); weight and aux lie in memory as (columns, depth), or (depth, columns) if DEPTH_FIRST. A
    quantised aux is not DEPTH_FIRST, and has a scale for each row in memory.
    """
    WIDTH: gl.constexpr = _GROUPS * _COLUMNS
    TILE: gl.constexpr = [STAGES, BLOCK_K, WIDTH] if DEPTH_FIRST else [STAGES, WIDTH, BLOCK_K]
    lefts = gl.allocate_shared_memory(left_map.dtype, [STAGES, BLOCK_M, BLOCK_K], left_map.layout)
    more_lefts = gl.allocate_shared_memory(left_map.dtype, [STAGES, MORE_M, BLOCK_K], more_left_map.layout)
    auxes = gl.allocate_shared_memory(aux_map.dtype, TILE, aux_map.layout)
    weights = gl.allocate_shared_memory(weight_map.dtype, TILE, weight_map.layout)
    buffers = gl.allocate_shared_memory(output_map.dtype, [_GROUPS, BLOCK_M // 2, _COLUMNS], output_map.layout)
    filled = allocate_barriers(batch=STAGES)
    emptied = allocate_barriers(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=_GROUPS)
    stages, barriers = (lefts, more_lefts, weights, auxes), (filled, emptied)
    sizes = rows, columns, depth
    maps, outputs = (left_map, more_left_map, weight_map, aux_map), (output_map, more_output_map)
    vectors = cross_modal_scale_ptr, aux_weight_scale_ptr, bias_ptr
    gl.warp_specialize(
        [
            (_compute_tiles, (0, stages, barriers, buffers, outputs, vectors, sizes, GROUP, DEPTH_FIRST)),
            (_compute_tiles, (1, stages, barriers, buffers, outputs, vectors, sizes, GROUP, DEPTH_FIRST)),
            (_load_tiles, (maps, stages, barriers, sizes, GROUP, DEPTH_FIRST)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


class CombinedTile(NamedTuple):
    """The output tile is (BLOCK_M + MORE_M) x 128, a k-step's depth BLOCK_K."""

    BLOCK_M: int
    MORE_M: int
    BLOCK_K: int
    STAGES: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Its rows and columns, and a k-step's depth."""
        return self.BLOCK_M + self.MORE_M, _GROUPS.value * _COLUMNS.value, self.BLOCK_K


def combined_matmul(
    tile: CombinedTile, left: Tensor, combined: CombinedWeight, bias: Tensor | None, output: Tensor
) -> None:
    """Write a `CombinedMatmul` to a contiguous output. A quantised W_aux has a scale for each row in memory.

    Raises:
        NotCompiledError: the kernel does not compile.
    """
    (weight, aux_weight, *scales), (rows, depth), columns = combined[:4], left.shape, output.shape[1]
    (depth_first, outer), (_, width, step) = combined.layout, tile.shape
    size, block = ((depth, columns), (step, width)) if depth_first else ((columns, depth), (width, step))
    maps = (
        tensor_map(left, (rows, depth), left.stride(0), (tile.BLOCK_M, step)),
        tensor_map(left, (rows, depth), left.stride(0), (tile.MORE_M, step)),
        tensor_map(weight, size, weight.stride(outer), block),
        tensor_map(aux_weight, size, aux_weight.stride(outer), block),
        tensor_map(output, (rows, columns), columns, (tile.BLOCK_M // 2, _COLUMNS.value)),
        tensor_map(output, (rows, columns), columns, (tile.MORE_M, _COLUMNS.value)),
    )
    launch(
        combined_matmul_hopper_kernel,
        (min(count_tiles(tile, rows, columns), multiprocessors(left.device)), 1),
        (*scales, bias),
        (rows, columns, depth),
        tile,
        maps,
        GROUP=GROUP,
        DEPTH_FIRST=depth_first,
        num_warps=4,
        **TMA_OPTIONS,
    )
