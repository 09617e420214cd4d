"""What several test files share: operands, and how their products are judged; marks for what compiles; small models
and what is looked at in them; programs in which packages are missing."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from benchmarks.offline import TARGETS, can_compile
from m2pt import FusedCrossModalLinear, reparameterize_aux_into_target_model
from m2pt_kernels import cross_modal_linear, dequantize, quantize
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.plans import gemm_hopper
from m2pt_kernels.verification import Bound
from m2pt_kernels.versions import HAS_TMA_LOOPS

ROOT = Path(__file__).parents[1]
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
DTYPES = [(torch.float32, torch.float32), *((half, half) for half in HALF), *((half, torch.float32) for half in HALF)]
NAMES = ("x", "weight", "aux_weight", "scale", "bias")
STORAGES = ("int8", "int4", "float8_e4m3fn")


def operands(m, n, k, dtype=torch.float32, weight_dtype=torch.float32, device="cpu", needs_grad=NAMES, models=1):
    """x, weight, aux_weight, scale, bias and a gradient for the output, of the sizes a network has."""
    several = () if models == 1 else (models,)
    tensors = {
        "x": torch.randn(m, k, dtype=dtype, device=device),
        "weight": torch.randn(n, k, dtype=weight_dtype, device=device) / max(k, 1) ** 0.5,
        "aux_weight": torch.randn(*several, n, k, dtype=weight_dtype, device=device) / max(k, 1) ** 0.5,
        "scale": 0.3 - 0.5 * torch.arange(models, device=device),
        "bias": torch.randn(n, dtype=weight_dtype, device=device),
    }
    for name in needs_grad:
        tensors[name].requires_grad_()
    return tensors, torch.randn(m, n, dtype=dtype, device=device)


def changed(product, **operands):
    """A product of the kernels, with other operands."""
    own = {name: operands.pop(name) for name in product._fields if name in operands}
    return product._replace(**own, **({"combined": product.combined._replace(**operands)} if operands else {}))


def published(x, weight, aux_weight, scale, bias=None):
    """The published formulation: the combined weight is materialised, in the dtypes torch gives it."""
    scaled = scale.to(weight.dtype).view(-1, *(1,) * (aux_weight.dim() - 1)) * aux_weight
    return F.linear(x, weight + (scaled if aux_weight.dim() == 2 else scaled.sum(0)), bias)


def outputs(function, tensors, grad_output):
    """The output and the gradient of every tensor that asks for one."""
    leaves = {
        name: tensor if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    y = function(**leaves)
    y.backward(grad_output)
    return {"y": y.detach()} | {
        name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad
    }


def exact(tensors, grad_output):
    """The same in float64."""
    wide = {
        name: tensor if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    return outputs(published, wide, grad_output.double())


def without_cancellation(tensors, grad_output):
    """The same of absolute values: what float32 accumulators round, however small their sum is."""
    absolute = {
        name: tensor if tensor is None else tensor.detach().abs().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    return exact(absolute, grad_output.abs())


def moved_by_combined_rounding(tensors, grad_output):
    """How far a combined weight rounded to the dtype of x moves y and the gradient of x, in units of that dtype's eps:
    each term of their sums by half of its size at most, independently of others. Infinite where it may overflow."""
    x, weight, aux_weight, scale = (tensors[name].detach().double() for name in NAMES[:4])
    combined = weight + (scale.view(-1, 1, 1) * aux_weight).sum(0)
    limits = torch.finfo(tensors["x"].dtype)
    combined[combined.abs() > limits.max * (1 - limits.eps)] = math.inf
    squares = combined.square()
    return {"y": (x.square() @ squares.t()).sqrt(), "x": (grad_output.double().square() @ squares).sqrt()}


def scale_gradient_bound(want, eps, tensors, grad_output):
    """`eps` of the gradient wanted; on a GPU, where the terms may cancel and cuBLAS is further off too, twice what
    it moves if each float32 accumulator is off by a rounding of its terms' sum, independently of others."""
    x, aux_weight = tensors["x"].detach().double(), tensors["aux_weight"].detach().double()
    if x.device.type == "cpu":
        return eps * want.abs().max()
    terms = grad_output.double().abs().t() @ x.abs()
    return eps * want.abs().max() + 2 * torch.finfo(torch.float32).eps * (terms * aux_weight).norm()


