"""Lightning: a callback that connects a module's model, logs the scales, and writes the merged model."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import checked_target, merge_state_dict, save_state_dict, without_wrapping
from ..checks import check_kind, require
from ..pathway import cross_modal_scales, fused_layers, require_whole
from ..pathway_files import digests
from ..replacement import has_pathway
from ..surgery import AuxModels, reparameterize_aux_into_target_model

require("lightning.pytorch", "integrations")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging  # noqa: E402


class PathwayCallback(Callback):
    """Connects auxiliary models to a module's model, whatever the trainer is to do, before the optimizer is made.

    `setup` runs the module's `configure_model`, which Lightning wants to be repeatable, and connects what that leaves;
    so callbacks behind this one, such as `WeightAveraging`, copy a module that has its pathway. The smallest, the mean
    and the largest scale are logged after every epoch, as `cross_modal_scale/min`, `/mean` and `/max`.

    Modules that are loaded with `load_from_checkpoint`, which knows no callbacks, or that shard their model, call
    `connect` in their own `configure_model`. A model that `configure_model` shards can be trained and saved whole;
    `FSDPStrategy`, which flattens scales, is refused.

    Args:
        aux_model: as `reparameterize_aux_into_target_model` takes it.
        name: the dotted name of the model to improve, inside the module.
        save_aux_weights: whether checkpoints hold the frozen auxiliary weights. If not, they hold the SHA-256 of each,
            and load only into a module that a callback has connected to the same auxiliary models.
        export_path: the `.safetensors` file that the merged model's state dict is written to when fitting ends, by one
            process. The module stays connected.
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

    def connect(self, pl_module: LightningModule) -> None:
        """Connect the model of a module, in place. One that has a pathway already is left as it is.

        Raises:
            TypeError, ValueError: as `reparameterize_aux_into_target_model`; or there is no model of that name.
        """
        model = self._model(pl_module)
        if has_pathway(model):
            return
        reparameterize_aux_into_target_model(model, self.aux_model, **self.options)
        known = _frozen_digests(pl_module)
        pl_module.register_load_state_dict_pre_hook(partial(_put_back, known))
        if not self.save_aux_weights:
            pl_module.register_state_dict_post_hook(partial(_leave_out, known))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.callbacks[: trainer.callbacks.index(self)]:
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                copier = type(callback).__name__
                raise ValueError(f"callbacks: {copier} copies the module without its pathway: put it behind this one")
        pl_module.configure_model()
        self.connect(pl_module)
        averages_buffers = any(getattr(callback, "_use_buffers", False) for callback in trainer.callbacks)
        layers = fused_layers(self._model(pl_module))
        if averages_buffers and any(layer.aux_weight_scale is not None for _, layer in layers):
            raise ValueError("callbacks: WeightAveraging would round quantised aux_weight: give it use_buffers=False")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse now what logging and exporting could not do later."""
        model = self._model(pl_module)
        cross_modal_scales(model)
        if self.export_path is not None or not self.save_aux_weights:
            require_whole(model, "export_path and save_aux_weights=False need a whole model")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scales = cross_modal_scales(self._model(pl_module)).values()
        figures = {"min": min(scales), "mean": sum(scales) / len(scales), "max": max(scales)}
        pl_module.log_dict({f"cross_modal_scale/{name}": value for name, value in figures.items()}, sync_dist=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.export_path is not None:
            if trainer.is_global_zero:
                merged = merge_state_dict(self._model(pl_module).state_dict())
                save_state_dict(without_wrapping(merged), self.export_path)
            trainer.strategy.barrier("export")

    def _model(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.name)
        except AttributeError:
            raise ValueError(f"name: {type(pl_module).__name__} has no module {self.name!r}") from None


def _frozen_digests(module: nn.Module) -> dict[str, Tensor]:
    """By the names of frozen auxiliary weights their SHA-256, as bytes."""
    layers = {name: layer for name, layer in fused_layers(module) if not layer.is_aux_trainable}
    return {
        f"{name}.aux_weight": torch.frombuffer(bytearray.fromhex("".join(digests([layer]).values())), dtype=torch.uint8)
        for name, layer in layers.items()
    }


def _leave_out(
    known: Mapping[str, Tensor], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Put its SHA-256 in the place of every frozen auxiliary weight."""
    state_dict.update({f"{prefix}{name}": known[name] for name in known if f"{prefix}{name}" in state_dict})


def _put_back(known: Mapping[str, Tensor], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the module's own auxiliary weight in the place of every SHA-256, if it is the same."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, digest in known.items():
        saved = state_dict.get(f"{prefix}{name}")
        if name not in own or saved is None or saved.dim() > 1:
            continue
        if not torch.equal(saved.cpu(), digest):
            raise ValueError(f"aux_model: {name} is another than the one in the checkpoint, by its SHA-256")
        state_dict[f"{prefix}{name}"] = own[name]
