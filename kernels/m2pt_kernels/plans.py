"""Choose a product's kernel and tiles by the GPU, the operands, and what was timed or found faulty.

This file has the kernels and tiles by architecture; devices.py and quantization.py say which dtypes a device reads,
estimates.py which tiles are tried first. docs/kernels.md says how to add an architecture.
"""

import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import estimates, gemm_pointers, gemm_tma, records, split_sums
from .combined import CombinedWeight, model_stride
from .devices import active_target, capability_of, device_name, input_precision, multiprocessors
from .products import GradParameters, Product
from .quantization import DTYPES as QUANTIZED
from .quantization import reads_float8
from .tiles import GradTile
from .versions import HAS_TALLEST_HOPPER_TILE, HAS_TMA_LOOPS, RELEASE, is_trusted

try:
    from . import gemm_hopper, gemm_hopper_gradients
except (ImportError, AttributeError):  # Gluon is experimental: a release may lack a part, or rename it
    gemm_hopper = gemm_hopper_gradients = None  # type: ignore[assignment]

KERNELS = (
    gemm_pointers.combined_matmul_kernel,
    gemm_pointers.grad_parameters_kernel,
    gemm_tma.combined_matmul_tma_kernel,
    gemm_tma.grad_parameters_tma_kernel,
    *([] if gemm_hopper is None else [gemm_hopper.combined_matmul_hopper_kernel]),
    *([] if gemm_hopper_gradients is None else [gemm_hopper_gradients.grad_parameters_hopper_kernel]),
    split_sums.split_sums_kernel,
)


class Plan(NamedTuple):
    """What computes a product: the kernels of "pointers", "tma" or "hopper" with a tile, or plain torch, "eager".

    splits: how many blocks share the reduction of a tile of gradients; `split_sums` adds their results.
    """

    by: str
    tile: Any = None
    splits: int = 1

    @property
    def kernel(self) -> str:
        """The name of what is compiled for it."""
        return self.by if self.tile is None else f"{self.by} {'x'.join(map(str, self.tile))}"

    def __str__(self) -> str:
        return self.kernel if self.splits == 1 else f"{self.kernel} in {self.splits} splits"


EAGER = Plan("eager")


