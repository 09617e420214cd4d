"""The demo from end to end, with an epoch of everything, and what it says of its figures."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from m2pt.checkpoints import load_state_dict
from m2pt.demo.data import labelled_subset, load_digit_images, load_speech
from m2pt.demo.experiment import Run, permuted, run_experiment
from m2pt.demo.models import digit_transformer, speech_transformer
from m2pt.demo.plots import plot_accuracy, plot_scales
from m2pt.demo.report import write_report
from m2pt.demo.settings import Settings
from m2pt.demo.summary import conclusion, summarize

DEFAULT = Settings()
SHORT = Settings(
    seeds=2,
    speech_pretraining=replace(DEFAULT.speech_pretraining, epochs=1),
    digit_pretraining=replace(DEFAULT.digit_pretraining, epochs=1),
    fine_tuning=replace(DEFAULT.fine_tuning, epochs=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def results(folder):
    return run_experiment(SHORT, folder / "merged.safetensors")


def test_every_variant_runs_with_every_seed_and_the_scales_move(results):
    assert [(run.variant, run.seed) for run in results.runs] == [
        (variant, seed) for seed in range(2) for variant in ("baseline", "pathway", "control")
    ]
    for run in results.runs:
        assert 0 <= run.accuracy <= 1
        assert len(run.scales) == (0 if run.variant == "baseline" else 16)
        assert all(run.scales.values())


def test_merged_checkpoint_loads_strictly_into_a_plain_model(results, folder):
    plain = speech_transformer(9)
    plain.load_state_dict(load_state_dict(folder / "merged.safetensors"))
    speech = load_speech()
    with torch.no_grad():
        accuracy = (plain.eval()(speech.test).argmax(1) == speech.test_speakers).double().mean().item()
    assert accuracy == results.merge.accuracy == results.runs[-2].accuracy


def test_saved_bytes(results):
    full, autocast = results.saved_bytes
    weights = sum(p.numel() for n, p in speech_transformer(9).blocks.named_parameters() if p.ndim == 2)
    assert full.fused == full.plain == full.published - 4 * weights
    assert autocast.fused == autocast.plain - 2 * weights


def test_repeated_runs_give_the_same_figures(results, tmp_path):
    again = run_experiment(SHORT, tmp_path / "merged.safetensors")
    assert again.runs == results.runs and again.reconstruction_errors == results.reconstruction_errors


def test_quantised_auxiliary_weights(results, folder, tmp_path):
    quantised = run_experiment(replace(SHORT, aux_dtype="int8"), tmp_path / "merged.safetensors")
    assert 0.001 < quantised.quantization_error < 0.02 and results.quantization_error is None
    assert quantised.saved_bytes == results.saved_bytes
    assert quantised.merge.max_logit_difference < 1e-4
    assert [run.scales for run in quantised.runs] != [run.scales for run in results.runs]
    write_report(quantised, tmp_path)
    assert "stored as int8, with a relative error of" in (tmp_path / "report.md").read_text()
    write_report(results, folder)
    assert "stored as" not in (folder / "report.md").read_text()


def test_files(results, folder):
    write_report(results, folder)
    plot_accuracy(results, folder / "accuracy.png")
    plot_scales(results, folder / "scales.png")
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["runs"] == [asdict(run) for run in results.runs]
    report = (folder / "report.md").read_text()
    assert "CC BY 4.0" in report and "| pathway |" in report
    assert {path.suffix for path in folder.iterdir()} == {".md", ".json", ".png", ".safetensors"}


def test_speech_is_the_published_data():
    speech = load_speech()
    assert speech.train.shape == (270, 1, 12, 30) and speech.test.shape == (370, 1, 12, 30)
    assert speech.train_speakers.bincount().tolist() == [30] * 9
    spoken = speech.train.abs().sum(2, keepdim=True).expand_as(speech.train) > 0
    assert speech.train[spoken].mean().abs() < 1e-2 and (speech.train[spoken].std() - 1).abs() < 1e-2


def test_labelled_subsets_are_balanced_and_differ_by_seed():
    speakers = load_speech().train_speakers
    subsets = [labelled_subset(speakers, 4, seed) for seed in (0, 0, 1)]
    assert all(speakers[subset].bincount().tolist() == [4] * 9 for subset in subsets)
    assert torch.equal(subsets[0], subsets[1]) and not torch.equal(subsets[0].sort()[0], subsets[2].sort()[0])


def test_permuted_keeps_the_values_and_not_the_order():
    model = digit_transformer()
    shuffled = permuted(model, 0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort()[0], shuffled.get_parameter(name).flatten().sort()[0])
    weight = model.blocks[0].attn.qkv.weight
    assert (weight == shuffled.blocks[0].attn.qkv.weight).double().mean() < 0.01
    assert load_digit_images().shape == (1797, 1, 8, 8)


def runs_of(**accuracies):
    return [Run(name, seed, value, {}) for name, values in accuracies.items() for seed, value in enumerate(values)]


def test_summary_and_conclusion_follow_from_the_figures():
    runs = runs_of(baseline=[0.5, 0.6, 0.7], pathway=[0.6, 0.7, 0.8], control=[0.4, 0.7, 0.7])
    baseline, pathway, control = summarize(runs)
    assert (baseline.mean, pathway.difference, control.difference) == pytest.approx((60, 10, 0))
    assert control.standard_error == pytest.approx(10 / 3**0.5)
    assert "pathway (+10.00 points)" in conclusion([baseline, pathway, control])
    assert "control" not in conclusion([baseline, pathway, control])
    assert conclusion([baseline, control]).startswith("No difference")
