"""Models of Hugging Face and torchvision on either side of a pathway, found by the names of their families."""

import pytest
import timm
import torch
from helpers import hugging_face, randomised
from torch import nn
from torchvision.models import VisionTransformer

from m2pt import (
    FusedCrossModalLinear,
    describe_pathways,
    merge_pathways,
    reparameterize_aux_into_target_model,
)

transformers = pytest.importorskip("transformers")
modeling_dinov2 = transformers.models.dinov2.modeling_dinov2

WIDTH, HIDDEN, DEPTH = 32, 64, 2
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": HIDDEN}
PICTURE = {"image_size": 32, "patch_size": 16}
SPEECH = SIZE | {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WHISPER = TEXT | {"d_model": WIDTH, "decoder_start_token_id": 1, "max_source_positions": 8, "max_target_positions": 8}
WHISPER |= {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", DEPTH), ("attention_heads", 2), ("ffn_dim", HIDDEN))
}
DINO = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "mlp_ratio": 2} | PICTURE


def timm_vit(seed, **settings):
    torch.manual_seed(seed)
    size = {"img_size": 32, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size | settings).eval()


def torchvision_vit(seed):
    torch.manual_seed(seed)
    return randomised(VisionTransformer(32, 16, DEPTH, 2, WIDTH, HIDDEN, num_classes=5).eval())


def parts(pattern, *names):
    return tuple(pattern.format(name) for name in names)


QKV = ("q", "k", "v")
CLASSIC = (parts("attention.attention.{}", "query", "key", "value"), "attention.output.dense")
CURRENT = (parts("attention.{}_proj", *QKV), "attention.o_proj")
DINOV2 = CLASSIC if hasattr(modeling_dinov2, "Dinov2SelfAttention") else CURRENT  # renamed by some release after 5.17
SELF = (parts("self_attn.{}_proj", *QKV), "self_attn.out_proj")
MLP, DENSE = ("mlp.fc1", "mlp.fc2"), ("intermediate.dense", "output.dense")
FORWARD = ("feed_forward.intermediate_dense", "feed_forward.output_dense")

IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
SOUND = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}
TOKENS = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])}
MEL = {"input_features": torch.randn(2, 80, 16, generator=torch.Generator().manual_seed(0))}

FAMILIES = {
    "ViT": (hugging_face("ViTModel", **SIZE, **PICTURE), "layers", *CURRENT, *MLP, IMAGES),
    "ViT, classifier": (
        hugging_face("ViTForImageClassification", **SIZE, **PICTURE), "vit.layers", *CURRENT, *MLP, IMAGES),
    "DeiT": (hugging_face("DeiTModel", **SIZE, **PICTURE), "layers", *CURRENT, *MLP, IMAGES),
    "BEiT": (hugging_face("BeitModel", **SIZE, **PICTURE), "layers", *CURRENT, *MLP, IMAGES),
    "AST": (
        hugging_face("ASTModel", **SIZE, max_length=32, num_mel_bins=32, time_stride=16, frequency_stride=16),
        "layers", *CURRENT, *MLP, {"input_values": torch.ones(2, 32, 32)}),
    "VideoMAE": (
        hugging_face("VideoMAEModel", **SIZE, **PICTURE, num_frames=4), "encoder.layer", *CLASSIC, *DENSE,
        {"pixel_values": torch.ones(2, 4, 3, 32, 32)}),
    "VideoMAE, pretraining": (
        hugging_face("VideoMAEForPreTraining", **SIZE, **PICTURE, num_frames=4, decoder_num_hidden_layers=1),
        "videomae.encoder.layer", *CLASSIC, *DENSE, None),
    "DINOv2": (hugging_face("Dinov2Model", **DINO), "encoder.layer", *DINOV2, *MLP, IMAGES),
    "DINOv2, registers": (
        hugging_face("Dinov2WithRegistersModel", **DINO), "encoder.layer", *DINOV2, *MLP, IMAGES),
    "DINOv3": (
        hugging_face("DINOv3ViTModel", **SIZE, **PICTURE), "model.layer", *CURRENT, "mlp.up_proj", "mlp.down_proj",
        IMAGES),
    "SigLIP": (hugging_face("SiglipVisionModel", **SIZE, **PICTURE), "encoder.layers", *SELF, *MLP, IMAGES),
    "CLIP": (hugging_face("CLIPVisionModel", **SIZE, **PICTURE), "encoder.layers", *SELF, *MLP, IMAGES),
    "BERT": (
        hugging_face("BertModel", **SIZE, vocab_size=50), "encoder.layer",
        parts("attention.self.{}", "query", "key", "value"), "attention.output.dense", *DENSE, TOKENS),
    "Wav2Vec2": (
        hugging_face("Wav2Vec2Model", **SPEECH), "encoder.layers", parts("attention.{}_proj", *QKV),
        "attention.out_proj", *FORWARD, SOUND),
    "HuBERT": (
        hugging_face("HubertModel", **SPEECH), "encoder.layers", parts("attention.{}_proj", *QKV),
        "attention.out_proj", *FORWARD, SOUND),
    "Whisper": (
        hugging_face("WhisperModel", **WHISPER), "encoder.layers", *SELF, "fc1", "fc2",
        MEL | {"decoder_input_ids": torch.tensor([[3], [4]])}),
}  # fmt: skip


