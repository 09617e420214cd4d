"""Runs the optimizer's step inside backward, so that the gradients need not all be in memory at once."""

from torch import Tensor
from torch.optim import Optimizer

from .checks import check_kind

JOINT = {"Adahessian", "Adan", "FusedAdam", "FusedLAMB", "FusedNovoGrad", "Kron", "LBFGS", "Lamb", "Lookahead"}
"""Optimizers of torch, timm and apex whose update of a parameter depends on the others, or on a count they share."""


def step_in_backward(optimizer: Optimizer) -> None:
    """Let backward update every trainable parameter as soon as its gradient is computed, and free the gradient.

    Call this once, and then neither `optimizer.step` nor `zero_grad`. The updates are those of a step after backward,
    bit for bit on a CPU; learning-rate schedulers and `state_dict` work as before.

    Wrong, but not detected: gradient accumulation, clipping by the norm of all gradients, a `GradScaler`, and
    `DistributedDataParallel`, which adds the processes' gradients later (FSDP2 does so before). Nor is it detected if a
    parameter that was frozen or not in the optimizer at this call is trained later: nothing updates it, and its
    gradients add up. One that is frozen after the call may be unfrozen again. A model under `torch.compile` computes
    all of its gradients before it hands out the first, so no memory is saved.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: it does not update every parameter by itself.
    """
    check_kind(Optimizer, "a torch.optim.Optimizer", optimizer=optimizer)
    if not JOINT.isdisjoint(each.__name__ for each in type(optimizer).__mro__):
        name = type(optimizer).__name__
        raise ValueError(f"optimizer: expected one that updates every parameter by itself, as AdamW does, got {name}")
    update = StepInBackward(optimizer)
    for parameter in update.group_of:
        parameter.register_post_accumulate_grad_hook(update)


class StepInBackward:
    """The hook that updates a parameter once its gradient is computed, and frees the gradient."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.group_of = {
            parameter: index
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        }

    def __call__(self, parameter: Tensor) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [groups[self.group_of[parameter]] | {"params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        parameter.grad = None
