"""Files that lie, and disks that fail: nothing in a file is executed, nothing is believed that is not there, and what
was good before is still there afterwards."""

import datetime
import errno
import functools
import io
import itertools
import json
import os
import pickle
import random
import resource
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    RECIPES,
    assert_equal,
    assignments,
    has_extras,
    interrupted,
    make_data,
    need_extras,
    no_plots,
    tiny_model,
)

from m2pt.checkpoint_formats import load_auxiliary, load_pretrained
from m2pt.checkpoints import AVERAGES, WRAPPERS, load_state_dict, save_state_dict
from m2pt.cli import main
from m2pt.data import create_dataset
from m2pt.demo.experiment import Results
from m2pt.demo.report import plot_scales as plot_scales_of_the_demo
from m2pt.demo.report import write_report
from m2pt.matrix import Matrix, compare, run_matrix
from m2pt.train import load_recipe, parse_assignment
from m2pt.train.batches import training_batches
from m2pt.train.distributed import World
from m2pt.train.engine import evaluate
from m2pt.train.files import load_trained
from m2pt.train.log import Log, plot_curves, plot_scales

pytestmark = pytest.mark.slow

ALONE = World(0, 1, torch.device("cpu"))

RECIPE = ["tiny_image", "model.overrides.depth=1", "model.overrides.embed_dim=16", "model.overrides.num_heads=2"]
SHORT = ["data.batch_size=600", "schedule.epochs=2", "schedule.warmup_epochs=0", "run.checkpoint_steps=1"]


_no_plots = pytest.fixture(autouse=True)(no_plots)


def weights():
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(3, 4, generator=generator), "b.bias": torch.randn(5, generator=generator).half()}


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(path, folder):
    """Train on from a run's checkpoint."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "last.pth").write_bytes(path.read_bytes())
    return main(["train", *RECIPE, "--out", str(folder / "run"), "--resume"])


READERS = {
    "load_state_dict": lambda path, folder: load_state_dict(path),
    "load_trained": lambda path, folder: load_trained(path),
    "load_auxiliary": lambda path, folder: load_auxiliary(path),
    "load_pretrained": lambda path, folder: load_pretrained(tiny_model("image", 2), path),
}
COMMANDS = {
    "convert": lambda path, folder: main(["convert", str(path), str(folder / "out.safetensors")]),
    "merge": lambda path, folder: main(["merge", str(path), str(folder / "out.safetensors")]),
    "eval": lambda path, folder: main(["eval", str(path), "--recipe", *RECIPE]),
    "train --init": lambda path, folder: main(["train", *RECIPE, "--out", str(folder / "run"), "--init", str(path)]),
    "train --aux": lambda path, folder: main(["train", *RECIPE, "--out", str(folder / "run"), "--aux", str(path)]),
    "train --resume": resume,
}


def assert_refused(path, folder, reader, capsys):
    """A ValueError that names the file; on the command line one line and the status 2; and no file is written."""
    if reader in READERS:
        with pytest.raises(ValueError, match=path.name):
            READERS[reader](path, folder)
    else:
        assert COMMANDS[reader](path, folder) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("m2pt: error: ")
        assert ("last.pth" if reader == "train --resume" else path.name) in line
    assert not {name for name in content_of(folder) if name not in (path.name, "last.pth")}


class Call:
    """What pickle turns into a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "os.system": lambda touched: Call(os.system, f"touch {touched}"),
    "open": lambda touched: Call(open, str(touched), "w"),
    "eval": lambda touched: Call(eval, f"open({str(touched)!r}, 'w')"),
    "np.save": lambda touched: Call(np.save, str(touched), 1),
}
DUMPS = {
    "zip": torch.save,
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, 2)),
}
NAMES = (*WRAPPERS, *AVERAGES, "recipe", "optimizer", "scaler", "step", "args")


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("dump", DUMPS)
def test_these_payloads_work_where_nothing_is_refused(tmp_path, dump, payload):
    DUMPS[dump]({"args": PAYLOADS[payload](tmp_path / "touched")}, tmp_path / "bad.pth")
    if dump == "pickle":
        pickle.loads((tmp_path / "bad.pth").read_bytes())
    else:
        torch.load(tmp_path / "bad.pth", weights_only=False)
    assert list(tmp_path.glob("touched*"))


