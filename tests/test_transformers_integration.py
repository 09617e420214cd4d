"""A connected model of transformers saves, loads and trains as any other; on small random models."""

import copy
import importlib
import logging
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from statistics import fmean
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.fsdp import fully_shard

from m2pt import (
    cross_modal_scales,
    describe_pathways,
    disconnect_pathways,
    load_pathway,
    merge_pathways,
    parameter_groups,
    quantize_aux,
    reparameterize_aux_into_target_model,
    save_pathway,
)
from m2pt.checkpoints import read_safetensors, save_state_dict

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from m2pt.integrations.transformers import (  # noqa: E402
    PATHWAY,
    PathwayCallback,
    connect,
    from_pretrained,
    keep_pathway,
)

pytestmark = pytest.mark.slow

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PICTURE = {"image_size": 32, "patch_size": 16}
FAMILIES = {
    "ViTForImageClassification": PICTURE,
    "ASTForAudioClassification": {"max_length": 32, "num_mel_bins": 32},
    "VideoMAEForVideoClassification": PICTURE | {"num_frames": 4},
    "BertForSequenceClassification": {"vocab_size": 50},
    "SiglipVisionModel": PICTURE,
}
VIT, VIDEO = "ViTForImageClassification", "VideoMAEModel"
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in IMAGES]


def build(name=VIT, seed=0):
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**SIZE, **FAMILIES.get(name, PICTURE))).eval()


def auxiliary():
    return build(VIDEO, seed=9)


def scaled(model):
    """With scales that are not zero."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("cross_modal_scale"):
            nn.init.normal_(parameter, std=0.5)
    return model


def connected(seed=0, aux_model=None, **options):
    return scaled(connect(build(seed=seed), aux_model or auxiliary(), **options))


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=IMAGES[:2]).logits


def is_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def entries(folder):
    return {name for path in folder.glob("model*.safetensors") for name in read_safetensors(path)[0]}


@pytest.fixture
def said():
    """What transformers warns of."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield messages
    logging.getLogger("transformers").removeHandler(handler)


