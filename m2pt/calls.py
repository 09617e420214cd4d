"""Checks that models call their fused layers: if they read the weight instead, the auxiliary weight has no effect.

The scales then get no gradient, and merging changes what the model computes.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from m2pt_kernels.divided import whole

from .linear import FusedCrossModalLinear, is_plain_linear
from .pairing import unwrapped
from .replacement import bypasses, has_pathway, is_dora

Sample = Tensor | tuple[Any, ...] | Mapping[str, Any]

WEIGHT_READERS = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("linear1", "linear2"),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ("qkv", "proj"),
    "peft.tuners.hira.layer.Linear": ("base_layer",),
    "peft.tuners.peanut.layer.Linear": ("base_layer",),
}
"""Modules known to read the weights of some of their layers (TransformerEncoderLayer only in evaluation).

They are given by name, so that nothing has to be imported, and are refused at once. `check_calls` finds all others,
`watch_pathways` those that do not call a layer.
"""

PROJECTIONS = ("qkv", "query", "key", "value")
"""Attention with a separate query bias reads these: timm's BEiT, EVA and Swin v2, transformers 4's VideoMAE."""


def is_known_to_read(parent: nn.Module, layer_name: str) -> bool:
    """Whether a module is known to read the weight of its layer without calling it."""
    if layer_name in PROJECTIONS and getattr(parent, "q_bias", None) is not None:
        return not getattr(parent, "qkv_bias_separate", False)
    if layer_name == "base_layer" and (is_dora(parent) or bypasses(parent)):
        return True
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(parent).__mro__)
    return any(layer_name in WEIGHT_READERS.get(name, ()) for name in names)


def check_sample(sample: Sample | None) -> None:
    """Raise a TypeError unless `sample` can be the input of a forward pass."""
    if not isinstance(sample, (Tensor, tuple, Mapping, type(None))):
        expected = "a tensor, a tuple of arguments or a mapping of keyword arguments"
        raise TypeError(f"sample: expected {expected}, got {type(sample).__name__}")


def check_calls(model: nn.Module, sample: Sample) -> None:
    """Run `model` once in evaluation mode, without `torch.compile`, and check how it uses its fused layers.

    It has to call every one, and must not compute with its `weight`; it may ask that for its dtype, device and sizes.
    Training flags, buffers and torch's random state are left as they were; lazy modules are built.

    Raises:
        ValueError: the model fails the check, or raises an error.
    """
    sample = tree_map_only(Tensor, Tensor.clone, sample)  # a model may write to its input
    keywords = sample if isinstance(sample, Mapping) else {}
    arguments = sample if isinstance(sample, tuple) else () if isinstance(sample, Mapping) else (sample,)
    buffers = {
        module: {name: (own, None if own is None else own.clone()) for name, own in module._buffers.items()}
        for module in model.modules()
        if not isinstance(module, FusedCrossModalLinear)
    }
    flags = {module: module.training for module in model.modules()}
    gpus = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    try:
        for module in flags:
            module.training = False
        with (
            torch.no_grad(),
            torch.random.fork_rng(gpus),
            torch.compiler.set_stance("force_eager"),
            _reads(model) as read,
        ):
            model(*arguments, **keywords)
    except Exception as error:
        raise ValueError(f"sample: {type(model).__name__} raised {error!r}") from error
    finally:
        for module, flag in flags.items():
            module.training = flag
        for module, own in buffers.items():
            for name, (buffer, before) in own.items():
                module._buffers[name] = None if buffer is None or before is None else buffer.copy_(before)
    if names := [name for name, layer in model.named_modules() if _is_uncalled(layer)]:
        raise ValueError(f"target_model: {_description(model, names)}")
    if names := [name for name, layer in model.named_modules() if layer in read]:
        reader = f"{_parents(model, names)}, which also calls the layer: merging would change that module's output"
        raise ValueError(f"target_model: {', '.join(names)}: weight is read by {reader}")


class _Watched(FusedCrossModalLinear):
    """A fused layer whose `weight` is a `_Watch`. Its own forward does not read that attribute."""

    @property
    def weight(self):  # type: ignore[override]
        watch = cast(Tensor, self._parameters["weight"]).as_subclass(_Watch)
        watch.layer = self
        return watch


class _Watch(Tensor):
    """A weight that adds its layer to `_Watch.read` when its entries are read."""

    _is_param = True  # what isinstance(weight, nn.Parameter) looks at
    read: set[nn.Module]
    layer: nn.Module

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in METADATA:
            cls.read.update(leaf.layer for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Watch))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_sparse", "is_quantized")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point),
}
"""What a model may ask of a weight: the merged weight gives the same answers."""


@contextmanager
def _reads(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The fused layers whose weight is read inside the block, other than by a call."""
    layers = [layer for layer in model.modules() if type(layer) is FusedCrossModalLinear]
    read: set[nn.Module] = set()
    _Watch.read = read
    try:
        for layer in layers:
            layer.__class__ = _Watched
        yield read
    finally:
        _Watch.read = set()
        for layer in layers:
            layer.__class__ = FusedCrossModalLinear


