"""Which layers belong together, by what was said or found; further auxiliary models, and taking one out again."""

import copy
import re

import pytest
import torch
from helpers import fused_layers, images, unchanged, vit
from timm.layers import GluMlp, SwiGLUPacked
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
FUSED48 = {"one": (144, 48), "two": (48, 48), "three": (192, 48), "four": (48, 192)}
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
        (SPLIT, OTHER, "(8, 8): target q, k, v, o, auxiliary project"),
        (FUSED, SPLIT, "(24, 8): target mix_in, auxiliary none; (8, 8): target mix_out, auxiliary q, k, v, o"),
        (FUSED | {"gate": (16, 8)}, OTHER, "(16, 8): target up, gate, auxiliary expand"),
        (FUSED | {"gate": (5, 8)}, OTHER, "(5, 8): target gate, auxiliary none"),
        (FUSED, {"a": (3, 3)}, "(24, 8): target mix_in, auxiliary none; (8, 8): target mix_out, auxiliary none"),
        (FUSED, {"query_key_value": (24, 8)} | SPLIT, "(24, 8): target mix_in, auxiliary query_key_value"),
    ],
)
def test_what_is_not_clear_lists_the_candidates(shapes, aux_shapes, unclear):
    target, aux = model(**shapes), model(**aux_shapes)
    message = rf"^aux_model: body.0: it is not clear which of its layers .* layer_names; .*{re.escape(unclear)}"
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
    message = r"^aux_model: it is not known which layers of encoder.layers.0 belong to attn.norm: .*; known are those"
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux, layer_names=("attn.qkv", "attn.norm"))


@pytest.mark.parametrize("names", [("blocks", "encoder.layers"), ["blocks", "encoder.layers"]])
def test_bodies_are_named_on_each_side(names):
    target, aux = vit(), separate()
    reparameterize_aux_into_target_model(target, aux, main_body_name=names)
    assert len(fused_layers(target)) == 8


def inside(**modules):
    return nn.ModuleDict(modules)


def nested():
    """Blocks that hold sequences of equal blocks themselves."""
    blocks = vit().blocks
    for block in blocks:
        block.experts = nn.ModuleList(Block(a=(8, 8)) for _ in range(3))
    return inside(layers=blocks, head=nn.ModuleList([Block(a=(8, 8))]))


