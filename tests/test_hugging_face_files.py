"""Files of Hugging Face's encoders: as `transformers` writes them, and name for name as its releases 4 and 5 do, at a
tiny width; and those of others that only an auxiliary model is read from."""

import re
import tracemalloc
from functools import partial

import pytest
import torch
from helpers import vit
from timm.layers import SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2pt import reparameterize_aux_into_target_model
from m2pt.checkpoint_blocks import linear_weights
from m2pt.checkpoint_formats import convert_state_dict, load_auxiliary, load_pretrained, read_checkpoint
from m2pt.checkpoints import load_state_dict, save_state_dict
from m2pt.families import LAYER_NAMES
from m2pt.models import create_model

pytestmark = pytest.mark.slow

WIDTH, HIDDEN, DEPTH, CLASSES = 32, 64, 2, 5
SIZE = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 2, "img_size": 32, "patch_size": 16}


def small(model=VisionTransformer, eps=1e-12, **settings):
    settings = SIZE | {"num_classes": 0, "norm_layer": partial(nn.LayerNorm, eps=eps)} | settings
    return vit(model=model, **settings)


def random(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def linear(name, rows, *columns, bias=True):
    return {f"{name}.weight": (rows, *columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name):
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def blocks(prefix, attention, proj, fc1, fc2, norms, more=None, key_bias=True, bias=True, hidden=HIDDEN):
    """The blocks of an encoder: `attention` names query, key and value, and `fc1` may name two."""
    shapes = {}
    for i in range(DEPTH):
        query, key, value = (f"{prefix}.{i}.{name}" for name in attention)
        shapes |= linear(query, WIDTH, WIDTH, bias=bias) | linear(value, WIDTH, WIDTH, bias=bias)
        shapes |= linear(key, WIDTH, WIDTH, bias=bias and key_bias)
        shapes |= linear(f"{prefix}.{i}.{proj}", WIDTH, WIDTH) | linear(f"{prefix}.{i}.{fc2}", WIDTH, hidden)
        for name in fc1:
            shapes |= linear(f"{prefix}.{i}.{name}", hidden, WIDTH)
        for name in norms:
            shapes |= norm(f"{prefix}.{i}.{name}")
        shapes |= {f"{prefix}.{i}.{name}": shape for name, shape in (more or {}).items()}
    return shapes


def parts(pattern, *names):
    return [pattern.format(name) for name in names or ("q", "k", "v")]


WORDS = ("query", "key", "value")
OLD = {
    "attention": parts("attention.attention.{}", *WORDS),
    "proj": "attention.output.dense",
    "fc1": ["intermediate.dense"],
    "fc2": "output.dense",
    "norms": ["layernorm_before", "layernorm_after"],
}
"""Blocks as transformers 4 names them, and every `save_pretrained` since."""
NEW = OLD | {
    "attention": parts("attention.{}_proj"),
    "proj": "attention.o_proj",
    "fc1": ["mlp.fc1"],
    "fc2": "mlp.fc2",
}
"""As transformers 5 names them in a model."""
CLIP = {
    "attention": parts("self_attn.{}_proj"),
    "proj": "self_attn.out_proj",
    "fc1": ["mlp.fc1"],
    "fc2": "mlp.fc2",
    "norms": ["layer_norm1", "layer_norm2"],
}
WAV2VEC2 = {
    "attention": parts("attention.{}_proj"),
    "proj": "attention.out_proj",
    "fc1": ["feed_forward.intermediate_dense"],
    "fc2": "feed_forward.output_dense",
    "norms": ["layer_norm", "final_layer_norm"],
}
WHISPER = CLIP | {"fc1": ["fc1"], "fc2": "fc2", "norms": ["self_attn_layer_norm", "final_layer_norm"]}
SCALES = {"layer_scale1.lambda1": (WIDTH,), "layer_scale2.lambda1": (WIDTH,)}
DINO = {"norms": ["norm1", "norm2"], "more": SCALES}
GATED = {"fc1": ["mlp.gate_proj", "mlp.up_proj"], "fc2": "mlp.down_proj"}
TABLE = "relative_position_bias.relative_position_bias_table"


def embeddings(prefix, *tokens, positions=5, channels=3, patch=(16, 16)):
    shapes = {f"{prefix}embeddings.{token}": (1, 1, WIDTH) for token in tokens}
    shapes |= {f"{prefix}embeddings.position_embeddings": (1, positions, WIDTH)} if positions else {}
    return shapes | linear(f"{prefix}embeddings.patch_embeddings.projection", WIDTH, channels, *patch)


def vit_like(prefix, is_new, *tokens, positions=5, channels=3):
    body = blocks(f"{prefix}layers", **NEW) if is_new else blocks(f"{prefix}encoder.layer", **OLD)
    return embeddings(prefix, *tokens, positions=positions, channels=channels) | body | norm(f"{prefix}layernorm")


def plain(is_new):
    return vit_like("vit.", is_new, "cls_token")


def ast(is_new):
    body = vit_like("audio_spectrogram_transformer.", is_new, "cls_token", "distillation_token", channels=1)
    return body | norm("classifier.layernorm") | linear("classifier.dense", CLASSES, WIDTH)


def deit(is_new):
    body = vit_like("deit.", is_new, "cls_token", "distillation_token", positions=6)
    return body | linear("cls_classifier", CLASSES, WIDTH) | linear("distillation_classifier", CLASSES, WIDTH)


def beit(is_new, is_shared=False, head=None):
    names = {"lambda_1": (WIDTH,), "lambda_2": (WIDTH,)}
    shared = {f"beit.shared_position_bias.{TABLE.rpartition('.')[2]}" if is_new else f"beit.encoder.{TABLE}": (12, 2)}
    if not is_shared:
        names |= {TABLE if is_new else f"attention.attention.{TABLE}": (12, 2)}
    settings = (NEW if is_new else OLD) | {"more": names, "key_bias": False}
    body = blocks("beit.layers" if is_new else "beit.encoder.layer", **settings) | (shared if is_shared else {})
    head = norm("beit.pooler.layernorm") | linear("classifier", CLASSES, WIDTH) if head is None else head
    return embeddings("beit.", "cls_token", "mask_token", positions=0) | body | head


def beit_masked(is_new, has_norm):
    """With `use_mean_pooling` or without, and then with a norm at the end of the transformer."""
    head = norm("layernorm") | linear("lm_head", 9, WIDTH) | (norm("beit.layernorm") if has_norm else {})
    return beit(is_new, head=head)


def videomae(is_new):
    biases = {"attention.attention.q_bias": (WIDTH,), "attention.attention.v_bias": (WIDTH,)}
    published = OLD | {"more": biases, "bias": False}
    body = blocks("videomae.encoder.layer", **(OLD | {"key_bias": False} if is_new else published))
    decoder = blocks("decoder.decoder_layers", **(OLD | {"key_bias": False} if is_new else published))
    tokens = {"mask_token": (1, 1, WIDTH)} | linear("encoder_to_decoder", WIDTH, WIDTH, bias=False)
    head = linear("decoder.head", 12, WIDTH) | norm("fc_norm")
    return embeddings("videomae.", positions=0, patch=(2, 16, 16)) | body | decoder | tokens | head


def dinov2(is_new, prefix="dinov2.", registers=True, **gated):
    old = OLD | {"fc1": ["mlp.fc1"], "fc2": "mlp.fc2"}
    body = blocks(f"{prefix}encoder.layer", **((NEW if is_new else old) | DINO | gated))
    tokens = {f"{prefix}embeddings.mask_token": (1, WIDTH)}
    tokens |= {f"{prefix}embeddings.register_tokens": (1, 4, WIDTH)} if registers else {}
    return embeddings(prefix, "cls_token") | body | tokens | norm(f"{prefix}layernorm")


def siglip(is_new):
    prefix = "" if is_new else "vision_model."
    head = {f"{prefix}head.probe": (1, 1, WIDTH), f"{prefix}head.attention.in_proj_weight": (3 * WIDTH, WIDTH)}
    head |= {f"{prefix}head.attention.in_proj_bias": (3 * WIDTH,)} | linear(f"{prefix}head.mlp.fc1", HIDDEN, WIDTH)
    head |= linear(f"{prefix}head.attention.out_proj", WIDTH, WIDTH) | linear(f"{prefix}head.mlp.fc2", WIDTH, HIDDEN)
    return (
        linear(f"{prefix}embeddings.patch_embedding", WIDTH, 3, 16, 16)
        | {f"{prefix}embeddings.position_embedding.weight": (4, WIDTH), f"{prefix}embeddings.position_ids": (1, 4)}
        | blocks(f"{prefix}encoder.layers", **CLIP)
        | norm(f"{prefix}post_layernorm")
        | norm(f"{prefix}head.layernorm")
        | head
    )


def clip(is_new):
    prefix = "" if is_new else "vision_model."
    return (
        linear(f"{prefix}embeddings.patch_embedding", WIDTH, 3, 16, 16, bias=False)
        | {f"{prefix}embeddings.class_embedding": (WIDTH,)}
        | {f"{prefix}embeddings.position_embedding.weight": (5, WIDTH), f"{prefix}embeddings.position_ids": (1, 5)}
        | norm(f"{prefix}pre_layrnorm")
        | blocks(f"{prefix}encoder.layers", **CLIP)
        | norm(f"{prefix}post_layernorm")
    )


def both_towers(is_new):
    texts = linear("text_projection", 8, WIDTH, bias=False) | linear("visual_projection", 8, WIDTH, bias=False)
    text = blocks("text_model.encoder.layers", **CLIP) | norm("text_model.final_layer_norm") | {"logit_scale": ()}
    text |= {"text_model.embeddings.token_embedding.weight": (9, WIDTH)}
    return text | clip(is_new=False) | texts


QUANTIZED = {"quantizer.codevectors": (1, 8, 4)} | linear("quantizer.weight_proj", 8, WIDTH)
PRETRAINING = QUANTIZED | linear("project_hid", 8, WIDTH) | linear("project_q", 8, 8)
CLASSIFYING = {"layer_weights": (3,)} | linear("projector", 8, WIDTH) | linear("classifier", CLASSES, 8)
SPEAKERS = (
    CLASSIFYING | linear("tdnn.0.kernel", 8, 40) | linear("feature_extractor", 8, 16) | {"objective.weight": (8, 2)}
)
ADAPTER = {f"wav2vec2.adapter.layers.{i}.conv.{kind}": (8,) for i in range(2) for kind in ("weight", "bias")}
ADAPTER |= linear("wav2vec2.adapter.proj", 8, WIDTH) | norm("wav2vec2.adapter.proj_layer_norm")


def wav2vec2(is_new, prefix="wav2vec2.", head=None):
    front = {f"{prefix}feature_extractor.conv_layers.{i}.conv.weight": (8, 1, 3) for i in range(2)}
    front |= linear(f"{prefix}feature_projection.projection", WIDTH, 8) | {f"{prefix}masked_spec_embed": (WIDTH,)}
    name = f"{prefix}encoder.pos_conv_embed.conv"
    weight = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    front |= {f"{name}.{part}": (WIDTH, 2, 4) for part in (weight if is_new else ("weight_g", "weight_v"))}
    body = blocks(f"{prefix}encoder.layers", **WAV2VEC2) | norm(f"{prefix}encoder.layer_norm")
    head = (linear("lm_head", 9, WIDTH) if prefix else {}) if head is None else head
    return front | {f"{name}.bias": (WIDTH,)} | body | head


def dinov2_classifier(is_new):
    return dinov2(is_new) | linear("classifier", CLASSES, 2 * WIDTH)


def mms(is_new):
    """Wav2Vec2 with adapters in its blocks."""
    adapters = {f"wav2vec2.encoder.layers.{i}.adapter_layer.linear_1.weight": (4, WIDTH) for i in range(DEPTH)}
    return wav2vec2(is_new) | adapters


def whisper(is_new, prefix="model."):
    front = linear(f"{prefix}encoder.conv1", WIDTH, 80, 3) | linear(f"{prefix}encoder.conv2", WIDTH, WIDTH, 3)
    front |= {f"{prefix}encoder.embed_positions.weight": (8, WIDTH)}
    body = blocks(f"{prefix}encoder.layers", **WHISPER, key_bias=False) | norm(f"{prefix}encoder.layer_norm")
    decoder = blocks(f"{prefix}decoder.layers", **WHISPER, key_bias=False) | norm(f"{prefix}decoder.layer_norm")
    return front | body | decoder | (linear("proj_out", 9, WIDTH, bias=False) if prefix else {})


def timm_names(*others, scales=False, norms=("norm",)):
    inside = {f"{name}.{kind}" for name in ("norm1", "norm2", *LAYER_NAMES) for kind in ("weight", "bias")}
    inside |= {"ls1.gamma", "ls2.gamma"} if scales else set()
    names = {f"blocks.{i}.{name}" for i in range(DEPTH) for name in inside}
    return names | {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")} | set(others)


PATCHES = ("patch_embed.proj.weight", "patch_embed.proj.bias")
POOL = ("attn_pool.norm", "attn_pool.q", "attn_pool.kv", "attn_pool.proj", "attn_pool.mlp.fc1", "attn_pool.mlp.fc2")
DINO_NAMES = timm_names(*PATCHES, "cls_token", "reg_token", "pos_embed", scales=True)
PLAIN_DINO_NAMES = DINO_NAMES - {"reg_token"}
CLIP_NAMES = timm_names("patch_embed.proj.weight", "cls_token", "pos_embed", norms=("norm_pre", "norm"))
VIT_NAMES = timm_names(*PATCHES, "cls_token", "pos_embed")

# The shapes by name, given whether the names are those of transformers 5, and the timm names expected.
FILES = {
    "ViT": (plain, VIT_NAMES),
    "AST": (ast, timm_names(*PATCHES, "cls_token", "dist_token", "pos_embed", norms=("norm", "fc_norm", "head"))),
    "DeiT": (deit, timm_names(*PATCHES, "cls_token", "dist_token", "pos_embed", norms=("norm", "head", "head_dist"))),
    "BEiT": (beit, timm_names(*PATCHES, "cls_token", scales=True, norms=("fc_norm", "head"))),
    "BEiT, shared positions": (
        partial(beit, is_shared=True),
        timm_names(*PATCHES, "cls_token", scales=True, norms=("fc_norm", "head")),
    ),
    "BEiT, masked": (partial(beit_masked, has_norm=True), timm_names(*PATCHES, "cls_token", scales=True)),
    "BEiT, masked, mean": (
        partial(beit_masked, has_norm=False),
        timm_names(*PATCHES, "cls_token", scales=True, norms=()),
    ),
    "VideoMAE": (videomae, timm_names(*PATCHES, norms=("fc_norm",))),
    "DINOv2": (partial(dinov2, registers=False, prefix=""), PLAIN_DINO_NAMES),
    "DINOv2, registers": (dinov2, DINO_NAMES),
    "DINOv2, classifier": (dinov2_classifier, DINO_NAMES),
    "DINOv2, gated": (partial(dinov2, **GATED), DINO_NAMES),
    "SigLIP": (siglip, timm_names(*PATCHES, "pos_embed", "attn_pool.latent", norms=("norm", *POOL))),
    "CLIP": (clip, CLIP_NAMES),
    "CLIP, both towers": (both_towers, CLIP_NAMES),
    "Wav2Vec2": (wav2vec2, timm_names()),
    "Wav2Vec2, pretraining": (partial(wav2vec2, head=PRETRAINING), timm_names()),
    "Wav2Vec2, speakers": (partial(wav2vec2, head=SPEAKERS), timm_names()),
    "Wav2Vec2, adapter": (partial(wav2vec2, head=ADAPTER), timm_names()),
    "HuBERT": (partial(wav2vec2, prefix=""), timm_names()),
    "Whisper": (whisper, timm_names()),
    "Whisper, bare": (partial(whisper, prefix=""), timm_names()),
}
REASONS = {
    "decoder": r"decoder\.|encoder_to_decoder|model\.decoder",
    "mask token": r".*mask_token|.*masked_spec_embed",
    "relative positions, which timm's VisionTransformer does not have": r".*relative_position_bias_table",
    "head for masked patches": r"lm_head|layernorm",
    "head for the class token and the mean of the patches together, where timm's takes only one": r"classifier",
    "numbers of the positions": r".*embeddings\.position_ids$",
    "adapter after the encoder": r"wav2vec2\.adapter\.",
    "text tower": r"text_",
    "comparison with texts": r"visual_projection|logit_scale",
    "convolutional front end": r"(wav2vec2\.)?feature_(extractor\.conv|projection)|.*encoder\.conv[12]",
    "positions of the convolutional front end": r".*pos_conv_embed|.*embed_positions",
    "head for speech": (
        r"lm_head|proj_out|quantizer|project_hid|project_q|layer_weights|projector|classifier|tdnn|objective"
        r"|feature_extractor\.(weight|bias)$"
    ),
}


@pytest.fixture(params=[False, True], ids=["names of 4", "names of 5"])
def is_new(request):
    return request.param


@pytest.fixture(params=FILES)
def case(request, is_new):
    make, names = FILES[request.param]
    return random(make(is_new)), names


def write(entries, path):
    if path.suffix == ".safetensors":
        save_state_dict(entries, path)
    else:
        torch.save(entries, path)
    return path


def auxiliary_weights(path):
    aux = load_auxiliary(path)
    return {f"{i}.{layer}": aux.blocks[i].get_submodule(layer).weight for i in range(DEPTH) for layer in LAYER_NAMES}


@pytest.mark.parametrize("wrapper", ["", "model.", "model.backbone.", "module._orig_mod."])
def test_every_entry_is_accounted_for(case, wrapper):
    entries, expected = case
    entries = {wrapper + name: value for name, value in entries.items()}
    tensors, report = convert_state_dict(entries)
    assert set(tensors) == expected
    assert report.used.keys() | report.dropped.keys() == entries.keys()
    assert not report.used.keys() & report.dropped.keys()
    assert set(report.used.values()) == expected - {"attn_pool.kv.weight", "attn_pool.kv.bias"}
    assert all(re.match(REASONS[reason], name.removeprefix(wrapper)) for name, reason in report.dropped.items())
    kept = {source: target for source, target in report.used.items() if target not in report.changed}
    assert all(torch.equal(tensors[target], entries[source]) for source, target in kept.items())
    again, second = convert_state_dict(tensors)
    assert again.keys() == tensors.keys() and not second.dropped and not second.changed
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    "wrapper, suffix", [("", ".safetensors"), ("model.", ".pth.tar"), ("net.encoder_a.", ".safetensors")]
)
def test_the_linear_layers_of_any_file_are_an_auxiliary_model(case, tmp_path, wrapper, suffix):
    entries, _ = case
    tensors, _ = convert_state_dict(entries)
    beside = {"unknown.weight": torch.ones(3), "rotary.inv_freq": torch.ones(2)}
    entries = {wrapper + name: value.bfloat16() for name, value in entries.items()} | beside
    for name, weight in auxiliary_weights(write(entries, tmp_path / f"w{suffix}")).items():
        assert torch.equal(weight, tensors[f"blocks.{name}.weight"].bfloat16())


def sources_of_linear_weights(entries, layers=LAYER_NAMES):
    """The entries of a file that its linear layers are made of, by the report."""
    weights = {f"blocks.{i}.{layer}.weight" for i in range(DEPTH) for layer in layers}
    return {source for source, target in convert_state_dict(entries)[1].used.items() if target in weights}


SHAPES = ((), (3,), (1, 1, 3))


@pytest.mark.parametrize("spoilt", [*map(torch.ones, SHAPES), torch.ones(2, 2).int()], ids=str)
def test_a_linear_weight_that_is_no_floating_matrix_is_named(case, spoilt):
    entries, _ = case
    for name in sources_of_linear_weights(entries):
        for read in (convert_state_dict, linear_weights):
            with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected a floating matrix"):
                read(entries | {name: spoilt})


@pytest.mark.parametrize("spoilt, other_block", [*zip(map(torch.ones, SHAPES), (0, 1, 0), strict=True)], ids=str)
def test_an_entry_of_another_shape_is_refused_or_kept_as_it_is(case, spoilt, other_block):
    entries, _ = case
    expected = linear_weights(entries)
    for name in entries.keys() - sources_of_linear_weights(entries):
        if f".{other_block}." in name:
            continue
        changed = entries | {name: spoilt}
        found = linear_weights(changed)
        assert all(torch.equal(found[i][layer], expected[i][layer]) for i in range(DEPTH) for layer in LAYER_NAMES)
        refused = rf"{re.escape(name)}: expected|expected (parts of one shape.*{re.escape(name)}|a class token)"
        try:
            tensors, report = convert_state_dict(changed)
        except ValueError as error:
            assert re.search(refused, str(error))
        else:
            assert report.used.keys() ^ report.dropped.keys() == entries.keys()
            target = report.used.get(name)
            kept = target is not None and not target.startswith("attn_pool.q.")
            assert not kept or torch.equal(tensors[target].flatten(), spoilt.flatten())


@pytest.mark.parametrize("shape", [(WIDTH, 16), (5, WIDTH), (0, WIDTH)], ids=str)
def test_the_weight_of_an_attention_that_is_spoilt_is_the_one_that_is_named(case, shape):
    entries, _ = case
    names = sources_of_linear_weights(entries, ("attn.qkv", "attn.proj"))
    assert len(names) == 4 * DEPTH
    for name in names:
        for read in (convert_state_dict, linear_weights):
            with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected shape \(32, 32\)"):
                read(entries | {name: torch.ones(shape)})


def test_weights_of_one_byte_are_refused_without_their_scales(case, tmp_path, is_new):
    entries, _ = case
    dtype = torch.float8_e5m2 if is_new else torch.float8_e4m3fn
    linear = sources_of_linear_weights(entries)
    for name in sorted(linear)[:: len(linear) - 1]:
        path = write(entries | {name: entries[name].to(dtype)}, tmp_path / "w.safetensors")
        for read in (read_checkpoint, load_auxiliary, partial(load_pretrained, small())):
            with pytest.raises(ValueError, match=rf"w\.safetensors: .*{re.escape(name)}: expected .* 16 bits.*float8"):
                read(path)
    _, report = convert_state_dict(entries)
    for name in entries.keys() - linear:
        changed = entries | {name: entries[name].to(dtype)}
        assert len(linear_weights(changed)) == DEPTH
        if "class token" in report.dropped.get(name, "class token"):  # used, or left out for its shape
            with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected .* 16 bits.*float8"):
                convert_state_dict(changed)
        else:
            convert_state_dict(changed)


def test_parts_of_different_dtypes_are_refused():
    entries = random(dinov2(True, **GATED))
    for part in ("attention.q_proj.weight", "attention.v_proj.bias", "mlp.up_proj.weight"):
        name = f"dinov2.encoder.layer.1.{part}"
        changed = entries | {name: entries[name].half()}
        reads = [convert_state_dict] + [linear_weights] * part.endswith("weight")
        for read in reads:
            with pytest.raises(ValueError, match=r"layer\.1\..*: expected .*float.* got torch\.float"):
                read(changed)
    changed = entries | {"dinov2.layernorm.weight": entries["dinov2.layernorm.weight"].half()}
    assert convert_state_dict(changed)[0]["norm.weight"].dtype == torch.float16


def test_adapters_in_the_blocks_are_refused_where_blocks_are_loaded(tmp_path, is_new):
    path = write(random(mms(is_new)), tmp_path / "mms.pth")
    for read in (read_checkpoint, partial(load_pretrained, small())):
        message = r"mms\.pth: wav2vec2\.encoder\.layers\.0\.adapter_layer\.linear_1\.weight: the blocks have adapters"
        with pytest.raises(ValueError, match=message):
            read(path)
    assert len(load_auxiliary(path).blocks) == DEPTH


@pytest.mark.parametrize("prefix", ["", "vit.", "module.vit."])
def test_what_is_wrapped_otherwise_than_the_transformer_is_not_taken_for_its_own(prefix):
    entries = random(vit_like(prefix, True, "cls_token") | linear("model.classifier", CLASSES, WIDTH))
    with pytest.raises(ValueError, match=r"unknown entries .*: model\.classifier\.weight, model\.classifier\.bias$"):
        convert_state_dict(entries)


def test_a_head_that_is_wrapped_beside_bare_blocks_is_unknown():
    timm = convert_state_dict(random(vit_like("", True, "cls_token")))[0]
    with pytest.raises(ValueError, match=r"unknown entries .*: model\.head\.weight$"):
        convert_state_dict(timm | {"model.head.weight": torch.ones(CLASSES, WIDTH)})


def test_a_number_of_five_digits_is_no_blocks(tmp_path):
    entries = random(whisper(True)) | {"model.encoder.layers.99999.self_attn.q_proj.weight": torch.ones(WIDTH, WIDTH)}
    assert len(load_auxiliary(write(entries, tmp_path / "w.pth")).blocks) == DEPTH


def test_a_name_of_very_many_numbers_is_looked_at_in_moderation():
    name = "0." * 50_000 + "weight"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected transformer blocks") as caught:
            linear_weights({name: torch.ones(1)})
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("wrapper", ["model.", "model.backbone."])
def test_checkpoints_of_lightning_are_read(case, tmp_path, wrapper):
    entries, expected = case
    content = {
        "state_dict": {wrapper + name: value for name, value in entries.items()},
        "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.95), "name": "vit"},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "best_k_models": {}}
        },
        "optimizer_states": [{"state": {}, "param_groups": [{"params": [0], "lr": 1e-3}]}],
        "loops": {"fit_loop": {"state_dict": {}}},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")[0].keys() == expected
    weights = auxiliary_weights(tmp_path / "last.ckpt")
    content["state_dict"] |= {"accuracy.total": torch.tensor(3), "criterion.weight": torch.ones(2)}
    torch.save(content, tmp_path / "last.ckpt")
    again = auxiliary_weights(tmp_path / "last.ckpt")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    with pytest.raises(ValueError, match=r"unknown entries .*: accuracy\.total, criterion\.weight"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_missing_bias_of_the_keys_is_zero():
    for make in (whisper, beit, videomae):
        for is_new in (False, True):
            tensors, report = convert_state_dict(random(make(is_new)))
            query, key, value = tensors["blocks.1.attn.qkv.bias"].chunk(3)
            assert query.count_nonzero() == value.count_nonzero() == WIDTH and not key.any()
            assert report.changed["blocks.1.attn.qkv.bias"] == "zeros between the biases of query and value"


def gpt2(is_linear):
    shapes = {}
    for i in range(DEPTH):
        for name, rows, columns in (
            ("attn.c_attn", 3 * WIDTH, WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", HIDDEN, WIDTH),
            ("mlp.c_proj", WIDTH, HIDDEN),
        ):
            shapes[f"transformer.h.{i}.{name}.weight"] = (rows, columns) if is_linear else (columns, rows)
    return shapes | {"transformer.wte.weight": (9, WIDTH), "lm_head.weight": (9, WIDTH)}


@pytest.mark.parametrize("is_linear", [False, True], ids=["Conv1D", "Linear"])
def test_weights_that_are_stored_as_inputs_by_outputs_are_turned(tmp_path, is_linear):
    entries = random(gpt2(is_linear))
    found = auxiliary_weights(write(entries, tmp_path / "w.pth"))
    for i in range(DEPTH):
        for layer, name in zip(LAYER_NAMES, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), strict=True):
            stored = entries[f"transformer.h.{i}.{name}.weight"]
            assert torch.equal(found[f"{i}.{layer}"], stored if is_linear else stored.T)


def torchvision_vit(fc1, fc2):
    shapes = {"encoder.pos_embedding": (1, 5, WIDTH)}
    for i in range(DEPTH):
        name = f"encoder.layers.encoder_layer_{i}"
        shapes |= {f"{name}.self_attention.in_proj_weight": (3 * WIDTH, WIDTH), f"{name}.ln_1.weight": (WIDTH,)}
        shapes |= {f"{name}.self_attention.out_proj.weight": (WIDTH, WIDTH)}
        shapes |= {f"{name}.mlp.{fc1}.weight": (HIDDEN, WIDTH), f"{name}.mlp.{fc2}.weight": (WIDTH, HIDDEN)}
    return shapes


@pytest.mark.parametrize("mlp", [("0", "3"), ("linear_1", "linear_2")])
def test_files_of_torchvision_are_auxiliary_models(tmp_path, mlp):
    entries = random(torchvision_vit(*mlp))
    found = auxiliary_weights(write(entries, tmp_path / "w.pth"))
    name = "encoder.layers.encoder_layer_1"
    assert torch.equal(found["1.attn.qkv"], entries[f"{name}.self_attention.in_proj_weight"])
    assert torch.equal(found["1.mlp.fc2"], entries[f"{name}.mlp.{mlp[1]}.weight"])


def llama(keys=16):
    names = {"attention": parts("self_attn.{}_proj"), "proj": "self_attn.o_proj", "norms": [], "bias": False}
    shapes = blocks("model.layers", **(names | GATED))
    shared = {f"model.layers.{i}.self_attn.{part}_proj.weight": (keys, WIDTH) for i in range(DEPTH) for part in "kv"}
    return shapes | shared | {"lm_head.weight": (9, WIDTH)}


def test_shared_keys_and_gated_mlps_are_joined(tmp_path):
    entries = random(llama())
    found = auxiliary_weights(write(entries, tmp_path / "w.safetensors"))
    name = "model.layers.1"
    qkv = [entries[f"{name}.self_attn.{part}_proj.weight"] for part in "qkv"]
    gate, up = (entries[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(found["1.attn.qkv"], torch.cat(qkv)) and found["1.attn.qkv"].shape == (64, WIDTH)
    assert torch.equal(found["1.mlp.fc1"], torch.cat([gate, up]))


@pytest.mark.parametrize(
    "prefix, attention, proj, mlp",
    [
        ("encoder.layer", parts("attention.self.{}", *WORDS), "attention.output.dense", OLD),
        ("bert.encoder.layer", parts("attention.self.{}", *WORDS), "attention.output.dense", OLD),
        ("layer", NEW["attention"], NEW["proj"], {"fc1": ["mlp.up_proj"], "fc2": "mlp.down_proj"}),
        ("model.layer", NEW["attention"], NEW["proj"], GATED),
    ],
    ids=["BERT", "BERT with a head", "DINOv3", "DINOv3, gated"],
)
def test_other_families_are_auxiliary_models(tmp_path, prefix, attention, proj, mlp):
    names = {"attention": attention, "proj": proj, "fc1": mlp["fc1"], "fc2": mlp["fc2"], "norms": ["norm1"]}
    entries = random(blocks(prefix, **names) | {"cls.predictions.bias": (9,), "pooler.dense.weight": (WIDTH, WIDTH)})
    found = auxiliary_weights(write(entries, tmp_path / "w.pth"))
    for layer, sources in zip(LAYER_NAMES, (attention, [proj], mlp["fc1"], [mlp["fc2"]]), strict=True):
        expected = torch.cat([entries[f"{prefix}.1.{source}.weight"] for source in sources])
        assert torch.equal(found[f"1.{layer}"], expected)
    with pytest.raises(ValueError, match=r"w\.pth: expected transformer blocks named as in one of .*Whisper; got "):
        read_checkpoint(tmp_path / "w.pth")


def own_dinov2(chunks, gated):
    """DINOv2's own names, whose blocks may be in chunks: `blocks.1.3` is the fourth."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 5, WIDTH), "mask_token": (1, WIDTH)} | norm("norm")
    shapes |= {"register_tokens": (1, 4, WIDTH)} | linear("patch_embed.proj", WIDTH, 3, 16, 16)
    fc1, fc2, rows = ("w12", "w3", 2 * HIDDEN) if gated else ("fc1", "fc2", HIDDEN)
    for i in reversed(range(4)):
        name = f"blocks.{i // 2}.{i}" if chunks else f"blocks.{i}"
        shapes |= linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{name}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{name}.mlp.{fc1}", rows, WIDTH) | linear(f"{name}.mlp.{fc2}", WIDTH, HIDDEN)
        shapes |= norm(f"{name}.norm1") | norm(f"{name}.norm2")
        shapes |= {f"{name}.ls1.gamma": (WIDTH,), f"{name}.ls2.gamma": (WIDTH,)}
    return shapes


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "in chunks"])
def test_files_of_dinov2_are_read_as_timm_does(tmp_path, chunks, gated):
    entries = random(own_dinov2(chunks, gated))
    settings = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4} if gated else {}
    model = small(depth=4, init_values=1.0, reg_tokens=4, no_embed_class=True, **settings)
    report = load_pretrained(model, write(entries, tmp_path / "w.pth"))
    assert report.dropped == {"mask_token": "mask token"} and not report.initialised
    found = model.state_dict()
    assert torch.equal(found["cls_token"], entries["cls_token"] + entries["pos_embed"][:, :1])
    assert torch.equal(found["pos_embed"], entries["pos_embed"][:, 1:])
    aux = load_auxiliary(tmp_path / "w.pth")
    for i in range(4):
        name = f"blocks.{i // 2}.{i}" if chunks else f"blocks.{i}"
        weight = entries[f"{name}.mlp.{'w12' if gated else 'fc1'}.weight"]
        assert torch.equal(found[f"blocks.{i}.mlp.fc1.weight"], weight)
        assert torch.equal(aux.blocks[i].mlp.fc1.weight, weight)
        assert torch.equal(found[f"blocks.{i}.ls2.gamma"], entries[f"{name}.ls2.gamma"])


def two_encoders():
    return blocks("encoder_q.layers", **CLIP) | blocks("encoder_k.layers", **CLIP)


def two_chunks():
    return {name.replace("blocks.1.3", "blocks.1.1"): shape for name, shape in own_dinov2(True, False).items()}


def without(name, make=llama):
    return lambda: {key: shape for key, shape in make().items() if not key.startswith(name)}


def towers(*prefixes):
    return lambda: {name: shape for prefix in prefixes for name, shape in blocks(prefix, **CLIP).items()}


def gates_in_chunks():
    """Whose last chunk has no gates, and so looks like another family's."""
    shapes = blocks("blocks.0", **NEW | GATED)
    last = {name.replace("blocks.0.0.", "blocks.1.2."): shape for name, shape in shapes.items() if ".0.0." in name}
    return shapes | {name: shape for name, shape in last.items() if "gate_proj" not in name}


REFUSED = {
    "several": (two_encoders, r"expected one transformer, got several: encoder_q\.layers\.\*, encoder_k\.layers\.\*$"),
    "pictures and sounds": (
        towers("vision_model.layers", "audio_model.layers", "text_model.layers"),
        r"expected one transformer, got several: vision_model\.layers\.\*, audio_model\.layers\.\*$",
    ),
    "pictures and a language model": (
        towers("vision_model.layers", "language_model.layers"),
        r"got several: vision_model\.layers\.\*, language_model\.layers\.\*$",
    ),
    "a decoder beside an unknown encoder": (
        lambda: towers("decoder.layers")() | {"encoder.layers.0.mixer.weight": (3, 3)},
        r"expected an encoder named as in a family of m2pt\.families, got encoder\.layers\.0\.mixer\.weight$",
    ),
    "texts and another": (towers("text_model.layers", "model.layers"), r"got several: text_model\.layers\.\*, model"),
    "no gates in the last chunk": (gates_in_chunks, r"blocks\.2\.mlp\.gate_proj\.weight is missing"),
    "a gate of twice the rows": (
        lambda: llama() | {"model.layers.1.mlp.gate_proj.weight": (2 * HIDDEN, WIDTH)},
        r"layers\.1\.mlp\.gate_proj\.weight: expected shape \(64, 32\), got \(128, 32\)",
    ),
    "an output for other heads": (
        lambda: llama() | {"model.layers.1.self_attn.o_proj.weight": (WIDTH, 20)},
        r"layers\.1\.self_attn\.o_proj\.weight: expected shape \(32, 32\), got \(32, 20\)",
    ),
    "shared values of fewer rows": (
        lambda: llama() | {"model.layers.1.self_attn.v_proj.weight": (5, WIDTH)},
        r"layers\.1\.self_attn\.v_proj\.weight: expected shape \(16, 32\), got \(5, 32\)",
    ),
    "a number twice": (two_chunks, r"blocks\.\*: expected blocks with different numbers, got 1 twice$"),
    "a gap": (without("model.layers.0."), r"model\.layers\.0\.self_attn\.q_proj\.weight is missing"),
    "a chunk less": (
        without("blocks.0.", partial(own_dinov2, True, False)),
        r"blocks\.0\.attn\.qkv\.weight is missing",
    ),
    "no gate": (without("model.layers.0.mlp.gate"), r"model\.layers\.0\.mlp\.gate_proj\.weight is missing"),
    "keys that are not shared evenly": (partial(llama, 5), r"k_proj\.weight: expected shape \(32, 32\), got \(5, 32\)"),
    "connected": (
        lambda: llama() | {"model.layers.0.self_attn.q_proj.cross_modal_scale": (1,)},
        "merge it first with `m2pt merge`",
    ),
    "no layers": (
        lambda: norm("model.layers.0.norm"),
        r"named as in a family of m2pt\.families; the names begin with model\.layers\.0\.norm\.weight, model",
    ),
    "nothing": (dict, r"a family of m2pt\.families; it is empty$"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_no_single_transformer_is_refused(tmp_path, refused):
    make, message = REFUSED[refused]
    path = write(random(make()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth: .*{message}"):
        load_auxiliary(path)


SPOILT = {
    "unknown": (lambda: vit_like("vit.", True, "cls_token") | {"vit.adapter.weight": (3,)}, r"unknown.*vit\.adapter"),
    "unknown embedding": (lambda: vit_like("", True, "norm"), r"unknown entries .*: embeddings\.norm$"),
    "no class token": (
        lambda: {name: shape for name, shape in dinov2(True).items() if "cls_token" not in name},
        r"dinov2\.embeddings\.register_tokens: expected a class token with a position",
    ),
    "two tokens": (
        lambda: clip(True) | {"cls_token": (1, 1, WIDTH)},
        r"embeddings\.class_embedding: a second entry for cls_token",
    ),
    "gate of another shape": (
        lambda: dinov2(True, **GATED) | {"dinov2.encoder.layer.1.mlp.gate_proj.weight": (5, WIDTH)},
        r"dinov2\.encoder\.layer\.1\.mlp\.gate_proj\.weight: expected shape \(64, 32\), got \(5, 32\)",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_does_not_become_a_timm_model_is_refused(tmp_path, spoilt):
    make, message = SPOILT[spoilt]
    with pytest.raises(ValueError, match=rf"w\.pth: .*{message}"):
        read_checkpoint(write(random(make()), tmp_path / "w.pth"))


@pytest.mark.parametrize("converted", [False, True], ids=["as published", "converted"])
@pytest.mark.parametrize("make", [whisper, wav2vec2])
def test_the_embedding_of_the_model_stays_where_the_file_has_none(tmp_path, make, converted):
    entries = random(make(True))
    tensors, _ = convert_state_dict(entries)
    model = small(num_classes=CLASSES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_pretrained(model, write(tensors if converted else entries, tmp_path / "w.pth"))
    embedding = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert set(report.initialised) == {*embedding, "head.weight", "head.bias"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in report.initialised else tensors[name])


def lost(make, *parts):
    return {name: value for name, value in random(make(True)).items() if not any(part in name for part in parts)}


LOST = {
    "DINOv2": (dinov2, ("patch_embeddings",), partial(small, reg_tokens=4, no_embed_class=True, init_values=1.0)),
    "a class token alone": (plain, ("patch_embeddings", "position_embeddings"), small),
    "positions alone": (plain, ("patch_embeddings", "cls_token"), small),
    "CLIP's norm alone": (clip, ("embeddings",), partial(small, pre_norm=True)),
}


@pytest.mark.parametrize("converted", [False, True], ids=["as published", "converted"])
@pytest.mark.parametrize("name", LOST)
def test_a_lost_patch_embedding_is_missed(tmp_path, name, converted):
    make, parts, build = LOST[name]
    entries = lost(make, *parts)
    path = write(convert_state_dict(entries)[0] if converted else entries, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing in the file: .*patch_embed\.proj\.weight"):
        load_pretrained(build(), path)


def test_ast_is_loaded_into_the_audio_model(tmp_path):
    """Whose spectrograms are time by frequency, and whose positions are its own."""
    write(random(ast(True)), tmp_path / "ast.pth")
    settings = {"patch_size": 16, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 2}
    model = create_model("audio", "tiny", num_classes=CLASSES, img_size=(64, 32), **settings)
    positions = model.pos_embed.clone()
    report = load_pretrained(model, tmp_path / "ast.pth")
    assert torch.equal(model.pos_embed, positions) and report.initialised == ["pos_embed"]
    entries = load_state_dict(tmp_path / "ast.pth")
    prefix = "audio_spectrogram_transformer."
    assert report.dropped == {
        f"{prefix}embeddings.distillation_token": "the model has no distillation token",
        f"{prefix}embeddings.position_embeddings": "positions of a spectrogram laid out frequency by time",
        **dict.fromkeys((f"{prefix}layernorm.weight", f"{prefix}layernorm.bias"), "the model has no such layer"),
    }
    patches = {kind: entries[f"{prefix}embeddings.patch_embeddings.projection.{kind}"] for kind in ("weight", "bias")}
    frequency_by_time = torch.randn(1, 1, 32, 64)
    expected = nn.functional.conv2d(frequency_by_time, patches["weight"], patches["bias"], stride=16)
    found = model.patch_embed(frequency_by_time.mT).unflatten(1, (4, 2)).permute(0, 3, 2, 1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, entries[f"{prefix}layers.1.mlp.fc2.weight"])


def test_a_distillation_token_is_left_out_with_its_position(tmp_path):
    write(random(deit(False)), tmp_path / "deit.pth")
    entries, model = load_state_dict(tmp_path / "deit.pth"), small(num_classes=CLASSES)
    report = load_pretrained(model, tmp_path / "deit.pth")
    positions = entries["deit.embeddings.position_embeddings"]
    assert torch.equal(model.pos_embed, positions[:, [0, 2, 3, 4, 5]])
    assert report.changed["pos_embed"] == "without the distillation token's"
    assert "the model has no distillation token" in str(report)
    larger = small(num_classes=CLASSES, img_size=64)
    report = load_pretrained(larger, tmp_path / "deit.pth")
    assert report.changed["pos_embed"] == "resampled from 2 x 2 to 4 x 4"
    assert torch.equal(larger.pos_embed[:, 0], positions[:, 0])


def test_a_distilled_model_of_grey_pictures_is_not_taken_for_one_of_spectrograms(tmp_path):
    shapes = deit(True) | {"deit.embeddings.patch_embeddings.projection.weight": (WIDTH, 1, 16, 16)}
    write(random(shapes), tmp_path / "deit.pth")
    entries, model = load_state_dict(tmp_path / "deit.pth"), small(num_classes=CLASSES, in_chans=1)
    report = load_pretrained(model, tmp_path / "deit.pth")
    assert torch.equal(model.patch_embed.proj.weight, entries["deit.embeddings.patch_embeddings.projection.weight"])
    assert torch.equal(model.pos_embed, entries["deit.embeddings.position_embeddings"][:, [0, 2, 3, 4, 5]])
    assert report.changed["pos_embed"] == "without the distillation token's" and not report.initialised


def test_the_head_for_distillation_leaves_the_other(tmp_path):
    write(random(deit(True)), tmp_path / "deit.pth")
    entries = load_state_dict(tmp_path / "deit.pth")
    model = small(num_classes=CLASSES)
    report = load_pretrained(model, tmp_path / "deit.pth")
    assert torch.equal(model.head.weight, entries["cls_classifier.weight"]) and not report.initialised
    heads = {name: reason for name, reason in report.dropped.items() if "classifier" in name}
    assert heads == dict.fromkeys(
        ("distillation_classifier.weight", "distillation_classifier.bias"), "the model has no such layer"
    )
    report = load_pretrained(small(num_classes=3), tmp_path / "deit.pth")
    assert report.dropped["cls_classifier.bias"] == "the model's head has other shapes"
    assert report.dropped["distillation_classifier.bias"] == "the model has no such layer"
    report = load_pretrained(small(), tmp_path / "deit.pth")
    assert report.dropped["cls_classifier.bias"] == "the model has no such layer"
    model = small(VisionTransformerDistilled, num_classes=CLASSES)
    model.head_dist = nn.Linear(WIDTH, 3)
    report = load_pretrained(model, tmp_path / "deit.pth")
    assert report.dropped == dict.fromkeys(heads, "the model's head has other shapes")
    assert torch.equal(model.head.weight, entries["cls_classifier.weight"])


@pytest.mark.parametrize("make", [beit, partial(beit, is_shared=True)], ids=["of every block", "shared"])
def test_relative_positions_leave_the_models_own(tmp_path, make, is_new):
    write(random(make(is_new)), tmp_path / "beit.pth")
    model = small(num_classes=CLASSES, init_values=1.0, global_pool="avg")
    positions = model.pos_embed.clone()
    report = load_pretrained(model, tmp_path / "beit.pth")
    assert report.initialised == ["pos_embed"] and torch.equal(model.pos_embed, positions)


def test_an_entry_of_another_shape_than_the_models_is_named_as_in_the_file(tmp_path, is_new):
    path = write(random(plain(is_new)), tmp_path / "w.pth")
    name = "vit.layers.0.mlp.fc2.weight" if is_new else "vit.encoder.layer.0.output.dense.weight"
    message = rf"w\.pth: VisionTransformer: blocks\.0\.mlp\.fc2\.weight, {re.escape(name)}: expected shape \(32, 96\)"
    with pytest.raises(ValueError, match=message):
        load_pretrained(small(mlp_ratio=3), path)


def test_a_block_that_such_a_file_lacks_is_still_missed(tmp_path):
    with pytest.raises(ValueError, match=r"missing in the file: blocks\.2\.norm1\.weight"):
        load_pretrained(small(depth=3), write(random(whisper(True)), tmp_path / "w.pth"))


CONFIG = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": HIDDEN}
PICTURES = CONFIG | {"image_size": 32, "patch_size": 16, "num_labels": CLASSES}
DINO_CONFIG = {key: value for key, value in PICTURES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
TEXTS = CONFIG | {"vocab_size": 9}
VIDEO = PICTURES | {"num_frames": 4, "tubelet_size": 2}
SPECTROGRAM = PICTURES | {"max_length": 64, "num_mel_bins": 32, "frequency_stride": 16, "time_stride": 16}
IMAGE, CLIP_OF_VIDEO, FBANK = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 3, 32, 32), torch.randn(2, 64, 32)
SCALED = {"init_values": 1.0}
MAP = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"}


def last(output):
    return output.last_hidden_state


def logits(output):
    return output.logits


def pooled(output):
    return output.pooler_output


def both_heads(model, input):
    model.set_distilled_training(False)
    return model(input)


# The class in transformers and its configuration, what it puts out, its input; a timm model and what it puts out.
features = VisionTransformer.forward_features
TWINS = {
    "ViT": ("ViTModel", "ViTConfig", PICTURES, last, IMAGE, small, features),
    "ViT, classifier": (
        *("ViTForImageClassification", "ViTConfig", PICTURES, logits, IMAGE),
        *(partial(small, num_classes=CLASSES), VisionTransformer.forward),
    ),
    "DeiT": (
        *("DeiTForImageClassificationWithTeacher", "DeiTConfig", PICTURES, logits, IMAGE),
        *(partial(small, VisionTransformerDistilled, num_classes=CLASSES), both_heads),
    ),
    "AST": (
        *("ASTModel", "ASTConfig", SPECTROGRAM, last, FBANK),
        partial(small, VisionTransformerDistilled, img_size=(32, 64), in_chans=1),
        lambda model, input: model.forward_features(input.mT.unsqueeze(1)),
    ),
    "BEiT without relative positions": (
        "BeitForImageClassification",
        "BeitConfig",
        PICTURES | {"use_absolute_position_embeddings": True},
        logits,
        IMAGE,
        partial(small, num_classes=CLASSES, global_pool="avg", **SCALED),
        VisionTransformer.forward,
    ),
    "VideoMAE": (
        *("VideoMAEForVideoClassification", "VideoMAEConfig", VIDEO, logits, CLIP_OF_VIDEO),
        partial(create_model, "video", num_classes=CLASSES, num_frames=4, **SIZE),
        lambda model, input: model(input.transpose(1, 2)),
    ),
    "DINOv2": ("Dinov2Model", "Dinov2Config", DINO_CONFIG, last, IMAGE, partial(small, eps=1e-6, **SCALED), features),
    "DINOv2, gated": (
        *("Dinov2Model", "Dinov2Config", DINO_CONFIG | {"use_swiglu_ffn": True}, last, IMAGE),
        partial(small, eps=1e-6, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, **SCALED | {"mlp_ratio": 2 * 48 / WIDTH}),
        features,
    ),
    "DINOv2, registers": (
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO_CONFIG, last, IMAGE),
        *(partial(small, eps=1e-6, reg_tokens=4, no_embed_class=True, **SCALED), features),
    ),
    "SigLIP": (
        *("SiglipVisionModel", "SiglipVisionConfig", PICTURES, pooled, IMAGE),
        *(partial(small, eps=1e-6, **MAP), VisionTransformer.forward),
    ),
    "CLIP": (
        *("CLIPVisionModel", "CLIPVisionConfig", PICTURES, pooled, IMAGE),
        partial(small, eps=1e-5, pre_norm=True, act_layer="quick_gelu"),
        VisionTransformer.forward,
    ),
}


def hugging_face(name, config, settings):
    """A model of `transformers` whose every parameter counts: biases and norms too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(model, folder, how):
    if how == "torch":
        torch.save(model.state_dict(), folder / "pytorch_model.pth")
        return folder / "pytorch_model.pth"
    model.save_pretrained(folder, max_shard_size="20KB" if how == "shards" else "1GB")
    assert (folder / "model.safetensors.index.json").is_file() == (how == "shards")
    return folder


@pytest.mark.parametrize("how", ["torch", "whole", "shards"])
@pytest.mark.parametrize("twin", TWINS)
def test_what_transformers_writes_computes_the_same_in_timm(tmp_path, twin, how):
    name, config, settings, output, input, build, run = TWINS[twin]
    theirs, ours = hugging_face(name, config, settings), build().eval()
    report = load_pretrained(ours, saved(theirs, tmp_path, how))
    assert not report.initialised
    with torch.no_grad():
        torch.testing.assert_close(run(ours, input), output(theirs(input)), rtol=1e-4, atol=1e-5)


SPEECH = {
    "Wav2Vec2": (
        *("Wav2Vec2Model", "Wav2Vec2Config"),
        CONFIG
        | {"conv_dim": (WIDTH, WIDTH), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
        | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        *("encoder.layers.0", torch.randn(2, 400)),
    ),
    "Whisper": (
        *("WhisperModel", "WhisperConfig"),
        {"d_model": WIDTH, "encoder_layers": DEPTH, "decoder_layers": 1, "vocab_size": 9, "max_source_positions": 8}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": HIDDEN}
        | {"decoder_ffn_dim": HIDDEN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 1},
        *("encoder.layers.0", torch.randn(2, 80, 16)),
    ),
}


@pytest.mark.parametrize("how", ["torch", "whole", "shards"])
@pytest.mark.parametrize("speech", SPEECH)
def test_blocks_of_speech_compute_the_same_in_timm(tmp_path, speech, how):
    name, config, settings, first, input = SPEECH[speech]
    theirs, ours = hugging_face(name, config, settings), small(eps=1e-5)
    load_pretrained(ours, saved(theirs, tmp_path, how))
    seen = []

    def see(module, arguments, named):
        seen.append(arguments[0] if arguments else named["hidden_states"])

    theirs.get_submodule(first).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        encoder = theirs.get_encoder() if speech == "Whisper" else theirs
        expected = encoder(input).last_hidden_state
        torch.testing.assert_close(ours.norm(ours.blocks(seen[0])), expected, rtol=1e-4, atol=1e-5)


AUXILIARIES = {
    "BERT": ("BertModel", "BertConfig", TEXTS),
    "Llama": ("LlamaModel", "LlamaConfig", TEXTS | {"num_key_value_heads": 1}),
    "GPT-2": ("GPT2Model", "GPT2Config", {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 2, "vocab_size": 9}),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", PICTURES),
    "DINOv3, gated": ("DINOv3ViTModel", "DINOv3ViTConfig", PICTURES | {"use_gated_mlp": True}),
    "CLIP": ("CLIPModel", "CLIPConfig", {"vision_config": PICTURES, "text_config": TEXTS}),
    "SigLIP": ("SiglipModel", "SiglipConfig", {"vision_config": PICTURES, "text_config": TEXTS}),
    "BEiT": ("BeitModel", "BeitConfig", PICTURES | {"use_relative_position_bias": True}),
    "BEiT, shared positions": (
        *("BeitForImageClassification", "BeitConfig"),
        PICTURES | {"use_shared_relative_position_bias": True},
    ),
    **{
        f"BEiT, masked, {mean}": (
            *("BeitForMaskedImageModeling", "BeitConfig"),
            PICTURES | {"vocab_size": 9, "use_mask_token": True, "use_mean_pooling": mean},
        )
        for mean in (False, True)
    },
    "DINOv2, classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO_CONFIG),
    "Wav2Vec2, adapters": (
        *("Wav2Vec2ForCTC", "Wav2Vec2Config"),
        SPEECH["Wav2Vec2"][2] | {"vocab_size": 9, "add_adapter": True, "adapter_attn_dim": 4},
    ),
    "Wav2Vec2, speakers": (
        *("Wav2Vec2ForXVector", "Wav2Vec2Config"),
        SPEECH["Wav2Vec2"][2] | {"use_weighted_layer_sum": True},
    ),
    "Wav2Vec2, pretraining": ("Wav2Vec2ForPreTraining", "Wav2Vec2Config", SPEECH["Wav2Vec2"][2]),
    "ViT-MAE": ("ViTMAEForPreTraining", "ViTMAEConfig", PICTURES),
    "VideoMAE": ("VideoMAEForPreTraining", "VideoMAEConfig", VIDEO),
    **{name: row[:3] for name, row in (TWINS | SPEECH).items()},
}


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_what_transformers_writes_is_an_auxiliary_model(tmp_path, auxiliary):
    model = hugging_face(*AUXILIARIES[auxiliary])
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    found = auxiliary_weights(saved(model, tmp_path, "torch"))
    for folder, how in ((whole, "whole"), (shards, "shards")):
        folder.mkdir()
        again = auxiliary_weights(saved(model, folder, how))
        assert all(torch.equal(again[name], value) for name, value in found.items())


CONVERTED = ("BEiT, shared positions", "BEiT, masked, False", "BEiT, masked, True", "DINOv2, classifier")
CONVERTED += ("Wav2Vec2, speakers", "Wav2Vec2, pretraining")


@pytest.mark.parametrize("how", ["torch", "whole"])
@pytest.mark.parametrize("auxiliary", CONVERTED)
def test_what_transformers_writes_around_the_blocks_is_known(tmp_path, auxiliary, how):
    model = hugging_face(*AUXILIARIES[auxiliary])
    tensors, report = read_checkpoint(saved(model, tmp_path, how))
    assert all(re.match(REASONS[reason], name) for name, reason in report.dropped.items())
    expected = {"beit.layernorm": "norm.weight", "layernorm": None}
    for layer, target in expected.items():
        if f"{layer}.weight" in model.state_dict():
            assert report.used.get(f"{layer}.weight") == target
    assert not any(name.startswith("head.") for name in tensors) or auxiliary == "BEiT, shared positions"


def test_a_folder_of_transformers_is_connected(tmp_path):
    model = hugging_face("ViTModel", "ViTConfig", PICTURES)
    aux = load_auxiliary(saved(model, tmp_path, "shards"))
    target = reparameterize_aux_into_target_model(small(), aux)
    expected = load_state_dict(tmp_path)["encoder.layer.1.output.dense.weight"]
    assert torch.equal(target.blocks[1].mlp.fc2.aux_weight, expected)


def test_the_vision_tower_of_blip_is_meant_and_not_the_decoder_of_its_texts(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": HIDDEN}
    text = size | {
        "vocab_size": 50,
        "encoder_hidden_size": WIDTH,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    text |= {"sep_token_id": 2, "pad_token_id": 0}
    config = transformers.BlipConfig(vision_config=size | {"image_size": 32, "patch_size": 16}, text_config=text)
    model = transformers.BlipForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    found = load_auxiliary(tmp_path)
    blocks = model.vision_model.encoder.layers
    assert len(found.blocks) == DEPTH
    assert torch.equal(found.blocks[1].attn.qkv.weight, blocks[1].self_attn.qkv.weight)
    assert torch.equal(found.blocks[1].attn.proj.weight, blocks[1].self_attn.projection.weight)
