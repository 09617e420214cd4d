"""What other libraries do to a connected model: the pathway stays, or the tool is refused by name."""
# ruff: noqa: E402

import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

for library in ("accelerate", "bitsandbytes", "peft", "torchao", "transformers"):
    pytest.importorskip(library)

import bitsandbytes.utils
import peft
from accelerate.utils import transformer_engine
from accelerate.utils.bnb import replace_with_bnb_layers
from helpers import connected, fused_layers, images, unchanged, vit
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import BitsAndBytesConfig
from transformers.integrations.bitnet import replace_with_bitnet_linear
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from m2pt import (
    FusedCrossModalLinear,
    disconnect_pathways,
    merge_pathways,
    quantize_aux,
    reparameterize_aux_into_target_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate", "ignore:Already unmerged")

LAYER = "blocks.0.attn.qkv"
LOST = r"^qkv of Attention: {} would replace a FusedCrossModalLinear and lose its pathway: leave it out of the"


def is_linear(module, name=""):
    return isinstance(module, nn.Linear)


def is_not_fused(module, name=""):
    return is_linear(module) and not isinstance(module, FusedCrossModalLinear)


def left_out(model, is_chosen):
    """The names of linear layers that are not chosen, which some libraries ask for."""
    return [name for name, module in model.named_modules() if is_linear(module) and not is_chosen(module)]


def float8(model, is_chosen):
    convert_to_float8_training(model, module_filter_fn=is_chosen, config=Float8LinearConfig(emulate=True))


def quantization_aware(model, is_chosen):
    weight_config = IntxFakeQuantizeConfig(torch.int4, group_size=16)
    quantize_(model, QATConfig(weight_config=weight_config, step="prepare"), is_chosen)


def int8(model, is_chosen):
    quantize_(model, Int8WeightOnlyConfig(), is_chosen)


def accelerate_8bit(model, is_chosen):
    settings = SimpleNamespace(load_in_8bit=True, load_in_4bit=False, llm_int8_threshold=6.0)
    replace_with_bnb_layers(model, settings, left_out(model, is_chosen))


def accelerate_4bit(model, is_chosen):
    settings = SimpleNamespace(
        load_in_8bit=False,
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
        bnb_4bit_quant_type="nf4",
    )
    replace_with_bnb_layers(model, settings, left_out(model, is_chosen))


def bitnet(model, is_chosen):
    settings = SimpleNamespace(
        linear_class="autobitlinear", quantization_mode="online", use_rms_norm=False, rms_norm_eps=1e-6
    )
    replace_with_bitnet_linear(model, left_out(model, is_chosen), settings)


WEIGHT = r"^weight of a FusedCrossModalLinear: expected a plain tensor, got a torchao.quantization.Int8Tensor: "
CONVERSIONS = {
    "torchao float8 training": (float8, LOST.format("Float8Linear")),
    "torchao QAT": (quantization_aware, LOST.format("FakeQuantizedLinear")),
    "torchao int8": (int8, WEIGHT),
    "accelerate 8 bit": (accelerate_8bit, LOST.format("Linear8bitLt")),
    "accelerate 4 bit": (accelerate_4bit, LOST.format("Linear4bit")),
    "transformers BitNet": (bitnet, LOST.format("AutoBitLinear")),
}
every_conversion = pytest.mark.parametrize("convert,message", CONVERSIONS.values(), ids=CONVERSIONS)


@every_conversion
def test_converting_a_fused_layer_is_refused(convert, message):
    model = connected(depth=1)
    with unchanged(model), pytest.raises((TypeError, ValueError), match=message):
        convert(model, is_linear)


@every_conversion
def test_a_conversion_that_leaves_fused_layers_out_keeps_the_pathway(convert, message):
    model = connected(depth=1).eval()
    head, weight, before = model.head, model.head.weight, model.forward_features(images())
    convert(model, is_not_fused)
    assert model.head is not head or model.head.weight is not weight
    assert len(fused_layers(model)) == 4 and torch.equal(model.forward_features(images()), before)


@every_conversion
@pytest.mark.parametrize("prepare", [merge_pathways, disconnect_pathways])
def test_what_merging_and_disconnecting_leave_is_converted(prepare, convert, message):
    model = prepare(connected(depth=1))
    layer, weight = model.get_submodule(LAYER), model.get_submodule(LAYER).weight
    convert(model, is_linear)
    assert model.get_submodule(LAYER) is not layer or layer.weight is not weight


CONVERTED = "is a {}, expected a plain nn.Linear$"
CONVERTED_FIRST = {
    "torchao float8 training": (float8, CONVERTED.format("torchao.float8.float8_linear.Float8Linear")),
    "torchao QAT": (quantization_aware, CONVERTED.format("torchao.quantization.qat.linear.FakeQuantizedLinear")),
    "torchao int8": (
        int8,
        r"weight: expected a plain tensor, got a torchao.quantization.Int8Tensor: connect",
    ),
    "accelerate 8 bit": (accelerate_8bit, CONVERTED.format("bitsandbytes.nn.modules.Linear8bitLt")),
}


@pytest.mark.parametrize("side", ["target_model", "aux_model"])
@pytest.mark.parametrize("convert,message", CONVERTED_FIRST.values(), ids=CONVERTED_FIRST)
def test_surgery_refuses_converted_models(convert, message, side):
    models = {"target_model": vit(0, depth=1), "aux_model": vit(1, depth=1)}
    convert(models[side], is_linear)
    before = [(each, id(each), *map(id, each.parameters())) for model in models.values() for each in model.modules()]
    with pytest.raises((TypeError, ValueError), match=rf"^{side}: {LAYER}.?{message}"):
        reparameterize_aux_into_target_model(**models)
    after = [(each, id(each), *map(id, each.parameters())) for model in models.values() for each in model.modules()]
    assert after == before


@pytest.fixture
def engine(monkeypatch):
    """The part of transformer_engine that accelerate looks at, where it is not installed."""

    class Linear(nn.Module):
        def __init__(self, in_features, out_features, bias, params_dtype):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
            self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype))

    module = ModuleType("transformer_engine.pytorch")
    module.Linear, module.LayerNorm = Linear, nn.LayerNorm
    package = ModuleType("transformer_engine")
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setattr(transformer_engine, "is_transformer_engine_available", lambda: True)
    monkeypatch.setattr(transformer_engine, "GatheredParameters", lambda *_, **__: nullcontext())
    return Linear


