"""Runs: fine-tuning or probing with a pathway, masked pretraining, and evaluation of the results."""

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from timm.utils import random_seed
from torch import Tensor, nn

from ..checkpoints import Weights, check_weights, load_state_dict, save_state_dict
from ..checks import checked_path
from ..data import create_dataset
from ..data.common import Samples, missing, some
from ..models import MaskedAutoencoder
from ..pathway import places
from ..pathway_files import digests, frozen_entries
from ..simulation import auxiliary_tensors
from .batches import micro_batch_size, running, samples_of, steps_per_epoch, test_batches, training_batches
from .creation import connect, create_trained_model, created, initialised, read_auxiliaries, say_taken
from .deployment import build_plain, check_auxiliary, deployed, description, model_difference
from .distributed import World, is_first_process, processes, termination
from .engine import Trainer, classification_objective, evaluate
from .files import (
    CHECKPOINT,
    CLASS_NAMES,
    RECIPE,
    Trained,
    load_checkpoint,
    load_trained,
    save_checkpoint,
    write_json,
)
from .log import Log, plot_curves, plot_scales
from .memory import announce, evaluation_explained, explained, memory_in_words
from .metrics import metric_of
from .optimization import create_loss, create_optimizer, create_scheduler
from .recipe import Recipe, Schedule

SCALE = ".cross_modal_scale"
TERMINATED = 128 + signal.SIGTERM
"""The status that a shell gives a process which SIGTERM ended."""

Metrics = dict[str, float]


def train(recipe: Recipe, out: str | os.PathLike, resume: bool = False) -> dict[str, Metrics]:
    """Train a model as the recipe says, evaluate it, merge its pathway, and evaluate a plain model with that file.

    Under `torchrun` every process calls this; they all see `out`. The files there are `recipe.json`, `log.jsonl`,
    `last.pth` (to resume from), `merged.safetensors`, `merged.json` (how to build the model for it), `result.json`,
    `curves.png`, and with a pathway `scales.png`.

    Args:
        recipe: one without `pretraining`.
        out: folder to write to, made if it is missing.
        resume: continue the run in `out` from its last checkpoint.

    Returns:
        The metrics in percent: "trained" for the model in training, "merged" for the plain one.

    Raises:
        FloatingPointError: the loss, a gradient or a weight is not finite; the message names the step and the layer.
        FileNotFoundError, TypeError, ValueError: recipe, data and checkpoints do not fit, or `out` holds a run already.
        OSError: `out` cannot be written to.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came during training. The step was finished, or an evaluation
            cut short, and the state saved; the status of SystemExit is 143. Before and after training Ctrl-C ends at
            once, and so does a second one.
    """
    out = _checked(recipe, out)
    require_training(recipe)
    _require_free(out, resume)
    _say_shortened(recipe.schedule)
    test_set = _test_set(recipe)
    with processes() as world:
        train_set = _training_set(recipe, world)
        _match_classes(test_set, train_set)
        num_classes, views = train_set.num_classes, train_set.views
        announce(recipe, num_classes, world, views)
        module = create_trained_model(recipe, num_classes, train_set.multi_label)
        objective = classification_objective(recipe, num_classes, views, create_loss(recipe.loss))
        steps = steps_per_epoch(samples_of(train_set), recipe.data)
        with explained(recipe, module, world.size):
            trainer = Trainer(module.to(world.device), objective, recipe, world, steps)
        metric, batches = metric_of(test_set), test_batches(test_set, recipe, world)

        def measure(model: nn.Module, asked: Callable[[], int] = lambda: 0) -> Metrics:
            with evaluation_explained(recipe):
                return evaluate(model, test_set, _until_stopped(batches, asked), metric, recipe.machine, world)

        with _log_of(trainer, out, train_set.class_names, resume, steps) as log:
            _fit(trainer, train_set, out, log, steps, lambda asked: measure(trainer.evaluated, asked))
            trained = measure(trainer.evaluated)
            weights = trainer.weights()
            if world.is_first:
                save_state_dict(deployed(weights), out / "merged.safetensors")
            world.barrier()
            plain = build_plain(recipe, num_classes, load_state_dict(out / "merged.safetensors"))
            merged = measure(plain.to(world.device))
            log.write(trainer.step, model="trained", **trained)
            log.write(trainer.step, model="merged", **merged, **description(recipe, num_classes))
        result = {"trained": trained, "merged": merged}
        if world.is_first:
            classes = {CLASS_NAMES: train_set.class_names}
            write_json(out / "merged.json", description(recipe, num_classes) | classes)
            write_json(out / "result.json", result)
            plot_curves(out)
            plot_scales({name: value.tolist() for name, value in weights.items() if name.endswith(SCALE)}, out)
    return result


