"""Files of pathways: they make the same model again from the target and the auxiliary model, or say why not."""

import json
from pathlib import Path

import pytest
import torch
from helpers import PLACES, Wrapper, connected, fused_layers, hugging_face, images, unchanged, vit
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from m2pt import (
    describe_pathways,
    freeze_for_linear_probe,
    load_pathway,
    quantize_aux,
    reparameterize_aux_into_target_model,
    save_pathway,
)
from m2pt.pathway_files import ENTRY, frozen_entries

STORAGES = ("int8", "int4", "float8_e4m3fn", "bfloat16")


def randomised(model):
    """Scales that are not zero."""
    for layer in fused_layers(model).values():
        nn.init.normal_(layer.cross_modal_scale)
    return model


def logits(model):
    with torch.no_grad():
        output = model.eval()(images())
    return getattr(output, "logits", output)


def content_of(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}, json.loads(file.metadata()[ENTRY])


def rewrite(path, tensors, content):
    save_file(tensors, path, {ENTRY: content if isinstance(content, str) else json.dumps(content)})


def wide(seed):
    return vit(seed, embed_dim=64, num_heads=2)


def hugging_face_vit(seed):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return hugging_face("ViTForImageClassification", image_size=32, patch_size=16, **size)(seed)


def timm_of_its_size(seed):
    return vit(seed, embed_dim=32, num_heads=2, mlp_ratio=2, depth=2)


def text(seed):
    return hugging_face("GPT2Model", n_embd=32, n_layer=2, n_head=2, n_inner=64, vocab_size=11)(seed)


CASES = {
    "as it is": (vit, {"vit": vit}, {}),
    "two models": (vit, {"one": vit, "two": vit}, {}),
    "two models, int8": (wide, {"one": wide, "two": wide}, {"aux_dtype": "int8"}),
    **{storage: (wide, {"aux": wide}, {"aux_dtype": storage}) for storage in STORAGES},
    "some layers of other blocks": (vit, {"vit": vit}, {"blocks": [(0, 1)], "layer_names": ["mlp.fc1"]}),
    "rows that are joined": (timm_of_its_size, {"hf": hugging_face_vit}, {}),
    "rows that are divided": (hugging_face_vit, {"timm": timm_of_its_size}, {}),
    "transposed": (hugging_face_vit, {"gpt": text}, {"layer_names": {"mlp.fc1": "mlp.c_fc"}}),
    "trained": (vit, {"vit": vit}, {"is_aux_trainable": True}),
}


@pytest.mark.parametrize("include_base", [False, True])
@pytest.mark.parametrize("target,aux,options", CASES.values(), ids=CASES)
def test_a_pathway_comes_back_bit_for_bit(tmp_path, target, aux, options, include_base):
    models = {name: build(10 + i) for i, (name, build) in enumerate(aux.items())}
    model = randomised(reparameterize_aux_into_target_model(target(0), models, **options))
    path, is_trained = tmp_path / "pathway.safetensors", "is_aux_trainable" in options
    if is_trained:
        with torch.no_grad():
            model.blocks[0].attn.qkv.aux_weight.data = model.blocks[0].attn.qkv.aux_weight + 1
    with unchanged(model):
        save_pathway(model, path, include_base)
    other = None if is_trained else {name: build(10 + i) for i, (name, build) in enumerate(aux.items())}
    loaded = load_pathway(target(7 if include_base else 0), other, path)
    assert torch.equal(logits(loaded), logits(model))
    assert describe_pathways(loaded) == describe_pathways(model).replace("| not yet |", "| yes |")
    assert {name: layer.is_aux_trainable for name, layer in fused_layers(loaded).items()} == dict.fromkeys(
        fused_layers(model), is_trained
    )
    names = {name.rpartition(".")[2] for name in content_of(path)[0]}
    assert ("aux_weight" in names) == is_trained and ("weight" in names) == include_base
    save_pathway(loaded, tmp_path / "again.safetensors", include_base)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_model_that_was_cast_is_stored_as_it_computes(tmp_path, cast):
    model = getattr(connected(), cast)()
    save_pathway(model, tmp_path / "pathway.safetensors", include_base=True)
    loaded = load_pathway(getattr(vit(0), cast)(), vit(1), tmp_path / "pathway.safetensors")
    assert fused_layers(loaded)["blocks.0.attn.qkv"].storage == str(next(model.parameters()).dtype)[6:]
    with torch.no_grad():
        got, want = (each.eval()(images().to(next(model.parameters()).dtype)) for each in (loaded, model))
    assert torch.equal(got, want)


