"""Clips of video files, sampled and augmented for VideoMAE's recipe (Tong et al., NeurIPS 2022)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..checks import check_positive, one_of
from .common import Layouts, Samples, draw_seed, read_text, seeded
from .frames import read_frames
from .image import image_transform


class VideoDataset(Samples):
    """Clips (3, frames, size, size) with ImageNet's mean and deviation, and their class index.

    In training a clip begins at random; it is augmented `repeats` times, each time alike in all of its frames. In
    evaluation `clips` clips are spread evenly over the video, its shorter side is scaled to `size`, and `crops` squares
    are cut evenly along the longer one; a sample holds `clips * crops` views. A clip that reaches beyond the end of its
    video repeats the last frame.

    Args:
        files: the video files.
        labels: their class indices.
        num_classes: of the data set.
        size: side of the input, in pixels.
        frames: frames of a clip.
        stride: from one frame of a clip to the next, in frames of the video.
        rand_augment: timm's name of a RandAugment, or "" for none.
        erasing: probability of random erasing.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        num_classes: int,
        training: bool,
        *,
        size: int = 224,
        frames: int = 16,
        stride: int = 4,
        repeats: int = 2,
        clips: int = 5,
        crops: int = 3,
        rand_augment: str = "rand-m7-n4-mstd0.5-inc1",
        erasing: float = 0.25,
    ) -> None:
        super().__init__(num_classes, None, labels)
        check_positive(frames=frames, stride=stride, repeats=repeats, clips=clips, crops=crops)
        self.files, self.training = files, training
        self.size, self.frames, self.stride, self.clips, self.crops = size, frames, stride, clips, crops
        self.transform = image_transform(training, size=size, rand_augment=rand_augment, erasing=erasing)
        self.views = repeats if training else clips * crops

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> tuple[Tensor, Tensor | int]:
        file, label = self.files[index], self.labels[index]
        views = self._training_views(file) if self.training else self._evaluation_views(file)
        if self.views == 1:
            return views[0], label
        return torch.stack(views), torch.full((self.views,), label) if self.training else label

    def _training_views(self, file: Path) -> list[Tensor]:
        pictures = list(map(functional.to_pil_image, read_frames(file, self._training_frames)))
        views = []
        for _ in range(self.views):
            seed = draw_seed()
            transformed = []
            for picture in pictures:
                with seeded(seed):
                    transformed.append(self.transform(picture))
            views.append(torch.stack(transformed, dim=1))
        return views

    def _training_frames(self, count: int) -> list[int]:
        span = (self.frames - 1) * self.stride + 1
        start = int(torch.randint(max(count - span, 0) + 1, ()))
        return [min(start + frame * self.stride, count - 1) for frame in range(self.frames)]

    def _evaluation_views(self, file: Path) -> list[Tensor]:
        video = torch.stack(read_frames(file, self._evaluation_frames, self.size))
        height, width = video.shape[2:]
        views = []
        for clip in video.split(self.frames):
            clip = functional.to_dtype(clip, torch.float32, scale=True)
            clip = functional.normalize(clip, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)).movedim(0, 1)
            for offset in _spread(max(height, width) - self.size, self.crops):
                top, left = (offset, 0) if height > width else (0, offset)
                views.append(clip[:, :, top : top + self.size, left : left + self.size])
        return views

    def _evaluation_frames(self, count: int) -> list[int]:
        last = (count - 1) // self.stride
        starts = _spread(max(last + 1 - self.frames, 0), self.clips)
        return [min(start + frame, last) * self.stride for start in starts for frame in range(self.frames)]


def _spread(room: int, count: int) -> list[int]:
    """`count` offsets from 0 to `room` at equal distances; a single one is in the middle."""
    return [room // 2] if count == 1 else [place * room // (count - 1) for place in range(count)]


def file_list(root: Path, split: str, training: bool, *, num_classes: int = 400, **settings: Any) -> VideoDataset:
    """`root/split.csv` or `root/split.txt` with lines `path label`, as VideoMAE reads Kinetics-400. Paths are relative
    to `root` and may hold spaces.

    Args:
        num_classes: labels are 0 to `num_classes` - 1.
    """
    check_positive(num_classes=num_classes)
    lists = {path.stem: path for path in sorted(root.glob("*.txt")) + sorted(root.glob("*.csv"))}
    path = lists[one_of("split", split, lists)]
    files, labels = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not (name and re.fullmatch(r"\d{1,18}", label) and int(label) < num_classes):
            raise ValueError(f"{path}, line {number}: expected a path and a label below {num_classes}, got {line!r}")
        files.append(root / name.strip())
        labels.append(int(label))
    return VideoDataset(files, labels, num_classes, training, **settings)


LAYOUTS: Layouts = {"list": (file_list, VideoDataset)}
