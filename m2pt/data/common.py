"""What the modalities share: attributes of a dataset and random numbers."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class Samples(Dataset):
    """A map-style dataset that says what its targets mean.

    Attributes:
        num_classes: length of the logits; of the parts in segmentation.
        class_names: their names in the order of the logits, or None where the files do not say.
        views: how many inputs a sample holds, see `m2pt.data.create_dataset`.
        multi_label: whether a sample may have several classes.
    """

    views = 1
    multi_label = False

    def __init__(self, num_classes: int, class_names: Sequence[str] | None) -> None:
        self.num_classes = num_classes
        self.class_names = None if class_names is None else tuple(class_names)

    def __len__(self) -> int:
        raise NotImplementedError


def listed(path: Path) -> Path:
    """`path`, if it is a file; otherwise a FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def draw_seed() -> int:
    """A seed from torch's CPU generator."""
    return int(torch.randint(2**31, ()))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start torch's CPU generator, `random` and numpy's from `seed`; afterwards all three are as they were.

    timm's transforms draw from all three. Within this, one number decides what they do.
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
