"""What tells a right result from a wrong one: results that plain torch makes, with faults made on purpose."""

import itertools
from functools import partial

import pytest
import torch
from helpers import changed
from torch.utils._pytree import tree_map

from benchmarks.offline import TARGETS, compiling_for
from m2pt_kernels import gemm, verification
from m2pt_kernels.cases import KINDS, PRODUCTS, Shape, cases
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.plans import EAGER, Plan
from m2pt_kernels.products import GradParameters
from m2pt_kernels.verification import Bound, verify

PLAN = Plan("pointers", "under test")
SHAPE = Shape(70, 128, 96)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no kernel runs here")


@pytest.fixture(autouse=True)
def _on_hopper():
    with compiling_for(TARGETS["sm_90"]):
        yield


@pytest.fixture
def computing_by(monkeypatch):
    """Have PLAN computed by a function of the product."""

    def replace(function):
        def compute(plan, product):
            return function(product) if plan == PLAN else in_torch(product)

        monkeypatch.setattr(gemm, "compute", compute)

    return replace


in_torch = partial(gemm.compute, EAGER)


def exactly(product):
    """In float64, rounded once."""
    scales = getattr(product, "combined", product).aux_weight_scale
    if scales is not None:
        aux_weight = verification.dequantize(product.operands[2], scales)
        product = changed(product, aux_weight=aux_weight, aux_weight_scale=None)
    wide = {torch.Tensor: torch.Tensor.double, torch.dtype: lambda _: torch.float64}
    result = in_torch(tree_map(lambda operand: wide.get(type(operand), lambda it: it)(operand), product))
    if isinstance(result, torch.Tensor):
        return result.to(product.left.dtype)
    dtypes = product.weight_dtype, product.aux_dtype, torch.float32
    return tuple(None if value is None else value.to(dtype) for value, dtype in zip(result, dtypes, strict=True))


def outputs(result):
    return [result] if isinstance(result, torch.Tensor) else [output for output in result if output is not None]


ALL = list(itertools.product(KINDS, PRODUCTS))


@pytest.mark.parametrize("shape", [SHAPE, Shape(1, 64, 3), Shape(45, 23, 29)], ids=str)
@pytest.mark.parametrize("kind, product", ALL)
def test_right_results_have_no_fault(computing_by, kind, product, shape):
    computing_by(exactly)
    for case in cases(KINDS[kind], product, shape, "cpu"):
        finding = verify(PLAN, case.product)
        assert finding.fault is None and 0 <= finding.error_ratio <= 1.01


@pytest.mark.parametrize("kind, product", ALL)
def test_plain_torch_has_no_fault(kind, product):
    for case in cases(KINDS[kind], product, SHAPE, "cpu"):
        assert verify(EAGER, case.product) == (None, pytest.approx(1, abs=1))


def a_row_too_few(product):
    result = in_torch(product)
    outputs(result)[0][-1] = 0
    return result


def the_last_terms_left_out(product):
    if isinstance(product, GradParameters):
        return in_torch(changed(product, grad_output=product.grad_output[:-4], x=product.x[:-4]))
    left = product.left.clone()
    left[:, -4:] = 0
    return in_torch(changed(product, left=left))


def two_entries_changed_places(product):
    result = in_torch(product)
    output = outputs(result)[0]
    output[[0, 1], 5] = output[[1, 0], 5]
    return result


def left_empty(product):
    result = in_torch(product)
    outputs(result)[-1].view(-1)[-1:] = torch.empty(1)
    return result


def another_scale(product):
    scale = product.operands[3]
    return in_torch(product if scale is None else changed(product, cross_modal_scale=1.1 * scale))


FAULTS = [a_row_too_few, the_last_terms_left_out, two_entries_changed_places, left_empty]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind, product", ALL)
def test_a_wrong_result_is_a_fault(computing_by, kind, product, fault):
    computing_by(fault)
    for case in cases(KINDS[kind], product, SHAPE, "cpu"):
        assert "plain torch" in verify(PLAN, case.product).fault


@pytest.mark.parametrize("kind, product", ALL)
def test_another_scale_is_a_fault(computing_by, kind, product):
    computing_by(another_scale)
    for case in cases(KINDS[kind], product, SHAPE, "cpu"):
        fault = verify(PLAN, case.product).fault
        assert (fault is None) == (case.product.operands[3] is None)
        assert fault is None or product != "grad_parameters" or fault.startswith("error of the gradient of aux_weight")


@pytest.mark.parametrize("output, name", list(enumerate(["weight", "aux_weight", "scale"])))
def test_each_gradient_counts(computing_by, output, name):
    def fault(product):
        result = in_torch(product)
        result[output].view(-1)[-1] *= 1.2
        return result

    computing_by(fault)
    case = cases(KINDS["autocast, two models"], "grad_parameters", SHAPE, "cpu")[1]
    found = verify(PLAN, case.product).fault
    assert found.startswith(f"error of the gradient of {name}") and ";" not in found


