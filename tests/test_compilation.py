"""The tile of every product compiles for its GPUs, without spills and within shared memory; no GPU is needed."""

import re
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from operator import attrgetter

import pytest
import torch
import triton
from helpers import by_hopper, by_tma, for_target, needs_compiler, operands
from two_processes import FORKSERVER

from benchmarks.offline import TARGETS, compiling_for, resources
from benchmarks.sass import main_loop
from m2pt_kernels import cross_modal_linear, estimates, gemm, gemm_tma, plans, quantize
from m2pt_kernels.combined import CombinedWeight
from m2pt_kernels.devices import input_precision
from m2pt_kernels.gemm_pointers import combined_matmul_kernel, grad_parameters_kernel
from m2pt_kernels.plans import gemm_hopper
from m2pt_kernels.products import CombinedMatmul, GradParameters
from m2pt_kernels.split_sums import split_sums_kernel
from m2pt_kernels.versions import HAS_TALLEST_HOPPER_TILE, HAS_TMA_LOOPS, RELEASE

pytestmark = pytest.mark.slow

HALF, FLOAT = torch.bfloat16, torch.float32
KINDS = {
    "half": (HALF, HALF, HALF, "highest"),
    "half, W_aux float32": (HALF, HALF, FLOAT, "highest"),
    "mixed": (HALF, FLOAT, FLOAT, "highest"),
    "tf32": (FLOAT, FLOAT, FLOAT, "high"),
    "ieee": (FLOAT, FLOAT, FLOAT, "highest"),
}
if gemm_hopper is not None:
    from m2pt_kernels.tensor_maps import map_of_several, tensor_map


each_target = pytest.mark.parametrize("target", [for_target(target) for target in TARGETS])
LIKE_SM_80 = ("sm_86", "sm_120")
"""Whose instructions are the same. Their tiles, which need less shared memory, are compiled for fewer cases."""
ALL = ("weight", "aux_weight", "scale")
RAGGED = [((600, 3088, 1040), ALL)]
"""(M, N, K), and what is trained."""
EVEN = [((1024, 3072, 1024), ("scale",))]
SMALL = [
    ((257, 131, 77), ALL),  # not aligned
    ((100, 272, 208), ("scale",)),
]


@pytest.fixture
def first_tiles(monkeypatch):
    """The first tile of the first kernel that can compute a product is used, and nothing is split."""
    kernels = ["hopper", "tma", "pointers"]
    monkeypatch.setattr(estimates, "clocks", lambda by, tile, work: {1: kernels.index(by)})


@pytest.fixture
def without_gluon(monkeypatch):
    """What the kernels that are written in Gluon would compute is left to those in `gemm_tma`."""
    monkeypatch.setattr(plans, "gemm_hopper", None)
    monkeypatch.setattr(plans, "gemm_hopper_gradients", None)


@contextmanager
def no_product_is_waited_for():
    """The assembler says (C75xx) where it makes an asynchronous wgmma wait; nothing is taken from Triton's cache."""
    said = StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(said):
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        yield
    assert "Compiling entry function" in said.getvalue()
    assert not re.findall(r".*\bC75\d\d\b.*", said.getvalue())


def test_every_architecture_is_compiled_for():
    others = {"small", "portable", "thor"}  # for any GPU, and one whose tiles are another's
    assert {plans.architecture(target) for target in TARGETS.values()} == set(plans.POINTER_TILES) - others


@pytest.mark.parametrize(
    "target, kind",
    [
        for_target(target, kind)
        for target in TARGETS
        for kind in KINDS
        if kind != "half, W_aux float32" or target in ("sm_80", "sm_90", "sm_100")
    ],
)
def test_no_spills_no_atomics_and_within_shared_memory(target, kind, matmul_precision):
    dtype, weight_dtype, aux_dtype, precision = KINDS[kind]
    matmul_precision(precision)
    cases = RAGGED  # which takes the most registers
    if kind == "half" or (kind in ("mixed", "tf32") and target == "sm_80"):
        cases = cases + EVEN
    if (kind == "half" and target not in LIKE_SM_80) or (kind == "ieee" and target == "sm_80"):
        cases = cases + (SMALL if target in ("sm_80", "sm_90") else SMALL[:1])
    with compiling_for(TARGETS[target]) as compiled:
        for sizes, trained in cases:
            tensors, grad_output = operands(*sizes, dtype, weight_dtype, needs_grad=())
            tensors["aux_weight"] = tensors["aux_weight"].to(aux_dtype)
            for name in ("x", *trained):
                tensors[name].requires_grad_()
            cross_modal_linear(**tensors).backward(grad_output)
    assert len(compiled) >= 2 * len(cases)
    for kernel in compiled:
        used = resources(kernel)
        assert used.spilled == 0, (kernel.src.constants, used)
        assert not re.search("atomic|tma_reduce", kernel.asm["ttgir"])  # their order, and so the sum, would vary


