"""Checks for hooks that would be lost when a layer or a parameter is replaced."""

from torch import Tensor, nn

from .optimizer_in_backward import StepInBackward

FORWARD = {"_forward_pre_hooks": "forward pre-hooks", "_forward_hooks": "forward hooks"}

KINDS = FORWARD | {
    "_backward_pre_hooks": "backward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_state_dict_pre_hooks": "state-dict pre-hooks",
    "_state_dict_hooks": "state-dict hooks",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hooks",
    "_load_state_dict_post_hooks": "load-state-dict post-hooks",
}
"""The attributes in which an `nn.Module` keeps hooks, and what messages call these."""

TENSOR_KINDS = {"_backward_hooks": "gradient hooks", "_post_accumulate_grad_hooks": "post-accumulate-gradient hooks"}


def has_forward_hooks(layer: nn.Module) -> bool:
    """Whether hooks may change what a layer computes."""
    return any(getattr(layer, kind) for kind in FORWARD)


def check_no_hooks(name: str, layer: nn.Module) -> None:
    """Raise a ValueError for a layer with hooks of any kind, or a forward that is not its class's."""
    own = ["a forward of its own"] * ("forward" in vars(layer))
    _check_none(name, own + [what for kind, what in KINDS.items() if getattr(layer, kind)])


def check_no_tensor_hooks(name: str, parameter: Tensor) -> None:
    """Raise a ValueError for a parameter with hooks other than those of `step_in_backward`."""
    hooks = {what: (getattr(parameter, kind) or {}).values() for kind, what in TENSOR_KINDS.items()}
    _check_none(name, [what for what, own in hooks.items() if not all(isinstance(h, StepInBackward) for h in own)])


def _check_none(name: str, kinds: list[str]) -> None:
    if kinds:
        raise ValueError(f"{name} has {' and '.join(kinds)}, which would be lost: remove them first")
