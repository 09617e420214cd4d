"""Recipes: small TOML files of published figures, every one of which the command line can override."""

import importlib.resources
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..checks import check_kind, check_not_negative, check_positive, check_probability, check_sizes, nearest, one_of
from .toml import toml_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Dtype = Literal["float32", "bfloat16", "float16"]
_FOLDER = importlib.resources.files("m2pt") / "recipes"


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        modality, size, task, overrides: as in `m2pt.models.create_model`.
        init: a checkpoint of any format that `m2pt convert` reads, to start from; none if empty.
        trainable: "all", or "head" for a linear probe: the head, after a batch normalisation, and the scales.
    """

    modality: str
    size: str = "base"
    task: str = "classification"
    init: str = ""
    trainable: Literal["all", "head"] = "all"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Auxiliary:
    """The transformer of another modality, or several.

    Attributes:
        path: its checkpoint, or a list of several models'; without one the target is trained alone.
        modality: its name in logs and reports.
        dtype: of its weights, one of torch's or of `m2pt.quantize_aux`'s; the checkpoint's own if empty.
        trainable: whether its weights are trained too, as in the published code.
        blocks: which blocks are connected if the models' depths differ: "first", "last" or "even", see
            `m2pt.reparameterize_aux_into_target_model`.
        in_checkpoints: whether `last.pth` holds its frozen weights. If not, they are read from `path` when resuming or
            evaluating, and must have the same SHA-256.
    """

    path: str | list[str] = ""
    modality: str = ""
    dtype: Literal["", "float32", "bfloat16", "float16", "int8", "int4", "float8_e4m3fn"] = ""
    trainable: bool = False
    blocks: Literal["", "first", "last", "even"] = ""
    in_checkpoints: bool = True

    def __post_init__(self) -> None:
        if not self.path and (self.modality or self.dtype or self.trainable):
            raise ValueError("path: missing, but modality, dtype or trainable is given")
        if self.trainable and not self.in_checkpoints:
            raise ValueError("in_checkpoints: expected true with trainable: no other file has the trained weights")
        if not all(isinstance(path, str) and path for path in self.paths) or len(set(self.paths)) < len(self.paths):
            raise ValueError(f"path: expected a path or a list of different ones, got {self.path!r}")

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return self.path if isinstance(self.path, list) else [self.path] * bool(self.path)


@dataclass(frozen=True)
class Data:
    """What the model is trained on.

    Attributes:
        layout, root, settings: as in `m2pt.data.create_dataset`; the layout "embedded" has no root.
        train_split, test_split: names of the layout's splits.
        batch_size: samples of one optimizer step, over all processes and micro-batches.
        test_batch_size: samples of one forward pass of a process in evaluation.
        on_error: what happens at a damaged training sample: "stop" ends the run; "skip" names it on stderr and takes
            the next readable one instead. If a list names missing files, "stop" stops before training and names them.
            The test split always stops; in a training stream timm skips, whatever is said here.
    """

    layout: str
    batch_size: int
    root: str = ""
    train_split: str = "train"
    test_split: str = "test"
    test_batch_size: int = 64
    on_error: Literal["stop", "skip"] = "stop"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size, test_batch_size=self.test_batch_size)


@dataclass(frozen=True)
class Optimizer:
    """timm's optimizer.

    Attributes:
        base_lr: the learning rate for a batch of 256; it is multiplied by `data.batch_size / 256`.
        name, weight_decay, layer_decay, options: as in `timm.optim.create_optimizer_v2`; the options are the
            optimizer's. "bnbadamw8bit" is AdamW with one-byte states; it needs a GPU and the extra `adam8bit`. "adam"
            and "adamw" are fused unless the options say otherwise; with an optimizer that is not fused, every step
            waits for the GPU once, to find out whether its gradient is finite.
        scale_learning_rate: the cross-modal scales' learning rate divided by that of their block.
        clip_grad: the largest norm of the gradient; 0 for no limit.
    """

    base_lr: float
    name: str = "adamw"
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    scale_learning_rate: float = 1.0
    clip_grad: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.base_lr < math.inf:
            raise ValueError(f"base_lr: expected a positive number, got {self.base_lr}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected a number in (0, 1], got {self.layer_decay}")
        check_not_negative(
            weight_decay=self.weight_decay, scale_learning_rate=self.scale_learning_rate, clip_grad=self.clip_grad
        )


@dataclass(frozen=True)
class Schedule:
    """timm's scheduler, stepped every update; `epochs` includes the warm-up.

    A warm-up of `warmup_epochs` that is not shorter than the run, as where only `epochs` was overridden, is shortened
    to the first tenth of the run: see `warmup`.
    """

    epochs: int
    name: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        check_positive(epochs=self.epochs)
        check_not_negative(warmup_epochs=self.warmup_epochs, warmup_lr=self.warmup_lr, min_lr=self.min_lr)

    @property
    def warmup(self) -> float:
        """The epochs of warm-up that are run."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 10


