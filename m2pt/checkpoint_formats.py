"""Checkpoints of other projects: recognised by their names, renamed as timm names them, every entry accounted for.

An entry that no format knows is an error rather than a warning: it is either a part of the model that would silently be
lost, or a sign that the file is not what it seems.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from m2pt_kernels.divided import check_undivided

from .checkpoints import load_state_dict
from .checks import check_module, check_state_dict
from .families import LAYER_NAMES

PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class Format:
    """How a project names the parts of its transformer, as regular expressions for the beginnings of names.

    Attributes:
        name: what the report calls it.
        marker: a name that only files of this format have.
        prefix: taken off a name before anything else.
        renames: pattern and replacement; the first that matches is used.
        drops: pattern and the reason why such an entry is left out, tried before `renames`.
        zero_key_bias: whether the projection of the keys has no bias where the others have one.
    """

    name: str
    marker: str
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    drops: tuple[tuple[str, str], ...] = ()
    zero_key_bias: bool = False


FORMATS = (
    Format(
        name="Hugging Face ViT",
        marker=r"(vit\.)?encoder\.layer\.\d",
        prefix=r"vit\.",
        renames=(
            (r"embeddings\.cls_token", "cls_token"),
            (r"embeddings\.position_embeddings", "pos_embed"),
            (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
            (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
            (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
            (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
            (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
            (r"encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
            (r"layernorm\.", "norm."),
            (r"classifier\.", "head."),
        ),
        drops=(
            (r"decoder\.", "decoder"),
            (r"embeddings\.mask_token", "mask token"),
            (r"pooler\.", "pooler, which timm has none of"),
        ),
    ),
    Format(
        name="Point-MAE",
        marker=r"(MAE_encoder\.)?blocks\.blocks\.\d",
        prefix=r"MAE_encoder\.",
        renames=(
            (r"blocks\.blocks\.", "blocks."),
            (r"encoder\.", "patch_embed."),
            (r"cls_head_finetune\.", "head."),
            (r"label_conv\.", "head.category."),
            (r"propagation_0\.mlp_convs\.0\.", "head.propagation.0."),
            (r"propagation_0\.mlp_bns\.0\.", "head.propagation.1."),
            (r"propagation_0\.mlp_convs\.1\.", "head.propagation.3."),
            (r"propagation_0\.mlp_bns\.1\.", "head.propagation.4."),
            (r"convs1\.", "head.classifier.0."),
            (r"bns1\.", "head.classifier.1."),
            (r"convs2\.", "head.classifier.4."),
            (r"bns2\.", "head.classifier.5."),
            (r"convs3\.", "head.classifier.7."),
        ),
        drops=(
            (r"MAE_decoder\.|decoder_pos_embed\.|increase_dim\.", "decoder"),
            (r"mask_token", "mask token"),
        ),
    ),
    Format(
        name="VideoMAE",
        marker=r"(encoder|backbone)\.blocks\.\d|blocks\.\d+\.attn\.[qv]_bias",
        prefix=r"(encoder|backbone)\.",
        renames=(
            (r"blocks\.(\d+)\.attn\.q_bias", r"blocks.\1.attn.query.bias"),
            (r"blocks\.(\d+)\.attn\.v_bias", r"blocks.\1.attn.value.bias"),
        ),
        drops=((r"decoder\.|encoder_to_decoder\.", "decoder"), (r"mask_token", "mask token")),
        zero_key_bias=True,
    ),
    Format(
        name="timm or MAE",
        marker=r"blocks\.\d",
        drops=((r"decoder_", "decoder"), (r"mask_token", "mask token")),
    ),
)

WRAPPING = r"(?:(?:module|_orig_mod)\.)*"
"""What torch's wrappers of whole models put before every name."""

TIMM_NAME = re.compile(
    r"(cls|reg|dist)_token|cls_pos|pos_embed(\.\d\.(weight|bias))?"
    r"|(patch_embed|norm_pre|norm|fc_norm|attn_pool|head|head_dist)\..+"
    r"|blocks\.\d+\.((norm[12]|attn\.(qkv|q_norm|k_norm|norm|proj)|mlp\.(fc1|norm|fc2))\.(weight|bias)|ls[12]\.gamma)"
)
PROJECTION = re.compile(r"(blocks\.\d+\.attn)\.(query|key|value)\.(weight|bias)")
HEAD = re.compile(r"(head|head_dist)\.")
CATEGORIES = "head.category.0.weight"
CLASS_TOKEN = ("cls_token", "cls_pos")
AFTER_BLOCKS = re.compile(r"(norm|fc_norm|attn_pool|head|head_dist)\.")


