"""Training steps, the state that continues them, and evaluation."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

from ..optimizer_in_backward import step_in_backward
from ..pathway import places
from ..pathway_files import digests, frozen_entries
from .batches import derived_seed, running, samples_of, to_device
from .deployment import AUXILIARY, check_auxiliary
from .distributed import World, distribute, shard, synchronised
from .metrics import Metric
from .optimization import create_mixing, create_optimizer, create_scheduler
from .recipe import Machine, Recipe

Objective = Callable[[nn.Module, Any], Tensor]
"""The loss of a model for a collated batch, both on the device."""

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def classification_objective(
    recipe: Recipe, num_classes: int, views: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> Objective:
    """The loss of logits for targets, of mixed inputs where the recipe asks for it; every view is a sample."""
    mixing = create_mixing(recipe.loss, num_classes)

    def objective(model: nn.Module, batch: Any) -> Tensor:
        input, target = batch
        if views > 1:
            input, target = input.flatten(0, 1), target.flatten(0, 1)
        if mixing is not None:
            input, target = mixing(input, target)
        return loss(model(input), target)

    return objective


def autocast(machine: Machine, device: torch.device) -> torch.autocast:
    """The recipe's precision."""
    return torch.autocast(device.type, getattr(torch, machine.precision), enabled=machine.precision != "float32")


def offloading(machine: Machine) -> AbstractContextManager:
    """Whether what the forward pass saves waits for backward in the host's memory."""
    return save_on_cpu(pin_memory=True) if machine.offload_activations else nullcontext()