def pretrain(recipe: Recipe, out: str | os.PathLike, resume: bool = False) -> None:
    """Pretrain a masked autoencoder as the recipe says.

    The files in `out` are `pretrained.safetensors`, the transformer without its decoder, which `load_auxiliary` and
    `load_pretrained` read, and `recipe.json`, `log.jsonl`, `last.pth` and `curves.png` as in `train`.

    Args:
        recipe: one with `pretraining`.
        out: folder to write to, made if it is missing.
        resume: continue the run in `out` from its last checkpoint.

    Raises:
        FloatingPointError: the loss, a gradient or a weight is not finite; the message names the step and the layer.
        FileNotFoundError, TypeError, ValueError: recipe and data do not fit, or `out` holds a run already.
        OSError: `out` cannot be written to.
        KeyboardInterrupt, SystemExit: as in `train`.
    """
    out = _checked(recipe, out)
    require_pretraining(recipe)
    _require_free(out, resume)
    _say_shortened(recipe.schedule)
    with processes() as world:
        train_set = _training_set(recipe, world)
        steps = steps_per_epoch(samples_of(train_set), recipe.data)
        views = train_set.views
        announce(recipe, train_set.num_classes, world, views)
        autoencoder = _autoencoder(recipe)

        def objective(model: nn.Module, batch: Any) -> Tensor:
            input, _ = batch
            return model(input.flatten(0, 1) if views > 1 else input)

        with explained(recipe, autoencoder, world.size):
            trainer = Trainer(autoencoder.to(world.device), objective, recipe, world, steps)
        with _log_of(trainer, out, train_set.class_names, resume, steps) as log:
            _fit(trainer, train_set, out, log, steps, None)
        weights = trainer.weights()
        if world.is_first:
            (prefix,) = (f"{name}." for name, module in autoencoder.named_modules() if module is autoencoder.model)
            inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            save_state_dict(inside, out / "pretrained.safetensors")
            plot_curves(out)


def require_training(recipe: Recipe) -> None:
    """Raise a ValueError for a recipe that is not for `train`."""
    if recipe.pretraining is not None:
        raise ValueError("recipe: this one is for pretraining: run it with `m2pt pretrain`")


def require_pretraining(recipe: Recipe) -> None:
    """Raise a ValueError for a recipe that is not for `pretrain`."""
    if recipe.pretraining is None:
        raise ValueError("recipe: expected one with a table [pretraining]; this one is for `m2pt train`")
    if recipe.auxiliary.path or recipe.model.trainable != "all":
        raise ValueError("recipe: pretraining has no auxiliary model and no probe")


def preview(recipe: Recipe) -> str:
    """What `train` or `pretrain` would run: parameters, steps and memory. Data are opened, and nothing is written.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as in these.
    """
    test_set = None if recipe.pretraining else _test_set(recipe)
    with processes() as world:
        train_set = _training_set(recipe, world)
        num_classes = train_set.num_classes
        if test_set is None:
            module: nn.Module = _autoencoder(recipe)
        else:
            _match_classes(test_set, train_set)
            module = create_trained_model(recipe, num_classes, train_set.multi_label)
        samples = samples_of(train_set)
        steps = steps_per_epoch(samples, recipe.data)
        create_scheduler(create_optimizer(module, recipe), recipe, steps)
        aux = sum(tensor.nbytes for tensor in auxiliary_tensors(module) if not tensor.requires_grad)
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        epochs, machine = recipe.schedule.epochs, recipe.machine
        return "\n".join(
            [
                f"parameters: {trained:,} trained" + f", {aux / 2**20:,.0f} MiB of W_aux frozen" * bool(aux),
                f"steps: {epochs * steps:,}, in {epochs} epochs of {steps:,}, over {samples:,} samples",
                f"step: {recipe.data.batch_size} samples; processes {world.size}, micro-batches {machine.accumulation}",
                f"memory: {memory_in_words(recipe, num_classes, world.size, train_set.views)}",
            ]
        )


def _autoencoder(recipe: Recipe) -> MaskedAutoencoder:
    random_seed(recipe.run.seed)
    module = MaskedAutoencoder(initialised(recipe, num_classes=0), **vars(recipe.pretraining))
    return module.freeze_unused()  # an optimizer's state that lacks a trainable parameter is not loaded again


def _match_classes(test_set: Any, train_set: Any) -> None:
    """Number the classes of both splits alike."""
    if isinstance(train_set, Samples):
        test_set.number_as(train_set.class_names)
        test_set.require_classes_of(train_set)


