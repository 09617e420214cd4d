"""Pairs the linear layers of a target with those of an auxiliary model: bodies, blocks, layers of a block.

Names decide if both models are of a known family, shapes if one is not. Anything unclear is an error that lists the
candidates.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from .checks import one_of
from .families import layers_of_block

Names = tuple[str, ...]
Layers = Mapping[str, Names]
LayerNames = Sequence[str] | Mapping[str | Names, str | Sequence[str]]
Blocks = str | Sequence[int] | Sequence[tuple[int, int]]

CONV1D = "transformers.pytorch_utils.Conv1D"
"""GPT-2's linear layer, named so that nothing has to be imported. Its weight is (in_features, out_features)."""

SPACINGS = ("first", "last", "even")


class Group(NamedTuple):
    """Layers of a block that belong together: their rows, one layer after the other, match in both models.

    Attributes:
        target_names, aux_names: dotted names inside the block.
        chosen: those of `target_names` that are to be connected.
        misfit: why they do not belong together after all.
    """

    target_names: Names
    aux_names: Names
    chosen: Names
    misfit: str = ""


class Pair(NamedTuple):
    """Blocks that belong together, by their dotted names."""

    target_block: str
    aux_block: str
    groups: list[Group]


def pair_blocks(
    target: nn.Module,
    aux: nn.Module,
    argument: str,
    layer_names: LayerNames | None,
    main_body_name: str | tuple[str, str] | None,
    blocks: Blocks | None,
) -> list[Pair]:
    """Pair blocks and layers by the arguments of `reparameterize_aux_into_target_model`.

    Args:
        argument: what error messages call `aux`.

    Raises:
        TypeError, ValueError: as there.
    """
    _check_names(layer_names)
    target_body, aux_body = _body_names(target, aux, argument, main_body_name)
    target_blocks = _block_names(target, "target_model", target_body)
    aux_blocks = _block_names(aux, argument, aux_body)
    if blocks is None and len(target_blocks) != len(aux_blocks):
        raise ValueError(
            f"{argument}: expected {len(target_blocks)} blocks in {aux_body!r} as in target_model, got"
            f" {len(aux_blocks)}: choose with blocks='first', 'last', 'even', indices or pairs of indices"
        )
    indices = _block_indices(blocks, len(target_blocks), len(aux_blocks))
    places = [(target_blocks[i], aux_blocks[j]) for i, j in indices]
    modules = [(target.get_submodule(i), aux.get_submodule(j)) for i, j in places]
    named = _named_groups(*modules[0], *places[0], argument, layer_names)
    pairs = []
    for (target_block, aux_block), place in zip(modules, places, strict=True):
        if named:
            groups = _named_groups(target_block, aux_block, *place, argument, layer_names) or named
        else:
            groups = _groups_by_shape(target_block, aux_block, *place, argument)
        if not isinstance(layer_names, Mapping):
            groups = [group._replace(misfit=_misfit(target_block, aux_block, group)) for group in groups]
        pairs.append(Pair(*place, groups))
    return pairs


def unwrapped(module: nn.Module, place: str) -> tuple[nn.Module, str]:
    """The layer inside wrappers that call it as their `base_layer`, as peft's LoRA does, and its dotted name."""
    while not isinstance(module, nn.Linear) and isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module, place = inner, f"{place}.base_layer"
    return module, place


def is_conv1d(module: nn.Module) -> bool:
    """Whether it computes what GPT-2's linear layer does."""
    modules = (base for base in type(module).__mro__ if issubclass(base, nn.Module))
    own = [base for base in modules if f"{base.__module__}.{base.__qualname__}" == CONV1D]
    return bool(own) and type(module).forward is own[0].forward and "forward" not in vars(module)


def in_projection(model: nn.Module, place: str) -> Tensor | None:
    """The parameter of torch's MultiheadAttention that serves as a layer `in_proj`, if `place` names that."""
    parent, _, name = place.rpartition(".")
    try:
        attention = model.get_submodule(parent)
    except AttributeError:
        return None
    return attention.in_proj_weight if name == "in_proj" and isinstance(attention, nn.MultiheadAttention) else None