class TestSaving:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_every_family_comes_back_whole(self, tmp_path, name, said):
        model = scaled(connect(build(name), auxiliary()))
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(type(model), tmp_path, auxiliary())
        assert type(loaded) is type(model) and is_equal(loaded, model)
        assert describe_pathways(loaded) == describe_pathways(model)
        assert not said
        assert not [entry for entry in entries(tmp_path) if "aux_weight" in entry]
        assert {entry for entry in model.state_dict() if "aux_weight" not in entry} == entries(tmp_path)

    @pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"save_original_format": True}], ids=str)
    def test_logits_are_the_same(self, tmp_path, options):
        model = connected()
        model.save_pretrained(tmp_path / "new" / "folder", **options)
        loaded = from_pretrained(type(model), tmp_path / "new" / "folder", auxiliary())
        assert torch.equal(logits(loaded), logits(model))

    def test_a_folder_inside(self, tmp_path):
        model = connected()
        model.save_pretrained(tmp_path / "sub")
        assert is_equal(from_pretrained(type(model), tmp_path, auxiliary(), subfolder="sub"), model)

    def test_a_loaded_model_saves_the_pathway_too(self, tmp_path):
        model = connected()
        model.save_pretrained(tmp_path / "first")
        loaded = from_pretrained(type(model), tmp_path / "first", auxiliary())
        loaded.save_pretrained(tmp_path / "second")
        assert is_equal(from_pretrained(type(model), tmp_path / "second", auxiliary()), model)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_so_does_a_copy_and_not_of_the_original(self, tmp_path, copied):
        model = connected()
        other = copied(model)
        merge_pathways(model)
        other.save_pretrained(tmp_path)
        assert is_equal(from_pretrained(type(model), tmp_path, auxiliary()), other)

    def test_an_auto_class_finds_the_class(self, tmp_path):
        model = connected()
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(transformers.AutoModelForImageClassification, tmp_path, auxiliary())
        assert type(loaded) is type(model) and is_equal(loaded, model)

    def test_trained_auxiliary_weights_need_no_auxiliary_model(self, tmp_path):
        model = connected(is_aux_trainable=True)
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(type(model), tmp_path, None)
        assert is_equal(loaded, model) and torch.equal(logits(loaded), logits(model))
        assert all(parameter.requires_grad for parameter in loaded.parameters())

    def test_quantised_and_several(self, tmp_path):
        model = quantize_aux(connected(aux_model=[auxiliary(), build(VIDEO, seed=8)]), "int8")
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(type(model), tmp_path, [auxiliary(), build(VIDEO, seed=8)])
        assert is_equal(loaded, model)
        assert not [entry for entry in entries(tmp_path) if "aux_weight" in entry]

    @pytest.mark.parametrize("plain", [merge_pathways, disconnect_pathways])
    def test_a_plain_model_is_saved_and_no_pathway_is_left(self, tmp_path, plain, said):
        model = connected()
        model.save_pretrained(tmp_path)
        plain(model).save_pretrained(tmp_path)
        assert not (tmp_path / PATHWAY).exists()
        loaded = type(model).from_pretrained(tmp_path)
        assert is_equal(loaded, model) and not said
        assert "vit.encoder.layer.0.output.dense.weight" in entries(tmp_path)  # as transformers itself saves it

    def test_what_is_loaded_and_merged_is_saved_as_a_plain_model(self, tmp_path):
        model = connected()
        model.save_pretrained(tmp_path)
        merged = merge_pathways(from_pretrained(type(model), tmp_path, auxiliary()))
        merged.save_pretrained(tmp_path)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(merge_pathways(model)))

    def test_a_pathway_that_cannot_be_written_leaves_the_folder_as_it_was(self, tmp_path):
        model = connected()
        model.vit.layers[0].mlp.fc1.auxiliaries = (model.vit.layers[0].mlp.fc1.auxiliaries[0]._replace(layers=""),)
        with pytest.raises(ValueError, match="connect it by surgery"):
            model.save_pretrained(tmp_path)
        assert not [*tmp_path.iterdir()]

    def test_plain_surgery_is_saved_from_now_on(self, tmp_path):
        model = scaled(reparameterize_aux_into_target_model(build(), auxiliary()))
        assert keep_pathway(model) is model
        model.save_pretrained(tmp_path)
        assert is_equal(from_pretrained(type(model), tmp_path, auxiliary()), model)

    def test_arguments_by_position(self, tmp_path, monkeypatch):
        connected().save_pretrained(tmp_path, False)
        assert not [*tmp_path.iterdir()]
        monkeypatch.setattr(transformers.ViTForImageClassification, "push_to_hub", pushed := Mock())
        connected().save_pretrained(tmp_path, True, None, True)
        pushed.assert_called_once_with(tmp_path.name)

    def test_scales_of_a_given_state_dict_are_those_of_the_model(self, tmp_path):
        model = connected()
        given = model.state_dict()
        model.save_pretrained(tmp_path, state_dict={name: tensor.bfloat16() for name, tensor in given.items()})
        model.save_pretrained(tmp_path, state_dict=dict(given))
        assert is_equal(from_pretrained(type(model), tmp_path, auxiliary()), model)
        name = next(name for name in given if name.endswith("cross_modal_scale"))
        with pytest.raises(ValueError, match=rf"^state_dict: {name} is not the model's: load these scales"):
            model.save_pretrained(tmp_path / "other", state_dict=given | {name: given[name] / 2})
        assert not (tmp_path / "other").exists()

    def test_other_processes_write_nothing(self, tmp_path, monkeypatch):
        model = connected()
        monkeypatch.setattr(type(model), "push_to_hub", None)
        model.save_pretrained(tmp_path, is_main_process=False, push_to_hub=True)
        assert not [*tmp_path.iterdir()]
        (tmp_path / PATHWAY).touch()
        merge_pathways(connected()).save_pretrained(tmp_path, is_main_process=False)
        assert (tmp_path / PATHWAY).exists()

    def test_what_is_pushed_has_the_pathway(self, tmp_path, monkeypatch):
        pushed = []

        def push_to_hub(self, repo_id, **options):  # transformers uploads what save_pretrained writes
            self.save_pretrained(tmp_path / "upload")
            pushed.append((repo_id, options))

        model = connected()
        monkeypatch.setattr(type(model), "push_to_hub", push_to_hub)
        taken = {
            "private": True,
            "commit_message": "Trained",
            "max_shard_size": "20KB",
            "revision": "dev",
            "tags": ["a"],
        }
        model.save_pretrained(tmp_path / "own", push_to_hub=True, **taken)
        model.save_pretrained(tmp_path / "own", push_to_hub=True, repo_id="me/vit")
        assert pushed == [("own", taken), ("me/vit", {})]
        assert is_equal(from_pretrained(type(model), tmp_path / "upload", auxiliary()), model)

    def test_what_cannot_be_pushed_is_refused(self, tmp_path, monkeypatch):
        model = connected()
        monkeypatch.setattr(type(model), "push_to_hub", None)
        with pytest.raises(ValueError, match=r"^push_to_hub: expected False with state_dict, variant: "):
            model.save_pretrained(tmp_path / "new", push_to_hub=True, state_dict=model.state_dict(), variant="ema")
        assert not (tmp_path / "new").exists()

    def test_a_name_on_the_hub_is_loaded(self, tmp_path, monkeypatch):
        model = connected()
        cache = tmp_path / "models--me--vit"
        model.save_pretrained(cache / "snapshots" / "0123" / "sub")
        (cache / "refs").mkdir()
        (cache / "refs" / "dev").write_text("0123")
        where = {"cache_dir": tmp_path, "local_files_only": True, "revision": "dev", "subfolder": "sub"}
        where |= {"token": False, "force_download": False}
        asked = Mock(side_effect=transformers.utils.cached_file)
        monkeypatch.setattr(transformers.utils, "cached_file", asked)
        for kind in (type(model), transformers.AutoModelForImageClassification):
            assert is_equal(from_pretrained(kind, "me/vit", auxiliary(), **where), model)
            assert asked.call_args.kwargs == where

    def test_code_of_the_folder_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "own_vit.py").write_text(
            "from transformers import ViTConfig, ViTForImageClassification\n"
            "class OwnConfig(ViTConfig):\n    model_type = 'own_vit'\n"
            "class OwnViT(ViTForImageClassification):\n    config_class = OwnConfig\n"
        )
        own_vit = importlib.import_module("own_vit")
        monkeypatch.setitem(sys.modules, "own_vit", own_vit)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        own_vit.OwnConfig.register_for_auto_class()
        own_vit.OwnViT.register_for_auto_class("AutoModelForImageClassification")
        model = scaled(connect(own_vit.OwnViT(own_vit.OwnConfig(**SIZE, **PICTURE)), auxiliary()))
        model.save_pretrained(tmp_path / "saved")
        kind = transformers.AutoModelForImageClassification
        trust = {"trust_remote_code": True, "code_revision": "main"}
        loaded = from_pretrained(kind, tmp_path / "saved", auxiliary(), **trust)
        assert type(loaded).__module__.startswith("transformers_modules.") and is_equal(loaded, model)
        connected().save_pretrained(tmp_path / "plain")
        from_pretrained(kind, tmp_path / "plain", auxiliary(), **trust)

    def test_transformers_still_takes_the_class_for_its_own(self, tmp_path, monkeypatch):
        connected().save_pretrained(tmp_path)
        kind, seen = transformers.ViTForImageClassification, []
        tie = kind.tie_weights
        monkeypatch.setattr(
            kind, "tie_weights", lambda self, **o: (seen.append(self.is_custom_code()), tie(self, **o))[1]
        )
        from_pretrained(kind, tmp_path, auxiliary())
        assert seen and not any(seen)


