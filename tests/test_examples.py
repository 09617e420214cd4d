"""The examples run as they are, with small random models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAST_LINE = {
    "huggingface_trainer": ("transformers", "merged: largest difference of logits "),
    "plain_loop": ("timm", "merged: logits differ by "),
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_runs(path):
    needs, expected = LAST_LINE[path.stem]
    pytest.importorskip(needs)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    finished = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    last = finished.stdout.splitlines()[-1]
    assert last.startswith(expected) and float(last.removeprefix(expected)) < 1e-4
