"""Maps made on the host: kept by all that they say, and encoded once; stand-ins for the driver, no GPU is needed."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton

from m2pt_kernels.plans import gemm_hopper

if gemm_hopper is None:
    pytest.skip("this Triton's Gluon lacks what the kernel needs", allow_module_level=True)

from triton.backends.nvidia import driver as nvidia

from m2pt_kernels.tensor_maps import DTYPES, encode_once, map_of_several, tensor_map
from m2pt_kernels.versions import RELEASE

HALF = torch.bfloat16
MATRIX = torch.empty(64, 128, dtype=HALF)


def described(matrix=MATRIX, shape=(64, 128), pitch=128, tile=(32, 32)):
    return tensor_map(matrix, shape, pitch, tile)


def test_the_same_matrix_is_described_once():
    assert described() is described(MATRIX.view(128, 64))


@pytest.mark.parametrize(
    "change",
    [
        {"matrix": MATRIX[1:]},
        {"matrix": MATRIX.view(torch.float16)},
        {"shape": (63, 128)},
        {"shape": (64, 120)},
        {"pitch": 136},
        {"tile": (64, 32)},
        {"tile": (32, 64)},
    ],
    ids=["address", "dtype", "rows", "columns", "pitch", "height", "width"],
)
def test_another_one_has_another_map(change):
    """So memory that is used again for other matrices is not read through a map of what was there before."""
    arguments = {"matrix": MATRIX, "shape": (64, 128), "pitch": 128, "tile": (32, 32)} | change
    map = described(**change)
    assert map is not described()
    assert (map.base.data_ptr(), map.base.dtype) == (arguments["matrix"].data_ptr(), arguments["matrix"].dtype)
    assert (tuple(map.shape), map.strides) == (arguments["shape"], [arguments["pitch"], 1])
    assert tuple(map.block_shape) == arguments["tile"]


SEVERAL = torch.empty(3, 64, 128, dtype=HALF)


@pytest.mark.parametrize(
    "other, shape, strides",
    [
        (SEVERAL[1:], (2, 64, 128), (8192, 128, 1)),
        (SEVERAL[:2], (2, 64, 128), (8192, 128, 1)),
        (SEVERAL[:, :48], (3, 48, 128), (8192, 128, 1)),
        (SEVERAL[:, :, :120], (3, 64, 120), (8192, 128, 1)),
        (SEVERAL[::2], (2, 64, 128), (16384, 128, 1)),
        (SEVERAL[0], (1, 64, 128), (8192, 128, 1)),
        (SEVERAL.view(torch.float16), (3, 64, 128), (8192, 128, 1)),
    ],
    ids=["address", "fewer", "rows", "columns", "distance", "one", "dtype"],
)
def test_several_matrices_are_described_by_all_that_they_are(other, shape, strides):
    assert map_of_several(SEVERAL, 32, 64) is map_of_several(SEVERAL.view(3, 64, 128), 32, 64)
    map = map_of_several(other, 32, 64)
    assert map is not map_of_several(SEVERAL, 32, 64)
    assert (map.base.data_ptr(), map.kind) == (other.data_ptr(), (other.dtype, 1, 32, 64))
    assert (tuple(map.shape), tuple(map.strides)) == (shape, strides)


@pytest.mark.parametrize("tile", [(64, 64), (32, 32)])
def test_tiles_of_several_matrices_are_of_one_each(tile):
    assert map_of_several(SEVERAL, *tile).block_shape == [1, *tile]
    assert map_of_several(SEVERAL, *tile) is not map_of_several(SEVERAL, 32, 64)


def test_no_map_keeps_a_tensor():
    matrix = torch.empty(64, 128, dtype=HALF)
    alive = weakref.ref(matrix)
    described(matrix)
    del matrix
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_tma_copies(dtype):
    map = tensor_map(torch.empty(128, 64, dtype=torch.float32).view(dtype), (128, 64), 64, (64, 32))
    assert map.kind == (dtype, 64, 32) and map.layout.element_bitwidth == 8 * dtype.itemsize


@pytest.mark.skipif(RELEASE < (3, 8), reason="Triton before 3.8 encodes every time")
def test_a_launch_reuses_what_another_one_encoded(monkeypatch):
    encoded, launched = [], []

    def make(map, metadata, _):
        encoded.append(map)
        return [f"map {len(encoded)}", *map.shape, *map.strides]

    utils = SimpleNamespace(launch=lambda *arguments: launched.append(arguments[-1]))
    monkeypatch.setattr(nvidia, "make_tensordesc_arg", make)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    one, other = described(pitch=160), described(pitch=192)
    of_map = f"tensordesc<bf16[32, 32],{one.layout!r}>"
    compiled = SimpleNamespace(
        run=object.__new__(nvidia.CudaLauncher),
        src=SimpleNamespace(signature={"left": of_map, "none": "constexpr", "right": of_map, "size": "i32"}),
        metadata=SimpleNamespace(tensordesc_meta=[{}, {}]),
    )
    encode_once(compiled)
    for left, right in ((one, other), (other, one), (one, one)):
        compiled.run.launch(1, 1, 1, (left, None, right, 7))
    assert encoded == [one, other]
    first, second = (["map 1", 64, 128, 160, 1], ["map 2", 64, 128, 192, 1])
    assert [list(arguments) for arguments in launched] == [
        [*first, None, *second, 7],
        [*second, None, *first, 7],
        [*first, None, *first, 7],
    ]
