"""Guards pathways when a module is replaced: conversions of linear layers would lose them."""

import re
from typing import TYPE_CHECKING, cast
from warnings import warn

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .linear import RELEASED, FusedCrossModalLinear

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

BYPASSING = ("hra", "shira", "supertuning", "frod")
"""The methods of peft whose layers multiply by the inner layer's weight and do not call that layer."""
MULTIPLYING = ("oft", "boft", "ia3", "road", "deft")
"""The methods of peft that merge by multiplying the weight, as DoRA does too."""


def has_pathway(module: nn.Module) -> bool:
    """Whether it is or has a fused layer, or is code generated from one, which keeps the names of parameters."""
    return any(isinstance(each, FusedCrossModalLinear) for each in module.modules()) or any(
        name.rpartition(".")[2] == "cross_modal_scale" for name, _ in module.named_parameters()
    )


def bypasses(wrapper: nn.Module) -> bool:
    """Whether it is known not to call its `base_layer`."""
    return _method(wrapper) in BYPASSING or getattr(wrapper, "miss_fn", None) == "bat"


def is_dora(wrapper: nn.Module) -> bool:
    return bool(len(getattr(wrapper, "lora_magnitude_vector", ())))


def has_multiplied(wrapper: nn.Module) -> bool:
    """Whether its adapter is merged and has multiplied the inner layer's weight, but not its auxiliary weight."""
    return getattr(wrapper, "merged", False) and (_method(wrapper) in MULTIPLYING or is_dora(wrapper))


def _method(wrapper: nn.Module) -> str:
    """The name of the peft method whose layer it is, or an empty string."""
    found = re.fullmatch(r"peft\.tuners\.(\w+)\.layer", type(wrapper).__module__)
    return found[1] if found else ""


def _keep_pathway(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Raise a ValueError if a fused layer is replaced by a layer without a pathway or by a wrapper that does not call
    it, or comes out of a wrapper that has multiplied its weight; warn if a module around fused layers is replaced.

    torch calls it before a module is set as an attribute or added to another, of all modules.
    """
    if module is None or name not in parent._modules:
        return
    before = parent._modules[name]
    if before is None or before is module or module in RELEASED or not has_pathway(before):
        return
    what = f"{name} of {type(parent).__name__}: {type(module).__name__}"
    if not has_pathway(module):
        if isinstance(before, FusedCrossModalLinear):
            remedy = "leave it out of the conversion, or merge_pathways(model) or disconnect_pathways(model) first"
            raise ValueError(f"{what} would replace a FusedCrossModalLinear and lose its pathway: {remedy}")
        warn(f"{what} replaces a module with pathways and has none", stacklevel=3)
    elif isinstance(before, FusedCrossModalLinear):
        if bypasses(module):
            raise ValueError(f"{what} would not call the FusedCrossModalLinear inside: merge_pathways(model) first")
        before.is_called = False  # by what is around it now
    elif has_multiplied(before):
        cast("BaseTunerLayer", before).unmerge()
        remedy = "keep the adapter" if is_dora(before) else "merge_pathways(model) first"
        had = "had its weight multiplied by the adapter, but not its auxiliary weight, and was unmerged again"
        raise ValueError(f"{what} {had}: {remedy}")


register_module_module_registration_hook(_keep_pathway)