def _check_names(layer_names: LayerNames | None) -> None:
    if layer_names is None:
        return
    groups: list[tuple[Any, Any]] = []
    if isinstance(layer_names, Mapping):
        groups = [(_names(target), _names(aux)) for target, aux in layer_names.items()]
    elif isinstance(layer_names, Collection) and not isinstance(layer_names, str):
        groups = [((name,), (name,)) for name in layer_names]
    targets = [name for names, _ in groups for name in names]
    names = targets + [name for _, names in groups for name in names]
    is_complete = bool(groups) and all(target and aux for target, aux in groups)
    if not is_complete or not all(isinstance(name, str) for name in names) or len(set(targets)) != len(targets):
        expected = "a sequence of different names, or a mapping from the target's to the auxiliary model's"
        raise ValueError(f"layer_names: expected {expected}, got {layer_names!r}")


def _names(names: Any) -> tuple[Any, ...]:
    """A tuple of one name, or of several in their order."""
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def _body_names(target: nn.Module, aux: nn.Module, argument: str, main_body_name: Any) -> tuple[str, str]:
    if main_body_name is None:
        return _find_body(target, "target_model"), _find_body(aux, argument)
    if isinstance(main_body_name, str):
        return main_body_name, main_body_name
    names = main_body_name if isinstance(main_body_name, (tuple, list)) else ()
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"main_body_name: expected a dotted name, or the target's and the other, got {main_body_name!r}"
        )
    return names[0], names[1]


def _find_body(model: nn.Module, argument: str) -> str:
    """The dotted name of the blocks: `blocks`, or else the one sequence of a known family or of equal blocks."""
    if _is_sequence(model._modules.get("blocks")):
        return "blocks"
    bodies = {name: list(module) for name, module in model.named_modules() if _is_sequence(module)}
    found = [name for name, blocks in bodies.items() if _layers(blocks[0]) or _are_equal(blocks)]
    found = [name for name in found if not any(other != name and _is_inside(name, other) for other in found)]
    found = [name for name in found if "decoder" not in name] or found
    if not found:
        raise ValueError(
            f"{argument}: {type(model).__name__} has no sequence of equal blocks with linear layers;"
            " name the blocks with main_body_name"
        )
    if len(found) > 1:
        candidates = ", ".join(f"{name!r} ({len(bodies[name])} blocks)" for name in found)
        raise ValueError(
            f"{argument}: {type(model).__name__} has several sequences of blocks, name one with main_body_name:"
            f" {candidates}"
        )
    return found[0]


def _is_sequence(module: Any) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 0


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}." if other else "")


def _are_equal(blocks: Sequence[nn.Module]) -> bool:
    shapes = [_linear_shapes(block) for block in blocks]
    return len(blocks) > 1 and bool(shapes[0]) and all(own == shapes[0] for own in shapes)


def _block_names(model: nn.Module, argument: str, body: str) -> list[str]:
    try:
        blocks = model.get_submodule(body)
    except AttributeError:
        raise ValueError(f"{argument}: {type(model).__name__} has no module {body!r}") from None
    if not _is_sequence(blocks):
        got = type(blocks).__name__
        raise ValueError(f"{argument}: expected {body!r} to be a non-empty sequence of blocks, got {got}")
    return [f"{body}.{name}".removeprefix(".") for name in blocks._modules]