@pytest.mark.parametrize("aux", [vit(1), [vit(1)], {"VisionTransformer": vit(1)}], ids=["model", "list", "mapping"])
def test_auxiliary_models_are_given_as_to_surgery(tmp_path, aux):
    model = connected()
    save_pathway(model, tmp_path / "pathway.safetensors")
    assert torch.equal(logits(load_pathway(vit(0), aux, tmp_path / "pathway.safetensors")), logits(model))


def test_the_file_is_small_and_readable_by_others(tmp_path):
    path = tmp_path / "pathway.safetensors"
    save_pathway(quantize_aux(connected(), "int8"), path)
    tensors, content = content_of(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{layer}.cross_modal_scale": (1,) for layer in fused_layers(connected())
    }
    assert content["layers"]["blocks.1.mlp.fc2"] == {
        "storage": "int8",
        "auxiliaries": [["VisionTransformer", "blocks.1.mlp.fc2"]],
    }
    assert len(content["sha256"]["VisionTransformer"]) == 64 and path.stat().st_size < 2500


def with_wrapped_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(torch.compile(block, backend="eager") if i else block)
    model.get_submodule("blocks.0").attn.proj = checkpoint_wrapper(model.get_submodule("blocks.0").attn.proj)
    return model


class Holder(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, input):
        return self.module(input)


AROUND = {
    "nothing": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "an attribute of that name": Holder,
    "blocks": with_wrapped_blocks,
}


@pytest.mark.parametrize("target", AROUND.values(), ids=[f"into {name}" for name in AROUND])
@pytest.mark.parametrize("saved", AROUND.values(), ids=AROUND)
def test_wrappers_are_left_out_of_the_names(tmp_path, saved, target):
    path, expected = tmp_path / "pathway.safetensors", tmp_path / "expected.safetensors"
    save_pathway(connected(), expected, include_base=True)
    save_pathway(saved(connected()), path, include_base=True)
    assert path.read_bytes() == expected.read_bytes()
    loaded = load_pathway(target(vit(7)), vit(1), path)
    assert len(fused_layers(loaded)) == len(PLACES)
    assert torch.equal(logits(loaded), logits(connected()))


def test_the_target_may_be_inside_a_larger_model(tmp_path):
    path = tmp_path / "pathway.safetensors"
    save_pathway(nn.Sequential(connected()), path)
    model = load_pathway(nn.Sequential(vit(0)), vit(1), path)
    assert torch.equal(logits(model), logits(connected()))


