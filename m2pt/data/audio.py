"""Log-mel filterbanks of sound files, prepared and augmented as AudioMAE does (Huang et al., NeurIPS 2022)."""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_positive, check_probability, one_of, require
from .common import Layouts, Samples, is_hidden, read_json, read_lines, read_text, some

SAMPLE_RATE = 16_000
WINDOW, HOP, FFT = SAMPLE_RATE * 25 // 1000, SAMPLE_RATE * 10 // 1000, 512
MEL_BINS, LOWEST_HERTZ = 128, 20


def read_wave(path: Path) -> Tensor:
    """The sound file's mean over channels at 16 kHz, with its own mean removed: (samples,), float32, full scale 1.

    Raises:
        ValueError: the file is missing, damaged, shorter than a window of 25 ms, or holds values that are not finite.
    """
    soundfile, signal = require("soundfile", "audio"), require("scipy.signal", "audio")
    try:
        with soundfile.SoundFile(path) as file:
            values, rate = np.concatenate(list(_blocks(file))), file.samplerate
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as sound: {error}") from error
    if not 1000 <= rate <= 1_000_000:
        raise ValueError(f"{path}: expected a sampling rate of 1 to 1000 kHz, got {rate} Hz")
    if len(values) * SAMPLE_RATE < WINDOW * rate:
        raise ValueError(f"{path}: expected at least 25 ms of sound, got {1000 * len(values) / rate:.1f} ms")
    wave = torch.from_numpy(signal.resample_poly(values.mean(axis=1), SAMPLE_RATE, rate))
    if not wave.isfinite().all():
        raise ValueError(f"{path}: holds values that are not finite")
    return wave - wave.mean()


def _blocks(file: Any) -> Iterator[np.ndarray]:
    """The values (samples, channels) to the end, which may not be where the file says."""
    while len(block := file.read(2**16, dtype="float32", always_2d=True)):
        yield block
    yield block


