"""The models that are compared, and the training step they are compared in."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from m2pt import reparameterize_aux_into_target_model, step_in_backward
from m2pt.saved_bytes import published_formulation

MODELS = {
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
    "ViT-H": "vit_huge_patch14_224",
    "ViT-g": "vit_giant_patch14_224",
    "ViT-G": "vit_gigantic_patch14_224",
}

PLAIN = "plain"
PUBLISHED_TRAINED = "published, W_aux trained"
PUBLISHED_FROZEN = "published, W_aux frozen"
FUSED = "this package, W_aux frozen"
VARIANTS = (PLAIN, PUBLISHED_TRAINED, PUBLISHED_FROZEN, FUSED)

AUX_DTYPES = {f"this package, W_aux {dtype}": dtype for dtype in ("bfloat16", "int8", "float8_e4m3fn", "int4")}
FUSED_BFLOAT16, FUSED_INT8, FUSED_FLOAT8, FUSED_INT4 = AUX_DTYPES
FUSED_LEVERS = f"{FUSED_INT8}, every lever"
FUSED_LEVERS_ADAMW = f"{FUSED_INT8}, every lever but 8-bit Adam"
AUX_DTYPES |= {FUSED_LEVERS: "int8", FUSED_LEVERS_ADAMW: "int8"}


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


FUSED_ADAMW = partial(AdamW, fused=True)
"""Its steps need no transient memory."""


@dataclass(frozen=True)
class Levers:
    """What lowers the peak of a training step: a smaller Adam, updates inside backward, blocks' inputs on the host."""

    create_optimizer: Callable[[list[nn.Parameter]], Optimizer] = FUSED_ADAMW
    in_backward: bool = False
    on_host: bool = False


NO_LEVERS = Levers()


def every_lever(checkpointing: bool, create_optimizer: Callable[[list[nn.Parameter]], Optimizer]) -> Levers:
    """Block inputs go to the host only with activation checkpointing, where nothing else is saved."""
    return Levers(create_optimizer, in_backward=True, on_host=checkpointing)


def adamw(model: nn.Module, levers: Levers = NO_LEVERS) -> Optimizer:
    """AdamW over the trainable parameters, with its states already allocated."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = levers.create_optimizer(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    if levers.in_backward:
        step_in_backward(optimizer)
    return optimizer


def training_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, autocast: bool) -> None:
    """Run forward, backward, and the updates that backward has not done; `autocast` is to bfloat16."""
    forward(model, images, labels, autocast).backward()
    optimizer.step()
    optimizer.zero_grad()


def forward(model: nn.Module, images: Tensor, labels: Tensor, autocast: bool) -> Tensor:
    """Return the loss."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        return F.cross_entropy(model(images), labels)
