"""Targets with auxiliary models over seeds: what is trained, what is compared, what is written."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import assignments, make_data, no_plots, tiny_model

from m2pt.checkpoints import save_state_dict
from m2pt.cli import main
from m2pt.matrix import compare, load_matrix
from m2pt.train import parse_assignment, train


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    no_plots(monkeypatch)
    torch.manual_seed(1)
    auxiliaries, targets = [], []
    for modality, recipe in (("image", "image_imagenet"), ("point", "point_modelnet40")):
        make_data(modality, tmp_path / modality)
        save_state_dict(tiny_model(modality, 0).state_dict(), tmp_path / f"{modality}.safetensors")
        auxiliaries.append(f'{modality} = "{tmp_path / modality}.safetensors"')
        targets += [f"[targets.{modality}]", f'recipe = "{recipe}"', f'data = "{tmp_path / modality}"']
        settings = [*assignments(modality), "schedule.epochs=1", "optimizer.base_lr=1.0"]
        overrides = dict(map(parse_assignment, settings))
        targets += [f"overrides.{key} = {json.dumps(value)}" for key, value in overrides.items()]
    file = tmp_path / "matrix.toml"
    file.write_text("\n".join(["seeds = [3, 4]", "[auxiliaries]", *auxiliaries, *targets]))
    return file


def test_a_target_says_which_blocks_its_auxiliary_models_reach(configuration):
    text = configuration.read_text()
    configuration.write_text(f'{text}\noverrides.auxiliary.blocks = "even"')
    assert load_matrix(configuration).targets["point"].auxiliary.blocks == "even"


def test_matrix_trains_compares_and_is_not_repeated(configuration, tmp_path, monkeypatch, capsys):
    out, trained = tmp_path / "out", []

    def recorded(recipe, folder, resume):
        trained.append((folder.relative_to(out).as_posix(), recipe.auxiliary.modality, recipe.run.seed))
        return train(recipe, folder, resume)

    monkeypatch.setattr("m2pt.matrix.train", recorded)
    assert main(["matrix", str(configuration), "--out", str(out)]) == 0
    assert trained == [
        *[(f"image/alone/{seed}", "", seed) for seed in (3, 4)],
        *[(f"image/point/{seed}", "point", seed) for seed in (3, 4)],
        *[(f"point/alone/{seed}", "", seed) for seed in (3, 4)],
        *[(f"point/image/{seed}", "image", seed) for seed in (3, 4)],
    ]
    report = (out / "gains.md").read_text()
    assert report.splitlines()[0] in capsys.readouterr().out and (out / "gains.png").stat().st_size
    gains = json.loads((out / "gains.json").read_text())
    assert [(gain["target"], gain["auxiliary"], gain["metric"]) for gain in gains] == [
        ("image", "point", "top1"),
        ("point", "image", "top1"),
    ]
    for gain in gains:
        for name, values in (("alone", gain["alone"]), (gain["auxiliary"], gain["connected"])):
            results = [json.loads((out / gain["target"] / name / f"{s}/result.json").read_text()) for s in (3, 4)]
            assert [result["merged"]["top1"] for result in results] == values

    assert main(["matrix", str(configuration), "--out", str(out)]) == 0
    assert len(trained) == 8 and (out / "gains.md").read_text() == report
    configuration.write_text(
        configuration.read_text().replace("overrides.schedule.epochs = 1", "overrides.schedule.epochs = 2")
    )
    assert main(["matrix", str(configuration), "--out", str(out)]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_shipped_configuration_needs_no_data():
    matrix = load_matrix(Path(__file__).parents[1] / "benchmarks" / "tiny_matrix.toml")
    assert len(matrix.seeds) == 3 and matrix.auxiliaries.keys() == {"image", "audio", "point", "video"}
    for modality, recipe in matrix.targets.items():
        assert recipe.model.modality == modality and recipe.model.init == matrix.auxiliaries[modality]
        assert recipe.data.layout == "embedded" and not recipe.data.root


def test_gain_is_compared_seed_by_seed():
    alone, connected = ([{"map": value} for value in values] for values in ([10.0, 20.0, 30.0], [11.0, 22.0, 33.0]))
    gain = compare("audio", "image", alone, connected)
    assert (gain.metric, gain.alone, gain.connected) == ("map", [10, 20, 30], [11, 22, 33])
    assert (gain.mean, gain.standard_deviation) == (2, 1)
    assert gain.standard_error == pytest.approx(3**-0.5)
    assert compare("audio", "image", alone[:1], connected[:1]).standard_error is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("seeds = [1", "matrix.toml"),
        ("seeds = [1]", "expected the keys seeds, targets, auxiliaries; got seeds"),
        ("seeds = []\n[targets]\n[auxiliaries]", "seeds: expected a list of different numbers"),
        ("seeds = [1, 1]\n[targets]\n[auxiliaries]", "seeds: expected a list of different numbers"),
        (
            "seeds = [1]\n[targets.a]\ndata = 'y'\n[auxiliaries]",
            r"targets\.a: expected the keys recipe, data, overrides",
        ),
        ("seeds = [1]\n[targets.a]\nrecipe = 'x'\ndata = 'y'\n[auxiliaries]", "recipe: x: no such file"),
    ],
)
def test_a_wrong_configuration_is_refused(text, message, tmp_path):
    file = tmp_path / "matrix.toml"
    file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_matrix(file)
