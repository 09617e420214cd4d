"""Two processes under torchrun, DDP and FSDP2, against one process on the same batches."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import connected, images
from tiny_runs import assignments, interrupted, make_data, no_plots, tiny_model
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from two_processes import FORKSERVER, in_two_processes

from m2pt import quantize_aux
from m2pt.checkpoints import load_state_dict, save_state_dict
from m2pt.cli import main
from m2pt.train.distributed import World, distribute
from m2pt.train.log import read_log
from m2pt.train.recipe import Machine

pytestmark = pytest.mark.slow

# plain steps along the gradient: equal weights after them are equal gradients
STEPS = [
    "optimizer.name=momentum",
    "optimizer.options.momentum=0.0",
    "optimizer.base_lr=10.0",
    "optimizer.clip_grad=1.0",
]
SETTINGS = [*STEPS, "loss.mixup=0.0", "loss.cutmix=0.0", "model.overrides.drop_path_rate=0.0", "run.ema_decay=0.5"]
UNCLIPPED = ["optimizer.clip_grad=0.0", "optimizer.options.momentum=0.9"]
SMALLEST = [
    "machine.sharding=fsdp",
    "machine.step_in_backward=true",
    "machine.checkpoint_activations=true",
    "machine.offload_activations=true",
]
WITHOUT_AUX = "auxiliary.in_checkpoints=false"
MOMENTUM = ["optimizer.options.momentum=0.9", "run.checkpoint_steps=1"]


def command(folder, out, *more):
    data = ["--data", str(folder / "image"), "--aux", str(folder / "aux.safetensors"), "--aux-dtype", "bfloat16"]
    return ["train", "image_imagenet", *data, "--out", str(folder / out), *assignments("image"), *SETTINGS, *more]


@pytest.fixture(scope="module")
def runs(folder):
    """Runs of one process and of two, under their names."""
    make_data("image", folder / "image", train=12, test=5)
    make_data("point", folder / "point", train=8, test=2)
    torch.manual_seed(1)
    save_state_dict(tiny_model("audio", 0).state_dict(), folder / "aux.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        no_plots(patch)
        assert main(command(folder, "one")) == 0
        assert main(command(folder, "one_unclipped", *UNCLIPPED)) == 0
        with interrupted(4):
            assert main(command(folder, "resumed_one", *MOMENTUM)) == 130
        shutil.copytree(folder / "resumed_one", folder / "resumed_fsdp")
        with interrupted(4):
            assert main(command(folder, "resumed_without_aux", *MOMENTUM, WITHOUT_AUX)) == 130
        assert main([*command(folder, "resumed_one", *MOMENTUM), "--resume"]) == 0
    decoder = ["pretraining.decoder_width=48", "pretraining.decoder_depth=1", "pretraining.decoder_heads=3"]
    pretraining = ["pretrain", "pretrain_point", "--data", str(folder / "point"), "--out", str(folder / "mae")]
    together(
        command(folder, "ddp"),
        command(folder, "fsdp", "machine.sharding=fsdp"),
        command(folder, "fsdp_inside", *UNCLIPPED, *SMALLEST),
        command(folder, "fsdp_bfloat16", "machine.sharding=fsdp", "machine.precision=bfloat16"),
        [*command(folder, "resumed_fsdp", *MOMENTUM, "machine.sharding=fsdp"), "--resume"],
        [*command(folder, "resumed_without_aux", *MOMENTUM, "machine.sharding=fsdp", WITHOUT_AUX), "--resume"],
        [*pretraining, *assignments("point"), *decoder],
    )
    return folder


def together(*commands):
    """Run commands one after the other in two processes, which torchrun starts from the server of processes."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in signals}
    settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "max_restarts": 0}
    try:
        elastic_launch(LaunchConfig(1, 1, 2, start_method=FORKSERVER.get_start_method(), **settings), run)(commands)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(commands):
    """What each of the two does."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    no_plots(pytest.MonkeyPatch())
    for arguments in commands:
        if code := main(arguments):
            sys.exit(code)


def checkpoint(out):
    return torch.load(out / "last.pth", weights_only=True)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_computes(runs, name):
    one, two = (read_log(runs / out) for out in ("one", name))
    metrics = ("step", "loss", "gradient_norm", "learning_rate", "top1")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert {key: a[key] for key in metrics if key in a} == pytest.approx(
            {key: b[key] for key in metrics if key in b}, rel=1e-5
        )
    start = tiny_model("image", 2).state_dict()
    one, two = checkpoint(runs / "one"), checkpoint(runs / name)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(two["ema"], one["ema"], rtol=1e-5, atol=1e-7)
    assert any((one["model"][key] - value).abs().max() > 1e-3 for key, value in start.items())
    results = [json.loads((runs / out / "result.json").read_text()) for out in ("one", name)]
    assert results[0] == results[1]


def test_shards_with_steps_inside_backward_and_offloading(runs):
    one, two = (checkpoint(runs / name) for name in ("one_unclipped", "fsdp_inside"))
    for key in ("model", "ema"):
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)
    for name, state in one["optimizer"]["state"].items():
        torch.testing.assert_close(two["optimizer"]["state"][name], state, rtol=1e-5, atol=1e-6)


def test_shards_of_bfloat16_have_float32_masters(runs):
    one, two = checkpoint(runs / "one")["model"], checkpoint(runs / "fsdp_bfloat16")["model"]
    assert two["blocks.0.attn.qkv.aux_weight"].dtype == torch.bfloat16
    assert two["blocks.0.attn.qkv.weight"].dtype == torch.float32
    assert not torch.equal(two["blocks.0.attn.qkv.weight"], two["blocks.0.attn.qkv.weight"].bfloat16().float())
    torch.testing.assert_close(two, one, rtol=0.1, atol=5e-3)
    assert not all(torch.equal(two[name], value) for name, value in one.items())


def test_shards_continue_what_one_process_began(runs):
    one, two = (checkpoint(runs / name) for name in ("resumed_one", "resumed_fsdp"))
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-5, atol=1e-6)
    assert two["optimizer"]["state"].keys() == one["optimizer"]["state"].keys() != set()
    for name, state in one["optimizer"]["state"].items():
        torch.testing.assert_close(two["optimizer"]["state"][name], state, rtol=1e-5, atol=1e-6)


def test_shards_continue_without_the_auxiliary_weights_in_the_checkpoint(runs):
    whole, without = (checkpoint(runs / name) for name in ("resumed_fsdp", "resumed_without_aux"))
    for part in ("model", "ema"):
        left_out = whole[part].keys() - without[part].keys()
        assert left_out == {name for name in whole[part] if name.endswith(".aux_weight")} != set()
        assert all(torch.equal(value, whole[part][name]) for name, value in without[part].items())
    merged = (load_state_dict(runs / name / "merged.safetensors") for name in ("resumed_fsdp", "resumed_without_aux"))
    torch.testing.assert_close(*merged, rtol=0, atol=0)


AUXILIARY = ["frozen", "trained", "bfloat16", "int8", "int4", "float8_e4m3fn"]


def model_with(auxiliary):
    model = connected(torch.float64, auxiliary == "trained", depth=1, embed_dim=64, num_heads=2)
    return model if auxiliary in ("frozen", "trained") else quantize_aux(model, auxiliary)


def loss_and_gradients(model, inputs):
    """Of a model that may be wrapped; every gradient whole and under the name it has in a plain model."""
    loss = model(inputs).square().mean()
    loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in gradients.items()
    }


def every_wrapped_model():
    """Loss and gradients of this process's half of the images, for every sharding and auxiliary weight."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    mine = images(torch.float64).chunk(world.size)[world.rank]
    return {
        (sharding, auxiliary): loss_and_gradients(
            distribute(
                model_with(auxiliary),
                Machine(precision="float32", sharding=sharding),
                world,
            ),
            mine,
        )
        for sharding in ("ddp", "fsdp")
        for auxiliary in AUXILIARY
    }


@pytest.fixture(scope="module")
def wrapped():
    return in_two_processes(every_wrapped_model)


@pytest.mark.parametrize("auxiliary", AUXILIARY)
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_loss_and_every_gradient_are_those_of_one_process(wrapped, sharding, auxiliary):
    model = model_with(auxiliary)
    loss, gradients = loss_and_gradients(model, images(torch.float64))
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ("blocks.0.mlp.fc1.aux_weight" in gradients) == (auxiliary == "trained")
    results = [each[sharding, auxiliary] for each in wrapped]
    torch.testing.assert_close(sum(loss for loss, _ in results) / 2, loss)
    for _, found in results:
        torch.testing.assert_close(found, gradients)


def test_pretraining_in_two_processes(runs):
    pretrained = load_state_dict(runs / "mae" / "pretrained.safetensors")
    assert pretrained.keys() == {name for name in tiny_model("point", 0).state_dict()}
    assert [line["step"] for line in read_log(runs / "mae")] == [1, 2, 3, 4]
