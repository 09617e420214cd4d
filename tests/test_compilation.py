"""Every tile configuration compiles for its GPUs, without spills and within shared memory; no GPU is needed."""

import itertools

import pytest
import torch
from test_ops import operands

from benchmarks.offline import TARGETS, compiling_for, resources
from m2pt_kernels import cross_modal_linear
from m2pt_kernels.configs import TILES, architecture

HALF, FLOAT = torch.bfloat16, torch.float32
KINDS = {
    "half": (HALF, HALF, "highest"),
    "mixed": (HALF, FLOAT, "highest"),
    "tf32": (FLOAT, FLOAT, "high"),
    "ieee": (FLOAT, FLOAT, "highest"),
}
SIZES = [(257, 131, 77), (600, 272, 208), (256, 256, 256)]


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_every_architecture_is_compiled_for():
    assert {architecture(target) for target in TARGETS.values()} == set(TILES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_within_shared_memory(target, kind, matmul_precision):
    dtype, weight_dtype, precision = KINDS[kind]
    matmul_precision(precision)
    with compiling_for(TARGETS[target]) as compiled:
        for sizes, trained in itertools.product(SIZES, (("scale",), ("weight", "aux_weight", "scale"))):
            tensors, grad_output = operands(*sizes, dtype, weight_dtype, needs_grad=("x", *trained))
            cross_modal_linear(**tensors).backward(grad_output)
    assert len(compiled) == 12
    for kernel in compiled:
        used = resources(kernel)
        assert used.spilled == 0, (kernel.src.constants, used)