def matrices(name, model, block):
    """The rows of query, key and value, of the projection after them and of the MLP, in this order."""
    _, body, qkv, *others, _ = FAMILIES[name]
    layers = model.get_submodule(body)[block]
    together = torch.cat([layers.get_submodule(part).weight for part in qkv])
    return [together, *(layers.get_submodule(other).weight for other in others)]


def timm_layers(model, block):
    attention, mlp = model.blocks[block].attn, model.blocks[block].mlp
    return [attention.qkv, attention.proj, mlp.fc1, mlp.fc2]


def fused_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedCrossModalLinear)}


@pytest.mark.parametrize("name", FAMILIES)
def test_is_an_auxiliary_of_a_timm_vit(name):
    build, *_ = FAMILIES[name]
    aux, target = build(0), timm_vit(1)
    reparameterize_aux_into_target_model(target, aux, sample=IMAGES["pixel_values"])
    assert len(fused_layers(target)) == 4 * DEPTH
    for block in range(DEPTH):
        for layer, expected in zip(timm_layers(target, block), matrices(name, aux, block), strict=True):
            assert torch.equal(layer.aux_weight, expected)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family[-1] is not None])
def test_is_the_target_of_a_timm_vit(name):
    """Found without a word, every layer is called, gets its rows as views, and merges into what was computed."""
    build, body, qkv, *others, sample = FAMILIES[name]
    target, aux = build(0), timm_vit(1)
    before = target(**sample)[0]
    reparameterize_aux_into_target_model(target, aux, sample=sample)
    layers = fused_layers(target)
    assert set(layers) == {f"{body}.{block}.{layer}" for block in range(DEPTH) for layer in (*qkv, *others)}
    assert torch.equal(target(**sample)[0], before)
    for block in range(DEPTH):
        own = [layers[f"{body}.{block}.{layer}"].aux_weight for layer in (*qkv, *others)]
        expected = [layer.weight for layer in timm_layers(aux, block)]
        assert all(torch.equal(*pair) for pair in zip((torch.cat(own[:3]), *own[3:]), expected, strict=True))
        assert own[2].data_ptr() == expected[0][2 * WIDTH :].data_ptr()
    for layer in layers.values():
        nn.init.normal_(layer.cross_modal_scale)
    connected = target(**sample)[0]
    assert not torch.allclose(connected, before, atol=1e-2)
    torch.testing.assert_close(merge_pathways(target)(**sample)[0], connected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "target, aux", [("ViT", "VideoMAE"), ("BERT", "AST"), ("Wav2Vec2", "CLIP"), ("Whisper", "DINOv3")]
)
def test_three_layers_on_either_side_share_their_weights(target, aux):
    build, body, qkv, *_, sample = FAMILIES[target]
    build_aux, aux_body, aux_qkv, *_ = FAMILIES[aux]
    model, other = build(0), build_aux(1)
    reparameterize_aux_into_target_model(model, other, sample=sample)
    for block in range(DEPTH):
        for own, expected in zip(qkv, aux_qkv, strict=True):
            weight = other.get_submodule(f"{aux_body}.{block}.{expected}").weight
            assert model.get_submodule(f"{body}.{block}.{own}").aux_weight.data_ptr() == weight.data_ptr()


