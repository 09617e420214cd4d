"""Checkpoints on disk: what is read, what is refused, and that writing is all or nothing."""

import argparse
import json
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import m2pt.checkpoints
from m2pt import FusedCrossModalLinear, merge_pathways
from m2pt.checkpoints import (
    load_state_dict,
    merge_state_dict,
    read_weights,
    save_state_dict,
    without_wrapping,
    written_whole,
)

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3}


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "fc.weight": torch.randn(3, 4, generator=generator),
        "fc.bias": torch.randn(3, generator=generator).bfloat16(),
        "steps": torch.tensor(7),
    }


def write(content, path):
    if path.suffix == ".safetensors":
        save_state_dict(content, path)
    else:
        torch.save(content, path)
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [Path, str])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin"])
def test_round_trip(tmp_path, name, kind):
    write(weights(), tmp_path / name)
    assert_same(load_state_dict(kind(tmp_path / name)), weights())


ARGS = argparse.Namespace(lr=0.1, output_dir="runs", epochs=None)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda content: {"module": content},
        lambda content: {"state_dict": content, "epoch": 3},
        lambda content: {"model": content, "optimizer": {"state": {}}, "scaler": {"scale": 2.0}, "args": ARGS},
        lambda content: {"model": {"module": content}},
        lambda content: {"module": {"state_dict": {"model": content, "note": "x"}}, "lr": 0.1},
    ],
)
def test_wrapped_state_dicts_are_found(tmp_path, wrap):
    assert_same(load_state_dict(write(wrap(weights()), tmp_path / "w.pth")), weights())


RAW, AVERAGE = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
BOTH = {
    "timm": lambda: {"state_dict": RAW, "state_dict_ema": AVERAGE, "args": ARGS, "arch": "vit"},
    "DeiT": lambda: {"model": RAW, "model_ema": AVERAGE, "scaler": {"scale": 2.0}},
    "a run": lambda: {"model": RAW, "ema": AVERAGE, "step": 3},
    "wrapped": lambda: {"module": {"model": {"module": RAW}, "model_ema": {"module": AVERAGE}}},
    "timm's order": lambda: {"model": RAW, "model_ema": {"a": torch.ones(2) / 2}, "state_dict_ema": AVERAGE},
}


@pytest.mark.parametrize("both", BOTH)
@pytest.mark.parametrize("weights, expected", [(None, AVERAGE), ("ema", AVERAGE), ("raw", RAW)])
def test_of_weights_and_their_average_one_is_taken(tmp_path, both, weights, expected):
    path = write(BOTH[both](), tmp_path / "w.pth.tar")
    assert_same(load_state_dict(path, weights), expected)
    found, taken = read_weights(path, weights)
    assert_same(found, expected)
    assert taken == (weights or "ema")


@pytest.mark.parametrize("weights", [None, "raw"])
@pytest.mark.parametrize(
    "beside",
    [{}, {"model_ema": None}, {"ema": 0.999}, {"ema": {}}, {"ema": {"decay": 0.9}}, {"model_ema": {"module": {}}}],
    ids=str,
)
def test_without_an_average_there_is_nothing_to_choose(tmp_path, beside, weights):
    found, taken = read_weights(write({"model": RAW} | beside, tmp_path / "w.pth"), weights)
    assert_same(found, RAW)
    assert taken is None


@pytest.mark.parametrize("weights", [None, "ema"])
def test_an_average_alone_is_read(tmp_path, weights):
    found, taken = read_weights(write({"ema": AVERAGE}, tmp_path / "w.pth"), weights)
    assert_same(found, AVERAGE)
    assert taken is None


@pytest.mark.parametrize(
    "content, name, weights, message",
    [
        ({"model": RAW}, "w.pth", "ema", "there is no moving average .*'state_dict_ema', 'model_ema', 'ema'"),
        (RAW, "w.safetensors", "ema", "there is no moving average"),
        ({"ema": AVERAGE}, "w.pth", "raw", "there are no raw weights in it beside their moving average, ema"),
    ],
)
def test_weights_that_are_not_there_are_refused(tmp_path, content, name, weights, message):
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        load_state_dict(write(content, tmp_path / name), weights)


