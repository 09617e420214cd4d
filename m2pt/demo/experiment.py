"""The experiment: does a frozen digit transformer, connected by a pathway, help to tell speakers apart?"""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import load_state_dict, save_state_dict
from ..models import MaskedAutoencoder
from ..pathway import cross_modal_scales, merge_pathways, quantization_errors
from ..saved_bytes import published_formulation, saved_for_backward_bytes
from ..surgery import reparameterize_aux_into_target_model
from .data import SPEAKERS, Speech, labelled_subset, load_digit_images, load_speech
from .models import digit_transformer, speech_transformer
from .settings import Settings, TrainingSettings
from .training import train

MERGE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Run:
    """One fine-tuned model: its accuracy on the test split, 0 to 1, and its learned scales by layer name."""

    variant: str
    seed: int
    accuracy: float
    scales: dict[str, float]


@dataclass(frozen=True)
class Merge:
    """The last seed's pathway model, merged, saved and loaded into a plain timm model."""

    accuracy: float
    max_logit_difference: float


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that the forward of one fine-tuning batch saves for backward."""

    precision: str
    plain: int
    fused: int
    published: int


@dataclass(frozen=True)
class Environment:
    """Versions, and the wall-clock time that the experiment took."""

    torch: str
    timm: str
    cpus: int | None
    seconds: float


@dataclass(frozen=True)
class Results:
    """Everything that was measured.

    The reconstruction errors are the masked autoencoders', by modality; the quantization error is the largest relative
    one of an auxiliary weight, None where they are stored as they are.
    """

    settings: Settings
    reconstruction_errors: dict[str, float]
    quantization_error: float | None
    runs: list[Run]
    merge: Merge
    saved_bytes: list[SavedBytes]
    environment: Environment


def run_experiment(settings: Settings, merged_path: Path) -> Results:
    """Pretrain both transformers, fine-tune every variant with every seed, merge one pathway model to `merged_path`.

    Raises:
        RuntimeError: the merged model does not compute what the connected one did.
    """
    start = time.perf_counter()
    speech = load_speech()
    target, speech_error = _pretrained(
        lambda: speech_transformer(0),
        speech.train,
        settings.mask_ratio,
        settings.speech_pretraining,
        seed=0,
        description="pretraining on speech",
    )
    auxiliary, digit_error = _pretrained(
        digit_transformer,
        load_digit_images(),
        settings.mask_ratio,
        settings.digit_pretraining,
        seed=1,
        description="pretraining on digits",
    )
    published = reparameterize_aux_into_target_model(_classifier(target, seed=0), auxiliary)
    runs = []
    for seed in range(settings.seeds):
        models: dict[str, nn.Module] = {"baseline": _classifier(target, seed)}
        for variant, aux_model in (("pathway", auxiliary), ("control", permuted(auxiliary, seed))):
            models[variant] = reparameterize_aux_into_target_model(
                _classifier(target, seed), aux_model, aux_dtype=settings.aux_dtype
            )
        for variant, model in models.items():
            description = f"fine-tuning {variant}, seed {seed + 1} of {settings.seeds}"
            _fine_tune(model, speech, settings, seed, description)
            accuracy = _accuracy(_logits(model, speech.test), speech.test_speakers)
            scales = {} if variant == "baseline" else cross_modal_scales(model)
            runs.append(Run(variant, seed, accuracy, scales))
    batch = speech.train[: settings.fine_tuning.batch_size]
    return Results(
        settings,
        {"speech": speech_error, "digits": digit_error},
        max(quantization_errors(published, settings.aux_dtype).aux_weights.values()) if settings.aux_dtype else None,
        runs,
        _merge(models["pathway"], speech, merged_path),
        [_saved_bytes(models["baseline"], models["pathway"], published, batch, autocast) for autocast in (False, True)],
        Environment(torch.__version__, timm.__version__, os.cpu_count(), time.perf_counter() - start),
    )


def _pretrained(
    build: Callable[[], VisionTransformer],
    images: Tensor,
    mask_ratio: float,
    settings: TrainingSettings,
    seed: int,
    description: str,
) -> tuple[VisionTransformer, float]:
    """The transformer that `build` makes, pretrained on images (N, 1, height, width), and its reconstruction error.

    The error is the last epoch's mean squared error of hidden patches, as a fraction of the images' variance.
    """
    torch.manual_seed(seed)
    encoder = build()
    autoencoder = MaskedAutoencoder(
        encoder, mask_ratio, decoder_width=64, decoder_depth=1, decoder_heads=2, normalize_targets=False
    )
    error = train(autoencoder, lambda batch: autoencoder(images[batch]), len(images), settings, seed, description)
    return encoder, error / images.var().item()


def permuted(model: nn.Module, seed: int) -> nn.Module:
    """A copy with the entries of every parameter shuffled: the same values, nothing of what was learned."""
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shuffled.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def _classifier(pretrained: VisionTransformer, seed: int) -> VisionTransformer:
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    model.reset_classifier(SPEAKERS)
    return model


def _fine_tune(model: nn.Module, speech: Speech, settings: Settings, seed: int, description: str) -> None:
    labelled = labelled_subset(speech.train_speakers, settings.labelled_per_speaker, seed)
    utterances, speakers = speech.train[labelled], speech.train_speakers[labelled]

    def loss_of(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(utterances[batch]), speakers[batch])

    train(model, loss_of, len(labelled), settings.fine_tuning, seed, description)


@torch.inference_mode()
def _logits(model: nn.Module, utterances: Tensor) -> Tensor:
    return model.eval()(utterances)


def _accuracy(logits: Tensor, speakers: Tensor) -> float:
    return (logits.argmax(1) == speakers).double().mean().item()


def _merge(model: nn.Module, speech: Speech, path: Path) -> Merge:
    connected = _logits(model, speech.test)
    merged = merge_pathways(copy.deepcopy(model))
    difference = (_logits(merged, speech.test) - connected).abs().max().item()
    if not difference <= MERGE_TOLERANCE:
        raise RuntimeError(f"merged model: logits differ by {difference:.1e}, expected {MERGE_TOLERANCE:.0e} at most")
    save_state_dict(merged.state_dict(), path)
    plain = speech_transformer(SPEAKERS)
    plain.load_state_dict(load_state_dict(path))
    expected = _accuracy(connected, speech.test_speakers)
    accuracy = _accuracy(_logits(plain, speech.test), speech.test_speakers)
    if accuracy != expected:
        raise RuntimeError(f"{path}: a plain model's accuracy with it is {accuracy}, expected {expected}")
    return Merge(accuracy, difference)


def _saved_bytes(
    plain: nn.Module, connected: nn.Module, published: nn.Module, batch: Tensor, autocast: bool
) -> SavedBytes:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain_bytes = saved_for_backward_bytes(plain, batch)
        fused_bytes = saved_for_backward_bytes(connected, batch)
        with published_formulation(published):
            published_bytes = saved_for_backward_bytes(published, batch)
    return SavedBytes("bfloat16 autocast" if autocast else "float32", plain_bytes, fused_bytes, published_bytes)
