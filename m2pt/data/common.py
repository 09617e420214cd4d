"""Shared by all modalities: samples and their labels, the text files that list them, and random numbers."""

import codecs
import json
import os
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

HIDDEN = ("__MACOSX", "@eaDir")
"""Folders that systems put beside the user's, with copies of pictures. Names that begin with a dot are hidden too."""


Layouts = Mapping[str, tuple[Callable[..., Dataset], Callable]]
"""By the names of the layouts: what reads one, and what else takes its settings."""


class Samples(Dataset):
    """A map-style dataset that says what its targets mean. Every input that it yields is finite.

    Attributes:
        num_classes: length of the logits; in segmentation the number of parts.
        class_names: their names in the order of the logits, or None if the files do not say.
        labels: each sample's class, or a sequence of its classes; in segmentation its category.
        label_names: the names of what is in `labels`: `class_names`, except in segmentation.
        files: those that lists name, which may be missing.
        views: how many inputs a sample holds, see `m2pt.data.create_dataset`.
        multi_label: whether a sample may have several classes.
    """

    files: Sequence[Path] = ()
    views = 1
    multi_label = False

    def __init__(self, num_classes: int, class_names: Sequence[str] | None, labels: Sequence[Any]) -> None:
        self.num_classes, self.labels = num_classes, labels
        self.class_names = self.label_names = None if class_names is None else tuple(class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        for label in _each(self.labels[index]):
            check_label(self.name(index), label, self._label_count())
        sample = self.read(index)
        if not all(leaf.isfinite().all() for leaf in tree_leaves(sample) if isinstance(leaf, Tensor)):
            raise ValueError(f"{self.name(index)}: holds values that are not finite, or too large to compute with")
        return sample

    def read(self, index: int) -> tuple[Any, Any]:
        """The input and the target of a sample.

        Raises:
            ValueError: it is damaged; the message names it.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What errors call a sample: its file, or its place in one."""
        raise NotImplementedError

    def check_labels(self) -> None:
        """Raise a ValueError that names the first sample with a label out of range."""
        for label, index in self._first_samples().items():
            check_label(self.name(index), label, self._label_count())

    def number_as(self, class_names: Sequence[str] | None) -> None:
        """Number the classes as another split does, by their names; nothing changes if either has no names.

        Raises:
            ValueError: the class of a sample is not among them; the message names both, and nothing has changed.
        """
        if self.class_names is None or class_names is None or self.class_names == tuple(class_names):
            return
        numbers = {name: number for number, name in enumerate(class_names)}
        self._require(numbers)
        changed = [numbers.get(name) for name in self.class_names]
        self.labels = [changed[each] if isinstance(each, int) else [changed[e] for e in each] for each in self.labels]
        self.num_classes = len(class_names)
        self.class_names = self.label_names = tuple(class_names)

    def require_classes_of(self, training: "Samples") -> None:
        """Check that the training split has a sample of every class that has one here.

        Raises:
            ValueError: it has none; the message names the class, and a sample of it.
        """
        self._require([training._label_name(label) for label in training._first_samples()])

    def _require(self, known: Collection[str]) -> None:
        present = {self._label_name(label): index for label, index in self._first_samples().items()}
        lacking = [name for name in present if name not in known]
        if lacking:
            raise ValueError(
                f"{self.name(present[lacking[0]])}: its class is not in the training split, which lacks"
                f" {some(list(map(repr, lacking)))}"
            )

    def _first_samples(self) -> dict[int, int]:
        """Every label that occurs, and the first sample that has it."""
        first: dict[int, int] = {}
        for index, labels in enumerate(self.labels):
            for label in _each(labels):
                first.setdefault(label, index)
        return first

    def _label_count(self) -> int:
        return self.num_classes if self.label_names is None else len(self.label_names)

    def _label_name(self, label: int) -> str:
        return str(label) if self.label_names is None else self.label_names[label]


def _each(labels: int | Sequence[int]) -> Sequence[int]:
    return (labels,) if isinstance(labels, int) else labels


def check_label(name: str, label: int, num_classes: int) -> None:
    """Raise a ValueError if the label of the sample `name` is not one of `num_classes`, counted from 0."""
    if not 0 <= label < num_classes:
        raise ValueError(f"{name}: expected a label from 0 to {num_classes - 1}, got {label}")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's own, such as `.ipynb_checkpoints` and `._1.jpg`."""
    return name.startswith(".") or name in HIDDEN


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def missing(files: Sequence[Path]) -> list[str]:
    """Which of the files are missing. Every folder is listed once, which is quicker than looking for every file."""
    there: dict[Path, set[str]] = {}
    for folder in {file.parent for file in files}:
        there[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    return [str(file) for file in files if file.name not in there[file.parent] and not file.exists()]


def listed(path: Path) -> Path:
    """`path`, if it is a file; otherwise a FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark. The mark is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another encoding; the message names the line.
    """
    content = listed(path).read_bytes()
    has_two_bytes = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if has_two_bytes else "utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{path}, line {1 + error.object[: error.start].count(10)}"
        byte = error.object[error.start]
        raise ValueError(f"{place}: expected UTF-8, got the byte {byte:#x}: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path}: expected UTF-8, got zeros between the letters: save the file as UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of such a text file, without white space around them; empty ones are left out."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another encoding, or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None


def draw_seed() -> int:
    """A seed from torch's CPU generator."""
    return int(torch.randint(2**31, ()))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, `random`'s and numpy's with `seed`; afterwards all three are as they were.

    timm's transforms draw from all three. Inside the block, one number decides what they do.
    """
    states: tuple[Any, ...] = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
