"""What a training step holds in memory, part by part: fake tensors are allocated and freed, and nothing is computed."""

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
"""`weights` with buffers and a moving average; `activations` wait from forward to backward, with the batch itself;
`transient` is what comes and goes within either."""

Bytes = dict[str, int]
"""By part."""

Moment = tuple[str, int]
"""What a step is at between two marks, and of which block: 0 for the first, others counted from the end, as -2."""

Splits = Callable[[int, int, int], int]
"""Among how many blocks of a GPU gradients of rows, columns and tokens are split."""


class Timeline(TorchDispatchMode):
    """Keeps what is allocated and freed inside the block, to which part it belongs, and marks of moments between."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.parts: list[str] = []
        self.events: list[int | Moment] = []  # a storage comes, n, or goes, ~n; or a mark
        self.held: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        result = operator(*arguments, **(named or {}))
        self.hold("transient", [result] if isinstance(result, Tensor) else tree_leaves(result))
        return result

    def hold(self, part: str, values: Iterable[Any]) -> None:
        """Note the tensors that are new, and to which part they belong unless that is known."""
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
        """Let all that is there and belongs to no other part belong to this one."""
        for _, number in self.held.values():
            if self.parts[number] == "transient":
                self.parts[number] = part

    def mark(self, name: str, block: int) -> None:
        """Begin a moment."""
        self.events.append((name, block))

    def _release(self, place: int, _: weakref.ref) -> None:
        self.events.append(~self.held.pop(place)[1])

    def peaks(self) -> dict[Moment, Bytes]:
        """What there is at a time, when it is the most, in each moment since the first mark."""
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


class SplitSums(TorchDispatchMode):
    """Holds what the kernels of a GPU do of the splits of a layer's gradients, while these are computed."""

    def __init__(self, splits: Splits) -> None:
        super().__init__()
        self.splits = splits

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if operator is not torch.ops.m2pt_kernels.grad_parameters.default:
            return operator(*arguments, **(named or {}))
        grad_output, x = (operand.flatten(0, -2) for operand in arguments[:2])
        size = grad_output.shape[1], x.shape[1]
        splits = self.splits(*size, len(x))
        sums = x.new_empty(splits if splits > 1 else 0, *size, dtype=torch.float32)
        gradients = operator(*arguments, **(named or {}))
        del sums
        return gradients


def most_splits(rows: int, columns: int, tokens: int) -> int:
    """The most that any GPU may be asked for."""
    return min(MOST_SPLITS, MOST_SPLIT_BYTES // (4 * rows * columns))


Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def to_host(tensor: Tensor) -> Layout:
    """As `torch.autograd.graph.save_on_cpu` has it: a saved tensor leaves the device."""
    return tensor.shape, tensor.stride(), tensor.dtype


def from_host(layout: Layout) -> Tensor:
    """And comes back as another tensor."""
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype)


def fake() -> FakeTensorMode:
    """Inside the block tensors have no memory; a model on "meta" is brought in by `to_empty(device="cpu")`."""
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
        model: in training.
        optimizer: its states are there.
        batch: the tensors of a micro-batch.
        loss: the forward pass.
        micro_batches: of a step; from the second on each is like the second.
        on_host: what forward saves waits in the host's memory.
        average: of the weights, if there is one.
        buckets: whether the gradients are there a second time, as DDP sends them.
        splits: of gradients, as the GPU's kernels divide them.
    """
    timeline = Timeline()
    timeline.hold("W_aux", auxiliary_tensors(model))
    for module in (model, *([] if average is None else [average])):
        timeline.hold("weights", [*module.parameters(), *module.buffers()])
    timeline.hold("optimizer", [value for state in optimizer.state.values() for value in state.values()])
    timeline.hold("activations", tree_leaves(batch))
    sent = [torch.empty_like(p) for p in model.parameters() if p.requires_grad and buckets]
    timeline.hold("gradients", sent)
    with _noted(model, timeline), timeline, SplitSums(splits):
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
    """Inside the block, the timeline notes the gradients of the model and when its blocks begin and end."""

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
        if torch._C._current_graph_task_id() != -1:  # computed again in backward
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
