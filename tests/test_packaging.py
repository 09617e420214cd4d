"""What is shipped: folders that do not get in each other's way, and a wheel with everything in it."""

import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def test_kernels_folder_is_no_package():
    assert (ROOT / "kernels" / "m2pt_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_folder_does_not_shadow_an_installed_package(tmp_path):
    installed = tmp_path / "kernels" / "__init__.py"
    installed.parent.mkdir()
    installed.touch()
    script = "import kernels, m2pt_kernels; print(kernels.__file__)"
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = run(sys.executable, "-c", script, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths})
    assert found.strip() == str(installed)


@pytest.mark.parametrize("package", ["m2pt", "m2pt_kernels"])
def test_packages_are_typed(package):
    assert resources.files(package).joinpath("py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    run(sys.executable, "-m", "pip", "wheel", *options, folder, folder / "source")
    (path,) = folder.glob("*.whl")
    with ZipFile(path) as archive:
        yield archive


@pytest.mark.parametrize(
    "name",
    [
        "m2pt/__init__.py",
        "m2pt/py.typed",
        "m2pt/demo/__init__.py",
        "m2pt/data/japanese_vowels.npz",
        "m2pt_kernels/__init__.py",
        "m2pt_kernels/py.typed",
    ],
)
def test_wheel_holds(wheel, name):
    source = ROOT / ("kernels" if name.startswith("m2pt_kernels") else "") / name
    assert wheel.read(name) == source.read_bytes()


def test_wheel_holds_the_license(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_wheel_holds_every_module(wheel):
    modules = {
        path.relative_to(parent).as_posix()
        for parent, package in ((ROOT, "m2pt"), (ROOT / "kernels", "m2pt_kernels"))
        for path in (parent / package).rglob("*.py")
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules


def test_wheel_holds_nothing_else(wheel):
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"m2pt", "m2pt_kernels"}
