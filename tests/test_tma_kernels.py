"""The kernels that read by TMA, through the operators, against float64 and plain torch's own error.

Triton's interpreter runs those in `gemm_tma` as well, without their specialised warps: there the operators are told
that the device is a Hopper GPU, and given small tiles. On a Hopper or Blackwell GPU the same tests run with its own
tiles, and with the kernels in `gemm_hopper` and `gemm_hopper_gradients`, which only a GPU executes, and without them.
"""

import pytest
import torch
from helpers import (
    DTYPES,
    HALF,
    assert_an_infinite_scale_gradient_is_infinite,
    assert_as_good_as_torch,
    assert_combined_weight_and_output_are_rounded_once_each,
    assert_gradients_of_weights_are_rounded_once,
    assert_quantized_as_good_as_torch,
    assert_small_terms_after_a_large_one_count,
    operands,
    outputs,
    quantized,
)
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from m2pt_kernels import cross_modal_linear, estimates, gemm, gemm_tma, plans
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.ops import path_of

ROWS = 1000 if torch.cuda.is_available() else 72
HALVES = DTYPES[1:]
STEP = ["combined_matmul", "combined_matmul", "grad_parameters"]


@pytest.fixture(params=["gluon", "tl", "tl, split"] if torch.cuda.is_available() else ["tl", "tl, split"])
def products(request, device, monkeypatch):
    """The products that the kernels which read by TMA have made."""
    made = []

    def record(module, name):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: made.append(name) or launch(*arguments))

    record(gemm_tma, "combined_matmul")
    record(gemm_tma, "grad_parameters")
    if request.param == "gluon" and plans.gemm_hopper is not None:
        record(plans.gemm_hopper, "combined_matmul")
        record(plans.gemm_hopper_gradients, "grad_parameters")
    else:
        monkeypatch.setattr(plans, "gemm_hopper", None)
        monkeypatch.setattr(plans, "gemm_hopper_gradients", None)
    if INTERPRETED:
        monkeypatch.setattr(plans, "active_target", lambda: GPUTarget("cuda", 90, 32))
    if INTERPRETED and plans.HAS_TMA_LOOPS:
        small = gemm_tma.CombinedTile(BLOCK_M=32, MORE_M=16, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=1)
        small_grad = gemm_tma.GradTile(BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=1)
        tiles = {2: [small], 4: [small._replace(MORE_M=0)]}
        monkeypatch.setattr(plans, "tma_tiles", lambda target, combined: tiles[combined.weight.itemsize])
        monkeypatch.setattr(plans, "tma_grad_tiles", lambda *_: [small_grad])
    kernels = ["hopper", "tma", "pointers"]
    splits = 2 if "split" in request.param else 1
    monkeypatch.setattr(estimates, "clocks", lambda by, tile, work: {1 if work.models else splits: kernels.index(by)})
    return made


def assert_by_tma(products, expected, device):
    """Where there is TMA, the kernels that read by it made just these."""
    runs = path_of(torch.empty(0, device=device)) is gemm and plans.HAS_TMA_LOOPS
    has_tma = runs and plans.architecture(plans.active_target()) in plans.TMA_TILES
    assert products == (expected if has_tma else [])


def further_apart(tensor, gap):
    """The same numbers in rows of a wider matrix."""
    return F.pad(tensor, (0, gap))[..., :-gap]


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("dtypes", HALVES, ids=str)
def test_output_and_gradients(device, products, dtypes, models):
    tensors, grad_output = operands(ROWS, 88, 72, *dtypes, device, models=models)
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)
    assert_by_tma(products, STEP, device)


@pytest.mark.parametrize("name", ["x", "weight", "aux_weight", "scale"])
def test_one_gradient_and_no_bias(device, products, name):
    tensors, grad_output = operands(ROWS, 88, 72, *HALVES[0], device, needs_grad=(name,), models=3)
    tensors["bias"] = None
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)
    assert_by_tma(products, STEP[:2] if name == "x" else STEP[1:], device)


@pytest.mark.parametrize(
    "storage, models, in_features, dtypes",
    [
        ("int8", 1, 80, HALVES[0]),
        ("int8", 2, 96, HALVES[-1]),
        ("float8_e4m3fn", 1, 96, HALVES[-1]),
        ("float8_e4m3fn", 2, 80, HALVES[0]),
    ],
    ids=str,
)
def test_quantized_aux_weight(device, products, storage, models, in_features, dtypes):
    needs_grad = ("x", "weight", "scale", "bias")
    tensors, grad_output = operands(ROWS, 88, in_features, *dtypes, device, needs_grad, models)
    assert_quantized_as_good_as_torch(tensors, grad_output, storage)
    assert_by_tma(products, STEP, device)


