"""Fused GEMMs for cross-modal re-parameterised linear layers: `y = x (W + s * W_aux)^T + b`."""

from typing import TYPE_CHECKING, Any

from .ops import combined_weight, cross_modal_linear, implementation
from .quantization import dequantize, quantize

if TYPE_CHECKING:
    from .tuning import warmup

__all__ = ["combined_weight", "cross_modal_linear", "dequantize", "implementation", "quantize", "warmup"]


def __getattr__(name: str) -> Any:
    if name == "warmup":  # needs Triton; the rest works without it
        from .tuning import warmup

        return warmup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