def evaluate_checkpoint(recipe: Recipe, checkpoint: str | os.PathLike, weights: Weights | None = None) -> Metrics:
    """The metrics in percent of a checkpoint of `train`: `last.pth`, also of an unfinished run, or a merged file.

    Args:
        recipe: the run's.
        checkpoint: the file.
        weights: "ema" for the moving average of the weights, "raw" for the weights beside it; which were taken is
            printed. Default: the average if there is one.

    Raises:
        TypeError: `recipe` or `checkpoint` has another type.
        FileNotFoundError: no such file, or no data.
        ValueError: the checkpoint is not of the recipe's model, has other classes than the data, or no such `weights`.
    """
    checkpoint = _checked(recipe, checkpoint, "checkpoint")
    check_weights(weights)
    trained = load_trained(checkpoint, weights)
    with _naming_difference(checkpoint, trained.model, recipe):
        test_set, plain = _test_set_and_plain(recipe, checkpoint, trained)
    with processes() as world, evaluation_explained(recipe):
        batches = test_batches(test_set, recipe, world)
        return evaluate(plain.to(world.device), test_set, batches, metric_of(test_set), recipe.machine, world)


def _test_set_and_plain(recipe: Recipe, checkpoint: Path, trained: Trained) -> tuple[Any, nn.Module]:
    test_set = _test_set(recipe)
    say_taken(checkpoint, trained.taken)
    _number_as_trained(test_set, trained.class_names, recipe)
    state_dict = trained.state_dict
    if trained.digests is not None:
        state_dict = state_dict | _auxiliary_weights(recipe, test_set.num_classes, trained.digests)
    try:
        return test_set, build_plain(recipe, test_set.num_classes, deployed(state_dict))
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None


@contextmanager
def _naming_difference(checkpoint: Path, trained: Mapping[str, Any], recipe: Recipe) -> Iterator[None]:
    """Inside the block an error says how the model was trained, if the recipe says something else."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if difference := model_difference(trained, recipe):
            raise ValueError(f"{checkpoint}: {difference}") from error
        raise


def _auxiliary_weights(recipe: Recipe, num_classes: int, expected: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights that a checkpoint leaves out, by state-dict name, from the auxiliary models' files."""
    if not recipe.auxiliary.path:
        raise ValueError("auxiliary.path: missing, but the checkpoint leaves out auxiliary weights")
    module = connect(created(recipe, num_classes), read_auxiliaries(recipe), recipe)
    check_auxiliary(digests(places(module)), expected)
    left_out = frozen_entries(module)
    return {name: tensor for name, tensor in module.state_dict().items() if name in left_out}


def _say_shortened(schedule: Schedule) -> None:
    """Say on stderr, in the first process only, that the warm-up is shorter than the recipe's."""
    if schedule.warmup != schedule.warmup_epochs and is_first_process():
        print(
            f"m2pt: schedule.warmup_epochs: {schedule.warmup_epochs} is not less than schedule.epochs"
            f" ({schedule.epochs}): the warm-up is shortened to {schedule.warmup} epochs",
            file=sys.stderr,
        )


class _StoppedError(Exception):
    """A signal has asked to stop in the middle of an evaluation."""


def _until_stopped(batches: Iterable[Any], asked: Callable[[], int]) -> Iterator[Any]:
    with running(batches) as loaded:
        for batch in loaded:
            if asked():
                raise _StoppedError
            yield batch


def _fit(
    trainer: Trainer,
    dataset: Any,
    out: Path,
    log: Log,
    steps_per_epoch: int,
    measure: Callable[[Callable[[], int]], Metrics] | None,
) -> None:
    """Train to the end of the schedule.

    Args:
        measure: returns the metrics, given a function that returns the signal that asks to stop, or 0.
    """
    recipe, world = trainer.recipe, trainer.world
    steps = recipe.schedule.epochs * steps_per_epoch
    start, since = time.perf_counter(), trainer.step
    explaining = explained(recipe, trainer.module, world.size, trainer.optimizer)
    with explaining, termination() as signals, _micro_batches(trainer, dataset) as micro_batches:

        def asked() -> int:
            return world.largest(max(signals, default=0))

        while trainer.step < steps:
            trainer.update(itertools.islice(micro_batches, recipe.machine.accumulation))
            step = trainer.step
            stop = asked()
            log.bar.update()
            epoch, is_inside = divmod(step, steps_per_epoch)
            is_logged = step % recipe.run.log_steps == 0 or step == steps
            is_due = recipe.run.checkpoint_steps and step % recipe.run.checkpoint_steps == 0
            is_saved = not is_inside or is_due or stop
            if not (is_logged or is_saved):
                continue
            metrics = _metrics(trainer, dataset)
            if is_logged:
                rate = (step - since) * recipe.data.batch_size / (time.perf_counter() - start)
                log.write(step, **metrics, samples_per_second=rate)
                start, since = time.perf_counter(), step
            paused = time.perf_counter()
            is_ending = stop or step == steps
            if measure is not None and not (is_inside or is_ending) and epoch % recipe.run.eval_epochs == 0:
                try:
                    log.write(step, **measure(asked))
                except _StoppedError:
                    stop = asked()
            if is_saved:
                state = trainer.state_dict()
                if world.is_first:
                    save_checkpoint(out, state, recipe, dataset.class_names)
            if stop:
                log.write(step, stopped=signal.Signals(stop).name)
                raise SystemExit(TERMINATED) if stop == signal.SIGTERM else KeyboardInterrupt(f"step {step} is saved")
            start += time.perf_counter() - paused


