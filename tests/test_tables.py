"""Hugging Face tables: every name of a column, every type of label, is understood or refused by name."""

import io

import numpy as np
import pytest
from PIL import Image
from tiny_runs import no_plots

from m2pt.cli import main
from m2pt.data import create_dataset

datasets = pytest.importorskip("datasets")
Value, ClassLabel = datasets.Value, datasets.ClassLabel

_no_plots = pytest.fixture(autouse=True)(no_plots)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(root, split="train", image="image", **columns):
    """A parquet file of pictures and of columns, each a pair of values and their type."""
    count = len(next(iter(columns.values()))[0])
    pictures = [Image.fromarray(np.full((40, 40, 3), 20 * index, np.uint8)) for index in range(count)]
    content = {image: pictures} | {name: values for name, (values, _) in columns.items()}
    features = datasets.Features({image: datasets.Image()} | {name: kind for name, (_, kind) in columns.items()})
    root.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(content, features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def read(root, split="train", **settings):
    return create_dataset("image", "huggingface", root, split, False, size=32, **settings)


@pytest.mark.parametrize(
    ("values", "kind", "names", "labels"),
    [
        ([0, 2, 1, 0], ClassLabel(names=["cat", "dog", "emu"]), ("cat", "dog", "emu"), [0, 2, 1, 0]),
        ([0, 2, 1, 0], Value("int64"), ("0", "1", "2"), [0, 2, 1, 0]),
        ([1, 3, 2, 1], Value("int32"), ("1", "2", "3"), [0, 2, 1, 0]),
        ([9, 10, 200, 9], Value("uint8"), ("9", "10", "200"), [0, 1, 2, 0]),
        (["dog", "cat", "dog", ""], Value("string"), ("", "cat", "dog"), [2, 1, 2, 0]),
        (["dog", "cat", "dog", "cat"], Value("large_string"), ("cat", "dog"), [1, 0, 1, 0]),
        ([True, False, True, True], Value("bool"), ("False", "True"), [1, 0, 1, 1]),
    ],
)
def test_labels_of_these_types_are_understood(tmp_path, values, kind, names, labels):
    dataset = read(table(tmp_path / "data", label=(values, kind)))
    assert (dataset.class_names, dataset.num_classes) == (names, len(names))
    assert [dataset[index][1] for index in range(4)] == labels
    assert all(type(dataset[index][1]) is int for index in range(4))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([0, 1, -1], ClassLabel(names=["cat", "dog"]), "split 'train', row 2: expected a label from 0 to 1, got -1"),
        ([0, 1, -1], Value("int64"), "split 'train', row 2: expected a label of 0 or more in column 'label', got -1"),
        ([0, None, 1], Value("int64"), "split 'train', row 1: expected a label in column 'label', got none"),
        (["a", "b", None], Value("string"), "split 'train', row 2: expected a label in column 'label', got none"),
        ([0, None, 1], ClassLabel(names=["cat", "dog"]), "row 1: expected a label in column 'label', got none"),
        ([0.0, 1.0, 2.0], Value("float32"), "label_column: expected class labels, integers, .* got .*float32"),
        ([b"a", b"b", b"a"], Value("binary"), "label_column: expected class labels, integers, .* got .*binary"),
        (
            [[0], [0, 1], []],
            datasets.Sequence(Value("int64")),
            "label_column: expected class labels, integers, .* got (List|Sequence)",
        ),
        ([{"a": 1}] * 3, {"a": Value("int64")}, "label_column: expected class labels, integers, .* got "),
    ],
)
def test_other_labels_are_refused_by_name(tmp_path, values, kind, message):
    root = table(tmp_path / "data", label=(values, kind))
    with pytest.raises(ValueError, match=message):
        read(root)


CIFAR = {"fine_label": ([0, 1, 2], ClassLabel(num_classes=3)), "coarse_label": ([0, 1, 1], ClassLabel(num_classes=2))}


