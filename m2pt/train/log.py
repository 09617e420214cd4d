"""Logs a run: lines on the terminal, JSON lines, TensorBoard if it is installed, and plots."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoints import written_whole
from ..checks import require

figures = require("matplotlib.figure", "train")

FILE = "log.jsonl"


class Log:
    """The log of the first process; in the others it does nothing.

    Args:
        folder: the run's; a log in it is continued.
        is_first: whether this is the first process.
        step, steps: where the run starts and ends. Lines of an interrupted run after `step`, and its results, are
            dropped, as they will be written again.
    """

    def __init__(self, folder: Path, is_first: bool, step: int, steps: int) -> None:
        self.path, self.is_first = folder / FILE, is_first
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=None if is_first else True)
        self.tensorboard: Any = None
        if not is_first:
            return
        kept = [line for line in read_log(folder) if line["step"] <= step and "model" not in line]
        with written_whole(self.path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, step: int, **entries: Any) -> None:
        """Add a line of numbers or words for a step."""
        if not self.is_first:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **entries}) + "\n")
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written: {error}") from error
        self.bar.write(f"step {step}: " + ", ".join(f"{name} {_short(value)}" for name, value in entries.items()))
        if self.tensorboard is not None:
            for name, value in entries.items():
                if isinstance(value, float):
                    self.tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none if there is no log. An incomplete last line is left out."""
    path = folder / FILE
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_curves(folder: Path) -> None:
    """Write `curves.png`: all numbers in a run's log over the steps."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in read_log(folder):
        for name, value in line.items():
            if isinstance(value, float):
                curves.setdefault(name, []).append((line["step"], value))
    figure = figures.Figure(figsize=(6, 1.8 * max(len(curves), 1)), dpi=150, layout="constrained")
    panels = figure.subplots(max(len(curves), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, points) in zip(panels, curves.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", color="#4477aa")
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(color="#e6e6e6")
    panels[-1].set_xlabel("step")
    with written_whole(folder / "curves.png") as temporary:
        figure.savefig(temporary)


def plot_scales(scales: Mapping[str, Sequence[float]], folder: Path) -> None:
    """Write `scales.png`: the cross-modal scales of every layer by block, from names such as
    `blocks.0.attn.qkv.cross_modal_scale`; nothing if there are none."""
    layers: dict[str, dict[int, float]] = {}
    for name, several in scales.items():
        _, block, layer = name.removesuffix(".cross_modal_scale").split(".", 2)
        for i, scale in enumerate(several):
            label = layer if len(several) == 1 else f"{layer}[{i}]"
            layers.setdefault(label, {})[int(block)] = scale
    if not layers:
        return
    figure = figures.Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for layer, blocks in layers.items():
        axes.plot(list(blocks), list(blocks.values()), "o-", label=layer)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("block")
    axes.set_ylabel("cross-modal scale")
    axes.legend(frameon=False)
    with written_whole(folder / "scales.png") as temporary:
        figure.savefig(temporary)
