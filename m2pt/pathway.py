"""Works on connected models: inspects them, quantises them, freezes them for a probe, and merges their pathways."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from m2pt_kernels import dequantize
from m2pt_kernels.divided import flattened_modules, fsdp_modules, is_divided, whole

from .calls import is_known_to_read, stop_watching
from .checks import check_kind, qualified_name
from .linear import FusedCrossModalLinear, kept
from .replacement import has_multiplied
from .tensor_checks import check_module

GATHER = (
    "gather its state dict with torch.distributed.checkpoint.state_dict.get_model_state_dict(model,"
    " options=StateDictOptions(full_state_dict=True))"
)


def quantize_aux(model: nn.Module, dtype: str = "int8") -> nn.Module:
    """Store the frozen auxiliary weight of every fused layer in fewer bytes, in place and one layer at a time.

    Bytes per weight: "bfloat16" 2, "int8" and "float8_e4m3fn" 1 (a scale per output row), "int4" 0.56 (one per 64
    columns). The model computes with the stored values from then on, `merge_pathways` too; the auxiliary model is left
    alone. `quantization_errors` tells beforehand what it changes.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no fused layer below `model`, one that is divided among processes, or an auxiliary weight that is
            trainable, quantised already, not finite, or does not fit `dtype` (the message names its layer; the model is
            as it was).
    """
    require_whole(model, "quantise the auxiliary weights before dividing the model")
    for check_only in (True, False):
        for layer, (name, *_) in places(model).items():
            try:
                layer.quantized_aux(dtype) if check_only else layer.quantize_aux(dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return model


class QuantizationErrors(NamedTuple):
    """Relative errors: the Frobenius norm of the change divided by that of what is changed."""

    aux_weights: dict[str, float]
    """Of `cross_modal_scale * aux_weight`, by the layer's dotted name."""
    output: float | None
    """Of the model's output for the given inputs; None without inputs."""


