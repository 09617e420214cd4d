"""What a re-parameterized ViT-B saves for backward, measured: never the combined weights."""

import pytest
import timm
import torch

from m2pt import reparameterize_aux_into_target_model
from m2pt.linear import FusedCrossModalLinear
from m2pt.saved_bytes import published_formulation, saved_for_backward_bytes


@pytest.fixture(scope="module")
def measured():
    """Bytes by model and precision, of one small image through a ViT-B."""
    options = {"img_size": 64, "weight_init": "skip"}
    plain, target, aux = (timm.create_model("vit_base_patch16_224", **options) for _ in range(3))
    fused = reparameterize_aux_into_target_model(target, aux)
    image = torch.randn(1, 3, 64, 64)
    weights = sum(m.weight.numel() for m in fused.modules() if isinstance(m, FusedCrossModalLinear))
    found = {"combined weights": weights}
    for precision in ("float32", "autocast"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            found["plain", precision] = saved_for_backward_bytes(plain, image)
            found["fused", precision] = saved_for_backward_bytes(fused, image)
            with published_formulation(fused):
                found["published", precision] = saved_for_backward_bytes(fused, image)
    return found


def test_fused_saves_what_the_plain_model_saves(measured):
    assert measured["fused", "float32"] == measured["plain", "float32"]


def test_fused_saves_less_under_autocast_by_the_half_precision_weights(measured):
    saved = measured["plain", "autocast"] - measured["fused", "autocast"]
    assert saved == 2 * measured["combined weights"]


def test_published_formulation_saves_every_combined_weight(measured):
    assert measured["published", "float32"] - measured["plain", "float32"] == 4 * measured["combined weights"]
    assert measured["published", "autocast"] >= measured["plain", "autocast"]
