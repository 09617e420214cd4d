"""Creates the model that a recipe trains, with its pathway."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import random_seed
from torch import nn

from m2pt_kernels.quantization import DTYPES as QUANTIZED

from ..checkpoint_formats import load_auxiliary, load_pretrained
from ..checkpoints import TAKEN, Weights
from ..models import create_model
from ..pathway import freeze_for_linear_probe
from ..surgery import reparameterize_aux_into_target_model
from .deployment import probe_head
from .distributed import is_first_process
from .recipe import Recipe


def create_trained_model(recipe: Recipe, num_classes: int, multi_label: bool) -> Any:
    """The recipe's model with its pathway, on the CPU; what the recipe does not train is frozen.

    Raises:
        FileNotFoundError, ValueError: a checkpoint is missing or does not fit, or the loss does not fit the targets.
    """
    if multi_label and recipe.loss.name != "binary_cross_entropy":
        raise ValueError("loss.name: samples with several classes need 'binary_cross_entropy'")
    random_seed(recipe.run.seed)
    module = initialised(recipe, num_classes)
    if recipe.auxiliary.path:
        connect(module, read_auxiliaries(recipe), recipe)
    restrict(module, recipe)
    return module


def created(recipe: Recipe, num_classes: int) -> Any:
    """The recipe's model alone, randomly initialised."""
    model = recipe.model
    return create_model(model.modality, model.size, model.task, num_classes=num_classes, **model.overrides)


def initialised(recipe: Recipe, num_classes: int) -> Any:
    """The recipe's model alone, loaded from the checkpoint that it starts from, whose report is printed."""
    module = created(recipe, num_classes)
    if recipe.model.init:
        report = load_pretrained(module, recipe.model.init)
        if is_first_process():
            print(report)
    if recipe.machine.checkpoint_activations:
        module.set_grad_checkpointing()
    return module


def read_auxiliaries(recipe: Recipe) -> Mapping[str, nn.Module]:
    """The auxiliary models by path; prints which weights were taken from a file that holds both kinds."""
    aux_models = {path: load_auxiliary(path) for path in recipe.auxiliary.paths}
    for path, aux_model in aux_models.items():
        say_taken(path, aux_model.weights)
    return aux_models


def connect(module: nn.Module, aux_models: Mapping[str, nn.Module], recipe: Recipe) -> nn.Module:
    """Connect a model to its auxiliary models as the recipe says, in place."""
    dtype = recipe.auxiliary.dtype
    quantized = dtype in QUANTIZED.values()
    if dtype and not quantized:
        for aux_model in aux_models.values():
            aux_model.to(getattr(torch, dtype))
    return reparameterize_aux_into_target_model(
        module,
        aux_models,
        is_aux_trainable=recipe.auxiliary.trainable,
        aux_dtype=dtype if quantized else None,
        blocks=recipe.auxiliary.blocks or None,
    )


def restrict(module: Any, recipe: Recipe) -> None:
    """For a linear probe, freeze all but a new head and the cross-modal scales."""
    if recipe.model.trainable != "head":
        return
    module.head = probe_head(module.head)
    module.requires_grad_(False)
    module.head.requires_grad_(True)
    if recipe.auxiliary.path:
        freeze_for_linear_probe(module)


def say_taken(path: Any, taken: Weights | None) -> None:
    """Print which weights were taken if the file holds both; in the first process only."""
    if taken is not None and is_first_process():
        print(f"{path}: {TAKEN[taken]}")
