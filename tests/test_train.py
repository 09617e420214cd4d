"""Training from the command line: four modalities, resuming, merging, pretraining, evaluation and what is refused."""

import copy
import json
import math
import random
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import jaccard_score
from tiny_runs import (
    RECIPES,
    SIZES,
    WIDTH,
    assert_equal,
    assignments,
    has_extras,
    interrupted,
    make_data,
    need_extras,
    no_plots,
    tiny_model,
)
from torch import nn
from torch.autograd.graph import save_on_cpu

import m2pt.train.run
from m2pt import reparameterize_aux_into_target_model
from m2pt.checkpoint_formats import load_auxiliary, load_pretrained
from m2pt.checkpoints import load_state_dict, save_state_dict
from m2pt.cli import main
from m2pt.data import create_dataset
from m2pt.train import load_recipe, parse_assignment
from m2pt.train.batches import training_batches
from m2pt.train.deployment import deployed, probe_head
from m2pt.train.distributed import World, distribute
from m2pt.train.engine import Trainer, evaluate
from m2pt.train.files import load_trained
from m2pt.train.log import read_log
from m2pt.train.metrics import Metric, mean_average_precision, mious, part_ious, top_accuracies
from m2pt.train.optimization import create_loss, create_mixing, create_optimizer, create_scheduler, scaled_groups
from m2pt.train.recipe import Machine

pytestmark = pytest.mark.slow

OTHER = {"image": "audio", "audio": "point", "point": "video", "video": "image"}
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def files(folder):
    """Data of every modality under its name, and an auxiliary checkpoint of each."""
    torch.manual_seed(1)
    for modality in RECIPES:
        if has_extras(modality):
            make_data(modality, folder / modality)
        save_state_dict(tiny_model(modality, 0).state_dict(), folder / f"{modality}.safetensors")
    return folder


_no_plots = pytest.fixture(autouse=True)(no_plots)


def arguments(modality, files, *more):
    need_extras(modality)
    return [RECIPES[modality], "--data", str(files / modality), *assignments(modality), *more]


def run(modality, files, out, *more, code=0):
    """Train with the other modality's auxiliary model; the folder that it wrote to."""
    aux = ["--aux", str(files / f"{OTHER[modality]}.safetensors"), "--aux-modality", OTHER[modality]]
    assert main(["train", *arguments(modality, files, *aux, *more), "--out", str(out)]) == code
    return out


def tiny_recipe(modality, files, *more):
    values = dict(map(parse_assignment, [*assignments(modality), *more]))
    return load_recipe(RECIPES[modality], {"data.root": str(files / modality), **values})


def checkpoint(out):
    return torch.load(out / "last.pth", weights_only=True)


def log_without(out, *names):
    return [{name: value for name, value in line.items() if name not in names} for line in read_log(out)]


@pytest.mark.parametrize("modality", RECIPES)
def test_train_evaluate_and_merge(modality, files, tmp_path, capsys):
    out = run(modality, files, tmp_path / "run", "optimizer.base_lr=0.1")
    result = json.loads((out / "result.json").read_text())
    assert result["trained"] == result["merged"]
    expected = ", ".join(f"{name} {value:.2f}" for name, value in result["merged"].items())
    assert f"trained: {expected}\nmerged: {expected}\n" in capsys.readouterr().out
    for file in ("last.pth", "merged.safetensors"):
        evaluation = arguments(modality, files)[1:]
        assert main(["eval", str(out / file), "--recipe", RECIPES[modality], *evaluation]) == 0
        assert capsys.readouterr().out == f"{expected}\n"

    trained = checkpoint(out)["model"]
    scales = [value for name, value in trained.items() if name.endswith("cross_modal_scale")]
    assert len(scales) == 8 and all(scale != 0 for scale in scales)
    auxiliary = load_state_dict(files / f"{OTHER[modality]}.safetensors")
    merged = load_state_dict(out / "merged.safetensors")
    for layer in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        assert torch.equal(trained[f"{layer}.aux_weight"], auxiliary[f"{layer}.weight"])
        expected = trained[f"{layer}.weight"] + trained[f"{layer}.cross_modal_scale"] * auxiliary[f"{layer}.weight"]
        torch.testing.assert_close(merged[f"{layer}.weight"], expected)

    lines = read_log(out)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {line["model"] for line in lines if "model" in line} == {"trained", "merged"}


def test_curves_and_scales_are_drawn(files, tmp_path, monkeypatch):
    monkeypatch.undo()  # of `_no_plots`
    out = run("point", files, tmp_path / "run")
    assert (out / "curves.png").stat().st_size and (out / "scales.png").stat().st_size


def test_merged_image_model_is_timms(files, tmp_path):
    out = run("image", files, tmp_path / "run", "optimizer.base_lr=0.1")
    described = json.loads((out / "merged.json").read_text())
    assert described["function"] == "timm.create_model"
    assert described["arguments"]["model_name"] == "vit_base_patch16_224"
    model = timm.create_model(**described["arguments"]).eval()
    assert "drop_path_rate" not in described["arguments"] and all(
        type(block.attn.qkv) is nn.Linear for block in model.blocks
    )
    model.load_state_dict(load_state_dict(out / "merged.safetensors"))
    connected = tiny_model("image", 2)
    reparameterize_aux_into_target_model(connected, load_auxiliary(files / "audio.safetensors"))
    connected.load_state_dict(checkpoint(out)["model"])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), connected.eval()(images))


def test_training_learns(files, tmp_path):
    more = ("optimizer.base_lr=0.2", "loss.mixup=0.0", "loss.cutmix=0.0", "schedule.epochs=8", "run.eval_epochs=4")
    lines = read_log(run("image", files, tmp_path / "run", *more, "data.settings.rand_augment="))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert [line["step"] for line in lines if "top1" in line] == [8, 16, 16]
    assert lines[-1]["top1"] == 100


