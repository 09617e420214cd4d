"""Gradients whose reduction over the tokens is split: any number of splits of any shape, in a fixed order."""

import pytest
import torch
from helpers import (
    DTYPES,
    HALF,
    NAMES,
    STORAGES,
    assert_as_good_as_torch,
    assert_quantized_as_good_as_torch,
    every_other,
    exact,
    operands,
    outputs,
    padded,
    scale_gradient_bound,
    transposed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from m2pt_kernels import cross_modal_linear, estimates, gemm, split_sums
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.ops import path_of
from m2pt_kernels.plans import UNTUNED
from m2pt_kernels.tiles import ceil_div

LAYOUTS = (torch.Tensor.contiguous, transposed, padded, every_other)


@pytest.fixture
def split(monkeypatch):
    """Make every gradient be split among so many blocks, or as many as its tokens have steps; returns how many were."""
    made, launch = [], split_sums.grad_parameters

    def choose(wanted):
        def clocks(by, tile, work):
            steps = 0 if work.models else ceil_div(work.depth, tile.BLOCK_K)
            return {ceil_div(steps, ceil_div(steps, min(wanted, steps))) if steps else 1: 0}

        made.clear()
        UNTUNED.clear()
        monkeypatch.setattr(estimates, "clocks", clocks)
        monkeypatch.setattr(
            split_sums, "grad_parameters", lambda splits, *others: made.append(len(splits)) or launch(splits, *others)
        )
        return made

    return choose


def runs_kernels(device):
    return path_of(torch.empty(0, device=device)) is gemm


@settings(max_examples=15 if INTERPRETED else 60)
@given(
    seed=st.integers(0, 2**32 - 1),
    splits=st.integers(2, 9),
    tokens=st.integers(1, 300),
    features=st.tuples(*[st.integers(1, 70)] * 2),
    models=st.integers(1, 3),
    dtypes=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    needs_grad=st.sets(st.sampled_from(NAMES), min_size=1),
)
def test_any_number_of_splits_shape_stride_dtype_and_subset(
    device, split, seed, splits, tokens, features, models, dtypes, layouts, needs_grad
):
    torch.manual_seed(seed)
    split(splits)
    tensors, grad_output = operands(tokens, *features, *dtypes, device, needs_grad=(), models=models)
    tensors["x"], grad_output = layouts[0](tensors["x"]), layouts[1](grad_output)
    if models == 1:
        tensors["aux_weight"] = layouts[2](tensors["aux_weight"])
    for name in needs_grad:
        tensors[name].requires_grad_()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize(
    "splits, tokens, expected",
    [
        (2, 5, []),  # less than a step
        (3, 97, [2]),  # four steps: shares of two
        (4, 97, [4]),  # a token in the last share
        (16, 600, [10]),  # 19 steps: shares of two
    ],
)
def test_shares_of_the_tokens(device, split, splits, tokens, expected):
    made = split(splits)
    tensors, grad_output = operands(tokens, 48, 64, HALF[0], HALF[0], device)
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)
    if device == "cpu":  # tiles of a GPU have other steps
        assert made == (expected if runs_kernels(device) else [])


@pytest.mark.parametrize("one, features", enumerate([(1, 64), (33, 64), (5, 1088)]), ids=str)
@pytest.mark.parametrize("other, storage", enumerate(STORAGES), ids=str)
def test_quantized_aux_weight(device, split, other, storage, one, features):
    models = 1 + (one + other) % 2
    made = split(3)
    needs_grad = ("weight", "scale")
    tensors, grad_output = operands(137, *features, *DTYPES[-1], device, needs_grad, models=models)
    assert_quantized_as_good_as_torch(tensors, grad_output, storage)
    assert bool(made) == runs_kernels(device)


@pytest.mark.parametrize("shape", [(257, 70, 45), (97, 3, 1060)], ids=str)
def test_the_scale_gradient_is_exact_and_reproducible(device, split, shape):
    tensors, grad_output = operands(*shape, HALF[0], HALF[0], device, needs_grad=("scale",))
    want = exact(tensors, grad_output)["scale"]
    for splits in (2, 5):
        made = split(splits)
        runs = [outputs(cross_modal_linear, tensors, grad_output)["scale"] for _ in range(2)]
        assert (runs[0].double() - want).abs() <= scale_gradient_bound(want, 1e-5, tensors, grad_output)
        assert torch.equal(*runs)
        assert len(made) == (2 if runs_kernels(device) else 0)


@pytest.mark.parametrize("name", ["x", "grad_output"])
def test_what_is_infinite_stays_so(device, split, name):
    split(4)
    tensors, grad_output = operands(200, 33, 40, HALF[0], HALF[0], device, needs_grad=("weight", "scale"))
    tensors |= {"grad_output": grad_output}
    tensors[name][150, 7] = torch.inf
    grad_output = tensors.pop("grad_output")
    got, want = outputs(cross_modal_linear, tensors, grad_output), exact(tensors, grad_output)
    for key in ("weight", "scale"):
        assert torch.equal(got[key].isfinite(), want[key].isfinite())
