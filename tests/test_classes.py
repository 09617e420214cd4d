"""Classes have the numbers of the training split, in every layout; a class that it lacks is named."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import no_plots

from m2pt.cli import main
from m2pt.data import create_dataset
from m2pt.data.common import missing, read_text

pytestmark = pytest.mark.slow

COLOURS = {"apple": (255, 0, 0), "banana": (0, 255, 0), "cherry": (0, 0, 255)}
SETTINGS = ["data.layout=folder", "data.test_split=val", "data.batch_size=30", "schedule.epochs=8", "machine.workers=0"]
SETTINGS += ["schedule.warmup_epochs=1", "optimizer.base_lr=1e-2", "run.eval_epochs=8"]
SETTINGS += ["data.settings={size=32,rand_augment='',erasing=0.0}"]

_no_plots = pytest.fixture(autouse=True)(no_plots)


def put(folder, colour="white", count=1):
    """Noisy pictures of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    colour = COLOURS.get(folder.name, (255, 255, 255)) if colour == "white" else colour
    for index in range(count):
        pixels = np.clip(random.normal(colour, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{'-'.join(map(str, colour))}_{index}.png")


def fruit(root, *validation):
    """A training split of three colours, and a validation split of some classes."""
    for name in COLOURS:
        put(root / "train" / name, count=20)
    for name in validation:
        put(root / "val" / name, count=4)
    return root


def train(root, out, *more):
    return main(["train", "tiny_image", "--data", str(root), "--out", str(out), *SETTINGS, *more])


def classes_of(root, split="train", **settings):
    return create_dataset("image", "folder", root, split, False, size=32, **settings).class_names


# folders


@pytest.mark.parametrize("part", ["day", "day/noon", "."])
def test_a_class_is_the_folder_below_the_split_however_deep_its_pictures_lie(tmp_path, part):
    for name in ("cat", "dog"):
        put(tmp_path / "train" / name / part)
        put(tmp_path / "train" / name / "night")
    dataset = create_dataset("image", "folder", tmp_path, "train", False, size=32)
    assert dataset.class_names == ("cat", "dog")
    assert [dataset[index][1] for index in range(4)] == [0, 0, 1, 1]


def test_hidden_folders_and_files_are_left_out(tmp_path):
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-1000"):
        put(tmp_path / "train" / name)
        put(tmp_path / "train" / "cat" / name)
    (tmp_path / "train" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "train" / "cat" / "._1.png").write_bytes(b"\0")
    (tmp_path / "train" / "dog" / "Thumbs.db").write_bytes(b"\0")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    dataset = create_dataset("image", "folder", tmp_path, "train", False, size=32)
    assert dataset.class_names == ("cat", "dog")
    assert [dataset[index][1] for index in range(len(dataset))] == [0, 0, 0, 1]  # cat/cat and cat/dog
    with pytest.raises(ValueError, match="split: expected one of train; got"):
        classes_of(tmp_path, "__MACOSX")


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    for number in (1, 2, 10):
        put(tmp_path / "train" / str(number))
    assert classes_of(tmp_path) == ("1", "2", "10")


def test_names_that_differ_by_case_or_zeros_have_one_order_in_every_process(tmp_path):
    names = ["A", "a", "B", "b", "1", "01", "001", "②", "10²"]
    for name in names:
        put(tmp_path / "train" / name)
    read = f"create_dataset('image', 'folder', {str(tmp_path)!r}, 'train', True).class_names"
    command = [sys.executable, "-c", f"from m2pt.data import create_dataset\nprint({read})"]
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # this process has another one
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.stdout == f"{classes_of(tmp_path)}\n"
    assert set(classes_of(tmp_path)) == set(names)


@pytest.mark.parametrize("link", ["self", "class", "split", "root"])
def test_links_to_a_folder_around_them_are_not_followed(tmp_path, link):
    for name in ("cat", "dog"):
        put(tmp_path / "train" / name, count=2)
    put(tmp_path / "elsewhere")
    target = {"self": ".", "class": "..", "split": "../..", "root": "../../.."}[link]
    for name in ("cat", "dog"):
        (tmp_path / "train" / name / "loop").symlink_to(target)
    (tmp_path / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    dataset = create_dataset("image", "folder", tmp_path, "train", False)
    assert dataset.labels == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("ending", ["JPEG", "jpg", "png", "bmp", "webp", "tif", "TIFF", "ppm", "gif", "jp2"])
def test_pictures_of_every_usual_ending_are_found(tmp_path, ending):
    put(tmp_path / "train" / "cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / f"a.{ending}")
    assert len(create_dataset("image", "folder", tmp_path, "train", False)) == 2


@pytest.mark.parametrize("beside", [False, True])
def test_pictures_outside_of_a_class_folder_are_refused(tmp_path, beside):
    put(tmp_path / "val", COLOURS["apple"], 7)
    if beside:
        put(tmp_path / "val" / "apple")
    with pytest.raises(ValueError, match=r"val: expected a folder for every class, .* 255-0-0_0.png, .* and 2 more$"):
        classes_of(tmp_path, "val")


def test_class_names_number_another_split(tmp_path):
    root = fruit(tmp_path, "banana", "cherry")
    names = classes_of(root)
    dataset = create_dataset("image", "folder", root, "val", False, size=32, class_names=names)
    assert (dataset.class_names, dataset.num_classes) == (names, 3)
    assert [dataset[index][1] for index in range(len(dataset))] == 4 * [1] + 4 * [2]
    with pytest.raises(ValueError, match=r"val/banana/.*png: its class is not in the training split, .* 'banana'$"):
        classes_of(root, "val", class_names=("apple", "cherry"))


# runs


@pytest.mark.parametrize("validation", [("apple", "banana", "cherry"), ("banana", "cherry"), ("cherry",)])
def test_a_split_without_some_classes_is_measured_by_the_others(tmp_path, validation):
    assert train(fruit(tmp_path / "data", *validation), tmp_path / "out") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["merged"]["top1"] == result["trained"]["top1"] == 100


@pytest.mark.parametrize("more", ["aardvark", "zebra"])
def test_a_class_that_was_not_trained_is_refused_before_training(tmp_path, capsys, more):
    root = fruit(tmp_path / "data", "apple", "banana", "cherry", more)
    assert train(root, tmp_path / "out") == 2
    sample = root / "val" / more / "255-255-255_0.png"
    expected = f"m2pt: error: {sample}: its class is not in the training split, which lacks {more!r}\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "out").exists()


def test_a_flat_split_is_refused(tmp_path, capsys):
    root = fruit(tmp_path / "data")
    put(root / "val", COLOURS["apple"])
    assert train(root, tmp_path / "out") == 2
    assert f"{root}/val: expected a folder for every class" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is trained, and whose validation lacks the first class."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        no_plots(patch)
        assert train(fruit(root / "data", "banana", "cherry"), root / "out") == 0
    return root


def test_the_names_are_saved_with_the_run_and_with_the_merged_model(run):
    assert torch.load(run / "out" / "last.pth", weights_only=True)["class_names"] == list(COLOURS)
    assert json.loads((run / "out" / "merged.json").read_text())["class_names"] == list(COLOURS)


def evaluate(checkpoint, root):
    return main(["eval", str(checkpoint), "--recipe", "tiny_image", "--data", str(root), *SETTINGS])


@pytest.mark.parametrize("file", ["last.pth", "merged.safetensors"])
def test_evaluation_numbers_classes_as_the_checkpoint_does(run, tmp_path, capsys, file):
    for name in ("cherry", "banana"):
        put(tmp_path / "val" / name, count=4)
    assert evaluate(run / "out" / file, tmp_path) == 0
    assert capsys.readouterr().out == "top1 100.00, top5 100.00\n"
    put(tmp_path / "val" / "aardvark")
    assert evaluate(run / "out" / file, tmp_path) == 2
    assert "which lacks 'aardvark'" in capsys.readouterr().err


def test_evaluation_without_saved_names_numbers_classes_as_the_training_split(run, tmp_path, capsys):
    merged = tmp_path / "alone.safetensors"
    merged.write_bytes((run / "out" / "merged.safetensors").read_bytes())
    assert evaluate(merged, run / "data") == 0
    assert capsys.readouterr().out == "top1 100.00, top5 100.00\n"
    put(tmp_path / "data" / "val" / "cherry")
    assert evaluate(merged, tmp_path / "data") == 2
    assert "checkpoint: it does not name its classes, nor does a training split: split:" in capsys.readouterr().err


def test_a_damaged_description_is_named(run, tmp_path, capsys):
    merged = tmp_path / "a.safetensors"
    merged.write_bytes((run / "out" / "merged.safetensors").read_bytes())
    for content in (
        "[]",
        "{",
        "\xff",
        "3",
        '{"class_names": "abc"}',
        '{"class_names": [["a"]]}',
        '{"class_names": {"a": 0}}',
    ):
        (tmp_path / "a.json").write_text(content, encoding="latin-1")
        assert evaluate(merged, run / "data") == 2
        assert capsys.readouterr().err.startswith(f"m2pt: error: {tmp_path}/a.json")


def test_a_run_is_not_resumed_with_other_classes(run, tmp_path, capsys):
    root = fruit(tmp_path / "data", "cherry")
    (root / "train" / "apple").rename(root / "train" / "date")
    assert train(root, run / "out", "--resume") == 2
    expected = "last.pth: the run to resume had other classes: new are ['date'], gone are ['apple']"
    assert expected in capsys.readouterr().err


def test_a_run_is_not_resumed_with_its_classes_in_another_order(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    state = torch.load(run / "out" / "last.pth", weights_only=True)
    torch.save(state | {"class_names": list(COLOURS)[::-1]}, tmp_path / "out" / "last.pth")
    assert train(run / "data", tmp_path / "out", "--resume") == 2
    assert "last.pth: the run to resume had its classes in another order" in capsys.readouterr().err


# every layout: its test split has one class, and then one that its training split lacks


def audio_list(root, files):
    (root / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/0,low\n1,/m/1,high\n2,/m/2,none\n")
    for split, labels in files.items():
        rows = [f"{split}{index}.wav,/m/{label}" for index, label in enumerate(labels)]
        (root / f"{split}.csv").write_text("\n".join(["wav,labels", *rows]))
    return "audio", "list", {}, "none"


def esc50(root, files):
    (root / "meta").mkdir()
    with (root / "meta" / "esc50.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "fold", "target", "category"])
        for split, labels in files.items():
            for index, label in enumerate(labels):
                rows.writerow([f"{split}{index}.wav", {"test": 1, "train": 2}[split], label, f"class{label}"])
    return "audio", "esc50", {}, "class2"


def speech_commands(root, files):
    (root / "validation_list.txt").write_text("")
    names = [f"word{label}/test{index}.wav" for index, label in enumerate(files["test"])]
    (root / "testing_list.txt").write_text("\n".join(names))
    for split, labels in files.items():
        for index, label in enumerate(labels):
            (root / f"word{label}").mkdir(exist_ok=True)
            (root / f"word{label}" / f"{split}{index}.wav").write_bytes(b"")
    return "audio", "speech_commands", {}, "word2"


def modelnet40(root, files):
    (root / "modelnet40_shape_names.txt").write_text("bed\nsofa\nvase\n")
    for split, labels in files.items():
        names = [f"{('bed', 'sofa', 'vase')[label]}_{split}{index}" for index, label in enumerate(labels)]
        (root / f"modelnet40_{split}.txt").write_text("\n".join(names))
    return "point", "modelnet40", {}, "vase"


def modelnet40_h5(root, files):
    h5py = pytest.importorskip("h5py")
    (root / "shape_names.txt").write_text("bed\nsofa\nvase\n")
    for split, labels in files.items():
        with h5py.File(root / f"ply_data_{split}0.h5", "w") as file:
            file["data"], file["label"] = np.zeros((len(labels), 8, 3)), np.array(labels)[:, None]
    return "point", "modelnet40_h5", {}, "vase"


def scanobjectnn(root, files):
    h5py = pytest.importorskip("h5py")
    (root / "main_split").mkdir()
    for split, labels in files.items():
        name = {"train": "training", "test": "test"}[split]
        with h5py.File(root / "main_split" / f"{name}_objectdataset.h5", "w") as file:
            file["data"], file["label"] = np.zeros((len(labels), 8, 3)), np.array(labels)
    return "point", "scanobjectnn", {"variant": "objectbg"}, "box"


def shapenetpart(root, files):
    (root / "synsetoffset2category.txt").write_text("Airplane\ta\nBag\tb\nCap\tc\n")
    (root / "train_test_split").mkdir()
    for split, labels in files.items():
        entries = [f"shape_data/{'abc'[label]}/{split}{index}" for index, label in enumerate(labels)]
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(entries))
    return "point", "shapenetpart", {}, "Cap"


def video_list(root, files):
    for split, labels in files.items():
        lines = [f"{split}{index}.mp4 {label}" for index, label in enumerate(labels)]
        (root / f"{split}.csv").write_text("\n".join(lines))
    return "video", "list", {"num_classes": 3}, "2"


def folder(root, files):
    for split, labels in files.items():
        for index, label in enumerate(labels):
            put(root / split / f"class{label}", (index, 0, 0))
    return "image", "folder", {}, "class2"


def huggingface(root, files):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    for split, labels in files.items():
        columns = {"image": [Image.new("RGB", (8, 8))] * len(labels), "label": [f"class{label}" for label in labels]}
        datasets.Dataset.from_dict(columns, features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return "image", "huggingface", {}, "class2"


LAYOUTS = [audio_list, esc50, speech_commands, modelnet40, modelnet40_h5, scanobjectnn, shapenetpart]
LAYOUTS += [video_list, folder, huggingface]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_class_that_the_training_split_lacks_is_named_in_every_layout(tmp_path, monkeypatch, layout):
    if layout is huggingface:
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for labels in ([1], [1, 2]):
        root = tmp_path / str(len(labels))
        root.mkdir()
        modality, name, settings, lacking = layout(root, {"train": [0, 1, 0], "test": labels})
        training, test = (
            create_dataset(modality, name, root, split, split == "train", **settings) for split in ("train", "test")
        )
        if labels == [1]:
            test.number_as(training.class_names)
            test.require_classes_of(training)
            number = 1 if layout is not esc50 else training.class_names.index("class1")
            assert test.labels in ([number], [[number]]) and test.class_names == training.class_names
            continue
        with pytest.raises(ValueError, match=f": its class is not in the training split, which lacks '{lacking}'$"):
            test.number_as(training.class_names)
            test.require_classes_of(training)


def test_a_run_names_a_class_that_no_training_sample_has(tmp_path, capsys):
    """Where a file declares the classes of all splits, or they have numbers only."""
    video_list(tmp_path, {"train": [0, 1] * 4, "test": [2]})
    for split in ("train", "test"):
        for index in range(8):
            (tmp_path / f"{split}{index}.mp4").write_bytes(b"")
    command = ["train", "tiny_video", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    settings = ["data.layout=list", "data.settings={num_classes=3}", "data.batch_size=2"]
    assert main([*command, *settings]) == 2
    assert "test0.mp4: its class is not in the training split, which lacks '2'" in capsys.readouterr().err


# files of lists


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_missing_file_of_a_list_is_named_before_training(tmp_path, capsys, split, on_error):
    video_list(tmp_path, {"train": [0, 1] * 4, "test": [1] * 8})
    for each in {"train", "test"} - {split}:
        for index in range(8):
            (tmp_path / f"{each}{index}.mp4").write_bytes(b"")
    command = ["train", "tiny_video", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "machine.workers=0"]
    settings = ["data.layout=list", "data.settings={num_classes=2}", "data.batch_size=2", f"data.on_error={on_error}"]
    assert main([*command, *settings]) == 2
    error = capsys.readouterr().err
    if split == "train" and on_error == "skip":
        assert "not there" not in error  # and so the run ends at the first sample, as there is none
    else:
        start = f"m2pt: error: data: 8 files of split '{split}' are missing: {tmp_path}/{split}0.mp4, "
        assert error.startswith(start) and error.endswith(f"{split}4.mp4 and 3 more\n")
        assert not (tmp_path / "out").exists()


def test_missing_files_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").touch()
    files = [tmp_path / "a" / "1", tmp_path / "a" / "2", tmp_path / "b" / "1", Path(__file__)]
    assert missing(files) == [str(files[1]), str(files[2])]


def test_a_name_that_only_the_file_system_finds_is_not_missing(tmp_path, monkeypatch):
    """As of another case, on systems to which that is the same."""
    (tmp_path / "a.wav").touch()
    monkeypatch.setattr("os.listdir", lambda folder: ["A.WAV"])
    assert missing([tmp_path / "a.wav"]) == []


def test_listed_words_that_were_not_unpacked_are_named(tmp_path):
    speech_commands(tmp_path, {"train": [0, 1], "test": [1]})
    with (tmp_path / "testing_list.txt").open("a") as file:
        file.write("\nbed/1.wav\nword0/gone.wav")
    with pytest.raises(FileNotFoundError, match=r"testing_list\.txt: 2 of its 3 .*: bed/1.wav, word0/gone.wav$"):
        create_dataset("audio", "speech_commands", tmp_path, "test", False)
    assert len(create_dataset("audio", "speech_commands", tmp_path, "train", False)) == 2


# text


MARK = "\ufeff"


@pytest.mark.parametrize("encoding, mark", [("utf-8", ""), ("utf-8", MARK), ("utf-16-le", MARK), ("utf-16-be", MARK)])
def test_lists_are_read_in_every_unicode_encoding_that_they_declare(tmp_path, encoding, mark):
    classes, rows = "index,mid,display_name\n0,/m/0,café\n1,/m/1,名前\n", "wav,labels\r\nä.wav,/m/1\r\n"
    (tmp_path / "class_labels_indices.csv").write_bytes((mark + classes).encode(encoding))
    (tmp_path / "train.csv").write_bytes((mark + rows).encode(encoding))
    dataset = create_dataset("audio", "list", tmp_path, "train", False)
    assert dataset.class_names == ("café", "名前")
    assert (dataset.files, dataset.labels) == ([tmp_path / "ä.wav"], [[1]])


ZEROS = r"train\.csv: expected UTF-8, got zeros between the letters: save the file as UTF-8"
BYTE = r"train\.csv, line 2: expected UTF-8, got the byte 0xe9: save it as UTF-8"


@pytest.mark.parametrize(
    ("encoding", "name", "message"),
    [("latin-1", "étude", BYTE), ("cp1252", "étude", BYTE), ("utf-16-le", "etude", ZEROS), ("utf-32", "étude", ZEROS)],
)
def test_other_encodings_are_refused_by_name(tmp_path, encoding, name, message):
    (tmp_path / "train.csv").write_bytes(f"a.mp4 0\n{name}.mp4 1\n".encode(encoding))
    with pytest.raises(ValueError, match=message):
        create_dataset("video", "list", tmp_path, "train", False)


def test_a_wrong_byte_behind_a_mark_is_named_with_its_line(tmp_path):
    (tmp_path / "list.txt").write_bytes(MARK.encode() + b"one\n\xff")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: expected UTF-8, got the byte 0xff"):
        read_text(tmp_path / "list.txt")


def test_a_text_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        read_text(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,fold,target,category\na.wav,1\n", r"esc50\.csv, line 2: expected a cell for each of filename, fold"),
        (
            "filename,fold,target,category\na.wav,1,-1,dog\n",
            r"line 2: expected an integer from 0 on as target, got '-1'",
        ),
        (
            "filename,fold,target,category\na.wav,1,dog,3\n",
            r"line 2: expected an integer from 0 on as target, got 'dog'",
        ),
        ("filename,fold,target,category\na.wav,1,1,dog,2\n", r"line 2: expected a cell for each of filename, fold"),
        ("filename,fold,target,category\n,1,1,dog\n", r"line 2: expected a cell for each of filename, fold"),
        ("filename,fold,target,category,fold\na.wav,1,0,dog,2\n", r"esc50\.csv: expected different columns"),
        ("filename,fold,target,category\na.wav,1,0,dog\nb.wav,1,0,cat\n", r"expected one category for each target"),
        ("filename,fold,target,category\na.wav,1,0,dog\nb.wav,1,1,dog\n", r"expected one category for each target"),
        (
            f"filename,fold,target,category\na.wav,1,{'1' * 5000},dog\n",
            r"line 2: expected an integer from 0 on as target",
        ),
        ('filename,fold,target,category\n"' + "a" * 200_000, r"esc50\.csv, line 1: field larger"),
        ("filename,fold,target,category\na.wav,1,1,dog\n", r"esc50\.csv: expected the column target to count from 0"),
    ],
)
def test_damaged_rows_are_named(tmp_path, text, message):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        create_dataset("audio", "esc50", tmp_path, "train", False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"wav": "a.wav", "labels": ["/m/0"]}]}', r"train\.json, entry 0: expected text as wav and labels"),
        ('{"data": [{"wav": null, "labels": "/m/0"}]}', r"train\.json, entry 0: expected text as wav and labels"),
        ('{"data": [{"wav": 3, "labels": "/m/0"}]}', r"train\.json, entry 0: expected text as wav and labels"),
        ('{"data": {"wav": "a.wav"}}', r"train\.json: expected"),
        ("[" * 100_000, r"train\.json: cannot be read as JSON"),
        ('{"data": [', r"train\.json: cannot be read as JSON"),
    ],
)
def test_damaged_entries_are_named(tmp_path, content, message):
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/0,low\n")
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        create_dataset("audio", "list", tmp_path, "train", False)


def test_a_class_that_is_listed_twice_is_refused(tmp_path):
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/0,low\n1,/m/0,high\n")
    (tmp_path / "train.csv").write_text("wav,labels\na.wav,/m/0\n")
    with pytest.raises(ValueError, match=r"indices\.csv: expected every class once in the column mid"):
        create_dataset("audio", "list", tmp_path, "train", False)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("synsetoffset2category.txt", "Airplane\n", r"category\.txt: expected lines of a category and its synset"),
        ("synsetoffset2category.txt", "Airplane a b\n", r"category\.txt: expected lines of a category and its synset"),
        ("synsetoffset2category.txt", "Chicken a\n", r"category\.txt: category: expected one of Airplane"),
        (
            "train_test_split/shuffled_train_file_list.json",
            '["shape_data/z/1"]',
            r"list\.json: expected shape_data/synset",
        ),
        ("train_test_split/shuffled_train_file_list.json", '["a/1"]', r"list\.json: expected shape_data/synset/shape"),
        ("train_test_split/shuffled_train_file_list.json", "[3]", r"list\.json: expected shape_data/synset/shape"),
        ("train_test_split/shuffled_train_file_list.json", "{}", r"list\.json: expected shape_data/synset/shape"),
        ("train_test_split/shuffled_train_file_list.json", "[", r"list\.json: cannot be read as JSON"),
    ],
)
def test_damaged_lists_of_parts_are_named(tmp_path, file, content, message):
    shapenetpart(tmp_path, {"train": [0], "test": [0]})
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        create_dataset("point", "shapenetpart", tmp_path, "train", False)


def test_words_are_found_however_they_are_written(tmp_path):
    speech_commands(tmp_path, {"train": [0, 1], "test": [1]})
    (tmp_path / "testing_list.txt").write_text("./word1/test0.wav\nword1\\\\other test.WAV\n".replace("\\\\", "\\"))
    (tmp_path / "word1" / "other test.WAV").touch()
    (tmp_path / "word0" / "._train0.wav").touch()
    (tmp_path / "@eaDir").mkdir()
    splits = {name: create_dataset("audio", "speech_commands", tmp_path, name, False) for name in ("train", "test")}
    assert [file.name for file in splits["test"].files] == ["other test.WAV", "test0.wav"]
    assert [file.name for file in splits["train"].files] == ["train0.wav", "train1.wav"]
    assert splits["train"].class_names == ("word0", "word1")


def test_a_test_split_without_a_sample_is_refused_before_training(tmp_path, capsys):
    video_list(tmp_path, {"train": [0, 1] * 4, "test": []})
    for index in range(8):
        (tmp_path / f"train{index}.mp4").write_bytes(b"")
    command = ["train", "tiny_video", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "data.layout=list", "data.settings={num_classes=2}", "data.batch_size=2"]) == 2
    assert capsys.readouterr().err == "m2pt: error: data.test_split: there is no sample in 'test'\n"


@pytest.mark.parametrize(
    "names", ["ab", {"a", "b"}, {"a": 0}, 5, np.array(["a"]), iter("ab"), [1, 2], ["a", None], torch.ones(2)]
)
def test_class_names_of_another_kind_are_refused(names):
    with pytest.raises(TypeError, match=r"^class_names"):
        create_dataset("image", "embedded", None, "test", False, class_names=names)


def test_class_names_that_are_there_twice_are_refused():
    with pytest.raises(ValueError, match="class_names: expected different names"):
        create_dataset("image", "embedded", None, "test", False, class_names=["a", "b", "a"])
