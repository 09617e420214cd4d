"""The cases that `check` runs, products of every operand kind and size, and the worker process that runs them.

A worker (`python -m m2pt_kernels.cases`) reads requests from stdin, one per line, and answers line by line, so its
parent knows what it was doing when it hung or died.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product as pairs
from typing import Any, NamedTuple, TextIO

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from . import gemm
from .combined import CombinedWeight
from .devices import INTERPRETED
from .plans import Plan, candidates, problem, variant
from .products import CombinedMatmul, GradParameters, Product
from .quantization import DTYPES, GROUP_SIZE, quantize
from .tiles import ceil_div
from .verification import verify

PRODUCTS = ("forward", "grad_input", "grad_parameters")


class Kind(NamedTuple):
    """The dtypes of activations and weights, the number of auxiliary models, and whether float32 means TF32."""

    x: str
    weight: str
    aux_weight: str
    models: int = 1
    tf32: bool = False


KINDS = {
    "bf16": Kind("bfloat16", "bfloat16", "bfloat16"),
    "bf16, int8": Kind("bfloat16", "bfloat16", "int8"),
    "bf16, int4": Kind("bfloat16", "bfloat16", "int4"),
    "bf16, float8": Kind("bfloat16", "bfloat16", "float8_e4m3fn"),
    "bf16, two models": Kind("bfloat16", "bfloat16", "bfloat16", models=2),
    "fp16": Kind("float16", "float16", "float16"),
    "fp32": Kind("float32", "float32", "float32"),
    "tf32": Kind("float32", "float32", "float32", tf32=True),
    "autocast": Kind("bfloat16", "float32", "float32"),
    "autocast, bf16": Kind("bfloat16", "float32", "bfloat16"),
    "autocast, int8": Kind("bfloat16", "float32", "int8"),
    "autocast, int4": Kind("bfloat16", "float32", "int4"),
    "autocast, float8": Kind("bfloat16", "float32", "float8_e4m3fn"),
    "autocast, two models": Kind("bfloat16", "float32", "bfloat16", models=2),
}
"""Named after the precision and, where it differs, W_aux."""


class Shape(NamedTuple):
    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.in_features} -> {self.out_features}"


GPU_SHAPES = (
    Shape(512, 256, 512),
    Shape(2048, 512, 1024),
    Shape(3001, 656, 1296),
    Shape(1001, 203, 137),
    Shape(12608, 768, 768),
    Shape(12608, 768, 3072),
)
"""In order: small; aligned; ragged, with rows that TMA can read; ragged, with rows it cannot; few tiles; large."""
SMALL_SHAPES = (Shape(64, 64, 64), Shape(45, 48, 80), Shape(37, 23, 29))


@dataclass
class Row:
    """What was found for a plan at a shape; times, the plain product's too, are in milliseconds.

    not_run: why the case did not run, where that is not the kernel's fault.
    """

    kind: str
    product: str
    shape: Shape
    inputs: str
    plan: str
    variant: str
    fault: str | None = None
    not_run: str | None = None
    error_ratio: float | None = None
    milliseconds: float | None = None
    plain_milliseconds: float | None = None

    @property
    def place(self) -> str:
        """Identifies a row among others of its kind."""
        return f"{self.product}, {self.shape}, {self.inputs}, {self.plan}"


class Case(NamedTuple):
    """A product, and a function that computes it without the pathway."""

    inputs: str
    product: Product
    plain: Callable[[], Tensor]


def cases(kind: Kind, product: str, shape: Shape, device: str) -> list[Case]:
    """Make cases with and without a bias, with W_aux frozen and, unless it is quantised, trained.

    For int4 the input features are rounded up to whole groups.
    """
    torch.manual_seed(0)
    x_dtype, weight_dtype = (getattr(torch, _runnable(name)) for name in (kind.x, kind.weight))
    stored = kind.aux_weight if kind.aux_weight in DTYPES.values() else None
    tokens, in_features, out_features = shape
    if stored == "int4":
        in_features = ceil_div(in_features, GROUP_SIZE) * GROUP_SIZE
    draw = partial(torch.randn, device=device)
    x, grad_output = (draw(tokens, features).to(x_dtype) for features in (in_features, out_features))
    weights = draw(1 + kind.models, out_features, in_features) / in_features**0.5
    weight, aux_weight = weights[0].to(weight_dtype), weights[1:].squeeze(0) if kind.models == 1 else weights[1:]
    aux_weight_scale = None
    if stored:
        aux_weight, aux_weight_scale = quantize(aux_weight, stored)
    else:
        aux_weight = aux_weight.to(getattr(torch, _runnable(kind.aux_weight)))
    scale, bias = torch.linspace(0.4, -0.3, kind.models, device=device), draw(out_features).to(weight_dtype)
    half, half_bias = weight.to(x_dtype), bias.to(x_dtype)
    combined = CombinedWeight(weight, aux_weight, scale, aux_weight_scale, transposed=product == "forward")
    if product == "forward":
        return [
            Case("bias", CombinedMatmul(x, combined, bias), partial(F.linear, x, half, half_bias)),
            Case("no bias", CombinedMatmul(x, combined), partial(F.linear, x, half)),
        ]
    if product == "grad_input":
        return [Case("", CombinedMatmul(grad_output, combined), partial(torch.mm, grad_output, half))]
    wide = {} if weight_dtype == x_dtype else {"out_dtype": weight_dtype}
    plain = partial(torch.mm, grad_output.t(), x, **wide)
    frozen = GradParameters(grad_output, x, aux_weight, None, weight_dtype, None, aux_weight_scale)
    found = [Case("", frozen, plain)]
    if not stored:
        trained = frozen._replace(cross_modal_scale=scale, aux_dtype=aux_weight.dtype)
        found.append(Case("W_aux trained", trained, plain))
    return found


def _runnable(dtype: str) -> str:
    return "float16" if INTERPRETED and dtype == "bfloat16" else dtype


def _rows(request: dict[str, Any]) -> Iterator[tuple[Row, Case, Plan]]:
    kind = KINDS[request["kind"]]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind.tf32 else "ieee"
    for product, sizes in pairs(request["products"], request["shapes"]):
        shape = Shape(*sizes)
        for case in cases(kind, product, shape, "cpu" if INTERPRETED else "cuda"):
            for plan in candidates(case.product):
                name = variant(plan, problem(case.product))
                yield Row(request["kind"], product, shape, case.inputs, str(plan), name), case, plan


def _verify(row: Row, case: Case, plan: Plan) -> None:
    row.fault, row.error_ratio = verify(plan, case.product)


def _time(row: Row, case: Case, plan: Plan) -> None:
    measure = partial(triton.testing.do_bench, warmup=5, rep=20, return_mode="median")
    row.milliseconds = measure(partial(gemm.compute, plan, case.product))
    row.plain_milliseconds = measure(case.plain)


def _attempt(work: Callable[[Row, Case, Plan], None], row: Row, case: Case, plan: Plan) -> None:
    try:
        work(row, case, plan)
    except torch.OutOfMemoryError as error:
        row.not_run = str(error).partition("\n")[0]
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        row.fault = f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"


def answer(request: dict[str, Any], output: TextIO) -> None:
    """Write one line when a row begins and another when it is done."""
    for row, case, plan in _rows(request):
        if request["timed"]:
            wanted, work = row.place in request["places"], _time
        else:
            wanted, work = row.place not in request["places"], _verify
        if wanted and row.variant not in request["lost"]:
            print(json.dumps({"begun": asdict(row)}), file=output, flush=True)
            _attempt(work, row, case, plan)
            print(json.dumps({"done": asdict(row)}), file=output, flush=True)
            if row.fault and not INTERPRETED:
                torch.cuda.synchronize()  # raises if the fault left the device unusable


def main() -> None:
    """Answer the requests on stdin. Output from Triton and others goes to stderr."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        for line in sys.stdin:
            answer(json.loads(line), output)


if __name__ == "__main__":
    main()