@each_target
def test_several_models_without_spills_and_within_shared_memory(target):
    with compiling_for(TARGETS[target]) as compiled:
        tensors, grad_output = operands(600, 1040, 576, HALF, FLOAT, models=3)
        cross_modal_linear(**tensors).backward(grad_output)
        if target not in LIKE_SM_80:
            tensors, grad_output = operands(600, 3088, 1040, HALF, HALF, models=3)
            tensors["aux_weight"] = tensors["aux_weight"].detach().float().requires_grad_()
            cross_modal_linear(**tensors).backward(grad_output)
        if target in ("sm_90", "sm_100"):  # whose tiles depend on the bytes of all weights
            tensors, grad_output = operands(600, 1040, 576, HALF, HALF, models=2)
            cross_modal_linear(**tensors).backward(grad_output)
            tensors["aux_weight"].requires_grad_(False)
            cross_modal_linear(**quantized(tensors, "int8")).backward(grad_output)
    assert len(compiled) == (3 if target in LIKE_SM_80 else 12 if target in ("sm_90", "sm_100") else 6)
    for kernel in compiled:
        assert resources(kernel).spilled == 0, (kernel.metadata.name, kernel.src.constants, resources(kernel))


@pytest.mark.parametrize("target", [for_target(target) for target in TARGETS if target != "sm_120"])  # sm_86's tiles
def test_every_tile_by_pointers_of_quantized_weights_without_spills(target):
    """Of one int8 and of two int4 models."""
    for storage, models in (("int8", 1), ("int4", 2)):
        tensors, grad_output = operands(1024, 1024, 1024, HALF, HALF, models=models, needs_grad=())
        x, weight, aux_weight, scale, bias, aux_weight_scale = quantized(tensors, storage).values()
        combined = CombinedWeight(weight, aux_weight, scale, aux_weight_scale, transposed=True)
        with compiling_for(TARGETS[target]) as compiled:
            for product in (
                CombinedMatmul(x, combined, bias),
                GradParameters(grad_output, x, aux_weight, None, HALF, None, aux_weight_scale),
            ):
                for plan in plans.candidates(product):
                    if plan.by == "pointers":
                        gemm.compute(plan, product)
        assert len(compiled) >= 2
        for kernel in compiled:
            assert resources(kernel).spilled == 0, (kernel.metadata.name, kernel.src.constants, resources(kernel))


@pytest.mark.parametrize(
    "target, storage",
    [
        for_target(target, storage)
        for target in TARGETS
        for storage in ((None,) if target in LIKE_SM_80 else (None, "int8", "int4"))
    ],
)
def test_split_gradients_without_spills_and_within_shared_memory(target, storage):
    """In the tiles of every kernel, and the sums of the splits, all gradients being wanted."""
    models, columns = (1, 1088) if storage else (3, 1040)
    tensors, grad_output = operands(600, 3088, columns, HALF, FLOAT, models=models, needs_grad=())
    tensors = quantized(tensors, storage) if storage else tensors
    scale, aux_dtype = (None, None) if storage else (tensors["scale"], FLOAT)
    product = GradParameters(
        *(grad_output, tensors["x"], tensors["aux_weight"], scale, FLOAT, aux_dtype, tensors.get("aux_weight_scale"))
    )
    row = plans.architecture(TARGETS[target])
    tiles = {
        "hopper": plans.hopper_grad_tiles(TARGETS[target], product),
        "tma": plans.TMA_GRAD_TILES.get(row, ()) if HAS_TMA_LOOPS else (),
        "pointers": (*plans.POINTER_GRAD_TILES[row]["half"], *plans.POINTER_GRAD_TILES["small"]["half"]),
    }
    split = [plans.Plan(by, tile, splits=3) for by, found in tiles.items() for tile in found]
    with compiling_for(TARGETS[target]) as compiled:
        for plan in split:
            gemm.grad_parameters(product, plan)
    assert len(compiled) == len(split) + 1
    for kernel in compiled:
        assert resources(kernel).spilled == 0, (kernel.metadata.name, kernel.src.constants, resources(kernel))


