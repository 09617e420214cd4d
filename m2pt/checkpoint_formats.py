"""Reads checkpoints of other projects: recognises their names, renames them to timm's, accounts for every entry.

An entry that the format does not know is an error rather than a warning: it is either a part of the model that would
silently be lost, or a sign that the file is not what it seems.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from m2pt_kernels.divided import check_undivided

from .checkpoint_blocks import Body, find_body, linear_weights, require_one_dtype, weights_of_blocks
from .checkpoint_names import ADAPTER, FORMATS, PARTS, RELATIVE, Format, inside_block
from .checkpoints import TAKEN, Weights, read_weights
from .families import LAYER_NAMES
from .models.vit import SpectrogramDropout
from .tensor_checks import check_module, check_state_dict

PART = re.compile(r"(blocks\.\d+\.)(?:attn|mlp)\.(query|key|value|gate|up)\.(weight|bias)")
TIMM_NAME = re.compile(
    r"(cls|reg|dist)_token|cls_pos|pos_embed(\.\d\.(weight|bias))?"
    r"|(patch_embed|norm_pre|norm|fc_norm|attn_pool|head|head_dist)\..+"
    r"|blocks\.\d+\.((norm[12]|attn\.(qkv|q_norm|k_norm|norm|proj)|mlp\.(fc1|norm|fc2))\.(weight|bias)|ls[12]\.gamma)"
)
HEADS = ("head", "head_dist")
CATEGORIES = "head.category.0.weight"
CLASS_TOKEN = ("cls_token", "cls_pos")
AFTER_BLOCKS = re.compile(r"(norm|fc_norm|attn_pool|head|head_dist)\.")
SPECTROGRAM = "positions of a spectrogram laid out frequency by time"
WIDE_HEAD = "head for the class token and the mean of the patches together, where timm's takes only one"
ANY_WRAPPING = re.compile(r"(?:(?:module|_orig_mod|model|backbone)\.)*")
"""The prefixes that torch's and Lightning's wrappers give every name."""


@dataclass
class Report:
    """What happened to every entry of a file.

    Attributes:
        format: the format that was recognised.
        used: name in the file -> the timm name that it went to, the first of several.
        dropped: name in the file -> why it was left out.
        changed: timm name -> what was done to it beyond renaming.
        initialised: the model's names that the file has no entry for; they keep their values.
        weights: "ema" or "raw", whichever was read from a file that holds the weights and their moving average; None if
            it holds only one of them.
    """

    format: Format
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    weights: Weights | None = None

    def drop(self, name: str, reason: str) -> None:
        """Mark every entry of the file that went to the timm name `name` as dropped."""
        for source in self.sources(name):
            del self.used[source]
            self.dropped[source] = reason
        self.changed.pop(name, None)

    def sources(self, name: str) -> list[str]:
        """The entries of the file that went to the timm name `name`."""
        return [source for source, target in self.used.items() if target == name]

    def __str__(self) -> str:
        entries = len(self.used) + len(self.dropped)
        lines = [f"{self.format.name}: {entries} entries, {len(self.used)} used, {len(self.dropped)} dropped"]
        if self.weights is not None:
            lines[0] += f"; {TAKEN[self.weights]}"
        lines += _grouped("dropped", self.dropped)
        lines += _grouped("changed", self.changed)
        lines += _grouped("kept as initialised", dict.fromkeys(self.initialised, "not in the file"))
        return "\n".join(lines)


def _grouped(title: str, reasons: Mapping[str, str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return [f"{title} ({reason}): {', '.join(names)}" for reason, names in groups.items()]


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
    """Convert a state dict of any format in `FORMATS` to the entries of a timm VisionTransformer.

    Dtypes are kept. Query, key and value are joined into timm's `qkv`, with zeros for the key bias if only the others
    have one; gate and up of a gated MLP are joined into `fc1`. Blocks in chunks are put in order. In a DINOv2 with
    registers, the class token's position is added to the token, as in timm. The decoder, the mask token and anything
    else that has no place in a timm model are left out. A file does not say how its model computes: Wav2Vec2's blocks
    may normalise after the layers, and CLIP's use another activation.

    Returns:
        The converted entries, and what happened to every entry of `state_dict`.

    Raises:
        TypeError: `state_dict` holds anything but named tensors.
        ValueError: the format or an entry is unknown, a weight is missing or has the wrong shape, two entries have the
            same place, parts differ in dtype, or a floating entry has one byte, to be scaled by another entry. The
            message names the entry.
    """
    check_state_dict(state_dict)
    try:
        return _converted(state_dict)
    except ValueError as error:
        raise ValueError(f"state_dict: {error}") from None


def _converted(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
    body = find_body(state_dict)
    source_format, root = _recognise(body)
    weights_of_blocks(state_dict, body)
    report = Report(source_format)
    tensors: dict[str, Tensor] = {}
    for source, tensor in state_dict.items():
        name = _normalised(source, body, root)
        drops = source_format.drops if source.startswith(root) else source_format.outside + source_format.drops
        reason = next((reason for pattern, reason in drops if re.match(pattern, name)), None)
        if reason is not None:
            report.dropped[source] = reason
            continue
        if tensor.is_floating_point() and tensor.element_size() == 1:
            raise ValueError(f"{source}: expected a floating dtype of 16 bits or more, got {tensor.dtype}")
        name = _renamed(name, source_format)
        if name in tensors:
            raise ValueError(f"{source}: a second entry for {name}, beside {report.sources(name)[0]}")
        tensors[name] = tensor
        report.used[source] = name
    _join_parts(tensors, report)
    _reshape(tensors, report)
    if adapters := [source for source, name in report.used.items() if ADAPTER.match(name)]:
        raise ValueError(f"{adapters[0]}: the blocks have adapters, which timm's do not have")
    if unknown := [source for source, name in report.used.items() if not TIMM_NAME.fullmatch(name)]:
        raise ValueError(f"unknown entries for the format {source_format.name}: {', '.join(unknown)}")
    _require_biases(tensors, body.depth(), report)
    head, width = tensors.get("head.weight"), len(tensors["blocks.0.attn.proj.weight"])
    if head is not None and head.shape[1:] == (2 * width,):  # DINOv2's
        _leave_out(dict.fromkeys(("head.weight", "head.bias"), WIDE_HEAD), tensors, report)
    return tensors, report


def _recognise(body: Body) -> tuple[Format, str]:
    """The format of the blocks, and the prefix of every name in the transformer."""
    place = f"{body.prefix}{body.layers['attn.qkv'][-1]} {body.layers['mlp.fc1'][0]}"
    for candidate in FORMATS:
        if match := re.fullmatch(rf"((?:.+\.)?){candidate.blocks}", place):
            return candidate, match[1]
    known = "; ".join(candidate.name for candidate in FORMATS)
    got = ", ".join(f"{body.prefix}0.{name}" for names in body.layers.values() for name in names)
    raise ValueError(f"expected transformer blocks named as in one of {known}; got {got}")


def _normalised(source: str, body: Body, root: str) -> str:
    """A name without the transformer's prefix; in the blocks, with `blocks.i.` and timm's names of linear layers."""
    if source in body.places:
        number, inside = body.places[source]
        return f"blocks.{number}.{inside_block(inside, body.layers)}"
    wrapping = re.findall(ANY_WRAPPING, source)[0]
    return source.removeprefix(root if source.startswith(root) else wrapping if root.startswith(wrapping) else "")


def _renamed(name: str, source_format: Format) -> str:
    for pattern, replacement in source_format.renames:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _join_parts(tensors: dict[str, Tensor], report: Report) -> None:
    has_key_bias = any(name.endswith(".attn.key.bias") for name in tensors)
    joined: dict[str, dict[str, Tensor]] = {}
    for name in list(tensors):
        if match := PART.fullmatch(name):
            layer = next(layer for layer, names in PARTS.items() if match[2] in names)
            target = f"{match[1]}{layer}.{match[3]}"
            joined.setdefault(target, {})[match[2]] = tensors.pop(name)
            report.used[report.sources(name)[0]] = target
    for name, parts in joined.items():
        sources = report.sources(name)
        if name in tensors:
            raise ValueError(f"{name}: expected one whole or several parts, got both ({', '.join(sources)})")
        entries = dict(zip(sources, parts.values(), strict=True))
        require_one_dtype(entries)
        names = next(names for layer, names in PARTS.items() if f".{layer}." in name)
        report.changed[name] = f"{', '.join(names[:-1])} and {names[-1]} joined"
        if name.endswith(".attn.qkv.bias") and not has_key_bias:
            parts["key"] = torch.zeros_like(next(iter(parts.values())))
            report.changed[name] = "zeros between the biases of query and value"
        if missing := [part for part in names if part not in parts]:
            raise ValueError(f"{name}: no {' and no '.join(missing)} to join with {', '.join(sources)}")
        if len({part.shape for part in parts.values()}) > 1:
            shapes = ", ".join(f"{source} {tuple(part.shape)}" for source, part in entries.items())
            raise ValueError(f"{name}: expected parts of one shape, got {shapes}")
        tensors[name] = torch.cat([parts[part] for part in names])


def _reshape(tensors: dict[str, Tensor], report: Report) -> None:
    """Reshape the entries that have another shape in a timm model."""
    for name, tensor in list(tensors.items()):
        if name == CATEGORIES and tensor.ndim == 3:
            new, what = {name: tensor.squeeze(2).T}, "convolution of one-hot categories as an embedding"
        elif name == "class_embedding":
            new, what = {"cls_token": tensor.reshape(1, 1, -1)}, "leading dimensions"
        elif name == "position_embedding.weight":
            new, what = {"pos_embed": tensor.unsqueeze(0)}, "leading dimension"
        elif name == "register_tokens":
            token, positions = tensors.get("cls_token"), tensors.get("pos_embed")
            if token is None or positions is None or positions.ndim != 3 or token.shape != (1, 1, positions.shape[2]):
                raise ValueError(f"{report.sources(name)[0]}: expected a class token with a position beside it")
            tensors["cls_token"], tensors["pos_embed"] = token + positions[:, :1], positions[:, 1:]
            report.changed["cls_token"] = report.changed["pos_embed"] = "class token's position added to it"
            new, what = {"reg_token": tensor}, ""
        elif name.startswith("attn_pool.qkv.") and tensor.ndim:
            query, key_value = tensor.tensor_split([len(tensor) // 3])
            kind = name.rpartition(".")[2]
            new = {f"attn_pool.q.{kind}": query, f"attn_pool.kv.{kind}": key_value}
            what = "query split from key and value"
        else:
            continue
        if existing := [other for other in new if other != name and other in tensors]:
            raise ValueError(f"{report.sources(name)[0]}: a second entry for {existing[0]}")
        for source in report.sources(name):
            report.used[source] = next(iter(new))
        del tensors[name]
        tensors.update(new)
        report.changed.update({name: what for name in new if what})


def _require_biases(tensors: Mapping[str, Tensor], depth: int, report: Report) -> None:
    for name in (f"blocks.{index}.{layer}" for index in range(depth) for layer in LAYER_NAMES):
        bias, rows = tensors.get(f"{name}.bias"), tensors[f"{name}.weight"].shape[:1]
        if bias is not None and bias.shape != rows:
            sources = ", ".join(report.sources(f"{name}.bias"))
            raise ValueError(f"{sources}: expected shape {tuple(rows)}, got {tuple(bias.shape)}")


def read_checkpoint(path: str | os.PathLike, weights: Weights | None = None) -> tuple[dict[str, Tensor], Report]:
    """Read a file, or a folder that Hugging Face's `save_pretrained` wrote, and convert it by `convert_state_dict`.

    Args:
        path, weights: as in `m2pt.checkpoints.load_state_dict`: "raw" for the weights, "ema" for their moving average.

    Raises:
        TypeError: `path` is not a path.
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint, not of a known format, or without such `weights`.
    """
    state_dict, taken = read_weights(path, weights)
    try:
        tensors, report = _converted(state_dict)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    report.weights = taken
    return tensors, report


class LinearLayers(nn.Module):
    """The linear layers of a transformer, which are all that surgery reads. It cannot be called.

    Attributes:
        blocks: as in timm, but with linear layers only.
        weights: "ema", "raw" or None, as in `Report`.
    """

    blocks: nn.ModuleList
    weights: Weights | None


def load_auxiliary(path: str | os.PathLike, weights: Weights | None = None) -> LinearLayers:
    """Load the linear layers of the transformer in a checkpoint, for `reparameterize_aux_into_target_model`.

    Only what surgery reads is built: `blocks.i.attn.qkv`, `attn.proj`, `mlp.fc1` and `mlp.fc2`, without biases, with
    the file's depth, widths and dtype, on the CPU. It cannot be called. Everything else in the file is ignored, and so
    is any prefix of the blocks, which are named as in any family of `m2pt.families`. The rows of query, key and value
    are joined, and so are those of a gated MLP: first the gate's, then the others.

    Args:
        path, weights: as in `read_checkpoint`.

    Returns:
        The linear layers; their attribute `weights` says which were read from a file with weights and their average.

    Raises:
        TypeError: `path` is not a path.
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint; no such `weights`; no transformer or several; or a weight that is
            missing, has one byte per entry, or does not fit the others.
    """
    state_dict, taken = read_weights(path, weights)
    try:
        blocks = linear_weights(state_dict)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    body = LinearLayers()
    body.weights = taken
    body.blocks = nn.ModuleList()
    for tensors in blocks:
        block = nn.ModuleDict({"attn": nn.ModuleDict(), "mlp": nn.ModuleDict()})
        for layer, weight in tensors.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            block.set_submodule(layer, linear)
        body.blocks.append(block)
    return body


def load_pretrained(model: nn.Module, path: str | os.PathLike, weights: Weights | None = None) -> Report:
    """Load a checkpoint of any known format into a model of `m2pt.models` or a timm VisionTransformer, in place.

    Everything has to fit, with these exceptions:

    - Positions of another grid are resampled, or left out if the model computes its own. They may be missing if the
      file has relative ones.
    - A head of another shape is left out, and so are layers after the blocks that the model does not have.
    - The head and other layers after the blocks may be missing in the file.
    - A class token with a position of its own, as for point clouds, may be missing on either side.
    - A distillation token that the model does not have is left out, with its position. In the audio model, AST's
      patches (frequency by time) are then transposed, and its positions left out.
    - From a file with nothing before the blocks, such as a speech model's, the blocks and what follows them are loaded;
      the model keeps its own embedding.

    Args:
        model: what to load into.
        path, weights: as in `read_checkpoint`.

    Returns:
        What happened to every entry of the file, and what the model keeps of its own.

    Raises:
        TypeError: `model` is not a module, or `path` not a path.
        FileNotFoundError: no such file.
        ValueError: the model has no data or is divided among processes, or the file is not a readable checkpoint of a
            known format, or does not fit: the message names the entry, and the model is as it was.
    """
    check_module("model", model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("model: expected one with data, got one on the meta device")
    check_undivided(model, "load the file before dividing the model")
    tensors, report = read_checkpoint(path, weights)
    own = model.state_dict()
    is_embedded = not all(name.startswith("blocks.") or AFTER_BLOCKS.match(name) for name in tensors)
    try:
        _leave_out(_to_leave_out(tensors, own), tensors, report)
        if "dist_token" in tensors and "dist_token" not in own:
            _leave_distillation_out(model, tensors, report)
        if "pos_embed" in tensors and tensors["pos_embed"].shape != own["pos_embed"].shape:
            tensors["pos_embed"], report.changed["pos_embed"] = _positions_for(model, tensors["pos_embed"])
        report.initialised = [name for name in own if name not in tensors]
        _require_fit(tensors, own, report, is_embedded)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {type(model).__name__}: {error}") from None
    model.load_state_dict(own | tensors)
    return report


def _to_leave_out(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    reasons = {name: "the model has no such layer" for name in tensors if AFTER_BLOCKS.match(name) and name not in own}
    for head in HEADS:
        theirs, ours = (
            {name: value.shape for name, value in entries.items() if name.startswith(f"{head}.")}
            for entries in (tensors, own)
        )
        if ours and theirs != ours:
            reasons |= dict.fromkeys(theirs, "the model's head has other shapes")
    if "cls_pos" in tensors and "cls_pos" not in own:
        reasons |= {name: "the model has no class token" for name in CLASS_TOKEN if name in tensors}
    if "pos_embed" in tensors and "pos_embed" not in own:
        reasons["pos_embed"] = "the model computes its positions"
    return reasons


def _leave_out(reasons: Mapping[str, str], tensors: dict[str, Tensor], report: Report) -> None:
    for name, reason in reasons.items():
        if tensors.pop(name, None) is not None:
            report.drop(name, reason)


def _leave_distillation_out(model: nn.Module, tensors: dict[str, Tensor], report: Report) -> None:
    reasons = {"dist_token": "the model has no distillation token"}
    patches, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    is_audio = isinstance(getattr(model, "patch_drop", None), SpectrogramDropout)
    if is_audio and patches is not None and patches.ndim == 4 and patches.shape[1] == 1:
        tensors["patch_embed.proj.weight"] = patches.mT.contiguous()
        report.changed["patch_embed.proj.weight"] = "frequency by time turned into time by frequency"
        reasons["pos_embed"] = SPECTROGRAM
    elif positions is not None and positions.ndim == 3:
        tensors["pos_embed"] = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
        report.changed["pos_embed"] = "without the distillation token's"
    _leave_out(reasons, tensors, report)


def _positions_for(model: nn.Module, positions: Tensor) -> tuple[Tensor, str]:
    """Positions for the model's grid, and what was done to them.

    A file says how many positions it has but not how they are arranged. They are assumed to form a square, or, for a
    spectrogram (one channel, a grid that is not square), to have as many columns (frequencies) as the model. Its rows
    are time steps of one length, so a shorter one gets the first of them (as in AudioMAE); all else is resampled.
    """
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    if positions.ndim != 3 or len(positions) != 1 or positions.shape[1] <= prefix:
        raise ValueError(f"pos_embed: expected shape (1, positions, width), got {tuple(positions.shape)}")
    patch_embed: Any = model.patch_embed
    rows, columns = patch_embed.grid_size
    count = positions.shape[1] - prefix
    spectrogram = patch_embed.proj.in_channels == 1 and rows != columns
    old_columns = columns if spectrogram else math.isqrt(count)
    old_rows = count // old_columns
    if old_rows * old_columns != count:
        raise ValueError(f"pos_embed: {count} positions do not make a grid to resample to {rows} x {columns}")
    if spectrogram and rows < old_rows:
        return positions[:, : prefix + rows * columns], f"first {rows} of {old_rows} time steps"
    resampled = resample_abs_pos_embed(positions, [rows, columns], [old_rows, old_columns], prefix)
    return resampled, f"resampled from {old_rows} x {old_columns} to {rows} x {columns}"


def _require_fit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], report: Report, is_embedded: bool) -> None:
    if unexpected := [source for source, name in report.used.items() if name not in own]:
        raise ValueError(f"there is no place for {', '.join(unexpected)}")
    required = [
        name
        for name in report.initialised
        if not AFTER_BLOCKS.match(name) and (is_embedded or name.startswith("blocks."))
    ]
    optional = {"pos_embed"} if not {RELATIVE, SPECTROGRAM}.isdisjoint(report.dropped.values()) else set()
    optional |= set(CLASS_TOKEN) if "cls_pos" in own else set()
    if missing := [name for name in required if name not in optional]:
        raise ValueError(f"missing in the file: {', '.join(missing)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            names = ", ".join(dict.fromkeys([name, *report.sources(name)]))
            raise ValueError(f"{names}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