def in_torch(tensors, grad_output):
    """What plain torch makes of the same tensors; float32 weights with a half-precision x need its autocast."""
    dtype = tensors["x"].dtype
    if tensors["weight"].dtype == dtype:
        return outputs(published, tensors, grad_output)

    def autocast(**leaves):
        with torch.autocast(leaves["x"].device.type, dtype):
            return published(**leaves)

    return outputs(autocast, tensors, grad_output)


def assert_as_good_as_torch(got, tensors, grad_output, torch_got=None):
    """No error is above what `Bound` accepts, roundings of the combined weight included."""
    want, terms = exact(tensors, grad_output), without_cancellation(tensors, grad_output)
    moved = moved_by_combined_rounding(tensors, grad_output)
    torch_got = in_torch(tensors, grad_output) if torch_got is None else torch_got
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].dtype == torch_got[name].dtype and got[name].shape == expected.shape, name
        if expected.numel():
            bound = Bound(got[name].dtype, tensors["x"].shape[-1])
            rounded = torch.finfo(got[name].dtype).eps * moved[name] if name in moved else None
            bound.add(got[name], torch_got[name], expected, terms[name], rounded)
            assert bound.error <= bound.accepted, f"{name}: {bound.error:.2e}, torch {bound.plain_error:.2e}"


def quantized(tensors, storage):
    """The operands with W_aux stored so, and the same with what it then stands for."""
    data, scale = quantize(tensors["aux_weight"], storage)
    stored = tensors | {"aux_weight": data, "aux_weight_scale": scale}
    return stored, tensors | {"aux_weight": dequantize(data, scale)}


def assert_quantized_as_good_as_torch(
    tensors, grad_output, storage, layout=torch.Tensor.contiguous, layout_of_scales=torch.Tensor.contiguous
):
    """Measured against float64 with the stored value; plain torch's own error is with that in the weight's dtype."""
    stored, plain = quantized(tensors, storage)
    stored["aux_weight"] = layout(stored["aux_weight"])
    stored["aux_weight_scale"] = layout_of_scales(stored["aux_weight_scale"])
    rounded = plain | {"aux_weight": plain["aux_weight"].to(tensors["weight"].dtype)}
    got = outputs(cross_modal_linear, stored, grad_output)
    assert_as_good_as_torch(got, plain, grad_output, in_torch(rounded, grad_output))


def transposed(tensor):
    return tensor.t().contiguous().t()


def padded(tensor):
    return F.pad(tensor, (3, 2))[:, 3:-2]


def every_other(tensor):
    return tensor.repeat_interleave(2, -1)[:, ::2]


def assert_combined_weight_and_output_are_rounded_once_each(device, dtypes, models, features):
    """Products with the identity show the combined weight.

    Weights on a grid and scales of two bits keep its sum exact in float32, and in no half precision; where weights are
    zero but one auxiliary model's, its scale may have more bits than half precision holds.
    """
    (dtype, weight_dtype), grid = dtypes, 2**13
    tensors, _ = operands(1, features, features, dtype, weight_dtype, device, needs_grad=(), models=models)
    weight, aux_weight = ((tensors[name] * grid).round() / grid for name in ("weight", "aux_weight"))
    bias = tensors["bias"].to(dtype)
    scale = 1.5 * 0.5 ** torch.arange(1, models + 1, device=device)
    total = weight.double() + (scale.double().view(-1, 1, 1) * aux_weight.double()).sum(0)
    combined, eye = total.to(dtype), torch.eye(features, dtype=dtype, device=device)
    assert torch.equal(torch.ops.m2pt_kernels.grad_input(eye, weight, aux_weight, scale), combined)
    y = cross_modal_linear(3 * eye, weight, aux_weight, scale, bias)
    assert torch.equal(y, (3 * combined.double().t() + bias.double()).to(dtype))
    scale = torch.tensor([0.0] * (models - 1) + [1 + 2**-8 + 2**-11], device=device)
    scaled = scale[-1].double() * aux_weight.view(models, features, features)[-1].double()
    scaled_alone = torch.ops.m2pt_kernels.grad_input(eye, torch.zeros_like(weight), aux_weight, scale)
    assert torch.equal(scaled_alone, scaled.to(dtype))