@pytest.mark.parametrize(
    "build, body",
    [
        (nested, "layers"),
        (lambda: inside(blocks=vit().blocks, layers=vit().blocks), "blocks"),
        (lambda: inside(module=vit()), "module.blocks"),
        (lambda: inside(decoder=separate(), encoder=separate()), "encoder.encoder.layers"),
        (lambda: inside(vit=vit(), decoder_layers=vit().blocks), "vit.blocks"),
        (lambda: inside(decoder=vit()), "decoder.blocks"),
        (lambda: inside(encoder=model(**FUSED48), decoder=vit()), "encoder.body"),
        (lambda: inside(model=inside(decoder=vit(), encoder=separate())), "model.encoder.encoder.layers"),
        (lambda: inside(blocks=nn.Linear(48, 48), inner=vit()), "inner.blocks"),
        (lambda: inside(inner=vit(), uneven=nn.ModuleList([Block(a=(8, 8)), Block(a=(4, 8))])), "inner.blocks"),
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
        (lambda: inside(known=vit(), unknown=model(**SPLIT)), "'known.blocks' (2 blocks), 'unknown.body' (2 blocks)"),
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
    assert all(layer.cross_modal_scale.requires_grad for layer in layers.values())

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
    target.blocks[0].attn.qkv.cross_modal_scale.requires_grad_(False)
    assert remove_auxiliary(target, "point") is target
    assert [layer.cross_modal_scale.requires_grad for layer in fused_layers(target).values()] == [False, *[True] * 7]
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
        assert (
            isinstance(weight, nn.Parameter)
            and weight.is_floating_point()
            and weight.device.type == "cpu"
            and not weight.is_cuda
        )
        return self.fc(x.to(weight.dtype))


def test_a_sample_shows_weights_that_are_read_beside_the_call():
    target, aux = nn.Sequential(Norm(), Norm()), nn.Sequential(Norm(), Norm())
    message = r"^target_model: 0.fc, 1.fc: weight is read by Norm, which also calls the layer: merging would"
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux, sample=torch.ones(3, 8))
    target, aux = nn.Sequential(Asks(), Asks()), nn.Sequential(Asks(), Asks())
    reparameterize_aux_into_target_model(target, aux, sample=torch.ones(3, 8))
    assert {type(layer) for layer in fused_layers(target).values()} == {FusedCrossModalLinear}


def grouped(rows, hidden=192):
    """Blocks named as Llama's, with so many rows of query, key and value."""
    torch.manual_seed(0)
    shapes = {f"{part}_proj": (n, 48) for part, n in zip("qkv", rows, strict=True)} | {"o_proj": (48, rows[0])}
    gated = {"gate_proj": (hidden, 48), "up_proj": (hidden, 48), "down_proj": (48, hidden)}
    blocks = [nn.ModuleDict({"self_attn": Block(**shapes), "mlp": Block(**gated)}) for _ in range(DEPTH)]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


@pytest.mark.parametrize("is_target", [False, True])
def test_rows_that_only_add_up_do_not_belong_together(is_target):
    """Six heads of queries share a key: 96 + 24 + 24 rows are not three times 48."""
    models = [vit(), grouped((96, 24, 24))][:: -1 if is_target else 1]
    name = "self_attn.v_proj" if is_target else "attn.qkv"
    message = "expected the same number of rows in each, got 96, 24, 24; no layer of this block fits"
    with unchanged(*models), pytest.raises(ValueError, match=rf"^aux_model: .*qkv.*: {message}$"):
        reparameterize_aux_into_target_model(*models, layer_names=(name,))


def test_a_gated_layer_is_not_one_without_a_gate():
    target, aux = vit(mlp_ratio=4), grouped((48, 48, 48), hidden=96)
    message = (
        r"^aux_model: layers.0.mlp.gate_proj \+ layers.0.mlp.up_proj and .*: a gated MLP and one without a gate; wh"
    )
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux)


LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("layer_names", [None, LAYERS, ("mlp.fc1",)])
def test_gates_are_compared_in_every_block_however_layers_are_named(layer_names):
    target, aux = vit(mlp_layer=GluMlp), vit(mlp_layer=GluMlp)
    aux.blocks[1].mlp.gate_last = False
    with (
        unchanged(target, aux),
        pytest.raises(ValueError, match=r"^aux_model: blocks.1.mlp.fc1 .*: the rows of the gate"),
    ):
        reparameterize_aux_into_target_model(target, aux, layer_names=layer_names)
    target, aux = vit(mlp_ratio=4), vit(mlp_layer=SwiGLUPacked, mlp_ratio=4)
    with (
        unchanged(target, aux),
        pytest.raises(ValueError, match=r"^aux_model: .*fc1: a gated MLP and one without a gate"),
    ):
        reparameterize_aux_into_target_model(target, aux, layer_names=layer_names)


def test_rows_are_compared_in_every_block():
    target, aux = vit(), grouped((48, 48, 48))
    aux["layers"][1] = grouped((96, 24, 24))["layers"][1]
    message = r"^aux_model: layers.1.self_attn.q_proj \+ .*: expected the same number of rows in each, got 96"
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux, layer_names=("attn.qkv",))


def test_a_name_that_the_target_lacks_is_the_one_named():
    target, aux = vit(), separate()
    with unchanged(target, aux), pytest.raises(ValueError, match=r"^target_model: there is no layer blocks.0.mlp.fc3$"):
        reparameterize_aux_into_target_model(target, aux, layer_names=("attn.qkv", "mlp.fc3"))


