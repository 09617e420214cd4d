"""The blocks of a transformer in a state dict, whatever stands before their numbers, and their linear layers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import LAYER_NAMES, layers_of_block

NUMBER = re.compile(r"(?<![^._])\d{1,4}(?=\.)")
"""A block's number is a part of a name, or the end of one: `blocks.3.`, torchvision's `encoder_layer_3.`."""
CHUNK = re.compile(r"(?<![^.])\d+\.$")

Layers = Mapping[str, tuple[str, ...]]
"""The names in a block for each of `LAYER_NAMES`, several where rows are joined."""


@dataclass(frozen=True)
class Body:
    """The blocks of one transformer.

    Attributes:
        prefix: what stands before the number of a block; before that of a chunk, where blocks are in chunks.
        layers: what its linear layers are called.
        places: name in the file -> number of its block, and name in the block.
    """

    prefix: str
    layers: Layers
    places: Mapping[str, tuple[int, str]]

    def depth(self) -> int:
        return 1 + max(number for number, _ in self.places.values())


def find_body(names: Iterable[str]) -> Body:
    """The one transformer among the names of a state dict.

    It is one whose blocks have linear layers as a family of `m2pt.families` names them. Decoders count only where there
    is nothing else, and beside a text tower a vision tower (`vision_model`, of CLIP and SigLIP) is meant.

    Raises:
        ValueError: none, several, two blocks of one number, or the model is connected to an auxiliary one.
    """
    names = list(names)
    if any(name.rpartition(".")[2] == "cross_modal_scale" for name in names):
        raise ValueError("the model in it is connected to an auxiliary one: fold it first, with `m2pt merge`")
    bodies = _bodies(names)
    for is_meant in (lambda prefix: "decoder" not in prefix, lambda prefix: "vision_model" in prefix.split(".")):
        if len(bodies) > 1:
            bodies = [body for body in bodies if is_meant(body.prefix)] or bodies
    if len(bodies) > 1:
        raise ValueError(f"expected one transformer, got several: {', '.join(body.prefix + '*' for body in bodies)}")
    if not bodies:
        got = ", ".join(names[:3]) or "nothing"
        raise ValueError(f"expected transformer blocks with layers named as in a family that is known; got {got}")
    return bodies[0]


def _bodies(names: Iterable[str]) -> list[Body]:
    numbered: dict[str, dict[int, dict[str, str]]] = {}  # what stands before a number, the number, what stands after
    for name in names:
        for number in NUMBER.finditer(name):
            blocks = numbered.setdefault(name[: number.start()], {})
            blocks.setdefault(int(number[0]), {})[name[number.end() + 1 :]] = name
    bodies: dict[str, Body] = {}
    for prefix, blocks in numbered.items():
        if not (layers := _most(map(_layers, blocks.values()))):
            continue
        places = {name: (number, inside) for number, block in blocks.items() for inside, name in block.items()}
        whole = CHUNK.sub("", prefix)
        if whole in bodies:
            earlier = bodies[whole].places
            if twice := {number for number, _ in earlier.values()} & blocks.keys():
                raise ValueError(f"{whole}*: expected blocks of different numbers, got {min(twice)} twice")
            places |= earlier
            layers = _most((layers, bodies[whole].layers))
        bodies[whole] = Body(whole, layers, places)
    return list(bodies.values())


def _most(found: Iterable[Layers]) -> Layers:
    """The layers with the most names: a block that lacks one of them may look like another family's."""
    return max(found, key=lambda layers: sum(map(len, layers.values())))


def _layers(block: Mapping[str, str]) -> Layers:
    return layers_of_block(lambda name: bool(_entry(block, name)))


def _entry(block: Mapping[str, str], name: str) -> str:
    """What the weight of a layer is called in the file, or nothing; torchvision's `in_proj_weight` is no layer's."""
    return block.get(f"{name}.weight", block.get(f"{name}_weight", ""))


def linear_weights(state_dict: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights of `LAYER_NAMES` in every block: rows joined, and as `nn.Linear` has them, (out, in).

    Raises:
        ValueError: as by `find_body`; or a weight that is missing, no floating matrix, or of a shape that does not fit
            the others'. The message names the entry.
    """
    body = find_body(state_dict)
    blocks: list[dict[str, str]] = [{} for _ in range(body.depth())]
    for name, (number, inside) in body.places.items():
        blocks[number][inside] = name
    found = []
    for number, block in enumerate(blocks):
        weights = {}
        for layer, names in body.layers.items():
            entries = [_entry(block, name) for name in names]
            if not all(entries):
                raise ValueError(f"{body.prefix}{number}.{names[entries.index('')]}.weight is missing")
            weights[layer] = {entry: state_dict[entry] for entry in entries}
        require_matrices(weights)
        if body.layers["attn.qkv"] == ("attn.c_attn",):
            weights = _as_linear(weights)
        require_shapes(weights)
        found.append({layer: _joined(list(parts.values())) for layer, parts in weights.items()})
    return found


def _as_linear(weights: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """GPT-2's weights; those of `transformers` are stored as (in, out), which is where `c_attn` is wide."""
    rows, columns = next(iter(weights["attn.qkv"].values())).shape
    if rows > columns:
        return weights
    return {layer: {name: weight.T.contiguous() for name, weight in parts.items()} for layer, parts in weights.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def require_matrices(weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise a ValueError unless all weights of a block, by layer and entry, are floating matrices."""
    for parts in weights.values():
        for name, weight in parts.items():
            if weight.ndim != 2 or not weight.is_floating_point():
                raise ValueError(
                    f"{name}: expected a floating matrix, got {weight.dtype} of shape {tuple(weight.shape)}"
                )


def require_shapes(weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise a ValueError unless the weights of a block, by layer and entry, fit together.

    Several heads may share a key and a value, and the MLP may be gated, with twice the rows.
    """
    qkv, proj, fc1, fc2 = (list(weights[layer].values()) for layer in LAYER_NAMES)
    width, inner, hidden = qkv[0].shape[1], proj[0].shape[1], fc2[0].shape[1]
    shared = qkv[-1].shape[0] if len(qkv) > 1 and inner % max(1, qkv[-1].shape[0]) == 0 else inner
    rows = {
        "attn.qkv": (inner, shared, shared) if len(qkv) > 1 else (3 * inner,),
        "attn.proj": (width,),
        "mlp.fc1": (2 * hidden,) if len(fc1) == 1 and fc1[0].shape[0] == 2 * hidden else (hidden,) * len(fc1),
        "mlp.fc2": (width,),
    }
    columns = dict(zip(LAYER_NAMES, (width, inner, width, hidden), strict=True))
    for layer, parts in weights.items():
        for (name, weight), expected in zip(parts.items(), rows[layer], strict=True):
            if weight.shape != (shape := (expected, columns[layer])):
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}")