@pytest.mark.parametrize("stop", [3, 4])  # the end of the first epoch; inside the second
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_resumed_training_is_the_same_bit_for_bit(modality, stop, tmp_path):
    make_data(modality, tmp_path / modality, train=12, test=3)
    save_state_dict(tiny_model(OTHER[modality], 0).state_dict(), tmp_path / f"{OTHER[modality]}.safetensors")
    settings = [
        "run.ema_decay=0.5",
        "run.checkpoint_steps=1",
        "machine.accumulation=2",
        "model.overrides.drop_path_rate=0.5",
    ]
    whole = run(modality, tmp_path, tmp_path / "whole", *settings)

    with interrupted(stop):
        parts = run(modality, tmp_path, tmp_path / "parts", *settings, code=130)
    assert checkpoint(parts)["step"] == stop
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    run(modality, tmp_path, parts, *settings, "--resume")

    assert checkpoint(whole)["step"] == 6
    assert_equal(checkpoint(whole), checkpoint(parts))
    assert_equal(load_state_dict(whole / "merged.safetensors"), load_state_dict(parts / "merged.safetensors"))
    assert log_without(whole, "samples_per_second") == log_without(parts, "samples_per_second")


@pytest.mark.parametrize("storage", ["", "int8"])
def test_checkpoints_may_leave_the_auxiliary_weights_out(files, tmp_path, storage, monkeypatch):
    """A resumed run ends as one that was not interrupted, and `m2pt eval` finds the weights in their own file."""
    settings = ["run.ema_decay=0.5", "run.checkpoint_steps=1", f"auxiliary.dtype={storage}"]
    without = [*settings, "auxiliary.in_checkpoints=false"]
    whole = run("image", files, tmp_path / "whole", *settings)
    with interrupted(3):
        parts = run("image", files, tmp_path / "parts", *without, code=130)
    run("image", files, parts, *without, "--resume")
    state, expected = checkpoint(parts), checkpoint(whole)
    assert expected["step"] == 4 and "auxiliary" not in expected
    for part in ("model", "ema"):
        left_out = expected[part].keys() - state[part].keys()
        assert left_out == {name for name in expected[part] if "aux_weight" in name.rpartition(".")[2]} != set()
        assert_equal(state[part], {name: expected[part][name] for name in state[part]})
    assert_equal(state["optimizer"], expected["optimizer"])
    assert_equal(load_state_dict(whole / "merged.safetensors"), load_state_dict(parts / "merged.safetensors"))

    build, built = m2pt.train.run.build_plain, []
    monkeypatch.setattr("m2pt.train.run.build_plain", lambda *given: built.append(given[-1]) or build(*given))
    evaluation = [f"--recipe={RECIPES['image']}", *arguments("image", files)[1:], f"auxiliary.dtype={storage}"]
    evaluation.append(f"auxiliary.path={files / 'audio.safetensors'}")
    for out in (whole, parts):
        assert main(["eval", str(out / "last.pth"), *evaluation]) == 0
    assert_equal(*built)


DAMAGES = {
    "head.bias": lambda state: state["model"].pop("head.bias"),
    "surplus: only the checkpoint has it": lambda state: state["model"].update(surplus=torch.ones(1)),
    "head.weight": lambda state: state["ema"].pop("head.weight"),
    "optimizer state for": lambda state: state["optimizer"]["state"].pop(next(iter(state["optimizer"]["state"]))),
}


@pytest.mark.parametrize("setting", ["auxiliary.in_checkpoints=true", "auxiliary.in_checkpoints=false"])
def test_a_checkpoint_of_other_entries_is_not_resumed(files, tmp_path, setting, capsys):
    settings = [setting, "run.ema_decay=0.5", "schedule.epochs=1"]
    out = run("image", files, tmp_path / "run", *settings)
    for message, damage in DAMAGES.items():
        state = checkpoint(out)
        damage(state)
        (tmp_path / message).mkdir()
        torch.save(state, tmp_path / message / "last.pth")
        run("image", files, tmp_path / message, *settings, "--resume", code=2)
        assert message in capsys.readouterr().err


def test_an_evaluation_with_another_recipe_says_what_differs(files, tmp_path, capsys):
    out = run("image", files, tmp_path / "run")
    shutil.copy(out / "merged.safetensors", tmp_path / "moved.safetensors")
    evaluation = [f"--recipe={RECIPES['image']}", *arguments("image", files)[1:]]
    own = ["last.pth", "merged.safetensors"]
    for names, more, message in (
        (
            own,
            ["model.size=small", "model.overrides.embed_dim=96"],
            "model.size: the checkpoint was trained with 'base', the recipe says 'small'",
        ),
        (
            own,
            ["model.overrides.depth=3"],
            "model.overrides.depth: the checkpoint was trained with 2, the recipe says 3",
        ),
        (own, ["model.overrides.mlp_ratio=2"], "overrides.mlp_ratio: .* trained with no value, the recipe says 2"),
        (own, ["model.modality=audio"], "model.modality: .* trained with 'image', the recipe says 'audio'"),
        (["../moved.safetensors"], ["model.overrides.depth=1"], r"12 unexpected, such as blocks\.1\."),
        (
            ["../moved.safetensors"],
            ["model.overrides.img_size=64", "data.settings.size=64"],
            r"1 of other shapes, such as pos_embed: \(1, 17, 48\) for \(1, 65, 48\)",
        ),
    ):
        for file in names:
            assert main(["eval", str(out / file), *evaluation, *more]) == 2
            error = capsys.readouterr().err.replace(str(tmp_path), "")
            assert re.search(message, error) and len(error) < 200 and error.count("\n") == 1
        assert main(["eval", str(out / file), *evaluation, "model.overrides.drop_path_rate=0.3"]) == 0
        capsys.readouterr()


def test_leaving_out_what_is_not_there_changes_nothing(files, tmp_path):
    assert main(["train", *arguments("image", files, "auxiliary.in_checkpoints=false"), "--out", str(tmp_path)]) == 0
    assert "auxiliary" not in checkpoint(tmp_path)


