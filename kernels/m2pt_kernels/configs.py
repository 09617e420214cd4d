"""Tile shapes: one per product, kind of operands and architecture. Chosen offline; they need no tuning."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .quantization import DTYPES as QUANTIZED
from .versions import OTHER_TILES, is_trusted

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


class CombinedTileConfig(NamedTuple):
    """The same for the products with the combined weight.

    COMBINE_IN_WARPS: every warp combines what it multiplies, in registers, again in each warp that needs it; otherwise
    the block combines a tile once and passes it through shared memory, which costs a barrier a step.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    COMBINE_IN_WARPS: bool


_Tile, _Combined = TileConfig, CombinedTileConfig

# Of each tuple the first is used unless `warmup` finds a faster one; for one auxiliary model all fit without spills.
# Operand kinds: "half"; "mixed" is half-precision activations with float32 W or W_aux; float32 is "tf32" or "ieee".
TILES: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "ampere": {  # sm_80 and sm_87, with 163 KiB of shared memory
        "combined_matmul": {
            "half": (
                _Combined(256, 128, 32, 8, 4, True),
                _Combined(256, 128, 32, 8, 4, False),
                _Combined(128, 128, 32, 4, 4, True),
            ),
            "mixed": (
                _Combined(256, 128, 32, 8, 4, False),
                _Combined(256, 128, 32, 8, 3, True),
                _Combined(128, 128, 32, 8, 3, False),
            ),
            "tf32": (
                _Combined(256, 128, 16, 8, 4, True),
                _Combined(256, 128, 16, 8, 4, False),
                _Combined(128, 128, 32, 8, 3, True),
            ),
            "ieee": (_Combined(128, 128, 8, 8, 3, False), _Combined(64, 64, 16, 4, 3, False)),
        },
        "grad_parameters": {
            "half": (_Tile(128, 128, 64, 8, 3), _Tile(128, 128, 32, 8, 4)),
            "tf32": (_Tile(128, 128, 32, 8, 3), _Tile(128, 128, 16, 8, 4)),
            "ieee": (_Tile(128, 128, 16, 8, 3), _Tile(64, 64, 16, 4, 3)),
        },
    },
    "ampere_small": {  # sm_86, sm_89 and sm_120: the same instructions, 99 KiB, and half the tensor cores' rate
        "combined_matmul": {
            "half": (
                _Combined(128, 128, 32, 4, 3, True),
                _Combined(256, 128, 32, 8, 4, True),
                _Combined(128, 128, 32, 8, 4, False),
            ),
            "mixed": (
                _Combined(256, 128, 32, 8, 3, True),
                _Combined(256, 128, 16, 8, 4, False),
                _Combined(128, 128, 32, 8, 3, False),
            ),
            "tf32": (
                _Combined(256, 128, 16, 8, 4, True),
                _Combined(256, 128, 16, 8, 3, False),
                _Combined(128, 128, 32, 8, 3, True),
            ),
            "ieee": (_Combined(128, 128, 8, 8, 3, False), _Combined(64, 64, 16, 4, 3, False)),
        },
        "grad_parameters": {
            "half": (_Tile(128, 128, 64, 8, 3), _Tile(128, 128, 32, 8, 4)),
            "tf32": (_Tile(128, 128, 32, 8, 3), _Tile(128, 128, 16, 8, 4)),
            "ieee": (_Tile(128, 128, 16, 8, 3),),
        },
    },
    "hopper": {  # sm_90, and sm_100 with the accumulator in tensor memory
        "combined_matmul": {
            "half": (_Combined(128, 128, 64, 8, 3, False),),
            "mixed": (_Combined(128, 128, 32, 8, 3, False),),
            "tf32": (_Combined(128, 128, 32, 8, 3, False),),
            "ieee": (_Combined(64, 64, 16, 4, 3, False),),
        },
        "grad_parameters": {
            "half": (_Tile(128, 128, 64, 8, 3),),
            "tf32": (_Tile(128, 128, 32, 8, 3),),
            "ieee": (_Tile(64, 64, 16, 8, 3),),
        },
    },
    "cdna": {  # gfx90a, gfx942
        "combined_matmul": {
            "half": (
                _Combined(256, 128, 32, 8, 2, False),
                _Combined(256, 256, 32, 8, 2, False),
                _Combined(128, 128, 32, 8, 2, False),
            ),
            "mixed": (_Combined(256, 128, 32, 8, 2, False), _Combined(128, 128, 32, 8, 2, False)),
            "tf32": (_Combined(256, 128, 16, 8, 2, False), _Combined(128, 128, 32, 8, 2, False)),
            "ieee": (_Combined(256, 128, 16, 8, 2, False), _Combined(128, 128, 32, 8, 2, False)),
        },
        "grad_parameters": {
            "half": (_Tile(128, 128, 32, 4, 2), _Tile(256, 128, 32, 8, 2), _Tile(128, 128, 32, 8, 2)),
            "tf32": (_Tile(128, 128, 16, 4, 2), _Tile(128, 128, 32, 8, 2)),
            "ieee": (_Tile(128, 128, 16, 4, 2), _Tile(128, 128, 32, 8, 2)),
        },
    },
    "rdna": {  # gfx11 and gfx12, which have no tf32
        "combined_matmul": {
            "half": (_Combined(128, 128, 32, 8, 2, False), _Combined(128, 64, 32, 4, 2, False)),
            "mixed": (_Combined(128, 128, 32, 8, 2, False), _Combined(128, 128, 16, 8, 2, False)),
            "ieee": (_Combined(128, 128, 8, 8, 2, False), _Combined(64, 64, 16, 8, 2, False)),
        },
        "grad_parameters": {
            "half": (_Tile(128, 128, 32, 8, 2), _Tile(64, 64, 32, 4, 2)),
            "ieee": (_Tile(128, 128, 8, 8, 2), _Tile(64, 64, 16, 8, 2)),
        },
    },
    "small": {  # any GPU, for results of which the tiles above would be few or mostly padding
        "combined_matmul": {
            "half": (_Combined(64, 64, 32, 4, 3, False), _Combined(64, 32, 32, 4, 3, False)),
            "mixed": (_Combined(64, 64, 32, 4, 3, False), _Combined(64, 32, 32, 4, 3, False)),
            "tf32": (_Combined(64, 64, 16, 4, 3, False), _Combined(64, 32, 32, 4, 3, False)),
            "ieee": (_Combined(32, 32, 16, 4, 3, False),),
        },
        "grad_parameters": {
            "half": (_Tile(128, 64, 32, 4, 4),),
            "tf32": (_Tile(64, 64, 32, 4, 3),),
            "ieee": (_Tile(32, 32, 16, 4, 3),),
        },
    },
    "portable": {  # any other GPU, the interpreter, and matrices that are not aligned
        "combined_matmul": {
            "half": (_Combined(64, 64, 32, 4, 2, False),),
            "mixed": (_Combined(64, 32, 32, 4, 2, False),),
            "tf32": (_Combined(32, 32, 16, 4, 2, False),),
            "ieee": (_Combined(32, 32, 16, 4, 2, False),),
        },
        "grad_parameters": {
            "half": (_Tile(64, 32, 32, 4, 2),),
            "tf32": (_Tile(32, 32, 16, 4, 2),),
            "ieee": (_Tile(32, 32, 16, 4, 2),),
        },
    },
}