@pytest.mark.parametrize("target", [for_target(target) for target in TARGETS if target.startswith("sm_")])
def test_every_lane_sums_splits_alike(target):
    """With an entry a lane, a product fused with the first step of their sum would be rounded otherwise in each."""
    grad_output, x, aux_weight = (torch.empty(*size, dtype=HALF) for size in ((600, 80), (600, 64), (80, 64)))
    plan = plans.Plan("pointers", plans.POINTER_GRAD_TILES["small"]["half"][0], splits=3)
    with compiling_for(TARGETS[target]) as compiled:
        gemm.grad_parameters(GradParameters(grad_output, x, aux_weight, None, None, None), plan)
    (sums,) = (kernel for kernel in compiled if kernel.metadata.name == "split_sums_kernel")
    assert "shfl.sync.bfly" in sums.asm["ptx"] and "fma.rn.f32" not in sums.asm["ptx"]


@pytest.mark.parametrize("weight_dtype, stores", [(HALF, 0), (FLOAT, 4)], ids=str)
def test_ampere_combines_in_registers_or_once_a_block(first_tiles, weight_dtype, stores):
    x, weight = torch.empty(1024, 1024, dtype=HALF), torch.empty(1024, 1024, dtype=weight_dtype)
    with compiling_for(TARGETS["sm_80"]) as compiled:
        cross_modal_linear(x, weight, weight, torch.empty(1))
    loop = main_loop(compiled[0])
    assert loop.instructions["tensor"] == 64
    assert loop.stores_to_shared == stores


@each_target
def test_more_rows_than_32_bits_count(first_tiles, target):
    rows = 2**31 + 5
    x, grad_output = torch.empty(1, 16, dtype=HALF).expand(rows, 16), torch.empty(1, 1, dtype=HALF).expand(rows, 1)
    weight = torch.empty(1, 16, dtype=HALF, requires_grad=True)
    with compiling_for(TARGETS[target]) as compiled:
        cross_modal_linear(x, weight, torch.empty_like(weight), torch.empty(1)).backward(grad_output)
    assert len(compiled) == 2
    assert all(resources(kernel).spilled == 0 for kernel in compiled)


def assert_compiles(target, *sizes, models):
    tensors, grad_output = operands(*sizes, HALF, HALF, models=models)
    with compiling_for(TARGETS[target]) as compiled:
        cross_modal_linear(**tensors).backward(grad_output)
    assert len(compiled) == 3


@pytest.mark.parametrize("sizes", [(1, 100, 100), (100, 1, 100), (100, 100, 1)], ids=str)
@pytest.mark.parametrize("target, models", [("sm_90", 1), for_target("gfx942", 2)])
def test_one_size_of_one_compiles(target, models, sizes):
    assert_compiles(target, *sizes, models=models)


@each_target
def test_sizes_of_one_compile(target):
    assert_compiles(target, 1, 1, 1, models=2)


