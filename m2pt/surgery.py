"""Surgery: connect auxiliary models to a target model, and take them out again."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m2pt_kernels.divided import is_divided

from .calls import Sample, check_calls, check_sample, is_known_to_read, stop_watching, watch_pathways
from .checks import check_kind, nearest, qualified_name
from .hooks import check_no_hooks, check_no_tensor_hooks, has_forward_hooks
from .linear import RELEASED, Auxiliary, FusedCrossModalLinear, fused_in, is_plain_linear
from .pairing import (
    Blocks,
    Group,
    LayerNames,
    Pair,
    in_projection,
    is_conv1d,
    pair_blocks,
    unwrapped,
)
from .pathway import GATHER, places, require_whole
from .tensor_checks import check_module, check_readable

AuxModels = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


def reparameterize_aux_into_target_model(
    target_model: nn.Module,
    aux_model: AuxModels,
    layer_names: LayerNames | None = None,
    main_body_name: str | tuple[str, str] | None = None,
    is_aux_trainable: bool = False,
    aux_dtype: str | None = None,
    sample: Sample | None = None,
    blocks: Blocks | None = None,
) -> nn.Module:
    """Replace linear layers of the target's blocks by `FusedCrossModalLinear`, in place (M2PT, section 3.2).

    For the families in `m2pt.families`, the blocks and their attention and MLP layers are found by name. Query, key and
    value may be one layer on one side and three on the other. Other models need exactly one sequence of equal blocks,
    whose linear layers have the same names or pair up by shape in one way only. GPT-2's Conv1D is read transposed, and
    in a LoRA wrapper the inner layer is used. `describe_pathways` shows the connections.

    A target that is connected already gets the new auxiliary models in addition to those it has. Auxiliary weights and
    scales then become new parameters with the same values, and the scales trainable, so make the optimizer afterwards.
    Wrap the target in DistributedDataParallel afterwards too.

    If a parent reads a layer's weight without calling the layer, connecting it would have no effect: some such modules
    are known and refused, and a `sample` finds any others. Without a sample, the target's first forward pass in
    training mode warns of layers that have not been called; that of a compiled target does not. It also warns of layers
    that were replaced since, and of scales that something has frozen at zero.

    Args:
        target_model: the model to improve.
        aux_model: a model of another modality, whose layers have the same shapes. It is left as it is, and shares the
            storage of its weights, except for joined rows and Conv1D. A sequence of models, or a mapping that names
            them for `describe_pathways`, connects them all, each with scales of its own; the weights of several models
            are copied.
        layer_names: the linear layers of a block, as dotted names valid in both models; or a mapping from the target's
            names to the auxiliary model's. A tuple on either side stands for the layers' rows, one layer after the
            other: `{"attn.qkv": ("attention.q", "attention.k", "attention.v")}`.
        main_body_name: the dotted name of the sequence of blocks in both models; or a pair, the target's and the
            auxiliary model's. None finds `blocks`, or else the one of a known family or of equal blocks.
        is_aux_trainable: whether the auxiliary weights are trained too.
        aux_dtype: how frozen auxiliary weights are stored, as `quantize_aux` takes it; None shares them as they are.
        sample: the input of a forward pass of `target_model`: a tensor, a tuple of arguments, or a mapping of keyword
            arguments. The target runs once with it, in evaluation mode, and has to call every connected layer.
        blocks: which blocks are connected. None connects all, if both models have the same depth. "first" and "last"
            connect as many as the shallower model has; "even" spreads its blocks over the deeper one's, from the first
            to the last. Indices connect the blocks of these numbers; pairs the target's with the auxiliary model's.

    Returns:
        `target_model`.

    Raises:
        TypeError: an argument of another type, or an auxiliary weight that is not floating.
        ValueError: the models do not fit: no body or several, a missing layer, another depth or shape, layers that pair
            up in several ways, a layer that is not linear, connected to this weight already, used twice, not called by
            its parent, divided among processes, inside DistributedDataParallel, or with hooks, which would be lost; or
            `aux_dtype` does not fit a weight, or the target raised an error with `sample`. The message says which, and
            both models are as they were.
    """
    check_module("target_model", target_model)
    check_sample(sample)
    connections: dict[str, list[Connection]] = {}
    for argument, (name, model) in _named_models(aux_model, target_model).items():
        for pair in pair_blocks(target_model, model, argument, layer_names, main_body_name, blocks):
            for place, connection in _connections(target_model, model, argument, name, pair):
                connections.setdefault(place, []).append(connection)
    require_used_once(target_model, {place: own[0].layer for place, own in connections.items()})
    fused = {}
    for place, own in connections.items():
        try:
            fused[place] = _connected(own, is_aux_trainable, aux_dtype)
        except (TypeError, ValueError) as error:
            arguments = " and ".join(connection.argument for connection in own)
            raise type(error)(f"{arguments}: {place}: {error}") from None
    with replaced(target_model, fused):
        if sample is not None:
            check_calls(target_model, sample)
    watch_pathways(target_model)
    return target_model


class Connection(NamedTuple):
    """What a layer of the target gets from one auxiliary model, which error messages call `argument`."""

    layer: nn.Linear
    argument: str
    auxiliary: Auxiliary
    weight: Tensor


def remove_auxiliary(model: nn.Module, name: str) -> nn.Module:
    """Remove an auxiliary model from a connected one, in place; a layer that has no other becomes a plain `nn.Linear`.

    Nothing is merged into the weights. If others stay, their weights and scales become new parameters with the same
    values, so make the optimizer afterwards.

    Args:
        model: a connected model.
        name: the auxiliary model's, as `describe_pathways` shows it.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module, or `name` not a string.
        ValueError: no fused layer below `model`, none with such an auxiliary model, one that is divided among processes
            or inside DistributedDataParallel, or has hooks, which would be lost. The model is as it was.
    """
    check_kind(str, "the name of an auxiliary model", name=name)
    if not _without(model, lambda auxiliary: auxiliary.model == name):
        names = _auxiliary_names(model)
        raise ValueError(f"name: expected one of {', '.join(names)}; got {name!r}{nearest(name, names)}")
    return model


def disconnect_pathways(model: nn.Module) -> nn.Module:
    """Turn every fused layer into the plain `nn.Linear` it would be without its auxiliary weights, in place.

    Nothing is merged: the model computes bit for bit what it computes in `disabled_pathways`, with the same parameters
    as weights and biases.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as in `remove_auxiliary`.
    """
    _without(model, lambda auxiliary: True)
    return model


def _without(model: nn.Module, is_removed: Callable[[Auxiliary], bool]) -> bool:
    """Remove auxiliary weights from a model; returns whether there were any."""
    require_whole(model, "remove auxiliary models before dividing the model")
    replacements: dict[str, nn.Module] = {}
    for layer, (place, *more) in places(model).items():
        if indices := [i for i, auxiliary in enumerate(layer.auxiliaries) if is_removed(auxiliary)]:
            if type(layer) is not FusedCrossModalLinear:
                raise ValueError(f"{place} is a {qualified_name(layer)}, expected a plain FusedCrossModalLinear")
            _check_replaceable(model, place, place)
            replacements |= dict.fromkeys((place, *more), layer.without(indices))
    with replaced(model, replacements):
        pass
    if not _auxiliary_names(model):
        for module in model.modules():
            stop_watching(module)
    return bool(replacements)


def _auxiliary_names(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(auxiliary.model for layer in fused_in(model) for auxiliary in layer.auxiliaries))


def _named_models(aux_model: AuxModels, target_model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """The auxiliary models with names not yet taken, by what error messages call them."""
    taken = _auxiliary_names(target_model)
    if isinstance(aux_model, Mapping):
        models = {f"aux_model[{name!r}]": (name, model) for name, model in aux_model.items()}
    elif isinstance(aux_model, nn.Module) or not isinstance(aux_model, Iterable):
        models = {"aux_model": (type(aux_model).__name__, aux_model)}
    else:
        models = {f"aux_model[{i}]": (type(model).__name__, model) for i, model in enumerate(aux_model)}
    expected = "expected a module, a sequence of modules or modules by name"
    for argument, (name, model) in models.items():
        if not isinstance(name, str) or not isinstance(model, nn.Module):
            raise TypeError(f"{argument}: {expected}, got {type(model).__name__}")
    if not models:
        raise ValueError(f"aux_model: {expected}, got none")
    for argument, (name, model) in models.items():
        if isinstance(aux_model, Mapping) and name in taken:
            raise ValueError(f"aux_model: target_model is connected to a model {name!r} already")
        own, number = name, 1
        while own in taken:
            number += 1
            own = f"{name} {number}"
        taken.append(own)
        models[argument] = own, model
    return models


@torch.no_grad()
def _connections(
    target: nn.Module, aux: nn.Module, argument: str, name: str, pair: Pair
) -> Iterator[tuple[str, Connection]]:
    """The layers of a block that are to be connected, by their places."""
    fitting, misfits = [], []
    for group in pair.groups:
        targets = [target_layer(target, f"{pair.target_block}.{layer}") for layer in group.target_names]
        aux_places = [f"{pair.aux_block}.{layer}" for layer in group.aux_names]
        weights = [(place, _aux_weight(aux, argument, place)) for place in aux_places]
        if misfit := _misfit(group, [layer for _, layer in targets], weights):
            misfits.append(misfit)
        else:
            fitting.append((group, targets, weights))
    if misfits:
        fit = ", ".join(layer for group, *_ in fitting for layer in group.target_names)
        remedy = f"what fits in this block: {fit}" if fit else "no layer of this block fits"
        raise ValueError(f"{argument}: {misfits[0]}; {remedy}")
    for group, targets, weights in fitting:
        stops = accumulate(len(layer.weight) for _, layer in targets)
        for target_name, (place, layer), stop in zip(group.target_names, targets, stops, strict=True):
            if target_name in group.chosen:
                read_from, weight = _rows(weights, stop - len(layer.weight), stop)
                yield place, Connection(layer, argument, Auxiliary(name, read_from), weight)


def _misfit(group: Group, layers: Sequence[nn.Linear], weights: Sequence[tuple[str, Tensor]]) -> str:
    """Why the layers of the target cannot get the rows of these weights; empty if they can."""
    joined = " + ".join(place for place, _ in weights)
    if any(weight is layer.weight for _, weight in weights for layer in layers):
        return f"{joined} is target_model's own weight"
    if len({weight.device for _, weight in weights}) > 1:
        return f"{joined} are on different devices"
    if group.misfit:
        return f"{joined} and target_model's {', '.join(group.target_names)}: {group.misfit}"
    expected, got = _joined_shape(layer.weight for layer in layers), _joined_shape(weight for _, weight in weights)
    return "" if got == expected else f"{joined} has weight shape {got}, expected {expected} as in target_model"


def _joined_shape(weights: Iterable[Tensor]) -> tuple[int, ...] | list[tuple[int, ...]]:
    """The shape of all rows together, or of each weight if the numbers of columns differ."""
    shapes = [tuple(weight.shape) for weight in weights]
    columns = {shape[1] for shape in shapes}
    return (sum(rows for rows, _ in shapes), *columns) if len(columns) == 1 else shapes


def _rows(weights: Sequence[tuple[str, Tensor]], start: int, stop: int) -> tuple[str, Tensor]:
    """The name and the data of some rows of weights laid end to end; a view unless they come from several."""
    names, parts, first = [], [], 0
    for place, weight in weights:
        rows = slice(max(start - first, 0), min(stop - first, len(weight)))
        first += len(weight)
        if rows == slice(0, len(weight)):
            names.append(place)
            parts.append(weight)
        elif rows.start < rows.stop:
            names.append(f"{place}[{rows.start}:{rows.stop}]")
            parts.append(weight[rows])
    return " + ".join(names), parts[0] if len(parts) == 1 else torch.cat(parts)


def weight_at(model: nn.Module, argument: str, layers: str) -> Tensor:
    """Read an auxiliary weight from the layers that an `Auxiliary` names.

    Raises:
        ValueError: there is no such layer, or it could not be connected.
    """
    parts = []
    for each in layers.split(" + "):
        divided = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", each, re.DOTALL)
        weight = _aux_weight(model, argument, divided[1] if divided else each)
        parts.append(weight[int(divided[2]) : int(divided[3])] if divided else weight)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def target_layer(model: nn.Module, place: str, argument: str = "target_model") -> tuple[str, nn.Linear]:
    """A layer that may be connected, and its place inside a wrapper; or an error about the argument."""
    layer, place = _layer(model, argument, place)
    if type(layer) is not FusedCrossModalLinear and not is_plain_linear(layer):
        raise ValueError(_unfit(argument, place, layer))
    check_readable(f"{argument}: {place}.weight", layer.weight)
    if place.rpartition(".")[2] == "_orig_mod":
        raise ValueError(f"{argument}: {place} is compiled by itself, which keeps the old layer: compile afterwards")
    _check_replaceable(model, place, f"{argument}: {place}")
    called = place
    while called:
        parent_name, _, layer_name = called.rpartition(".")
        parent = model.get_submodule(parent_name)
        if is_known_to_read(parent, layer_name):
            reader = f"{type(parent).__name__}, which reads its weight"
            raise ValueError(f"{argument}: {place} is not called by its {reader}: leave it out with layer_names")
        called = parent_name if layer_name == "base_layer" else ""
    return place, layer


def _check_replaceable(model: nn.Module, place: str, name: str) -> None:
    """Raise a ValueError if what surrounds or watches a layer would be lost with it."""
    layer = model.get_submodule(place)
    check_no_hooks(name, layer)
    if isinstance(layer, FusedCrossModalLinear):
        check_no_tensor_hooks(f"{name}.aux_weight", layer.aux_weight)
        check_no_tensor_hooks(f"{name}.cross_modal_scale", layer.cross_modal_scale)
    parts = place.split(".")
    around = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    if any(isinstance(module, DistributedDataParallel) for module in around):
        raise ValueError(f"{name} is inside DistributedDataParallel, which would not see its scale: wrap it afterwards")


def _aux_weight(model: nn.Module, argument: str, place: str) -> Tensor:
    if (weight := in_projection(model, place)) is not None:
        return weight
    layer, place = _layer(model, argument, place)
    if isinstance(layer, FusedCrossModalLinear):
        raise ValueError(f"{argument}: {place} is connected to an auxiliary model already, merge its pathways first")
    if not is_plain_linear(layer) and not is_conv1d(layer):
        raise ValueError(_unfit(argument, place, layer))
    if has_forward_hooks(layer):
        raise ValueError(f"{argument}: {place} has forward hooks, which may change what it computes: remove them first")
    weight = cast(Tensor, layer.weight)
    check_readable(f"{argument}: {place}.weight", weight)
    return weight.t().contiguous() if is_conv1d(layer) else weight


def _layer(model: nn.Module, argument: str, place: str) -> tuple[nn.Module, str]:
    try:
        layer, place = unwrapped(model.get_submodule(place), place)
    except AttributeError:
        raise ValueError(f"{argument}: there is no layer {place}") from None
    if is_divided(model, place):
        raise ValueError(
            f"{argument}: {place} is divided among processes: connect whole models and divide the target afterwards,"
            f" or {GATHER} for a whole one"
        )
    return layer, place


def _unfit(argument: str, place: str, layer: nn.Module) -> str:
    added = " with a forward, parameters, buffers or modules of its own" * (type(layer) is nn.Linear)
    return f"{argument}: {place} is a {qualified_name(layer)}{added}, expected a plain nn.Linear"


def require_used_once(model: nn.Module, layers: Mapping[str, nn.Module], argument: str = "target_model") -> None:
    """Raise a ValueError for a layer that the model has in another place too, which would keep the old one."""
    chosen = set(layers.values())
    seen: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in chosen and seen.setdefault(module, name) != name:
            raise ValueError(f"{argument}: {name} is {seen[module]}, used twice")


def _connected(
    connections: Sequence[Connection], is_aux_trainable: bool, aux_dtype: str | None
) -> FusedCrossModalLinear:
    layer = connections[0].layer
    connected = layer if isinstance(layer, FusedCrossModalLinear) else None
    fused = FusedCrossModalLinear(
        layer.in_features,
        layer.out_features,
        origin_layer=layer if connected is None else connected.plain(),
        aux_weight=[connection.weight for connection in connections],
        is_aux_trainable=is_aux_trainable,
    )
    fused.auxiliaries = tuple(connection.auxiliary for connection in connections)
    if aux_dtype is not None:
        fused.quantize_aux(aux_dtype)
    return fused if connected is None else connected.joined(fused)


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put layers in their places; if that or the block fails, undo it all."""
    before = {place: model.get_submodule(place) for place in layers}
    called = {layer: layer.is_called for layer in fused_in(model)}
    try:
        for place, layer in layers.items():
            model.set_submodule(place, layer)
        yield
    except BaseException:
        RELEASED.update(before.values())
        for place, layer in before.items():
            model.set_submodule(place, layer)
        for layer, is_called in called.items():
            layer.is_called = is_called
        raise
