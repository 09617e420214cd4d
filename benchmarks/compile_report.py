"""What every kernel compiles to, per architecture, for ViT-B's mlp.fc1 at 64 images.

No GPU is needed, and nothing is timed. On sm_90 the first tile of every kernel that reads by TMA is shown beside the
chosen plan. Tensor, shared, float and integer are instructions per warp and k-step, "instructions" all of them, and
"barriers" the waits for other warps or for copies. The columns in clocks are the time of an SM for a k-step of a tile:
tensor cores at their dense peak; an instruction per clock from each of four schedulers; 128 bytes per clock through
shared memory; 64 bytes per clock from L2. Shared memory counts copies into it, reads and writes of warps (from the
SASS, without bank conflicts), and reads of wgmma or tcgen05: an operand in shared memory once for every 64 or 128 rows
of the other, one in registers or tensor memory not at all. "overlap" says whether combining a k-step's operand overlaps
with MMA. The predictions turn this into times of products.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from tqdm import tqdm
from triton.compiler import CompiledKernel

from benchmarks import results
from benchmarks.cost import TENSOR_FLOPS, costs_of
from benchmarks.offline import TARGETS, Resources, compiling_for, resources
from benchmarks.results import Row
from benchmarks.sass import Loop, main_loop
from m2pt_kernels import gemm, plans
from m2pt_kernels.combined import CombinedWeight
from m2pt_kernels.plans import Plan
from m2pt_kernels.products import CombinedMatmul, GradParameters, Product

TOKENS, IN_FEATURES, OUT_FEATURES = 12608, 768, 3072

REGISTERS, SHARED_PER_SM = 65536, {80: 164, 86: 100, 90: 228, 100: 228, 120: 100}
CONSUMER_WARPS = 8
"""Warps of a specialised kernel that compute; the others copy."""

UNROLLED = 4
"""k-steps per loop iteration of the hand-scheduled kernel with the combined weight."""
PIPES = ("tensor", "shared", "float", "integer")
ACTIVATIONS = torch.bfloat16
WEIGHTS = {
    "bf16": (torch.bfloat16, torch.bfloat16, 1),
    "bf16, two W_aux": (torch.bfloat16, torch.bfloat16, 2),
    "bf16, W_aux int8": (torch.bfloat16, torch.int8, 1),
    "fp32, W_aux bf16": (torch.float32, torch.bfloat16, 1),
    "fp32, two W_aux bf16": (torch.float32, torch.bfloat16, 2),
    "fp32, W_aux int8": (torch.float32, torch.int8, 1),
    "fp32": (torch.float32, torch.float32, 1),
}
"""The dtypes of W and W_aux, and how many auxiliary models there are."""


def products(tokens: int, in_features: int, out_features: int, weights: str) -> list[Product]:
    """Return a layer's forward, input gradient and parameter gradients, with W and s trained and W_aux frozen."""
    weight_dtype, aux_dtype, models = WEIGHTS[weights]
    x, grad_output = (torch.empty(tokens, features, dtype=ACTIVATIONS) for features in (in_features, out_features))
    weight = torch.empty(out_features, in_features, dtype=weight_dtype)
    aux_weight = torch.empty(*((models,) if models > 1 else ()), *weight.shape, dtype=aux_dtype)
    aux_weight_scale = torch.empty(out_features, 1) if aux_dtype == torch.int8 else None
    combined = CombinedWeight(weight, aux_weight, torch.empty(models), aux_weight_scale)
    return [
        CombinedMatmul(x, combined._replace(transposed=True), torch.empty(out_features, dtype=weight_dtype)),
        CombinedMatmul(grad_output, combined),
        GradParameters(grad_output, x, aux_weight, None, weight_dtype, None, aux_weight_scale),
    ]


class Terms(NamedTuple):
    """Clocks of one SM that a k-step of a tile takes, by pipe."""

    tensor: float
    shared: float
    L2: float
    issue: float


