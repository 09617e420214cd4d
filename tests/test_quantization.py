"""Quantised auxiliary weights: what is stored, what a model computes with it, and what is refused."""

import copy
import io

import pytest
import timm
import torch
from helpers import scaled, vits
from torch import nn

from m2pt import (
    FusedCrossModalLinear,
    merge_pathways,
    quantization_errors,
    quantize_aux,
    reparameterize_aux_into_target_model,
    step_in_backward,
)
from m2pt.checkpoints import load_state_dict, merge_state_dict, save_state_dict
from m2pt.saved_bytes import published_formulation
from m2pt_kernels import dequantize, quantize

STORAGES = ("int8", "int4", "float8_e4m3fn")
EVERY_STORAGE = (*STORAGES, "bfloat16")
IN, OUT = 128, 6


def nearest_entries(weight, storage):
    """What `quantize` and `dequantize` are to return, entry by entry in Python and float64."""
    largest, group = {"int8": (127, IN), "int4": (7, 64), "float8_e4m3fn": (448, IN)}[storage]
    entries = torch.arange(-largest, largest + 1.0).tolist()
    if storage == "float8_e4m3fn":
        bytes_ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        entries = bytes_[bytes_.isfinite()].tolist()
    rows = []
    for row in weight.double().tolist():
        rows.append([])
        for start in range(0, len(row), group):
            values = row[start : start + group]
            scale = max(map(abs, values)) / largest or 1.0
            rows[-1] += [scale * min(entries, key=lambda entry: abs(entry - value / scale)) for value in values]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("storage", STORAGES)
def test_entries_are_the_nearest(storage):
    weight = torch.randn(OUT, IN)
    weight[1] *= 1e-4
    weight[2] = 0
    weight[3, 5] = 40
    data, scale = quantize(weight, storage)
    torch.testing.assert_close(dequantize(data, scale).double(), nearest_entries(weight, storage), rtol=1e-6, atol=0)
    groups = IN // 64 if storage == "int4" else 1
    assert data.shape == (OUT, IN // 2 if storage == "int4" else IN) and data.itemsize == 1
    assert scale.shape == (OUT, groups) and scale.dtype == torch.float32


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_blocks_of_rows_and_other_dtypes(storage, dtype):
    weight = torch.randn(OUT, IN).to(dtype)
    data, scale = quantize(weight, storage)
    assert torch.equal(dequantize(data, scale), dequantize(*quantize(weight.float(), storage)))
    assert torch.equal(dequantize(data[2:5], scale[2:5]), dequantize(data, scale)[2:5])
    assert quantize(weight.to("meta"), storage)[0].shape == data.shape


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [1e300, -1e39, float("inf"), float("nan")])
def test_what_is_not_finite_in_float32_is_refused(storage, value):
    weight = torch.ones(OUT, IN, dtype=torch.float64)
    weight[2, 3] = value
    with pytest.raises(ValueError, match=r"^weight: .*NaN.*float32"):
        quantize(weight, storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_largest_float32_comes_back_finite_or_is_refused(storage):
    largest = torch.finfo(torch.float32).max
    weight = torch.full((1, 64), largest)
    if storage == "int8":  # 127 times the rounded scale is beyond float32
        with pytest.raises(ValueError, match=r"^weight: "):
            quantize(weight, storage)
        weight *= 1 - 2**-20
    torch.testing.assert_close(dequantize(*quantize(weight, storage)), weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [1e-300, 5e-324])
def test_what_float32_rounds_to_zero_is_zero(storage, value):
    data, scale = quantize(torch.full((OUT, IN), value, dtype=torch.float64), storage)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(dequantize(data, scale), torch.zeros(OUT, IN))


def test_float8_is_refused_on_older_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9"):
        quantize(Elsewhere(torch.ones(2, 64)), "float8_e4m3fn")


class Elsewhere(torch.Tensor):
    device = torch.device("cuda", 0)


def layer(storage=None, dtype=torch.float32, scale=0.5):
    torch.manual_seed(0)
    origin, aux = nn.Linear(IN, OUT, dtype=dtype), nn.Linear(IN, OUT, dtype=dtype)
    fused = FusedCrossModalLinear(IN, OUT, origin_layer=origin, aux_weight=aux.weight)
    nn.init.constant_(fused.cross_modal_scale, scale)
    if storage:
        fused.quantize_aux(storage)
    return fused


def with_stored_value(fused):
    """The same layer with its auxiliary weight as float32 numbers."""
    twin = layer()
    twin.load_state_dict(
        {name: value for name, value in fused.state_dict().items() if not name.startswith("aux")}, strict=False
    )
    stored = (
        fused.aux_weight if fused.aux_weight_scale is None else dequantize(fused.aux_weight, fused.aux_weight_scale)
    )
    twin.aux_weight.data = stored.float()
    return twin


@pytest.mark.parametrize("storage", EVERY_STORAGE)
def test_output_gradients_and_merge_are_those_of_the_stored_value(storage):
    fused, x = layer(storage), torch.randn(3, 5, IN)
    twin = with_stored_value(fused)
    assert torch.equal(fused(x), twin(x))
    for each in (fused, twin):
        each(x).square().sum().backward()
    torch.testing.assert_close(fused.weight.grad, twin.weight.grad, rtol=0, atol=0)
    torch.testing.assert_close(fused.cross_modal_scale.grad, twin.cross_modal_scale.grad)
    assert torch.equal(fused.merge()(x), fused(x))


@pytest.mark.parametrize("storage", STORAGES)
def test_names_bytes_and_the_auxiliary_model(storage):
    aux = nn.Linear(IN, OUT)
    before = aux.weight.clone()
    fused = FusedCrossModalLinear(IN, OUT, aux_weight=aux.weight)
    fused.quantize_aux(storage)
    assert set(fused.state_dict()) == {"weight", "bias", "cross_modal_scale", "aux_weight", "aux_weight_scale"}
    assert "aux_weight" not in dict(fused.named_parameters())
    assert torch.equal(aux.weight, before)
    stored = sum(fused.get_buffer(name).nbytes for name in ("aux_weight", "aux_weight_scale"))
    assert stored == {"int8": OUT * (IN + 4), "float8_e4m3fn": OUT * (IN + 4), "int4": OUT * IN * 0.5625}[storage]


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("meta")])
@pytest.mark.parametrize("storage", STORAGES)
def test_conversions_leave_what_is_stored_as_it_is(storage, convert):
    fused = layer(storage)
    data, scale = fused.aux_weight, fused.aux_weight_scale
    converted = convert(fused)
    assert (converted.aux_weight.dtype, converted.aux_weight_scale.dtype) == (data.dtype, torch.float32)
    assert converted.aux_weight.device == converted.aux_weight_scale.device == converted.weight.device
    if not converted.weight.is_meta:
        assert converted.weight.dtype != torch.float32
        assert torch.equal(dequantize(converted.aux_weight, converted.aux_weight_scale), dequantize(data, scale))
    assert converted(torch.zeros(2, IN).to(converted.weight)).dtype == converted.weight.dtype


