"""One layer of a ViT: time, memory and bytes saved for backward of every way to compute `x (W + s W_aux)^T + b`.

W_aux is frozen. Forward and the whole step (forward and backward) are those of training, where x, W, s and b require
gradients; for the gradients only the backward is timed, where only x requires one, or only W, s and b. Ratios are to
`F.linear(x, W, b)`, the ceiling; TFLOP/s count its FLOPs, so they are comparable. Memory is the peak that forward and
backward add to the layer and its input. Rounds end when the medians of time and ratio are known to 2 %, or at a limit.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import DEVICE, ON_GPU, Prepare, peak_bytes, time_paired
from m2pt.saved_bytes import saved_for_backward_bytes
from m2pt_kernels import cross_modal_linear, implementation

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """A linear layer and the tokens of a batch it sees in training."""

    name: str
    batch: int
    tokens: int
    in_features: int
    out_features: int

    @property
    def flops(self) -> int:
        """FLOPs of one product."""
        return 2 * self.batch * self.tokens * self.in_features * self.out_features

    def __str__(self) -> str:
        return f"{self.name}, {self.batch}"


@dataclass(frozen=True)
class Precision:
    name: str
    x: torch.dtype
    weights: torch.dtype

    @property
    def autocast(self) -> bool:
        return self.x != self.weights

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pass:
    """What is timed, how many products it is, and which operands require gradients."""

    name: str
    products: int
    asking: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def layers(batch: int, model: str, tokens: int, width: int, hidden: int) -> list[Shape]:
    """The linear layers of a ViT block."""
    return [
        Shape(f"{model} attn.qkv", batch, tokens, width, 3 * width),
        Shape(f"{model} attn.proj", batch, tokens, width, width),
        Shape(f"{model} mlp.fc1", batch, tokens, width, hidden),
        Shape(f"{model} mlp.fc2", batch, tokens, hidden, width),
    ]


MODELS = (("ViT-B", 197, 768, 3072), ("ViT-L", 197, 1024, 4096), ("ViT-g", 257, 1408, 6144))
LARGEST = Shape("ViT-22B mlp.fc1", 64, 256, 6144, 24576)
GPU_SHAPES = [*(layer for batch in (64, 8) for model in MODELS for layer in layers(batch, *model)), LARGEST]
CPU_SHAPES = [Shape("ViT-Ti attn.proj", 1, 197, 192, 192)]
SHAPES, MOST_ROUNDS = (GPU_SHAPES, 40) if ON_GPU else (CPU_SHAPES, 15)

FLOAT16 = Precision("float16", torch.float16, torch.float16)
FLOAT32 = Precision("float32", torch.float32, torch.float32)
PRECISIONS = [
    Precision("bfloat16", torch.bfloat16, torch.bfloat16),
    Precision("autocast", torch.bfloat16, torch.float32),
    FLOAT16,
    FLOAT32,
]

TRAINED = ("x", "weight", "scale", "bias")
PASSES = [
    Pass("forward", 1, TRAINED),
    Pass("input gradient", 1, ("x",)),
    Pass("parameter gradients", 1, ("weight", "scale", "bias")),
    Pass("whole step", 3, TRAINED),
]

Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_linear(x: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def published(x: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight + scale * aux_weight, bias)


def two_products(x: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(x, aux_weight)


def compiled(x: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    return _compiled_published()(x, weight, aux_weight, scale, bias)


@cache
def _compiled_published() -> Function:
    return torch.compile(published, mode="max-autotune", dynamic=False)


TRANSIENT = "transient copy"
COMPILED = "published, torch.compile"
FUNCTIONS: dict[str, Function] = {
    "F.linear": plain_linear,
    "published": published,
    **({TRANSIENT: cross_modal_linear} if ON_GPU else {}),
    "two GEMMs": two_products,
    "this package": cross_modal_linear,
    COMPILED: compiled,
}


class Layer(nn.Module):
    """The operands of a shape in a precision, and how to combine them; those in `asking` require gradients."""

    def __init__(self, function: Function, shape: Shape, precision: Precision, asking: Iterable[str]) -> None:
        super().__init__()
        self.function, self.autocast = function, precision.autocast
        weight = torch.randn(2, shape.out_features, shape.in_features, device=DEVICE) / shape.in_features**0.5
        self.weight = nn.Parameter(weight[0].to(precision.weights))
        self.aux_weight = nn.Parameter(weight[1].to(precision.weights))
        self.scale = nn.Parameter(torch.full((1,), 0.1, device=DEVICE, dtype=precision.weights))
        self.bias = nn.Parameter(torch.zeros(shape.out_features, device=DEVICE, dtype=precision.weights))
        size = (shape.batch, shape.tokens)
        self.x = torch.randn(*size, shape.in_features, device=DEVICE, dtype=precision.x)
        self.grad_output = torch.randn(*size, shape.out_features, device=DEVICE, dtype=precision.x)
        self.requires_grad_(False)
        self.asking = [getattr(self, name).requires_grad_() for name in asking]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
            return self.function(x, self.weight, self.aux_weight, self.scale, self.bias)

    def backward(self, y: Tensor) -> None:
        torch.autograd.grad(y, self.asking, self.grad_output, allow_unused=True)

    def whole_step(self) -> None:
        self.backward(self(self.x))

    def prepare(self, timed: Pass) -> Prepare:
        return {
            "forward": lambda: partial(self, self.x),
            "whole step": lambda: self.whole_step,
        }.get(timed.name, lambda: partial(self.backward, self(self.x)))


def parameters(values: Iterable[object], mark: pytest.MarkDecorator, marked: Iterable[object]) -> list:
    """Parametrize by name; the marked values are left out unless they are asked for."""
    return [pytest.param(value, id=str(value), marks=mark if value in marked else ()) for value in values]


ONLY_IN_FULL = [LARGEST, FLOAT16, FLOAT32] if ON_GPU else []


@pytest.mark.parametrize("name", parameters(FUNCTIONS, pytest.mark.compile, [COMPILED]))
@pytest.mark.parametrize("timed", PASSES, ids=str)
@pytest.mark.parametrize("precision", parameters(PRECISIONS, pytest.mark.full, ONLY_IN_FULL))
@pytest.mark.parametrize("shape", parameters(SHAPES, pytest.mark.full, ONLY_IN_FULL))
def test_operator(record, shape, precision, timed, name):
    if name == COMPILED:
        torch.compiler.reset()  # or it would give up compiling after a few shapes
    layer = Layer(FUNCTIONS[name], shape, precision, timed.asking)
    ceiling = Layer(plain_linear, shape, precision, timed.asking)
    with implementation("eager") if name == TRANSIENT else nullcontext():
        layer.whole_step()
        peak = peak_bytes(layer.whole_step)
        saved = saved_for_backward_bytes(layer, layer.x)
        timing, ratio = time_paired(layer.prepare(timed), ceiling.prepare(timed), MOST_ROUNDS)
    record(
        {
            "layer": shape.name,
            "tokens": f"{shape.batch} x {shape.tokens}",
            "precision": precision.name,
            "pass": timed.name,
            "implementation": name,
            **timing.columns("ms"),
            "time / F.linear": ratio,
            "TFLOP/s": timed.products * shape.flops / timing.median / 1e12,
            "peak, MiB": peak / MIB,
            "saved, MiB": saved / MIB,
        },
        timing,
    )
