"""Surgery: connect an auxiliary model to a target model, train what should be trained, fold the connection away."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from m2pt_kernels import dequantize
from m2pt_kernels.divided import flattened_modules, fsdp_modules, is_divided, whole

from .calls import Sample, check_calls, check_sample, is_known_to_read, stop_watching, watch_calls
from .checks import check_kind, check_module
from .hooks import check_no_hooks, has_forward_hooks
from .linear import FusedCrossModalLinear, is_plain_linear

GATHER = (
    "gather its state dict with torch.distributed.checkpoint.state_dict.get_model_state_dict(model,"
    " options=StateDictOptions(full_state_dict=True))"
)

LAYER_NAMES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def reparameterize_aux_into_target_model(
    target_model: nn.Module,
    aux_model: nn.Module | Sequence[nn.Module],
    layer_names: Sequence[str] = LAYER_NAMES,
    main_body_name: str = "blocks",
    is_aux_trainable: bool = False,
    aux_dtype: str | None = None,
    sample: Sample | None = None,
) -> nn.Module:
    """Replace linear layers of every block of the target by `FusedCrossModalLinear`, in place (M2PT, section 3.2).

    A layer whose weight its parent reads without calling the layer would not be connected: some such modules are known
    and refused, and a `sample` shows any other. Without a sample, the first forward pass of the target in training mode
    warns of layers that have not been called; that of a compiled target does not.

    Args:
        target_model: the model to improve; any module with a sequence of blocks, such as a timm VisionTransformer.
        aux_model: a model of another modality, with as many blocks and linear layers of the same shapes. It is left as
            it is; its weights' storage is shared. A sequence of such models connects them all, each with scales of
            its own, and copies their weights.
        layer_names: the linear layers of a block, as dotted names.
        main_body_name: the dotted name of the sequence of blocks, in both models.
        is_aux_trainable: whether the auxiliary weights are trained too.
        aux_dtype: how frozen auxiliary weights are stored, as `quantize_aux` takes it; None shares them as they are.
        sample: the input of a forward pass of `target_model`: a tensor, a tuple of arguments, or a mapping of keyword
            arguments. The target runs once with it, in evaluation mode, and has to call every connected layer.

    Returns:
        `target_model`.

    Raises:
        TypeError: an argument of another type, or an auxiliary weight that is not floating.
        ValueError: the models do not fit: a missing body or layer, another depth or shape, a layer that is not linear,
            connected already, used twice, not called by its parent, divided among processes, or with hooks, which would
            be lost; or `aux_dtype` does not fit a weight, or the target raised an error with `sample`. The message
            names the block and layer, and the target is as it was.
    """
    check_module("target_model", target_model)
    check_kind(str, "a dotted name", main_body_name=main_body_name)
    target_names = _block_names(target_model, "target_model", main_body_name)
    aux_models = _named_models(aux_model)
    aux_names = {argument: _block_names(model, argument, main_body_name) for argument, model in aux_models.items()}
    for argument, blocks in aux_names.items():
        if len(target_names) != len(blocks):
            raise ValueError(
                f"{argument}: expected {len(target_names)} blocks in {main_body_name!r} as in target_model,"
                f" got {len(blocks)}"
            )
    _require_names(layer_names)
    check_sample(sample)
    replacements = []
    connected: dict[nn.Linear, str] = {}
    for target_block, *own_names in zip(target_names, *aux_names.values(), strict=True):
        for layer_name in layer_names:
            place = f"{target_block}.{layer_name}"
            origin_layer = _linear(target_model, "target_model", place)
            check_no_hooks(f"target_model: {place}", origin_layer)
            _require_called(target_model, place)
            aux_weights = [
                _aux_weight(model, argument, f"{block}.{layer_name}", origin_layer)
                for (argument, model), block in zip(aux_models.items(), own_names, strict=True)
            ]
            if origin_layer in connected:
                raise ValueError(f"target_model: {place} is {connected[origin_layer]}, used twice")
            connected[origin_layer] = place
            try:
                fused = FusedCrossModalLinear(
                    origin_layer.in_features,
                    origin_layer.out_features,
                    origin_layer=origin_layer,
                    aux_weight=aux_weights,
                    is_aux_trainable=is_aux_trainable,
                )
                if aux_dtype is not None:
                    fused.quantize_aux(aux_dtype)
            except (TypeError, ValueError) as error:
                raise type(error)(f"aux_model: {place}: {error}") from None
            replacements.append((place, origin_layer, fused))
    try:
        for place, _, fused in replacements:
            target_model.set_submodule(place, fused)
        if sample is not None:
            check_calls(target_model, sample)
    except BaseException:
        for place, origin_layer, _ in replacements:
            target_model.set_submodule(place, origin_layer)
        raise
    if sample is None:
        watch_calls(target_model)
    return target_model


def _named_models(aux_model: nn.Module | Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The auxiliary models, by what error messages call them."""
    if isinstance(aux_model, nn.Module):
        return {"aux_model": aux_model}
    models = list(aux_model) if isinstance(aux_model, Iterable) else [aux_model]
    if not all(isinstance(model, nn.Module) for model in models):
        raise TypeError(f"aux_model: expected a module, or a sequence of modules, got {aux_model!r}")
    if not models:
        raise ValueError(f"aux_model: expected a module, or a sequence of modules, got {aux_model!r}")
    return {f"aux_model[{i}]": model for i, model in enumerate(models)}


