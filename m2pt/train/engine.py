"""Training steps, the state from which they continue, and evaluation."""

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
    """The loss of logits for targets, with mixed inputs if the recipe asks for them; every view is a sample."""
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
    """Keep what the forward pass saves in the host's memory until backward, if the recipe asks for it."""
    return save_on_cpu(pin_memory=True) if machine.offload_activations else nullcontext()


class Trainer:
    """A model in training: its optimizer steps, and the state from which they continue bit for bit on a CPU.

    Everything random in a step follows from the seed, the step and the process, so that there is no generator to save;
    the learning rate follows from the step. Loss and gradient are checked on the device, and read back only by
    `metrics`: from the first step on that is not finite every update is left out, so that it is as if that step came
    next. An optimizer that is not fused has to be told by the host, which reads back once per step (or per parameter,
    where the step is inside backward).

    Args:
        module: the model, on the device.
        objective: its loss.
        recipe: of the run.
        world: this process among all.
        updates_per_epoch: steps of an epoch.

    Attributes:
        evaluated: the model to evaluate: `module`, or the moving average of its weights.
        step: how many steps are done; once `metrics` has raised its error, those before the one that it names.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        recipe: Recipe,
        world: World,
        updates_per_epoch: int,
    ) -> None:
        self.module, self.objective, self.recipe, self.world = module, objective, recipe, world
        sharded = recipe.machine.sharding == "fsdp"
        decay = recipe.run.ema_decay
        if decay and "dtype" not in inspect.signature(ModelEmaV3).parameters:
            raise ImportError(
                "run.ema_decay: timm before 1.0.31 has no float32 average: pip install 'm2pt-triton[train]'"
            )
        # in float32 timm needs no random rounding of bfloat16 weights, and without foreach frozen ones stay exact;
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
        self.model = distribute(module, recipe.machine, world)
        if self.ema is not None and sharded:
            shard(self.ema.module, recipe.machine)
        self.optimizer = create_optimizer(module, recipe)
        self.trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if recipe.machine.step_in_backward:
            for name, parameter in self.trained.items():
                parameter.register_post_accumulate_grad_hook(partial(self._check_gradient, name))
            step_in_backward(self.optimizer)
        self.scheduler = create_scheduler(self.optimizer, recipe, updates_per_epoch)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.machine.precision == "float16")
        self.step = 0
        self.has_failed = torch.zeros((), dtype=torch.bool, device=world.device)
        self.is_left_out = self.has_failed
        self.norms: dict[str, Tensor] = {}
        self.record = torch.zeros(3 + len(self.trained), dtype=torch.float64, device=world.device)
        """The number of the last step, or of the first that was not finite, its loss, the norm of its gradient, and the
        norm of every parameter's."""
        self.has_finite_loss = True
        self.not_finite: list[str] = []

    @property
    def evaluated(self) -> nn.Module:
        return self.module if self.ema is None else self.ema.module

    def update(self, micro_batches: Iterable[Any]) -> None:
        """One optimizer step over micro-batches, as many as the recipe accumulates.

        Nothing is read back, and nothing raised where loss or gradient are not finite: see `metrics`.

        Raises:
            ValueError: there are fewer.
        """
        self._seed()
        self.scheduler.step_update(self.step)
        self.optimizer.zero_grad()
        self.norms.clear()
        self.model.train()
        loss = torch.zeros((), device=self.world.device)
        number, expected = 0, self.recipe.machine.accumulation
        for number, batch in enumerate(micro_batches, 1):
            loss += self._backward(batch, is_last=number == expected)
        if number < expected:  # a stream that leaves out what it cannot read, and with it everything
            ended = f"ended at step {self.step}, after {number} of {expected} micro-batches"
            raise ValueError(f"data: the training split {ended}")
        loss = self.world.mean(loss)
        norm = self._norm() if self.recipe.machine.step_in_backward else self._step(loss)
        self._note(loss, norm)
        if self.ema is not None:
            self.ema.update(self.module)
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """What is logged of the last step, read back from the device.

        Returns:
            The loss, averaged over all micro-batches and processes, the norm of its gradient before clipping unless the
            step is inside backward, and the learning rate of the head.

        Raises:
            FloatingPointError: loss or gradient were not finite, in this step or an earlier one, which is named. The
                weights are as they were before it; but where the step is inside backward, those whose gradient came
                before the first that is not finite have made it.
        """
        step, loss, norm, *norms = self.record.tolist()
        self.has_finite_loss = math.isfinite(loss)
        if not (self.has_finite_loss and (math.isfinite(norm) or self.scaler.is_enabled())):
            self.step = int(step)
            self.not_finite = [name for name, each in zip(self.trained, norms, strict=True) if not math.isfinite(each)]
            what = f"the norm of the gradient is {norm}" if self.has_finite_loss else f"the loss is {loss}"
            raise FloatingPointError(f"step {self.step}: {what}")
        metrics = {"loss": loss} if self.recipe.machine.step_in_backward else {"loss": loss, "gradient_norm": norm}
        return metrics | {"learning_rate": max(group["lr"] for group in self.optimizer.param_groups)}

    def _seed(self) -> None:
        random_seed(derived_seed(self.recipe.run.seed, self.step, self.world.rank))

    def _backward(self, batch: Any, is_last: bool) -> Tensor:
        machine = self.recipe.machine
        with synchronised(self.model, enabled=is_last):
            with offloading(machine):
                loss = self._loss(self.model, batch) / machine.accumulation
            if machine.step_in_backward:
                self.is_left_out = self.has_failed | ~self.world.mean(loss.detach().clone()).isfinite()
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _check_gradient(self, name: str, parameter: Tensor) -> None:
        """Before the step inside backward: skip it from the first gradient on that is not finite."""
        self.norms[name] = torch.linalg.vector_norm(_local(cast(Tensor, parameter.grad)))
        self.is_left_out = self.is_left_out | ~self.norms[name].isfinite()
        if self._leaves_out():
            parameter.grad = None

    def _leaves_out(self) -> bool:
        """Whether the host has to skip the update; a fused optimizer is told here to do so on the device."""
        if not self.optimizer.defaults.get("fused"):
            return bool(self.is_left_out)
        cast(Any, self.optimizer).found_inf = self.is_left_out.float()  # as torch's GradScaler tells it
        return False

    def _step(self, loss: Tensor) -> Tensor:
        """Clip the gradient and make the step, unless loss or gradient are not finite; returns the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        trained = {name: parameter for name, parameter in self.trained.items() if parameter.grad is not None}
        gradients = [_local(cast(Tensor, parameter.grad)) for parameter in trained.values()]
        self.norms = dict(zip(trained, torch._foreach_norm(gradients), strict=True))
        norm = self._norm()
        if self.recipe.optimizer.clip_grad:
            nn.utils.clip_grads_with_norm_(trained.values(), self.recipe.optimizer.clip_grad, norm)
        self.is_left_out = self.has_failed | ~loss.isfinite() | ~norm.isfinite()
        if not self._leaves_out():
            self.optimizer.step()
        self.scaler.update()
        return norm

    def _norm(self) -> Tensor:
        """The norm of the whole gradient, the same in every process."""
        norm = torch.linalg.vector_norm(torch.stack(list(self.norms.values())))
        if self.recipe.machine.sharding == "fsdp":
            norm = (self.world.mean(norm.square()) * self.world.size).sqrt()
        return norm

    def _note(self, loss: Tensor, norm: Tensor) -> None:
        """Record the step, unless an earlier one was not finite; a scaler skips gradients that are not."""
        step, none = torch.full_like(loss, self.step, dtype=torch.float64), torch.zeros_like(loss)
        record = torch.stack([step, loss, norm, *(self.norms.get(name, none) for name in self.trained)])
        self.record = torch.where(self.has_failed, self.record, record)
        is_finite = loss.isfinite() if self.scaler.is_enabled() else loss.isfinite() & norm.isfinite()
        self.has_failed = self.has_failed | ~is_finite

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        with autocast(self.recipe.machine, self.world.device):
            return self.objective(model, to_device(batch, self.world.device))

    def first_not_finite(self, micro_batches: Iterable[Any]) -> str:
        """What in this process is the first not to be finite in the step over these that `metrics` has named.

        They are computed again, unless weights have changed in backward.
        """
        has_changed = self.recipe.machine.step_in_backward and self.has_finite_loss
        found = [] if has_changed else self._outputs_not_finite(micro_batches)
        if self.has_finite_loss:
            found += [f"the gradient of {name}" for name in reversed(self.not_finite)]  # as backward goes
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
        """The whole state dict of `evaluated`, on the CPU; if it is sharded, in the first process only."""
        return cast(dict[str, Tensor], get_model_state_dict(self.evaluated, options=WHOLE))

    def state_dict(self) -> dict[str, Any]:
        """The whole state in plain containers, on the CPU; if it is sharded, in the first process only.

        Raises:
            FloatingPointError: a step was not finite, or a trained weight is not; training cannot continue from it.
        """
        self.metrics()
        damaged = next(
            (name for name, parameter in self.trained.items() if not _local(parameter).isfinite().all()), None
        )
        if self.world.largest(damaged is not None):
            raise FloatingPointError(f"step {self.step}: {damaged or 'a weight'} is not finite")
        model, optimizer = get_state_dict(self.module, self.optimizer, options=WHOLE)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        state |= {"scaler": self.scaler.state_dict(), "step": self.step}
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
            ValueError: it has other entries, or leaves out auxiliary weights that differ from the model's.
        """
        if self.without:
            check_auxiliary(self.digests, state[AUXILIARY])
        models = {"model": self.module} if self.ema is None else {"model": self.module, "ema": self.ema.module}
        for part, module in models.items():  # torch does not compare the names where it should be strict
            if differing := sorted(state[part].keys() ^ (self.entries - self.without)):
                raise ValueError(f"{part}: {', '.join(differing[:5])}: only the checkpoint has it, or only the model")
            set_model_state_dict(module, state[part], options=replace(WHOLE, strict=False))
        for group in state["optimizer"]["param_groups"]:  # the run may have begun with another release
            if "fused" in group:
                group["fused"] = self.optimizer.defaults["fused"]
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"], options=WHOLE)
        self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Any, batches: Iterable[Any], metric: Metric, machine: Machine, world: World
) -> dict[str, float]:
    """The metrics of a model on a test split, the same in every process; logits are averaged over a sample's views.

    Raises:
        ValueError: no sample, or one that cannot be read; in a stream, fewer than it claims to have.
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
