"""Hugging Face: a connected model that saves and loads as any other, and a callback for its Trainer.

`save_pretrained` of such a model writes `pathway.safetensors` beside the model's own weights and scales, and no frozen
auxiliary weights. `from_pretrained` puts them together again.
"""

import os
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..checkpoints import read_safetensors
from ..checks import check_kind, require
from ..pathway import cross_modal_scales, fused_layers, merge_pathways
from ..pathway_files import OWN, frozen_entries, load_pathway, save_pathway
from ..replacement import has_pathway
from ..surgery import AuxModels, reparameterize_aux_into_target_model

transformers = require("transformers", "integrations")

PATHWAY = "pathway.safetensors"
"""The file beside the model."""
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
PUSH = ("commit_message", "create_pr", "private", "token")


def connect(model: nn.Module, aux_model: AuxModels, **options: Any) -> nn.Module:
    """Connect a model of transformers, in place, so that `save_pretrained` keeps its pathway.

    From then on `save_pretrained` writes `pathway.safetensors` too, as `save_pathway`, and leaves frozen auxiliary
    weights out of the model's own files. These have the names that the model has in memory
    (`save_original_format=False`), because the Trainer resumes from no others. A PeftModel's adapter gets the file
    beside it, and `load_adapter` of that folder sets the scales. After `merge_pathways` a plain model is saved.

    Args:
        model: a `transformers.PreTrainedModel`, or a `peft.PeftModel` of one.
        aux_model: as `reparameterize_aux_into_target_model` takes it.
        options: further arguments of `reparameterize_aux_into_target_model`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as `reparameterize_aux_into_target_model`; or `model` has no `save_pretrained`.
    """
    _check_savable(model)
    return _saved_with_pathway(reparameterize_aux_into_target_model(model, aux_model, **options))


def from_pretrained(
    model_class: Any, folder: str | os.PathLike, aux_model: AuxModels | None, **options: Any
) -> nn.Module:
    """Load a connected model that `save_pretrained` or the Trainer wrote, and connect it as it was.

    Args:
        model_class: the class of the model, or an Auto class such as `AutoModelForImageClassification`.
        folder: what `model_class.from_pretrained` takes: a folder, or a name on the Hub.
        aux_model: as `load_pathway` takes it.
        options: further arguments of `model_class.from_pretrained`.

    Returns:
        The model, as `connect` returns it.

    Raises:
        OSError: there is no such folder, or no `pathway.safetensors` in it.
        TypeError, ValueError: as `load_pathway`.
    """
    hub = {name: options[name] for name in HUB if name in options}
    path = transformers.utils.cached_file(folder, PATHWAY, **hub)
    if hasattr(model_class, "from_config"):
        with torch.device("meta"):
            model_class = type(model_class.from_config(transformers.AutoConfig.from_pretrained(folder, **hub)))
    own = {rf"\.{entry}$" for entry in OWN}
    expected = {*(model_class._keys_to_ignore_on_load_unexpected or ()), *own}
    attributes = {"_keys_to_ignore_on_load_unexpected": expected, "__module__": model_class.__module__}
    model = type(model_class.__name__, (model_class,), attributes).from_pretrained(folder, **options)
    model.__class__ = model_class
    return _saved_with_pathway(load_pathway(model, aux_model, path))


