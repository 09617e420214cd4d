"""Hooks that would be lost are refused by name, and the hook that watches whether layers are called."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from helpers import PLACES, Readers, X, connected, fused_layers, images, unchanged, vit
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

from m2pt import (
    FusedCrossModalLinear,
    disconnect_pathways,
    merge_pathways,
    remove_auxiliary,
    reparameterize_aux_into_target_model,
    step_in_backward,
)
from m2pt.hooks import KINDS
from m2pt.saved_bytes import published_formulation

pytestmark = pytest.mark.slow

LAST = "blocks.1.mlp.fc2"


def hook(*arguments):
    pass


HOOKS = {
    "forward hooks": lambda layer: layer.register_forward_hook(hook),
    "forward hooks ": lambda layer: layer.register_forward_hook(hook, with_kwargs=True, always_call=True),
    "forward pre-hooks": lambda layer: layer.register_forward_pre_hook(hook),
    "forward pre-hooks ": lambda layer: layer.register_forward_pre_hook(hook, with_kwargs=True),
    "backward hooks": lambda layer: layer.register_full_backward_hook(hook),
    "backward hooks ": lambda layer: layer.register_backward_hook(hook),
    "backward pre-hooks": lambda layer: layer.register_full_backward_pre_hook(hook),
    "state-dict hooks": lambda layer: layer.register_state_dict_post_hook(hook),
    "state-dict pre-hooks": lambda layer: layer.register_state_dict_pre_hook(hook),
    "load-state-dict pre-hooks": lambda layer: layer.register_load_state_dict_pre_hook(hook),
    "load-state-dict post-hooks": lambda layer: layer.register_load_state_dict_post_hook(hook),
}
TENSOR_HOOKS = {
    "gradient hooks": lambda layer: layer.weight.register_hook(hook),
    "post-accumulate-gradient hooks": lambda layer: layer.weight.register_post_accumulate_grad_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_surgery_refuses_a_layer_with_hooks(kind):
    target, aux = vit(0), vit(1)
    handle = HOOKS[kind](target.get_submodule(LAST))
    message = rf"has {kind.strip()}, which would be lost: remove them first$"
    with pytest.raises(ValueError, match=f"^target_model: {LAST} {message}"):
        reparameterize_aux_into_target_model(target, aux)
    with pytest.raises(ValueError, match=f"^origin_layer {message}"):
        layer_of(target.get_submodule(LAST))
    assert fused_layers(target) == {}
    handle.remove()
    with unchanged(aux):
        reparameterize_aux_into_target_model(target, aux)


def layer_of(origin_layer):
    shape = origin_layer.in_features, origin_layer.out_features
    return FusedCrossModalLinear(*shape, origin_layer=origin_layer, aux_weight=torch.ones_like(origin_layer.weight))


@pytest.mark.parametrize("kind", HOOKS | TENSOR_HOOKS)
def test_merging_refuses_a_layer_or_a_weight_with_hooks(kind):
    model = connected()
    layer = model.get_submodule(LAST)
    handle = (HOOKS | TENSOR_HOOKS)[kind](layer)
    message = rf"{'weight' if kind in TENSOR_HOOKS else 'the layer'} has {kind.strip()}, which would be lost"
    with pytest.raises(ValueError, match=f"^{message}"):
        layer.merge()
    with pytest.raises(ValueError, match=f"^{LAST}: {message}"):
        merge_pathways(model)
    assert list(fused_layers(model)) == PLACES
    handle.remove()
    assert fused_layers(merge_pathways(model)) == {}


REPLACING = {
    "merge": merge_pathways,
    "disconnect": disconnect_pathways,
    "remove": lambda model: remove_auxiliary(model, "VisionTransformer"),
    "connect": lambda model: reparameterize_aux_into_target_model(model, vit(2)),
}


@pytest.mark.parametrize("replace", REPLACING.values(), ids=REPLACING)
def test_a_forward_of_a_fused_layers_own_is_not_dropped(replace):
    model = connected()
    layer = model.get_submodule(LAST)
    layer.forward = lambda input: 2 * type(layer).forward(layer, input)
    message = rf"{LAST}:?( the layer)? has a forward of its own, which would be lost: remove them first$"
    with unchanged(model), pytest.raises(ValueError, match=message):
        replace(model)
    del layer.forward
    replace(model)
    assert model.get_submodule(LAST) is not layer


def test_all_kinds_of_hooks_are_named_at_once():
    model = connected()
    for kind in ("forward hooks", "backward hooks"):
        HOOKS[kind](model.get_submodule(LAST))
    with pytest.raises(ValueError, match=f"^{LAST}: the layer has forward hooks and backward hooks, which"):
        merge_pathways(model)


def test_every_kind_of_hook_that_torch_knows_is_looked_for():
    flags = {"_is_full_backward_hook", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
    kept = {name for name in vars(nn.Linear(1, 1)) if "hook" in name}
    assert kept - flags - {"_forward_pre_hooks_with_kwargs"} == KINDS.keys()


def test_hooks_of_parameters_survive_surgery():
    target = vit(0)
    seen = []
    for parameter in target.get_submodule(LAST).parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient.shape))
    reparameterize_aux_into_target_model(target, vit(1))(images()).sum().backward()
    assert sorted(seen) == [(48,), (48, 192)]


def test_a_model_trained_by_steps_in_backward_is_merged():
    model = connected()
    step_in_backward(torch.optim.SGD(model.parameters(), lr=0.01))
    model(images()).square().sum().backward()
    logits = model(images())
    torch.testing.assert_close(merge_pathways(model)(images()), logits)


def readers(**options):
    return reparameterize_aux_into_target_model(Readers(0), Readers(1), ("fc", "attn.v_proj"), **options)


NOT_CALLED = "blocks.0.attn.v_proj, blocks.1.attn.v_proj: not called by Attention"


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not called by")
        yield


def test_the_first_pass_in_training_warns_of_layers_that_were_not_called():
    model = readers()
    with pytest.warns(UserWarning, match=f"^{NOT_CALLED}, which reads") as warned:
        model.eval()(X)
        model.train()
        with pytest.raises(TypeError):
            model(None)
        assert not warned
        model(X)
        assert not model._forward_hooks
        model(X)
    assert len(warned) == 1


def test_two_operations_are_watched_by_one_hook():
    model = vit()
    for layer in ("attn.qkv", "mlp.fc1"):
        reparameterize_aux_into_target_model(model, vit(1), (layer,))
    assert len(model._forward_hooks) == 1


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: saved(model),
    "average": lambda model: ModelEmaV3(model).module.train(),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_duplicates_are_watched_too(duplicate):
    model = readers()
    twin = duplicate(model)
    for each in (twin, model):
        with pytest.warns(UserWarning, match=f"^{NOT_CALLED}"):
            each(X)
        assert not each._forward_hooks


def functional(model):
    return partial(torch.func.functional_call, model, dict(model.named_parameters()))


def checkpointed(use_reentrant):
    return lambda model: partial(checkpoint, model, use_reentrant=use_reentrant)


def checkpointed_blocks(model):
    model.set_grad_checkpointing()
    return model


def replaced_forward(model):
    def call(x):
        with published_formulation(model):
            return model(x)

    return call


WAYS = {
    "called": lambda model: model,
    "functional_call": functional,
    "reentrant checkpoint": checkpointed(True),
    "checkpoint": checkpointed(False),
    "checkpointed blocks": checkpointed_blocks,
    "with another forward": replaced_forward,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_model_that_calls_its_layers_is_left_alone(way, no_warnings):
    model = connected()
    assert len(model._forward_hooks) == 1
    way(model)(images().requires_grad_()).sum().backward()
    assert not model._forward_hooks


def test_merging_leaves_no_hook(no_warnings):
    model = nn.Sequential(connected(), nn.Identity())
    merge_pathways(model)
    assert not any(module._forward_hooks for module in model.modules())
    model(images())


def compile_model(model, **options):
    return torch.compile(model, **options)


def compile_in_place(model, **options):
    model.compile(**options)
    return model


def compile_blocks_in_place(model, **options):
    for block in model.blocks:
        block.compile(**options)
    return model


def compile_blocks(model, **options):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, **options)
    return model


def compile_forward_of_blocks(model, **options):
    for block in model.blocks:
        block.forward = torch.compile(block.forward, **options)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "compiled", [compile_model, compile_in_place, compile_blocks_in_place, compile_blocks, compile_forward_of_blocks]
)
def test_compiled_code_has_no_breaks_and_warns_of_nothing(compiled, checkpointing, no_warnings):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = connected()
    model.set_grad_checkpointing(checkpointing)
    watched = model._forward_hooks
    step = compiled(model, fullgraph=True, backend=count)
    step(images()).sum().backward()
    compilations = len(graphs)
    for _ in range(2):
        step(images()).sum().backward()
    with torch.compiler.set_stance("force_eager"):
        model(images()).sum().backward()
    assert not watched
    step(images()).sum().backward()
    assert len(graphs) == compilations


def test_layers_outside_of_what_is_compiled_are_watched():
    model = readers()
    model.blocks[0]["attn"].compile(backend="eager")
    with pytest.warns(UserWarning, match="^blocks.1.attn.v_proj: not called by Attention"):
        model(X)


def test_a_sample_passes_by_what_is_compiled():
    model = Readers(0)
    for block in model.blocks:
        block["fc"].compile(backend="eager")
        block["attn"].forward = torch.compile(block["attn"].forward, backend="eager")
    reparameterize_aux_into_target_model(model, Readers(1), ("fc",), sample=X)
    with pytest.raises(ValueError, match=f"^target_model: {NOT_CALLED}, which"):
        reparameterize_aux_into_target_model(model, Readers(2), ("attn.v_proj",), sample=X)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_of_a_watched_model(strict, training):
    model = connected(depth=1).train(training)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(called|attribute|side effect)")
        exported = torch.export.export(model, (images(),), strict=strict)
    assert len(model._forward_hooks) == 1
    torch.testing.assert_close(exported.module()(images()), model(images()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_watched_model_in_training_is_traced():
    model = connected(depth=1)
    torch.testing.assert_close(torch.jit.trace(model, images())(images()), model(images()))
