"""The operators inside torch's own machinery, on the eager path: opcheck, gradcheck, compile, checkpointing, FLOPs."""

import io
import itertools
import shutil
from functools import partial

import pytest
import torch
from helpers import connected, images, operands, outputs, published
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from m2pt import FusedCrossModalLinear, merge_pathways, quantize_aux
from m2pt_kernels import cross_modal_linear, implementation, quantize
from m2pt_kernels.devices import INTERPRETED

pytestmark = pytest.mark.slow

OPS = torch.ops.m2pt_kernels


def stored(aux_weight, storage):
    return (aux_weight, None) if storage is None else quantize(aux_weight, storage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "needs_grad", [(), ("x",), ("scale",), ("x", "weight", "aux_weight", "scale", "bias")], ids=str
)
def test_opcheck_forward(dtype, needs_grad):
    tensors, _ = operands(5, 6, 8, dtype, needs_grad=needs_grad)
    torch.library.opcheck(OPS.cross_modal_linear.default, tuple(tensors.values()))


@pytest.mark.parametrize("storage", [None, "int8", "int4"])  # opcheck itself cannot compare float8 tensors
@pytest.mark.parametrize(
    "has_bias,leading,models", [(True, (2, 3), 2), (False, (5,), 1), (False, (), 2), (True, (0, 3), 1)], ids=str
)
def test_opcheck_every_argument(has_bias, leading, models, storage):
    tensors, _ = operands(1, 6, 64, needs_grad=("weight", "scale", "bias"), models=models)
    _, weight, aux_weight, scale, bias = tensors.values()
    aux_weight, aux_weight_scale = stored(aux_weight, storage)
    x, grad_output = torch.randn(*leading, 64, requires_grad=True), torch.randn(*leading, 6)
    arguments = (x, weight, aux_weight, scale, bias if has_bias else None, aux_weight_scale)
    torch.library.opcheck(OPS.cross_modal_linear.default, arguments)
    arguments = (grad_output, weight.detach(), aux_weight, scale.detach(), aux_weight_scale)
    torch.library.opcheck(OPS.grad_input.default, arguments)


@pytest.mark.parametrize("storage", [None, "int8", "int4"])
@pytest.mark.parametrize("leading,models,dtype", [((5,), 1, torch.float32), ((2, 3), 2, torch.bfloat16)], ids=str)
def test_opcheck_grad_parameters(leading, models, dtype, storage):
    """Each gradient is asked for by an argument that may be None."""
    tensors, _ = operands(1, 6, 64, needs_grad=(), models=models)
    aux_weight, aux_weight_scale = stored(tensors["aux_weight"], storage)
    grad_output, x = torch.randn(*leading, 6, dtype=dtype), torch.randn(*leading, 64, dtype=dtype)
    for arguments in itertools.product(
        (None, aux_weight),
        (None,) if storage else (None, tensors["scale"]),
        (None, torch.bfloat16),
        (None, torch.float16),
        (aux_weight_scale,),
    ):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(OPS.grad_parameters.default, (grad_output, x, *arguments), test_utils=checks)
    torch.library.opcheck(OPS.grad_parameters.default, (grad_output, x, *arguments))


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


def trained(width):
    return FusedCrossModalLinear(width, 6, aux_weight=[*torch.randn(2, 6, width)], is_aux_trainable=True)


COMPILED = {
    "layer, two trained auxiliaries": (lambda: trained(8), (5, 8)),
    "model, int8 auxiliary": (lambda: quantize_aux(connected(depth=1), "int8"), (3, 32, 32)),
    "both": (lambda: nn.Sequential(quantize_aux(connected(depth=1), "int8").blocks[0].mlp, trained(48)), (5, 48)),
}


no_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on a CPU")


