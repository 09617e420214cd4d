"""How the package starts: what is imported when, and the version."""

import pytest
from helpers import run_in_forks

import m2pt
import m2pt.train

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


HELP = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]


def test_what_needs_no_model_imports_no_torch(tmp_path):
    commands = [*HELP, ["recipes"], ["recipes", "tiny_image", "schedule.epochs=3"]]
    for finished in run_in_forks(tmp_path, "import m2pt.cli", *((LIGHT, command, {}) for command in commands)):
        assert (finished.returncode, finished.stderr) == (0, "") and finished.stdout, finished.args


IMPORTED = "import sys, {name}; sys.exit('torch' in sys.modules)"
NAMES = """
import pickle, {name} as package
for name in package.__all__:
    value = getattr(package, name)
    assert pickle.loads(pickle.dumps(value)) is value, name
from {name} import *
{last}
"""
SUBMODULES = "import m2pt; m2pt.pathway.merge_pathways; m2pt.checkpoints.merge_state_dict; m2pt.train.recipe"


def test_names_of_a_package_are_imported_when_asked_for(tmp_path):
    """Submodules are attributes, too."""
    packages = (m2pt, m2pt.train)
    for package in packages:
        names = package.__all__
        assert names == sorted(names) and set(names) <= set(dir(package))
    for preparation, codes in {
        "": [IMPORTED.format(name=package.__name__) for package in packages],
        "import matplotlib.figure, sklearn.datasets, timm, torch": [
            *(NAMES.format(name=each.__name__, last=each.__all__[-1]) for each in packages),
            SUBMODULES,
        ],
    }.items():
        for finished in run_in_forks(tmp_path, preparation, *((code, [], {}) for code in codes)):
            finished.check_returncode()


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'm2pt' has no attribute 'merge_pathway'"):
        _ = m2pt.merge_pathway
    with pytest.raises(ImportError, match="cannot import name 'merge_pathway'"):
        from m2pt import merge_pathway  # noqa: F401
