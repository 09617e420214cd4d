"""Fused GEMMs for cross-modal re-parameterised linear layers: `y = x (W + s * W_aux)^T + b`."""

from .ops import cross_modal_linear, implementation
from .reference import combined_weight

__all__ = ["combined_weight", "cross_modal_linear", "implementation"]
