"""Simulated memory of training steps: against all blocks, against tensors that are there, and what is said of it."""

import inspect
import math
from functools import partial

import pytest
import timm
import torch
from tiny_runs import WIDTH
from torch import nn
from torch.nn import functional as F

from m2pt import (
    estimate_memory,
    low_memory,
    parameter_groups,
    quantize_aux,
    reparameterize_aux_into_target_model,
    step_in_backward,
)
from m2pt.cli import main
from m2pt.models import SIZES, create_model
from m2pt.simulation import PARTS, most_splits
from m2pt.train import load_recipe, memory, one_step, preview, shipped_recipes
from m2pt.train.engine import Trainer
from m2pt.train.levers import ADAM, CHECKPOINTING, IN_BACKWARD, INT8, LEVERS, ON_HOST, cheapest_first, further_levers

pytestmark = pytest.mark.slow

SHALLOW = {"model.overrides.depth": 2}
"""So few blocks are all simulated, in a third of the time of a few that stand for all."""
GIB = 2**30
MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def each_recipe_is_simulated_once():
    """The tests ask for the same recipes again and again."""
    known, simulate = {}, memory.simulated_peak

    def once(*arguments, **keywords):
        asked = inspect.signature(simulate).bind(*arguments, **keywords)
        asked.apply_defaults()
        key = repr(asked)
        if key not in known:
            known[key] = simulate(*arguments, **keywords)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "simulated_peak", once)
        yield


def total(parts):
    return sum(parts.values())


def of_all_blocks(recipe):
    return max(map(total, one_step._moments(recipe, 1000, 1, None, None).values()))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("vit_small_patch16_224", {"model.overrides.depth": 12}),
        ("vit_small_patch16_224", {"data.batch_size": 2}),
        ("vit_small_patch16_224", {"machine.checkpoint_activations": True, "machine.step_in_backward": True}),
        ("audio_esc50", {"model.size": "small", "run.ema_decay": 0.99}),
        ("point_shapenetpart", {"model.size": "small", "data.batch_size": 4, "machine.checkpoint_activations": True}),
        ("pretrain_video", {"model.size": "small", "data.batch_size": 4, "optimizer.options.foreach": True}),
        ("image_imagenet", {"model.size": "small", "data.batch_size": 64, "machine.accumulation": 2}),
    ],
)
def test_a_few_blocks_stand_for_all(name, settings):
    recipe = memory.with_pathway(name, {"model.overrides.depth": 6} | settings)
    assert one_step.equal_blocks(recipe) == recipe.model.overrides["depth"]
    assert total(memory.simulated_peak(recipe, 1000)) == pytest.approx(of_all_blocks(recipe), rel=1e-3)


def test_parts_of_a_small_batch_are_those_of_the_parameters():
    peak = memory.simulated_peak(memory.with_pathway("vit_base_patch16_224", {"data.batch_size": 1}), 1000)
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    layers = sum(module.weight.nbytes for module in model.blocks.modules() if isinstance(module, nn.Linear))
    assert peak["weights"] == pytest.approx(parameters, rel=1e-3)
    assert peak["W_aux"] == layers
    assert peak["gradients"] == pytest.approx(parameters, rel=0.05)
    assert peak["optimizer"] == pytest.approx(2 * parameters, rel=1e-3)
    assert tuple(peak) == PARTS


def test_sums_of_split_gradients_are_transient():
    peak = memory.simulated_peak(memory.with_pathway("vit_small_patch16_224", {"data.batch_size": 2} | SHALLOW), 1000)
    size = 1536, 384
    sums = most_splits(*size, 2 * 197) * 4 * math.prod(size)
    assert 20 * MIB < sums < peak["transient"] < sums + 4 * MIB


def test_every_further_lever_lowers_the_peak():
    found = estimate_memory("vit_base_patch16_224")
    assert list(found.further) == list(LEVERS)
    peaks = [total(peak) for peak in (found.peak, *found.further.values())]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 4 * peaks[-1]
    assert found.further[INT8]["W_aux"] == pytest.approx(found.peak["W_aux"] / 4, rel=0.01)
    assert found.further[IN_BACKWARD]["gradients"] < 0.05 * GIB
    everything = memory.settings_of(list(LEVERS))
    assert estimate_memory("vit_base_patch16_224", everything).peak == found.further[ON_HOST]


@pytest.mark.parametrize("gib, levers", [(24, ()), (6.3, (INT8,)), (4, (CHECKPOINTING,)), (2.0, None)])
def test_the_cheapest_levers_that_fit(gib, levers):
    found = estimate_memory("vit_base_patch16_224", gpu_gib=gib)
    assert found.fitting == levers and found.fits == (levers == ())
    if levers:
        fitted = estimate_memory("vit_base_patch16_224", memory.settings_of(levers))
        assert total(fitted.peak) + memory.RESERVED <= gib * GIB < total(found.peak) + memory.RESERVED


