"""Every tile configuration compiles for its GPUs, without spills and within shared memory; no GPU is needed."""

import itertools
import subprocess
import sys

import pytest
import torch
from test_ops import operands

from benchmarks.offline import TARGETS, compiling_for, resources
from benchmarks.sass import main_loop, serialised_wgmma
from m2pt_kernels import cross_modal_linear
from m2pt_kernels.configs import TILES, architecture, input_precision

HALF, FLOAT = torch.bfloat16, torch.float32
KINDS = {
    "half": (HALF, HALF, HALF, "highest"),
    "half, W_aux float32": (HALF, HALF, FLOAT, "highest"),
    "mixed": (HALF, FLOAT, FLOAT, "highest"),
    "tf32": (FLOAT, FLOAT, FLOAT, "high"),
    "ieee": (FLOAT, FLOAT, FLOAT, "highest"),
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
    dtype, weight_dtype, aux_dtype, precision = KINDS[kind]
    matmul_precision(precision)
    with compiling_for(TARGETS[target]) as compiled:
        for sizes, trained in itertools.product(SIZES, (("scale",), ("weight", "aux_weight", "scale"))):
            tensors, grad_output = operands(*sizes, dtype, weight_dtype, needs_grad=())
            tensors["aux_weight"] = tensors["aux_weight"].to(aux_dtype)
            for name in ("x", *trained):
                tensors[name].requires_grad_()
            cross_modal_linear(**tensors).backward(grad_output)
    assert len(compiled) == 12
    for kernel in compiled:
        used = resources(kernel)
        assert used.spilled == 0, (kernel.src.constants, used)


@pytest.mark.parametrize("aux_dtype", [HALF, FLOAT], ids=str)
@pytest.mark.parametrize("weight_dtype", [HALF, FLOAT], ids=str)
def test_hopper_multiplies_from_registers_without_waiting(weight_dtype, aux_dtype):
    tensors, grad_output = operands(600, 272, 208, HALF, weight_dtype)
    tensors["aux_weight"] = tensors["aux_weight"].detach().to(aux_dtype)
    with compiling_for(TARGETS["sm_90"]) as compiled:
        cross_modal_linear(**tensors).backward(grad_output)
    assert len(compiled) == 3
    for kernel in compiled:
        assert "_tma_" in kernel.metadata.name
        assert resources(kernel).spilled == 0
        assert serialised_wgmma(kernel) == []
        loop = main_loop(kernel)
        assert loop.instructions["tensor"] == 4 and loop.stores_to_shared == 0
        assert sum(loop.instructions.values()) <= 151


def test_float32_precision_follows_torch(matmul_precision):
    target = TARGETS["sm_90"]
    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        matmul_precision(setting)
        assert input_precision(FLOAT, target) == expected
        assert input_precision(FLOAT, TARGETS["gfx1100"]) == input_precision(HALF, target) == "ieee"


def test_float32_precision_follows_torchs_newer_setting():
    code = (
        "import torch; from m2pt_kernels.configs import input_precision;"
        "from triton.backends.compiler import GPUTarget; torch.backends.cuda.matmul.fp32_precision = 'tf32';"
        "assert input_precision(torch.float32, GPUTarget('cuda', 90, 32)) == 'tf32'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
