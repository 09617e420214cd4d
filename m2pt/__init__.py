"""Multimodal Pathway: improve a transformer of one modality with the frozen weights of another's (CVPR 2024)."""

from .groups import parameter_groups
from .linear import FusedCrossModalLinear
from .optimizer_in_backward import step_in_backward
from .pathway import (
    cross_modal_scales,
    describe_pathways,
    disabled_pathways,
    freeze_for_linear_probe,
    merge_pathways,
    quantization_errors,
    quantize_aux,
    scale_table,
)
from .pathway_files import load_pathway, save_pathway
from .surgery import disconnect_pathways, remove_auxiliary, reparameterize_aux_into_target_model

__all__ = [
    "FusedCrossModalLinear",
    "cross_modal_scales",
    "describe_pathways",
    "disabled_pathways",
    "disconnect_pathways",
    "freeze_for_linear_probe",
    "load_pathway",
    "merge_pathways",
    "parameter_groups",
    "quantization_errors",
    "quantize_aux",
    "remove_auxiliary",
    "reparameterize_aux_into_target_model",
    "save_pathway",
    "scale_table",
    "step_in_backward",
]
