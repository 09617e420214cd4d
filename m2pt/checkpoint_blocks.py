"""Finds the blocks of a transformer in a state dict, whatever prefix their numbers have, and their linear layers."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from m2pt_kernels.checks import GEMM_DTYPES

from .families import LAYER_NAMES, layers_of_block

NUMBER = re.compile(r"(?<![^._])\d{1,4}(?=\.)")
"""A block's number is a part of a name or the end of a part: `blocks.3.`, torchvision's `encoder_layer_3.`."""
MOST_NUMBERS = 8
"""How many numbers in a name are tried; any of them may be the block's."""
ENCODER = re.compile(r"(?<![^._])encoder[._](.*\.)?\d+\.")
"""An entry of an encoder's blocks."""
CHUNK = re.compile(r"(?<![^.])\d+\.$")

Layers = Mapping[str, tuple[str, ...]]
"""A block's names for each of `LAYER_NAMES`; several where their rows are joined."""


@dataclass(frozen=True)
class Body:
    """The blocks of one transformer.

    Attributes:
        prefix: what comes before the block's number in a name, or before the chunk's number if blocks are in chunks.
        layers: the names of its linear layers.
        places: name in the file -> number of its block, and name in the block.
    """

    prefix: str
    layers: Layers
    places: Mapping[str, tuple[int, str]]

    def depth(self) -> int:
        return 1 + max(number for number, _ in self.places.values())


def find_body(names: Iterable[str]) -> Body:
    """Find the one transformer among the names of a state dict.

    The linear layers of its blocks have the names of a family in `m2pt.families`. Decoders count only if there is
    nothing else, and text towers (`text_model`) only if there is no vision tower (`vision_model`, as in CLIP and
    SigLIP).

    Raises:
        ValueError: there is no transformer or several, a decoder beside an encoder of an unknown family, two blocks
            with the same number, or a model that is connected to an auxiliary one.
    """
    names = list(names)
    if any(name.rpartition(".")[2] == "cross_modal_scale" for name in names):
        raise ValueError("the model in it is connected to an auxiliary one: merge it first with `m2pt merge`")
    bodies = _bodies(names)
    if encoders := [body for body in bodies if "decoder" not in body.prefix]:
        bodies = encoders
    elif bodies and (unknown := [name for name in names if ENCODER.search(name)]):
        raise ValueError(f"expected an encoder named as in a family of m2pt.families, got {_cut(unknown[0])}")
    if any("vision_model" in body.prefix.split(".") for body in bodies):
        bodies = [body for body in bodies if "text_model" not in body.prefix.split(".")]
    if len(bodies) > 1:
        got = ", ".join(f"{_cut(body.prefix)}*" for body in bodies)
        raise ValueError(f"expected one transformer, got several: {got}")
    if not bodies:
        got = f"the names begin with {', '.join(map(_cut, names[:3]))}" if names else "it is empty"
        expected = "expected transformer blocks whose linear layers are named as in a family of m2pt.families"
        raise ValueError(f"{expected}; {got}")
    return bodies[0]


def _cut(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:100]}..."


def _bodies(names: Iterable[str]) -> list[Body]:
    numbered: dict[str, dict[int, dict[str, str]]] = {}  # what stands before a number, the number, what stands after
    for name in names:
        for number in itertools.islice(NUMBER.finditer(name), MOST_NUMBERS):
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
                raise ValueError(f"{whole}*: expected blocks with different numbers, got {min(twice)} twice")
            places |= earlier
            layers = _most((layers, bodies[whole].layers))
        bodies[whole] = Body(whole, layers, places)
    return list(bodies.values())


def _most(found: Iterable[Layers]) -> Layers:
    """The layers with the most names: a block that lacks one may look like another family's."""
    return max(found, key=lambda layers: sum(map(len, layers.values())))


def _layers(block: Mapping[str, str]) -> Layers:
    return layers_of_block(lambda name: bool(_entry(block, name)))


def _entry(block: Mapping[str, str], name: str) -> str:
    """The name of a layer's weight in the file, or an empty string.

    torchvision's `in_proj_weight` is a parameter of the attention itself.
    """
    return block.get(f"{name}.weight", block.get(f"{name}_weight", ""))


BlockWeights = dict[str, dict[str, Tensor]]
"""A block's entries in the file for each of `LAYER_NAMES`; several where their rows are joined."""


