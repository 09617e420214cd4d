"""Tile shapes: one per product, kind of operands and architecture. Chosen offline; they need no tuning."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

GROUP = 8
"""Rows of tiles that are computed together, so that their operands stay in L2."""

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, as decided by TRITON_INTERPRET before this import."""


class TileConfig(NamedTuple):
    """The output tile is BLOCK_M x BLOCK_N, a step of the reduction BLOCK_K."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# Operand kinds: "half"; "mixed" is half-precision activations, W or W_aux float32; float32 as "tf32" or "ieee".
TILES = {
    "ampere": {  # sm_80; fits the 99 KiB of sm_86, sm_89 and sm_120 too
        "combined_matmul": {
            "half": TileConfig(128, 128, 32, 8, 4),
            "mixed": TileConfig(128, 128, 32, 8, 3),
            "tf32": TileConfig(128, 64, 32, 4, 3),
            "ieee": TileConfig(64, 64, 16, 4, 3),
        },
        "grad_parameters": {
            "half": TileConfig(128, 128, 64, 8, 3),
            "tf32": TileConfig(128, 128, 32, 8, 3),
            "ieee": TileConfig(64, 64, 16, 4, 3),
        },
    },
    "hopper": {  # sm_90, and sm_100 with the accumulator in tensor memory
        "combined_matmul": {
            "half": TileConfig(128, 128, 64, 8, 3),
            "mixed": TileConfig(128, 128, 32, 8, 3),
            "tf32": TileConfig(128, 128, 32, 8, 3),
            "ieee": TileConfig(64, 64, 16, 4, 3),
        },
        "grad_parameters": {
            "half": TileConfig(128, 128, 64, 8, 3),
            "tf32": TileConfig(128, 128, 32, 8, 3),
            "ieee": TileConfig(64, 64, 16, 8, 3),
        },
    },
    "cdna": {  # gfx90a, gfx942
        "combined_matmul": {
            "half": TileConfig(128, 128, 32, 8, 2),
            "mixed": TileConfig(128, 128, 32, 8, 2),
            "tf32": TileConfig(128, 128, 32, 8, 2),
            "ieee": TileConfig(128, 128, 32, 8, 2),
        },
        "grad_parameters": {
            "half": TileConfig(128, 128, 32, 8, 2),
            "tf32": TileConfig(128, 128, 32, 8, 2),
            "ieee": TileConfig(128, 128, 32, 8, 2),
        },
    },
    "portable": {  # anything else, the interpreter, and matrices that are not aligned
        "combined_matmul": {
            "half": TileConfig(64, 64, 32, 4, 2),
            "mixed": TileConfig(64, 32, 32, 4, 2),
            "tf32": TileConfig(32, 32, 16, 4, 2),
            "ieee": TileConfig(32, 32, 16, 4, 2),
        },
        "grad_parameters": {
            "half": TileConfig(64, 32, 32, 4, 2),
            "tf32": TileConfig(32, 32, 16, 4, 2),
            "ieee": TileConfig(32, 32, 16, 4, 2),
        },
    },
}


def active_target() -> GPUTarget | None:
    """What Triton's active driver compiles for; None in the interpreter.

    Raises:
        RuntimeError: Triton has no active driver.
    """
    return None if INTERPRETED else triton.runtime.driver.active.get_current_target()


def architecture(target: GPUTarget | None) -> str:
    """The row of TILES for a target."""
    if target is None:
        return "portable"
    if target.backend == "cuda":
        return "hopper" if 90 <= target.arch < 120 else "ampere"
    return "cdna" if target.arch.startswith("gfx9") else "portable"


def input_precision(dtype: torch.dtype, target: GPUTarget | None) -> str:
    """How float32 operands are multiplied: "ieee", or "tf32" where torch's float32 matmul precision allows it."""
    if dtype != torch.float32 or target is None or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if target.backend == "cuda" or target.arch == "gfx942" else "ieee"


def is_aligned(features: tuple[int, int], *matrices: Tensor) -> bool:
    """Whether rows can be read 16 elements at a time, which the larger tiles need to keep within the registers."""
    strides = (stride for matrix in matrices for stride in matrix.stride() if stride != 1)
    return all(n % 16 == 0 for n in (*features, *strides)) and all(m.data_ptr() % 16 == 0 for m in matrices)


def tile_config(
    product: str,
    target: GPUTarget | None,
    dtype: torch.dtype,
    weight_bytes: int,
    precision: str,
    aligned: bool,
) -> TileConfig:
    """The entry of TILES for activations of `dtype` and weights of at most `weight_bytes` an element."""
    row = TILES[architecture(target) if aligned else "portable"]
    if dtype == torch.float32:
        return row[product][precision]
    return row[product]["half" if weight_bytes == 2 else "mixed"]
