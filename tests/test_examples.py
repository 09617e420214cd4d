"""The examples run as they are, with small random models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = r"\d(\.\d+)?e-0[5-9]|0\.0"
LAST_LINE = {
    "huggingface_trainer": ("transformers", f"merged: logits differ by ({SMALL})"),
    "large_vit": ("timm", f"merged: logits differ by ({SMALL})"),
    "lightning_module": ("lightning", r"written: .*pathway\.ckpt, merged\.safetensors"),
    "plain_loop": ("timm", f"merged: logits differ by ({SMALL})"),
}


EFFECT = r"^without its pathways: .* (\S+)$"


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    needs, expected = LAST_LINE[path.stem]
    pytest.importorskip(needs)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    finished = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(expected, finished.stdout.splitlines()[-1])
    if path.stem == "lightning_module":
        assert (tmp_path / "merged.safetensors").is_file()
    elif path.stem == "large_vit":
        losses = [float(loss) for loss in re.findall(r"^step \d: loss (\S+)$", finished.stdout, re.MULTILINE)]
        assert len(losses) == 3 and losses[2] < losses[0]
        assert "2 GiB are enough with: no lever" in finished.stdout
    else:
        assert float(re.search(EFFECT, finished.stdout, re.MULTILINE)[1]) > 1e-5


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
