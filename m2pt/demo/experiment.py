"""The experiment: how a pathway from a frozen digit transformer changes a model that tells speakers apart.

It uses the data of `m2pt.data.embedded`, and every model is trained by `m2pt.train` in a folder of its own.
"""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from ..checkpoints import load_state_dict, save_state_dict
from ..checks import require
from ..data.embedded import SPEAKERS, spoken_vowels
from ..matrix import Gain, compare, trained_metrics
from ..pathway import cross_modal_scales, quantization_errors
from ..saved_bytes import published_formulation, saved_for_backward_bytes
from ..train import Recipe, load_recipe, pretrain
from ..train.creation import connect, created, read_auxiliaries
from ..train.files import CHECKPOINT, load_trained

linear_model = require("sklearn.linear_model", "train")

LABELLED = 4
FINE_TUNING: dict[str, Any] = {
    "data.batch_size": 12,
    "data.settings.shot": LABELLED,
    "optimizer.base_lr": 6.4e-2,
    "optimizer.scale_learning_rate": 3.0,
    "schedule.epochs": 30,
    "schedule.warmup_epochs": 3,
    "run.eval_epochs": 30,
}
"""Overrides of the recipe tiny_audio. The learning rate, 3e-3 for a batch of 12, was chosen by the baseline's accuracy
on unlabelled training utterances, with seeds that the experiment does not use. It is higher for the scales: a step of
AdamW is about as long as the learning rate, and a scale has a range of order 1."""
MERGE_TOLERANCE = 1e-4

Result = TypeVar("Result")


@dataclass(frozen=True)
class Results:
    """Everything that was measured.

    Attributes:
        merge_difference: the largest difference between the logits of a connected model and those of a plain timm model
            with its merged checkpoint, over all runs and test utterances.
        saved_bytes: bytes that the forward pass of one batch saves for backward, by precision and formulation.
        quantization_error: the largest relative error of an auxiliary weight; None if they are not quantised.
        scales: the scale of every layer, by variant and seed.
        digits, shuffled: the gain from the digit transformer, and from the same with its entries shuffled.
        digits_over_shuffled: the gain of the first over the second.
        random_features: test accuracy in percent of logistic regression on a frozen random transformer, by seed.
    """

    merge_difference: float
    saved_bytes: dict[str, dict[str, int]]
    aux_dtype: str
    quantization_error: float | None
    scales: dict[str, list[dict[str, float]]]
    digits: Gain
    shuffled: Gain
    digits_over_shuffled: Gain
    random_features: list[float]


def run_demo(out: Path, seeds: int, aux_dtype: str = "", overrides: dict[str, Any] | None = None) -> Results:
    """Pretrain both transformers, fine-tune every variant with every seed, check that they merge, and measure.

    The variants of a seed share the pretrained start, the head and the batches. Runs that an earlier call finished in
    `out` are not trained again, and an interrupted one is resumed.

    Args:
        out: folder to write to, made if it is missing, with a folder for every run, see `m2pt.train.train`.
        seeds: runs of each variant.
        aux_dtype: how the auxiliary weights are stored, as in `m2pt.quantize_aux`; unchanged if empty.
        overrides: values of all recipes to override, by dotted key.

    Raises:
        ValueError: fewer than two seeds, or `out` holds runs of other recipes.
        ArithmeticError: a merged model does not compute what the connected one does.
        OSError: `out` cannot be written to.
    """
    if seeds < 2:
        raise ValueError(f"seeds: expected at least 2, for a standard deviation, got {seeds}")
    out.mkdir(parents=True, exist_ok=True)
    overrides = overrides or {}
    for name, recipe in (("speech", "pretrain_tiny_audio"), ("digits", "pretrain_tiny_image")):
        _quietly(f"pretraining on {name}", partial(_pretrain, load_recipe(recipe, overrides), out / name))
    speech, digits = (str(out / name / "pretrained.safetensors") for name in ("speech", "digits"))
    utterances = spoken_vowels(None, "test", False).inputs
    metrics: dict[str, list[dict[str, float]]] = {"baseline": [], "pathway": [], "control": []}
    scales: dict[str, list[dict[str, float]]] = {"pathway": [], "control": []}
    differences, random_features = [], []
    for seed in range(seeds):
        own: dict[str, Any] = {"model.init": speech, "data.settings.fold": seed, "run.seed": seed}
        for variant, path in (("baseline", ""), ("pathway", digits), ("control", _shuffled(digits, seed, out))):
            aux = {"auxiliary.path": path, "auxiliary.modality": "image", "auxiliary.dtype": aux_dtype} if path else {}
            run = load_recipe("tiny_audio", FINE_TUNING | own | aux | overrides)
            folder = out / variant / str(seed)
            what = f"fine-tuning, seed {seed + 1} of {seeds}: {variant}"
            metrics[variant].append(_quietly(what, partial(trained_metrics, run, folder)))
            if path:
                connected = _connected(run)
                connected.load_state_dict(load_trained(folder / CHECKPOINT).state_dict)
                differences.append(_merge_difference(connected, run, folder / "merged.safetensors", utterances))
                scales[variant].append(cross_modal_scales(connected))
        random_features.append(random_features_accuracy(run))
    unquantized = _connected(run.with_overrides({"auxiliary.dtype": ""}))
    models = {"plain": created(run, SPEAKERS), "fused": _connected(run), "published": unquantized}
    return Results(
        max(differences),
        _saved_bytes(models, utterances[: run.data.batch_size].clone()),
        aux_dtype,
        max(quantization_errors(unquantized, aux_dtype).aux_weights.values()) if aux_dtype else None,
        scales,
        compare("speech", "digits", metrics["baseline"], metrics["pathway"]),
        compare("speech", "digits, shuffled", metrics["baseline"], metrics["control"]),
        compare("speech", "digits", metrics["control"], metrics["pathway"]),
        random_features,
    )


