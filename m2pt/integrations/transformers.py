"""Hugging Face: connected models that save and load like any other, and a callback for their Trainer.

`save_pretrained` of such a model writes `pathway.safetensors` beside the model's own weights and scales, and no frozen
auxiliary weights. `from_pretrained` puts them together again.
"""

import inspect
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from m2pt_kernels.divided import is_divided

from ..checks import check_kind, require
from ..pathway import fused_layers, mean_absolute_scales, merge_pathways, places
from ..pathway_files import OWN, SCALE, digests, frozen_entries, load_pathway, read_pathway, save_pathway
from ..replacement import has_pathway
from ..surgery import AuxModels, reparameterize_aux_into_target_model

if TYPE_CHECKING:
    import transformers
    from peft import PeftModel
else:
    transformers = require("transformers", "integrations")

PATHWAY = "pathway.safetensors"
"""The file beside the model."""
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
PUSH = inspect.signature(transformers.PreTrainedModel.push_to_hub).parameters.keys() - {"self", "repo_id"}


def connect(model: nn.Module, aux_model: AuxModels, **options: Any) -> nn.Module:
    """Connect a model of transformers, in place, and call `keep_pathway`.

    Args:
        model: a `transformers.PreTrainedModel`, or a `peft.PeftModel` of one.
        aux_model: as `reparameterize_aux_into_target_model` takes it.
        options: further arguments of `reparameterize_aux_into_target_model`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as in `reparameterize_aux_into_target_model`; or `model` has no `save_pretrained`.
    """
    _check_savable(model)
    return keep_pathway(reparameterize_aux_into_target_model(model, aux_model, **options))


def keep_pathway(model: nn.Module) -> nn.Module:
    """Make `save_pretrained` of this instance, its copies and pickles keep the pathway from now on.

    It also writes `pathway.safetensors`, like `save_pathway`, and leaves frozen auxiliary weights out of the model's
    own files. These use the names that the model has in memory (`save_original_format=False`), because the Trainer
    resumes from no others. A PeftModel's adapter gets the file beside it, `load_adapter` of that folder sets the
    scales, and what `merge_and_unload` returns keeps the pathway. After `merge_pathways` a plain model is saved.

    Args:
        model: a connected `transformers.PreTrainedModel`, or a `peft.PeftModel` of one. `get_peft_model` makes another
            instance: call this after it.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module, or has no `save_pretrained`.
        ValueError: it has no pathways.
    """
    fused_layers(model)
    _check_savable(model)
    cast(Any, model).save_pretrained = partial(_save_pretrained, model)
    if _is_peft(model):
        model.load_adapter = partial(_load_adapter, model)
        keep_pathway(model.get_base_model())
    else:
        _ignore_frozen(model)
    return model


def from_pretrained(
    model_class: Any, folder: str | os.PathLike, aux_model: AuxModels | None, **options: Any
) -> nn.Module:
    """Load a connected model that `save_pretrained` or the Trainer wrote, and connect it as it was.

    Args:
        model_class: the class of the model that was saved, or an Auto class such as `AutoModelForImageClassification`.
        folder: what `model_class.from_pretrained` takes: a folder, or a name on the Hub.
        aux_model: as `load_pathway` takes it.
        options: further arguments of `model_class.from_pretrained`, except `output_loading_info=True`.

    Returns:
        The model, as `connect` returns it.

    Raises:
        OSError: there is no such folder, or no `pathway.safetensors` in it.
        TypeError, ValueError: as in `load_pathway`; or another class was saved, whose layers have other names.
    """
    if options.get("output_loading_info"):
        raise ValueError("output_loading_info: expected False: only the model is returned")
    hub = {name: options[name] for name in HUB if name in options}
    is_name = isinstance(folder, str) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", folder) and not os.path.isdir(folder)
    if not is_name and not Path(folder, hub.get("subfolder", ""), PATHWAY).is_file():
        raise FileNotFoundError(f"folder: there is no {PATHWAY} in {folder}, or no such folder")
    path = transformers.utils.cached_file(folder, PATHWAY, **hub)
    if hasattr(model_class, "from_config"):
        code = {name: options[name] for name in ("code_revision", "trust_remote_code") if name in options}
        options.pop("code_revision", None)
        config = transformers.AutoConfig.from_pretrained(folder, **hub, **code)
        with torch.device("meta"):
            model_class = type(model_class.from_config(config, **(code if hasattr(config, "auto_map") else {})))
    expected = {*(model_class._keys_to_ignore_on_load_unexpected or ()), *(rf"\.{entry}$" for entry in OWN)}
    attributes = {"_keys_to_ignore_on_load_unexpected": expected, "__module__": model_class.__module__}
    renamed: Any = type(model_class.__name__, (model_class,), attributes)
    model = renamed.from_pretrained(folder, **options)
    model.__class__ = model_class
    try:
        return keep_pathway(load_pathway(model, aux_model, path))
    except ValueError as error:
        saved = ", ".join(model.config.architectures or ())
        if saved in ("", model_class.__name__):
            raise
        raise ValueError(f"{error} (model_class: {folder} is of {saved}, not of {model_class.__name__})") from None


