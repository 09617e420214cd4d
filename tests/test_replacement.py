"""What takes the place of a fused layer, what cannot be stored in one, and what recorders of operators are told."""

import copy
import warnings

import pytest
import torch
from helpers import Wrapper, connected, fused_layers, images, unchanged, vit
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from m2pt import FusedCrossModalLinear, merge_pathways, reparameterize_aux_into_target_model
from m2pt.replacement import has_pathway

LAYER = "blocks.0.attn.qkv"


def plain_copy(layer):
    return nn.Linear(layer.in_features, layer.out_features)


SETTERS = {
    "attribute": lambda parent, name, module: setattr(parent, name, module),
    "add_module": lambda parent, name, module: parent.add_module(name, module),
    "register_module": lambda parent, name, module: parent.register_module(name, module),
    "set_submodule": lambda parent, name, module: parent.set_submodule(name, module),
}


@pytest.mark.parametrize("put", SETTERS.values(), ids=SETTERS)
def test_a_layer_without_a_pathway_does_not_replace_one_that_has_one(put):
    model = connected()
    parent = model.blocks[0].attn
    message = r"^qkv of Attention: Linear would replace a FusedCrossModalLinear and lose its pathway: .*disconnect_path"
    with unchanged(model), pytest.raises(ValueError, match=message):
        put(parent, "qkv", plain_copy(parent.qkv))


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_items_of_containers_are_not_replaced_either(container):
    layer = connected().get_submodule(LAYER)
    body = container([layer]) if container is nn.ModuleList else container(layer)
    with pytest.raises(ValueError, match=f"^0 of {container.__name__}: Linear would replace"):
        body[0] = plain_copy(layer)
    assert body[0] is layer