def test_a_checkpoint_that_timm_saves_is_read_as_timm_does(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    average = timm.utils.ModelEmaV3(model)
    nn.init.ones_(average.module.head.weight)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = timm.utils.CheckpointSaver(
        model, optimizer, argparse.Namespace(model="vit"), average, checkpoint_dir=tmp_path
    )
    saver.save_checkpoint(0, metric=1.0)
    path = tmp_path / "last.pth.tar"
    for weights, use_ema in ((None, True), ("ema", True), ("raw", False)):
        expected = timm.models.load_state_dict(str(path), use_ema=use_ema)
        assert_same(load_state_dict(path, weights), expected)
        assert bool((expected["head.weight"] == 1).all()) == use_ema


INDEX = "model.safetensors.index.json"


def shards(folder, suffix=".safetensors", **changed):
    """Weights in two files with an index, as `save_pretrained` writes them."""
    first, second = f"model-00001-of-00002{suffix}", f"model-00002-of-00002{suffix}"
    entries = weights()
    write({"fc.weight": entries["fc.weight"]}, folder / first)
    write({name: entries[name] for name in ("fc.bias", "steps")}, folder / second)
    weight_map = {"fc.weight": first, "fc.bias": second, "steps": second} | changed
    index = folder / (INDEX if suffix == ".safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_a_folder_is_read_whatever_is_saved_in_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name}: a folder without any of .*{INDEX}, pytorch"):
        load_state_dict(tmp_path)
    index = shards(tmp_path, ".bin")
    assert_same(load_state_dict(tmp_path), weights())
    write(RAW, tmp_path / "pytorch_model.bin")
    assert_same(load_state_dict(str(tmp_path)), RAW)
    shards(tmp_path)
    assert_same(load_state_dict(tmp_path), weights())
    write(AVERAGE, tmp_path / "model.safetensors")
    assert_same(load_state_dict(tmp_path), AVERAGE)
    assert_same(load_state_dict(index), weights())


def test_an_entry_in_two_shards_is_that_of_the_index(tmp_path):
    shards(tmp_path)
    write(
        weights() | {"fc.weight": torch.zeros(3, 4), "extra": torch.ones(1)},
        tmp_path / "model-00002-of-00002.safetensors",
    )
    assert_same(load_state_dict(tmp_path), weights() | {"extra": torch.ones(1)})


@pytest.mark.parametrize(
    "shard, error, message",
    [
        (
            "model-00003-of-00003.safetensors",
            FileNotFoundError,
            "there is no 'model-00003-of-00003.safetensors' beside it",
        ),
        ("model-00001-of-00002.safetensors", ValueError, "steps is not in 'model-00001-of-00002.safetensors'"),
        ("../outside.safetensors", ValueError, "expected the names of files beside it, got '../outside.safetensors'"),
        ("inside/w.safetensors", ValueError, "expected the names of files beside it, got 'inside/w.safetensors'"),
        ("/w.safetensors", ValueError, "expected the names of files beside it, got '/w.safetensors'"),
        ("..", FileNotFoundError, "there is no '..' beside it"),
        ("a\nb\x1b[2J", FileNotFoundError, r"there is no 'a\nb\x1b[2J' beside it"),
        ("nul\0", FileNotFoundError, r"there is no 'nul\x00' beside it"),
        ("\ud800", FileNotFoundError, r"there is no '\ud800' beside it"),
        ("x" * 300, FileNotFoundError, "there is no 'xxx"),
        ("", ValueError, "expected the names of files beside it"),
        (3, ValueError, "not a readable checkpoint"),
    ],
    ids=str,
)
def test_an_index_is_not_trusted(tmp_path, shard, error, message):
    folder = tmp_path / "model"
    (folder / "inside").mkdir(parents=True)
    for outside in (tmp_path / "outside.safetensors", folder / "inside" / "w.safetensors"):
        write({"steps": torch.tensor(7)}, outside)
    shards(folder, steps=shard)
    with pytest.raises(error, match=rf"{INDEX}: {re.escape(message)}"):
        load_state_dict(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": "a"}', "[" * 100_000], ids=len)
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX}: not a readable checkpoint"):
        load_state_dict(tmp_path)


def test_an_index_of_nothing_is_refused(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=f"{INDEX}: its weight_map is empty"):
        load_state_dict(tmp_path)


def halves(folder, wraps):
    """Weights and their average in two torch files, each with both where `wraps` says so."""
    weight_map = {}
    for name, wrap in zip("ab", wraps, strict=True):
        raw, average = {name: torch.zeros(2)}, {name: torch.ones(2)}
        write({"model": raw, "ema": average} if wrap else raw, folder / f"{name}.bin")
        weight_map[name] = f"{name}.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("weights, value", [(None, 1.0), ("ema", 1.0), ("raw", 0.0)])
def test_of_weights_and_their_average_in_shards_one_is_taken(tmp_path, weights, value):
    halves(tmp_path, (True, True))
    found, taken = read_weights(tmp_path, weights)
    assert_same(found, {name: torch.full((2,), value) for name in "ab"})
    assert taken == (weights or "ema")


@pytest.mark.parametrize(
    "weights, message",
    [
        (None, r"index\.json: expected a moving average beside the weights in all of its files or in none"),
        ("raw", r"index\.json: expected a moving average beside the weights in all of its files or in none"),
        ("ema", r"b\.bin: there is no moving average"),
    ],
)
def test_an_average_in_some_shards_only_is_refused(tmp_path, weights, message):
    halves(tmp_path, (True, False))
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path, weights)


def test_a_damaged_shard_is_named(tmp_path):
    shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: not a readable checkpoint"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["module.a.weight", "module.b"], ["a.weight", "b"]),
        (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),
        (["module.module.a", "module.b"], ["module.a", "b"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["module.a", "_orig_mod.b"], ["module.a", "_orig_mod.b"]),
        (["modules.a", "model.b"], ["modules.a", "model.b"]),
        ([], []),
    ],
)
def test_what_torch_put_before_every_name_is_taken_off(names, expected):
    assert list(without_wrapping(dict.fromkeys(names, torch.ones(1)))) == expected


