"""Connecting two timm ViTs, training what should be trained, and folding the connection away."""

import contextlib
import copy
import re
from contextlib import contextmanager
from functools import partial

import pytest
import timm
import torch
from helpers import LAYERS, PLACES, SIZE, Readers, X, connected, fused_layers, images, unchanged, vit
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2
from torchvision.models.video import SwinTransformer3d

from m2pt import (
    FusedCrossModalLinear,
    cross_modal_scales,
    freeze_for_linear_probe,
    merge_pathways,
    quantize_aux,
    reparameterize_aux_into_target_model,
    scale_table,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On models this small, several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def published_forward(self, input):
    return F.linear(input, self.weight + self.cross_modal_scale * self.aux_weight, self.bias)


@pytest.fixture
def published(monkeypatch):
    """Switches every fused layer to the published formulation."""
    return lambda: monkeypatch.setattr(FusedCrossModalLinear, "forward", published_forward)


def test_demo_of_the_paper_runs_with_only_the_import_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **SIZE))
    for name in ("Image_ViT_B16.pth", "Audio_ViT_B16.pth"):
        torch.save(timm.create_model("vit_base_patch16_224").state_dict(), name)

    model = timm.create_model("vit_base_patch16_224", pretrained=False)
    aux_model = timm.create_model("vit_base_patch16_224", pretrained=False)
    pretrained_state_dict = torch.load("Image_ViT_B16.pth")
    aux_state_dict = torch.load("Audio_ViT_B16.pth")
    model.load_state_dict(pretrained_state_dict, strict=True)
    aux_model.load_state_dict(aux_state_dict, strict=True)
    reparameterize_aux_into_target_model(model, aux_model, layer_names=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))

    layers = fused_layers(model)
    assert list(layers) == PLACES
    for name, layer in layers.items():
        assert torch.equal(layer.weight, pretrained_state_dict[f"{name}.weight"])
        assert torch.equal(layer.aux_weight, aux_state_dict[f"{name}.weight"])


def test_stock_vit_base():
    with torch.device("meta"):
        target, aux = timm.create_model("vit_base_patch16_224"), timm.create_model("vit_base_patch16_224")
    layers = fused_layers(reparameterize_aux_into_target_model(target, aux))
    assert list(layers) == [f"blocks.{block}.{layer}" for block in range(12) for layer in LAYERS]


@pytest.mark.parametrize("layer_names", [LAYERS, ("attn.proj",), ["mlp.fc2", "attn.qkv"]])
def test_only_the_named_layers_are_replaced(layer_names):
    target, aux = vit(0), vit(1)
    target.blocks[0].requires_grad_(False)
    plain, weights = dict(target.named_modules()), dict(target.named_parameters())
    logits = target(images())
    with unchanged(aux):
        assert reparameterize_aux_into_target_model(target, aux, layer_names) is target
    layers = fused_layers(target)
    assert set(layers) == {f"blocks.{block}.{layer}" for block in range(2) for layer in layer_names}
    assert all(module is plain[name] for name, module in target.named_modules() if name not in layers)
    assert all(target.get_parameter(name) is weight for name, weight in weights.items())
    assert all(weight.requires_grad != name.startswith("blocks.0.") for name, weight in weights.items())
    for name, layer in layers.items():
        assert layer.aux_weight.data_ptr() == aux.get_submodule(name).weight.data_ptr()
        assert not layer.aux_weight.requires_grad
    assert torch.equal(target(images()), logits)


def test_published_checkpoint_loads_strictly(published):
    source, model = connected(), reparameterize_aux_into_target_model(vit(3), vit(4))
    weights = vit(0).state_dict()
    aux_weights = vit(1).state_dict()
    for name, scale in cross_modal_scales(source).items():
        weights[f"{name}.cross_modal_scale"] = torch.tensor([scale])
        weights[f"{name}.aux_weight"] = aux_weights[f"{name}.weight"]
    model.load_state_dict(weights, strict=True)
    logits = model(images())
    published()
    torch.testing.assert_close(logits, source(images()))


@pytest.mark.parametrize("main_body_name", ["blocks", "encoder.layers"])
def test_body_of_another_name_and_kind(main_body_name):
    def model():
        body = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(3, 3)}) for _ in range(2))
        root = nn.Module()
        for name in reversed(main_body_name.split(".")):
            root.add_module(name, body)
            body, root = root, nn.Module()
        return body

    target = reparameterize_aux_into_target_model(model(), model(), ("fc",), main_body_name, True)
    assert list(fused_layers(target)) == [f"{main_body_name}.0.fc", f"{main_body_name}.1.fc"]
    assert all(layer.aux_weight.requires_grad for layer in fused_layers(target).values())


