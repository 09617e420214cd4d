"""GPU time, without the host, of each product of a ViT's linear layers: every plan beside the plain GEMM.

Run as `python -m benchmarks.products`. The plain GEMM is cuBLAS's, with half-precision weights; for float32 weights it
writes its gradient in float32. The transient copy is `implementation("eager")`: separate passes make the combined
weight, and the gradients of W and s from the float32 accumulator. Times are medians of 15 calls made in turn and timed
by events, each on an idle device after passes over 1 GiB that empty the L2 cache and give the host time to launch.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import results
from benchmarks.results import Row
from m2pt_kernels import gemm
from m2pt_kernels.combined import CombinedWeight
from m2pt_kernels.plans import EAGER, candidates
from m2pt_kernels.products import CombinedMatmul, GradParameters, Product

ROUNDS = 15
PLAIN = "plain GEMM"


class Layer(NamedTuple):
    name: str
    tokens: int
    in_features: int
    out_features: int


LAYERS = (
    Layer("ViT-B attn.qkv", 64 * 197, 768, 2304),
    Layer("ViT-B attn.proj", 64 * 197, 768, 768),
    Layer("ViT-B mlp.fc1", 64 * 197, 768, 3072),
    Layer("ViT-B mlp.fc2", 64 * 197, 3072, 768),
    Layer("ViT-L attn.qkv", 64 * 197, 1024, 3072),
    Layer("ViT-L attn.proj", 64 * 197, 1024, 1024),
    Layer("ViT-L mlp.fc1", 64 * 197, 1024, 4096),
    Layer("ViT-L mlp.fc2", 64 * 197, 4096, 1024),
    Layer("ViT-g mlp.fc1", 64 * 257, 1408, 6144),
    Layer("ViT-g mlp.fc2", 64 * 257, 6144, 1408),
)
HALF, FLOAT = torch.bfloat16, torch.float32
WEIGHTS = {"bf16": (HALF, HALF), "fp32": (FLOAT, FLOAT), "fp32, W_aux bf16": (FLOAT, HALF)}
"""The dtypes of W and W_aux."""


def milliseconds(calls: dict[str, Callable[[], object]], emptied: Tensor) -> dict[str, float]:
    """Return the median of each; calls are made in turn."""
    pairs = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            for _ in range(4):
                emptied.zero_()
            start.record()
            call()
            end.record()
            pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {name: median(start.elapsed_time(end) for start, end in timed) for name, timed in pairs.items()}


def products(layer: Layer, weights: str) -> list[tuple[Callable[[], object], Product]]:
    """Return each with its plain GEMM, with W, s and b trained and W_aux frozen."""
    weight_dtype, aux_dtype = WEIGHTS[weights]
    draw = partial(torch.randn, device="cuda")
    x = draw(layer.tokens, layer.in_features, dtype=HALF)
    grad_output = draw(layer.tokens, layer.out_features, dtype=HALF)
    weight, aux_weight = draw(2, layer.out_features, layer.in_features) / layer.in_features**0.5
    weight, aux_weight, half = weight.to(weight_dtype), aux_weight.to(aux_dtype), weight.to(HALF)
    scale, bias = torch.full((1,), 0.1, device="cuda"), draw(layer.out_features, dtype=weight_dtype)
    half_bias, transposed = bias.to(HALF), grad_output.t()
    wide = {} if weight_dtype == HALF else {"out_dtype": FLOAT}
    combined = CombinedWeight(weight, aux_weight, scale)
    return [
        (partial(F.linear, x, half, half_bias), CombinedMatmul(x, combined._replace(transposed=True), bias)),
        (partial(torch.mm, grad_output, half), CombinedMatmul(grad_output, combined)),
        (
            partial(torch.mm, transposed, x, **wide),
            GradParameters(grad_output, x, aux_weight, None, weight_dtype, None),
        ),
    ]


def report(layer: Layer, weights: str, emptied: Tensor) -> list[Row]:
    rows = []
    for plain, product in products(layer, weights):
        plans = [EAGER, *candidates(product)]
        calls = {PLAIN: plain} | {str(plan): partial(gemm.compute, plan, product) for plan in plans}
        times = milliseconds(calls, emptied)
        flops = 2 * layer.tokens * layer.in_features * layer.out_features
        rows.append(
            {
                "layer": layer.name,
                "tokens": layer.tokens,
                "weights": weights,
                "product": product.name,
                "plain GEMM, us": times[PLAIN] * 1e3,
                "TFLOP/s": flops / times[PLAIN] / 1e9,
                "transient copy / plain": times[str(EAGER)] / times[PLAIN],
                "this package / plain": times[str(plans[1])] / times[PLAIN],
                "its plan": str(plans[1]),
                "others / plain": ", ".join(f"{plan} {times[str(plan)] / times[PLAIN]:.2f}" for plan in plans[2:]),
            }
        )
    return rows


def measure() -> list[Row]:
    memory = torch.empty(2**28, dtype=torch.int8, device="cuda")
    cases = [(layer, weights) for weights in WEIGHTS for layer in LAYERS]
    return [row for case in tqdm(cases, unit="layer") for row in report(*case, memory)]


if __name__ == "__main__":
    results.run("products", results.device_slug(), measure, __doc__)
