"""A connected model of transformers saves, loads and trains as any other; on small random models."""

import copy
import logging
import pickle
import shutil
import warnings
from statistics import fmean

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group

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
from m2pt.checkpoints import read_safetensors

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from m2pt.integrations.transformers import PATHWAY, PathwayCallback, connect, from_pretrained  # noqa: E402

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
        with pytest.raises(ValueError, match="connect by surgery"):
            model.save_pretrained(tmp_path)
        assert not [*tmp_path.iterdir()]

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
        model.save_pretrained(tmp_path / "own", push_to_hub=True, private=True, commit_message="Trained")
        model.save_pretrained(tmp_path / "own", push_to_hub=True, repo_id="me/vit")
        assert pushed == [("own", {"private": True, "commit_message": "Trained"}), ("me/vit", {})]
        assert is_equal(from_pretrained(type(model), tmp_path / "upload", auxiliary()), model)

    def test_a_name_on_the_hub_is_loaded(self, tmp_path):
        model = connected()
        cache = tmp_path / "models--me--vit"
        model.save_pretrained(cache / "snapshots" / "0123")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0123")
        for kind in (type(model), transformers.AutoModelForImageClassification):
            loaded = from_pretrained(kind, "me/vit", auxiliary(), cache_dir=tmp_path, local_files_only=True)
            assert is_equal(loaded, model)


class TestErrors:
    def test_without_a_pathway(self, tmp_path):
        build().save_pretrained(tmp_path)
        with pytest.raises(OSError, match=PATHWAY):
            from_pretrained(transformers.ViTForImageClassification, tmp_path, auxiliary())

    def test_another_auxiliary_model(self, tmp_path):
        connected().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"^aux_model: the weights of 'VideoMAEModel' are others"):
            from_pretrained(transformers.ViTForImageClassification, tmp_path, build(VIDEO, seed=8))

    def test_plain_loading_says_what_it_leaves_out(self, tmp_path, said):
        connected().save_pretrained(tmp_path)
        transformers.ViTForImageClassification.from_pretrained(tmp_path)
        assert len(said) == 1 and "cross_modal_scale" in said[0]

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
        block = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(2, 2)})])})
        reparameterize_aux_into_target_model(block, copy.deepcopy(block))
        with pytest.raises(TypeError, match=r"^model: expected a transformers.PreTrainedModel .*, got ModuleDict$"):
            trainer(tmp_path, block, PathwayCallback())


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
        with pytest.raises(ValueError, match=r"^merge: expected False: of a PeftModel the adapter is saved alone"):
            trainer(tmp_path, model, PathwayCallback())
        with pytest.raises(ValueError, match=r"^model: there is no FusedCrossModalLinear inside this PeftModel"):
            trainer(tmp_path, self.wrapped(build()), PathwayCallback(merge=False))
