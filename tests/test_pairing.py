"""Which layers belong together, by what was said or found; further auxiliary models, and taking one out again."""

import copy
import re

import pytest
import torch
from test_pathway import fused_layers, images, unchanged, vit
from torch import nn

from m2pt import (
    FusedCrossModalLinear,
    cross_modal_scales,
    describe_pathways,
    merge_pathways,
    quantize_aux,
    remove_auxiliary,
    reparameterize_aux_into_target_model,
)

DEPTH = 2


class Block(nn.Module):
    """Linear layers of these names and shapes, one after the other as far as they fit."""

    def __init__(self, **shapes):
        super().__init__()
        for name, (rows, columns) in shapes.items():
            self.add_module(name, nn.Linear(columns, rows))


def model(depth=DEPTH, name="body", **shapes):
    """A sequence of blocks of a family that nobody knows."""
    return nn.ModuleDict({name: nn.ModuleList(Block(**shapes) for _ in range(depth))})


FUSED = {"mix_in": (24, 8), "mix_out": (8, 8), "up": (16, 8), "down": (8, 16)}
SPLIT = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "wide": (16, 8), "narrow": (8, 16)}
OTHER = {"attend": (24, 8), "project": (8, 8), "expand": (16, 8), "contract": (8, 16)}


def pairs(target, aux, **settings):
    """What each layer of the target's first connected block was read from."""
    reparameterize_aux_into_target_model(target, aux, **settings)
    layers = {name.split(".", 2)[2]: layer for name, layer in fused_layers(target).items()}
    return {name: layer.auxiliaries[0].layers for name, layer in layers.items()}


def test_unknown_layers_pair_up_by_shape_where_there_is_one_way():
    found = pairs(model(**FUSED), model(name="layers", **OTHER))
    expected = dict(zip(FUSED, OTHER, strict=True))
    assert found == {name: f"layers.1.{other}" for name, other in expected.items()}


def test_unknown_layers_of_the_same_names_pair_up_by_name():
    found = pairs(model(**SPLIT), model(name="layers", **SPLIT))
    assert found == {name: f"layers.1.{name}" for name in SPLIT}


@pytest.mark.parametrize(
    "shapes, aux_shapes, unclear",
    [
        (SPLIT, OTHER, "(8, 8): q, k, v, o and project"),
        (FUSED, SPLIT, "(24, 8): mix_in and none; (8, 8): mix_out and q, k, v, o"),
        (FUSED | {"gate": (16, 8)}, OTHER, "(16, 8): up, gate and expand"),
        (FUSED | {"gate": (5, 8)}, OTHER, "(5, 8): gate and none"),
        (FUSED, {"a": (3, 3)}, "(24, 8): mix_in and none; (8, 8): mix_out and none; (16, 8): up and none"),
    ],
)
def test_what_is_not_clear_lists_the_candidates(shapes, aux_shapes, unclear):
    target, aux = model(**shapes), model(**aux_shapes)
    message = rf"^aux_model: which of its layers belong to .* layer_names; .*{re.escape(unclear)}"
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux)


def test_names_say_what_is_not_clear():
    names = {"mix_in": ("q", "k", "v"), "mix_out": "o", "up": "wide"}
    target, aux = model(**FUSED), model(name="layers", **SPLIT)
    found = pairs(target, aux, layer_names=names)
    together = "layers.1.q + layers.1.k + layers.1.v"
    assert found == {"mix_in": together, "mix_out": "layers.1.o", "up": "layers.1.wide"}
    weight = torch.cat([aux["layers"][0].get_submodule(name).weight for name in ("q", "k", "v")])
    assert torch.equal(target["body"][0].mix_in.aux_weight, weight)

    target, aux = model(**SPLIT), model(**FUSED)
    found = pairs(target, aux, layer_names={("q", "k", "v"): "mix_in", "o": "mix_out"})
    rows = {"q": "[0:8]", "k": "[8:16]", "v": "[16:24]"}
    assert found == {name: f"body.1.mix_in{own}" for name, own in rows.items()} | {"o": "body.1.mix_out"}
    weight = aux["body"][1].mix_in.weight
    assert target["body"][1].k.aux_weight.data_ptr() == weight[8:].data_ptr()
    assert torch.equal(target["body"][1].k.aux_weight, weight[8:16])


