"""What the compiler made of every kernel, per architecture, beside a plain GEMM.

No GPU is needed and none is timed. "predicted" is the plain GEMM's bound over the kernel's, per FLOP, each bound being
the busiest of these, in clocks of one SM, everything overlapped perfectly: tensor cores at their dense peak; an
instruction a clock from each of four schedulers; 128 bytes a clock through shared memory, counting copies into it, what
warps read and write (from the SASS, without bank conflicts) and what wgmma or tcgen05 reads: an operand in shared
memory once for every 64 or 128 rows of the other, one in registers or tensor memory not at all; 64 bytes a clock from
L2. Launch, prologue, epilogue, waves of tiles, bandwidth of tensor memory, HBM and clock frequency are left out.
Instructions are those of a warp and k-step.
"""

import re
from dataclasses import dataclass

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from benchmarks import results
from benchmarks.offline import TARGETS, compiling_for, resources
from benchmarks.plain_gemm import plain_matmul_kernel, plain_matmul_tma_kernel
from benchmarks.results import Row
from benchmarks.sass import Loop, main_loop
from m2pt_kernels import cross_modal_linear

M, N, K = 12608, 3072, 768
"""ViT-B's mlp.fc1 at 64 images of 197 tokens."""

TENSOR_FLOPS = {80: 2048, 86: 1024, 90: 4096, 100: 8192, 120: 1024}
"""Dense half-precision FLOP a clock and SM (float32 accumulation)."""

REGISTERS, SHARED_PER_SM = 65536, {80: 164, 86: 100, 90: 228, 100: 228, 120: 100}
CONSUMER_WARPS = 8
"""Warps of a specialised kernel that compute; the others copy."""

PLAIN_TILES = {"ampere": (128, 128, 32, 4, 4), 90: (128, 256, 64, 4, 3), 100: (256, 256, 64, 8, 3)}
"""By architecture, if TMA is there; the best found offline."""
COLUMNS_BY_HAND, UNROLLED = 128, 4
"""Of a tile, and steps in a turn of the loop, of the kernel that is scheduled by hand."""
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


@dataclass(frozen=True)
class Product:
    """A compiled kernel with what one k-step of a block copies in: rows and columns of operands, bytes per element."""

    name: str
    weights: str
    compiled: CompiledKernel
    rows: int
    columns: int
    depth: int
    row_bytes: int
    column_bytes: int
    steps: int = 1
    """k-steps in a turn of the compiled loop, which may be unrolled."""

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.depth

    @property
    def copied(self) -> int:
        return self.depth * (self.rows * self.row_bytes + self.columns * self.column_bytes)


def products(name: str) -> list[Product]:
    """The plain GEMM first, then forward, input gradient and parameter gradients for every dtype of the weights."""
    target = TARGETS[name]
    found = [_plain(target)]
    for weights, (weight_dtype, aux_dtype, models) in WEIGHTS.items():
        with compiling_for(target) as forward:
            x = torch.empty(M, K, dtype=ACTIVATIONS, requires_grad=True)
            weight = torch.empty(N, K, dtype=weight_dtype, requires_grad=True)
            shape = (N, K) if models == 1 else (models, N, K)
            aux_weight, scale = torch.empty(shape, dtype=aux_dtype), torch.empty(models, requires_grad=True)
            aux_weight_scale = torch.empty(N, 1) if aux_dtype == torch.int8 else None
            y = cross_modal_linear(x, weight, aux_weight, scale, None, aux_weight_scale)
        with compiling_for(target) as backward:
            y.backward(torch.empty_like(y))
        backward.sort(key=lambda kernel: kernel.metadata.name.startswith("grad_parameters"))
        combined = weight_dtype.itemsize + models * aux_dtype.itemsize
        for label, kernel in zip(("forward", "grad_input", "grad_parameters"), forward + backward, strict=True):
            tile = _constants(kernel)
            rows = tile["BLOCK_M"] + tile.get("MORE_M", 0)
            columns = tile.get("BLOCK_N", COLUMNS_BY_HAND)
            column_bytes = ACTIVATIONS.itemsize if label == "grad_parameters" else combined
            steps = UNROLLED if kernel.metadata.name == "combined_matmul_hopper_kernel" else 1
            sizes = rows, columns, tile["BLOCK_K"]
            found.append(Product(label, weights, kernel, *sizes, ACTIVATIONS.itemsize, column_bytes, steps))
    return found


