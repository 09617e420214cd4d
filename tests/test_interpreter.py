"""The same tests of the operators on the Triton kernels, executed by Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NAMES = ("test_ops.py", "test_tma_kernels.py", "test_several_models.py", "test_numerics.py", "test_splits.py")


def test_operators_in_the_interpreter():
    options = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-k", "triton-cpu"]  # tests of kernels alone
    command = [sys.executable, "-m", "pytest", *options, *(Path(__file__).with_name(name) for name in NAMES)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if run.returncode:  # the summary names the tests that failed; a crash says on stderr which test it was
        pytest.fail(f"in the interpreter:\n{run.stdout[-5000:]}{run.stderr[:2000]}", pytrace=False)
    assert " passed" in run.stdout and "skipped" not in run.stdout