def test_rows_of_different_numbers_on_both_sides():
    """As of grouped queries: two layers of rows that lie across three."""
    target, aux = model(a=(10, 8), b=(6, 8)), model(c=(4, 8), d=(4, 8), e=(8, 8))
    found = pairs(target, aux, layer_names={("a", "b"): ("c", "d", "e")})
    assert found == {"a": "body.1.c + body.1.d + body.1.e[0:2]", "b": "body.1.e[2:8]"}
    block, own = aux["body"][0], target["body"][0]
    together = torch.cat([block.c.weight, block.d.weight, block.e.weight])
    assert torch.equal(torch.cat([own.a.aux_weight, own.b.aux_weight]), together)


def separate(seed=0, depth=DEPTH):
    """A ViT whose queries, keys and values are layers of their own, named as Hugging Face does."""
    torch.manual_seed(seed)
    shapes = {f"{part}_proj": (48, 48) for part in ("q", "k", "v", "o")}
    blocks = [
        nn.ModuleDict({"attention": Block(**shapes), "mlp": Block(fc1=(192, 48), fc2=(48, 192))}) for _ in range(depth)
    ]
    return nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.Sequential(*blocks)})})


def test_names_of_the_target_choose_layers_of_known_families():
    found = pairs(vit(), separate(), layer_names=("mlp.fc1", "attn.qkv"))
    together = " + ".join(f"encoder.layers.1.attention.{part}_proj" for part in ("q", "k", "v"))
    assert found == {"attn.qkv": together, "mlp.fc1": "encoder.layers.1.mlp.fc1"}
    target = separate()
    reparameterize_aux_into_target_model(target, vit(), layer_names=("attention.q_proj", "attention.v_proj"))
    rows = {"q": "[0:48]", "v": "[96:144]"}
    assert {name: layer.auxiliaries[0].layers for name, layer in fused_layers(target).items()} == {
        f"encoder.layers.{i}.attention.{part}_proj": f"blocks.{i}.attn.qkv{own}"
        for i in range(DEPTH)
        for part, own in rows.items()
    }


def test_names_that_one_side_lacks_are_refused():
    target, aux = vit(), separate()
    for block in target.blocks:
        block.attn.norm = nn.Linear(3, 3)
    message = r"^aux_model: which of its layers belong to attn.norm is not known, .*; known is that of attn.qkv, "
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux, layer_names=("attn.qkv", "attn.norm"))


@pytest.mark.parametrize("names", [("blocks", "encoder.layers"), ["blocks", "encoder.layers"]])
def test_bodies_are_named_on_each_side(names):
    target, aux = vit(), separate()
    reparameterize_aux_into_target_model(target, aux, main_body_name=names)
    assert len(fused_layers(target)) == 8


def inside(**modules):
    return nn.ModuleDict(modules)


@pytest.mark.parametrize(
    "build, body",
    [
        (lambda: inside(blocks=vit().blocks, layers=vit().blocks), "blocks"),
        (lambda: inside(module=vit()), "module.blocks"),
        (lambda: inside(decoder=separate(), encoder=separate()), "encoder.encoder.layers"),
        (lambda: inside(vit=vit(), decoder_layers=vit().blocks), "vit.blocks"),
        (lambda: inside(decoder=vit()), "decoder.blocks"),
        (lambda: inside(known=vit(), unknown=model(**SPLIT)), "known.blocks"),
        (lambda: nn.Sequential(*vit().blocks), ""),
        (lambda: inside(stages=nn.ModuleList([vit()])), "stages.0.blocks"),
    ],
)
def test_the_body_is_found(build, body):
    target = build()
    reparameterize_aux_into_target_model(target, vit(1))
    prefix = f"{body}." if body else ""
    assert {name.removeprefix(prefix).split(".")[0] for name in fused_layers(target)} == {"0", "1"}
    assert all(name.startswith(prefix) for name in fused_layers(target))


