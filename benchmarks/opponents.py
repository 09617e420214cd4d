"""What the alternatives are predicted to reach of a plain GEMM's speed; compare the compile report's figures.

No GPU is needed and none is timed. Every alternative is the plain GEMM plus passes over matrices of the weight's size,
which read and write HBM at its peak rate, one after the other; launches, caches and all that the compile report leaves
out are left out. "published" makes the combined weight in the dtypes that torch's promotion gives it and keeps it for
backward. "transient copy" (`implementation("eager")`) makes it in one pass and makes it again in backward.
"""

from typing import NamedTuple

from tqdm import tqdm

from benchmarks import results
from benchmarks.compile_report import TENSOR_FLOPS, M
from benchmarks.results import Row

HBM_BYTES = {80: 13.4, 90: 14.5, 100: 29.2}
"""A clock and SM: A100 SXM 2039 GB/s, 108 SMs at 1.41 GHz; H100 SXM 3350, 132 at 1.755; B200 8000, 148 at 1.85."""


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


def predicted(bytes_per_weight: int, tokens: int, arch: int) -> float:
    """Of the plain GEMM's speed, which is taken to be the tensor cores' peak."""
    gemm = 2 * tokens / TENSOR_FLOPS[arch]
    return gemm / (gemm + bytes_per_weight / HBM_BYTES[arch])


def rows(arch: int, tokens: int) -> list[Row]:
    return [
        {
            "architecture": f"sm_{arch}",
            "tokens": f"{tokens:,}",
            "implementation": passes.name,
            "weights": passes.weights,
            "forward": predicted(passes.forward, tokens, arch),
            "grad_input": predicted(passes.grad_input, tokens, arch),
            "grad_parameters": predicted(passes.grad_parameters, tokens, arch),
        }
        for passes in ALTERNATIVES
    ]


def predict() -> list[Row]:
    return [row for arch in tqdm(HBM_BYTES) for tokens in (M // 16, M) for row in rows(arch, tokens)]


if __name__ == "__main__":
    results.run("opponents", "offline", predict, __doc__)