def through_a_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=isinstance(content, dict))


def reloaded(fused, storage):
    twin = layer(storage, scale=0.0)
    nn.init.zeros_(twin.aux_weight_scale)
    twin.load_state_dict(through_a_file(fused.state_dict()), strict=True)
    return twin


@pytest.mark.parametrize("duplicate", [reloaded, lambda m, _: copy.deepcopy(m), lambda m, _: through_a_file(m)])
@pytest.mark.parametrize("storage", STORAGES)
def test_duplicates_compute_the_same(storage, duplicate):
    fused, x = layer(storage), torch.randn(3, IN)
    assert torch.equal(duplicate(fused, storage)(x), fused(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("there", [None, *STORAGES])
@pytest.mark.parametrize("here", [None, *STORAGES])
def test_loading_another_storage_is_refused(here, there, assign):
    fused, saved = layer(here), layer(there).state_dict()
    if here == there:
        fused.load_state_dict(saved, assign=assign)
        return
    before = fused.aux_weight.clone()
    with pytest.raises(RuntimeError, match=r"aux_weight: it is stored as torch\..* here and as torch\..*quantize_aux"):
        fused.load_state_dict(saved, assign=assign)
    assert torch.equal(fused.aux_weight.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("storage", EVERY_STORAGE)
def test_surgery_and_quantize_aux_do_the_same_and_merge_to_the_same_logits(storage, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    one = scaled(reparameterize_aux_into_target_model(*vits(), aux_dtype=storage))
    other = scaled(quantize_aux(reparameterize_aux_into_target_model(*vits()), storage))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    logits = one(images)
    save_state_dict(one.state_dict(), tmp_path / "trained.safetensors")
    from_file, _ = vits()
    from_file.load_state_dict(merge_state_dict(load_state_dict(tmp_path / "trained.safetensors")), strict=True)
    assert torch.equal(merge_pathways(one)(images), logits)
    assert torch.equal(from_file(images), logits)


def test_checkpoints_with_scales_of_a_weight_that_is_not_quantised_are_refused():
    saved = reparameterize_aux_into_target_model(*vits(), aux_dtype="int8").state_dict()
    saved["blocks.1.mlp.fc1.aux_weight"] = saved["blocks.1.mlp.fc1.weight"]
    with pytest.raises(ValueError, match=r"^blocks.1.mlp.fc1: aux_weight_scale: .*torch.float32"):
        merge_state_dict(saved)
    del saved["blocks.0.attn.qkv.aux_weight_scale"]
    with pytest.raises(ValueError, match=r"^blocks.0.attn.qkv: aux_weight: .*torch.int8"):
        merge_state_dict(saved)


@pytest.mark.parametrize("storage", EVERY_STORAGE)
def test_errors_are_those_of_quantising(storage):
    images = torch.randn(2, 3, 32, 32)
    model = scaled(reparameterize_aux_into_target_model(*vits()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(images)
    errors = quantization_errors(model, storage, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    change = (quantize_aux(model, storage)(images) - logits).norm() / logits.norm()
    assert errors.output == pytest.approx(change.item(), rel=1e-3)
    largest = {"bfloat16": 0.003, "int8": 0.01, "float8_e4m3fn": 0.04, "int4": 0.15}[storage]
    assert len(errors.aux_weights) == 8
    assert all(largest / 10 < error < largest for error in errors.aux_weights.values())
    assert 0 < errors.output < largest


def test_errors_without_inputs_and_of_nothing():
    model = reparameterize_aux_into_target_model(*vits())
    for fused in model.modules():
        if isinstance(fused, FusedCrossModalLinear):
            nn.init.zeros_(fused.aux_weight)
    assert quantization_errors(model, "int4") == (
        dict.fromkeys(quantization_errors(model, "int8").aux_weights, 0.0),
        None,
    )


@pytest.mark.parametrize(
    "prepare, storage, message",
    [
        ({"is_aux_trainable": True}, "int8", "blocks.0.attn.qkv: aux_weight: .*trainable"),
        ({"is_aux_trainable": True}, "bfloat16", "blocks.0.attn.qkv: aux_weight: .*trainable"),
        ({"aux_dtype": "int8"}, "int4", "blocks.0.attn.qkv: aux_weight: .*int8 already"),
        ({}, "int3", "blocks.0.attn.qkv: dtype: .*'int3'"),
        ({"layer_names": ["mlp.fc2"]}, "int4", "blocks.1.mlp.fc2: weight: .*NaN"),
        ({"layer_names": ["mlp.fc2"]}, "bfloat16", "blocks.1.mlp.fc2: aux_weight: .*NaN"),
    ],
)
def test_what_cannot_be_quantised_is_refused_and_nothing_has_changed(prepare, storage, message):
    target, aux = vits()
    nn.init.constant_(aux.blocks[1].mlp.fc2.weight, float("nan"))
    layer_names = prepare.get("layer_names", ["attn.qkv", "attn.proj"])
    model = reparameterize_aux_into_target_model(target, aux, **({"layer_names": layer_names} | prepare))
    before = {name: value.dtype for name, value in model.state_dict().items()}
    for refuse in (quantize_aux, quantization_errors):
        with pytest.raises(ValueError, match=rf"^{message}"):
            refuse(model, storage)
    assert {name: value.dtype for name, value in model.state_dict().items()} == before


def test_what_bfloat16_rounds_to_infinity_is_refused():
    fused = layer()
    nn.init.constant_(fused.aux_weight[:1], torch.finfo(torch.float32).max)
    before = fused.aux_weight
    with pytest.raises(ValueError, match=r"^aux_weight: .*bfloat16"):
        fused.quantize_aux("bfloat16")
    assert fused.aux_weight is before
    fused.to("meta").quantize_aux("bfloat16")
    assert fused.aux_weight.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"is_aux_trainable": True}, {"aux_dtype": "int3"}])
def test_surgery_refuses_and_leaves_the_target_as_it_was(options):
    target, aux = vits()
    with pytest.raises(ValueError, match=r"^aux_model: blocks.0.attn.qkv: "):
        reparameterize_aux_into_target_model(target, aux, **({"aux_dtype": "int8"} | options))
    assert not any(isinstance(module, FusedCrossModalLinear) for module in target.modules())


def test_bytes_per_weight_of_a_vit_b():
    target, aux = (timm.create_model("vit_base_patch16_224", weight_init="skip") for _ in range(2))
    model = reparameterize_aux_into_target_model(target, aux)
    layers = [module for module in model.modules() if isinstance(module, FusedCrossModalLinear)]
    for storage, expected in (("bfloat16", 2), ("int8", 1.0039), ("float8_e4m3fn", 1.0039), ("int4", 0.5625)):
        stored = sum(t.nbytes for layer in layers for t in layer.quantized_aux(storage) if t is not None)
        assert stored / sum(layer.weight.numel() for layer in layers) == pytest.approx(expected, abs=1e-4)


def train(model, images, update):
    for _ in range(3):
        model(images).square().mean().backward()
        update()


def test_steps_inside_backward_train_the_same_model():
    images = torch.randn(2, 3, 32, 32)
    model = reparameterize_aux_into_target_model(*vits(), aux_dtype="int8")
    other = copy.deepcopy(model)
    step_in_backward(torch.optim.AdamW(model.parameters(), fused=True))
    train(model, images, lambda: None)
    optimizer = torch.optim.AdamW(other.parameters(), fused=True)
    train(other, images, lambda: (optimizer.step(), optimizer.zero_grad()))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_the_published_formulation_does_not_know_quantised_weights():
    model = reparameterize_aux_into_target_model(*vits(), aux_dtype="int8")
    with pytest.raises(ValueError, match="quantised"), published_formulation(model):
        pass
