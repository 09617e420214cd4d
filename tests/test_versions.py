"""Releases of Triton and numpy that are pretended in processes of their own, and what the installed Triton is told."""

import warnings

import pytest
import torch
from helpers import by_tma, for_target, run_in_forks

from benchmarks.offline import TARGETS, compiling_for
from m2pt_kernels import cross_modal_linear
from m2pt_kernels.plans import POINTER_GRAD_TILES, POINTER_TILES, gemm_hopper, gemm_hopper_gradients
from m2pt_kernels.versions import NEWEST, OLDEST, RELEASE

pytestmark = pytest.mark.slow

COMPILE = """
import sys, triton
triton.__version__ = sys.argv[1]
import torch
from benchmarks.offline import TARGETS, compiling_for
from m2pt_kernels import cross_modal_linear
x, weight = torch.empty(16384, 2048, dtype=torch.bfloat16), torch.empty(2048, 2048, dtype=torch.bfloat16)
aux_weight, scale = torch.empty(2, 2048, 2048, dtype=torch.bfloat16), torch.empty(2, requires_grad=True)
for target in ("sm_80", "sm_90"):
    with compiling_for(TARGETS[target]) as compiled:
        cross_modal_linear(x, weight, aux_weight, scale).backward(x)
    print(*(f"{kernel.metadata.name} {kernel.metadata.num_warps}" for kernel in compiled))
"""
INTERPRET = """
import numpy, triton
triton.__version__, numpy.__version__ = "3.6.0", "2.4.1"
import m2pt_kernels
with m2pt_kernels.implementation("triton"):
    pass
"""


RELEASES = ["3.4.0", f"{NEWEST[0]}.{NEWEST[1] + 1}.0+git1234", "4.0"]


@pytest.fixture(scope="module")
def pretended(folder):
    """How a process ends for each of these releases, one that trusts them, and one of Triton's interpreter."""
    runs = {release: (COMPILE, [release], {}) for release in RELEASES}
    runs["trusted"] = COMPILE, ["4.0"], {"M2PT_TRUST_TRITON": "1"}
    runs["interpreted"] = INTERPRET, [], {"TRITON_INTERPRET": "1"}
    preparation = "import torch, triton, warnings; warnings.simplefilter('always', UserWarning)"
    return dict(zip(runs, run_in_forks(folder, preparation, *runs.values()), strict=True))


@pytest.mark.parametrize("release", RELEASES)
def test_an_unknown_triton_gets_portable_kernels_and_one_warning(pretended, release):
    finished = pretended[release]
    tables = POINTER_TILES["portable"], POINTER_GRAD_TILES["portable"]
    warps = {tile.num_warps for table in tables for (tile,) in table.values()}
    assert warps == {4}
    assert finished.stdout.splitlines() == ["combined_matmul_kernel 4 grad_parameters_kernel 4"] * 2
    assert finished.stderr.count(f"knows Triton 3.5 to 3.9, this is {release}: it uses portable kernels") == 1


@by_tma
def test_an_unknown_triton_is_trusted_on_demand(pretended):
    by_pointers, by_tma = pretended["trusted"].stdout.splitlines()
    assert by_pointers.count("8") == 2 and by_tma == "combined_matmul_tma_kernel 12 grad_parameters_hopper_kernel 12"
    assert "portable" not in pretended["trusted"].stderr


def test_the_installed_triton_is_known():
    assert OLDEST <= RELEASE <= NEWEST


def test_the_kernels_in_gluon_are_there_from_triton_3_7_on():
    expected = RELEASE >= (3, 7)
    assert (gemm_hopper is not None) == (gemm_hopper_gradients is not None) == expected


def test_an_interpreter_that_does_not_work_with_numpy_is_refused(pretended):
    error = "RuntimeError: TRITON_INTERPRET: Triton 3.6.0 needs numpy < 2.4, got 2.4.1\n"
    assert pretended["interpreted"].stderr.endswith(error)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", for_target("gfx942")])
def test_every_kernel_asks_for_fused_multiplications_and_additions(target):
    x, weight = (torch.empty(1024, 1024, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with warnings.catch_warnings(), compiling_for(TARGETS[target]) as compiled:
        warnings.simplefilter("error")
        y = cross_modal_linear(x, weight, weight.detach(), torch.empty(1, requires_grad=True))
        y.backward(torch.empty_like(y))
    assert len(compiled) == 3 and all(kernel.metadata.enable_fp_fusion for kernel in compiled)