def weights_of_blocks(state_dict: Mapping[str, Tensor], body: Body) -> list[BlockWeights]:
    """The weights of every block by their names in the file, (out, in) as in `nn.Linear`; nothing is copied.

    Raises:
        ValueError: a weight is missing, is not a floating matrix of 16 bits or more, has another dtype than those it is
            joined with, or has a shape that does not fit the others. The message names the entry.
    """
    blocks: list[dict[str, str]] = [{} for _ in range(body.depth())]
    for name, (number, inside) in body.places.items():
        blocks[number][inside] = name
    found = []
    for number, block in enumerate(blocks):
        weights: BlockWeights = {}
        for layer, names in body.layers.items():
            entries = [_entry(block, name) for name in names]
            if not all(entries):
                raise ValueError(f"{body.prefix}{number}.{names[entries.index('')]}.weight is missing")
            weights[layer] = {entry: state_dict[entry] for entry in entries}
        _require_matrices(weights)
        if body.layers["attn.qkv"] == ("attn.c_attn",):
            weights = _as_linear(weights)
        _require_shapes(weights)
        found.append(weights)
    return found


def linear_weights(state_dict: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights of `LAYER_NAMES` in every block, contiguous and with their rows joined.

    Raises:
        ValueError: as in `find_body` and `weights_of_blocks`.
    """
    blocks = weights_of_blocks(state_dict, find_body(state_dict))
    return [{layer: _joined(list(parts.values())) for layer, parts in weights.items()} for weights in blocks]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def _as_linear(weights: BlockWeights) -> BlockWeights:
    """GPT-2's weights as (out, in). `transformers` stores them as (in, out): then `c_attn` is wide."""
    rows, columns = next(iter(weights["attn.qkv"].values())).shape
    if rows > columns:
        return weights
    return {layer: {name: weight.T for name, weight in parts.items()} for layer, parts in weights.items()}


def _require_matrices(weights: BlockWeights) -> None:
    for parts in weights.values():
        for name, weight in parts.items():
            if weight.ndim != 2 or weight.dtype not in GEMM_DTYPES:
                expected, shape = "expected a floating matrix of 16 bits or more", tuple(weight.shape)
                raise ValueError(f"{name}: {expected}, got {weight.dtype} of shape {shape}")
        require_one_dtype(parts)


def require_one_dtype(parts: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the entry unless all parts to be joined have the same dtype."""
    first, expected = next((name, part.dtype) for name, part in parts.items())
    for name, part in parts.items():
        if part.dtype != expected:
            raise ValueError(f"{name}: expected {expected} as {first}, which it is joined with, got {part.dtype}")


def _require_shapes(weights: BlockWeights) -> None:
    """Check that the weights of a block fit together.

    Several heads may share a key and a value, and the MLP may be gated, with twice the rows. The sizes that most
    weights agree on are expected, so that the error names the faulty one.
    """
    qkv, (proj,), fc1, (fc2,) = (list(weights[layer].values()) for layer in LAYER_NAMES)
    width = _agreed(proj.shape[0], fc2.shape[0], *(part.shape[1] for part in (*qkv, *fc1)))
    query, *key_value = (len(part) for part in qkv) if len(qkv) > 1 else [len(qkv[0]) // 3]
    inner = _agreed(query, proj.shape[1], width, *key_value)
    shared = max((rows for rows in key_value if rows and inner % rows == 0), default=inner)
    hidden = _agreed(fc2.shape[1], *map(len, fc1))
    rows = {
        "attn.qkv": (inner, shared, shared) if key_value else (3 * inner,),
        "attn.proj": (width,),
        "mlp.fc1": (2 * hidden,) if len(fc1) == 1 and len(fc1[0]) == 2 * hidden else (hidden,) * len(fc1),
        "mlp.fc2": (width,),
    }
    columns = dict(zip(LAYER_NAMES, (width, inner, width, hidden), strict=True))
    for layer, parts in weights.items():
        for (name, weight), expected in zip(parts.items(), rows[layer], strict=True):
            if weight.shape != (shape := (expected, columns[layer])):
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}")


def _agreed(*sizes: int) -> int:
    """The first size that occurs twice, or else the first of all."""
    return next((size for i, size in enumerate(sizes) if size in sizes[i + 1 :]), sizes[0])