class TestErrors:
    def test_without_a_pathway(self, tmp_path):
        build().save_pretrained(tmp_path)
        for folder in (tmp_path, str(tmp_path), tmp_path / "none", str(tmp_path / "none"), Path("none"), "./none"):
            with pytest.raises(
                FileNotFoundError, match=f"^folder: there is no {PATHWAY} in {folder}, or no such folder"
            ):
                from_pretrained(transformers.ViTForImageClassification, folder, auxiliary())

    def test_without_a_pathway_in_a_folder_beside(self, tmp_path, monkeypatch):
        build().save_pretrained(tmp_path / "saved")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"^folder: there is no {PATHWAY} in saved, or no such folder"):
            from_pretrained(transformers.ViTForImageClassification, "saved", auxiliary())

    def test_loading_info(self, tmp_path):
        with pytest.raises(ValueError, match=r"^output_loading_info: expected False"):
            from_pretrained(transformers.ViTForImageClassification, tmp_path, auxiliary(), output_loading_info=True)

    def test_another_class_than_was_saved(self, tmp_path):
        connected().save_pretrained(tmp_path / VIT)
        scaled(connect(build("ViTModel"), auxiliary())).save_pretrained(tmp_path / "ViTModel")
        for saved, kind in ((VIT, "AutoModel"), ("ViTModel", VIT)):
            other = kind.replace("AutoModel", "ViTModel")
            with pytest.raises(ValueError, match=rf"\(model_class: .* is of {saved}, not of {other}\)$"):
                from_pretrained(getattr(transformers, kind), tmp_path / saved, auxiliary())

    def test_another_auxiliary_model(self, tmp_path):
        connected().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"^aux_model: the weights of 'VideoMAEModel' differ"):
            from_pretrained(transformers.ViTForImageClassification, tmp_path, build(VIDEO, seed=8))

    def test_plain_loading_says_what_it_leaves_out(self, tmp_path, said):
        connected().save_pretrained(tmp_path)
        transformers.ViTForImageClassification.from_pretrained(tmp_path)
        assert len(said) == 1 and "cross_modal_scale" in said[0]

    def test_what_is_unexpected_is_still_said(self, tmp_path, said, monkeypatch):
        model = connected()
        model.save_pretrained(tmp_path)
        tensors, _ = read_safetensors(tmp_path / "model.safetensors")
        others = {name: torch.zeros(1) for name in ("old.weight", "vit.aux_weights", "vit.my_aux_weight")}
        save_state_dict(tensors | others, tmp_path / "model.safetensors", {"format": "pt"})
        monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"^old\."])
        from_pretrained(type(model), tmp_path, auxiliary())
        assert len(said) == 1 and "vit.aux_weights" in said[0] and "vit.my_aux_weight" in said[0]
        assert "old.weight" not in said[0] and "cross_modal_scale" not in said[0]

    def test_what_is_missing_is_still_said(self, tmp_path, said):
        model = connect(build("BertForSequenceClassification"), auxiliary())
        model.bert.save_pretrained(tmp_path)
        save_pathway(model.bert, tmp_path / PATHWAY)
        with pytest.raises(ValueError, match=r"encoder\.layer\.0"):
            from_pretrained(transformers.BertForSequenceClassification, tmp_path, auxiliary())
        assert len(said) == 1 and "classifier.weight" in said[0]

    def test_a_model_of_another_library(self):
        model = nn.Linear(2, 2)
        with pytest.raises(TypeError, match=r"^model: expected a transformers.PreTrainedModel .*, got Linear$"):
            connect(model, auxiliary())
        with pytest.raises(TypeError, match=r"^model: expected a transformers.PreTrainedModel .*, got ModuleDict$"):
            keep_pathway(surgery_of_another_library())

    def test_a_model_that_is_not_connected(self):
        with pytest.raises(ValueError, match=r"^model: there is no FusedCrossModalLinear inside this ViT"):
            keep_pathway(build())


