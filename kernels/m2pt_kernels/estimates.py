"""Estimate what a plan takes, to choose one before anything was timed: waves of tiles, steps, and what is fixed.

Constants are in clocks of one SM at 1.755 GHz. Those of kernels are fitted to an H200's times of every plan of the
linear layers of ViT-B, L and g (`benchmarks/results/products-h200.json`), and stand for other GPUs until these are
measured; `warmup` replaces estimates by times.
"""

from typing import Any, NamedTuple

from .tiles import ceil_div, count_tiles


class Speed(NamedTuple):
    """Says how a kernel spends its time, in clocks.

    Attributes:
        wait: of a step, in which a block waits. Blocks that share an SM do so together.
        tile: of a tile, besides its steps.
        overlaps: whether the tensor cores multiply while the next step's operand is combined.
    """

    wait: int
    tile: int
    overlaps: bool = False


TILE = 2300
"""Clocks of a tile before its first step and after its last."""
DESCRIPTORS = 13500
"""Clocks in which a block of `gemm_tma` makes descriptors of its operands, before all else."""
SPEEDS = {
    **dict.fromkeys(("pointers", "pointers, gradients"), Speed(wait=356, tile=TILE)),
    "tma": Speed(wait=80, tile=TILE + DESCRIPTORS),
    "tma, gradients": Speed(wait=95, tile=TILE + DESCRIPTORS),
    "hopper, gradients": Speed(wait=95, tile=TILE),
    "hopper": Speed(wait=150, tile=TILE, overlaps=True),
}
"""By the kernels of a plan."""
FLOPS = {
    "ampere": 2048,
    "ampere_small": 1024,
    "hopper": 4096,
    "blackwell": 8192,
    "thor": 8192,
    "cdna": 2048,
    "rdna": 512,
    "portable": 1024,
}
"""Dense half-precision FLOP a clock and SM, by the makers' data sheets; of portable kernels, assumed."""
SLOWDOWN = {"half": 1, "tf32": 2, "ieee": 16}
"""By so much are float32 operands multiplied slower."""
COMBINE = 0.115
"""Clocks for an entry of an auxiliary model that is added to W."""
SHARED_RATE = 128
"""Bytes a clock through shared memory."""
SPLIT_RATE = 16
"""Bytes a clock and SM of the splits, which are written and read."""
LAUNCH = 3500
"""Clocks of the launch that adds splits."""

MOST_SPLITS = 16
MOST_SPLIT_BYTES = 2**26
"""Splits that are chosen take no more memory than this while gradients are computed."""


class Work(NamedTuple):
    """Describes a product and the GPU.

    Attributes:
        rows, columns, depth: of the result, and of what is summed up for an entry of it.
        models: auxiliary models whose weights are combined with W; 0 in gradients.
        weight_bytes: of an entry of W and of each W_aux together.
        flops: a clock and SM, of operands of this dtype.
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
    """Return about how long a kernel takes in such tiles: whole, and in as many splits as are the fastest.

    Only the reduction of gradients is split.
    """
    height, width, depth = tile.shape
    speed = SPEEDS[by if work.models else f"{by}, gradients"]
    multiply = 2 * height * width * depth / work.flops
    combine = COMBINE * work.models * width * depth
    if speed.overlaps:
        # wgmma reads the rows once for each half of the columns; what is copied in is written and read once.
        shared = (3 * height * 2 + 2 * width * work.weight_bytes) * depth / SHARED_RATE
        busy = max(multiply, combine, shared)
    else:
        busy = multiply + combine
    # About as many blocks share an SM as registers hold; one of those that read by TMA.
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