def _require_names(layer_names: Sequence[str]) -> None:
    names = [] if isinstance(layer_names, str) or not isinstance(layer_names, Collection) else list(layer_names)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"layer_names: expected a sequence of different names, got {layer_names!r}")


def _block_names(model: nn.Module, argument: str, main_body_name: str) -> list[str]:
    """The dotted names of the blocks."""
    try:
        blocks = model.get_submodule(main_body_name)
    except AttributeError:
        raise ValueError(f"{argument}: {type(model).__name__} has no module {main_body_name!r}") from None
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        got = type(blocks).__name__
        raise ValueError(f"{argument}: expected {main_body_name!r} to be a non-empty sequence of blocks, got {got}")
    return [f"{main_body_name}.{name}".removeprefix(".") for name in blocks._modules]


def _linear(model: nn.Module, argument: str, place: str) -> nn.Linear:
    try:
        layer = model.get_submodule(place)
    except AttributeError:
        raise ValueError(f"{argument}: there is no layer {place}") from None
    if isinstance(layer, FusedCrossModalLinear):
        raise ValueError(f"{argument}: {place} is connected to an auxiliary model already")
    if not is_plain_linear(layer):
        raise ValueError(f"{argument}: {place} is a {type(layer).__name__}, expected a plain nn.Linear")
    if is_divided(model, place):
        raise ValueError(
            f"{argument}: {place} is divided among processes: connect whole models and divide the target afterwards,"
            f" or {GATHER} for a whole one"
        )
    return layer


def _aux_weight(model: nn.Module, argument: str, place: str, origin_layer: nn.Linear) -> Tensor:
    layer = _linear(model, argument, place)
    if has_forward_hooks(layer):
        raise ValueError(f"{argument}: {place} has forward hooks, which may change what it computes: remove them first")
    weight = layer.weight
    if weight.shape != origin_layer.weight.shape:
        raise ValueError(
            f"{argument}: {place} has weight shape {tuple(weight.shape)},"
            f" expected {tuple(origin_layer.weight.shape)} as in target_model"
        )
    if weight is origin_layer.weight:
        raise ValueError(f"{argument}: {place} is target_model's own weight")
    return weight


def _require_called(model: nn.Module, place: str) -> None:
    parent_name, _, layer_name = place.rpartition(".")
    parent = model.get_submodule(parent_name)
    if is_known_to_read(parent, layer_name):
        raise ValueError(f"target_model: {place} is not called by its {type(parent).__name__}, which reads its weight")


