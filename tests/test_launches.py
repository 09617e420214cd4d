"""Launching again what was compiled: a stand-in for the driver takes note of launches, no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from helpers import misaligned, needs_compiler
from triton import knobs
from triton.runtime import JITFunction

from benchmarks.offline import TARGETS, compiling_for
from m2pt_kernels import launches
from m2pt_kernels.devices import active_target
from m2pt_kernels.launches import HELD, NotCompiledError, launch
from m2pt_kernels.plans import gemm_hopper
from m2pt_kernels.tiles import GradTile

TILE = GradTile(16, 16, 16, num_warps=4, num_stages=2)


@triton.jit
def copy_kernel(
    source_ptr, more_ptr, output_ptr, size, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TWICE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    value = tl.load(source_ptr + index * stride, index < size)
    if more_ptr is not None:
        value += tl.load(more_ptr + index, index < size)
    tl.store(output_ptr + index, 2 * value if TWICE else value, index < size)


@triton.jit
def other_kernel(
    source_ptr, more_ptr, output_ptr, size, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TWICE: tl.constexpr,
):  # fmt: skip
    tl.store(output_ptr, tl.load(source_ptr))


PLAIN = {
    "kernel": copy_kernel,
    "grid": (4, 1),
    "tensors": (torch.empty(64), torch.empty(64), torch.empty(64)),
    "sizes": (64, 16),
    "tile": TILE,
    "TWICE": False,
    "enable_fp_fusion": True,
}


@pytest.fixture
def driver(monkeypatch):
    """A driver that lists what it launches, and `searched`, the kernels that Triton was asked for."""
    searched, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (searched.append(self), run(self, *a, **k))[1])
    with compiling_for(TARGETS["sm_90"], copy_kernel, other_kernel):
        active = triton.runtime.driver.active
        found = SimpleNamespace(active=active, launched=[], searched=searched)
        active.launcher_cls = lambda source, metadata: lambda *arguments: found.launched.append(arguments)
        yield found


@needs_compiler("sm_90")
def test_the_same_is_launched_again_without_asking_triton(driver):
    for _ in range(3):
        launch(**PLAIN)
    assert driver.searched == [copy_kernel]
    first, *others = ([*launched[:6], *launched[7:]] for launched in driver.launched)  # without metadata, always new
    assert len(others) == 2
    for other in others:
        assert len(other) == len(first) and all(one is another for one, another in zip(first, other, strict=True))


@needs_compiler("sm_90")
def test_other_numbers_of_programs_share_what_was_compiled(driver):
    for programs in (4, 8):
        launch(**PLAIN | {"grid": (programs, 2)})
    assert driver.searched == [copy_kernel] and [launched[:3] for launched in driver.launched] == [(4, 2, 1), (8, 2, 1)]


SOURCE, MORE, OUTPUT = PLAIN["tensors"]
CHANGES = {
    "kernel": {"kernel": other_kernel},
    "dtype": {"tensors": (SOURCE.half(), MORE, OUTPUT)},
    "alignment": {"tensors": (misaligned(SOURCE), MORE, OUTPUT)},
    "alignment of what is written": {"tensors": (SOURCE, MORE, misaligned(OUTPUT))},
    "no tensor": {"tensors": (SOURCE, None, OUTPUT)},
    "a size that is no multiple of 16": {"sizes": (63, 16)},
    "a size of 1": {"sizes": (64, 1)},
    "a size of 64 bits": {"sizes": (2**40, 16)},
    "tile": {"tile": TILE._replace(BLOCK_M=32)},
    "warps": {"tile": TILE._replace(num_warps=8)},
    "constant": {"TWICE": True},
    "option": {"enable_fp_fusion": False},
}


@needs_compiler("sm_90")
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_reused_for_what_is_compiled_anew(driver, change):
    for arguments in (PLAIN, PLAIN | CHANGES[change]) * 2:
        launch(**arguments)
    assert len(driver.searched) == 2
    (one, _), (other, _) = HELD.values()
    assert one is not other


@needs_compiler("sm_90")
@pytest.mark.parametrize("settings, name", [(knobs.runtime, "debug"), (knobs.compilation, "instrumentation_mode")])
def test_a_setting_that_changes_the_code_is_followed(driver, monkeypatch, settings, name):
    launch(**PLAIN)
    monkeypatch.setattr(settings, name, "consan" if name == "instrumentation_mode" else True, raising=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *arguments, **options: driver.searched.append(self))
        launch(**PLAIN)
    assert len(driver.searched) == 2 and len(HELD) == 1


@needs_compiler("sm_90")
def test_devices_do_not_share(driver):
    for device in ("first", "second") * 2:
        driver.active.get_current_device = lambda device=device: device
        launch(**PLAIN)
    for device in ("first", "second"):
        copy_kernel.device_caches.pop(device)
    (first, _), (second, _) = HELD.values()
    assert len(driver.searched) == 2 and first is not second


@needs_compiler("sm_90")
def test_the_stream_is_the_current_one(driver):
    for stream in (1, 2, 3):
        driver.active.get_current_stream = lambda device, stream=stream: stream
        launch(**PLAIN)
    assert [launched[3] for launched in driver.launched] == [1, 2, 3]


@needs_compiler("sm_90")
def test_hooks_see_every_launch(driver):
    for _ in range(2):
        launch(**PLAIN)
    assert len(driver.launched) == 2
    for metadata, enter, leave in (launched[6:9] for launched in driver.launched):
        assert enter is knobs.runtime.launch_enter_hook and leave is knobs.runtime.launch_exit_hook
        assert metadata.get()["name"] == "copy_kernel"


if gemm_hopper is not None:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    from m2pt_kernels import tensor_maps
    from m2pt_kernels.tensor_maps import DTYPES, tensor_map

    @gluon.jit
    def filling_kernel(
        map, output_ptr, size, stride, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    ):  # fmt: skip
        gl.store(output_ptr, map.block_type.shape[0] + size + stride)

    def filling(dtype=torch.float32, height=32, rows=64):
        map = tensor_map(torch.empty(rows, 64).view(dtype), (rows, 32), 64, (height, 16))
        return {
            "kernel": filling_kernel,
            "grid": (1, 1),
            "tensors": (OUTPUT,),
            "sizes": (64, 16),
            "tile": TILE,
            "maps": (map,),
        }


with_maps = pytest.mark.skipif(gemm_hopper is None, reason="this Triton's Gluon lacks what the kernels need")


@with_maps
@needs_compiler("sm_90")
def test_a_launch_takes_its_own_maps(driver):
    first, second = filling(rows=64), filling(rows=96)
    for arguments in (first, second, first):
        launch(**arguments)
    filling_kernel.device_caches.clear()
    assert len(HELD) == 1
    assert [launched[9] for launched in driver.launched] == [*first["maps"], *second["maps"], *first["maps"]]


@with_maps
@needs_compiler("sm_90")
@pytest.mark.parametrize("change", [{"dtype": torch.int32}, {"height": 64}], ids=str)
def test_maps_of_other_tiles_and_dtypes_are_compiled_anew(driver, change, monkeypatch):
    monkeypatch.setitem(DTYPES, torch.int32, gl.int32)
    for arguments in (filling(), filling(**change)) * 2:
        launch(**arguments)
    filling_kernel.device_caches.clear()
    assert len(HELD) == 2


@with_maps
@needs_compiler("sm_90")
@pytest.mark.parametrize("debug", [False, True])
def test_maps_are_encoded_once_unless_launches_are_instrumented(driver, monkeypatch, debug):
    once = []
    monkeypatch.setattr(knobs.runtime, "debug", debug)
    monkeypatch.setattr(tensor_maps, "encode_once", once.append)
    launch(**filling())
    filling_kernel.device_caches.clear()
    assert len(once) == (0 if debug else 1)


@with_maps
@needs_compiler("sm_90")
@pytest.mark.parametrize("error, raised", [(ValueError("bad"), NotCompiledError), (OSError("disk full"), OSError)])
def test_what_the_compiler_raises_says_that_nothing_was_compiled(driver, monkeypatch, error, raised):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(JITFunction, "warmup", fail)
    with pytest.raises(raised, match=str(error)):
        launch(**filling())
    assert not HELD and not driver.launched


@needs_compiler("sm_90")
def test_what_is_held_is_bounded(driver, monkeypatch):
    monkeypatch.setattr(launches, "MOST_HELD", 3)
    for size in range(64, 70):
        launch(**PLAIN | {"sizes": (size, 16)})
        assert 0 < len(HELD) <= 3


def test_nothing_is_held_where_code_depends_on_the_storage(monkeypatch):
    asked = []
    monkeypatch.setattr(launches, "active_target", lambda: TARGETS["gfx942"])
    monkeypatch.setattr(JITFunction, "run", lambda self, *arguments, **options: asked.append(options))
    for _ in range(2):
        launch(**PLAIN)
    assert len(asked) == 2 and not HELD
    assert asked[0] == {"grid": (4, 1), "warmup": False, **TILE._asdict(), "TWICE": False, "enable_fp_fusion": True}


@needs_compiler("sm_90")
def test_a_device_is_asked_once_what_it_is(driver, monkeypatch):
    asked = []
    monkeypatch.setattr(driver.active, "get_current_target", lambda: asked.append(1) or TARGETS["sm_90"])
    for device in ("first", "second") * 2:
        driver.active.get_current_device = lambda device=device: device
        assert active_target() == TARGETS["sm_90"]
    assert len(asked) == 2
