"""Store a GPU's times between processes, and which kernels were found correct or faulty.

They are JSON files in `$M2PT_CACHE_DIR`, by default `~/.cache/m2pt_kernels`, for each GPU name, release of torch and
Triton, and state of the kernels.
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

from .devices import INTERPRETED

Kernels = tuple[JITFunction, ...]

Findings = dict[str, dict[str, str | None]]
"""The fault, or None, by variant of a kernel and by what it was tried on."""


def path_of(content: str, device: str, kernels: Kernels) -> Path:
    """Return the file of "times" or "findings".

    Raises:
        RuntimeError: no variable names a folder, and there is no home folder.
    """
    if setting := os.environ.get("M2PT_CACHE_DIR"):
        folder = Path(setting)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2pt_kernels"
    code = "".join((torch.__version__, *(kernel.cache_key for kernel in kernels)))
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9]+", "-", device)
    return folder / f"{name}-triton-{triton.__version__}-{digest}-{content}.json"


def read(path: Path) -> dict[str, Any]:
    """Read a file; one that is missing or damaged counts as empty."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically or, with a warning, not at all."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(content, indent=1))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"M2PT_CACHE_DIR: cannot write {path} ({error}); it is lost when this process ends", stacklevel=3)


@cache
def faults(device: str, kernels: Kernels) -> dict[str, str]:
    """Return the fault of each variant of a kernel that was found faulty on such a GPU."""
    if INTERPRETED:
        return {}
    try:
        return _faults(read(path_of("findings", device, kernels)))
    except RuntimeError:  # without a home folder nothing was remembered
        return {}


def _faults(findings: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, tried in findings.items():
        wrong = [fault for fault in tried.values() if isinstance(fault, str)] if isinstance(tried, dict) else []
        if wrong:
            found[name] = wrong[0]
    return found


def remember(device: str, kernels: Kernels, findings: Findings) -> None:
    """Store findings for `faults`. A variant's fault is gone once it is correct where it was faulty.

    Other processes that are already running are not affected.
    """
    path, known = path_of("findings", device, kernels), faults(device, kernels)
    content = read(path)
    for name, tried in findings.items():
        before = content.get(name)
        content[name] = (before if isinstance(before, dict) else {}) | tried
        known.pop(name, None)
        known.update(_faults({name: content[name]}))
    write(path, content)