@pytest.mark.parametrize("reader", [*READERS, *COMMANDS])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_in_a_checkpoint_is_not_executed(tmp_path, capsys, reader, payload):
    torch.save({"model": weights(), "args": PAYLOADS[payload](tmp_path / "touched")}, tmp_path / "bad.pth")
    assert_refused(tmp_path / "bad.pth", tmp_path, reader, capsys)


@pytest.mark.parametrize("reader", [*READERS, "merge"])
@pytest.mark.parametrize("dump", DUMPS)
def test_code_is_not_executed_wherever_it_stands(tmp_path, capsys, reader, dump):
    code = PAYLOADS["os.system"](tmp_path / "touched")
    inside = ({name: content} for name in NAMES for content in (code, {"a.weight": code}, weights() | {"b": code}))
    for content in (code, [code], {"a.weight": code}, *inside):
        DUMPS[dump](content, tmp_path / "bad.pth")
        assert_refused(tmp_path / "bad.pth", tmp_path, reader, capsys)


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


RECONSTRUCT = np.zeros(1).__reduce__()[0]
FOREIGN = {
    "a path": (Path("/runs/1"), [type(Path())]),
    "a date": (datetime.datetime(2026, 1, 1), [datetime.datetime]),
    "two": ([Path("a"), datetime.timedelta(1)], [datetime.timedelta, type(Path())]),
    "an array": (np.zeros(3), [RECONSTRUCT, np.ndarray]),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("beside", FOREIGN)
def test_what_stands_beside_the_weights_is_named_and_can_be_allowed(tmp_path, beside, is_zip):
    path, weights = tmp_path / "model.pth", {"weight": torch.randn(2)}
    value, classes = FOREIGN[beside]
    torch.save({"model": weights, "beside": value}, path, _use_new_zipfile_serialization=is_zip)
    names = [f"{each.__module__}.{each.__qualname__}" for each in classes]
    with pytest.raises(ValueError, match=r"model\.pth: not a readable .*: it also holds ") as refusal:
        load_state_dict(path)
    message = str(refusal.value)
    if is_zip:
        listed = ", ".join(names)
        assert f": it also holds {listed}, which" in message and message.endswith(f"add_safe_globals([{listed}])")
    else:  # of the older format torch tells the first only
        assert any(f": it also holds {name}, which" in message for name in names)
    with torch.serialization.safe_globals(classes):
        assert torch.equal(load_state_dict(path)["weight"], weights["weight"])


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.str_("a"), "numpy.dtypes.StrDType"),
        (np.datetime64("2026-01-01"), "numpy.dtypes.DateTime64DType"),
        (frozenset([1]), "frozenset"),
        (range(3), "range"),
        (slice(3), "slice"),
    ],
)
def test_the_reason_is_told_whatever_stands_beside_the_weights(tmp_path, value, name, is_zip):
    path = tmp_path / "model.pth"
    torch.save({"model": {"weight": torch.ones(2)}, "beside": value}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=rf"model\.pth: not a readable .*: it also holds .*{name}"):
        load_state_dict(path)


@pytest.mark.parametrize("code", np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?")
def test_numbers_of_numpy_may_stand_beside_the_weights(tmp_path, code):
    torch.save({"model": {"weight": torch.ones(2)}, "best": np.dtype(code).type(1)}, tmp_path / "model.pth")
    assert load_state_dict(tmp_path / "model.pth")["weight"].tolist() == [1, 1]


SAFETENSORS = {
    "a header of an exabyte": struct.pack("<Q", 2**60) + b"{}",
    "a header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "a header that is negative": struct.pack("<q", -1) + b"{}",
    "terabytes that are not there": header({"a": entry([2**20, 2**20], 0, 2**42)}) + bytes(16),
    "a shape beyond 64 bits": header({"a": entry([2**40, 2**40], 0, 16)}) + bytes(16),
    "more than its bytes": header({"a": entry([2**20, 2**20], 0, 16)}) + bytes(16),
    "bytes of another tensor": header({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}) + bytes(16),
    "bytes before the first": header({"a": entry([4], -16, 0)}) + bytes(16),
    "an unknown dtype": header({"a": entry([4], 0, 16, "F33")}) + bytes(16),
    "a header that is no JSON": struct.pack("<Q", 4) + b"\xff{}\0" + bytes(16),
}


def rebuilt(size, stride):
    """A float32 tensor of these sizes, as a pickle claims it, over a storage of four elements."""
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})


