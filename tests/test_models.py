"""The models of the four modalities, against timm's, hand-written formulas and published figures."""

import copy
import itertools
from importlib import import_module

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from m2pt import cross_modal_scales, freeze_for_linear_probe, merge_pathways, reparameterize_aux_into_target_model
from m2pt.models import MODALITIES, SIZES, create_model
from m2pt.models.grouping import (
    chamfer_distance,
    farthest_point_sampling,
    group,
    interpolate,
    nearest_neighbors,
)
from m2pt.models.point import GroupEmbed
from m2pt.saved_bytes import saved_for_backward_bytes
from m2pt.train import load_recipe
from m2pt.train.creation import created
from m2pt.train.deployment import TIMM_NAMES, description

WIDTH = {"embed_dim": 24, "depth": 3, "num_heads": 2}
TINY = {
    "image": {"img_size": 32, "patch_size": 8},
    "audio": {"img_size": (48, 32), "patch_size": 8},
    "point": {"num_groups": 8, "group_size": 6},
    "video": {"num_frames": 4, "img_size": 16, "patch_size": 8},
}
SHAPES = {"image": (3, 32, 32), "audio": (1, 48, 32), "point": (40, 3), "video": (3, 4, 16, 16)}


def tiny(modality, task="classification", num_classes=5, **overrides):
    return create_model(modality, "tiny", task, num_classes=num_classes, **{**WIDTH, **TINY[modality], **overrides})


def batch_of(modality, size=2):
    return torch.randn(size, *SHAPES[modality])


def segmentation_batch(size=2):
    return batch_of("point", size), torch.arange(size)


CASES = [(modality, "classification") for modality in MODALITIES] + [("point", "segmentation")]


def case(modality, task):
    return tiny(modality, task), segmentation_batch() if task == "segmentation" else batch_of(modality)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_image_is_timms_model():
    model = create_model("image", "tiny", num_classes=7).eval()
    timms = timm.create_model("vit_tiny_patch16_224", num_classes=7, global_pool="avg").eval()
    timms.load_state_dict(model.state_dict())
    nn.init.normal_(model.head.weight)
    timms.head.weight.data.copy_(model.head.weight)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(images), timms(images))


TIMMS = dict(TIMM_NAMES)
TIMMS["so400m"] = "vit_so400m_patch14_siglip_gap_224"  # whose tokens and pooling are SigLIP's
WITH_CLASS_TOKEN = {"so400m": {"class_token": True, "fc_norm": True}}


def test_timm_has_every_size_but_the_largest():
    assert SIZES.keys() - TIMMS.keys() == {"22b"}


@pytest.mark.parametrize("size", TIMMS)
def test_blocks_are_timms(size):
    options = {"num_classes": 1000, "depth": 1}
    with torch.device("meta"):
        model = create_model("image", size, **options)
        timms = timm.create_model(TIMMS[size], global_pool="avg", **options, **WITH_CLASS_TOKEN.get(size, {}))
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in timms.named_parameters()
    }
    assert model.blocks[0].attn.num_heads == timms.blocks[0].attn.num_heads