@dataclass
class Report:
    """What became of every entry of a file.

    Attributes:
        format: the format that was recognised.
        used: name in the file -> the timm name that it went to.
        dropped: name in the file -> why it was left out.
        changed: timm name -> what was done to it beyond renaming.
        initialised: names of the model that the file has nothing for; they are as they were.
    """

    format: Format
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)

    def drop(self, name: str, reason: str) -> None:
        """Take back every entry of the file that went to the timm name `name`."""
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
    """The entries of a timm VisionTransformer, from a state dict of any format in `FORMATS`.

    Dtypes are kept. Query, key and value are joined into timm's `qkv`; VideoMAE's `q_bias` and `v_bias` into its bias,
    with zeros between them. Decoder, mask token and what else has no place in a timm model are left out.

    Returns:
        The converted entries, and what became of every entry of `state_dict`.

    Raises:
        TypeError: `state_dict` holds something else than named tensors.
        ValueError: no known format, an unknown entry, a weight that is missing or of the wrong shape, or two entries
            for one place. The message names the entry.
    """
    check_state_dict(state_dict)
    try:
        return _converted(state_dict)
    except ValueError as error:
        raise ValueError(f"state_dict: {error}") from None


def _converted(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Report]:
    wrapping = min((re.findall(WRAPPING, source)[0] for source in state_dict), key=len, default="")
    source_format = _recognise([source.removeprefix(wrapping) for source in state_dict])
    report = Report(source_format)
    tensors: dict[str, Tensor] = {}
    for source, tensor in state_dict.items():
        name = re.sub(f"^(?:{source_format.prefix})", "", source.removeprefix(wrapping))
        reason = next((reason for pattern, reason in source_format.drops if re.match(pattern, name)), None)
        if reason is not None:
            report.dropped[source] = reason
            continue
        name = _renamed(name, source_format)
        if name in tensors:
            raise ValueError(f"{source}: a second entry for {name}, beside {report.sources(name)[0]}")
        tensors[name] = tensor
        report.used[source] = name
    _join_projections(tensors, report)
    if CATEGORIES in tensors and tensors[CATEGORIES].ndim == 3:
        tensors[CATEGORIES] = tensors[CATEGORIES].squeeze(2).T
        report.changed[CATEGORIES] = "convolution of one-hot categories as an embedding"
    _require_timm_names(tensors, report)
    _require_blocks(tensors)
    return tensors, report


def _recognise(names: Sequence[str]) -> Format:
    for candidate in FORMATS:
        if any(re.match(candidate.marker, name) for name in names):
            return candidate
    known = ", ".join(candidate.name for candidate in FORMATS)
    raise ValueError(f"expected transformer blocks named as in one of {known}; got {', '.join(names[:3]) or 'nothing'}")


def _renamed(name: str, source_format: Format) -> str:
    for pattern, replacement in source_format.renames:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _join_projections(tensors: dict[str, Tensor], report: Report) -> None:
    zero_key_bias = report.format.zero_key_bias
    joined: dict[str, dict[str, Tensor]] = {}
    for name in list(tensors):
        if match := PROJECTION.fullmatch(name):
            joined.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = tensors.pop(name)
            report.used[report.sources(name)[0]] = f"{match[1]}.qkv.{match[3]}"
    for name, parts in joined.items():
        sources = ", ".join(report.sources(name))
        if name in tensors:
            raise ValueError(f"{name}: expected one whole or three parts, got both ({sources})")
        if zero_key_bias and "query" in parts:
            parts.setdefault("key", torch.zeros_like(parts["query"]))
        if missing := [part for part in PARTS if part not in parts]:
            raise ValueError(f"{name}: no {' and no '.join(missing)} to join with {sources}")
        if len({part.shape for part in parts.values()}) > 1:
            raise ValueError(f"{name}: expected parts of one shape, got {[tuple(p.shape) for p in parts.values()]}")
        tensors[name] = torch.cat([parts[part] for part in PARTS])
        report.changed[name] = "zeros between q_bias and v_bias" if zero_key_bias else "query, key and value joined"


def _require_timm_names(tensors: Mapping[str, Tensor], report: Report) -> None:
    if any(name.endswith(".cross_modal_scale") for name in tensors):
        raise ValueError("the model in it is connected to an auxiliary one: fold it first, with `m2pt merge`")
    if unknown := [source for source, name in report.used.items() if not TIMM_NAME.fullmatch(name)]:
        raise ValueError(f"unknown entries for the format {report.format.name}: {', '.join(unknown)}")


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)