TYPES = {"aux_ptr": HALF, "cross_modal_scale_ptr": FLOAT, "aux_weight_scale_ptr": None, "partial_ptr": FLOAT}
INT8 = {"aux_ptr": torch.int8, "aux_weight_scale_ptr": FLOAT, "grad_aux_ptr": None}
INT4 = INT8 | {"aux_ptr": torch.uint8}
POINTERS = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "EVEN_K": False, "INPUT_PRECISION": "ieee"}
POINTERS |= {"COMBINE_IN_WARPS": False, "SCALED_BY_DEPTH": False, "num_stages": 2}
TMA = {"BLOCK_M": 64, "MORE_M": 0, "BLOCK_N": 128, "BLOCK_K": 32, "DEPTH_FIRST": False, "PANEL": 32, "num_stages": 4}
LAUNCHES = {
    "combined_matmul": (combined_matmul_kernel, TYPES, POINTERS),
    "combined_matmul, int8 by depth": (combined_matmul_kernel, TYPES | INT8, POINTERS | {"SCALED_BY_DEPTH": True}),
    "combined_matmul, int4": (combined_matmul_kernel, TYPES | INT4, POINTERS),
    "grad_parameters": (grad_parameters_kernel, TYPES, POINTERS),
    "grad_parameters, int4": (grad_parameters_kernel, TYPES | INT4, POINTERS),
    "combined_matmul by TMA": (gemm_tma.combined_matmul_tma_kernel, TYPES, TMA),
    "combined_matmul by TMA, int8": (gemm_tma.combined_matmul_tma_kernel, TYPES | INT8, TMA | {"DEPTH_FIRST": True}),
    "grad_parameters by TMA": (gemm_tma.grad_parameters_tma_kernel, TYPES, TMA | {"BLOCK_N": 64, "BLOCK_K": 64}),
    "sums of splits": (split_sums_kernel, TYPES | {"splits_ptr": FLOAT}, {"BLOCK": 64, "SPLITS": 2, "num_stages": 1}),
    "sums of splits, int4": (split_sums_kernel, TYPES | INT4, {"BLOCK": 64, "SPLITS": 2, "num_stages": 1}),
}
"""A kernel, what its pointers point to where that is not bfloat16, and its constants."""
if gemm_hopper is not None:

    def tiles_of(dtype, *tile):
        return tensor_map(torch.empty(4096, 4096, dtype=dtype), (4096, 4096), 4096, tile)

    HOPPER = {"BLOCK_M": 64, "MORE_M": 32, "BLOCK_K": 32, "STAGES": 4, "num_stages": 1}
    MAPS = {"left_map": tiles_of(HALF, 64, 32), "more_left_map": tiles_of(HALF, 32, 32)}
    MAPS |= {"output_map": tiles_of(HALF, 32, 64), "more_output_map": tiles_of(HALF, 32, 64)}
    for depth_first in (False, True):
        of_weights = tiles_of(HALF, 32, 128) if depth_first else tiles_of(HALF, 128, 32)
        LAUNCHES[f"combined_matmul by TMA for sm_90, depth first {depth_first}"] = (
            gemm_hopper.combined_matmul_hopper_kernel,
            TYPES,
            HOPPER | MAPS | {"weight_map": of_weights, "aux_map": of_weights, "DEPTH_FIRST": depth_first},
        )

    GRADS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 5, "num_stages": 1, "PIECE": 64}
    GRADS |= {"grad_map": tiles_of(HALF, 64, 128), "x_map": tiles_of(HALF, 64, 128)}
    for name in ("aux_map", "grad_weight_map", "grad_aux_map"):
        GRADS[name] = map_of_several(torch.empty(2, 4096, 4096, dtype=HALF), 64, 64)
    LAUNCHES["grad_parameters by TMA for sm_90"] = (
        plans.gemm_hopper_gradients.grad_parameters_hopper_kernel,
        TYPES,
        GRADS,
    )


def integers(launch):
    """The arguments that are integers and no constants."""
    kernel = LAUNCHES[launch][0]
    names = [param.name for param in kernel.params if not param.is_constexpr]
    return [name for name in names if not name.endswith(("_ptr", "_map"))]


def compile_launch(launch, values):
    """With these arguments; the other integers are multiples of 16."""
    kernel, types, constants = LAUNCHES[launch]
    arguments = {}
    for param in kernel.params:
        if param.name.endswith("_ptr"):
            dtype = types.get(param.name, HALF)
            arguments[param.name] = None if dtype is None else torch.empty(16, dtype=dtype)
        else:
            arguments[param.name] = (constants | {"GROUP": 8, "MODELS": 2}).get(param.name, 4096)
    with compiling_for(TARGETS["sm_90"]) as compiled:
        kernel[(1,)](**arguments | values, num_warps=4, num_stages=constants["num_stages"])
    assert len(compiled) == 1