SQUARE = torch.arange(16.0).view(4, 4)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": SQUARE.t()},
        {"a": SQUARE[:, 1:3]},
        {"a": torch.ones(1).expand(5)},
        {"a": SQUARE, "b": SQUARE},
        {"a": SQUARE, "b": SQUARE.view(16), "c": SQUARE.t()},
        {"a": SQUARE[:3], "b": SQUARE[1:]},
        {"a": nn.Parameter(SQUARE), "b": torch.empty(0)},
    ],
    ids=["transposed", "columns", "expanded", "tied", "views", "overlapping", "parameter"],
)
def test_every_layout_is_saved(tmp_path, tensors):
    save_state_dict(tensors, tmp_path / "w.safetensors")
    assert_same(
        load_state_dict(tmp_path / "w.safetensors"), {name: tensor.detach() for name, tensor in tensors.items()}
    )


def test_saved_file_has_the_permissions_of_any_other_new_file(tmp_path):
    (tmp_path / "other").touch()
    save_state_dict(weights(), tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_replaces_the_target_and_leaves_nothing_else(tmp_path):
    for value in (0.0, 1.0):
        save_state_dict({"a": torch.full((2,), value)}, tmp_path / "w.safetensors")
    assert list(listing(tmp_path)) == ["w.safetensors"]
    assert load_state_dict(tmp_path / "w.safetensors")["a"].tolist() == [1.0, 1.0]


def test_an_interrupted_write_is_an_interruption_whatever_the_writer_raises_then(tmp_path):
    """torch's writer ends its archive on the way out, and fails."""
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a.pth"):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, raised", [(RuntimeError("disk full"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)], ids=repr
)
@pytest.mark.parametrize("existing", [True, False])
def test_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch, existing, error, raised):
    path = tmp_path / "w.safetensors"
    if existing:
        save_state_dict(weights(), path)
    before = listing(tmp_path)

    def fail_midway(tensors, filename, *metadata):
        Path(filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr(m2pt.checkpoints, "save_file", fail_midway)
    with pytest.raises(raised):
        save_state_dict({"a": torch.ones(2)}, path)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["w.pth", "w", "w.safetensors.bak"])
def test_saving_under_another_ending_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"/{re.escape(name)}: .*\.safetensors$"):
        save_state_dict(weights(), tmp_path / name)
    assert not listing(tmp_path)


