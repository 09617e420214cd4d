"""What Python and the dispatcher cost a layer: 16 x 16 on 16 tokens, forward and backward, one thread.

Microseconds per call, of 20 in a row; ratios are to the published formulation as it ships, which trains W_aux.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from benchmarks.timing import DEVICE, time_paired
from benchmarks.variants import PLAIN, PUBLISHED_TRAINED, VARIANTS, computing_as
from m2pt import FusedCrossModalLinear

CALLS = 20
MOST_ROUNDS = 200
SIZE = 16


@contextmanager
def calls(variant: str) -> Iterator[Callable[[], None]]:
    """CALLS forward and backward passes of a layer, each with new gradients; valid inside the block."""
    layer = nn.Linear(SIZE, SIZE, device=DEVICE)
    if variant != PLAIN:
        aux_weight = torch.randn(SIZE, SIZE, device=DEVICE)
        trained = variant == PUBLISHED_TRAINED
        layer = FusedCrossModalLinear(SIZE, SIZE, True, layer, aux_weight, is_aux_trainable=trained)
    x = torch.randn(SIZE, SIZE, device=DEVICE, requires_grad=True)
    grad_output = torch.randn(SIZE, SIZE, device=DEVICE)

    def run() -> None:
        for _ in range(CALLS):
            layer.zero_grad()
            x.grad = None
            layer(x).backward(grad_output)

    with computing_as(variant, layer):
        yield run


@pytest.mark.parametrize("variant", VARIANTS)
def test_host_overhead(record, variant):
    with calls(variant) as subject, calls(PUBLISHED_TRAINED) as reference:
        timing, ratio = time_paired(lambda: subject, lambda: reference, MOST_ROUNDS)
    record({"layer": variant, **timing.columns("us", CALLS), "time / published, trained": ratio}, timing)
