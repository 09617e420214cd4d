"""Every kernel on this GPU against float64, in a process for each product and kind of operands, and its time.

`python -m m2pt_kernels.check`, or `m2pt check`. What is found faulty is not used any more on such a GPU. Without a GPU
Triton's interpreter runs the kernels, at small sizes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product as pairs
from pathlib import Path
from threading import Event, Timer
from typing import Any

import torch
import triton
from torch import nn
from tqdm import tqdm

from . import gemm, records
from .cases import GPU_SHAPES, KINDS, PRODUCTS, SMALL_SHAPES, Row, Shape
from .configs import device_name
from .quantization import supports_float8

PATIENCE = 90.0
"""Seconds without a line after which a process is given up."""

_LARGEST_SMALL = 96
"""The largest size in the interpreter."""

WORKER = [sys.executable, "-m", "m2pt_kernels.cases"]

_BYTES_PER_PROCESS = 3 * 2**30
"""Of GPU memory, at the largest of the shapes."""


def run(model: str | None = None, batch: int = 64, json_file: Path | None = None) -> int:
    """Check, print a table and return the exit status: 0, or 1 if a kernel is faulty.

    Args:
        model: name of a timm model, whose linear layers are checked instead of the usual sizes.
        batch: of that model's inputs.
        json_file: where every row is written to.

    Raises:
        ValueError: no timm model of that name, no positive batch, or a file in no folder.
    """
    if batch < 1:
        raise ValueError(f"--batch: expected a positive number, got {batch}")
    if json_file and not json_file.absolute().parent.is_dir():
        raise ValueError(f"--json: expected a file in a folder that exists, got {json_file}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if on_gpu and not gemm.supports(device):
        print(f"{device_name(device)} has a compute capability below 8.0, where plain torch computes: nothing to check")
        return 0
    kinds = [name for name, kind in KINDS.items() if kind.aux_weight != "float8_e4m3fn" or supports_float8(device)]
    shapes = layers(model, batch) if model else GPU_SHAPES if on_gpu else SMALL_SHAPES
    if on_gpu:
        print(f"{device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}")
    else:
        print("No GPU was found: Triton's interpreter runs the portable kernels, at small sizes, bfloat16 as float16.")
        kinds = [name for name in kinds if not KINDS[name].tf32]
        shapes = sorted({Shape(*(min(size, _LARGEST_SMALL) for size in shape)) for shape in shapes})
    rows = check(kinds, shapes, on_gpu)
    findings: dict[str, str | None] = {}
    for row in rows:
        findings[row.variant] = findings.get(row.variant) or row.fault
    if on_gpu:
        records.remember(device_name(device), gemm.KERNELS, findings)
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))
    faults = [f"{variant}: {fault}" for variant, fault in findings.items() if fault]
    print(f"{len(findings) - len(faults)} of {len(findings)} kernels are right", *faults, sep="\n")
    return 1 if faults else 0


def layers(model: str, batch: int) -> list[Shape]:
    """The sizes of the linear layers of a timm model, its classifier left out, on a batch.

    Raises:
        ValueError: timm has no such model.
    """
    import timm

    if not timm.is_model(model):
        raise ValueError(f"--model: expected the name of a timm model, got {model!r}")
    shapes: set[Shape] = set()
    with torch.device("meta"):
        network = timm.create_model(model)
        images = torch.empty(batch, *network.default_cfg["input_size"])
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and layer is not network.get_classifier():
            layer.register_forward_hook(
                lambda layer, inputs, _: shapes.add(
                    Shape(inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features)
                )
            )
    network.eval()(images)
    return sorted(shapes)


def check(kinds: Sequence[str], shapes: Sequence[Shape], on_gpu: bool) -> list[Row]:
    """Verify every plan in processes side by side, then time those that are right at the largest shape, one by one."""
    # On a GPU the processes take their time to compile, forward the longest; in the interpreter they take it to start.
    groups = list(pairs([[product] for product in PRODUCTS] if on_gpu else [PRODUCTS], kinds))
    rows: list[Row] = []
    with ThreadPoolExecutor(_side_by_side(on_gpu)) as pool, _Workers(on_gpu) as workers:
        with tqdm(total=len(groups), desc="checking", unit="group") as bar:
            for found in pool.map(lambda group: _verified(workers, *group, shapes), groups):
                rows += found
                bar.set_postfix(faulty=sum(row.fault is not None for row in rows))
                bar.update()
        if on_gpu:
            largest = max(shapes, key=lambda shape: shape.tokens * shape.in_features * shape.out_features)
            _add_times(workers, [row for row in rows if row.shape == largest and row.fault is None])
    return rows


def _side_by_side(on_gpu: bool) -> int:
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, torch.cuda.mem_get_info()[0] // _BYTES_PER_PROCESS)) if on_gpu else cores


class _LostError(Exception):
    """A process that did not end as it should, and how."""


class _Workers:
    """Processes that compute cases; none outlives the block."""

    def __init__(self, on_gpu: bool) -> None:
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if on_gpu else {"TRITON_INTERPRET": "1"})
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for process in tuple(self._running):
            process.kill()

    def answers(self, requests: list[dict[str, Any]]) -> Iterator[tuple[str, Row]]:
        """What a new process says of each row, "begun" or "done".

        Raises:
            _LostError: after its last words.
        """
        with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+") as stderr:
            stdin.writelines(f"{json.dumps(request)}\n" for request in requests)
            stdin.seek(0)
            process = subprocess.Popen(
                WORKER, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, text=True, env=self._environment
            )
            self._running.add(process)
            try:
                while not self._ended and (line := _line(process)):
                    ((event, fields),) = json.loads(line).items()
                    yield event, Row(**fields | {"shape": Shape(*fields["shape"])})
                status = None if self._ended else process.wait()
            finally:
                process.kill()
                process.stdout.close()
                self._running.discard(process)
            if status is None or status < 0:
                raise _LostError("stopped" if status is None else f"ended by {signal.Signals(-status).name}")
            if status > 0:
                stderr.seek(0)
                raise _LostError(f"status {status}: {(stderr.read().strip().splitlines() or [''])[-1]}")


def _line(process: subprocess.Popen[str]) -> str:
    """The next line, or an empty one when the process has ended.

    Raises:
        _LostError: neither happened in time.
    """
    late = Event()
    timer = Timer(PATIENCE, lambda: (late.set(), process.kill()))
    timer.start()
    try:
        line = process.stdout.readline()
        if not line:
            process.wait()
    finally:
        timer.cancel()
    if late.is_set():
        raise _LostError(f"no end in {PATIENCE:.0f} s")
    return line


def _verified(workers: _Workers, products: Sequence[str], kind: str, shapes: Sequence[Shape]) -> list[Row]:
    """The rows of a group. A plan that ends its process, or never ends, is left out at the shapes that follow."""
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
        except _LostError as error:
            if begun is None and len(rows) == before:
                name = " and ".join(products)
                return [*rows, Row(kind, name, shapes[0], "", "", f"{name} of {kind}", str(error))]
            if begun is not None:
                begun.fault = str(error)
                rows.append(begun)
                lost.append(begun.variant)


def _add_times(workers: _Workers, rows: list[Row]) -> None:
    kinds: dict[str, dict[str, Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, {})[row.place] = row
    requests = [
        {"kind": kind, "products": PRODUCTS, "shapes": [rows[0].shape], "timed": True, "places": list(places)}
        for kind, places in kinds.items()
    ]
    last = None
    try:
        with tqdm(total=len(rows), desc="timing", unit="plan") as bar:
            for event, row in workers.answers(requests):
                last = row
                if event == "done":
                    timed = kinds[row.kind][row.place]
                    timed.milliseconds, timed.plain_milliseconds = row.milliseconds, row.plain_milliseconds
                    bar.update()
    except _LostError as error:
        place = "before the first plan" if last is None else f"at {last.variant}, {last.shape}"
        print(f"Timing ended {place}: {error}", file=sys.stderr)


def table(rows: Sequence[Row]) -> str:
    """A line for every kernel: its worst error at any shape over plain torch's, and times at the largest shape."""
    variants: dict[str, list[Row]] = {}
    for row in rows:
        variants.setdefault(row.variant, []).append(row)
    lines = [("kernel, plan and operands", "error / torch's", "ms", "/ F.linear", "")]
    for variant, found in variants.items():
        ratios = [row.error_ratio for row in found if row.error_ratio is not None]
        timed = next((row for row in found if row.milliseconds is not None), None)
        error = f"{max(ratios):.2f}" if ratios else "-"
        times = ("-", "-") if timed is None else (f"{timed.milliseconds:.3f}", f"{_over_plain(timed):.2f}")
        lines.append((variant, error, *times, "FAULTY" if any(row.fault for row in found) else ""))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        f"{name:{width}} {error:>15} {time:>8} {ratio:>10} {mark}".rstrip() for name, error, time, ratio, mark in lines
    )


def _over_plain(row: Row) -> float:
    return row.milliseconds / row.plain_milliseconds


def main() -> int:
    """As the command line."""
    parser = argparse.ArgumentParser(prog="python -m m2pt_kernels.check", description=" ".join(__doc__.split()))
    parser.add_argument("--model", metavar="NAME", help="check the linear layers of this timm model instead")
    parser.add_argument("--batch", type=int, default=64, help="inputs of that model at a time (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to this file")
    arguments = parser.parse_args()
    try:
        return run(arguments.model, arguments.batch, arguments.json)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