class PathwayCallback(transformers.TrainerCallback):
    """Completes the checkpoints of a connected model, logs its scales and merges it at the end of the training.

    Checkpoints are as `connect` says, whichever way the model was connected. Logged is the mean absolute scale of every
    auxiliary model, as `pathway/<name>` beside the loss. Reporters that the Trainer has added before get it after
    `trainer.add_callback(trainer.pop_callback(TensorBoardCallback))`, which moves them behind this one.

    Args:
        merge: whether to merge the pathways when training has ended, of the best model with `load_best_model_at_end`;
            `trainer.save_model` then writes a plain model. Not of a PeftModel, of which only the adapter is saved.

    Raises:
        TypeError: `merge` is no bool; or, as soon as there is a Trainer, its model has no `save_pretrained`.
        ValueError: as soon as there is a Trainer: its model has no pathways, or is a PeftModel to be merged.
    """

    def __init__(self, merge: bool = True) -> None:
        check_kind(bool, "a bool", merge=merge)
        self.merge = merge

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        fused_layers(model)
        if self.merge and _is_peft(model):
            raise ValueError("merge: expected False: of a PeftModel the adapter is saved alone and needs the pathway")
        _check_savable(model)
        _saved_with_pathway(model)

    on_train_begin = on_init_end  # a Trainer with model_init has another model now

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], model: nn.Module, **others: Any
    ) -> None:
        if "loss" in logs:
            means = _mean_scales(model)
            logs.update(means)
            state.log_history[-1].update(means)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        if self.merge:
            merge_pathways(model)


def _mean_scales(model: nn.Module) -> dict[str, float]:
    scales = iter(cross_modal_scales(model).values())
    of_auxiliaries = defaultdict(list)
    for _, layer in fused_layers(model):
        for auxiliary in layer.auxiliaries:
            of_auxiliaries[f"pathway/{auxiliary.model}"].append(abs(next(scales)))
    return {name: fmean(own) for name, own in of_auxiliaries.items()}


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")


def _check_savable(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained"):
        expected = "a transformers.PreTrainedModel or a peft.PeftModel"
        raise TypeError(f"model: expected {expected}, got {type(model).__name__}")


def _saved_with_pathway(model: nn.Module) -> nn.Module:
    """The model, of which this instance, its copies and pickles save the pathway too."""
    model.save_pretrained = partial(_save_pretrained, model)
    if _is_peft(model):
        model.load_adapter = partial(_load_adapter, model)
    else:
        _ignore_frozen(model)
    return model


def _ignore_frozen(model: nn.Module) -> None:
    """Leave frozen auxiliary weights out of files of the model; the Trainer does not miss them there either."""
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *frozen_entries(model)}


def _save_pretrained(model: nn.Module, save_directory: str | os.PathLike, *args: Any, **options: Any) -> None:
    """`save_pretrained`, and the pathway before it; or a pathway removed that was saved there earlier."""
    save = partial(type(model).save_pretrained, model, save_directory, *args)
    path = Path(save_directory, PATHWAY)
    is_main_process = options.get("is_main_process", True)
    if not has_pathway(model):
        if is_main_process:
            path.unlink(missing_ok=True)
        return save(**options)
    if is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_pathway(model.get_base_model() if _is_peft(model) else model, path)
    if _is_peft(model):
        return save(**options)
    _ignore_frozen(model)
    is_pushed = options.pop("push_to_hub", False)  # which would leave the pathway out, as a file that was there before
    push = {name: options.pop(name) for name in PUSH if name in options}
    repo_id = options.pop("repo_id", path.parent.name)
    save(**{"save_original_format": False} | options)
    if is_pushed and is_main_process:
        model.push_to_hub(repo_id, **push)


def _load_adapter(model: nn.Module, folder: str | os.PathLike, *args: Any, **options: Any) -> Any:
    """`load_adapter` of a PeftModel, and what of its pathway was trained and saved beside the adapter."""
    loaded = type(model).load_adapter(model, folder, *args, **options)
    path, base = Path(folder, PATHWAY), model.get_base_model()
    if path.is_file() and has_pathway(base):
        tensors, _ = read_safetensors(path)
        own = {name.replace(".base_layer.", "."): name for name in base.state_dict()}
        if others := sorted(tensors.keys() - own.keys()):
            raise ValueError(f"model: it has no {', '.join(others[:5])}, which {path} has")
        base.load_state_dict({own[name]: tensor for name, tensor in tensors.items()}, strict=False)
    return loaded