def _constants(compiled: CompiledKernel) -> dict[str, int]:
    names = compiled.src.fn.arg_names
    return {names[position]: value for (position, *_), value in compiled.src.constants.items()}


def _plain(target: GPUTarget) -> Product:
    by_tma = target.arch in PLAIN_TILES
    block_m, block_n, block_k, warps, stages = PLAIN_TILES[target.arch if by_tma else "ampere"]
    kernel = plain_matmul_tma_kernel if by_tma else plain_matmul_kernel
    with compiling_for(target, kernel) as compiled:
        x, weight, output = (torch.empty(s, dtype=ACTIVATIONS) for s in ((M, K), (N, K), (M, N)))
        tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
        kernel[(tiles,)](
            x,
            weight,
            output,
            M,
            N,
            K,
            K,
            K,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP=8,
            num_warps=warps,
            num_stages=stages,
        )
    size = ACTIVATIONS.itemsize
    return Product("plain", "bf16", compiled[0], block_m, block_n, block_k, size, size)


def bounds(product: Product, loop: Loop, arch: int) -> dict[str, float]:
    """Clocks of one SM per k-step of a block, by pipe."""
    name = product.compiled.metadata.name
    consumers = CONSUMER_WARPS if "tma" in name or "hopper" in name else _warps(product.compiled)
    shared = product.copied + loop.shared_bytes / product.steps * consumers
    if arch == 90:
        shared += _wgmma_reads(product)
    if arch == 100:
        shared += _tcgen05_reads(product)
    return {
        "tensor": product.flops / TENSOR_FLOPS[arch],
        "issue": sum(loop.instructions.values()) / product.steps * consumers / 4,
        "shared": shared / 128,
        "L2": product.copied / 64,
    }


def _wgmma_reads(product: Product) -> int:
    """Bytes of shared memory that two warp groups read as operands, each for half of the tile's first dimension."""
    swapped = product.name in ("forward", "grad_input")
    size = ACTIVATIONS.itemsize * product.depth
    if swapped:
        return 2 * product.rows * size
    return (product.rows + 2 * product.columns) * size


def _tcgen05_reads(product: Product) -> int:
    """Bytes of shared memory that 128 rows at a time of the first operand, which may be in tensor memory, read."""
    size = ACTIVATIONS.itemsize * product.depth
    if product.compiled.metadata.name.startswith("combined_matmul_tma"):
        return triton.cdiv(product.columns, 128) * product.rows * size
    return (product.rows + triton.cdiv(product.rows, 128) * product.columns) * size


def report(name: str) -> list[Row]:
    """The rows of one architecture."""
    target = TARGETS[name]
    rows, plain_bound = [], 0.0
    for product in products(name):
        used, loop = resources(product.compiled), main_loop(product.compiled)
        row: Row = {
            "architecture": name,
            "product": product.name,
            "weights": product.weights,
            "tile": f"{product.rows}x{product.columns}x{product.depth}",
            "registers": used.registers,
            "spilled": used.spilled,
            "shared KiB": used.shared / 1024,
            "blocks per SM": "-",
            "tensor": "-",
            "shared": "-",
            "float": "-",
            "integer": "-",
            "copied B/FLOP": product.copied / product.flops,
            "limit": "-",
            "predicted": "-",
        }
        if loop is not None:
            limits = bounds(product, loop, target.arch)
            bound = max(limits.values()) / product.flops
            plain_bound = plain_bound or bound
            pipes = ("tensor", "shared", "float", "integer")
            row |= {pipe: loop.instructions.get(pipe, 0) / product.steps for pipe in pipes}
            row |= {
                "blocks per SM": _blocks_per_sm(product.compiled, used.registers, used.shared, target.arch),
                "limit": max(limits, key=lambda pipe: limits[pipe]),
                "predicted": f"{plain_bound / bound:.2f}",
            }
        rows.append(row)
    return rows


def _blocks_per_sm(compiled: CompiledKernel, registers: int, shared: int, arch: int) -> int:
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * _warps(compiled))
    return min(by_registers, SHARED_PER_SM[arch] * 1024 // (shared + 1024))


def _warps(compiled: CompiledKernel) -> int:
    """Of a block, the ones that specialisation added included."""
    return int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])[1]) // 32


def compile_all() -> list[Row]:
    return [row for name in tqdm(TARGETS, desc="compiling") for row in report(name)]


if __name__ == "__main__":
    results.run("compile-report", "offline", compile_all, __doc__)
