"""What a light installation does: it imports, and names the extra that brings what is missing."""

import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from helpers import run_without

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


def m2pt(missing, *arguments):
    return run_without(missing, "from m2pt.cli import main; sys.exit(main())", *arguments)


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
    code = """
import m2pt, m2pt.checkpoint_formats, m2pt.data, m2pt.models, m2pt.tensor_parallel, m2pt_kernels.tuning
model, aux = (m2pt.models.create_model(name, "tiny", num_classes=2) for name in ("image", "audio"))
m2pt.merge_pathways(m2pt.reparameterize_aux_into_target_model(model, aux))
"""
    run_without(EXTRAS, code).check_returncode()
    layer = FusedCrossModalLinear(2, 2, aux_weight=torch.randn(2, 2))
    save_state_dict(layer.state_dict(prefix="blocks.0.mlp.fc1."), tmp_path / "a.safetensors")
    finished = m2pt(EXTRAS, "merge", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    assert (finished.returncode, finished.stderr) == (0, "")


def test_an_integration_names_its_extra():
    finished = run_without(("transformers",), "import m2pt.integrations, m2pt.integrations.transformers")
    assert finished.stderr.splitlines()[-1].endswith("pip install 'm2pt-triton[integrations]'")


@pytest.mark.parametrize(
    "module, command",
    [
        ("sklearn", ("demo", "--out")),
        ("matplotlib", ("demo", "--out")),
        ("sklearn", ("train", "tiny_image", "--out")),
        ("matplotlib", ("pretrain", "pretrain_tiny_audio", "--out")),
        ("matplotlib", ("matrix", str(ROOT / "benchmarks" / "tiny_matrix.toml"), "--out")),
        ("sklearn", ("eval", "a.safetensors", "--recipe", "tiny_image", "--data")),
    ],
    ids=lambda entry: entry if isinstance(entry, str) else entry[0],
)
def test_the_command_line_names_the_extra_that_is_missing(tmp_path, module, command):
    finished = m2pt((module,), *command, str(tmp_path / "out"))
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"m2pt: error: {module}") and line.endswith("pip install 'm2pt-triton[train]'")
    assert not list((tmp_path / "out").glob("*"))


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
