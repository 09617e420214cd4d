"""Batches that depend only on the seed and the step, not on processes, workers or where training was resumed."""

import itertools
import sys
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from ..data.common import seeded
from .distributed import World
from .recipe import Data, Machine, Recipe
from .workers import leave_to_parent, received


def derived_seed(*numbers: int) -> int:
    """A seed of 32 bits that differs from every other combination's."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededSamples(Dataset):
    """A dataset whose key is an index and the seed of everything random in the sample.

    Returns the sample and the errors of samples that could not be read. With `skips`, the next readable one takes their
    place, so that the batch is the same whichever process reads it; otherwise the sample is None.
    """

    def __init__(self, dataset: Any, skips: bool) -> None:
        self.dataset, self.skips = dataset, skips

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        index, seed = key
        samples = len(self.dataset)
        errors: list[str] = []
        for place in range(index, index + (samples if self.skips else 1)):
            try:
                with seeded(seed):
                    return self.dataset[place % samples], errors
            except ValueError as error:
                errors.append(str(error))
            except Exception as error:
                return None, [_described(f"sample {place % samples}", error)]
        return None, errors


class StreamedSamples(IterableDataset):
    """The samples of a stream in the form of `SeededSamples`; after an error nothing else comes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[tuple[Any, list[str]]]:
        try:
            for sample in self.dataset:
                yield sample, []
            return
        except ValueError as error:
            errors = [str(error)]
        except Exception as error:
            errors = [_described("a stream of samples", error)]
        while True:  # an incomplete batch might be left out
            yield None, errors


class Batches:
    """Collated batches of what `SeededSamples` returns; what could not be read is named once on stderr.

    Errors are passed as values, because a DataLoader would put its workers' tracebacks into the message. Use with
    `running`.

    Args:
        sampling: arguments of the DataLoader.

    Raises:
        ChildProcessError: a worker was lost.
        ValueError: a sample cannot be read, and none stands in for it.
    """

    def __init__(self, dataset: Dataset, machine: Machine, world: World, **sampling: Any) -> None:
        # with torch's generator, a step that is repeated after others or resumed would draw other numbers
        sampling = {"generator": torch.Generator()} | sampling
        self.loader = DataLoader(
            dataset,
            collate_fn=_collate,
            num_workers=machine.workers,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=leave_to_parent,
            **sampling,
        )

    def __iter__(self) -> Iterator[Any]:
        named: set[str] = set()
        with received(self.loader) as batches:
            for batch, errors in batches:
                if batch is None:
                    raise ValueError(errors[-1])
                for error in errors:
                    if error not in named:
                        named.add(error)
                        print(f"m2pt: left out: {error}", file=sys.stderr)
                yield batch


def _collate(read: list[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
    samples, errors = zip(*read, strict=True)
    every = list(itertools.chain(*errors))
    if any(sample is None for sample in samples):
        return None, every
    try:
        return default_collate(list(samples)), every
    except Exception as error:
        return None, [_described("samples of a batch do not fit each other", error)]


def _described(what: str, error: Exception) -> str:
    """An error that no damaged file explains, and the line that raised it: workers give no traceback."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"data: {what}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


class TrainingOrder(Sampler[list[tuple[int, int]]]):
    """This process's share of every micro-batch from step `start` on, through all epochs.

    An epoch is a permutation cut into batches; the rest is left out. A batch is cut into `accumulation`
    micro-batches, whose samples are dealt out to the processes one by one.
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
    """The number of whole batches in so many samples.

    Raises:
        ValueError: there are none.
    """
    if samples < data.batch_size:
        raise ValueError(f"data.batch_size: {data.batch_size}, but split {data.train_split!r} has {samples} samples")
    return samples // data.batch_size


def micro_batch_size(recipe: Recipe, processes: int) -> int:
    """Samples of a micro-batch in each process.

    Raises:
        ValueError: the batch cannot be divided evenly, or not into pairs where its samples are mixed.
    """
    parts = recipe.machine.accumulation * processes
    pairs = 2 if recipe.loss.mixup or recipe.loss.cutmix else 1
    size = recipe.data.batch_size
    if size % (parts * pairs):
        raise ValueError(
            f"data.batch_size: expected a multiple of {parts * pairs} for {processes} processes,"
            f" {recipe.machine.accumulation} micro-batches{' and mixed pairs' if pairs == 2 else ''}, got {size}"
        )
    return size // parts


def samples_of(dataset: Any) -> int:
    """Samples of an epoch, over all processes."""
    return len(dataset) if not isinstance(dataset, IterableDataset) else cast(Any, dataset).reader.num_samples


def training_batches(dataset: Any, recipe: Recipe, world: World, start: int) -> Iterator[Any]:
    """The micro-batches of this process from step `start` on, collated."""
    if isinstance(dataset, IterableDataset):
        return _streamed(dataset, recipe, world, start)
    order = TrainingOrder(samples_of(dataset), recipe, world, start)
    samples = SeededSamples(dataset, skips=recipe.data.on_error == "skip")
    return iter(Batches(samples, recipe.machine, world, batch_sampler=order))


def _streamed(dataset: Any, recipe: Recipe, world: World, start: int) -> Iterator[Any]:
    """A stream has no order to choose from: what was seen before `start` is read again and left out."""
    steps, micro_batches = steps_per_epoch(samples_of(dataset), recipe.data), recipe.machine.accumulation
    for epoch in range(start // steps, recipe.schedule.epochs):
        dataset.set_epoch(epoch)
        generator = torch.Generator().manual_seed(derived_seed(recipe.run.seed, epoch, world.rank))
        sampling = {"batch_size": micro_batch_size(recipe, world.size), "drop_last": True, "generator": generator}
        seen = max(start - epoch * steps, 0) * micro_batches
        with running(Batches(StreamedSamples(dataset), recipe.machine, world, **sampling)) as batches:
            yield from itertools.islice(batches, seen, steps * micro_batches)


def test_batches(dataset: Any, recipe: Recipe, world: World) -> Iterable[Any]:
    """This process's share of a test split: every `world.size`-th sample, padded with the first to equal shares.

    Every process reads the whole of a stream. Nothing stands in for a sample that cannot be read: the metrics are those
    of the whole split.
    """
    size = recipe.data.test_batch_size
    if isinstance(dataset, IterableDataset):
        return Batches(StreamedSamples(dataset), recipe.machine, world, batch_size=size)
    samples = len(dataset)
    padded = [*range(samples), *[0] * (-samples % world.size)]
    keys = [(index, derived_seed(recipe.run.seed, index)) for index in padded[world.rank :: world.size]]
    return Batches(SeededSamples(dataset, skips=False), recipe.machine, world, batch_size=size, sampler=keys)


def running(batches: Iterable[Any]) -> closing[Generator[Any, None, None]]:
    """The batches for a `with` block; their workers end with it."""
    return closing(_each(batches))


def _each(batches: Iterable[Any]) -> Generator[Any, None, None]:
    yield from batches


def to_device(batch: Any, device: torch.device) -> Any:
    """A collated batch of tensors, or of lists of them, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return [to_device(part, device) for part in batch]