def of_launch(launch):
    is_by_tma = LAUNCHES[launch][0].fn.__name__.endswith("tma_kernel")
    return pytest.param(launch, marks=by_tma if is_by_tma else ())


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("launch", [of_launch(launch) for launch in LAUNCHES])
def test_every_integer_may_be_one_odd_or_beyond_32_bits(launch, turn):
    """Triton compiles 1, multiples of 16, other integers and long ones differently. Each takes its turn."""
    names = integers(launch)
    ones, long, odd = (set(names[(turn + step) % 3 :: 3]) for step in range(3))
    if "TMA" in launch:  # some are refused: see `test_plans.py`
        ones = {name for name in ones if name != "columns" and not name.startswith("stride")}
        long -= {"rows", "columns", "depth", "share", "splits"}
    compile_launch(launch, dict.fromkeys(ones, 1) | dict.fromkeys(long, 2**31 + 16) | dict.fromkeys(odd, 17))


def quantized(tensors, storage):
    data, scales = quantize(tensors["aux_weight"].detach(), storage)
    return tensors | {"aux_weight": data, "aux_weight_scale": scales}


@pytest.mark.parametrize(
    "target, storage",
    [
        *(for_target(target, "float8_e4m3fn") for target in TARGETS),
        *(for_target(target, "int8") for target in TARGETS if target not in LIKE_SM_80),
        *(for_target(target, "int4") for target in ("sm_80", "sm_90", "sm_100")),
    ],
)
def test_quantized_without_spills_and_within_shared_memory(first_tiles, target, storage):
    refused = storage == "float8_e4m3fn" and target in ("sm_80", "sm_86", "gfx942", "gfx1100")
    cases = [(HALF, FLOAT, (1100, 1040, 1088))]
    if storage == "int8" and target == "sm_100":  # sm_90's kernels are below, and tiles by pointers above
        cases.append((HALF, HALF, (1024, 1024, 1024)))
    if storage == "int8" and target in ("sm_80", "gfx942"):
        cases.append((FLOAT, FLOAT, (257, 131, 192)))
    with compiling_for(TARGETS[target]) as compiled:
        for dtype, weight_dtype, sizes in cases:
            tensors, grad_output = operands(*sizes, dtype, weight_dtype, needs_grad=("x", "scale"))
            if refused:
                with pytest.raises(ValueError, match=r"^aux_weight: float8_e4m3fn needs CUDA"):
                    cross_modal_linear(**quantized(tensors, storage))
            else:
                cross_modal_linear(**quantized(tensors, storage)).backward(grad_output)
    assert len(compiled) == (0 if refused else 3 * len(cases))
    for kernel in compiled:
        assert resources(kernel).spilled == 0, (kernel.src.constants, resources(kernel))


@by_tma
@pytest.mark.parametrize(
    "storage, weight_dtype, in_features",
    [("int8", FLOAT, 224), ("float8_e4m3fn", HALF, 208)],
    ids=str,
)
def test_hopper_dequantises_in_registers_without_waiting(
    first_tiles, without_gluon, storage, weight_dtype, in_features
):
    tensors, grad_output = operands(600, 272, in_features, HALF, weight_dtype)
    with no_product_is_waited_for(), compiling_for(TARGETS["sm_90"]) as compiled:
        cross_modal_linear(**quantized(tensors, storage)).backward(grad_output)
    assert len(compiled) == 3
    for kernel in compiled:
        assert "_tma_" in kernel.metadata.name
        assert resources(kernel).spilled == 0
        loop = main_loop(kernel)
        assert loop.instructions["tensor"] == 4 and loop.stores_to_shared == 0
        # A warp combines 16 x 32 a step: every entry is read once, and 8 float32 scales by each of its 32 lanes.
        assert loop.shared_bytes <= 16 * 32 * (weight_dtype.itemsize + 1) + 8 * 32 * 4


def compile_by_hopper(product, tiles):
    """In the first tiles of `gemm_hopper`, of which the very first takes the most registers."""
    with no_product_is_waited_for(), compiling_for(TARGETS["sm_90"]) as compiled:
        for tile in plans.hopper_tiles(TARGETS["sm_90"], product.combined)[:tiles]:
            gemm.compute(plans.Plan("hopper", tile), product)
    return compiled


HOPPER_TILES = 4 if HAS_TALLEST_HOPPER_TILE else 3