def quantize_aux(model: nn.Module, dtype: str = "int8") -> nn.Module:
    """Store the frozen auxiliary weight of every fused layer in fewer bytes, in place and one layer at a time.

    Bytes per weight: "bfloat16" 2, "int8" and "float8_e4m3fn" 1 (a scale per output row), "int4" 0.56 (one per 64
    columns). The model computes with the stored values from then on, `merge_pathways` too; the auxiliary model is left
    alone. `quantization_errors` tells beforehand what it changes.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: no fused layer below `model`, one that is divided among processes, or an auxiliary weight that is
            trainable, quantised already, not finite, or does not fit `dtype` (the message names its layer; the model is
            as it was).
    """
    _require_whole(model, "quantise the auxiliary weights before dividing the model")
    for check_only in (True, False):
        for layer, (name, *_) in _places(model).items():
            try:
                layer.quantized_aux(dtype) if check_only else layer.quantize_aux(dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return model


class QuantizationErrors(NamedTuple):
    """Frobenius norms of the change over those of what is changed."""

    aux_weights: dict[str, float]
    """Of `cross_modal_scale * aux_weight`, by the layer's dotted name."""
    output: float | None
    """Of the model's output for the given inputs; None without inputs."""


@torch.no_grad()
def quantization_errors(model: nn.Module, dtype: str, *inputs: Tensor) -> QuantizationErrors:
    """What `quantize_aux(model, dtype)` would change; the model itself is not.

    The output is compared at the scales the model has: as long as they are zero, nothing changes. Takes the memory of a
    float32 copy of the auxiliary weights. Call `model.eval()` first if the model drops anything at random.

    Args:
        model: a connected model whose auxiliary weights are not quantised yet.
        dtype: as `quantize_aux` takes it.
        inputs: the arguments of a forward pass that returns one tensor, such as a batch of validation images.

    Raises:
        TypeError, ValueError: as `quantize_aux`; or the model has no data.
    """
    _require_whole(model, "ask before dividing the model")
    stored, errors = {}, {}
    for layer, (name, *_) in _places(model).items():
        _require_data(layer)
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
        TypeError: `model` is no module.
        ValueError: no fused layer below `model`, one that is divided among processes, a merged weight that is not
            finite, or hooks on a layer or its weight, which would be lost (the message names the layer; the model is
            as it was).
    """
    _require_whole(model, f"{GATHER}, and merge that with m2pt.checkpoints.merge_state_dict")
    places = _places(model)
    for layer, (name, *_) in places.items():
        try:
            layer.merge()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for layer, names in places.items():
        merged = layer.merge()
        for name in names:
            model.set_submodule(name, merged)
    for module in model.modules():
        stop_watching(module)
    return model


def _fused_layers(model: nn.Module) -> list[tuple[str, FusedCrossModalLinear]]:
    """Every place of a fused layer below `model`; a layer that is used twice has two.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no fused layer.
    """
    check_module("model", model)
    named = model.named_modules(remove_duplicate=False)
    layers = [(name, module) for name, module in named if name and isinstance(module, FusedCrossModalLinear)]
    if not layers:
        raise ValueError(f"model: there is no FusedCrossModalLinear inside this {type(model).__name__}")
    return layers


def _require_whole(model: nn.Module, remedy: str) -> None:
    for name, _ in _fused_layers(model):
        if is_divided(model, name):
            raise ValueError(f"{name}: divided among processes: {remedy}")


def _require_data(layer: FusedCrossModalLinear) -> None:
    if layer.weight.is_meta:
        raise ValueError("model: expected one with data, this one is on the meta device")


def _places(model: nn.Module) -> dict[FusedCrossModalLinear, list[str]]:
    """Every fused layer below `model` once, with the names of its places."""
    places: dict[FusedCrossModalLinear, list[str]] = {}
    for name, layer in _fused_layers(model):
        places.setdefault(layer, []).append(name)
    return places


def cross_modal_scales(model: nn.Module) -> dict[str, float]:
    """The learned scale of every fused layer, by the layer's dotted name.

    With several auxiliary models a layer has one for each, by its name and the model's number in brackets. Scales that
    are divided among processes are gathered: then every process has to call this.

    Raises:
        TypeError: `model` is no module.
        ValueError: no fused layer below `model`, no data in it, or one that `FullyShardedDataParallel` divides.
    """
    scales: dict[str, float] = {}
    layers = _fused_layers(model)
    if flattened_modules(model.modules()):
        raise ValueError(f"model: FullyShardedDataParallel has divided it: {GATHER}, which has the scales")
    for name, layer in layers:
        _require_data(layer)
        several = whole(layer.cross_modal_scale.detach()).tolist()
        scales |= {name if len(several) == 1 else f"{name}[{i}]": scale for i, scale in enumerate(several)}
    return scales


def scale_table(model: nn.Module) -> str:
    """The learned scales as a Markdown table, a row per block and a column per layer of a block.

    A block's name ends with the first number in a layer's name, as in `blocks.0` and `encoder_layer_0`. As by
    `cross_modal_scales`, every process has to call this.

    Raises:
        TypeError: `model` is no module.
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
        TypeError: `model` is no module, or `head_name` no string.
        ValueError: the model has no such head with parameters, or no fused layer.
    """
    layers = _fused_layers(model)
    check_kind(str, "a dotted name", head_name=head_name)
    try:
        head = model.get_submodule(head_name)
    except AttributeError:
        raise ValueError(f"head_name: {type(model).__name__} has no module {head_name!r}") from None
    if head is model or next(head.parameters(), None) is None:
        raise ValueError(f"head_name: expected a module with parameters, {head_name!r} is a {type(head).__name__}")
    for module in fsdp_modules(model.modules()):
        module.reshard()  # what is set on parameters that are whole for a while would be lost
    model.requires_grad_(False)
    head.requires_grad_(True)
    for _, layer in layers:
        layer.cross_modal_scale.requires_grad_(True)
    return model