@pytest.mark.parametrize(
    "build, candidates",
    [
        (lambda: inside(a=vit(), b=separate()), "'a.blocks' (2 blocks), 'b.encoder.layers' (2 blocks)"),
        (lambda: inside(a=model(**SPLIT), b=model(3, **SPLIT)), "'a.body' (2 blocks), 'b.body' (3 blocks)"),
    ],
)
def test_several_bodies_are_listed(build, candidates):
    target, aux = vit(), build()
    with (
        unchanged(target, aux),
        pytest.raises(ValueError, match=rf"^aux_model: ModuleDict .*: {re.escape(candidates)}$"),
    ):
        reparameterize_aux_into_target_model(target, aux)


@pytest.mark.parametrize(
    "blocks, target_depth, aux_depth, expected",
    [
        (None, 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("first", 5, 3, [(0, 0), (1, 1), (2, 2)]),
        ("last", 5, 3, [(2, 0), (3, 1), (4, 2)]),
        ("last", 2, 3, [(0, 1), (1, 2)]),
        ("even", 5, 3, [(0, 0), (2, 1), (4, 2)]),
        ("even", 3, 5, [(0, 0), (1, 2), (2, 4)]),
        ("even", 12, 6, list(zip((0, 2, 4, 7, 9, 11), range(6), strict=True))),
        ("even", 3, 1, [(0, 0)]),
        ("even", 2, 2, [(0, 0), (1, 1)]),
        ([1], 3, 3, [(1, 1)]),
        ((2, 0), 3, 3, [(2, 2), (0, 0)]),
        (range(1, 3), 5, 3, [(1, 1), (2, 2)]),
        ([(4, 0), [1, 0]], 5, 3, [(4, 0), (1, 0)]),
        ([(4, 0), 1], 5, 3, [(4, 0), (1, 1)]),
    ],
)
def test_blocks_are_chosen(blocks, target_depth, aux_depth, expected):
    target, aux = model(target_depth, **FUSED), model(aux_depth, name="layers", **FUSED)
    reparameterize_aux_into_target_model(target, aux, main_body_name=("body", "layers"), blocks=blocks)
    read = {name: layer.auxiliaries[0].layers for name, layer in fused_layers(target).items() if name.endswith("up")}
    assert read == {f"body.{i}.up": f"layers.{j}.up" for i, j in expected}
    assert all(torch.equal(target.get_submodule(n).aux_weight, aux.get_submodule(m).weight) for n, m in read.items())


def scaled(model):
    for layer in fused_layers(model).values():
        nn.init.normal_(layer.cross_modal_scale)
    return model


STORAGES = [None, "bfloat16", "int8", "float8_e4m3fn"]


@pytest.mark.parametrize("aux_dtype, is_aux_trainable", [*((storage, False) for storage in STORAGES), (None, True)])
def test_a_further_model_is_added_to_a_connected_one(aux_dtype, is_aux_trainable):
    settings = {"aux_dtype": aux_dtype, "is_aux_trainable": is_aux_trainable}
    target = scaled(reparameterize_aux_into_target_model(vit(0), vit(1), **settings)).eval()
    target.blocks[0].attn.qkv.cross_modal_scale.requires_grad_(False)
    weights, logits, scales = dict(target.named_parameters()), target(images()), cross_modal_scales(target)
    second = vit(2)
    with unchanged(second):
        reparameterize_aux_into_target_model(target, second, **settings)
    torch.testing.assert_close(target(images()), logits)
    assert all(
        target.get_parameter(name) is p for name, p in weights.items() if "aux" not in name and "scale" not in name
    )
    after = cross_modal_scales(target)
    assert after == {f"{name}[{i}]": (scale, 0.0)[i] for name, scale in scales.items() for i in (0, 1)}
    layers = fused_layers(target)
    assert all(layer.aux_weight.requires_grad == is_aux_trainable and not layer.training for layer in layers.values())
    assert [layer.cross_modal_scale.requires_grad for layer in layers.values()] == [False, *[True] * 7]

    together = reparameterize_aux_into_target_model(vit(0), [vit(1), vit(2)], **settings)
    together.load_state_dict(target.state_dict())
    fresh = reparameterize_aux_into_target_model(vit(0), [vit(1), vit(2)], **settings)
    expected = {
        name: tensor for name, tensor in fresh.state_dict().items() if name.endswith(("aux_weight", "weight_scale"))
    }
    state = target.state_dict()
    assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in expected.items())
    scaled(target)
    connected = target(images())
    torch.testing.assert_close(merge_pathways(target)(images()), connected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aux_dtype", STORAGES)
def test_a_model_is_taken_out_again(aux_dtype):
    names = {"audio": vit(1), "point": vit(2), "video": vit(3)}
    target = scaled(reparameterize_aux_into_target_model(vit(0), names, aux_dtype=aux_dtype))
    scales = cross_modal_scales(target)
    assert remove_auxiliary(target, "point") is target
    assert [a.model for a in target.blocks[0].attn.qkv.auxiliaries] == ["audio", "video"]
    expected = reparameterize_aux_into_target_model(vit(0), [vit(1), vit(3)], aux_dtype=aux_dtype)
    for name, layer in fused_layers(expected).items():
        layer.cross_modal_scale.data = torch.tensor([scales[f"{name}[0]"], scales[f"{name}[2]"]])
    assert target.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(target.state_dict()[n].float(), t.float()) for n, t in expected.state_dict().items())

    remove_auxiliary(target, "audio")
    assert target.blocks[0].attn.qkv.aux_weight.shape == (144, 48)
    assert target.blocks[0].attn.qkv.cross_modal_scale.tolist() == [pytest.approx(scales["blocks.0.attn.qkv[2]"])]
    weights = {name: target.get_parameter(f"{name}.weight") for name in fused_layers(target)}
    remove_auxiliary(target, "video")
    assert not fused_layers(target) and not target._forward_hooks
    assert all(type(target.get_submodule(name)) is nn.Linear for name in weights)
    assert all(target.get_parameter(f"{name}.weight") is weight for name, weight in weights.items())
    assert torch.equal(target.eval()(images()), vit(0).eval()(images()))


