"""Differences between releases of Triton other than tiles: features, options, and which releases are known."""

import os
import re
import warnings
from functools import cache
from typing import Any

import triton

RELEASE = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
OLDEST, NEWEST = (3, 5), (3, 9)
"""All kernels were compiled with these and the releases between, and inspected: no spills, within shared memory."""

HAS_TMA_LOOPS = RELEASE >= (3, 8)
"""Triton 3.4 to 3.6 do not compile the loops of `gemm_tma`; 3.7 does, but barriers share their memory."""

HAS_TALLEST_HOPPER_TILE = RELEASE == (3, 8)
"""The tallest tile of `gemm_hopper`: 3.7 spills it, and 3.9 makes its products wait for each other."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Fuses multiplications and additions into one instruction in every kernel; Triton 3.10 will do so only if asked."""

TMA_OPTIONS = OPTIONS
"""The kernels that read by TMA need another option from Triton 3.9 on."""
if RELEASE >= (3, 9):
    # It assembles for sm_90 with ptxas 13, which by default spills registers of the largest tiles.
    TMA_OPTIONS = OPTIONS | {"ptx_options": "--register-usage-level=0"}


@cache
def is_trusted() -> bool:
    """Return whether more than the portable kernels may be used: Triton is known, or M2PT_TRUST_TRITON is 1.

    It warns once if not.
    """
    if OLDEST <= RELEASE <= NEWEST or os.environ.get("M2PT_TRUST_TRITON") == "1":
        return True
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    warnings.warn(
        f"m2pt_kernels knows Triton {oldest} to {newest}, this is {triton.__version__}: it uses portable kernels, which"
        " are slower; M2PT_TRUST_TRITON=1 lets it use the others",
        stacklevel=2,
    )
    return False


def check_interpreter() -> None:
    """Check that Triton's interpreter works with the installed numpy.

    Raises:
        RuntimeError: it does not.
    """
    import numpy as np  # needed by the interpreter alone

    if RELEASE < (3, 7) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        raise RuntimeError(f"TRITON_INTERPRET: Triton {triton.__version__} needs numpy < 2.4, got {np.__version__}")
