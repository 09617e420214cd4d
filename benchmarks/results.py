"""Tables of results: JSON and Markdown, one pair of files per benchmark and device.

They are written to `runs/benchmarks/`, which git ignores, or with `--record` to `results/`, which it tracks.
`python -m benchmarks.results` puts the tracked ones into README.md.
"""

import json
import os
import platform
import re
import subprocess
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import timm
import torch
import triton

IGNORED = Path(__file__).parents[1] / "runs" / "benchmarks"
TRACKED = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
RECORD = f"write complete tables to {TRACKED.relative_to(TRACKED.parents[1])}, which git tracks"

Row = dict[str, str | float]
"""A row of a table by its column names, which state the units."""


def device_name() -> str:
    """The GPU, or the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def clocks() -> str:
    """The GPU's clocks at this moment, and what limits them."""
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    query = "--query-gpu=clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--id={gpu}", query, "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        clock, highest, power = output.strip().split(", ")
    except (OSError, subprocess.SubprocessError, ValueError):
        return "clocks unknown"
    return f"SM clock {clock} of {highest} MHz, power limit {power} W"


def device_slug() -> str:
    """ "cpu", or the model of the GPU: "h100" of "NVIDIA H100 80GB HBM3"."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    model = re.search(r"\b[A-Z]+\d+\w*", name)
    return re.sub(r"[^a-z0-9]+", "-", (model[0] if model else name).lower())


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timm": timm.__version__,
    }


def made_with(machine: str) -> str:
    """A line that names the machine, the versions and the day."""
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{machine}; {names}; {date.today().isoformat()}"


def write(benchmark: str, device: str, rows: list[Row], notes: str, record: bool, expected: int | None = None) -> Path:
    """Write `<benchmark>-<device>.json` and `.md` and return the latter; `notes` says what was measured.

    A table of fewer rows than expected is partial: it says so, also in its name, and is never recorded.
    """
    partial = expected is not None and len(rows) < expected
    folder = TRACKED if record and not partial else IGNORED
    details = {
        "benchmark": benchmark,
        "device": device,
        **({"partial": True} if partial else {}),
        "machine": device_name(),
        "date": date.today().isoformat(),
        "versions": versions(),
        "notes": notes.strip(),
    }
    path = folder / f"{benchmark}-{device}{'-partial' if partial else ''}.md"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.with_suffix(".json").write_text(f'{json.dumps(details, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    warning = f"Partial: {len(rows)} of {expected} measurements.\n\n" if partial else ""
    path.write_text(f"{notes.strip()}\n\n{warning}{table(rows)}\n\n{made_with(details['machine'])}.\n")
    return path


def run(benchmark: str, device: str, measure: Callable[[], list[Row]], notes: str) -> Path:
    """Run a benchmark script: parse its arguments, write and print its table, and return the table's path."""
    parser = ArgumentParser(description=notes, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=RECORD)
    record = parser.parse_args().record
    path = write(benchmark, device, measure(), notes, record)
    print(path.read_text())
    print(f"Written to {path}")
    return path


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    return json.loads(path.with_suffix(".json").read_text())["rows"]


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; numbers are rounded to three digits."""
    columns = list(rows[0])
    numeric = [any(isinstance(row[column], (int, float)) for row in rows) for column in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def insert_tables(text: str) -> str:
    """Put each `results/name.md` between `<!-- name -->` and `<!-- end -->` in the text of README.md."""
    for path in TRACKED.glob("*.md"):
        begin, found, rest = text.partition(f"<!-- {path.stem} -->\n")
        if found:
            text = begin + found + path.read_text() + rest[rest.index("<!-- end -->") :]
    return text


if __name__ == "__main__":
    README.write_text(insert_tables(README.read_text()))