def _require_blocks(tensors: Mapping[str, Tensor]) -> None:
    """Every block has its four weights, and their shapes fit together."""
    for index in range(_depth(tensors)):
        names = [f"blocks.{index}.{layer}" for layer in LAYER_NAMES]
        for name in names:
            weight = tensors.get(f"{name}.weight")
            if weight is None:
                raise ValueError(f"{name}.weight is missing")
            if weight.ndim != 2 or not weight.is_floating_point():
                got = f"{weight.dtype} of shape {tuple(weight.shape)}"
                raise ValueError(f"{name}.weight: expected a floating matrix, got {got}")
        qkv, proj, fc1, fc2 = (tensors[f"{name}.weight"] for name in names)
        width, inner, hidden = qkv.shape[1], proj.shape[1], fc1.shape[0]
        shapes = ((3 * inner, width), (width, inner), (hidden, width), (width, hidden))
        for name, weight, shape in zip(names, (qkv, proj, fc1, fc2), shapes, strict=True):
            bias = tensors.get(f"{name}.bias")
            if weight.shape != shape:
                raise ValueError(f"{name}.weight: expected shape {shape}, got {tuple(weight.shape)}")
            if bias is not None and bias.shape != shape[:1]:
                raise ValueError(f"{name}.bias: expected shape {shape[:1]}, got {tuple(bias.shape)}")


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Tensor], Report]:
    """`convert_state_dict` of a file.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint, or not one of a known format.
    """
    state_dict = load_state_dict(path)
    try:
        return _converted(state_dict)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def load_auxiliary(path: str | os.PathLike) -> nn.Module:
    """The linear layers of the transformer in a checkpoint, for `reparameterize_aux_into_target_model`.

    Only what surgery reads is built: `blocks.i.attn.qkv`, `attn.proj`, `mlp.fc1` and `mlp.fc2`, without biases, of the
    file's own depth, widths and dtype, on the CPU. It cannot be called.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError: no such file.
        ValueError: not a readable checkpoint, or not one of a known format (see `convert_state_dict`).
    """
    tensors, _ = read_checkpoint(path)
    body = nn.Module()
    body.blocks = nn.ModuleList()
    for index in range(_depth(tensors)):
        block = nn.ModuleDict({"attn": nn.ModuleDict(), "mlp": nn.ModuleDict()})
        for layer in LAYER_NAMES:
            weight = tensors[f"blocks.{index}.{layer}.weight"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            block.set_submodule(layer, linear)
        body.blocks.append(block)
    return body


def load_pretrained(model: nn.Module, path: str | os.PathLike) -> Report:
    """Load a checkpoint of any known format into a model of `m2pt.models` or a timm VisionTransformer, in place.

    Everything has to fit, but for four things. Positions of another grid are resampled, or left out if the model
    computes its own. A head of other shapes is left out, and so are layers after the blocks that the model has none of.
    Head and other layers after the blocks may be missing in the file. A class token with a position of its own, a point
    cloud's, may be missing on either side.

    Returns:
        What became of every entry of the file, and what the model keeps of its own.

    Raises:
        TypeError: `model` is no module, or `path` no path.
        FileNotFoundError: no such file.
        ValueError: a model without data or divided among processes, not a readable checkpoint of a known format, or one
            that does not fit: the message names the entry, and the model is as it was.
    """
    check_module("model", model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("model: expected one with data, this one is on the meta device")
    check_undivided(model, "load the file before dividing the model")
    tensors, report = read_checkpoint(path)
    own = model.state_dict()
    try:
        for name, reason in _to_leave_out(tensors, own).items():
            del tensors[name]
            report.drop(name, reason)
        if "pos_embed" in tensors and tensors["pos_embed"].shape != own["pos_embed"].shape:
            tensors["pos_embed"], report.changed["pos_embed"] = _positions_for(model, tensors["pos_embed"])
        report.initialised = [name for name in own if name not in tensors]
        _require_fit(tensors, own, report)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {type(model).__name__}: {error}") from None
    model.load_state_dict(own | tensors)
    return report


def _to_leave_out(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    reasons = {name: "the model has no such layer" for name in tensors if AFTER_BLOCKS.match(name) and name not in own}
    heads = [{name: value.shape for name, value in entries.items() if HEAD.match(name)} for entries in (tensors, own)]
    if heads[0] != heads[1]:
        reasons |= dict.fromkeys(heads[0], "head of other shapes than the model's")
    if "cls_pos" in tensors and "cls_pos" not in own:
        reasons |= {name: "the model has no class token" for name in CLASS_TOKEN if name in tensors}
    if "pos_embed" in tensors and "pos_embed" not in own:
        reasons["pos_embed"] = "the model computes its positions"
    return reasons


def _positions_for(model: nn.Module, positions: Tensor) -> tuple[Tensor, str]:
    """Positions for the model's grid, and what was done.

    A file says how many positions it has but not how they lie. They are taken for a square; but a spectrogram's (one
    channel, a model that is not square) for as many columns, its frequencies, as the model has. Its rows are time steps
    of one length, so that a shorter one has the first of them (as in AudioMAE); all else is resampled.
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


def _require_fit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], report: Report) -> None:
    if unexpected := [source for source, name in report.used.items() if name not in own]:
        raise ValueError(f"there is no place for {', '.join(unexpected)}")
    required = [name for name in report.initialised if not AFTER_BLOCKS.match(name)]
    if missing := [name for name in required if not ("cls_pos" in own and name in CLASS_TOKEN)]:
        raise ValueError(f"missing in the file: {', '.join(missing)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