def _quietly(what: str, run: Callable[[], Result]) -> Result:
    """Print what runs, but not its own output, which its log holds; a terminal shows a progress bar."""
    print(what, flush=True)
    with redirect_stdout(io.StringIO()):
        return run()


def _pretrain(recipe: Recipe, folder: Path) -> None:
    pretrain(recipe, folder, resume=(folder / CHECKPOINT).exists())


def _shuffled(path: str, seed: int, out: Path) -> str:
    """A checkpoint with the entries of every tensor shuffled: the same values, but nothing that was learned."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(tensor: Tensor) -> Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)

    shuffled = out / "shuffled" / f"{seed}.safetensors"
    shuffled.parent.mkdir(exist_ok=True)
    save_state_dict({name: shuffle(tensor) for name, tensor in load_state_dict(path).items()}, shuffled)
    return str(shuffled)


def _connected(recipe: Recipe) -> nn.Module:
    """The recipe's model with its pathway, randomly initialised."""
    return connect(created(recipe, SPEAKERS), read_auxiliaries(recipe), recipe)


def plain_transformer(recipe: Recipe) -> nn.Module:
    """timm's own model in the recipe's sizes, without pathways."""
    sizes = recipe.model.overrides | {"in_chans": 1, "num_classes": SPEAKERS, "global_pool": "avg"}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


@torch.inference_mode()
def _merge_difference(connected: nn.Module, recipe: Recipe, merged: Path, utterances: Tensor) -> float:
    plain = plain_transformer(recipe)
    plain.load_state_dict(load_state_dict(merged))
    difference = (plain.eval()(utterances) - connected.eval()(utterances)).abs().max().item()
    if not difference <= MERGE_TOLERANCE:
        raise ArithmeticError(f"{merged}: logits differ by {difference:.1e}, expected {MERGE_TOLERANCE:.0e} at most")
    return difference


def _saved_bytes(models: Mapping[str, nn.Module], batch: Tensor) -> dict[str, dict[str, int]]:
    saved = {}
    for precision, enabled in (("float32", False), ("bfloat16 autocast", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), published_formulation(models["published"]):
            saved[precision] = {name: saved_for_backward_bytes(model, batch) for name, model in models.items()}
    return saved


@torch.inference_mode()
def random_features_accuracy(recipe: Recipe) -> float:
    """Test accuracy in percent of logistic regression on the features of the recipe's model, random and frozen."""
    train, test = (spoken_vowels(None, split, False, **recipe.data.settings) for split in ("train", "test"))
    random_seed(recipe.run.seed)
    model = created(recipe, num_classes=0).eval()
    classifier = linear_model.LogisticRegression(max_iter=10_000).fit(model(train.inputs).numpy(), train.labels)
    return 100 * classifier.score(model(test.inputs).numpy(), test.labels)
