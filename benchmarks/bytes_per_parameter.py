"""Bytes per parameter of a ViT-B's connected layers, training on the CPU: float32 weights, AdamW.

Run as `python -m benchmarks.bytes_per_parameter`. Real tensors are counted in a real training step at 32 pixels under
bfloat16 autocast: W, the gradients that exist together when AdamW updates, AdamW's states, and W_aux with its scales.
"""

import torch
from bitsandbytes.optim import AdamW8bit
from tqdm import tqdm

from benchmarks import results
from benchmarks.results import Row
from benchmarks.timing import nbytes
from benchmarks.variants import (
    FUSED,
    FUSED_BFLOAT16,
    FUSED_FLOAT8,
    FUSED_INT4,
    FUSED_INT8,
    NO_LEVERS,
    PUBLISHED_TRAINED,
    Levers,
    adamw,
    training_step,
    vision_transformer,
)
from m2pt import FusedCrossModalLinear

SETTINGS = (
    (PUBLISHED_TRAINED, "", NO_LEVERS),
    (FUSED, "", NO_LEVERS),
    (FUSED_BFLOAT16, "", NO_LEVERS),
    (FUSED_INT8, "", NO_LEVERS),
    (FUSED_FLOAT8, "", NO_LEVERS),
    (FUSED_INT4, "", NO_LEVERS),
    (FUSED_INT8, ", step in backward", Levers(in_backward=True)),
    (FUSED_INT8, ", 8-bit Adam", Levers(AdamW8bit)),
    (FUSED_INT8, ", 8-bit Adam, step in backward", Levers(AdamW8bit, in_backward=True)),
)


def bytes_per_parameter(
    variant: str, levers: Levers, name: str = "vit_base_patch16_224", **options: int
) -> dict[str, float]:
    """Count W, gradients, Adam and W_aux; gradients and Adam are W's, and W_aux's where that is trained."""
    with vision_transformer(variant, name, img_size=32, **options) as model:
        layers = [module for module in model.modules() if isinstance(module, FusedCrossModalLinear)]
        weights = [weight for layer in layers for weight in (layer.weight, layer.aux_weight)]
        trained = [weight for weight in weights if weight.requires_grad]
        optimizer = adamw(model, levers)
        gradients: list[int] = []
        optimizer.register_step_pre_hook(lambda *_: gradients.append(nbytes(weight.grad for weight in trained)))
        images, labels = torch.randn(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
        training_step(model, optimizer, images, labels, autocast=True)
        counts = {
            "W": nbytes(layer.weight for layer in layers),
            "gradient": max(gradients),
            "Adam": nbytes(value for weight in trained for value in optimizer.state[weight].values()),
            "W_aux": nbytes(value for layer in layers for value in (layer.aux_weight, layer.aux_weight_scale)),
        }
        entries = sum(layer.weight.numel() for layer in layers)
    return {part: count / entries for part, count in counts.items()}


def row(variant: str, added: str, levers: Levers) -> Row:
    found = bytes_per_parameter(variant, levers)
    return {"bytes per parameter": variant + added, **found, "total": sum(found.values())}


def count() -> list[Row]:
    return [row(*setting) for setting in tqdm(SETTINGS)]


if __name__ == "__main__":
    results.run("bytes-per-parameter", "cpu", count, __doc__)
