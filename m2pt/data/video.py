"""Clips of video files, sampled and augmented for VideoMAE's recipe (Tong et al., NeurIPS 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..checks import check_positive, one_of, require
from .common import Samples, draw_seed, seeded
from .image import image_transform

THREADS = 1
"""Of a frame's conversion. FFmpeg keeps more for the next one, which a forked data worker would wait for, for ever."""


def read_frames(path: Path) -> list[Any]:
    """Every frame of the file's first video stream, decoded but not yet converted to RGB.

    Raises:
        ValueError: the file is missing, damaged, or has no frame.
    """
    av = require("av", "video")
    try:
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as video: {error}") from error
    if not frames:
        raise ValueError(f"{path}: has no video frame")
    return frames


class VideoDataset(Samples):
    """Clips (3, frames, size, size) with ImageNet's mean and deviation, and their class index.

    In training a clip begins at random; it is augmented `repeats` times, each time alike in all of its frames. In
    evaluation `clips` clips are spread evenly over the video, its shorter side is scaled to `size`, and `crops` squares
    are cut evenly along the longer one; a sample holds `clips * crops` views. After its end a video stands still: a
    clip that reaches beyond repeats the last frame.

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
        super().__init__(num_classes, None)
        check_positive(frames=frames, stride=stride, repeats=repeats, clips=clips, crops=crops)
        self.files, self.labels, self.training = files, labels, training
        self.size, self.frames, self.stride, self.clips, self.crops = size, frames, stride, clips, crops
        self.transform = image_transform(training, size=size, rand_augment=rand_augment, erasing=erasing)
        self.views = repeats if training else clips * crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
        frames, label = read_frames(self.files[index]), self.labels[index]
        views = self._training_views(frames) if self.training else self._evaluation_views(frames)
        if self.views == 1:
            return views[0], label
        return torch.stack(views), torch.full((self.views,), label) if self.training else label

    def _training_views(self, frames: list[Any]) -> list[Tensor]:
        span = (self.frames - 1) * self.stride + 1
        start = int(torch.randint(max(len(frames) - span, 0) + 1, ()))
        steps = range(start, start + self.frames * self.stride, self.stride)
        pictures = [frames[min(step, len(frames) - 1)].to_image(threads=THREADS) for step in steps]
        views = []
        for _ in range(self.views):
            seed = draw_seed()
            transformed = []
            for picture in pictures:
                with seeded(seed):
                    transformed.append(self.transform(picture))
            views.append(torch.stack(transformed, dim=1))
        return views

    def _evaluation_views(self, frames: list[Any]) -> list[Tensor]:
        sampled = frames[:: self.stride]
        sampled += sampled[-1:] * (self.frames - len(sampled))
        arrays = [frame.to_ndarray(format="rgb24", threads=THREADS) for frame in sampled]
        video = torch.stack(list(map(torch.from_numpy, arrays))).movedim(3, 1)
        video = functional.resize(video, [self.size], antialias=True)
        height, width = video.shape[2:]
        views = []
        for start in _spread(len(video) - self.frames, self.clips):
            clip = functional.to_dtype(video[start : start + self.frames], torch.float32, scale=True)
            clip = functional.normalize(clip, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)).movedim(0, 1)
            for offset in _spread(max(height, width) - self.size, self.crops):
                top, left = (offset, 0) if height > width else (0, offset)
                views.append(clip[:, :, top : top + self.size, left : left + self.size])
        return views


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
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not (name and label.isdecimal() and int(label) < num_classes):
            raise ValueError(f"{path}, line {number}: expected a path and a label below {num_classes}, got {line!r}")
        files.append(root / name.strip())
        labels.append(int(label))
    return VideoDataset(files, labels, num_classes, training, **settings)


LAYOUTS = {"list": (file_list, VideoDataset)}