def trained(model, sample):
    """After a step of which every scale gets its part."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(**sample) if isinstance(sample, dict) else model(sample)
    (output if isinstance(output, torch.Tensor) else output[0]).square().mean().backward()
    optimizer.step()
    assert all(layer.cross_modal_scale.item() != 0 for layer in fused_layers(model).values())
    return model.eval()


def test_ast_to_timm_in_ten_lines(tmp_path):
    aux_model, model = FAMILIES["AST"][0](0), timm_vit(1)
    reparameterize_aux_into_target_model(model, aux_model)
    logits = trained(model.train(), IMAGES["pixel_values"])(IMAGES["pixel_values"])
    torch.save(merge_pathways(model).state_dict(), tmp_path / "merged.pth")

    loaded = timm_vit(2, checkpoint_path=str(tmp_path / "merged.pth"))
    torch.testing.assert_close(loaded(IMAGES["pixel_values"]), logits)


def test_videomae_to_a_hugging_face_vit_in_ten_lines(tmp_path):
    model, aux_model = FAMILIES["ViT, classifier"][0](0), FAMILIES["VideoMAE"][0](1)
    reparameterize_aux_into_target_model(model, aux_model)
    logits = trained(model.train(), IMAGES)(**IMAGES).logits
    merge_pathways(model).save_pretrained(tmp_path)

    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**IMAGES).logits, logits)


def test_minilm_to_a_small_vit_in_ten_lines(tmp_path):
    """Six blocks of 384 features in twelve."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    aux_model = transformers.BertModel(transformers.BertConfig(**shape, vocab_size=50))
    model = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=5)
    with pytest.raises(ValueError, match=r"^aux_model: expected 12 blocks in 'encoder.layer' .*got 6: .*'even'"):
        reparameterize_aux_into_target_model(model, aux_model)
    reparameterize_aux_into_target_model(model, aux_model, blocks="even")
    blocks = sorted({int(name.split(".")[1]) for name in fused_layers(model)})
    assert blocks == [0, 2, 4, 7, 9, 11]
    for place, block in enumerate(blocks):
        expected = aux_model.encoder.layer[place].intermediate.dense.weight
        assert model.blocks[block].mlp.fc1.aux_weight.data_ptr() == expected.data_ptr()
    logits = trained(model, IMAGES["pixel_values"])(IMAGES["pixel_values"])
    torch.save(merge_pathways(model).state_dict(), tmp_path / "merged.pth")

    settings = {"img_size": 32, "num_classes": 5, "checkpoint_path": str(tmp_path / "merged.pth")}
    loaded = timm.create_model("vit_small_patch16_224", **settings).eval()
    torch.testing.assert_close(loaded(IMAGES["pixel_values"]), logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_merged_model_of_every_library_saves_what_it_computes(tmp_path, attention):
    model = FAMILIES["BERT"][0](0)
    model.set_attn_implementation(attention)
    reparameterize_aux_into_target_model(model, timm_vit(1), sample=TOKENS)
    features = trained(model, TOKENS)(**TOKENS)[0]
    merge_pathways(model).save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, attn_implementation=attention)
    torch.testing.assert_close(loaded(**TOKENS)[0], features)


GPT2 = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 2, "n_inner": HIDDEN, "vocab_size": 50}


