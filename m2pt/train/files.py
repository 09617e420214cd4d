"""The files of a run: written to a temporary name and then renamed, read without executing anything in them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load_state_dict
from .recipe import Recipe

CHECKPOINT = "last.pth"


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def save_checkpoint(folder: Path, state: dict[str, Any], recipe: Recipe) -> None:
    """The state of a run and its recipe, in `folder/last.pth`."""
    temporary = folder / f"{CHECKPOINT}.partial"
    torch.save({**state, "recipe": recipe.as_dict()}, temporary)
    os.replace(temporary, folder / CHECKPOINT)


def load_checkpoint(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The state in `folder/last.pth`, of the same recipe.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another recipe's; the message names what differs. The machine and where the data lie may.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so there is no run to resume")
    state = torch.load(path, map_location="cpu", weights_only=True)
    saved, given = flat(state["recipe"]), flat(recipe.as_dict())
    differing = [
        f"{key} is {given.get(key)!r}, was {saved.get(key)!r}"
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key) and key != "data.root" and not key.startswith("machine.")
    ]
    if differing:
        raise ValueError(f"{path}: the run to resume had another recipe: {'; '.join(differing)}")
    return state


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights to evaluate in a run's checkpoint, which are the moving average if it has one, or in a merged file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint.
    """
    weights = load_state_dict(path)
    if Path(path).suffix == ".safetensors":
        return weights
    return torch.load(path, map_location="cpu", weights_only=True).get("ema", weights)


def flat(table: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key."""
    entries: dict[str, Any] = {}
    for key, value in table.items():
        entries |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return entries