def _block_indices(blocks: Blocks | None, target_depth: int, aux_depth: int) -> list[tuple[int, int]]:
    if blocks is None or isinstance(blocks, str):
        spacing = "first" if blocks is None else one_of("blocks", blocks, SPACINGS)
        count = min(target_depth, aux_depth)
        places = (_spread(spacing, depth, count) for depth in (target_depth, aux_depth))
        return list(zip(*places, strict=True))
    expected = "blocks: expected 'first', 'last', 'even', indices or pairs of indices, each block of the target once"
    chosen = blocks if isinstance(blocks, Sequence) and not isinstance(blocks, bytes) else ()
    pairs = [(block, block) if isinstance(block, int) else _names(block) for block in chosen]
    if not pairs or not all(len(pair) == 2 and all(type(index) is int for index in pair) for pair in pairs):
        raise TypeError(f"{expected}; got {blocks!r}")
    if len({i for i, _ in pairs}) != len(pairs):
        raise ValueError(f"{expected}; got {blocks!r}")
    for i, j in pairs:
        if not (0 <= i < target_depth and 0 <= j < aux_depth):
            bounds = f"{target_depth} in the target and {aux_depth} in the auxiliary model"
            raise ValueError(f"blocks: expected indices of 0 or more, below {bounds}; got {i, j}")
    return pairs


def _spread(spacing: str, depth: int, count: int) -> list[int]:
    """`count` of `depth` blocks; "even" begins with the first and ends with the last."""
    if spacing == "even" and count > 1:
        return [round(i * (depth - 1) / (count - 1)) for i in range(count)]
    start = depth - count if spacing == "last" else 0
    return list(range(start, start + count))


def _named_groups(
    target: nn.Module,
    aux: nn.Module,
    target_place: str,
    aux_place: str,
    argument: str,
    layer_names: LayerNames | None,
) -> list[Group]:
    """Pair the layers of two blocks by name; empty if no names are given or known."""
    if isinstance(layer_names, Mapping):
        return [Group(_names(names), _names(aux_names), _names(names)) for names, aux_names in layer_names.items()]
    known = _known_groups(target, aux)
    if layer_names is None:
        return known
    if missing := [name for name in layer_names if not _has_module(target, name)]:
        raise ValueError(f"target_model: there is no layer {target_place}.{missing[0]}")
    if not known or all(_has_layer(aux, name) for name in layer_names):
        return [Group((name,), (name,), (name,)) for name in layer_names]
    known_names = [name for group in known for name in group.target_names]
    if unknown := [name for name in layer_names if name not in known_names]:
        raise ValueError(
            f"{argument}: it is not known which layers of {aux_place} belong to {', '.join(unknown)}: give a mapping"
            f" as layer_names; known are those of {', '.join(known_names)}"
        )
    chosen = [group._replace(chosen=tuple(n for n in group.target_names if n in layer_names)) for group in known]
    return [group for group in chosen if group.chosen]


def _known_groups(target: nn.Module, aux: nn.Module) -> list[Group]:
    """Groups of two known families, without the layers of torch's MultiheadAttention, which reads their weights."""
    layers, aux_layers = _layers(target), _layers(aux)
    groups = []
    for layer in layers if aux_layers else ():
        names, aux_names = layers[layer], aux_layers[layer]
        if isinstance(_parent(target, names[0]), nn.MultiheadAttention):
            continue
        if len(names) == len(aux_names):
            groups += [Group((name,), (aux_name,), (name,)) for name, aux_name in zip(names, aux_names, strict=True)]
        else:
            names = names[::-1] if _gate_is_last(aux, aux_names) else names
            aux_names = aux_names[::-1] if _gate_is_last(target, names) else aux_names
            groups.append(Group(names, aux_names, names))
    return groups


def _misfit(target: nn.Module, aux: nn.Module, group: Group) -> str:
    """Why layers do not belong together, whatever their shapes; empty if they may."""
    sides = (target, group.target_names), (aux, group.aux_names)
    if len(group.target_names) != len(group.aux_names):
        block, names = max(sides, key=lambda side: len(side[1]))
        rows = [_shape(block, name)[0] for name in names if _has_layer(block, name)]
        if len(set(rows)) > 1:
            return f"expected the same number of rows in each, got {', '.join(map(str, rows))}"
    gated = [_is_gated(*side) for side in sides]
    if None not in gated and gated[0] != gated[1]:
        return "a gated MLP and one without a gate"
    if len(group.target_names) == len(group.aux_names) and _gate_is_last(*sides[0]) != _gate_is_last(*sides[1]):
        return "the rows of the gate come last in one of them"
    return ""


