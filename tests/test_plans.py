"""Which kernel a product gets, and on which device: no GPU is needed, drivers and devices are stand-ins."""

from contextlib import contextmanager, nullcontext
from contextvars import Context
from types import SimpleNamespace

import pytest
import torch
import triton
from helpers import by_hopper, by_tma, changed, for_target, misaligned, operands
from triton.backends.compiler import GPUTarget
from triton.runtime import _allocation

from benchmarks.offline import TARGETS, compiling_for
from benchmarks.predictions import measured
from benchmarks.products import LAYERS, WEIGHTS
from m2pt_kernels import estimates, gemm, gemm_pointers, plans, reference
from m2pt_kernels.cases import PRODUCTS
from m2pt_kernels.combined import CombinedWeight
from m2pt_kernels.devices import device_of, multiprocessors, supports
from m2pt_kernels.launches import NotCompiledError
from m2pt_kernels.ops import path_of
from m2pt_kernels.plans import TUNED, UNTUNED, Plan, gemm_hopper, problem
from m2pt_kernels.products import CombinedMatmul, GradParameters
from m2pt_kernels.tiles import GradTile, count_tiles, share_of
from m2pt_kernels.versions import HAS_TALLEST_HOPPER_TILE

by_all_tiles = pytest.mark.skipif(not HAS_TALLEST_HOPPER_TILE, reason="of Triton 3.8 alone: its assembler fits them")
HALF, FLOAT = torch.bfloat16, torch.float32
HOPPER, AMPERE = TARGETS["sm_90"], TARGETS["sm_80"]


def matrix(*shape, dtype=HALF, gap=0):
    """Uninitialised, its rows `gap` entries apart."""
    return torch.empty(*shape[:-1], shape[-1] + gap, dtype=dtype)[..., : shape[-1]]


