"""Sharding rules of the operators for DTensor. Importing this registers them, and takes most of a second.

Every dimension of an operand has a name. Sharding a name shards every operand that has it and leaves the others
replicated; a result that has it comes out sharded, and one that was summed over it as a partial sum. So no operator
communicates by itself. Each batch dimension (a number), "out" (column-wise parallel) and "in" (row-wise parallel) can
be sharded; "model" cannot, because a product needs all auxiliary matrices at once.
"""

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

Names = tuple[str | int, ...]
Placements = list[Placement | None]

_operators = torch.ops.m2pt_kernels


def _shardings(outputs: list[Names], inputs: list[Names | None], names: Names) -> list[tuple[Placements, Placements]]:
    """Return placements of outputs and inputs, unsharded and sharded along each name; None for an input left out."""

    def place(name: str | int | None, operand: Names | None, otherwise: Placement) -> Placement | None:
        if operand is None:
            return None
        return Shard(operand.index(name)) if name in operand else otherwise

    return [
        (
            [place(name, operand, Replicate() if name is None else Partial()) for operand in outputs],
            [place(name, operand, Replicate()) for operand in inputs],
        )
        for name in (None, *names)
    ]


def _batch(x) -> Names:
    return tuple(range(x.ndim - 1))


def _names(operand, *names: str) -> Names | None:
    """Name the dimensions of an operand, which may be left out or lack the first dimension."""
    return None if operand is None else names[-operand.ndim :]


def _aux(aux_weight, aux_weight_scale) -> tuple[Names | None, Names | None, Names]:
    """Name both, and the features that can be sharded: int4's columns only if no group is divided."""
    is_int4 = aux_weight is not None and aux_weight.tensor_meta.dtype == torch.uint8
    is_divisible = not is_int4 or aux_weight_scale.shape[-1] % aux_weight_scale.mesh.size() == 0
    return (
        _names(aux_weight, "model", "out", "in"),
        _names(aux_weight_scale, "model", "out", "in" if is_int4 else "group"),
        ("out", "in") if is_divisible else ("out",),
    )


@register_sharding(_operators.cross_modal_linear.default)
def _(x, weight, aux_weight, scale, bias=None, aux_weight_scale=None):
    batch = _batch(x)
    aux, aux_scale, features = _aux(aux_weight, aux_weight_scale)
    inputs = [(*batch, "in"), ("out", "in"), aux, ("model",), _names(bias, "out"), aux_scale]
    shardings = _shardings([(*batch, "out")], inputs, (*batch, *features))
    for outputs, placements in shardings:
        if bias is not None and outputs == [Partial()]:
            placements[4] = Partial()  # a summand, like every process's product
    return shardings


@register_sharding(_operators.grad_input.default)
def _(grad_output, weight, aux_weight, scale, aux_weight_scale=None):
    batch = _batch(grad_output)
    aux, aux_scale, features = _aux(aux_weight, aux_weight_scale)
    inputs = [(*batch, "out"), ("out", "in"), aux, ("model",), aux_scale]
    return _shardings([(*batch, "in")], inputs, (*batch, *features))


@register_sharding(_operators.grad_parameters.default)
def _(grad_output, x, aux_weight, scale, weight_dtype, aux_dtype, aux_weight_scale=None):
    batch = _batch(x)
    aux, aux_scale, features = _aux(aux_weight, aux_weight_scale)
    grad_aux = ("out", "in") if scale is None or scale.shape[0] == 1 else ("model", "out", "in")
    inputs = [(*batch, "out"), (*batch, "in"), aux, _names(scale, "model"), aux_scale]
    return _shardings([("out", "in"), grad_aux, ("model",)], inputs, (*batch, *features))
