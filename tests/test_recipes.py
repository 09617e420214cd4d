"""Recipes: the published figures, what may be overridden, and what is refused."""

from pathlib import Path

import pytest
import torch

from m2pt.data import create_dataset
from m2pt.models import create_model
from m2pt.train import describe_recipe, load_recipe, parse_assignment, shipped_recipes
from m2pt.train.optimization import create_scheduler
from m2pt.train.recipe import tomllib
from m2pt.train.toml import toml_value

RECIPES = Path(__file__).parent.parent / "m2pt" / "recipes"
CLASSES = {"image": 1000, "audio": 527, "point": 40, "video": 400}

PUBLISHED = {
    "image_imagenet": {
        "learning_rate": 2e-3,  # 5e-4 * 1024 / 256
        "schedule.epochs": 100,
        "schedule.warmup_epochs": 5,
        "data.batch_size": 1024,
        "optimizer.layer_decay": 0.65,
        "optimizer.weight_decay": 0.05,
        "model.overrides.drop_path_rate": 0.1,
        "loss.mixup": 0.8,
        "loss.cutmix": 1.0,
        "loss.label_smoothing": 0.1,
    },
    "image_imagenet_probe": {
        "optimizer.base_lr": 0.1,
        "optimizer.weight_decay": 0.0,
        "schedule.epochs": 90,
        "model.trainable": "head",
    },
    "audio_audioset": {
        "optimizer.base_lr": 1e-3,
        "optimizer.layer_decay": 0.75,
        "optimizer.weight_decay": 5e-4,
        "schedule.epochs": 60,
        "schedule.warmup_epochs": 4,
        "model.overrides.drop_path_rate": 0.1,
        "model.overrides.time_masking": 0.2,
        "model.overrides.frequency_masking": 0.2,
        "data.settings.time_mask": 192,
        "data.settings.frequency_mask": 48,
        "data.settings.mixup": 0.5,
        "loss.name": "binary_cross_entropy",
    },
    "audio_esc50": {"model.overrides.img_size": [512, 128], "optimizer.base_lr": 1e-3},
    "audio_speech_commands": {"model.overrides.img_size": [128, 128], "optimizer.base_lr": 1e-3},
    "point_modelnet40": {
        "learning_rate": 5e-4,
        "data.batch_size": 32,
        "data.settings.points": 1024,
        "model.overrides.num_groups": 64,
        "model.overrides.group_size": 32,
        "model.overrides.drop_path_rate": 0.1,
        "optimizer.weight_decay": 0.05,
        "optimizer.clip_grad": 10.0,
        "schedule.epochs": 300,
        "schedule.warmup_epochs": 10,
    },
    "point_modelnet40_few_shot": {
        "learning_rate": 5e-4,
        "schedule.epochs": 150,
        "data.settings.points": 1024,
        "model.overrides.num_groups": 64,
    },
    "point_scanobjectnn": {
        "learning_rate": 5e-4,
        "schedule.epochs": 300,
        "data.settings.points": 2048,
        "model.overrides.num_groups": 128,
    },
    "point_shapenetpart": {
        "model.task": "segmentation",
        "data.settings.points": 2048,
        "model.overrides.num_groups": 128,
        "schedule.epochs": 300,
    },
    "video_kinetics400": {
        "optimizer.base_lr": 7e-4,
        "schedule.epochs": 90,
        "schedule.warmup_epochs": 5,
        "data.settings.repeats": 2,
        "data.settings.stride": 4,
        "data.settings.frames": 16,
        "data.settings.clips": 5,
        "data.settings.crops": 3,
        "data.settings.erasing": 0.25,
        "optimizer.weight_decay": 0.05,
        "optimizer.layer_decay": 0.75,
        "model.overrides.drop_path_rate": 0.1,
        "loss.mixup": 0.8,
        "loss.cutmix": 1.0,
    },
    "pretrain_image": {"pretraining.mask_ratio": 0.75, "optimizer.base_lr": 1.5e-4, "data.batch_size": 4096},
    "pretrain_audio": {"pretraining.mask_ratio": 0.8, "optimizer.base_lr": 2e-4, "data.batch_size": 512},
    "pretrain_point": {"pretraining.mask_ratio": 0.6, "learning_rate": 1e-3, "data.batch_size": 128},
    "pretrain_video": {"pretraining.mask_ratio": 0.9, "optimizer.base_lr": 1.5e-4, "data.batch_size": 1024},
}


TINY = {"image": 10, "audio": 9, "point": 10, "video": 5}


def value(recipe, key):
    for part in key.split("."):
        recipe = recipe[part] if isinstance(recipe, dict) else getattr(recipe, part)
    return recipe