def architecture(target: GPUTarget | None) -> str:
    """Return the row of the tables below for a target."""
    if target is None or not is_trusted():
        return "portable"
    if target.backend == "cuda":
        newer = {9: "hopper", 10: "blackwell", 11: "thor"}
        return newer.get(target.arch // 10) or ("ampere" if target.arch in (80, 87) else "ampere_small")
    if target.arch.startswith("gfx9"):
        return "cdna"
    return "rdna" if target.arch.startswith(("gfx11", "gfx12")) else "portable"


_256x128 = partial(gemm_pointers.CombinedTile, BLOCK_M=256, BLOCK_N=128, num_warps=8)
_128x128 = partial(gemm_pointers.CombinedTile, BLOCK_M=128, BLOCK_N=128, num_warps=8)
_128x64 = partial(gemm_pointers.CombinedTile, BLOCK_M=128, BLOCK_N=64, num_warps=8)
_64x64 = partial(gemm_pointers.CombinedTile, BLOCK_M=64, BLOCK_N=64, num_warps=4)
_64x32 = partial(gemm_pointers.CombinedTile, BLOCK_M=64, BLOCK_N=32, num_warps=4)
_32x32 = partial(gemm_pointers.CombinedTile, BLOCK_M=32, BLOCK_N=32, num_warps=4)
_AMPERE_IEEE = (_128x128(BLOCK_K=8, num_stages=3), _64x64(BLOCK_K=16, num_stages=3))

# Of a tuple and "small", the tile that `estimates` ranks fastest is used, or the first of equals, unless `warmup` finds
# a faster one; with one auxiliary model all fit without spills.
# Operand kinds: "half"; "mixed" is half-precision activations with float32 W or W_aux; float32 is "tf32" or "ieee".
POINTER_TILES: dict[str, dict[str, tuple[gemm_pointers.CombinedTile, ...]]] = {
    "ampere": {  # sm_80 and sm_87, with 163 KiB of shared memory
        "half": (
            _256x128(BLOCK_K=32, num_stages=4, COMBINE_IN_WARPS=True),
            _256x128(BLOCK_K=32, num_stages=4),
            _128x128(BLOCK_K=32, num_stages=4, num_warps=4, COMBINE_IN_WARPS=True),
        ),
        "mixed": (
            _256x128(BLOCK_K=32, num_stages=4),
            _256x128(BLOCK_K=32, num_stages=3, COMBINE_IN_WARPS=True),
            _128x128(BLOCK_K=32, num_stages=3),
        ),
        "tf32": (
            _256x128(BLOCK_K=16, num_stages=4, COMBINE_IN_WARPS=True),
            _256x128(BLOCK_K=16, num_stages=4),
            _128x128(BLOCK_K=32, num_stages=3, COMBINE_IN_WARPS=True),
        ),
        "ieee": _AMPERE_IEEE,
    },
    "ampere_small": {  # sm_86, sm_89 and sm_120: the same instructions, 99 KiB, and half the tensor cores' rate
        "half": (
            _128x128(BLOCK_K=32, num_stages=3, num_warps=4, COMBINE_IN_WARPS=True),
            _256x128(BLOCK_K=32, num_stages=4, COMBINE_IN_WARPS=True),
            _128x128(BLOCK_K=32, num_stages=4),
        ),
        "mixed": (
            _256x128(BLOCK_K=32, num_stages=3, COMBINE_IN_WARPS=True),
            _256x128(BLOCK_K=16, num_stages=4),
            _128x128(BLOCK_K=32, num_stages=3),
        ),
        "tf32": (
            _256x128(BLOCK_K=16, num_stages=4, COMBINE_IN_WARPS=True),
            _256x128(BLOCK_K=16, num_stages=3),
            _128x128(BLOCK_K=32, num_stages=3, COMBINE_IN_WARPS=True),
        ),
        "ieee": _AMPERE_IEEE,
    },
    "hopper": {  # sm_90
        "half": (_128x128(BLOCK_K=64, num_stages=3), _128x64(BLOCK_K=64, num_stages=3)),
        "mixed": (_128x128(BLOCK_K=32, num_stages=3), _128x64(BLOCK_K=64, num_stages=3)),
        "tf32": (_128x128(BLOCK_K=32, num_stages=3),),
        "ieee": (_64x64(BLOCK_K=16, num_stages=3),),
    },
    "cdna": {  # gfx90a, gfx942
        "half": (
            _256x128(BLOCK_K=32, num_stages=2),
            gemm_pointers.CombinedTile(BLOCK_M=256, BLOCK_N=256, BLOCK_K=32, num_warps=8, num_stages=2),
            _128x128(BLOCK_K=32, num_stages=2),
        ),
        "mixed": (_256x128(BLOCK_K=32, num_stages=2), _128x128(BLOCK_K=32, num_stages=2)),
        **dict.fromkeys(("tf32", "ieee"), (_256x128(BLOCK_K=16, num_stages=2), _128x128(BLOCK_K=32, num_stages=2))),
    },
    "rdna": {  # gfx11 and gfx12, which have no tf32
        "half": (
            _128x128(BLOCK_K=32, num_stages=2),
            gemm_pointers.CombinedTile(BLOCK_M=128, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2),
        ),
        "mixed": (_128x128(BLOCK_K=32, num_stages=2), _128x128(BLOCK_K=16, num_stages=2)),
        "ieee": (_128x128(BLOCK_K=8, num_stages=2), _64x64(BLOCK_K=16, num_stages=2, num_warps=8)),
    },
    "small": {  # any GPU, where the tiles above would be few or mostly padding
        **dict.fromkeys(("half", "mixed"), (_64x64(BLOCK_K=32, num_stages=3), _64x32(BLOCK_K=32, num_stages=3))),
        "tf32": (_64x64(BLOCK_K=16, num_stages=3), _64x32(BLOCK_K=32, num_stages=3)),
        "ieee": (_32x32(BLOCK_K=16, num_stages=3),),
    },
    "portable": {  # any other GPU, the interpreter, and matrices that are not aligned
        "half": (_64x64(BLOCK_K=32, num_stages=2),),
        "mixed": (_64x32(BLOCK_K=32, num_stages=2),),
        **dict.fromkeys(("tf32", "ieee"), (_32x32(BLOCK_K=16, num_stages=2),)),
    },
}

_grad_128x128 = partial(GradTile, BLOCK_M=128, BLOCK_N=128, num_warps=8)
_grad_128x64 = partial(GradTile, BLOCK_M=128, BLOCK_N=64, num_warps=8)
_grad_256x128 = partial(GradTile, BLOCK_M=256, BLOCK_N=128, num_warps=8)
_grad_64x64 = partial(GradTile, BLOCK_M=64, BLOCK_N=64, num_warps=4)
_grad_32x32 = partial(GradTile, BLOCK_M=32, BLOCK_N=32, num_warps=4)
_AMPERE_GRADS: dict[str, Sequence[GradTile]] = {
    "half": (_grad_128x128(BLOCK_K=64, num_stages=3), _grad_128x128(BLOCK_K=32, num_stages=4)),
    "tf32": (_grad_128x128(BLOCK_K=32, num_stages=3), _grad_128x128(BLOCK_K=16, num_stages=4)),
    "ieee": (_grad_128x128(BLOCK_K=16, num_stages=3),),
}

POINTER_GRAD_TILES: dict[str, dict[str, Sequence[GradTile]]] = {
    "ampere": _AMPERE_GRADS | {"ieee": (*_AMPERE_GRADS["ieee"], _grad_64x64(BLOCK_K=16, num_stages=3))},
    "ampere_small": _AMPERE_GRADS,
    "hopper": {
        "half": (_grad_128x128(BLOCK_K=64, num_stages=3),),
        "tf32": (_grad_128x128(BLOCK_K=32, num_stages=3),),
        "ieee": (_grad_64x64(BLOCK_K=16, num_stages=3, num_warps=8),),
    },
    "cdna": {
        "half": (
            _grad_128x128(BLOCK_K=32, num_stages=2, num_warps=4),
            _grad_256x128(BLOCK_K=32, num_stages=2),
            _grad_128x128(BLOCK_K=32, num_stages=2),
        ),
        **dict.fromkeys(
            ("tf32", "ieee"),
            (_grad_128x128(BLOCK_K=16, num_stages=2, num_warps=4), _grad_128x128(BLOCK_K=32, num_stages=2)),
        ),
    },
    "rdna": {
        "half": (_grad_128x128(BLOCK_K=32, num_stages=2), _grad_64x64(BLOCK_K=32, num_stages=2)),
        "ieee": (_grad_128x128(BLOCK_K=8, num_stages=2), _grad_64x64(BLOCK_K=16, num_stages=2, num_warps=8)),
    },
    "small": {
        "half": (_grad_128x64(BLOCK_K=32, num_stages=4, num_warps=4),),
        "tf32": (_grad_64x64(BLOCK_K=32, num_stages=3),),
        "ieee": (_grad_32x32(BLOCK_K=16, num_stages=3),),
    },
    "portable": {
        "half": (GradTile(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),),
        **dict.fromkeys(("tf32", "ieee"), (_grad_32x32(BLOCK_K=16, num_stages=2),)),
    },
}
for _row in ("blackwell", "thor"):
    # Blackwell keeps the accumulator in tensor memory. On sm_110 only the pointer kernels run.
    POINTER_TILES[_row], POINTER_GRAD_TILES[_row] = POINTER_TILES["hopper"], POINTER_GRAD_TILES["hopper"]

CROWDED_TILES: Sequence[GradTile] = ()
"""Half-precision gradients with a large epilogue use these, if any, whatever the architecture."""
if RELEASE < (3, 8):  # whose compiler spills the tiles above, or does not take float32 steps of depth 8
    POINTER_TILES["ampere"]["ieee"] = POINTER_TILES["ampere_small"]["ieee"] = (_64x64(BLOCK_K=16, num_stages=3),)
    POINTER_TILES["portable"]["half"] = (_64x64(BLOCK_K=16, num_stages=2),)
    POINTER_TILES["cdna"]["half"] = tuple(tile for tile in POINTER_TILES["cdna"]["half"] if tile.BLOCK_N < 256)
    POINTER_GRAD_TILES["small"]["half"] = (_grad_64x64(BLOCK_K=32, num_stages=4, num_warps=8),)
    POINTER_GRAD_TILES["small"]["tf32"] = (_grad_64x64(BLOCK_K=32, num_stages=3, num_warps=8),)
    POINTER_GRAD_TILES["portable"]["ieee"] = (_grad_32x32(BLOCK_K=32, num_stages=2),)
    CROWDED_TILES = (_grad_128x64(BLOCK_K=32, num_stages=3),)
if RELEASE < (3, 6):
    POINTER_TILES["rdna"]["mixed"] = (_128x128(BLOCK_K=16, num_stages=2),)
    POINTER_GRAD_TILES["cdna"]["half"] = (
        _grad_128x128(BLOCK_K=32, num_stages=2),
        _grad_256x128(BLOCK_K=32, num_stages=2),
    )
    POINTER_GRAD_TILES["rdna"]["half"] = (_grad_128x64(BLOCK_K=32, num_stages=2),)

_hopper = partial(gemm_tma.CombinedTile, BLOCK_M=256, BLOCK_N=128, BLOCK_K=32, num_warps=4)
_OVER_256_ROWS = tuple(_hopper(MORE_M=more, num_stages=4) for more in (128, 64, 32))
_blackwell = partial(gemm_tma.CombinedTile, BLOCK_M=256, MORE_M=128, BLOCK_N=128, num_warps=8)

# Registers (sm_90) and tensor memory (sm_100) hold 384 rows per tile; shared memory holds the stages. By architecture,
# then by the bytes of an element of W and one of W_aux together.
TMA_TILES: dict[str, dict[int, tuple[gemm_tma.CombinedTile, ...]]] = {
    "hopper": {
        **dict.fromkeys((3, 4), (*_OVER_256_ROWS, _hopper(MORE_M=0, num_stages=5))),
        **dict.fromkeys((5, 6), (*_OVER_256_ROWS, _hopper(MORE_M=0, num_stages=4))),
        8: (*(tile._replace(num_stages=3) for tile in _OVER_256_ROWS), _hopper(MORE_M=0, num_stages=4)),
    },
    "blackwell": dict.fromkeys(
        (3, 4, 5, 6, 8), (_blackwell(BLOCK_K=64, num_stages=2), _blackwell(BLOCK_K=32, num_stages=4))
    ),
}
# The same for two or three auxiliary models, by the bytes of W and all W_aux; tiles left out would spill.
SEVERAL_TMA_TILES: dict[str, dict[int, tuple[gemm_tma.CombinedTile, ...]]] = {
    "hopper": {
        **dict.fromkeys((4, 5, 6), _OVER_256_ROWS),
        **dict.fromkeys((8, 10, 12), tuple(tile._replace(num_stages=2) for tile in _OVER_256_ROWS)),
    },
    "blackwell": {
        **dict.fromkeys((4, 5, 6), (_blackwell(BLOCK_K=64, num_stages=2),)),
        **dict.fromkeys((7, 8), (_blackwell(BLOCK_K=32, num_stages=3),)),
        **dict.fromkeys((10, 12, 16), (_blackwell(BLOCK_K=32, num_stages=2),)),
    },
}
if RELEASE >= (3, 9):  # whose assembler spills 384 rows of three models
    SEVERAL_TMA_TILES["hopper"][10] = SEVERAL_TMA_TILES["hopper"][10][1:]
# The same on sm_90 for quantised W_aux that lie in memory as (depth, columns), with a scale per index of the depth.
_SEVERAL_PAIRED_TILES: dict[int, tuple[gemm_tma.CombinedTile, ...]] = dict.fromkeys(
    (4, 5, 6, 7), (_hopper(MORE_M=0, num_stages=4),)
)

_grad = partial(GradTile, BLOCK_K=64)
TMA_GRAD_TILES: dict[str, Sequence[GradTile]] = {
    "hopper": (
        _grad(BLOCK_M=128, BLOCK_N=256, num_warps=4, num_stages=3),
        _grad(BLOCK_M=128, BLOCK_N=128, num_warps=4, num_stages=5),
    ),
    "blackwell": (
        _grad(BLOCK_M=128, BLOCK_N=256, num_warps=8, num_stages=4),
        _grad(BLOCK_M=256, BLOCK_N=128, num_warps=8, num_stages=4),
        _grad(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=5),
    ),
}
_MOST_DESCRIBED = 2**31
"""Triton computes the extent of a map made on the host in 32 bits, and changes the map by it for some drivers."""
_LARGEST_SIZE_BY_TMA = 2**31 - 2**10
"""Coordinates have 32 bits, and a tile may reach past the matrix."""


def candidates(product: Product) -> list[Plan]:
    """Return the plans of a product on the current device, sorted by `estimates.clocks`: the untuned choice is first.

    Raises:
        ValueError: the device cannot read a float8 W_aux.
    """
    clocks = _clocks(product)
    return sorted(clocks, key=clocks.__getitem__)


def worth_timing(product: Product, within: float = 1.5) -> list[Plan]:
    """Return the `usable` plans estimated to take up to `within` times as long as the first.

    The first plan of every kernel is included, and plain torch.
    """
    clocks, plans = _clocks(product), list(usable(product))
    first = {by: next(plan for plan in plans if plan.by == by) for by in {plan.by for plan in plans}}.values()
    return [plan for plan in plans if plan in first or clocks[plan] <= within * clocks[plans[0]]]


def _clocks(product: Product) -> dict[Plan, float]:
    target = active_target()
    tiles: dict[str, Sequence[Any]]
    if isinstance(product, GradParameters):
        _check_readable(product.aux_weight, target)
        by_tma = _is_grad_for_tma(product)
        tiles = {
            "hopper": hopper_grad_tiles(target, product) if by_tma and _are_grads_described(product) else (),
            "tma": tma_grad_tiles(target, product) if by_tma else (),
            "pointers": _pointer_grad_tiles(target, product),
        }
    else:
        left, combined, _ = product
        _check_readable(combined.aux_weight, target)
        by_tma = _is_for_tma(*product)
        tiles = {
            "hopper": hopper_tiles(target, combined) if by_tma and _are_described(left, combined) else (),
            "tma": tma_tiles(target, combined) if by_tma else (),
            "pointers": _pointer_tiles(target, left, combined),
        }
    work = _work(product, target)
    return {
        Plan(by, tile, splits): clocks
        for by, found in tiles.items()
        for tile in found
        for splits, clocks in estimates.clocks(by, tile, work).items()
    }


def _work(product: Product, target: GPUTarget | None) -> estimates.Work:
    if isinstance(product, GradParameters):
        size, models, weight_bytes = (*product.shape, len(product.x)), 0, 0
    else:
        left, combined, _ = product
        depth, columns = combined.shape
        size, models = (len(left), columns, depth), combined.models
        weight_bytes = combined.weight.itemsize + models * combined.aux_weight.itemsize
    activations = product[0]
    flops = estimates.FLOPS[architecture(target)]
    if activations.dtype == torch.float32:
        flops /= estimates.SLOWDOWN[input_precision(activations.dtype, target)]
    return estimates.Work(*size, models, weight_bytes, flops, multiprocessors(activations.device))


def _check_readable(aux_weight: Tensor | None, target: GPUTarget | None) -> None:
    if aux_weight is None or aux_weight.dtype != torch.float8_e4m3fn or target is None:
        return
    if not reads_float8(capability_of(target)):
        raise ValueError(f"aux_weight: float8_e4m3fn needs CUDA and compute capability 8.9, this is {target.arch}")


def hopper_tiles(target: GPUTarget | None, combined: CombinedWeight) -> Sequence[Any]:
    """Return the tiles of `gemm_hopper`, for one auxiliary model; none if it cannot compute the product."""
    if gemm_hopper is None or architecture(target) != "hopper" or combined.models > 1:
        return ()
    if combined.aux_weight_scale is not None and not combined.transposed:  # the scales lie along the depth
        return ()
    heights = [(256, 128), (256, 64), (256, 32), (128, 32)]
    if not HAS_TALLEST_HOPPER_TILE:
        del heights[0]
    stages = 3 if combined.weight.itemsize + combined.aux_weight.itemsize == 8 else 4  # as shared memory holds
    tile = partial(gemm_hopper.CombinedTile, BLOCK_K=32, STAGES=stages)
    return [tile(BLOCK_M=rows, MORE_M=more) for rows, more in heights]


def tma_tiles(target: GPUTarget | None, combined: CombinedWeight) -> Sequence[gemm_tma.CombinedTile]:
    """Return the tiles of `gemm_tma`; none if it cannot compute the product."""
    row, models = architecture(target), combined.models
    if not HAS_TMA_LOOPS or models > 3:  # more would spill
        return ()
    tiles = (TMA_TILES if models == 1 else SEVERAL_TMA_TILES).get(row, {})
    if row == "hopper" and models > 1 and combined.layout[0] and combined.aux_weight.itemsize == 1:
        tiles = _SEVERAL_PAIRED_TILES
    return tiles.get(combined.weight.itemsize + models * combined.aux_weight.itemsize, ())


def _is_for_tma(left: Tensor, combined: CombinedWeight, bias: Tensor | None) -> bool:
    """Return whether TMA can address the operands and the output of a product, and is worth it."""
    columns, aux_weight_scale = combined.shape[1], combined.aux_weight_scale
    by_rows = combined.layout[1] == -2  # then a row of int8 or float8 has one scale
    return (
        left.dtype.itemsize == 2
        and _is_whole(columns * left.itemsize)
        and _is_addressable(left)
        and _is_addressable(combined.weight, by_rows)
        and _is_addressable(combined.aux_weight, by_rows)
        and (bias is None or _is_whole(bias.data_ptr()))
        and (aux_weight_scale is None or (by_rows and _are_addressable(aux_weight_scale)))
        and (aux_weight_scale is None or combined.transposed or _is_whole(columns))
    )


def _is_grad_for_tma(product: GradParameters) -> bool:
    """Return whether TMA can address the operands and the outputs of gradients."""
    (rows, columns), aux_weight, aux_weight_scale = product.shape, product.aux_weight, product.aux_weight_scale
    return (
        product.x.itemsize == 2
        and _is_whole(columns * product.x.itemsize)
        and _is_addressable(product.grad_output)
        and _is_addressable(product.x)
        and (aux_weight is None or (_is_addressable(aux_weight) and _is_whole(rows * 4)))
        and (aux_weight_scale is None or _are_addressable(aux_weight_scale))
    )


def _is_whole(number: int) -> bool:
    """Return whether an address or a distance is a multiple of 16, as TMA and wide loads require."""
    return number % 16 == 0


def _is_addressable(matrix: Tensor, row_major: bool = True) -> bool:
    """Return whether TMA can address a matrix, or several, stored by rows or by columns; it cannot address int4."""
    pitch, step = (matrix if row_major else matrix.mT).stride()[-2:]
    return (
        matrix.dtype != torch.uint8
        and matrix.numel() > 0
        and step == 1
        and pitch >= matrix.shape[-1 if row_major else -2]
        and _is_whole(pitch * matrix.itemsize)
        and max(matrix.shape) <= _LARGEST_SIZE_BY_TMA
        and _is_whole(model_stride(matrix) * matrix.itemsize)
        and _is_whole(matrix.data_ptr())
    )


def _are_addressable(aux_weight_scale: Tensor) -> bool:
    """Return whether TMA can address the quantisation scales of each auxiliary model."""
    distance = model_stride(aux_weight_scale) * aux_weight_scale.itemsize
    return _is_whole(aux_weight_scale.data_ptr()) and _is_whole(distance)


def _is_described(matrix: Tensor) -> bool:
    """Return whether the host can make a map of a matrix, or of several."""
    reaches = (size * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
    return max(reaches) * matrix.itemsize < _MOST_DESCRIBED


def _are_described(left: Tensor, combined: CombinedWeight) -> bool:
    output_bytes = len(left) * combined.shape[1] * left.itemsize
    return output_bytes < _MOST_DESCRIBED and all(map(_is_described, (left, combined.weight, combined.aux_weight)))


def _are_grads_described(product: GradParameters) -> bool:
    gradients = product.models * product.shape[0] * product.shape[1] * 4
    matrices = (product.grad_output, product.x, product.aux_weight)
    return gradients < _MOST_DESCRIBED and all(_is_described(matrix) for matrix in matrices if matrix is not None)


def hopper_grad_tiles(target: GPUTarget | None, product: GradParameters) -> Sequence[GradTile]:
    """Return the tiles of `gemm_hopper_gradients`; none if it cannot compute the product."""
    if gemm_hopper_gradients is None or architecture(target) != "hopper":
        return ()
    aux_weight = product.aux_weight
    if aux_weight is not None and product.models > 1:
        # CUDA requires of a map, unlike the other kernels, that matrices lie whole rows apart.
        rows, rest = divmod(model_stride(aux_weight), aux_weight.stride(-2))
        if rest or not rows:
            return ()
    return TMA_GRAD_TILES["hopper"]


def tma_grad_tiles(target: GPUTarget | None, product: GradParameters) -> Sequence[GradTile]:
    """Return the tiles of `gemm_tma` for gradients; none if it cannot compute the product."""
    row, aux_weight = architecture(target), product.aux_weight
    if not HAS_TMA_LOOPS or row not in TMA_GRAD_TILES:
        return ()
    tiles = TMA_GRAD_TILES[row]
    elements = aux_weight, product.weight_dtype, product.aux_dtype
    if row == "blackwell" and len({element.itemsize for element in elements if element is not None}) > 1:
        # Their layouts differ, and only 256 rows a tile, or few columns, leave registers to convert between them.
        tiles = [tile for tile in tiles if tile.BLOCK_N < 256]
    if row == "blackwell" and aux_weight is not None and product.models > 2 and aux_weight.itemsize == 4:
        tiles = [tile for tile in tiles if tile.BLOCK_M < 256]  # the others would spill
    return tiles


def _pointer_tiles(target: GPUTarget | None, left: Tensor, combined: CombinedWeight) -> list[Any]:
    weight, aux_weight, models = combined.weight, combined.aux_weight, combined.models
    packed = aux_weight.dtype == torch.uint8
    aligned = _is_aligned(combined.shape, left, weight, aux_weight)
    aligned &= weight.itemsize + models * aux_weight.itemsize <= 8
    is_mixed = packed or models > 1 or max(weight.itemsize, aux_weight.itemsize) > 2
    tiles = _tiles_of(POINTER_TILES, target, left, aligned, is_mixed)
    if packed:
        return [tile for tile in tiles if tile.BLOCK_N <= 32]  # others would spill, as below
    if models > 1 or combined.aux_weight_scale is not None:
        tiles = [tile for tile in tiles if not tile.COMBINE_IN_WARPS]
    if combined.aux_weight_scale is not None and architecture(target) == "ampere_small":
        tiles = [tile for tile in tiles if tile != POINTER_TILES["small"]["half"][0]]
    return tiles


def _pointer_grad_tiles(target: GPUTarget | None, product: GradParameters) -> Sequence[GradTile]:
    row, x, aux_weight = architecture(target), product.x, product.aux_weight
    aligned = _is_aligned(product.shape, product.grad_output, x)
    if CROWDED_TILES and aligned and row != "portable" and x.itemsize == 2 and _is_crowded(product):
        return CROWDED_TILES
    if aux_weight is not None:  # others would spill
        aligned &= row not in ("blackwell", "thor") or product.models * aux_weight.itemsize <= 8
        aligned &= row != "ampere_small" or product.models == 1 or aux_weight.dtype != torch.uint8
    return _tiles_of(POINTER_GRAD_TILES, target, x, aligned)


def _tiles_of(
    table: dict[str, dict[str, Any]],
    target: GPUTarget | None,
    activations: Tensor,
    aligned: bool,
    is_mixed: bool = False,
) -> Any:
    rows = (architecture(target), "small") if aligned and architecture(target) != "portable" else ("portable",)
    kind = "mixed" if is_mixed else "half"
    if activations.dtype == torch.float32:
        kind = input_precision(activations.dtype, target)
    return [tile for row in rows for tile in table[row][kind]]


def _is_aligned(features: tuple[int, int], *matrices: Tensor) -> bool:
    """Return whether rows can be read 16 elements at a time; if not, the larger tiles would spill."""
    strides = (stride for matrix in matrices for stride in matrix.stride() if stride != 1)
    return all(map(_is_whole, (*features, *strides, *(matrix.data_ptr() for matrix in matrices))))


def _is_crowded(product: GradParameters) -> bool:
    """Return whether the epilogue reads several auxiliary models, int4, or elements wider than it writes."""
    aux_weight, weight_dtype = product.aux_weight, product.weight_dtype
    if aux_weight is None:
        return False
    wider = weight_dtype is not None and aux_weight.itemsize > weight_dtype.itemsize
    return wider or aux_weight.dtype == torch.uint8 or product.models > 1


class Problem(NamedTuple):
    """All that a product's candidates and their speed depend on; `product` is its name.

    A tensor operand is described by its shape, strides, alignment and dtype.
    """

    product: str
    device: str
    target: GPUTarget | None
    input_precision: str
    operands: tuple[Any, ...]


def problem(product: Product) -> Problem:
    """Describe a product on the current device, the one of its tensors."""
    operands = [
        (operand.shape, operand.stride(), operand.data_ptr() % 16 == 0, operand.dtype)  # `_is_whole`, at each launch
        if isinstance(operand, Tensor)
        else operand
        for operand in product.operands
    ]
    first, target = product[0], active_target()
    precision = input_precision(first.dtype, target)
    return Problem(product.name, device_name(first.device), target, precision, tuple(operands))


def variant(plan: Plan, key: Problem) -> str:
    """Name what a plan compiles for a problem, regardless of sizes, layouts and which outputs are wanted."""
    first, second, aux_weight, _, weight_dtype, *_ = key.operands
    dtypes = [first[-1], weight_dtype if key.product == "grad_parameters" else second[-1]]
    if aux_weight is not None:
        shape, *_, dtype = aux_weight
        dtypes += [dtype] * (shape[0] if len(shape) == 3 else 1)
    names = [QUANTIZED.get(dtype) or str(dtype).removeprefix("torch.") for dtype in dtypes]
    if key.input_precision == "tf32":
        names.append("as tf32")
    kernel = f"{plan.kernel} in splits" if plan.splits > 1 else plan.kernel
    return f"{key.product} by {kernel} of {' '.join(names)}"


TUNED: dict[Problem, Plan] = {}
"""The plans that `warmup` chose."""

UNTUNED: dict[Problem, Plan] = {}
"""Plans chosen without tuning, kept because choosing a plan takes longer than launching it."""
MOST_UNTUNED = 2**12

_recorded: dict[Problem, Product] | None = None


@contextmanager
def recording() -> Iterator[dict[Problem, Product]]:
    """Collect the products, one per problem, that any thread chooses plans for inside."""
    global _recorded
    recorded: dict[Problem, Product] = {}
    _recorded = recorded
    try:
        yield recorded
    finally:
        _recorded = None


def choose(product: Product) -> Plan:
    """Return the plan of a prepared product on the current device: the tuned one, or the first that is usable."""
    key = problem(product)
    if (recorded := _recorded) is not None:  # read once, as another thread may end it
        recorded.setdefault(key, product)
    plan = TUNED.get(key) or UNTUNED.get(key)
    if plan is None:
        if len(UNTUNED) >= MOST_UNTUNED:  # of sizes that keep changing
            UNTUNED.clear()
        plan = UNTUNED[key] = next(usable(product))
    return plan


def usable(product: Product) -> Iterator[Plan]:
    """Yield `candidates`, then plain torch; skip, with a warning, those found faulty on such a GPU."""
    key = problem(product)
    faults = records.faults(key.device, KERNELS)
    left_out = []
    for plan in (*candidates(product), EAGER):
        name = variant(plan, key)
        if name in NOT_COMPILED:
            continue
        if name in faults:
            left_out.append(f"{name} was found faulty on this GPU ({faults[name]}) and is not used")
            continue
        while left_out:
            forget = f"delete {records.path_of('findings', key.device, KERNELS)} to try it again"
            _warn_once(f"{left_out.pop(0)}: the next plan is {plan}; {forget}")
        yield plan


NOT_COMPILED: set[str] = set()
"""Variants that the compiler failed on in this process."""


def leave_out(plan: Plan, product: Product, error: Exception) -> None:
    """Stop using a kernel that does not compile in this process; warn once per kernel."""
    key = problem(product)
    name = variant(plan, key)
    if name in NOT_COMPILED:  # by another thread
        return
    NOT_COMPILED.add(name)
    _forget(key.device, {name})
    reason = str(error).partition("\n")[0]
    message = f"{name} does not compile with Triton {triton.__version__} ({reason}): using {choose(product)} instead"
    warnings.warn(message, stacklevel=2)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def remember(device: str, findings: records.Findings) -> None:
    """Store findings about such a GPU, and choose plans anew where a variant is faulty."""
    records.remember(device, KERNELS, findings)
    _forget(device, records.faults(device, KERNELS))


def _forget(device: str, variants: Container[str]) -> None:
    """Forget the plans that use such variants."""
    UNTUNED.clear()
    for key, plan in tuple(TUNED.items()):
        if key.device == device and variant(plan, key) in variants:
            TUNED.pop(key, None)  # as another thread may do the same
