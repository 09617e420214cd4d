"""Compile the kernels for an absent GPU, through the package's own host code, and read off the resources they need."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import JITFunction

from benchmarks.sass import assembler
from m2pt_kernels import implementation, launches, plans

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
SHARED_MEMORY = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}
"""KiB a block may use, by `GPUTarget.arch`."""


class Resources(NamedTuple):
    """Per thread: registers and bytes spilled (stack and local memory). Per block: bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


class _CompileOnlyDriver:
    """Triton's driver interface, for a device that takes every kernel and runs none."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[target.arch] * 1024},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: GPUTarget, *others: JITFunction) -> Iterator[list[CompiledKernel]]:
    """Inside the block, the package's kernels and `others` called with CPU tensors only compile, for `target`.

    The list holds what was compiled once the block is left.

    Raises:
        triton.runtime.errors.OutOfResources: a kernel needs more shared or tensor memory than the target has.
    """
    compiled: list[CompiledKernel] = []
    triton.runtime.driver.set_active(_CompileOnlyDriver(target))
    try:
        with implementation("triton"):
            yield compiled
        for kernel in (*plans.KERNELS, *others):
            compiled += kernel.device_caches.pop(str(target), ({},))[0].values()
    finally:
        for kernel in (*plans.KERNELS, *others):
            kernel.device_caches.pop(str(target), None)
        launches.HELD.clear()
        triton.runtime.driver.set_active(None)


def can_compile(target: GPUTarget) -> bool:
    """Whether the installed Triton can compile for `target`; a copy may have been stripped of what it needs."""
    try:
        make_backend(target)
        return target.backend != "cuda" or bool(assembler(target.arch))
    except RuntimeError:
        return False


def resources(compiled: CompiledKernel) -> Resources:
    """Registers, spills and shared memory, as the assembler reports them."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, *spills = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL"))
    else:
        assembly = compiled.asm["amdgcn"]
        names = (r"\.vgpr_count", r"\.vgpr_spill_count", r"\.sgpr_spill_count", "; ScratchSize")
        registers, *spills = (int(re.search(rf"{name}: +(\d+)", assembly)[1]) for name in names)
    return Resources(registers, sum(spills), compiled.metadata.shared)
