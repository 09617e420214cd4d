"""Pathways as adapters: frozen weights stay frozen, pathways are switched off and taken out, parameters are grouped."""

import copy
import math
import pickle
import warnings

import pytest
import timm.utils
import torch
from helpers import connected, fused_layers, images, unchanged, vit
from torch import nn

from m2pt import (
    disabled_pathways,
    disconnect_pathways,
    freeze_for_linear_probe,
    parameter_groups,
    quantize_aux,
    remove_auxiliary,
    reparameterize_aux_into_target_model,
)

LAYER = "blocks.0.attn.qkv"


def unfreeze_one_by_one(model):
    for parameter in model.parameters():
        parameter.requires_grad = True


def lightning_callbacks():
    return pytest.importorskip("lightning.pytorch.callbacks")


ASKED = {
    "requires_grad_": lambda model: model.requires_grad_(True),
    "one by one": unfreeze_one_by_one,
    "timm": timm.utils.unfreeze,
    "lightning": lambda model: lightning_callbacks().BaseFinetuning.make_trainable(model),
    "after a probe": lambda model: freeze_for_linear_probe(model).requires_grad_(True),
    "in a copy": lambda model: copy.deepcopy(model).requires_grad_(True),
    "in a pickled copy": lambda model: pickle.loads(pickle.dumps(model)).requires_grad_(True),
}


@pytest.mark.parametrize(
    "ask, is_compiled",
    [*((how, False) for how in ASKED), *((how, True) for how in ("requires_grad_", "one by one", "in a copy"))],
)
def test_a_frozen_auxiliary_weight_stays_frozen(ask, is_compiled):
    model = connected(depth=1)
    model = ASKED[ask](model) or model
    if is_compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            model(images()).square().mean().backward()
    for layer in fused_layers(model).values():
        assert layer.aux_weight.grad is None and layer.cross_modal_scale.grad is not None
        assert not layer.is_aux_trained and "float32 frozen" in repr(layer)
    if not is_compiled:
        (warning,) = caught
        assert str(warning.message).startswith("aux_weight: something has set its requires_grad, but it was connected")
    grouped = {id(parameter) for group in parameter_groups(model, 1e-3, 0.05) for parameter in group["params"]}
    assert grouped == {id(p) for name, p in model.named_parameters() if not name.endswith("aux_weight")}


def test_only_the_surgery_call_makes_auxiliary_weights_trainable():
    model = connected(is_aux_trainable=True, depth=1)
    freeze_for_linear_probe(model)
    assert not any(layer.is_aux_trained for layer in fused_layers(model).values())
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images()).square().mean().backward()
    assert all(layer.aux_weight.grad.any() for layer in fused_layers(model).values())
    grouped = {id(parameter) for group in parameter_groups(model, 1e-3, 0.05) for parameter in group["params"]}
    assert grouped == set(map(id, model.parameters()))


def test_what_surgery_makes_anew_is_trained_as_before():
    model = reparameterize_aux_into_target_model(vit(0, depth=1), {"one": vit(1, depth=1)}, is_aux_trainable=True)
    reparameterize_aux_into_target_model(model, {"two": vit(2, depth=1)}, is_aux_trainable=True)
    assert all(layer.is_aux_trained for layer in fused_layers(model).values())
    freeze_for_linear_probe(model)
    remove_auxiliary(model, "two")
    assert not any(layer.is_aux_trained for layer in fused_layers(model).values())
    message = "is_aux_trainable: expected True, as for the auxiliary weights that are there"
    with pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(model, {"three": vit(3, depth=1)})
    model.requires_grad_(True)
    assert all(layer.is_aux_trained for layer in fused_layers(model).values())


def test_a_sample_is_no_reason_to_say_that_a_layer_reads_its_own_weight():
    model = reparameterize_aux_into_target_model(vit(0, depth=1), vit(1, depth=1), layer_names=("attn.qkv",))
    with disabled_pathways(model.requires_grad_(True)):
        reparameterize_aux_into_target_model(model, vit(2, depth=1), layer_names=("mlp.fc1",), sample=images())
    with pytest.warns(UserWarning, match="aux_weight: something has set"):
        reparameterize_aux_into_target_model(model, vit(3, depth=1), layer_names=("mlp.fc2",), sample=images())


