"""Numbers under stress: magnitudes, denormals, NaN and infinity, long sums, and the same bits on every run."""

import math

import pytest
import torch
from helpers import (
    DTYPES,
    NAMES,
    assert_an_infinite_scale_gradient_is_infinite,
    assert_as_good_as_torch,
    exact,
    in_torch,
    operands,
    outputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from m2pt_kernels import cross_modal_linear, gemm
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.ops import path_of

stressed = settings(max_examples=10 if INTERPRETED else 60)


@stressed
@given(
    seed=st.integers(0, 2**32 - 1),
    models=st.integers(1, 3),
    shape=st.tuples(*[st.integers(1, 70)] * 3),
    dtypes=st.sampled_from(DTYPES),
    scale=st.floats(-8, 4).map(lambda exponent: 10**exponent),
    sign=st.sampled_from([-1, 1]),
    magnitudes=st.tuples(*[st.floats(-6, 3).map(lambda exponent: 10**exponent)] * 4),
)
def test_any_magnitude(device, seed, models, shape, dtypes, scale, sign, magnitudes):
    torch.manual_seed(seed)
    tensors, grad_output = operands(*shape, *dtypes, device, needs_grad=(), models=models)
    tensors["scale"] = tensors["scale"] * (sign * scale)
    for name, magnitude in zip(("x", "weight", "aux_weight"), magnitudes, strict=False):
        tensors[name] *= magnitude
    for tensor in tensors.values():
        tensor.requires_grad_()
    grad_output = grad_output * magnitudes[3]
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize("name", ["x", "weight", "aux_weight", "grad_output"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_denormals_count(device, dtypes, name):
    tensors, grad_output = operands(17, 12, 33, *dtypes, device, needs_grad=())
    tensors["grad_output"] = grad_output
    denormal = torch.finfo(tensors[name].dtype).smallest_normal / 8
    tensors[name] = (torch.randn_like(tensors[name]).clamp(-2, 2) * 4).round() * (denormal / 4)
    assert 0 < tensors[name].abs().max() < torch.finfo(tensors[name].dtype).smallest_normal
    if name != "grad_output":
        tensors["bias"].zero_()
        tensors["weight" if name == "aux_weight" else "aux_weight"].zero_()
    grad_output = tensors.pop("grad_output")
    for tensor in tensors.values():
        tensor.requires_grad_()
    got, torch_got = outputs(cross_modal_linear, tensors, grad_output), in_torch(tensors, grad_output)
    assert_as_good_as_torch(got, tensors, grad_output, torch_got)
    for key, found in got.items():  # a CPU's bfloat16 instructions take denormals as zero, in plain torch too
        assert found.count_nonzero() >= 0.9 * torch_got[key].count_nonzero(), key


@stressed
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    dtypes=st.sampled_from(DTYPES),
    name=st.sampled_from(["x", "weight", "aux_weight", "bias", "grad_output"]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    position=st.floats(0, 1, exclude_max=True),
)
def test_nan_and_infinity_spread_as_in_torch(device, seed, shape, dtypes, name, value, position):
    """The same entries are finite, and those that are not are NaN or the same infinity.

    As in float64: torch's own sum of two half-precision weights may round to zero, and zero times infinity is NaN.
    """
    torch.manual_seed(seed)
    tensors, grad_output = operands(*shape, *dtypes, device, needs_grad=())
    tensors["grad_output"] = grad_output
    tensors[name].view(-1)[int(position * tensors[name].numel())] = value
    grad_output = tensors.pop("grad_output")
    for tensor in tensors.values():
        tensor.requires_grad_()
    want = exact(tensors, grad_output)
    for key, found in outputs(cross_modal_linear, tensors, grad_output).items():
        assert torch.equal(found.isnan(), want[key].isnan()), key
        assert torch.equal(found == math.inf, want[key] == math.inf), key
        assert torch.equal(found == -math.inf, want[key] == -math.inf), key


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(device, dtypes):
    sizes, runs = ((70, 45, 80), 2) if INTERPRETED else ((300, 192, 768), 5)
    tensors, grad_output = operands(*sizes, *dtypes, device, models=2)
    first, *others = (outputs(cross_modal_linear, tensors, grad_output) for _ in range(runs))
    assert first.keys() == {"y", *NAMES}
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("dtype", [DTYPES[0][0], DTYPES[-1][0]], ids=str)
def test_scale_gradient_of_a_million_tokens(device, dtype, request):
    """A sum of 2**20 terms of one sign, the worst for float32 accumulators: plain torch's error here is about 4e-5."""
    if device == "cuda" and dtype == torch.float32 and path_of(torch.empty(0, device=device)) is gemm:
        reason = "one accumulator for all terms is off by 2e-4 on an H200; cuBLAS, which splits them, by 2e-7"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    rows = 2**11 if INTERPRETED else 2**20
    tensors, grad_output = operands(rows, 6, 9, dtype, dtype, device, needs_grad=("scale", "weight"))
    tensors["x"] = tensors["x"].abs()
    grad_output = grad_output.abs()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize("name", ["x", "grad_output"])
def test_an_infinite_scale_gradient_is_infinite(device, name):
    """Tiles reach past matrices of such sizes, where an infinity times zero is NaN."""
    assert_an_infinite_scale_gradient_is_infinite(device, name, (3, 5, 3))
