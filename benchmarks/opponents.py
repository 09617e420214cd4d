"""Predicted minimum time of the alternatives over a plain GEMM's, for ViT-B's mlp.fc1.

No GPU is needed, and nothing is timed. Every alternative is the plain GEMM, as modelled for the predictions, plus
passes over matrices of the weight's size, which read and write HBM at its peak rate, one after the other; their
launches are left out. "published" makes the combined weight in the dtypes of torch's promotion and keeps it for
backward. "transient copy" (`implementation("eager")`) makes it in one pass, and again in backward.
"""

from typing import NamedTuple

from tqdm import tqdm

from benchmarks import results
from benchmarks.compile_report import IN_FEATURES, OUT_FEATURES, TOKENS
from benchmarks.cost import A100, B200, H100, Gpu, plain
from benchmarks.results import Row


class Passes(NamedTuple):
    """Bytes read and written for every element of the weight, besides what the plain GEMM moves."""

    name: str
    weights: str
    forward: int
    grad_input: int
    grad_parameters: int


# In the order they are made. Forward: s * A, W + that, its cast; or all in one. Parameters: G in float32, A in float32,
# G * A, its sum, the cast of G.
ALTERNATIVES = (
    Passes("published", "bf16", (2 + 2) + (2 + 2 + 2), 0, (2 + 2 + 2) + 2),
    Passes("published", "fp32, W_aux bf16", (2 + 4) + (4 + 4 + 4) + (4 + 2), 0, (2 + 4) + (4 + 2 + 4) + 4),
    Passes("published", "fp32", (4 + 4) + (4 + 4 + 4) + (4 + 2), 0, (2 + 4) + (4 + 4 + 4) + 4),
    Passes("transient copy", "bf16", 2 + 2 + 2, 2 + 2 + 2, 2 + (2 + 4) + (4 + 4 + 4) + 4 + (4 + 2)),
    Passes("transient copy", "fp32, W_aux bf16", 4 + 2 + 2, 4 + 2 + 2, 2 + (2 + 4) + (4 + 4 + 4) + 4),
    Passes("transient copy", "fp32", 4 + 4 + 2, 4 + 4 + 2, 2 + (4 + 4 + 4) + 4),
)


def predicted(bytes_per_weight: int, rows: int, columns: int, depth: int, gpu: Gpu) -> float:
    """Predict the time over that of a plain GEMM with such a result."""
    passes = bytes_per_weight * IN_FEATURES * OUT_FEATURES / gpu.hbm / 1e3
    return 1 + passes / plain(rows, columns, depth, gpu)


def rows(gpu: Gpu, tokens: int) -> list[Row]:
    return [
        {
            "GPU": gpu.name,
            "tokens": f"{tokens:,}",
            "implementation": passes.name,
            "weights": passes.weights,
            "forward": predicted(passes.forward, tokens, OUT_FEATURES, IN_FEATURES, gpu),
            "grad_input": predicted(passes.grad_input, tokens, IN_FEATURES, OUT_FEATURES, gpu),
            "grad_parameters": predicted(passes.grad_parameters, OUT_FEATURES, IN_FEATURES, tokens, gpu),
        }
        for passes in ALTERNATIVES
    ]


def predict() -> list[Row]:
    return [row for gpu in tqdm((A100, H100, B200)) for tokens in (TOKENS // 16, TOKENS) for row in rows(gpu, tokens)]


if __name__ == "__main__":
    results.run("opponents", "offline", predict, __doc__)