def test_combinations_come_by_cost_and_the_host_only_with_checkpointing():
    recipe = memory.with_pathway("vit_base_patch16_224")
    found = list(cheapest_first(recipe))
    assert found[:2] == [(), (INT8,)] and found[-1] == tuple(LEVERS)
    assert found.index((INT8, ADAM, IN_BACKWARD)) < found.index((CHECKPOINTING,))
    assert all(CHECKPOINTING in chosen for chosen in found if ON_HOST in chosen)


def test_levers_that_a_recipe_cannot_have_are_left_out():
    assert further_levers(load_recipe("point_modelnet40")) == [ADAM, CHECKPOINTING, ON_HOST]  # it clips, and is alone
    recipe = load_recipe("tiny_image")
    assert IN_BACKWARD in further_levers(recipe) and IN_BACKWARD not in further_levers(recipe, processes=2)
    recipe = load_recipe("tiny_image", {"machine.compile": True, "optimizer.name": "sgd"})
    assert further_levers(recipe) == [CHECKPOINTING]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_has_an_estimate(name):
    recipe = memory.with_pathway(name, {"data.batch_size": 8, "machine.accumulation": 1, "model.overrides.depth": 1})
    assert total(memory.simulated_peak(recipe, 10)) > MIB


@pytest.mark.parametrize("modality", ["image", "audio", "point", "video"])
@pytest.mark.parametrize("size, billions", [("so400m", 0.41), ("gigantic", 1.84), ("22b", 21.8)])
def test_large_sizes(modality, size, billions):
    with torch.device("meta"):
        model = create_model(modality, size, num_classes=1000 if modality == "image" else 10)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01) and len(model.blocks) == SIZES[size]["depth"]


