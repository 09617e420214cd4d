"""Checkpoints of other projects, written here name for name as their code does, at a tiny width."""

import argparse
import copy
import re
import zipfile
from functools import partial

import numpy as np
import pytest
import timm
import torch
from helpers import vit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from m2pt import reparameterize_aux_into_target_model
from m2pt.checkpoint_formats import convert_state_dict, load_auxiliary, load_pretrained, read_checkpoint
from m2pt.checkpoints import save_state_dict
from m2pt.families import LAYER_NAMES
from m2pt.models import create_model

WIDTH, HIDDEN, HEADS, DEPTH, CLASSES = 12, 24, 2, 2, 5
SIZE = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2}
DECODER = {"width": 8, "hidden": 16}


def linear(name, out, *inputs, bias=True):
    entries = {f"{name}.weight": torch.randn(out, *inputs)}
    return entries | {f"{name}.bias": torch.randn(out)} if bias else entries


def norm(name, width=WIDTH):
    return {f"{name}.weight": torch.rand(width) + 0.5, f"{name}.bias": torch.randn(width)}


def batch_norm(name, width):
    statistics = {"running_mean": torch.randn(width), "running_var": torch.rand(width) + 0.5}
    return (
        norm(name, width)
        | {f"{name}.{key}": value for key, value in statistics.items()}
        | {f"{name}.num_batches_tracked": torch.tensor(3)}
    )


def timm_block(name, width=WIDTH, hidden=HIDDEN, qkv_bias=True):
    return (
        norm(f"{name}.norm1", width)
        | linear(f"{name}.attn.qkv", 3 * width, width, bias=qkv_bias)
        | linear(f"{name}.attn.proj", width, width)
        | norm(f"{name}.norm2", width)
        | linear(f"{name}.mlp.fc1", hidden, width)
        | linear(f"{name}.mlp.fc2", width, hidden)
    )


def videomae_block(name, width=WIDTH, hidden=HIDDEN):
    biases = {f"{name}.attn.q_bias": torch.randn(width), f"{name}.attn.v_bias": torch.randn(width)}
    return timm_block(name, width, hidden, qkv_bias=False) | biases


def hugging_face_layer(name, width=WIDTH, hidden=HIDDEN):
    projections = (linear(f"{name}.attention.attention.{part}", width, width) for part in ("query", "key", "value"))
    entries = {key: value for projection in projections for key, value in projection.items()}
    return (
        entries
        | linear(f"{name}.attention.output.dense", width, width)
        | linear(f"{name}.intermediate.dense", hidden, width)
        | linear(f"{name}.output.dense", width, hidden)
        | norm(f"{name}.layernorm_before", width)
        | norm(f"{name}.layernorm_after", width)
    )


def stack(name, layer, depth=DEPTH, **settings):
    return {key: value for i in range(depth) for key, value in layer(f"{name}.{i}", **settings).items()}


def vit_body(channels=3, patch=4, positions=17):
    return (
        {"cls_token": torch.randn(1, 1, WIDTH), "pos_embed": torch.randn(1, positions, WIDTH)}
        | linear("patch_embed.proj", WIDTH, channels, patch, patch)
        | stack("blocks", timm_block)
    )


def timm_vit():
    return vit_body() | norm("norm") | linear("head", CLASSES, WIDTH)


def mae_finetuned():
    return vit_body() | norm("fc_norm") | linear("head", CLASSES, WIDTH)


def mae_pretrained(channels=3, patch=4, positions=17):
    width = DECODER["width"]
    tokens = {
        "mask_token": torch.randn(1, 1, width),
        "decoder_pos_embed": torch.randn(1, positions, width),
    }
    return (
        vit_body(channels, patch, positions)
        | norm("norm")
        | tokens
        | linear("decoder_embed", width, WIDTH)
        | stack("decoder_blocks", timm_block, depth=1, **DECODER)
        | norm("decoder_norm", width)
        | linear("decoder_pred", patch**2 * channels, width)
    )


def audiomae_pretrained():
    return mae_pretrained(channels=1, patch=16, positions=513)


def point_tokenizer(prefix=""):
    return (
        linear(f"{prefix}encoder.first_conv.0", 128, 3, 1)
        | batch_norm(f"{prefix}encoder.first_conv.1", 128)
        | linear(f"{prefix}encoder.first_conv.3", 256, 128, 1)
        | linear(f"{prefix}encoder.second_conv.0", 512, 512, 1)
        | batch_norm(f"{prefix}encoder.second_conv.1", 512)
        | linear(f"{prefix}encoder.second_conv.3", WIDTH, 512, 1)
        | linear(f"{prefix}pos_embed.0", 128, 3)
        | linear(f"{prefix}pos_embed.2", WIDTH, 128)
        | stack(f"{prefix}blocks.blocks", timm_block, qkv_bias=False)
        | norm(f"{prefix}norm")
    )


