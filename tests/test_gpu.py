"""What only makes sense on a GPU: graphs, streams, threads, several devices, its memory, and its own check."""

import copy
import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers import assert_as_good_as_torch, operands, outputs
from timm.utils import ModelEmaV3
from tiny_runs import ONCE, batches_of, recipe_of, trainer_of
from torch import nn
from torch.profiler import ProfilerActivity, profile

from m2pt import FusedCrossModalLinear
from m2pt_kernels import (
    check,
    cross_modal_linear,
    estimates,
    gemm,
    implementation,
    plans,
    quantize,
    records,
    reference,
    tuning,
    warmup,
)
from m2pt_kernels.cases import KINDS, Shape
from m2pt_kernels.combined import CombinedWeight
from m2pt_kernels.plans import KERNELS, TUNED
from m2pt_kernels.products import CombinedMatmul, GradParameters
from m2pt_kernels.verification import verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

MIB = 2**20
SIZES = {"small": (32, 64, 64, torch.float16), "large": (1024, 1536, 768, torch.bfloat16)}
"""Rows, output and input features: of the kernels that read by pointers; of those that read by TMA, where there are."""


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def layer_of(size, device="cuda"):
    _, out_features, in_features, dtype = size
    aux_weight = torch.randn(out_features, in_features) / in_features**0.5
    layer = FusedCrossModalLinear(in_features, out_features, aux_weight=aux_weight).to(device, dtype)
    nn.init.constant_(layer.cross_modal_scale, 0.5)
    return layer


def input_of(size, device="cuda"):
    rows, _, in_features, dtype = size
    return torch.randn(rows, in_features, device=device, dtype=dtype)


def step(layer, x):
    """The output, the gradient of x and those of the parameters."""
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(torch.ones_like(y))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad}
    return y.detach(), leaf.grad, gradients


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_cuda_graph_of_forward_and_backward(size, name):
    layer = layer_of(size)
    twin = copy.deepcopy(layer)
    with implementation(name):
        graphed = torch.cuda.make_graphed_callables(twin, (input_of(size).requires_grad_(),))
        for scale in (0.5, -1.0):
            x = input_of(size)
            for module in (layer, graphed):
                nn.init.constant_(module.cross_modal_scale, scale)
            assert_same(step(graphed, x), step(layer, x))


def test_a_product_runs_on_the_current_stream(size):
    layer, x = layer_of(size), input_of(size)
    expected = step(layer, x)
    late, side = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = step(layer, late)
    side.synchronize()
    assert_same(found, expected)


def test_nothing_waits_for_the_device(size):
    layer, x = layer_of(size), input_of(size)
    step(layer, x)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_product_is_one_kernel(size):
    layer, x = layer_of(size), input_of(size)
    with torch.no_grad():
        layer(x)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            layer(x)
            torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and kernels[0].startswith("combined_matmul")


on_hopper = pytest.mark.skipif(
    plans.gemm_hopper is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the kernels with maps made on the host are for sm_90",
)


def products_at(memory, tokens, in_features, out_features):
    """A layer's products with the pathway, of matrices that lie one after the other in memory."""
    sizes = [(tokens, in_features), (tokens, out_features), (out_features, in_features), (out_features, in_features)]
    parts = memory[: sum(rows * columns for rows, columns in sizes)].normal_().split([r * c for r, c in sizes])
    x, grad_output, weight, aux_weight = (part.view(size) for part, size in zip(parts, sizes, strict=True))
    combined = CombinedWeight(weight, aux_weight, torch.full((1,), 0.3, device="cuda"))
    return [
        CombinedMatmul(x, combined._replace(transposed=True)),
        CombinedMatmul(grad_output, combined),
        GradParameters(grad_output, x, aux_weight, None, torch.bfloat16, None),
    ]


def hopper_plans(product):
    found = [plan for plan in plans.candidates(product) if plan.by == "hopper"]
    assert found
    return found


@on_hopper
def test_maps_follow_memory_that_is_used_again():
    memory = torch.empty(2**21, device="cuda", dtype=torch.bfloat16)
    for sizes in ((512, 256, 384), (384, 256, 512), (512, 128, 768), (512, 256, 384)):
        for product in products_at(memory, *sizes):
            for plan in hopper_plans(product):
                assert verify(plan, product).fault is None, plan


