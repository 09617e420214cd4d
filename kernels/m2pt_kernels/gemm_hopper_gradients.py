"""The persistent GEMM of the parameters' gradients for sm_90, `G = dY^T x`, scheduled by hand like `gemm_hopper.py`.

One warp loads by TMA; two groups of four warps compute half of a tile's rows each, and start a k-step's products before
the previous ones are done. A tile is stored in pieces of its columns while the first k-steps of the next one arrive.
"""

import torch
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

from .devices import multiprocessors
from .gemm_hopper import allocate_barriers, async_load, async_store, tile_at
from .launches import launch
from .products import GradParameters
from .tensor_maps import map_of_several, tensor_map
from .tiles import GROUP, GradTile, ceil_div, count_tiles, share_of
from .versions import TMA_OPTIONS

# Another name before Triton 3.9.
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

_GROUPS = gl.constexpr(2)
_ROWS = gl.constexpr(64)
"""A group's half of a tile has as many rows as wgmma."""
_SLOTS = gl.constexpr(2)
"""How many pieces of the result, and of W_aux, a group has memory for; it uses the slots in turn."""


@gluon.jit
def _tiles(sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return how many tiles a split has."""
    rows, columns, _, _ = sizes
    return gl.cdiv(rows, BLOCK_M) * gl.cdiv(columns, BLOCK_N)


@gluon.jit
def _place(index, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr):
    """Return where a tile begins, and which split it belongs to."""
    rows, columns, _, _ = sizes
    tiles = _tiles(sizes, BLOCK_M, BLOCK_N)
    row, column = tile_at(index % tiles, rows, columns, BLOCK_M, BLOCK_N, GROUP)
    return row, column, index // tiles


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """Return the next k-step's stage, and its phase: whether it was used an odd number of times before."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), phase ^ last.to(gl.int32)


@gluon.jit
def _load_tiles(operands, stages, barriers, sizes, GROUP: gl.constexpr):
    """Fill one stage after another, each as soon as both groups have read it. Entries past a matrix are zero."""
    grad, x = operands
    grads, xs = stages
    filled, emptied = barriers
    _, _, share, splits = sizes
    STAGES: gl.constexpr = grads.shape[0]
    BLOCK_K: gl.constexpr = grads.shape[1]
    BLOCK_M: gl.constexpr = grads.shape[2]
    BLOCK_N: gl.constexpr = xs.shape[2]
    stage, phase = 0, 0
    for index in range(gl.program_id(0), splits * _tiles(sizes, BLOCK_M, BLOCK_N), gl.num_programs(0)):
        row, column, split = _place(index, sizes, BLOCK_M, BLOCK_N, GROUP)
        for k in range(split * share, (split + 1) * share, BLOCK_K):
            mbarrier.wait(emptied.index(stage), phase ^ 1)
            barrier = filled.index(stage)
            mbarrier.expect(barrier, grad.nbytes_per_cta + x.nbytes_per_cta)
            async_load(grad, [k, row], barrier, grads.index(stage))
            async_load(x, [k, column], barrier, xs.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _release_before(stage, emptied, wanted=True):
    """Release the stage before this one to be filled again."""
    STAGES: gl.constexpr = emptied.shape[0]
    mbarrier.arrive(emptied.index(gl.where(stage == 0, STAGES, stage) - 1), count=1, pred=wanted)


@gluon.jit
def _multiply(group: gl.constexpr, stages, barriers, steps, stage, phase, accumulator):
    """Run a tile's k-loop into a group's accumulator."""
    grads, xs = stages
    filled, emptied = barriers
    for step in range(steps):
        mbarrier.wait(filled.index(stage), phase)
        grad = grads.index(stage).slice(group * _ROWS, _ROWS, 1).permute((1, 0))
        accumulator = warpgroup_mma(grad, xs.index(stage), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(num_outstanding=1, deps=(accumulator,))
        _release_before(stage, emptied, step > 0)
        stage, phase = _next(stage, phase, grads.shape[0])
    accumulator = warpgroup_mma_wait(num_outstanding=0, deps=(accumulator,))
    _release_before(stage, emptied)
    return accumulator, stage, phase


@gluon.jit
def _split(tile, LAYOUT: gl.constexpr):
    """Return the pieces of a tile; every thread keeps its elements."""
    if tile.shape[1] == LAYOUT.instr_shape[1]:
        return (gl.convert_layout(tile, LAYOUT, assert_trivial=True),)
    else:
        left, right = tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute((0, 2, 1)).split()
        return _split(left, LAYOUT) + _split(right, LAYOUT)


@gluon.jit
def _fetch(group: gl.constexpr, turn: gl.constexpr, factors, place, MODELS: gl.constexpr, COUNT: gl.constexpr):
    """Start loading a tile's next piece of W_aux, if there is one; Triton waits until the slot has been read."""
    aux, auxes, arrived = factors
    row, column, _ = place
    if turn < MODELS * COUNT:
        barrier = arrived.index(group * _SLOTS + turn % _SLOTS)
        mbarrier.expect(barrier, aux.nbytes_per_cta)
        coordinates = [turn // COUNT, row, column + turn % COUNT * aux.block_type.shape[2]]
        async_load(aux, coordinates, barrier, auxes.index(group * _SLOTS + turn % _SLOTS))


@gluon.jit
def _take(group: gl.constexpr, turn: gl.constexpr, factors, phase, LAYOUT: gl.constexpr):
    """Read a piece of W_aux in float32 once it has arrived."""
    _, auxes, arrived = factors
    slot: gl.constexpr = group * _SLOTS + turn % _SLOTS
    mbarrier.wait(arrived.index(slot), phase ^ (turn // _SLOTS & 1))
    return auxes.index(slot).reshape([auxes.shape[2], auxes.shape[3]]).load(LAYOUT).to(gl.float32)


@gluon.constexpr_function
def _blocks(count, descriptor):
    """Return the shape of several blocks."""
    return [count, *descriptor.block_type.shape]


@gluon.jit
def _store(group: gl.constexpr, turn, descriptor, piece, buffers, matrix, row, column):
    """Store a piece through shared memory once the store before last has left it; this one is waited for later."""
    FIT: gl.constexpr = buffers.dtype.primitive_bitwidth // descriptor.dtype.primitive_bitwidth
    buffer = buffers.index(group * _SLOTS + turn % _SLOTS)
    buffer = _reinterpret(buffer, descriptor.dtype, _blocks(FIT, descriptor), descriptor.layout).index(0)
    tma.store_wait(_SLOTS - 1)
    gl.barrier()
    buffer.reshape(piece.shape).store(piece.to(descriptor.dtype))
    fence_async_shared()
    gl.barrier()
    async_store(descriptor, [matrix, row, column], buffer)


@gluon.jit
def _row_of(matrix, length, row, LAYOUT: gl.constexpr):
    """Return the 64-bit offsets of a group's entries in one of several vectors, and whether they exist."""
    entry = row + gl.arange(0, _ROWS, LAYOUT)
    return gl.to_tensor(matrix).to(gl.int64) * length + entry, entry < length


@gluon.jit
def _compute_tiles(
    group: gl.constexpr,
    stages,
    barriers,
    factors,
    outputs,
    vectors,
    sizes,
    GROUP: gl.constexpr,
    MODELS: gl.constexpr,
    PIECE: gl.constexpr,
):
    """Compute a group's half of every tile, and store the wanted results."""
    grads, xs = stages
    grad_weight, grad_aux, buffers = outputs
    cross_modal_scale_ptr, aux_weight_scale_ptr, partial_ptr = vectors
    rows, columns, share, splits = sizes
    BLOCK_M: gl.constexpr = grads.shape[2]
    BLOCK_N: gl.constexpr = xs.shape[2]
    COUNT: gl.constexpr = BLOCK_N // PIECE
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    scales = gl.tuple([])
    if grad_aux is not None:
        for model in gl.static_range(MODELS):
            scales += (gl.load(cross_modal_scale_ptr + model).to(gl.float32),)
    steps = gl.cdiv(share, grads.shape[1])
    stage, phase, aux_phase = 0, 0, 0
    for index in range(gl.program_id(0), splits * _tiles(sizes, BLOCK_M, BLOCK_N), gl.num_programs(0)):
        row, column, split = _place(index, sizes, BLOCK_M, BLOCK_N, GROUP)
        row += group * _ROWS
        place = row, column, split
        if partial_ptr is not None:
            for turn in gl.static_range(_SLOTS):
                _fetch(group, turn, factors, place, MODELS, COUNT)
        accumulator = gl.zeros((_ROWS, BLOCK_N), gl.float32, TILE)
        accumulator, stage, phase = _multiply(group, stages, barriers, steps, stage, phase, accumulator)
        pieces = _split(accumulator, LAYOUT)
        stores = 0
        for model in gl.static_range(MODELS):
            if partial_ptr is not None:
                sums = gl.zeros((_ROWS,), gl.float32, ROW_LAYOUT)
            for i in gl.static_range(COUNT):
                piece_column = column + i * PIECE
                if partial_ptr is not None:
                    product = pieces[i] * _take(group, model * COUNT + i, factors, aux_phase, LAYOUT)
                    _fetch(group, model * COUNT + i + _SLOTS, factors, place, MODELS, COUNT)
                    inside = piece_column + gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT)) < columns
                    sums += gl.sum(gl.where(inside[None, :], product, 0.0), 1)
                if grad_aux is not None:
                    _store(group, stores, grad_aux, scales[model] * pieces[i], buffers, model, row, piece_column)
                    stores += 1
                if grad_weight is not None and model == 0:
                    _store(group, stores, grad_weight, pieces[i], buffers, split, row, piece_column)
                    stores += 1
            if partial_ptr is not None:
                if aux_weight_scale_ptr is not None:
                    offsets, inside = _row_of(model, rows, row, ROW_LAYOUT)
                    sums *= gl.load(aux_weight_scale_ptr + offsets, inside, other=0.0)
                column_tile = model * gl.cdiv(columns, BLOCK_N) + column // BLOCK_N
                offsets, inside = _row_of(column_tile, rows, row, ROW_LAYOUT)
                gl.store(partial_ptr + offsets, sums, inside)
        aux_phase ^= MODELS * COUNT // _SLOTS & 1
    tma.store_wait(0)


@gluon.jit
def _buffers(descriptor, COUNT: gl.constexpr):
    return gl.allocate_shared_memory(descriptor.dtype, _blocks(COUNT, descriptor), descriptor.layout)


@gluon.jit
def _buffers_of_either(first, second, COUNT: gl.constexpr):
    """Return buffers that fit the blocks of both descriptors; either may be None."""
    if first is None:
        return None if second is None else _buffers(second, COUNT)
    elif second is not None and second.nbytes_per_cta > first.nbytes_per_cta:
        return _buffers(second, COUNT)
    else:
        return _buffers(first, COUNT)


@gluon.jit
def _barriers(BATCH: gl.constexpr, COUNT: gl.constexpr):
    barriers = allocate_barriers(batch=BATCH)
    for i in gl.static_range(BATCH):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def grad_parameters_hopper_kernel(
    grad_map,
    x_map,
    aux_map,
    grad_weight_map,
    grad_aux_map,
    cross_modal_scale_ptr,
    aux_weight_scale_ptr,
    partial_ptr,
    rows,
    columns,
    share,
    splits,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    MODELS: gl.constexpr,
    PIECE: gl.constexpr,
):
    """Compute the same as `gemm_tma.grad_parameters_tma_kernel`, with tensor maps made on the host.

    aux and grad_aux are (models, rows, columns), grad_weight is (splits, rows, columns): all in blocks of PIECE
    columns, at most half of a tile's. share is the depth of a split.
    """
    grads = gl.allocate_shared_memory(grad_map.dtype, [STAGES, BLOCK_K, BLOCK_M], grad_map.layout)
    xs = gl.allocate_shared_memory(x_map.dtype, [STAGES, BLOCK_K, BLOCK_N], x_map.layout)
    operands, stages = (grad_map, x_map), (grads, xs)
    barriers = _barriers(STAGES, 1), _barriers(STAGES, _GROUPS)
    factors = None, None, None
    if aux_map is not None:
        factors = aux_map, _buffers(aux_map, _GROUPS * _SLOTS), _barriers(_GROUPS * _SLOTS, 1)
    outputs = grad_weight_map, grad_aux_map, _buffers_of_either(grad_weight_map, grad_aux_map, _GROUPS * _SLOTS)
    vectors = cross_modal_scale_ptr, aux_weight_scale_ptr, partial_ptr
    sizes = rows, columns, share, splits
    gl.warp_specialize(
        [
            (_compute_tiles, (0, stages, barriers, factors, outputs, vectors, sizes, GROUP, MODELS, PIECE)),
            (_compute_tiles, (1, stages, barriers, factors, outputs, vectors, sizes, GROUP, MODELS, PIECE)),
            (_load_tiles, (operands, stages, barriers, sizes, GROUP)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


def grad_parameters(
    tile: GradTile, product: GradParameters, grad_weight: Tensor | None, grad_aux: Tensor | None, splits: int = 1
) -> Tensor | None:
    """Write those weight gradients that are not None; return the scale's, if wanted, as partial sums (n, ...).

    With several splits only grad_weight is written: (splits, N, K) in float32, one for each share of the tokens.

    Raises:
        NotCompiledError: the kernel does not compile.
    """
    grad_output, x, aux_weight, cross_modal_scale, *_, aux_weight_scale = product
    (rows, columns), depth, models = product.shape, len(x), product.models
    column_tiles = ceil_div(columns, tile.BLOCK_N)
    partial = None if aux_weight is None else x.new_empty(models, column_tiles * rows, dtype=torch.float32)
    in_pieces = aux_weight, grad_weight, grad_aux
    piece = 128 // max(2, *(matrices.itemsize for matrices in in_pieces if matrices is not None))
    launch(
        grad_parameters_hopper_kernel,
        (min(count_tiles(tile, rows, columns) * splits, multiprocessors(x.device)), 1),
        (cross_modal_scale, aux_weight_scale, partial),
        (rows, columns, share_of(depth, splits, tile.BLOCK_K) or depth, splits),
        tile,
        (
            tensor_map(grad_output, (depth, rows), grad_output.stride(0), (tile.BLOCK_K, tile.BLOCK_M)),
            tensor_map(x, (depth, columns), x.stride(0), (tile.BLOCK_K, tile.BLOCK_N)),
            *(matrices if matrices is None else map_of_several(matrices, _ROWS.value, piece) for matrices in in_pieces),
        ),
        STAGES=tile.num_stages,
        GROUP=GROUP,
        MODELS=models,
        PIECE=piece,
        **TMA_OPTIONS,
    )
    return partial
