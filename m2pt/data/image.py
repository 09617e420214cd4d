"""Images through timm's readers, with MAE's augmentation (He et al., CVPR 2022). Mixup and cutmix mix batches: they
belong to the training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.data
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_positive, check_probability, one_of, require
from .common import Samples, draw_seed, seeded


class ImageDataset(Samples):
    """The images of a map-style reader of timm, transformed."""

    def __init__(self, reader: Any, transform: Callable[[Image.Image], Tensor]) -> None:
        names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
        super().__init__(len(names), names)
        self.reader, self.transform = reader, transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            file, target = self.reader[index]
            with file, Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = self.reader.filename(index, absolute=True)
            raise ValueError(f"{name}: cannot be read as an image: {error}") from error
        return self.transform(picture), target


class ReproducibleTransform:
    """A timm transform whose random choices follow from torch's CPU generator alone."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, picture: Image.Image) -> Tensor:
        with seeded(draw_seed()):
            return self.transform(picture)


def image_transform(
    training: bool, *, size: int = 224, rand_augment: str = "rand-m9-mstd0.5-inc1", erasing: float = 0.25
) -> Callable[[Image.Image], Tensor]:
    """MAE's transform of a picture to a float32 tensor (3, size, size).

    Colours are normalized with ImageNet's mean and deviation, timm's default. In evaluation the shorter side is scaled
    to 8/7 of `size` and the centre cut out.

    Args:
        size: in pixels.
        rand_augment: timm's name of a RandAugment, or "" for none.
        erasing: probability of random erasing.
    """
    check_positive(size=size)
    check_probability(erasing=erasing)
    if not training:
        return timm.data.create_transform(size, interpolation="bicubic", crop_pct=224 / 256)
    return ReproducibleTransform(
        timm.data.create_transform(
            size,
            is_training=True,
            color_jitter=0.0,
            auto_augment=rand_augment or None,
            re_prob=erasing,
            re_mode="pixel",
            interpolation="bicubic",
        )
    )


def folder(root: Path, split: str, training: bool, **settings: Any) -> ImageDataset:
    """`root/split/class/.../image`: one folder for each split, in it one for each class, as ImageNet is unpacked."""
    one_of("split", split, [path.name for path in root.iterdir() if path.is_dir()])
    try:
        files = timm.data.create_dataset("", root=str(root / split), search_split=False)
    except RuntimeError as error:  # timm's for a folder without an image
        raise ValueError(f"{root / split}: {error}") from error
    return ImageDataset(files.reader, image_transform(training, **settings))


def huggingface(root: Path, split: str, training: bool, **settings: Any) -> ImageDataset:
    """A local copy of a Hugging Face dataset, e.g. its parquet files, with the columns `image` and `label`."""
    datasets = require("datasets", "image")
    one_of("split", split, datasets.get_dataset_split_names(str(root)))
    files = timm.data.create_dataset(f"hfds/{root.absolute()}", split=split)
    return ImageDataset(files.reader, image_transform(training, **settings))


def webdataset(
    root: Path,
    split: str,
    training: bool,
    *,
    num_classes: int = 1000,
    batch_size: int = 1,
    seed: int = 42,
    **settings: Any,
) -> Dataset:
    """timm's iterable dataset over tar shards of `jpg` and `cls` files, listed by split in `root/info.json`.

    The shards are shuffled with `seed` and the epoch that `dataset.set_epoch` is told, the samples with the worker's
    seed; timm skips a damaged sample with a warning. `split` may also be timm's pattern
    `name-{0000..0009}.tar|number_of_samples`. `batch_size` makes every worker yield whole batches in training.
    """
    require("webdataset", "image")
    check_positive(num_classes=num_classes)
    try:
        dataset = timm.data.create_dataset(
            "wds/", root=str(root), split=split, is_training=training, batch_size=batch_size, seed=seed
        )
    except RuntimeError as error:  # timm's for an unknown split; it names the splits
        raise ValueError(f"split: {error}") from error
    dataset.transform = image_transform(training, **settings)
    dataset.num_classes, dataset.class_names, dataset.views, dataset.multi_label = num_classes, None, 1, False
    return dataset


LAYOUTS = {
    "folder": (folder, image_transform),
    "huggingface": (huggingface, image_transform),
    "webdataset": (webdataset, image_transform),
}
