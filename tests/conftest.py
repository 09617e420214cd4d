"""The paths one test body runs on: plain torch on the CPU; on a GPU the kernels too; the kernels alone in a process
where Triton's interpreter is on (TRITON_INTERPRET=1), which `test_interpreter.py` starts."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts: the tests themselves run side by side

import pytest
import torch
from hypothesis import HealthCheck, settings

from m2pt_kernels import implementation, records
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.plans import NOT_COMPILED, UNTUNED

if INTERPRETED:
    PATHS = [("triton", "cpu")]
elif torch.cuda.is_available():
    PATHS = [("eager", "cpu"), ("eager", "cuda"), ("triton", "cuda")]
else:
    PATHS = [("eager", "cpu")]

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where a shell runs tests in the background

pytest.register_assert_rewrite("helpers", "tiny_runs")

# Random cases are drawn by a rule, so that a run can be repeated; `--hypothesis-profile random` draws others.
unlimited = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("fixed", derandomize=True, **unlimited)
settings.register_profile("random", **unlimited)
settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--repetitions", type=int, default=2, help="how often the tests of faults and load repeat")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n 2`, a worker that has run out of tests takes some of the other's: the slow ones come in whole files."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_finish():
    """What the imports made stays: accelerate and others collect garbage on and on, and took 0.5 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repetitions(request):
    """So many kills; half as many terminations; 40 times as many steps and flipped bits; 20 times as many cycles of
    surgery."""
    return request.config.getoption("repetitions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the tests of one file share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(params=PATHS, ids="-".join)
def device(request):
    """The device to put tensors on, with the path under test forced."""
    name, device = request.param
    with implementation(name):
        yield device


@pytest.fixture
def matmul_precision():
    """A function that sets torch's precision of float32 products until the test ends."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _seed():
    """torch's own function formats the stack for a later GPU, which takes a millisecond or two."""
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def _choose_plans_anew(tmp_path, monkeypatch):
    """As tests change what they depend on; what the user's folder says of this GPU is not read."""
    monkeypatch.setenv("M2PT_CACHE_DIR", str(tmp_path / "m2pt_kernels"))
    UNTUNED.clear()
    NOT_COMPILED.clear()
    records.faults.cache_clear()