class PathwayCallback(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):
    """Completes the checkpoints of a connected model, logs its scales and merges it at the end of training.

    Checkpoints, including pushed ones, are as `keep_pathway` says, however the model was connected. They hold the
    SHA-256 of each auxiliary model's frozen weights as stored, which is compared on resuming. The mean absolute scale
    of every auxiliary model is logged as `pathway/<name>` beside the loss. Reporters that the Trainer added earlier get
    it once `trainer.add_callback(trainer.pop_callback(TensorBoardCallback))` has moved them behind this callback.

    Args:
        merge: whether to merge the pathways when training ends (the best model's, with `load_best_model_at_end`);
            `trainer.save_model` then writes a plain model. Not for a PeftModel, of which only the adapter is saved.

    Raises:
        TypeError: `merge` is not a bool; or, once there is a Trainer, its model has no `save_pretrained`.
        ValueError: once there is a Trainer: its model has no pathways, or is a PeftModel to be merged; when training
            begins: it was merged before, or the checkpoint has another auxiliary model or storage.
    """

    def __init__(self, merge: bool = True) -> None:
        check_kind(bool, "a bool", merge=merge)
        self.merge = merge
        self.is_merged = False
        self.sha256: dict[str, str] = {}

    def state(self) -> dict[str, dict[str, Any]]:
        """What the Trainer keeps in a checkpoint."""
        return {"args": {"merge": self.merge}, "attributes": {"sha256": self.sha256}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if self.merge and _is_peft(model):
            raise ValueError("merge: expected False: a PeftModel saves only its adapter, which needs the pathway")
        keep_pathway(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if self.is_merged and not has_pathway(model):
            raise ValueError("model: it was merged when training ended; merge=False keeps it connected")
        self.on_init_end(args, state, control, model)  # a Trainer with model_init has another model now
        self.sha256 = _digests(model)
        if state.global_step and (saved := state.stateful_callbacks.get(type(self).__name__)):
            _require_same(self.sha256, saved["attributes"]["sha256"], "the checkpoint")

    def on_push_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if state.is_world_process_zero and has_pathway(model):  # the Trainer pushes only files that it knows
            save_pathway(_base(model), Path(args.output_dir, PATHWAY))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], model: nn.Module, **others: Any
    ) -> None:
        if "loss" in logs:
            means = {f"pathway/{name}": mean for name, mean in mean_absolute_scales(model).items()}
            logs.update(means)
            state.log_history[-1].update(means)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if self.merge:
            merge_pathways(model)
            self.is_merged = True


def _digests(model: nn.Module) -> dict[str, str]:
    """The SHA-256 of frozen auxiliary weights; none for a model that is divided among processes."""
    layers = places(model)
    return {} if any(is_divided(model, name) for name, *_ in layers.values()) else digests(layers)


def _require_same(got: dict[str, str], expected: dict[str, str], where: str) -> None:
    if got != expected:
        is_other = f"its weights differ from those in {where}, or are stored in another way"
        raise ValueError(f"aux_model: {is_other}: their SHA-256 is {got}, expected {expected}")


def _is_peft(model: nn.Module) -> TypeGuard["PeftModel"]:
    return hasattr(model, "get_base_model")


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if _is_peft(model) else model


def _check_savable(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained"):
        expected = "a transformers.PreTrainedModel or a peft.PeftModel"
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}")


def _ignore_frozen(model: "transformers.PreTrainedModel") -> None:
    """Leave frozen auxiliary weights out of the model's files, where the Trainer does not miss them either."""
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *frozen_entries(model)}


def _save_pretrained(
    model: "transformers.PreTrainedModel | PeftModel", save_directory: str | os.PathLike, *args: Any, **options: Any
) -> None:
    """Save the pathway and then the model; without a pathway, remove one that was saved there earlier."""
    save = partial(type(model).save_pretrained, model, save_directory)
    options |= zip(inspect.signature(save).parameters, args, strict=False)
    path = Path(save_directory, PATHWAY)
    is_main_process = options.get("is_main_process", True)
    if not has_pathway(model):
        if is_main_process:
            path.unlink(missing_ok=True)
        return save(**options)
    is_pushed = not _is_peft(model) and options.pop("push_to_hub", False)  # which would leave the pathway out
    push = {name: options[name] for name in PUSH & options.keys()}
    given = {name for name, value in options.items() if value is not None}
    if is_pushed and (others := sorted(given - PUSH - {"is_main_process", "repo_id"})):
        raise ValueError(f"push_to_hub: expected False with {', '.join(others)}: push_to_hub() has no such argument")
    if is_main_process:
        _check_scales(model, options.get("state_dict") or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        save_pathway(_base(model), path)
    if _is_peft(model):
        return save(**options)
    _ignore_frozen(model)
    save(**{"save_original_format": False} | options)
    if is_pushed and is_main_process:
        model.push_to_hub(options.get("repo_id", path.parent.name), **push)


def _check_scales(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for scales that differ from the model's own, which the pathway's file will have."""
    own = model.state_dict()
    for name in state_dict.keys() & own.keys():
        if name.endswith(SCALE) and not torch.equal(own[name].to(state_dict[name]), state_dict[name]):
            raise ValueError(f"state_dict: {name} is not the model's: load these scales into the model, and save it")


def _load_adapter(model: "PeftModel", folder: str | os.PathLike, *args: Any, **options: Any) -> Any:
    """Load a PeftModel's adapter, and what was trained of its pathway and saved beside the adapter."""
    loaded = type(model).load_adapter(model, folder, *args, **options)
    path, base = Path(folder, PATHWAY), model.get_base_model()
    if path.is_file() and has_pathway(base):
        tensors, content = read_pathway(path)
        own = {name.replace(".base_layer.", "."): name for name in base.state_dict()}
        if others := sorted(tensors.keys() - own.keys()):
            raise ValueError(f"model: it has no {', '.join(others[:5])}, which {path} has")
        _require_same(_digests(base), content["sha256"], str(path))
        base.load_state_dict({own[name]: tensor for name, tensor in tensors.items()}, strict=False)
    return loaded