def test_rows_further_apart(device, products):
    tensors, grad_output = operands(ROWS, 88, 72, *HALVES[0], device, needs_grad=(), models=2)
    for gap, name in ((16, "x"), (32, "weight"), (48, "aux_weight")):
        tensors[name] = further_apart(tensors[name], gap)
    for tensor in tensors.values():
        tensor.requires_grad_()
    got = outputs(cross_modal_linear, tensors, further_apart(grad_output, 64))
    assert_as_good_as_torch(got, tensors, grad_output)
    assert_by_tma(products, STEP, device)


def test_vectors_further_apart(device, products):
    tensors, grad_output = operands(ROWS, 88, 80, *HALVES[0], device, needs_grad=(), models=2)
    for name in ("scale", "bias"):
        tensors[name] = further_apart(tensors[name][:, None], 3)[:, 0]
        assert not tensors[name].is_contiguous()
    for name in ("x", "weight", "scale", "bias"):
        tensors[name].requires_grad_()
    assert_quantized_as_good_as_torch(
        tensors, grad_output, "int8", layout_of_scales=lambda scales: further_apart(scales, 3)
    )
    assert_by_tma(products, STEP, device)


@pytest.mark.parametrize("models", [1, 2])
def test_int4_with_one_group_a_row_is_left_to_the_other_kernels(device, products, models):
    needs_grad = ("x", "weight", "scale", "bias")
    tensors, grad_output = operands(ROWS, 88, 64, *HALVES[0], device, needs_grad, models)
    assert_quantized_as_good_as_torch(tensors, grad_output, "int4")
    assert_by_tma(products, [], device)


def by_columns(tensor):
    return tensor.mT.contiguous().mT


def test_weights_stored_by_columns(device, products):
    tensors, grad_output = operands(ROWS, 88, 72, *HALVES[0], device, needs_grad=("x",), models=2)
    tensors["weight"], tensors["aux_weight"] = by_columns(tensors["weight"]), by_columns(tensors["aux_weight"])
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)
    assert_by_tma(products, STEP[:2], device)


def test_quantized_weights_stored_by_columns_are_left_to_the_other_kernels(device, products):
    tensors, grad_output = operands(ROWS, 112, 80, *HALVES[0], device, needs_grad=("x",))
    tensors["weight"] = by_columns(tensors["weight"])
    assert_quantized_as_good_as_torch(tensors, grad_output, "int8", by_columns)
    assert_by_tma(products, [], device)


@pytest.mark.parametrize("storage", [None, "int8"])
def test_scale_gradients_are_exact_and_reproducible(device, products, storage):
    tensors, grad_output = operands(ROWS, 88, 80, *HALVES[0], device, needs_grad=("scale",), models=2)
    stored, plain = quantized(tensors, storage) if storage else (tensors, tensors)
    terms = grad_output.double().t() @ tensors["x"].double() * plain["aux_weight"].double()
    runs = [outputs(cross_modal_linear, stored, grad_output)["scale"] for _ in range(2)]
    assert ((runs[0].double() - terms.sum((1, 2))).abs() <= 5e-7 * terms.abs().sum((1, 2))).all()
    assert torch.equal(*runs)
    assert_by_tma(products, STEP[1:] * 2, device)


@pytest.mark.parametrize("name", ["x", "grad_output"])
def test_an_infinite_scale_gradient_is_infinite(device, products, name):
    assert_an_infinite_scale_gradient_is_infinite(device, name, (ROWS, 88, 72), *HALVES[0])
    assert_by_tma(products, STEP[1:], device)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("dtypes", HALVES, ids=str)
def test_combined_weight_and_output_are_rounded_once_each(device, products, dtypes, models):
    assert_combined_weight_and_output_are_rounded_once_each(device, dtypes, models, features=ROWS)
    assert_by_tma(products, STEP[:1] * 3, device)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_weights_are_rounded_once(device, products, dtype, models):
    assert_gradients_of_weights_are_rounded_once(device, dtype, models, ROWS)
    assert_by_tma(products, STEP[1:], device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_terms_after_a_large_one_count(device, products, dtype):
    assert_small_terms_after_a_large_one_count(device, dtype, rows=ROWS)
    assert_by_tma(products, STEP[:2], device)
