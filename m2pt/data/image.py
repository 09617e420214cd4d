"""Images from class folders, Hugging Face tables and tar shards, with MAE's augmentation (He et al., CVPR 2022).

Mixup and cutmix mix batches: they belong to the training loop.
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO

import timm.data
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..checks import check_positive, check_probability, one_of, require
from .common import Layouts, Samples, check_label, draw_seed, is_hidden, seeded, some
from .pictures import as_seen

ENDINGS = (*IMG_EXTENSIONS, ".jfif", ".gif", ".jp2", ".avif")
"""File endings of pictures in folders; those in shards have no dot."""


class Files:
    """Pictures that are files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def open(self, index: int) -> BinaryIO:
        return self.paths[index].open("rb")

    def name(self, index: int) -> str:
        return str(self.paths[index])


class Table:
    """Pictures in a column of a Hugging Face dataset, which is not decoded."""

    def __init__(self, rows: Any, column: str, place: str) -> None:
        self.rows, self.column, self.place = rows, column, place

    def open(self, index: int) -> BinaryIO:
        cell = self.rows[index][self.column] or {}
        if cell.get("bytes"):
            return io.BytesIO(cell["bytes"])
        if cell.get("path"):
            return Path(cell["path"]).open("rb")
        raise ValueError(f"column {self.column!r} is empty")

    def name(self, index: int) -> str:
        return f"{self.place}, row {index}"


class ImageDataset(Samples):
    """Pictures, transformed, and their class index."""

    def __init__(
        self,
        pictures: Files | Table,
        labels: Sequence[int],
        class_names: Sequence[str],
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        super().__init__(len(class_names), class_names, labels)
        self.pictures, self.transform = pictures, transform

    def name(self, index: int) -> str:
        return self.pictures.name(index)

    def read(self, index: int) -> tuple[Tensor, int]:
        try:
            with self.pictures.open(index) as file, Image.open(file) as opened:
                picture = as_seen(opened)
        except Exception as error:  # Pillow has no error of its own for damaged files
            raise ValueError(f"{self.name(index)}: cannot be read as an image: {error}") from error
        return self.transform(picture), self.labels[index]


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
    """`root/split/class/.../image`: one folder for each split, in it one for each class, as ImageNet is unpacked.

    A class is a folder directly below the split's, however deep its pictures are; hidden folders and files are skipped.
    """
    one_of("split", split, [path.name for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)])
    place = root / split
    files = sorted(_pictures(place, set(Path(os.path.realpath(place)).parents)), key=lambda file: _natural(str(file)))
    parts = [file.relative_to(place).parts for file in files]
    outside = [own[0] for own in parts if len(own) == 1]
    if outside:
        raise ValueError(f"{place}: expected a folder for every class, got pictures outside of one: {some(outside)}")
    if not files:
        raise ValueError(f"{place}: Found 0 images in it: expected files that end in one of {', '.join(ENDINGS)}")
    names = sorted({own[0] for own in parts}, key=_natural)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers[own[0]] for own in parts]
    return ImageDataset(Files(files), labels, names, image_transform(training, **settings))


def _pictures(folder: Path, around: Set[Path]) -> Iterator[Path]:
    """The pictures in a folder and below; links are followed, except to a folder around it."""
    real = Path(os.path.realpath(folder))
    if real in around:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _pictures(Path(entry.path), around | {real})
            elif entry.name.lower().endswith(ENDINGS):
                yield Path(entry.path)