def test_other_auxiliary_weights_than_those_left_out_are_refused(files, tmp_path, capsys):
    aux = shutil.copy(files / "audio.safetensors", tmp_path / "audio.safetensors")
    settings = [f"auxiliary.path={aux}", "auxiliary.in_checkpoints=false"]
    out = run("image", files, tmp_path / "run", *settings)
    weights = load_state_dict(aux)
    weights["blocks.1.mlp.fc2.weight"][0, 0] += 1
    save_state_dict(weights, aux)
    digest, modality = checkpoint(out)["auxiliary"][str(aux)], f"auxiliary.modality={OTHER['image']}"
    evaluation = [f"--recipe={RECIPES['image']}", *arguments("image", files)[1:]]
    for command, status in (
        (["eval", str(out / "last.pth"), *evaluation, settings[0]], 2),
        (["train", *arguments("image", files), "--out", str(out), *settings, modality, "--resume"], 2),
    ):
        assert main(command) == status
        error = capsys.readouterr().err
        assert "auxiliary.path: these weights differ from those that the checkpoint leaves out" in error
        assert f"expected {digest}" in error
    assert main(["eval", str(out / "last.pth"), f"--recipe={RECIPES['image']}", f"--data={files / 'image'}"]) == 2
    assert main(["merge", str(out / "last.pth"), str(tmp_path / "merged.safetensors")]) == 2
    assert "blocks.0.attn.qkv.aux_weight is missing, as with auxiliary.in_checkpoints=false" in capsys.readouterr().err
    run("image", files, tmp_path / "trained", "--train-aux", *settings, code=2)
    assert "in_checkpoints: expected true with trainable" in capsys.readouterr().err


def test_auxiliary_models_that_were_exchanged_are_refused(files, tmp_path, capsys):
    paths = [str(files / "audio.safetensors"), str(tmp_path / "other.safetensors")]
    save_state_dict(tiny_model("audio", 0).state_dict(), paths[1])
    state = [f"auxiliary.path={paths!r}".replace("'", '"'), "auxiliary.in_checkpoints=false"]
    out = run("image", files, tmp_path / "run", *state)
    evaluation = ["eval", str(out / "last.pth"), f"--recipe={RECIPES['image']}", *arguments("image", files)[1:]]
    assert main([*evaluation, state[0]]) == 0
    assert main([*evaluation, f"auxiliary.path={paths[::-1]!r}".replace("'", '"')]) == 2
    assert "auxiliary.path: these weights differ" in capsys.readouterr().err
    damaged = checkpoint(out) | {"auxiliary": {"audio": 3}}
    torch.save(damaged, out / "last.pth")
    assert main([*evaluation, state[0]]) == 2
    assert f"{out / 'last.pth'}: expected the SHA-256 of auxiliary models" in capsys.readouterr().err


def test_a_run_begun_before_a_setting_existed_is_resumed(files, tmp_path):
    out = run("image", files, tmp_path / "run", "schedule.epochs=1")
    state = torch.load(out / "last.pth", weights_only=True)
    for key in ("blocks", "in_checkpoints"):
        del state["recipe"]["auxiliary"][key]
    torch.save(state, out / "last.pth")
    run("image", files, out, "schedule.epochs=1", "--resume")


def test_steps_inside_backward_are_the_same_bit_for_bit_and_may_be_switched_on_later(files, tmp_path):
    settings = ["run.ema_decay=0.5", "optimizer.base_lr=0.1", "optimizer.scale_learning_rate=10.0"]
    settings += ["--aux-dtype=int8", "run.checkpoint_steps=1"]
    inside = "machine.step_in_backward=true"
    after = run("image", files, tmp_path / "after", *settings)
    with interrupted(1):
        run("image", files, tmp_path / "inside", *settings, code=130)
    with interrupted(3):
        run("image", files, tmp_path / "inside", *settings, inside, "--resume", code=130)
    out = run("image", files, tmp_path / "inside", *settings, inside, "--resume")
    for key in ("model", "ema", "optimizer", "step"):
        assert_equal(checkpoint(out)[key], checkpoint(after)[key])
    unlike = ("gradient_norm", "samples_per_second")
    assert log_without(out, *unlike) == log_without(after, *unlike)
    assert all("gradient_norm" in line for line in read_log(after) if "loss" in line)
    assert [line["step"] for line in read_log(out) if "gradient_norm" in line] == [1]


def test_the_moving_average_is_what_is_evaluated_and_merged(files, tmp_path, capsys):
    out = run("image", files, tmp_path / "run", "run.ema_decay=0.5", "optimizer.base_lr=1.0")
    average, last = (deployed(checkpoint(out)[key]) for key in ("ema", "model"))
    assert_equal(load_state_dict(out / "merged.safetensors"), average)
    assert_equal(deployed(load_trained(out / "last.pth")[0]), average)
    assert not torch.equal(average["head.weight"], last["head.weight"])
    for option, weights, said in (
        ([], average, "the moving average was taken, not the raw weights"),
        (["--weights=raw"], last, "the raw weights were taken, not their moving average"),
    ):
        save_state_dict(weights, tmp_path / "expected.safetensors")
        evaluation = [f"--recipe={RECIPES['image']}", *arguments("image", files)[1:]]
        capsys.readouterr()
        assert main(["eval", str(tmp_path / "expected.safetensors"), *evaluation]) == 0
        expected = capsys.readouterr().out
        assert main(["eval", str(out / "last.pth"), *option, *evaluation]) == 0
        assert capsys.readouterr().out == f"{out / 'last.pth'}: {said}\n{expected}"


