"""`create_dataset`: what it refuses, images, and random numbers that follow from torch's generator."""

import json
import random
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.utils.data import DataLoader

from m2pt.data import LAYOUTS, create_dataset
from m2pt.data.audio import read_wave
from m2pt.data.frames import read_frames
from m2pt.data.point import ArrayClouds
from m2pt.train.workers import received

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """`train` and `validation`, each with a folder of scikit-learn's photographs and two of its digits."""
    root = tmp_path_factory.mktemp("pictures")
    photographs, digits = load_sample_images().images, load_digits()
    for split, offset in (("train", 0), ("validation", 20)):
        for name in ("photograph", "one", "seven"):
            (root / split / name).mkdir(parents=True)
        Image.fromarray(photographs[offset // 20]).save(root / split / "photograph" / "0.jpg")
        for name, digit in (("one", 1), ("seven", 7)):
            for number, index in enumerate(np.flatnonzero(digits.target == digit)[offset : offset + 2]):
                image = Image.fromarray((digits.images[index] * 15).astype(np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


def test_folder_labels_are_the_sorted_class_folders(pictures):
    dataset = create_dataset("image", "folder", pictures, "train", False, size=32)
    assert (dataset.num_classes, dataset.class_names) == (3, ("one", "photograph", "seven"))
    assert [dataset[index][1] for index in range(len(dataset))] == [0, 0, 1, 2, 2]
    assert (dataset.views, dataset.multi_label) == (1, False)


def test_evaluation_crops_the_centre_and_normalizes(pictures):
    dataset = create_dataset("image", "folder", pictures, "validation", False)
    (index,) = (index for index in range(len(dataset)) if dataset[index][1] == 1)
    with Image.open(pictures / "validation" / "photograph" / "0.jpg") as photograph:
        width, height = photograph.size
        resized = photograph.resize((int(width * 256 / height), 256), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    expected = torch.from_numpy(np.array(resized.crop((left, 16, left + 224, 240)))) / 255
    torch.testing.assert_close(dataset[index][0], ((expected - MEAN) / STD).permute(2, 0, 1))


def test_training_augments_and_evaluation_does_not(pictures):
    training = create_dataset("image", "folder", pictures, "train", True, size=64)
    evaluation = create_dataset("image", "folder", pictures, "train", False, size=64)
    assert training[2][0].shape == evaluation[2][0].shape == (3, 64, 64)
    assert not torch.equal(training[2][0], training[2][0])
    assert torch.equal(evaluation[2][0], evaluation[2][0])


def test_training_transform_is_maes(pictures):
    steps = create_dataset("image", "folder", pictures, "train", True).transform.transform.transforms
    by_name = {type(step).__name__: step for step in steps}
    crop, augment, erasing = (
        by_name[name] for name in ("RandomResizedCropAndInterpolation", "RandAugment", "RandomErasing")
    )
    assert (crop.scale, crop.interpolation.value) == ((0.08, 1.0), "bicubic")
    assert {(op.magnitude, op.magnitude_std) for op in augment.ops} == {(9, 0.5)} and augment.num_layers == 2
    assert (erasing.probability, erasing.per_pixel, erasing.max_count) == (0.25, True, 1)
    assert torch.equal(by_name["Normalize"].mean, MEAN) and torch.equal(by_name["Normalize"].std, STD)


def test_augmentation_can_be_turned_off(pictures):
    dataset = create_dataset("image", "folder", pictures, "train", True, rand_augment="", erasing=0.0)
    names = {type(step).__name__ for step in dataset.transform.transform.transforms}
    assert not names & {"RandAugment", "RandomErasing"}


@pytest.mark.parametrize("workers", [0, 2])
def test_random_choices_follow_from_the_generator(pictures, workers):
    dataset = create_dataset("image", "folder", pictures, "train", True, size=32)

    def epoch():
        torch.manual_seed(5)
        return torch.cat([inputs for inputs, _ in DataLoader(dataset, batch_size=2, num_workers=workers)])

    random.seed(1), np.random.seed(1)
    first = epoch()
    random.seed(2), np.random.seed(2)
    assert torch.equal(epoch(), first)


def test_other_generators_are_left_as_they_are(pictures):
    dataset = create_dataset("image", "folder", pictures, "train", True, size=32)
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1), np.random.seed(1)
    dataset[0]
    assert (random.random(), np.random.random()) == expected


def test_batches_have_the_documented_dtypes(pictures):
    inputs, targets = next(
        iter(DataLoader(create_dataset("image", "folder", pictures, "train", False, size=32), batch_size=5))
    )
    assert (inputs.dtype, targets.dtype, inputs.shape) == (torch.float32, torch.int64, (5, 3, 32, 32))


def test_damaged_image_is_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    dataset = create_dataset("image", "folder", tmp_path, "train", False)
    with pytest.raises(ValueError, match=r"train/a/broken\.png: cannot be read as an image"):
        dataset[0]


def test_image_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    dataset = create_dataset("image", "folder", tmp_path, "train", False)
    with pytest.raises(ValueError, match=r"train/a/gone\.png: cannot be read as an image: .*No such file"):
        dataset[0]


def test_image_that_claims_terabytes_is_named(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0")):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "train" / "a" / "huge.png").write_bytes(content)
    dataset = create_dataset("image", "folder", tmp_path, "train", False)
    with pytest.raises(ValueError, match=r"train/a/huge\.png: cannot be read as an image"):
        dataset[0]


def test_folder_without_an_image_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="Found 0 images"):
        create_dataset("image", "folder", tmp_path, "train", False)


def test_huggingface_reads_a_local_copy(pictures, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = create_dataset("image", "folder", pictures, "train", False, size=32)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(folder.class_names)))
    names = [folder.name(index) for index in range(len(folder))]
    columns = {"image": names, "label": [folder[index][1] for index in range(len(folder))]}
    copy = datasets.Dataset.from_dict(columns, features).cast_column("image", datasets.Image(decode=False))
    copy = copy.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
    (tmp_path / "copy").mkdir()
    copy.cast_column("image", datasets.Image()).to_parquet(tmp_path / "copy" / "train-00000-of-00001.parquet")
    dataset = create_dataset("image", "huggingface", tmp_path / "copy", "train", False, size=32)
    assert (len(dataset), dataset.class_names) == (5, folder.class_names)
    for index in range(5):
        assert torch.equal(dataset[index][0], folder[index][0]) and dataset[index][1] == folder[index][1]
    with pytest.raises(ValueError, match="split: expected one of train; got 'test'"):
        create_dataset("image", "huggingface", tmp_path / "copy", "test", False)


def test_webdataset_reads_shards(pictures, tmp_path):
    pytest.importorskip("webdataset")
    folder = create_dataset("image", "folder", pictures, "train", False, size=32)
    with tarfile.open(tmp_path / "train-0000.tar", "w") as shard:
        for index in range(len(folder)):
            label = tmp_path / "label"
            label.write_text(str(folder[index][1]))
            image = folder.name(index)
            shard.add(image, f"{index}{image[-4:]}")
            shard.add(label, f"{index}.cls")
    split = {"name": "train", "num_samples": 5, "filenames": ["train-0000.tar"], "shard_lengths": [5]}
    (tmp_path / "info.json").write_text(json.dumps({"splits": {"train": split}}))
    dataset = create_dataset("image", "webdataset", tmp_path, "train", False, size=32, num_classes=3)
    assert (len(dataset), dataset.num_classes) == (5, 3)
    for (image, label), index in zip(dataset, range(5), strict=True):
        assert torch.equal(image, folder[index][0]) and label == folder[index][1]
    training = create_dataset("image", "webdataset", tmp_path, "train", True, size=32, num_classes=3)
    assert sorted(label for _, label in training) == [0, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="split test not found"):
        create_dataset("image", "webdataset", tmp_path, "test", False)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_in_a_shard_is_refused_by_the_name_of_its_sample(tmp_path, label, training, workers):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-0000.tar")) as tar:
        for index in range(4):
            tar.write({"__key__": f"sample{index}", "png": Image.new("RGB", (8, 8)), "cls": label if index == 2 else 0})
    split = {"name": "train", "num_samples": 4, "filenames": ["train-0000.tar"], "shard_lengths": [4]}
    (tmp_path / "info.json").write_text(json.dumps({"splits": {"train": split}}))
    dataset = create_dataset("image", "webdataset", tmp_path, "train", training, size=32, num_classes=3)
    error = f"sample sample2: expected a label from 0 to 2, got {label}"
    with pytest.raises(ValueError, match=error), received(DataLoader(dataset, num_workers=workers)) as batches:
        list(batches)


@pytest.mark.parametrize("label", ["dog", "1.0", "", None, "9" * 5000])
def test_a_shard_s_label_that_is_no_integer_is_refused_by_the_name_of_its_sample(tmp_path, label):
    """timm would leave the sample out."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "val-0000.tar")) as tar:
        for index in range(4):
            content = {"__key__": f"sample{index}", "jpeg": Image.new("RGB", (8, 8)), "cls": "1"}
            content |= {} if index < 2 else {"cls": label}
            tar.write({name: value for name, value in content.items() if value is not None})
    split = {"name": "val", "num_samples": 4, "filenames": ["val-0000.tar"], "shard_lengths": [4]}
    (tmp_path / "info.json").write_text(json.dumps({"splits": {"val": split}}))
    dataset = create_dataset("image", "webdataset", tmp_path, "val", False, size=32, num_classes=3)
    samples = iter(dataset)
    assert [next(samples)[1] for _ in range(2)] == [1, 1]
    with pytest.raises(ValueError, match=r"val-0000\.tar, sample sample2: expected a label from 0 to 2 as cls, got "):
        next(samples)


@pytest.mark.parametrize("labels", [[0, 2, 1], [0, 3, 1]])
def test_labels_of_shards_may_lie_in_json_files(tmp_path, labels):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "val-0000.tar")) as tar:
        for index, label in enumerate(labels):
            tar.write({"__key__": f"sample{index}", "png": Image.new("RGB", (8, 8)), "json": {"species": label}})
    split = {
        "name": "val",
        "num_samples": 3,
        "filenames": ["val-0000.tar"],
        "shard_lengths": [3],
        "alt_label": "species",
    }
    (tmp_path / "info.json").write_text(json.dumps({"splits": {"val": split}}))
    dataset = create_dataset("image", "webdataset", tmp_path, "val", False, size=32, num_classes=3)
    if 3 not in labels:
        assert [label for _, label in dataset] == labels
    else:
        with pytest.raises(ValueError, match="sample sample1: expected a label from 0 to 2, got 3"):
            list(dataset)


def test_a_label_that_is_changed_later_is_checked_when_its_sample_is_read():
    dataset = create_dataset("image", "embedded", None, "train", True)
    dataset.labels[3] = 10
    dataset[2], dataset[4]
    with pytest.raises(ValueError, match="embedded data, sample 3: expected a label from 0 to 9, got 10"):
        dataset[3]


def test_pictures_in_shards_are_read_as_those_in_folders(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "train" / "scan").mkdir(parents=True)
    file = tmp_path / "train" / "scan" / "0.png"
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(file)
    with webdataset.TarWriter(str(tmp_path / "train-0000.tar")) as tar:
        tar.write({"__key__": "0", "png": file.read_bytes(), "cls": 0})
    split = {"name": "train", "num_samples": 1, "filenames": ["train-0000.tar"], "shard_lengths": [1]}
    (tmp_path / "info.json").write_text(json.dumps({"splits": {"train": split}}))
    ((shard, _),) = create_dataset("image", "webdataset", tmp_path, "train", False, size=32, num_classes=1)
    assert torch.equal(shard, create_dataset("image", "folder", tmp_path, "train", False, size=32)[0][0])
    assert len(shard.unique()) > 100


def test_a_sample_that_is_not_finite_is_a_damaged_sample():
    dataset = create_dataset("image", "embedded", None, "train", True)
    dataset.inputs = dataset.inputs.clone()
    dataset.inputs[3, 0, 1, 1] = float("nan")
    dataset[2], dataset[4]
    with pytest.raises(ValueError, match="embedded data, sample 3: holds values that are not finite"):
        dataset[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smell", "folder", "train"), "modality: expected one of audio, image, point, video; got 'smell'"),
        (("image", "esc50", "train"), "layout of modality image: expected one of embedded, folder, huggingface, web"),
        (("image", "folder", "test"), "split: expected one of train, validation; got 'test'"),
    ],
)
def test_unknown_names_are_refused(pictures, arguments, message):
    modality, layout, split = arguments
    with pytest.raises(ValueError, match=message):
        create_dataset(modality, layout, pictures, split, False)


def test_unknown_setting_is_refused_in_every_layout(tmp_path):
    for modality, layouts in LAYOUTS.items():
        for layout in layouts:
            with pytest.raises(ValueError, match=f"setting of layout {layout}: expected one of .*; got 'colour'"):
                create_dataset(modality, layout, tmp_path, "train", False, colour="red")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size: expected a positive integer, got 0"),
        ({"erasing": 1.5}, r"erasing: expected a probability in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_settings_are_refused(pictures, settings, message):
    with pytest.raises(ValueError, match=message):
        create_dataset("image", "folder", pictures, "train", True, **settings)


def test_missing_root_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        create_dataset("image", "folder", tmp_path / "nowhere", "train", False)


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("soundfile", "audio", lambda root: read_wave(root / "a.wav")),
        ("av", "video", lambda root: read_frames(root / "a.mp4", range)),
        ("h5py", "point", lambda root: ArrayClouds([root / "a.h5"])),
        ("datasets", "image", lambda root: create_dataset("image", "huggingface", root, "train", False)),
        ("webdataset", "image", lambda root: create_dataset("image", "webdataset", root, "train", False)),
    ],
)
def test_missing_extra_says_how_to_install_it(tmp_path, monkeypatch, module, extra, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} .*pip install 'm2pt-triton\[{extra}\]'"):
        use(tmp_path)
