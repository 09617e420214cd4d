"""How families of transformers name the linear layers of a block. The same names serve modules and checkpoints."""

from collections.abc import Callable

LAYER_NAMES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""timm's names for the layers of a block; all other names are mapped to these."""


def _attention(projections: str, output: str, *parts: str) -> dict[str, tuple[str, ...]]:
    return {"attn.qkv": tuple(projections.format(part) for part in parts) or (projections,), "attn.proj": (output,)}


LETTERS, WORDS = ("q", "k", "v"), ("query", "key", "value")

ATTENTION = (
    _attention("attn.qkv", "attn.proj"),  # timm, MAE, Point-MAE, VideoMAE, DINOv2
    _attention("attn.{}_proj", "attn.proj", *LETTERS),  # timm's EVA
    # Hugging Face: ViT, AST, VideoMAE, DeiT, BEiT, DINOv2 as transformers 4 and all files name them; then its 5
    _attention("attention.attention.{}", "attention.output.dense", *WORDS),
    _attention("attention.{}_proj", "attention.o_proj", *LETTERS),  # and DINOv3
    _attention("attention.{}_proj", "attention.out_proj", *LETTERS),  # Wav2Vec2, HuBERT
    _attention("attention.self.{}", "attention.output.dense", *WORDS),  # BERT
    _attention("self_attn.{}_proj", "self_attn.out_proj", *LETTERS),  # SigLIP, CLIP, Whisper
    _attention("self_attn.{}_proj", "self_attn.o_proj", *LETTERS),  # Llama
    _attention("self_attn.qkv", "self_attn.projection"),  # BLIP's pictures
    _attention("attn.c_attn", "attn.c_proj"),  # GPT-2
    _attention("self_attention.in_proj", "self_attention.out_proj"),  # torchvision's ViT
)

MLP = (
    {"mlp.fc1": ("mlp.fc1",), "mlp.fc2": ("mlp.fc2",)},  # timm and most others
    {"mlp.fc1": ("intermediate.dense",), "mlp.fc2": ("output.dense",)},  # Hugging Face: ViT and its kin, BERT
    {"mlp.fc1": ("feed_forward.intermediate_dense",), "mlp.fc2": ("feed_forward.output_dense",)},  # Wav2Vec2, HuBERT
    {"mlp.fc1": ("fc1",), "mlp.fc2": ("fc2",)},  # Whisper
    {"mlp.fc1": ("mlp.c_fc",), "mlp.fc2": ("mlp.c_proj",)},  # GPT-2
    {"mlp.fc1": ("mlp.0",), "mlp.fc2": ("mlp.3",)},  # torchvision's ViT, and in its files
    {"mlp.fc1": ("mlp.linear_1",), "mlp.fc2": ("mlp.linear_2",)},
    # gated: the rows of the gate, then the others
    {"mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc2": ("mlp.down_proj",)},  # Llama, DINOv2 and DINOv3
    {"mlp.fc1": ("mlp.fc1_g", "mlp.fc1_x"), "mlp.fc2": ("mlp.fc2",)},  # timm's EVA
    {"mlp.fc1": ("mlp.w12",), "mlp.fc2": ("mlp.w3",)},  # DINOv2
    {"mlp.fc1": ("mlp.weights_in",), "mlp.fc2": ("mlp.weights_out",)},  # Hugging Face's DINOv2
    {"mlp.fc1": ("mlp.up_proj",), "mlp.fc2": ("mlp.down_proj",)},  # DINOv3, without a gate
)


def layers_of_block(has: Callable[[str], bool]) -> dict[str, tuple[str, ...]]:
    """A block's names for each of `LAYER_NAMES`: several where rows are joined, in that order.

    torchvision's `self_attention.in_proj` is not a layer but a parameter, `in_proj_weight`.

    Args:
        has: whether the block has a layer of that name.

    Returns:
        An empty dict unless both the attention and the MLP are known.
    """
    found: dict[str, tuple[str, ...]] = {}
    for known in (ATTENTION, MLP):
        for layers in known:
            if all(has(name) for names in layers.values() for name in names):
                found |= layers
                break
    return found if len(found) == len(LAYER_NAMES) else {}
