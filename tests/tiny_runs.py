"""Data sets of a few generated samples in the layouts of the recipes, models that learn them in seconds, and runs
without plots or cut short."""

import csv
import json
import math
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from m2pt.models import MaskedAutoencoder, create_model
from m2pt.train import load_recipe, parse_assignment
from m2pt.train.distributed import World
from m2pt.train.engine import Trainer, classification_objective
from m2pt.train.optimization import create_loss

WIDTH = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SIZES = {
    "image": {"img_size": 32, "patch_size": 8},
    "audio": {"img_size": [32, 128]},
    "point": {"num_groups": 8, "group_size": 8},
    "video": {"img_size": 32, "num_frames": 4},
}
RECIPES = {
    "image": "image_imagenet",
    "audio": "audio_esc50",
    "point": "point_modelnet40",
    "video": "video_kinetics400",
}
SETTINGS = {
    "image": ["data.settings.size=32"],
    "audio": [
        "data.settings.frames=32",
        "data.settings.time_mask=4",
    ],
    "point": ["data.settings.points=64"],
    "video": [
        "data.settings.size=32",
        "data.settings.frames=4",
        "data.settings.num_classes=2",
        "data.settings.clips=2",
        "data.settings.crops=1",
    ],
}
RUN = [
    "data.batch_size=4",
    "data.test_batch_size=3",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "machine.workers=0",
    "machine.precision=float32",
    "run.log_steps=1",
]


def assignments(modality):
    """What makes the modality's recipe tiny."""
    overrides = [f"model.overrides.{name}={value}" for name, value in (WIDTH | SIZES[modality]).items()]
    return overrides + SETTINGS[modality] + RUN


def tiny_model(modality, num_classes, **settings):
    """The model of these assignments."""
    return create_model(modality, num_classes=num_classes, **WIDTH | SIZES[modality] | settings)


def no_plots(monkeypatch):
    """Figures take longer than these runs."""
    for plot in ("plot_curves", "plot_scales"):
        monkeypatch.setattr(f"m2pt.train.run.{plot}", lambda *arguments: None)


def interrupted(stop):
    """Inside the block training is stopped before a step, as by Ctrl-C."""
    update = Trainer.update

    def interrupting(trainer, batches):
        if trainer.step == stop:
            raise KeyboardInterrupt
        return update(trainer, batches)

    return mock.patch.object(Trainer, "update", interrupting)


def assert_equal(a, b):
    """Nested containers with the same tensors, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


EXTRAS = {"audio": ("soundfile", "scipy"), "video": ("av",)}


def need_extras(modality):
    """Skip the test where what reads the modality's files is not installed."""
    for module in EXTRAS.get(modality, ()):
        pytest.importorskip(module)


def has_extras(modality):
    return all(map(find_spec, EXTRAS.get(modality, ())))


def make_data(modality, root, train=8, test=5):
    """Two classes that are easy to tell apart: `train` and `test` samples in all."""
    need_extras(modality)
    root.mkdir()
    MAKERS[modality](root, {"train": train, "test": test})
    return root


def images(root, counts):
    for split, count in counts.items():
        for index in range(count):
            folder = root / {"train": "train", "test": "val"}[split] / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(index)).save(folder / f"{index}.png")


def picture(index, size=40):
    noise = np.random.default_rng(index).integers(0, 100, (size, size, 3))
    noise[..., index % 2] += 100
    return noise.astype(np.uint8)