def point_pretrained():
    entries = (
        {"mask_token": torch.randn(1, 1, WIDTH)}
        | point_tokenizer("MAE_encoder.")
        | linear("decoder_pos_embed.0", 128, 3)
        | linear("decoder_pos_embed.2", WIDTH, 128)
        | stack("MAE_decoder.blocks", timm_block, depth=1, qkv_bias=False)
        | norm("MAE_decoder.norm")
        | linear("increase_dim.0", 96, WIDTH, 1)
    )
    return {f"module.{name}": value for name, value in entries.items()}


def point_finetuned():
    return (
        {"cls_token": torch.randn(1, 1, WIDTH), "cls_pos": torch.randn(1, 1, WIDTH)}
        | point_tokenizer()
        | linear("cls_head_finetune.0", 256, 2 * WIDTH)
        | batch_norm("cls_head_finetune.1", 256)
        | linear("cls_head_finetune.4", 256, 256)
        | batch_norm("cls_head_finetune.5", 256)
        | linear("cls_head_finetune.8", CLASSES, 256)
    )


def point_segmentation():
    return (
        point_tokenizer()
        | linear("label_conv.0", 64, 16, 1, bias=False)
        | batch_norm("label_conv.1", 64)
        | linear("propagation_0.mlp_convs.0", 4 * WIDTH, 3 * WIDTH + 3, 1)
        | linear("propagation_0.mlp_convs.1", 1024, 4 * WIDTH, 1)
        | batch_norm("propagation_0.mlp_bns.0", 4 * WIDTH)
        | batch_norm("propagation_0.mlp_bns.1", 1024)
        | linear("convs1", 512, 1024 + 6 * WIDTH + 64, 1)
        | linear("convs2", 256, 512, 1)
        | linear("convs3", 50, 256, 1)
        | batch_norm("bns1", 512)
        | batch_norm("bns2", 256)
    )


def videomae_pretrained():
    width = DECODER["width"]
    return (
        {"mask_token": torch.randn(1, 1, width)}
        | linear("encoder.patch_embed.proj", WIDTH, 3, 2, 4, 4)
        | stack("encoder.blocks", videomae_block)
        | norm("encoder.norm")
        | stack("decoder.blocks", videomae_block, depth=1, **DECODER)
        | norm("decoder.norm", width)
        | linear("decoder.head", 2 * 3 * 4 * 4, width)
        | linear("encoder_to_decoder", width, WIDTH, bias=False)
    )


def videomae_finetuned():
    return (
        linear("patch_embed.proj", WIDTH, 3, 2, 4, 4)
        | stack("blocks", videomae_block)
        | norm("fc_norm")
        | linear("head", CLASSES, WIDTH)
    )


def hugging_face_body(prefix=""):
    return (
        {
            f"{prefix}embeddings.cls_token": torch.randn(1, 1, WIDTH),
            f"{prefix}embeddings.position_embeddings": torch.randn(1, 17, WIDTH),
        }
        | linear(f"{prefix}embeddings.patch_embeddings.projection", WIDTH, 3, 4, 4)
        | stack(f"{prefix}encoder.layer", hugging_face_layer)
        | norm(f"{prefix}layernorm")
    )


def hugging_face_vit():
    return (
        hugging_face_body() | linear("pooler.dense", WIDTH, WIDTH) | {"embeddings.mask_token": torch.zeros(1, 1, WIDTH)}
    )


def hugging_face_classifier():
    return hugging_face_body("vit.") | linear("classifier", CLASSES, WIDTH)


def hugging_face_mae():
    width = DECODER["width"]
    tokens = {
        "decoder.mask_token": torch.randn(1, 1, width),
        "decoder.decoder_pos_embed": torch.randn(1, 17, width),
    }
    return (
        hugging_face_body("vit.")
        | tokens
        | linear("decoder.decoder_embed", width, WIDTH)
        | stack("decoder.decoder_layers", hugging_face_layer, depth=1, **DECODER)
        | norm("decoder.decoder_norm", width)
        | linear("decoder.decoder_pred", 48, width)
    )


VIT_BODY = set(vit_body())
BLOCKS = {name for name in VIT_BODY if name.startswith("blocks.")}
PATCHES = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
NORM, FC_NORM, HEAD = ({f"{layer}.weight", f"{layer}.bias"} for layer in ("norm", "fc_norm", "head"))
POINT_BODY = {
    *(name.replace("blocks.blocks.", "blocks.") for name in point_tokenizer() if not name.startswith("encoder.")),
    *(name.replace("encoder.", "patch_embed.") for name in point_tokenizer() if name.startswith("encoder.")),
}
POINT_HEAD = {name.replace("cls_head_finetune.", "head.") for name in point_finetuned() if name.startswith("cls_head")}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
PART_HEAD = {
    "head.category.0.weight",
    *(f"head.category.1.{kind}" for kind in BATCH_NORM),
    *(f"head.propagation.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")),
    *(f"head.propagation.{i}.{kind}" for i in (1, 4) for kind in BATCH_NORM),
    *(f"head.classifier.{i}.{kind}" for i in (0, 4, 7) for kind in ("weight", "bias")),
    *(f"head.classifier.{i}.{kind}" for i in (1, 5) for kind in BATCH_NORM),
}
ARGS = argparse.Namespace(model="vit", lr=1e-3)
METRICS = {"epoch": 300, "metrics": {"acc": np.float64(0.93)}, "best_metrics": {"acc": np.float64(0.94)}}

