"""Small real data sets that come with the package, to try every modality. Nothing is augmented.

Images and points: the 1797 handwritten digits of scikit-learn's `load_digits`; the first 1200 are for training.
Audio: UCI Machine Learning Repository, "Japanese Vowels", M. Kudo, J. Toyama, M. Shimbo (1999), licence CC BY 4.0:
640 utterances of the vowels /ae/ by nine male speakers, 12 LPC cepstrum coefficients a frame, 7 to 29 frames; the first
270 are the published training split.
Video: the two photographs of scikit-learn's `load_sample_images`, by danielbuechele and vultilion (Flickr),
licence CC BY 2.0.
"""

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_positive, check_sizes, one_of, require
from .common import Samples
from .point import unit_sphere

TRAIN_DIGITS = 1200
SPEAKERS, UTTERANCES = 9, 30
FRAMES, BINS = 32, 128
CLIPS = {"train": 600, "test": 300}
SCREEN, SQUARE, TRAVEL = 64, 24, 16
MOTIONS = {"left": (0, -1, 0), "right": (0, 1, 0), "up": (-1, 0, 0), "down": (1, 0, 0), "grow": (-0.5, -0.5, 1)}
"""What a pixel of travel adds to the top, the left and the side of a square."""


class TensorSamples(Samples):
    """Rows of a tensor and their classes."""

    def __init__(self, inputs: Tensor, labels: Tensor, num_classes: int, class_names: Sequence[str] | None) -> None:
        super().__init__(num_classes, class_names, labels.tolist())
        self.inputs = inputs

    def name(self, index: int) -> str:
        return f"embedded data, sample {index}"

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], self.labels[index]


def digit_images(root: Path | None, split: str, training: bool, *, size: int = 32) -> TensorSamples:
    """Digits of 8x8 pixels, scaled up to (3, size, size), in [-1, 1]."""
    check_positive(size=size)
    pixels, digits = _digits(split)
    images = _scaled(pixels.unsqueeze(1), size) * 2 - 1
    return TensorSamples(images.expand(-1, 3, -1, -1), digits, 10, list(map(str, range(10))))