for (_row, _product, _kind), _tiles in OTHER_TILES.items():
    TILES[_row][_product][_kind] = tuple(map(type(TILES[_row][_product][_kind][0])._make, _tiles))


def ceil_div(size: int, block: int) -> int:
    """As `triton.cdiv`, which on the host takes microseconds."""
    return -(-size // block)


def active_target() -> GPUTarget | None:
    """What Triton's active driver compiles for; None in the interpreter.

    Raises:
        RuntimeError: Triton has no active driver.
    """
    return None if INTERPRETED else triton.runtime.driver.active.get_current_target()


def architecture(target: GPUTarget | None) -> str:
    """The row of TILES for a target."""
    if target is None or not is_trusted():
        return "portable"
    if target.backend == "cuda":
        if 90 <= target.arch < 120:
            return "hopper"
        return "ampere" if target.arch in (80, 87) else "ampere_small"
    if target.arch.startswith("gfx9"):
        return "cdna"
    return "rdna" if target.arch.startswith(("gfx11", "gfx12")) else "portable"


def input_precision(dtype: torch.dtype, target: GPUTarget | None) -> str:
    """How float32 operands are multiplied: "ieee", or "tf32" where torch's float32 matmul precision allows it."""
    if dtype != torch.float32 or target is None or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if target.backend == "cuda" or target.arch == "gfx942" else "ieee"


def is_aligned(features: tuple[int, int], *matrices: Tensor) -> bool:
    """Whether rows can be read 16 elements at a time, which the larger tiles need to keep within the registers."""
    strides = (stride for matrix in matrices for stride in matrix.stride() if stride != 1)
    return all(n % 16 == 0 for n in (*features, *strides)) and all(m.data_ptr() % 16 == 0 for m in matrices)


def is_small(rows: int, columns: int) -> bool:
    """Whether a result has so few rows, or would make so few large tiles (under 64), that small ones are better."""
    return rows <= 64 or rows * columns < 2**20


def tile_configs(
    product: str,
    target: GPUTarget | None,
    dtype: torch.dtype,
    weight_bytes: int,
    precision: str,
    aligned: bool,
    small: bool,
) -> tuple[Any, ...]:
    """The entry of TILES for activations of `dtype` and weights of at most `weight_bytes` an element."""
    row = architecture(target) if aligned else "portable"
    kinds = TILES["small" if small and row != "portable" else row][product]
    if dtype == torch.float32:
        return kinds[precision]
    return kinds["half" if weight_bytes == 2 else "mixed"]


class Plan(NamedTuple):
    """How a product is computed: by the kernels of "pointers", "tma" or "hopper" in such tiles, or "eager" by torch."""

    by: str
    tile: Any = None

    def __str__(self) -> str:
        return self.by if self.tile is None else f"{self.by} {'x'.join(map(str, self.tile))}"


EAGER = Plan("eager")

TUNED: dict[tuple, Plan] = {}
"""The plans that `warmup` chose, by what `problem` says of a product's arguments."""

UNTUNED: dict[tuple, Plan] = {}
"""The plans of products that it has not, kept as choosing one takes longer than computing it."""
MOST_UNTUNED = 2**12


@cache
def device_name(device: torch.device) -> str:
    """Of a GPU, which its target does not tell from others of the same generation."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def problem(product: str, *arguments: Tensor | torch.dtype | None) -> tuple:
    """What a product's candidates and their speed depend on: the GPU, shapes, strides, alignment, dtypes, float32
    precision. The current device is the arguments'."""
    return (
        product,
        device_name(arguments[0].device),
        active_target(),
        torch.backends.cuda.matmul.fp32_precision,
        *(
            (tuple(argument.shape), argument.stride(), argument.data_ptr() % 16 == 0, argument.dtype)
            if isinstance(argument, Tensor)
            else argument
            for argument in arguments
        ),
    )


def variant(plan: Plan, key: tuple) -> str:
    """What a plan compiles for a `problem`, up to sizes, layouts and which outputs are asked for, in words."""
    product, _, target, _, *arguments = key
    first, second, aux_weight, _, *others = arguments
    dtypes = [first[-1], others[0] if product == "grad_parameters" else second[-1]]
    if aux_weight is not None:
        shape, *_, dtype = aux_weight
        dtypes += [dtype] * (shape[0] if len(shape) == 3 else 1)
    names = [QUANTIZED.get(dtype) or str(dtype).removeprefix("torch.") for dtype in dtypes]
    if input_precision(first[-1], target) == "tf32":
        names.append("as tf32")
    return f"{product} by {plan} of {' '.join(names)}"
