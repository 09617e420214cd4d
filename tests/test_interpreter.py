"""The same tests of the operators on the Triton kernels, executed by Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "name", ["test_ops.py", "test_several_models.py", "test_numerics.py", "test_tma_kernels.py", "test_splits.py"]
)
def test_operators_in_the_interpreter(name):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).with_name(name)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[:2000]  # a crash says there which test it was
    assert " passed" in run.stdout and "skipped" not in run.stdout