@by_hopper
@pytest.mark.parametrize(
    "product, dtype, weight_dtype, aux_dtype, tiles",
    [
        ("forward", HALF, HALF, HALF, HOPPER_TILES),
        ("forward", torch.float16, FLOAT, FLOAT, 1),
        ("forward", HALF, HALF, torch.int8, 1),
        ("forward", HALF, FLOAT, torch.float8_e4m3fn, 1),
        ("grad_input", HALF, HALF, HALF, HOPPER_TILES),
        ("grad_input", HALF, FLOAT, HALF, 1),
        ("grad_input", torch.float16, FLOAT, FLOAT, 1),
    ],
    ids=str,
)
def test_hopper_combines_the_next_step_while_it_multiplies(product, dtype, weight_dtype, aux_dtype, tiles):
    """No spills, nothing through shared memory, no product waited for at once."""
    x, grad_output = torch.empty(1000, 256, dtype=dtype), torch.empty(1000, 384, dtype=dtype)
    weight, aux_weight = torch.empty(384, 256, dtype=weight_dtype), torch.empty(384, 256, dtype=aux_dtype)
    scales = torch.empty(384, 1) if aux_dtype.itemsize == 1 else None
    is_forward = product == "forward"
    combined = CombinedWeight(weight, aux_weight, torch.empty(1), scales, transposed=is_forward)
    bias = torch.empty(384, dtype=weight_dtype) if is_forward else None
    compiled = compile_by_hopper(CombinedMatmul(x if is_forward else grad_output, combined, bias), tiles)
    assert len(compiled) == tiles
    for kernel in compiled:
        assert resources(kernel).spilled == 0 and kernel.metadata.global_scratch_size == 0
        loop = main_loop(kernel)
        assert loop.instructions["tensor"] == 4 * 4 and loop.stores_to_shared == 0


@by_hopper
def test_scales_that_are_not_those_of_the_depth_are_left_to_other_kernels():
    weight, aux_weight = torch.empty(384, 256, dtype=HALF), torch.empty(384, 256, dtype=torch.int8)
    combined = CombinedWeight(weight, aux_weight, torch.empty(1), torch.empty(384, 1), transposed=False)
    assert list(plans.hopper_tiles(TARGETS["sm_90"], combined)) == []


def compile_gradients_by_hopper(product, splits):
    """In all tiles of `gemm_hopper_gradients`; what adds splits is left out."""
    with no_product_is_waited_for(), compiling_for(TARGETS["sm_90"]) as compiled:
        for tile in plans.hopper_grad_tiles(TARGETS["sm_90"], product):
            gemm.grad_parameters(product, plans.Plan("hopper", tile, splits))
    return [kernel for kernel in compiled if kernel.metadata.name == "grad_parameters_hopper_kernel"]


def gradients(models=1, dtype=HALF, weight=HALF, aux=HALF, grad_aux=None):
    """Of a layer of 3088 outputs; aux is the dtype of W_aux, which the scale's gradient needs, grad_aux of its own."""
    shape = (3088, 1040) if models == 1 else (models, 3088, 1040)
    is_quantised = aux is not None and aux.itemsize == 1
    return GradParameters(
        torch.empty(600, 3088, dtype=dtype),
        torch.empty(600, 1040, dtype=dtype),
        None if aux is None else torch.empty(shape, dtype=aux),
        None if grad_aux is None else torch.empty(models),
        weight,
        grad_aux,
        torch.empty(*shape[:-1], 1) if is_quantised else None,
    )


@by_hopper
@pytest.mark.parametrize(
    "wanted, splits",
    [
        ({}, 1),
        ({}, 3),
        ({"aux": None}, 1),
        ({"weight": None}, 1),
        ({"weight": None, "aux": None, "grad_aux": FLOAT, "models": 2}, 1),
        ({"weight": FLOAT, "grad_aux": FLOAT}, 1),
        ({"weight": FLOAT, "aux": FLOAT, "grad_aux": FLOAT, "dtype": torch.float16}, 1),
        ({"weight": FLOAT, "aux": FLOAT, "grad_aux": FLOAT, "models": 3}, 1),
        ({"grad_aux": HALF, "models": 3}, 1),
        ({"aux": torch.int8}, 1),
        ({"weight": FLOAT, "aux": torch.float8_e4m3fn, "models": 4}, 1),
    ],
    ids=str,
)
def test_hoppers_gradients_begin_a_steps_products_before_the_last_ones_are_done(wanted, splits):
    """In all tiles: no spills, nothing through shared memory in the loop, no product waited for at once."""
    compiled = compile_gradients_by_hopper(gradients(**wanted), splits)
    assert len(compiled) == 2
    for kernel in compiled:
        assert resources(kernel).spilled == 0 and kernel.metadata.global_scratch_size == 0
        loop = main_loop(kernel)
        assert loop.instructions["tensor"] == 4 and loop.stores_to_shared == 0


