"""The two modalities: speech, which is classified, and handwritten digits, whose only use is their transformer.

Both are described in `m2pt.data.embedded`. The task is which of nine speakers spoke.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import require
from ..data.embedded import SPEAKERS, TRAIN_UTTERANCES, load_utterances

datasets = require("sklearn.datasets", "train")
model_selection = require("sklearn.model_selection", "train")

ATTRIBUTION = (
    'Speech data: UCI Machine Learning Repository, "Japanese Vowels", M. Kudo, J. Toyama, M. Shimbo (1999), CC BY 4.0. '
    "Handwritten digits: scikit-learn's `load_digits`."
)
FRAMES = 30


@dataclass(frozen=True)
class Speech:
    """Utterances (N, 1, 12 coefficients, 30 frames), zero where they have ended, and their speakers (N,), 0 to 8."""

    train: Tensor
    train_speakers: Tensor
    test: Tensor
    test_speakers: Tensor


def load_speech() -> Speech:
    """Both published splits, every coefficient normalised by the training split's mean and standard deviation."""
    cepstra, speakers = load_utterances()
    train_frames = torch.cat(cepstra[:TRAIN_UTTERANCES])
    mean, deviation = train_frames.mean(0), train_frames.std(0)
    utterances = torch.zeros(len(cepstra), FRAMES, train_frames.shape[1])
    for utterance, spoken in zip(utterances, cepstra, strict=True):
        utterance[: len(spoken)] = (spoken - mean) / deviation
    train, test = utterances.mT.unsqueeze(1).contiguous().tensor_split([TRAIN_UTTERANCES])
    train_speakers, test_speakers = speakers.tensor_split([TRAIN_UTTERANCES])
    return Speech(train, train_speakers, test, test_speakers)


def load_digit_images() -> Tensor:
    """Images (1797, 1, 8, 8), normalised by the mean and standard deviation of all pixels."""
    images = torch.from_numpy(datasets.load_digits().images).float().unsqueeze(1)
    return (images - images.mean()) / images.std()


def labelled_subset(speakers: Tensor, per_speaker: int, seed: int) -> Tensor:
    """Indices (9 * per_speaker,) of utterances, as many of every speaker, drawn by `seed`."""
    labelled, _ = model_selection.train_test_split(
        torch.arange(len(speakers)), train_size=SPEAKERS * per_speaker, stratify=speakers, random_state=seed
    )
    return labelled
