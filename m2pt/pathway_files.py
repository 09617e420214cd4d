"""Saves a pathway to a small file and loads it: scales and where the auxiliary weights came from, but not these."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m2pt_kernels.checks import GEMM_DTYPES
from m2pt_kernels.quantization import DTYPES

from .calls import watch_pathways
from .checkpoints import checked_target, read_safetensors, save_state_dict
from .checks import check_kind, checked_path
from .linear import Auxiliary, FusedCrossModalLinear, fused_in
from .pathway import places, require_data, require_whole
from .surgery import AuxModels, replaced, require_used_once, target_layer, weight_at
from .tensor_checks import check_module

ENTRY, VERSION = "m2pt_pathway", 1
"""The entry of the file's metadata that describes the pathway in JSON, and its version."""
SCALE, AUX_WEIGHT = "cross_modal_scale", "aux_weight"
OWN = (SCALE, AUX_WEIGHT, "aux_weight_scale")
"""The entries of a state dict that a pathway adds to those of a layer."""
STORAGES = (*DTYPES.values(), *(str(dtype).removeprefix("torch.") for dtype in GEMM_DTYPES))


def save_pathway(model: nn.Module, path: str | os.PathLike, include_base: bool = False) -> None:
    """Write the pathways of a connected model to a `.safetensors` file, whole or not at all, without frozen W_aux.

    The file holds the scales and, if they may be trained, the auxiliary weights, by their names in the state dict. Its
    metadata say which layers of which auxiliary models the weights were read from, how they are stored, and the SHA-256
    of each model's weights as stored. `load_pathway` needs the auxiliary models to restore the pathway.

    Args:
        model: a connected model. Names in the file leave out the wrappers of torch around it, and of peft around its
            layers. Other entries of a model wrapped by peft can be loaded only into one that is wrapped alike.
        path: ends in `.safetensors`.
        include_base: also write all other entries of the model's state dict. Without them it is up to the caller to
            keep the target's own weights.

    Raises:
        TypeError: `model` is not a module, or `path` not a path.
        ValueError: no fused layer below `model`; two of one name; scales that are not finite; a layer that is divided
            among processes, has no data, has an auxiliary weight that is pruned or was trained and then quantised, or
            was not connected by surgery, so that the origin of a frozen one is unknown; or another ending.
        OSError: there is a folder of that name, the folder is missing or cannot be written, or the disk is full.
    """
    path = checked_target(path)
    require_whole(model, "gather it first")
    layers = _by_name((_layer_name(names[0]), layer) for layer, names in places(model).items())
    tensors = _base(model) if include_base else {}
    for name, layer in layers.items():
        require_data(layer)
        if not layer.cross_modal_scale.isfinite().all():
            raise ValueError(f"{name}.{SCALE}: expected finite scales, got {layer.cross_modal_scale.tolist()}")
        layer.require_stored(f"{name}.{AUX_WEIGHT}")
        tensors[f"{name}.{SCALE}"] = layer.cross_modal_scale
        if layer.is_aux_trainable:
            if layer.aux_weight_scale is not None:
                raise ValueError(f"{name}: aux_weight was trained and then quantised: save the whole state dict")
            tensors[f"{name}.{AUX_WEIGHT}"] = layer.aux_weight
        elif not all(auxiliary.layers for auxiliary in layer.auxiliaries):
            raise ValueError(f"{name}: it is not known where its auxiliary weight came from: connect it by surgery")
    described = {
        name: {"storage": layer.storage, "auxiliaries": [list(auxiliary) for auxiliary in layer.auxiliaries]}
        for name, layer in layers.items()
    }
    content = {"version": VERSION, "layers": described, "sha256": digests(layers.values())}
    save_state_dict(tensors, path, {ENTRY: json.dumps(content)})