TORCH = {
    "terabytes that are not there": lambda: rebuilt((2**20, 2**20), (2**20, 1)),
    "terabytes over one element": lambda: torch.ones(1).expand(2**20, 2**20),
    "a storage of a terabyte": lambda: rebuilt((4,), (2**38,)),
    "no data": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "quantised by torch": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.parametrize("reader", ["load_state_dict", "load_auxiliary", "convert", "eval"])
@pytest.mark.parametrize("claim", SAFETENSORS)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, capsys, claim, reader):
    (tmp_path / "bad.safetensors").write_bytes(SAFETENSORS[claim])
    assert_refused(tmp_path / "bad.safetensors", tmp_path, reader, capsys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", ["load_state_dict", "load_trained"])
@pytest.mark.parametrize("claim", TORCH)
def test_a_tensor_without_its_data_is_refused(tmp_path, capsys, claim, reader):
    torch.save({"model": weights() | {"c": TORCH[claim]()}}, tmp_path / "bad.pth")
    assert_refused(tmp_path / "bad.pth", tmp_path, reader, capsys)


@pytest.mark.parametrize("reader", ["load_state_dict", "load_trained", "convert"])
def test_a_checkpoint_that_holds_itself_is_refused(tmp_path, capsys, reader):
    content = weights()
    content["model"] = content
    torch.save(content, tmp_path / "bad.pth")
    assert_refused(tmp_path / "bad.pth", tmp_path, reader, capsys)


def assert_refused_or_like(path, expected, is_same):
    """A ValueError that names the file, or the same shapes and dtypes with values that `is_same` accepts."""
    try:
        found = load_state_dict(path)
    except ValueError as error:
        assert path.name in str(error)
        return 1
    assert [(value.shape, value.dtype) for value in found.values()] == [
        (value.shape, value.dtype) for value in expected.values()
    ]
    assert all(is_same(value, original) for value, original in zip(found.values(), expected.values(), strict=True))
    return 0


def test_any_flipped_bit_of_a_safetensors_header_is_refused_or_renames_a_tensor(tmp_path):
    path = tmp_path / "w.safetensors"
    save_state_dict(weights(), path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    expected = load_state_dict(path)
    refused = sum(flipped(path, whole, bit, expected) for bit in range(8 * (8 + length)))
    assert refused > 4 * length


def flipped(path, whole, bit, expected):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    return assert_refused_or_like(path, expected, torch.equal)


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_of_a_torch_file_is_refused_or_changes_nothing(tmp_path, repetitions):
    path = tmp_path / "w.pth"
    torch.save({"model": weights()}, path)
    whole, expected = path.read_bytes(), weights()
    places = random.Random(0)
    flips = 40 * repetitions
    refused = sum(flipped(path, whole, places.randrange(8 * len(whole)), expected) for _ in range(flips))
    assert refused > flips / 4


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """The checkpoint of a run that was interrupted after two of its four steps."""
    out = tmp_path_factory.mktemp("half_way") / "run"
    with interrupted(2):
        assert main(["train", *RECIPE, *SHORT, "--out", str(out)]) == 130
    return out / "last.pth"


def go_on(folder, content):
    """The status of resuming a run whose checkpoint holds these bytes."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "last.pth").write_bytes(content)
    return main(["train", *RECIPE, *SHORT, "--out", str(folder / "run"), "--resume"])


def test_a_run_goes_on_from_the_checkpoint_that_these_tests_damage(tmp_path, half_way):
    assert go_on(tmp_path, half_way.read_bytes()) == 0


def test_a_flipped_bit_of_a_run_does_not_go_into_its_weights(tmp_path, half_way, capsys, repetitions):
    whole, places = half_way.read_bytes(), random.Random(0)
    start = len(whole) // 2
    for _ in range(repetitions):
        place = places.randrange(8 * start, 8 * (start + 4096))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        assert go_on(tmp_path, damaged) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("m2pt: error: ") and "last.pth: not a readable checkpoint" in line
        assert content_of(tmp_path) == {"last.pth": bytes(damaged)}


@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "step", "recipe"])
def test_a_run_without_a_part_of_its_state_is_refused(tmp_path, half_way, capsys, part):
    state = torch.load(half_way, weights_only=True)
    without = {name: value for name, value in state.items() if name != part}
    for damaged in (without, *(state | {part: value} for value in (None, [], {}, {"a": 1}) if part != "scaler")):
        torch.save(damaged, tmp_path / "last.pth")
        content = (tmp_path / "last.pth").read_bytes()
        assert go_on(tmp_path, content) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("m2pt: error: ") and "last.pth: " in line
        assert content_of(tmp_path / "run") == {"last.pth": content}


ODD_NAMES = [
    "with spaces",
    "ünïcødé ✓",
    "new\nline",
    "-dash",
    "--out",
    "%s %(x)d 100%",
    "a=b",
    "'quoted\"",
    "*",
    "x" * 200,
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_with_odd_names_are_files_as_any_other(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    ones = torch.ones(2, 2)
    torch.save({"weight": ones, "aux_weight": ones, "cross_modal_scale": torch.ones(1)}, f"{name}.pth")
    assert main(["merge", "--", f"{name}.pth", f"{name}.safetensors"]) == 0
    assert torch.equal(load_state_dict(f"{name}.safetensors")["weight"], 2 * ones)
    assert main(["merge", "--force", "--", f"{name}.none.pth", f"{name}.safetensors"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.pth", f"{name}.safetensors"}


@pytest.mark.parametrize("name", ["--resume\nüñ %s 'a=b\" *"])
def test_folders_with_odd_names_are_folders_as_any_other(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *RECIPE, *SHORT, f"--out={name}"]) == 0
    assert main(["eval", f"--recipe={RECIPE[0]}", "--", f"{name}/last.pth", *RECIPE[1:]]) == 0
    assert main(["train", *RECIPE, *SHORT, f"--out={name}", "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


IMPOSSIBLE = {"long": "x" * 300, "nul": "a\0b"}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "{}", "out.safetensors"],
        ["merge", "connected.safetensors", "{}.safetensors"],
        ["convert", "{}.pth", "out.safetensors"],
        ["train", "{}", "--out", "out"],
        ["train", "tiny_image", "--out", "out", "--aux", "{}"],
        ["eval", "{}", "--recipe", "tiny_image"],
        ["matrix", "{}", "--out", "out"],
    ],
    ids=" ".join,
)
def test_impossible_names_are_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, name):
    monkeypatch.chdir(tmp_path)
    ones = torch.ones(2, 2)
    connected = {"weight": ones, "aux_weight": ones, "cross_modal_scale": torch.ones(1)}
    save_state_dict(connected, "connected.safetensors")
    assert main([argument.format(IMPOSSIBLE[name]) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("m2pt: error: ")
    assert list(content_of(tmp_path)) == ["connected.safetensors"]


@contextmanager
def room_for(size):
    """No file can become larger: a write beyond fails with an error, as on a full disk (Python ignores the signal)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, half_way, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth").write_bytes(half_way.read_bytes())
    model = load_state_dict(half_way) | {"fc.weight": torch.ones(2, 2), "fc.aux_weight": torch.ones(2, 2)}
    save_state_dict(model | {"fc.cross_modal_scale": torch.ones(1)}, tmp_path / "connected.safetensors")
    save_state_dict(weights(), tmp_path / "merged.safetensors")
    before = content_of(tmp_path)
    commands = (
        ["merge", "--force", str(tmp_path / "connected.safetensors"), str(tmp_path / "merged.safetensors")],
        ["train", *RECIPE, *SHORT, "--out", str(tmp_path / "run"), "--resume"],
    )
    for room, command in itertools.product((0, 3000, 20_000), commands):
        with room_for(room):
            assert main(command) == 2
        assert "File too large" in capsys.readouterr().err.splitlines()[-1]
        after = content_of(tmp_path)
        assert {name: after[name] for name in before} == before
        assert after.keys() - before.keys() <= {"recipe.json", "log.jsonl"}
        assert not list(tmp_path.rglob("*.partial"))
    assert main(["train", *RECIPE, *SHORT, "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_a_disk_that_tells_at_the_end_that_it_is_full_leaves_what_was_there(tmp_path, half_way, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth").write_bytes(half_way.read_bytes())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert go_on(tmp_path, half_way.read_bytes()) == 2
    assert "recipe.json: cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert content_of(tmp_path) == {"last.pth": half_way.read_bytes()}


def results_of_the_demo():
    scales = dict.fromkeys(("pathway", "control"), [{"blocks.0.attn.qkv": 0.1}] * 2)
    gain = compare("speech", "digits", [{"top1": 50.0}] * 2, [{"top1": 51.0}] * 2)
    saved = {"float32": {"plain": 1, "fused": 1, "published": 2}}
    return Results(0.0, saved, "", None, scales, gain, gain, gain, [50.0] * 2)


def write_matrix(folder):
    """As if every run had given the same metric."""
    recipes = {name: load_recipe(f"tiny_{name}") for name in ("image", "point")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2pt.matrix.train", lambda *arguments, **settings: {"merged": {"top1": 50.0}})
        run_matrix(Matrix(recipes, {"audio": "audio.pth", "video": "video.pth"}, [0, 1]), folder)


WRITERS = {
    "report.md": lambda folder: write_report(results_of_the_demo(), folder),
    "results.json": lambda folder: write_report(results_of_the_demo(), folder),
    "scales.png": lambda folder: plot_scales_of_the_demo(results_of_the_demo().scales, folder / "scales.png"),
    "gains.md": write_matrix,
    "gains.json": write_matrix,
    "gains.png": write_matrix,
    "curves.png": plot_curves,
    "run/scales.png": lambda folder: plot_scales({"blocks.0.attn.qkv.cross_modal_scale": [0.1]}, folder),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_a_full_disk_has_no_room_for_is_named_and_left_as_it_was(tmp_path, name):
    """Room for what is written before it, and for all but its last byte."""
    path = tmp_path / name.removeprefix("run/")
    WRITERS[name](tmp_path)
    before = content_of(tmp_path)
    with room_for(path.stat().st_size - 1), pytest.raises(OSError, match=f"^{path}: cannot be written: .*too large"):
        WRITERS[name](tmp_path)
    assert content_of(tmp_path) == before
    assert not list(tmp_path.rglob("*.partial"))


def test_a_log_that_a_full_disk_has_no_room_for_is_named(tmp_path):
    refused = pytest.raises(OSError, match=f"^{tmp_path / 'log.jsonl'}: cannot be written: .*too large")
    with Log(tmp_path, True, 0, 1) as log, room_for(8), refused:
        log.write(1, loss=1.0)


@pytest.mark.parametrize("folder", ["/sys", "/proc", "file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys, folder):
    """Of these not even root can make one; a file is no folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ones = torch.ones(2, 2)
    connected = {"weight": ones, "aux_weight": ones, "cross_modal_scale": torch.ones(1)}
    save_state_dict(connected, tmp_path / "connected.safetensors")
    commands = [["merge", "connected.safetensors", f"{folder}/merged.safetensors"]]
    commands += [["train", *RECIPE, *SHORT, "--out", f"{folder}/run"], ["demo", "--out", f"{folder}/run"]]
    for command in commands:
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("m2pt: error: ") and folder in line
    assert {path.name for path in tmp_path.iterdir()} == {"file", "connected.safetensors"}


SAMPLES = {
    "image": "train/class0/2.png",
    "audio": "audio/train2.wav",
    "point": "ball/ball_train2.txt",
    "video": "train2.mp4",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data of every modality, with a training sample that is cut off near its beginning."""
    folder = tmp_path_factory.mktemp("data")
    for modality, name in SAMPLES.items():
        if has_extras(modality):
            sample = make_data(modality, folder / modality, train=8, test=2) / name
            sample.write_bytes(sample.read_bytes()[:40])
    return folder


def on_samples(modality, data, out, *more):
    need_extras(modality)
    tiny = [*assignments(modality), "run.checkpoint_steps=1", "schedule.epochs=3"]
    return main(["train", RECIPES[modality], "--data", str(data / modality), "--out", str(out), *tiny, *more])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("modality", SAMPLES)
def test_a_damaged_sample_stops_the_run_and_is_named(data, tmp_path, capsys, modality, workers):
    assert on_samples(modality, data, tmp_path / "run", f"machine.workers={workers}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"m2pt: error: {data / modality / SAMPLES[modality]}: ")
    assert "Traceback" not in line


@pytest.mark.parametrize("modality", ["point"])
def test_a_damaged_sample_is_left_out_where_the_recipe_says_so(data, tmp_path, capsys, modality):
    skip = "data.on_error=skip"
    for workers in (0, 2):
        assert on_samples(modality, data, tmp_path / str(workers), skip, f"machine.workers={workers}") == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("m2pt:"))
        assert line.startswith(f"m2pt: left out: {data / modality / SAMPLES[modality]}: ")
    assert on_samples(modality, data, tmp_path / "parts") == 2  # stops, after as many steps as need other samples only
    assert on_samples(modality, data, tmp_path / "parts", skip, "--resume") == 0
    states = [torch.load(tmp_path / out / "last.pth", weights_only=True) for out in ("0", "2", "parts")]
    for state in states[1:]:
        for part in ("model", "optimizer", "step"):
            assert_equal(state[part], states[0][part])


def test_the_next_readable_sample_stands_in_for_a_damaged_one(data):
    recipe = load_recipe("point_modelnet40", dict(map(parse_assignment, assignments("point"))))
    clouds = create_dataset("point", "modelnet40", data / "point", "train", True, points=64)
    labels = []
    for on_error, damaged in (("stop", set()), ("skip", {2, 3})):
        samples = Labelled(clouds.labels, damaged)
        recipe = recipe.with_overrides({"data.on_error": on_error})
        labels.append(torch.cat([index for index, _ in training_batches(samples, recipe, ALONE, 0)]))
    assert {2, 3} < set(labels[0].tolist())
    assert torch.equal(labels[1], torch.where((labels[0] == 2) | (labels[0] == 3), 4, labels[0]))


class Labelled(torch.utils.data.Dataset):
    """Samples that are their own index."""

    def __init__(self, labels, damaged):
        self.labels, self.damaged = labels, damaged

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.damaged:
            raise ValueError(f"sample {index}: cannot be read")
        return torch.tensor(index), self.labels[index]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_data_set_without_a_readable_sample_is_refused(on_error):
    recipe = load_recipe("point_modelnet40", {"data.on_error": on_error, "data.batch_size": 4, "machine.workers": 0})
    with pytest.raises(ValueError, match=r"sample \d: cannot be read"):
        next(training_batches(Labelled([0] * 8, set(range(8))), recipe, ALONE, 0))


def test_a_damaged_test_sample_stops_whatever_the_recipe_says(tmp_path, capsys):
    sample = make_data("point", tmp_path / "point", train=8, test=2) / "ball" / "ball_test0.txt"
    sample.write_text("1,2,3\n")
    assert on_samples("point", tmp_path, tmp_path / "run", "data.on_error=skip") == 2
    assert f"m2pt: error: {sample}: " in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["samples", "shard"])
def test_a_stream_without_a_readable_sample_is_refused(tmp_path, capsys, damaged):
    """timm leaves out what it cannot read, and here nothing is left."""
    webdataset = pytest.importorskip("webdataset")
    for split in ("train", "val"):
        with webdataset.TarWriter(str(tmp_path / f"{split}.tar")) as tar:
            for index in range(4):
                tar.write({"__key__": str(index), "png": b"no picture", "cls": index % 2})
    if damaged == "shard":
        (tmp_path / "train.tar").write_bytes(b"no archive")
    splits = {
        name: {"name": name, "num_samples": 4, "filenames": [f"{name}.tar"], "shard_lengths": [4]}
        for name in ("train", "val")
    }
    (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
    stream = ["data.layout=webdataset", "data.settings.num_classes=2", "schedule.epochs=1"]
    command = ["train", RECIPES["image"], "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main([*command, *assignments("image"), *stream]) == 2
    assert (
        "m2pt: error: data: the training split ended at step 0, after 0 of 1 micro-batches" in capsys.readouterr().err
    )


def test_a_stream_that_leaves_out_a_test_sample_is_no_whole_split(tmp_path, capsys):
    """Of the training split it may."""
    webdataset = pytest.importorskip("webdataset")
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    splits = {}
    for split, damaged in (("train", 8), ("val", 2)):
        with webdataset.TarWriter(str(tmp_path / f"{split}.tar")) as tar:
            for index in range(9):
                picture = b"no picture" if index == damaged else file.getvalue()
                tar.write({"__key__": str(index), "png": picture, "cls": index % 2})
        splits[split] = {"name": split, "num_samples": 9, "filenames": [f"{split}.tar"], "shard_lengths": [9]}
    (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
    stream = ["data.layout=webdataset", "data.settings.num_classes=2", "schedule.epochs=1"]
    command = ["train", RECIPES["image"], "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main([*command, *assignments("image"), *stream]) == 2
    error = capsys.readouterr().err
    assert "m2pt: error: data: only 8 of the 9 samples of the test split can be read" in error


def test_a_test_split_without_a_sample_is_refused():
    recipe = load_recipe("image_imagenet")
    nothing = Labelled([], set())
    nothing.views = 1
    with pytest.raises(ValueError, match="data: the test split has no sample that can be read"):
        evaluate(tiny_model("image", 2), nothing, [], None, recipe.machine, ALONE)