def on_meta(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


def models_apart(tensor, gap):
    """The same shape, its matrices `gap` entries further apart."""
    distance = tensor.stride(0) + gap
    return torch.empty(len(tensor) * distance, dtype=tensor.dtype).as_strided(
        tensor.shape, (distance, *tensor.stride()[1:])
    )


def by_columns(tensor):
    return tensor.mT.contiguous().mT


UNADDRESSABLE = {
    "by columns": by_columns,
    "misaligned": misaligned,
    "rows on top of each other": lambda tensor: tensor[..., :1, :].expand_as(tensor),
    "rows 2 bytes more apart": lambda tensor: matrix(*tensor.shape, dtype=tensor.dtype, gap=2 // tensor.itemsize),
    "empty": lambda tensor: tensor[..., :0],
    "2**31 rows": lambda tensor: tensor.new_empty(2**31, tensor.shape[-1], device="meta"),
}


def forward():
    """A product that `gemm_tma` computes."""
    combined = CombinedWeight(matrix(256, 128), matrix(2, 256, 128), matrix(1), transposed=True)
    return CombinedMatmul(matrix(1024, 128), combined, matrix(256))


def grad_input():
    """The same of a quantised W_aux."""
    aux_weight, scales = matrix(2, 128, 256, dtype=torch.int8), matrix(2, 128, 1, dtype=FLOAT)
    return CombinedMatmul(matrix(1024, 128), CombinedWeight(matrix(128, 256), aux_weight, matrix(1), scales))


def hopper():
    """The same for `gemm_hopper`, which takes one auxiliary model."""
    return changed(forward(), aux_weight=matrix(256, 128))


def grad_parameters():
    aux_weight, scales = matrix(2, 128, 256, dtype=torch.int8), matrix(2, 128, 1, dtype=FLOAT)
    return GradParameters(matrix(1024, 128), matrix(1024, 256), aux_weight, None, HALF, None, scales)


OTHER_GPUS = {f"target {target}": {"target": target} for target in (AMPERE, TARGETS["sm_120"], TARGETS["gfx942"], None)}
NOT_TAKEN = {
    ("tma", forward): {
        **OTHER_GPUS,
        "float32 activations": {"left": matrix(1024, 128, dtype=FLOAT)},
        "four models": {"aux_weight": matrix(4, 256, 128)},
        "int4": {"aux_weight": matrix(256, 128, dtype=torch.uint8)},
        "output rows of no multiple of 16 bytes": {
            "weight": matrix(252, 128),
            "aux_weight": matrix(252, 128),
            "bias": matrix(252),
        },
        "models 2 bytes more apart": {"aux_weight": models_apart(matrix(2, 256, 128), 1)},
        "misaligned bias": {"bias": misaligned(matrix(256))},
        "aux_weight by columns": {"aux_weight": by_columns(matrix(256, 128))},
        **{f"left, {name}": {"left": change(matrix(1024, 128))} for name, change in UNADDRESSABLE.items()},
        **{
            f"weight, {name}": {"weight": change(matrix(256, 128))}
            for name, change in UNADDRESSABLE.items()
            if name not in ("by columns", "2**31 rows")
        },
    },
    ("tma", grad_input): {
        "weights by columns": {
            "weight": by_columns(matrix(128, 256)),
            "aux_weight": by_columns(matrix(2, 128, 256, dtype=torch.int8)),
        },
        "misaligned scales": {"aux_weight_scale": misaligned(matrix(2, 128, 1, dtype=FLOAT))},
        "scales of models 8 bytes more apart": {
            "left": matrix(1024, 126, gap=2),
            "weight": matrix(126, 256),
            "aux_weight": matrix(2, 126, 256, dtype=torch.int8),
            "aux_weight_scale": matrix(2, 126, 1, dtype=FLOAT),
        },
        "pairs of columns that are no panel": {
            "weight": matrix(128, 248),
            "aux_weight": matrix(2, 128, 248, dtype=torch.int8, gap=8),
        },
        "aux_weight, 2 bytes more apart": {"aux_weight": matrix(2, 128, 256, dtype=torch.int8, gap=2)},
    },
    ("tma", grad_parameters): {
        **OTHER_GPUS,
        "float32 activations": {"x": matrix(1024, 256, dtype=FLOAT)},
        "int4": {"aux_weight": matrix(2, 128, 256, dtype=torch.uint8)},
        "rows of results of no multiple of 16 bytes": {
            "x": matrix(1024, 252, gap=4),
            "aux_weight": matrix(2, 128, 252, dtype=torch.int8, gap=4),
        },
        "partial sums of no multiple of 16 bytes": {
            "grad_output": matrix(1024, 126, gap=2),
            "aux_weight": matrix(126, 256, dtype=torch.int8),
            "aux_weight_scale": matrix(126, 1, dtype=FLOAT),
        },
        "misaligned scales": {"aux_weight_scale": misaligned(matrix(2, 128, 1, dtype=FLOAT))},
        "scales of models 8 bytes more apart": {
            "aux_weight_scale": models_apart(matrix(2, 128, 1, dtype=FLOAT), 2),
        },
        "models 8 bytes more apart": {"aux_weight": models_apart(matrix(2, 128, 256, dtype=torch.int8), 8)},
        **{
            f"grad_output, {name}": {"grad_output": change(matrix(1024, 128))} for name, change in UNADDRESSABLE.items()
        },
        **{f"x, {name}": {"x": change(matrix(1024, 256))} for name, change in UNADDRESSABLE.items()},
        **{
            f"aux_weight, {name}": {"aux_weight": change(matrix(128, 256, dtype=torch.int8))}
            for name, change in UNADDRESSABLE.items()
        },
    },
}
if gemm_hopper is not None:
    NOT_TAKEN["hopper", hopper] = {
        **OTHER_GPUS,
        "target sm_100": {"target": TARGETS["sm_100"]},
        "two models": {"aux_weight": matrix(2, 256, 128)},
        "left that reaches over 2 GiB": {"left": on_meta(2**13, 2**17)[:, :128]},
        "2 GiB of output": {"left": on_meta(2**22, 128)},
        "one row 2**40 bytes apart": {"left": matrix(1, 128).as_strided((1, 128), (2**39, 1))},
        "scales along the depth": {
            "transposed": False,
            "aux_weight": matrix(256, 128, dtype=torch.int8),
            "aux_weight_scale": matrix(256, 1, dtype=FLOAT),
        },
        "misaligned bias": {"bias": misaligned(matrix(256))},
    }
    NOT_TAKEN["hopper", grad_parameters] = {
        **NOT_TAKEN["tma", grad_parameters],
        "target sm_100": {"target": TARGETS["sm_100"]},
        "one matrix for both models": {"aux_weight": matrix(128, 256, dtype=torch.int8).expand(2, 128, 256)},
        "models half a row more apart": {"aux_weight": models_apart(matrix(2, 128, 256, dtype=torch.int8), 128)},
        "2 GiB of x": {"x": on_meta(2**22, 256), "grad_output": on_meta(2**22, 128)},
        "2 GiB of gradients": {
            "x": on_meta(1024, 2**14),
            "grad_output": on_meta(1024, 2**14),
            "aux_weight": on_meta(2, 2**14, 2**14, dtype=torch.int8),
        },
    }


def chosen(monkeypatch, multiprocessors, tokens, in_features, out_features, target=HOPPER, dtypes=(HALF, HALF)):
    """The plans of a layer's forward, input gradient and parameter gradients."""
    monkeypatch.setattr(plans, "active_target", lambda: target)
    monkeypatch.setattr(plans, "multiprocessors", lambda device: multiprocessors)
    weight, aux_weight = (on_meta(out_features, in_features, dtype=dtype) for dtype in dtypes)
    x, grad_output = on_meta(tokens, in_features), on_meta(tokens, out_features)
    combined = CombinedWeight(weight, aux_weight, on_meta(1, dtype=FLOAT))
    return [
        plans.candidates(product)[0]
        for product in (
            CombinedMatmul(x, combined._replace(transposed=True)),
            CombinedMatmul(grad_output, combined),
            GradParameters(grad_output, x, aux_weight, None, weight.dtype, None),
        )
    ]


@by_all_tiles
@pytest.mark.parametrize(
    "multiprocessors, sizes, heights",
    [
        (132, (12608, 768, 3072), [384, 288]),  # 6 waves of 384 rows, 8 of 288 and of 320; 2 of each
        (114, (12608, 3072, 768), [384, 384]),  # 2 waves of 384, 3 of others; 7 of 384, 9 of 320, 10 of 288
        (132, (788, 768, 3072), [160, 128]),  # 72 tiles of 288 rows, 120 of 160; 18 and 30
        (132, (197, 3072, 768), [64, 128]),  # too few tiles of `gemm_hopper`
    ],
)
def test_tiles_are_chosen_by_waves(monkeypatch, multiprocessors, sizes, heights):
    forward, grad_input, _ = chosen(monkeypatch, multiprocessors, *sizes)
    assert [plan.tile.shape[0] for plan in (forward, grad_input)] == heights


@by_all_tiles
def test_the_choice_on_an_h200_is_the_fastest_that_was_measured_there(monkeypatch):
    layers = {layer.name: layer for layer in LAYERS}
    for (name, _, weights, product), times in measured().items():
        found = dict(zip(PRODUCTS, chosen(monkeypatch, 132, *layers[name][1:], dtypes=WEIGHTS[weights]), strict=True))
        assert times[str(found[product])] == min(time for plan, time in times.items() if plan != "plain")


@pytest.mark.parametrize("target, multiprocessors", [("sm_80", 108), ("sm_90", 132), ("sm_100", 148), ("gfx942", 304)])
def test_gradients_of_few_tiles_are_split_to_fill_the_machine(monkeypatch, target, multiprocessors):
    for tokens, in_features, out_features in ((12608, 768, 768), (100_000, 192, 192)):
        plan = chosen(monkeypatch, multiprocessors, tokens, in_features, out_features, TARGETS[target])[-1]
        assert 1 < plan.splits <= estimates.MOST_SPLITS
        assert plan.splits * in_features * out_features * 4 <= estimates.MOST_SPLIT_BYTES
        blocks = plan.splits * count_tiles(plan.tile, out_features, in_features)
        assert blocks > 0.8 * multiprocessors or plan.splits == estimates.MOST_SPLITS


@pytest.mark.parametrize("sizes", [(64, 768, 768), (12608, 8192, 8192), (0, 768, 768)])
def test_gradients_are_not_split_without_need(monkeypatch, sizes):
    assert chosen(monkeypatch, 132, *sizes)[-1].splits == 1


def test_splits_have_steps_of_their_own_and_bounded_memory():
    tile = plans.POINTER_GRAD_TILES["hopper"]["half"][0]
    for depth in range(1, 3000, 7):
        splits = max(estimates.clocks("pointers", tile, estimates.Work(256, 256, depth, 0, 0, 4096, 1000)))
        share = share_of(depth, splits, tile.BLOCK_K) or depth
        assert (splits - 1) * share < depth <= splits * share
    for columns, most in ((1024, 16), (2048, 8), (3072, 5), (16384, 1)):
        work = estimates.Work(1024, columns, 2**20, 0, 0, 4096, 10**6)
        assert max(estimates.clocks("pointers", tile, work)) == most


def test_the_estimate_adds_up():
    """Waves of tiles, each of steps and what is fixed; blocks that share an SM wait together; splits are added."""
    work = estimates.Work(1024, 512, 2048, 1, 4, 4096, 16)  # 128 x 128 x 64: 32 tiles in 2 waves of 32 steps
    step = 2 * 128 * 128 * 64 / 4096 + 0.115 * 128 * 64
    wide = gemm_pointers.CombinedTile(128, 128, 64, num_warps=8, num_stages=3)
    expected = 2 * (32 * step + 2300) + 2 * 32 * 356
    assert estimates.clocks("pointers", wide, work) == {1: pytest.approx(expected)}
    narrow = wide._replace(num_warps=4)  # two blocks an SM
    assert estimates.clocks("pointers", narrow, work) == {1: pytest.approx(expected - 32 * 356)}
    tile = GradTile(128, 128, 64, num_warps=4, num_stages=5)
    few = work._replace(models=0, rows=512, depth=64 * 99)  # 16 tiles on 32 SMs
    for by, fixed in (("tma", 15800), ("hopper", 2300)):
        assert estimates.clocks(by, tile, few._replace(multiprocessors=32)) == {
            1: 99 * (512 + 95) + fixed,
            2: pytest.approx(50 * (512 + 95) + fixed + 3500 + 8 * 2 * 512 * 512 / (16 * 32)),
        }


@by_hopper
def test_the_estimate_of_overlapping_work_is_the_busiest_pipes():
    tile = plans.gemm_hopper.CombinedTile(BLOCK_M=256, MORE_M=128, BLOCK_K=32, STAGES=4)  # 768 x 256: 4 tiles, a wave
    for weight_bytes, busy in ((4, 832), (8, 1088)):  # bytes through shared memory; the tensor cores take 768
        work = estimates.Work(768, 256, 2048, 1, weight_bytes, 4096, 16)
        assert estimates.clocks("hopper", tile, work) == {1: 64 * (busy + 150) + 2300}


@pytest.mark.parametrize("precision, slower", [("highest", 16), ("high", 2)])
def test_the_estimate_knows_how_float32_is_multiplied(monkeypatch, matmul_precision, precision, slower):
    matmul_precision(precision)
    wide = changed(forward(), left=matrix(1024, 128, dtype=FLOAT), weight=matrix(256, 128, dtype=FLOAT))
    monkeypatch.setattr(plans, "multiprocessors", lambda device: 7)
    of_half, of_float = (plans._work(product, HOPPER) for product in (forward(), wide))
    assert of_half == estimates.Work(1024, 256, 128, 2, 6, 4096, 7)
    assert of_float == estimates.Work(1024, 256, 128, 2, 8, 4096 / slower, 7)


def test_a_gpu_tells_how_many_multiprocessors_it_has(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert multiprocessors(torch.device("cuda", 5)) == 114
    multiprocessors.cache_clear()


@by_tma
@pytest.mark.parametrize(
    "by, product, changes",
    [
        pytest.param(by, product, changes, id=f"{product.__name__}: {name}")
        for (by, product), rows in NOT_TAKEN.items()
        for name, changes in rows.items()
    ],
)
def test_one_violated_condition_leaves_a_product_to_the_other_kernels(monkeypatch, by, product, changes):
    assert by in kernels(monkeypatch, product())
    assert by not in kernels(monkeypatch, product(), **changes)


def kernels(monkeypatch, product, target=HOPPER, **changes):
    """Those that may compute a product on a target."""
    monkeypatch.setattr(plans, "active_target", lambda: target)
    return {plan.by for plan in plans.candidates(changed(product, **changes))}


def test_a_fault_of_gradients_that_are_split_is_one_whatever_the_splits():
    tile = plans.POINTER_GRAD_TILES["hopper"]["half"][0]
    with compiling_for(HOPPER):
        key = problem(grad_parameters())
        whole, *split = (plans.variant(Plan("pointers", tile, splits), key) for splits in (1, 2, 7))
    assert split[0] == split[1] != whole
    assert str(Plan("pointers", tile, 7)) == f"{Plan('pointers', tile)} in 7 splits"


def test_a_fault_is_of_the_precision_it_was_found_with(matmul_precision):
    wide = changed(forward(), left=matrix(1024, 128, dtype=FLOAT), weight=matrix(256, 128, dtype=FLOAT))
    names = []
    with compiling_for(HOPPER):
        for precision in ("high", "highest"):
            matmul_precision(precision)
            key = problem(wide)
            matmul_precision("highest")
            names.append(plans.variant(Plan("pointers"), key))
    assert names[0] == f"{names[1]} as tf32"


@by_hopper
def test_what_takes_too_long_is_not_timed_but_of_every_kernel_the_first_is(monkeypatch):
    monkeypatch.setattr(plans, "active_target", lambda: HOPPER)
    product = changed(hopper(), left=matrix(12608, 128))
    every, some = [*plans.candidates(product), plans.EAGER], plans.worth_timing(product)
    assert some == [plan for plan in every if plan in some] and some[0] == every[0] and len(some) < len(every)
    assert {plan.by for plan in some} == {plan.by for plan in every}
    faulty = {plans.variant(plan, problem(product)): "wrong" for plan in some[:-1]}
    monkeypatch.setattr(plans.records, "faults", lambda *_: faulty)
    with pytest.warns(UserWarning, match="found faulty"):
        others = plans.worth_timing(product)
    assert len(others) > 1 and not set(others) & set(some[:-1])
    assert others[0] == next(plan for plan in every if plan not in some)


def test_a_triton_without_tma_loops_has_pointers_alone(monkeypatch):
    monkeypatch.setattr(plans, "HAS_TMA_LOOPS", False)
    monkeypatch.setattr(plans, "gemm_hopper", None)
    monkeypatch.setattr(plans, "gemm_hopper_gradients", None)
    for product in (forward, grad_input, grad_parameters):
        assert kernels(monkeypatch, product()) == {"pointers"}


def test_pointer_tiles_suit_the_operands(monkeypatch):
    monkeypatch.setattr(plans, "active_target", lambda: AMPERE)
    several, tiles = changed(forward(), left=matrix(12608, 128)), plans.POINTER_TILES
    one = changed(several, aux_weight=matrix(256, 128))
    for product, expected in (
        (one, tiles["ampere"]["half"] + tiles["small"]["half"]),
        (several, [tile for tile in tiles["ampere"]["mixed"] + tiles["small"]["mixed"] if not tile.COMBINE_IN_WARPS]),
        (changed(one, left=misaligned(matrix(12608, 128))), tiles["portable"]["half"]),
    ):
        assert {plan.tile for plan in plans.candidates(product)} == set(expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("dtype", [HALF, FLOAT, torch.int8, torch.uint8], ids=str)
def test_pointers_compute_all_there_is(monkeypatch, target, models, dtype):
    monkeypatch.setattr(plans, "active_target", lambda: TARGETS[target])
    lead = () if models == 1 else (models,)
    scales = matrix(*lead, 256, 1, dtype=FLOAT) if dtype in (torch.int8, torch.uint8) else None
    for tokens in (1, 12608):
        for left in (matrix(tokens, 128), misaligned(matrix(tokens, 128)), matrix(tokens, 128, dtype=FLOAT)):
            operands = {"left": left, "aux_weight": matrix(*lead, 256, 128, dtype=dtype), "aux_weight_scale": scales}
            assert any(plan.by == "pointers" for plan in plans.candidates(changed(forward(), **operands)))


@by_tma
def test_several_quantised_models_are_read_in_pairs_along_the_depth_alone():
    aux_weight, aux_weight_scale = matrix(2, 256, 128, dtype=torch.int8), matrix(2, 256, 1, dtype=FLOAT)
    along_columns = changed(forward(), aux_weight=aux_weight, aux_weight_scale=aux_weight_scale)
    for product, more_rows in ((grad_input(), [0]), (along_columns, [128, 64, 32])):
        assert [tile.MORE_M for tile in plans.tma_tiles(HOPPER, product.combined)] == more_rows


def test_a_gpu_between_hopper_and_blackwell_gets_hoppers_pointers(monkeypatch):
    large = changed(forward(), left=matrix(12608, 128))
    assert kernels(monkeypatch, large, GPUTarget("cuda", 110, 32)) == {"pointers"}
    tiles = {tile for row in ("hopper", "small") for tile in plans.POINTER_TILES[row]["mixed"]}
    assert {plan.tile for plan in plans.candidates(large)} <= tiles


@pytest.mark.parametrize("capability, reads", [(86, False), (89, True), (90, True)])
def test_float8_is_read_from_capability_89_on(monkeypatch, capability, reads):
    float8 = {"aux_weight": matrix(2, 128, 256, dtype=torch.float8_e4m3fn), "target": GPUTarget("cuda", capability, 32)}
    with nullcontext() if reads else pytest.raises(ValueError, match="float8_e4m3fn needs CUDA"):
        assert kernels(monkeypatch, grad_input(), **float8)


@by_tma
def test_what_is_not_read_by_tma_needs_no_alignment(monkeypatch):
    frozen_scale = {"grad_output": matrix(1024, 126, gap=2), "aux_weight": None, "aux_weight_scale": None}
    assert "tma" in kernels(monkeypatch, grad_parameters(), **frozen_scale)


@pytest.mark.parametrize(
    "changes",
    [
        {"left": matrix(1025, 128)},
        {"left": matrix(1024, 128, gap=8)},
        {"left": misaligned(matrix(1024, 128))},
        {"left": matrix(1024, 128, dtype=torch.float16)},
        {"weight": by_columns(matrix(256, 128))},
        {"bias": None},
        {"transposed": False},
    ],
    ids=["size", "stride", "alignment", "dtype", "order", "bias", "transposed"],
)
def test_a_tuned_plan_is_for_the_tensors_it_was_timed_with(changes):
    with compiling_for(HOPPER):
        assert problem(forward()) == problem(forward()) != problem(changed(forward(), **changes))


def test_a_tuned_plan_is_for_a_gpu_and_a_float32_precision(monkeypatch):
    keys = []
    for target, precision, name in (
        (HOPPER, "highest", "H100"),
        (AMPERE, "highest", "H100"),
        (HOPPER, "high", "H100"),
        (HOPPER, "highest", "H200"),
    ):
        monkeypatch.setattr(plans, "device_name", lambda device, name=name: name)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            with compiling_for(target):
                keys.append(problem(changed(forward(), left=matrix(1024, 128, dtype=FLOAT))))
        finally:
            torch.set_float32_matmul_precision(before)
    assert len(set(keys)) == len(keys)


@pytest.fixture(autouse=True)
def _forget():
    yield
    TUNED.clear()
    supports.cache_clear()


def test_remembered_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST_UNTUNED", 4)
    UNTUNED.update((str(size), Plan("pointers")) for size in range(9))
    with compiling_for(AMPERE):
        for rows in range(16, 24):
            gemm.combined_matmul(*changed(forward(), left=matrix(rows, 128)))
            assert len(UNTUNED) <= 4


@pytest.fixture
def devices(monkeypatch):
    """Two devices: an A100, where the tensors are that `devices.add` was given, and an H100, which is current."""
    ours, current = set(), [HOPPER]

    @contextmanager
    def inside(tensor):
        before, current[0] = current[0], AMPERE if tensor.data_ptr() in ours else HOPPER
        try:
            yield
        finally:
            current[0] = before

    monkeypatch.setattr(gemm, "device_of", inside)
    with compiling_for(HOPPER):
        driver = triton.runtime.driver.active
        monkeypatch.setattr(driver, "get_current_target", lambda: current[0])
        monkeypatch.setattr(driver, "get_current_device", lambda: str(current[0]))
        yield SimpleNamespace(
            add=lambda *tensors: ours.update(tensor.data_ptr() for tensor in tensors), current=lambda: current[0]
        )


@by_tma
@pytest.mark.parametrize("tuned", [False, True])
def test_plans_and_launches_are_the_tensors_devices_not_the_current_ones(devices, monkeypatch, tuned):
    made = []

    def launch(by):
        return SimpleNamespace(
            combined_matmul=lambda tile, left, combined, *_: made.append((by, combined.transposed, devices.current())),
            grad_parameters=lambda *_: made.append((by, None, devices.current())),
        )

    for name in ("_LAUNCHES", "_GRAD_LAUNCHES"):
        monkeypatch.setattr(gemm, name, {by: launch(by) for by in ("pointers", "tma", "hopper")})
    monkeypatch.setattr(gemm.split_sums, "grad_parameters", lambda *_: None)
    tensors, grad_output = operands(16384, 1024, 1024, HALF, HALF, needs_grad=())
    x, weight, aux_weight, scale, bias = tensors.values()
    combined = CombinedWeight(weight, aux_weight, scale, transposed=True)
    if tuned:  # for the other device
        TUNED[problem(CombinedMatmul(x, combined, bias))] = Plan("tma")
    best = "hopper" if gemm_hopper is not None else "tma"
    on_hopper = ("tma" if tuned else best, best, best)
    for target, expected in ((HOPPER, on_hopper), (AMPERE, ("pointers",) * 3)):
        if target is AMPERE:
            devices.add(x, grad_output)
        gemm.combined_matmul(x, combined, bias)
        gemm.combined_matmul(grad_output, combined._replace(transposed=False))
        gemm.grad_parameters(GradParameters(grad_output, x, aux_weight, scale, HALF, HALF))
        assert made == [(by, transposed, target) for by, transposed in zip(expected, (True, False, None), strict=True)]
        made.clear()
    assert devices.current() is HOPPER


def test_the_current_device_is_the_tensors_inside(monkeypatch):
    entered = []
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextmanager(lambda: (yield))()
    )
    with device_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))):
        assert entered == [torch.device("cuda", 1)]
    with device_of(torch.empty(1)):
        assert len(entered) == 1


