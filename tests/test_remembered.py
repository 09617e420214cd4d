"""Arguments are not checked again if an earlier call's were the same in all that the checks look at."""

from contextlib import nullcontext

import pytest
import torch
from helpers import operands
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from m2pt_kernels import cross_modal_linear, ops, quantize


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    """What is remembered, empty at first."""
    monkeypatch.setattr(ops, "_PASSED", {})
    return ops._PASSED


def valid(storage=None, **changes):
    tensors, _ = operands(2, 8, 64)
    if storage is not None:
        tensors["aux_weight"], tensors["aux_weight_scale"] = quantize(tensors["aux_weight"].detach(), storage)
    return tensors | changes


NESTED = torch.nested.nested_tensor([torch.randn(64), torch.randn(64)], layout=torch.strided)
SHAPES = {"x": (2, 64), "weight": (8, 64), "aux_weight": (8, 64), "scale": (1,), "bias": (8,)}
MADE = {
    "of an integer dtype": lambda shape: torch.ones(shape, dtype=torch.int32),
    "of another shape": lambda shape: torch.ones(7, 7),
    "on another device": lambda shape: torch.ones(shape, device="meta"),
    "that is sparse": lambda shape: torch.ones(shape).to_sparse(),
    "that is nested": lambda shape: NESTED,
    "that is no tensor": lambda shape: [1.0],
}
INVALID = {
    **{f"{name} {what}": {name: make(shape)} for name, shape in SHAPES.items() for what, make in MADE.items()},
    **{f"no {name}": {name: None} for name in ("x", "weight", "aux_weight", "scale")},
    "weight of a wider dtype": {"weight": torch.ones(8, 64, dtype=torch.float64)},
    "a scale of the quantisation": {"aux_weight_scale": torch.ones(8, 1)},
}
INVALID_QUANTIZED = {
    "no scale": {"aux_weight_scale": None},
    "a trained scale": {"aux_weight_scale": torch.ones(8, 1, requires_grad=True)},
    "another storage": {"aux_weight": torch.ones(8, 64, dtype=torch.uint8)},
    "a scale of another dtype": {"aux_weight_scale": torch.ones(8, 1, dtype=torch.float16)},
    "a scale of another shape": {"aux_weight_scale": torch.ones(8, 2)},
    "a scale on another device": {"aux_weight_scale": torch.ones(8, 1, device="meta")},
}


def refusal(tensors):
    with pytest.raises((TypeError, ValueError)) as caught:
        cross_modal_linear(**tensors)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "storage, changes",
    [
        *((None, changes) for changes in INVALID.values()),
        *(("int8", changes) for changes in INVALID_QUANTIZED.values()),
    ],
    ids=[*INVALID, *INVALID_QUANTIZED],
)
def test_what_is_not_valid_is_refused_as_before(remembered, storage, changes):
    expected = refusal(valid(storage, **changes))
    for _ in range(2):
        cross_modal_linear(**valid(storage))
    assert len(remembered) == 1
    assert refusal(valid(storage, **changes)) == expected
    assert len(remembered) == 1


def test_a_quantised_matrix_that_is_trained_later_is_refused():
    tensors = valid("float8_e4m3fn")
    cross_modal_linear(**tensors)
    tensors["aux_weight"].requires_grad_()
    assert refusal(tensors)[1].startswith("aux_weight: a quantised matrix")


def test_the_dtype_is_autocasts_of_now():
    for _ in range(2):
        assert cross_modal_linear(**valid()).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert cross_modal_linear(**valid()).dtype == dtype
    half = {"weight": torch.ones(8, 64, dtype=torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):
        cross_modal_linear(**valid(**half))
    assert refusal(valid(**half))[0] is TypeError


def test_what_passed_is_not_checked_again(monkeypatch):
    tensors, several = valid(), valid(x=torch.randn(3, 64))
    expected = cross_modal_linear(**tensors)
    monkeypatch.setattr(ops, "check_weights", lambda *tensors: pytest.fail("checked"))
    assert torch.equal(cross_modal_linear(**tensors), expected)
    with pytest.raises(pytest.fail.Exception):
        cross_modal_linear(**several)


def test_what_is_remembered_is_bounded(remembered, monkeypatch):
    monkeypatch.setattr(ops, "MOST_PASSED", 3)
    for samples in range(8):
        cross_modal_linear(**valid(x=torch.randn(samples, 64)))
        assert 0 < len(remembered) <= 3


NAMES = []
"""Of the operators that were seen."""


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        NAMES.append(function.name())
        return function(*arguments, **(named or {}))


class Recording(TwoTensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, arguments, named):
        NAMES.append(function.name())
        return super().__torch_dispatch__(function, types, arguments, named)


@pytest.mark.parametrize("watcher", [Recorder, Recording])
def test_who_watches_sees_the_operator_after_calls_that_nobody_watched(remembered, watcher):
    tensors = {name: tensor.detach() for name, tensor in valid().items()}
    x = tensors["x"]
    for _ in range(2):
        cross_modal_linear(**tensors)
        NAMES.clear()
        with Recorder() if watcher is Recorder else nullcontext():
            cross_modal_linear(**tensors | {"x": x if watcher is Recorder else Recording(x, x)})
        assert "m2pt_kernels::cross_modal_linear" in NAMES
    assert len(remembered) == 1


def test_sizes_that_are_symbols_are_not_remembered(remembered):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = {
        name: mode.from_tensor(tensor.detach(), symbolic_context=dynamic if name == "x" else None)
        for name, tensor in valid().items()
    }
    assert cross_modal_linear(**fake).shape == (fake["x"].shape[0], 8)
    assert not remembered