def test_every_shipped_recipe_is_checked():
    tiny = [f"{kind}tiny_{modality}" for modality in TINY for kind in ("", "pretrain_")]
    assert shipped_recipes() == sorted([*PUBLISHED, *tiny])


def test_tiny_recipes_fit_each_other_and_read_no_folder():
    for modality, classes in TINY.items():
        recipe, pretraining = load_recipe(f"tiny_{modality}"), load_recipe(f"pretrain_tiny_{modality}")
        assert recipe.model == pretraining.model and recipe.data.settings == pretraining.data.settings
        assert recipe.model.modality == modality and pretraining.pretraining is not None
        assert recipe.data.layout == pretraining.data.layout == "embedded" and not recipe.data.root
        model = create_model(modality, recipe.model.size, num_classes=classes, **recipe.model.overrides)
        assert len(model.blocks) == 4 and model.blocks[0].attn.qkv.weight.shape == (192, 64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_the_published_ones(name):
    recipe = load_recipe(name)
    assert {key: value(recipe, key) for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_and_data_accept_their_settings(name, tmp_path):
    recipe = load_recipe(name)
    model, data = recipe.model, recipe.data
    with torch.device("meta"):
        create_model(model.modality, model.size, model.task, num_classes=CLASSES[model.modality], **model.overrides)
    for split, training in ((data.train_split, True), (data.test_split, False)):
        with pytest.raises(FileNotFoundError, match="root"):  # the settings are checked before
            create_dataset(model.modality, data.layout, tmp_path / "none", split, training, **data.settings)


def test_a_value_is_replaced_by_its_dotted_key():
    recipe = load_recipe(
        "image_imagenet", {"optimizer.base_lr": 1, "model.overrides.depth": 2, "pretraining.mask_ratio": 0.5}
    )
    assert (recipe.optimizer.base_lr, recipe.model.overrides) == (1.0, {"drop_path_rate": 0.1, "depth": 2})
    assert recipe.pretraining is not None and recipe.pretraining.mask_ratio == 0.5
    assert recipe.with_overrides({"run.seed": 3}).run.seed == 3 and recipe.run.seed == 0


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_can_be_cut_to_one_epoch(name):
    """Its warm-up is then the first tenth of it; a longer run keeps the recipe's."""
    recipe = load_recipe(name, {"schedule.epochs": 1})
    steps = 20
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": 1.0}], lr=recipe.learning_rate)
    scheduler = create_scheduler(optimizer, recipe, steps)
    rates = []
    for step in range(steps):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    warmup_lr = recipe.schedule.warmup_lr
    assert rates[:3] == pytest.approx([warmup_lr, (warmup_lr + recipe.learning_rate) / 2, recipe.learning_rate])
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.05 * recipe.learning_rate
    whole = load_recipe(name).schedule
    assert whole.warmup == whole.warmup_epochs < whole.epochs


def test_a_recipe_is_read_from_a_file(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text((RECIPES / "image_imagenet.toml").read_text())
    assert load_recipe(str(file)) == load_recipe("image_imagenet")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("schedule.epochs=3", ("schedule.epochs", 3)),
        ("model.size=tiny", ("model.size", "tiny")),
        ('model.size="tiny"', ("model.size", "tiny")),
        ("a.b=[1, 2]", ("a.b", [1, 2])),
        ("machine.compile=true", ("machine.compile", True)),
        ("model.init=a=b.pth", ("model.init", "a=b.pth")),
    ],
)
def test_assignments_hold_toml(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["schedule.epochs", "=3"])
def test_an_assignment_needs_key_and_value(text):
    with pytest.raises(ValueError, match=r"expected key\.subkey=value"):
        parse_assignment(text)


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        ({"optimiser.base_lr": 1.0}, ValueError, "^optimiser: unknown key; allowed: model, data, optimizer"),
        ({"optimizer.lr": 1.0}, ValueError, "^optimizer.lr: unknown key; allowed: base_lr, name, weight_decay"),
        ({"schedule.epochs": "ten"}, TypeError, "^schedule.epochs: expected int, got 'ten'"),
        ({"schedule.epochs": 1.5}, TypeError, "^schedule.epochs: expected int, got 1.5"),
        ({"schedule.epochs": True}, TypeError, "^schedule.epochs: expected int, got True"),
        ({"schedule.epochs": 0}, ValueError, "^schedule.epochs: expected a positive integer, got 0"),
        ({"schedule.warmup_epochs": -1}, ValueError, "^schedule.warmup_epochs: expected 0 or more, got -1"),
        ({"model": 3}, TypeError, "^model: expected a table, got 3"),
        ({"data.layout.x": 3}, ValueError, "^data.layout.x: layout is a value, not a table"),
        ({"model.size.x": 3}, TypeError, "^model.size: expected str, got {'x': 3}"),
        ({"model.overrides": 3}, TypeError, "^model.overrides: expected dict, got 3"),
        ({"model.trainable": "tail"}, ValueError, "^model.trainable: expected one of 'all', 'head', got 'tail'"),
        ({"machine.precision": "int8"}, ValueError, "^machine.precision: expected one of 'float32', 'bfloat16'"),
        ({"machine.accumulation": 0}, ValueError, "^machine.accumulation: expected a positive integer"),
        ({"machine.workers": -1}, ValueError, "^machine.workers: expected 0 or more"),
        ({"data.batch_size": 0}, ValueError, "^data.batch_size: expected a positive integer"),
        ({"loss.label_smoothing": 1.0}, ValueError, "^loss.label_smoothing: expected a number in"),
        ({"loss.mixup": -1.0}, ValueError, "^loss.mixup: expected 0 or more"),
        ({"run.ema_decay": 2.0}, ValueError, "^run.ema_decay: expected a probability"),
        ({"run.seed": -1}, ValueError, "^run.seed: expected 0 or more"),
        ({"pretraining.decoder_depth": 2}, ValueError, "^pretraining.mask_ratio: missing"),
        ({"auxiliary.dtype": "float16"}, ValueError, "^auxiliary.path: missing"),
        ({"auxiliary.path": "a", "auxiliary.blocks": "odd"}, ValueError, "^auxiliary.blocks: expected one of '', "),
        ({"auxiliary.path": 5}, TypeError, "^auxiliary.path: expected str, got 5"),
        ({"auxiliary.path": ["a", 5]}, ValueError, "^auxiliary.path: expected a path or a list of different ones"),
        ({"auxiliary.path": ["a", "a"]}, ValueError, "^auxiliary.path: expected a path or a list of different ones"),
    ],
)
def test_a_wrong_value_is_named(overrides, error, message):
    with pytest.raises(error, match=message):
        load_recipe("image_imagenet", overrides)


