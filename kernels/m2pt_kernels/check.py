"""Compare every kernel on this GPU with float64, in one process per product and operand kind, and time it.

Run as `python -m m2pt_kernels.check` or `m2pt check`. Kernels found faulty are no longer used on such a GPU. Without a
GPU, Triton's interpreter runs the kernels at small sizes.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from difflib import get_close_matches
from itertools import product as pairs
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn
from tqdm import tqdm

from . import plans, records
from .cases import GPU_SHAPES, KINDS, PRODUCTS, SMALL_SHAPES, Row, Shape
from .devices import INTERPRETED, device_name, supports
from .processes import LostError, Workers
from .quantization import supports_float8

_LARGEST_SMALL = 96
"""The largest size in the interpreter."""


def run(model: str | None = None, batch: int = 64, json_file: Path | None = None) -> int:
    """Check, print a table and return the exit status: 0, or 1 if a kernel is faulty.

    Args:
        model: name of a timm model; its linear layers are checked instead of the usual sizes.
        batch: batch size of that model's inputs.
        json_file: the file to write every row to.

    Raises:
        ValueError: no such timm model or one without linear layers, a batch below 1, or a json_file in no folder.
    """
    if batch < 1:
        raise ValueError(f"--batch: expected a positive number, got {batch}")
    if json_file and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ValueError(f"--json: expected a file in a folder that exists, got {json_file}")
    on_gpu = torch.cuda.is_available() and not INTERPRETED
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if on_gpu and not supports(device):
        print(f"{device_name(device)} has a compute capability below 8.0 and uses plain torch: nothing to check")
        return 0
    kinds = [name for name, kind in KINDS.items() if kind.aux_weight != "float8_e4m3fn" or supports_float8(device)]
    shapes = layers(model, batch) if model else GPU_SHAPES if on_gpu else SMALL_SHAPES
    if on_gpu:
        print(f"{device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}")
    else:
        why = "TRITON_INTERPRET is set" if INTERPRETED else "No GPU was found"
        print(f"{why}: Triton's interpreter runs the portable kernels at small sizes, with bfloat16 as float16.")
        kinds = [name for name in kinds if not KINDS[name].tf32]
        shapes = sorted({Shape(*(min(size, _LARGEST_SMALL) for size in shape)) for shape in shapes})
    rows = check(kinds, shapes, on_gpu)
    if on_gpu:
        findings: records.Findings = {}
        for row in rows:
            if row.plan and not row.not_run:
                findings.setdefault(row.variant, {})[row.place] = row.fault
        plans.remember(device_name(device), findings)
    print(table(rows))
    faults = {row.variant: row.fault for row in reversed(rows) if row.fault}
    count = len({row.variant for row in rows})
    print(f"{count - len(faults)} of {count} kernels are correct")
    for name, fault in reversed(faults.items()):
        print(f"{name}: {fault}")
    if missed := [row for row in rows if row.not_run]:
        print(f"{len(missed)} of {len(rows)} cases were not run: {missed[0].not_run}")
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if faults else 0


def layers(model: str, batch: int) -> list[Shape]:
    """Return the sizes of a timm model's linear layers on a batch, without its classifier.

    Raises:
        ValueError: timm has no such model, or it has no such layers.
    """
    import timm

    if not timm.is_model(model):
        near = " or ".join(map(repr, get_close_matches(model, timm.list_models(), cutoff=0.7)))
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"--model: expected the name of a timm model, got {model!r}{hint}")
    shapes: set[Shape] = set()
    with torch.device("meta"):
        network: Any = timm.create_model(model)  # which has more than modules have
        images = torch.empty(batch, *network.default_cfg["input_size"])
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and layer is not network.get_classifier():
            layer.register_forward_hook(
                lambda layer, inputs, _: shapes.add(
                    Shape(inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features)
                )
            )
    network.eval()(images)
    if not shapes:
        raise ValueError(f"--model: expected a model with linear layers besides its classifier, got {model!r}")
    return sorted(shapes)


def check(kinds: Sequence[str], shapes: Sequence[Shape], on_gpu: bool) -> list[Row]:
    """Verify all plans in parallel processes, then time those that are correct at the largest shape, one by one."""
    # On a GPU most of the time is compiling, above all forward; in the interpreter it is starting processes.
    groups = list(pairs([[product] for product in PRODUCTS] if on_gpu else [PRODUCTS], kinds))
    largest = max(shapes, key=lambda shape: shape.tokens * shape.in_features * shape.out_features)
    with ThreadPoolExecutor(_side_by_side(largest, on_gpu)) as pool, Workers(on_gpu) as workers:
        verified = [pool.submit(_verified, workers, *group, shapes) for group in groups]
        for future in tqdm(as_completed(verified), total=len(groups), desc="checking", unit="group"):
            future.result()
        rows = [row for future in verified for row in future.result()]
        if on_gpu:
            _add_times(workers, [row for row in rows if row.shape == largest and not (row.fault or row.not_run)])
    return rows


def _side_by_side(shape: Shape, on_gpu: bool) -> int:
    """Return how many processes the cores and memory allow: operands and results, several of them in float32."""
    cores = len(os.sched_getaffinity(0))
    if not on_gpu:
        return cores
    tokens, in_features, out_features = shape
    needed = 2**30 + 40 * (tokens * (in_features + out_features) + 4 * in_features * out_features)
    return max(1, min(cores, torch.cuda.mem_get_info()[0] // needed))


def _verified(workers: Workers, products: Sequence[str], kind: str, shapes: Sequence[Shape]) -> list[Row]:
    """Return the rows of a group. A plan that ends its process, or hangs, is skipped from then on."""
    rows: list[Row] = []
    lost: list[str] = []
    while True:
        before, begun = len(rows), None
        request = {"kind": kind, "products": products, "shapes": shapes, "timed": False, "lost": lost}
        try:
            for event, row in workers.answers([request | {"places": [row.place for row in rows]}]):
                begun = row if event == "begun" else None
                if event == "done":
                    rows.append(row)
            return rows
        except LostError as error:
            if begun is not None:
                begun.fault = str(error)
                rows.append(begun)
            if len(rows) == before:
                name = " and ".join(products)
                return [*rows, Row(kind, name, shapes[0], "", "", f"{name} of {kind}", str(error))]
            if rows[-1].fault:
                lost.append(rows[-1].variant)


def _add_times(workers: Workers, rows: list[Row]) -> None:
    """Time all rows in one process for as long as it lives; a plan that ends it counts as faulty after all."""
    waiting = {(row.kind, row.place): row for row in rows}
    with tqdm(total=len(rows), desc="timing", unit="plan") as bar:
        while waiting:
            kinds: dict[str, list[str]] = {}
            for kind, place in waiting:
                kinds.setdefault(kind, []).append(place)
            request = {"products": PRODUCTS, "shapes": [rows[0].shape], "timed": True, "lost": []}
            before, begun = len(waiting), None
            try:
                for event, row in workers.answers(
                    [request | {"kind": kind, "places": places} for kind, places in kinds.items()]
                ):
                    begun = row if event == "begun" else None
                    if event == "done":
                        timed = waiting.pop((row.kind, row.place))
                        timed.fault, timed.not_run = row.fault, row.not_run
                        timed.milliseconds, timed.plain_milliseconds = row.milliseconds, row.plain_milliseconds
                        bar.update()
                return
            except LostError as error:
                if begun is not None:
                    waiting.pop((begun.kind, begun.place)).fault = f"while it was timed: {error}"
                if len(waiting) == before:
                    print(f"Nothing more could be timed: {error}", file=sys.stderr)
                    return


def table(rows: Sequence[Row]) -> str:
    """Format a line per kernel: its worst error at any shape over plain torch's, and times at the largest shape."""
    variants: dict[str, list[Row]] = {}
    for row in rows:
        variants.setdefault(row.variant, []).append(row)
    lines = [("kernel, plan and operands", "error / torch's", "ms", "/ F.linear", "")]
    for variant, found in variants.items():
        ratios = [row.error_ratio for row in found if row.error_ratio is not None]
        error = f"{max(ratios):.2f}" if ratios else "-"
        times = "-", "-"
        for row in found:
            if row.milliseconds is not None and row.plain_milliseconds is not None:
                times = f"{row.milliseconds:.3f}", f"{row.milliseconds / row.plain_milliseconds:.2f}"
                break
        mark = "FAULTY" if any(row.fault for row in found) else "not run" if not ratios else ""
        lines.append((variant, error, *times, mark))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{name:{width}} {error:>15} {time:>8} {ratio:>10} {mark}".rstrip() for name, error, time, ratio, mark in lines
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m m2pt_kernels.check", description=" ".join(__doc__.split()))
    parser.add_argument("--model", metavar="NAME", help="check the linear layers of this timm model instead")
    parser.add_argument("--batch", type=int, default=64, help="batch size of that model (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to this file")
    arguments = parser.parse_args()
    try:
        return run(arguments.model, arguments.batch, arguments.json)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
