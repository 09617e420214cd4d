"""Point clouds for Point-MAE's recipes (Pang et al., ECCV 2022): classification, few-shot and part segmentation."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_positive, one_of, require
from ..models.grouping import farthest_point_sampling
from .common import Layouts, Samples, listed, read_json, read_lines

SCANOBJECTNN_CLASSES = (
    *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door"),
    *("shelf", "table", "bed", "pillow", "sink", "sofa", "toilet"),
)
SCANOBJECTNN_VARIANTS = {
    "objectbg": ("main_split", "objectdataset.h5"),
    "objectonly": ("main_split_nobg", "objectdataset.h5"),
    "hardest": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}
SHAPENET_PART_COUNTS = {
    **{"Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2},
    **{"Lamp": 4, "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3},
}
SHAPENET_PARTS = {
    name: range(end - SHAPENET_PART_COUNTS[name], end)
    for name, end in zip(SHAPENET_PART_COUNTS, itertools.accumulate(SHAPENET_PART_COUNTS.values()), strict=True)
}


def unit_sphere(points: Tensor) -> Tensor:
    """Points (N, 3) moved to the mean 0 and scaled to the largest norm 1.

    Raises:
        ValueError: all points are the same, or some are not finite or too far away for float32.
    """
    centred = points - points.mean(dim=0)
    radius = centred.norm(dim=1).max()
    if (points == points[0]).all() or not radius.isfinite():
        raise ValueError("expected points that differ, are finite, and have squares that float32 can hold")
    return centred / radius


def scale_and_shift(points: Tensor) -> Tensor:
    """Points (N, 3) stretched along each axis by a random factor in [2/3, 3/2], then moved by one in [-0.2, 0.2]."""
    scale = torch.empty(3).uniform_(2 / 3, 3 / 2)
    return points * scale + torch.empty(3).uniform_(-0.2, 0.2)


class TextClouds(Dataset):
    """Text files with one point per line, read on request: index to a float32 tensor (N, columns)."""

    def __init__(self, files: Sequence[Path], columns: int, delimiter: str | None) -> None:
        self.files, self.columns, self.delimiter = files, columns, delimiter

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        try:
            values = torch.from_numpy(np.loadtxt(path, dtype=np.float32, delimiter=self.delimiter, ndmin=2))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as points: {error}") from error
        if values.shape[1] != self.columns or not values.isfinite().all():
            raise ValueError(f"{path}: expected {self.columns} finite columns, got {tuple(values.shape)} values")
        return values

    def name(self, index: int) -> str:
        return str(self.files[index])


class ArrayClouds(Dataset):
    """The clouds of HDF5 files with the arrays `data` (clouds, N, 3) and `label`, in memory.

    Raises:
        ValueError: a file is damaged, lacks an array, or has another shape.
    """

    files = ()

    def __init__(self, files: Sequence[Path]) -> None:
        h5py = require("h5py", "point")
        clouds: list[np.ndarray] = []
        self.labels: list[int] = []
        self.names: list[str] = []
        for path in files:
            try:
                with h5py.File(path) as file:
                    data, label = np.asarray(file["data"], np.float32), np.asarray(file["label"]).reshape(-1)
            except (KeyError, OSError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: cannot be read as point clouds: {error}") from error
            if data.ndim != 3 or data.shape[2] != 3 or len(data) != len(label):
                raise ValueError(
                    f"{path}: expected data (clouds, N, 3) and as many labels, got {data.shape}, {label.shape}"
                )
            if label.dtype.kind not in "bui" and not (label.dtype.kind == "f" and np.all(label % 1 == 0)):
                raise ValueError(f"{path}: expected integers as labels, got {label.dtype}: {label[:5]}")
            clouds.append(data)
            self.labels.extend(map(int, label))
            self.names += [f"{path}, cloud {index}" for index in range(len(data))]
        self.clouds = torch.from_numpy(np.concatenate(clouds))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.clouds[index]

    def name(self, index: int) -> str:
        return self.names[index]


class PointDataset(Samples):
    """Clouds in the unit sphere, thinned by farthest-point sampling, (points, 3), and their class index.

    In training `points` of the 75/64 times as many farthest points are drawn, scaled and shifted, as published (1024 of
    1200). In evaluation the first `points` of the farthest are taken as they are; with `votes` above 1 the sample holds
    that many random draws instead. The thinned clouds stay in memory; each worker of a DataLoader keeps those that it
    read (142 MB for all of ModelNet40's training split): keep the workers from epoch to epoch.

    Args:
        clouds: index to a tensor (N, 3 or more).
        labels: their class indices.
        points: points of an input.
        votes: inputs of a sample in evaluation.
    """

    def __init__(
        self,
        clouds: TextClouds | ArrayClouds,
        labels: Sequence[int],
        class_names: Sequence[str],
        training: bool,
        *,
        points: int = 1024,
        votes: int = 1,
    ) -> None:
        super().__init__(len(class_names), class_names, labels)
        check_positive(points=points, votes=votes)
        self.clouds, self.training, self.points = clouds, training, points
        self.views = 1 if training else votes
        self.files = clouds.files
        self._thinned: dict[int, Tensor] = {}

    def name(self, index: int) -> str:
        return self.clouds.name(index)

    def read(self, index: int) -> tuple[Tensor, int]:
        if index not in self._thinned:
            self._thinned[index] = self._thin(index)
        cloud, label = self._thinned[index], self.labels[index]
        if self.training:
            return self._draw(cloud), label
        if self.views == 1:
            return cloud[: self.points].clone(), label
        return torch.stack([self._draw(cloud) for _ in range(self.views)]), label

    def _thin(self, index: int) -> Tensor:
        cloud = self.clouds[index][:, :3]
        if len(cloud) < self.points:
            raise ValueError(f"{self.name(index)}: expected at least {self.points} points, got {len(cloud)}")
        cloud = _normalized(cloud, self.name(index))
        count = min(len(cloud), self.points * 75 // 64)
        return cloud[farthest_point_sampling(cloud[None], count)[0]]

    def _draw(self, cloud: Tensor) -> Tensor:
        return scale_and_shift(cloud[torch.randperm(len(cloud))[: self.points]])


def _normalized(points: Tensor, name: str) -> Tensor:
    try:
        return unit_sphere(points)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class PartDataset(Samples):
    """ShapeNetPart: `((points (points, 3), category), part labels (points,))`, in the unit sphere.

    In training the points are drawn with repetition, scaled and shifted; in evaluation they are taken at equal steps
    along the file, so that a result is reproducible.

    Attributes:
        category_names: of the category indices.
        parts: the part labels of each category, by name.
    """

    category_names = tuple(SHAPENET_PARTS)
    parts: Mapping[str, range] = SHAPENET_PARTS

    def __init__(self, clouds: TextClouds, categories: Sequence[str], training: bool, *, points: int = 2048) -> None:
        names = [f"{category} {part}" for category, parts in self.parts.items() for part in range(len(parts))]
        super().__init__(len(names), names, [self.category_names.index(category) for category in categories])
        check_positive(points=points)
        self.clouds, self.training, self.points = clouds, training, points
        self.files, self.label_names = clouds.files, self.category_names

    def name(self, index: int) -> str:
        return self.clouds.name(index)

    def number_as(self, class_names: Sequence[str] | None) -> None:
        """Parts and categories have the numbers that ShapeNetPart gives them."""

    def read(self, index: int) -> tuple[tuple[Tensor, int], Tensor]:
        values, category = self.clouds[index], self.labels[index]
        cloud, labels = _normalized(values[:, :3], self.name(index)), values[:, -1].long()
        expected = self.parts[self.category_names[category]]
        if not (labels == values[:, -1]).all() or labels.min() < expected.start or labels.max() >= expected.stop:
            raise ValueError(
                f"{self.name(index)}: expected part labels {expected.start} to {expected.stop - 1} of a"
                f" {self.category_names[category]}, got {values[:, -1].min():g} to {values[:, -1].max():g}"
            )
        if self.training:
            chosen = torch.randint(len(cloud), (self.points,))
            cloud = scale_and_shift(cloud[chosen])
        else:
            chosen = torch.arange(self.points) * len(cloud) // self.points
            cloud = cloud[chosen]
        return (cloud, category), labels[chosen]


def modelnet40(root: Path, split: str, training: bool, **settings: Any) -> PointDataset:
    """`modelnet40_normal_resampled`: `modelnet40_shape_names.txt`, `modelnet40_train.txt` and `modelnet40_test.txt`
    list classes and shapes; `class/class_0001.txt` has lines `x,y,z,nx,ny,nz`, of which the normals are not used."""
    one_of("split", split, ("train", "test"))
    classes, files, labels = _modelnet40(root, split)
    return PointDataset(TextClouds(files, 6, ","), labels, classes, training, **settings)


def modelnet40_h5(root: Path, split: str, training: bool, **settings: Any) -> PointDataset:
    """`modelnet40_ply_hdf5_2048`: `shape_names.txt` and `ply_data_train*.h5`, `ply_data_test*.h5` of 2048 points."""
    one_of("split", split, ("train", "test"))
    files = sorted(root.glob(f"ply_data_{split}*.h5"))
    if not files:
        raise FileNotFoundError(f"{root}: no file ply_data_{split}*.h5")
    clouds = ArrayClouds(files)
    return PointDataset(clouds, clouds.labels, read_lines(root / "shape_names.txt"), training, **settings)


def modelnet40_few_shot(
    root: Path, split: str, training: bool, *, way: int = 5, shot: int = 10, fold: int = 0, **settings: Any
) -> PointDataset:
    """`way` classes of `modelnet40`'s files, with `shot` training and 20 test shapes of each, drawn from seed `fold`.

    The published folds are pickles, which execute code when they are read. These folds are drawn by the same rule, but
    are not the same: compare results on them only with each other.

    Args:
        way: how many classes, published 5 and 10.
        shot: training shapes of a class, published 10 and 20.
        fold: 0 to 9.
    """
    one_of("split", split, ("train", "test"))
    check_positive(way=way, shot=shot)
    if fold not in range(10):
        raise ValueError(f"fold: expected an integer from 0 to 9, got {fold!r}")
    classes, files, labels = _modelnet40(root, split)
    if way > len(classes):
        raise ValueError(f"way: expected at most {len(classes)} classes, got {way}")
    generator = torch.Generator().manual_seed(fold)
    chosen = torch.randperm(len(classes), generator=generator)[:way].tolist()
    count = shot if split == "train" else 20
    indices, targets = [], []
    for target, label in enumerate(chosen):
        members = [index for index, of in enumerate(labels) if of == label]
        if len(members) < count:
            raise ValueError(f"{split}: expected at least {count} shapes of {classes[label]}, got {len(members)}")
        indices += [members[place] for place in torch.randperm(len(members), generator=generator)[:count]]
        targets += [target] * count
    clouds = TextClouds([files[index] for index in indices], 6, ",")
    return PointDataset(clouds, targets, [classes[label] for label in chosen], training, **settings)


def scanobjectnn(root: Path, split: str, training: bool, *, variant: str = "hardest", **settings: Any) -> PointDataset:
    """ScanObjectNN's `main_split` and `main_split_nobg`, with `training_*.h5` and `test_*.h5` of 2048 points.

    Args:
        variant: `objectbg` (with background), `objectonly` (without), or `hardest` (PB_T50_RS, with background).
    """
    one_of("split", split, ("train", "test"))
    folder, file = SCANOBJECTNN_VARIANTS[one_of("variant", variant, SCANOBJECTNN_VARIANTS)]
    prefix = "training" if split == "train" else "test"
    clouds = ArrayClouds([listed(root / folder / f"{prefix}_{file}")])
    return PointDataset(clouds, clouds.labels, SCANOBJECTNN_CLASSES, training, **({"points": 2048} | settings))


def shapenetpart(root: Path, split: str, training: bool, **settings: Any) -> PartDataset:
    """`shapenetcore_partanno_segmentation_benchmark_v0_normal`: `synsetoffset2category.txt`, the lists
    `train_test_split/shuffled_*_file_list.json`, and `synset/shape.txt` with lines `x y z nx ny nz part`.

    Args:
        split: `train`, `val`, `test`, or `trainval`, on which the published model is trained.
    """
    one_of("split", split, ("train", "val", "trainval", "test"))
    path = root / "synsetoffset2category.txt"
    lines = [line.split() for line in read_lines(path)]
    if not all(len(line) == 2 for line in lines):
        raise ValueError(f"{path}: expected lines of a category and its synset")
    category_of = {synset: one_of(f"{path}: category", name, SHAPENET_PARTS) for name, synset in lines}
    shapes: list[list[str]] = []
    for part in ("train", "val") if split == "trainval" else (split,):
        path = root / "train_test_split" / f"shuffled_{part}_file_list.json"
        entries = read_json(path)
        for entry in entries if isinstance(entries, list) else [entries]:
            _, *shape = str(entry).split("/")
            if len(shape) != 2 or shape[0] not in category_of:
                raise ValueError(f"{path}: expected shape_data/synset/shape of a known synset, got {entry!r}")
            shapes.append(shape)
    shapes.sort()
    clouds = TextClouds([root / synset / f"{shape}.txt" for synset, shape in shapes], 7, None)
    return PartDataset(clouds, [category_of[synset] for synset, _ in shapes], training, **settings)


def _modelnet40(root: Path, split: str) -> tuple[list[str], list[Path], list[int]]:
    """The class names, and the files of a split with their class indices."""
    classes = read_lines(root / "modelnet40_shape_names.txt")
    shapes = read_lines(root / f"modelnet40_{split}.txt")
    names = [one_of("class", shape.rpartition("_")[0], classes) for shape in shapes]
    files = [root / name / f"{shape}.txt" for name, shape in zip(names, shapes, strict=True)]
    return classes, files, [classes.index(name) for name in names]


LAYOUTS: Layouts = {
    "modelnet40": (modelnet40, PointDataset),
    "modelnet40_h5": (modelnet40_h5, PointDataset),
    "modelnet40_few_shot": (modelnet40_few_shot, PointDataset),
    "scanobjectnn": (scanobjectnn, PointDataset),
    "shapenetpart": (shapenetpart, PartDataset),
}