def test_saving_to_a_missing_folder_names_it(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "missing"))):
        save_state_dict(weights(), tmp_path / "missing" / "w.safetensors")
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    "name, dump",
    [
        ("w.safetensors", save_state_dict),
        ("w.pth", torch.save),
        ("w.pth", partial(torch.save, _use_new_zipfile_serialization=False)),
    ],
)
def test_truncated_file(tmp_path, name, dump):
    path = tmp_path / name
    dump(weights(), path)
    whole = path.read_bytes()
    for kept in range(0, len(whole), 9):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"/{name}: not a readable checkpoint"):
            load_state_dict(path)


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02}q\x00.", b"{}", b"\x00" * 64, b"K\x01."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_of_another_kind(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"w{suffix}: "):
        load_state_dict(path)


class TouchesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_pickle_is_not_executed(tmp_path, dump):
    path, touched = tmp_path / "w.pth", tmp_path / "touched"
    dump({"model": weights(), "args": TouchesAFile(touched)}, path)
    with pytest.raises(ValueError, match=r"w\.pth: not a readable checkpoint"):
        load_state_dict(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [torch.ones(2)],
        {"epoch": 3},
        {"a": torch.ones(2), "epoch": 3},
        {0: torch.ones(2)},
        {"model": torch.ones(2)},
        {"model": {"a": torch.ones(2), "b": [1]}},
        {"weights": {"a": torch.ones(2)}},
        {"ema": {}},
        {"model": RAW, "ema": {"a": torch.ones(2), "decay": 0.9}},
        None,
    ],
    ids=str,
)
def test_what_is_not_a_state_dict(tmp_path, content):
    with pytest.raises(ValueError, match=r"w\.pth: expected a state dict, bare or under one of .*'module', .*'ema'"):
        load_state_dict(write(content, tmp_path / "w.pth"))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [
        FusedCrossModalLinear(4, 4, bias, origin_layer=None, aux_weight=torch.randn(4, 4)) for bias in (True, False)
    ]
    for layer in layers:
        nn.init.normal_(layer.cross_modal_scale)
    return nn.Sequential(layers[0], nn.BatchNorm1d(4), nn.Sequential(layers[1]), nn.Linear(4, 2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_the_state_dict_equals_merging_the_model(dtype):
    fused = model(dtype)
    before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    state_dict = fused.state_dict()
    merged = merge_state_dict(state_dict)
    assert_same(state_dict, before)
    assert_same(merged, merge_pathways(fused).state_dict())


def test_entries_with_similar_names_are_left_alone():
    layer = FusedCrossModalLinear(4, 3, aux_weight=torch.ones(3, 4))
    other = {"my_aux_weight": torch.ones(2), "old.my_cross_modal_scale": torch.ones(1)}
    merged = merge_state_dict(layer.state_dict() | other)
    assert_same(merged, layer.merge().state_dict() | other)


def test_a_single_layer_can_be_merged():
    layer = model()[0]
    assert_same(merge_state_dict(layer.state_dict()), layer.merge().state_dict())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_merging_from_file_to_file(tmp_path, suffix):
    loaded = load_state_dict(write(model().state_dict(), tmp_path / f"w{suffix}"))
    save_state_dict(merge_state_dict(loaded), tmp_path / "merged.safetensors")
    assert_same(load_state_dict(tmp_path / "merged.safetensors"), merge_pathways(model()).state_dict())


@pytest.mark.parametrize("state_dict", [{}, weights()], ids=["empty", "plain"])
def test_nothing_to_merge(state_dict):
    with pytest.raises(ValueError, match=r"^state_dict: .*cross_modal_scale"):
        merge_state_dict(state_dict)


@pytest.mark.parametrize("missing", ["weight", "aux_weight", "cross_modal_scale"])
def test_incomplete_layer_is_refused(missing):
    state_dict = model().state_dict()
    del state_dict[f"2.0.{missing}"]
    with pytest.raises(ValueError, match=rf"^state_dict: 2\.0\.{missing} is missing$"):
        merge_state_dict(state_dict)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "aux_weight", "cross_modal_scale"])
def test_merged_weight_that_is_not_finite_is_refused(name, value):
    state_dict = model().state_dict()
    state_dict[f"2.0.{name}"].flatten()[-1] = value
    with pytest.raises(ValueError, match=r"^2\.0: .*NaN or infinite"):
        merge_state_dict(state_dict)
