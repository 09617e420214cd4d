"""What a re-parameterized ViT-B saves for backward, measured: never the combined weights."""

import pytest
import timm
import torch

from m2pt import reparameterize_aux_into_target_model
from m2pt.linear import FusedCrossModalLinear
from m2pt.saved_bytes import published_formulation, saved_for_backward_bytes

MIB = 2**20


@pytest.fixture(scope="module")
def saved():
    """MiB by formulation and precision, of one small image through a ViT-B, beyond what the plain ViT-B saves."""
    options = {"img_size": 64, "weight_init": "skip"}
    plain, target, aux = (timm.create_model("vit_base_patch16_224", **options) for _ in range(3))
    fused = reparameterize_aux_into_target_model(target, aux)
    image = torch.randn(1, 3, 64, 64)
    found = {"weights": sum(m.weight.numel() for m in fused.modules() if isinstance(m, FusedCrossModalLinear)) / MIB}
    for precision in ("float32", "autocast", "bfloat16"):
        if precision == "bfloat16":
            plain, fused, image = plain.bfloat16(), fused.bfloat16(), image.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            baseline = saved_for_backward_bytes(plain, image)
            found["fused", precision] = (saved_for_backward_bytes(fused, image) - baseline) / MIB
            with published_formulation(fused):
                found["published", precision] = (saved_for_backward_bytes(fused, image) - baseline) / MIB
    return found


def test_fused_saves_what_the_plain_model_saves(saved):
    assert saved["fused", "float32"] == saved["fused", "bfloat16"] == 0


def test_fused_saves_less_under_autocast_by_the_half_precision_weights(saved):
    assert saved["fused", "autocast"] == -2 * saved["weights"] == -162


def test_published_formulation_saves_every_combined_weight(saved):
    assert saved["published", "float32"] == 4 * saved["weights"] == 324
    assert saved["published", "bfloat16"] == 2 * saved["weights"] == 162
    assert saved["published", "autocast"] == 0