def test_what_asks_for_a_gradient_in_vain_changes_nothing_else():
    """Quantising, connecting a further model and taking it out look at what was said when connecting."""
    model = connected(depth=1).requires_grad_(True)
    reparameterize_aux_into_target_model(model, {"other": vit(2, depth=1)})
    assert not any(layer.is_aux_trainable or layer.is_aux_trained for layer in fused_layers(model).values())
    quantize_aux(model.requires_grad_(True), "int8")
    assert {layer.storage for layer in fused_layers(model).values()} == {"int8"}


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_disabled_pathways_leave_the_plain_model_bit_for_bit(storage, is_compiled):
    model, want = connected(depth=1).eval(), vit(0, depth=1).eval()(images())
    if storage:
        quantize_aux(model, storage)
    if is_compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
    before = model(images())
    with disabled_pathways(model):
        assert torch.equal(model(images()), want)
        with disabled_pathways(model.blocks[0].mlp):
            assert torch.equal(model(images()), want)
        assert torch.equal(model(images()), want)
        model(images()).sum().backward()
    assert torch.equal(model(images()), before) and not torch.equal(before, want)
    assert model.blocks[0].attn.qkv.weight.grad is not None and model.blocks[0].attn.qkv.cross_modal_scale.grad is None


def test_an_error_inside_the_block_enables_pathways_again():
    model = connected(depth=1)
    with pytest.raises(KeyError), disabled_pathways(model):
        raise KeyError
    assert all(layer.is_enabled for layer in fused_layers(model).values())
    with pytest.raises(ValueError, match=r"^model: there is no FusedCrossModalLinear"), disabled_pathways(vit(0)):
        pass


def test_a_disconnected_model_is_the_target():
    target = vit(0).eval()
    parameters = dict(target.named_parameters())
    with unchanged(aux := vit(1)):
        model = reparameterize_aux_into_target_model(target, aux)
        assert disconnect_pathways(model) is model
    assert not fused_layers(model) and not model._forward_hooks
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert all(type(model.get_submodule(f"blocks.1.{name}")) is nn.Linear for name in ("attn.qkv", "mlp.fc2"))
    assert torch.equal(model(images()), vit(0).eval()(images()))


def test_disconnecting_refuses_what_it_would_lose():
    model = connected()
    model.blocks[1].mlp.fc2.register_forward_hook(lambda *arguments: None)
    with unchanged(model), pytest.raises(ValueError, match=r"^blocks.1.mlp.fc2 has forward hooks, which would be lost"):
        disconnect_pathways(model)
    with pytest.raises(ValueError, match=r"^model: there is no FusedCrossModalLinear"):
        disconnect_pathways(vit(0))


def rates(model, *arguments, **options):
    """Learning rate and weight decay by the name of the parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, *arguments, **options)
    assert all(group["params"] for group in groups)
    named = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(named) == len(dict(named))
    torch.optim.AdamW(groups)
    return dict(named)


@pytest.mark.parametrize("scale_lr", [None, 0.5])
def test_scales_and_vectors_have_no_weight_decay(scale_lr):
    model = connected()
    found = rates(model, 0.1, 0.05, scale_lr=scale_lr)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, rate in found.items():
        parameter = model.get_parameter(name)
        is_scale, is_matrix = name.endswith("cross_modal_scale"), parameter.dim() > 1 and name not in EMBEDDINGS
        assert rate == (scale_lr or 0.1 if is_scale else 0.1, 0.05 if is_matrix else 0.0)


EMBEDDINGS = ("pos_embed", "cls_token")


WRAPPERS = {
    "none": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_layer_decay_holds_for_scales_too(wrap):
    model = connected()
    groups = parameter_groups(wrap(model), 0.8, 0.05, scale_lr=8.0, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found["pos_embed"] == (0.1, 0.0)
    assert found["head.weight"] == (0.8, 0.05) and found["blocks.0.attn.qkv.weight"] == (0.2, 0.05)
    assert found["blocks.0.attn.qkv.cross_modal_scale"] == (2.0, 0.0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"lr": -1.0}, "^lr: expected 0 or more, got -1.0"),
        ({"lr": math.inf}, "^lr: expected 0 or more, got inf"),
        ({"weight_decay": math.nan}, "^weight_decay: expected 0 or more, got nan"),
        ({"scale_lr": -0.1}, "^scale_lr: expected 0 or more, got -0.1"),
        ({"model": nn.Linear(3, 3), "layer_decay": 0.5}, r"^layer_decay: expected 1, as Linear has no group_matcher"),
        ({"layer_decay": 0.0}, r"^layer_decay: expected a number in \(0, 1\], got 0.0"),
    ],
    ids=str,
)
def test_rates_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(**{"model": connected(depth=1), "lr": 0.1, "weight_decay": 0.05} | arguments)
    with pytest.raises(TypeError, match=r"^scale_lr: expected a number, got '0.1'"):
        parameter_groups(connected(depth=1), 0.1, 0.05, scale_lr="0.1")
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got dict"):
        parameter_groups({}, 0.1, 0.05)
