"""How other projects name the parts of a transformer around the linear layers of its blocks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

QUERY_KEY_VALUE, GATE_UP = ("query", "key", "value"), ("gate", "up")
PARTS = {"attn.qkv": QUERY_KEY_VALUE, "mlp.fc1": GATE_UP}
"""The parts whose rows are joined in a layer, by names of our own: `attn.query`, `mlp.gate`."""


@dataclass(frozen=True)
class Format:
    """How a project names the parts of its transformer, as regular expressions.

    Before they are matched, names in blocks are made to begin with `blocks.i.`, with linear layers named as in timm or
    `PARTS`; all others lose the prefix of the whole transformer, such as `vit.`.

    Attributes:
        name: what the report calls it.
        blocks: the prefix of a block's number and the name of its value or qkv layer; a space; and the name of fc1.
        renames: the beginning of a name and its replacement; the first that matches is used.
        drops: the beginning of a name and the reason why such an entry is left out, tried before `renames`.
        outside: the same for names without the prefix of the whole transformer, tried before `drops`.
    """

    name: str
    blocks: str
    renames: tuple[tuple[str, str], ...] = ()
    drops: tuple[tuple[str, str], ...] = ()
    outside: tuple[tuple[str, str], ...] = ()


BLOCK = r"(blocks\.\d+)\."
ADAPTER = re.compile(BLOCK + r"adapter_layer\.")
RELATIVE = "relative positions, which timm's VisionTransformer does not have"
DECODER = (r"(MAE_)?decoder[._]|encoder_to_decoder\.|increase_dim\.", "decoder")
MASK_TOKEN = (r"(embeddings\.)?(mask_token|masked_spec_embed)", "mask token")
SPEECH = (
    (
        r"(lm_head|proj_out|quantizer|project_(q|hid)|projector|classifier|tdnn|objective)\.|layer_weights"
        r"|feature_extractor\.(weight|bias)",
        "head for speech",
    ),
    (r"feature_extractor\.|feature_projection\.|encoder\.conv[12]\.", "convolutional front end"),
    (r"encoder\.(pos_conv_embed|embed_positions)\.", "positions of the convolutional front end"),
    (r"adapter\.", "adapter after the encoder"),
    DECODER,
    MASK_TOKEN,
)

FORMATS = (
    Format(
        name="Point-MAE",
        blocks=r"blocks\.blocks\.attn\.qkv mlp\.fc1",
        renames=(
            (r"encoder\.", "patch_embed."),
            (r"cls_head_finetune\.", "head."),
            (r"label_conv\.", "head.category."),
            (r"propagation_0\.mlp_convs\.0\.", "head.propagation.0."),
            (r"propagation_0\.mlp_bns\.0\.", "head.propagation.1."),
            (r"propagation_0\.mlp_convs\.1\.", "head.propagation.3."),
            (r"propagation_0\.mlp_bns\.1\.", "head.propagation.4."),
            (r"convs1\.", "head.classifier.0."),
            (r"bns1\.", "head.classifier.1."),
            (r"convs2\.", "head.classifier.4."),
            (r"bns2\.", "head.classifier.5."),
            (r"convs3\.", "head.classifier.7."),
        ),
        drops=(DECODER, MASK_TOKEN),
    ),
    Format(
        name="timm, MAE, VideoMAE or DINOv2",
        blocks=r"blocks\.attn\.qkv mlp\.(fc1|w12)",
        renames=(
            (BLOCK + r"attn\.q_bias", r"\1.attn.query.bias"),
            (BLOCK + r"attn\.v_bias", r"\1.attn.value.bias"),
        ),
        drops=(DECODER, MASK_TOKEN),
    ),
    Format(
        name="Hugging Face ViT, DeiT, AST, BEiT, VideoMAE or DINOv2",
        blocks=r"(encoder\.layer|layers)\.(attention\.attention\.value|attention\.v_proj) (intermediate|mlp)\..+",
        renames=(
            (r"embeddings\.distillation_token", "dist_token"),
            (r"embeddings\.position_embeddings", "pos_embed"),
            (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"embeddings\.(cls_token|register_tokens)", r"\1"),
            (BLOCK + r"layernorm_before\.", r"\1.norm1."),
            (BLOCK + r"layernorm_after\.", r"\1.norm2."),
            (BLOCK + r"attention\.attention\.q_bias", r"\1.attn.query.bias"),
            (BLOCK + r"attention\.attention\.v_bias", r"\1.attn.value.bias"),
            (BLOCK + r"layer_scale([12])\.lambda1", r"\1.ls\2.gamma"),
            (BLOCK + r"lambda_([12])", r"\1.ls\2.gamma"),
            (r"layernorm\.", "norm."),
            (r"(pooler|classifier)\.layernorm\.", "fc_norm."),
            (r"classifier\.dense\.|(cls_)?classifier\.", "head."),
            (r"distillation_classifier\.", "head_dist."),
        ),
        drops=(
            (r".*\brelative_position_bias", RELATIVE),
            (r"pooler\.dense\.", "pooler, which timm does not have"),
            DECODER,
            MASK_TOKEN,
        ),
        outside=((r"(lm_head|layernorm)\.", "head for masked patches"),),
    ),
    Format(
        name="Hugging Face CLIP or SigLIP",
        blocks=r"encoder\.layers\.self_attn\.v_proj mlp\.fc1",
        renames=(
            (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"embeddings\.(class_embedding|position_embedding)", r"\1"),
            (r"pre_layrnorm\.", "norm_pre."),
            (BLOCK + r"layer_norm([12])\.", r"\1.norm\2."),
            (r"post_layernorm\.", "norm."),
            (r"head\.probe", "attn_pool.latent"),
            (r"head\.attention\.in_proj_", "attn_pool.qkv."),
            (r"head\.attention\.out_proj\.", "attn_pool.proj."),
            (r"head\.layernorm\.", "attn_pool.norm."),
            (r"head\.mlp\.", "attn_pool.mlp."),
            (r"classifier\.", "head."),
        ),
        drops=(
            (r"embeddings\.position_ids", "numbers of the positions"),
            (r"text_model\.|text_projection\.", "text tower"),
            (r"visual_projection\.|logit_(scale|bias)", "comparison with texts"),
        ),
    ),
    Format(
        name="Hugging Face Wav2Vec2 or HuBERT",
        blocks=r"encoder\.layers\.attention\.v_proj feed_forward\.intermediate_dense",
        renames=(
            (BLOCK + r"layer_norm\.", r"\1.norm1."),
            (BLOCK + r"final_layer_norm\.", r"\1.norm2."),
            (r"encoder\.layer_norm\.", "norm."),
        ),
        drops=SPEECH,
    ),
    Format(
        name="Hugging Face Whisper",
        blocks=r"encoder\.layers\.self_attn\.v_proj fc1",
        renames=(
            (BLOCK + r"self_attn_layer_norm\.", r"\1.norm1."),
            (BLOCK + r"final_layer_norm\.", r"\1.norm2."),
            (r"encoder\.layer_norm\.", "norm."),
        ),
        drops=SPEECH,
    ),
)


def inside_block(name: str, layers: Mapping[str, tuple[str, ...]]) -> str:
    """A name in a block, with linear layers named as in timm or `PARTS`.

    Args:
        name: such as `attention.attention.query.weight`.
        layers: the names for each of timm's layers.
    """
    layer, _, kind = name.rpartition(".")
    for target, names in layers.items():
        if layer in names:
            part = PARTS[target][names.index(layer)] if len(names) > 1 else ""
            return f"{target.rpartition('.')[0]}.{part}.{kind}" if part else f"{target}.{kind}"
    return name