def watch_pathways(model: nn.Module) -> None:
    """Warn once, at the end of the model's first forward pass in training mode, of pathways that have no effect.

    These are layers not called so far, layers replaced since by anything but plain ones, and scales that are zero and
    frozen. The hook is then removed. Code compiled by `torch.compile` is not watched.
    """
    stop_watching(model)
    model.register_forward_hook(_Watcher([name for name, layer in model.named_modules() if _is_fused(layer)]))


def stop_watching(model: nn.Module) -> None:
    """Undo `watch_pathways`."""
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, _Watcher):
            model._forward_hooks.pop(key, None)


class _Watcher:
    """The forward hook of a model whose layers `names` were connected."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, model: nn.Module, arguments: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not model.training:
            return
        stop_watching(model)
        layers = {name: layer for name, layer in model.named_modules() if _is_fused(layer) and not _is_kept(name)}
        compiled = {inner for module in model.modules() if _is_compiled(module) for inner in module.modules()}
        if uncalled := [name for name, layer in layers.items() if _is_uncalled(layer) and layer not in compiled]:
            warnings.warn(_description(model, uncalled), stacklevel=2)
        modules = dict(model.named_modules(remove_duplicate=False))
        lost = [name for name in self.names if name in modules and _is_without_pathway(modules[name])]
        if lost:
            warnings.warn(
                f"{', '.join(lost)}: replaced since they were connected: their pathways are lost, unless merged before",
                stacklevel=2,
            )
        if frozen := [name for name, layer in layers.items() if _is_frozen_at_zero(layer)]:
            remedy = "set requires_grad on every cross_modal_scale before making the optimizer"
            warnings.warn(f"{', '.join(frozen)}: cross_modal_scale is zero and frozen: {remedy}", stacklevel=2)


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, FusedCrossModalLinear)


def _is_kept(name: str) -> bool:
    """Whether it is the unused original of a copy that peft's `modules_to_save` trains."""
    return "original_module" in name.split(".")


def _is_without_pathway(module: nn.Module) -> bool:
    """Whether it has no pathway and is not the plain layer that merging leaves."""
    inner, _ = unwrapped(module, "")
    return not has_pathway(inner) and not is_plain_linear(inner)


def _is_frozen_at_zero(layer: nn.Module) -> bool:
    """Whether its auxiliary weight has no effect and never will; not known for layers that FSDP1 has flattened."""
    scale = layer._parameters.get("cross_modal_scale")
    if scale is None or scale.requires_grad or scale.is_meta:
        return False
    return not whole(scale.detach()).any()


def _is_uncalled(module: nn.Module) -> bool:
    """Whether it is a fused layer whose own forward has not recorded a call."""
    return _is_fused(module) and not module.is_called and "forward" not in vars(module)


def _is_compiled(module: nn.Module) -> bool:
    forward = getattr(module, "forward", None)
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _description(model: nn.Module, names: Collection[str]) -> str:
    reader = f"{_parents(model, names)}, which reads the weight itself or leaves the layer out"
    return f"{', '.join(names)}: not called by {reader}: the auxiliary weight has no effect"


def _parents(model: nn.Module, names: Collection[str]) -> str:
    return " or ".join(sorted({type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in names}))