def test_the_gate_may_come_last():
    """As in timm's GluMlp, which multiplies the first rows with the activated last ones."""
    target, aux = vit(mlp_layer=GluMlp, mlp_ratio=4), grouped((48, 48, 48), hidden=96)
    reparameterize_aux_into_target_model(target, aux, sample=images())
    mlp = aux["layers"][1]["mlp"]
    expected = torch.cat([mlp.up_proj.weight, mlp.gate_proj.weight])
    assert torch.equal(target.blocks[1].mlp.fc1.aux_weight, expected)
    aux, target = vit(mlp_layer=GluMlp, mlp_ratio=4), grouped((48, 48, 48), hidden=96)
    reparameterize_aux_into_target_model(target, aux)
    mlp, weight = target["layers"][1]["mlp"], aux.blocks[1].mlp.fc1.weight
    assert torch.equal(mlp.up_proj.aux_weight, weight[:96]) and torch.equal(mlp.gate_proj.aux_weight, weight[96:])
    target, aux = vit(mlp_layer=GluMlp), vit(mlp_layer=SwiGLUPacked)
    with (
        unchanged(target, aux),
        pytest.raises(ValueError, match=r"^aux_model: .*mlp.fc1: the rows of the gate come last"),
    ):
        reparameterize_aux_into_target_model(target, aux)


def test_blocks_of_timms_eva_are_queries_keys_values_and_gate_before_what_passes():
    aux, target = vit(mlp_layer=SwiGLUPacked, mlp_ratio=4), model(1, **SPLIT)
    torch.manual_seed(0)
    attention = Block(q_proj=(48, 48), k_proj=(48, 48), v_proj=(48, 48), proj=(48, 48))
    mlp = Block(fc1_g=(96, 48), fc1_x=(96, 48), fc2=(48, 96))
    target = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": attention, "mlp": mlp})])})
    reparameterize_aux_into_target_model(target, aux, blocks="first")
    qkv, fc1 = aux.blocks[0].attn.qkv.weight, aux.blocks[0].mlp.fc1.weight
    found = torch.cat([attention.get_submodule(f"{part}_proj").aux_weight for part in "qkv"])
    assert torch.equal(found, qkv)
    assert torch.equal(torch.cat([mlp.fc1_g.aux_weight, mlp.fc1_x.aux_weight]), fc1)


class Uneven(nn.Module):
    """A layer more in every block but the first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(a=(8, 8), b=(16, 8), **({"c": (24, 8)} if i else {})) for i in range(3))


def test_every_block_is_paired_for_itself_where_names_are_unknown():
    target = reparameterize_aux_into_target_model(Uneven(), Uneven())
    assert [name for name in fused_layers(target) if name.endswith(".c")] == ["blocks.1.c", "blocks.2.c"]
    assert len(fused_layers(target)) == 8


def test_a_target_inside_ddp_is_refused(tmp_path):
    """Its reducer would not average the gradients of the scales."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        target = DistributedDataParallel(vit())
        aux = DistributedDataParallel(vit(1))
        with (
            unchanged(target, aux),
            pytest.raises(ValueError, match=r"^target_model: .*qkv is inside DistributedDataPar"),
        ):
            reparameterize_aux_into_target_model(target, aux)
        connected = DistributedDataParallel(reparameterize_aux_into_target_model(vit(), aux))
        with unchanged(connected), pytest.raises(ValueError, match=r"^module.blocks.0.* is inside DistributedDataPar"):
            remove_auxiliary(connected, "DistributedDataParallel")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("is_connected", [False, True])
def test_a_layer_that_has_another_place_too_is_refused(is_connected):
    target = reparameterize_aux_into_target_model(vit(0), vit(1)) if is_connected else vit(0)
    target.again = target.blocks[0].mlp.fc1
    aux = vit(2)
    with (
        unchanged(target, aux),
        pytest.raises(ValueError, match=r"^target_model: again is blocks.0.mlp.fc1, used twice$"),
    ):
        reparameterize_aux_into_target_model(target, aux, blocks=[0])


def test_a_connected_layer_in_two_places_loses_its_auxiliary_in_both():
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    target.again = target.blocks[0].mlp.fc1
    remove_auxiliary(target, "VisionTransformer")
    assert type(target.again) is nn.Linear and target.again is target.blocks[0].mlp.fc1


