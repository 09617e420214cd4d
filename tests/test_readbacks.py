"""How often training reads back from the device: once per log interval, where the optimizer can leave an update out on
the device. A GPU waits at every such place, so that on a CPU it is enough to count them."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import m2pt.train.run
from m2pt.models import MaskedAutoencoder, create_model
from m2pt.train import load_recipe, parse_assignment
from m2pt.train.distributed import World
from m2pt.train.engine import Trainer, classification_objective
from m2pt.train.log import Log
from m2pt.train.optimization import create_loss

READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
STEPS, INTERVAL = 20, 10
SIZE = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SETTINGS = [f"model.overrides.{name}={value}" for name, value in SIZE.items()]
SETTINGS += ["data.batch_size=4", "loss.mixup=0.8", f"run.log_steps={INTERVAL}"]
SHAPES = {"image": (3, 32, 32), "audio": (1, 32, 128), "point": (64, 3), "video": (3, 8, 32, 32)}


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


def recipe_of(modality, *more):
    return load_recipe(f"tiny_{modality}", dict(map(parse_assignment, [*SETTINGS, *more])))


def trainer_of(recipe, device="cpu", pretraining=False):
    model = recipe.model
    module = create_model(model.modality, model.size, num_classes=0 if pretraining else 5, **model.overrides)
    if recipe.machine.checkpoint_activations:
        module.set_grad_checkpointing()
    world = World(0, 1, torch.device(device))
    if pretraining:
        module = MaskedAutoencoder(module, 0.5, 48, 1, 3)
        return Trainer(module.to(device), lambda model, batch: model(batch[0]), recipe, world, 1000, True)
    objective = classification_objective(recipe, 5, 1, create_loss(recipe.loss))
    return Trainer(module.to(device), objective, recipe, world, 1000)


def batches_of(recipe, steps):
    micro_batches = recipe.machine.accumulation
    shape = (recipe.data.batch_size // micro_batches, *SHAPES[recipe.model.modality])
    return [(torch.randn(shape), torch.randint(5, shape[:1])) for _ in range(steps * micro_batches)]


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


ONCE = {
    "plain": [],
    "clipping": ["optimizer.clip_grad=1.0"],
    "accumulation": ["machine.accumulation=2"],
    "step in backward": ["machine.step_in_backward=true"],
    "float16": ["machine.precision=float16"],
    "moving average": ["run.ema_decay=0.9"],
}


@pytest.mark.parametrize("setting", ONCE)
def test_training_reads_back_once_per_log_interval(readbacks, setting):
    assert readbacks("image", *ONCE[setting]).total() == STEPS // INTERVAL


@pytest.mark.parametrize("modality", ["audio", "point", "video"])
def test_every_modality_does(readbacks, modality):
    mixing = ["loss.mixup=0.0"] * (modality == "point")
    assert readbacks(modality, *mixing).total() == STEPS // INTERVAL


@pytest.mark.parametrize("modality", SHAPES)
def test_pretraining_does(readbacks, modality):
    assert readbacks(modality, pretraining=True).total() == STEPS // INTERVAL


def test_an_optimizer_that_cannot_leave_an_update_out_reads_once_per_step(readbacks):
    assert readbacks("image", "optimizer.name=momentum").total() == STEPS + STEPS // INTERVAL