def test_a_probe_cannot_train_auxiliary_weights():
    with pytest.raises(ValueError, match=r"auxiliary\.trainable"):
        load_recipe("image_imagenet_probe", {"auxiliary.path": "a", "auxiliary.trainable": True})


def test_missing_and_damaged_recipes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml: no such file, and none that `m2pt recipes` lists$"):
        load_recipe("none.toml")
    file = tmp_path / "damaged.toml"
    file.write_text("[model\n")
    with pytest.raises(ValueError, match=r"damaged\.toml"):
        load_recipe(str(file))
    file.write_text("")
    with pytest.raises(ValueError, match=r"^model: missing"):
        load_recipe(str(file))


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_printed_recipe_is_read_as_the_same(name, tmp_path):
    recipe = load_recipe(name, {"run.seed": 3})
    (tmp_path / "own.toml").write_text(recipe.as_toml(), "utf-8")
    assert load_recipe(str(tmp_path / "own.toml")) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_described_in_a_line(name):
    assert describe_recipe(name).endswith(".") and len(describe_recipe(name)) > 20
    assert (RECIPES / f"{name}.toml").read_text("utf-8").startswith(f"# {describe_recipe(name)}\n")


@pytest.mark.parametrize(
    "value",
    [
        "",
        'a "b" \\ \n\t\x00\x7f\x85 ü 😀',
        "'''",
        0,
        -(2**63),
        True,
        1e-5,
        1e16,
        -0.0,
        float("inf"),
        [],
        [[1, 2], ["a"]],
        [{"a": 1}, {}],
        {},
        {"a.b": {"": {"c d": [False, 0.5]}}, 'q"': {}, "é": 1},
    ],
)
def test_a_value_is_read_as_it_was_written(value):
    read = tomllib.loads(f"value = {toml_value(value)}")["value"]
    assert (read, repr(read)) == (value, repr(value))


def test_a_value_that_is_none_of_toml_is_refused():
    with pytest.raises(TypeError, match=r"^expected a string, boolean, number, list or table, got None"):
        toml_value([None])


@pytest.mark.parametrize(
    "name, overrides, nearest",
    [
        ("tiny_imag", {}, "'tiny_image'"),
        ("image_imagenet.tml", {}, "'image_imagenet' or 'image_imagenet_probe'"),
        ("tiny_image", {"optimiser.base_lr": 1.0}, "'optimizer'"),
        ("tiny_image", {"schedule.epoch": 1}, "'epochs'"),
        ("tiny_image", {"machine.sharding": "fdsp"}, "'fsdp'"),
    ],
)
def test_the_nearest_name_ends_the_error(name, overrides, nearest):
    with pytest.raises((ValueError, FileNotFoundError), match=f"; did you mean {nearest}\\?$"):
        load_recipe(name, overrides)