def test_models_that_are_alike_once_quantised_are_two():
    first, second = vit(1), vit(1)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter *= 2
    target = reparameterize_aux_into_target_model(vit(0), first, aux_dtype="int8")
    reparameterize_aux_into_target_model(target, second, aux_dtype="int8")
    scales = target.blocks[0].attn.qkv.aux_weight_scale
    torch.testing.assert_close(scales[1], 2 * scales[0])
    with unchanged(target), pytest.raises(ValueError, match="it is connected to this auxiliary weight already"):
        reparameterize_aux_into_target_model(target, vit(1), aux_dtype="int8")


@pytest.mark.parametrize("aux_dtype", [None, "int8"])
def test_what_stays_keeps_no_memory_of_what_was_taken_out(aux_dtype):
    target = reparameterize_aux_into_target_model(vit(0), {"a": vit(1), "b": vit(2)}, aux_dtype=aux_dtype)
    weight = remove_auxiliary(target, "a").blocks[0].attn.qkv.aux_weight
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_an_error_names_the_auxiliary_model_at_fault():
    target, aux = reparameterize_aux_into_target_model(vit(0), vit(1)), {"new": vit(2), "old": vit(1)}
    with (
        unchanged(target),
        pytest.raises(ValueError, match=r"^aux_model\['new'\] and aux_model\['old'\]: blocks.0.attn"),
    ):
        reparameterize_aux_into_target_model(target, aux)
    aux["odd"] = vit(3).to(torch.complex64)
    with unchanged(target), pytest.raises(TypeError, match=r".*aux_model\['odd'\]: blocks.0.attn.qkv: .*complex64"):
        reparameterize_aux_into_target_model(target, {"odd": aux["odd"]})


DIFFERENT = [("bfloat16", None), (None, "int8"), ("int8", None), ("int8", "int4"), ("float8_e4m3fn", "bfloat16")]


@pytest.mark.parametrize("first, second", DIFFERENT)
def test_a_further_model_is_stored_as_the_others(first, second):
    target, aux = (vit(seed, embed_dim=64, num_heads=4) for seed in range(2))
    reparameterize_aux_into_target_model(target, aux, aux_dtype=first)
    other = vit(2, embed_dim=64, num_heads=4)
    expected, got = first or "float32", second or "float32"
    message = rf"^aux_model: blocks.0.attn.qkv: aux_dtype: expected '{expected}', as .*, got '{got}'$"
    with unchanged(target, other), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, other, aux_dtype=second)
    reparameterize_aux_into_target_model(target, other, aux_dtype=first)


def test_a_further_model_of_fewer_bits_is_stored_with_those_of_more():
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    reparameterize_aux_into_target_model(target, vit(2).bfloat16())
    weight = target.blocks[0].attn.proj.aux_weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight[1].bfloat16(), vit(2).bfloat16().blocks[0].attn.proj.weight)


def test_models_without_data_are_joined_too():
    target, *others = (vit(seed).to("meta") for seed in range(3))
    for aux in others:
        reparameterize_aux_into_target_model(target, aux)
    assert target.blocks[0].attn.qkv.aux_weight.shape == (2, 144, 48)
    aux = separate()
    aux["encoder"]["layers"][0]["attention"].k_proj.to("meta")
    target = vit(0)
    with (
        unchanged(target),
        pytest.raises(ValueError, match=r"^aux_model: encoder.*k_proj \+ .* are on different devices"),
    ):
        reparameterize_aux_into_target_model(target, aux)


def test_a_failed_sample_leaves_what_was_called_as_it_was():
    target = reparameterize_aux_into_target_model(vit(0), vit(1), layer_names=("attn.qkv",))
    before = dict(fused_layers(target))
    with pytest.raises(ValueError, match=r"^sample: "):
        reparameterize_aux_into_target_model(target, vit(2), layer_names=("mlp.fc1",), sample=torch.ones(1, 3, 32, 33))
    target.norm.forward = None
    with pytest.raises(ValueError, match=r"^sample: "):
        reparameterize_aux_into_target_model(target, vit(2), layer_names=("mlp.fc1",), sample=images())
    assert fused_layers(target) == before and not any(layer.is_called for layer in before.values())