@pytest.mark.parametrize(
    "what, backend",
    [
        ("layer, two trained auxiliaries", "aot_eager"),
        ("model, int8 auxiliary", "aot_eager"),
        pytest.param("both", "inductor", marks=no_compiler),
    ],
)
def test_compiled_module_is_traced_again_for_another_batch_size_once_and_for_another_scale_never(what, backend):
    make, shape = COMPILED[what]
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        with torch._functorch.config.patch(enable_autograd_cache=False):  # it does not see changes of our operators
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

    module = make()
    compiled = torch.compile(module, fullgraph=True, backend=count)
    for step, batch in enumerate((4, 4, 6, 3, 9)):
        x, grads = torch.randn(batch, *shape), []
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("cross_modal_scale"):
                    parameter += 0.1
        for function in (compiled, module):
            module.zero_grad()
            y = function(x)
            y.square().mean().backward()
            grads.append({"y": y.detach()} | {name: p.grad for name, p in module.named_parameters()})
        torch.testing.assert_close(*grads)
        assert len(graphs) == (1 if step < 2 else 2)


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


def functional_arguments(models=1):
    """x, weight, aux_weight, scale, bias in float64."""
    tensors, _ = operands(4, 6, 8, torch.float64, torch.float64, needs_grad=(), models=models)
    return tuple(tensor.double() for tensor in tensors.values())


@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None, None), (None, None, None, 0, None), (0, 0, 0, 0, 0)], ids=str
)
@pytest.mark.parametrize("models", [1, 2])
def test_vmap(models, in_dims):
    arguments = functional_arguments(models)
    batched = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor]).requires_grad_()
        for tensor, dim in zip(arguments, in_dims, strict=True)
    ]
    leaves = [tensor for tensor in batched if tensor.requires_grad]
    y, want = (torch.vmap(f, in_dims)(*batched) for f in (cross_modal_linear, published))
    torch.testing.assert_close(y, want)
    grad_output = torch.randn_like(y)
    got, want = (torch.autograd.grad(out, leaves, grad_output) for out in (y, want))
    torch.testing.assert_close(got, want)


def test_batches_of_gradients():
    arguments = [tensor.requires_grad_() for tensor in functional_arguments()]
    grads = torch.randn(3, 4, 6, dtype=torch.float64)
    got, want = (
        torch.autograd.grad(f(*arguments), arguments, grads, is_grads_batched=True)
        for f in (cross_modal_linear, published)
    )
    torch.testing.assert_close(got, want)


def test_functional_call():
    layer = FusedCrossModalLinear(8, 6, aux_weight=torch.randn(6, 8)).double()
    x, weight, aux_weight, scale, bias = functional_arguments()
    other = {"weight": weight, "aux_weight": aux_weight, "cross_modal_scale": scale, "bias": bias}
    y = torch.func.functional_call(layer, other, (x,))
    torch.testing.assert_close(y, published(x, weight, aux_weight, scale, bias))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "linearize": lambda f, x: torch.func.linearize(f, x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda row: f(row).sum()))(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(x).sum())(x),
    "compiled grad": lambda f, x: torch.compile(torch.func.grad(lambda x: f(x).sum()), backend="aot_eager")(x),
    "dual numbers": lambda f, x: dual(f, x),
}


def dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_that_are_not_supported_say_so(transform):
    x, *others = functional_arguments()
    with pytest.raises(
        (NotImplementedError, torch._dynamo.exc.TorchDynamoException), match=r"cross_modal_linear: .*torch\.autograd"
    ):
        transform(lambda x: cross_modal_linear(x, *others), x)


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, autocast, storage):
    tensors, grad_output = operands(7, 6, 8, needs_grad=("x", "weight", "scale", "bias"))
    aux_weight, aux_weight_scale = stored(tensors["aux_weight"], storage)
    tensors |= {"aux_weight": aux_weight, "aux_weight_scale": aux_weight_scale}

    def checkpointed(**leaves):
        return checkpoint(cross_modal_linear, *leaves.values(), use_reentrant=use_reentrant)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        grad_output = grad_output.to(torch.bfloat16 if autocast else torch.float32)
        got, want = (outputs(f, tensors, grad_output) for f in (checkpointed, cross_modal_linear))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_selective_checkpointing_can_keep_the_product():
    keep = partial(create_selective_checkpoint_contexts, [OPS.cross_modal_linear.default])

    def two_products(x, weight, aux_weight, scale, bias):
        return cross_modal_linear(
            cross_modal_linear(x, weight, aux_weight, scale, bias).relu(), weight.t(), aux_weight.t(), scale
        )

    def checkpointed(**leaves):
        return checkpoint(two_products, *leaves.values(), use_reentrant=False, context_fn=keep)

    tensors, _ = operands(7, 6, 8)
    with Recorder() as recorder:
        got = outputs(checkpointed, tensors, torch.ones(7, 8))
    assert recorder.seen.count(OPS.cross_modal_linear.default) == 2
    want = outputs(two_products, tensors, torch.ones(7, 8))
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


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("autocast", [False, True])
def test_modes_see_operators(autocast):
    tensors, grad_output = operands(7, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Recorder() as forward:
            y = cross_modal_linear(**tensors)
        assert OPS.cross_modal_linear.default in forward.seen and OPS.grad_input.default not in forward.seen
        with Recorder() as backward:
            y.backward(grad_output.to(y.dtype))
    assert {OPS.grad_input.default, OPS.grad_parameters.default} <= set(backward.seen)


def dispatched(function, *arguments):
    with Recorder():
        return function(*arguments)


def compiled(function, *arguments):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)


RUNS = {"called": lambda function, *arguments: function(*arguments), "dispatched": dispatched, "compiled": compiled}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_nested_autocast_is_that_of_a_linear_with_the_merged_weight(run):
    """Enabled, disabled inside, enabled inside that with another dtype, and every level again on the way out."""
    autocast = partial(torch.autocast, "cpu", cache_enabled=False)  # F.linear finds the outer dtype in the cache
    tensors, _ = operands(7, 6, 8)

    def levels(linear, *arguments):
        ys = []
        with autocast(torch.bfloat16):
            ys.append(linear(*arguments))
            with autocast(enabled=False):
                ys.append(linear(*arguments))
                with autocast(torch.float16):
                    ys.append(linear(*arguments))
                ys.append(linear(*arguments))
            with autocast(torch.float16):
                ys.append(linear(*arguments))
            ys.append(linear(*arguments))
        return ys

    def merged(x, weight, aux_weight, scale, bias):
        return F.linear(x, torch.addcmul(weight, aux_weight, scale), bias)

    results = []
    for linear, runner in ((cross_modal_linear, run), (merged, RUNS["called"])):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        ys = runner(partial(levels, linear), *leaves)
        sum(y.double().square().sum() for y in ys).backward()
        results.append((ys, [leaf.grad for leaf in leaves]))
    (ys, grads), (wanted_ys, wanted_grads) = results
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert [y.dtype for y in ys] == [bf16, fp32, fp16, fp32, fp16, bf16]
    assert all(y.dtype == wanted.dtype and torch.equal(y, wanted) for y, wanted in zip(ys, wanted_ys, strict=True))
    torch.testing.assert_close(grads, wanted_grads, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_autocast_leaves_float64_as_it_is(run):
    arguments = functional_arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = run(cross_modal_linear, *arguments)
    torch.testing.assert_close(y, published(*arguments))


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


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("deploy", [merge_pathways, lambda model: model], ids=["merged", "connected"])
def test_export(deploy, strict):
    model = deploy(connected(depth=1).eval())
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        assert torch.equal(program.module()(images()[:3]), model(images()[:3]))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("deploy", [merge_pathways, lambda model: model], ids=["merged", "connected"])
def test_torchscript_by_tracing(deploy):
    model = deploy(connected(depth=1).eval())
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, images()), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(images()[:3]), model(images()[:3]))
    for module in (loaded, model):
        module(images()).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in loaded.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
