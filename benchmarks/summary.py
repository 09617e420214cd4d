"""The measurements of a run, as text for a terminal of 140 columns."""

from benchmarks.results import Row, cell

CEILING, OURS = "F.linear", "this package"
PASSES = {"forward": "fwd", "input gradient": "dx", "parameter gradients": "dW", "whole step": "all"}
WHOLE_STEP = "whole step"

OPERATORS_LEGEND = """\
Time / F.linear of forward (fwd), of backward for the gradient of x (dx) or of W, s and b (dW), and of forward plus
backward (all); TFLOP/s of this package's forward plus backward. * this package loses to the fastest alternative."""
STEPS_LEGEND = """\
W_aux is frozen, trained, or frozen and int8; published is with W_aux frozen. * this package is slower than that."""

Times = dict[tuple[str, str], float]
"""Time / F.linear, by implementation and pass."""


def operators(rows: list[Row]) -> str:
    """A line per layer, tokens and precision."""
    others = list(dict.fromkeys(row["implementation"] for row in rows if row["implementation"] not in (CEILING, OURS)))
    names = [*others, OURS]
    width = max(len(row["layer"]) for row in rows)
    titles = "|".join(f"{name.rpartition(', ')[2]:^19}" for name in names)
    passes = "|".join(" ".join(f"{short:>4}" for short in PASSES.values()) for _ in names)
    lines = [OPERATORS_LEGEND, f"{'':{width + 16}}|{titles}", f"{' layer':{width}} tokens precision|{passes} TFLOP/s"]
    settings = dict.fromkeys((row["layer"], row["tokens"], row["precision"]) for row in rows)
    for layer, tokens, precision in settings:
        found = [row for row in rows if (row["layer"], row["tokens"], row["precision"]) == (layer, tokens, precision)]
        times = {(row["implementation"], row["pass"]): row["time / F.linear"] for row in found}
        speed = {(row["implementation"], row["pass"]): row["TFLOP/s"] for row in found}.get((OURS, WHOLE_STEP), "-")
        groups = [" ".join(_ratio(times.get((name, each))) for each in PASSES) for name in others]
        marks = {each: "*" if _loses(times, others, each) else " " for each in PASSES}
        groups.append("".join(_ratio(times.get((OURS, each))) + marks[each] for each in PASSES))
        place = f"{marks[WHOLE_STEP]}{layer:{width}} {tokens.replace(' ', ''):>6} {precision:8}"
        lines.append(f"{place}|{'|'.join(groups)}{cell(speed):>7}")
    return "\n".join(lines)


def _loses(times: Times, others: list[str], each: str) -> bool:
    found = [times[name, each] for name in others if (name, each) in times]
    return bool(found) and times.get((OURS, each), 0.0) > min(found)


def _ratio(value: float | None) -> str:
    """Format in four characters."""
    if value is None:
        return "   -"
    return f"{value:.2f}" if value < 9.995 else f"{value:4.1f}" if value < 99.95 else f"{value:4.0f}"


def training_steps(rows: list[Row]) -> str:
    """A line per model, batch, precision, checkpointing and variant."""
    simulated = ["simulated", "/ simulated"] if any("measured / simulated" in row for row in rows) else []
    lines = [[" model", "batch", "precision", "ckpt", "variant", "ms", "/ published", "peak GiB", *simulated]]
    for row in rows:
        loses = row["variant"].startswith(OURS) and row["time / published"] != "-" and row["time / published"] > 1
        place = [f"{'*' if loses else ' '}{row['model']}", row["batch"], row["precision"], row["checkpointing"]]
        time = [row["median, ms"], row["time / published"]]
        memory = [_gib(row["peak, MiB"])]
        if simulated:
            memory += [_gib(row["simulated peak, MiB"]), row["measured / simulated"]]
        lines.append([*map(cell, [*place, row["variant"].replace("W_aux ", ""), *time, *memory])])
    return f"{STEPS_LEGEND}\n{_aligned(lines, left=1 + lines[0].index('variant'))}"


def _gib(mib: str | float) -> str | float:
    return mib if isinstance(mib, str) else mib / 1024


def _aligned(lines: list[list[str]], left: int) -> str:
    """Align columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = "<" * left + ">" * (len(widths) - left)
    return "\n".join(
        "  ".join(f"{value:{side}{width}}" for value, side, width in zip(line, sides, widths, strict=True))
        for line in lines
    )