def test_models_are_named_by_their_class_and_a_number():
    target = vit(0)
    reparameterize_aux_into_target_model(target, [vit(1), vit(2)], layer_names=("attn.qkv",))
    reparameterize_aux_into_target_model(target, vit(3), layer_names=("attn.qkv", "mlp.fc1"), blocks=[1])
    named = [auxiliary.model for auxiliary in target.blocks[1].attn.qkv.auxiliaries]
    assert named == ["VisionTransformer", "VisionTransformer 2", "VisionTransformer 3"]
    remove_auxiliary(target, "VisionTransformer 2")
    reparameterize_aux_into_target_model(target, vit(4), layer_names=("attn.qkv",))
    assert target.blocks[0].attn.qkv.auxiliaries[1].model == "VisionTransformer 2"
    remove_auxiliary(target, "VisionTransformer 3")
    assert type(target.blocks[1].mlp.fc1) is nn.Linear


def test_models_that_reach_different_blocks_at_once():
    aux = {"deep": vit(1, depth=3), "shallow": vit(2, depth=1)}
    target = scaled(reparameterize_aux_into_target_model(vit(0), aux, blocks="last"))
    named = [[a.model for a in target.blocks[i].mlp.fc1.auxiliaries] for i in range(2)]
    assert named == [["deep"], ["deep", "shallow"]]
    logits = target(images())
    torch.testing.assert_close(merge_pathways(target)(images()), logits, rtol=1e-4, atol=1e-4)


def damaged_second(target, damage):
    second = vit(2)
    damage(target, second)
    return second


def hook(target, second):
    target.blocks[1].mlp.fc2.register_forward_hook(lambda *arguments: None)


def narrow(target, second):
    second.blocks[1].mlp.fc2 = nn.Linear(5, 48)


def share(target, second):
    second.blocks[1].mlp.fc2.weight = nn.Parameter(target.blocks[1].mlp.fc2.aux_weight.detach().clone())


class Own(FusedCrossModalLinear):
    pass