def _is_gated(block: nn.Module, names: Names) -> bool | None:
    """Whether the first layers of a known MLP include a gate; None for other layers."""
    layers = _layers(block)
    if not layers or set(names) != set(layers["mlp.fc1"]):
        return None
    return sum(_shape(block, name)[0] for name in names) == 2 * _shape(block, layers["mlp.fc2"][0])[1]


def _layers(block: nn.Module) -> Layers:
    return layers_of_block(partial(_has_layer, block))


def _gate_is_last(block: nn.Module, names: Names) -> bool:
    """Whether the first layer of an MLP has the rows of its gate after the others, as timm's GluMlp may."""
    is_first = names == ("mlp.fc1",) and _has_module(block, "mlp")
    return is_first and bool(getattr(block.get_submodule("mlp"), "gate_last", False))


def _parent(block: nn.Module, name: str) -> nn.Module:
    return block.get_submodule(name.rpartition(".")[0])


def _groups_by_shape(
    target: nn.Module, aux: nn.Module, target_place: str, aux_place: str, argument: str
) -> list[Group]:
    """Pair layers by name; or, if the names differ, by shapes that only one layer of each block has."""
    shapes, aux_shapes = _linear_shapes(target), _linear_shapes(aux)
    for where, found in ((f"target_model: {target_place}", shapes), (f"{argument}: {aux_place}", aux_shapes)):
        if not found:
            raise ValueError(f"{where}: there are no linear layers inside")
    if shapes.keys() == aux_shapes.keys():
        return [Group((name,), (name,), (name,)) for name in shapes]
    alike = {
        shape: [[name for name in found if found[name] == shape] for found in (shapes, aux_shapes)]
        for shape in dict.fromkeys(shapes.values())
    }
    clear = {
        names[0]: aux_names[0]
        for names, aux_names in alike.values()
        if len(names) == len(aux_names) == 1 and not any(map(_is_interleaved, (names[0], aux_names[0])))
    }
    if len(clear) < len(shapes):
        unclear = "; ".join(
            f"{shape}: target {', '.join(names)}, auxiliary {', '.join(aux_names) or 'none'}"
            for shape, (names, aux_names) in alike.items()
            if names[0] not in clear
        )
        raise ValueError(
            f"{argument}: {aux_place}: it is not clear which of its layers belong to the target's: give"
            f" layer_names; clear are {clear}, the others by shape: {unclear}"
        )
    return [Group((name,), (aux_name,), (name,)) for name, aux_name in clear.items()]


def _is_interleaved(name: str) -> bool:
    """Whether its rows are query, key and value of one head after the other, as in GPT-NeoX, Bloom and Falcon."""
    return name.rpartition(".")[2] == "query_key_value"


def _shape(block: nn.Module, name: str) -> tuple[int, int]:
    """(out_features, in_features) of a layer."""
    if (weight := in_projection(block, name)) is not None:
        return weight.shape[0], weight.shape[1]
    layer, _ = unwrapped(block.get_submodule(name), name)
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    in_features, out_features = cast(Tensor, layer.weight).shape  # of Conv1D
    return out_features, in_features


def _has_module(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _has_layer(block: nn.Module, name: str) -> bool:
    if not _has_module(block, name):
        return in_projection(block, name) is not None
    layer, _ = unwrapped(block.get_submodule(name), name)
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def _linear_shapes(block: nn.Module) -> dict[str, tuple[int, int]]:
    """The shapes of the linear layers inside a block, by their dotted names."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, _ in block.named_modules():
        if name and not any(_is_inside(name, found) for found in shapes) and _has_layer(block, name):
            shapes[name] = _shape(block, name)
    return shapes