def test_transformer_engine_is_refused_too(engine):
    model = connected(depth=1)
    with torch.no_grad(), unchanged(model), pytest.raises(ValueError, match=LOST.format("Linear")):
        transformer_engine.convert_model(model, _convert_ln=False)
    merge_pathways(model)
    with torch.no_grad():
        transformer_engine.convert_model(model, _convert_ln=False)
    assert type(model.get_submodule(LAYER)) is engine


class Rounded(nn.Linear):
    def forward(self, input):
        return super().forward(input).round()


def warnings_of(model):
    """Of a forward pass in training mode."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()(images())
    return [str(each.message) for each in caught]


def test_layers_replaced_by_bitsandbytes_are_named_in_the_first_training_pass():
    """It writes to `_modules`, which torch does not see."""
    model = connected(depth=1)
    names = ", ".join(fused_layers(model))
    bitsandbytes.utils.replace_linear(model, Rounded, ("head",), copy_weights=True)
    assert type(model.get_submodule(LAYER)) is Rounded
    (message,) = warnings_of(model)
    assert message.startswith(f"{names}: replaced since they were connected: their pathways are lost")
    assert warnings_of(model) == []


def transformers_8bit(model):
    return replace_with_bnb_linear(model, ["head"], BitsAndBytesConfig(load_in_8bit=True))


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("convert", [transformers_8bit, dynamic])
def test_what_converts_the_exact_class_only_keeps_the_pathway(convert):
    model = connected(depth=1).eval()
    before = model.forward_features(images())
    converted = convert(model)
    assert len(fused_layers(converted)) == 4 and torch.equal(converted.forward_features(images()), before)


class Method(NamedTuple):
    """One of peft's, with the part of the message by which merging it over a pathway, or surgery inside, is refused."""

    config: type
    settings: Mapping = MappingProxyType({})
    unload: str = ""
    surgery: str = ""


