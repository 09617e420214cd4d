"""`m2pt check`: in Triton's interpreter, and with processes that answer, fail, die and hang as the tests dictate."""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import by_tma
from two_processes import FORKSERVER

from benchmarks.offline import TARGETS, compiling_for
from m2pt.cli import main
from m2pt_kernels import cases, check, cross_modal_linear, plans, processes, records, reference
from m2pt_kernels.cases import KINDS, Row, Shape
from m2pt_kernels.combined import CombinedWeight
from m2pt_kernels.devices import INTERPRETED
from m2pt_kernels.plans import KERNELS, TUNED, UNTUNED, gemm_hopper
from m2pt_kernels.products import CombinedMatmul

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter itself")]

SHAPES = (Shape(48, 64, 80), Shape(37, 23, 29))

ANSWERING = """
import itertools, json, os, signal, sys, time
from m2pt_kernels_double import behaviour
for line in sys.stdin:
    request = json.loads(line)
    for product in request["products"]:
        for shape, plan in itertools.product(request["shapes"], ("pointers a", "pointers b", "pointers c")):
            row = dict(kind=request["kind"], product=product, shape=shape, inputs="", plan=plan, fault=None,
                variant=f"{product} by {plan} of {request['kind']}", error_ratio=1.0)
            place = f"{product}, {shape[0]} x {shape[1]} -> {shape[2]}, , {plan}"
            if request["timed"] != (place in request["places"]) or row["variant"] in request["lost"]:
                continue
            print(json.dumps({"begun": row}), flush=True)
            behaviour(request, row)
            print(json.dumps({"done": row}), flush=True)
"""


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """Have the command find a GPU of two kinds of operands, and its processes behave as the code that is given."""

    def pretend(behaviour):
        lines = "".join(f"    {line}\n" for line in behaviour.splitlines() or ["pass"])
        (tmp_path / "m2pt_kernels_double.py").write_text(
            f"import os, signal, sys, time\n\ndef behaviour(request, row):\n{lines}"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(processes, "WORKER", [sys.executable, "-c", ANSWERING])
        monkeypatch.setattr(check, "KINDS", {name: KINDS[name] for name in ("bf16", "autocast, int8")})
        monkeypatch.setattr(check, "GPU_SHAPES", SHAPES)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
        monkeypatch.setattr(check, "supports", lambda device: True)
        monkeypatch.setattr(check, "device_name", lambda device: "NVIDIA H100 80GB HBM3")

    return pretend


def rows_of(path):
    return [Row(**fields | {"shape": Shape(*fields["shape"])}) for fields in json.loads(path.read_text())]


@pytest.fixture
def in_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def choose(*kinds, shapes=SHAPES):
        monkeypatch.setattr(check, "KINDS", {name: KINDS[name] for name in kinds})
        monkeypatch.setattr(check, "SMALL_SHAPES", shapes)

    return choose


def test_without_a_gpu_the_interpreter_runs_the_kernels(in_interpreter, tmp_path, capsys):
    in_interpreter("bf16, two models", "tf32")
    assert main(["check", "--json", str(tmp_path / "check.json")]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("No GPU was found: ") and "100%" in output.err
    assert output.out.endswith("\n3 of 3 kernels are correct\n")
    rows = rows_of(tmp_path / "check.json")
    assert [(row.product, row.shape, row.inputs) for row in rows] == [
        (product, shape, inputs)
        for product, of_product in {
            "forward": ("bias", "no bias"),
            "grad_input": ("",),
            "grad_parameters": ("", "W_aux trained"),
        }.items()
        for shape in sorted(SHAPES)
        for inputs in of_product
    ]
    assert {row.kind for row in rows} == {"bf16, two models"} and {row.fault for row in rows} == {None}
    assert all(row.plan.startswith("pointers") and row.error_ratio > 0 for row in rows)
    assert not records.path_of("findings", "cpu", KERNELS).exists()


def test_the_interpreter_is_used_beside_a_gpu_if_it_is_asked_for(on_gpu, in_interpreter, monkeypatch, capsys):
    on_gpu("")
    in_interpreter("fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "INTERPRETED", True)
    assert main(["check"]) == 0
    assert capsys.readouterr().out.startswith("TRITON_INTERPRET is set: ")
    assert not records.path_of("findings", "NVIDIA H100 80GB HBM3", KERNELS).exists()


def test_an_exception_is_a_fault_of_one_line(monkeypatch, capsys):
    def fail(*_):
        raise ValueError("\nno such layout\n\nat line 3:\n...")

    monkeypatch.setattr(cases, "INTERPRETED", True)
    monkeypatch.setattr(cases, "verify", fail)
    with compiling_for(TARGETS["sm_90"]):
        request = {"kind": "fp16", "products": ["grad_input"], "shapes": [[64, 64, 64]], "timed": False}
        cases.answer(request | {"places": [], "lost": []}, sys.stdout)
    begun, done = map(json.loads, capsys.readouterr().out.splitlines()[:2])
    assert begun["begun"]["fault"] is None and done["done"]["fault"] == "ValueError: no such layout ... ..."


def test_memory_that_is_short_is_no_fault(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation.")

    row = Row("fp16", "forward", SHAPES[0], "", "pointers", "forward by pointers")
    cases._attempt(fail, row, None, None)
    assert row.fault is None and row.not_run == "CUDA out of memory. Tried to allocate 2 GiB."


def test_the_reason_of_an_end_is_the_line_that_names_an_error():
    stderr = "Traceback:\n  line 1\ntorch.AcceleratorError: CUDA error: misaligned address\nCompile with CUDA_DSA.\n"
    assert processes._reason(stderr) == "torch.AcceleratorError: CUDA error: misaligned address"
    assert processes._reason("one\ntwo\n") == "two" and processes._reason("") == ""


def test_everything_right_on_a_gpu(on_gpu, tmp_path, capsys):
    on_gpu("if request['timed']: row['milliseconds'], row['plain_milliseconds'] = 0.3, 0.2")
    before = signal.getsignal(signal.SIGTERM)
    assert main(["check", "--json", str(tmp_path / "check.json")]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"NVIDIA H100 80GB HBM3, torch {torch.__version__}, Triton ")
    assert output.endswith("\n18 of 18 kernels are correct\n")
    assert ["grad_input", "by", "pointers", "b", "of", "bf16", "1.00", "0.300", "1.50"] in map(
        str.split, output.split("\n")
    )
    rows = rows_of(tmp_path / "check.json")
    assert len(rows) == 2 * 3 * 2 * 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert {row.milliseconds for row in rows if row.shape == SHAPES[0]} == {0.3}
    assert {row.milliseconds for row in rows if row.shape == SHAPES[1]} == {None}
    known = records.read(records.path_of("findings", "NVIDIA H100 80GB HBM3", KERNELS))
    assert known.keys() == {row.variant for row in rows}
    assert {place: fault for tried in known.values() for place, fault in tried.items()} == {
        row.place: None for row in rows
    }


FAULTS = {
    "row['fault'] = 'error of the output 3.0e-01'": "error of the output 3.0e-01",
    "os._exit(3)": "status 3: ",
    "print('ptxas fatal: unsupported')": "unexpected output: ptxas fatal: unsupported",
    "raise RuntimeError('an illegal memory access')": "status 1: RuntimeError: an illegal memory access",
    "os.kill(os.getpid(), signal.SIGSEGV)": "ended by SIGSEGV",
    "time.sleep(60)": "no end in 3 s",
}


@pytest.mark.parametrize("fault, message", FAULTS.items())
def test_a_fault_is_a_row_and_not_the_end(on_gpu, monkeypatch, tmp_path, capsys, fault, message):
    on_gpu(f"if row['plan'] == 'pointers b' and row['kind'] == 'bf16' and row['product'] == 'forward': {fault}")
    monkeypatch.setattr(processes, "PATIENCE", 3.0)
    assert main(["check", "--json", str(tmp_path / "check.json")]) == 1
    faulty = "forward by pointers b of bf16"
    output = capsys.readouterr().out
    assert "\n17 of 18 kernels are correct\n" in output and output.splitlines()[-1].startswith(f"{faulty}: {message}")
    (line,) = (line for line in output.splitlines() if line.endswith("FAULTY"))
    assert line.startswith(f"{faulty} ")
    rows = rows_of(tmp_path / "check.json")
    places = [(row.kind, row.product, row.place) for row in rows]
    ends_the_process = "row[" not in fault
    assert len(set(places)) == len(places) == 36 - ends_the_process
    assert {row.variant for row in rows if row.fault} == {faulty}
    known = records.read(records.path_of("findings", "NVIDIA H100 80GB HBM3", KERNELS))
    assert records._faults(known).keys() == {faulty} and len(known) == 18


def test_a_process_that_cannot_start_is_a_row(on_gpu, monkeypatch, capsys):
    on_gpu("")
    monkeypatch.setattr(processes, "WORKER", [sys.executable, "-c", "import no_such_module"])
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[-1]
        == "grad_parameters of autocast, int8: status 1: ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert lines[-7] == "0 of 6 kernels are correct"
    assert records.read(records.path_of("findings", "NVIDIA H100 80GB HBM3", KERNELS)) == {}


@pytest.mark.parametrize("supported", [False, True])
def test_float8_is_checked_where_the_gpu_has_it(on_gpu, monkeypatch, capsys, supported):
    on_gpu("")
    monkeypatch.setattr(check, "KINDS", {name: KINDS[name] for name in ("bf16", "bf16, float8")})
    monkeypatch.setattr(check, "supports_float8", lambda device: supported)
    assert main(["check"]) == 0
    assert f"{18 if supported else 9} kernels are correct" in capsys.readouterr().out


def check_without_end():
    processes.WORKER = ["sleep", "600"]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(main(["check"]))


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_its_processes(sent, status):
    process = FORKSERVER.Process(target=check_without_end)
    process.start()
    deadline = time.monotonic() + 60
    while not (children := children_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, sent)
    process.join(60)
    try:
        assert process.exitcode == status
    finally:
        process.kill()
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)


def children_of(pid):
    return [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def test_a_plan_that_ends_its_process_while_it_is_timed_is_faulty_after_all(on_gpu, tmp_path, capsys):
    on_gpu("""
if request['timed'] and row['plan'] == 'pointers b' and row['product'] == 'forward': os._exit(3)
if request['timed']: row['milliseconds'] = row['plain_milliseconds'] = 0.2
""")
    assert main(["check", "--json", str(tmp_path / "check.json")]) == 1
    output = capsys.readouterr().out
    assert "16 of 18 kernels are correct\nforward by pointers b of bf16: while it was timed: status 3" in output
    timed = [row for row in rows_of(tmp_path / "check.json") if row.milliseconds]
    assert len(timed) == 16
    assert len(records.faults("NVIDIA H100 80GB HBM3", KERNELS)) == 2


def test_times_that_cannot_be_had_are_no_fault(on_gpu, capsys):
    on_gpu("if request['timed']: row['not_run'] = 'CUDA out of memory'")
    assert main(["check"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("18 of 18 kernels are correct\n18 of 36 cases were not run: CUDA out of memory\n")


def test_what_could_not_be_run_is_not_remembered(on_gpu, capsys):
    on_gpu("if row['plan'] == 'pointers b': row['not_run'], row['error_ratio'] = 'CUDA out of memory', None")
    assert main(["check"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("12 of 36 cases were not run: CUDA out of memory\n") and "not run\n" in output
    known = records.read(records.path_of("findings", "NVIDIA H100 80GB HBM3", KERNELS))
    assert len(known) == 12 and not any("pointers b" in variant for variant in known)


def test_a_fault_is_forgotten_where_it_was_found_alone(on_gpu):
    path = records.path_of("findings", "NVIDIA H100 80GB HBM3", KERNELS)
    on_gpu("if row['plan'] == 'pointers b': row['fault'] = 'wrong'")
    assert main(["check"]) == 1
    elsewhere = {"forward by pointers b of bf16": {"(788, 768)": "wrong at another size"}}
    plans.remember("NVIDIA H100 80GB HBM3", elsewhere)
    faults = records.faults("NVIDIA H100 80GB HBM3", KERNELS)
    assert len(faults) == len(records._faults(records.read(path))) == 6
    on_gpu("")
    assert main(["check"]) == 0
    expected = {"forward by pointers b of bf16": "wrong at another size"}
    assert records.faults("NVIDIA H100 80GB HBM3", KERNELS) == expected
    assert len(records.read(path)) == 18 and records._faults(records.read(path)) == expected


def test_an_old_gpu_has_nothing_to_check(on_gpu, monkeypatch, capsys):
    on_gpu("")
    monkeypatch.setattr(check, "supports", lambda device: False)
    assert main(["check"]) == 0
    assert "below 8.0" in capsys.readouterr().out


def test_layers_of_a_model():
    shapes = [Shape(394, 192, 192), Shape(394, 192, 576), Shape(394, 192, 768), Shape(394, 768, 192)]
    assert check.layers("vit_tiny_patch16_224", 2) == shapes


def test_a_model_is_checked_instead_and_what_compilers_print_is_no_answer(in_interpreter, monkeypatch, tmp_path):
    script = "from m2pt_kernels import cases\ncases.verify = lambda *_: print('a banner') or (None, 2.0)\ncases.main()"
    monkeypatch.setattr(processes, "WORKER", [sys.executable, "-c", script])
    in_interpreter("fp16")
    assert main(["check", "--model", "vit_tiny_patch16_224", "--batch", "1", "--json", str(tmp_path / "c.json")]) == 0
    rows = rows_of(tmp_path / "c.json")
    assert {row.shape for row in rows} == {Shape(96, 96, 96)} and {row.error_ratio for row in rows} == {2.0}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "no_such_model"], "--model: expected the name of a timm model, got 'no_such_model'"),
        (
            ["--model", "resnet18"],
            "--model: expected a model with linear layers besides its classifier, got 'resnet18'",
        ),
        (["--batch", "0"], "--batch: expected a positive number, got 0"),
        (["--json", "no/such/folder/check.json"], "--json: expected a file in a folder that exists"),
        (["--json", "/"], "--json: expected a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"m2pt: error: {message}") and error.count("\n") == 1


@pytest.fixture
def weights():
    return {name: torch.randn(1024, 512, dtype=torch.bfloat16) for name in ("weight", "aux_weight")}


def kernels(x, weights):
    """What computes a forward pass."""
    with compiling_for(TARGETS["sm_90"]) as compiled:
        cross_modal_linear(x, **weights, scale=torch.ones(1))
    return [kernel.metadata.name for kernel in compiled]


@pytest.fixture
def variants(weights):
    """Those of that forward pass, with their plans."""
    x = torch.randn(1024, 512, dtype=torch.bfloat16)
    product = CombinedMatmul(x, CombinedWeight(*weights.values(), torch.ones(1), transposed=True))
    with compiling_for(TARGETS["sm_90"]):
        return {plans.variant(plan, plans.problem(product)): plan for plan in plans.candidates(product)}


def wrong(*variants):
    return {variant: {"at 1024": "error of the output 0.3"} for variant in variants}


@pytest.mark.parametrize(
    "kind, product, precision, expected",
    [
        ("bf16", "forward", "ieee", "forward by P of bfloat16 bfloat16 bfloat16"),
        ("bf16, int4", "forward", "ieee", "forward by P of bfloat16 bfloat16 int4"),
        ("autocast, two models", "grad_input", "ieee", "grad_input by P of bfloat16 float32 bfloat16 bfloat16"),
        ("autocast, float8", "grad_parameters", "ieee", "grad_parameters by P of bfloat16 float32 float8_e4m3fn"),
        ("tf32", "forward", "ieee", "forward by P of float32 float32 float32"),
        ("tf32", "forward", "tf32", "forward by P of float32 float32 float32 as tf32"),
    ],
)
def test_a_variant_names_what_decides_which_kernel_is_compiled(monkeypatch, kind, product, precision, expected):
    monkeypatch.setattr(plans, "input_precision", lambda dtype, target: precision)
    with compiling_for(TARGETS["sm_90"]):
        for case in cases.cases(KINDS[kind], product, SHAPES[0], "cpu"):
            assert plans.variant(plans.Plan("P"), plans.problem(case.product)) == expected


@by_tma
def test_a_faulty_plan_is_not_used_and_one_warning_names_the_next(weights, variants):
    x = torch.randn(1024, 512, dtype=torch.bfloat16)
    first, second = list(variants)[:2]
    plans.remember("cpu", wrong(first))
    with pytest.warns(UserWarning) as caught:
        kernels(x, weights)
        kernels(x[:900], weights)
    (warning,) = caught
    expected = (
        f"{first} was found faulty on this GPU (error of the output 0.3) and is not used:"
        f" the next plan is {variants[second]}; "
    )
    assert str(warning.message).startswith(expected)
    assert variants[first] not in UNTUNED.values()


@by_tma
@pytest.mark.filterwarnings("ignore:.*was found faulty")
def test_a_plan_that_is_found_faulty_later_is_given_up(weights, variants):
    x = torch.randn(1024, 512, dtype=torch.bfloat16)
    kernels(x, weights)
    first, second, *others = variants
    found = 0
    for faulty in ([first], [second], others):
        assert list(UNTUNED.values()) == [variants[faulty[0]]]
        plans.remember("cpu", wrong(*faulty))
        found += len(faulty)
        assert len(records.read(records.path_of("findings", "cpu", KERNELS))) == found
        kernels(x, weights)
    assert list(UNTUNED.values()) == [plans.EAGER]


@by_tma
def test_kernels_without_a_right_plan_leave_the_product_to_plain_torch(weights, variants):
    plans.remember("cpu", wrong(*variants))
    with pytest.warns(UserWarning, match="the next plan is eager"):
        assert kernels(torch.randn(1024, 512, dtype=torch.bfloat16), weights) == []


@by_tma
def test_other_dtypes_and_gpus_keep_the_plan(weights, variants, monkeypatch):
    x = torch.randn(1024, 512, dtype=torch.bfloat16)
    usual = kernels(x, weights)
    ((key, plan),) = UNTUNED.items()
    monkeypatch.setitem(TUNED, key, plan)
    plans.remember("NVIDIA H100 80GB HBM3", wrong(*variants))
    assert key in TUNED and kernels(x, weights) == usual
    plans.remember("cpu", wrong(*variants))
    assert kernels(x.half(), {name: weight.half() for name, weight in weights.items()}) == usual


def test_a_product_reads_what_was_found_once_and_verifies_nothing(weights, monkeypatch):
    read, x = [], torch.randn(1024, 512, dtype=torch.bfloat16)
    monkeypatch.setattr(records, "read", lambda path: read.append(path) or {})
    monkeypatch.setattr(reference, "combined_matmul", None)
    for rows in (1024, 900, 800):
        assert len(kernels(x[:rows], weights)) == 1
    assert len(read) == 1


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"forward by pointers": 1}', '{"a": {"b": 3}}', '"forward"'])
def test_damaged_findings_are_none(weights, content):
    path = records.path_of("findings", "cpu", KERNELS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    assert records.faults("cpu", KERNELS) == {}
    plans.remember("cpu", wrong("forward by pointers"))
    assert records.read(path)["forward by pointers"] == {"at 1024": "error of the output 0.3"}


def test_findings_that_cannot_be_written_hold_in_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2PT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="M2PT_CACHE_DIR: cannot write"):
        plans.remember("cpu", wrong("forward by pointers"))
    assert records.faults("cpu", KERNELS) == {"forward by pointers": "error of the output 0.3"}


def test_without_a_home_folder_nothing_was_found(weights, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert str(records.path_of("times", "cpu", KERNELS)).startswith(os.environ["M2PT_CACHE_DIR"])
    monkeypatch.delenv("M2PT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert len(kernels(torch.randn(1024, 512, dtype=torch.bfloat16), weights)) == 1


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_90", "gfx942"])
def test_the_shapes_reach_every_tile(name, monkeypatch):
    monkeypatch.setattr(cases, "INTERPRETED", False)
    target = TARGETS[name]
    reached, before = set(), torch.backends.cuda.matmul.fp32_precision
    with compiling_for(target):
        for (label, kind), product, shape in itertools.product(KINDS.items(), cases.PRODUCTS, cases.GPU_SHAPES):
            if kind.aux_weight == "float8_e4m3fn" and name != "sm_90":
                continue
            torch.backends.cuda.matmul.fp32_precision = "tf32" if kind.tf32 else "ieee"
            for case in cases.cases(kind, product, shape, "meta"):
                found = plans.candidates(case.product)
                reached |= {(label, product == "grad_parameters", plan.by, plan.tile) for plan in found}
    torch.backends.cuda.matmul.fp32_precision = before
    labels = {"half": "bf16", "mixed": "autocast", "tf32": "tf32", "ieee": "fp32"}
    for is_grad, tiles in enumerate((plans.POINTER_TILES, plans.POINTER_GRAD_TILES)):
        for row in (plans.architecture(target), "small", "portable"):
            for operands, of_kind in tiles[row].items():
                for tile in of_kind:
                    assert (labels[operands], bool(is_grad), "pointers", tile) in reached
    if name == "sm_90" and gemm_hopper is not None:
        for is_grad in (False, True):
            assert {"hopper", "tma"} <= {by for _, of_grad, by, _ in reached if of_grad == is_grad}
