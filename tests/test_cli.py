"""The command line: what it does, and what a person reads when it cannot."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import vit

import m2pt.train
from m2pt import merge_pathways, reparameterize_aux_into_target_model
from m2pt.checkpoint_formats import FORMATS
from m2pt.checkpoints import load_state_dict, merge_state_dict, save_state_dict
from m2pt.cli import main
from m2pt.models import create_model
from m2pt.train import load_recipe, shipped_recipes
from m2pt.train.run import create_trained_model

ROOT = Path(__file__).parents[1]
shallow = partial(vit, depth=1)


@pytest.fixture
def connected():
    model = reparameterize_aux_into_target_model(shallow(), shallow(1))
    for name, parameter in model.named_parameters():
        if name.endswith("cross_modal_scale"):
            torch.nn.init.constant_(parameter, 0.25)
    return model


def test_merge_folds_a_checkpoint_for_a_plain_model(connected, tmp_path, capsys):
    torch.save({"model": connected.state_dict()}, tmp_path / "trained.pth")
    assert main(["merge", str(tmp_path / "trained.pth"), str(tmp_path / "merged.safetensors")]) == 0
    assert "4 layers folded" in capsys.readouterr().out
    plain = shallow()
    plain.load_state_dict(load_state_dict(tmp_path / "merged.safetensors"))
    expected = merge_pathways(connected).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_merge_takes_off_what_torch_put_before_every_name(connected, tmp_path, prefix):
    entries = {prefix + name: value.bfloat16() for name, value in connected.state_dict().items()}
    torch.save({"state_dict": entries}, tmp_path / "trained.pth.tar")
    assert main(["merge", str(tmp_path / "trained.pth.tar"), str(tmp_path / "merged.safetensors")]) == 0
    merged = load_state_dict(tmp_path / "merged.safetensors")
    shallow().load_state_dict(merged)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}


def test_merge_reads_a_folder_of_shards(connected, tmp_path):
    entries = list(connected.state_dict().items())
    names = ("model-1.safetensors", "model-2.safetensors")
    for name, part in zip(names, (entries[:5], entries[5:]), strict=True):
        save_state_dict(dict(part), tmp_path / name)
    index = {"weight_map": {entry: names[i >= 5] for i, (entry, _) in enumerate(entries)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["merge", str(tmp_path), str(tmp_path / "merged.safetensors")]) == 0
    expected = merge_pathways(connected).state_dict()
    merged = load_state_dict(tmp_path / "merged.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())


@pytest.mark.parametrize("option", [[], ["--force"]], ids=str)
@pytest.mark.parametrize(
    "name, message", [("taken.pth", "ending in .safetensors"), ("a.safetensors", "it is a folder")]
)
def test_merge_does_not_advise_what_would_not_help(connected, tmp_path, monkeypatch, capsys, name, message, option):
    monkeypatch.chdir(tmp_path)
    save_state_dict(connected.state_dict(), "trained.safetensors")
    Path("taken.pth").write_bytes(b"taken")
    Path("a.safetensors").mkdir()
    assert main(["merge", *option, "trained.safetensors", name]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"m2pt: error: {name}: ") and message in line and "--force" not in line
    assert Path("taken.pth").read_bytes() == b"taken" and not list(Path("a.safetensors").iterdir())


def test_merge_does_not_overwrite_a_link_to_a_file_that_is_gone(connected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_state_dict(connected.state_dict(), "trained.safetensors")
    Path("merged.safetensors").symlink_to("gone.safetensors")
    assert main(["merge", "trained.safetensors", "merged.safetensors"]) == 2
    assert "merged.safetensors: already exists" in capsys.readouterr().err
    assert Path("merged.safetensors").is_symlink()


@pytest.mark.parametrize(
    "option, said", [([], "; the moving average was taken, not the raw weights"), (["--weights=raw"], "")]
)
def test_merge_of_an_average_without_pathway_says_where_it_looked(
    connected, tmp_path, monkeypatch, capsys, option, said
):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": connected.state_dict(), "ema": shallow().state_dict()}, "trained.pth")
    assert main(["merge", "trained.pth", "merged.safetensors", *option]) == (2 if said else 0)
    message = f"trained.pth: there is no cross_modal_scale in it, so there is nothing to merge{said}"
    assert capsys.readouterr().err == (f"m2pt: error: {message}\n" if said else "")


@pytest.mark.parametrize("reads", ["trained.safetensors", "merged.safetensors", "missing.safetensors"])
def test_merge_overwrites_only_when_it_is_told_to(connected, tmp_path, monkeypatch, capsys, reads):
    monkeypatch.chdir(tmp_path)
    for name in ("trained.safetensors", "merged.safetensors"):
        save_state_dict(connected.state_dict(), name)
    before = Path("merged.safetensors").read_bytes()
    assert main(["merge", reads, "merged.safetensors"]) == 2
    message = "merged.safetensors: already exists: choose another name, or overwrite it with --force"
    assert capsys.readouterr().err == f"m2pt: error: {message}\n"
    assert main(["merge", "--force", reads, "merged.safetensors"]) == (2 if reads.startswith("missing") else 0)
    assert (Path("merged.safetensors").read_bytes() == before) == reads.startswith("missing")
    shallow().load_state_dict(load_state_dict("merged.safetensors"), strict=not reads.startswith("missing"))


CHOICES = [
    ([], "the moving average was taken, not the raw weights"),
    (["--weights", "ema"], "the moving average was taken, not the raw weights"),
    (["--weights", "raw"], "the raw weights were taken, not their moving average"),
]


@pytest.mark.parametrize("option, said", CHOICES)
def test_merge_and_convert_say_which_weights_they_took(connected, tmp_path, capsys, option, said):
    model, average = connected.state_dict(), {name: value / 2 for name, value in connected.state_dict().items()}
    torch.save({"state_dict": model, "state_dict_ema": average}, tmp_path / "trained.pth.tar")
    assert main(["merge", str(tmp_path / "trained.pth.tar"), str(tmp_path / "merged.safetensors"), *option]) == 0
    merged = tmp_path / "merged.safetensors"
    assert capsys.readouterr().out == f"4 layers folded, written to {merged}; {said}\n"
    expected = merge_state_dict(model if "raw" in option else average)
    assert all(torch.equal(value, expected[name]) for name, value in load_state_dict(merged).items())

    plain = shallow().state_dict()
    average = {name: value / 2 for name, value in plain.items()}
    torch.save({"model": plain, "model_ema": average}, tmp_path / "plain.pth")
    assert main(["convert", *option, str(tmp_path / "plain.pth"), str(tmp_path / "timm.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"used, 0 dropped; {said}")
    expected = plain if "raw" in option else average
    converted = load_state_dict(tmp_path / "timm.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in converted.items())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_training_says_once_which_weights_of_an_auxiliary_model_it_took(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    aux = create_model("audio", "tiny", num_classes=0, depth=1, embed_dim=16, num_heads=2).state_dict()
    torch.save({"model": aux, "ema": aux}, tmp_path / "both.pth")
    torch.save({"model": aux}, tmp_path / "one.pth")
    settings = {"model.overrides.depth": 1, "model.overrides.embed_dim": 16, "model.overrides.num_heads": 2}
    for name, said in (("both.pth", "the moving average was taken, not the raw weights\n"), ("one.pth", "")):
        path = str(tmp_path / name)
        create_trained_model(load_recipe("tiny_image", settings | {"auxiliary.path": path}), 10, multi_label=False)
        assert capsys.readouterr().out == (f"{path}: {said}" if said and rank == "0" else "")


def test_nothing_is_said_of_weights_where_there_is_no_choice(connected, tmp_path, capsys):
    torch.save({"model": connected.state_dict()}, tmp_path / "trained.pth")
    for option in ([], ["--weights", "raw"]):
        assert main(["merge", "--force", str(tmp_path / "trained.pth"), str(tmp_path / "w.safetensors"), *option]) == 0
    assert capsys.readouterr().out == f"4 layers folded, written to {tmp_path / 'w.safetensors'}\n" * 2


def test_convert_writes_a_checkpoint_for_timm_and_reports_what_it_left_out(tmp_path, capsys):
    model = shallow()
    decoder = {"decoder_embed.weight": torch.ones(2), "decoder_norm.bias": torch.ones(2)}
    entries = model.state_dict() | decoder | {"mask_token": torch.ones(1)}
    torch.save({"model": {f"module.{name}": value for name, value in entries.items()}}, tmp_path / "mae.pth")
    assert main(["convert", str(tmp_path / "mae.pth"), str(tmp_path / "timm.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"timm, MAE, VideoMAE or DINOv2: {len(entries)} entries, {len(entries) - 3} used, 3 dropped",
        "dropped (decoder): module.decoder_embed.weight, module.decoder_norm.bias",
        "dropped (mask token): module.mask_token",
        f"written to {tmp_path / 'timm.safetensors'}",
    ]
    converted = load_state_dict(tmp_path / "timm.safetensors")
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(value, converted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert", "missing.pth", "out.safetensors"], "missing.pth: no such file"),
        (["convert", "plain.safetensors", "out.pth"], "ending in .safetensors"),
        (["convert", "connected.safetensors", "out.safetensors"], "merge it first with `m2pt merge`"),
        (["convert", "other.safetensors", "out.safetensors"], "other.safetensors: expected transformer blocks"),
        (
            ["convert", "one_byte.safetensors", "out.safetensors"],
            "blocks.0.attn.qkv.weight: expected a floating matrix",
        ),
        (["merge", "missing.pth", "out.safetensors"], "missing.pth: no such file"),
        (["merge", "plain.safetensors", "out.safetensors"], "plain.safetensors: there is no cross_modal_scale in it"),
        (["merge", "plain.safetensors", "connected.safetensors"], "connected.safetensors: already exists"),
        (["merge", "--weights", "ema", "connected.safetensors", "out.safetensors"], "there is no moving average"),
        (["convert", "--weights", "ema", "plain.safetensors", "out.safetensors"], "there is no moving average"),
        (["convert", ".", "out.safetensors"], ".: a folder without any of model.safetensors"),
        (["merge", "connected.safetensors", "out.pth"], "ending in .safetensors"),
        (["merge", "connected.safetensors", "missing/out.safetensors"], "missing/out.safetensors"),
        (["demo", "--seeds", "0"], "seeds: expected at least 2"),
        (["demo", "--out", "plain.safetensors"], "plain.safetensors"),
    ],
)
def test_errors_are_one_line(connected, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_state_dict(shallow().state_dict(), "plain.safetensors")
    save_state_dict(connected.state_dict(), "connected.safetensors")
    one_byte = {name: value.to(torch.float8_e4m3fn) for name, value in shallow().state_dict().items()}
    save_state_dict(one_byte, "one_byte.safetensors")
    save_state_dict({"conv1.weight": torch.ones(2)}, "other.safetensors")
    files = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("m2pt: error: ") and message in line
    assert sorted(tmp_path.iterdir()) == files


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(path, weights):
        raise KeyboardInterrupt

    monkeypatch.setattr("m2pt.checkpoints.read_weights", interrupt)
    assert main(["merge", "in", "out.safetensors"]) == 130
    assert capsys.readouterr().err == "m2pt: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_is_printed(arguments):
    code = f"import sys; sys.argv[1:] = {arguments}; from m2pt.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "m2pt" in run.stdout and not run.stderr


@pytest.mark.parametrize(
    "command, word",
    [
        ("train", "--aux-dtype"),
        ("pretrain", "--init"),
        ("eval", "--recipe"),
        ("matrix", "TOML"),
        ("merge", "OUT"),
        ("merge", "--force"),
        ("merge", "`module.` or `_orig_mod.`, that is removed"),
        ("convert", "OUT"),
        *((command, "--weights") for command in ("merge", "convert", "eval")),
    ],
)
def test_help_of_a_command_names_its_arguments(command, word, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"usage: m2pt {command}" in out and word in out


def test_help_of_convert_names_every_format(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for source_format in FORMATS:
        assert all(name in out for name in re.split(", | or |Hugging Face ", source_format.name))


@pytest.mark.parametrize("arguments", [[], ["train"], ["merge", "only-one"]])
def test_misuse_prints_the_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: m2pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, command, message",
    [
        ("trian tiny_image", "", r"argument command: .* got 'trian'; did you mean 'train'\?"),
        ("--versoin", "", r"unknown option --versoin; did you mean '--version'\?"),
        ("train tiny_image --outt runs", " train", r"unknown option --outt; did you mean '--out'\?"),
        ("train tiny_image --out a --aux-dtipe=int8", " train", r"unknown option --aux-dtipe; .* '--aux-dtype'\?"),
        (
            "train tiny_image --out a --aux-dtype bfloat",
            " train",
            r"--aux-dtype: .* got 'bfloat'; .* 'bfloat16' or .*\?",
        ),
        ("train tiny_image stray --out a", " train", "unrecognized arguments: stray: expected key=value .*"),
        ("recipes tiny_image -x", " recipes", "unrecognized arguments: -x: .*"),
        (
            "merge a b --weights emma",
            " merge",
            r"--weights: expected one of raw, ema; got 'emma'; did you mean 'ema'\?",
        ),
        ("merge a b c", " merge", "unrecognized arguments: c"),
        ("demo run.seed=1", " demo", "unrecognized arguments: run.seed=1"),
    ],
)
def test_misuse_is_told_with_the_command_s_usage_and_the_nearest_name(arguments, command, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: m2pt{command} [-h]")
    assert re.fullmatch(f"m2pt{command}: error: .*{message}", error)


def test_an_option_s_value_may_look_like_a_word_for_the_recipe(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(m2pt.train, "train", lambda recipe, out, resume: seen.append((recipe, out)) or {})
    assert main(["train", "--out", str(tmp_path / "a=b"), "tiny_image", "run.seed=7", "run.log_steps=3"]) == 0
    ((recipe, out),) = seen
    assert (recipe.run.seed, recipe.run.log_steps, out.name) == (7, 3, "a=b")


def test_a_misspelt_model_is_told_the_nearest(capsys):
    assert main(["check", "--model", "vit_tiny_patch16_24"]) == 2
    assert re.search(
        r"got 'vit_tiny_patch16_24'; did you mean 'vit_tiny_patch16_224'( or '\w+')*\?$", capsys.readouterr().err
    )


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    assert any(re.fullmatch(r"tiny_audio +Speaker identification: .*\.", line) for line in lines)
    assert main(["recipes", "tiny_audio", "schedule.epochs=7"]) == 0
    assert capsys.readouterr().out == load_recipe("tiny_audio", {"schedule.epochs": 7}).as_toml() + "\n"


def complete(line, folder):
    """What argcomplete answers the shell, which reads it from the eighth file."""
    code = "import os, sys; os.dup2(os.open('answer', os.O_CREAT | os.O_WRONLY), 8); from m2pt.cli import main\n"
    code += "try:\n    os._exit = sys.exit; main()\nfinally:\n    assert 'torch' not in sys.modules"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    shell |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | paths | shell, capture_output=True
    )
    assert finished.returncode == 0, finished.stderr
    return (folder / "answer").read_text().split("\n")


@pytest.mark.parametrize(
    "line, answer",
    [
        ("m2pt pre", ["pretrain"]),
        ("m2pt train tiny_p", ["tiny_point"]),
        ("m2pt eval a.safetensors --recipe own", ["own.toml"]),
        ("m2pt recipes image_imagenet_", ["image_imagenet_probe"]),
        ("m2pt train tiny_image --aux-dt", ["--aux-dtype"]),
        ("m2pt train tiny_image --aux-dtype b", ["bfloat16"]),
        ("m2pt merge own", ["own.safetensors", "own.toml"]),
    ],
)
def test_the_shell_completes(line, answer, tmp_path):
    pytest.importorskip("argcomplete")
    for name in ("own.toml", "own.safetensors"):
        (tmp_path / name).touch()
    assert sorted(word.strip() for word in complete(line, tmp_path)) == answer


def test_the_marker_of_argcomplete_is_where_it_looks():
    for module in ("cli", "__main__"):
        assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / "m2pt" / f"{module}.py").read_text("utf-8")[:1024]


def test_without_argcomplete_a_question_is_not_answered(monkeypatch, capsys):
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["recipes"]) == 0 and capsys.readouterr().out