def test_an_interrupted_removal_leaves_everything_as_it_was(monkeypatch):
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    places, original = [], nn.Module.set_submodule

    def interrupted(self, place, *arguments):
        places.append(place)
        if len(places) == 3:
            raise KeyboardInterrupt
        original(self, place, *arguments)

    monkeypatch.setattr(nn.Module, "set_submodule", interrupted)
    with unchanged(target), pytest.raises(KeyboardInterrupt):
        remove_auxiliary(target, "VisionTransformer")


def test_removal_refuses_what_it_would_lose():
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    subclass(target, None)
    with (
        unchanged(target),
        pytest.raises(ValueError, match=r"^blocks.1.mlp.fc2 is a test_pairing.Own, expected a plain"),
    ):
        remove_auxiliary(target, "VisionTransformer")
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    scale = target.blocks[0].attn.qkv.cross_modal_scale
    scale.register_hook(lambda gradient: gradient)
    message = "blocks.0.attn.qkv.cross_modal_scale has gradient hooks, which would be lost"
    with unchanged(target), pytest.raises(ValueError, match=f"^{message}"):
        remove_auxiliary(target, "VisionTransformer")
    with unchanged(target), pytest.raises(ValueError, match=f"^target_model: {message}"):
        reparameterize_aux_into_target_model(target, vit(2))


def test_a_divided_model_keeps_its_auxiliary(monkeypatch):
    target = reparameterize_aux_into_target_model(vit(0), vit(1))
    monkeypatch.setattr("m2pt.pathway.is_divided", lambda *arguments: True)
    with (
        unchanged(target),
        pytest.raises(ValueError, match=r"^blocks.0.attn.qkv: divided .*: remove auxiliary models bef"),
    ):
        remove_auxiliary(target, "VisionTransformer")


def test_joined_layers_of_different_widths_are_refused():
    target, aux = model(a=(16, 8)), model(b=(8, 8), c=(8, 5))
    message = r"^aux_model: body.0.b \+ body.0.c has weight shape \[\(8, 8\), \(8, 5\)\], expected \(16, 8\)"
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux, layer_names={"a": ("b", "c")})


class Wrapper(nn.Module):
    """As peft's LoRA: beside the layer two of its own."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.down, self.up = layer, nn.Linear(8, 2), nn.Linear(2, 16)


def test_layers_inside_wrappers_of_unknown_blocks_pair_up_without_the_wrappers_own():
    target, aux = model(**FUSED), model(name="layers", **OTHER)
    for block in target["body"]:
        block.up = Wrapper(block.up)
    found = pairs(target, aux)
    assert found["up.base_layer"] == "layers.1.expand" and len(found) == 4


def test_a_layer_inside_a_wrapper_of_a_module_that_reads_weights_is_refused():
    target, aux = (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2) for _ in range(2))
    for block in target.layers:
        block.linear1 = Wrapper(block.linear1)
    with (
        unchanged(target, aux),
        pytest.raises(ValueError, match=r"^target_model: layers.0.linear1.base_layer is not call"),
    ):
        reparameterize_aux_into_target_model(target, aux, layer_names=("linear1",))


def test_a_body_without_linear_layers_is_named():
    target = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1)}) for _ in range(2))})
    aux = vit()
    with (
        unchanged(target, aux),
        pytest.raises(ValueError, match=r"^target_model: blocks.0: there are no linear layers inside"),
    ):
        reparameterize_aux_into_target_model(target, aux)


def test_a_subclass_keeps_its_class_through_a_sample():
    target = reparameterize_aux_into_target_model(vit(0), vit(1), layer_names=("mlp.fc2",))
    subclass(target, None)
    reparameterize_aux_into_target_model(target, vit(2), layer_names=("mlp.fc1",), sample=images())
    assert type(target.blocks[1].mlp.fc2) is Own
