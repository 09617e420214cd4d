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
        launch: of a block that computes several tiles, besides these.
        overlaps: whether the tensor cores multiply while the next step's operand is combined.
    """

    wait: int
    tile: int
    launch: int = 0
    overlaps: bool = False


TILE = 2300
"""Clocks of a tile before its first step and after its last."""
DESCRIPTORS = 13500
"""Clocks in which a block makes descriptors of its operands, which a kernel that reads by TMA begins with."""
SPEEDS = {
    "pointers": Speed(wait=356, tile=TILE),
    "tma": Speed(wait=80, tile=TILE + DESCRIPTORS),
    "tma, gradients": Speed(wait=65, tile=TILE + DESCRIPTORS),
    "hopper": Speed(wait=175, tile=TILE, launch=DESCRIPTORS, overlaps=True),
}
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
SLOWER = {"half": 1, "tf32": 2, "ieee": 16}
"""By so much are float32 operands multiplied slower."""
COMBINE = 0.115
"""Clocks for an entry of an auxiliary model that is added to W."""
SHARED_BYTES = 128
"""Bytes a clock through shared memory."""
SPLIT_BYTES = 16
"""Bytes a clock and SM of the splits, which are written and read: between the rates of L2 and HBM, assumed."""
LAUNCH = 5000
"""Clocks of the launch that adds splits, assumed."""

MOST_SPLITS = 16
MOST_SPLIT_BYTES = 2**26
"""Partial sums take no more memory than this while gradients are computed."""


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


def clocks(by: str, tile: Any, work: Work, splits: int = 1) -> float:
    """Return about how long a kernel takes in such tiles."""
    height, width, depth = tile.shape
    speed = SPEEDS["tma, gradients" if by == "tma" and not work.models else by]
    multiply = 2 * height * width * depth / work.flops
    combine = COMBINE * work.models * width * depth
    if speed.overlaps:
        # wgmma reads the rows once for each half of the columns; what is copied in is written and read once.
        shared = (3 * height * 2 + 2 * width * work.weight_bytes) * depth / SHARED_BYTES
        busy = max(multiply, combine, shared)
    else:
        busy = multiply + combine
    waves = ceil_div(count_tiles(tile, work.rows, work.columns) * splits, work.multiprocessors)
    steps = ceil_div(ceil_div(work.depth, depth), splits)
    total = speed.launch + waves * (steps * busy + speed.tile) + ceil_div(waves, _blocks(by, tile)) * steps * speed.wait
    if splits > 1:
        # Each is written and read, in float32.
        total += LAUNCH + 8 * splits * work.rows * work.columns / (SPLIT_BYTES * work.multiprocessors)
    return total


def _blocks(by: str, tile: Any) -> int:
    """Return how many blocks share an SM: one by TMA, or else about what registers hold."""
    height, width, _ = tile.shape
    return 1 if by != "pointers" else min(4, max(1, 2**17 // (height * width * tile.num_warps)))


def best_splits(by: str, tile: Any, work: Work) -> int:
    """Return among how many blocks the reduction of gradients is split best, each with steps of its own."""
    steps = ceil_div(work.depth, tile.BLOCK_K)
    most = min(MOST_SPLITS, MOST_SPLIT_BYTES // max(4 * work.rows * work.columns, 1), steps)
    return min(range(1, most + 1), key=lambda splits: clocks(by, tile, work, splits), default=1)
