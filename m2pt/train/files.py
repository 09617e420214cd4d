"""The files of a run: written whole or not at all, read without executing anything in them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints import Weights, check_weights, load_torch, read_weights, state_dict_in, written_whole
from ..data.common import read_json
from .deployment import AUXILIARY
from .recipe import Recipe, with_defaults

CHECKPOINT = "last.pth"
RECIPE = "recipe.json"
REPLACEABLE = ("machine.", "data.root", "data.on_error")
"""Settings that may differ when a run is resumed."""
PARTS = ("model", "optimizer", "recipe")
CLASS_NAMES = "class_names"
"""The entry of a run's checkpoint, and of the JSON file beside a merged one: the training split's names, in order."""


def write_json(path: Path, content: Any) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(folder: Path, state: dict[str, Any], recipe: Recipe, class_names: Sequence[str] | None) -> None:
    """Write the state of a run, its recipe and the names of its classes to `folder/last.pth`.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    with written_whole(folder / CHECKPOINT) as temporary, temporary.open("wb") as file:
        names = None if class_names is None else list(class_names)
        torch.save({**state, "recipe": recipe.as_dict(), CLASS_NAMES: names}, file)


def load_checkpoint(folder: Path, recipe: Recipe, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Read the state in `folder/last.pth`, which has to be of the same recipe and the same classes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or has another recipe or other classes; the message names what differs.
            `REPLACEABLE` may.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so there is no run to resume")
    state = load_torch(path)
    if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) and state[part] for part in PARTS):
        raise ValueError(f"{path}: expected the state of a run, with {', '.join(PARTS)}")
    try:
        saved = flat(with_defaults(state["recipe"]))
    except (TypeError, ValueError):
        saved = flat(state["recipe"])
    given = flat(recipe.as_dict())
    differing = [
        f"{key} is {given.get(key)!r}, was {saved.get(key)!r}"
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key) and not key.startswith(REPLACEABLE)
    ]
    if differing:
        raise ValueError(f"{path}: the run to resume had another recipe: {'; '.join(differing)}")
    names = state.get(CLASS_NAMES)
    if names is not None and class_names is not None and names != list(class_names):
        new, old = (sorted(set(a) - set(b)) for a, b in ((class_names, names), (names, class_names)))
        what = f"other classes: new are {new}, gone are {old}" if new or old else "its classes in another order"
        raise ValueError(f"{path}: the run to resume had {what}")
    return state


class Trained(NamedTuple):
    """A trained model to evaluate."""

    state_dict: dict[str, Tensor]
    class_names: list[str] | None
    """If they are in the file or in the JSON file beside it."""
    taken: Weights | None
    """Which weights these are, if the file holds their moving average too."""
    digests: dict[str, str] | None
    """Those of the auxiliary weights that the file leaves out."""
    model: dict[str, Any]
    """The table [model] of the run's recipe, if that is in the file or beside it; otherwise empty."""


def load_trained(path: str | os.PathLike, weights: Weights | None = None) -> Trained:
    """Read the weights to evaluate from a run's checkpoint or a merged file.

    Args:
        path: a torch file or `.safetensors`.
        weights: "ema" for the moving average, "raw" for the others. Default: the average if there is one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint, one without such `weights`, or a damaged JSON file.
    """
    path = Path(path)
    check_weights(weights)
    if path.suffix == ".safetensors":
        state_dict, taken = read_weights(path, weights)
        class_names = _class_names_beside(path.with_suffix(".json"))
        return Trained(state_dict, class_names, taken, None, _model_beside(path.with_name(RECIPE)))
    content = load_torch(path)
    state_dict, taken = state_dict_in(content, path, weights)
    digests = content.get(AUXILIARY) if isinstance(content, dict) else None
    if digests is not None and not (isinstance(digests, dict) and all(isinstance(d, str) for d in digests.values())):
        raise ValueError(f"{path}: expected the SHA-256 of auxiliary models as {AUXILIARY}, got {digests!r}")
    return Trained(state_dict, _class_names_in(content, path), taken, digests, _model_in(content))


def _model_beside(path: Path) -> dict[str, Any]:
    return _model_in({"recipe": read_json(path)}) if path.is_file() else {}


def _model_in(content: Any) -> dict[str, Any]:
    recipe = content.get("recipe") if isinstance(content, dict) else None
    model = recipe.get("model") if isinstance(recipe, dict) else None
    return model if isinstance(model, dict) and isinstance(model.get("overrides", {}), dict) else {}


def _class_names_beside(path: Path) -> list[str] | None:
    return _class_names_in(read_json(path), path) if path.is_file() else None


def _class_names_in(content: Any, path: Path) -> list[str] | None:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected the description of a model, got {content!r}")
    names = content.get(CLASS_NAMES)
    if names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return names
    raise ValueError(f"{path}: expected a list of names as {CLASS_NAMES}, got {names!r}")


def flat(table: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key."""
    entries: dict[str, Any] = {}
    for key, value in table.items():
        entries |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return entries