def test_gigantic_is_as_large_as_timms():
    with torch.device("meta"):
        ours, theirs = (
            create_model("image", "gigantic", num_classes=1000),
            timm.create_model("vit_gigantic_patch14_224"),
        )
    shapes = [sorted(parameter.shape for parameter in model.blocks.parameters()) for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_simulated_states_of_8_bit_adam_are_those_of_the_library():
    library = pytest.importorskip("bitsandbytes.optim").AdamW8bit
    layers = nn.ModuleList([nn.Linear(64, 63), nn.Linear(64, 64), nn.Linear(100, 77)])
    layouts = []
    for create in (library, partial(one_step.EightBitStates, defaults={})):
        optimizer = create(layers.parameters())
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        states = optimizer.state.values()
        layouts.append([sorted((v.nbytes, v.dtype) for k, v in s.items() if k[:3] in ("sta", "abs")) for s in states])
    assert layouts[0] == layouts[1]


def test_passes_are_as_few_as_fit_and_keep_the_batch():
    recipe = memory.with_pathway("image_imagenet", {"model.size": "small", "data.batch_size": 256} | SHALLOW)
    whole = total(memory.simulated_peak(recipe, 1000)) + memory.RESERVED
    assert memory.fit_micro_batches(recipe, whole) == recipe
    fitted = memory.fit_micro_batches(recipe, whole - 1)
    assert fitted.data.batch_size == 256 and fitted.machine.accumulation == 2
    with pytest.raises(
        ValueError, match=r"data\.batch_size: auto: micro-batches of 2 samples need .* GiB, more than 0.0"
    ):
        memory.fit_micro_batches(recipe, GIB)
    with pytest.raises(ValueError, match=r"machine\.step_in_backward"):
        memory.fit_micro_batches(recipe.with_overrides({"machine.step_in_backward": True}), whole)


def small_pair():
    options = {"img_size": 32, "patch_size": 8, "num_classes": 5, **WIDTH}
    model, auxiliary = (timm.create_model("vit_tiny_patch16_224", **options) for _ in range(2))
    return reparameterize_aux_into_target_model(model, auxiliary)


def test_low_memory_trains_as_its_levers_do():
    torch.manual_seed(1)
    model = small_pair()
    torch.manual_seed(1)
    twin = small_pair()
    optimizer = low_memory(model, 1e-2, weight_decay=0.1)
    quantize_aux(twin, "int8")
    expected = torch.optim.AdamW(parameter_groups(twin, 1e-2, 0.1))
    step_in_backward(expected)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for _ in range(3):
        losses = [F.cross_entropy(each(images), labels) for each in (model, twin)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert model.grad_checkpointing and all(parameter.grad is None for parameter in model.parameters())
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(optimizer.state) == sum(parameter.requires_grad for parameter in model.parameters())


def test_low_memory_refuses_what_it_cannot_prepare_and_leaves_it_alone():
    with pytest.raises(ValueError, match="model: expected fused layers, got a Linear"):
        low_memory(nn.Linear(2, 2), 1e-3)
    model = small_pair()
    with pytest.raises(ValueError, match="lr: expected 0 or more"):
        low_memory(model, -1.0)
    assert not model.grad_checkpointing and model.blocks[0].mlp.fc1.aux_weight.dtype == torch.float32
    with pytest.raises(ValueError, match="set_grad_checkpointing"):
        low_memory(model.blocks, 1e-3)


def test_the_command_prints_the_table_and_the_command_that_fits(capsys):
    shallow = "model.overrides.depth=2"
    words = ["image_imagenet", "model.size=small", shallow, "--batch", "64", "--aux-dtype", "int8"]
    assert main(["memory", *words, "--gpu", "1.5"]) == 0
    output = capsys.readouterr().out
    assert "64 samples in bfloat16" in output and "as asked" in output and "+ checkpointing" in output
    command = f"m2pt train image_imagenet --aux PATH --aux-dtype int8 data.batch_size=64 model.size=small {shallow}"
    assert f"{command} machine.checkpoint_activations=true" in output.splitlines()[-1]
    assert main(["memory", "vit_small_patch16_224", shallow, "--gpu", "1.5"]) == 0
    assert "model.set_grad_checkpointing()" in capsys.readouterr().out
    assert main(["memory", "vit_small_patch16_224", shallow, "--measure"]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_the_preset_sets_every_lever_but_those_typed(capsys):
    settings = ["machine.offload_activations=false", "model.overrides.depth=2"]
    assert main(["memory", "vit_small_patch16_224", "--preset", "low-memory", *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("+")] == [f"+ {ON_HOST}"]


@pytest.mark.parametrize("command, recipe", [("train", "tiny_point"), ("pretrain", "pretrain_tiny_audio")])
def test_a_dry_run_says_what_would_run_and_writes_nothing(command, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([command, recipe, "--dry-run", "--out", str(out), "schedule.epochs=3"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    epochs, steps = 3, int(said["steps"].split(" epochs of ")[1].split(",")[0])
    assert said["steps"].startswith(f"{epochs * steps:,}, in 3 epochs")
    assert said["memory"].startswith("simulated peak of a step") and "trained" in said["parameters"]
    assert not out.exists()
    assert main([command, recipe, "--dry-run", "optimizer.name=adamv"]) == 2
    other = {"train": "pretrain", "pretrain": "train"}[command]
    assert main([other, recipe, "--dry-run"]) == 2


def test_optimizers_that_are_not_simulated_or_update_parameters_jointly(capsys):
    assert main(["memory", "tiny_image", "model.overrides.depth=1", "optimizer.name=lamb"]) == 0
    assert IN_BACKWARD not in capsys.readouterr().out
    assert main(["memory", "tiny_image", "optimizer.name=lookahead_adamw"]) == 2
    assert "optimizer.name: lookahead_adamw is not simulated, only adam" in capsys.readouterr().err


def test_the_preset_leaves_room_for_passes_of_a_batch_of_auto(capsys):
    words = ["data.batch_size=auto", "model.overrides.depth=2", "--preset", "low-memory", "--gpu", "1.3"]
    assert main(["memory", "vit_small_patch16_224", *words]) == 0
    output = capsys.readouterr().out
    assert "data.batch_size=auto: 64 samples, micro-batches 2" in output and "it fits." in output
    assert main(["memory", "vit_small_patch16_224", *words, "--batch", "32"]) == 0
    assert "data.batch_size=auto: 32 samples, micro-batches 1" in capsys.readouterr().out


def test_a_run_needs_a_folder_unless_it_is_dry(capsys):
    with pytest.raises(SystemExit):
        main(["train", "tiny_image"])
    assert "required: --out, or --dry-run" in capsys.readouterr().err


def test_a_batch_of_auto_needs_a_gpu(capsys):
    assert main(["train", "tiny_image", "--dry-run", "data.batch_size=auto"]) == 2
    assert "data.batch_size: auto: there is no GPU to fill" in capsys.readouterr().err


def test_preview_counts_what_is_trained():
    said = preview(load_recipe("tiny_image", {"model.trainable": "head"}))
    assert "parameters: 650 trained" in said  # 64 features and a bias for each of ten classes


@pytest.mark.parametrize("module", ["tiny_image", "pretrain_tiny_image"])
def test_running_out_of_memory_is_a_line_that_says_what_to_try(module, tmp_path, monkeypatch, capsys):
    def update(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "update", update)
    command = "pretrain" if module.startswith("pretrain") else "train"
    assert main([command, module, "--out", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert line.startswith("m2pt: error: the GPU is out of memory: 0.0 GiB were held (little): try --preset low-memory")


def test_running_out_of_memory_in_an_evaluation_is_a_line(tmp_path, monkeypatch, capsys):
    def evaluate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("m2pt.train.run.evaluate", evaluate)
    assert main(["train", "tiny_image", "--out", str(tmp_path / "run"), "schedule.epochs=1"]) == 2
    said = "m2pt: error: the GPU is out of memory in an evaluation: try a smaller data.test_batch_size than"
    assert said in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run" / "last.pth"), "--recipe", "tiny_image"]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_model_is_refused_with_the_nearest(capsys):
    assert main(["memory", "vit_gigantic_patch14_22"]) == 2
    assert "did you mean 'vit_gigantic_patch14_224'" in capsys.readouterr().err
