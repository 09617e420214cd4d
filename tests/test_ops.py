"""Every operator and gradient against float64, with plain torch's own error at the same dtypes as the measure."""

import ctypes
import itertools
import math
import mmap
from contextlib import ExitStack, nullcontext

import pytest
import torch
from helpers import (
    DTYPES,
    HALF,
    NAMES,
    STORAGES,
    assert_as_good_as_torch,
    assert_combined_weight_and_output_are_rounded_once_each,
    assert_gradients_of_weights_are_rounded_once,
    assert_quantized_as_good_as_torch,
    assert_small_terms_after_a_large_one_count,
    every_other,
    exact,
    operands,
    outputs,
    padded,
    published,
    quantized,
    scale_gradient_bound,
    transposed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from m2pt_kernels import cross_modal_linear, gemm, implementation
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.ops import path_of

SHAPES = [(1, 1, 1), (3, 5, 7), (64, 64, 64), (37, 70, 33), (130, 45, 129), (0, 8, 8)]


@pytest.mark.parametrize("dtype,weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(device, shape, dtype, weight_dtype):
    tensors, grad_output = operands(*shape, dtype, weight_dtype, device)
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["x", "weight", "aux_weight", "grad_output"])
def test_elements_further_apart_than_32_bits_count(device, name, transposed):
    """Within a tile and, as more than a tile deep, from step to step."""
    tensors, grad_output = operands(37, 37, 37, HALF[0], HALF[0], device, needs_grad=())
    tensors["grad_output"] = grad_output
    stride = 2**26 + 16
    memory = torch.empty(36 * stride + 37, dtype=HALF[0], device=device)
    far = memory.as_strided((37, 37), (1, stride) if transposed else (stride, 1))
    tensors[name] = far.copy_(tensors[name])
    grad_output = tensors.pop("grad_output")
    x, weight, aux_weight, scale = (tensors[key] for key in NAMES[:4])
    combined = weight.double() + scale.double() * aux_weight.double()
    total = grad_output.double().t() @ x.double()
    ops = torch.ops.m2pt_kernels
    close = {"rtol": 0.01, "atol": 0.01}
    y = ops.cross_modal_linear(**tensors)
    torch.testing.assert_close(y.double(), x.double() @ combined.t() + tensors["bias"].double(), **close)
    grad_x = ops.grad_input(grad_output, weight, aux_weight, scale)
    torch.testing.assert_close(grad_x.double(), grad_output.double() @ combined, **close)
    grad_weight, _, grad_scale = ops.grad_parameters(grad_output, x, aux_weight, scale, x.dtype, x.dtype)
    torch.testing.assert_close(grad_weight.double(), total, **close)
    torch.testing.assert_close(grad_scale.double(), (total * aux_weight.double()).sum().view(1), **close)


@pytest.mark.parametrize("needs_grad", [s for n in range(6) for s in itertools.combinations(NAMES, n)], ids="+".join)
def test_every_subset_of_gradients(device, needs_grad):
    tensors, grad_output = operands(17, 12, 9, device=device, needs_grad=needs_grad)
    if not needs_grad:
        y = cross_modal_linear(**tensors)
        assert y.grad_fn is None
        torch.testing.assert_close(y, published(**tensors))
        return
    got = outputs(cross_modal_linear, tensors, grad_output)
    assert set(got) == {"y", *needs_grad}
    assert_as_good_as_torch(got, tensors, grad_output)


@pytest.mark.parametrize("needs_grad", [s for n in range(6) for s in itertools.combinations(NAMES, n)], ids="+".join)
def test_saves_what_the_gradients_need_and_nothing_else(device, needs_grad):
    tensors, _ = operands(17, 12, 9, device=device, needs_grad=needs_grad)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None):
        cross_modal_linear(**tensors)
    wanted = set()
    if "x" in needs_grad:
        wanted |= {"weight", "aux_weight", "scale"}
    if "weight" in needs_grad:
        wanted |= {"x"}
    if "aux_weight" in needs_grad:
        wanted |= {"x", "scale"}
    if "scale" in needs_grad:
        wanted |= {"x", "aux_weight"}
    assert sorted(saved) == sorted(tensors[name].data_ptr() for name in wanted)


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("layout", [transposed, padded, every_other, expanded])
@pytest.mark.parametrize("name", ["x", "weight", "aux_weight", "grad_output"])
def test_strides(device, name, layout):
    tensors, grad_output = operands(37, 24, 33, device=device, needs_grad=())
    tensors["grad_output"] = grad_output
    tensors[name] = layout(tensors[name])
    assert tensors[name].stride() != (tensors[name].shape[1], 1)
    grad_output = tensors.pop("grad_output")
    for tensor in tensors.values():
        tensor.requires_grad_()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def test_strided_bias_and_scale(device):
    tensors, grad_output = operands(37, 24, 33, device=device, needs_grad=())
    tensors["bias"] = every_other(tensors["bias"][None])[0]
    tensors["scale"] = tensors["scale"].expand(3)[::3]
    for tensor in tensors.values():
        tensor.requires_grad_()
    assert tensors["bias"].stride() == (2,)
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def negated_lazily(tensor):
    return torch._neg_view(-tensor)