LAST = "blocks.1.mlp.fc2"


def put(module, name=LAST):
    return lambda model: model.set_submodule(name, module)


def drop_last_layer(model):
    del model.blocks[1].mlp.fc2


def drop_last_mlp(model):
    del model.blocks[1].mlp


def drop_last_block(model):
    model.blocks = model.blocks[:-1]


def drop_body(model):
    del model.blocks


def empty_body(model):
    model.blocks = nn.Sequential()


def connect(model):
    reparameterize_aux_into_target_model(model, vit(2))


def connect_last_layer(model):
    reparameterize_aux_into_target_model(model.blocks[1], vit(2).blocks[1], ("fc2",), "mlp")


def connect_last_block(model):
    part = nn.ModuleDict({"blocks": model.blocks[1:]})
    reparameterize_aux_into_target_model(part, nn.ModuleDict({"blocks": vit(2).blocks[1:]}))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def hook_last_layer(model):
    model.get_submodule(LAST).register_forward_hook(lambda module, args, output: 2 * output)


def patch_last_layer(model):
    model.get_submodule(LAST).forward = torch.sin


def prune_last_bias(model):
    prune.l1_unstructured(model.get_submodule(LAST), "bias", 1)


def use_block_twice(model):
    model.blocks[1] = model.blocks[0]


def parametrize_last_layer(model):
    nn.utils.parametrizations.weight_norm(model.get_submodule(LAST))