def test_conv1d_is_read_transposed():
    aux, target = hugging_face("GPT2Model", **GPT2)(0), timm_vit(1)
    reparameterize_aux_into_target_model(target, aux, sample=IMAGES["pixel_values"])
    for block in range(DEPTH):
        own = aux.h[block]
        expected = [own.attn.c_attn, own.attn.c_proj, own.mlp.c_fc, own.mlp.c_proj]
        for layer, conv in zip(timm_layers(target, block), expected, strict=True):
            assert torch.equal(layer.aux_weight, conv.weight.T)
            assert layer.aux_weight.is_contiguous()
    x, conv = torch.randn(3, WIDTH), aux.h[0].mlp.c_fc
    torch.testing.assert_close(nn.functional.linear(x, target.blocks[0].mlp.fc1.aux_weight, conv.bias), conv(x))


def test_conv1d_is_no_target():
    target = hugging_face("GPT2Model", **GPT2)(0)
    with pytest.raises(ValueError, match=r"^target_model: h.0.attn.c_attn is a transformers.pytorch_utils.Conv1D, exp"):
        reparameterize_aux_into_target_model(target, timm_vit(1))
    assert not fused_layers(target)


def test_conv1d_that_computes_something_else_is_refused():
    class Scaled(transformers.pytorch_utils.Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    aux, target = hugging_face("GPT2Model", **GPT2)(0), timm_vit(1)
    aux.h[1].mlp.c_fc.__class__ = Scaled
    with pytest.raises(ValueError, match=r"^aux_model: h.1.mlp.c_fc is a .*Scaled, expected a plain nn.Linear$"):
        reparameterize_aux_into_target_model(target, aux)
    assert not fused_layers(target)


@pytest.mark.parametrize("model", ["CLIPModel", "SiglipModel"])
def test_two_towers_are_named(model):
    towers = {"vision_config": SIZE | PICTURE, "text_config": SIZE | TEXT | {"eos_token_id": 2}}
    aux, target = hugging_face(model, **towers)(0), timm_vit(1)
    candidates = r"'text_model.encoder.layers' \(2 blocks\), 'vision_model.encoder.layers' \(2 blocks\)$"
    with pytest.raises(ValueError, match=f"^aux_model: {model} has several sequences of blocks, .*{candidates}"):
        reparameterize_aux_into_target_model(target, aux)
    reparameterize_aux_into_target_model(target, aux, main_body_name=("blocks", "vision_model.encoder.layers"))
    fc1 = aux.vision_model.encoder.layers[1].mlp.fc1
    assert target.blocks[1].mlp.fc1.aux_weight.data_ptr() == fc1.weight.data_ptr()


LLAMA = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 48}


def test_gated_layers_are_joined_and_divided():
    """timm's SwiGLUPacked has the rows of the gate before those of what passes it, as its product says."""
    llama = hugging_face("LlamaModel", **LLAMA, vocab_size=50)(0)
    packed = timm_vit(1, mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=3)
    reparameterize_aux_into_target_model(packed, llama, sample=IMAGES["pixel_values"])
    mlp = llama.layers[1].mlp
    assert torch.equal(packed.blocks[1].mlp.fc1.aux_weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))

    llama = hugging_face("LlamaModel", **LLAMA, vocab_size=50)(0)
    packed = timm_vit(1, mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=3)
    reparameterize_aux_into_target_model(llama, packed, sample=TOKENS)
    mlp = llama.layers[1].mlp
    together = torch.cat([mlp.gate_proj.aux_weight, mlp.up_proj.aux_weight])
    assert torch.equal(together, packed.blocks[1].mlp.fc1.weight)


def test_widths_that_differ_are_refused_with_what_fits():
    aux = hugging_face("ASTModel", **SIZE | {"intermediate_size": 96}, max_length=32, num_mel_bins=32)(0)
    target = timm_vit(1)
    message = (
        r"^aux_model: layers.0.mlp.fc1 has weight shape \(96, 32\), expected \(64, 32\) as in target_model;"
        r" what fits in this block: attn.qkv, attn.proj$"
    )
    with pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux)
    reparameterize_aux_into_target_model(target, aux, layer_names=("attn.qkv", "attn.proj"))
    assert len(fused_layers(target)) == 2 * DEPTH


