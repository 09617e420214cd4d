"""The GEMM with the combined weight for sm_90, scheduled by hand in Gluon, Triton's language below its tiles.

As in `gemm_tma.py` it is computed transposed, `Y^T = (W + s * W_aux) X^T`, with the combined tile in registers as the A
operand of wgmma. A block stays on its SM and computes tile after tile. One warp loads by TMA; two groups of four warps
have half of a tile's columns each: while the tensor cores multiply a step, the group combines the next one's operand.
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
from .gemm_tma import provide_descriptor_memory
from .launches import launch
from .tiles import GROUP, count_tiles
from .versions import TMA_OPTIONS

_GROUPS = gl.constexpr(2)
_COLUMNS = gl.constexpr(64)
"""A group's half of a tile has as many columns as wgmma has rows."""
_UNROLL = gl.constexpr(4)
"""All products are waited for every so many steps: none may be in flight where a loop turns."""


@gluon.jit
def _tile(index, rows, columns, BLOCK_ROWS: gl.constexpr, BLOCK_COLUMNS: gl.constexpr, GROUP: gl.constexpr):
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
def _load_tiles(
    matrices,
    stages,
    barriers,
    sizes,
    GROUP: gl.constexpr,
    DEPTH_FIRST: gl.constexpr,
):
    """Fill stage after stage, each as soon as both groups have read it. All that is past a matrix is zero."""
    left, more_left, weight, aux = matrices
    lefts, more_lefts, weights, auxes = stages
    filled, emptied = barriers
    rows, columns, depth = sizes
    STAGES: gl.constexpr = lefts.shape[0]
    BLOCK_M: gl.constexpr = left.block_type.shape[0]
    MORE_M: gl.constexpr = more_left.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight.block_type.shape[1 if DEPTH_FIRST else 0]
    BLOCK_K: gl.constexpr = left.block_type.shape[1]
    BYTES: gl.constexpr = left.nbytes_per_cta + more_left.nbytes_per_cta + weight.nbytes_per_cta + aux.nbytes_per_cta
    steps = _UNROLL * gl.cdiv(depth, _UNROLL * BLOCK_K)
    tiles = gl.cdiv(rows, BLOCK_M + MORE_M) * gl.cdiv(columns, BLOCK_N)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile(index, rows, columns, BLOCK_M + MORE_M, BLOCK_N, GROUP)
        for k in range(0, steps * BLOCK_K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(emptied.index(stage), ((step // STAGES) & 1) ^ 1)
            barrier = filled.index(stage)
            mbarrier.expect(barrier, BYTES)
            if DEPTH_FIRST:
                tma.async_load(weight, [k, column], barrier, weights.index(stage))
                tma.async_load(aux, [k, column], barrier, auxes.index(stage))
            else:
                tma.async_load(weight, [column, k], barrier, weights.index(stage))
                tma.async_load(aux, [column, k], barrier, auxes.index(stage))
            tma.async_load(left, [row, k], barrier, lefts.index(stage))
            tma.async_load(more_left, [row + BLOCK_M, k], barrier, more_lefts.index(stage))
            step += 1


@gluon.jit
def _operand(tile, group: gl.constexpr, OPERAND: gl.constexpr, RELABEL: gl.constexpr, DEPTH_FIRST: gl.constexpr):
    """Read a group's half of a tile of W or W_aux, in float32."""
    if DEPTH_FIRST:
        values = tile.slice(group * _COLUMNS, _COLUMNS, 1).permute((1, 0)).load(OPERAND)
    elif RELABEL:
        values = _relabel(tile.slice(group * _COLUMNS, _COLUMNS, 0).load(_to_be_relabelled(tile.shape[1])), 4, 2)
        values = gl.convert_layout(values, OPERAND, assert_trivial=True)
    else:
        values = tile.slice(group * _COLUMNS, _COLUMNS, 0).load(OPERAND)
    return values.to(gl.float32)


@gluon.jit
def _combine(
    weights,
    auxes,
    filled,
    step,
    scale,
    group: gl.constexpr,
    dtype: gl.constexpr,
    OPERAND: gl.constexpr,
    RELABEL: gl.constexpr,
    DEPTH_FIRST: gl.constexpr,
):
    """Make a step's operand, once its tiles are there."""
    STAGES: gl.constexpr = weights.shape[0]
    mbarrier.wait(filled.index(step % STAGES), (step // STAGES) & 1)
    weight = _operand(weights.index(step % STAGES), group, OPERAND, RELABEL, DEPTH_FIRST)
    aux = _operand(auxes.index(step % STAGES), group, OPERAND, RELABEL, DEPTH_FIRST)
    return (weight + scale * aux).to(dtype)


@gluon.jit
def _multiply(combined, lefts, more_lefts, step, accumulator, more, MORE_OPERAND: gl.constexpr):
    """Begin a step's products."""
    stage = step % lefts.shape[0]
    accumulator = warpgroup_mma(combined, lefts.index(stage).permute((1, 0)), accumulator, is_async=True)
    combined = gl.convert_layout(combined, MORE_OPERAND, assert_trivial=True)
    more = warpgroup_mma(combined, more_lefts.index(stage).permute((1, 0)), more, is_async=True)
    return accumulator, more


@gluon.jit
def _wait_for(step, accumulator, more, emptied, LATER: gl.constexpr):
    """Wait for a step's products, LATER steps having been begun since; then its stage may be filled again."""
    accumulator, more = warpgroup_mma_wait(num_outstanding=2 * LATER, deps=(accumulator, more))
    mbarrier.arrive(emptied.index(step % emptied.shape[0]), count=1)
    return accumulator, more


@gluon.jit
def _store(descriptor, tile, buffer, row, column, RELABEL: gl.constexpr):
    """Store a tile through shared memory, once the store before has left it; this one is waited for later."""
    tile = tile.to(descriptor.dtype)
    if RELABEL:
        tile = _relabel(tile, 2, 4)
    tma.store_wait(0)
    gl.barrier()
    buffer.permute((1, 0)).store(tile)
    fence_async_shared()
    gl.barrier()
    tma.async_store(descriptor, [row, column], buffer)


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
    lefts, more_lefts, weights, auxes = stages
    filled, emptied = barriers
    output, more_output = outputs
    cross_modal_scale_ptr, aux_weight_scale_ptr, bias_ptr = vectors
    rows, columns, depth = sizes
    BLOCK_M: gl.constexpr = lefts.shape[1]
    MORE_M: gl.constexpr = more_lefts.shape[1]
    BLOCK_K: gl.constexpr = lefts.shape[2]
    RELABEL: gl.constexpr = weights.dtype.primitive_bitwidth == 32 and not DEPTH_FIRST
    dtype: gl.constexpr = lefts.dtype
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    MORE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    MORE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MORE_LAYOUT, 2)
    buffer = buffers.index(group)
    more_buffer = buffer.slice(0, MORE_M, 0)
    turns = gl.cdiv(depth, _UNROLL * BLOCK_K)
    tiles = gl.cdiv(rows, BLOCK_M + MORE_M) * gl.cdiv(columns, _GROUPS * _COLUMNS)
    model_scale = gl.load(cross_modal_scale_ptr).to(gl.float32)
    step = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile(index, rows, columns, BLOCK_M + MORE_M, _GROUPS * _COLUMNS, GROUP)
        column += group * _COLUMNS
        scale = model_scale
        if aux_weight_scale_ptr is not None:
            scale *= _column_of(aux_weight_scale_ptr, column, columns, OPERAND, RELABEL)
        accumulator = gl.zeros((_COLUMNS, BLOCK_M), gl.float32, LAYOUT)
        more = gl.zeros((_COLUMNS, MORE_M), gl.float32, MORE_LAYOUT)
        if bias_ptr is not None:  # here, where registers are free
            accumulator += _column_of(bias_ptr, column, columns, LAYOUT, RELABEL)
            more += _column_of(bias_ptr, column, columns, MORE_LAYOUT, RELABEL)
        combined = _combine(weights, auxes, filled, step, scale, group, dtype, OPERAND, RELABEL, DEPTH_FIRST)
        for _ in range(turns - 1):
            for i in gl.static_range(_UNROLL):
                accumulator, more = _multiply(combined, lefts, more_lefts, step, accumulator, more, MORE_OPERAND)
                if i > 0:
                    accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 1)
                step += 1
                combined = _combine(weights, auxes, filled, step, scale, group, dtype, OPERAND, RELABEL, DEPTH_FIRST)
            accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 0)
        for i in gl.static_range(_UNROLL):
            accumulator, more = _multiply(combined, lefts, more_lefts, step, accumulator, more, MORE_OPERAND)
            if i > 0:
                accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 1)
            step += 1
            if i < _UNROLL - 1:
                combined = _combine(weights, auxes, filled, step, scale, group, dtype, OPERAND, RELABEL, DEPTH_FIRST)
        accumulator, more = _wait_for(step - 1, accumulator, more, emptied, 0)
        first, second = accumulator.reshape([_COLUMNS, 2, BLOCK_M // 2]).permute((0, 2, 1)).split()
        _store(output, first, buffer, row, column, RELABEL)
        _store(output, second, buffer, row + BLOCK_M // 2, column, RELABEL)
        _store(more_output, more, more_buffer, row + BLOCK_M, column, RELABEL)
    tma.store_wait(0)


@gluon.jit
def _describe(matrix_ptr, rows, columns, stride, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], matrix_ptr.dtype.element_ty)
    return tma.make_tensor_descriptor(matrix_ptr, [rows, columns], [stride, 1], [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def _buffers(descriptor, COUNT: gl.constexpr):
    ROWS: gl.constexpr = descriptor.block_type.shape[0]
    COLUMNS: gl.constexpr = descriptor.block_type.shape[1]
    return gl.allocate_shared_memory(descriptor.dtype, [COUNT, ROWS, COLUMNS], descriptor.layout)


@gluon.jit
def combined_matmul_hopper_kernel(
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
    BLOCK_N: gl.constexpr = _GROUPS * _COLUMNS
    left = _describe(left_ptr, rows, depth, stride_left, BLOCK_M, BLOCK_K)
    more_left = _describe(left_ptr, rows, depth, stride_left, MORE_M, BLOCK_K)
    if DEPTH_FIRST:
        weight = _describe(weight_ptr, depth, columns, stride_weight, BLOCK_K, BLOCK_N)
        aux = _describe(aux_ptr, depth, columns, stride_aux, BLOCK_K, BLOCK_N)
    else:
        weight = _describe(weight_ptr, columns, depth, stride_weight, BLOCK_N, BLOCK_K)
        aux = _describe(aux_ptr, columns, depth, stride_aux, BLOCK_N, BLOCK_K)
    output = _describe(output_ptr, rows, columns, columns, BLOCK_M // 2, _COLUMNS)
    more_output = _describe(output_ptr, rows, columns, columns, MORE_M, _COLUMNS)
    lefts, more_lefts = _buffers(left, STAGES), _buffers(more_left, STAGES)
    weights, auxes = _buffers(weight, STAGES), _buffers(aux, STAGES)
    buffers = _buffers(output, _GROUPS)
    filled = mbarrier.allocate_mbarrier(batch=STAGES)
    emptied = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=_GROUPS)
    stages, barriers, sizes = (lefts, more_lefts, weights, auxes), (filled, emptied), (rows, columns, depth)
    matrices, outputs = (left, more_left, weight, aux), (output, more_output)
    vectors = cross_modal_scale_ptr, aux_weight_scale_ptr, bias_ptr
    gl.warp_specialize(
        [
            (_compute_tiles, (0, stages, barriers, buffers, outputs, vectors, sizes, GROUP, DEPTH_FIRST)),
            (_compute_tiles, (1, stages, barriers, buffers, outputs, vectors, sizes, GROUP, DEPTH_FIRST)),
            (_load_tiles, (matrices, stages, barriers, sizes, GROUP, DEPTH_FIRST)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


class CombinedTile(NamedTuple):
    """The output tile is (BLOCK_M + MORE_M) x 128, a step's depth BLOCK_K."""

    BLOCK_M: int
    MORE_M: int
    BLOCK_K: int
    STAGES: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Its rows and columns, and a step's depth."""
        return self.BLOCK_M + self.MORE_M, _GROUPS.value * _COLUMNS.value, self.BLOCK_K


def combined_matmul(
    tile: CombinedTile, left: Tensor, combined: CombinedWeight, bias: Tensor | None, output: Tensor
) -> None:
    """Write a `CombinedMatmul` to output, contiguous. A quantised W_aux has a scale for each row in memory."""
    (rows, depth), columns, (depth_first, outer) = left.shape, output.shape[1], combined.layout
    provide_descriptor_memory()
    launch(
        combined_matmul_hopper_kernel,
        (min(count_tiles(tile, rows, columns), multiprocessors(left.device)), 1),
        (left, *combined[:4], bias, output),
        (rows, columns, depth, left.stride(0), combined.weight.stride(outer), combined.aux_weight.stride(outer)),
        tile,
        GROUP=GROUP,
        DEPTH_FIRST=depth_first,
        num_warps=4,
        **TMA_OPTIONS,
    )