def assert_gradients_of_weights_are_rounded_once(device, dtype, models, rows):
    """Sums of integers and scales of two bits are exact in float32, and in no half precision."""
    asked = ("weight", "aux_weight")
    tensors, grad_output = operands(rows, 88, 72, dtype, dtype, device, asked, models)
    tensors["x"], grad_output = (16 * tensors["x"]).round(), (16 * grad_output).round()
    tensors["scale"] = 1.5 * 0.5 ** torch.arange(models, device=device)
    got = outputs(cross_modal_linear, tensors, grad_output)
    total = grad_output.double().t() @ tensors["x"].double()
    scaled = tensors["scale"].double().view(-1, 1, 1) * total
    assert torch.equal(got["weight"], total.to(dtype))
    assert torch.equal(got["aux_weight"], scaled.to(dtype).view_as(got["aux_weight"]))


def assert_small_terms_after_a_large_one_count(device, dtype, rows):
    """2048 + 1023 / 64: an accumulator in half precision would stay at 2048."""
    left = torch.full((rows, 1024), 2.0**-6, dtype=dtype, device=device)
    left[:, 0] = 2048
    weight, scale = torch.ones(1024, 8, dtype=dtype, device=device), torch.ones(1, device=device)
    aux_weight = torch.zeros_like(weight)
    assert (torch.ops.m2pt_kernels.grad_input(left, weight, aux_weight, scale) == 2064).all()
    weight, aux_weight = weight.t().contiguous(), aux_weight.t().contiguous()
    assert (cross_modal_linear(left, weight, aux_weight, scale) == 2064).all()


def assert_an_infinite_scale_gradient_is_infinite(device, name, shape, *dtypes):
    tensors, grad_output = operands(*shape, *dtypes, device=device, needs_grad=())
    tensors["grad_output"] = grad_output
    for operand in ("x", "aux_weight", "grad_output"):
        tensors[operand] = tensors[operand].abs().clamp_min(0.1)  # zero times infinity is NaN
    tensors[name][1, 2] = math.inf
    grad_output = tensors.pop("grad_output")
    tensors["scale"].requires_grad_()
    assert outputs(cross_modal_linear, tensors, grad_output)["scale"].tolist() == [math.inf]


def misaligned(tensor):
    """The same shape and strides, from an address that is no multiple of 16 bytes."""
    memory = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize + 1, dtype=tensor.dtype)
    return memory[1:].as_strided(tensor.shape, tensor.stride())


by_tma = pytest.mark.skipif(not HAS_TMA_LOOPS, reason="Triton below 3.8 cannot compile the TMA kernels")
by_hopper = pytest.mark.skipif(gemm_hopper is None, reason="this Triton's Gluon lacks what the kernel needs")


def needs_compiler(target):
    return pytest.mark.skipif(not can_compile(TARGETS[target]), reason=f"this Triton has no compiler for {target}")


def for_target(target, *others):
    return pytest.param(target, *others, marks=needs_compiler(target))


LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
PLACES = [f"blocks.{block}.{layer}" for block in range(2) for layer in LAYERS]


SIZE = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