# The entries, how its training script wraps them, what the file is recognised as, the timm names expected of it.
FILES = {
    "timm": (timm_vit, lambda entries: entries, "timm, MAE, VideoMAE or DINOv2", VIT_BODY | NORM | HEAD),
    "zoo": (timm_vit, lambda entries: {"module": entries}, "timm, MAE, VideoMAE or DINOv2", VIT_BODY | NORM | HEAD),
    "MAE pretrained": (
        mae_pretrained,
        lambda entries: {"model": entries},
        "timm, MAE, VideoMAE or DINOv2",
        VIT_BODY | NORM,
    ),
    "MAE fine-tuned": (
        mae_finetuned,
        lambda entries: {"model": entries, "optimizer": {}, "epoch": 99, "scaler": {"scale": 2.0}, "args": ARGS},
        "timm, MAE, VideoMAE or DINOv2",
        VIT_BODY | FC_NORM | HEAD,
    ),
    "AudioMAE": (
        audiomae_pretrained,
        lambda entries: {"model": entries, "args": ARGS},
        "timm, MAE, VideoMAE or DINOv2",
        VIT_BODY | NORM,
    ),
    "Point-MAE pretrained": (
        point_pretrained,
        lambda entries: {"base_model": entries, "optimizer": {}} | METRICS,
        "Point-MAE",
        POINT_BODY,
    ),
    "Point-MAE fine-tuned": (
        point_finetuned,
        lambda entries: {"base_model": entries} | METRICS,
        "Point-MAE",
        POINT_BODY | POINT_HEAD | {"cls_token", "cls_pos"},
    ),
    "Point-MAE segmentation": (
        point_segmentation,
        lambda entries: {"model_state_dict": entries, "train_acc": np.float64(0.9), "class_avg_iou": np.float32(0.8)},
        "Point-MAE",
        POINT_BODY | PART_HEAD,
    ),
    "VideoMAE pretrained": (
        videomae_pretrained,
        lambda entries: {"model": entries, "args": ARGS},
        "timm, MAE, VideoMAE or DINOv2",
        BLOCKS | PATCHES | NORM,
    ),
    "VideoMAE fine-tuned": (
        videomae_finetuned,
        lambda entries: {"module": entries},
        "timm, MAE, VideoMAE or DINOv2",
        BLOCKS | PATCHES | FC_NORM | HEAD,
    ),
    "Hugging Face": (
        hugging_face_vit,
        lambda entries: entries,
        "Hugging Face ViT, DeiT, AST, BEiT, VideoMAE or DINOv2",
        VIT_BODY | NORM,
    ),
    "Hugging Face classifier": (
        hugging_face_classifier,
        lambda entries: {"state_dict": entries},
        "Hugging Face ViT, DeiT, AST, BEiT, VideoMAE or DINOv2",
        VIT_BODY | NORM | HEAD,
    ),
    "Hugging Face MAE": (
        hugging_face_mae,
        lambda entries: entries,
        "Hugging Face ViT, DeiT, AST, BEiT, VideoMAE or DINOv2",
        VIT_BODY | NORM,
    ),
}


def write(entries, path, wrap=lambda entries: entries):
    """A torch file wrapped as its project does, or a `.safetensors` file, which is always bare."""
    if path.suffix == ".safetensors":
        save_state_dict(entries, path)
    else:
        torch.save(wrap(entries), path)
    return path


@pytest.fixture(params=FILES)
def case(request):
    return FILES[request.param]


small = partial(vit, img_size=16, patch_size=4, num_classes=CLASSES, **SIZE)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_entry_is_accounted_for(case, tmp_path, suffix):
    make, wrap, name, expected = case
    entries = make()
    tensors, report = read_checkpoint(write(entries, tmp_path / f"w{suffix}", wrap))
    assert report.format.name == name
    assert set(tensors) == set(report.used.values()) == expected
    assert not report.used.keys() & report.dropped.keys()
    assert report.used.keys() | report.dropped.keys() == entries.keys()
    kept = {source: target for source, target in report.used.items() if target not in report.changed}
    assert all(torch.equal(tensors[target], entries[source]) for source, target in kept.items())