def changed_weight(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[-1, -1] += 1e-6
    return model


def smaller(model):
    model.blocks[1].mlp.fc1 = nn.Linear(48, 100)
    return model


def connected_already(model):
    return reparameterize_aux_into_target_model(model, vit(3))


TARGET = vit(1)

REFUSED = {
    "another model": (vit(0), vit(2), r"^aux_model: the weights of 'VisionTransformer' differ from those in "),
    "one weight": (vit(0), changed_weight(vit(1)), r"^aux_model: the weights of 'VisionTransformer' differ"),
    "a shallow one": (vit(0), vit(1, depth=1), r"^model: blocks.1.attn.qkv: aux_model .*: there is no layer blocks.1"),
    "a shallow target": (vit(0, depth=1), vit(1), r"^model: there is no layer blocks.1.attn.qkv$"),
    "another shape": (smaller(vit(0)), vit(1), r"^model: blocks.1.mlp.fc1: aux_weight: expected shape \(100, 48\)"),
    "none": (vit(0), None, "^aux_model: expected VisionTransformer, got 0 models$"),
    "two": (vit(0), [vit(1), vit(2)], "^aux_model: expected VisionTransformer, got 2 models$"),
    "the target": (TARGET, TARGET, "^model: blocks.0.attn.qkv: aux_model: it is model's own weight$"),
    "no model": ({}, vit(1), "^model: expected a torch.nn.Module, got dict$"),
    "another name": (vit(0), {"audio": vit(1)}, "^aux_model: expected VisionTransformer, got audio$"),
    "connected already": (connected_already(vit(0)), vit(1), r"^model: blocks.0.attn.qkv is connected already: disc"),
    "a path": (vit(0), 3, "^aux_model: expected a module, a sequence or a mapping of them, got 3$"),
    "no module": (vit(0), ["audio.pth"], "^aux_model 'VisionTransformer': expected a torch.nn.Module, got str$"),
}  # fmt: skip


@pytest.mark.parametrize("target,aux,message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(tmp_path, target, aux, message):
    save_pathway(connected(), tmp_path / "pathway.safetensors")
    with unchanged(*filter(None, [target])), pytest.raises((TypeError, ValueError), match=message):
        load_pathway(target, aux, tmp_path / "pathway.safetensors")


def test_a_target_without_data_is_refused(tmp_path):
    save_pathway(connected(), tmp_path / "pathway.safetensors")
    with pytest.raises(ValueError, match=r"^model: expected one with data"):
        load_pathway(vit(0).to("meta"), vit(1), tmp_path / "pathway.safetensors")


def test_another_target_than_the_one_in_the_file_is_refused(tmp_path):
    path = tmp_path / "pathway.safetensors"
    save_pathway(connected(), path, include_base=True)
    target = vit(0, num_classes=7)
    with (
        unchanged(target),
        pytest.raises(ValueError, match=r"^model: head.*: expected shape \(5,.* got \(7"),
    ):
        load_pathway(target, vit(1), path)
    target = vit(0, class_token=False, global_pool="avg")
    message = r"^model: cls_token, fc_norm.bias, .*: only the model has it, or only "
    with unchanged(target), pytest.raises(ValueError, match=message):
        load_pathway(target, vit(1), path)


def damaged(change):
    def damage(path):
        tensors, content = content_of(path)
        rewrite(path, tensors, change(tensors, content) or content)

    return damage


DAMAGED = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "no pathway": lambda path: save_file({"x": torch.ones(1)}, path),
    "no JSON": damaged(lambda tensors, content: "{"),
    "a list": damaged(lambda tensors, content: "[]"),
    "a later version": damaged(lambda tensors, content: content | {"version": 2}),
    "no layers": damaged(lambda tensors, content: content | {"layers": {}}),
    "layers that are none": damaged(lambda tensors, content: content | {"layers": 3}),
    "a scale is missing": damaged(lambda tensors, content: tensors.pop("blocks.1.mlp.fc1.cross_modal_scale") and None),
    "two scales": damaged(
        lambda tensors, content: tensors.update({"blocks.1.mlp.fc1.cross_modal_scale": torch.ones(2)})),
    "no finite scale": damaged(
        lambda tensors, content: tensors.update({"blocks.1.mlp.fc1.cross_modal_scale": torch.tensor([torch.nan])})),
    "a complex scale": damaged(
        lambda tensors, content: tensors.update({"blocks.1.mlp.fc1.cross_modal_scale": torch.ones(1) * 1j})),
    "weights of two": damaged(
        lambda tensors, content: tensors.update({"blocks.1.mlp.fc1.aux_weight": torch.ones(2, 192, 48)})),
    "brackets without end": damaged(lambda tensors, content: "[" * 10**5),
    "pairs of layers": damaged(lambda tensors, content: content | {"layers": [*content["layers"].items()]}),
    "pairs of digests": damaged(lambda tensors, content: content | {"sha256": [*content["sha256"].items()]}),
    "a number as digest": damaged(lambda tensors, content: content | {"sha256": {"VisionTransformer": 3}}),
    "a layer without a name": damaged(lambda tensors, content: content["layers"].update({"": {}})),
    "another storage": damaged(
        lambda tensors, content: content["layers"]["blocks.1.mlp.fc1"].update({"storage": "qint8"})),
    "no digest": damaged(lambda tensors, content: content | {"sha256": {}}),
    "a digest of another model": damaged(lambda tensors, content: content | {"sha256": {"audio": "0" * 64}}),
    "an auxiliary of three": damaged(
        lambda tensors, content: content["layers"]["blocks.1.mlp.fc1"].update({"auxiliaries": [["a", "b", "c"]]})),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "pathway.safetensors"
    save_pathway(connected(), path)
    damage(path)
    target = vit(0)
    with unchanged(target), pytest.raises(ValueError, match=f"^{path}: "):
        load_pathway(target, vit(1), path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors: no such file"):
        load_pathway(vit(0), vit(1), tmp_path / "nothing.safetensors")
    with pytest.raises(TypeError, match=r"^path: expected a path, got 3"):
        load_pathway(vit(0), vit(1), 3)


def own_layer():
    model = connected()
    layer = model.blocks[0].attn.qkv
    layer.auxiliaries = tuple(auxiliary._replace(layers="") for auxiliary in layer.auxiliaries)
    return model


def trained_and_quantised():
    return quantize_aux(freeze_for_linear_probe(connected(is_aux_trainable=True)), "int8")


def pruned():
    model = connected()
    prune.l1_unstructured(model.blocks[0].mlp.fc1, "aux_weight", 0.5)
    return model


def not_finite():
    model = connected()
    with torch.no_grad():
        model.blocks[0].attn.qkv.cross_modal_scale[0] = torch.nan
    return model


def with_two_of_one_name():
    model = nn.Module()
    model.module, model.blocks = connected(), connected().blocks
    return model


UNSAVED = {
    "not finite": (not_finite, r"^blocks.0.attn.qkv.cross_modal_scale: expected finite scales, got \[nan\]"),
    "two of one name": (with_two_of_one_name, r"^model: blocks.0.attn.qkv is there twice, with and without wrappers"),
    "pruned": (pruned, r"^blocks.0.mlp.fc1.aux_weight: it is computed from other tensors"),
    "trained and quantised": (trained_and_quantised, "aux_weight was trained and then quantised: save the whole state"),
    "no pathway": (vit, "^model: there is no FusedCrossModalLinear"),
    "not by surgery": (own_layer, "^blocks.0.attn.qkv: it is not known where its auxiliary weight came from"),
    "no data": (lambda: connected().to("meta"), r"^model: expected one with data"),
}


@pytest.mark.parametrize("build,message", UNSAVED.values(), ids=UNSAVED)
def test_what_cannot_be_saved_leaves_no_file(tmp_path, build, message):
    with pytest.raises(ValueError, match=message):
        save_pathway(build(), tmp_path / "pathway.safetensors")
    with pytest.raises(ValueError, match=r"expected a name ending in .safetensors"):
        save_pathway(connected(), tmp_path / "pathway.pth")
    assert not list(Path(tmp_path).iterdir())


def test_a_loaded_model_is_watched_and_trained_like_a_connected_one(tmp_path):
    save_pathway(reparameterize_aux_into_target_model(vit(0), vit(1)), tmp_path / "pathway.safetensors")
    model = load_pathway(vit(0), vit(1), tmp_path / "pathway.safetensors")
    for layer in fused_layers(model).values():
        layer.cross_modal_scale.requires_grad_(False)
    with pytest.warns(UserWarning, match="cross_modal_scale is zero and frozen"):
        model.train()(images())


def test_weights_that_were_trained_are_in_the_file_even_if_they_are_frozen_now(tmp_path):
    model = freeze_for_linear_probe(connected(is_aux_trainable=True))
    save_pathway(model, tmp_path / "pathway.safetensors")
    assert torch.equal(logits(load_pathway(vit(0), None, tmp_path / "pathway.safetensors")), logits(model))


def test_quantised_weights_with_the_same_codes_and_other_scales_are_other_weights(tmp_path):
    save_pathway(quantize_aux(connected(), "int8"), tmp_path / "pathway.safetensors")
    with pytest.raises(ValueError, match=r"^aux_model: the weights of 'VisionTransformer' differ"):
        load_pathway(vit(0), doubled(vit(1)), tmp_path / "pathway.safetensors")


def doubled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    return model


def wrapped(model):
    for name in PLACES[::3]:
        model.set_submodule(name, Wrapper(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("saved", [wrapped, lambda model: model], ids=["wrapped", "bare"])
@pytest.mark.parametrize("target", [wrapped, lambda model: model], ids=["into wrapped", "into bare"])
def test_wrappers_of_layers_are_left_out_of_the_names(tmp_path, saved, target):
    save_pathway(saved(connected()), tmp_path / "pathway.safetensors")
    model = load_pathway(target(vit(0)), vit(1), tmp_path / "pathway.safetensors")
    assert torch.equal(logits(model), logits(connected()))


def test_a_layer_that_the_target_uses_twice_is_refused(tmp_path):
    save_pathway(connected(), tmp_path / "pathway.safetensors")
    target = vit(0)
    target.blocks[1].attn.proj = target.blocks[0].attn.proj
    with (
        unchanged(target),
        pytest.raises(ValueError, match=r"^model: blocks.1.attn.proj is blocks.0.attn.proj, used twice"),
    ):
        load_pathway(target, vit(1), tmp_path / "pathway.safetensors")


@pytest.mark.parametrize("storage", [None, "int8"])
def test_frozen_entries_are_those_of_the_state_dict(storage):
    model = connected()
    if storage:
        quantize_aux(model, storage)
    kinds = ("aux_weight", "aux_weight_scale")
    assert frozen_entries(model) == {name for name in model.state_dict() if name.rpartition(".")[2] in kinds} != set()
    assert frozen_entries(connected(is_aux_trainable=True)) == frozen_entries(vit(0)) == set()


def test_a_layer_that_is_compiled_by_itself_is_saved_and_refused_as_a_target(tmp_path):
    model = connected()
    model.blocks[0].attn.qkv = torch.compile(model.blocks[0].attn.qkv, backend="eager")
    save_pathway(model, tmp_path / "pathway.safetensors", include_base=True)
    assert torch.equal(logits(load_pathway(vit(7), vit(1), tmp_path / "pathway.safetensors")), logits(connected()))
    target = vit(0)
    target.blocks[0].attn.qkv = torch.compile(target.blocks[0].attn.qkv, backend="eager")
    message = r"^model: blocks.0.attn.qkv._orig_mod is compiled by itself, which keeps the old layer: compile after"
    with unchanged(target), pytest.raises(ValueError, match=message):
        load_pathway(target, vit(1), tmp_path / "pathway.safetensors")


class Stateful(nn.Module):
    """Has state that is no tensor, and a buffer that cannot be overwritten."""

    def __init__(self, model, is_expanded=False):
        super().__init__()
        self.model = model
        self.register_buffer("buffer", torch.zeros(1).expand(3) if is_expanded else torch.zeros(3))

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        raise NotImplementedError

    def forward(self, input):
        return self.model(input)


def test_state_that_is_no_tensor_is_left_alone(tmp_path):
    save_pathway(Stateful(connected()), tmp_path / "pathway.safetensors", include_base=True)
    loaded = load_pathway(Stateful(vit(7)), vit(1), tmp_path / "pathway.safetensors")
    assert torch.equal(logits(loaded), logits(connected()))


def test_a_target_that_cannot_take_all_entries_is_as_it_was(tmp_path):
    save_pathway(Stateful(connected()), tmp_path / "pathway.safetensors", include_base=True)
    target = Stateful(vit(7), is_expanded=True)
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="buffer"):
        load_pathway(target, vit(1), tmp_path / "pathway.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in target.model.state_dict().items())
    assert not fused_layers(target)


def test_scales_beyond_the_range_of_the_target_are_refused(tmp_path):
    path = tmp_path / "pathway.safetensors"
    save_pathway(connected(), path)
    tensors, content = content_of(path)
    tensors["blocks.0.attn.qkv.cross_modal_scale"] = torch.tensor([1e300], dtype=torch.float64)
    rewrite(path, tensors, content)
    with pytest.raises(ValueError, match=r"^model: blocks.0.attn.qkv: cross_modal_scale: the file's are beyond"):
        load_pathway(vit(0), vit(1), path)


def test_auxiliary_weights_of_any_strides_have_the_same_digest(tmp_path):
    save_pathway(connected(), tmp_path / "pathway.safetensors")
    aux = vit(1)
    layer = aux.blocks[0].attn.qkv
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    loaded = load_pathway(vit(0), aux, tmp_path / "pathway.safetensors")
    assert not fused_layers(loaded)["blocks.0.attn.qkv"].aux_weight.is_contiguous()
    assert torch.equal(logits(loaded), logits(connected()))
