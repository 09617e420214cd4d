"""What `pytest benchmarks/` does around its measurements; the benchmarks of a GPU, with a made-up one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from benchmarks import conftest, cost, predictions, results, summary
from benchmarks.compile_report import Kernel
from benchmarks.offline import Resources
from benchmarks.sass import Loop
from benchmarks.timing import LEAST_ROUNDS, is_known, median_interval, until_known
from m2pt_kernels.plans import Plan

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[1]


def test_interval_contains_the_median_as_often_as_it_says():
    generator = random.Random(0)
    samples = [[generator.expovariate(1.0) for _ in range(25)] for _ in range(2000)]
    intervals = map(median_interval, samples)
    inside = sum(low <= 0.6931 <= high for low, high in intervals)
    assert 0.95 < inside / len(samples) < 0.98


@pytest.mark.parametrize(
    ("count", "left_out"), [(LEAST_ROUNDS, 0), (8, 0), (9, 1), (11, 1), (12, 2), (20, 5), (25, 7), (60, 21)]
)
def test_interval_leaves_out_as_many_at_both_ends_as_the_binomial_distribution_allows(count, left_out):
    samples = list(range(count))
    random.Random(0).shuffle(samples)
    assert median_interval(samples) == (left_out, count - 1 - left_out)


def test_median_is_known_if_both_ends_are_near():
    assert is_known([0.99, 1.0, 1.0, 1.0, 1.0, 1.01])
    assert not is_known([0.97, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert not is_known([1.0, 1.0, 1.0, 1.0, 1.0, 1.03])
    assert is_known([0.5, *[1.0] * 7, 9.0])


def dictated(*quantities):
    rounds = zip(*quantities, strict=True)
    return lambda: next(rounds)


def test_rounds_end_when_every_median_is_known():
    steady, wild = [1.0] * 100, [1.0, 2.0] * 50
    assert len(until_known(dictated(steady), 100)) == LEAST_ROUNDS
    assert len(until_known(dictated(steady, steady), 100)) == LEAST_ROUNDS
    assert len(until_known(dictated(wild), 40)) == 40
    assert len(until_known(dictated(steady, wild), 40)) == 40
    settling = [5.0] * 3 + [1.0] * 97
    found = until_known(dictated(steady, settling), 100)
    assert LEAST_ROUNDS < len(found) < 20
    assert median(second for _, second in found) == 1.0


def operator_rows(layer, published, ours, tokens="64 x 197", names=("published", "transient copy", "two GEMMs")):
    times = {"F.linear": 1.0, **dict.fromkeys(names, published), "this package": ours}
    return [
        {
            "layer": layer,
            "tokens": tokens,
            "precision": "bfloat16",
            "pass": each,
            "implementation": name,
            "time / F.linear": time,
            "TFLOP/s": 567.8,
        }
        for name, time in times.items()
        for each in summary.PASSES
    ]


def test_summary_of_operators_marks_rows_and_figures_that_lose():
    rows = [*operator_rows("ViT-B mlp.fc1", 1.1, 1.25), *operator_rows("ViT-B mlp.fc2", 1.1, 1.05)]
    *_, _, input_gradient, _, whole_step = rows
    input_gradient["time / F.linear"] = 12.34
    whole_step["layer"] = "ViT-B attn.proj"  # of which nothing else was measured
    *_, loses, wins, partial = summary.operators(rows).splitlines()
    assert loses.startswith("*ViT-B mlp.fc1   64x197 bfloat16|1.10 1.10 1.10 1.10|")
    assert loses.endswith("|1.25*1.25*1.25*1.25*    568")
    assert wins.startswith(" ViT-B mlp.fc2 ") and wins.endswith("|1.05 12.3*1.05    -       -")
    assert partial.startswith(" ViT-B attn.proj ") and partial.endswith("|   -    -    - 1.05     568")


def test_summary_fits_a_terminal():
    names = ("published", "transient copy", "two GEMMs", "published, torch.compile")
    rows = operator_rows("ViT-22B mlp.fc1", 1.1, 1.25, names=names)
    assert max(map(len, summary.operators(rows).splitlines())) <= 140
    rows = [step_row("this package, W_aux int8, every lever but 8-bit Adam", "out of memory", "-", "-")]
    assert max(map(len, summary.training_steps(rows).splitlines())) <= 140


def step_row(variant, milliseconds, ratio, peak):
    return {
        "model": "ViT-B",
        "batch": 64,
        "precision": "autocast",
        "checkpointing": "yes",
        "variant": variant,
        "median, ms": milliseconds,
        "time / published": ratio,
        "peak, MiB": peak,
        "simulated peak, MiB": 2048.0,
        "measured / simulated": "-" if peak == "-" else peak / 2048,
    }


def test_summary_of_training_steps():
    rows = [
        step_row("published, W_aux frozen", 123.4, 1.0, 3072.0),
        step_row("plain", 200.0, 1.62, 3072.0),
        step_row("this package, W_aux frozen", 111.0, 0.9, 2048.0),
        step_row("this package, W_aux int8", 150.0, 1.2, 1024.0),
        step_row("this package, W_aux int8, every lever", "out of memory", "-", "-"),
    ]
    *_, published, plain, ours, loses, out_of_memory = map(str.split, summary.training_steps(rows).splitlines())
    assert published[-5:] == ["123", "1", "3", "2", "1.5"]
    assert [line[0] for line in (plain, ours, loses, out_of_memory)] == ["ViT-B", "ViT-B", "*ViT-B", "ViT-B"]
    assert out_of_memory[-7:] == ["out", "of", "memory", "-", "-", "2", "-"]
    for row in rows:
        del row["simulated peak, MiB"], row["measured / simulated"]
    assert "simulated" not in summary.training_steps(rows)


MADE_UP = '''"""What is made up."""

import signal
import weakref

import pytest

from benchmarks.timing import Timing


@pytest.mark.parametrize("number", range(3), ids=["zero", "one", "two"])
def test_made_up(record, number):
    {action}
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    record({{"number": number, **timing.columns("ms")}}, timing)
'''


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs made-up files by the rules of the benchmarks; returns the result, and the folders of tables."""
    pytester.makeini("[pytest]")
    monkeypatch.setattr(results, "IGNORED", pytester.path / "ignored")
    monkeypatch.setattr(results, "TRACKED", pytester.path / "tracked")
    monkeypatch.setattr(results, "device_slug", lambda: "cpu")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run_pytest(*arguments, **files):
        for name, text in files.items():
            pytester.makepyfile(**{name: text})
            monkeypatch.delitem(sys.modules, name, raising=False)  # the benchmark of that name
        options = ("-p", conftest.__name__, "-p", "no:xdist")
        return pytester.runpytest_inprocess(*options, *arguments, no_reraise_ctrlc=True)

    return run_pytest