def randomised(model):
    """Nothing is zero or nearly so, not even the scales of layers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def vit(seed=0, model=VisionTransformer, **settings):
    """A tiny vision transformer with no two parameters alike."""
    torch.manual_seed(seed)
    return randomised(model(**SIZE | settings))


def connected(dtype=torch.float32, is_aux_trainable=False, **options):
    model = reparameterize_aux_into_target_model(
        vit(0, **options).to(dtype), vit(1, **options).to(dtype), is_aux_trainable=is_aux_trainable
    )
    for layer in fused_layers(model).values():
        nn.init.normal_(layer.cross_modal_scale)
    return model


def fused_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedCrossModalLinear)}


def images(dtype=torch.float32):
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(dtype)


@contextmanager
def unchanged(*models):
    """Same module objects, same parameter objects, same flags and same bytes afterwards."""

    def snapshot():
        modules = [(name, module, module.training) for model in models for name, module in model.named_modules()]
        tensors = [
            (name, id(tensor), tensor.requires_grad, tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
            for model in models
            for name, tensor in model.state_dict(keep_vars=True).items()
        ]
        return modules, tensors

    kept_alive = [list(model.parameters()) for model in models]
    before = snapshot()
    yield
    assert snapshot() == before
    del kept_alive


class Wrapper(nn.Module):
    """A layer that calls another, as peft's do."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, input):
        return self.base_layer(input)


class Readers(nn.Module):
    """Blocks of a layer that is called and, in WavLM's way, of four that are read, with a dropout and a batch norm."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention(), "fc": nn.Linear(8, 8)}) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x, scale=1.0):
        x = F.dropout(x * scale, training=self.training) + torch.rand(())
        for block in self.blocks:
            x = block["attn"](block["fc"](x))
        return self.norm(x.flatten(0, 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v, out = self.q_proj, self.k_proj, self.v_proj, self.out_proj
        bias = torch.cat([q.bias, k.bias, v.bias])
        options = {"use_separate_proj_weight": True, "training": self.training}
        weights = {"q_proj_weight": q.weight, "k_proj_weight": k.weight, "v_proj_weight": v.weight}
        arguments = x, x, x, 8, 2, torch.empty(0), bias, None, None, False, 0.0, out.weight, out.bias
        return F.multi_head_attention_forward(*arguments, **options, **weights)[0]


X = torch.ones(3, 2, 8)
"""What `Readers` takes."""


def hugging_face(name, **settings):
    """Builds a model of this class and these settings of its configuration."""

    def build(seed):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(seed)
        kind = getattr(transformers, name)
        return randomised(kind(kind.config_class(**settings)).eval())

    return build


def vits(count=2, width=64):
    return [vit(seed, patch_size=16, embed_dim=width, num_heads=2) for seed in range(count)]


def scaled(model):
    for fused in model.modules():
        if isinstance(fused, FusedCrossModalLinear):
            fused.cross_modal_scale.data = torch.linspace(0.3, -0.2, fused.cross_modal_scale.numel())
    return model


LIGHT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # what makes its import fail
"""


def run_without(missing, code, *arguments, **options):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", LIGHT + code, ",".join(missing), *arguments]
    return subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, **options)


FORKS = """
import json, os, sys
folder = sys.argv.pop()
exec(sys.argv.pop())
for place, (code, arguments, environment) in enumerate(json.load(sys.stdin)):
    if not os.fork():
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{place}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv += arguments
        os.environ |= environment
        exec(code, {})
        sys.stdout.flush(), sys.stderr.flush(), os._exit(0)  # an orderly end with torch takes 2 s
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run_in_forks(folder, preparation, *runs):
    """How each run of code with arguments and more of an environment ends, in a fork of one new interpreter, which has
    run the `preparation` once for all."""
    command = [sys.executable, "-c", FORKS, preparation, str(folder)]
    finished = subprocess.run(command, input=json.dumps(runs), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return [
        subprocess.CompletedProcess(
            run, int(status), *((folder / f"{place}.{stream}").read_text() for stream in (1, 2))
        )
        for place, (run, status) in enumerate(zip(runs, finished.stdout.split(), strict=True))
    ]