@dataclass(frozen=True)
class Loss:
    """The loss, and timm's mixing of a batch's samples: `mixup` and `cutmix` are the parameters of Beta, 0 for none."""

    name: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {self.label_smoothing}")
        check_not_negative(mixup=self.mixup, cutmix=self.cutmix)


@dataclass(frozen=True)
class Pretraining:
    """Arguments of `m2pt.models.MaskedAutoencoder`."""

    mask_ratio: float
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    normalize_targets: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio: expected a number in (0, 1), got {self.mask_ratio}")
        check_positive(decoder_width=self.decoder_width, decoder_heads=self.decoder_heads)
        check_sizes(decoder_depth=self.decoder_depth)


@dataclass(frozen=True)
class Run:
    """The seed, and how often the run logs, evaluates and saves.

    Attributes:
        seed: everything random follows from it.
        log_steps: steps from one line of metrics to the next.
        eval_epochs: epochs from one evaluation to the next; after the last epoch there is always one.
        checkpoint_steps: steps from one checkpoint to the next, beside those at the end of every epoch; 0 for none.
        ema_decay: of the moving average of the weights, which is then evaluated and merged instead; 0 for none.
    """

    seed: int = 0
    log_steps: int = 50
    eval_epochs: int = 1
    checkpoint_steps: int = 0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check_positive(log_steps=self.log_steps, eval_epochs=self.eval_epochs)
        check_probability(ema_decay=self.ema_decay)
        check_not_negative(seed=self.seed, checkpoint_steps=self.checkpoint_steps)


@dataclass(frozen=True)
class Machine:
    """What depends on the machine and not on the recipe; a run may be resumed with other values.

    Attributes:
        accumulation: micro-batches of one optimizer step.
        workers: data-loading processes of each training process; 0 to read in the training process.
        precision: of autocast; "float32" for none.
        checkpoint_activations: recompute the blocks' activations in backward.
        offload_activations: keep the inputs of these blocks in the host's memory until then.
        step_in_backward: update each parameter inside backward and free its gradient, see `m2pt.step_in_backward`;
            the norm of the gradient is then not logged.
        compile: torch.compile the model.
        sharding: what several processes do: "ddp" keeps the model in each, "fsdp" divides it among them.
    """

    accumulation: int = 1
    workers: int = 8
    precision: Dtype = "bfloat16"
    checkpoint_activations: bool = False
    offload_activations: bool = False
    step_in_backward: bool = False
    compile: bool = False
    sharding: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        check_positive(accumulation=self.accumulation)
        check_not_negative(workers=self.workers)
        if self.offload_activations and (self.compile or not self.checkpoint_activations):
            raise ValueError("offload_activations: expected checkpoint_activations = true and compile = false with it")
        if not self.step_in_backward:
            return
        if self.accumulation > 1:
            raise ValueError(f"accumulation: expected 1 with step_in_backward, got {self.accumulation}")
        if self.precision == "float16":
            raise ValueError("precision: expected 'bfloat16' or 'float32' with step_in_backward, got 'float16'")
        if self.compile:
            raise ValueError("compile: a compiled model's gradients come all at once: leave step_in_backward out")


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on. With `pretraining` it is for `pretrain`, without it for `train`.

    Raises:
        TypeError: a part has the wrong type.
        ValueError: two parts do not go together.
    """

    model: Model
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    auxiliary: Auxiliary = Auxiliary()
    loss: Loss = Loss()
    pretraining: Pretraining | None = None
    run: Run = Run()
    machine: Machine = Machine()

    def __post_init__(self) -> None:
        for part in fields(self):
            check_kind(part.type, f"{part.type}", **{part.name: getattr(self, part.name)})
        if self.model.trainable == "head" and self.auxiliary.trainable:
            raise ValueError(
                "auxiliary.trainable: a linear probe (model.trainable = 'head') trains head and scales only"
            )
        if self.machine.step_in_backward and self.optimizer.clip_grad:
            raise ValueError(
                f"optimizer.clip_grad: expected 0 with machine.step_in_backward, got {self.optimizer.clip_grad}"
            )

    @property
    def learning_rate(self) -> float:
        return self.optimizer.base_lr * self.data.batch_size / 256

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Recipe":
        """This recipe with other values of some dotted keys, see `load_recipe`."""
        return _build_overridden(self.as_dict(), overrides)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, as in the TOML file."""
        return {name: table for name, table in asdict(self).items() if table is not None}

    def as_toml(self) -> str:
        """The text of a TOML file from which `load_recipe` makes an equal recipe; every value is in it.

        Raises:
            TypeError: a value of `overrides`, `settings` or `options` is not of one of JSON's types.
        """
        tables = (
            "\n".join([f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())])
            for name, table in self.as_dict().items()
        )
        return "\n\n".join(tables)


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def describe_recipe(name: str) -> str:
    """What a shipped recipe is for: the comment on the first line of its file.

    Raises:
        ValueError: `name` is not in `shipped_recipes()`.
    """
    one_of("name", name, shipped_recipes())
    return (_FOLDER / f"{name}.toml").read_text("utf-8").partition("\n")[0].removeprefix("# ")


