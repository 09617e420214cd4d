"""What the memory benchmarks count and simulate, against tensors that are there."""

from importlib import import_module

import pytest
import timm
import torch
from torch._subclasses import FakeTensorMode

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
)

AdamW8bit = pytest.importorskip("bitsandbytes.optim").AdamW8bit
bytes_per_parameter = import_module("benchmarks.bytes_per_parameter").bytes_per_parameter
SimulatedAdamW8bit = import_module("benchmarks.memory_levers").SimulatedAdamW8bit

TINY = {"embed_dim": 128, "depth": 2, "num_heads": 2}
ENTRIES = 2 * 12 * 128 * 128
LARGEST = 4 * 128 * 128 / ENTRIES  # fc1
SCALES = 4 * 2 * (3 + 1 + 4 + 1) * 128 / ENTRIES  # a float32 for every row
STATES = 2 * (1 + 4 / 256 + 4 * 256 / ENTRIES)  # two states: a byte, a float32 for every 256, one table of values


@pytest.mark.parametrize(
    "variant, levers, expected",
    [
        (PUBLISHED_TRAINED, NO_LEVERS, (4, 8, 16, 4)),
        (FUSED, NO_LEVERS, (4, 4, 8, 4)),
        (FUSED_BFLOAT16, NO_LEVERS, (4, 4, 8, 2)),
        (FUSED_INT8, NO_LEVERS, (4, 4, 8, 1 + SCALES)),
        (FUSED_FLOAT8, NO_LEVERS, (4, 4, 8, 1 + SCALES)),
        (FUSED_INT4, NO_LEVERS, (4, 4, 8, 0.5625)),
        (FUSED_INT8, Levers(in_backward=True), (4, 4 * LARGEST, 8, 1 + SCALES)),
        (FUSED_INT8, Levers(AdamW8bit), (4, 4, STATES, 1 + SCALES)),
        (FUSED_INT8, Levers(AdamW8bit, in_backward=True), (4, 4 * LARGEST, STATES, 1 + SCALES)),
    ],
)
def test_bytes_per_parameter(variant, levers, expected):
    found = bytes_per_parameter(variant, levers, "vit_tiny_patch16_224", **TINY)
    assert tuple(found.values()) == pytest.approx(expected, abs=2e-4)  # AdamW counts its steps in tensors


def layouts(optimizer):
    return [
        {name: (value.shape, value.dtype) for name, value in state.items() if isinstance(value, torch.Tensor)}
        for state in optimizer.state.values()
    ]


def test_simulated_states_are_those_of_the_library():
    options = {"img_size": 32, **TINY, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    real = layouts(adamw(model, Levers(AdamW8bit)))
    model.to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        simulated = adamw(model.to_empty(device="cpu"), Levers(SimulatedAdamW8bit))
    assert layouts(simulated) == real
    assert {dtype for state in real for _, dtype in state.values()} == {torch.uint8, torch.float32}
