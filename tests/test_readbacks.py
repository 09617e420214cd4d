"""How often training reads back from the device: once per log interval, where the optimizer can leave an update out on
the device. A GPU waits at every such place, so that on a CPU it is enough to count them."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_runs import INPUTS, INTERVAL, ONCE, batches_of, recipe_of, trainer_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import m2pt.train.run
from m2pt.train.log import Log

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
STEPS = 20


class Readbacks(TorchDispatchMode):
    """Counts what makes the host wait for a value, by the name of the operator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        indices = arguments[1] if name in ("index", "index_put_") else ()
        if name in READS or any(index is not None and index.dtype == torch.bool for index in indices):
            self.counts[name] += 1
        return function(*arguments, **(keywords or {}))


class Lists(TorchFunctionMode):
    """Counts `Tensor.tolist`, which no operator stands for."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.counts[function.__name__] += 1
        return function(*arguments, **(keywords or {}))


@contextmanager
def counted():
    """The readbacks inside the block, by name."""
    with Readbacks() as mode, Lists(mode.counts):
        yield mode.counts


@pytest.fixture
def readbacks(tmp_path, monkeypatch):
    """A function that trains for `STEPS` steps and counts."""

    def count(modality, *more, pretraining=False):
        recipe = recipe_of(modality, *more)
        trainer, batches = trainer_of(recipe, pretraining=pretraining), batches_of(recipe, STEPS)
        monkeypatch.setattr(m2pt.train.run, "_micro_batches", lambda *arguments: nullcontext(iter(batches)))
        end = pytest.raises(ValueError, match=f"ended at step {STEPS}")
        with Log(tmp_path, True, 0, STEPS) as log, counted() as counts, end:
            m2pt.train.run._fit(trainer, None, tmp_path, log, 1000, None)
        return counts

    return count


@pytest.mark.parametrize("setting", ONCE)
def test_training_reads_back_once_per_log_interval(readbacks, setting):
    assert readbacks("image", *ONCE[setting]).total() == STEPS // INTERVAL


@pytest.mark.parametrize("modality", ["audio", "point", "video"])
def test_every_modality_does(readbacks, modality):
    mixing = ["loss.mixup=0.0"] * (modality == "point")
    assert readbacks(modality, *mixing).total() == STEPS // INTERVAL


@pytest.mark.parametrize("modality", INPUTS)
def test_pretraining_does(readbacks, modality):
    assert readbacks(modality, pretraining=True).total() == STEPS // INTERVAL


def test_an_optimizer_that_cannot_leave_an_update_out_reads_once_per_step(readbacks):
    assert readbacks("image", "optimizer.name=momentum").total() == STEPS + STEPS // INTERVAL
