"""A cost model of a product on a GPU: ours from the terms of its compiled loop, and cuBLAS's plain GEMM.

A launch takes as long as its busiest SM or as HBM. An SM takes waves times k-steps times clocks per k-step. Constants
called fitted were fitted to the times of an H200 in results/products-h200.json, at a nominal 1755 MHz, and are assumed
for every other GPU. `m2pt_kernels.estimates`, which chooses plans, has fewer terms because it compiles nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

from triton.backends.compiler import GPUTarget

from m2pt_kernels.estimates import DESCRIPTORS, FLOPS, SPEEDS, TILE
from m2pt_kernels.plans import architecture
from m2pt_kernels.tiles import ceil_div


class Gpu(NamedTuple):
    """A GPU by its data sheet: SMs, boost clock in MHz, HBM in GB/s."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    hbm: float


A100 = Gpu("A100", 80, 108, 1410, 2039)
H100 = Gpu("H100", 90, 132, 1755, 3350)
H200 = H100._replace(name="H200", hbm=4800)
B200 = Gpu("B200", 100, 148, 1850, 8000)

TENSOR_FLOPS = {arch: FLOPS[architecture(GPUTarget("cuda", arch, 32))] for arch in (80, 86, 90, 100, 120)}
"""Dense half-precision FLOP per clock and SM (float32 accumulation), from the data sheets."""

LAUNCH = 5.0
"""Microseconds of a launch between two events, with a cold L2 cache; fitted."""
NEXT_LAUNCH = 3.0
"""Microseconds to start a second kernel, which adds the splits; fitted."""


class Costs(NamedTuple):
    """Clocks that nothing hides: exposed ones of a k-step, a tile's epilogue, a block's prologue.

    Attributes:
        overlap: whether a k-step's combine overlaps with its MMA; "-" if nothing is combined.
    """

    exposed: float
    epilogue: float
    prologue: float = 0
    overlap: str = "-"


COSTS = {
    "hopper": Costs(SPEEDS["hopper"].wait, TILE, 0, "yes"),
    # Each of a k-step's products is waited for.
    "tma, sm_90": Costs(145, TILE, DESCRIPTORS, "no"),
    # The warps that combine wait for the one buffer of tensor memory that MMA reads. Assumed.
    "tma, sm_100": Costs(175, TILE, DESCRIPTORS, "partly"),
    # The combined tile goes through shared memory.
    "pointers, sm_90": Costs(790, TILE, 0, "no"),
    # The same warps combine and multiply, and others fill the gaps. Assumed.
    "pointers": Costs(205, TILE, 0, "partly"),
    # Less than in `estimates`, which leaves out what wgmma reads from shared memory.
    "tma, gradients": Costs(20, TILE, DESCRIPTORS),
    "hopper, gradients": Costs(5, TILE),
    "pointers, gradients": Costs(205, TILE),
}
"""By a plan's kernels and, where it matters, architecture; fitted unless it says assumed."""


def costs_of(by: str, product: str, arch: int) -> Costs:
    """Return the costs of a product, given by its name, as a plan computes it."""
    if product == "grad_parameters":
        return COSTS[f"{by}, gradients"]
    return COSTS.get(f"{by}, sm_{arch}") or COSTS[by]


PLAIN_COSTS = Costs(119, 4200)
"""Of cuBLAS's plain GEMM; fitted."""
PLAIN_TILES = {
    80: ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64)),
    90: ((128, 256), (256, 128), (128, 192), (192, 128), (128, 128), (192, 192)),
    100: ((128, 256), (256, 128), (128, 192), (192, 128), (128, 128), (256, 256)),
}
"""It uses the best of these, and clusters of SMs share what they read from L2; assumed."""
PLAIN_DEPTH = {80: 32, 90: 64, 100: 64}
PLAIN_SPLITS, LEAST_STEPS = (1, 2, 3, 4, 5, 6, 8, 12, 16), 16
"""It may split the reduction into so many parts, of at least so many k-steps each; assumed."""
ROWS_OF_MMA = {90: 64, 100: 128}
"""wgmma and tcgen05 read an operand in shared memory once for every so many rows of the other."""


