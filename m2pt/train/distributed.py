"""Runs the same program in one process or, under `torchrun`, in several."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..linear import FusedCrossModalLinear
from .recipe import Machine

MEETINGS = itertools.count()
LAST_GROUP: list[Any] = []
"""The last process group, kept because the model may outlive it: its threads may need Python's lock to end, and would
wait for ever if DDP dropped the last reference to it, as DDP holds that lock meanwhile. Python releases it."""


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and this process's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; the device is not used, nor waited for."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def interleave(self, rows: Tensor) -> Tensor:
        """Gather, in every process and in order, rows that were dealt out one by one, equally many to each."""
        if self.size == 1:
            return rows
        gathered = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(gathered, rows.contiguous())
        return torch.stack(gathered, dim=1).flatten(0, 1)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def is_first_process() -> bool:
    """Whether this is the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def termination() -> Iterator[set[int]]:
    """Inside the block SIGTERM and Ctrl-C add their number to the set instead of ending the process; a second Ctrl-C
    raises KeyboardInterrupt.

    Python lets only the main thread handle signals: in other threads nothing changes, nor does it if Ctrl-C is ignored,
    as in a command that a script runs in the background.
    """
    asked: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.add(number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def processes() -> Iterator[World]:
    """The processes that `torchrun` started, with their communication set up; otherwise this process alone."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        yield World(0, 1, device)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"m2pt/{next(MEETINGS)}", store)  # torch leaves addresses of an earlier meeting there
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device if on_gpu else None)
    try:
        yield World(rank, size, device)
    finally:
        LAST_GROUP[:] = [dist.group.WORLD]
        dist.destroy_process_group()


def distribute(module: nn.Module, machine: Machine, world: World) -> nn.Module:
    """What to call instead of `module`, so that the processes train one model.

    DDP wraps the module; FSDP2 divides every block's parameters, and the rest's, in place. Its parameters stay float32
    if autocast computes in bfloat16; they are rounded when a block gathers them. Batch normalisation, for points and in
    a linear probe, sees only a process's own samples.

    Raises:
        ValueError: FSDP in a single process, or DDP with the step inside backward.
    """
    if machine.sharding == "fsdp":
        if world.size == 1:
            raise ValueError("machine.sharding: 'fsdp' needs several processes: start the command with torchrun")
        return shard(module, machine)
    if world.size == 1:
        return module
    if machine.step_in_backward:
        raise ValueError(
            "machine.step_in_backward: DDP adds the processes' gradients too late: use machine.sharding=fsdp"
        )
    devices = [world.device] if world.device.type == "cuda" else None
    quantised = [
        f"{name}.{buffer}"
        for name, layer in module.named_modules()
        if isinstance(layer, FusedCrossModalLinear)
        for buffer, _ in layer.named_buffers()
    ]
    # every process read them from the same file; DDP would send them before every forward, and gloo cannot send float8
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, quantised)
    return DistributedDataParallel(module, devices)


def shard(module: nn.Module, machine: Machine) -> nn.Module:
    """Divide `module` among the processes in place: its transformer blocks, then the rest (FSDP2)."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if machine.precision == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for name, child in module.named_modules():
        if isinstance(child, nn.Sequential) and name.rpartition(".")[2] in ("blocks", "decoder"):
            for block in child:
                fully_shard(block, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    return module


def synchronised(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Set whether backward adds the gradients of all processes: only in the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return cast(AbstractContextManager[None], model.no_sync())
    return nullcontext()
