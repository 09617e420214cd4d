"""Simulates a training step's memory, part by part: fake tensors are allocated and freed, and nothing is computed."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2pt_kernels.estimates import MOST_SPLIT_BYTES, MOST_SPLITS

from .linear import FusedCrossModalLinear

PARTS = ("weights", "W_aux", "gradients", "optimizer", "activations", "transient")
"""`weights` include buffers and a moving average; `activations` are kept from forward to backward and include the
batch; `transient` is what is allocated and freed within either."""

Bytes = dict[str, int]
"""By part."""

Moment = tuple[str, int]
"""The phase of a step between two marks, and its block: 0 for the first, others counted from the end, as -2."""

Splits = Callable[[int, int, int], int]
"""Given rows, columns and tokens of a gradient, among how many blocks of a GPU it is split."""


class Timeline(TorchDispatchMode):
    """Records what is allocated and freed inside the block, which part it belongs to, and the marks of moments; while a
    layer's gradients are computed, holds what a GPU's kernels allocate for their splits."""

    def __init__(self, splits: Splits) -> None:
        super().__init__()
        self.splits = splits
        self.sizes: list[int] = []
        self.parts: list[str] = []
        self.events: list[int | Moment] = []  # n: a storage is allocated; ~n: it is freed; or a mark
        self.held: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if operator is torch.ops.prim.device.default:  # four of five calls, and slow otherwise
            return arguments[0].fake_device
        sums = None
        if operator is torch.ops.m2pt_kernels.grad_parameters.default:
            sums = self._split_sums(*arguments[:2])
            self.hold("transient", [sums])
        result = operator(*arguments, **(named or {}))
        self.hold("transient", [result] if isinstance(result, Tensor) else tree_leaves(result))
        del sums
        return result

    def _split_sums(self, grad_output: Tensor, x: Tensor) -> Tensor:
        size = grad_output.shape[-1], x.shape[-1]
        splits = self.splits(*size, x.shape[:-1].numel())
        return x.new_empty(splits if splits > 1 else 0, *size, dtype=torch.float32)

    def hold(self, part: str, values: Iterable[Any]) -> None:
        """Record the tensors that are new, and the part they belong to unless it is known."""
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            place = storage._cdata
            if place not in self.held:
                number = len(self.sizes)
                self.sizes.append(storage.nbytes())
                self.parts.append(part)
                self.events.append(number)
                self.held[place] = weakref.ref(storage, partial(self._release, place)), number
            elif self.parts[number := self.held[place][1]] == "transient":
                self.parts[number] = part

    def hold_rest(self, part: str) -> None:
        """Assign everything that belongs to no other part yet to this one."""
        for _, number in self.held.values():
            if self.parts[number] == "transient":
                self.parts[number] = part

    def mark(self, name: str, block: int) -> None:
        """Begin a moment."""
        self.events.append((name, block))

    def _release(self, place: int, _: weakref.ref) -> None:
        self.events.append(~self.held.pop(place)[1])

    def peaks(self) -> dict[Moment, Bytes]:
        """What is held at the peak of each moment since the first mark."""
        found: dict[Moment, Bytes] = {}
        moment: Moment | None = None
        now, most = dict.fromkeys(PARTS, 0), 0
        for event in self.events:
            if isinstance(event, tuple):
                moment, most = event, sum(found.get(event, {}).values())
            else:
                number = max(event, ~event)
                now[self.parts[number]] += self.sizes[number] if event >= 0 else -self.sizes[number]
            if moment is not None and (total := sum(now.values())) > most:
                most, found[moment] = total, now.copy()
        return found


def most_splits(rows: int, columns: int, tokens: int) -> int:
    """The most splits that any GPU may be asked for."""
    return min(MOST_SPLITS, MOST_SPLIT_BYTES // (4 * rows * columns))


Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def to_host(tensor: Tensor) -> Layout:
    """As in `torch.autograd.graph.save_on_cpu`: a saved tensor leaves the device."""
    return tensor.shape, tensor.stride(), tensor.dtype


def from_host(layout: Layout) -> Tensor:
    """A saved tensor comes back as another one."""
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype)


def fake() -> FakeTensorMode:
    """Inside the block tensors take no memory; bring in a model on "meta" with `to_empty(device="cpu")`."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def simulate(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Any,
    loss: Callable[[], Tensor],
    *,
    micro_batches: int = 1,
    on_host: bool = False,
    average: nn.Module | None = None,
    buckets: bool = False,
    splits: Splits = most_splits,
) -> dict[Moment, Bytes]:
    """The peaks of a training step, inside `fake`.

    Args:
        model: in training mode.
        optimizer: with its states created.
        batch: the tensors of a micro-batch.
        loss: the forward pass.
        micro_batches: how many gradients are added for a step; from the second on each is like the second.
        on_host: whether what forward saves is kept in the host's memory.
        average: the moving average of the weights, if there is one.
        buckets: whether the gradients are there a second time, as DDP sends them.
        splits: how the GPU's kernels split gradients.
    """
    timeline = Timeline(splits)
    timeline.hold("W_aux", auxiliary_tensors(model))
    for module in (model, *([] if average is None else [average])):
        timeline.hold("weights", [*module.parameters(), *module.buffers()])
    timeline.hold("optimizer", [value for state in optimizer.state.values() for value in state.values()])
    timeline.hold("activations", tree_leaves(batch))
    sent = [torch.empty_like(p) for p in model.parameters() if p.requires_grad and buckets]
    timeline.hold("gradients", sent)
    with _noted(model, timeline), timeline:
        for _ in range(min(micro_batches, 2)):
            timeline.mark("start", 0)
            with saved_tensors_hooks(to_host, from_host) if on_host else nullcontext():
                value = loss()
            timeline.hold_rest("activations")
            timeline.mark("loss", 0)
            value.backward()
            del value
        timeline.mark("update", 0)
        optimizer.step()
        optimizer.zero_grad()
    return timeline.peaks()


@contextmanager
def _noted(model: nn.Module, timeline: Timeline) -> Iterator[None]:
    """Inside the block, the timeline records the model's gradients and when its blocks begin and end."""

    def hold(parameter: Tensor) -> None:
        timeline.hold("gradients", [parameter.grad])

    blocks = blocks_of(model)
    last = len(blocks)
    hooks = [p.register_post_accumulate_grad_hook(hold) for p in model.parameters() if p.requires_grad]
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, inputs, index=index: begin(index, inputs[0])))
    if blocks:
        hooks.append(blocks[-1].register_forward_hook(lambda module, inputs, output: begin(last, output)))

    def begin(index: int, tensor: Tensor) -> None:
        """Block `index` begins forward; the one before it, which made the tensor, begins backward when that has a
        gradient."""
        if torch._C._current_graph_task_id() != -1:  # recomputed in backward
            return
        timeline.mark(*(("forward", index and index - last) if index < last else ("head", 0)))
        before = ("backward", index - 1 and index - 1 - last) if index else ("embedding", 0)
        if tensor.requires_grad:
            tensor.register_hook(lambda _: timeline.mark(*before))

    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def auxiliary_tensors(model: nn.Module) -> list[Tensor]:
    """W_aux of every fused layer, with its scales where it is quantised."""
    layers = [module for module in model.modules() if isinstance(module, FusedCrossModalLinear)]
    both = [tensor for layer in layers for tensor in (layer.aux_weight, layer.aux_weight_scale)]
    return [tensor for tensor in both if tensor is not None]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, a module's children `blocks`."""
    found = (module for name, module in model.named_modules() if name.split(".")[-1] == "blocks")
    return list(next(found, nn.Sequential()).children())