@on_hopper
def test_a_graph_reads_what_lies_where_its_maps_point():
    memory = torch.empty(2**21, device="cuda", dtype=torch.bfloat16)
    for product in products_at(memory, 1000, 256, 384):
        for plan in hopper_plans(product):
            gemm.compute(plan, product)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = gemm.compute(plan, product)
            memory.normal_()
            graph.replay()
            assert_same(output, gemm.compute(plan, product))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device_than_the_current_one(size):
    layer, x = layer_of(size), input_of(size)
    expected = step(layer, x)
    other = copy.deepcopy(layer).to("cuda:1")
    found = step(other, x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(found, expected, check_device=False)


def requested(when):
    """Bytes that tensors ask for, the allocator's rounding left out: "current" or "peak"."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def peak_above(function):
    """The most bytes that a call asks for at a time, besides those there were."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    result = function()
    torch.cuda.synchronize()
    return result, requested("peak") - before


def test_the_combined_weight_is_never_in_memory():
    size = (1024, 4096, 4096, torch.bfloat16)  # whose gradients are too large for splits
    layer, x = layer_of(size), input_of(size)
    grad_output = torch.ones_like(x)
    step(layer, x)
    layer.zero_grad()
    alone = [[leaf] for leaf in (x, layer.weight, layer.cross_modal_scale)]
    together = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    for wanted in (*alone, together):
        for leaf in together:
            leaf.requires_grad_(any(leaf is one for one in wanted))
        y, forward = peak_above(lambda: layer(x))
        assert y.nbytes <= forward < y.nbytes + 2 * MIB < layer.weight.nbytes
        gradients, backward = peak_above(partial(torch.autograd.grad, y, wanted, grad_output))
        kept = sum(gradient.nbytes for gradient in gradients)
        # So it is with the bias's gradient too: torch needs memory to sum it up, but before the others are there.
        assert kept <= backward < kept + 2 * MIB


def test_gradients_of_few_tiles_are_split_within_the_bound():
    x, grad_output, aux_weight = draw(12608, 768), draw(12608, 768), draw(768, 768)
    product = GradParameters(grad_output, x, aux_weight, None, torch.float32, None)
    assert plans.candidates(product)[0].splits > 1
    runs, peaks = zip(*(peak_above(lambda: gemm.grad_parameters(product)) for _ in range(3)), strict=True)
    kept = runs[0][0].nbytes + MIB
    assert kept < max(peaks) <= kept + estimates.MOST_SPLIT_BYTES
    assert all(torch.equal(run[0], runs[0][0]) and torch.equal(run[2], runs[0][2]) for run in runs)
    expected = reference.grad_parameters(product)
    assert_close(runs[0][0], expected[0])
    assert_close(runs[0][2], expected[2])


def test_steps_leave_no_memory_behind(size):
    layer, x, held = layer_of(size), input_of(size), []
    for _ in range(50):
        step(layer, x)
        held.append(requested("current"))
    assert len(set(held[2:])) == 1


def needs_memory(gib):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


FAR = 2**31 // 4096 + 64
"""Rows of 4,096 entries, of which the last are more than 2**31 from the first."""


def draw(*shape, divided_by=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).div_(divided_by)


def assert_close(found, expected):
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("in_features, out_features", [(4096, 64), (64, 4096)])
def test_activations_of_more_than_2_31_entries(in_features, out_features):
    needs_memory(12)
    x, grad_output = draw(FAR, in_features), draw(FAR, out_features)
    weight, aux_weight = (draw(out_features, in_features, divided_by=in_features**0.5) for _ in range(2))
    scale, last = torch.full((1,), 0.5, device="cuda"), slice(-100, None)
    for left, transposed in ((x, True), (grad_output, False)):
        combined = CombinedWeight(weight, aux_weight, scale, transposed=transposed)
        assert_close(gemm.combined_matmul(left, combined)[last], reference.combined_matmul(left[last], combined))
    grad_output[:-100], x[:-100] = 0, 0
    product = GradParameters(grad_output, x, aux_weight, None, torch.float32, None)
    found = gemm.grad_parameters(product)
    expected = reference.grad_parameters(product._replace(grad_output=grad_output[last], x=x[last]))
    assert_close(found[0], expected[0])
    assert_close(found[2], expected[2])


def test_weights_of_more_than_2_31_entries():
    needs_memory(20)
    x, grad_output = draw(512, 4096), draw(512, FAR)
    weight, aux_weight = draw(FAR, 4096, divided_by=64), draw(FAR, 4096, divided_by=64)
    scale, last = torch.full((1,), 0.5, device="cuda"), slice(-100, None)
    combined = CombinedWeight(weight, aux_weight, scale)
    of_last = CombinedWeight(weight[last], aux_weight[last], scale)
    y = gemm.combined_matmul(x, combined._replace(transposed=True))
    assert_close(y[:, last], reference.combined_matmul(x, of_last._replace(transposed=True)))
    grad_output[:, :-100] = 0
    expected = reference.combined_matmul(grad_output[:, last].contiguous(), of_last)
    assert_close(gemm.combined_matmul(grad_output, combined), expected)
    grad_weight, _, _ = gemm.grad_parameters(GradParameters(grad_output, x, None, None, torch.bfloat16, None))
    assert_close(grad_weight[last], reference.grad_weight(grad_output[:, last].contiguous(), x))
    assert not grad_weight[:-100].any()


def test_threads_that_race_for_the_first_product():
    """Each with sizes of its own, so that they compile, choose plans and make descriptors at the same time."""
    sizes = [(512 + 64 * index, 256, 128 + 64 * index, torch.bfloat16) for index in range(8)]
    pairs = [(layer_of(size), input_of(size)) for size in sizes]
    torch.cuda.synchronize()

    def run(pair):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [step(*pair) for _ in range(5)]
            torch.cuda.current_stream().synchronize()
            return results

    with ThreadPoolExecutor(len(pairs)) as pool:
        found = list(pool.map(run, pairs))
    for pair, results in zip(pairs, found, strict=True):
        for result in results:
            assert_same(result, step(*pair))


@pytest.mark.parametrize("setting", ONCE)
def test_training_does_not_wait_for_the_device_between_lines_of_the_log(setting):
    recipe = recipe_of("image", *ONCE[setting])
    if recipe.run.ema_decay and "dtype" not in inspect.signature(ModelEmaV3).parameters:
        pytest.skip("timm before 1.0.31 has no float32 average")
    trainer, micro_batches = trainer_of(recipe, "cuda"), recipe.machine.accumulation
    batches = [[part.pin_memory() for part in batch] for batch in batches_of(recipe, 4)]
    trainer.update(batches[:micro_batches])
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first in range(micro_batches, len(batches), micro_batches):
            trainer.update(batches[first : first + micro_batches])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert math.isfinite(trainer.metrics()["loss"]) and trainer.step == 4


@pytest.fixture
def _tuned_anew():
    TUNED.clear()
    yield
    TUNED.clear()


@pytest.mark.usefixtures("_tuned_anew")
def test_warmup_times_right_kernels_and_keeps_the_times(size, monkeypatch):
    layer, x = layer_of(size), input_of(size).requires_grad_()
    tuned = warmup(layer, x)
    assert [record.problem[0] for record in tuned] == ["forward", "grad_input", "grad_parameters"]
    assert all(record.milliseconds[record.plan] > 0 for record in tuned)
    assert records.faults(torch.cuda.get_device_name(), KERNELS) == {}
    monkeypatch.setattr(tuning, "_milliseconds", None)
    assert warmup(layer, x) == tuned
    tensors, grad_output = operands(size[0], size[1], size[2], size[3], size[3], "cuda")
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def test_the_check_finds_every_kernel_right(monkeypatch, capsys):
    monkeypatch.setattr(check, "KINDS", {"autocast, bf16": KINDS["autocast, bf16"]})
    monkeypatch.setattr(check, "GPU_SHAPES", (Shape(1001, 203, 137), Shape(1024, 768, 1536)))
    assert check.run() == 0
    output = capsys.readouterr().out
    assert "kernels are correct" in output and "FAULTY" not in output
    assert records.read(records.path_of("findings", torch.cuda.get_device_name(), KERNELS))


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
def test_weights_are_quantised_to_the_same_bits_as_on_a_cpu(dtype):
    """A pathway is known by the SHA-256 of its weights as they are stored."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    on_gpu, on_cpu = (quantize(each, dtype) for each in (weight.cuda(), weight))
    for got, want in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
