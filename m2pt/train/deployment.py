"""Turns a trained state dict into a plain model: merges pathways, folds a probe's normalisation."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from ..checkpoints import merge_state_dict
from ..models import create_model
from .recipe import Recipe

AUXILIARY = "auxiliary"
"""The entry of a checkpoint that leaves out auxiliary weights: the SHA-256 of each model's."""
PROBE_EPS = 1e-6
TIMM_NAMES = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
TIMM_NAMES |= {size: f"vit_{size}_patch14_224" for size in ("huge", "giant", "gigantic")}
"""timm's names for the image models that it has in full."""
TRAINING_ONLY = ("drop_path_rate", "time_masking", "frequency_masking")


def probe_head(head: nn.Module) -> nn.Sequential:
    """A linear head behind a batch normalisation without parameters (MAE's linear probe, CVPR 2022).

    Raises:
        ValueError: the head is not linear.
    """
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model.trainable: a linear probe needs a linear head, but this model's is a {type(head).__name__}"
        )
    nn.init.trunc_normal_(head.weight, std=0.01)
    return nn.Sequential(nn.BatchNorm1d(head.in_features, affine=False, eps=PROBE_EPS), head)


def check_auxiliary(digests: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise a ValueError unless the auxiliary weights are those that a checkpoint leaves out, by their SHA-256."""
    if [*digests.values()] != [*expected.values()]:
        raise ValueError(
            "auxiliary.path: these weights differ from those that the checkpoint leaves out, or auxiliary.dtype,"
            f" blocks or trainable differ: their SHA-256 is {', '.join(digests.values()) or 'none'}, expected"
            f" {', '.join(expected.values())}"
        )


def deployed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain model that computes what the trained one computes in evaluation.

    Raises:
        ValueError: a merged weight is not finite.
    """
    if any(name.endswith(".cross_modal_scale") for name in state_dict):
        state_dict = merge_state_dict(state_dict)
    if "head.0.running_mean" in state_dict:
        state_dict = _fold_probe_head(state_dict)
    return state_dict


def _fold_probe_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    folded = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.")}
    inverse = (state_dict["head.0.running_var"].double() + PROBE_EPS).rsqrt()
    weight = state_dict["head.1.weight"].double() * inverse
    bias = state_dict["head.1.bias"] - weight @ state_dict["head.0.running_mean"].double()
    return folded | {"head.weight": weight.float(), "head.bias": bias.float()}


def description(recipe: Recipe, num_classes: int) -> dict[str, Any]:
    """The dotted name and the arguments of the function that builds the plain model: timm's, if it has the model."""
    model = recipe.model
    overrides = {name: value for name, value in model.overrides.items() if name not in TRAINING_ONLY}
    if model.modality == "image" and (name := TIMM_NAMES.get(model.size)):
        arguments = {"model_name": name, "num_classes": num_classes, "global_pool": "avg", **overrides}
        return {"function": "timm.create_model", "arguments": arguments}
    arguments = {"modality": model.modality, "size": model.size, "task": model.task, "num_classes": num_classes}
    return {"function": "m2pt.models.create_model", "arguments": arguments | overrides}


def model_difference(trained: Mapping[str, Any], recipe: Recipe) -> str:
    """The first entry in which a recipe's model differs from a checkpoint's, with both values; or "".

    Args:
        trained: the table [model] of the checkpoint's recipe, empty if it is not known. Entries that matter only in
            training may differ, and an earlier version may have left out those with a default.
        recipe: the one to compare.
    """
    if not trained:
        return ""
    given = vars(recipe.model)
    keys = [key for key in ("modality", "size", "task") if trained.get(key, given[key]) != given[key]]
    if keys:
        key = keys[0]
        return f"model.{key}: the checkpoint was trained with {trained[key]!r}, the recipe says {given[key]!r}"
    before, now = (table.get("overrides", {}) for table in (trained, given))
    for name in before | now:
        if name not in TRAINING_ONLY and before.get(name) != now.get(name):
            old, new = (repr(table[name]) if name in table else "no value" for table in (before, now))
            return f"model.overrides.{name}: the checkpoint was trained with {old}, the recipe says {new}"
    return ""


def build_plain(recipe: Recipe, num_classes: int, state_dict: dict[str, Tensor]) -> nn.Module:
    """The plain model of `description`, with a deployed state dict.

    Raises:
        ValueError: the state dict is another model's; the message counts what does not fit and names the first.
    """
    described = description(recipe, num_classes)
    create = timm.create_model if described["function"] == "timm.create_model" else create_model
    model = create(**described["arguments"])
    if misfit := _misfit(model.state_dict(), state_dict):
        raise ValueError(misfit)
    model.load_state_dict(state_dict)
    return model


def _misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How many entries of a state dict do not fit a model, with the first of each kind; empty if all do."""
    shapes = [name for name in own if name in given and own[name].shape != given[name].shape]
    parts = [
        f"{len(names)} {what}, such as {names[0]}"
        for names, what in (
            ([name for name in own if name not in given], "missing"),
            ([name for name in given if name not in own], "unexpected"),
        )
        if names
    ]
    if shapes:
        sizes = " for ".join(str(tuple(entries[shapes[0]].shape)) for entries in (given, own))
        parts.append(f"{len(shapes)} of other shapes, such as {shapes[0]}: {sizes}")
    return f"entries that do not fit the recipe's model: {'; '.join(parts)}" if parts else ""