def log_mel(wave: Tensor, frames: int) -> Tensor:
    """Kaldi's log-mel filterbank of `wave` (samples,) at 16 kHz: (frames, 128), cut, or padded with zeros, at the end.

    Hanning windows of 25 ms every 10 ms, each without its mean and with pre-emphasis of 0.97, without dither; the power
    spectrum of 512 points, in triangles that overlap by half from 20 Hz to 8 kHz.
    """
    windows = wave.unfold(0, WINDOW, HOP)
    windows = windows - windows.mean(dim=1, keepdim=True)
    windows = windows - 0.97 * torch.cat([windows[:, :1], windows[:, :-1]], dim=1)
    power = torch.fft.rfft(windows * torch.hann_window(WINDOW, periodic=False), FFT).abs().square()
    features = (power[:, : FFT // 2] @ mel_weights()).clamp_min(torch.finfo(torch.float32).eps).log()
    return functional.pad(features, (0, 0, 0, frames - len(features)))


@cache
def mel_weights() -> Tensor:
    """What each bin of the spectrum below half the sampling rate adds to each mel bin: (256, 128)."""
    lowest, highest = (1127 * math.log1p(hertz / 700) for hertz in (LOWEST_HERTZ, SAMPLE_RATE / 2))
    edges = torch.linspace(lowest, highest, MEL_BINS + 2, dtype=torch.float64)
    hertz = torch.arange(FFT // 2, dtype=torch.float64) * SAMPLE_RATE / FFT
    position = 1127 * torch.log1p(hertz / 700).unsqueeze(1)
    rising = (position - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - position) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


class AudioDataset(Samples):
    """Filterbanks `(x - mean) / (2 std)` of shape (1, frames, 128) and their targets.

    The target is a class index if a file has one class and no two files are mixed. Otherwise (with several classes, and
    in training with `mixup` above 0) it is a float32 vector (classes,), as a batch needs one form.

    In training, a wave is rolled by a random shift and amplified by 1/2 + Beta(10, 10); two waves are mixed with a
    share of Beta(10, 10), the second cut or padded to the first; and a band of mel bins and one of frames are zeroed
    before normalization (SpecAugment, Park et al., Interspeech 2019). AudioMAE's own shift is always 0: it measures the
    axis of channels.

    Args:
        files: the sound files.
        labels: the class indices of each.
        frames: length of the input, 10 ms each.
        mean, std: of the data set's filterbanks.
        time_mask, frequency_mask: the largest widths of the zeroed bands; by default 3/16 of the frames, AudioMAE's 192
            of 1024, and 48 mel bins.
        mixup: probability of mixing a sample with another.
        roll: whether to shift and amplify.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[Sequence[int]],
        class_names: Sequence[str],
        multi_label: bool,
        training: bool,
        *,
        frames: int,
        mean: float,
        std: float,
        time_mask: int | None = None,
        frequency_mask: int = 48,
        mixup: float = 0.0,
        roll: bool = True,
    ) -> None:
        super().__init__(len(class_names), class_names, labels)
        check_positive(frames=frames)
        check_probability(mixup=mixup)
        if not std > 0:
            raise ValueError(f"std: expected a positive number, got {std!r}")
        if time_mask is None:
            time_mask = frames * 3 // 16
        for name, width, largest in ("time_mask", time_mask, frames), ("frequency_mask", frequency_mask, MEL_BINS):
            if not 0 <= width <= largest:
                raise ValueError(f"{name}: expected an integer from 0 to {largest}, got {width!r}")
        self.files, self.multi_label, self.training = files, multi_label, training
        self.frames, self.mean, self.std = frames, mean, std
        self.time_mask, self.frequency_mask, self.mixup, self.roll = time_mask, frequency_mask, mixup, roll

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> tuple[Tensor, Tensor | int]:
        wave, target = self._wave(index), self._multi_hot(index)
        if self.training and torch.rand(()) < self.mixup:
            wave, target = self._mix(wave, target, int(torch.randint(len(self), ())))
        features = log_mel(wave, self.frames)
        if self.training:
            features = self._mask(features)
        features = (features - self.mean) / (2 * self.std)
        is_vector = self.multi_label or (self.training and self.mixup > 0)
        return features[None], target if is_vector else self.labels[index][0]

    def _wave(self, index: int) -> Tensor:
        wave = read_wave(self.files[index])
        if self.training and self.roll:
            wave = wave.roll(int(torch.randint(len(wave), ()))) * (0.5 + _beta())
        return wave

    def _multi_hot(self, index: int) -> Tensor:
        target = torch.zeros(self.num_classes)
        target[self.labels[index]] = 1
        return target

    def _mix(self, wave: Tensor, target: Tensor, partner: int) -> tuple[Tensor, Tensor]:
        share = _beta()
        other = self._wave(partner)
        other = functional.pad(other, (0, len(wave) - len(other)))
        mixed = share * wave + (1 - share) * other
        return mixed - mixed.mean(), share * target + (1 - share) * self._multi_hot(partner)

    def _mask(self, features: Tensor) -> Tensor:
        masked = features.clone()
        for axis, widest in enumerate((self.time_mask, self.frequency_mask)):
            width = float(torch.rand(())) * widest
            start = float(torch.rand(())) * (features.shape[axis] - width)
            masked.narrow(axis, int(start), int(width)).zero_()
        return masked


def _beta() -> Tensor:
    return torch.distributions.Beta(10.0, 10.0).sample()


def file_list(root: Path, split: str, training: bool, **settings: Any) -> AudioDataset:
    """Lists of files with several classes each, in the form that AudioMAE and AST read for AudioSet.

    `root/class_labels_indices.csv` has the columns `index`, `mid` and `display_name`. `root/split.json` is
    `{"data": [{"wav": path, "labels": "mid,mid"}, ...]}`; `root/split.csv` has the columns `wav` and `labels`. Paths
    are relative to `root`. The settings are AudioSet's, with `mixup` 0.5.
    """
    classes_csv = root / "class_labels_indices.csv"
    lists = {path.stem: path for path in sorted(root.glob("*.csv")) if path != classes_csv}
    lists |= {path.stem: path for path in sorted(root.glob("*.json"))}
    path = lists[one_of("split", split, lists)]
    classes = _rows(classes_csv, "index", "mid", "display_name", integers=["index"])
    classes.sort(key=lambda row: row["index"])
    if [row["index"] for row in classes] != list(range(len(classes))):
        raise ValueError(f"{classes_csv}: expected the column index to count from 0 to {len(classes) - 1}")
    index_of = {row["mid"]: row["index"] for row in classes}
    if len(index_of) != len(classes):
        raise ValueError(f"{classes_csv}: expected every class once in the column mid")
    rows = _rows(path, "wav", "labels") if path.suffix == ".csv" else _json_rows(path)
    for row in rows:
        for label in row["labels"].split(","):
            if label not in index_of:
                raise ValueError(f"{path}: {row['wav']}: the label {label!r} is not in {classes_csv}")
    return AudioDataset(
        [root / row["wav"] for row in rows],
        [[index_of[label] for label in row["labels"].split(",")] for row in rows],
        [row["display_name"] for row in classes],
        True,
        training,
        **({"frames": 1024, "mean": -4.2677393, "std": 4.5689974, "mixup": 0.5} | settings),
    )


def esc50(root: Path, split: str, training: bool, *, fold: int = 1, **settings: Any) -> AudioDataset:
    """ESC-50 as distributed: `root/meta/esc50.csv` (its columns `filename`, `fold`, `target`, `category`) and
    `root/audio`.

    Args:
        split: `test` is the fold `fold`, `train` the other four.
        fold: 1 to 5.
    """
    one_of("split", split, ("train", "test"))
    if fold not in range(1, 6):
        raise ValueError(f"fold: expected an integer from 1 to 5, got {fold!r}")
    table = root / "meta" / "esc50.csv"
    rows = _rows(table, "filename", "fold", "target", "category", integers=["fold", "target"])
    names = {row["target"]: row["category"] for row in rows}
    if len({*names.values()}) != len(names) or any(names[row["target"]] != row["category"] for row in rows):
        raise ValueError(f"{table}: expected one category for each target")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{table}: expected the column target to count from 0, got {sorted(names)}")
    rows = [row for row in rows if (row["fold"] == fold) == (split == "test")]
    return AudioDataset(
        [root / "audio" / row["filename"] for row in rows],
        [[row["target"]] for row in rows],
        [names[index] for index in range(len(names))],
        False,
        training,
        **({"frames": 512, "mean": -6.6268077, "std": 5.358466} | settings),
    )


def speech_commands(root: Path, split: str, training: bool, **settings: Any) -> AudioDataset:
    """Speech Commands as distributed: `root/word/*.wav`, `root/validation_list.txt` and `root/testing_list.txt`.

    Args:
        split: `validation` and `test` are the files in those lists, `train` the others.
    """
    one_of("split", split, ("train", "validation", "test"))
    lists = {"validation": "validation_list.txt", "test": "testing_list.txt"}
    members = {name: set(map(_as_listed, read_lines(root / file))) for name, file in lists.items()}
    folders = sorted(
        path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name) and path.name[0] != "_"
    )
    words = [path.name for path in folders]
    every = {
        f"{folder.name}/{file.name}": index
        for index, folder in enumerate(folders)
        for file in folder.iterdir()
        if file.suffix.lower() == ".wav" and not is_hidden(file.name)
    }
    chosen = members.get(split, every.keys() - members["validation"] - members["test"])
    files = sorted(chosen)
    if lacking := [file for file in files if file not in every]:
        path = root / lists[split]
        raise FileNotFoundError(f"{path}: {len(lacking)} of its {len(files)} files are missing: {some(lacking)}")
    return AudioDataset(
        [root / file for file in files],
        [[every[file]] for file in files],
        words,
        False,
        training,
        **({"frames": 128, "mean": -6.845978, "std": 5.5654526} | settings),
    )


def _as_listed(line: str) -> str:
    """A path in a list, in the same form however it is written."""
    return str(PurePosixPath(line.replace("\\", "/")))


def _rows(path: Path, *columns: str, integers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a csv file, by column; the columns `integers` are converted."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows: list[dict[str, Any]] = []
    try:
        header = reader.fieldnames or ()
        if lacking := set(columns) - set(header):
            raise ValueError(
                f"{path}: expected the columns {', '.join(columns)}; missing: {', '.join(sorted(lacking))}"
            )
        if len(set(header)) != len(header):
            raise ValueError(f"{path}: expected different columns, got {', '.join(header)}")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or not all(row[column] for column in columns):
                raise ValueError(f"{place}: expected a cell for each of {', '.join(header)}")
            for column in integers:
                if not re.fullmatch(r"\s*\d{1,18}\s*", row[column]):
                    raise ValueError(f"{place}: expected an integer from 0 on as {column}, got {row[column]!r}")
            rows.append({column: row[column] for column in columns} | {column: int(row[column]) for column in integers})
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _json_rows(path: Path) -> list[dict[str, str]]:
    content = read_json(path)
    rows = content.get("data") if isinstance(content, dict) else None
    keys = ("wav", "labels")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path}: expected {{"data": [{{"wav": "...", "labels": "..."}}, ...]}}')
    for number, row in enumerate(rows):
        if not all(isinstance(row.get(key), str) for key in keys):
            raise ValueError(f"{path}, entry {number}: expected text as wav and labels, got {row}")
    return [{key: row[key] for key in keys} for row in rows]


LAYOUTS: Layouts = {
    "list": (file_list, AudioDataset),
    "esc50": (esc50, AudioDataset),
    "speech_commands": (speech_commands, AudioDataset),
}
