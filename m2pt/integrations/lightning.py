"""Lightning: a callback that connects a module's model, logs the scales, and writes the merged model."""

import hashlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from m2pt_kernels.checks import GEMM_DTYPES
from m2pt_kernels.divided import is_divided

from ..checkpoints import checked_target, merge_state_dict, save_state_dict, without_wrapping
from ..checks import check_kind, require
from ..linear import FusedCrossModalLinear, fused_in, is_left_out
from ..pathway import cross_modal_scales, fused_layers, mean_absolute_scales, require_whole
from ..pathway_files import bytes_of
from ..replacement import has_pathway
from ..surgery import AuxModels, reparameterize_aux_into_target_model, weight_at

if TYPE_CHECKING:
    import lightning.pytorch as lightning
else:
    lightning = require("lightning.pytorch", "integrations")

AVERAGING = (lightning.callbacks.WeightAveraging, lightning.callbacks.StochasticWeightAveraging)

CONNECTED = "_connected_pathways"
"""The attribute of a module that holds `save_aux_weights` for each connected model, by the prefix of its names."""


class PathwayCallback(lightning.Callback):
    """Connects auxiliary models to a module's model before the optimizer is made, whatever the trainer will do.

    `setup` runs the module's `configure_model`, which Lightning wants to be repeatable, and connects the result; so
    callbacks after this one, such as `WeightAveraging`, copy a module that has its pathway. Only `fit` connects again
    what was merged or disconnected. Every epoch ends by logging the scales, as `cross_modal_scale/min`, `/mean` and
    `/max`, and the mean absolute scale of every auxiliary model, as `pathway/<name>`.

    A module that is loaded with `load_from_checkpoint`, which runs no callbacks, or that shards its model, calls
    `connect` in its own `configure_model`; make the auxiliary model outside it, where true bfloat16 does not round it.
    With strategies that fork or spawn, such as `ddp_notebook`, call `connect` before `fit`. A model that
    `configure_model` shards can be trained and saved whole; `FSDPStrategy`, which flattens scales, is refused.

    Args:
        aux_model: as `reparameterize_aux_into_target_model` takes it.
        name: the dotted name of the model to improve, inside the module.
        save_aux_weights: whether checkpoints hold the frozen auxiliary weights. If not, they hold each one's SHA-256
            at that time, and load only into a module that a callback has connected to the same auxiliary weights, or to
            weights that a lower precision rounds to these. The last callback to connect the module decides.
        export_path: the `.safetensors` file that the merged model's state dict is written to when fitting ends, with
            the last weights, by one process; not with `fast_dev_run`. The module stays connected.
        options: further arguments of `reparameterize_aux_into_target_model`.

    Raises:
        TypeError: an argument of another type.
        ValueError: `export_path` has another ending.
        IsADirectoryError: there is a folder of that name.
    """

    def __init__(
        self,
        aux_model: AuxModels,
        name: str = "model",
        *,
        save_aux_weights: bool = True,
        export_path: str | os.PathLike | None = None,
        **options: Any,
    ) -> None:
        check_kind(str, "a dotted name", name=name)
        check_kind(bool, "a bool", save_aux_weights=save_aux_weights)
        self.aux_model, self.name, self.options = aux_model, name, options
        self.save_aux_weights = save_aux_weights
        self.export_path = None if export_path is None else checked_target(export_path)
        self._prefix = f"{name}." if name else ""

    def connect(self, pl_module: lightning.LightningModule) -> None:
        """Connect the model of a module, in place, and make its checkpoints hold what `save_aux_weights` says.

        A model that has a pathway already keeps it: `options` are ignored. `setup` for `fit` then raises a ValueError
        if its frozen weights are known to differ from those of `aux_model`.

        Raises:
            TypeError, ValueError: as in `reparameterize_aux_into_target_model`; or there is no model of that name.
        """
        model = self._model(pl_module)
        if not has_pathway(model):
            reparameterize_aux_into_target_model(model, self.aux_model, **self.options)
        if CONNECTED not in vars(pl_module):
            setattr(pl_module, CONNECTED, {})
            pl_module.register_load_state_dict_pre_hook(_put_back)
            pl_module.register_state_dict_post_hook(_leave_out)
        getattr(pl_module, CONNECTED)[self._prefix] = self.save_aux_weights

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
            if isinstance(callback, AVERAGING):
                copier = type(callback).__name__
                raise ValueError(f"callbacks: {copier} copies the module without its pathway: put it after this one")
        given = dict(pl_module.named_modules()).get(self.name)
        is_copy = trainer.strategy.launcher is not None and multiprocessing.parent_process() is not None
        if stage == "fit" and is_copy and (given is None or not has_pathway(given)):
            lost = "trains a copy of the module and would leave the original without a pathway"
            raise ValueError(f"strategy: this one {lost}: call callback.connect(module) before fit")
        pl_module.configure_model()
        if stage == "fit" and has_pathway(self._model(pl_module)):
            _check_same(self._model(pl_module), self.aux_model)
        if stage == "fit" or self._prefix not in vars(pl_module).get(CONNECTED, {}):
            self.connect(pl_module)
        averages_buffers = any(getattr(callback, "_use_buffers", False) for callback in trainer.callbacks)
        if averages_buffers and any(layer.aux_weight_scale is not None for layer in fused_in(self._model(pl_module))):
            raise ValueError("callbacks: WeightAveraging would round quantised aux_weight: give it use_buffers=False")

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuse now what logging and exporting could not do later."""
        model = self._model(pl_module)
        cross_modal_scales(model)
        if self.export_path is not None or not self.save_aux_weights:
            require_whole(model, "export_path and save_aux_weights=False need a whole model")
        if self.export_path is not None and trainer.is_global_zero and not self.export_path.parent.is_dir():
            raise FileNotFoundError(f"{self.export_path}: there is no folder {self.export_path.parent}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        model = self._model(pl_module)
        scales = cross_modal_scales(model).values()
        metrics = {"min": min(scales), "mean": sum(scales) / len(scales), "max": max(scales)}
        logged = {f"cross_modal_scale/{name}": value for name, value in metrics.items()}
        logged |= {f"pathway/{name}": value for name, value in mean_absolute_scales(model).items()}
        pl_module.log_dict(logged, sync_dist=True)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.export_path is not None and not trainer.fast_dev_run:
            if trainer.is_global_zero:
                merged = merge_state_dict(self._model(pl_module).state_dict())
                save_state_dict(without_wrapping(merged), self.export_path)
            trainer.strategy.barrier("export")

    def _model(self, pl_module: lightning.LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.name)
        except AttributeError:
            raise ValueError(f"name: {type(pl_module).__name__} has no module {self.name!r}") from None


def _check_same(model: nn.Module, aux_model: AuxModels) -> None:
    """Raise a ValueError for a layer whose frozen auxiliary weights are known to be of none of these models."""
    several = [aux_model] if isinstance(aux_model, nn.Module) else aux_model
    models = several.values() if isinstance(several, Mapping) else several
    for name, layer in fused_layers(model):
        found = [] if layer.is_aux_trainable or is_divided(model, name) else [*_comparisons(layer, models)]
        if found and not any(found):
            raise ValueError(f"aux_model: {name} is connected already, to other weights: disconnect_pathways first")


def _comparisons(layer: FusedCrossModalLinear, models: Iterable[nn.Module]) -> Iterator[bool]:
    """Whether weights are equal to what the models have in their places, if both are stored alike."""
    for part, model in product(layer.parts(), models):
        with suppress(TypeError, ValueError):
            weight = weight_at(model, "aux_model", part.auxiliary.layers)
            if not weight.is_meta and (weight.dtype, weight.device) == (part.data.dtype, part.data.device):
                yield torch.equal(weight, part.data)


def _frozen(module: nn.Module) -> Iterator[tuple[str, FusedCrossModalLinear]]:
    """The layers with frozen auxiliary weights, by the names of these weights."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, FusedCrossModalLinear) and not layer.is_aux_trainable:
            yield f"{name}.aux_weight", layer


