"""Batches that depend on the seed and the step alone, not on processes, workers, or where training was resumed."""

import itertools
import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..data.common import seeded
from .distributed import World
from .recipe import Data, Machine, Recipe


def derived_seed(*numbers: int) -> int:
    """A seed of 32 bits that differs from every other combination's."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededSamples(Dataset):
    """A dataset whose key is an index and the seed of everything random in the sample."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        with seeded(seed):
            return self.dataset[index]


class TrainingOrder(Sampler[list[tuple[int, int]]]):
    """This process's share of every pass from step `start` on, through all epochs.

    An epoch is a permutation cut into batches; the rest is left out. A batch is cut into `accumulation` passes, and a
    pass is dealt out to the processes one by one.
    """

    def __init__(self, samples: int, recipe: Recipe, world: World, start: int) -> None:
        self.samples, self.recipe, self.world, self.start = samples, recipe, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed, size = self.recipe.run.seed, self.recipe.data.batch_size
        steps = steps_per_epoch(self.samples, self.recipe.data)
        for epoch in range(self.start // steps, self.recipe.schedule.epochs):
            generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
            batches = torch.randperm(self.samples, generator=generator)[: steps * size].view(steps, size)
            for batch in batches[max(self.start - epoch * steps, 0) :]:
                for share in batch.view(self.recipe.machine.accumulation, -1):
                    indices = share[self.world.rank :: self.world.size].tolist()
                    yield [(index, derived_seed(seed, epoch, index)) for index in indices]


def steps_per_epoch(samples: int, data: Data) -> int:
    """Whole batches in a number of samples.

    Raises:
        ValueError: there is none.
    """
    if samples < data.batch_size:
        raise ValueError(f"data.batch_size: {data.batch_size}, but split {data.train_split!r} has {samples} samples")
    return samples // data.batch_size


def pass_size(recipe: Recipe, world: World) -> int:
    """Samples of one forward pass of one process.

    Raises:
        ValueError: the batch cannot be divided evenly, or not into pairs where its samples are mixed.
    """
    parts = recipe.machine.accumulation * world.size
    pairs = 2 if recipe.loss.mixup or recipe.loss.cutmix else 1
    size = recipe.data.batch_size
    if size % (parts * pairs):
        raise ValueError(
            f"data.batch_size: expected a multiple of {parts * pairs} for {world.size} processes,"
            f" {recipe.machine.accumulation} passes{' and mixed pairs' if pairs == 2 else ''}, got {size}"
        )
    return size // parts


def samples_of(dataset: Any) -> int:
    """Samples of an epoch, over all processes."""
    return len(dataset) if not isinstance(dataset, IterableDataset) else cast(Any, dataset).reader.num_samples


def training_batches(dataset: Any, recipe: Recipe, world: World, start: int) -> Iterator[Any]:
    """The passes of this process from step `start` on, collated."""
    if isinstance(dataset, IterableDataset):
        return _streamed(dataset, recipe, world, start)
    order = TrainingOrder(samples_of(dataset), recipe, world, start)
    return iter(DataLoader(SeededSamples(dataset), batch_sampler=order, **_loading(recipe.machine, world)))


def _streamed(dataset: Any, recipe: Recipe, world: World, start: int) -> Iterator[Any]:
    """A stream has no order to choose from: what was seen before `start` is read again and left out."""
    steps, passes = steps_per_epoch(samples_of(dataset), recipe.data), recipe.machine.accumulation
    for epoch in range(start // steps, recipe.schedule.epochs):
        dataset.set_epoch(epoch)
        seed = derived_seed(recipe.run.seed, epoch, world.rank)
        loader = DataLoader(
            dataset,
            batch_size=pass_size(recipe, world),
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
            **_loading(recipe.machine, world),
        )
        seen = max(start - epoch * steps, 0) * passes
        yield from itertools.islice(loader, seen, steps * passes)


def test_batches(dataset: Any, recipe: Recipe, world: World) -> DataLoader:
    """This process's share of a test split: every `world.size`-th sample, the first again to make all shares equal.

    A stream is read whole by every process.
    """
    size, loading = recipe.data.test_batch_size, _loading(recipe.machine, world)
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, size, **loading)
    samples = len(dataset)
    padded = [*range(samples), *[0] * (-samples % world.size)]
    keys = [(index, derived_seed(recipe.run.seed, index)) for index in padded[world.rank :: world.size]]
    return DataLoader(SeededSamples(dataset), size, sampler=keys, **loading)


def running(batches: Iterable[Any]) -> AbstractContextManager[Iterator[Any]]:
    """The batches of a loader, whose workers end with the block; Python would wait for them at its end for ever."""
    return closing(batch for batch in batches)


def _loading(machine: Machine, world: World) -> dict[str, Any]:
    return {
        "num_workers": machine.workers,
        "pin_memory": world.device.type == "cuda",
        "worker_init_fn": _ignore_termination,
    }


def _ignore_termination(worker: int) -> None:
    """SIGTERM is often sent to all processes of a job; the one that trains has to finish its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_device(batch: Any, device: torch.device) -> Any:
    """A collated batch of tensors, or of lists of them, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return [to_device(part, device) for part in batch]
