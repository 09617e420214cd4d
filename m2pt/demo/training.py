"""One training loop, for pretraining and for fine-tuning."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from tqdm import trange

from .settings import TrainingSettings


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    samples: int,
    settings: TrainingSettings,
    seed: int,
    description: str,
) -> float:
    """Train `model` in place, with a progress bar.

    Args:
        loss_of: the loss (scalar) of a batch, given the indices (N,) of its samples.
        samples: how many samples there are.
        seed: of the order of the samples and of everything random in the model.
        description: of the progress bar.

    Returns:
        The mean loss of the last epoch's batches.
    """
    steps_per_epoch = math.ceil(samples / settings.batch_size)
    steps = settings.epochs * steps_per_epoch
    optimizer = _optimizer(model, settings)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, t_in_epochs=False)
    torch.manual_seed(seed)
    model.train()
    for epoch in (bar := trange(settings.epochs, desc=description, unit="epoch", leave=False)):
        epoch_loss = 0.0
        for step, batch in enumerate(torch.randperm(samples).split(settings.batch_size), epoch * steps_per_epoch):
            scheduler.step_update(step)
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item() / steps_per_epoch
        bar.set_postfix(loss=f"{epoch_loss:.3f}")
    return epoch_loss


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = [parameter for name, parameter in parameters if name.endswith("cross_modal_scale")]
    others = [parameter for name, parameter in parameters if not name.endswith("cross_modal_scale")]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in others if parameter.ndim <= 1]},
        {"params": scales, "lr": settings.scale_learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0, fused=True)