class Kernel(NamedTuple):
    """What a plan compiled to for an architecture, and what a block copies in per k-step."""

    arch: int | str
    product: str
    by: str
    rows: int
    columns: int
    depth: int
    column_bytes: int
    products: int
    compiled: CompiledKernel
    loop: Loop | None
    resources: Resources

    @property
    def copied(self) -> int:
        return self.depth * (self.rows * ACTIVATIONS.itemsize + self.columns * self.column_bytes)

    @property
    def unrolled(self) -> int:
        """k-steps per loop iteration."""
        return UNROLLED if self.by == "hopper" and self.product != "grad_parameters" else 1

    @property
    def instructions(self) -> dict[str, float]:
        """Per warp and k-step."""
        return {pipe: count / self.unrolled for pipe, count in self.loop.instructions.items()}

    @property
    def barriers(self) -> float:
        """Waits per warp and k-step."""
        return self.loop.barriers / self.unrolled

    @property
    def warps(self) -> int:
        """Per block, including those that specialisation added."""
        return int(re.search(r"\.reqntid (\d+)", self.compiled.asm["ptx"])[1]) // 32

    @property
    def resident(self) -> int:
        """Blocks that an SM holds at a time."""
        by_registers = REGISTERS // (-(-self.resources.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, SHARED_PER_SM[self.arch] * 1024 // (self.resources.shared + 1024))

    @property
    def terms(self) -> Terms:
        consumers = self.warps if self.by == "pointers" else CONSUMER_WARPS
        shared = self.copied + self.loop.shared_bytes / self.unrolled * consumers
        if self.arch == 90:
            shared += self._wgmma_reads()
        if self.arch == 100:
            shared += self._tcgen05_reads()
        return Terms(
            tensor=2 * self.rows * self.columns * self.depth / TENSOR_FLOPS[self.arch],
            shared=shared / 128,
            L2=self.copied / 64,
            issue=sum(self.instructions.values()) * consumers / 4,
        )

    def _wgmma_reads(self) -> int:
        """Bytes of shared memory that two warp groups read as operands, each for half of the tile's first dimension."""
        size = ACTIVATIONS.itemsize * self.depth
        if self.product != "grad_parameters":  # computed transposed
            return 2 * self.rows * size
        return (self.rows + 2 * self.columns) * size

    def _tcgen05_reads(self) -> int:
        """Bytes of shared memory read as operands, for 128 rows at a time of the first, maybe in tensor memory."""
        size = ACTIVATIONS.itemsize * self.depth
        if self.product != "grad_parameters" and self.by == "tma":
            return triton.cdiv(self.columns, 128) * self.rows * size
        return (self.rows + triton.cdiv(self.rows, 128) * self.columns) * size


@cache
def kernel(architecture: str, weights: str, position: int, plan: Plan) -> Kernel:
    """Compile the multiplying kernel of `plan` for `products(...)[position]`, whatever its size."""
    target = TARGETS[architecture]
    product = products(TOKENS, IN_FEATURES, OUT_FEATURES, weights)[position]
    with compiling_for(target) as compiled:
        gemm.compute(plan, product)
    weight_dtype, aux_dtype, models = WEIGHTS[weights]
    combined_bytes = weight_dtype.itemsize + models * aux_dtype.itemsize
    rows, columns, depth = plan.tile.shape
    return Kernel(
        arch=target.arch,
        product=product.name,
        by=plan.by,
        rows=rows,
        columns=columns,
        depth=depth,
        column_bytes=ACTIVATIONS.itemsize if product.name == "grad_parameters" else combined_bytes,
        products=2 if rows > plan.tile.BLOCK_M else 1,
        compiled=compiled[0],
        loop=main_loop(compiled[0]),
        resources=resources(compiled[0]),
    )


def chosen(architecture: str, product: Product, multiprocessors: int = 132) -> Plan:
    """Return the plan that computes a product without tuning, on a GPU with so many SMs."""
    return candidates(architecture, product, multiprocessors)[0]


def candidates(architecture: str, product: Product, multiprocessors: int = 132) -> list[Plan]:
    """Return all plans, the chosen one first."""
    with compiling_for(TARGETS[architecture]), patch.object(plans, "multiprocessors", lambda device: multiprocessors):
        return plans.candidates(product)


def shown(architecture: str, product: Product) -> list[Plan]:
    """Return the chosen plan, and for sm_90 the first of every other kernel that reads by TMA."""
    found = candidates(architecture, product)
    first = {plan.by: plan for plan in reversed(found)}
    others = [first[by] for by in ("hopper", "tma") if by in first and by != found[0].by]
    return [found[0], *(others if architecture == "sm_90" else [])]


def report(architecture: str) -> Iterator[Row]:
    """Yield the rows of one architecture."""
    for weights in WEIGHTS:
        for position, product in enumerate(products(TOKENS, IN_FEATURES, OUT_FEATURES, weights)):
            for plan in shown(architecture, product):
                yield row(architecture, weights, position, product, plan)


def row(architecture: str, weights: str, position: int, product: Product, plan: Plan) -> Row:
    """Show what a plan of `products(...)[position]` compiles to."""
    made = kernel(architecture, weights, position, plan)
    found: Row = {
        "architecture": architecture,
        "weights": weights,
        "product": product.name,
        "plan": str(plan),
        "registers": made.resources.registers,
        "spilled": made.resources.spilled,
        "shared KiB": made.resources.shared / 1024,
        "blocks per SM": "-",
        **dict.fromkeys((*PIPES, "instructions", "barriers"), "-"),
        **{f"{pipe}, clocks": "-" for pipe in Terms._fields},
        "overlap": "-",
    }
    if made.loop is not None:
        found |= {pipe: made.instructions.get(pipe, 0) for pipe in PIPES}
        found |= {"instructions": sum(made.instructions.values()), "barriers": made.barriers}
        found |= {f"{pipe}, clocks": clocks for pipe, clocks in made.terms._asdict().items()}
        found |= {
            "blocks per SM": made.resident,
            "overlap": costs_of(plan.by, product.name, made.arch).overlap,
        }
    return found


def compile_all() -> list[Row]:
    return [row for name in tqdm(TARGETS, desc="compiling") for row in report(name)]


if __name__ == "__main__":
    results.run("compile-report", "offline", compile_all, __doc__)