def surgery_of_another_library():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(2, 2)})])})
    return reparameterize_aux_into_target_model(model, copy.deepcopy(model))


class Trainer(transformers.Trainer):
    def create_optimizer(self, *_):
        groups = parameter_groups(self.model, lr=1e-2, weight_decay=0.1, scale_lr=2e-2)
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


def trainer(folder, model, *callbacks, **settings):
    common = {"per_device_train_batch_size": 4, "max_steps": 7, "save_steps": 3, "logging_steps": 1}
    common |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps"}
    args = transformers.TrainingArguments(str(folder), **common | settings)
    more = {"eval_dataset": DATA[:2], "compute_metrics": Worse()} if "eval_strategy" in settings else {}
    return Trainer(model, args, train_dataset=DATA, callbacks=[*callbacks], **more)


class Reporter(transformers.TrainerCallback):
    """As TensorBoard's, which the Trainer adds before any callback that is given to it."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **others):
        self.seen.append(dict(logs))


class Worse:
    """A metric that is best after the first evaluation."""

    calls = 0

    def __call__(self, prediction):
        self.calls += 1
        return {"score": -self.calls}


class TestTrainer:
    @pytest.mark.parametrize("options", [{}, {"is_aux_trainable": True}, {"aux_dtype": "int8"}], ids=str)
    @pytest.mark.parametrize("is_plain_surgery", [False, True])
    def test_resuming_ends_as_the_undisturbed_run(self, tmp_path, options, is_plain_surgery, said):
        def run(seed):
            if not is_plain_surgery:
                return trainer(tmp_path, connected(seed, **options))
            model = scaled(reparameterize_aux_into_target_model(build(seed=seed), auxiliary(), **options))
            return trainer(tmp_path, model, PathwayCallback(merge=False))

        undisturbed = run(seed=0)
        undisturbed.train()
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "copy")
        resumed = run(seed=7)  # whatever is not loaded differs
        resumed.train(resume_from_checkpoint=str(tmp_path / "copy"))
        assert is_equal(resumed.model, undisturbed.model)
        loaded = from_pretrained(
            type(resumed.model), tmp_path / "checkpoint-7", None if "is_aux_trainable" in options else auxiliary()
        )
        assert is_equal(loaded, undisturbed.model)
        assert not said

    def test_resuming_from_several_files(self, tmp_path, said):
        undisturbed = trainer(tmp_path, connected())
        undisturbed.train()
        model = from_pretrained(type(undisturbed.model), tmp_path / "checkpoint-3", auxiliary())
        (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
        model.save_pretrained(tmp_path / "checkpoint-3", max_shard_size="20KB")
        resumed = trainer(tmp_path, connected(seed=7))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert is_equal(resumed.model, undisturbed.model) and not said

    @pytest.mark.parametrize("restored", [False, True])
    def test_resuming_with_another_auxiliary_model(self, tmp_path, restored):
        def run(**options):
            callbacks = {"restore_callback_states_from_checkpoint": restored}
            return trainer(tmp_path, connected(**options), PathwayCallback(merge=False), **callbacks)

        trainer(tmp_path, connected(), PathwayCallback(merge=False), max_steps=3).train()
        checkpoint = str(tmp_path / "checkpoint-3")
        digests = r"SHA-256 is \{.*[0-9a-f]{64}.*\}, expected \{'VideoMAEModel': '[0-9a-f]{64}'\}$"
        for options in ({"aux_model": build(VIDEO, seed=8)}, {"aux_dtype": "int8"}):
            with pytest.raises(ValueError, match=rf"^aux_model: .*{digests}"):
                run(**options).train(resume_from_checkpoint=checkpoint)
        resumed = run(seed=7)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.state.global_step == 7
        shutil.rmtree(tmp_path / "checkpoint-7")
        run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))  # which a resumed run has written

    def test_a_merged_model_is_not_trained_again(self, tmp_path):
        run = trainer(tmp_path, connected(), PathwayCallback(), max_steps=1)
        run.train()
        with pytest.raises(
            ValueError, match=r"^model: it was merged when training ended; merge=False keeps it connected"
        ):
            run.train()

    @pytest.mark.parametrize("is_merged", [False, True])
    def test_a_pushed_checkpoint_has_the_pathway(self, tmp_path, monkeypatch, is_merged):
        hub = Mock()
        monkeypatch.setattr("transformers.trainer.hf_api", lambda *_, **__: hub)
        run = trainer(tmp_path, connected(), PathwayCallback(merge=is_merged), max_steps=3, hub_model_id="me/vit")
        run.train()
        run.hub_model_id, run.push_in_progress = "me/vit", None
        run._push_from_checkpoint(str(tmp_path / "checkpoint-3"))
        assert (tmp_path / PATHWAY).exists() != is_merged
        if not is_merged:
            assert is_equal(from_pretrained(type(run.model), tmp_path, auxiliary()), run.model)

    def test_only_one_process_writes_what_is_pushed(self, tmp_path):
        run = trainer(tmp_path, connected(), PathwayCallback(merge=False))
        run.state.is_world_process_zero = False
        run.callback_handler.on_push_begin(run.args, run.state, run.control)
        assert not (tmp_path / PATHWAY).exists()

    def test_the_best_model_is_merged_and_saved(self, tmp_path, said):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "eval_strategy": "steps"}
        run = trainer(tmp_path, connected(), PathwayCallback(), eval_steps=3, **best)
        run.train()
        run.save_model(tmp_path)
        kept = from_pretrained(type(run.model), tmp_path / "checkpoint-3", auxiliary())
        assert is_equal(type(run.model).from_pretrained(tmp_path), merge_pathways(kept))
        assert not (tmp_path / PATHWAY).exists() and not said

    def test_without_merging_the_pathway_stays(self, tmp_path):
        run = trainer(tmp_path, connected(), PathwayCallback(merge=False))
        run.train()
        run.save_model(tmp_path)
        assert is_equal(from_pretrained(type(run.model), tmp_path, auxiliary()), run.model)

    def test_mean_absolute_scales_are_logged_beside_the_loss(self, tmp_path):
        model = connected(aux_model={"video": auxiliary(), "picture": build("ViTModel", seed=8)})
        reporter = Reporter()
        run = trainer(tmp_path, model, reporter, PathwayCallback(merge=False), max_steps=2, logging_steps=2)
        run.add_callback(run.pop_callback(Reporter))
        run.train()
        scales = cross_modal_scales(model)
        own = [[abs(scale) for name, scale in scales.items() if name.endswith(f"[{i}]")] for i in (0, 1)]
        expected = {"pathway/video": pytest.approx(fmean(own[0])), "pathway/picture": pytest.approx(fmean(own[1]))}
        for log in (run.state.log_history[0], reporter.seen[0]):
            assert {name: log[name] for name in log if name.startswith("pathway/")} == expected
        assert len(reporter.seen) == 2 and "pathway/video" not in reporter.seen[1]

    def test_a_new_model_of_each_run_is_completed_too(self, tmp_path):
        def model_init():
            return scaled(reparameterize_aux_into_target_model(build(), auxiliary()))

        args = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_steps=1)
        run = Trainer(args=args, model_init=model_init, train_dataset=DATA, callbacks=[PathwayCallback(merge=False)])
        run.train()
        assert is_equal(from_pretrained(type(run.model), tmp_path / "checkpoint-1", auxiliary()), run.model)

    def test_a_model_init_may_train_again_after_merging(self, tmp_path):
        args = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
        run = Trainer(args=args, model_init=lambda: connected(), train_dataset=DATA, callbacks=[PathwayCallback()])
        for _ in range(2):
            run.train()
            assert not any(name.endswith("cross_modal_scale") for name in run.model.state_dict())

    def test_divided_among_processes(self, tmp_path):
        model = connected()
        given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            callback = PathwayCallback()
            callback.on_train_begin(None, transformers.TrainerState(), None, model=model)
            assert callback.state()["attributes"] == {"sha256": {}}
            with pytest.raises(ValueError, match="divided among processes: gather it first"):
                model.save_pretrained(tmp_path, state_dict=given)
        finally:
            destroy_process_group()

    def test_inside_distributed_data_parallel(self):
        model = connected()
        scales = cross_modal_scales(model)
        expected = logits(model)
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
            logs, state = {"loss": 1.0}, transformers.TrainerState(log_history=[{}])
            PathwayCallback().on_log(None, state, None, logs=logs, model=wrapped)
            assert logs["pathway/VideoMAEModel"] == pytest.approx(fmean(map(abs, scales.values())))
            PathwayCallback().on_train_end(None, state, None, model=wrapped)
        finally:
            destroy_process_group()
        assert torch.allclose(logits(model), expected, atol=1e-5)
        with pytest.raises(ValueError, match=r"^model: there is no FusedCrossModalLinear"):
            cross_modal_scales(model)

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(TypeError, match=r"^merge: expected a bool, got 'yes'$"):
            PathwayCallback(merge="yes")
        with pytest.raises(ValueError, match=r"^model: there is no FusedCrossModalLinear inside this ViT"):
            trainer(tmp_path, build(), PathwayCallback())
        with pytest.raises(TypeError, match=r"^model: expected a transformers.PreTrainedModel .*, got ModuleDict$"):
            trainer(tmp_path, surgery_of_another_library(), PathwayCallback())


class TestPeft:
    def wrapped(self, model):
        peft = pytest.importorskip("peft")
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=["q_proj", "fc1"], modules_to_save=["classifier"], r=2)
        return peft.get_peft_model(model, config)

    def trainable(self, model):
        for name, parameter in model.named_parameters():
            if name.endswith("cross_modal_scale"):
                parameter.requires_grad_(True)
        return model

    def test_adapter_and_pathway_go_separate_ways_and_meet_again(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = self.trainable(self.wrapped(reparameterize_aux_into_target_model(build(), auxiliary())))
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.1))
        for _ in range(3):
            model.train()(pixel_values=IMAGES, labels=torch.arange(24) % 2).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save_pathway(model.get_base_model(), tmp_path / PATHWAY)
        model.save_pretrained(tmp_path)

        base = load_pathway(build(), auxiliary(), tmp_path / PATHWAY)
        assert all(scale != 0 for scale in cross_modal_scales(base).values())
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(logits(loaded), logits(model))

    def test_frozen_scales_are_said_once(self):
        model = self.wrapped(connect(build(), auxiliary())).train()
        with pytest.warns(UserWarning, match="cross_modal_scale is zero and frozen") as found:
            model(pixel_values=IMAGES[:2])
        assert len(found) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(pixel_values=IMAGES[:2])

    @pytest.mark.parametrize("is_plain_surgery", [False, True])
    def test_resuming_ends_as_the_undisturbed_run(self, tmp_path, is_plain_surgery):
        def run():
            if is_plain_surgery:
                model = self.wrapped(reparameterize_aux_into_target_model(build(), auxiliary()))
                return trainer(tmp_path, self.trainable(model), PathwayCallback(merge=False))
            return trainer(tmp_path, self.trainable(connect(self.wrapped(build()), auxiliary())))

        undisturbed = run()
        undisturbed.train()
        resumed = run()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert is_equal(resumed.model, undisturbed.model)
        base = load_pathway(build(), auxiliary(), tmp_path / "checkpoint-7" / PATHWAY)
        peft = pytest.importorskip("peft")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-7")
        assert torch.equal(logits(loaded), logits(undisturbed.model))

    @pytest.mark.parametrize("is_first", [True, False])
    def test_kept_after_wrapping_and_after_unloading(self, tmp_path, is_first):
        surgery = connect if is_first else reparameterize_aux_into_target_model
        model = keep_pathway(self.wrapped(surgery(build(), auxiliary())))
        scaled(model).save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / PATHWAY).exists()
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert is_equal(from_pretrained(type(merged), tmp_path / "merged", auxiliary()), merged)

    def test_a_pushed_adapter_has_the_pathway(self, tmp_path):
        run = trainer(tmp_path, scaled(connect(self.wrapped(build()), auxiliary())), PathwayCallback(merge=False))
        run.state.is_world_process_zero = True
        run.callback_handler.on_push_begin(run.args, run.state, run.control)
        loaded = load_pathway(build(), auxiliary(), tmp_path / PATHWAY)
        assert [*cross_modal_scales(loaded).values()] == [*cross_modal_scales(run.model).values()]

    def test_a_pathway_of_another_auxiliary_model_is_refused(self, tmp_path):
        scaled(connect(self.wrapped(build()), auxiliary())).save_pretrained(tmp_path)
        for options in ({"aux_model": build(VIDEO, seed=8)}, {"aux_model": auxiliary(), "aux_dtype": "int8"}):
            other = connect(self.wrapped(build()), **options)
            with pytest.raises(
                ValueError, match=r"^aux_model: .* SHA-256 is .*[0-9a-f]{64}.*, expected .*[0-9a-f]{64}"
            ):
                other.load_adapter(tmp_path, "default")

    def test_a_pathway_of_other_layers_is_refused(self, tmp_path):
        model = self.wrapped(connected())
        scaled(connect(model, build("ViTModel", seed=8), layer_names=["mlp.fc1"])).save_pretrained(tmp_path)
        other = connect(self.wrapped(build()), auxiliary(), layer_names=["mlp.fc2"])
        with pytest.raises(ValueError, match=r"^model: it has no vit.layers.0.attention.k_proj.cross_modal_scale, .*"):
            other.load_adapter(tmp_path, "default")

    def test_an_adapter_without_pathway_or_for_a_merged_model_is_loaded(self, tmp_path):
        self.wrapped(build()).save_pretrained(tmp_path)
        model = scaled(connect(self.wrapped(build()), auxiliary()))
        scales = cross_modal_scales(model)
        model.load_adapter(tmp_path, "default")
        assert cross_modal_scales(model) == scales
        model.save_pretrained(tmp_path)
        expected = logits(merge_pathways(model))
        model.load_adapter(tmp_path, "default")
        assert torch.equal(logits(model), expected)

    def test_it_is_not_merged_away_from_its_adapter(self, tmp_path):
        model = self.wrapped(connected())
        with pytest.raises(ValueError, match=r"^merge: expected False: a PeftModel saves only its adapter"):
            trainer(tmp_path, model, PathwayCallback())
        with pytest.raises(ValueError, match=r"^model: there is no FusedCrossModalLinear inside this PeftModel"):
            trainer(tmp_path, self.wrapped(build()), PathwayCallback(merge=False))
