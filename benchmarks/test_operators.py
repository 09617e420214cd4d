"""One layer of a ViT: time, memory and bytes saved for backward of every way to compute `x (W + s W_aux)^T + b`.

W, s, b and x are trained, W_aux is frozen. Ratios are to `F.linear(x, W, b)`, the ceiling; TFLOP/s count its FLOPs, so
they are comparable. Memory is the peak a forward and backward add to the layer and its input.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import DEVICE, ON_GPU, STOPWATCH, Prepare, peak_bytes, run_paired
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
        """Of one product."""
        return 2 * self.batch * self.tokens * self.in_features * self.out_features


@dataclass(frozen=True)
class Precision:
    name: str
    x: torch.dtype
    weights: torch.dtype

    @property
    def autocast(self) -> bool:
        return self.x != self.weights


GPU_SHAPES = (
    Shape("ViT-B attn.qkv", 64, 197, 768, 2304),
    Shape("ViT-B attn.proj", 64, 197, 768, 768),
    Shape("ViT-B mlp.fc1", 64, 197, 768, 3072),
    Shape("ViT-B mlp.fc2", 64, 197, 3072, 768),
    Shape("ViT-L mlp.fc1", 64, 197, 1024, 4096),
    Shape("ViT-L mlp.fc2", 64, 197, 4096, 1024),
    Shape("ViT-g mlp.fc1", 64, 257, 1408, 6144),
    Shape("ViT-22B mlp.fc1", 64, 256, 6144, 24576),
)
CPU_SHAPES = (Shape("ViT-Ti attn.proj", 1, 197, 192, 192),)
SHAPES, ROUNDS = (GPU_SHAPES, 20) if ON_GPU else (CPU_SHAPES, 10)

PRECISIONS = (
    Precision("bfloat16", torch.bfloat16, torch.bfloat16),
    Precision("float16", torch.float16, torch.float16),
    Precision("float32", torch.float32, torch.float32),
    Precision("autocast", torch.bfloat16, torch.float32),
)

Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_linear(x: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def published(x: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight + scale * aux_weight, bias)


def two_products(x: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) + scale * F.linear(x, aux_weight)


FUNCTIONS: dict[str, Function] = {
    "F.linear": plain_linear,
    "published": published,
    "two GEMMs": two_products,
    "this package": cross_modal_linear,
}
TRANSIENT = "copy made again in backward"
COMPILED = "published, torch.compile"
if ON_GPU:
    FUNCTIONS[TRANSIENT] = cross_modal_linear
    FUNCTIONS[COMPILED] = torch.compile(published, mode="max-autotune", dynamic=False)


class Layer(nn.Module):
    """The operands of a shape in a precision, and how to combine them."""

    def __init__(self, function: Function, shape: Shape, precision: Precision) -> None:
        super().__init__()
        self.function, self.autocast = function, precision.autocast
        weight = torch.randn(2, shape.out_features, shape.in_features, device=DEVICE) / shape.in_features**0.5
        self.weight = nn.Parameter(weight[0].to(precision.weights))
        self.aux_weight = nn.Parameter(weight[1].to(precision.weights), requires_grad=False)
        self.scale = nn.Parameter(torch.full((1,), 0.1, device=DEVICE, dtype=precision.weights))
        self.bias = nn.Parameter(torch.zeros(shape.out_features, device=DEVICE, dtype=precision.weights))
        size = (shape.batch, shape.tokens)
        self.x = torch.randn(*size, shape.in_features, device=DEVICE, dtype=precision.x, requires_grad=True)
        self.grad_output = torch.randn(*size, shape.out_features, device=DEVICE, dtype=precision.x)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
            return self.function(x, self.weight, self.aux_weight, self.scale, self.bias)

    def backward(self, y: Tensor) -> None:
        trained = (self.x, self.weight, self.scale, self.bias)
        torch.autograd.grad(y, trained, self.grad_output, allow_unused=True)

    def forward_backward(self) -> None:
        self.backward(self(self.x))

    def prepare(self, direction: str) -> Prepare:
        return {
            "forward": lambda: partial(self, self.x),
            "backward": lambda: partial(self.backward, self(self.x)),
            "both": lambda: self.forward_backward,
        }[direction]


def only_in_full(values, left_out):
    """Values, of which those whose name is among `left_out` are for a full run on a GPU."""
    names = {value if isinstance(value, str) else value.name: value for value in values}
    return [
        pytest.param(value, id=name, marks=pytest.mark.full if ON_GPU and name in left_out else ())
        for name, value in names.items()
    ]


@pytest.mark.benchmark(timer=STOPWATCH)
@pytest.mark.parametrize("name", only_in_full(FUNCTIONS, [COMPILED]))
@pytest.mark.parametrize(("direction", "products"), [("forward", 1), ("backward", 2), ("both", 3)])
@pytest.mark.parametrize("precision", only_in_full(PRECISIONS, ["float16", "float32"]))
@pytest.mark.parametrize("shape", only_in_full(SHAPES, ["ViT-22B mlp.fc1"]))
def test_operator(benchmark, record, shape, precision, direction, products, name):
    layer = Layer(FUNCTIONS[name], shape, precision)
    ceiling = Layer(plain_linear, shape, precision)
    with implementation("eager") if name == TRANSIENT else nullcontext():
        layer.forward_backward()
        peak = peak_bytes(layer.forward_backward)
        saved = saved_for_backward_bytes(layer, layer.x)
        timing = run_paired(benchmark, layer.prepare(direction), ceiling.prepare(direction), ROUNDS, warmup_rounds=2)
    record(
        {
            "layer": shape.name,
            "tokens": f"{shape.batch} x {shape.tokens}",
            "precision": precision.name,
            "pass": direction,
            "implementation": name,
            "p20, ms": timing.p20 * 1e3,
            "median, ms": timing.p50 * 1e3,
            "p80, ms": timing.p80 * 1e3,
            "time / F.linear": timing.ratio,
            "TFLOP/s": products * shape.flops / timing.p50 / 1e12,
            "peak, MiB": peak / MIB,
            "saved, MiB": saved / MIB,
        }
    )