@pytest.mark.parametrize("modality", ["image", "audio", "point", "video"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_described_as_it_is_built(modality, size):
    recipe = load_recipe(f"tiny_{modality}", {"model.size": size, "model.overrides": {"depth": 1}})
    described = description(recipe, 10)
    module, _, function = described["function"].rpartition(".")
    with torch.device("meta"):
        models = created(recipe, 10), getattr(import_module(module), function)(**described["arguments"])
    shapes = [{name: parameter.shape for name, parameter in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("arguments", "num_classes", "millions"),
    [
        (("image", "tiny"), 1000, 5.72),
        (("image", "small"), 1000, 22.05),
        (("image", "base"), 1000, 86.57),
        (("image", "large"), 1000, 304.33),
        (("image", "huge"), 1000, 632.05),
        (("image", "giant"), 1000, 1012.61),
        (("point", "small"), 40, 22.10),
        (("point", "small", "segmentation"), 50, 27.06),
    ],
)
def test_parameters_of_published_models(arguments, num_classes, millions):
    with torch.device("meta"):
        assert round(parameters(create_model(*arguments, num_classes=num_classes)) / 1e6, 2) == millions


def test_parameters_of_audio_and_video_by_hand():
    block = (768 + 1) * 2304 + (768 + 1) * 768 + (768 + 1) * 3072 + (3072 + 1) * 768 + 4 * 768
    with torch.device("meta"):
        audio, video = create_model("audio", num_classes=527), create_model("video", num_classes=400)
    assert parameters(audio) == 12 * block + (256 + 1) * 768 + 768 + 513 * 768 + 2 * 768 + (768 + 1) * 527
    assert parameters(video) == 12 * block + (3 * 2 * 256 + 1) * 768 + 2 * 768 + (768 + 1) * 400


@pytest.mark.parametrize(
    ("modality", "overrides", "shape", "tokens"),
    [
        ("image", {}, (3, 224, 224), 197),
        ("audio", {}, (1, 1024, 128), 513),
        ("audio", {"img_size": (512, 128)}, (1, 512, 128), 257),
        ("point", {}, (1024, 3), 65),
        ("point", {"num_groups": 128}, (2048, 3), 129),
        ("video", {}, (3, 16, 224, 224), 1568),
    ],
)
def test_tokens_at_base_size(modality, overrides, shape, tokens):
    with torch.device("meta"):
        model = create_model(modality, num_classes=0, depth=1, **overrides).eval()
        assert model.forward_features(torch.empty(1, *shape)).shape == (1, tokens, 768)


def test_segmentation_tokens_at_base_size():
    with torch.device("meta"):
        model = create_model("point", task="segmentation", num_classes=50, depth=1)
        centers, features = model.forward_features(torch.empty(2, 2048, 3))
        assert centers.shape == (2, 128, 3) and features.shape == (2, 128, 3 * 768)
        assert model((torch.empty(2, 2048, 3), torch.empty(2, dtype=torch.long))).shape == (2, 2048, 50)


@pytest.mark.parametrize("modality", MODALITIES)
def test_blocks_of_base_size(modality):
    with torch.device("meta"):
        model = create_model(modality, num_classes=3)
    for block in model.blocks:
        assert [layer.weight.shape for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)] == [
            (2304, 768),
            (768, 768),
            (3072, 768),
            (768, 3072),
        ]
        assert block.attn.num_heads == (6 if modality == "point" else 12)
        assert (block.attn.qkv.bias is None) == (modality == "point")
        assert block.norm1.eps == block.norm2.eps == (1e-5 if modality == "point" else 1e-6)
    assert len(model.blocks) == 12
    assert (model.norm if modality == "point" else model.fc_norm).eps == model.blocks[0].norm1.eps


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_head_starts_near_zero(modality):
    assert tiny(modality, num_classes=400).head.weight.std().item() == pytest.approx(2e-5, rel=0.05)


def sincos(position, width):
    angles = position / 10000 ** (np.arange(width // 2) / (width / 2))
    return np.concatenate([np.sin(angles), np.cos(angles)])


def test_audio_positions_are_fixed_and_the_published_ones():
    model = tiny("audio")
    expected = [np.zeros(24)] + [
        np.concatenate([sincos(band, 12), sincos(time, 12)]) for time in range(6) for band in range(4)
    ]
    assert not model.pos_embed.requires_grad and "pos_embed" in model.state_dict()
    np.testing.assert_allclose(model.pos_embed[0].numpy(), np.stack(expected), atol=1e-6)


def test_audio_masking_drops_times_and_bands_in_training_only():
    model = tiny("audio", time_masking=0.5, frequency_masking=0.25)
    tokens = torch.arange(1.0, 26).view(1, 25, 1).expand(50, -1, 2)
    kept = model.patch_drop(tokens)[..., 0].long()
    assert kept.shape == (50, 1 + 3 * 3) and (kept[:, 0] == 1).all()
    drawn = set()
    for sample in (kept[:, 1:] - 2).tolist():
        times, bands = {token // 4 for token in sample}, {token % 4 for token in sample}
        assert sorted(sample) == [time * 4 + band for time in sorted(times) for band in sorted(bands)]
        drawn.add((*sorted(times), *sorted(bands)))
    assert len(drawn) > 20
    assert model.eval().patch_drop(tokens) is tokens
    with torch.device("meta"):
        assert (
            create_model("audio", num_classes=0, depth=1).forward_features(torch.empty(1, 1, 1024, 128)).shape[1]
            == 1 + 51 * 6
        )


def test_video_tokens_by_hand():
    model = tiny("video").double()
    clips = batch_of("video").double()
    tokens = []
    for time, row, column in itertools.product(range(2), range(2), range(2)):
        tube = clips[:, :, 2 * time : 2 * time + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        token = tube.flatten(1) @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
        angles = len(tokens) / 10000 ** (2 * (np.arange(24) // 2) / 24)
        position = np.where(np.arange(24) % 2 == 0, np.sin(angles), np.cos(angles))
        tokens.append(token + torch.from_numpy(position))
    torch.testing.assert_close(model.patch_embed(clips), torch.stack(tokens, 1), atol=1e-6, rtol=0)
    assert not any("position" in name or "pos_embed" in name for name in model.state_dict())
    features = model.blocks(torch.stack(tokens, 1)).mean(1)
    torch.testing.assert_close(model(clips), model.head(model.fc_norm(features)), atol=1e-8, rtol=1e-4)


def test_point_classifier_by_hand():
    model = tiny("point").double().eval()
    points = batch_of("point").double()
    centers, neighborhoods = group(points, 8, 6)
    hidden = F.linear(centers, model.pos_embed[0].weight, model.pos_embed[0].bias)
    positions = F.linear(F.gelu(hidden), model.pos_embed[2].weight, model.pos_embed[2].bias)
    positions = torch.cat([model.cls_pos.expand(2, 1, -1), positions], 1)
    tokens = torch.cat([model.cls_token.expand(2, 1, -1), model.patch_embed(neighborhoods)], 1)
    for block in model.blocks:
        tokens = tokens + positions
        normed = F.layer_norm(tokens, (24,), eps=1e-5)
        q, k, v = (normed @ block.attn.qkv.weight.T).view(2, 9, 3, 2, 12).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / 12**0.5).softmax(-1) @ v
        tokens = tokens + block.attn.proj(attention.transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(F.layer_norm(tokens, (24,), eps=1e-5))))
    tokens = F.layer_norm(tokens, (24,), eps=1e-5)
    pooled = torch.cat([tokens[:, 0], tokens[:, 1:].max(1).values], 1)
    torch.testing.assert_close(model(points), model.head(pooled))
    assert [type(layer) for layer in model.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout] * 2 + [nn.Linear]
    assert model.head[0].in_features == 48 and model.head[3].p == 0.5


def test_group_embedding_by_hand():
    embed = GroupEmbed(24).double().eval()
    neighborhoods = torch.randn(2, 5, 6, 3, dtype=torch.float64)

    def mlp(layers, points):
        first, norm, _, last = layers
        hidden = points @ first.weight[:, :, 0].T + first.bias
        hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        return hidden.relu() @ last.weight[:, :, 0].T + last.bias

    local = mlp(embed.first_conv, neighborhoods)
    whole = local.max(2, keepdim=True).values.expand(-1, -1, 6, -1)
    expected = mlp(embed.second_conv, torch.cat([whole, local], 3)).max(2).values
    torch.testing.assert_close(embed(neighborhoods), expected)
    torch.testing.assert_close(embed(neighborhoods[:, :, torch.randperm(6)]), expected)


@pytest.mark.parametrize(("depth", "picked"), [(1, (0, 0, 0)), (3, (0, 1, 2)), (4, (1, 2, 3)), (12, (3, 7, 11))])
def test_segmentation_uses_three_levels(depth, picked):
    model = tiny("point", "segmentation", depth=depth).eval()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    _, features = model.forward_features(batch_of("point"))
    assert torch.equal(features, torch.cat([model.norm(outputs[index]) for index in picked], 2))


def test_segmentation_head_by_hand():
    model = tiny("point", "segmentation").eval()
    points, category = segmentation_batch()
    centers, features = model.forward_features(points)
    spread = interpolate(points, centers, features)
    near = model.head.propagation(torch.cat([points, spread], 2).mT)
    label = model.head.category[2](
        model.head.category[1](F.one_hot(category, 16).float() @ model.head.category[0].weight)
    )
    whole = torch.cat([features.max(1).values, features.mean(1), label], 1)
    expected = model.head.classifier(torch.cat([near, whole.unsqueeze(2).repeat(1, 1, 40)], 1)).mT
    torch.testing.assert_close(model((points, category)), expected)
    assert expected.shape == (2, 40, 5)


def farthest_points(points, count):
    chosen = [0]
    while len(chosen) < count:
        distances = ((points[:, None] - points[chosen]) ** 2).sum(-1).min(1)
        chosen.append(int(distances.argmax()))
    return chosen


def test_farthest_point_sampling_is_the_plain_loop():
    points = torch.randn(4, 60, 3)
    expected = [farthest_points(cloud, 20) for cloud in points.numpy()]
    assert farthest_point_sampling(points, 20).tolist() == expected
    square = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]])
    assert farthest_point_sampling(square, 4).tolist() == [[0, 3, 1, 2]]


def test_nearest_neighbors_and_groups_are_the_plain_loop():
    points = torch.randn(3, 50, 3)
    centers, neighborhoods = group(points, 7, 5)
    for cloud, cloud_centers, cloud_groups in zip(points.numpy(), centers.numpy(), neighborhoods.numpy(), strict=True):
        assert np.array_equal(cloud_centers, cloud[farthest_points(cloud, 7)])
        for center, members in zip(cloud_centers, cloud_groups, strict=True):
            nearest = np.linalg.norm(cloud - center, axis=1).argsort()[:5]
            np.testing.assert_allclose(members, cloud[nearest] - center, atol=1e-6)
    far = points + 1000
    distances, index = nearest_neighbors(far[:, :4], far, 3)
    expected = (far[:, :4, None].double() - far[:, None].double()).norm(dim=3).sort(2)
    assert torch.equal(index, expected.indices[:, :, :3])
    torch.testing.assert_close(distances, expected.values[:, :, :3].float())


def test_interpolation_is_the_plain_loop():
    queries, centers = torch.randn(2, 9, 3).double(), torch.randn(2, 6, 3).double()
    features = torch.randn(2, 6, 4).double()
    expected = torch.zeros(2, 9, 4).double()
    for sample, query in itertools.product(range(2), range(9)):
        squared = (centers[sample] - queries[sample, query]).square().sum(1)
        nearest = squared.argsort()[:3]
        weights = 1 / (squared[nearest] + 1e-8)
        expected[sample, query] = (weights / weights.sum()) @ features[sample, nearest]
    torch.testing.assert_close(interpolate(queries, centers, features), expected)
    torch.testing.assert_close(interpolate(centers, centers, features), features, atol=1e-6, rtol=0)


def test_chamfer_distance_by_brute_force():
    a, b = torch.randn(3, 7, 3).double().requires_grad_(), torch.randn(3, 40, 3).double()
    squared = ((a.detach().numpy()[:, :, None] - b.numpy()[:, None]) ** 2).sum(-1)
    assert chamfer_distance(a, b).item() == pytest.approx(squared.min(2).mean() + squared.min(1).mean())
    assert torch.autograd.gradcheck(lambda points: chamfer_distance(points, b), a)
    chamfer_distance(a, a.detach()).backward()
    assert not a.grad.any()


@pytest.mark.parametrize(("modality", "task"), CASES)
def test_every_trained_parameter_gets_a_gradient(modality, task):
    model, batch = case(modality, task)
    model(batch).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert without == ({"pos_embed"} if modality == "audio" else set())


@pytest.mark.parametrize(("modality", "task"), CASES)
def test_runs_under_autocast(modality, task):
    model, batch = case(modality, task)
    expected = model.eval()(batch)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch)
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("modality", "task"), CASES)
def test_state_dict_round_trip(modality, task):
    model, batch = case(modality, task)
    model(batch)
    other = tiny(modality, task)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.eval()(batch), model.eval()(batch))


