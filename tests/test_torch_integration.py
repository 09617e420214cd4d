"""The operators inside torch's own machinery, on the eager path: opcheck, gradcheck, compile, checkpointing, FLOPs."""

import pytest
import torch
from test_ops import operands, outputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from m2pt_kernels import cross_modal_linear, implementation, quantize
from m2pt_kernels.configs import INTERPRETED

OPS = torch.ops.m2pt_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "needs_grad", [(), ("x",), ("scale",), ("x", "weight", "aux_weight", "scale", "bias")], ids=str
)
def test_opcheck_forward(dtype, needs_grad):
    tensors, _ = operands(5, 6, 8, dtype, needs_grad=needs_grad)
    torch.library.opcheck(OPS.cross_modal_linear.default, tuple(tensors.values()))
    torch.library.opcheck(OPS.cross_modal_linear.default, (tensors["x"].view(1, 5, 8), *list(tensors.values())[1:4]))


def test_opcheck_gradients():
    tensors, grad_output = operands(5, 6, 8, needs_grad=())
    x, weight, aux_weight, scale, _ = tensors.values()
    torch.library.opcheck(OPS.grad_input.default, (grad_output, weight, aux_weight, scale))
    for arguments in (
        (aux_weight, scale, torch.bfloat16, torch.float16),
        (aux_weight, None, None, None),
        (None, None, torch.float32, None),
        (None, scale, None, torch.float32),
    ):
        torch.library.opcheck(OPS.grad_parameters.default, (grad_output, x, *arguments))


@pytest.mark.parametrize("storage", ["int8", "int4"])  # opcheck itself cannot compare float8 tensors
def test_opcheck_quantized(storage):
    tensors, grad_output = operands(5, 6, 64, needs_grad=("x", "weight", "scale"))
    x, weight, aux_weight, scale, bias = tensors.values()
    data, scales = quantize(aux_weight, storage)
    torch.library.opcheck(OPS.cross_modal_linear.default, (x, weight, data, scale, bias, scales))
    x, weight, scale = x.detach(), weight.detach(), scale.detach()
    torch.library.opcheck(OPS.grad_input.default, (grad_output, weight, data, scale, scales))
    arguments = (grad_output, x, data, None, torch.float32, None, scales)
    torch.library.opcheck(OPS.grad_parameters.default, arguments)


def test_gradcheck():
    tensors, _ = operands(4, 3, 5, torch.float64, torch.float64)
    tensors["scale"] = tensors["scale"].detach().double().requires_grad_()
    assert torch.autograd.gradcheck(cross_modal_linear, tuple(tensors.values()))


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_graph_breaks_and_with_one_recompilation(autocast):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(cross_modal_linear, fullgraph=True, backend=count)
    for batch in (4, 6, 9, 11):
        tensors, grad_output = operands(batch, 6, 8)
        dtype = torch.bfloat16 if autocast else torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = outputs(compiled, tensors, grad_output.to(dtype))
            want = outputs(cross_modal_linear, tensors, grad_output.to(dtype))
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=name)
    assert len(graphs) == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_quantized(autocast):
    torch._dynamo.reset()
    compiled = torch.compile(cross_modal_linear, fullgraph=True, backend="aot_eager")
    tensors, grad_output = operands(4, 6, 64, needs_grad=("x", "weight", "scale", "bias"))
    tensors["aux_weight"], tensors["aux_weight_scale"] = quantize(tensors["aux_weight"], "int8")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        grad_output = grad_output.to(torch.bfloat16 if autocast else torch.float32)
        got, want = (outputs(f, tensors, grad_output) for f in (compiled, cross_modal_linear))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    tensors, grad_output = operands(7, 6, 8)

    def checkpointed(**leaves):
        return checkpoint(cross_modal_linear, *leaves.values(), use_reentrant=use_reentrant)

    got, want = (outputs(f, tensors, grad_output) for f in (checkpointed, cross_modal_linear))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_flops_are_those_of_a_plain_linear():
    def count(function):
        tensors, grad_output = operands(7, 6, 8)
        with FlopCounterMode(display=False) as counter:
            outputs(function, tensors, grad_output)
        return counter.get_total_flops()

    def linear(x, weight, aux_weight, scale, bias):
        return torch.nn.functional.linear(x, weight, bias) + 0 * scale + 0 * aux_weight.sum()

    assert count(cross_modal_linear) == count(linear) == 3 * 2 * 7 * 6 * 8


@pytest.mark.parametrize("autocast", [False, True])
def test_modes_see_operators(autocast):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **kwargs or {})

    seen = []
    tensors, grad_output = operands(7, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Recorder():
            y = cross_modal_linear(**tensors)
        assert OPS.cross_modal_linear.default in seen and OPS.grad_input.default not in seen
        with Recorder():
            y.backward(grad_output.to(y.dtype))
    assert {OPS.grad_input.default, OPS.grad_parameters.default} <= set(seen)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="Triton has a driver here")
def test_triton_is_refused_without_a_driver():
    with pytest.raises(RuntimeError, match='implementation\\("triton"\\)'), implementation("triton"):
        pass


def test_meta_tensors():
    tensors, _ = operands(5, 6, 8, device="meta")
    y = cross_modal_linear(**tensors)
    assert y.shape == (5, 6) and y.device.type == "meta"
    y.sum().backward()
    assert tensors["weight"].grad.shape == (6, 8)