def _metrics(trainer: Trainer, dataset: Any) -> dict[str, float]:
    """What is logged of the last step.

    Raises:
        FloatingPointError: a step was not finite; the message names it, and the layer.
    """
    try:
        return trainer.metrics()
    except FloatingPointError as error:
        with _micro_batches(trainer, dataset) as again:
            found = trainer.first_not_finite(itertools.islice(again, trainer.recipe.machine.accumulation))
        raise FloatingPointError(f"{error}; {found}") from None


def _micro_batches(trainer: Trainer, dataset: Any) -> AbstractContextManager[Iterator[Any]]:
    """The micro-batches from the next step on."""
    return running(training_batches(dataset, trainer.recipe, trainer.world, trainer.step))


def _log_of(trainer: Trainer, out: Path, class_names: Sequence[str] | None, resume: bool, steps_per_epoch: int) -> Log:
    """The log of a run that starts, or continues from its last checkpoint."""
    if resume:
        state = load_checkpoint(out, trainer.recipe, class_names)
        try:
            trainer.load_state_dict(state)
        except Exception as error:  # torch has no error of its own for a state that does not fit
            raise ValueError(f"{out / CHECKPOINT}: not the state of this run ({error!r})") from error
    if trainer.world.is_first:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob("*.partial/"):  # by a process that was killed while it wrote
            shutil.rmtree(left)
        write_json(out / RECIPE, trainer.recipe.as_dict())
    return Log(out, trainer.world.is_first, trainer.step, trainer.recipe.schedule.epochs * steps_per_epoch)


def _checked(recipe: Recipe, path: str | os.PathLike, argument: str = "out") -> Path:
    """The path, once both arguments are known to have the right type."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}")
    return checked_path(argument, path)


def _require_free(out: Path, resume: bool) -> None:
    if not resume and (out / CHECKPOINT).exists():
        raise ValueError(f"{out}: there is a run in it already; continue it with resume, or choose another folder")


def _training_set(recipe: Recipe, world: World) -> Any:
    size = micro_batch_size(recipe, world.size)
    stream = {"batch_size": size, "seed": recipe.run.seed} if recipe.data.layout == "webdataset" else {}
    dataset = _opened(recipe, recipe.data.train_split, training=True, **stream)
    if recipe.data.on_error == "stop":
        _require_files(dataset, recipe.data.train_split)
    return dataset


def _test_set(recipe: Recipe) -> Any:
    """The test split. It has to be opened before the process group is set up: otherwise timm would divide a stream
    among the processes, and not evenly."""
    split = recipe.data.test_split
    dataset = _opened(recipe, split, training=False)
    _require_files(dataset, split)
    if isinstance(dataset, Samples) and not len(dataset):
        raise ValueError(f"data.test_split: there is no sample in {split!r}")
    return dataset


def _opened(recipe: Recipe, split: str, training: bool, **more: Any) -> Any:
    data = recipe.data
    settings = {**data.settings, **more}
    return create_dataset(recipe.model.modality, data.layout, data.root, split, training, **settings)


def _require_files(dataset: Any, split: str) -> None:
    """Check that the files of a list exist, before the first missing one stops a run in the middle."""
    lacking = missing(getattr(dataset, "files", ()))
    if lacking:
        raise FileNotFoundError(f"data: {len(lacking)} files of split {split!r} are missing: {some(lacking)}")


def _number_as_trained(test_set: Any, class_names: Sequence[str] | None, recipe: Recipe) -> None:
    """Number the classes of a test split as the checkpoint does; if it does not name them, as the training split of the
    recipe's data, on which it was trained."""
    if not isinstance(test_set, Samples) or test_set.class_names is None:
        return
    if class_names is None:
        try:
            class_names = _opened(recipe, recipe.data.train_split, training=False).class_names
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint: it does not name its classes, nor does a training split: {error}") from None
    test_set.number_as(class_names)