def test_a_scale_gradient_of_a_rounded_gradient_is_a_fault(computing_by):
    def fault(product):
        total, aux_weight = in_torch(product), product.aux_weight
        return *total[:2], (total[0].bfloat16().float() * aux_weight.float() * 1.004).sum().view(1)

    computing_by(fault)
    case = cases(KINDS["autocast"], "grad_parameters", Shape(4, 128, 96), "cpu")[0]
    positive = {name: getattr(case.product, name).abs() for name in ("grad_output", "x", "aux_weight")}
    assert "the gradient of scale" in verify(PLAN, changed(case.product, **positive)).fault  # nothing cancels


def test_different_bits_are_a_fault(computing_by):
    runs = itertools.count()

    def fault(product):
        result = in_torch(product)
        if next(runs) == 2:
            result[-1, -1] = torch.nextafter(result[-1, -1], torch.tensor(9.0))
        return result

    computing_by(fault)
    (case,) = cases(KINDS["fp32"], "grad_input", SHAPE, "cpu")
    assert "different bits" in verify(PLAN, case.product).fault


@pytest.fixture(params=["tf32", "ieee"])
def precision(request):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("product", PRODUCTS)
def test_operands_cut_to_tf32_are_right_if_torch_allows_tf32(computing_by, precision, product):
    def fault(product):
        names = ("grad_output", "x") if isinstance(product, GradParameters) else ("left", "weight")
        cut = [(operand.view(torch.int32) & -(2**13)).view(torch.float32) for operand in product.operands[:2]]
        return in_torch(changed(product, **dict(zip(names, cut, strict=True))))

    computing_by(fault)
    for case in cases(KINDS["tf32"], product, SHAPE, "cpu"):
        assert (verify(PLAN, case.product).fault is None) == (precision == "tf32")


def test_an_error_is_raised(computing_by):
    def fault(product):
        raise RuntimeError("an illegal memory access was encountered")

    computing_by(fault)
    (case,) = cases(KINDS["fp32"], "grad_input", SHAPE, "cpu")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        verify(PLAN, case.product)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind, product", ALL)
def test_blocks_are_the_whole(monkeypatch, kind, product):
    case = cases(KINDS[kind], product, Shape(150, 128, 96), "cpu")[-1]
    got = verification._outputs(case.product, in_torch(case.product))
    compare = verification._compare_gradients if product == "grad_parameters" else verification._compare_combined
    whole = compare(got, got, case.product)
    monkeypatch.setattr(verification, "_BLOCK_ENTRIES", 500)
    blocks = compare(got, got, case.product)
    assert whole.keys() == blocks.keys()
    for name, bound in whole.items():
        assert blocks[name].error == pytest.approx(bound.error, rel=1e-9)
        assert blocks[name].accepted == pytest.approx(bound.accepted, rel=1e-5)


def test_a_combined_weight_that_may_overflow_is_no_fault(computing_by):
    def overflowing(product):
        weight = product.combined.weight
        return in_torch(changed(product, weight=torch.where(weight == largest, torch.inf, weight)))

    computing_by(overflowing)
    largest = torch.finfo(torch.float16).max
    (case,) = cases(KINDS["fp16"], "grad_input", SHAPE, "cpu")
    grad_output, combined, _ = case.product
    combined.weight[3, 5], combined.aux_weight[3, 5], grad_output[:, 3] = largest, 0, 0.1
    assert verify(PLAN, case.product).fault is None


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_torch_is_as_deterministic_as_before(computing_by, mode):
    def check_mode(product):
        assert torch.zeros(3).new_empty(2, dtype=torch.float16).isnan().all()
        return in_torch(product)

    computing_by(check_mode)
    (case,) = cases(KINDS["fp32"], "grad_input", SHAPE, "cpu")
    torch.set_deterministic_debug_mode(mode)
    try:
        assert verify(PLAN, case.product).fault is None
        assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(0)


@pytest.mark.parametrize("product", PRODUCTS)
def test_nothing_is_right(product):
    case = cases(KINDS["autocast"], product, Shape(0, 64, 32), "cpu")[0]
    assert verify(EAGER, case.product).fault is None


@pytest.mark.parametrize("share, accepted", [(0.0, False), (1.5, False), (2.5, True)])
def test_roundings_of_operands_are_accepted(share, accepted):
    eps, ones = torch.finfo(torch.float16).eps, torch.ones(1, dtype=torch.float64)
    bound = Bound(torch.float16, 4)
    bound.add((ones + 3 * eps).half(), ones.half(), ones, ones, share * eps * ones)
    assert (bound.error <= bound.accepted) == accepted


def test_a_bound_counts_what_torch_has_finite():
    bound, ones = Bound(torch.float16, 4), torch.ones(2, dtype=torch.float64)
    bound.add(torch.tensor([9.0, 1.0]).half(), torch.tensor([torch.inf, 1.0]).half(), ones, ones)
    assert bound.error == 0
    bound.add(torch.tensor([1.0, torch.nan]).half(), ones.half(), ones, ones)
    assert not bound.error <= bound.accepted


def test_an_infinity_beside_the_largest_number_is_an_error_of_its_rounding():
    largest = torch.full((1,), torch.finfo(torch.float16).max, dtype=torch.float16)
    bound = Bound(torch.float16, 4)
    bound.add(largest * 2, largest, largest.double() + 8, largest.double() + 8)
    assert bound.error <= bound.accepted