@by_tma
@pytest.mark.parametrize("product", ["forward", "grad_input", "grad_parameters"])
@pytest.mark.parametrize("target", ["sm_90", for_target("sm_100")])
def test_descriptors_lie_in_memory_of_torch_on_the_current_device(target, product, monkeypatch):
    """In a context of its own: the allocator that another launch has set is not seen there."""
    allocated = []

    def launcher_cls(source, metadata):
        def launch(*arguments):
            allocated.append(_allocation._allocator.get()(metadata.global_scratch_size, 128, 0))

        return launch

    aux_weight, grad_output = matrix(128, 256), matrix(1024, 128)
    combined = CombinedWeight(matrix(128, 256), aux_weight, matrix(1))
    product = {
        "forward": CombinedMatmul(matrix(1024, 256), combined._replace(transposed=True)),
        "grad_input": CombinedMatmul(grad_output, combined),
        "grad_parameters": grad_parameters(),
    }[product]
    with compiling_for(TARGETS[target]):
        plan = next(plan for plan in plans.candidates(product) if plan.by == "tma")
        monkeypatch.setattr(triton.runtime.driver.active, "launcher_cls", launcher_cls)
        monkeypatch.setattr(torch, "empty", lambda size, **options: (size, options))
        Context().run(gemm.compute, plan, product)
    size, options = allocated[0]
    assert size > 0 and options == {"dtype": torch.int8, "device": "cuda"}


