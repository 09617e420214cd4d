"""Verify that a plan computes a product correctly: compare it with float64, and its error with plain torch's.

The memory that a kernel writes to is poisoned first, and repeated runs must give the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gemm
from .devices import active_target, input_precision
from .plans import EAGER, Plan
from .products import CombinedMatmul, GradParameters, Product
from .quantization import dequantize

RUNS = 3
OUTPUT = "the output"
GRADIENTS = ("the gradient of weight", "the gradient of aux_weight", "the gradient of scale")
"""What a product computes, by the names that `_outputs` and error messages use."""
_BLOCK_ENTRIES = 2**22
"""Entries per block of a float64 result: 32 MiB."""


class Finding(NamedTuple):
    """What is wrong with a plan, or None and `Bound.error_ratio` of its worst output."""

    fault: str | None
    error_ratio: float | None = None


class Bound:
    """Finds the largest error of a result, and accepts 1.5 times plain torch's plus a rounding.

    The rounding allows for one of the largest entry, one of the operands, one in float32 of the terms, in case they
    cancel, and the smallest number for each term. Only entries where torch's result is finite count. An infinity counts
    as the largest number, because torch may have rounded to that.

    Args:
        dtype: of the result.
        depth: how many terms are summed for an entry.
        eps: of the largest entry; by default the dtype's.
        sums: how many more float32 roundings of the largest entry are accepted, for intermediate sums.
    """

    def __init__(self, dtype: torch.dtype, depth: int, eps: float | None = None, sums: float = 0) -> None:
        self._limits, self._depth, self._sums = torch.finfo(dtype), depth, sums
        self._eps = self._limits.eps if eps is None else eps
        self._wide_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        self._largest: dict[str, Tensor] = {}

    def add(self, got: Tensor, plain: Tensor, exact: Tensor, terms: Tensor, moved: Tensor | None = None) -> None:
        """Count a block of the result.

        Args:
            got: the block.
            plain: as plain torch computes it.
            exact: in float64.
            terms: the sum of the terms' absolute values.
            moved: how far rounded operands move it; infinite where they may overflow.
        """
        counted = plain.isfinite() if moved is None else plain.isfinite() & moved.isfinite()
        blocks = {
            "error": got.clamp(self._limits.min, self._limits.max).double() - exact,
            "plain": plain.double() - exact,
            "exact": exact,
            "terms": terms.double(),
            "moved": torch.zeros_like(exact) if moved is None else moved.double(),
        }
        for name, block in blocks.items():
            largest = torch.where(counted, block.abs(), 0).max()
            self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)

    def _of(self, name: str) -> float:
        return self._largest[name].item() if self._largest else 0.0

    @property
    def error(self) -> float:
        return self._of("error")

    @property
    def plain_error(self) -> float:
        return self._of("plain")

    @property
    def accepted(self) -> float:
        rounding = (self._eps + self._sums * self._wide_eps) * self._of("exact") + self._of("moved")
        rounding += self._wide_eps * self._of("terms") + self._limits.smallest_normal * self._limits.eps * self._depth
        return 1.5 * self.plain_error + rounding

    @property
    def error_ratio(self) -> float:
        """Return the error over plain torch's or, if that is more, over a rounding of the largest entry."""
        return self.error / max(self.plain_error, self._eps * self._of("exact"), self._limits.tiny)


def verify(plan: Plan, product: Product) -> Finding:
    """Compute a product RUNS times with a plan, and compare; outside autocast.

    Raises:
        Exception: whatever the kernel raises.
    """
    with torch.no_grad():
        with _deterministic(1):  # so that empty memory is filled with NaN
            first, *others = (_outputs(product, gemm.compute(plan, product)) for _ in range(RUNS))
        if not all(_have_same_bits(first, other) for other in others):
            return Finding("repeated runs give different bits")
        with _deterministic(0):
            plain = _outputs(product, gemm.compute(EAGER, product))
        if isinstance(product, CombinedMatmul):
            bounds = _compare_combined(first, plain, product)
        else:
            bounds = _compare_gradients(first, plain, product)
    faults = [
        f"error of {name} {bound.error:.2e}, of plain torch {bound.plain_error:.2e}, accepted {bound.accepted:.2e}"
        for name, bound in bounds.items()
        if not bound.error <= bound.accepted  # which includes NaN
    ]
    if faults:
        return Finding("; ".join(faults))
    return Finding(None, max(bound.error_ratio for bound in bounds.values()))


@contextmanager
def _deterministic(mode: int) -> Iterator[None]:
    """Set torch's mode of deterministic algorithms: 0 for off, 1 to warn about others."""
    deterministic: Any = torch.utils.deterministic  # a module whose settings are properties of its class
    before, filled = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(mode)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        deterministic.fill_uninitialized_memory = filled


def _outputs(product: Product, result: Any) -> dict[str, Tensor]:
    """Return what is wanted of a result by its names."""
    if isinstance(product, CombinedMatmul):
        return {OUTPUT: result}
    return {name: gradient for name, gradient in zip(GRADIENTS, result, strict=True) if gradient is not None}


def _have_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    pairs = zip(first.values(), second.values(), strict=True)
    return all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs)


