"""The Lightning callback in Lightning's own trainer, in one process and in two."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import vit
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from two_processes import free_port

from m2pt import (
    cross_modal_scales,
    disconnect_pathways,
    merge_pathways,
    parameter_groups,
    quantize_aux,
    reparameterize_aux_into_target_model,
)
from m2pt.checkpoints import load_state_dict, merge_state_dict, save_state_dict
from m2pt.linear import fused_in

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch import callbacks  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402

from m2pt.integrations.lightning import PathwayCallback  # noqa: E402
from m2pt.pathway import mean_absolute_scales  # noqa: E402

pytestmark = pytest.mark.slow

PROGRAM = "import sys; import test_lightning_integration as t; t.all_forks(sys.argv[1])"
QKV = "model.blocks.0.attn.qkv.aux_weight"


def small(channels=3, seed=0):
    return vit(seed, img_size=16, in_chans=channels, embed_dim=32, num_heads=2, num_classes=3)


def pathway(seed=1, **options):
    return PathwayCallback(small(1, seed), **options)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = small()
        self.optimizers_made = 0

    def training_step(self, batch, index):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        self.optimizers_made += 1
        return torch.optim.SGD(parameter_groups(self.model, lr=0.1, weight_decay=0.05, scale_lr=1.0), momentum=0.9)


class LateClassifier(Classifier):
    """Makes its model in `configure_model`."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = small()


class Surgical(Classifier):
    """Is connected already."""

    def __init__(self):
        super().__init__()
        reparameterize_aux_into_target_model(self.model, small(1, 1))


class ConnectedClassifier(Classifier):
    """Connects its model itself, and so does what `load_from_checkpoint` makes."""

    def configure_model(self):
        pathway(save_aux_weights=False).connect(self)


