"""Datasets of the four modalities, read from the file layouts of public code and augmented as the recipes ask."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from ..checks import check_kind, checked_path, one_of
from . import audio, embedded, image, point, video
from .common import Layouts, Samples

LAYOUTS: Mapping[str, Layouts] = {
    "image": {**image.LAYOUTS, "embedded": (embedded.digit_images, embedded.digit_images)},
    "audio": {**audio.LAYOUTS, "embedded": (embedded.spoken_vowels, embedded.spoken_vowels)},
    "point": {**point.LAYOUTS, "embedded": (embedded.digit_clouds, embedded.digit_clouds)},
    "video": {**video.LAYOUTS, "embedded": (embedded.moving_squares, embedded.moving_squares)},
}


def create_dataset(
    modality: str,
    layout: str,
    root: str | os.PathLike | None,
    split: str,
    training: bool,
    class_names: Sequence[str] | None = None,
    **settings: Any,
) -> Dataset:
    """The samples of one split as pairs `(input, target)`. Nothing is downloaded.

    | modality | layouts | input, float32 | target |
    |---|---|---|---|
    | image | folder, webdataset, huggingface | (3, 224, 224) | class index |
    | audio | list, esc50, speech_commands | (1, frames, 128 mel bins) | class index, or a float32 vector (classes,) |
    | point | modelnet40, modelnet40_h5, modelnet40_few_shot, scanobjectnn | (points, 3) | class index |
    | point | shapenetpart | (points, 3) and the category's index | part labels (points,), int64 |
    | video | list | (3, 16 frames, 224, 224) | class index |
    | all | embedded | small, see `m2pt.data.embedded` | class index |

    A class index is an int, hence int64 in a collated batch. The attributes `num_classes` and `class_names` (None if
    the files do not name them) describe the targets. If the attribute `views` is V > 1, a sample holds V inputs of the
    same thing on a new first axis. In training each of them is a sample of its own, and the target has that axis as
    well; in evaluation their logits are to be averaged.

    Every random choice follows from torch's CPU generator, which a DataLoader seeds in each worker.

    Args:
        layout: how files are arranged under `root`; the function of that name in the modality's module says what is
            read. The layout "embedded" comes with the package, and its root is None or "".
        split: the part of the data, by its name in the layout.
        training: augment at random; otherwise prepare for evaluation.
        class_names: those of the training split, in order, so that another split numbers its classes alike. Without
            them folders and tables number the classes that they have. Layouts without names ignore them.
        settings: the keyword arguments of the layout's function, and of the dataset's class or, for images, of
            `m2pt.data.image.image_transform`.

    Raises:
        ValueError: an unknown modality, layout, split or setting, no root, a file with invalid content, a label out of
            range, or a class that is not in `class_names`. A sample is read when it is requested, and the error for a
            damaged one names its file.
        TypeError: `root` is not a path, or `class_names` is not a sequence of names.
        FileNotFoundError: `root`, or a file that lists the samples, does not exist.
        ImportError: the layout needs an optional dependency; the message says how to install it.
    """
    if class_names is not None:
        check_kind((list, tuple), "a list or tuple of names", class_names=class_names)
        check_kind(str, "names", **{f"class_names[{index}]": name for index, name in enumerate(class_names)})
        if len(set(class_names)) != len(class_names):
            raise ValueError(f"class_names: expected different names, got {class_names!r}")
    layouts = LAYOUTS[one_of("modality", modality, LAYOUTS)]
    build, configured = layouts[one_of(f"layout of modality {modality}", layout, layouts)]
    allowed = _keyword_arguments(build) | _keyword_arguments(configured)
    for name in settings:
        one_of(f"setting of layout {layout}", name, allowed)
    folder = None
    if layout == "embedded":
        if root:
            raise ValueError(f"root: layout embedded comes with the package and reads no folder, got {root}")
    elif not root:
        raise ValueError(f"root: layout {layout} of modality {modality} needs the folder of the data set, got none")
    elif not (folder := checked_path("root", root)).is_dir():
        raise FileNotFoundError(f"root: {folder}: no such folder")
    dataset = build(folder, split, training, **settings)
    if isinstance(dataset, Samples):
        dataset.check_labels()
        dataset.number_as(class_names)
    return dataset


def _keyword_arguments(function: Callable) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