@by_hopper
def test_gradients_that_are_not_wanted_are_not_computed_by_another_ones_kernel():
    plan = plans.Plan("hopper", plans.TMA_GRAD_TILES["hopper"][0])
    with compiling_for(TARGETS["sm_90"]) as compiled:
        for wanted in ({}, {"aux": None}, {"weight": None}, {"grad_aux": HALF}):
            gemm.grad_parameters(gradients(**wanted), plan)
    assert len(compiled) == 4


@by_tma
def test_hopper_dequantises_three_models_in_registers(first_tiles):
    tensors, grad_output = operands(600, 272, 224, HALF, FLOAT, models=3, needs_grad=("x",))
    with compiling_for(TARGETS["sm_90"]) as compiled:
        y = cross_modal_linear(**quantized(tensors, "float8_e4m3fn"))
        with no_product_is_waited_for():
            y.backward(grad_output)
    grad_input = next(kernel for kernel in compiled if kernel.metadata.name == "combined_matmul_tma_kernel")
    assert resources(grad_input).spilled == 0
    assert main_loop(grad_input).stores_to_shared == 0


@by_tma
@pytest.mark.parametrize("models, weight_dtype", [(2, HALF), (3, FLOAT)], ids=str)
def test_hopper_combines_several_models_in_registers(models, weight_dtype):
    """In all tiles."""
    aux_weight = torch.empty(models, 272, 224, dtype=HALF)
    combined = CombinedWeight(torch.empty(272, 224, dtype=weight_dtype), aux_weight, torch.empty(models))
    tiles = plans.tma_tiles(TARGETS["sm_90"], combined)
    with no_product_is_waited_for(), compiling_for(TARGETS["sm_90"]) as compiled:
        for tile in tiles:
            product = CombinedMatmul(torch.empty(1000, 224, dtype=HALF), combined._replace(transposed=True))
            gemm.compute(plans.Plan("tma", tile), product)
            gemm.compute(plans.Plan("tma", tile), CombinedMatmul(torch.empty(1000, 272, dtype=HALF), combined))
    assert len(compiled) == 2 * len(tiles) and {64, 32} <= {tile.MORE_M for tile in tiles}
    for kernel in compiled:
        assert resources(kernel).spilled == 0
        assert main_loop(kernel).stores_to_shared == 0