def subclass(target, second):
    target.blocks[1].mlp.fc2.__class__ = Own


@pytest.mark.parametrize(
    "damage, message",
    [
        (hook, "target_model: blocks.1.mlp.fc2 has forward hooks, which would be lost"),
        (narrow, r"aux_model: blocks.1.mlp.fc2 has weight shape \(48, 5\)"),
        (share, "aux_model: blocks.1.mlp.fc2: it is connected to this auxiliary weight already"),
        (subclass, "target_model: blocks.1.mlp.fc2 is a test_pairing.Own, expected a plain nn.Linear"),
    ],
)
def test_a_further_model_that_does_not_fit_leaves_everything_as_it_was(damage, message):
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    second = damaged_second(target, damage)
    with unchanged(target, second), pytest.raises(ValueError, match=f"^{message}"):
        reparameterize_aux_into_target_model(target, second)


def test_taking_out_what_has_hooks_leaves_the_model_as_it_was():
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    hook(target, None)
    with (
        unchanged(target),
        pytest.raises(ValueError, match=r"^blocks.1.mlp.fc2 has forward hooks, which would be lost"),
    ):
        remove_auxiliary(target, "VisionTransformer")


def test_a_layer_tells_what_it_is():
    target = reparameterize_aux_into_target_model(vit(0), {"audio": vit(1), "point": vit(2)})
    layer = target.blocks[0].attn.proj
    sizes = "FusedCrossModalLinear(in_features=48, out_features=48, bias=True"
    assert repr(layer) == f"{sizes}, aux_weight=[audio, point] float32 frozen, cross_modal_scale=trained)"
    quantize_aux(target)
    layer.cross_modal_scale.requires_grad_(False)
    assert repr(layer) == f"{sizes}, aux_weight=[audio, point] int8 frozen, cross_modal_scale=frozen)"
    assert copy.deepcopy(layer).auxiliaries == layer.auxiliaries
    own = FusedCrossModalLinear(3, 4, aux_weight=torch.ones(4, 3), is_aux_trainable=True)
    assert repr(own).endswith("aux_weight=[aux_weight[0]] float32 trained, cross_modal_scale=trained)")


def test_the_description_has_a_row_for_every_auxiliary_weight():
    target = scaled(
        reparameterize_aux_into_target_model(vit(0), {"audio": vit(1), "point": vit(2)}, is_aux_trainable=True)
    )
    target.blocks[0](torch.ones(1, 3, 48))
    head, rule, *rows = describe_pathways(target).splitlines()
    assert head.count("|") == rule.count("|") == 7
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[1], row[2]) for row in cells] == [
        (name, model, name) for name in fused_layers(target) for model in ("audio", "point")
    ]
    assert {row[3] for row in cells} == {"float32, trained"}
    assert [row[4] for row in cells] == [f"{scale:+.4f}, trained" for scale in cross_modal_scales(target).values()]
    assert [row[5] for row in cells] == ["yes"] * 8 + ["not yet"] * 8


class Norm(nn.Module):
    """Calls its layer, and divides by the norm of its weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x.to(self.fc.weight.dtype)) / self.fc.weight.norm()


class Asks(Norm):
    """Only asks what the weight is like."""

    def forward(self, x):
        weight = self.fc.weight
        assert weight.shape == weight.size() == (8, 8) and weight.dim() == weight.ndim == 2 and len(weight) == 8
        assert weight.is_floating_point() and weight.device.type == "cpu" and not weight.is_cuda
        return self.fc(x.to(weight.dtype))


def test_a_sample_shows_weights_that_are_read_beside_the_call():
    target, aux = nn.Sequential(Norm(), Norm()), nn.Sequential(Norm(), Norm())
    message = r"^target_model: 0.fc, 1.fc: weight is read by Norm, which calls it too: merging would change"
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux, sample=torch.ones(3, 8))
    target, aux = nn.Sequential(Asks(), Asks()), nn.Sequential(Asks(), Asks())
    reparameterize_aux_into_target_model(target, aux, sample=torch.ones(3, 8))
    assert {type(layer) for layer in fused_layers(target).values()} == {FusedCrossModalLinear}