WRAPPED = {
    "wrapper": nn.Sequential,
    "activation checkpointing": checkpoint_wrapper,
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
    "copy": copy.deepcopy,
    "traced": lambda layer: torch.jit.trace(layer, torch.randn(2, layer.in_features)),
    "exported": lambda layer: torch.export.export(layer, (torch.randn(2, layer.in_features),)).module(),
    "removed": lambda layer: None,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_keeps_the_pathway_may_take_its_place(wrap):
    model = connected()
    wrapped = wrap(model.blocks[0].attn.qkv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.blocks[0].attn.qkv = wrapped
    assert model.blocks[0].attn.qkv is wrapped


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_modules_that_had_no_pathway_are_replaced_as_ever():
    model = connected()
    scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    setattr(scripted, "0", torch.jit.script(nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.head = nn.Linear(48, 7)
        model.blocks[0].attn.extra = nn.Linear(48, 7)
        model.blocks[0].attn.qkv = None
        model.blocks[0].attn.qkv = nn.Linear(48, 144)
    assert not has_pathway(model.blocks[0].attn.qkv) and has_pathway(model.blocks[0])


@pytest.mark.parametrize("make", [FusedCrossModalLinear.merge, FusedCrossModalLinear.plain])
def test_what_a_layer_makes_of_itself_takes_its_place(make):
    model = connected()
    mlp = model.blocks[0].mlp
    mlp.fc1 = make(mlp.fc1)
    assert type(mlp.fc1) is nn.Linear
    other = nn.Linear(48, 192)
    mlp.fc1 = other
    assert mlp.fc1 is other


def test_a_module_around_pathways_is_replaced_with_a_warning():
    model = connected()
    attention = vit(3).blocks[0].attn
    with pytest.warns(UserWarning, match="^attn of Block: Attention replaces a module with pathways and has none"):
        model.blocks[0].attn = attention
    assert model.blocks[0].attn is attention


class Quantized(nn.Linear):
    def forward(self, input):
        return super().forward(input).round()


def first_training_pass(model):
    """The warnings of the first forward pass in training mode, and of the next."""
    every = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train()(images())
        every.append([str(each.message) for each in caught])
    assert every[1] == []
    return every[0]


class Reader(nn.Module):
    """As an adapter that computes with the weight of the layer inside."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, input):
        return nn.functional.linear(input, 2 * self.base_layer.weight, self.base_layer.bias)


@pytest.mark.parametrize("wrapper,is_named", [(Reader, True), (nn.Sequential, False)])
def test_a_wrapper_has_to_call_the_layer_that_was_called_before_it_came(wrapper, is_named):
    model = connected()
    model.eval()(images())
    model.blocks[0].attn.qkv = wrapper(model.blocks[0].attn.qkv)
    message = f"{LAYER}.base_layer: not called by Reader, which reads the weight itself or leaves the layer out: "
    assert first_training_pass(model) == [f"{message}the auxiliary weight has no effect"] * is_named


def test_layers_replaced_behind_the_back_of_torch_are_named_in_the_first_training_pass():
    model = connected().eval()
    for name, layer in list(model.blocks[1].attn.named_children()):
        if isinstance(layer, FusedCrossModalLinear):
            model.blocks[1].attn._modules[name] = Quantized(layer.in_features, layer.out_features)
    model(images())
    message = "blocks.1.attn.qkv, blocks.1.attn.proj: replaced since they were connected: their pathways are lost"
    assert first_training_pass(model) == [f"{message}, unless merged before"]


@pytest.mark.parametrize("sample", [None, images()], ids=["no sample", "sample"])
def test_scales_frozen_at_zero_are_named_in_the_first_training_pass(sample):
    model = reparameterize_aux_into_target_model(vit(0), vit(1), sample=sample)
    layers = fused_layers(model)
    for layer in layers.values():
        layer.cross_modal_scale.requires_grad_(False)
    layers[LAYER].cross_modal_scale.requires_grad_(True)
    with torch.no_grad():
        layers["blocks.0.mlp.fc1"].cross_modal_scale += 1
    names = ", ".join(name for name in layers if name not in (LAYER, "blocks.0.mlp.fc1"))
    (message,) = first_training_pass(model)
    assert message.startswith(f"{names}: cross_modal_scale is zero and frozen: ")


def test_a_model_that_is_connected_twice_is_watched_once():
    model = reparameterize_aux_into_target_model(vit(0), vit(1))
    reparameterize_aux_into_target_model(model, vit(2))
    for layer in fused_layers(model).values():
        layer.cross_modal_scale.requires_grad_(False)
    assert len(first_training_pass(model)) == 1


class Own(Wrapper):
    """Its module is named as one of peft's methods is, and it says that it is merged."""

    merged = True


@pytest.mark.parametrize("module", ["shira", "road", "own.shira.layer"])
def test_only_pefts_own_wrappers_are_known_by_name(monkeypatch, module):
    monkeypatch.setattr(Own, "__module__", module)
    model = connected()
    layer = model.blocks[0].attn.qkv
    model.blocks[0].attn.qkv = Own(layer)
    model.blocks[0].attn.qkv = layer
    assert model.blocks[0].attn.qkv is layer


def test_nothing_is_said_of_trained_scales_and_merged_parts():
    model = reparameterize_aux_into_target_model(vit(0), vit(1))
    merge_pathways(model.blocks[0])
    model.blocks[0].attn.qkv = Wrapper(model.blocks[0].attn.qkv)
    assert first_training_pass(model) == []


class Foreign(torch.Tensor):
    """A tensor class of another package with operators of its own, as those of quantised weights are."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        return super().__torch_function__(function, types, arguments, keywords or {})


class OwnParameter(nn.Parameter):
    """A parameter's class without any."""


def test_parameters_of_an_own_class_are_connected():
    target, aux = vit(0), vit(1)
    for model in (target, aux):
        layer = model.get_submodule(LAYER)
        layer.weight = OwnParameter(layer.weight.detach())
    assert type(reparameterize_aux_into_target_model(target, aux).get_submodule(LAYER).weight) is OwnParameter


def foreign(tensor):
    return nn.Parameter(tensor.detach().as_subclass(Foreign), requires_grad=False)


@pytest.mark.parametrize("side", ["target_model", "aux_model"])
def test_weights_of_another_packages_class_are_refused_by_name(side):
    models = {"target_model": vit(0), "aux_model": vit(1)}
    layer = models[side].get_submodule("blocks.1.mlp.fc1")
    layer.weight = foreign(layer.weight)
    message = rf"^{side}: blocks.1.mlp.fc1.weight: expected a plain tensor, got a {__name__}.Foreign: connect unquant"
    with unchanged(*models.values()), pytest.raises(TypeError, match=message):
        reparameterize_aux_into_target_model(**models)


@pytest.mark.parametrize("name", ["weight", "bias", "aux_weight", "cross_modal_scale"])
def test_a_fused_layer_takes_no_tensor_of_another_packages_class(name):
    layer = connected().get_submodule(LAYER)
    before = getattr(layer, name)
    with pytest.raises(
        TypeError, match=rf"^{name} of a FusedCrossModalLinear: expected a plain tensor, got a {__name__}.Foreign"
    ):
        setattr(layer, name, foreign(before))
    assert getattr(layer, name) is before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("is_dynamo", [True, False])
def test_onnx_is_told_to_merge_first(tmp_path, is_dynamo):
    pytest.importorskip("onnxscript")
    model = connected(depth=1).eval()
    line = "ONNX does not support FusedCrossModalLinear: merge_pathways(model) first"
    with pytest.raises(Exception) as caught:
        torch.onnx.export(model, (images(),), tmp_path / "model.onnx", dynamo=is_dynamo, verbose=False)
    causes = [caught.value, caught.value.__cause__]
    assert line in map(str, causes) and line in str(caught.value)


@pytest.mark.parametrize("inner", ["layer", "mlp"])
def test_fx_is_told_to_merge_first(inner):
    mlp = connected(depth=1).blocks[0].mlp
    module = nn.Sequential(mlp.fc1) if inner == "layer" else mlp
    with pytest.raises(TypeError, match=r"^torch.fx does not support FusedCrossModalLinear: merge_pathways"):
        torch.fx.symbolic_trace(module)
    assert torch.fx.symbolic_trace(merge_pathways(module)) is not None