@by_tma
def test_columns_that_are_not_a_multiple_of_16_bytes_are_not_read_in_pairs(first_tiles, without_gluon):
    tensors, _ = operands(600, 272, 200, HALF, HALF, needs_grad=("x",))
    tensors["aux_weight"] = torch.empty(272, 208, dtype=torch.int8)[:, :200]
    with compiling_for(TARGETS["sm_90"]) as compiled:
        y = cross_modal_linear(**tensors, aux_weight_scale=torch.empty(272, 1))
        y.backward(torch.empty_like(y))
    assert {kernel.metadata.name for kernel in compiled} == {"combined_matmul_tma_kernel", "combined_matmul_kernel"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_largest_layer_and_more_results_than_32_bits_count(target):
    x = torch.empty(100_000, 6144, dtype=HALF, requires_grad=True)
    weight = torch.empty(24576, 6144, dtype=HALF, requires_grad=True)
    with compiling_for(TARGETS[target]) as compiled:
        y = cross_modal_linear(x, weight, torch.empty_like(weight), torch.empty(1, requires_grad=True))
        y.backward(torch.empty_like(y))
    assert y.numel() > 2**31 and len(compiled) == 3
    assert all(resources(kernel).spilled == 0 for kernel in compiled)


def compile_step(target, weight_dtype, aux_dtype):
    """Forward, grad_input and grad_parameters for bfloat16 activations."""
    tensors, grad_output = operands(600, 3088, 1040, HALF, weight_dtype)
    tensors["aux_weight"] = tensors["aux_weight"].detach().to(aux_dtype)
    with compiling_for(TARGETS[target]) as compiled:
        cross_modal_linear(**tensors).backward(grad_output)
    assert len(compiled) == 3
    for kernel in compiled:
        assert "_tma_" in kernel.metadata.name
        assert resources(kernel).spilled == 0
    return sorted(compiled, key=lambda kernel: kernel.metadata.name)


@by_tma
@pytest.mark.parametrize("weight_dtype, aux_dtype", [(HALF, HALF), (FLOAT, FLOAT)], ids=str)
def test_hopper_multiplies_from_registers_without_waiting(first_tiles, without_gluon, weight_dtype, aux_dtype):
    most = (140, 140, 58) if RELEASE < (3, 9) else (141, 140, 61)  # whose assembler is another
    with no_product_is_waited_for():
        compiled = compile_step("sm_90", weight_dtype, aux_dtype)
    for kernel, instructions in zip(compiled, most, strict=True):
        loop = main_loop(kernel)
        assert loop.instructions["tensor"] == 4 and loop.stores_to_shared == 0
        assert sum(loop.instructions.values()) <= instructions


@needs_compiler("sm_100")
@by_tma
@pytest.mark.parametrize("weight_dtype, aux_dtype", [(HALF, HALF), (FLOAT, FLOAT)], ids=str)
def test_blackwell_multiplies_from_tensor_memory(first_tiles, weight_dtype, aux_dtype):
    *products, grad_parameters = compile_step("sm_100", weight_dtype, aux_dtype)
    for kernel in (*products, grad_parameters):
        assert 0 < kernel.metadata.tmem_size <= 512
        loop = main_loop(kernel)
        assert loop.instructions["tensor"] >= 4 and loop.stores_to_shared == 0
    for kernel in products:
        left_operands = re.findall(r"tcgen05\.mma\.\S+ \[[^]]+\], (.)", kernel.asm["ptx"])
        assert set(left_operands) == {"["}
        assert main_loop(kernel).instructions["float"] == 32


@by_tma
@pytest.mark.parametrize(
    "target, position, weight_dtype, aux_dtype",
    [
        ("sm_90", 1, FLOAT, FLOAT),
        ("sm_90", 2, HALF, HALF),
        for_target("sm_100", 1, HALF, HALF),
        for_target("sm_100", 2, FLOAT, FLOAT),
    ],
    ids=str,
)
def test_other_tiles_by_tma(first_tiles, without_gluon, target, position, weight_dtype, aux_dtype, monkeypatch):
    for name in ("tma_tiles", "tma_grad_tiles"):
        tiles = getattr(plans, name)
        monkeypatch.setattr(plans, name, lambda *product, tiles=tiles: tiles(*product)[: position + 1][-1:])
    compile_step(target, weight_dtype, aux_dtype)


def test_float32_precision_follows_torch(matmul_precision):
    target = TARGETS["sm_90"]
    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        matmul_precision(setting)
        assert input_precision(FLOAT, target) == expected
        assert input_precision(FLOAT, TARGETS["gfx1100"]) == input_precision(HALF, target) == "ieee"


@pytest.mark.parametrize(
    "owner, name, value",
    [
        ("backends.cuda.matmul", "allow_tf32", True),
        ("backends.cuda.matmul", "fp32_precision", "tf32"),
        ("backends", "fp32_precision", "tf32"),
    ],
)
def test_float32_precision_follows_torchs_other_settings(owner, name, value):
    """In a process of its own: torch refuses to mix them."""
    process = FORKSERVER.Process(target=assert_tf32_follows, args=(owner, name, value))
    process.start()
    process.join()
    assert process.exitcode == 0


def assert_tf32_follows(owner, name, value):
    assert input_precision(FLOAT, TARGETS["sm_90"]) == "ieee"
    setattr(attrgetter(owner)(torch), name, value)
    assert input_precision(FLOAT, TARGETS["sm_90"]) == "tf32"