@pytest.mark.parametrize(("modality", "task"), CASES)
def test_activation_checkpointing_saves_memory_and_changes_nothing(modality, task):
    model, batch = case(modality, task)
    model.eval()
    saved, gradients = [], []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(batch).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
        saved.append(saved_for_backward_bytes(model, batch))
    assert torch.equal(*gradients) and gradients[0].any()
    assert saved[1] < saved[0]


@pytest.mark.parametrize(("modality", "task"), CASES)
def test_layer_decay(modality, task):
    model = tiny(modality, task)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    settings = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: settings[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(settings) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, (scale, decay) in trained.items():
        first, second, *_ = (*name.split("."), "")
        if first in ("cls_token", "cls_pos", "pos_embed", "patch_embed"):
            layer = 0
        elif first == "blocks":
            layer = 1 + int(second)
        else:
            layer = 3 if first == "norm" else 4
        assert scale == 0.5 ** (4 - layer), name
        if name in ("cls_token", "cls_pos") or model.get_parameter(name).ndim == 1:
            assert decay == 0
        elif name != "pos_embed":
            assert decay == 0.05


@pytest.mark.parametrize(("target", "auxiliary"), list(itertools.product(MODALITIES, repeat=2)))
def test_any_modality_helps_any_other(target, auxiliary):
    model, batch = tiny(target).eval(), batch_of(target)
    plain = model(batch)
    reparameterize_aux_into_target_model(model, tiny(auxiliary, num_classes=0))
    assert len(cross_modal_scales(model)) == 12
    torch.testing.assert_close(model(batch), plain)
    freeze_for_linear_probe(model)
    nn.init.normal_((model.head[-1] if target == "point" else model.head).weight)
    model(batch).square().sum().backward()
    scales = {name: p for name, p in model.named_parameters() if name.endswith("cross_modal_scale")}
    assert all(scale.grad.any() for scale in scales.values())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == scales.keys() | {
        name for name, _ in model.named_parameters() if name.startswith("head.")
    }
    for scale in scales.values():
        nn.init.constant_(scale, 0.3)
    connected = model(batch)
    assert not torch.allclose(connected, plain)
    merged = merge_pathways(model)
    torch.testing.assert_close(merged(batch), connected, atol=1e-5, rtol=1e-4)
    tiny(target).load_state_dict(merged.state_dict())


def test_segmentation_takes_a_pathway():
    model, batch = case("point", "segmentation")
    reparameterize_aux_into_target_model(model, tiny("video", num_classes=0))
    model(batch).square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("cross_modal_scale"))


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_compiles_into_one_graph(modality):
    model, batch = tiny(modality, depth=1).eval(), batch_of(modality)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), model(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smell",), r"modality: expected one of image, audio, point, video, got 'smell'"),
        (("image", "colossal"), r"size: expected one of tiny, .*, 22b, got 'colossal'"),
        (("video", "tiny", "segmentation"), r"task: expected one of classification for 'video', got 'segmentation'"),
        (("point", "tiny", "detection"), r"task: expected one of classification, segmentation .* got 'detection'"),
    ],
)
def test_unknown_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(*arguments, num_classes=2)


