"""The models that are compared, and the training step they are compared in."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2pt import reparameterize_aux_into_target_model
from m2pt.saved_bytes import published_formulation

PLAIN = "plain"
PUBLISHED_TRAINED = "published, W_aux trained"
PUBLISHED_FROZEN = "published, W_aux frozen"
FUSED = "this package, W_aux frozen"
VARIANTS = (PLAIN, PUBLISHED_TRAINED, PUBLISHED_FROZEN, FUSED)

FUSED_INT8 = "this package, W_aux int8"
FUSED_INT4 = "this package, W_aux int4"
AUX_DTYPES = {FUSED_INT8: "int8", FUSED_INT4: "int4"}


@contextmanager
def vision_transformer(variant: str, name: str, device: str = "cpu", **options: int) -> Iterator[nn.Module]:
    """A timm ViT with 1000 classes, connected to another of the same shape and computing as `variant` says.

    PUBLISHED_TRAINED is the published code as it ships. Train the model inside the block.
    """
    with torch.device(device):
        model = timm.create_model(name, **options)
        auxiliary = timm.create_model(name, **options)
    if variant != PLAIN:
        trained, aux_dtype = variant == PUBLISHED_TRAINED, AUX_DTYPES.get(variant)
        reparameterize_aux_into_target_model(model, auxiliary, is_aux_trainable=trained, aux_dtype=aux_dtype)
    del auxiliary
    with computing_as(variant, model):
        yield model


def computing_as(variant: str, model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, the fused layers of `model` compute as `variant` does."""
    return published_formulation(model) if variant in (PUBLISHED_TRAINED, PUBLISHED_FROZEN) else nullcontext()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trainable, its states already there, without transient memory in its steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def adamw_in_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    """As `adamw`, one for each parameter, called by backward as soon as the parameter's gradient is there."""
    optimizers = {
        parameter: torch.optim.AdamW([parameter], fused=True)
        for parameter in model.parameters()
        if parameter.requires_grad
    }

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.grad = torch.zeros_like(parameter)
        update(parameter)
        parameter.register_post_accumulate_grad_hook(update)
    return list(optimizers.values())


def training_step(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], images: Tensor, labels: Tensor, autocast: bool
) -> None:
    """Forward, backward and update; `autocast` to bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