def imaginary_part(tensor):
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def zeros_not_stored(tensor):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@pytest.mark.parametrize("view", [negated_lazily, imaginary_part, zeros_not_stored])
@pytest.mark.parametrize("name", [*NAMES, "grad_output"])
def test_entries_that_are_not_those_in_memory(device, name, view):
    tensors, grad_output = operands(17, 12, 9, device=device, needs_grad=())
    tensors["grad_output"] = grad_output
    tensors[name] = view(tensors[name])
    assert tensors[name].is_neg() or tensors[name]._is_zerotensor()
    grad_output = tensors.pop("grad_output")
    for tensor in tensors.values():
        tensor.requires_grad_()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize("name", ["x", "weight", "aux_weight", "scale"])
def test_a_tensor_changed_before_backward_is_an_error(device, name):
    tensors, grad_output = operands(17, 12, 9, device=device)
    y = cross_modal_linear(**tensors)
    with torch.no_grad():
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad_output)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 70)] * 3),
    dtypes=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from([torch.Tensor.contiguous, transposed, padded, every_other])] * 3),
    scale=st.sampled_from([0.0, 1e-8, 0.3, -1.0, 1e4]),
    needs_grad=st.sets(st.sampled_from(NAMES), min_size=1),
)
def test_any_shape_stride_dtype_scale_and_subset(device, seed, shape, dtypes, layouts, scale, needs_grad):
    torch.manual_seed(seed)
    tensors, grad_output = operands(*shape, *dtypes, device, needs_grad=())
    tensors["scale"].fill_(scale)
    for name, layout in zip(("x", "weight", "aux_weight"), layouts, strict=True):
        tensors[name] = layout(tensors[name])
    for name in needs_grad:
        tensors[name].requires_grad_()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 5), (0, 3)], ids=str)
def test_leading_dimensions(device, leading):
    tensors, _ = operands(1, 6, 8, device=device)
    tensors["x"] = torch.randn(*leading, 8, device=device, requires_grad=True)
    grad_output = torch.randn(*leading, 6, device=device)
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def test_transposed_batch(device):
    tensors, _ = operands(1, 6, 8, device=device)
    tensors["x"] = torch.randn(5, 3, 8, device=device).transpose(0, 1).requires_grad_()
    grad_output = torch.randn(6, 3, 5, device=device).permute(1, 2, 0)
    got = outputs(cross_modal_linear, tensors, grad_output)
    assert got["y"].is_contiguous()
    assert_as_good_as_torch(got, tensors, grad_output)


def test_no_bias(device):
    tensors, grad_output = operands(37, 24, 33, device=device)
    tensors["bias"] = None
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize("aux_dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, *HALF], ids=str)
def test_aux_weight_and_scale_of_another_dtype(device, aux_dtype, scale_dtype):
    tensors, grad_output = operands(37, 24, 33, device=device, needs_grad=())
    tensors["aux_weight"] = tensors["aux_weight"].to(aux_dtype)
    tensors["scale"] = tensors["scale"].to(scale_dtype)
    got = outputs(cross_modal_linear, {n: t.detach().requires_grad_() for n, t in tensors.items()}, grad_output)
    want = exact({n: t.detach().requires_grad_() for n, t in tensors.items()}, grad_output)
    for name, expected in want.items():
        dtype = grad_output.dtype if name == "y" else tensors[name].dtype
        assert got[name].dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max()
        if name == "scale":
            tolerance = scale_gradient_bound(expected, 8 * torch.finfo(dtype).eps, tensors, grad_output)
        assert (got[name].double() - expected).abs().max() <= tolerance, name


@pytest.mark.parametrize("one, dtypes", enumerate(DTYPES), ids=str)
@pytest.mark.parametrize("other, shape", enumerate([(3, 5, 64), (37, 70, 192), (130, 45, 128), (0, 8, 64)]), ids=str)
def test_quantized_aux_weight(device, other, shape, one, dtypes):
    """With each dtype, and with each shape, every storage."""
    needs_grad = ("x", "weight", "scale", "bias")
    tensors, grad_output = operands(*shape, *dtypes, device, needs_grad)
    assert_quantized_as_good_as_torch(tensors, grad_output, STORAGES[(one + other) % 3])


@pytest.mark.parametrize("storage", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 70, 33)], ids=str)
def test_quantized_aux_weight_of_any_width(device, shape, storage):
    tensors, grad_output = operands(*shape, device=device, needs_grad=("x", "weight", "scale"))
    assert_quantized_as_good_as_torch(tensors, grad_output, storage)


