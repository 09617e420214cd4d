"""What the packages do beside their work: no network, no files but where they were asked for, no code out of data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

WATCHED = """
import json, os, sys

NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"}
CHANGES = {"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate"}
network, changed = [], []

def watch(event, arguments):
    if event in NETWORK:
        network.append(f"{event} {arguments[1:]}")
        raise OSError("there is no network")
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        changed.append(arguments[0])
    if event in CHANGES and -1 in arguments:  # otherwise relative to an open folder, which was found by its name before
        changed.extend(arguments[: 2 if event in ("os.rename", "os.link") else 1])

sys.addaudithook(watch)

import importlib, pkgutil
import m2pt, m2pt_kernels
for package in (m2pt, m2pt_kernels):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)

from pathlib import Path
from m2pt.cli import main
from m2pt.demo.experiment import run_demo
from m2pt.demo.report import write_report

out, report = map(Path, sys.argv[1:])
run = str(out / "run")
short = ["schedule.epochs=1", "schedule.warmup_epochs=0", "data.batch_size=250"]
for command in (
    ["pretrain", "pretrain_tiny_audio", "--out", str(out / "audio"), *short],
    ["train", "tiny_image", "--aux", str(out / "audio" / "pretrained.safetensors"), "--out", run, *short],
    ["eval", f"{run}/merged.safetensors", "--recipe", "tiny_image"],
    ["merge", f"{run}/last.pth", f"{run}/again.safetensors"],
    ["convert", f"{run}/merged.safetensors", f"{run}/converted.safetensors"],
):
    assert main(command) == 0, command
smallest = {"schedule.epochs": 1, "schedule.warmup_epochs": 0, "model.overrides.depth": 1}
write_report(run_demo(out / "demo", 2, overrides=smallest), out / "demo")

changed = sorted({os.path.abspath(os.fsdecode(path)) for path in changed if isinstance(path, (str, bytes))})
report.write_text(json.dumps({"network": network, "changed": changed}))
"""


def listing(*folders):
    """Every file's size and time: also what native code has written, which Python does not tell of."""
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Import everything, pretrain, train, evaluate, merge, convert and run the demo, in a process that is watched."""
    folder = tmp_path_factory.mktemp("session")
    for name in ("home", "temporary", "current", "out"):
        (folder / name).mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL", "HF_", "TORCH"))
    }
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    before = listing(ROOT / "m2pt", ROOT / "kernels")
    command = [sys.executable, "-c", WATCHED, str(folder / "out"), str(folder / "report.json")]
    subprocess.run(command, cwd=folder / "current", env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert listing(ROOT / "m2pt", ROOT / "kernels") == before
    return folder


def test_nothing_goes_over_the_network(session):
    assert json.loads((session / "report.json").read_text())["network"] == []


def test_nothing_is_written_but_to_output_cache_and_temporary_folders(session):
    allowed = [session / name for name in ("out", "temporary", "home/.cache", "home/.config")]
    changed = map(Path, json.loads((session / "report.json").read_text())["changed"])
    outside = [path for path in changed if not any(path.is_relative_to(folder) for folder in (*allowed, "/dev"))]
    assert not outside
    assert not listing(session / "current", session / "temporary")
    assert {Path(path).relative_to(session / "home").parts[0] for path in listing(session / "home")} <= {
        ".cache",
        ".config",
    }
    assert {path.name for path in (session / "out").iterdir()} == {"audio", "run", "demo"}


UNSAFE = {
    "S102": "exec(input())",
    "S301": "import pickle\npickle.loads(b'')",
    "S302": "import marshal\nmarshal.loads(b'')",
    "S306": "import tempfile\ntempfile.mktemp()",
    "S307": "eval(input())",
    "S310": "import urllib.request\nurllib.request.urlopen(input())",
    "S506": "import yaml\nyaml.load('')",
    "S602": "import subprocess\nsubprocess.run('ls ' + input(), shell=True)",
    "S605": "import os\nos.system('ls ' + input())",
    "TID251": "import torch\ntorch.load('a.pth', weights_only=True)",
}


def test_the_linter_refuses_code_out_of_data(tmp_path):
    pytest.importorskip("ruff")
    (tmp_path / "m2pt").mkdir()
    for rule, code in UNSAFE.items():
        (tmp_path / "m2pt" / f"{rule}.py").write_text(f"{code}\n")
    options = ["--no-cache", "--output-format=concise", f"--config={ROOT / 'pyproject.toml'}"]
    command = [sys.executable, "-m", "ruff", "check", *options, "m2pt"]
    lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    refused = {rule for rule in UNSAFE if any(f"/{rule}.py:" in line and f" {rule} " in line for line in lines)}
    assert refused == UNSAFE.keys()