def sounds(root, counts):
    import soundfile

    (root / "meta").mkdir()
    (root / "audio").mkdir()
    with (root / "meta" / "esc50.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "fold", "target", "category"])
        for fold, split in ((1, "test"), (2, "train")):
            for index in range(counts[split]):
                name = f"{split}{index}.wav"
                rows.writerow([name, fold, index % 2, ("low", "high")[index % 2]])
                time = np.arange(16000 * 4 // 10) / 16000
                wave = np.sin(2 * math.pi * (300, 3000)[index % 2] * time + index)
                noise = 0.05 * np.random.default_rng(index).normal(size=len(time))
                soundfile.write(root / "audio" / name, 0.5 * wave + noise, 16000)


def clouds(root, counts):
    (root / "modelnet40_shape_names.txt").write_text("ball\nstick\n")
    for split, count in counts.items():
        names = [f"{('ball', 'stick')[index % 2]}_{split}{index}" for index in range(count)]
        (root / f"modelnet40_{split}.txt").write_text("\n".join(names) + "\n")
        for index, name in enumerate(names):
            folder = root / name.partition("_")[0]
            folder.mkdir(exist_ok=True)
            points = np.random.default_rng(index).normal(size=(80, 6))
            points[:, 1:3] *= (1, 0.1)[index % 2]
            np.savetxt(folder / f"{name}.txt", points, delimiter=",")


def videos(root, counts):
    import av

    for split, count in counts.items():
        lines = []
        for index in range(count):
            name = f"{split}{index}.mp4"
            with av.open(str(root / name), "w") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.width = stream.height = 40
                for step in range(20):
                    frame = av.VideoFrame.from_ndarray(np.roll(picture(index), step, axis=0), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            lines.append(f"{name} {index % 2}\n")
        (root / f"{split}.csv").write_text("".join(lines))


def parts(root, counts):
    """ShapeNetPart with bags and caps, two parts each: what is above and what is below."""
    (root / "synsetoffset2category.txt").write_text("Bag\t02773838\nCap\t02954340\n")
    (root / "train_test_split").mkdir()
    for split, count in {**counts, "val": 0}.items():
        entries = []
        for index in range(count):
            synset, first = (("02773838", 4), ("02954340", 6))[index % 2]
            entries.append(f"shape_data/{synset}/{split}{index}")
            (root / synset).mkdir(exist_ok=True)
            points = np.random.default_rng(index).normal(size=(80, 7))
            points[:, 6] = first + (points[:, 2] > 0)
            np.savetxt(root / synset / f"{split}{index}.txt", points)
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(entries))


MAKERS = {"image": images, "audio": sounds, "point": clouds, "video": videos, "parts": parts}

INTERVAL = 10
INPUTS = {"image": (3, 32, 32), "audio": (1, 32, 128), "point": (64, 3), "video": (3, 8, 32, 32)}
ONCE = {
    "plain": [],
    "clipping": ["optimizer.clip_grad=1.0"],
    "accumulation": ["machine.accumulation=2"],
    "step in backward": ["machine.step_in_backward=true"],
    "float16": ["machine.precision=float16"],
    "moving average": ["run.ema_decay=0.9"],
}
"""Settings with which training reads back from the device once per line of the log."""


def recipe_of(modality, *more):
    """A recipe of generated or embedded data, smaller still."""
    size = [f"model.overrides.{name}={value}" for name, value in {"embed_dim": 16, "depth": 1, "num_heads": 2}.items()]
    settings = [*size, "data.batch_size=4", "loss.mixup=0.8", f"run.log_steps={INTERVAL}", *more]
    return load_recipe(f"tiny_{modality}", dict(map(parse_assignment, settings)))


def trainer_of(recipe, device="cpu", pretraining=False):
    """Trains the recipe's model."""
    model = recipe.model
    module = create_model(model.modality, model.size, num_classes=0 if pretraining else 5, **model.overrides)
    if recipe.machine.checkpoint_activations:
        module.set_grad_checkpointing()
    world = World(0, 1, torch.device(device))
    if pretraining:
        module = MaskedAutoencoder(module, 0.5, 48, 1, 3)
        return Trainer(module.to(device), lambda model, batch: model(batch[0]), recipe, world, 1000)
    objective = classification_objective(recipe, 5, 1, create_loss(recipe.loss))
    return Trainer(module.to(device), objective, recipe, world, 1000)


def batches_of(recipe, steps):
    """Noise, one batch for each pass of each step."""
    micro_batches = recipe.machine.accumulation
    shape = (recipe.data.batch_size // micro_batches, *INPUTS[recipe.model.modality])
    return [(torch.randn(shape), torch.randint(5, shape[:1])) for _ in range(steps * micro_batches)]
