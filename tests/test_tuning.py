"""Tuning ahead of training, with a driver that compiles and runs nothing, and times that the tests dictate."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from helpers import by_tma, operands
from torch import nn

from benchmarks.offline import TARGETS, compiling_for
from m2pt import FusedCrossModalLinear
from m2pt_kernels import cross_modal_linear, plans, quantize, tuning, warmup
from m2pt_kernels.plans import TUNED, UNTUNED, gemm_hopper
from m2pt_kernels.products import CombinedMatmul
from m2pt_kernels.verification import Finding

EAGER = "eager"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        aux_weight = torch.randn(1024, 512, dtype=torch.bfloat16)
        self.fused = FusedCrossModalLinear(512, 1024, aux_weight=aux_weight).bfloat16()
        self.norm = nn.BatchNorm1d(1024).bfloat16()
        self.dropout = nn.Dropout()

    def forward(self, x):
        return self.norm(self.dropout(self.fused(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def sample():
    return torch.randn(2048, 512, dtype=torch.bfloat16, requires_grad=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("M2PT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "verify", lambda *_: Finding(None, 1.0))  # the driver computes nothing
    monkeypatch.setattr(plans, "multiprocessors", lambda device: 8)  # for which the model has tiles enough
    monkeypatch.setattr(plans.worth_timing, "__defaults__", (9,))
    TUNED.clear()
    yield tmp_path / "cache"
    TUNED.clear()


@pytest.fixture
def times(monkeypatch):
    """What `_milliseconds` answers for a plan; 2 for others. Under None, the plans it was asked for."""
    dictated = {None: []}

    def milliseconds(function):
        function()
        plan = str(function.args[0])
        dictated[None].append(plan)
        return dictated.get(plan, 2.0)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return dictated


DEFAULT = [("combined_matmul_tma_kernel", 4), ("grad_parameters_tma_kernel", 3)]
if gemm_hopper is not None:
    DEFAULT = [("combined_matmul_hopper_kernel", 3), ("grad_parameters_hopper_kernel", 3)]
TUNED_TO = [("combined_matmul_tma_kernel", 5), ("grad_parameters_tma_kernel", 5)]


def kernels(model, sample):
    """The kernels of a training step, and how many stages each has."""
    with compiling_for(TARGETS["sm_90"]) as compiled:
        model(sample).float().square().sum().backward()
    return sorted((kernel.metadata.name, kernel.metadata.num_stages) for kernel in compiled)


@contextmanager
def compiling_nothing():
    """As if for Hopper, as `kernels`; Triton leaves every kernel out."""
    with compiling_for(TARGETS["sm_90"]), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = lambda **_: True
        yield


def tune(model, sample, **options):
    with compiling_nothing():
        return warmup(model, sample, **options)


@by_tma
def test_the_fastest_plan_is_used(model, sample, times):
    assert kernels(model, sample) == DEFAULT
    times["tma 256x0x128x32x4x5"] = times["tma 128x128x64x4x5"] = 1.0
    tuned = tune(model, sample)
    assert [record.problem[0] for record in tuned] == ["forward", "grad_parameters"]
    assert [record.plan for record in tuned] == ["tma 256x0x128x32x4x5", "tma 128x128x64x4x5"]
    assert not any(record.eager_wins for record in tuned)
    assert kernels(model, sample) == TUNED_TO


STORAGES = (None, "int8", "int4")


FROZEN = ("nothing", "scale", "weight", "aux_weight", "all but scale", "all but x")


@pytest.mark.parametrize("one, storage", enumerate(STORAGES))
@pytest.mark.parametrize("other, frozen", enumerate(FROZEN))
def test_what_was_timed_is_what_runs(times, monkeypatch, other, frozen, one, storage):
    """Every pair of what is frozen, how W_aux is stored, one model or two, and strided vectors or not."""
    models, strided = 1 + (one + other) % 2, (one + other // 2) % 2
    tensors, _ = operands(1024, 512, 256, *2 * [torch.bfloat16], needs_grad=(), models=models)
    if storage:
        tensors["aux_weight"], tensors["aux_weight_scale"] = quantize(tensors["aux_weight"], storage)
    trained = {"x", "weight", "aux_weight", "scale"}
    trained = {"all but scale": {"scale"}, "all but x": {"x"}}.get(frozen, trained - {frozen})
    trained -= {"aux_weight"} if storage else set()
    if strided:
        tensors["scale"] = tensors["scale"].repeat_interleave(2)[::2]
        tensors["bias"] = tensors["bias"].repeat_interleave(2)[::2]
    model = Product({name: tensor for name, tensor in tensors.items() if name != "x"}, trained)
    x = tensors["x"].requires_grad_("x" in trained)
    with compiling_nothing():
        monkeypatch.setattr(tuning, "_milliseconds", lambda function: -len(str(function.args[0])))  # not the default
        tuned = [(record.problem[0], record.plan) for record in warmup(model, x)]
        used, choose = {}, plans.choose
        monkeypatch.setattr(plans, "choose", lambda product: used.setdefault(product.name, choose(product)))
        model(x).float().square().sum().backward()
    used = [(name, str(plan)) for name, plan in used.items()]
    assert used == tuned and len(used) == 1 + ("x" in trained) + (len(trained - {"x"}) > 0)


class Product(nn.Module):
    def __init__(self, tensors, trained):
        super().__init__()
        for name, tensor in tensors.items():
            if name in trained:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x):
        return cross_modal_linear(x, **dict(self.named_parameters()), **dict(self.named_buffers()))


def test_each_gpu_and_state_of_the_kernels_has_its_own_times(model, sample, times, cache, monkeypatch):
    names = iter(("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H200"))
    for count in (1, 2, 3):
        name = next(names)
        monkeypatch.setattr(plans, "device_name", lambda device, name=name: name)
        if count == 3:
            changed = type("ChangedKernel", (), {"cache_key": "changed", "device_caches": {}})
            monkeypatch.setattr(plans, "KERNELS", (*plans.KERNELS[:3], changed))
        timed = len(times[None])
        tune(model, sample)
        assert len(times[None]) > timed and len(list(cache.iterdir())) == count
    assert {file.name.split("-triton")[0] for file in cache.iterdir()} == {"NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"}


def test_products_are_timed_on_the_device_of_their_tensors(model, sample, monkeypatch):
    inside = []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        try:
            yield
        finally:
            inside.pop()

    monkeypatch.setattr(tuning, "device_of", device_of)
    monkeypatch.setattr(tuning, "_milliseconds", lambda function: float(len(inside)))
    for record in tune(model, sample):
        assert set(record.milliseconds.values()) == {1.0}


@pytest.mark.filterwarnings("error")
def test_several_gpus_are_no_reason_to_warn(model, sample, times, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    assert tune(model, sample)


@by_tma
def test_other_sizes_keep_the_default(model, sample, times):
    times["tma 256x0x128x32x4x5"] = times["tma 128x128x64x4x5"] = 1.0
    tune(model, sample)
    assert kernels(model, torch.cat([sample, sample])) == DEFAULT


def test_tensors_that_tma_cannot_address_keep_the_default(model, sample, times):
    odd = torch.randn(sample.numel() + 1, dtype=sample.dtype)[1:].view(sample.shape)
    assert odd.data_ptr() % 16
    untuned = kernels(model, odd)
    times["tma 256x0x128x32x4x5"] = times["tma 128x128x64x4x5"] = 1.0
    tune(model, sample)
    assert kernels(model, odd) == untuned


def test_another_gpu_keeps_the_default(model, sample, times):
    tune(model, sample)
    with compiling_for(TARGETS["sm_80"]) as compiled:
        model(sample)
    assert [kernel.name for kernel in compiled] == ["combined_matmul_kernel"]


def test_nothing_is_tuned_unasked(model, sample, times):
    kernels(model, sample)
    assert times[None] == [] and TUNED == {}


@by_tma
def test_times_are_kept_on_disk(model, sample, times, cache):
    first = tune(model, sample)
    count = len(times[None])
    assert count == sum(len(record.milliseconds) for record in first) > 4
    TUNED.clear()
    assert tune(model, sample) == first
    assert len(times[None]) == count
    (file,) = cache.iterdir()
    file.write_text(json.dumps({key: {} for key in json.loads(file.read_text())}))
    tune(model, sample)
    assert len(times[None]) == 2 * count


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": {"b": "c"}}'])
def test_a_damaged_cache_is_timed_again(model, sample, times, cache, content):
    tune(model, sample)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(content)
    tune(model, sample)
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_is_a_warning(model, sample, times, cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="M2PT_CACHE_DIR"):
        assert tune(model, sample)
    assert cache.read_text() == "a file where the folder should be"


def test_plain_torch_is_used_only_if_asked(model, sample, times, capsys):
    times[EAGER] = 1.0
    assert all(record.eager_wins and record.plan != EAGER for record in tune(model, sample))
    assert "2 of 2 products" in capsys.readouterr().err
    assert len(kernels(model, sample)) == 2
    assert {record.plan for record in tune(model, sample, use_eager=True)} == {EAGER}
    assert kernels(model, sample) == []


def test_a_plan_that_does_not_fit_the_device_is_not_chosen(model, sample, times, monkeypatch):
    def out_of_shared_memory(function):
        if not str(function.args[0]).startswith("pointers"):
            raise triton.OutOfResources(300_000, 227_000, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "_milliseconds", out_of_shared_memory)
    assert all(record.plan.startswith("pointers") for record in tune(model, sample))


def test_a_candidate_that_fails_is_left_out_with_a_warning_and_tried_again_next_time(
    model, sample, times, cache, monkeypatch
):
    first = tune(model, sample)[0].plan
    milliseconds, failing = tuning._milliseconds, [first]

    def fail(function):
        if str(function.args[0]) in failing:
            raise RuntimeError("an illegal memory access was encountered")
        return milliseconds(function)

    monkeypatch.setattr(tuning, "_milliseconds", fail)
    (file,) = cache.iterdir()
    file.unlink()
    with pytest.warns(UserWarning, match=f"^warmup: forward by {first} failed .* RuntimeError: an illegal memory"):
        record = tune(model, sample)[0]
    assert record.plan != first and first not in record.milliseconds
    failing.clear()
    assert tune(model, sample)[0].plan == first


def test_a_candidate_whose_result_is_wrong_is_never_used_again(model, sample, times, cache, monkeypatch):
    first = tune(model, sample)[0].plan
    for file in cache.iterdir():
        file.unlink()

    def verify(plan, product):
        return Finding("error of the output 0.3" if product.name == "forward" and str(plan) == first else None, 1.0)

    monkeypatch.setattr(tuning, "verify", verify)
    times[first] = 0.5
    with pytest.warns(UserWarning, match=f"^warmup: forward by {first} of .* is wrong .*: error of the output 0.3"):
        record = tune(model, sample)[0]
    assert record.plan != first and first not in record.milliseconds
    monkeypatch.setattr(tuning, "verify", None)
    with pytest.warns(UserWarning, match=f"^forward by {first} of .* was found faulty .*: the next plan is"):
        assert tune(model, sample)[0] == record
    monkeypatch.setattr(tuning, "verify", verify)
    larger = tune(model, torch.cat([sample, sample]))[0]
    assert first not in larger.milliseconds


def test_a_kernel_found_wrong_at_one_product_is_given_up_at_all(sample, times, monkeypatch):
    model = FusedCrossModalLinear(512, 1024, aux_weight=torch.randn(1024, 512)).bfloat16().requires_grad_(False)
    plan = tune(model, sample)[0].plan
    times[plan] = 1.0
    larger = torch.cat([sample, sample])

    def verify(tried, product):
        return Finding("wrong" if str(tried) == plan and len(product.left) > 1024 else None, 1.0)

    monkeypatch.setattr(tuning, "verify", verify)
    with pytest.warns(UserWarning, match="is wrong and is not used any more"):
        (record,) = tune(model, larger)
    assert record.plan != plan and plan not in map(str, TUNED.values())
    assert plan not in {str(used) for used in plans_used(model, sample)}


def plans_used(model, sample):
    """Those of a forward pass."""
    with pytest.warns(UserWarning, match="was found faulty"), compiling_for(TARGETS["sm_90"]):
        model(sample)
    return {**UNTUNED, **TUNED}.values()


class OfTwoSizes(nn.Module):
    def __init__(self):
        super().__init__()
        aux_weight = torch.randn(1024, 512, dtype=torch.bfloat16)
        self.fused = FusedCrossModalLinear(512, 1024, aux_weight=aux_weight).bfloat16().requires_grad_(False)

    def forward(self, x):
        return self.fused(x), self.fused(torch.cat([x, x]))


def test_a_kernel_found_wrong_at_the_last_product_is_not_chosen_for_the_first(sample, times, monkeypatch):
    model = OfTwoSizes()
    plan = tune(model, sample)[0].plan
    times[plan] = 1.0
    for name in (TUNED, UNTUNED):
        name.clear()
    monkeypatch.setattr(
        tuning,
        "verify",
        lambda tried, product: Finding("wrong" if len(product.left) > 1024 and str(tried) == plan else None),
    )
    monkeypatch.setenv("M2PT_CACHE_DIR", str(Path(os.environ["M2PT_CACHE_DIR"]) / "another"))
    with pytest.warns(UserWarning, match="is wrong and is not used any more"):
        first, last = tune(model, sample)
    assert plan not in (first.plan, last.plan, *first.milliseconds)


def test_products_are_verified_and_timed_outside_autocast(sample, monkeypatch):
    enabled = []
    model = nn.Sequential(FusedCrossModalLinear(512, 1024, aux_weight=torch.randn(1024, 512)))
    monkeypatch.setattr(tuning, "verify", lambda *_: enabled.append(torch.is_autocast_enabled("cpu")) or Finding(None))
    monkeypatch.setattr(tuning, "_milliseconds", lambda _: enabled.append(torch.is_autocast_enabled("cpu")) or 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert tune(model, sample.float())
    assert enabled and not any(enabled)


def test_every_candidate_but_plain_torch_is_verified_before_it_is_timed(model, sample, times, monkeypatch):
    verified = []
    monkeypatch.setattr(tuning, "verify", lambda plan, *_: verified.append(str(plan)) or Finding(None, 1.0))
    tune(model, sample)
    assert verified == [plan for plan in times[None] if plan != EAGER]


def test_a_product_for_which_no_kernel_has_the_resources_is_left_to_plain_torch(model, sample, monkeypatch):
    def out_of_shared_memory(function):
        if str(function.args[0]) != EAGER:
            raise triton.OutOfResources(300_000, 227_000, "shared memory")
        return 1.0

    monkeypatch.setattr(tuning, "_milliseconds", out_of_shared_memory)
    assert [record.plan for record in tune(model, sample)] == [EAGER, EAGER]


def test_a_failure_that_leaves_the_device_unusable_is_raised(monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "_milliseconds", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
        tuning._time((), CombinedMatmul(x, (), None), {EAGER: plans.EAGER})


def test_a_product_that_no_kernel_computes_is_left_to_plain_torch(model, sample, monkeypatch):
    def fail(function):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "_milliseconds", fail)
    with pytest.warns(UserWarning, match="^warmup: "):
        tuned = tune(model, sample)
    assert [record.plan for record in tuned] == [EAGER, EAGER] and tuned[0].milliseconds == {}


def test_nothing_is_recorded_after_a_warmup(model, sample, times):
    tune(model, sample)
    assert plans._recorded is None
    with pytest.raises(ValueError, match="x: expected shape"):
        tune(model, sample[:, :5])
    assert plans._recorded is None


def test_an_interrupt_leaves_no_plan(model, sample, monkeypatch):
    def interrupt(function):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_milliseconds", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune(model, sample)
    assert TUNED == {}


def test_the_model_is_left_as_it_was(model, sample, times):
    model.fused.weight.grad = gradient = torch.ones_like(model.fused.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    tune(model, sample)
    assert model.fused.weight.grad is gradient and torch.equal(gradient, torch.ones_like(gradient))
    assert sample.grad is None and model.fused.bias.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("products", [["forward"], ["forward", "grad_input"]], ids="+".join)
def test_a_frozen_model_is_tuned_for_what_it_computes(model, sample, times, products):
    model.requires_grad_(False)
    tuned = tune(model, sample.requires_grad_("grad_input" in products))
    assert [record.problem[0] for record in tuned] == products


def test_a_model_without_products_to_tune_is_refused(model, sample):
    with pytest.raises(ValueError, match=r"^model: .* Linear"):
        tune(nn.Linear(512, 4).bfloat16(), sample)
    with pytest.raises(ValueError, match=r"^model: .* Model"):
        warmup(model, sample)