class ShardedClassifier(Classifier):
    """FSDP2."""

    def configure_model(self):
        pathway().connect(self)
        if not isinstance(self.model, FSDPModule):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def batches(ranks=1, rank=0):
    """Batches of 4, divided among processes."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12, 3, 16, 16, generator=generator), torch.arange(12) % 3)
    return DataLoader(data, 4 // ranks, sampler=DistributedSampler(data, ranks, rank, shuffle=False))


def trainer(*own, epochs=2, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet, **settings}
    return lightning.Trainer(max_epochs=epochs, callbacks=[*own], **settings)


def fitted(callback, *others, module=None, ckpt_path=None, **settings):
    module = module or Classifier()
    own = trainer(callback, *others, **settings)
    own.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return module, own


def saving(folder):
    return callbacks.ModelCheckpoint(folder, filename="last", save_top_k=1, enable_version_counter=False)


def interrupted(folder, callback, **settings):
    """The checkpoint of a run that ended after one of two epochs."""
    fitted(callback, saving(folder), epochs=1, enable_checkpointing=True, **settings)
    return folder / "last.ckpt"


def saved_in(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_equal(module, other):
    assert module.model.state_dict().keys() == other.model.state_dict().keys()
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name]), name


def ours(warnings):
    return [str(each.message) for each in warnings if re.search("pathway|aux_weight|scale", str(each.message))]


@pytest.mark.parametrize("kind", [Classifier, LateClassifier])
def test_fit_validate_and_test_connect_once_and_before_the_optimizer(kind, recwarn):
    callback, module = pathway(), kind()
    own = trainer(callback)
    own.validate(module, batches(), verbose=False)
    layer = module.model.blocks[0].attn.qkv
    own.fit(module, batches())
    own.test(module, batches(), verbose=False)
    assert module.model.blocks[0].attn.qkv is layer and module.optimizers_made == 1
    assert torch.equal(layer.aux_weight, small(1, 1).blocks[0].attn.qkv.weight)
    assert len(cross_modal_scales(module.model)) == 8 and all(cross_modal_scales(module.model).values())
    assert not ours(recwarn)


def test_every_epoch_logs_the_mean_absolute_scale_of_every_auxiliary_model():
    callback = PathwayCallback({"audio": small(1, 1), "video/2": small(1, 2)})
    module, own = fitted(callback)
    scales = torch.stack([layer.cross_modal_scale for layer in fused_in(module.model)]).detach().abs().mean(0)
    logged = {name: value.item() for name, value in own.callback_metrics.items() if name.startswith("pathway/")}
    assert logged == pytest.approx({"pathway/audio": scales[0].item(), "pathway/video/2": scales[1].item()})
    with pytest.raises(ValueError, match="model: there is no FusedCrossModalLinear"):
        mean_absolute_scales(small())


def test_every_epoch_logs_the_range_of_the_scales(tmp_path):
    best = callbacks.ModelCheckpoint(tmp_path, monitor="cross_modal_scale/min", mode="min")
    module, own = fitted(pathway(), best, enable_checkpointing=True)
    scales = torch.tensor([*cross_modal_scales(module.model).values()])
    logged = {name: value for name, value in own.callback_metrics.items() if name.startswith("cross_modal_scale")}
    expected = {"min": scales.min(), "mean": scales.mean(), "max": scales.max()}
    torch.testing.assert_close(logged, {f"cross_modal_scale/{name}": value for name, value in expected.items()})
    assert best.best_model_score == scales.min() < scales.max()


def test_a_compiled_model_is_exported_under_plain_names(tmp_path):
    module = Classifier()
    module.model = torch.compile(module.model, backend="eager")
    fitted(pathway(export_path=tmp_path / "merged.safetensors"), module=module)
    small().load_state_dict(load_state_dict(tmp_path / "merged.safetensors"))


def test_the_merged_model_is_exported_and_training_can_go_on(tmp_path):
    export = tmp_path / "merged.safetensors"
    module, _ = fitted(pathway(export_path=export))
    plain, images = small(), batches().dataset.tensors[0]
    plain.load_state_dict(load_state_dict(export))
    torch.testing.assert_close(plain(images), module.model(images))
    before = cross_modal_scales(module.model)
    fitted(pathway(export_path=export), module=module)
    assert cross_modal_scales(module.model) != before
    assert not torch.equal(load_state_dict(export)["head.weight"], plain.head.weight)


def test_an_export_that_cannot_be_written_is_refused_before_training(tmp_path):
    callback = pathway(export_path=tmp_path / "runs" / "merged.safetensors")
    with pytest.raises(FileNotFoundError, match=r"merged.safetensors: there is no folder .*runs"):
        fitted(callback, callbacks.LambdaCallback(on_train_start=lambda *_: pytest.fail("it trains")))
    callback.on_fit_start(mock.Mock(is_global_zero=False), Surgical())  # another process does not write it


def test_a_trial_run_exports_nothing(tmp_path):
    fitted(pathway(export_path=tmp_path / "merged.safetensors"), fast_dev_run=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("remove", [merge_pathways, disconnect_pathways])
def test_a_module_without_its_pathway_is_connected_again_by_fit_only(remove):
    module, own = fitted(pathway(), epochs=1)
    remove(module.model)
    for run in (own.validate, own.test):
        run(module, batches(), verbose=False)
    assert not fused_in(module.model)
    fitted(pathway(), module=module, epochs=1)
    assert len(fused_in(module.model)) == 8


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("storage", ["whole", "left out", "left out, int8", "left out, trained"])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, storage, precision):
    settings = {
        "save_aux_weights": storage == "whole",
        "aux_dtype": "int8" if "int8" in storage else None,
        "is_aux_trainable": "trained" in storage,
    }
    undisturbed, _ = fitted(pathway(**settings), precision=precision)
    path = interrupted(tmp_path, pathway(**settings), precision=precision)
    resumed, _ = fitted(pathway(**settings), ckpt_path=path, precision=precision)
    assert_equal(resumed, undisturbed)
    assert saved_in(path)[QKV].shape == ((32,) if storage in ("left out", "left out, int8") else (96, 32))


def test_auxiliary_weights_that_were_left_out_have_to_be_the_same(tmp_path):
    path = interrupted(tmp_path, pathway(save_aux_weights=False))
    with pytest.raises(ValueError, match=r"aux_model: model.blocks.0.attn.qkv.aux_weight differs from the one"):
        fitted(pathway(seed=2, save_aux_weights=False), ckpt_path=path)


def requantised(module):
    quantize_aux(module.model)


def reconnected(module):
    disconnect_pathways(module.model)
    reparameterize_aux_into_target_model(module.model, small(1, 2))


def connected_to_another(module):
    reparameterize_aux_into_target_model(module.model, small(1, 2))


def with_other_weights(module):
    other = Classifier()
    pathway(seed=2).connect(other)
    module.load_state_dict(other.state_dict())


@pytest.mark.parametrize("change", [requantised, reconnected, connected_to_another, with_other_weights])
def test_checkpoints_hold_the_digests_of_the_weights_at_that_time(change):
    module, same, other = (Classifier() for _ in range(3))
    for each in (module, same, other):
        pathway(save_aux_weights=False).connect(each)
    for each in (module, same):
        change(each)
    checkpoint = module.state_dict()
    assert checkpoint[QKV].shape == (32,)
    same.load_state_dict(checkpoint)
    with pytest.raises(ValueError, match=r"qkv.aux_weight differs from .*, or is stored in another dtype"):
        other.load_state_dict(checkpoint)


def test_the_digest_of_a_quantised_weight_is_of_its_scales_too():
    first, second, audio = Classifier(), Classifier(), small(1, 1)
    pathway(save_aux_weights=False, aux_dtype="int8").connect(first)
    with torch.no_grad():
        audio.blocks[0].attn.qkv.weight *= 2
    PathwayCallback(audio, save_aux_weights=False, aux_dtype="int8").connect(second)
    assert torch.equal(first.model.blocks[0].attn.qkv.aux_weight, second.model.blocks[0].attn.qkv.aux_weight)
    with pytest.raises(ValueError, match=r"qkv.aux_weight differs from the one"):
        second.load_state_dict(first.state_dict())


def test_auxiliary_weights_that_are_computed_are_not_left_out():
    module = Classifier()
    pathway(save_aux_weights=False).connect(module)
    prune.identity(module.model.blocks[0].attn.qkv, "aux_weight")
    assert module.state_dict().keys() & {QKV, f"{QKV}_orig"} == {f"{QKV}_orig"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_auxiliary_weights_that_were_left_out_may_have_been_rounded(dtype):
    module = Classifier()
    pathway(save_aux_weights=False).connect(module)
    exact, rounded = module.state_dict(), deepcopy(module).to(dtype)
    module.load_state_dict(rounded.state_dict())
    assert torch.equal(module.model.blocks[0].attn.qkv.aux_weight, small(1, 1).blocks[0].attn.qkv.weight)
    if dtype != torch.float64:
        with pytest.raises(ValueError, match="or is stored in another dtype"):
            rounded.load_state_dict(exact)


@pytest.mark.parametrize("saved, loaded", [("32-true", "bf16-true"), ("bf16-true", "32-true")])
def test_checkpoints_load_in_another_precision(tmp_path, saved, loaded):
    path = interrupted(tmp_path, pathway(save_aux_weights=False), precision=saved)
    own = trainer(pathway(save_aux_weights=False), precision=loaded)
    own.test(Classifier(), batches(), verbose=False, ckpt_path=path)


@pytest.mark.parametrize("module", [Classifier, Surgical])
@pytest.mark.parametrize("first", [True, False])
def test_the_last_callback_says_whether_auxiliary_weights_are_saved(tmp_path, module, first):
    module, _ = fitted(pathway(save_aux_weights=first), module=module(), epochs=1)
    path = interrupted(tmp_path, pathway(save_aux_weights=not first), module=module)
    assert saved_in(path)[QKV].shape == ((32,) if first else (96, 32))


def test_models_of_one_module_are_saved_each_in_its_way():
    module = Classifier()
    module.other = small()
    pathway(save_aux_weights=False).connect(module)
    pathway(name="other").connect(module)
    copy = deepcopy(module)
    shapes = [copy.state_dict()[name].shape for name in (QKV, QKV.replace("model", "other"))]
    assert shapes == [(32,), (96, 32)]
    copy.load_state_dict(module.state_dict())


def test_a_module_that_is_connected_keeps_its_pathway():
    module = Surgical()
    layer = module.model.blocks[0].attn.qkv
    named = PathwayCallback({"other": small(1, 2), "same": small(1, 1)}, aux_dtype="int8")
    for callback in (pathway(), pathway(is_aux_trainable=True), named):
        fitted(callback, module=module, epochs=1)
    assert module.model.blocks[0].attn.qkv is layer and not layer.is_aux_trainable
    with pytest.raises(ValueError, match=r"aux_model: blocks.0.attn.qkv is connected already, to other weights"):
        fitted(pathway(seed=2), module=module)
    connected_to_another(module)
    for seed in (1, 2):
        fitted(pathway(seed), module=module, epochs=1)


def test_trained_auxiliary_weights_may_differ_from_their_model():
    callback, module = PathwayCallback([small(1, 1), small(1, 2)], is_aux_trainable=True), Classifier()
    for _ in range(2):
        fitted(callback, module=module, epochs=1)


@pytest.mark.parametrize("change", [requantised, Classifier.bfloat16])
def test_auxiliary_weights_that_cannot_be_compared_are_left_alone(change):
    module, callback = Surgical(), pathway(seed=2)
    change(module)
    callback.setup(trainer(callback), module, "fit")


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_without_auxiliary_weights_says_so(strict):
    module, other = Classifier(), Surgical()
    pathway(save_aux_weights=False).connect(module)
    with pytest.raises(RuntimeError, match=r"qkv.aux_weight: the auxiliary weights were left out of this checkpoint"):
        other.load_state_dict(module.state_dict(), strict=strict)
    with pytest.raises(ValueError, match=r"^model.blocks.0.attn.qkv: the auxiliary weights were left out of this"):
        merge_state_dict(module.state_dict())


@pytest.mark.parametrize("save_aux_weights", [True, False])
def test_the_checkpoint_says_whether_auxiliary_weights_are_in_it(tmp_path, save_aux_weights):
    path = interrupted(tmp_path, pathway(save_aux_weights=save_aux_weights))
    module, _ = fitted(pathway(save_aux_weights=not save_aux_weights), ckpt_path=path)
    undisturbed, _ = fitted(pathway())
    assert_equal(module, undisturbed)


def test_modules_that_connect_themselves_load_from_a_checkpoint(tmp_path):
    path = interrupted(tmp_path, pathway(save_aux_weights=False), module=ConnectedClassifier())
    saved = saved_in(path)
    module = ConnectedClassifier.load_from_checkpoint(path, map_location="cpu")
    assert {f"model.{name}.cross_modal_scale": scale for name, scale in cross_modal_scales(module.model).items()} == {
        name: value.item() for name, value in saved.items() if name.endswith("cross_modal_scale")
    }
    assert torch.equal(module.model.blocks[1].mlp.fc1.aux_weight, small(1, 1).blocks[1].mlp.fc1.weight)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Classifier.load_from_checkpoint(path, map_location="cpu")


def test_a_merged_module_is_saved_as_a_plain_one():
    module, _ = fitted(pathway(save_aux_weights=False), epochs=1)
    connected = module.state_dict()
    merge_pathways(module.model)
    assert module.state_dict().keys() == Classifier().state_dict().keys()
    module.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict(connected)


def averaging(kind):
    if kind == "SWA":
        return callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    return callbacks.EMAWeightAveraging(decay=0.5)


@pytest.mark.parametrize("kind", ["SWA", "EMA"])
@pytest.mark.parametrize("module", [Classifier, LateClassifier])
def test_averages_of_weights_have_the_pathway(tmp_path, recwarn, kind, module):
    export = tmp_path / "merged.safetensors"
    plainly, _ = fitted(pathway(save_aux_weights=False), module=module())
    averaged, _ = fitted(pathway(save_aux_weights=False, export_path=export), averaging(kind), module=module())
    assert cross_modal_scales(averaged.model) != cross_modal_scales(plainly.model)
    assert all(cross_modal_scales(averaged.model).values())
    for name, value in averaged.model.state_dict().items():
        if name.endswith("aux_weight"):
            assert torch.equal(value, small(1, 1).get_parameter(name.replace("aux_weight", "weight")))
    merged = merge_pathways(deepcopy(averaged.model)).state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in load_state_dict(export).items())
    assert not ours(recwarn)


@pytest.mark.parametrize("save_aux_weights", [True, False])
def test_a_run_with_averages_is_resumed(tmp_path, save_aux_weights):
    settings = {"save_aux_weights": save_aux_weights}
    undisturbed, _ = fitted(pathway(**settings), averaging("EMA"))
    fitted(pathway(**settings), averaging("EMA"), saving(tmp_path), epochs=1, enable_checkpointing=True)
    resumed, _ = fitted(pathway(**settings), averaging("EMA"), ckpt_path=tmp_path / "last.ckpt")
    assert_equal(resumed, undisturbed)


@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_what_copies_the_module_has_to_stand_behind(kind):
    with pytest.raises(ValueError, match=r"callbacks: \w+Averaging copies .*: put it after this one"):
        fitted(averaging(kind), pathway())


def test_averaging_leaves_quantised_auxiliary_weights_alone():
    kept = Classifier()
    pathway(aux_dtype="int8").connect(kept)
    module, _ = fitted(pathway(aux_dtype="int8"), callbacks.EMAWeightAveraging(decay=0.9, use_buffers=False), epochs=3)
    expected, found = (dict(each.model.named_buffers()) for each in (kept, module))
    assert len(found) == 16 and all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(ValueError, match=r"callbacks: WeightAveraging would round .*: give it use_buffers=False"):
        fitted(pathway(aux_dtype="int8"), callbacks.EMAWeightAveraging(decay=0.9))


def test_unfreezing_a_module_leaves_auxiliary_weights_frozen():
    class Unfreezing(Classifier):
        def on_fit_start(self):
            self.freeze()
            self.unfreeze()

    with pytest.warns(UserWarning, match="aux_weight: something has set its requires_grad"):
        module, _ = fitted(pathway(), module=Unfreezing())
    layer = module.model.blocks[0].attn.qkv
    assert torch.equal(layer.aux_weight, small(1, 1).blocks[0].attn.qkv.weight) and layer.aux_weight.grad is None
    assert all(cross_modal_scales(module.model).values())


def test_pathways_without_effect_are_warned_of():
    class Frozen(Classifier):
        def on_fit_start(self):
            self.requires_grad_(False)
            self.model.head.requires_grad_(True)

    with pytest.warns(UserWarning, match="cross_modal_scale is zero and frozen"):
        fitted(pathway(), module=Frozen())


def test_a_module_that_replaces_its_model_is_refused():
    class Replacing(Classifier):
        def configure_model(self):
            self.model = small()

        def training_step(self, batch, index):
            raise AssertionError

    with (
        pytest.warns(UserWarning, match="replaces a module with pathways"),
        pytest.raises(ValueError, match="model: there is no FusedCrossModalLinear inside this VisionTransformer"),
    ):
        fitted(pathway(), module=Replacing())


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="name: expected a dotted name, got 3"):
        pathway(name=3)
    with pytest.raises(TypeError, match="save_aux_weights: expected a bool, got 'no'"):
        pathway(save_aux_weights="no")
    with pytest.raises(ValueError, match=r"expected a name ending in \.safetensors"):
        pathway(export_path=tmp_path / "merged.ckpt")
    with pytest.raises(ValueError, match="name: Classifier has no module 'backbone'"):
        fitted(pathway(name="backbone"))


def one_fork(folder):
    """A strategy that forks, of one process."""
    for kind in (Classifier, LateClassifier, ConnectedClassifier):
        with pytest.raises(Exception, match=r"strategy: .*: call callback.connect\(module\) before fit"):
            fitted(pathway(), module=kind(), strategy="ddp_fork")
    callback, module = pathway(save_aux_weights=False), Classifier()
    callback.connect(module)
    fitted(callback, saving(f"{folder}/fork"), module=module, strategy="ddp_fork", enable_checkpointing=True)
    undisturbed, _ = fitted(pathway())
    assert_equal(module, undisturbed)
    assert saved_in(Path(folder, "fork", "last.ckpt"))[QKV].shape == (32,)
    own = trainer(pathway(), strategy="ddp_fork")
    own.validate(Classifier(), batches(), verbose=False)


def test_strategies_that_fork_want_a_module_that_is_connected(forks):
    status, stderr = forks["one_fork"]
    assert status == 0, stderr


def test_a_run_inside_another_process_is_none_of_these():
    with mock.patch("multiprocessing.parent_process"):
        fitted(pathway(), epochs=1)


def sharding(callback, **settings):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return trainer(callback, strategy=strategy, devices=2, **settings)


def slow_save(state_dict, path):
    time.sleep(1)
    save_state_dict(state_dict, path)


def two_processes(folder):
    """What each of two processes does."""
    callback = pathway(save_aux_weights=False, export_path=Path(folder, "merged.safetensors"))
    own = trainer(callback, saving(folder), strategy="ddp", devices=2, enable_checkpointing=True)
    module, rank = Classifier(), own.global_rank
    with mock.patch("m2pt.integrations.lightning.save_state_dict", side_effect=slow_save) as save:
        own.fit(module, batches(2, rank))
    assert callback.export_path.is_file()
    scales = {"ddp": cross_modal_scales(module.model)}
    module, last = ShardedClassifier(), Path(folder, "sharded.ckpt")
    own = sharding(pathway(), epochs=1)
    own.fit(module, batches(2, rank))
    own.save_checkpoint(last)
    module = ShardedClassifier()
    sharding(pathway()).fit(module, batches(2, rank), ckpt_path=last)
    scales["fsdp"] = cross_modal_scales(module.model)
    for refused in (pathway(export_path=callback.export_path), pathway(save_aux_weights=False)):
        with pytest.raises(ValueError, match="divided among processes: export_path and save_aux_weights=False need"):
            sharding(refused).fit(ShardedClassifier(), batches(2, rank))
    Path(folder, f"rank{rank}.json").write_text(json.dumps((scales, save.call_count)))
    torch.distributed.barrier()
    os._exit(0)  # Lightning leaves the group open, and its threads may not outlive Python's own end


def fork(function, folder, **environment):
    """The number of a process that has imported what this one has, as torch cannot do once this one has trained."""
    if number := os.fork():
        return number
    signal.alarm(100)  # it may wait for one that is lost
    os.dup2(os.open(f"{folder}/{function.__name__}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= environment
    function(folder)
    os._exit(0)


def all_forks(folder):
    """`one_fork`, and `two_processes` with what torchrun tells them."""
    together = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1"}
    together |= {"MASTER_PORT": str(free_port())}
    ranks = [fork(two_processes, folder, RANK=rank, LOCAL_RANK=rank, **together) for rank in "01"]
    one, *two = (os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in (fork(one_fork, folder), *ranks))
    Path(folder, "statuses.json").write_text(json.dumps({"one_fork": one, "two_processes": two}))


@pytest.fixture(scope="module")
def forks(folder):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    subprocess.run(command, env=environment, timeout=200, check=True)
    statuses = json.loads((folder / "statuses.json").read_text())
    return {name: (status, (folder / f"{name}.err").read_text()) for name, status in statuses.items()}


def test_two_processes_train_what_one_trains(forks, folder):
    statuses, stderr = forks["two_processes"]
    assert statuses == [0, 0] and "sync_dist" not in stderr, stderr
    scales, writes = zip(*(json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)), strict=True)
    module, _ = fitted(pathway())
    assert scales[0] == scales[1]
    for found in scales[0].values():
        assert found == pytest.approx(cross_modal_scales(module.model), rel=1e-4, abs=1e-6)
    merged = merge_pathways(module.model).state_dict()
    torch.testing.assert_close(load_state_dict(folder / "merged.safetensors"), merged, rtol=1e-4, atol=1e-6)
    assert sorted(writes) == [0, 1]