def digit_clouds(root: Path | None, split: str, training: bool, *, points: int = 64) -> TensorSamples:
    """Digits as clouds (points, 3): column, row and intensity of the pixels with ink, in the unit sphere.

    They are flat and coarse, but real. `points` are spread over the pixels in reading order: with 64 no pixel is left
    out, and some are there twice or more.
    """
    check_positive(points=points)
    pixels, digits = _digits(split)
    clouds = []
    for picture in pixels:
        rows, columns = picture.nonzero(as_tuple=True)
        cloud = torch.stack([columns / 8, rows / 8, picture[rows, columns]], dim=1)
        clouds.append(unit_sphere(cloud[torch.arange(points) * len(cloud) // points]))
    return TensorSamples(torch.stack(clouds), digits, 10, list(map(str, range(10))))


def spoken_vowels(
    root: Path | None, split: str, training: bool, *, shot: int = UTTERANCES, fold: int = 0
) -> TensorSamples:
    """Utterances as spectrograms (1, 32 frames, 128 bins), zero after their end; the class is the speaker.

    The training split has `shot` of the 30 utterances of each speaker, drawn from seed `fold`; the test split has all.
    """
    check_positive(shot=shot)
    check_sizes(fold=fold)
    if shot > UTTERANCES:
        raise ValueError(f"shot: expected at most {UTTERANCES}, got {shot}")
    utterances, speakers = load_utterances()
    spectrograms = torch.zeros(len(utterances), 1, FRAMES, BINS)
    for spectrogram, cepstra in zip(spectrograms, utterances, strict=True):
        spectrogram[0, : len(cepstra)] = log_spectrum(cepstra)
    part = torch.arange(len(utterances))[_part(split, SPEAKERS * UTTERANCES)]
    if split == "train" and shot < UTTERANCES:
        generator = torch.Generator().manual_seed(fold)
        part = torch.cat([own[torch.randperm(UTTERANCES, generator=generator)[:shot]] for own in part.chunk(SPEAKERS)])
    return TensorSamples(spectrograms[part], speakers[part], SPEAKERS, None)


def moving_squares(root: Path | None, split: str, training: bool, *, frames: int = 8, size: int = 32) -> TensorSamples:
    """Clips (3, frames, size, size) in [-1, 1] of a square, cut out of a photograph, on black; the class is its motion.

    The pixels are real, the motions are made. The left two thirds of both photographs are for training, the right third
    for the test.
    """
    check_positive(frames=frames, size=size)
    count = CLIPS[one_of("split", split, CLIPS)]
    generator = torch.Generator().manual_seed(0)

    def draw(start: int, stop: int) -> int:
        return int(torch.randint(start, stop, (), generator=generator))

    pictures = require("sklearn.datasets", "train").load_sample_images().images
    photographs = [_share(torch.tensor(picture), split) for picture in pictures]
    labels = torch.arange(count) % len(MOTIONS)
    clips = torch.empty(count, 3, frames, size, size)
    for number, (clip, label) in enumerate(zip(clips, labels.tolist(), strict=True)):
        photograph = photographs[number // len(MOTIONS) % len(photographs)]
        top, left = (draw(0, room - SQUARE) for room in photograph.shape[1:])
        square = photograph[:, top : top + SQUARE, left : left + SQUARE]
        start = [draw(TRAVEL, SCREEN - SQUARE - TRAVEL + 1) for _ in range(2)]
        for frame, travelled in enumerate(np.linspace(0, TRAVEL, frames)):
            change = list(MOTIONS.values())[label]
            top, left, side = (round(at + travelled * by) for at, by in zip([*start, SQUARE], change, strict=True))
            screen = torch.full((1, 3, SCREEN, SCREEN), -1.0)
            screen[0, :, top : top + side, left : left + side] = _scaled(square[None], side)[0]
            clip[:, frame] = _scaled(screen, size)[0]
    return TensorSamples(clips, labels, len(MOTIONS), list(MOTIONS))


def load_utterances() -> tuple[list[Tensor], Tensor]:
    """Every utterance's cepstrum coefficients (frames, 12), and the speakers (640,), 0 to 8."""
    with (files(__package__) / "japanese_vowels.npz").open("rb") as file, np.load(file) as content:
        frames, lengths, speakers = (torch.from_numpy(content[name]) for name in ("frames", "lens", "y"))
    return list(frames.float().split(lengths.tolist())), speakers.long()


def log_spectrum(cepstra: Tensor) -> Tensor:
    """Cepstra (frames, K), c_1 to c_K, to log-magnitudes (frames, 128) at the centers of as many bands up to half the
    sampling rate: log |H(w)| = 2 sum_k c_k cos(k w), without c_0, the gain."""
    order = torch.arange(1, cepstra.shape[1] + 1)
    frequency = math.pi * (torch.arange(BINS) + 0.5) / BINS
    return 2 * cepstra @ torch.cos(order[:, None] * frequency)


def _digits(split: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 8, 8) in [0, 1], and which digits they show."""
    digits = require("sklearn.datasets", "train").load_digits()
    part = _part(split, TRAIN_DIGITS)
    return torch.from_numpy(digits.images[part]).float() / 16, torch.from_numpy(digits.target[part])


def _part(split: str, train: int) -> slice:
    """The first `train` samples, or the others."""
    return {"train": slice(train), "test": slice(train, None)}[one_of("split", split, ("train", "test"))]


def _scaled(pictures: Tensor, size: int) -> Tensor:
    """Pictures (N, C, height, width) as (N, C, size, size)."""
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)


def _share(photograph: Tensor, split: str) -> Tensor:
    """A split's share of a picture (height, width, 3), as (3, height, its width) in [-1, 1]."""
    edge = 2 * photograph.shape[1] // 3
    share = photograph[:, :edge] if split == "train" else photograph[:, edge:]
    return share.permute(2, 0, 1).float() / 127.5 - 1