class Launch(NamedTuple):
    """What is computed: the tiles, the k-steps of each, and the clocks of an SM that a k-step takes of every pipe.

    Attributes:
        hbm_bytes: the operands and the output, once.
        products: MMAs per k-step, each with its own accumulator.
        splits: parts of the reduction, each computed by its own block.
        partial_bytes: what splits write and a second launch reads.
        resident: blocks that an SM holds at a time.
    """

    tiles: int
    steps: int
    terms: Mapping[str, float]
    hbm_bytes: int
    products: int = 1
    splits: int = 1
    partial_bytes: int = 0
    resident: int = 1


class Estimate(NamedTuple):
    """Microseconds: of every pipe as if it worked alone, exposed, fixed, and in total."""

    waves: int
    terms: dict[str, float]
    total: float


def estimate(launch: Launch, costs: Costs, gpu: Gpu) -> Estimate:
    """Estimate the time of a launch, plus that of the launch that adds the splits of its reduction."""
    blocks = launch.tiles * launch.splits
    waves = ceil_div(blocks, gpu.multiprocessors)
    steps = waves * ceil_div(launch.steps, launch.splits)
    busiest, exposed = max(launch.terms.values()), costs.exposed / min(launch.resident, waves)
    clocks = busiest + exposed
    if costs.overlap == "no":
        clocks = max(busiest, launch.terms["tensor"] + launch.terms["issue"] + exposed * launch.products)
    fixed = waves * (costs.prologue + costs.epilogue)
    adding = 0.0 if launch.splits == 1 else NEXT_LAUNCH + launch.partial_bytes / gpu.hbm / 1e3
    hbm = launch.hbm_bytes / gpu.hbm / 1e3
    terms = {name: steps * term / gpu.clock for name, term in launch.terms.items()}
    terms |= {
        "HBM": hbm,
        "exposed": steps * (clocks - busiest) / gpu.clock,
        "fixed": LAUNCH + fixed / gpu.clock + adding,
    }
    return Estimate(waves, terms, LAUNCH + max(hbm, (steps * clocks + fixed) / gpu.clock) + adding)


def plain(rows: int, columns: int, depth: int, gpu: Gpu) -> float:
    """Estimate the microseconds of cuBLAS's plain half-precision GEMM with its best tile, with or without splits."""
    step = PLAIN_DEPTH[gpu.arch]
    steps = ceil_div(depth, step)
    return min(
        estimate(
            Launch(
                tiles=ceil_div(rows, height) * ceil_div(columns, width),
                steps=steps,
                terms={
                    "tensor": 2 * height * width * step / TENSOR_FLOPS[gpu.arch],
                    "shared": 2 * step * (height + width + _reads(height, width, gpu.arch)) / 128,
                },
                hbm_bytes=2 * (rows * depth + depth * columns + rows * columns),
                splits=splits,
                partial_bytes=partial_bytes(rows, columns, splits),
            ),
            PLAIN_COSTS,
            gpu,
        ).total
        for height, width in PLAIN_TILES[gpu.arch]
        for splits in PLAIN_SPLITS
        if splits == 1 or steps // splits >= LEAST_STEPS
    )


def partial_bytes(rows: int, columns: int, splits: int) -> int:
    """Count the float32 bytes that splits of a reduction write and that are read to add them."""
    return 0 if splits == 1 else 8 * splits * rows * columns


def _reads(rows: int, columns: int, arch: int) -> int:
    """Count the rows and columns, with repeats, that a tile's MMAs read from shared memory per index of the depth."""
    if arch not in ROWS_OF_MMA:  # warps read both operands of their 64 x 64
        return ceil_div(columns, 64) * rows + ceil_div(rows, 64) * columns
    return rows + ceil_div(rows, ROWS_OF_MMA[arch]) * columns