def written(folder):
    return {path.name: path.read_text() for path in folder.glob("*")}


def test_results_are_ignored_by_git_unless_they_are_recorded(run):
    result = run(test_made_up=MADE_UP.format(action="pass"))
    result.assert_outcomes(passed=3)
    tables = written(results.IGNORED)
    assert tables.keys() == {"made-up-cpu.md", "made-up-cpu.json"} and not results.TRACKED.exists()
    assert tables["made-up-cpu.md"].startswith(
        "What is made up.\n\n| number | p20, ms | median, ms | p80, ms | rounds |"
    )
    content = json.loads(tables["made-up-cpu.json"])
    assert "partial" not in content and [row["number"] for row in content["rows"]] == [0, 1, 2]
    assert content["rows"][0]["median, ms"] == 3500.0
    result.stdout.fnmatch_lines(["*= results =*", "*torch *", str(results.IGNORED / "made-up-cpu.md")])
    assert "Median" not in result.stdout.str()
    run("--record")
    assert written(results.TRACKED).keys() == tables.keys()
    ignored = subprocess.run(["git", "check-ignore", "runs/benchmarks/x.md"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128)  # 128: not a checkout


@pytest.mark.parametrize(
    ("action", "arguments", "count"),
    [
        ("pass", ["-k", "zero or one"], 2),
        ("pass", ["test_made_up.py::test_made_up[one]"], 1),
        ("assert number != 1", [], 2),
        ("if number == 2: raise KeyboardInterrupt", [], 2),
        ("if number == 1: signal.raise_signal(signal.SIGTERM)", [], 1),
        ("if number == 1: weakref.finalize(Timing(()), signal.raise_signal, signal.SIGTERM)", [], 2),
    ],
    ids=["-k", "::", "failed", "Ctrl-C", "SIGTERM", "SIGTERM in a callback"],
)
def test_partial_results_say_so_and_are_never_recorded(run, action, arguments, count):
    result = run("--record", *arguments, test_made_up=MADE_UP.format(action=action))
    tables = written(results.IGNORED)
    assert tables.keys() == {"made-up-cpu-partial.md", "made-up-cpu-partial.json"} and not results.TRACKED.exists()
    assert f"\n\nPartial: {count} of 3 measurements.\n\n|" in tables["made-up-cpu-partial.md"]
    content = json.loads(tables["made-up-cpu-partial.json"])
    assert content["partial"] is True and len(content["rows"]) == count
    result.stdout.fnmatch_lines([str(results.IGNORED / "made-up-cpu-partial.md")])


def test_files_run_in_the_order_of_their_importance(run):
    names = ("test_another", *reversed(conftest.IMPORTANCE))
    result = run("-v", **{name: MADE_UP.format(action="pass") for name in names})
    found = [line.partition(".py::")[0] for line in result.outlines if " PASSED" in line]
    assert list(dict.fromkeys(found)) == [*conftest.IMPORTANCE, "test_another"]


def test_what_has_to_be_asked_for_is_left_out_and_not_missed(run):
    text = "\n\n@pytest.mark.{}\ndef test_{}(record):\n    record({{'number': 3}}, None)\n"
    file = MADE_UP.format(action="return record({'number': number}, None)") + "".join(
        text.format(name, name) for name in conftest.LEFT_OUT
    )
    run(test_made_up=file).assert_outcomes(passed=3, deselected=2)
    assert "made-up-cpu.md" in written(results.IGNORED)
    run("--compile").assert_outcomes(passed=4, deselected=1)
    run("--compile", "--full").assert_outcomes(passed=5)
    assert "made-up-cpu-full.md" in written(results.IGNORED)


def test_a_table_of_pytest_benchmark_is_shown_to_those_who_use_its_options(run):
    assert "Median" in run("--benchmark-columns=median", test_made_up=MADE_UP.format(action="pass")).stdout.str()


@pytest.mark.parametrize(("arguments", "folder"), [([], "IGNORED"), (["--record"], "TRACKED")])
def test_scripts_record_when_told_to(tmp_path, monkeypatch, capsys, arguments, folder):
    for each in ("IGNORED", "TRACKED"):
        monkeypatch.setattr(results, each, tmp_path / each)
    monkeypatch.setattr(sys, "argv", ["made_up.py", *arguments])
    path = results.run("made-up", "cpu", lambda: [{"number": 1.0, "text": "-"}], "What is made up.")
    assert path == tmp_path / folder / "made-up-cpu.md"
    assert results.read(path) == [{"number": 1.0, "text": "-"}]
    assert capsys.readouterr().out == f"{path.read_text()}\nWritten to {path}\n"


AS_ON_A_GPU = """
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from benchmarks import results, timing


class Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    synchronize = record

    def elapsed_time(self, end):
        return 2.0


def create_model(name, small=timm.create_model):
    if "large" in name:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return small("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3, patch_size=56)


class Small:
    def pytest_itemcollected(self, item):
        if shape := item.callspec.params.get("shape"):
            item.callspec.params["shape"] = replace(shape, tokens=4, in_features=64)


timing.ON_GPU, timing.DEVICE = True, "cpu"
timing._larger_than_l2 = lambda: torch.empty(1)
torch.cuda.Event = Event
torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated = lambda: 0
torch.cuda.max_memory_allocated = lambda: 2**30
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="0123")
results.device_name = lambda: "made-up GPU"
results.device_slug = lambda: "made-up"
results.IGNORED = Path(sys.argv[1])
timm.create_model = create_model
raise SystemExit(pytest.main(sys.argv[2:], plugins=[Small()]))
"""


@pytest.mark.slow
def test_benchmarks_of_a_gpu_run(tmp_path):
    """On the CPU, with made-up times and memory: everything but the measuring."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ntest "$1" = --id=GPU-0123 && echo "1755, 1980, 700.00"\n')
    smi.chmod(0o755)
    paths = os.pathsep.join((str(ROOT), *sys.path))
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}
    environment.pop("PYTEST_XDIST_WORKER", None)
    chosen = (
        "(test_operator and ViT-B and attn.proj and 8 and not 64 and autocast and (transient or step))"
        " or (test_training_step and ViT-B and 16 and checkpointing)"
        " or (test_training_step and ViT-L and 16 and frozen)"
    )
    command = [sys.executable, "-c", AS_ON_A_GPU, str(tmp_path / "ignored"), "benchmarks", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, "-k", chosen], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No GPU was found" not in result.stdout
    assert "made-up GPU; SM clock 1755 of 1980 MHz, power limit 700.00 W; python" in result.stdout
    operators = results.read(tmp_path / "ignored" / "operators-made-up-partial.md")
    steps = results.read(tmp_path / "ignored" / "training-step-made-up-partial.md")
    assert {row["implementation"] for row in operators} >= {"F.linear", "transient copy", "this package"}
    assert {row["pass"] for row in operators} == set(summary.PASSES)
    out_of_memory = [row for row in steps if row["model"] == "ViT-L"]
    assert out_of_memory and {row["median, ms"] for row in out_of_memory} == {"out of memory"}
    trained = [row for row in steps if row["model"] == "ViT-B"]
    assert len(trained) == 5 and any("every lever" in row["variant"] for row in trained)
    assert all(row["time / published"] == 1.0 for row in trained)
    assert all(row["peak, MiB"] / row["simulated peak, MiB"] == row["measured / simulated"] for row in trained)


GPU = cost.Gpu("made up", 90, multiprocessors=10, clock=1000, hbm=1000)
LAUNCH = cost.Launch(tiles=21, steps=5, terms={"tensor": 100, "shared": 80, "issue": 40}, hbm_bytes=0)


@pytest.mark.parametrize(
    ("changes", "costs", "waves", "microseconds"),
    [
        ({}, cost.Costs(20, epilogue=300), 3, 3 * (5 * 120 + 300) / 1000),
        ({"tiles": 20}, cost.Costs(20, epilogue=300), 2, 2 * (5 * 120 + 300) / 1000),
        ({}, cost.Costs(20, 300, prologue=400), 3, 3 * (5 * 120 + 300 + 400) / 1000),
        ({}, cost.Costs(20, 300, overlap="no"), 3, 3 * (5 * (100 + 40 + 20) + 300) / 1000),
        ({"products": 2}, cost.Costs(20, 300, overlap="no"), 3, 3 * (5 * (100 + 40 + 2 * 20) + 300) / 1000),
        ({"resident": 2}, cost.Costs(20, 300), 3, 3 * (5 * 110 + 300) / 1000),
        ({"resident": 2, "tiles": 10}, cost.Costs(20, 300), 1, (5 * 120 + 300) / 1000),
        ({"hbm_bytes": 9_000_000}, cost.Costs(20, 300), 3, 9.0),
        (
            {"tiles": 4, "steps": 12, "splits": 5, "partial_bytes": cost.partial_bytes(100, 100, 5)},
            cost.Costs(20, 300),
            2,
            2 * (3 * 120 + 300) / 1000 + cost.NEXT_LAUNCH + 0.4,
        ),
    ],
)
def test_estimate_by_hand(changes, costs, waves, microseconds):
    found = cost.estimate(LAUNCH._replace(**changes), costs, GPU)
    assert found.waves == waves
    assert found.total == pytest.approx(cost.LAUNCH + microseconds)


def test_terms_of_an_estimate_add_up_where_the_busiest_pipe_is_the_limit():
    terms = cost.estimate(LAUNCH, cost.Costs(20, 300), GPU).terms
    assert terms == pytest.approx(
        {"tensor": 1.5, "shared": 1.2, "issue": 0.6, "HBM": 0, "exposed": 0.3, "fixed": cost.LAUNCH + 0.9}
    )


def test_plain_gemm_has_the_best_of_tiles_and_splits():
    # 192 x 192: 66 x 16 tiles are 8 waves of 12 steps, of which tensor cores and shared memory take 1152 clocks.
    assert cost.plain(12608, 3072, 768, cost.H200) == pytest.approx(5 + 8 * (12 * (1152 + 119) + 4200) / 1755)
    # 192 x 192 in 8 splits: 16 x 8 blocks are a wave of 25 steps.
    adding = cost.NEXT_LAUNCH + 8 * 8 * 768 * 768 / 4.8e6
    assert cost.plain(768, 768, 12608, cost.H200) == pytest.approx(5 + (25 * 1271 + 4200) / 1755 + adding)


@pytest.mark.parametrize(
    ("by", "product", "arch", "overlap"),
    [
        ("hopper", "forward", 90, "yes"),
        ("tma", "grad_input", 90, "no"),
        ("tma", "forward", 100, "partly"),
        ("pointers", "forward", 90, "no"),
        ("pointers", "forward", 80, "partly"),
        ("tma", "grad_parameters", 90, "-"),
        ("hopper", "grad_parameters", 90, "-"),
    ],
)
def test_what_overlaps_where(by, product, arch, overlap):
    assert cost.costs_of(by, product, arch).overlap == overlap


def test_terms_of_a_compiled_loop_by_hand():
    loop = Loop({"tensor": 8, "shared": 64, "integer": 400}, shared_bytes=4 * 2048, stores_to_shared=0, barriers=9)
    resources = Resources(registers=168, spilled=0, shared=196888)
    kernel = Kernel(90, "forward", "hopper", 384, 128, 32, 4, 2, None, loop, resources)
    # W and W_aux are copied in and read by warps, 64 rows of 128 each; wgmma reads x twice.
    shared = (384 * 64 + 2 * 128 * 32 * 4 + 2 * 384 * 64) / 128
    assert kernel.terms == (768, shared, 640, (8 + 64 + 400) / 4 * 8 / 4)
    grad = kernel._replace(product="grad_parameters", by="tma", rows=128, columns=256, depth=64, column_bytes=2)
    grad = grad._replace(loop=Loop({"tensor": 4}, 0, 0, 0))
    assert grad.terms == grad._replace(by="hopper").terms == (1024, 1024, 768, 8)


PRODUCTS_ROW = {
    "layer": "ViT-B attn.qkv",
    "tokens": 12608,
    "weights": "fp32",
    "product": "forward",
    "plain GEMM, us": 70.0,
    "this package / plain": 1.5,
    "its plan": "hopper 1x2",
    "others / plain": "tma 3x4 1.95, pointers 5x6xFalse 2.83",
}


@pytest.mark.parametrize(("tile", "ratio"), [((1, 2), 1.5), ((3, 4), "-")])
def test_measured_stands_beside_predicted_where_that_plan_was_measured(monkeypatch, tile, ratio):
    monkeypatch.setattr(results, "read", lambda path: [PRODUCTS_ROW])
    key = ("ViT-B attn.qkv", 12608, "fp32", "forward")
    measured = predictions.measured()
    assert measured == {key: {"plain": 70.0, "hopper 1x2": 1.5, "tma 3x4": 1.95, "pointers 5x6xFalse": 2.83}}
    monkeypatch.setattr(predictions, "chosen", lambda *arguments: Plan("hopper", tile))
    monkeypatch.setattr(predictions, "predict", lambda *arguments: (cost.Estimate(5, {"tensor": 60.0}, 143.0), 0.9))
    layer = predictions.SHOWN[0]
    product, *_ = predictions.products(*layer[1:], "fp32")
    row = predictions.row(cost.H200, layer, "fp32", 0, product, measured)
    plain = cost.plain(12608, 2304, 768, cost.H200)
    assert row["measured / plain"] == ratio and row["predicted / plain"] == 143.0 / plain
    assert (row["plan"], row["measured plain, us"]) == (str(Plan("hopper", tile)), 70.0)
