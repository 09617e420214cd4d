"""The fused layer: an `nn.Linear` that multiplies by `weight + cross_modal_scale * aux_weight`."""

from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeGuard
from warnings import warn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from m2pt_kernels import combined_weight, cross_modal_linear, quantize
from m2pt_kernels.checks import GEMM_DTYPES, check_tensor
from m2pt_kernels.divided import check_whole
from m2pt_kernels.quantization import DTYPES

from .checks import check_kind, check_sizes, nearest
from .hooks import check_no_hooks, check_no_tensor_hooks
from .tensor_checks import check_readable

STAYS_FROZEN = (
    "aux_weight: something has set its requires_grad, but it was connected as frozen and stays so: connect with"
    " is_aux_trainable=True to train it; otherwise set it to False again before DistributedDataParallel counts on it"
)

_OPERANDS = itemgetter("weight", "aux_weight", "cross_modal_scale", "bias", "aux_weight_scale")


RELEASED: WeakSet[nn.Module] = WeakSet()
"""Layers that may take the place of a fused one without its pathway: those made from it and, after a failed surgery,
those that were there before."""


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes what an `nn.Linear` does, apart from hooks: no forward of its own, nothing added."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and module._parameters.keys() == {"weight", "bias"}
        and not (module._buffers or module._modules)
    )


def fused_in(model: nn.Module) -> list["FusedCrossModalLinear"]:
    """The fused layers of a model, once each; the model itself if it is one."""
    return [module for module in model.modules() if isinstance(module, FusedCrossModalLinear)]


def kept(is_trained: bool) -> str:
    """The word for whether training changes something."""
    return "trained" if is_trained else "frozen"


def is_left_out(aux_weight: Tensor) -> bool:
    """Whether it is the SHA-256 that a checkpoint without auxiliary weights holds in their place."""
    return aux_weight.dtype == torch.uint8 and aux_weight.dim() == 1


@torch.compiler.assume_constant_result
def _is_in_onnx_export() -> bool:
    """Like torch's own, but right in a strict export too, which takes that one to be false."""
    return torch.onnx.is_in_onnx_export()


def _check_traceable(input: Any) -> None:
    """Raise a TypeError in tracers that record plain operators only: the ONNX exporter and `torch.fx`."""
    recorder = "torch.fx" if isinstance(input, Proxy) else "ONNX" * _is_in_onnx_export()
    if recorder:
        raise TypeError(f"{recorder} does not support FusedCrossModalLinear: merge_pathways(model) first")


def merged_weight(weight: Tensor, aux_weight: Tensor, scale: Tensor, aux_weight_scale: Tensor | None = None) -> Tensor:
    """`weight + scale * aux_weight` over all auxiliary models, summed in float32 and rounded once to weight's dtype.

    `aux_weight_scale` holds the scales of a quantised `aux_weight`.

    Raises:
        TypeError, ValueError: as in `combined_weight`; or there is no data, or the sum is not finite.
    """
    merged = combined_weight(weight, aux_weight, scale, weight.dtype, aux_weight_scale)
    if merged.is_meta:
        raise ValueError("there is nothing to merge on the meta device")
    if not merged.isfinite().all():
        raise ValueError("weight + cross_modal_scale * aux_weight has NaN or infinite entries")
    return merged


def _aux_weights(aux_weight: Tensor | Sequence[Tensor] | None, shape: tuple[int, int]) -> list[Tensor]:
    """The weight of each auxiliary model, checked to fit."""
    weights: list[Any] = list(aux_weight) if isinstance(aux_weight, Sequence) and aux_weight else [aux_weight]
    for weight in weights:
        if not isinstance(weight, Tensor) or weight.dtype not in GEMM_DTYPES:
            got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"aux_weight: expected a floating tensor of shape {shape}, got {got}")
        check_tensor("aux_weight", weight)
        check_whole("aux_weight", weight)
        if weight.shape != shape:
            raise ValueError(f"aux_weight: expected shape {shape}, got {tuple(weight.shape)}")
    return weights


class Auxiliary(NamedTuple):
    """Where an auxiliary weight was read from.

    Attributes:
        model: the name of the auxiliary model.
        layers: the dotted names of its layers, joined by " + ", with `[rows]` after one that was split.
    """

    model: str
    layers: str


class Part(NamedTuple):
    """What a layer holds of one auxiliary model."""

    data: Tensor
    aux_weight_scale: Tensor | None
    scale: Tensor
    auxiliary: Auxiliary

    def is_equal(self, other: "Part") -> bool:
        """Whether both hold the same auxiliary weight; not known, and false, on the meta device."""
        matrices = ((self.data, other.data), (self.aux_weight_scale, other.aux_weight_scale))
        return not self.data.is_meta and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in matrices
        )