@torch.no_grad()
def quantization_errors(model: nn.Module, dtype: str, *inputs: Tensor) -> QuantizationErrors:
    """How much `quantize_aux(model, dtype)` would change; the model is left alone.

    The output is compared at the model's own scales: as long as they are zero, nothing changes. Takes the memory of a
    float32 copy of the auxiliary weights. Call `model.eval()` first if the model drops anything at random.

    Args:
        model: a connected model whose auxiliary weights are not quantised yet.
        dtype: as `quantize_aux` takes it.
        inputs: the arguments of a forward pass that returns one tensor, such as a batch of validation images.

    Raises:
        TypeError, ValueError: as in `quantize_aux`; or the model has no data.
    """
    require_whole(model, "ask before dividing the model")
    stored, errors = {}, {}
    for layer, (name, *_) in places(model).items():
        require_data(layer)
        try:
            data, scale = layer.quantized_aux(dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        stored[f"{name}.aux_weight"] = data if scale is None else dequantize(data, scale)
        errors[name] = _relative_error(stored[f"{name}.aux_weight"], layer.aux_weight)
    if not inputs:
        return QuantizationErrors(errors, None)
    return QuantizationErrors(errors, _relative_error(functional_call(model, stored, inputs), model(*inputs)))


def _relative_error(found: Tensor, exact: Tensor) -> float:
    change = (found.double() - exact.double()).norm().item()
    return change / exact.double().norm().item() if change else 0.0


def merge_pathways(model: nn.Module) -> nn.Module:
    """Turn every fused layer into a plain `nn.Linear` holding `W + s * W_aux`, in place and one layer at a time.

    The result computes what the connected model computed, at the cost of a plain model (M2PT, section 3.2).

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no fused layer below `model`, one that is divided among processes, a merged weight that is not
            finite, a layer whose weight is read other than by calling it, as by peft's DoRA, or has been multiplied by
            an adapter, or hooks on a layer or its weight, which would be lost (the message names the layer; the model
            is as it was).
    """
    require_whole(model, f"{GATHER}, and merge that with m2pt.checkpoints.merge_state_dict")
    layers = places(model)
    for layer, (name, *_) in layers.items():
        parent, _, own_name = name.rpartition(".")
        if is_known_to_read(around := model.get_submodule(parent), own_name):
            change = "reads its weight, so merging would change that module's output: merge before wrapping"
            raise ValueError(f"{name}: {qualified_name(around)} {change}")
        if has_multiplied(around):
            change = "has multiplied its weight, but not its auxiliary weight: unmerge_adapter() first"
            raise ValueError(f"{name}: {qualified_name(around)} {change}")
        try:
            layer.merge()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for layer, names in layers.items():
        merged = layer.merge()
        for name in names:
            model.set_submodule(name, merged)
    for module in model.modules():
        stop_watching(module)
    return model


@contextmanager
def disabled_pathways(model: nn.Module) -> Iterator[None]:
    """Inside the block the fused layers compute `x weight^T + bias`, as plain linear layers do, bit for bit.

    Copies that are made inside the block stay disabled.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no fused layer below `model`.
    """
    were_enabled = {layer: layer.is_enabled for _, layer in fused_layers(model)}
    try:
        for layer in were_enabled:
            layer.is_enabled = False
        yield
    finally:
        for layer, was_enabled in were_enabled.items():
            layer.is_enabled = was_enabled


def fused_layers(model: nn.Module) -> list[tuple[str, FusedCrossModalLinear]]:
    """Every place of a fused layer below `model`; a layer that is used twice has two.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no fused layer.
    """
    check_module("model", model)
    named = model.named_modules(remove_duplicate=False)
    layers = [(name, module) for name, module in named if name and isinstance(module, FusedCrossModalLinear)]
    if not layers:
        raise ValueError(f"model: there is no FusedCrossModalLinear inside this {type(model).__name__}")
    return layers


def require_whole(model: nn.Module, remedy: str) -> None:
    for name, _ in fused_layers(model):
        if is_divided(model, name):
            raise ValueError(f"{name}: divided among processes: {remedy}")


def require_data(layer: nn.Linear) -> None:
    if layer.weight.is_meta:
        raise ValueError("model: expected one with data, got one on the meta device")


def places(model: nn.Module) -> dict[FusedCrossModalLinear, list[str]]:
    """Every fused layer below `model` once, with the names of its places."""
    places: dict[FusedCrossModalLinear, list[str]] = {}
    for name, layer in fused_layers(model):
        places.setdefault(layer, []).append(name)
    return places


def cross_modal_scales(model: nn.Module) -> dict[str, float]:
    """The learned scale of every fused layer, by the layer's dotted name.

    With several auxiliary models a layer has one for each, named by the layer and the model's number in brackets.
    Scales that are divided among processes are gathered: then every process has to call this.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no fused layer below `model`, no data in it, or one that `FullyShardedDataParallel` divides.
    """
    scales: dict[str, float] = {}
    layers = fused_layers(model)
    if flattened_modules(model.modules()):
        raise ValueError(f"model: FullyShardedDataParallel has divided it: {GATHER}, which has the scales")
    for name, layer in layers:
        require_data(layer)
        several = whole(layer.cross_modal_scale.detach()).tolist()
        scales |= {name if len(several) == 1 else f"{name}[{i}]": scale for i, scale in enumerate(several)}
    return scales


def mean_absolute_scales(model: nn.Module) -> dict[str, float]:
    """The mean absolute scale of every auxiliary model, by its name.

    Raises:
        TypeError, ValueError: as in `cross_modal_scales`, which it calls.
    """
    scales = iter(cross_modal_scales(model).values())
    found: dict[str, list[float]] = {}
    for _, layer in fused_layers(model):
        for auxiliary in layer.auxiliaries:
            found.setdefault(auxiliary.model, []).append(abs(next(scales)))
    return {name: fmean(own) for name, own in found.items()}


def describe_pathways(model: nn.Module) -> str:
    """Describe the connections in a Markdown table, with a row for every auxiliary weight of every fused layer.

    The columns show the layer; the auxiliary model; its layers that were read, with `[rows]` after one that was split;
    how the weight is stored and whether it is trained; the scale and whether it is trained; and whether the layer has
    been called since it was connected, other than in compiled code. As with `cross_modal_scales`, every process has to
    call this.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no fused layer below `model`, or no data in it.
    """
    scales = iter(cross_modal_scales(model).values())
    lines = ["| layer | auxiliary model | read from | aux_weight | cross_modal_scale | called |", "|---" * 6 + "|"]
    for name, layer in fused_layers(model):
        stored = f"{layer.storage}, {kept(layer.is_aux_trained)}"
        called = "yes" if layer.is_called else "not yet"
        for auxiliary in layer.auxiliaries:
            scale = f"{next(scales):+.4f}, {kept(layer.cross_modal_scale.requires_grad)}"
            lines.append(f"| {name} | {auxiliary.model} | {auxiliary.layers} | {stored} | {scale} | {called} |")
    return "\n".join(lines)


def scale_table(model: nn.Module) -> str:
    """The learned scales as a Markdown table, a row per block and a column per layer of a block.

    A block's name ends with the first number in a layer's name, as in `blocks.0` and `encoder_layer_0`. As with
    `cross_modal_scales`, every process has to call this.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no fused layer below `model`, or no data in it.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, scale in cross_modal_scales(model).items():
        parts = name.split(".")
        split = next((i for i, part in enumerate(parts[:-1], 1) if re.fullmatch(r"(.*_)?\d+", part)), 0)
        rows.setdefault(".".join(parts[:split]), {})[".".join(parts[split:])] = scale
    columns = list(dict.fromkeys(layer for row in rows.values() for layer in row))
    lines = ["| block | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for block, row in rows.items():
        cells = [f"{row[layer]:+.4f}" if layer in row else "" for layer in columns]
        lines.append(f"| {block} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def freeze_for_linear_probe(model: nn.Module, head_name: str = "head") -> nn.Module:
    """Freeze everything but the head and the cross-modal scales (M2PT's linear probing).

    Args:
        model: a connected model.
        head_name: the dotted name of the head.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module, or `head_name` not a string.
        ValueError: the model has no such head with parameters, or no fused layer.
    """
    layers = fused_layers(model)
    check_kind(str, "a dotted name", head_name=head_name)
    try:
        head = model.get_submodule(head_name)
    except AttributeError:
        raise ValueError(f"head_name: {type(model).__name__} has no module {head_name!r}") from None
    if head is model or next(head.parameters(), None) is None:
        raise ValueError(f"head_name: expected a module with parameters, but {head_name!r} is a {type(head).__name__}")
    for module in fsdp_modules(model.modules()):
        module.reshard()  # flags set on parameters that are whole for a while would be lost
    model.requires_grad_(False)
    head.requires_grad_(True)
    for _, layer in layers:
        layer.cross_modal_scale.requires_grad_(True)
    return model