def _sha256(layer: FusedCrossModalLinear, dtype: torch.dtype) -> bytes:
    """The SHA-256 of a layer's auxiliary weights in a dtype."""
    found = hashlib.sha256()
    for tensor in (layer.aux_weight.to(dtype), layer.aux_weight_scale):
        if tensor is not None:
            found.update(bytes_of(tensor))
    return found.digest()


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace every frozen auxiliary weight that is not to be saved with its SHA-256."""
    left_out = tuple(own for own, is_saved in getattr(module, CONNECTED).items() if not is_saved)
    for name, layer in _frozen(module):
        if name.startswith(left_out) and f"{prefix}{name}" in state_dict:
            digest = _sha256(layer, layer.aux_weight.dtype)
            state_dict[f"{prefix}{name}"] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _put_back(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace every SHA-256 with the module's own auxiliary weight, if that is the same, maybe after rounding."""
    for name, layer in _frozen(module):
        saved, own = state_dict.get(f"{prefix}{name}"), layer.aux_weight
        if saved is not None and is_left_out(saved):
            if bytes(saved.tolist()) not in (_sha256(layer, dtype) for dtype in (own.dtype, *GEMM_DTYPES)):
                reason = "differs from the one in the checkpoint, by its SHA-256, or is stored in another dtype"
                raise ValueError(f"aux_model: {name} {reason}")
            state_dict[f"{prefix}{name}"] = own
