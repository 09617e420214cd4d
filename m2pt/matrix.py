"""Trains every target with every auxiliary model over several seeds, and reports the gains and their spread.

A configuration is a TOML file:

    seeds = [0, 1, 2]

    [auxiliaries]                       # by modality
    audio = "zoo/audio.safetensors"
    point = "zoo/point.safetensors"

    [targets.image]
    recipe = "image_imagenet"           # a shipped one, or a file
    data = "data/imagenet"              # left out for embedded data
    overrides.model.init = "zoo/image.safetensors"
    overrides.schedule.epochs = 20

An auxiliary model of the target's own modality is left out.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .checkpoints import written_whole
from .checks import check_kind, checked_path, nearest, require
from .train import Recipe, load_recipe, train
from .train.distributed import is_first_process
from .train.files import CHECKPOINT, flat, write_json
from .train.recipe import tomllib

figures = require("matplotlib.figure", "train")


@dataclass(frozen=True)
class Matrix:
    """Recipes by target, paths of checkpoints by auxiliary modality, and seeds."""

    targets: dict[str, Recipe]
    auxiliaries: dict[str, str]
    seeds: list[int]


@dataclass(frozen=True)
class Gain:
    """What an auxiliary model changed, in percentage points, compared with the same seed's run without one.

    Attributes:
        metric: the name of the metric compared.
        alone, connected: its value for each seed.
        mean, standard_deviation, standard_error: of the differences; a single one has no deviation and no error.
    """

    target: str
    auxiliary: str
    metric: str
    alone: list[float]
    connected: list[float]
    mean: float
    standard_deviation: float | None
    standard_error: float | None


def load_matrix(path: str | os.PathLike) -> Matrix:
    """Read a configuration and all of its recipes.

    Raises:
        FileNotFoundError: no such file or recipe.
        TypeError, ValueError: a key is missing, unknown, or has an invalid value.
    """
    path = checked_path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return _matrix(tomllib.loads(path.read_text("utf-8")))
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from None
    except ValueError as error:  # of TOML or UTF-8 too
        raise ValueError(f"{path}: {error}") from None


def _matrix(table: dict[str, Any]) -> Matrix:
    _require_keys(table, ("seeds", "targets", "auxiliaries"), "the file")
    seeds, targets, auxiliaries = (table[key] for key in ("seeds", "targets", "auxiliaries"))
    numbers = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not numbers or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected a list of different numbers of 0 or more, got {seeds!r}")
    if not isinstance(targets, dict) or not targets:
        raise ValueError(f"targets: expected tables by name, got {targets!r}")
    if not isinstance(auxiliaries, dict) or not all(isinstance(aux, str) for aux in auxiliaries.values()):
        raise ValueError(f"auxiliaries: expected paths by modality, got {auxiliaries!r}")
    return Matrix({name: _target(target, f"targets.{name}") for name, target in targets.items()}, auxiliaries, seeds)


def _target(table: Any, place: str) -> Recipe:
    _require_keys(table, ("recipe",), place, optional=("data", "overrides"))
    overrides = table.get("overrides", {})
    if not isinstance(overrides, dict):
        raise ValueError(f"{place}.overrides: expected a table, got {overrides!r}")
    root = {"data.root": table["data"]} if "data" in table else {}
    try:
        return load_recipe(table["recipe"], root | flat(overrides))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None


def _require_keys(table: Any, required: Sequence[str], place: str, optional: Sequence[str] = ()) -> None:
    if not isinstance(table, dict) or table.keys() - set(optional) != set(required):
        keys = (*required, *optional)
        got = ", ".join(table) if isinstance(table, dict) else repr(table)
        unknown = next((key for key in table if key not in keys), "") if isinstance(table, dict) else ""
        raise ValueError(f"{place}: expected the keys {', '.join(keys)}; got {got}{nearest(unknown, keys)}")


def run_matrix(matrix: Matrix, out: str | os.PathLike) -> str:
    """Train the runs that are not finished yet, and report the gains.

    Written to `out`: a folder `target/auxiliary/seed` for every run, and `gains.md`, `gains.json`, `gains.png`.

    Returns:
        The report in Markdown.

    Raises:
        TypeError: `matrix` is not a Matrix, or `out` not a path.
        ValueError: a folder holds a run of another recipe. For other errors see `m2pt.train.train`.
    """
    check_kind(Matrix, "a Matrix", matrix=matrix)
    out = checked_path("out", out)
    gains = []
    for name, recipe in matrix.targets.items():
        alone = [_result(recipe, "", "", seed, out / name / "alone" / str(seed)) for seed in matrix.seeds]
        for modality, path in matrix.auxiliaries.items():
            if modality != recipe.model.modality:
                folder = out / name / modality
                connected = [_result(recipe, modality, path, seed, folder / str(seed)) for seed in matrix.seeds]
                gains.append(compare(name, modality, alone, connected))
    report = markdown(gains)
    if is_first_process():
        with written_whole(out / "gains.md") as temporary:
            temporary.write_text(f"{report}\n\n![Gains](gains.png)\n", encoding="utf-8")
        write_json(out / "gains.json", [asdict(gain) for gain in gains])
        plot(gains, out / "gains.png")
    return report


def _result(recipe: Recipe, modality: str, path: str, seed: int, folder: Path) -> dict[str, float]:
    given = {"auxiliary.modality": modality, "auxiliary.path": path, "run.seed": seed}
    return trained_metrics(recipe.with_overrides(given), folder)


def trained_metrics(recipe: Recipe, folder: Path) -> dict[str, float]:
    """The merged model's metrics of one run: read if it is finished, otherwise trained, from where it stopped.

    Raises:
        ValueError: the folder holds a run of another recipe. For other errors see `m2pt.train.train`.
    """
    if (folder / "result.json").exists():
        if json.loads((folder / "recipe.json").read_text("utf-8")) != recipe.as_dict():
            raise ValueError(f"{folder}: holds a run of another recipe")
        return json.loads((folder / "result.json").read_text("utf-8"))["merged"]
    return train(recipe, folder, resume=(folder / CHECKPOINT).exists())["merged"]


def compare(
    target: str, auxiliary: str, alone: Sequence[dict[str, float]], connected: Sequence[dict[str, float]]
) -> Gain:
    """The gain in the first of the metrics, seed by seed."""
    metric = next(iter(alone[0]))
    before, after = ([metrics[metric] for metrics in runs] for runs in (alone, connected))
    differences = [b - a for a, b in zip(before, after, strict=True)]
    deviation = stdev(differences) if len(differences) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(differences))
    return Gain(target, auxiliary, metric, before, after, fmean(differences), deviation, error)


def markdown(gains: Sequence[Gain]) -> str:
    """The table of gains."""
    lines = [
        "| target | auxiliary | metric | alone, % | connected, % | gain, points | standard deviation | standard error"
        " | seeds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for gain in gains:
        spread = ["" if value is None else f"{value:.2f}" for value in (gain.standard_deviation, gain.standard_error)]
        lines.append(
            f"| {gain.target} | {gain.auxiliary} | {gain.metric} | {fmean(gain.alone):.2f} |"
            f" {fmean(gain.connected):.2f} | {gain.mean:+.2f} | {' | '.join(spread)} | {len(gain.alone)} |"
        )
    return "\n".join(lines)


def plot(gains: Sequence[Gain], path: Path) -> None:
    """Every gain with its standard error, and the differences of single seeds."""
    figure = figures.Figure(figsize=(6, 1 + 0.5 * len(gains)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, gain in enumerate(gains):
        differences = [b - a for a, b in zip(gain.alone, gain.connected, strict=True)]
        axes.plot(differences, [place] * len(differences), "o", color="#999999", markersize=4, alpha=0.6)
        axes.errorbar(gain.mean, place, xerr=gain.standard_error, fmt="D", color="#4477aa", capsize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(gains)), [f"{gain.auxiliary} to {gain.target}" for gain in gains])
    axes.invert_yaxis()
    axes.set_xlabel("gain, percentage points; diamonds: mean and standard error, dots: seeds")
    axes.grid(axis="x", color="#e6e6e6")
    with written_whole(path) as temporary:
        figure.savefig(temporary)