MULTIPLIED = "had its weight multiplied by .*, and was unmerged again: merge_pathways.model. first"
KEPT = MULTIPLIED.replace("merge_pathways.model. first", "keep the adapter")
READ = rf"{LAYER}.base_layer is not called by its \w+, which reads its weight: leave it out"
STACKED = {
    "LoRA": Method(peft.LoraConfig, {"r": 2}),
    "DoRA": Method(peft.LoraConfig, {"r": 2, "use_dora": True}, KEPT, READ),
    "PiSSA": Method(peft.LoraConfig, {"r": 2, "init_lora_weights": "pissa"}),
    "IA3": Method(peft.IA3Config, {"feedforward_modules": ["mlp.fc2"]}, MULTIPLIED),
    "LoHa": Method(peft.LoHaConfig, {"r": 2}),
    "VeRA": Method(peft.VeraConfig, {"r": 2}),
    "OFT": Method(peft.OFTConfig, {"oft_block_size": 8, "r": 0}, MULTIPLIED),
    "BOFT": Method(peft.BOFTConfig, {"boft_block_size": 8}, MULTIPLIED),
    "RandLoRA": Method(peft.RandLoraConfig, {"r": 2}, surgery="is a peft.tuners.randlora.layer.Linear, expected"),
}
MERGED = STACKED | {
    "RoAd": Method(peft.RoadConfig, {"group_size": 16}, MULTIPLIED),
    "DEFT": Method(peft.DeftConfig, {"r": 2}, MULTIPLIED),
    "HiRA": Method(peft.HiraConfig, {"r": 2}, surgery=READ),
    "PEANuT": Method(peft.PeanutConfig, surgery=READ),
}
BYPASSING = {
    "HRA": Method(peft.HRAConfig, {"r": 2}),
    "SHiRA": Method(peft.ShiraConfig, {"r": 2}),
    "MiSS bat": Method(peft.MissConfig, {"r": 8, "init_weights": "bat"}),
    "SuperTuning": Method(peft.SupertuningConfig),
    "FRoD": Method(peft.FrodConfig),
}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """BOFT would look for one, and compile."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)


def wrapped(model, method, is_trained=False):
    """The model with an adapter beside each layer of attention and MLP, as fresh or somewhere else."""
    torch.manual_seed(0)
    layers = r".*blocks\.\d+\.(attn|mlp)\.(qkv|proj|fc1|fc2)"
    model = peft.get_peft_model(model, method.config(target_modules=layers, **method.settings)).eval()
    for parameter in model.parameters() if is_trained else ():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", STACKED.values(), ids=STACKED)
def test_adapters_stack_on_a_pathway(method):
    plain, model = connected(depth=1).eval(), wrapped(connected(depth=1), method)
    close(model(images()), plain(images()))
    for each in (plain, model):
        for layer in fused_layers(each).values():
            layer.cross_modal_scale.requires_grad_(True).data *= 2
        each(images()).square().mean().backward()
    close(model(images()), plain(images()))
    scales = [[layer.cross_modal_scale for layer in fused_layers(each).values()] for each in (plain, model)]
    close([scale.grad for scale in scales[1]], [scale.grad for scale in scales[0]])
    assert len(scales[1]) == 4


@pytest.mark.parametrize("is_unfrozen", [False, True])
@pytest.mark.parametrize("method", STACKED.values(), ids=STACKED)
def test_scales_that_an_adapter_freezes_at_zero_are_named(method, is_unfrozen):
    model = wrapped(reparameterize_aux_into_target_model(vit(0, depth=1), vit(1, depth=1)), method)
    for layer in fused_layers(model).values() if is_unfrozen else ():
        layer.cross_modal_scale.requires_grad_(True)
    names = ", ".join(name.removeprefix("base_model.model.") for name in fused_layers(model))
    remedy = "cross_modal_scale is zero and frozen: set requires_grad on every cross_modal_scale before making"
    assert warnings_of(model) == [f"{names}: {remedy} the optimizer"] * (not is_unfrozen)


@pytest.mark.parametrize("method", MERGED.values(), ids=MERGED)
def test_merging_an_adapter_keeps_the_output_or_is_refused(method):
    model = wrapped(connected(depth=1), method, is_trained=True)
    before = model(images())
    assert (before - connected(depth=1).eval()(images())).abs().max() > 0.005
    if not method.unload:
        model = model.merge_and_unload().eval()
        close(model(images()), before)
        assert len(fused_layers(model)) == 4
        return
    with pytest.raises(ValueError, match=rf"^qkv of Attention: FusedCrossModalLinear {method.unload}"):
        model.merge_and_unload()
    close(model(images()), before)


@pytest.mark.parametrize("name", [name for name, method in MERGED.items() if method.unload == MULTIPLIED])
def test_after_the_pathways_a_multiplying_adapter_is_merged_exactly(name):
    model = wrapped(connected(depth=1), MERGED[name], is_trained=True)
    before = model(images())
    model.merge_adapter()
    message = rf"^base_model.model.{LAYER}.base_layer: peft.tuners.* has multiplied its weight.*: unmerge_adapter.. fi"
    with pytest.raises(ValueError, match=message):
        merge_pathways(model)
    model.unmerge_adapter()
    close(merge_pathways(model)(images()), before)
    merged = model.merge_and_unload().eval()
    close(merged(images()), before)
    assert type(merged.get_submodule(LAYER)) is nn.Linear


@pytest.mark.parametrize("name", ["DoRA", "HiRA", "PEANuT"])
def test_pathways_are_not_merged_where_an_adapter_reads_the_weight(name):
    model = wrapped(connected(depth=1), MERGED[name])
    message = rf"^base_model.model.{LAYER}.base_layer: peft.tuners.* reads its weight, .*: merge before wrapping"
    with unchanged(model), pytest.raises(ValueError, match=message):
        merge_pathways(model)
    before = wrapped(merge_pathways(connected(depth=1)), MERGED[name], is_trained=True)
    output = before(images())
    close(before.merge_and_unload().eval()(images()), output)


@pytest.mark.parametrize("method", BYPASSING.values(), ids=BYPASSING)
def test_adapters_that_would_not_call_the_layer_are_refused(method):
    model = connected(depth=1)
    message = r"^qkv of Attention: \w+ would not call the FusedCrossModalLinear inside: merge_pathways.model. first"
    with unchanged(model), pytest.raises(ValueError, match=message):
        wrapped(model, method)
    wrapped(merge_pathways(connected(depth=1)), method)
    target = wrapped(vit(0, depth=1), method)
    place = rf"{LAYER}.base_layer is not called by its|{LAYER} is a peft.tuners.frod.layer.Linear, expected"
    with pytest.raises(ValueError, match=f"^target_model: ({place})"):
        reparameterize_aux_into_target_model(target.base_model.model, vit(1, depth=1))


@pytest.mark.parametrize("method", MERGED.values(), ids=MERGED)
def test_surgery_inside_an_adapter_computes_both_or_is_refused(method):
    target, aux = wrapped(vit(0, depth=1), method, is_trained=True), vit(1, depth=1)
    if method.surgery:
        with unchanged(target, aux), pytest.raises(ValueError, match=f"^target_model: .*{method.surgery}"):
            reparameterize_aux_into_target_model(target.base_model.model, aux)
        return
    before = target(images())
    reparameterize_aux_into_target_model(target.base_model.model, aux)
    close(target(images()), before)
    for layer in fused_layers(target).values():
        layer.cross_modal_scale.requires_grad_(True)
    assert warnings_of(target) == []


@pytest.mark.parametrize("is_fresh", [False, True])
def test_what_peft_trains_as_a_whole_keeps_the_auxiliary_weight_frozen(is_fresh):
    """`modules_to_save` trains a copy, and the original stands aside."""
    model = reparameterize_aux_into_target_model(vit(0, depth=1), vit(1, depth=1)) if is_fresh else connected(depth=1)
    settings = {"r": 2, "target_modules": r".*attn\.qkv", "modules_to_save": ["mlp"]}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    said = warnings_of(model)
    assert [each for each in said if "not called" in each] == []
    assert sum("aux_weight: something has set its requires_grad" in each for each in said) == 2
    assert [each.partition(":")[0] for each in said if "zero and frozen" in each] == (
        ["blocks.0.attn.qkv.base_layer, blocks.0.attn.proj"] * is_fresh
    )
    model(images()).square().mean().backward()
    saved = [layer for name, layer in fused_layers(model).items() if "modules_to_save" in name]
    assert len(saved) == 2 and all(layer.aux_weight.grad is None for layer in saved)
    assert all(layer.weight.grad.any() and layer.cross_modal_scale.grad.any() for layer in saved)


def pruned(model, name):
    for layer in fused_layers(model).values():
        prune.l1_unstructured(layer, name, 0.5)
    return model


@pytest.mark.parametrize("name", ["weight", "aux_weight"])
def test_a_pruned_model_is_merged_once_pruning_is_permanent(name):
    model = pruned(connected(depth=1).eval(), name)
    before = model(images())
    assert not torch.equal(before, connected(depth=1).eval()(images()))
    with pytest.raises(ValueError, match=f"^{LAYER}: the layer has forward pre-hooks, which would be lost"):
        merge_pathways(model)
    for layer in fused_layers(model).values():
        assert (getattr(layer, name) == 0).float().mean() == 0.5
        prune.remove(layer, name)
    close(merge_pathways(model)(images()), before)


def test_a_pruned_auxiliary_weight_is_quantised_once_pruning_is_permanent():
    model = pruned(connected(depth=1).eval(), "aux_weight")
    before = model(images())
    message = f"^{LAYER}: aux_weight: it is computed from other tensors, as by pruning: make it permanent first"
    with pytest.raises(ValueError, match=message):
        quantize_aux(model, "int8")
    assert torch.equal(model(images()), before)
    for layer in fused_layers(model).values():
        prune.remove(layer, "aux_weight")
    quantize_aux(model, "int8")
    quantize_aux(pruned(connected(depth=1), "weight"), "int8")


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, "weight"),
    "spectral_norm": (parametrizations.spectral_norm, "weight"),
    "orthogonal": (parametrizations.orthogonal, "weight"),
    "of weight": (lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()), "weight"),
    "of aux_weight": (lambda layer: parametrize.register_parametrization(layer, "aux_weight", Doubled()), "aux_weight"),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parametrised_layer_keeps_its_pathway(kind):
    register, name = PARAMETRIZED[kind]
    model = connected(depth=1).eval()
    layer = model.get_submodule(LAYER)
    register(layer)
    assert parametrize.is_parametrized(layer, name)
    input = torch.randn(3, 48)
    weight = layer.weight + layer.cross_modal_scale * layer.aux_weight
    close(layer(input), F.linear(input, weight, layer.bias))
    before = model(images())
    before.square().mean().backward()
    assert layer.cross_modal_scale.grad.any()
    message = rf"^{LAYER} is a torch.nn.utils.parametrize.ParametrizedFused.*, expected a plain FusedCrossModalLinear"
    with unchanged(model), pytest.raises(ValueError, match=message):
        disconnect_pathways(model)
    if kind == "weight_norm":
        with unchanged(model), pytest.raises(ValueError, match=f"^{LAYER}: the layer has load-state-dict pre-hooks"):
            merge_pathways(model)
        return
    if name == "aux_weight":
        with pytest.raises(ValueError, match=f"^{LAYER}: aux_weight: it is computed from other tensors"):
            quantize_aux(model, "int8")
    close(merge_pathways(model)(images()), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("side", ["target_model", "aux_model"])
@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda layer: prune.identity(layer, "weight"),
            "is a .*Linear with a forward, parameters, buffers or mod",
        ),
        (
            parametrizations.weight_norm,
            "is a torch.nn.utils.parametrize.ParametrizedLinear, expected a plain nn",
        ),
    ],
    ids=["pruned", "weight_norm"],
)
def test_surgery_refuses_weights_that_are_computed(side, change, message):
    models = {"target_model": vit(0, depth=1), "aux_model": vit(1, depth=1)}
    change(models[side].get_submodule(LAYER))
    with unchanged(*models.values()), pytest.raises(ValueError, match=f"^{side}: {LAYER} {message}"):
        reparameterize_aux_into_target_model(**models)


def test_surgery_looks_around_an_adapter_for_what_reads_the_weight():
    target, aux = wrapped(vit(0, depth=1), STACKED["LoRA"]), vit(1, depth=1)
    target.base_model.model.blocks[0].attn.q_bias = nn.Parameter(torch.zeros(48))  # as timm's BEiT, which reads qkv
    with unchanged(target, aux), pytest.raises(ValueError, match=f"^target_model: {READ}"):
        reparameterize_aux_into_target_model(target.base_model.model, aux)
