"""The files of a run: written whole or not at all, read without executing anything in them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import load_state_dict, load_torch, state_dict_in, written_whole
from .recipe import Recipe

CHECKPOINT = "last.pth"
REPLACEABLE = ("machine.", "data.root", "data.on_error")
"""What a run may be resumed with other values of."""
PARTS = ("model", "optimizer", "recipe")


def write_json(path: Path, content: Any) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(folder: Path, state: dict[str, Any], recipe: Recipe) -> None:
    """The state of a run and its recipe, in `folder/last.pth`.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    with written_whole(folder / CHECKPOINT) as temporary, temporary.open("wb") as file:
        torch.save({**state, "recipe": recipe.as_dict()}, file)


def load_checkpoint(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The state in `folder/last.pth`, of the same recipe.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or another recipe's; the message names what differs. `REPLACEABLE` may.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so there is no run to resume")
    state = load_torch(path)
    if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) and state[part] for part in PARTS):
        raise ValueError(f"{path}: expected the state of a run, with {', '.join(PARTS)}")
    saved, given = flat(state["recipe"]), flat(recipe.as_dict())
    differing = [
        f"{key} is {given.get(key)!r}, was {saved.get(key)!r}"
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key) and not key.startswith(REPLACEABLE)
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
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_state_dict(path)
    content = load_torch(path)
    return state_dict_in(content["ema"] if isinstance(content, dict) and "ema" in content else content, path)


def flat(table: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key."""
    entries: dict[str, Any] = {}
    for key, value in table.items():
        entries |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return entries