@pytest.mark.parametrize(
    ("modality", "overrides", "message"),
    [
        ("image", {"num_classes": -1}, r"num_classes: expected 0 or more, got -1"),
        ("audio", {"time_masking": 1.0}, r"time_masking: expected a ratio in \[0, 1\), got 1.0"),
        ("audio", {"embed_dim": 26}, r"width: expected a multiple of 4 .* got 26"),
        ("video", {"embed_dim": 25, "num_heads": 5}, r"width: expected an even number .* got 25"),
        ("video", {"num_frames": 5}, r"img_size: .* tubes of \(2, 8, 8\), got \(5, 16, 16\)"),
        ("point", {"num_groups": 0}, r"num_groups, group_size: expected 1 or more of each, got 0, 6"),
    ],
)
def test_impossible_overrides(modality, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(modality, **overrides)


@pytest.mark.parametrize(
    ("modality", "given", "nearest"),
    [
        ("imag", {}, "'image'"),
        ("image", {"size": "smal"}, "'small'"),
        ("point", {"task": "segmentaton"}, "'segmentation'"),
        ("image", {"dept": 2}, "'depth'"),
        ("audio", {"time_maskin": 0.1}, "'time_masking'"),
        ("point", {"num_group": 8}, "'num_groups'"),
        ("video", {"num_frame": 4}, "'num_frames'"),
    ],
)
def test_the_nearest_name_ends_the_error(modality, given, nearest):
    with pytest.raises((TypeError, ValueError), match=rf"; did you mean {nearest}\?$"):
        create_model(modality, num_classes=2, **given)


def test_unknown_override():
    with pytest.raises(TypeError, match="colour"):
        tiny("point", colour="red")


@pytest.mark.parametrize(
    ("modality", "shape", "message"),
    [
        ("image", (1, 3, 32, 40), r"input: expected shape \(B, 3, 32, 32\), got \(1, 3, 32, 40\)"),
        ("audio", (1, 48, 32), r"input: expected shape \(B, 1, 48, 32\), got \(1, 48, 32\)"),
        ("video", (1, 4, 3, 16, 16), r"input: expected shape \(B, 3, 4, 16, 16\), got \(1, 4, 3, 16, 16\)"),
        ("point", (2, 3, 40), r"points: expected shape \(B, N, 3\), got \(2, 3, 40\)"),
        ("point", (2, 7, 3), r"points: expected at least 8 for 8 groups of 6, got 7"),
    ],
)
def test_wrong_input(modality, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny(modality)(torch.zeros(shape))


def test_wrong_category():
    with pytest.raises(ValueError, match=r"category: expected shape \(2\), got \(2, 16\)"):
        tiny("point", "segmentation")((batch_of("point"), torch.zeros(2, 16)))