@pytest.mark.parametrize("needs_grad", [("x",), ("scale",), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("layout", [transposed, padded, every_other])
@pytest.mark.parametrize("storage", STORAGES)
def test_quantized_strides_and_subsets(device, storage, layout, needs_grad):
    if storage == "float8_e4m3fn" and layout is padded:
        layout = transposed  # torch pads no float8
    tensors, grad_output = operands(17, 12, 128, device=device, needs_grad=needs_grad)
    assert_quantized_as_good_as_torch(tensors, grad_output, storage, layout)


@pytest.mark.parametrize("storage", STORAGES)
def test_quantized_saves_what_is_stored(device, storage):
    tensors, _ = operands(17, 12, 64, device=device, needs_grad=("x", "scale"))
    stored, _ = quantized(tensors, storage)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None):
        cross_modal_linear(**stored)
    names = ("x", "weight", "aux_weight", "aux_weight_scale", "scale")
    assert sorted(saved) == sorted(stored[name].data_ptr() for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_quantized_scale_gradient_is_exact_and_reproducible(device, storage, dtype):
    sizes = (70, 45, 128) if INTERPRETED else (394, 768, 768)
    tensors, grad_output = operands(*sizes, dtype, dtype, device, needs_grad=("scale",))
    stored, plain = quantized(tensors, storage)
    want = exact(plain, grad_output)["scale"]
    runs = [outputs(cross_modal_linear, stored, grad_output)["scale"] for _ in range(2)]
    assert (runs[0].double() - want).abs() <= scale_gradient_bound(want, 1e-5, plain, grad_output)
    assert torch.equal(*runs)


def before_forbidden_memory(tensor):
    """The same tensor in memory after which the process may not read; as it is, if it is not on the CPU."""
    if tensor.device.type != "cpu":
        return tensor
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory, pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=pages - tensor.nbytes)
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_nothing_is_read_past_the_end_of_an_operand(device, storage):
    """A masked load that lost its mask gives the same numbers, but ends the process here."""
    needs_grad = ("x", "weight", "scale", "bias")
    tensors, grad_output = operands(5, 40, 64 if storage == "int4" else 33, device=device, needs_grad=needs_grad)
    stored, plain = quantized(tensors, storage) if storage else (tensors, tensors)
    guarded = {
        name: before_forbidden_memory(tensor.detach()).requires_grad_(tensor.requires_grad)
        for name, tensor in stored.items()
    }
    got = outputs(cross_modal_linear, guarded, before_forbidden_memory(grad_output))
    assert_as_good_as_torch(got, plain, grad_output)


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_combined_weight_and_output_are_rounded_once_each(device, dtypes, models):
    assert_combined_weight_and_output_are_rounded_once_each(device, dtypes, models, features=70)


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_weights_are_rounded_once(device, dtype, models):
    assert_gradients_of_weights_are_rounded_once(device, dtype, models, rows=70)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_float32_parameters_are_not_rounded_to_half(device, dtype):
    tensors, grad_output = operands(37, 24, 33, dtype, torch.float32, device, needs_grad=NAMES[1:])
    got, want = outputs(cross_modal_linear, tensors, grad_output), exact(tensors, grad_output)
    for name in NAMES[1:]:
        tolerance = 1e-5 * want[name].abs().max()
        if name == "scale":
            tolerance = scale_gradient_bound(want[name], 1e-5, tensors, grad_output)
        assert (got[name].double() - want[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(device, dtype):
    tensors, grad_output = operands(37, 24, 33, device=device)
    tensors["x"] = tensors["x"].detach().to(dtype).float().requires_grad_()
    grad_output = grad_output.to(dtype)

    def under_autocast(function):
        def call(**leaves):
            with torch.autocast(device, dtype):
                return function(**leaves)

        return outputs(call, tensors, grad_output)

    assert_as_good_as_torch(
        under_autocast(cross_modal_linear), tensors, grad_output, torch_got=under_autocast(published)
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_backward_inside_autocast_is_not_rounded(device, dtype):
    for own_dtype in (dtype, torch.float32):
        tensors, grad_output = operands(37, 24, 33, own_dtype, device=device)
        outside = outputs(cross_modal_linear, tensors, grad_output)
        with ExitStack() as stack:

            def forward(enter=stack.enter_context, **leaves):
                return cross_modal_linear(**leaves), enter(torch.autocast(device, dtype))

            inside = outputs(lambda **leaves: forward(**leaves)[0], tensors, grad_output)
        assert all(torch.equal(inside[name], outside[name]) for name in outside)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("seed", range(1 if INTERPRETED else 3))
def test_scale_gradient_is_exact_and_reproducible(device, dtype, seed):
    torch.manual_seed(seed)
    sizes = (70, 45, 80) if INTERPRETED else (394, 768, 768)
    tensors, grad_output = operands(*sizes, dtype, dtype, device, needs_grad=("scale",))
    want = exact(tensors, grad_output)["scale"]
    runs = [outputs(cross_modal_linear, tensors, grad_output)["scale"] for _ in range(3)]
    assert (runs[0].double() - want).abs() <= scale_gradient_bound(want, 1e-5, tensors, grad_output)
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_every_operand_of_an_operator_is_of_a_dtype_that_the_kernels_read(device):
    tensors, grad_output = operands(17, 12, 9, device=device, needs_grad=())
    arguments = [grad_output, tensors["x"], tensors["aux_weight"], tensors["scale"], torch.float32, torch.float32]
    kernels = path_of(tensors["x"]) is gemm
    for position in range(4):
        wide = [*arguments[:position], arguments[position].double(), *arguments[position + 1 :]]
        with pytest.raises(TypeError, match="expected dtypes among") if kernels else nullcontext():
            torch.ops.m2pt_kernels.grad_parameters(*wide)


@pytest.mark.parametrize("has_scale", [True, False])
def test_an_aux_gradient_takes_both_a_scale_and_a_dtype(device, has_scale):
    tensors, grad_output = operands(17, 12, 9, device=device, needs_grad=())
    scale, aux_dtype = (tensors["scale"], None) if has_scale else (None, torch.float32)
    arguments = (grad_output, tensors["x"], None, scale, torch.float32, aux_dtype)
    assert [grad.numel() for grad in torch.ops.m2pt_kernels.grad_parameters(*arguments)] == [12 * 9, 0, 0]


def test_long_reduction(device):
    tensors, grad_output = operands(1000 if INTERPRETED else 5000, 3, 2, device=device)
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_terms_after_a_large_one_count(device, dtype):
    assert_small_terms_after_a_large_one_count(device, dtype, rows=3)


def test_empty_features(device):
    tensors, grad_output = operands(5, 3, 0, device=device)
    got = outputs(cross_modal_linear, tensors, grad_output)
    assert torch.equal(got["y"], tensors["bias"].detach().expand(5, 3))
    assert got["weight"].shape == (3, 0) and got["scale"].item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_spread_as_in_torch(device, name, value):
    """On a GPU an infinite scale may give NaN for torch's infinity: tiles reach past the matrices, to zeros."""
    tensors, grad_output = operands(17, 12, 9, device=device, needs_grad=())
    tensors[name].view(-1)[0] = value
    for tensor in tensors.values():
        tensor.requires_grad_()
    got, torch_got = (outputs(f, tensors, grad_output) for f in (cross_modal_linear, published))
    for key in got:
        if name == "scale" and math.isinf(value) and device == "cuda":
            assert torch.equal(got[key].isfinite(), torch_got[key].isfinite())
            got[key], torch_got[key] = (
                values[key].masked_fill(~values[key].isfinite(), 0) for values in (got, torch_got)
            )
        torch.testing.assert_close(got[key], torch_got[key], equal_nan=True, rtol=1e-4, atol=1e-4, msg=key)


def test_second_order_gradients_are_refused(device):
    tensors, _ = operands(3, 4, 5, device=device)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(cross_modal_linear(**tensors).sum(), tensors["x"], create_graph=True)


def test_implementation_is_restored_after_an_error():
    tensors, _ = operands(2, 3, 4, torch.float64, torch.float64)
    with pytest.raises(KeyError), implementation("eager"):
        raise KeyError
    assert cross_modal_linear(**tensors).dtype == torch.float64
