"""Tables of results: JSON and Markdown in `results/`, one pair of files a benchmark and device, and in README.md.

`python -m benchmarks.results` puts the newest tables into README.md.
"""

import json
import os
import platform
import re
from datetime import date
from pathlib import Path

import timm
import torch
import triton

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"

Row = dict[str, str | float]
"""A line of a table by its column names, which state the units."""


def device_name() -> str:
    """The GPU, or the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def device_slug() -> str:
    """ "cpu", or the model of the GPU: "h100" of "NVIDIA H100 80GB HBM3"."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    model = re.search(r"\b[A-Z]+\d+\w*", name)
    return re.sub(r"[^a-z0-9]+", "-", (model[0] if model else name).lower())


def write(benchmark: str, device: str, rows: list[Row], notes: str) -> Path:
    """Write `results/<benchmark>-<device>.json` and `.md` and return the latter; `notes` says what was measured."""
    details = {
        "benchmark": benchmark,
        "device": device,
        "machine": device_name(),
        "date": date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "timm": timm.__version__,
        },
        "notes": notes.strip(),
    }
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    path = FOLDER / f"{benchmark}-{device}.md"
    FOLDER.mkdir(exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.with_suffix(".json").write_text(f'{json.dumps(details, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    path.write_text(f"{notes.strip()}\n\n{table(rows)}\n\n{details['machine']}; {versions}; {details['date']}.\n")
    return path


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table; numbers are rounded to three digits."""
    columns = list(rows[0])
    numeric = [isinstance(rows[0][column], (int, float)) for column in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def insert_tables(text: str) -> str:
    """README.md with what stands between `<!-- name -->` and `<!-- end -->` replaced by each `results/name.md`."""
    for path in FOLDER.glob("*.md"):
        begin, found, rest = text.partition(f"<!-- {path.stem} -->\n")
        if found:
            text = begin + found + path.read_text() + rest[rest.index("<!-- end -->") :]
    return text


if __name__ == "__main__":
    README.write_text(insert_tables(README.read_text()))
