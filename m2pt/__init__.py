"""Multimodal Pathway: improve a transformer of one modality with the frozen weights of another's (CVPR 2024)."""

from typing import TYPE_CHECKING

__all__ = [
    "FusedCrossModalLinear",
    "cross_modal_scales",
    "describe_pathways",
    "disabled_pathways",
    "disconnect_pathways",
    "estimate_memory",
    "freeze_for_linear_probe",
    "load_pathway",
    "low_memory",
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

if TYPE_CHECKING:
    from .groups import parameter_groups
    from .linear import FusedCrossModalLinear
    from .memory_saving import low_memory
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
    from .train.memory import estimate_memory
    from .version import __version__ as __version__
else:
    from .lazy import attach

    __getattr__, __dir__ = attach(
        __name__,
        {
            "__version__": "version",
            "cross_modal_scales": "pathway",
            "describe_pathways": "pathway",
            "disabled_pathways": "pathway",
            "disconnect_pathways": "surgery",
            "estimate_memory": "train.memory",
            "freeze_for_linear_probe": "pathway",
            "FusedCrossModalLinear": "linear",
            "load_pathway": "pathway_files",
            "low_memory": "memory_saving",
            "merge_pathways": "pathway",
            "parameter_groups": "groups",
            "quantization_errors": "pathway",
            "quantize_aux": "pathway",
            "remove_auxiliary": "surgery",
            "reparameterize_aux_into_target_model": "surgery",
            "save_pathway": "pathway_files",
            "scale_table": "pathway",
            "step_in_backward": "optimizer_in_backward",
        },
    )
