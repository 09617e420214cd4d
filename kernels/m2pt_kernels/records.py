"""What is remembered of a GPU between processes: times, and which kernels were found right or faulty.

JSON files in `$M2PT_CACHE_DIR`, by default `~/.cache/m2pt_kernels`, for each GPU's name, release of torch and Triton,
and state of the kernels.
"""

import hashlib
import json
import os
import re
import secrets
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import JITFunction

from .configs import UNTUNED

Kernels = tuple[JITFunction, ...]


def path_of(kind: str, device: str, kernels: Kernels) -> Path:
    """The file of such records, "times" or "findings"."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("M2PT_CACHE_DIR") or Path(caches) / "m2pt_kernels")
    code = "".join((torch.__version__, *(kernel.cache_key for kernel in kernels)))
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}-triton-{triton.__version__}-{digest}-{kind}.json"


def read(path: Path) -> dict[str, Any]:
    """Nothing, if there is no such file or it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """At once or, with a warning, not at all."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content, indent=1))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"M2PT_CACHE_DIR: cannot write {path} ({error}); it is forgotten with this process", stacklevel=3)


@cache
def faults(device: str, kernels: Kernels) -> dict[str, str]:
    """What is wrong with each variant of a kernel that was found faulty on such a GPU."""
    findings = read(path_of("findings", device, kernels))
    return {variant: fault for variant, fault in findings.items() if isinstance(fault, str)}


def remember(device: str, kernels: Kernels, findings: dict[str, str | None]) -> None:
    """Keep what is wrong with each variant, or None: those with a fault are not used any more, by any process."""
    path, known = path_of("findings", device, kernels), faults(device, kernels)
    for variant, fault in findings.items():
        known.pop(variant, None)
        if fault is not None:
            known[variant] = fault
    UNTUNED.clear()
    write(path, read(path) | findings)
