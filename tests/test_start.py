"""How the package starts: what is imported when, and the version."""

import pickle
import subprocess
import sys

import pytest

import m2pt
import m2pt.train

pytestmark = pytest.mark.slow

COMMANDS = ("train", "pretrain", "eval", "matrix", "merge", "convert", "check", "demo", "recipes", "memory")
LIGHT = """
import sys
from m2pt.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as error:
    status = error.code
loaded = {name.partition(".")[0] for name in sys.modules} & {"torch", "timm", "numpy", "triton"}
sys.exit(f"imported: {loaded}" if loaded else status)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        ["recipes"],
        ["recipes", "tiny_image", "schedule.epochs=3"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_no_torch(arguments):
    finished = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "") and finished.stdout


@pytest.mark.parametrize("package", [m2pt, m2pt.train], ids=lambda package: package.__name__)
def test_names_of_a_package_are_imported_when_asked_for(package):
    names = package.__all__
    assert names == sorted(names) and set(names) <= set(dir(package))
    code = f"import sys, {package.__name__} as p; before = 'torch' in sys.modules\n"
    code += f"[getattr(p, name) for name in {names}]; from {package.__name__} import *\n"
    code += f"{names[-1]}; sys.exit(before)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for value in (getattr(package, name) for name in names):
        assert pickle.loads(pickle.dumps(value)) is value


def test_submodules_are_attributes_and_other_names_are_refused():
    code = "import m2pt; m2pt.pathway.merge_pathways; m2pt.checkpoints.merge_state_dict; m2pt.train.recipe"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'm2pt' has no attribute 'merge_pathway'"):
        _ = m2pt.merge_pathway
    with pytest.raises(ImportError, match="cannot import name 'merge_pathway'"):
        from m2pt import merge_pathway  # noqa: F401