def test_dropped_entries_have_a_reason(case):
    _, report = convert_state_dict(case[0]())
    reasons = {
        "mask token": r"mask_token$",
        "decoder": r"decoder|increase_dim",
        "pooler, which timm does not have": r"^pooler\.",
    }
    assert all(re.search(reasons[reason], name) for name, reason in report.dropped.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_prefixes_of_whole_models_are_taken_off(case, prefix):
    make, _, _, expected = case
    entries = {prefix + name.removeprefix("module."): value for name, value in make().items()}
    tensors, report = convert_state_dict(entries)
    assert set(tensors) == expected
    assert report.used.keys() | report.dropped.keys() == entries.keys()


def test_converting_twice_changes_nothing_more(case):
    once, _ = convert_state_dict(case[0]())
    twice, report = convert_state_dict(once)
    assert report.used == {name: name for name in once} and not report.dropped
    assert all(torch.equal(twice[name], value) for name, value in once.items())


def attention(x, query, key, value, proj):
    """Scaled dot-product attention of two heads, each of the four a function of the tokens."""
    heads = [part(x).unflatten(-1, (HEADS, WIDTH // HEADS)) for part in (query, key, value)]
    scores = torch.einsum("bqhd,bkhd->bhqk", heads[0], heads[1]) / (WIDTH // HEADS) ** 0.5
    return proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), heads[2]).flatten(-2))


def layers(entries):
    """The linear layers and norms of a state dict, as functions by name."""

    def dense(name, bias=None):
        return lambda x: F.linear(x, entries[f"{name}.weight"], entries[f"{name}.bias"] if bias is None else bias)

    def layer_norm(name):
        return lambda x: F.layer_norm(x, (WIDTH,), entries[f"{name}.weight"], entries[f"{name}.bias"], eps=1e-6)

    return dense, layer_norm


def test_hugging_face_weights_compute_the_same_in_timm(tmp_path):
    entries = hugging_face_classifier()
    entries = {name: 0.3 * value for name, value in entries.items()}
    dense, layer_norm = layers(entries)
    image = torch.randn(3, 3, 16, 16)
    patches = F.conv2d(
        image,
        entries["vit.embeddings.patch_embeddings.projection.weight"],
        entries["vit.embeddings.patch_embeddings.projection.bias"],
        stride=4,
    )
    token = entries["vit.embeddings.cls_token"].expand(3, -1, -1)
    x = torch.cat([token, patches.flatten(2).mT], 1) + entries["vit.embeddings.position_embeddings"]
    for i in range(DEPTH):
        layer = f"vit.encoder.layer.{i}"
        parts = [dense(f"{layer}.attention.attention.{part}") for part in ("query", "key", "value")]
        x = x + attention(layer_norm(f"{layer}.layernorm_before")(x), *parts, dense(f"{layer}.attention.output.dense"))
        hidden = F.gelu(dense(f"{layer}.intermediate.dense")(layer_norm(f"{layer}.layernorm_after")(x)))
        x = x + dense(f"{layer}.output.dense")(hidden)
    expected = dense("classifier")(layer_norm("vit.layernorm")(x)[:, 0])

    model = small()
    report = load_pretrained(model, write(entries, tmp_path / "w.safetensors"))
    assert not report.dropped and not report.initialised
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, prefix", [(videomae_pretrained, "encoder."), (videomae_finetuned, "")])
def test_videomae_blocks_compute_the_same_in_timm(make, prefix):
    entries = {name: 0.3 * value for name, value in make().items()}
    tensors, _ = convert_state_dict(entries)
    dense, layer_norm = layers(entries)
    x = torch.randn(2, 7, WIDTH)
    for i in range(DEPTH):
        block = Block(WIDTH, HEADS, mlp_ratio=2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        start = f"blocks.{i}."
        block.load_state_dict({key.removeprefix(start): tensors[key] for key in tensors if key.startswith(start)})
        name = f"{prefix}blocks.{i}"
        bias = (entries[f"{name}.attn.q_bias"], None, entries[f"{name}.attn.v_bias"])
        expected_bias = torch.cat([bias[0], torch.zeros(WIDTH), bias[2]])  # a key bias would not change the output
        assert torch.equal(block.attn.qkv.bias, expected_bias)
        weights = entries[f"{name}.attn.qkv.weight"].split(WIDTH)
        parts = [lambda x, w=w, b=b: F.linear(x, w, b) for w, b in zip(weights, bias, strict=True)]
        y = x + attention(layer_norm(f"{name}.norm1")(x), *parts, dense(f"{name}.attn.proj"))
        y = y + dense(f"{name}.mlp.fc2")(F.gelu(dense(f"{name}.mlp.fc1")(layer_norm(f"{name}.norm2")(y))))
        torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)
        x = y


def connect(path):
    """A target connected to the auxiliary model in a file, as its auxiliary weights by timm name."""
    target = reparameterize_aux_into_target_model(small(), load_auxiliary(path))
    return {name: value for name, value in target.state_dict().items() if name.endswith(".aux_weight")}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_format_is_an_auxiliary_model(case, tmp_path, suffix):
    make, wrap, _, _ = case
    entries = make()
    tensors, _ = convert_state_dict(entries)
    connected = connect(write(entries, tmp_path / f"w{suffix}", wrap))
    assert len(connected) == DEPTH * len(LAYER_NAMES)
    assert all(torch.equal(value, tensors[name.replace(".aux_", ".")]) for name, value in connected.items())


@pytest.mark.parametrize("make", [timm_vit, hugging_face_vit, videomae_finetuned])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(tmp_path, make, dtype):
    entries = {name: value.to(dtype) for name, value in make().items()}
    assert {value.dtype for value in convert_state_dict(entries)[0].values()} == {dtype}
    assert {value.dtype for value in connect(write(entries, tmp_path / "w.pth")).values()} == {dtype}


@pytest.mark.parametrize("weights", [None, "ema", "raw"])
def test_an_auxiliary_model_carries_which_weights_it_has(tmp_path, weights):
    raw, average = timm_vit(), timm_vit()
    torch.save({"model": raw, "ema": average}, tmp_path / "both.pth")
    aux = load_auxiliary(tmp_path / "both.pth", weights)
    assert aux.weights == (weights or "ema")
    expected = raw if weights == "raw" else average
    assert torch.equal(aux.blocks[1].mlp.fc1.weight, expected["blocks.1.mlp.fc1.weight"])
    torch.save({"model": raw}, tmp_path / "one.pth")
    assert load_auxiliary(tmp_path / "one.pth").weights is None


def test_auxiliary_of_another_depth_is_refused(tmp_path):
    entries = {name: value for name, value in timm_vit().items() if not name.startswith("blocks.1.")}
    aux = load_auxiliary(write(entries, tmp_path / "w.safetensors"))
    assert len(aux.blocks) == 1
    with pytest.raises(ValueError, match="expected 2 blocks"):
        reparameterize_aux_into_target_model(small(), aux)


def test_auxiliary_widths_are_the_files_own(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2, mlp_ratio=3, init_values=0.1)
    aux = load_auxiliary(write(model.state_dict(), tmp_path / "w.pth"))
    for block, expected in zip(aux.blocks, model.blocks, strict=True):
        for layer in LAYER_NAMES:
            assert torch.equal(block.get_submodule(layer).weight, expected.get_submodule(layer).weight)
    assert not any(parameter.requires_grad for parameter in aux.parameters())


POINTS = {"num_groups": 4, "group_size": 8}


def image_model():
    return create_model("image", num_classes=CLASSES, img_size=16, patch_size=4, **SIZE)


def audio_model(frames=1024):
    return create_model("audio", num_classes=CLASSES, img_size=(frames, 128), **SIZE)


def point_model():
    return create_model("point", num_classes=CLASSES, **POINTS, **SIZE)


def part_model():
    return create_model("point", task="segmentation", num_classes=50, **POINTS, **SIZE)


def video_model():
    return create_model("video", num_classes=CLASSES, img_size=8, patch_size=4, num_frames=4, **SIZE)


CLOUD = torch.rand(2, 16, 3)
IMAGE = torch.rand(2, 3, 16, 16)
PARTS = (CLOUD, torch.tensor([3, 15]))
CLASSIFICATION = {"cls_token", "cls_pos"} | POINT_HEAD

# File, model, its input, the timm names that the model has no place for, the names that the file has nothing for.
LOADS = {
    "timm": ("timm", small, IMAGE, set(), set()),
    "Hugging Face to timm": ("Hugging Face MAE", small, IMAGE, set(), HEAD),
    "MAE to timm": ("MAE pretrained", small, IMAGE, set(), HEAD),
    "image, pretrained": ("MAE pretrained", image_model, IMAGE, NORM, FC_NORM | HEAD),
    "image, fine-tuned": ("MAE fine-tuned", image_model, IMAGE, set(), set()),
    "audio, pretrained": ("AudioMAE", audio_model, torch.rand(2, 1, 1024, 128), NORM, FC_NORM | HEAD),
    "point, pretrained": ("Point-MAE pretrained", point_model, CLOUD, set(), CLASSIFICATION),
    "point, fine-tuned": ("Point-MAE fine-tuned", point_model, CLOUD, set(), set()),
    "parts, pretrained": ("Point-MAE pretrained", part_model, PARTS, set(), PART_HEAD),
    "parts, fine-tuned": ("Point-MAE segmentation", part_model, PARTS, set(), set()),
    "parts, from classification": ("Point-MAE fine-tuned", part_model, PARTS, CLASSIFICATION, PART_HEAD),
    "video, pretrained": ("VideoMAE pretrained", video_model, torch.rand(2, 3, 4, 8, 8), NORM, FC_NORM | HEAD),
    "video, fine-tuned": ("VideoMAE fine-tuned", video_model, torch.rand(2, 3, 4, 8, 8), set(), set()),
}


@pytest.mark.parametrize("converted", [False, True], ids=["as published", "converted"])
@pytest.mark.parametrize("load", LOADS)
def test_loading_fills_the_model(tmp_path, load, converted):
    file, build, input, left, initialised = LOADS[load]
    make, wrap, _, names = FILES[file]
    entries = make()
    tensors, _ = convert_state_dict(entries)
    path = tmp_path / ("w.safetensors" if converted else "w.pth")
    write(tensors if converted else entries, path, wrap)
    model = build()
    before = copy.deepcopy(model.state_dict())
    report = load_pretrained(model, path)
    assert set(report.initialised) == initialised
    assert set(report.used.values()) == names - left
    assert report.used.keys() | report.dropped.keys() == (tensors if converted else entries).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in initialised else tensors[name])
    assert model.eval()(input).isfinite().all()


def test_one_hot_categories_become_an_embedding():
    entries = point_segmentation()
    tensors, report = convert_state_dict(entries)
    category = torch.tensor([3, 0, 15])
    one_hot = F.one_hot(category, 16).float().unsqueeze(2)
    expected = F.conv1d(one_hot, entries["label_conv.0.weight"]).squeeze(2)
    torch.testing.assert_close(F.embedding(category, tensors["head.category.0.weight"]), expected)
    assert report.changed == {"head.category.0.weight": "convolution of one-hot categories as an embedding"}


def plane(rows, columns, row_step=1.0, column_step=1.0, row_start=0.0, column_start=0.0):
    """Positions (1, rows * columns, width) that are a plane over the grid, so that any resampling of it is known."""
    row = (row_start + row_step * torch.arange(rows)).view(-1, 1, 1)
    column = (column_start + column_step * torch.arange(columns)).view(1, -1, 1)
    slopes = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
    return (row * slopes[0] + column * slopes[1]).flatten(0, 1).unsqueeze(0)


def inner(positions, old, new):
    """The positions away from the borders at which a resampled plane is bent."""
    rows, columns = (slice(None) if a == b else slice(3, b - 3) for a, b in zip(old, new, strict=True))
    return positions.view(*new, WIDTH)[rows, columns]


@pytest.mark.parametrize(
    "settings, channels, old, new",
    [
        ({"img_size": (48, 48)}, 3, (6, 6), (12, 12)),
        ({"img_size": (24, 48)}, 3, (6, 6), (6, 12)),
        ({"img_size": (40, 32), "in_chans": 1}, 1, (5, 8), (10, 8)),
    ],
    ids=["square", "wide", "longer spectrogram"],
)
@pytest.mark.parametrize("tokens", [{}, {"reg_tokens": 2}, {"no_embed_class": True}], ids=["cls", "reg", "no class"])
def test_positions_of_another_grid_are_resampled(tmp_path, settings, channels, old, new, tokens):
    model = VisionTransformer(patch_size=4, num_classes=CLASSES, global_pool="token", **settings, **SIZE, **tokens)
    prefix = torch.randn(1, model.pos_embed.shape[1] - new[0] * new[1], WIDTH)
    entries = vit_body(channels) | norm("norm") | linear("head", CLASSES, WIDTH)
    entries["pos_embed"] = torch.cat([prefix, plane(*old)], 1)
    if "reg_tokens" in tokens:
        entries["reg_token"] = torch.randn(1, 2, WIDTH)
    report = load_pretrained(model, write(entries, tmp_path / "w.pth"))
    steps = [before / after for before, after in zip(old, new, strict=True)]
    expected = plane(*new, *steps, *(step / 2 - 0.5 for step in steps))  # pixel centers stay where they are
    found = model.pos_embed.detach()
    assert torch.equal(found[:, : prefix.shape[1]], prefix)
    found = found[:, prefix.shape[1] :]
    assert inner(expected, old, new).numel() >= 32 * WIDTH
    torch.testing.assert_close(inner(found, old, new), inner(expected, old, new), rtol=1e-4, atol=1e-4)
    assert report.changed == {"pos_embed": f"resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]}"}


def test_shorter_spectrogram_has_the_first_time_steps(tmp_path):
    entries = audiomae_pretrained()
    entries["pos_embed"] = torch.cat([torch.randn(1, 1, WIDTH), plane(64, 8)], 1)
    model = audio_model(frames=512)
    report = load_pretrained(model, write(entries, tmp_path / "w.pth"))
    assert torch.equal(model.pos_embed[:, :1], entries["pos_embed"][:, :1])
    assert torch.equal(model.pos_embed[:, 1:], plane(32, 8))
    assert report.changed == {"pos_embed": "first 32 of 64 time steps"}


def test_audiomae_positions_are_those_of_the_model(tmp_path):
    """The fixed positions of a 512-frame model are the beginning of a 1024-frame one's."""
    entries = convert_state_dict(audio_model().state_dict())[0]
    model = audio_model(frames=512)
    expected = model.pos_embed.clone()
    load_pretrained(model, write(entries, tmp_path / "w.pth"))
    torch.testing.assert_close(model.pos_embed, expected)


def test_as_many_positions_are_left_as_they_are(tmp_path):
    """A model that is not square loads its own checkpoint: 2 x 8 positions are not taken for 4 x 4."""
    saved, loaded = (VisionTransformer(img_size=(8, 32), patch_size=4, **SIZE) for _ in range(2))
    report = load_pretrained(loaded, write(saved.state_dict(), tmp_path / "w.pth"))
    assert torch.equal(loaded.pos_embed, saved.pos_embed) and not report.changed


def test_positions_that_the_model_computes_are_dropped(tmp_path):
    model = VisionTransformer(img_size=16, patch_size=4, num_classes=CLASSES, pos_embed="none", **SIZE)
    report = load_pretrained(model, write(timm_vit(), tmp_path / "w.pth"))
    assert report.dropped == {"pos_embed": "the model computes its positions"}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("make, head", [(timm_vit, "head"), (hugging_face_classifier, "classifier")])
def test_head_of_other_classes_is_dropped(tmp_path, make, head, classes):
    model = small(num_classes=classes)
    before = copy.deepcopy(model.head.state_dict())
    report = load_pretrained(model, write(make(), tmp_path / "w.pth"))
    assert report.dropped.keys() == {f"{head}.weight", f"{head}.bias"}
    assert set(report.initialised) == (HEAD if classes else set())
    assert all(torch.equal(value, before[name]) for name, value in model.head.state_dict().items())


def without(name):
    return lambda entries: entries.pop(name)


def plus(name, *shape):
    return lambda entries: entries.update({name: torch.zeros(*shape)})


MALFORMED = {
    "empty": (timm_vit, lambda entries: entries.clear(), "it is empty"),
    "no blocks": (
        timm_vit,
        lambda entries: [entries.pop(name) for name in list(entries) if name.startswith("blocks.")],
        r"expected transformer blocks .*; the names begin with cls_token, pos_embed, patch_embed\.proj\.weight$",
    ),
    "no weight": (timm_vit, without("blocks.1.mlp.fc1.weight"), r"blocks\.1\.mlp\.fc1\.weight is missing"),
    "no first block": (
        timm_vit,
        lambda entries: [entries.pop(name) for name in list(entries) if name.startswith("blocks.0.")],
        r"blocks\.0\.attn\.qkv\.weight is missing",
    ),
    "unknown": (timm_vit, plus("blocks.0.attn.rel_pos", 3), r"unknown entries .*: blocks\.0\.attn\.rel_pos$"),
    "unknown outside": (hugging_face_vit, plus("vit.adapter.weight", 3), r"unknown entries .*: vit\.adapter\.weight$"),
    "connected": (timm_vit, plus("blocks.0.attn.qkv.cross_modal_scale", 1), "m2pt merge"),
    "shape": (
        timm_vit,
        plus("blocks.1.attn.proj.weight", 5, WIDTH),
        r"blocks\.1\.attn\.proj\.weight.*\(12, 12\).*\(5, 12\)",
    ),
    "dimensions": (
        timm_vit,
        plus("blocks.1.mlp.fc1.weight", 24),
        r"blocks\.1\.mlp\.fc1\.weight: expected .* matrix.*\(24,\)",
    ),
    "bias": (
        timm_vit,
        plus("blocks.0.attn.qkv.bias", 12),
        r"blocks\.0\.attn\.qkv\.bias: expected shape \(36,\), got \(12,\)",
    ),
    "integers": (
        timm_vit,
        lambda entries: entries.update({"blocks.0.attn.qkv.weight": torch.ones(36, 12, dtype=torch.int8)}),
        r"blocks\.0\.attn\.qkv\.weight: expected a floating matrix of 16 bits or more, got torch.int8",
    ),
    "only q_bias": (
        videomae_pretrained,
        without("encoder.blocks.1.attn.v_bias"),
        r"no value .* encoder\.blocks\.1\.attn\.q_bias",
    ),
    "only v_bias": (videomae_finetuned, without("blocks.0.attn.q_bias"), r"no query .* blocks\.0\.attn\.v_bias"),
    "q_bias beside a whole bias": (
        videomae_finetuned,
        plus("blocks.0.attn.qkv.bias", 36),
        r"blocks\.0\.attn\.qkv\.bias: .* got both",
    ),
    "no query": (
        hugging_face_vit,
        without("encoder.layer.0.attention.attention.query.weight"),
        r"encoder\.layer\.0\.attention\.attention\.query\.weight is missing",
    ),
    "no key bias": (
        hugging_face_vit,
        without("encoder.layer.1.attention.attention.key.bias"),
        r"blocks\.1\.attn\.qkv\.bias: no key to join",
    ),
    "query of another shape": (
        hugging_face_vit,
        plus("encoder.layer.0.attention.attention.query.weight", 6, WIDTH),
        r"encoder\.layer\.0\.attention\.attention\.query\.weight: expected shape \(12, 12\), got \(6, 12\)",
    ),
    "query's bias of another shape": (
        hugging_face_vit,
        plus("encoder.layer.0.attention.attention.query.bias", 6),
        r"blocks\.0\.attn\.qkv\.bias: expected parts of one shape, got .*query\.bias \(6,\)",
    ),
    "bias of another shape": (
        hugging_face_vit,
        plus("encoder.layer.1.output.dense.bias", 6),
        r"encoder\.layer\.1\.output\.dense\.bias: expected shape \(12,\), got \(6,\)",
    ),
    "twice": (videomae_pretrained, plus("patch_embed.proj.bias", WIDTH), r"patch_embed\.proj\.bias: a second entry"),
    "half wrapped": (
        point_pretrained,
        plus("MAE_encoder.blocks.blocks.0.x", 1),
        r"unknown entries .*: MAE_encoder\.blocks\.blocks\.0\.x$",
    ),
}


IGNORED = (
    *("unknown", "unknown outside", "half wrapped", "twice", "bias", "no key bias"),
    *("query's bias of another shape", "bias of another shape"),
    *("only q_bias", "only v_bias", "q_bias beside a whole bias"),
)
"""What an auxiliary model does not need."""


@pytest.mark.parametrize("malformed", MALFORMED)
def test_malformed_files_are_refused(tmp_path, malformed):
    make, spoil, message = MALFORMED[malformed]
    entries = make()
    spoil(entries)
    path = write(entries, tmp_path / "w.pth")
    for read in (read_checkpoint, partial(load_pretrained, nn.Identity())):
        with pytest.raises(ValueError, match=rf"w\.pth: .*{message}"):
            read(path)
    if malformed in IGNORED:
        assert len(load_auxiliary(path).blocks) == DEPTH
    else:
        with pytest.raises(ValueError, match=rf"w\.pth: .*{message}"):
            load_auxiliary(path)


@pytest.mark.parametrize("content", [{"weights": {"a": torch.ones(2)}}, {"model": {"blocks.0.x": 3}}, [1]], ids=str)
def test_what_is_not_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: expected a state dict"):
        load_auxiliary(tmp_path / "w.pth")


def remove_block(entries):
    for name in [name for name in entries if name.startswith("blocks.1.")]:
        del entries[name]


def remove_embedding(entries):
    for name in [name for name in entries if name.startswith("patch_embed.")]:
        del entries[name]


MISFITS = {
    "shallower": (timm_vit, remove_block, small, r"missing in the file: blocks\.1\.norm1\.weight"),
    "deeper": (timm_vit, lambda _: None, partial(small, depth=1), r"no place for blocks\.1\.norm1\.weight"),
    "no norm in a block": (
        timm_vit,
        without("blocks.1.norm2.bias"),
        small,
        r"missing in the file: blocks\.1\.norm2\.bias$",
    ),
    "no class token": (timm_vit, without("cls_token"), small, "missing in the file: cls_token$"),
    "no positions": (timm_vit, without("pos_embed"), small, "missing in the file: pos_embed$"),
    "no embedding": (timm_vit, remove_embedding, small, r"missing in the file: patch_embed\.proj\.weight, patch_embed"),
    "no patches": (timm_vit, without("patch_embed.proj.bias"), small, r"missing in the file: patch_embed\.proj\.bias$"),
    "registers": (timm_vit, plus("reg_token", 1, 4, WIDTH), small, "no place for reg_token$"),
    "channels": (audiomae_pretrained, lambda _: None, small, "512 positions do not make a grid"),
    "patches": (
        timm_vit,
        plus("patch_embed.proj.weight", WIDTH, 1, 4, 4),
        small,
        r"patch_embed\.proj\.weight: expected shape \(12, 3, 4, 4\), got \(12, 1, 4, 4\)",
    ),
    "width of a norm": (timm_vit, plus("norm.weight", 5), small, r"norm\.weight: expected shape \(12,\), got \(5,\)"),
    "flat positions": (timm_vit, plus("pos_embed", 17), small, r"pos_embed: expected shape .* got \(17,\)"),
    "positions of nothing": (timm_vit, plus("pos_embed", 1, 1, WIDTH), small, r"pos_embed: expected shape"),
    "positions of another width": (
        timm_vit,
        plus("pos_embed", 1, 10, 6),
        small,
        r"pos_embed: expected shape \(1, 17, 12\)",
    ),
    "image as video": (timm_vit, lambda _: None, video_model, "no place for cls_token"),
    "point cloud as image": (point_finetuned, lambda _: None, small, "no place for .*encoder.first_conv"),
    "image as point cloud": (timm_vit, lambda _: None, point_model, "no place for patch_embed.proj.weight"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path, misfit):
    make, spoil, build, message = MISFITS[misfit]
    entries = make()
    spoil(entries)
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"w\.pth: {type(model).__name__}: .*{message}"):
        load_pretrained(model, write(entries, tmp_path / "w.pth"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_numbers_as_numpy_1_saved_them_are_read(tmp_path):
    torch.save({"base_model": point_finetuned()} | METRICS, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\nscalar\n" in content
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            old.writestr(name, content)
    assert set(read_checkpoint(tmp_path / "old.pth")[0]) == FILES["Point-MAE fine-tuned"][3]


def test_report_names_what_was_not_used_by_reason(tmp_path):
    model = image_model()
    report = str(load_pretrained(model, write(mae_pretrained(), tmp_path / "w.pth")))
    first, *lines = report.splitlines()
    assert first == "timm, MAE, VideoMAE or DINOv2: 50 entries, 28 used, 22 dropped"
    assert "dropped (mask token): mask_token" in lines
    assert "dropped (the model has no such layer): norm.weight, norm.bias" in lines
    assert any(re.match(r"dropped \(decoder\): .*decoder_embed\.weight, decoder_embed\.bias", line) for line in lines)
    assert "kept as initialised (not in the file): fc_norm.weight, fc_norm.bias, head.weight, head.bias" in lines
    assert len(lines) == 4