def _compare_combined(got: dict[str, Tensor], plain: dict[str, Tensor], product: CombinedMatmul) -> dict[str, Bound]:
    left, combined, bias = product
    weight, cross_modal_scale = combined.weight, combined.cross_modal_scale
    aux_weight = _values(combined.aux_weight, combined.aux_weight_scale)
    if combined.transposed:
        weight, aux_weight = weight.t(), aux_weight.mT
    depth, limits = len(weight), torch.finfo(left.dtype)
    bias = left.new_zeros(weight.shape[1]) if bias is None else bias
    bound = Bound(left.dtype, depth, _operand_eps(left), _sums(depth))
    for columns in _blocks(weight.shape[1], depth):
        summands = torch.cat((weight[None, :, columns].double(), _scaled(aux_weight[..., columns], cross_modal_scale)))
        total, absolute = summands.sum(0), summands.abs().sum(0).float()
        finite = total.abs() <= limits.max * (1 - limits.eps)
        squares = torch.where(finite, total.square(), torch.inf).float()
        for rows in _blocks(len(left), max(absolute.shape)):
            block = left[rows].double()
            bound.add(
                got[OUTPUT][rows, columns],
                plain[OUTPUT][rows, columns],
                block @ total + bias[columns].double(),
                block.float().abs() @ absolute + bias[columns].float().abs(),
                _operand_eps(left) * (block.square().float() @ squares).sqrt(),
            )
    return {OUTPUT: bound}


def _compare_gradients(got: dict[str, Tensor], plain: dict[str, Tensor], product: GradParameters) -> dict[str, Bound]:
    grad_output, x, aux_weight, cross_modal_scale, *_, aux_weight_scale = product
    tokens, columns = x.shape
    eps = _operand_eps(x) if x.dtype == torch.float32 else 0.0  # other dtypes are multiplied as they are
    bounds = {
        name: Bound(output.dtype, tokens, max(eps, torch.finfo(output.dtype).eps), _sums(tokens))
        for name, output in got.items()
    }
    of_weight, of_aux_weight, of_scale = GRADIENTS
    aux_weight = None if aux_weight is None else _values(aux_weight, aux_weight_scale)
    of_scales = []
    for rows in _blocks(grad_output.shape[1], columns):
        exact, terms, squares = _sums_over_tokens(grad_output[:, rows], x)
        if of_weight in got:
            bounds[of_weight].add(got[of_weight][rows], plain[of_weight][rows], exact, terms, eps * squares.sqrt())
        if of_aux_weight in got and cross_modal_scale is not None:
            block, plain_block = (outputs[of_aux_weight][..., rows, :] for outputs in (got, plain))
            factors = cross_modal_scale.double().view(-1, *(1,) * (block.dim() - 1))
            sums = factors * exact, factors.abs() * terms, factors.abs() * eps * squares.sqrt()
            bounds[of_aux_weight].add(block, plain_block, *sums)
        if aux_weight is not None:
            aux = aux_weight[..., rows, :].double()
            weighted = exact * aux, terms * aux.abs(), squares * aux.square()
            of_scales.append([sums.sum((-2, -1)).view(-1) for sums in weighted])
    if aux_weight is not None:
        exact, terms, squares = (sum(blocks) for blocks in zip(*of_scales, strict=True))
        bounds[of_scale].add(got[of_scale], plain[of_scale], exact, terms, eps * squares.sqrt())
    return bounds


def _values(aux_weight: Tensor, aux_weight_scale: Tensor | None) -> Tensor:
    return aux_weight if aux_weight_scale is None else dequantize(aux_weight, aux_weight_scale)


def _scaled(aux_weight: Tensor, cross_modal_scale: Tensor) -> Tensor:
    """Map (N, K) or (n, N, K) to (n, N, K), in float64."""
    return cross_modal_scale.double().view(-1, 1, 1) * aux_weight.double()


def _sums_over_tokens(grad_output: Tensor, x: Tensor) -> list[Tensor]:
    """Return dY^T x in float64: of the entries, of their absolute values and of their squares."""
    functions: tuple[Callable[[Tensor], Tensor], ...] = torch.clone, torch.abs, torch.square
    sums = [x.new_zeros(grad_output.shape[1], x.shape[1], dtype=torch.float64) for _ in functions]
    for tokens in _blocks(len(x), max(grad_output.shape[1], x.shape[1])):
        grad, block = grad_output[tokens].t().double(), x[tokens].double()
        for total, function in zip(sums, functions, strict=True):
            total.addmm_(function(grad), function(block))
    return sums


def _operand_eps(operand: Tensor) -> float:
    """Return the relative rounding of an operand before it is multiplied."""
    tf32 = operand.dtype == torch.float32 and input_precision(operand.dtype, active_target()) == "tf32"
    return 2.0**-10 if tf32 else torch.finfo(operand.dtype).eps


def _sums(depth: int) -> float:
    """Count a rounding of the sum for every 16 terms, as tensor cores add that many products to it at once."""
    return depth / 16


def _blocks(size: int, width: int) -> list[slice]:
    """Divide rows of `width` entries into blocks."""
    step = max(1, _BLOCK_ENTRIES // width)
    return [slice(start, start + step) for start in range(0, size, step)]
