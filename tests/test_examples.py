"""The examples run as they are, with small random models."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from two_processes import FORKSERVER

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


def run(path, folder):
    """As from the command line, but with torch imported already."""
    os.chdir(folder)
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [str(path)]
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    needs, expected = LAST_LINE[path.stem]
    pytest.importorskip(needs)
    process = FORKSERVER.Process(target=run, args=(path, tmp_path))
    process.start()
    process.join()
    stdout, stderr = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == 0, stderr
    assert re.fullmatch(expected, stdout.splitlines()[-1])
    if path.stem == "lightning_module":
        assert (tmp_path / "merged.safetensors").is_file()
    elif path.stem == "large_vit":
        losses = [float(loss) for loss in re.findall(r"^step \d: loss (\S+)$", stdout, re.MULTILINE)]
        assert len(losses) == 3 and losses[2] < losses[0]
        assert "2 GiB are enough with: no lever" in stdout
    else:
        assert float(re.search(EFFECT, stdout, re.MULTILINE)[1]) > 1e-5


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
