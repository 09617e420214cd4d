"""The demo from end to end, with an epoch of everything, and what it says of its metrics."""

import json
import shutil
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from tiny_runs import interrupted, no_plots

from m2pt.checkpoints import load_state_dict
from m2pt.data import create_dataset
from m2pt.demo.experiment import plain_transformer, random_features_accuracy, run_demo
from m2pt.demo.report import markdown, write_report
from m2pt.matrix import compare
from m2pt.train import load_recipe
from m2pt.train.creation import created
from m2pt.train.files import CHECKPOINT, load_trained, read_json

pytestmark = pytest.mark.slow

SHORT = {"schedule.epochs": 1}


@pytest.fixture(scope="module", autouse=True)
def without_plots():
    with pytest.MonkeyPatch.context() as patch:
        no_plots(patch)
        yield


@pytest.fixture(scope="module")
def results(folder):
    return run_demo(folder, 2, overrides=SHORT)


def test_every_variant_runs_with_every_seed_and_the_scales_move(results, folder):
    runs = {(path.parent.parent.name, path.parent.name) for path in folder.glob("*/*/result.json")}
    assert runs == {(variant, seed) for variant in ("baseline", "pathway", "control") for seed in "01"}
    assert results.digits.alone == results.shuffled.alone
    assert results.digits_over_shuffled.connected == results.digits.connected
    assert results.digits_over_shuffled.alone == results.shuffled.connected
    for variant in ("pathway", "control"):
        assert [len(scales) for scales in results.scales[variant]] == [16, 16]
        assert all(scale for scales in results.scales[variant] for scale in scales.values())


def test_the_variants_of_a_seed_differ_in_their_auxiliary_weights_alone(results, folder):
    for seed in "01":
        recipes = [read_json(folder / variant / seed / "recipe.json") for variant in ("baseline", "pathway", "control")]
        assert all(recipe.pop("auxiliary") is not None for recipe in recipes) and recipes[0] == recipes[1] == recipes[2]
        assert recipes[0]["data"]["settings"] == {"shot": 4, "fold": int(seed)}
        assert recipes[0]["model"]["init"] == str(folder / "speech" / "pretrained.safetensors")


def test_the_control_keeps_the_values_and_not_the_order(results, folder):
    digits, *shuffled = (
        load_state_dict(folder / name)
        for name in ("digits/pretrained.safetensors", "shuffled/0.safetensors", "shuffled/1.safetensors")
    )
    for name, tensor in digits.items():
        assert all(torch.equal(tensor.flatten().sort()[0], other[name].flatten().sort()[0]) for other in shuffled)
    weights = [entries["blocks.0.attn.qkv.weight"] for entries in (digits, *shuffled)]
    assert all((a == b).double().mean() < 0.01 for a, b in pairwise(weights))
    trained = load_trained(folder / "control" / "1" / CHECKPOINT).state_dict
    assert torch.equal(trained["blocks.0.attn.qkv.aux_weight"], weights[2])


def test_merged_checkpoint_loads_strictly_into_a_plain_timm_model(results, folder):
    test_set = create_dataset("audio", "embedded", None, "test", False)
    plain = plain_transformer(load_recipe("tiny_audio"))
    plain.load_state_dict(load_state_dict(folder / "pathway" / "1" / "merged.safetensors"))
    with torch.no_grad():
        predicted = plain.eval()(test_set.inputs).argmax(1)
    accuracy = (predicted == torch.tensor(test_set.labels)).double().mean().item()
    assert 100 * accuracy == pytest.approx(results.digits.connected[1])
    assert results.merge_difference <= 1e-4


def test_a_merged_checkpoint_that_computes_something_else_is_an_error(results, folder, monkeypatch):
    monkeypatch.setattr("m2pt.demo.experiment.MERGE_TOLERANCE", -1.0)
    with pytest.raises(ArithmeticError, match=r"pathway/0/merged\.safetensors: logits differ by"):
        run_demo(folder, 2, overrides=SHORT)


def test_saved_bytes(results):
    full, autocast = results.saved_bytes["float32"], results.saved_bytes["bfloat16 autocast"]
    model = created(load_recipe("tiny_audio"), 9)
    weights = sum(p.numel() for n, p in model.blocks.named_parameters() if p.ndim == 2)
    assert full["fused"] == full["plain"] == full["published"] - 4 * weights
    assert autocast["fused"] == autocast["plain"] - 2 * weights


def test_an_interrupted_demo_goes_on_to_the_same_metrics(results, tmp_path):
    with interrupted(10), pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, 2, overrides=SHORT)
    finished = {path.parent.name for path in tmp_path.rglob("pretrained.safetensors")}
    assert finished == {"speech"} and not list(tmp_path.rglob("*.partial"))
    assert run_demo(tmp_path, 2, overrides=SHORT) == results


def test_what_is_finished_is_not_trained_again(results, folder):
    with interrupted(0):
        assert run_demo(folder, 2, overrides=SHORT) == results
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run_demo(folder, 2, "int8", SHORT)


def test_quantised_auxiliary_weights(results, folder, tmp_path):
    for name in ("speech", "digits"):  # no auxiliary weights are there yet
        shutil.copytree(folder / name, tmp_path / name)
    quantised = run_demo(tmp_path, 2, "int8", SHORT)
    assert 0.001 < quantised.quantization_error < 0.02 and results.quantization_error is None
    assert quantised.saved_bytes == results.saved_bytes
    assert quantised.merge_difference < 1e-4
    assert quantised.scales != results.scales and quantised.digits.alone == results.digits.alone
    assert "stored as int8, with a relative error of" in markdown(quantised)
    assert "stored as" not in markdown(results)


def test_random_features_are_measured_on_the_runs_own_utterances(results, folder):
    recipes = [read_json(folder / "baseline" / seed / "recipe.json") for seed in "01"]
    for recipe, accuracy in zip(recipes, results.random_features, strict=True):
        given = {"data.settings": recipe["data"]["settings"], "run.seed": recipe["run"]["seed"]}
        assert random_features_accuracy(load_recipe("tiny_audio", given)) == accuracy
    assert all(70 < accuracy < 95 for accuracy in results.random_features)


def test_report_says_what_is_demonstrated_before_the_accuracies(results):
    a, b = ([{"top1": value} for value in values] for values in ([80.0, 90.0], [81.0, 92.0]))
    known = replace(results, digits=compare("speech", "digits", a, b), random_features=[84.0, 86.0])
    report = markdown(known)
    parts = (
        "Merged into a plain timm model, logits differ by",
        "| float32 |",
        "| bfloat16 autocast |",
        "16 scales were learned",
        "| speech | digits | top1 | 85.00 | 86.50 | +1.50 | 0.71 | 0.50 | 2 |",
        "| speech | digits, shuffled | top1 |",
        "logistic regression on a frozen random transformer already reaches 85.0 % on this task",
        "CC BY 4.0",
    )
    places = [report.index(part) for part in parts]
    assert places == sorted(places)


def test_files(results, tmp_path):
    write_report(results, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "results.json", "scales.png"}
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(asdict(results)))
    assert (tmp_path / "report.md").read_text().startswith(markdown(results))