@pytest.mark.parametrize(
    "broken, damage, message",
    [
        ("target", drop_last_block, "aux_model: expected 1 blocks in 'blocks' .*got 2"),
        ("aux", drop_last_block, "aux_model: expected 2 blocks in 'blocks' .*got 1"),
        ("target", drop_last_layer, f"target_model: .*{LAST}"),
        ("aux", drop_last_layer, f"aux_model: .*{LAST}"),
        ("target", drop_last_mlp, "target_model: there is no layer blocks.1.mlp.fc1"),
        ("aux", drop_last_mlp, "aux_model: there is no layer blocks.1.mlp.fc1"),
        ("target", drop_body, "target_model: VisionTransformer has no sequence of equal blocks"),
        ("aux", drop_body, "aux_model: VisionTransformer has no sequence of equal blocks"),
        ("target", empty_body, "target_model: VisionTransformer has no sequence of equal blocks"),
        ("aux", empty_body, "aux_model: VisionTransformer has no sequence of equal blocks"),
        ("target", put(nn.Identity(), "blocks"), "target_model: VisionTransformer has no sequence of equal blocks"),
        ("aux", put(nn.Identity(), "blocks"), "aux_model: VisionTransformer has no sequence of equal blocks"),
        ("target", put(nn.Linear(192, 47)), rf"aux_model: {LAST} .*\(48, 192\).*\(47, 192\)"),
        ("aux", put(nn.Linear(1, 48)), rf"aux_model: {LAST} .*\(48, 1\).*\(48, 192\)"),
        (
            "target",
            put(nn.Identity()),
            f"target_model: {LAST} is a torch.nn.modules.linear.Identity, expected a plain nn.Linear",
        ),
        ("aux", put(nn.Conv2d(192, 48, 1)), f"aux_model: {LAST} is a torch.nn.modules.conv.Conv2d, expected"),
        ("aux", connect, "aux_model: blocks.0.attn.qkv is connected"),
        ("aux", connect_last_block, "aux_model: blocks.1.attn.qkv is connected"),
        ("target", put(Scaled(192, 48)), f"target_model: {LAST} is a test_pathway.Scaled, expected"),
        ("aux", put(Scaled(192, 48)), f"aux_model: {LAST} is a test_pathway.Scaled, expected"),
        ("target", hook_last_layer, f"target_model: {LAST} has forward hooks, which would be lost"),
        ("aux", hook_last_layer, f"aux_model: {LAST} has forward hooks, which may change what it computes"),
        (
            "target",
            patch_last_layer,
            f"target_model: {LAST} is a torch.nn.modules.linear.Linear with a forward, .*, expected",
        ),
        (
            "target",
            prune_last_bias,
            f"target_model: {LAST} is a torch.nn.modules.linear.Linear with a forward, .*, expected",
        ),
        ("target", use_block_twice, "target_model: blocks.1.attn.qkv is blocks.0.attn.qkv, used twice"),
        (
            "target",
            parametrize_last_layer,
            f"target_model: {LAST} is a torch.nn.utils.parametrize.ParametrizedLinear, expected",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_and_left_as_they_were(broken, damage, message):
    models = {"target": vit(0), "aux": vit(1)}
    damage(models[broken])
    for layer_names in (None, LAYERS):
        with unchanged(*models.values()), pytest.raises(ValueError, match=f"^{message}"):
            reparameterize_aux_into_target_model(*models.values(), layer_names)


def torch_encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1)


def swin(block=SwinTransformerBlock):
    return SwinTransformer([4, 4], 32, [1, 1], [2, 2], [4, 4], num_classes=5, block=block)


def video_swin():
    return SwinTransformer3d([2, 4, 4], 32, [1, 1], [2, 2], [2, 4, 4], num_classes=5)


SWIN = "features.1", ("attn.qkv", "attn.proj")


@pytest.mark.parametrize(
    "build, body, layers, reader",
    [
        (torch_encoder, "layers", ("self_attn.out_proj",), "MultiheadAttention"),
        (torch_encoder, "layers", ("linear1", "linear2"), "TransformerEncoderLayer"),
        (swin, *SWIN, "ShiftedWindowAttention"),
        (partial(swin, SwinTransformerBlockV2), *SWIN, "ShiftedWindowAttentionV2"),
        (video_swin, "features.0", SWIN[1], "ShiftedWindowAttention3d"),
    ],
)
def test_layers_that_are_known_to_be_read_without_a_call_are_refused(build, body, layers, reader):
    for layer in layers:
        target, aux = build(), build()
        message = rf"^target_model: {body}.0.{layer} is not called by its {reader}, which reads"
        with unchanged(target, aux), pytest.raises(ValueError, match=message):
            reparameterize_aux_into_target_model(target, aux, (layer,), body)


PLAIN_SIZE = {"img_size": 32, "num_classes": 5}
Q_BIAS = {
    **{
        name: ("blocks", partial(timm.create_model, name, depth=1, embed_dim=48, num_heads=3, **PLAIN_SIZE))
        for name in ("beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224")
    },
    "swinv2_tiny_window8_256": (
        "layers.0.blocks",
        partial(
            timm.create_model,
            "swinv2_tiny_window8_256",
            depths=(1, 1),
            embed_dim=24,
            num_heads=(2, 2),
            window_size=4,
            **PLAIN_SIZE,
        ),
    ),
}


@pytest.mark.parametrize("body, build", Q_BIAS.values(), ids=Q_BIAS.keys())
def test_attention_with_a_bias_of_its_own_for_queries_reads_qkv_and_calls_proj(body, build):
    target, aux = build().eval(), build()
    with unchanged(target, aux), pytest.raises(ValueError, match=rf"^target_model: {body}.0.attn.qkv is not called"):
        reparameterize_aux_into_target_model(target, aux, ("attn.proj", "attn.qkv"), body)
    reparameterize_aux_into_target_model(target, aux, ("attn.proj",), body, sample=images())
    (layer,) = fused_layers(target).values()
    for parameter in target.parameters():
        nn.init.normal_(parameter, std=0.1)
    logits = target(images())
    logits.square().sum().backward()
    assert layer.cross_modal_scale.grad.item() != 0
    torch.testing.assert_close(merge_pathways(target)(images()), logits)
    target.get_submodule(body)[0].attn.qkv_bias_separate = True
    reparameterize_aux_into_target_model(target, aux, ("attn.proj", "attn.qkv"), body, sample=images())


class SelfAttention(nn.Module):
    """As transformers 4 has VideoMAE's."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(8)) for _ in range(2))


@pytest.mark.parametrize("layer", ["query", "key", "value"])
def test_separate_projections_beside_a_bias_for_queries_are_read(layer):
    target, aux = (nn.Sequential(nn.ModuleDict({"attention": SelfAttention()})) for _ in range(2))
    message = rf"^target_model: 0.attention.{layer} is not called by its SelfAttention, which reads its weight"
    with unchanged(target, aux), pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux, (f"attention.{layer}",), "")


READ = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj")


@contextmanager
def untouched(*models):
    """`unchanged`, random numbers included."""
    before = torch.get_rng_state()
    with unchanged(*models):
        yield
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(model._forward_hooks for model in models)


@pytest.mark.parametrize("layers", [READ, ("fc", "attn.v_proj")])
def test_a_sample_shows_layers_that_are_read_without_a_call(layers):
    target, aux = Readers(0), Readers(1)
    target.blocks[0].eval()
    names = ", ".join(f"blocks.{block}.{layer}" for block in range(2) for layer in layers if layer != "fc")
    with untouched(target, aux), pytest.raises(ValueError, match=f"^target_model: {names}: not called by Attention,"):
        reparameterize_aux_into_target_model(target, aux, layers, sample=X)


@pytest.mark.parametrize("sample", [X, (X, 2.0), {"x": X, "scale": 2.0}], ids=["tensor", "arguments", "keywords"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_sample_proves_that_layers_are_called(sample, is_compiled):
    target = Readers(0)
    target.blocks[0].eval()
    if is_compiled:
        target.compile(backend="eager", fullgraph=True)
    aux, others = Readers(1), [target.norm, target.blocks[0].attn, target.blocks[1].attn]
    with untouched(aux, *others):
        reparameterize_aux_into_target_model(target, aux, ("fc",), sample=sample)
    assert list(fused_layers(target)) == ["blocks.0.fc", "blocks.1.fc"]
    assert [module.training for module in fused_layers(target).values()] == [False, True]


@pytest.mark.parametrize("layers", [("fc",), ("fc", "attn.v_proj")])
def test_the_pass_with_a_sample_changes_no_buffer_and_no_input(layers):
    """Also where the target writes to both, and where it is refused afterwards."""

    def writes(module, arguments):
        arguments[0].zero_()
        module.count += 1
        module.mean = module.mean + 1
        module.first = torch.ones(1)

    target, aux, sample = Readers(0), Readers(1), X.clone()
    target.register_buffer("count", torch.zeros(2))
    target.register_buffer("mean", torch.zeros(3))
    target.register_buffer("first", None)
    before = dict(target.named_buffers())
    target.register_forward_pre_hook(writes)
    with contextlib.nullcontext() if layers == ("fc",) else pytest.raises(ValueError, match="not called"):
        reparameterize_aux_into_target_model(target, aux, layers, sample=sample)
    assert torch.equal(sample, X)
    after = dict(target.named_buffers())
    assert after.keys() == before.keys() and all(after[name] is buffer for name, buffer in before.items())
    assert not target.count.any() and not target.mean.any() and target.first is None


@pytest.mark.parametrize(
    "add",
    [lambda layer: layer.register_buffer("seen", torch.zeros(1)), lambda layer: layer.add_module("extra", nn.ReLU())],
)
def test_a_layer_to_which_something_was_added_is_refused(add):
    """It would be lost."""
    target = vit()
    add(target.blocks[1].mlp.fc1)
    with (
        unchanged(target),
        pytest.raises(
            ValueError,
            match=r"^target_model: blocks.1.mlp.fc1 is a torch.nn.modules.linear.Linear with a .*, expected a plain",
        ),
    ):
        reparameterize_aux_into_target_model(target, vit(1))


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "hook, sample, error, message",
    [
        (None, X[0, 0, :5], ValueError, r"sample: Readers raised ValueError\(.*\(5,\)"),
        (None, {"y": X}, ValueError, r"sample: Readers raised TypeError\(.*'y'"),
        (None, [X], TypeError, "sample: expected a tensor, a tuple .* or a mapping .*, got list"),
        (None, "x", TypeError, "sample: expected .*, got str"),
        (interrupt, X, KeyboardInterrupt, ""),
    ],
)
def test_a_sample_that_the_target_does_not_take_leaves_it_as_it_was(hook, sample, error, message):
    target, aux = Readers(0), Readers(1)
    if hook:
        target.norm.register_forward_hook(hook)
    with untouched(target, aux), pytest.raises(error, match=f"^{message}"):
        reparameterize_aux_into_target_model(target, aux, ("fc",), sample=sample)


def test_a_model_is_no_auxiliary_of_its_own():
    model = vit()
    with unchanged(model), pytest.raises(ValueError, match=r"^aux_model: blocks.0.attn.qkv is target_model's own"):
        reparameterize_aux_into_target_model(model, model)


def test_an_auxiliary_model_without_data_is_refused():
    target = vit()
    with unchanged(target), pytest.raises(ValueError, match=r"^aux_model: blocks.0.attn.qkv: .*meta device"):
        reparameterize_aux_into_target_model(target, vit(1).to("meta"))


@pytest.mark.parametrize("layer_names", ["mlp.fc1", "", (), [], {}, ("mlp.fc1", "mlp.fc2", "mlp.fc1")])
def test_bad_layer_names_are_refused(layer_names):
    target, aux = vit(0), vit(1)
    with unchanged(target, aux), pytest.raises(ValueError, match=f"^layer_names: .*{re.escape(repr(layer_names))}$"):
        reparameterize_aux_into_target_model(target, aux, layer_names)


def test_unknown_body_name_is_refused():
    target, aux = vit(0), vit(1)
    with unchanged(target, aux), pytest.raises(ValueError, match=r"^target_model: .*'encoder\.layers'"):
        reparameterize_aux_into_target_model(target, aux, main_body_name="encoder.layers")


OPTIONS = [{}, {"qkv_bias": False}, {"proj_bias": False}, {"qk_norm": True}, {"init_values": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_are_those_of_the_published_formulation(published, options):
    model = connected(**options)
    logits = model(images())
    published()
    torch.testing.assert_close(logits, model(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merged_model_is_a_plain_timm_model_with_the_same_logits(options, dtype):
    model = connected(dtype, **options)
    logits = model(images(dtype))
    assert merge_pathways(model) is model
    assert all(type(model.get_submodule(place)) is nn.Linear for place in PLACES)
    plain = vit(5, **options).to(dtype)
    plain.load_state_dict(model.state_dict(), strict=True)
    for merged in (model, plain):
        torch.testing.assert_close(merged(images(dtype)), logits)


def test_merge_sums_in_float32():
    model = connected(torch.bfloat16)
    parts = {
        name: (layer.weight.double(), layer.cross_modal_scale.double() * layer.aux_weight.double())
        for name, layer in fused_layers(model).items()
    }
    merge_pathways(model)
    for name, (weight, addend) in parts.items():
        two_roundings = 2**-23 * (weight.abs() + addend.abs())
        merged = model.get_submodule(name).weight
        assert merged.dtype == torch.bfloat16
        assert (merged >= (weight + addend - two_roundings).bfloat16()).all()
        assert (merged <= (weight + addend + two_roundings).bfloat16()).all()


@pytest.mark.parametrize("training", [True, False])
def test_merge_keeps_flags_and_everything_else(training):
    model = connected().train(training)
    frozen = {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "norm.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    kept = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] not in PLACES}
    merge_pathways(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert all(model.get_parameter(name) is parameter for name, parameter in kept.items())
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameter", ["weight", "aux_weight", "cross_modal_scale"])
def test_merge_refuses_what_is_not_finite_and_leaves_the_model_as_it_was(parameter, value):
    model = connected()
    with torch.no_grad():
        model.get_parameter(f"{LAST}.{parameter}").flatten()[-1] = value
    with unchanged(model), pytest.raises(ValueError, match=f"^{LAST}: .*NaN or infinite"):
        merge_pathways(model)


def test_merged_model_can_be_connected_again():
    model = reparameterize_aux_into_target_model(merge_pathways(connected()), vit(2))
    assert list(fused_layers(model)) == PLACES


def test_cross_modal_scales_and_their_table():
    model = reparameterize_aux_into_target_model(vit(0), vit(1), ("attn.qkv", "mlp.fc2"))
    scales = {
        "blocks.0.attn.qkv": 0.5,
        "blocks.0.mlp.fc2": -0.125,
        "blocks.1.attn.qkv": 0.0,
        "blocks.1.mlp.fc2": 12.03125,
    }
    for name, scale in scales.items():
        nn.init.constant_(model.get_parameter(f"{name}.cross_modal_scale"), scale)
    assert cross_modal_scales(model) == scales
    assert scale_table(model).splitlines() == [
        "| block | attn.qkv | mlp.fc2 |",
        "|---|---|---|",
        "| blocks.0 | +0.5000 | -0.1250 |",
        "| blocks.1 | +0.0000 | +12.0312 |",
    ]


def test_scale_table_leaves_cells_of_missing_layers_empty():
    model = connected()
    merge_pathways(model.blocks[0].mlp)
    header, _, first, second = (line.split("|")[1:-1] for line in scale_table(model).splitlines())
    assert [name.strip() for name in header].index("mlp.fc1") == [cell.strip() for cell in first].index("")
    assert "" not in [cell.strip() for cell in second]


def train(model, steps, **options):
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images()), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("is_aux_trainable", [True, False])
def test_linear_probe_trains_exactly_the_head_and_the_scales(is_aux_trainable):
    model = connected(is_aux_trainable=is_aux_trainable)
    model.norm.weight.requires_grad_(False)
    assert freeze_for_linear_probe(model) is model
    trained = {"head.weight", "head.bias"} | {f"{place}.cross_modal_scale" for place in PLACES}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, steps=1, lr=0.01)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == trained


def test_scale_table_of_names_with_numbers_in_words_and_at_the_end():
    target, aux = (VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5) for _ in range(2))
    layers = ("mlp.0", "mlp.3")
    reparameterize_aux_into_target_model(target, [aux, copy.deepcopy(aux)], layers, "encoder.layers", sample=images())
    block, *rows = (line.split("|")[1:-1] for line in scale_table(target).splitlines())
    assert [cell.strip() for cell in block] == ["block", "mlp.0[0]", "mlp.0[1]", "mlp.3[0]", "mlp.3[1]"]
    assert [row[0].strip() for row in rows[1:]] == [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    alone = nn.Sequential(nn.ReLU(), FusedCrossModalLinear(2, 2, aux_weight=torch.ones(2, 2)))
    assert scale_table(alone).splitlines()[0] == "| block | 1 |"


def test_linear_probe_of_a_head_with_another_name():
    model = freeze_for_linear_probe(connected(), head_name="blocks.1.norm2")
    assert model.blocks[1].norm2.weight.requires_grad
    assert not any(p.requires_grad for p in model.head.parameters())


@pytest.mark.parametrize("head_name", ["classifier", "fc_norm", ""])
def test_linear_probe_without_such_a_head_is_refused(head_name):
    model = connected()
    with unchanged(model), pytest.raises(ValueError, match=f"^head_name: .*'{head_name}'"):
        freeze_for_linear_probe(model, head_name)


def test_a_layer_used_twice_is_merged_once():
    model = connected()
    model.blocks[1] = model.blocks[0]
    x = images()
    expected = model(x)
    merge_pathways(model)
    assert fused_layers(model) == {}
    assert model.blocks[1].mlp.fc1 is model.blocks[0].mlp.fc1
    torch.testing.assert_close(model(x), expected)


def test_training_reduces_the_loss_moves_the_scales_and_leaves_the_auxiliary_model():
    target, aux = vit(0), vit(1)
    model = reparameterize_aux_into_target_model(target, aux)
    with unchanged(aux):
        losses = train(model, steps=8, lr=0.003)
    assert losses[-1] < 0.5 * losses[0]
    assert min(map(abs, cross_modal_scales(model).values())) > 0.001
    assert all(torch.equal(model.get_parameter(f"{p}.aux_weight"), aux.get_submodule(p).weight) for p in PLACES)


def gradients(model, x):
    model.zero_grad()
    logits = model(x)
    F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, torch.arange(4)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("is_aux_trainable", [True, False])
def test_gradients_of_a_deep_model_are_those_of_the_published_formulation(published, is_aux_trainable):
    model = connected(torch.float64, is_aux_trainable, depth=12)
    found = gradients(model, images(torch.float64))
    published()
    torch.testing.assert_close(found, gradients(model, images(torch.float64)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_with_activation_checkpointing(use_reentrant):
    model = connected(is_aux_trainable=True)
    expected = gradients(model, images())
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=use_reentrant)
    torch.testing.assert_close(gradients(model, images()), expected)


@pytest.mark.parametrize("storage", [None, "bfloat16", "int8", "int4", "float8_e4m3fn"])
def test_moving_average_follows_the_scales_and_keeps_what_is_frozen(storage):
    model = connected(embed_dim=64, num_heads=2)
    if storage:
        quantize_aux(model, storage)
    average = ModelEmaV3(model, decay=0.75, exclude_buffers=True, foreach=False)
    before = copy.deepcopy(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(1)
    average.update(model)
    for name, value in average.module.state_dict().items():
        assert value.dtype == before[name].dtype
        torch.testing.assert_close(value.float(), before[name].float() + 0.25 * (name in trained), msg=name)
    assert sum(name.endswith("cross_modal_scale") for name in trained) == len(PLACES)


def test_autocast_computes_what_the_published_formulation_does(published):
    model = connected(is_aux_trainable=True)
    dtypes = []
    for layer in fused_layers(model).values():
        layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, images())
        published()
        expected = gradients(model, images())
    assert set(dtypes) == {torch.bfloat16}
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    for kind in ("weight", "bias", "aux_weight", "cross_modal_scale"):
        names = [name for name in found if name.rpartition(".")[2] == kind]
        ours, theirs = (torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected))
        assert (ours - theirs).norm() < 0.02 * theirs.norm(), kind