def _natural(name: str) -> tuple[list[Any], str]:
    """A key that sorts names by the numbers in them, and then without regard to case."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def huggingface(
    root: Path, split: str, training: bool, *, image_column: str = "", label_column: str = "", **settings: Any
) -> ImageDataset:
    """A local copy of a Hugging Face dataset, e.g. its parquet files.

    The classes are those that a column of class labels names; in one of integers, strings or bools, all that occur.

    Args:
        image_column: the column of pictures; by default `image`, or the only one that is declared to hold pictures.
        label_column: the column of classes; by default `label`, or the only one that is declared to hold class labels.
    """
    datasets = require("datasets", "image")
    try:
        splits = datasets.get_dataset_split_names(str(root.absolute()))
        found = {name: datasets.load_dataset(str(root.absolute()), split=name) for name in splits if name == split}
    except Exception as error:  # of whichever reader the files need
        raise ValueError(f"{root}: cannot be read as a table: {error.__cause__ or error}") from error
    rows = found[one_of("split", split, splits)]
    place = f"{root}, split {split!r}"
    image_column = _column("image_column", image_column, "image", rows.features, datasets.Image)
    label_column = _column("label_column", label_column, "label", rows.features, datasets.ClassLabel)
    try:
        pictures = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (NotImplementedError, TypeError, ValueError):  # Arrow's
        kind = rows.features[image_column]
        raise ValueError(f"image_column: expected pictures in {image_column!r} of {place}, got {kind}") from None
    labels, names = _classes(rows.select_columns([label_column]), label_column, place)
    table = Table(pictures, image_column, place)
    return ImageDataset(table, labels, names, image_transform(training, **settings))


def _column(setting: str, given: str, usual: str, columns: Mapping[str, Any], kind: type) -> str:
    """The column that is given, or the usual one, or the only one of a kind."""
    if given:
        return one_of(setting, given, columns)
    fitting = [usual] if usual in columns else [name for name, found in columns.items() if isinstance(found, kind)]
    if len(fitting) != 1:
        raise ValueError(f"{setting}: expected one of {', '.join(sorted(columns))}, as there is no column {usual!r}")
    return fitting[0]


def _classes(rows: Any, column: str, place: str) -> tuple[list[int], list[str]]:
    """The class indices of a table, and the names of the classes."""
    kind, values = rows.features[column], rows.to_dict()[column]
    if None in values:
        raise ValueError(f"{place}, row {values.index(None)}: expected a label in column {column!r}, got none")
    if hasattr(kind, "names"):
        return values, kind.names
    is_value = isinstance(kind, require("datasets", "image").Value)
    if not is_value or not kind.dtype.startswith(("int", "uint", "bool", "string", "large_string")):
        raise ValueError(
            f"label_column: expected class labels, integers, strings or bools in {column!r} of {place}, got {kind}"
        )
    classes = sorted(set(values))
    if classes and not isinstance(classes[0], str) and classes[0] < 0:
        row = values.index(classes[0])
        raise ValueError(f"{place}, row {row}: expected a label of 0 or more in column {column!r}, got {classes[0]}")
    numbers = {value: number for number, value in enumerate(classes)}
    return [numbers[value] for value in values], list(map(str, classes))


class ShardDataset(timm.data.IterableImageDataset):
    """timm's stream of tar shards, whose labels are checked; its attributes are those of `Samples`."""

    class_names, views, multi_label = None, 1, False

    def __init__(self, num_classes: int, transform: Callable[[Image.Image], Tensor], **arguments: Any) -> None:
        endings = ";".join(ending.removeprefix(".") for ending in ENDINGS)
        super().__init__(reader="wds/", input_img_mode="", input_key=endings, transform=transform, **arguments)
        self.num_classes = num_classes

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        reader, webdataset = self.reader, require("webdataset", "image")
        is_first = reader.ds is None
        if is_first:
            reader._lazy_init()
            if not reader.split_info.alt_label:  # the name of the label in a json file beside
                decode = len(reader.ds.pipeline) - 2  # it leaves out a sample whose label is not a number
                reader.ds.pipeline.insert(decode, webdataset.map(self._labelled))
            reader.ds.append(webdataset.map(self._checked))
            reader.ds.append(webdataset.map(_seen, handler=webdataset.warn_and_continue))
        return super().__iter__()

    def _labelled(self, sample: dict[str, Any]) -> dict[str, Any]:
        label = sample.get("cls", b"").decode(errors="replace")
        if not re.fullmatch(r"\s*-?\d{1,18}\s*", label):
            name = f"{sample['__url__']}, sample {sample['__key__']}"
            raise ValueError(f"{name}: expected a label from 0 to {self.num_classes - 1} as cls, got {label!r}")
        return sample

    def _checked(self, sample: dict[str, Any]) -> dict[str, Any]:
        check_label(f"{self.reader.root}, sample {sample['__key__']}", sample["target"], self.num_classes)
        return sample


def _seen(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"image": as_seen(sample["image"])}


def webdataset(
    root: Path,
    split: str,
    training: bool,
    *,
    num_classes: int = 1000,
    batch_size: int = 1,
    seed: int = 42,
    **settings: Any,
) -> ShardDataset:
    """timm's iterable dataset over tar shards of `jpg` and `cls` files, listed by split in `root/info.json`.

    The shards are shuffled with `seed` and the epoch given to `dataset.set_epoch`, the samples with the worker's
    seed; timm skips a damaged sample with a warning. `split` may also be timm's pattern
    `name-{0000..0009}.tar|number_of_samples`. `batch_size` makes every worker yield whole batches in training.
    """
    require("webdataset", "image")
    check_positive(num_classes=num_classes)
    try:
        return ShardDataset(
            num_classes,
            image_transform(training, **settings),
            root=str(root),
            split=split,
            is_training=training,
            batch_size=batch_size,
            seed=seed,
        )
    except KeyError as error:
        raise ValueError(f"{root}: split {split!r} has no {error} in info.json") from None
    except RuntimeError as error:  # timm's for an unknown split; it names the splits
        raise ValueError(f"split: {error}") from error


LAYOUTS: Layouts = {
    "folder": (folder, image_transform),
    "huggingface": (huggingface, image_transform),
    "webdataset": (webdataset, image_transform),
}