def test_columns_are_found_or_named_by_settings(tmp_path):
    root = table(tmp_path / "cifar10", image="img", label=([0, 1, 1], ClassLabel(num_classes=2)))
    assert read(root).labels == [0, 1, 1]
    root = table(
        tmp_path / "pets", image="photo", species=([1, 0, 1], ClassLabel(num_classes=2)), age=([1, 2, 3], Value("int8"))
    )
    assert read(root).labels == [1, 0, 1]
    assert read(root, label_column="age").class_names == ("1", "2", "3")
    root = table(tmp_path / "cifar100", image="img", **CIFAR)
    assert read(root, label_column="fine_label").num_classes == 3
    assert read(root, label_column="coarse_label", image_column="img").num_classes == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "label_column: expected one of coarse_label, fine_label, img, as there is no column 'label'$"),
        ({"label_column": "label"}, "label_column: expected one of coarse_label, fine_label, img; got 'label'"),
        ({"image_column": "image"}, "image_column: expected one of coarse_label, fine_label, img; got 'image'"),
        (
            {"label_column": "img"},
            "label_column: expected class labels, integers, strings or bools in 'img' .* got Image",
        ),
        (
            {"label_column": "fine_label", "image_column": "coarse_label"},
            "image_column: expected pictures in 'coarse_label' of .*, got ClassLabel",
        ),
    ],
)
def test_columns_that_are_not_clear_are_refused_by_name(tmp_path, settings, message):
    root = table(tmp_path / "cifar100", image="img", **CIFAR)
    with pytest.raises(ValueError, match=message):
        read(root, **settings)


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_pictures_that_are_not_declared_as_such_are_read(tmp_path, form):
    """As pandas writes them."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    cell = file.getvalue() if form == "bytes" else {"bytes": file.getvalue(), "path": None}
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"image": [cell], "label": [0]})
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    picture, label = read(tmp_path / "data")[0]
    assert picture[0].mean() > 2 and picture[1].mean() < -2 and label == 0


def test_an_empty_or_damaged_cell_is_a_damaged_sample(tmp_path):
    (tmp_path / "data").mkdir()
    cells = [None, {"bytes": b"no picture", "path": None}, {"bytes": None, "path": None}]
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2]})
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    dataset = read(tmp_path / "data")
    for row in range(3):
        with pytest.raises(ValueError, match=rf"data, split 'train', row {row}: cannot be read as an image: "):
            dataset[row]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train.csv", "image,label\na.png,1,2,3\nb.png,1\n"),
        ("train.csv", "image,label\n\xe9.png,1\n"),
        ("train.jsonl", '{"image": "a.png", "label": 0}\n{"image": "b.p'),
        ("train-00000-of-00001.parquet", "no parquet"),
        ("train.zip", "no archive"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, file, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).write_text(content, encoding="latin-1")
    with pytest.raises((OSError, ValueError), match="data"):
        read(tmp_path / "data")


def test_a_test_split_has_the_numbers_of_the_training_split(tmp_path):
    root = table(tmp_path / "data", label=([3, 5, 9], Value("int64")))
    table(root, "test", label=([9, 5], Value("int64")))
    assert read(root, "test", class_names=read(root).class_names).labels == [2, 1]
    assert read(root, "test").labels == [1, 0]


@pytest.mark.parametrize("kind", [Value("int64"), Value("string"), ClassLabel(num_classes=2)])
def test_training_on_a_table(tmp_path, kind):
    values = [str(index % 2) if kind == Value("string") else index % 2 for index in range(12)]
    root = table(tmp_path / "data", image="img", fine_label=(values, kind))
    table(root, "test", image="img", fine_label=(values[1:2], kind))
    command = ["train", "tiny_image", "--data", str(root), "--out", str(tmp_path / "out"), "data.layout=huggingface"]
    settings = "data.settings={size=32,label_column='fine_label',rand_augment=''}"
    assert main([*command, settings, "data.batch_size=4", "schedule.epochs=2", "machine.workers=0"]) == 0
