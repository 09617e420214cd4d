"""The main loop of a compiled kernel: its SASS instructions, counted by the pipe that executes them."""

import re
import subprocess
import tempfile
from collections import Counter
from inspect import signature
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import CompiledKernel

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
TENSOR = {"HMMA", "HGMMA", "UTCHMMA"}
PIPES = {
    "tensor": TENSOR,
    "shared": {"LDS", "LDSM", "STS", "STSM"},
    "copy": {"LDG", "LDGSTS", "UTMALDG", "STG"},
    "float": {"FFMA", "FFMA2", "FADD", "FMUL", "HFMA2", "F2FP"},
}
"""Every other instruction counts as integer and control."""


class Loop(NamedTuple):
    """One iteration of a warp: instructions by pipe, bytes it moves between registers and shared memory, and barriers.

    Barriers are waits for other warps (BAR) and for barriers in shared memory (SYNCS).
    """

    instructions: dict[str, int]
    shared_bytes: int
    stores_to_shared: int
    barriers: int


def main_loop(compiled: CompiledKernel) -> Loop | None:
    """The loop that is densest in tensor instructions; None without any (float32 by FMA, unrolled) or on AMD.

    Where other warps form an operand in tensor memory (sm_100), their loop is added, as if every warp ran both.
    """
    if "cubin" not in compiled.asm:
        return None
    instructions, labels = _disassemble(compiled.asm["cubin"])
    tensor_before = [0, *accumulate(_pipe(name) == "tensor" for name, _ in instructions)]
    multiplying, others = [], []
    for end, (name, operands) in enumerate(instructions, 1):
        target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        if target and (start := labels.get(target[0], end)) < end:
            tensor = tensor_before[end] - tensor_before[start]
            (multiplying if tensor else others).append((tensor / (end - start), instructions[start:end]))
    if not multiplying:
        return None
    # Blocks that wait for a barrier stand at the end and jump back, which looks like longer loops.
    _, loop = max(multiplying, key=itemgetter(0))
    forming = [loop for _, loop in others if _stores_to_tensor_memory(loop)]
    loop = loop + min(forming, key=len, default=[])
    counts = Counter(_pipe(name) for name, _ in loop)
    shared = [name for name, _ in loop if _pipe(name) == "shared"]
    return Loop(
        dict(counts),
        sum(map(_shared_bytes, shared)),
        stores_to_shared=sum(name.startswith("ST") for name in shared),
        barriers=sum(name.startswith(("BAR.SYNC", "SYNCS.PHASECHK")) for name, _ in loop),
    )


def assembler(architecture: int) -> str:
    """The path of Triton's assembler; before 3.6 it is the same for every architecture."""
    return get_ptxas(*[architecture][: len(signature(get_ptxas).parameters)]).path


def _disassemble(cubin: bytes) -> tuple[list[tuple[str, str]], dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]  # no analysis of data flow
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[tuple[str, str]] = []
    labels = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append((instruction[1], instruction[2]))
    return instructions, labels


def _stores_to_tensor_memory(loop: list[tuple[str, str]]) -> bool:
    return any(name.startswith("STTM") for name, _ in loop)


def _pipe(name: str) -> str:
    base = name.split(".")[0]
    return next((pipe for pipe, names in PIPES.items() if base in names), "integer")


def _shared_bytes(name: str) -> int:
    """Bytes of a whole warp: LDS.64 reads 8 bytes a lane, LDSM.16.M88.4 four matrices of 128 bytes, LDSM.16.M88 one."""
    if name.startswith(("LDSM", "STSM")):
        matrices = name.rpartition(".")[2]
        return 128 * (int(matrices) if matrices.isdigit() else 1)
    width = re.search(r"\.(64|128)\b", name)
    return 32 * (int(width[1]) // 8 if width else 4)
