"""The data that comes along: what it holds, and every modality trained, connected and merged on it."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tiny_runs import WIDTH, assert_equal, interrupted, no_plots
from torch.nn import functional as F

from m2pt.checkpoints import load_state_dict
from m2pt.cli import main
from m2pt.data import create_dataset
from m2pt.data.embedded import load_utterances
from m2pt.models import create_model
from m2pt.train import load_recipe

pytestmark = pytest.mark.slow

SAMPLES = {
    "image": (1200, 597, (3, 32, 32), 10),
    "audio": (270, 370, (1, 32, 128), 9),
    "point": (1200, 597, (64, 3), 10),
    "video": (600, 300, (3, 8, 32, 32), 5),
}
SMALL = {"point": {"num_groups": 4, "group_size": 4}}
OTHER = {"image": "audio", "audio": "point", "point": "video", "video": "image"}


def embedded(modality, split, **settings):
    return create_dataset(modality, "embedded", None, split, split == "train", **settings)


@pytest.fixture(scope="module")
def splits():
    return {modality: (embedded(modality, "train"), embedded(modality, "test")) for modality in SAMPLES}


@pytest.mark.parametrize("modality", SAMPLES)
def test_samples(modality, splits):
    *counts, shape, classes = SAMPLES[modality]
    for dataset, count in zip(splits[modality], counts, strict=True):
        assert len(dataset) == count and dataset.num_classes == classes and dataset.views == 1
        input, target = dataset[count - 1]
        assert input.shape == shape and input.dtype == torch.float32 and type(target) is int
        assert dataset.inputs.isfinite().all()
        assert set(dataset.labels) == set(range(classes))


@pytest.mark.parametrize("modality", SAMPLES)
def test_samples_are_always_the_same(modality, splits):
    torch.manual_seed(7)
    again = embedded(modality, "test")
    assert torch.equal(again.inputs, splits[modality][1].inputs)
    assert again.labels == splits[modality][1].labels


@pytest.mark.parametrize("modality", SAMPLES)
def test_no_sample_is_in_both_splits(modality, splits):
    train, test = ({input.numpy().tobytes() for input in dataset.inputs} for dataset in splits[modality])
    assert not train & test


def test_digits_in_order(splits):
    digits = load_digits()
    for modality in ("image", "point"):
        train, test = splits[modality]
        assert train.labels + test.labels == digits.target.tolist()
    pictures = torch.cat([dataset.inputs for dataset in splits["image"]])
    small = F.avg_pool2d((pictures[:, 0] + 1) / 2, 4)
    similarity = np.corrcoef(small.flatten(), digits.images.ravel() / 16)[0, 1]
    assert similarity > 0.95 and torch.equal(pictures[:, 0], pictures[:, 2])


def test_clouds_hold_every_pixel_with_ink(splits):
    train, _ = splits["point"]
    for cloud, picture in zip(train.inputs[:50], load_digits().images[:50], strict=True):
        assert len(cloud.unique(dim=0)) == (picture > 0).sum()
        assert cloud.norm(dim=1).max() == pytest.approx(1)
    assert embedded("point", "test", points=20)[0][0].shape == (20, 3)


def test_spectrum_is_the_cosine_series(splits):
    utterances, speakers = load_utterances()
    train, test = splits["audio"]
    assert train.labels + test.labels == speakers.tolist()
    assert [train.labels.count(speaker) for speaker in range(9)] == [30] * 9
    for dataset, index, utterance in ((train, 3, 3), (test, 5, 275)):
        spectrogram, cepstra = dataset[index][0][0].double(), utterances[utterance].double().tolist()
        frequency = math.pi * 40.5 / 128
        expected = 2 * sum(c * math.cos(k * frequency) for k, c in enumerate(cepstra[2], start=1))
        assert spectrogram[2, 40].item() == pytest.approx(expected, rel=1e-5)
        assert spectrogram[: len(cepstra)].any(1).all() and not spectrogram[len(cepstra) :].any()


def test_a_few_utterances_of_each_speaker(splits):
    whole, test = splits["audio"]
    few, again, other = (embedded("audio", "train", shot=4, fold=fold) for fold in (0, 0, 1))
    assert few.labels == [speaker for speaker in range(9) for _ in range(4)]
    assert torch.equal(few.inputs, again.inputs) and not torch.equal(few.inputs, other.inputs)
    of_speakers = [{input.numpy().tobytes() for input in whole.inputs[30 * speaker :][:30]} for speaker in range(9)]
    assert all(
        input.numpy().tobytes() in of_speakers[label] for input, label in zip(few.inputs, few.labels, strict=True)
    )
    assert len(few.inputs.unique(dim=0)) == 36
    assert torch.equal(embedded("audio", "train", shot=30, fold=1).inputs, whole.inputs)
    assert torch.equal(embedded("audio", "test", shot=4, fold=1).inputs, test.inputs)


def test_squares_move_as_their_classes_say(splits):
    """Their shape against black: top, left, height and width in the first and the last frame."""
    for dataset in splits["video"]:
        for clip, label in zip(dataset.inputs, dataset.labels, strict=True):
            (top, left, height, width), (low, right, high, wide) = (square_of(clip[:, frame]) for frame in (0, -1))
            moved = {"left": (0, -8), "right": (0, 8), "up": (-8, 0), "down": (8, 0), "grow": (-4, -4)}
            name = dataset.class_names[label]
            assert (low - top, right - left) == pytest.approx(moved[name], abs=1)
            assert (high / height, wide / width) == pytest.approx((40 / 24,) * 2 if name == "grow" else (1, 1), rel=0.2)


def square_of(picture):
    rows, columns = ((picture > -0.999).any(0).any(axis).nonzero().squeeze(1) for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="root: layout embedded comes with the package"):
        create_dataset("image", "embedded", tmp_path, "train", True)
    for root in (None, ""):
        with pytest.raises(ValueError, match="root: layout folder of modality image needs the folder"):
            create_dataset("image", "folder", root, "train", True)
    for modality in SAMPLES:
        with pytest.raises(ValueError, match="split: expected one of test, train; got 'validation'"):
            embedded(modality, "validation")
    for modality, setting in (("image", "size"), ("point", "points"), ("video", "frames"), ("video", "size")):
        with pytest.raises(ValueError, match=f"{setting}: expected a positive integer, got 0"):
            embedded(modality, "train", **{setting: 0})
    for settings, message in (
        ({"shot": 0}, "shot: expected a positive integer, got 0"),
        ({"shot": 31}, "shot: expected at most 30, got 31"),
        ({"shot": 4, "fold": -1}, "fold: expected 0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            embedded("audio", "train", **settings)


def test_recipes_without_data_say_what_is_missing(tmp_path, capsys):
    assert main(["train", "image_imagenet", "--out", str(tmp_path / "run")]) == 2
    assert "root: layout folder of modality image needs the folder" in capsys.readouterr().err


@pytest.mark.parametrize("modality", SAMPLES)
def test_resumed_pretraining_is_the_same_bit_for_bit(modality, tmp_path, monkeypatch):
    no_plots(monkeypatch)
    batch_size = SAMPLES[modality][0] // 3
    settings = [
        f"data.batch_size={batch_size}",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0",
        "run.checkpoint_steps=1",
    ]
    settings += [f"model.overrides.{name}={value}" for name, value in (WIDTH | SMALL.get(modality, {})).items()]
    command = ["pretrain", f"pretrain_tiny_{modality}", *settings, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    with interrupted(1):
        assert main([*command, str(tmp_path / "parts")]) == 130
    assert main([*command, str(tmp_path / "parts"), "--resume"]) == 0
    assert_equal(*(load_state_dict(tmp_path / name / "pretrained.safetensors") for name in ("whole", "parts")))


@pytest.mark.parametrize("modality", SAMPLES)
def test_tiny_recipes_train_with_a_converted_auxiliary_model(modality, tmp_path, monkeypatch, capsys):
    no_plots(monkeypatch)
    other = load_recipe(f"tiny_{OTHER[modality]}").model
    auxiliary = create_model(other.modality, other.size, num_classes=0, **other.overrides).state_dict()
    torch.save({"model": auxiliary}, tmp_path / "auxiliary.pth")
    assert main(["convert", str(tmp_path / "auxiliary.pth"), str(tmp_path / "auxiliary.safetensors")]) == 0
    out = tmp_path / "run"
    command = ["train", f"tiny_{modality}", "--aux", str(tmp_path / "auxiliary.safetensors"), "--out", str(out)]
    assert main([*command, "data.batch_size=90", "schedule.epochs=1", "schedule.warmup_epochs=0"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["trained"] == result["merged"] and 0 < result["merged"]["top1"] <= 100
    trained = torch.load(out / "last.pth", weights_only=True)["model"]
    scales = [value for name, value in trained.items() if name.endswith("cross_modal_scale")]
    assert len(scales) == 16 and all(scale != 0 for scale in scales)
    name = "blocks.3.mlp.fc1"
    assert torch.equal(trained[f"{name}.aux_weight"], auxiliary[f"{name}.weight"])
    expected = trained[f"{name}.weight"] + trained[f"{name}.cross_modal_scale"] * auxiliary[f"{name}.weight"]
    torch.testing.assert_close(load_state_dict(out / "merged.safetensors")[f"{name}.weight"], expected)
