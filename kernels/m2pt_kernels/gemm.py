"""Compute the two products with the kernels that `plans` chooses, each on its tensors' device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import gemm_pointers, gemm_tma, plans, reference, split_sums
from .combined import CombinedWeight
from .devices import device_of
from .launches import NotCompiledError
from .plans import EAGER, Plan
from .products import CombinedMatmul, GradParameters, Product

_LAUNCHES = {"pointers": gemm_pointers, "tma": gemm_tma, "hopper": plans.gemm_hopper}
_GRAD_LAUNCHES = {"pointers": gemm_pointers, "tma": gemm_tma, "hopper": plans.gemm_hopper_gradients}


def combined_matmul(
    left: Tensor, combined: CombinedWeight, bias: Tensor | None = None, plan: Plan | None = None
) -> Tensor:
    """Return left times combined plus bias, contiguous and in left's dtype. `plan` overrides the chosen one.

    Raises:
        NotCompiledError: the kernel of `plan` does not compile.
        ValueError: the device cannot read a float8 W_aux.
    """
    with device_of(left):
        return _by_plan(_combined_matmul, CombinedMatmul(left, combined, bias).prepared(), plan)


def _combined_matmul(plan: Plan, product: CombinedMatmul) -> Tensor:
    if plan == EAGER:
        return reference.combined_matmul(*product)
    left, combined, _ = product
    output = left.new_empty(left.shape[0], combined.shape[1])
    _LAUNCHES[plan.by].combined_matmul(plan.tile, *product, output)
    return output


def grad_parameters(
    product: GradParameters, plan: Plan | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the wanted gradients of weight, aux weight and cross-modal scale. `plan` overrides the chosen one.

    The scale's is reduced in two stages of fixed order without atomics, a sum per row of a tile and the sum of those:
    repeated runs give the same bits. This also holds if the tokens are split, which takes N x K float32 memory per
    split until this returns: `estimates.MOST_SPLIT_BYTES` at most, unless `plan` says otherwise.

    Raises:
        NotCompiledError, ValueError: as `combined_matmul`.
    """
    with device_of(product.x):
        return _by_plan(_grad_parameters, product.prepared(), plan)


def _grad_parameters(plan: Plan, product: GradParameters) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if plan == EAGER:
        return reference.grad_parameters(product)
    empty, weight_dtype, aux_dtype = product.x.new_empty, product.weight_dtype, product.aux_dtype
    grad_weight = None if weight_dtype is None else empty(product.shape, dtype=weight_dtype)
    grad_aux = None if aux_dtype is None else empty(product.aux_shape, dtype=aux_dtype)
    launch = _GRAD_LAUNCHES[plan.by].grad_parameters
    if plan.splits == 1:
        partial = launch(plan.tile, product, grad_weight, grad_aux)
    else:
        splits = empty(plan.splits, *product.shape, dtype=torch.float32)
        launch(plan.tile, product.of_splits, splits, None, plan.splits)
        partial = split_sums.grad_parameters(splits, product, grad_weight, grad_aux)
    return grad_weight, grad_aux, None if partial is None else partial.sum(1)


def _by_plan(function: Callable[[Plan, Any], Any], product: Product, plan: Plan | None) -> Any:
    """Compute with `plan`, or else with the first that compiles."""
    while plan is None:
        chosen = plans.choose(product)
        try:
            return function(chosen, product)
        except NotCompiledError as error:
            plans.leave_out(chosen, product, error)
    return function(plan, product)


def compute(plan: Plan, product: Product) -> Any:
    """Compute a product with one of its plans.

    Raises:
        NotCompiledError: its kernel does not compile.
    """
    return combined_matmul(*product, plan) if isinstance(product, CombinedMatmul) else grad_parameters(product, plan)
