"""What a light installation does: it imports, and names the extra that brings what is missing."""

import json
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from helpers import run_in_forks, run_without

from m2pt import FusedCrossModalLinear, cli
from m2pt.checkpoints import save_state_dict

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "sklearn",
    "matplotlib",
    "datasets",
    "webdataset",
    "scipy",
    "soundfile",
    "h5py",
    "av",
    "bitsandbytes",
    "argcomplete",
)


def test_kernels_need_torch_and_triton_alone():
    others = ("timm", "torchvision", "safetensors", "tqdm", "PIL", "m2pt")
    code = """
import m2pt_kernels, torch
x, weight = torch.randn(3, 8), torch.randn(4, 8)
data, scales = m2pt_kernels.quantize(weight, "int8")
m2pt_kernels.cross_modal_linear(x, weight.requires_grad_(), data, torch.ones(1), None, scales).sum().backward()
"""
    run_without((*EXTRAS, *others), code).check_returncode()


def test_what_needs_no_extra_imports_and_runs_without_any(tmp_path):
    """And an integration names the extra that brings its library."""
    code = """
import importlib
import m2pt, m2pt.checkpoint_formats, m2pt.cli, m2pt.data, m2pt.integrations, m2pt.models, m2pt.tensor_parallel
import m2pt_kernels.tuning
model, aux = (m2pt.models.create_model(name, "tiny", num_classes=2) for name in ("image", "audio"))
m2pt.merge_pathways(m2pt.reparameterize_aux_into_target_model(model, aux))
for name in ("transformers", "lightning"):
    try:
        importlib.import_module(f"m2pt.integrations.{name}")
    except ImportError as error:
        print(error)
sys.exit(m2pt.cli.main(["merge", *sys.argv[1:]]))
"""
    layer = FusedCrossModalLinear(2, 2, aux_weight=torch.randn(2, 2))
    save_state_dict(layer.state_dict(prefix="blocks.0.mlp.fc1."), tmp_path / "a.safetensors")
    paths = (str(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    finished = run_without((*EXTRAS, "transformers", "lightning"), code, *paths)
    assert (finished.returncode, finished.stderr) == (0, "")
    for_transformers, for_lightning, *_ = finished.stdout.splitlines()
    assert "transformers" in for_transformers and "lightning" in for_lightning
    assert all(line.endswith("pip install 'm2pt-triton[integrations]'") for line in (for_transformers, for_lightning))


MISSING = """
import json, sys
module, *commands = map(json.loads, sys.argv[1:])
sys.modules[module] = None  # what makes its import fail
from m2pt.cli import main
for command in commands:
    if main(command) != 2:
        sys.exit(f"{command} is not refused")
"""
COMMANDS = {
    "sklearn": (
        ("demo", "--out"),
        ("train", "tiny_image", "--out"),
        ("eval", "a.safetensors", "--recipe", "tiny_image", "--data"),
    ),
    "matplotlib": (
        ("demo", "--out"),
        ("pretrain", "pretrain_tiny_audio", "--out"),
        ("matrix", str(ROOT / "benchmarks" / "tiny_matrix.toml"), "--out"),
    ),
}


def test_the_command_line_names_the_extra_that_is_missing(tmp_path):
    """In one process for each that is missing, with torch from before, as each command needs it."""
    out = tmp_path / "out"
    runs = [
        (MISSING, [json.dumps(module), *(json.dumps([*command, str(out)]) for command in commands)], {})
        for module, commands in COMMANDS.items()
    ]
    for module, finished in zip(COMMANDS, run_in_forks(tmp_path, "import timm, torch", *runs), strict=True):
        lines = finished.stderr.splitlines()
        assert (finished.returncode, len(lines)) == (0, 3), finished.stderr
        for line in lines:
            assert line.startswith(f"m2pt: error: {module}") and line.endswith("pip install 'm2pt-triton[train]'")
    assert not list(out.glob("*"))


def test_the_command_line_runs_from_a_checkout():
    command = [sys.executable, "-m", "m2pt", "--version"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("m2pt ")


def test_the_command_line_runs_where_nothing_is_installed(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.delitem(sys.modules, "m2pt.version", raising=False)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert capsys.readouterr().out == f"m2pt {setup['metadata']['version']}\n"


def test_all_is_every_extra_but_those_of_tests():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    needed = [name for name in extras if name not in ("all", "integrations", "test")]
    assert extras["all"].strip() == f"m2pt-triton[{','.join(needed)}]"