class Trainer:
    """A model in training: its optimizer steps, and the state from which they continue bit for bit on a CPU.

    Everything random in a step follows from the seed, the step and the process, so that there is no generator to save;
    the learning rate follows from the step.

    Args:
        module: the model, on the device.
        objective: its loss.
        recipe: of the run.
        world: this process among all.
        updates_per_epoch: steps of an epoch.
        has_unused_parameters: whether some trainable parameters get no gradient.

    Attributes:
        evaluated: the model to evaluate: `module`, or the moving average of its weights.
        step: how many steps are done.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        recipe: Recipe,
        world: World,
        updates_per_epoch: int,
        has_unused_parameters: bool = False,
    ) -> None:
        self.module, self.objective, self.recipe, self.world = module, objective, recipe, world
        sharded = recipe.machine.sharding == "fsdp"
        decay = recipe.run.ema_decay
        if decay and "dtype" not in inspect.signature(ModelEmaV3).parameters:
            raise ImportError(
                "run.ema_decay: timm before 1.0.31 has no float32 average: pip install 'm2pt-triton[train]'"
            )
        # in float32 timm needs no random rounding of bfloat16 weights, and one by one it leaves frozen ones exact;
        # buffers are copied, because float8 has no average
        self.ema = (
            ModelEmaV3(module, decay, dtype=torch.float32, foreach=False, exclude_buffers=True) if decay else None
        )
        if recipe.machine.compile:
            module.compile()
        self.entries = module.state_dict().keys()
        self.without: set[str] = set()
        if recipe.auxiliary.path and not recipe.auxiliary.in_checkpoints:
            self.without, self.digests = frozen_entries(module), digests(places(module))
        self.model = distribute(module, recipe.machine, world, has_unused_parameters)
        if self.ema is not None and sharded:
            shard(self.ema.module, recipe.machine)
        self.optimizer = create_optimizer(module, recipe)
        self.left_out: set[str] = set()
        if recipe.machine.step_in_backward:
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(self._leave_out, name))
            step_in_backward(self.optimizer)
        self.scheduler = create_scheduler(self.optimizer, recipe, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.machine.precision == "float16")
        self.step = 0

    @property
    def evaluated(self) -> nn.Module:
        return self.module if self.ema is None else self.ema.module

    def update(self, batches: Iterable[Any]) -> dict[str, float]:
        """One optimizer step over the passes in `batches`, as many as the recipe accumulates.

        Returns:
            The loss, averaged over all passes and processes, the norm of its gradient before clipping where it is
            known, and the learning rate of the head.

        Raises:
            FloatingPointError: the loss or its gradient is not finite. The weights are as they were; but where the step
                is inside backward, those with a finite gradient have made it.
            ValueError: there are fewer passes.
        """
        self._seed()
        self.scheduler.step_update(self.step)
        self.optimizer.zero_grad()
        self.left_out.clear()
        self.model.train()
        loss = torch.zeros((), device=self.world.device)
        number, passes = 0, self.recipe.machine.accumulation
        for number, batch in enumerate(batches, 1):
            loss += self._backward(batch, is_last=number == passes)
        if number < passes:  # a stream that leaves out what it cannot read, and with it everything
            raise ValueError(f"data: the training split ended at step {self.step}, after {number} of {passes} passes")
        figures = {"loss": self._finite_mean(loss)}
        if not self.recipe.machine.step_in_backward:
            figures["gradient_norm"] = self._step()
        elif self.world.any(bool(self.left_out)):
            raise FloatingPointError(f"step {self.step}: the gradient is not finite")
        if self.ema is not None:
            self.ema.update(self.module)
        self.step += 1
        return figures | {"learning_rate": max(group["lr"] for group in self.optimizer.param_groups)}

    def _seed(self) -> None:
        random_seed(derived_seed(self.recipe.run.seed, self.step, self.world.rank))

    def _backward(self, batch: Any, is_last: bool) -> Tensor:
        machine = self.recipe.machine
        with synchronised(self.model, enabled=is_last):
            with offloading(machine):
                loss = self._loss(self.model, batch) / machine.accumulation
            if machine.step_in_backward:
                self._finite_mean(loss.detach().clone())
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _leave_out(self, name: str, parameter: Tensor) -> None:
        """Before the step inside backward, take away a gradient that is not finite; to know it, wait for the GPU.

        Nothing is raised here, because other processes would wait in vain for this one to go on with backward.
        """
        if not _is_finite(cast(Tensor, parameter.grad)):
            self.left_out.add(name)
            parameter.grad = None

    def _finite_mean(self, loss: Tensor) -> float:
        mean = self.world.mean(loss).item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"step {self.step}: the loss is {mean}")
        return mean

    def _step(self) -> float:
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        with autocast(self.recipe.machine, self.world.device):
            return self.objective(model, to_device(batch, self.world.device))

    def _clip(self) -> float:
        """Clip the gradient, unless it is not finite: clipping would spread that over all layers."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        total = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler leaves such a step out
            raise FloatingPointError(f"step {self.step}: the norm of the gradient is {norm}")
        nn.utils.clip_grads_with_norm_(parameters, self.recipe.optimizer.clip_grad or math.inf, total)
        return norm

    def first_not_finite(self, batches: Iterable[Any]) -> str:
        """What in this process is the first not to be finite in the step over these passes that `update` has refused.

        The passes are computed again, unless weights have changed in backward.
        """
        found = [] if self.world.any(bool(self.left_out)) else self._outputs_not_finite(batches)
        if not found:  # backward goes from the last layer to the first
            found = [
                f"the gradient of {name}"
                for name, parameter in reversed(list(self.module.named_parameters()))
                if name in self.left_out or not (parameter.grad is None or _is_finite(parameter.grad))
            ]
        return f"the first that is not finite is {found[0]}" if found else "everything is finite in this process"

    @torch.no_grad()
    def _outputs_not_finite(self, batches: Iterable[Any]) -> list[str]:
        """Input, outputs of layers and loss that are not finite in the forward passes of the step, in their order."""
        found: list[str] = []

        def look(what: str, value: Any) -> None:
            if not all(leaf.isfinite().all() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                found.append(what)

        def look_at_output(name: str, module: nn.Module, input: Any, output: Any) -> None:
            look(f"the output of {name or type(module).__name__}", output)

        hooks = [self.module.register_forward_pre_hook(lambda module, input: look("the input", input))]
        hooks += [
            module.register_forward_hook(partial(look_at_output, name)) for name, module in self.module.named_modules()
        ]
        self._seed()
        try:
            with torch.compiler.set_stance("force_eager"):
                for batch in batches:
                    look("the loss itself", self._loss(self.module, batch))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def weights(self) -> dict[str, Tensor]:
        """The whole state dict of `evaluated`, on the CPU; where it is sharded, in the first process only."""
        return cast(dict[str, Tensor], get_model_state_dict(self.evaluated, options=WHOLE))

    def state_dict(self) -> dict[str, Any]:
        """The whole state in plain containers, on the CPU; where it is sharded, in the first process only.

        Raises:
            FloatingPointError: a trained weight is not finite; nothing can be continued from it.
        """
        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        damaged = next((name for name, p in trained if not _is_finite(p)), None)
        if self.world.any(damaged is not None):
            raise FloatingPointError(f"step {self.step}: {damaged or 'a weight'} is not finite")
        model, optimizer = get_state_dict(self.module, self.optimizer, options=WHOLE)
        state = {"model": model, "optimizer": optimizer, "scaler": self.scaler.state_dict(), "step": self.step}
        if self.ema is not None:
            state["ema"] = get_model_state_dict(self.ema.module, options=WHOLE)
        if not self.without:
            return state
        for part in {"model", "ema"} & state.keys():
            state[part] = {name: value for name, value in state[part].items() if name not in self.without}
        return state | {AUXILIARY: self.digests}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, whatever the number of processes that saved it.

        Raises:
            ValueError: it has other entries, or leaves out auxiliary weights that are others.
        """
        if self.without:
            check_auxiliary(self.digests, state[AUXILIARY])
        models = {"model": self.module} if self.ema is None else {"model": self.module, "ema": self.ema.module}
        for part, module in models.items():  # torch does not compare the names where it should be strict
            if differing := sorted(state[part].keys() ^ (self.entries - self.without)):
                raise ValueError(f"{part}: {', '.join(differing[:5])}: only the checkpoint has it, or only the model")
            set_model_state_dict(module, state[part], options=replace(WHOLE, strict=False))
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"], options=WHOLE)
        self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


def _is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor is finite, or this process's part of it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isfinite().all())


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Any, batches: Iterable[Any], metric: Metric, machine: Machine, world: World
) -> dict[str, float]:
    """The metrics of a model on a test split, the same in every process; logits are averaged over a sample's views.

    Raises:
        ValueError: no sample, or one that cannot be read; in a stream, fewer than it says to have.
    """
    model.eval()
    views = dataset.views
    kept: list[tuple[Tensor, Tensor]] = []
    with running(batches) as loaded:
        for batch in loaded:
            input, target = to_device(batch, world.device)
            with autocast(machine, world.device):
                logits = model(input.flatten(0, 1) if views > 1 else input).float()
            if views > 1:
                logits = logits.unflatten(0, (-1, views)).mean(1)
            kept.append(metric.rows(logits, input, target))
    if not kept:
        raise ValueError("data: the test split has no sample that can be read")
    rows, targets = (_in_order(parts, dataset, world) for parts in zip(*kept, strict=True))
    if len(rows) < (samples := samples_of(dataset)):  # a stream leaves out what it cannot read
        raise ValueError(f"data: only {len(rows)} of the {samples} samples of the test split can be read")
    return metric.summary(rows, targets)


def _in_order(parts: Sequence[Tensor], dataset: Any, world: World) -> Tensor:
    rows = torch.cat(list(parts))
    if not isinstance(dataset, IterableDataset):
        rows = world.interleave(rows)[: len(dataset)]
    return rows.cpu()