def test_what_does_not_compile_is_left_out_with_one_warning(monkeypatch):
    monkeypatch.setattr(plans, "active_target", lambda: AMPERE)
    product, tried = forward(), []

    def combined_matmul(tile, *_):
        tried.append(tile)
        if len(tried) <= 2:
            raise NotCompiledError("CompilationError: no such instruction\nsource")

    monkeypatch.setattr(gemm, "_LAUNCHES", {"pointers": SimpleNamespace(combined_matmul=combined_matmul)})
    first, second, third, *_ = plans.candidates(product)
    TUNED[problem(product)] = second
    with pytest.warns(UserWarning, match="does not compile") as warned:
        gemm.combined_matmul(*product)
    assert tried == [second.tile, first.tile, third.tile]
    assert [str(warning.message) for warning in warned] == [
        f"{plans.variant(plan, problem(product))} does not compile with Triton {triton.__version__}"
        f" (CompilationError: no such instruction): using {then} instead"
        for plan, then in ((second, first), (first, third))
    ]
    gemm.combined_matmul(*product)
    assert tried[3:] == [third.tile] and problem(product) not in TUNED


def test_a_plan_that_is_asked_for_and_does_not_compile_is_an_error(monkeypatch):
    def combined_matmul(*_):
        raise NotCompiledError("no such instruction")

    monkeypatch.setattr(plans, "active_target", lambda: AMPERE)
    monkeypatch.setattr(gemm, "_LAUNCHES", {"pointers": SimpleNamespace(combined_matmul=combined_matmul)})
    with pytest.raises(NotCompiledError, match="no such"):
        gemm.combined_matmul(*forward(), plans.candidates(forward())[0])


@pytest.mark.parametrize("capability, path", [((7, 0), reference), ((7, 5), reference), ((8, 0), gemm), ((9, 0), gemm)])
def test_a_gpu_without_tensor_cores_that_triton_knows_gets_plain_torch(monkeypatch, capability, path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float16)
    assert path_of(x) is path


@pytest.mark.parametrize("arch", [60, 70, 75])
def test_kernels_are_not_forced_on_such_a_gpu(arch):
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"), compiling_for(GPUTarget("cuda", arch, 32)):
        pass
    assert path_of(torch.empty(1)) is reference