def test_torchvision_on_either_side():
    """Its attention reads weights without a call: as a target only its MLPs are connected."""
    aux, target = torchvision_vit(0), timm_vit(1)
    reparameterize_aux_into_target_model(target, aux, sample=IMAGES["pixel_values"])
    for block, own in enumerate(aux.encoder.layers):
        expected = [
            own.self_attention.in_proj_weight,
            own.self_attention.out_proj.weight,
            own.mlp[0].weight,
            own.mlp[3].weight,
        ]
        for layer, weight in zip(timm_layers(target, block), expected, strict=True):
            assert layer.aux_weight.data_ptr() == weight.data_ptr()

    target, aux = torchvision_vit(0), timm_vit(1)
    reparameterize_aux_into_target_model(target, aux, sample=IMAGES["pixel_values"])
    names = [f"encoder.layers.encoder_layer_{block}.mlp.{layer}" for block in range(DEPTH) for layer in (0, 3)]
    assert list(fused_layers(target)) == names
    connected = trained(target, IMAGES["pixel_values"])(IMAGES["pixel_values"])
    torch.testing.assert_close(merge_pathways(target)(IMAGES["pixel_values"]), connected)


class TestLora:
    def wrapped(self, **settings):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["qkv", "fc1"], r=2, init_lora_weights=False, **settings)
        return peft.get_peft_model(timm_vit(0), config)

    def test_the_layer_inside_is_connected_and_trained_beside_the_adapter(self):
        model = self.wrapped()
        reparameterize_aux_into_target_model(model, timm_vit(1), sample=IMAGES["pixel_values"])
        names = {name.removeprefix("base_model.model.") for name in fused_layers(model)}
        layers = ("attn.qkv.base_layer", "attn.proj", "mlp.fc1.base_layer", "mlp.fc2")
        assert names == {f"blocks.{block}.{layer}" for block in range(DEPTH) for layer in layers}
        logits = trained(model, IMAGES["pixel_values"])(IMAGES["pixel_values"])
        merged = merge_pathways(model).merge_and_unload()
        assert [type(layer) for layer in timm_layers(merged, 0)] == [nn.Linear] * 4
        torch.testing.assert_close(merged(IMAGES["pixel_values"]), logits, rtol=1e-4, atol=1e-4)

    def test_the_layer_inside_an_auxiliary_is_read(self):
        aux, target = self.wrapped(), timm_vit(1)
        reparameterize_aux_into_target_model(target, aux)
        base = aux.base_model.model.blocks[1].mlp.fc1.base_layer
        assert target.blocks[1].mlp.fc1.aux_weight.data_ptr() == base.weight.data_ptr()

    def test_dora_reads_the_weight(self):
        model = self.wrapped(use_dora=True)
        with pytest.raises(
            ValueError, match=r"^target_model: .*attn.qkv.base_layer is not called by its Linear, which"
        ):
            reparameterize_aux_into_target_model(model, timm_vit(1))


def test_the_description_tells_what_is_connected_to_what():
    target = timm_vit(0)
    reparameterize_aux_into_target_model(target, {"audio": FAMILIES["AST"][0](1)}, aux_dtype="int8", blocks=[(1, 0)])
    lines = describe_pathways(target).splitlines()
    qkv = " + ".join(f"layers.0.attention.{part}_proj" for part in QKV)
    assert lines[2] == f"| blocks.1.attn.qkv | audio | {qkv} | int8, frozen | +0.0000, trained | not yet |"
    assert len(lines) == 2 + 4
    other = reparameterize_aux_into_target_model(FAMILIES["ViT"][0](0), timm_vit(1))
    other(**IMAGES)
    line = "| layers.0.attention.k_proj | VisionTransformer | blocks.0.attn.qkv[32:64] | float32, frozen |"
    assert describe_pathways(other).splitlines()[3] == f"{line} +0.0000, trained | yes |"