def _bare(name: str) -> str:
    """A name without the wrappers of torch and peft, around the model and around modules in it."""
    name = re.sub(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+", "", name)
    return re.sub(r"\.(?:_orig_mod|_checkpoint_wrapped_module)(?=\.|$)", "", name)


def _layer_name(name: str) -> str:
    return re.sub(r"(?:\.base_layer)+$", "", _bare(name))


def _base(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's state dict except those of its pathways."""
    pathways = {id(getattr(layer, kind)) for layer in fused_in(model) for kind in OWN}
    entries = model.state_dict(keep_vars=True).items()
    return _by_name(
        (_bare(n), value) for n, value in entries if isinstance(value, Tensor) and id(value) not in pathways
    )


def _by_name(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dict by name, or a ValueError for two of one name that only wrappers made different."""
    found: dict[str, Any] = {}
    for name, value in named:
        if name in found:
            raise ValueError(f"model: {name} is there twice, with and without wrappers around it: save the parts apart")
        found[name] = value
    return found


def frozen_entries(model: nn.Module) -> set[str]:
    """The names of frozen auxiliary weights in the model's state dict; none without a pathway."""
    layers = [layer for layer in fused_in(model) if not layer.is_aux_trainable]
    frozen = {id(tensor) for layer in layers for tensor in (layer.aux_weight, layer.aux_weight_scale)}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in frozen}


def digests(layers: Iterable[FusedCrossModalLinear]) -> dict[str, str]:
    """The SHA-256 of each auxiliary model's frozen weights as the layers store them, one layer after the other."""
    hashes: dict[str, Any] = {}
    for layer in layers:
        for part in layer.parts() if not layer.is_aux_trainable else ():
            found = hashes.setdefault(part.auxiliary.model, hashlib.sha256())
            for tensor in (part.data, part.aux_weight_scale):
                if tensor is not None:
                    found.update(bytes_of(tensor))
    return {model: found.hexdigest() for model, found in hashes.items()}


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor's entries in order, wherever they are in memory, as `hashlib` takes them."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def load_pathway(model: nn.Module, aux_model: AuxModels | None, path: str | os.PathLike) -> nn.Module:
    """Connect a model in place like the one that `save_pathway` wrote, with its scales, which are trainable.

    Args:
        model: the target with weights of its own, which the file replaces if it has them. It is not connected yet, and
            has layers of the same names.
        aux_model: the auxiliary model; a sequence of several, in the order of the file; or a mapping by their names
            there. None if the file holds all auxiliary weights, because they were trained.
        path: the file.

    Returns:
        `model`.

    Raises:
        TypeError: an argument of another type.
        FileNotFoundError: no such file.
        ValueError: the file is damaged or of another kind; the model does not fit it; or an auxiliary model has other
            weights than the one in the file, by their SHA-256. The model is as it was.
    """
    check_module("model", model)
    path = checked_path("path", path)
    tensors, content = read_pathway(path)
    aux_models = _named(aux_model, [*content["sha256"]])
    names = {_layer_name(name): name for name, _ in model.named_modules()}
    layers: dict[str, FusedCrossModalLinear] = {}
    for name, described in content["layers"].items():
        place, layer = target_layer(model, names.get(name, name), "model")
        if isinstance(layer, FusedCrossModalLinear):
            raise ValueError(f"model: {name} is connected already: disconnect_pathways first")
        require_data(layer)
        try:
            layers[place] = _layer(layer, name, described, tensors, aux_models)
        except (TypeError, ValueError) as error:
            raise type(error)(f"model: {place}: {error}") from None
    require_used_once(model, {place: model.get_submodule(place) for place in layers}, "model")
    for aux_name, digest in digests(layers.values()).items():
        if digest != (expected := content["sha256"][aux_name]):
            raise ValueError(
                f"aux_model: the weights of {aux_name!r} differ from those in {path}, or were cast differently before"
                f" they were quantised: their SHA-256 is {digest}, expected {expected}"
            )
    own = {f"{name}.{kind}" for name in content["layers"] for kind in OWN}
    base = {name: tensor for name, tensor in tensors.items() if name not in own}
    if base:
        base = _named_as_in(model, base, path)
    with replaced(model, layers), _restored(model, base):
        model.load_state_dict(base, strict=False)
    watch_pathways(model)
    return model


def read_pathway(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and its description of the pathways, checked to be complete.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or was not written by `save_pathway`.
    """
    tensors, metadata = read_safetensors(path)
    try:
        content = json.loads(metadata[ENTRY])
        _check(content, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a file of save_pathway, version {VERSION} ({error!r})") from None
    return tensors, content


def _check(content: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error of some kind for contents that `save_pathway` does not write."""
    digests, layers = content["sha256"], content["layers"]
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']}")
    if not layers.keys() or "" in layers or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError("layers and digests")
    for name, described in layers.items():
        described["auxiliaries"] = auxiliaries = [Auxiliary(*entry) for entry in described["auxiliaries"]]
        if not auxiliaries or not all(isinstance(part, str) for auxiliary in auxiliaries for part in auxiliary):
            raise ValueError(f"the auxiliaries of {name}")
        scale, trained = tensors[f"{name}.{SCALE}"], tensors.get(f"{name}.{AUX_WEIGHT}")
        if scale.shape != (len(auxiliaries),) or not scale.is_floating_point() or not scale.isfinite().all():
            raise ValueError(f"{name}.{SCALE}")
        if trained is None and not all(auxiliary.model in digests for auxiliary in auxiliaries):
            raise ValueError(f"no digest of what {name} was read from")
        if trained is not None and len(auxiliaries) != (1 if trained.dim() == 2 else len(trained)):
            raise ValueError(f"{name}.{AUX_WEIGHT}")
        if described["storage"] not in STORAGES:
            raise ValueError(f"storage {described['storage']!r}")


def _named(aux_model: AuxModels | None, names: Sequence[str]) -> Mapping[str, nn.Module]:
    """The auxiliary models by the names in the file."""
    expected = f"expected {', '.join(names) or 'none'}"
    if isinstance(aux_model, Mapping):
        if aux_model.keys() != set(names):
            raise ValueError(f"aux_model: {expected}, got {', '.join(map(str, aux_model))}")
        models = dict(aux_model)
    else:
        check_kind((nn.Module, Sequence, type(None)), "a module, a sequence or a mapping of them", aux_model=aux_model)
        several = [] if aux_model is None else [aux_model] if isinstance(aux_model, nn.Module) else [*aux_model]
        if len(several) != len(names):
            raise ValueError(f"aux_model: {expected}, got {len(several)} models")
        models = dict(zip(names, several, strict=True))
    for name, model in models.items():
        check_module(f"aux_model {name!r}", model)
    return models


def _layer(
    layer: nn.Linear,
    name: str,
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    aux_models: Mapping[str, nn.Module],
) -> FusedCrossModalLinear:
    auxiliaries, storage = described["auxiliaries"], described["storage"]
    trained = tensors.get(f"{name}.{AUX_WEIGHT}")
    if trained is None:
        weights = [weight_at(aux_models[each.model], f"aux_model {each.model!r}", each.layers) for each in auxiliaries]
        if any(weight is layer.weight for weight in weights):
            raise ValueError("aux_model: it is model's own weight")
    else:
        weights = [trained] if trained.dim() == 2 else [*trained]
    if storage not in DTYPES.values():
        weights = [weight.to(getattr(torch, storage)) for weight in weights]
    fused = FusedCrossModalLinear(
        layer.in_features,
        layer.out_features,
        origin_layer=layer,
        aux_weight=weights,
        is_aux_trainable=trained is not None,
    )
    fused.auxiliaries = tuple(auxiliaries)
    if storage in DTYPES.values():
        fused.quantize_aux(storage)
    with torch.no_grad():
        fused.cross_modal_scale.copy_(tensors[f"{name}.{SCALE}"])
    if not fused.cross_modal_scale.isfinite().all():
        raise ValueError(f"{SCALE}: the file's are beyond the range of {fused.cross_modal_scale.dtype}")
    return fused


@contextmanager
def _restored(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """If the block fails, put back the entries of the state dict that it may have overwritten."""
    entries = model.state_dict()
    before = {name: entries[name].clone() for name in names}
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # for entries that cannot be overwritten
            model.load_state_dict(before, strict=False)
        raise


def _named_as_in(model: nn.Module, base: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The entries of a file by the model's names for them, checked to fit."""
    entries = model.state_dict().items()
    there = _by_name((_bare(name), (name, value)) for name, value in entries if isinstance(value, Tensor))
    if differing := sorted(there.keys() ^ base.keys()):
        raise ValueError(f"model: {', '.join(differing[:5])}: only the model has it, or only {path}")
    for name, tensor in base.items():
        expected, got = tuple(tensor.shape), tuple(there[name][1].shape)
        if got != expected:
            raise ValueError(f"model: {name}: expected shape {expected} as in {path}, got {got}")
    return {there[name][0]: tensor for name, tensor in base.items()}