def test_the_moving_average_needs_timms_of_float32(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("m2pt.train.engine.ModelEmaV3", lambda model, decay: None)
    run("image", files, tmp_path, "run.ema_decay=0.5", code=2)
    assert capsys.readouterr().err.endswith("1.0.31 has no float32 average: pip install 'm2pt-triton[train]'\n")


def test_the_moving_average_keeps_float8_auxiliary_weights(files, tmp_path):
    out = run("image", files, tmp_path / "run", "run.ema_decay=0.5", "--aux-dtype", "float8_e4m3fn")
    average, last = (checkpoint(out)[key] for key in ("ema", "model"))
    name = "blocks.0.mlp.fc1.aux_weight"
    assert average[name].dtype == torch.float8_e4m3fn
    assert torch.equal(average[name].view(torch.uint8), last[name].view(torch.uint8))


def test_resume_wants_the_same_recipe_but_not_the_same_machine(files, tmp_path, capsys):
    out = run("image", files, tmp_path / "run")
    before = checkpoint(out)
    run("image", files, out, code=2)
    assert "there is a run in it already" in capsys.readouterr().err
    run("image", files, out, "--resume", "optimizer.weight_decay=0.1", code=2)
    assert "optimizer.weight_decay is 0.1, was 0.05" in capsys.readouterr().err
    run("image", files, tmp_path / "none", "--resume", code=2)
    assert "there is no run to resume" in capsys.readouterr().err
    run("image", files, out, "--resume", "machine.accumulation=2")
    assert_equal(checkpoint(out), before)


def test_interrupted_while_saving_keeps_the_last_complete_checkpoint(files, tmp_path, monkeypatch):
    save, saved = torch.save, []

    def interrupted(state, file):
        if saved:
            file.write(b"half")
            raise KeyboardInterrupt
        saved.append(state["step"])
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        out = run("point", files, tmp_path / "run", code=130)
    assert checkpoint(out)["step"] == saved[0] == 2
    assert not list(out.glob("*.partial"))
    run("point", files, out, "--resume")
    assert checkpoint(out)["step"] == 4


def test_a_loss_that_is_not_finite_stops_with_the_step(files, tmp_path, capsys):
    out = run("point", files, tmp_path / "run", "optimizer.base_lr=1e30", "schedule.warmup_lr=0.0", code=2)
    assert "m2pt: error: step 1: the loss is nan" in capsys.readouterr().err
    assert not (out / "result.json").exists()


UPDATES = {
    "fused": [],
    "not fused": ["optimizer.name=momentum"],
    "clipped": ["optimizer.clip_grad=1.0"],
    "in backward": ["machine.step_in_backward=true"],
    "in backward, not fused": ["machine.step_in_backward=true", "optimizer.name=momentum"],
    "float16": ["machine.precision=float16"],
}


def trainer_of(model, files, *more):
    recipe = tiny_recipe("image", files, *more)
    return Trainer(model, lambda model, batch: model(batch).float().square().mean(), recipe, ALONE, 2)


@pytest.mark.parametrize("update", UPDATES)
def test_no_update_is_made_from_the_first_loss_on_that_is_not_finite(update, files):
    model = tiny_model("image", 2)
    trainer = trainer_of(model, files, *UPDATES[update])
    images = torch.randn(4, 3, 32, 32)
    trainer.update([images])
    assert math.isfinite(trainer.metrics()["loss"])
    trainer.update([images])
    before = copy.deepcopy(model.state_dict())
    trainer.update([images * math.inf])
    for _ in range(3):
        trainer.update([images])
    for read in (trainer.metrics, trainer.state_dict, trainer.metrics):
        with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
            read()
    assert trainer.step == 2
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("update", ["in backward", "in backward, not fused"])
def test_a_gradient_that_is_not_finite_is_not_applied_in_backward(files, update):
    model = tiny_model("image", 2)
    trainer = trainer_of(model, files, *UPDATES[update], "optimizer.base_lr=1.0", "schedule.warmup_lr=0.1")
    weight = model.blocks[1].mlp.fc1.weight
    before = copy.deepcopy(model.state_dict())
    weight.register_hook(lambda gradient: gradient * math.nan)
    trainer.update([torch.randn(4, 3, 32, 32)])
    with pytest.raises(FloatingPointError, match="step 0: the norm of the gradient is nan"):
        trainer.metrics()
    found = trainer.first_not_finite([])
    assert found == "the first that is not finite is the gradient of blocks.1.mlp.fc1.weight"
    assert torch.equal(weight, before["blocks.1.mlp.fc1.weight"]) and weight.grad is None
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_gradient_scaler_leaves_a_step_out_and_training_goes_on(files):
    model = tiny_model("image", 2)
    trainer = trainer_of(model, files, *UPDATES["float16"], "run.ema_decay=0.5")
    images = torch.randn(4, 3, 32, 32)
    poison = model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    before, scale = copy.deepcopy(model.state_dict()), trainer.scaler.get_scale()
    trainer.update([images])
    assert not math.isfinite(trainer.metrics()["gradient_norm"]) and trainer.scaler.get_scale() == scale / 2
    assert_equal(model.state_dict(), before)
    poison.remove()
    for _ in range(2):
        trainer.update([images])
    assert trainer.state_dict()["step"] == 3 and not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("fused", [None, False])
def test_a_run_of_an_optimizer_that_was_not_fused_is_resumed(files, tmp_path, fused):
    settings = ["run.checkpoint_steps=1", "schedule.epochs=2"]
    with interrupted(3):
        out = run("image", files, tmp_path, *settings, code=130)
    state = checkpoint(out)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = fused
    torch.save(state, out / "last.pth")
    run("image", files, out, *settings, "--resume")
    assert all(group["fused"] for group in checkpoint(out)["optimizer"]["param_groups"])


def test_adam_with_states_of_a_byte(files, tmp_path, monkeypatch):
    """On the CPU, where bitsandbytes has the same update; timm's check for a GPU is answered with yes."""
    pytest.importorskip("bitsandbytes")

    def create_on_cpu(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return create_optimizer(*arguments)

    monkeypatch.setattr("m2pt.train.engine.create_optimizer", create_on_cpu)
    start = ["--init", str(files / "image.safetensors"), "optimizer.base_lr=0.1"]
    exact = run("image", files, tmp_path / "exact", *start)
    settings = [*start, "optimizer.name=bnbadamw8bit"]
    whole = run("image", files, tmp_path / "whole", *settings)
    settings += ["machine.step_in_backward=true", "run.checkpoint_steps=1"]
    with interrupted(3):
        run("image", files, tmp_path / "parts", *settings, code=130)
    parts = run("image", files, tmp_path / "parts", *settings, "--resume")
    for key in ("model", "optimizer", "step"):
        assert_equal(checkpoint(parts)[key], checkpoint(whole)[key])
    name = "blocks.0.mlp.fc1.weight"
    states = checkpoint(whole)["optimizer"]["state"][name]["__bnb_optimizer_quant_state__"]
    assert states["state1"].dtype == states["state2"].dtype == torch.uint8
    begin = load_state_dict(files / "image.safetensors")[name]
    expected, found = (checkpoint(out)["model"][name] for out in (exact, whole))
    assert 0 < (found - expected).norm() < 0.02 * (expected - begin).norm()


def test_auxiliary_weights_are_trained_on_demand_in_their_dtype(files, tmp_path):
    auxiliary = load_state_dict(files / "audio.safetensors")["blocks.0.mlp.fc1.weight"].bfloat16()
    fast = "optimizer.base_lr=1.0"
    frozen = run("image", files, tmp_path / "frozen", fast, "--aux-dtype", "bfloat16")
    trained = run("image", files, tmp_path / "trained", fast, "--aux-dtype", "bfloat16", "--train-aux")
    weights = [checkpoint(out)["model"]["blocks.0.mlp.fc1.aux_weight"] for out in (frozen, trained)]
    assert torch.equal(weights[0], auxiliary)
    assert weights[1].dtype == torch.bfloat16 and not torch.equal(weights[1], auxiliary)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_several_auxiliary_models(files, tmp_path, dtype):
    """One after the other on the command line; the shallower one is connected to the last block."""
    shallow = tmp_path / "shallow.safetensors"
    entries = load_state_dict(files / "point.safetensors")
    blocks = {name: tensor for name, tensor in entries.items() if name.startswith("blocks.0.")}
    save_state_dict(blocks, shallow)
    more = ["--aux", str(shallow), "--aux-dtype", dtype, "auxiliary.blocks=last", "optimizer.base_lr=1.0"]
    out = run("image", files, tmp_path / "run", *more)
    result = json.loads((out / "result.json").read_text())
    assert result["trained"] == result["merged"]
    trained = checkpoint(out)["model"]
    first, last = (f"blocks.{block}.mlp.fc1" for block in range(2))
    assert trained[f"{first}.cross_modal_scale"].shape == (1,) and trained[f"{last}.cross_modal_scale"].shape == (2,)
    assert all(scale != 0 for scale in trained[f"{last}.cross_modal_scale"])
    if dtype == "bfloat16":
        expected = [entries["blocks.0.mlp.fc1.weight"], load_state_dict(files / "audio.safetensors")[f"{last}.weight"]]
        assert torch.equal(trained[f"{last}.aux_weight"], torch.stack(expected[::-1]).bfloat16())


def test_auxiliary_weights_at_one_byte(files, tmp_path, capsys):
    out = run("image", files, tmp_path / "int8", "optimizer.base_lr=1.0", "--aux-dtype", "int8")
    model = checkpoint(out)["model"]
    assert model["blocks.0.mlp.fc1.aux_weight"].dtype == torch.int8
    assert model["blocks.0.mlp.fc1.cross_modal_scale"] != 0
    result = json.loads((out / "result.json").read_text())
    assert result["merged"] == result["trained"]
    run("image", files, tmp_path / "no", "--aux-dtype", "int8", "--train-aux", code=2)
    assert "trainable" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(precision, files, tmp_path):
    out = run("image", files, tmp_path / "run", f"machine.precision={precision}", "schedule.epochs=1")
    state = checkpoint(out)
    assert all(value.dtype == torch.float32 for value in state["model"].values())
    assert bool(state["scaler"]) == (precision == "float16")
    run("image", files, out, "--resume", f"machine.precision={precision}", "schedule.epochs=1")
    assert_equal(checkpoint(out), state)


def test_activation_checkpointing_and_offloading_change_nothing(files, tmp_path):
    plain = run("image", files, tmp_path / "plain", "schedule.epochs=1")
    checkpointing = ("schedule.epochs=1", "machine.checkpoint_activations=true")
    again = run("image", files, tmp_path / "again", *checkpointing)
    torch.testing.assert_close(checkpoint(again)["model"], checkpoint(plain)["model"])
    inside = ("machine.offload_activations=true", "machine.step_in_backward=true")
    offloaded = run("image", files, tmp_path / "offloaded", *checkpointing, *inside)
    assert_equal(checkpoint(offloaded)["model"], checkpoint(again)["model"])


def test_offloaded_are_the_inputs_of_blocks(files, monkeypatch):
    """A copy is made of every block's input, and of no weight of a block."""
    packed = []

    class Packing(save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (packed.append(tensor.data_ptr()), pack(tensor))[1]

    monkeypatch.setattr("m2pt.train.engine.save_on_cpu", Packing)
    machine = ("machine.checkpoint_activations=true", "machine.offload_activations=true")
    model = tiny_model("image", 2)
    model.set_grad_checkpointing()
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, inputs_: inputs.append(inputs_[0].data_ptr()))
    trainer = Trainer(model, lambda model, batch: model(batch).mean(), tiny_recipe("image", files, *machine), ALONE, 2)
    trainer.update([torch.randn(4, 3, 32, 32)])
    assert set(inputs[:2]) <= set(packed)
    assert not {parameter.data_ptr() for parameter in model.blocks.parameters()} & set(packed)


def test_micro_batches_are_one_batch(files, tmp_path):
    settings = ["loss.mixup=0.0", "loss.cutmix=0.0", "model.overrides.drop_path_rate=0.0"]
    settings += ["optimizer.name=momentum", "optimizer.base_lr=1.0"]
    whole = run("image", files, tmp_path / "whole", *settings)
    parts = run("image", files, tmp_path / "parts", *settings, "machine.accumulation=4")
    torch.testing.assert_close(checkpoint(parts)["model"], checkpoint(whole)["model"])


def test_linear_probe_trains_head_and_scales_and_folds_the_normalisation(files, tmp_path):
    tiny = assignments("image")
    aux = ["--aux", str(files / "audio.safetensors")]
    init = ["--init", str(files / "image.safetensors"), "model.overrides.global_pool=avg"]
    command = ["train", "image_imagenet_probe", "--data", str(files / "image"), *aux, *init, *tiny]
    assert main([*command, "--out", str(tmp_path), "optimizer.base_lr=20.0"]) == 0
    trained, start = checkpoint(tmp_path)["model"], load_state_dict(files / "image.safetensors")
    changed = {name for name, value in trained.items() if name in start and not torch.equal(value, start[name])}
    assert not changed and all(value != 0 for name, value in trained.items() if name.endswith("_scale"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["trained"] == result["merged"]
    assert load_state_dict(tmp_path / "merged.safetensors")["head.weight"].shape == (2, 48)


def test_folded_probe_head_computes_the_same():
    head = probe_head(nn.Linear(5, 3)).train()
    for _ in range(20):
        head(3 * torch.randn(16, 5) + 1)
    head.eval()
    folded = deployed({f"head.{name}": value for name, value in head.state_dict().items()})
    features = torch.randn(4, 5)
    expected = nn.functional.linear(features, folded["head.weight"], folded["head.bias"])
    torch.testing.assert_close(expected, head(features))


def test_part_segmentation(tmp_path, files, capsys):
    make_data("parts", tmp_path / "data")
    settings = [*assignments("point"), "optimizer.base_lr=1.0"]
    command = ["train", "point_shapenetpart", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main([*command, "--aux", str(files / "image.safetensors"), *settings]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trained"] == result["merged"] and result["merged"].keys() == {"instance_miou", "class_miou"}


def test_few_shot(tmp_path, files):
    make_data("point", tmp_path / "data", train=8, test=40)
    settings = [*assignments("point"), "data.settings.way=2", "data.settings.shot=3"]
    command = ["train", "point_modelnet40_few_shot", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main([*command, "--aux", str(files / "image.safetensors"), *settings]) == 0
    assert checkpoint(tmp_path / "run")["step"] == 2  # 6 samples are one batch of 4 an epoch


@pytest.mark.parametrize("modality", RECIPES)
def test_pretraining_serves_as_start_and_as_auxiliary(modality, files, tmp_path):
    need_extras(modality)
    out, decoder = tmp_path / "mae", {"decoder_width": 48, "decoder_depth": 1, "decoder_heads": 3}
    settings = [entry for entry in assignments(modality) if "clips" not in entry and "crops" not in entry]
    layout = ["data.layout=esc50", "data.train_split=train"] if modality == "audio" else []
    settings += [*layout, *(f"pretraining.{name}={value}" for name, value in decoder.items())]
    command = ["pretrain", f"pretrain_{modality}", "--data", str(files / modality), "--out", str(out), *settings]
    assert main([*command, "optimizer.base_lr=0.05", "schedule.epochs=3"]) == 0
    losses = [line["loss"] for line in read_log(out)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    model = tiny_model(modality, 2)
    load_pretrained(model, out / "pretrained.safetensors")
    pretrained = load_state_dict(out / "pretrained.safetensors")
    assert torch.equal(model.blocks[1].mlp.fc2.weight, pretrained["blocks.1.mlp.fc2.weight"])
    assert torch.equal(
        load_auxiliary(out / "pretrained.safetensors").blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight
    )


def test_recipes_are_for_one_command(files, tmp_path, capsys):
    data = ["--data", str(files / "image"), "--out", str(tmp_path)]
    assert main(["train", "pretrain_image", *data]) == 2
    assert "m2pt pretrain" in capsys.readouterr().err
    assert main(["pretrain", "image_imagenet", *data]) == 2
    assert "m2pt train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["data.batch_size=10"], "data.batch_size: 10, but split 'train' has 8 samples"),
        (
            ["machine.accumulation=3"],
            "data.batch_size: expected a multiple of 6 for 1 processes, 3 micro-batches and mixed pairs",
        ),
        (["machine.sharding=fsdp"], "machine.sharding: 'fsdp' needs several processes"),
        (
            ["machine.step_in_backward=true", "machine.accumulation=2"],
            "machine.accumulation: expected 1 with step_in_backward, got 2",
        ),
        (
            ["machine.step_in_backward=true", "machine.precision=float16"],
            "machine.precision: expected 'bfloat16' or 'float32' with step_in_backward",
        ),
        (["machine.step_in_backward=true", "machine.compile=true"], "machine.compile: a compiled model's gradients"),
        (
            ["machine.step_in_backward=true", "optimizer.clip_grad=1.0"],
            "optimizer.clip_grad: expected 0 with machine.step_in_backward, got 1.0",
        ),
        (["machine.offload_activations=true"], "machine.offload_activations: expected checkpoint_activations = true"),
        (["machine.step_in_backward=true", "optimizer.name=lamb"], "optimizer: expected one that updates every"),
        (["model.overrides.depth=3"], "']: expected 3 blocks"),
        (["data.settings.colour=1"], "setting of layout folder: expected one of"),
        (["data.test_split=none"], "split: expected one of"),
        (["model.init=none.pth"], "none.pth: no such file"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(more, message, files, tmp_path, capsys):
    run("image", files, tmp_path / "run", *more, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("m2pt: error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_eval_refuses_another_model(files, tmp_path, capsys):
    data = ["--recipe", "image_imagenet", "--data", str(files / "image"), *assignments("image")]
    assert main(["eval", str(files / "audio.safetensors"), *data]) == 2
    assert "patch_embed.proj.weight" in capsys.readouterr().err


# -- parts --


def test_batches_do_not_depend_on_processes_passes_or_workers(files):
    dataset = create_dataset("image", "folder", files / "image", "train", True, size=32)

    def step(number, world, **machine):
        recipe = tiny_recipe("image", files, *(f"machine.{name}={value}" for name, value in machine.items()))
        batches = training_batches(dataset, recipe, world, number)
        return torch.cat([next(batches)[0] for _ in range(recipe.machine.accumulation)])

    whole = step(1, ALONE)
    assert torch.equal(step(1, ALONE, accumulation=2), whole)
    assert torch.equal(step(1, ALONE, workers=1), whole)
    shares = [step(1, World(rank, 2, torch.device("cpu"))) for rank in range(2)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), whole)
    assert not torch.equal(step(3, ALONE), whole)


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order(files):
    clouds = create_dataset("point", "modelnet40", files / "point", "train", True, points=64)
    dataset = [(torch.tensor(index), label) for index, label in enumerate(clouds.labels)]
    batches = list(training_batches(dataset, tiny_recipe("point", files), ALONE, 0))
    seen = torch.cat([input for input, _ in batches]).view(2, -1)
    assert [sorted(epoch.tolist()) for epoch in seen] == [list(range(8))] * 2 and not torch.equal(seen[0], seen[1])


def connected_model(files):
    return reparameterize_aux_into_target_model(tiny_model("image", 2), load_auxiliary(files / "audio.safetensors"))


def test_optimizer_groups(files):
    recipe = tiny_recipe("image", files, "optimizer.scale_learning_rate=10.0", "optimizer.layer_decay=0.5")
    model = connected_model(files)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates, decays = {}, {}
    for group in scaled_groups(model, recipe):
        for parameter in group["params"]:
            rates[names[id(parameter)]], decays[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert rates.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rates["patch_embed.proj.weight"] == rates["pos_embed"] == 0.125
    assert rates["blocks.0.attn.qkv.weight"] == 0.25 and rates["blocks.1.attn.qkv.weight"] == 0.5
    assert rates["blocks.0.attn.qkv.cross_modal_scale"] == 2.5
    assert rates["blocks.1.mlp.fc2.cross_modal_scale"] == 5.0
    assert rates["head.weight"] == 1
    assert decays["blocks.0.attn.qkv.weight"] == 0.05
    assert not any(decays[name] for name in decays if name.endswith(("bias", "cross_modal_scale", "pos_embed")))


def test_learning_rate_follows_warmup_and_cosine(files):
    recipe = tiny_recipe("image", files, "schedule.epochs=10", "schedule.warmup_epochs=2", "schedule.min_lr=1e-6")
    optimizer = create_optimizer(connected_model(files), recipe)
    scheduler = create_scheduler(optimizer, recipe, updates_per_epoch=5)
    head = max(range(len(optimizer.param_groups)), key=lambda index: optimizer.param_groups[index]["lr_scale"])
    peak = 5e-4 * 4 / 256
    for step in (0, 3, 10, 20, 49):
        scheduler.step_update(step)
        expected = (
            peak * step / 10 if step < 10 else 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        )
        assert optimizer.param_groups[head]["lr"] == pytest.approx(expected)


def test_a_warmup_that_is_too_long_is_shortened_said_once_and_resumed(files, tmp_path, capsys):
    settings = ["schedule.epochs=2", "schedule.warmup_epochs=2", "run.checkpoint_steps=1"]
    line = (
        "m2pt: schedule.warmup_epochs: 2 is not less than schedule.epochs (2): the warm-up is shortened to 0.2 epochs"
    )
    whole = run("image", files, tmp_path / "whole", *settings)
    assert [each for each in capsys.readouterr().err.splitlines() if each.startswith("m2pt: ")] == [line]
    with interrupted(1):
        parts = run("image", files, tmp_path / "parts", *settings, code=130)
    run("image", files, parts, *settings, "--resume")
    assert_equal(checkpoint(parts), checkpoint(whole))


def test_lars_adapts_matrices_only(files):
    recipe = tiny_recipe("image", files, "optimizer.name=lars", "optimizer.weight_decay=0.0")
    for group in create_optimizer(connected_model(files), recipe).param_groups:
        assert group["always_adapt"] == all(parameter.ndim > 1 for parameter in group["params"])


def test_ddp_refuses_steps_inside_backward():
    with pytest.raises(ValueError, match=r"machine.step_in_backward: DDP .*machine.sharding=fsdp"):
        distribute(nn.Linear(2, 2), Machine(step_in_backward=True), World(0, 2, torch.device("cpu")))


def test_optimizers_of_bitsandbytes_need_whole_parameters_a_gpu_and_their_package(files, monkeypatch):
    pytest.importorskip("bitsandbytes")

    def create(*more):
        create_optimizer(tiny_model("image", 2), tiny_recipe("image", files, "optimizer.name=bnbadamw8bit", *more))

    with pytest.raises(ValueError, match=r"optimizer.name: bnbadamw8bit .*machine.sharding=fsdp"):
        create("machine.sharding=fsdp")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"optimizer.name: bnbadamw8bit: CUDA required"):
        create()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"bitsandbytes .*pip install 'm2pt-triton\[adam8bit\]'"):
        create()


def test_losses_against_torch():
    logits, classes = torch.randn(4, 5), torch.randint(5, (4,))
    recipe = load_recipe("image_imagenet")
    cross_entropy = create_loss(recipe.loss)
    expected = nn.functional.cross_entropy(logits, classes, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, classes), expected)
    soft = torch.rand(4, 5).softmax(1)
    torch.testing.assert_close(cross_entropy(logits, soft), nn.functional.cross_entropy(logits, soft))
    points, labels = torch.randn(2, 7, 5), torch.randint(5, (2, 7))
    expected = nn.functional.cross_entropy(points.mT, labels, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(points, labels), expected)
    several = torch.randint(2, (4, 5)).float()
    binary = create_loss(load_recipe("audio_audioset").loss)
    torch.testing.assert_close(binary(logits, several), nn.functional.binary_cross_entropy_with_logits(logits, several))


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0)])
def test_videos_are_mixed_alike_in_all_frames(mixup, cutmix):
    recipe = load_recipe("video_kinetics400", {"loss.mixup": mixup, "loss.cutmix": cutmix, "loss.label_smoothing": 0.0})
    mix = create_mixing(recipe.loss, 2)
    video = torch.stack([torch.zeros(3, 4, 16, 16), torch.ones(3, 4, 16, 16)])
    np.random.seed(0)
    mixed, target = mix(video.clone(), torch.tensor([0, 1]))
    assert mixed.shape == video.shape and torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))
    assert 0 < target[0, 1] < 1
    torch.testing.assert_close(mixed[0].mean(), target[0, 1])


def test_probabilities_of_several_classes_need_the_binary_loss(tmp_path, capsys, files):
    need_extras("audio")
    audio = files / "audio" / "audio"
    (audio / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/a,low\n1,/m/b,high\n")
    rows = [{"wav": f"train{index}.wav", "labels": ("/m/a", "/m/a,/m/b")[index % 2]} for index in range(8)]
    (audio / "train.json").write_text(json.dumps({"data": rows}))
    (audio / "eval.json").write_text(json.dumps({"data": rows[:3]}))
    command = ["train", "audio_audioset", "--data", str(audio), "--out", str(tmp_path / "run"), *assignments("audio")]
    assert main([*command, "loss.name=cross_entropy"]) == 2
    assert "loss.name: samples with several classes need 'binary_cross_entropy'" in capsys.readouterr().err
    assert main(command) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trained"] == result["merged"] and 0 < result["merged"]["map"] <= 100


def test_a_stream_of_shards_is_trained_on_and_resumed(files, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    shards = tmp_path / "shards"
    shards.mkdir()
    for split, count in (("train", 8), ("val", 4)):
        with webdataset.TarWriter(str(shards / f"{split}-0.tar")) as tar:
            for index in range(count):
                file = sorted((files / "image" / split).rglob("*.png"))[index]
                tar.write({"__key__": f"{index:04}", "png": file.read_bytes(), "cls": index % 2})
    splits = {
        split: {"name": split, "num_samples": count, "filenames": [f"{split}-0.tar"], "shard_lengths": [count]}
        for split, count in (("train", 8), ("val", 4))
    }
    (shards / "info.json").write_text(json.dumps({"splits": splits}))
    command = ["train", "image_imagenet", "--data", str(shards), *assignments("image"), "machine.workers=1"]
    command += ["data.layout=webdataset", "data.settings.num_classes=2", "run.checkpoint_steps=1"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    with interrupted(3):
        assert main([*command, "--out", str(tmp_path / "parts")]) == 130
    assert main([*command, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert_equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


def test_logits_are_averaged_over_views(files):
    dataset = create_dataset("point", "modelnet40", files / "point", "test", False, points=64, votes=3)
    recipe = tiny_recipe("point", files, "data.settings.votes=3")
    model = tiny_model("point", 2).eval()
    samples = [dataset[index] for index in range(len(dataset))]
    batches = torch.utils.data.DataLoader(samples, 2)
    kept = Metric(lambda logits, input, target: (logits, target), lambda rows, target: {"logits": rows})
    logits = evaluate(model, dataset, batches, kept, recipe.machine, ALONE)["logits"]
    expected = torch.stack([model(views).mean(0) for views, _ in samples])
    torch.testing.assert_close(logits, expected)


def test_top_accuracies():
    logits = torch.arange(12.0).repeat(4, 1)
    assert top_accuracies(logits, torch.tensor([11, 7, 6, 0])) == {"top1": 25.0, "top5": 50.0}


def test_mean_average_precision_leaves_out_classes_that_do_not_occur():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.1, 0.6, 0.5]])
    target = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]])
    # first class: ranks 1 and 3 of 3, (1 + 2/3) / 2; second: rank 2, 1/2; third: no sample
    assert mean_average_precision(scores, target)["map"] == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="no sample has a class"):
        mean_average_precision(scores, torch.zeros(3, 3))


def test_mean_intersection_over_union_against_sklearn():
    parts = [range(0, 3), range(3, 5)]
    category = torch.tensor([0, 1, 0])
    logits = torch.randn(3, 40, 5)
    target = torch.stack([torch.randint(parts[c].start, parts[c].stop, (40,)) for c in category.tolist()])
    target[0][target[0] == 2] = 1  # a part that is not there,
    logits[0, :, 2] = -100  # and not predicted
    ious, _ = part_ious(logits, category, target, parts)
    expected = []
    for shape, c in enumerate(category.tolist()):
        predicted = logits[shape, :, parts[c].start : parts[c].stop].argmax(1) + parts[c].start
        scores = jaccard_score(target[shape], predicted, labels=list(parts[c]), average=None, zero_division=1)
        expected.append(scores.mean())
    np.testing.assert_allclose(ious.squeeze(1), expected, rtol=1e-6)
    by_class = (np.mean([expected[0], expected[2]]) + expected[1]) / 2
    result = mious(ious, category)
    assert result["instance_miou"] == pytest.approx(100 * np.mean(expected))
    assert result["class_miou"] == pytest.approx(100 * by_class)


def test_sizes_of_all_modalities_fit_each_other():
    shapes = {m: tiny_model(m, 0).blocks[0].mlp.fc1.weight.shape for m in SIZES}
    assert set(shapes.values()) == {(4 * WIDTH["embed_dim"], WIDTH["embed_dim"])}
