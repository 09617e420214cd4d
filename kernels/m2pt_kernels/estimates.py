"""A cost model to choose plans before anything is timed: waves of tiles, k-steps and fixed costs.

Constants are in clocks of one SM at 1.755 GHz. Those of kernels are fitted to an H200's times of every plan of the
linear layers of ViT-B, L and g (`benchmarks/results/products-h200.json`) and used for other GPUs until those are
measured; `warmup` replaces estimates with times.
"""

from typing import Any, NamedTuple

from .tiles import ceil_div, count_tiles


class Speed(NamedTuple):
    """How a kernel spends its time, in clocks.

    Attributes:
        wait: per k-step, in which a block waits. Blocks that share an SM wait together.
        tile: per tile, besides its k-steps.
        overlaps: whether the tensor cores multiply while the next k-step's operand is combined.
    """

    wait: int
    tile: int
    overlaps: bool = False


TILE = 2300
"""Clocks of a tile before its first k-step and after its last."""
DESCRIPTORS = 13500
"""Clocks that a block of `gemm_tma` first spends on making its operands' descriptors."""
SPEEDS = {
    **dict.fromkeys(("pointers", "pointers, gradients"), Speed(wait=356, tile=TILE)),
    "tma": Speed(wait=80, tile=TILE + DESCRIPTORS),
    "tma, gradients": Speed(wait=95, tile=TILE + DESCRIPTORS),
    "hopper, gradients": Speed(wait=95, tile=TILE),
    "hopper": Speed(wait=150, tile=TILE, overlaps=True),
}
"""By a plan's kernels."""
FLOPS: dict[str, float] = {
    "ampere": 2048,
    "ampere_small": 1024,
    "hopper": 4096,
    "blackwell": 8192,
    "thor": 8192,
    "cdna": 2048,
    "rdna": 512,
    "portable": 1024,
}
"""Dense half-precision FLOP per clock and SM, from the makers' data sheets; for portable kernels, assumed."""
SLOWDOWN = {"half": 1, "tf32": 2, "ieee": 16}
"""How many times slower float32 operands are multiplied."""
COMBINE = 0.115
"""Clocks to add an entry of an auxiliary model to W."""
SHARED_RATE = 128
"""Bytes per clock through shared memory."""
SPLIT_RATE = 16
"""Bytes per clock and SM at which splits are written and read."""
LAUNCH = 3500
"""Clocks of the launch that adds splits."""

MOST_SPLITS = 16
MOST_SPLIT_BYTES = 2**26
"""The most memory that chosen splits take while gradients are computed."""


class Work(NamedTuple):
    """A product and the GPU.

    Attributes:
        rows, columns, depth: of the result, and of the sum that makes an entry of it.
        models: auxiliary models whose weights are combined with W; 0 for gradients.
        weight_bytes: of an entry of W and of each W_aux together.
        flops: per clock and SM, for operands of this dtype.
        multiprocessors: SMs of the GPU.
    """

    rows: int
    columns: int
    depth: int
    models: int
    weight_bytes: int
    flops: float
    multiprocessors: int


def clocks(by: str, tile: Any, work: Work) -> dict[int, float]:
    """Estimate a kernel's clocks with a tile, by number of splits: for 1, and for the fastest number.

    Only the reduction of gradients is split.
    """
    height, width, depth = tile.shape
    speed = SPEEDS[by if work.models else f"{by}, gradients"]
    multiply = 2 * height * width * depth / work.flops
    combine = COMBINE * work.models * width * depth
    if speed.overlaps:
        # wgmma reads the rows once for each half of the columns; copied data is written and read once.
        shared = (3 * height * 2 + 2 * width * work.weight_bytes) * depth / SHARED_RATE
        busy = max(multiply, combine, shared)
    else:
        busy = multiply + combine
    # About as many blocks share an SM as its registers hold; one, if they read by TMA.
    resident = 1 if by != "pointers" else min(4, max(1, 2**17 // (height * width * tile.num_warps)))
    tiles, all_steps = count_tiles(tile, work.rows, work.columns), ceil_div(work.depth, depth)
    split_bytes = 4 * work.rows * work.columns
    most = 1 if work.models else min(MOST_SPLITS, MOST_SPLIT_BYTES // max(split_bytes, 1), all_steps)
    found = {}
    for splits in range(1, max(most, 1) + 1):
        waves, steps = ceil_div(tiles * splits, work.multiprocessors), ceil_div(all_steps, splits)
        adding = LAUNCH + 2 * splits * split_bytes / (SPLIT_RATE * work.multiprocessors) if splits > 1 else 0
        waiting = ceil_div(waves, resident) * steps * speed.wait
        found[splits] = waves * (steps * busy + speed.tile) + waiting + adding
    return {splits: found[splits] for splits in {1, min(found, key=found.__getitem__)}}
