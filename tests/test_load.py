"""Long training, and surgery over and over: neither memory nor the number of live tensors grows."""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from tiny_runs import no_plots
from torch import Tensor

from m2pt import merge_pathways, reparameterize_aux_into_target_model
from m2pt.checkpoints import save_state_dict
from m2pt.cli import main
from m2pt.models import create_model
from m2pt.train.engine import Trainer

MODEL = {"embed_dim": 16, "depth": 2, "num_heads": 2}
MIB = 2**20
STATM = Path("/proc/self/statm")


class Memory:
    """What lives after a tenth of the repetitions, but not before the twentieth, and what lives after all of them."""

    def __init__(self, repetitions):
        self.repetitions, self.measured = repetitions, []

    def after(self, done):
        if done in (max(self.repetitions // 10, 20), self.repetitions):
            gc.collect()
            tensors = sum(issubclass(type(found), Tensor) for found in gc.get_objects())
            resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB if STATM.exists() else 0.0
            self.measured.append((tensors, resident))

    def assert_constant(self, mib):
        (tensors, resident), (tensors_at_end, resident_at_end) = self.measured
        print(f"{self.repetitions}: {tensors_at_end} tensors, {resident:.1f} MiB, then {resident_at_end:.1f} MiB")
        assert tensors_at_end <= tensors  # fewer, where what other tests left is freed meanwhile
        assert resident_at_end - resident < mib


def test_training_does_not_grow(tmp_path, monkeypatch, repetitions):
    """With a log line every step, a checkpoint every tenth, an evaluation every fortieth and a moving average."""
    steps = 40 * repetitions
    memory, update = Memory(steps), Trainer.update

    def measured(trainer, batches):
        metrics = update(trainer, batches)
        memory.after(trainer.step)
        return metrics

    no_plots(monkeypatch)
    monkeypatch.setattr(Trainer, "update", measured)
    torch.manual_seed(0)
    auxiliary = create_model("image", "tiny", num_classes=0, img_size=32, patch_size=8, **MODEL)
    save_state_dict(auxiliary.state_dict(), tmp_path / "aux.safetensors")
    command = ["train", "tiny_image", *(f"model.overrides.{name}={value}" for name, value in MODEL.items())]
    command += ["data.batch_size=30", f"schedule.epochs={repetitions}", "run.eval_epochs=1", "run.log_steps=1"]
    command += ["run.checkpoint_steps=10", "run.ema_decay=0.9"]
    command += ["--aux", str(tmp_path / "aux.safetensors"), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    memory.assert_constant(mib=16)


@pytest.mark.parametrize("aux_dtype", [None, "int8"])
def test_surgery_and_merging_do_not_grow(repetitions, aux_dtype):
    cycles = 20 * repetitions
    memory = Memory(cycles)
    plain, auxiliary = (create_model("image", "tiny", num_classes=3, img_size=32, patch_size=8, **MODEL) for _ in "ab")
    images = torch.randn(2, 3, 32, 32)
    for done in range(1, cycles + 1):
        model = reparameterize_aux_into_target_model(copy.deepcopy(plain), auxiliary, aux_dtype=aux_dtype)
        model(images).sum().backward()
        merge_pathways(model)(images).sum().backward()
        memory.after(done)
    memory.assert_constant(mib=16)