def load_recipe(recipe: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its shipped name or its path, with some values overridden.

    Args:
        recipe: a name in `shipped_recipes()`, or the path of a `.toml` file.
        overrides: dotted key -> value, e.g. `{"optimizer.base_lr": 1e-3, "model.overrides.depth": 2}`.

    Raises:
        FileNotFoundError: no such recipe.
        TypeError, ValueError: an unknown or missing key, or a value of the wrong type or out of range; the message
            names the key and what is allowed.
    """
    if overrides is None:
        overrides = {}
    check_kind(str, "a name or a path", recipe=recipe)
    return _build_overridden(_read(recipe), overrides)


def with_defaults(table: dict[str, Any]) -> dict[str, Any]:
    """The result of `Recipe.as_dict` in this version or an earlier one, with the entries that were added since.

    Raises:
        TypeError, ValueError: it is not a recipe of this version.
    """
    return _build(Recipe, table, "").as_dict()


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse `key.subkey=value`, the value in TOML; a string needs no quotes.

    Raises:
        TypeError: `text` is not a string.
        ValueError: there is no key or no `=`.
    """
    check_kind(str, "key.subkey=value", text=text)
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"text: expected key.subkey=value, got {text!r}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _build_overridden(table: dict[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    check_kind(Mapping, "values by dotted key", overrides=overrides)
    for key, value in overrides.items():
        check_kind(str, "values by dotted key", overrides=key)
        *path, last = key.split(".")
        inner = table
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{key}: {part} is a value, not a table")
        inner[last] = value
    return _build(Recipe, table, "")


def _read(recipe: str) -> dict[str, Any]:
    if recipe in shipped_recipes():
        content = (_FOLDER / f"{recipe}.toml").read_bytes()
    elif Path(recipe).is_file():
        content = Path(recipe).read_bytes()
    else:
        hint = nearest(Path(recipe).stem, shipped_recipes())
        raise FileNotFoundError(f"recipe: {recipe}: no such file, and none that `m2pt recipes` lists{hint}")
    try:
        return tomllib.loads(content.decode())
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"recipe: {recipe}: {error}") from None


def _build(kind: Any, table: dict[str, Any], place: str) -> Any:
    kinds = get_type_hints(kind)
    for key in table:
        if key not in kinds:
            raise ValueError(f"{place}{key}: unknown key; allowed: {', '.join(kinds)}{nearest(key, kinds)}")
    for entry in fields(kind):
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in table:
            raise ValueError(f"{place}{entry.name}: missing")
    values = {key: _value(kinds[key], value, f"{place}{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


def _value(kind: Any, value: Any, place: str) -> Any:
    if isinstance(kind, UnionType):
        kind = next((own for own in get_args(kind) if type(value) is (get_origin(own) or own)), get_args(kind)[0])
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{place}: expected a table, got {value!r}")
        return _build(kind, value, f"{place}.")
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            expected = ", ".join(map(repr, allowed))
            raise ValueError(f"{place}: expected one of {expected}, got {value!r}{nearest(value, allowed)}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    expected = get_origin(kind) or kind
    if type(value) is not expected:
        raise TypeError(f"{place}: expected {expected.__name__}, got {value!r}")
    return value