class FusedCrossModalLinear(nn.Linear):
    """`y = x (weight + cross_modal_scale * aux_weight)^T + bias` (cross-modal re-parameterization, M2PT eq. 2).

    With n auxiliary models, `y = x (weight + sum of cross_modal_scale[i] * aux_weight[i])^T + bias`.

    Args:
        in_features: size of each input sample.
        out_features: size of each output sample.
        bias: whether the layer has a bias; ignored if `origin_layer` is given.
        origin_layer: the target model's layer. Its weight and bias parameters are adopted, not copied, with their
            dtype, device and `requires_grad`, and so is its training flag. None initialises new ones like `nn.Linear`.
        aux_weight: (out_features, in_features), the auxiliary model's weight, any floating dtype of 16 bits or more.
            Its storage is shared where it already lies on the layer's device, so loading a checkpoint into this layer
            writes to both. A sequence of such weights, of n > 1 auxiliary models, is copied into one tensor
            (n, out_features, in_features).
        is_aux_trainable: whether `aux_weight` gets a gradient. If not, it stays frozen whatever asks for a gradient
            later, such as `model.requires_grad_(True)`. The auxiliary model's own flag is left alone.

    `cross_modal_scale` has shape (1,) or (n,), starts at zero and is trainable. State-dict names: `weight`,
    `bias`, `aux_weight`, `cross_modal_scale`; and `aux_weight_scale` once `quantize_aux` has made `aux_weight` small.

    Raises:
        TypeError: `aux_weight` is missing or not such a tensor, `origin_layer` is not a plain `nn.Linear`, a size is
            not an integer, `is_aux_trainable` is not a bool, or a weight is of another package's class, such as
            torchao's.
        ValueError: `aux_weight` or `origin_layer` has another shape or is divided among processes, `aux_weight` is
            sparse, nested or without data, `origin_layer` has hooks, which would be lost, or a size is negative.
    """

    is_called = False
    """Whether it has been called, other than in compiled code."""

    is_enabled = True
    """Whether the auxiliary weights take part; `disabled_pathways` leaves them out for a while."""

    is_aux_trainable = False
    """Whether `aux_weight` may get a gradient."""

    auxiliaries: tuple[Auxiliary, ...]
    """Where each auxiliary weight was read from, as recorded by surgery; a state dict does not hold this."""

    aux_weight: Tensor
    aux_weight_scale: Tensor | None
    cross_modal_scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        origin_layer: nn.Linear | None = None,
        aux_weight: Tensor | Sequence[Tensor] | None = None,
        is_aux_trainable: bool = False,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features)
        check_kind(bool, "a bool", is_aux_trainable=is_aux_trainable)
        shape = (out_features, in_features)
        aux_weights = _aux_weights(aux_weight, shape)
        if origin_layer is not None:
            if not is_plain_linear(origin_layer):
                raise TypeError(f"origin_layer: expected a plain nn.Linear, got {type(origin_layer).__name__}")
            if origin_layer.weight.shape != shape:
                raise ValueError(f"origin_layer: expected weight shape {shape}, got {tuple(origin_layer.weight.shape)}")
            check_whole("origin_layer", origin_layer.weight)
            check_no_hooks("origin_layer", origin_layer)
        super().__init__(in_features, out_features, bias, device=None if origin_layer is None else "meta")
        if origin_layer is not None:
            self.weight, self.bias = origin_layer.weight, origin_layer.bias
            self.train(origin_layer.training)
        if any(each.is_meta for each in aux_weights) and not self.weight.is_meta:
            raise ValueError("aux_weight: expected a tensor with data, got one on the meta device")
        aux_weights = [each.detach().to(self.weight.device) for each in aux_weights]
        stored = aux_weights[0] if len(aux_weights) == 1 else torch.stack(aux_weights)
        self.aux_weight = nn.Parameter(stored, requires_grad=is_aux_trainable)
        self.is_aux_trainable, self.is_enabled = is_aux_trainable, True
        self.register_buffer("aux_weight_scale", None)
        self.auxiliaries = tuple(Auxiliary(f"aux_weight[{i}]", "") for i in range(len(aux_weights)))
        self.cross_modal_scale = nn.Parameter(self.weight.new_zeros(len(aux_weights)))

    def forward(self, input: Tensor) -> Tensor:
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            operands = self._operands()
        else:
            # nn.Module's __setattr__ takes thirty times as long, and its __getattr__ ten times.
            self.__dict__["is_called"] = True
            try:
                operands = _OPERANDS({**self._buffers, **self._parameters})
            except KeyError:  # for a weight that is computed, as by a parametrization
                operands = self._operands()
        weight, aux_weight, scale, bias, aux_weight_scale = operands
        if not self.is_enabled:
            return F.linear(input, weight, bias)
        if is_compiling or torch.jit.is_tracing() or isinstance(input, Proxy):
            _check_traceable(input)
        if aux_weight.requires_grad and not self.is_aux_trainable:
            if not is_compiling:
                warn(STAYS_FROZEN, stacklevel=2)
            aux_weight = aux_weight.detach()
        return cross_modal_linear(input, weight, aux_weight, scale, bias, aux_weight_scale)

    def _operands(self) -> tuple[Any, ...]:
        return self.weight, self.aux_weight, self.cross_modal_scale, self.bias, self.aux_weight_scale

    @property
    def is_aux_trained(self) -> bool:
        """Whether `aux_weight` gets a gradient."""
        return self.is_aux_trainable and self.aux_weight.requires_grad

    def extra_repr(self) -> str:
        """Sizes, the auxiliary models, how their weights are stored, and what is trained."""
        models = ", ".join(dict.fromkeys(auxiliary.model for auxiliary in self.auxiliaries))
        aux_weight = f"[{models}] {self.storage} {kept(self.is_aux_trained)}"
        scale = kept(self.cross_modal_scale.requires_grad)
        return f"{super().extra_repr()}, aux_weight={aux_weight}, cross_modal_scale={scale}"

    @property
    def storage(self) -> str:
        """How the auxiliary weights are stored: "int8", "int4" or "float8_e4m3fn" if quantised, or their dtype."""
        return DTYPES.get(self.aux_weight.dtype, str(self.aux_weight.dtype).removeprefix("torch."))

    def quantize_aux(self, dtype: str) -> None:
        """Store a frozen `aux_weight` in fewer bytes; the tensor it shared with the auxiliary model is left alone.

        From then on the layer computes with the stored value, and so does its merge.

        Args:
            dtype: "int8" or "float8_e4m3fn" (a scale per output row), "int4" (one per 64 columns of a row) or
                "bfloat16". Of these only "bfloat16" stays a parameter and follows `.to(dtype)`; the others become
                buffers, `aux_weight` and the float32 `aux_weight_scale`, that `.to()` moves and never casts.

        Raises:
            ValueError: another dtype, an `aux_weight` that is trainable, quantised already, divided among processes or
                not finite in bfloat16, or one that `m2pt_kernels.quantize` refuses.
        """
        self._store(*self.quantized_aux(dtype))

    def require_stored(self, name: str) -> None:
        """Raise a ValueError if `aux_weight` is computed, as by pruning or a parametrization."""
        if "aux_weight" not in self._parameters | self._buffers:
            raise ValueError(f"{name}: it is computed from other tensors, as by pruning: make it permanent first")

    def _store(self, data: Tensor, aux_weight_scale: Tensor | None, is_trained: bool = False) -> None:
        if aux_weight_scale is None:
            self.aux_weight = nn.Parameter(data, requires_grad=is_trained)
            return
        del self.aux_weight
        self.register_buffer("aux_weight", data)
        self.aux_weight_scale = aux_weight_scale

    @torch.no_grad()
    def quantized_aux(self, dtype: str) -> tuple[Tensor, Tensor | None]:
        """What `quantize_aux(dtype)` would store: `aux_weight` and `aux_weight_scale`; errors as there."""
        check_whole("aux_weight", self.aux_weight)
        self.require_stored("aux_weight")
        if self.is_aux_trained:
            raise ValueError("aux_weight: expected a frozen one to quantise, got a trainable one")
        if self.aux_weight_scale is not None:
            raise ValueError(f"aux_weight: it is stored as {self.storage} already")
        if dtype == "bfloat16":
            rounded = self.aux_weight.bfloat16()
            if not rounded.is_meta and not rounded.isfinite().all():
                raise ValueError("aux_weight: there are NaN or infinite entries, or ones beyond bfloat16's range")
            return rounded, None
        if dtype not in DTYPES.values():
            dtypes = ["bfloat16", *DTYPES.values()]
            raise ValueError(f"dtype: expected one of {', '.join(dtypes)}, got {dtype!r}{nearest(dtype, dtypes)}")
        return quantize(self.aux_weight, dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module, but a TypeError for a parameter of a class that the kernels cannot read."""
        if param is not None:
            check_readable(f"{name} of a FusedCrossModalLinear", param)
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        quantized = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in quantized.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        loaded = state_dict.get(f"{prefix}aux_weight")
        if loaded is not None and is_left_out(loaded):
            error_msgs.append(
                f"{prefix}aux_weight: the auxiliary weights were left out of this checkpoint: load it into a module"
                " that PathwayCallback.connect has connected to them, frozen"
            )
            return
        if loaded is not None and DTYPES.get(loaded.dtype) != DTYPES.get(self.aux_weight.dtype):
            error_msgs.append(
                f"{prefix}aux_weight: it is stored as {self.aux_weight.dtype} here and as {loaded.dtype} in the"
                " checkpoint; quantize_aux the model like the one that was saved"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def plain(self, weight: nn.Parameter | None = None) -> nn.Linear:
        """An `nn.Linear` that shares the bias and the weight of this layer, or has another weight."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.weight if weight is None else weight, self.bias
        RELEASED.add(plain)
        return plain.train(self.training)

    @torch.no_grad()
    def joined(self, other: "FusedCrossModalLinear") -> "FusedCrossModalLinear":
        """This layer with copies of the auxiliary weights and scales of both layers; the scales are trainable.

        Raises:
            ValueError: `other` has an auxiliary weight that is here already, or trains or stores its weights
                differently.
        """
        is_trainable, own, others = self.is_aux_trainable, self.parts(), other.parts()
        if other.is_aux_trainable != is_trainable:
            raise ValueError(f"is_aux_trainable: expected {is_trainable}, as for the auxiliary weights that are there")
        dtypes = self.aux_weight.dtype, other.aux_weight.dtype
        is_wider = not DTYPES.keys() & {*dtypes} and torch.promote_types(*dtypes) == dtypes[0]
        if self.storage != other.storage and not is_wider:
            expected = f"expected {self.storage!r}, as the auxiliary weights there are stored"
            raise ValueError(f"aux_dtype: {expected}, got {other.storage!r}")
        if any(old.is_equal(new) for old in own for new in others):
            raise ValueError("it is connected to this auxiliary weight already")
        joined = self._with([*own, *others])
        joined.cross_modal_scale.requires_grad_(True)
        return joined

    @torch.no_grad()
    def without(self, indices: Collection[int]) -> nn.Linear:
        """This layer without some of its auxiliary weights; a plain `nn.Linear` if none is left."""
        others = [part for i, part in enumerate(self.parts()) if i not in indices]
        return self._with(others) if others else self.plain()

    def parts(self) -> list[Part]:
        """What it holds of each auxiliary model."""

        def each(tensor: Tensor | None) -> list[Any]:
            return [tensor] * n if n == 1 or tensor is None else list(tensor)

        n = len(self.auxiliaries)
        stored = each(self.aux_weight), each(self.aux_weight_scale)
        return [Part(*own) for own in zip(*stored, self.cross_modal_scale, self.auxiliaries, strict=True)]

    def _with(self, parts: Sequence[Part]) -> "FusedCrossModalLinear":
        layer = FusedCrossModalLinear(
            self.in_features, self.out_features, origin_layer=self.plain(), aux_weight=self.weight
        )
        weights, weight_scales, scales, layer.auxiliaries = zip(*parts, strict=True)
        together = (lambda tensors: tensors[0].clone()) if len(parts) == 1 else torch.stack
        scales_of_rows = None if weight_scales[0] is None else together(weight_scales)
        layer._store(together(weights), scales_of_rows, self.is_aux_trained)
        layer.is_aux_trainable = self.is_aux_trainable
        layer.cross_modal_scale = nn.Parameter(torch.stack(scales), self.cross_modal_scale.requires_grad)
        return layer

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain `nn.Linear` with the merged weight; the bias parameter is shared with this layer.

        Raises:
            ValueError: the merged weight is not finite, has no data or is divided among processes; or the layer or its
                weight has hooks, which would be lost (those of `step_in_backward` may be).
        """
        weight = merged_weight(self.weight, self.aux_weight, self.cross_modal_scale, self.aux_weight_scale)
        check_no_hooks("the layer", self)
        check_no_tensor_hooks("weight", self.weight)
        with torch.enable_grad():  # for a weight that is computed, as by a parametrization
            is_trained = self.weight.requires_grad
        return self.plain(nn.Parameter(weight, is_trained))
