"""Autotuning ahead of training: time the plans of a model's products once, and use the fastest from then on.

Nothing is timed unless `warmup` is called: a product that was not timed uses the first of its candidates.
"""

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from . import gemm, plans, records
from .devices import device_of
from .divided import check_undivided
from .launches import NotCompiledError
from .plans import EAGER, TUNED, Plan, Problem
from .products import Product
from .verification import verify


@dataclass(frozen=True)
class Tuned:
    """The milliseconds of each of a product's candidates that ran, and which one is used."""

    problem: Problem
    milliseconds: dict[str, float]
    plan: str

    @property
    def eager_wins(self) -> bool:
        """Whether plain torch, which stores the combined weight during the product, is the fastest."""
        return min(self.milliseconds, key=self.milliseconds.__getitem__, default=str(EAGER)) == str(EAGER)


def warmup(model: nn.Module, sample: Tensor | tuple[Any, ...], use_eager: bool = False) -> list[Tuned]:
    """Time every way to compute the products of a training step, and use the fastest from now on in this process.

    Runs the model forward and backward once, within the caller's autocast; parameters, gradients, buffers and random
    numbers are left as they were. What other threads compute meanwhile is tuned too. Each candidate's result is
    compared with float64 before it is timed. Times are stored by `records`, and not measured again if found there. A
    candidate that fails is skipped with a warning, and one whose result is wrong is never used again on such a GPU; if
    no kernel is left, plain torch computes. Call it before `torch.compile` and distributed wrappers.

    Args:
        model: on the GPU that it trains on.
        sample: the input of a training step, or a tuple of inputs; products are tuned for exactly these sizes.
        use_eager: use plain torch, which stores the combined weight during a product, where it is the fastest. It is
            timed in any case, and a line on stderr says where it would win.

    Returns:
        A record for each product that differs in shapes, strides, alignment or dtypes.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no product of the model is computed by a Triton kernel, or a module is divided among processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_undivided(model, "warm up before dividing the model")
    products = _products(model, sample)
    if not products:
        raise ValueError(f"model: expected a model on a GPU with fused layers, got a {type(model).__name__} without")
    paths = {key.device: records.path_of("times", key.device, plans.KERNELS) for key in products}
    caches = {device: _times(records.read(path)) for device, path in paths.items()}
    timed = {}
    for key, product in tqdm(products.items(), desc="tuning", unit="product"):
        cache = caches[key.device]
        with device_of(product[0]):
            named = {str(plan): plan for plan in plans.worth_timing(product)}
            if not cache.get(str(key), {}).keys() >= named.keys():
                cache[str(key)] = _time(key, product, named)
        timed[key] = named, cache[str(key)]
    tuned = [_choose(key, *found, use_eager) for key, found in timed.items()]
    for device, cache in caches.items():
        records.write(paths[device], cache)
    winning = sum(record.eager_wins for record in tuned)
    if winning and not use_eager:
        message = "would be faster with a transient combined weight: warmup(..., use_eager=True) allows it"
        tqdm.write(f"{winning} of {len(tuned)} products {message}", file=sys.stderr)
    return tuned


def _choose(key: Problem, named: dict[str, Plan], times: dict[str, float], use_eager: bool) -> Tuned:
    """Use from now on the fastest plan that runs and was not found faulty meanwhile, in this product or another."""
    faults = records.faults(key.device, plans.KERNELS)
    right = {name: plan for name, plan in named.items() if plans.variant(plan, key) not in faults}
    times = {name: times[name] for name in right if name in times}
    runs = [name for name, time in times.items() if time < math.inf]
    allowed = [name for name in runs if use_eager or named[name] != EAGER]
    fastest = min(allowed, key=times.__getitem__, default=str(EAGER))
    TUNED[key] = named[fastest]
    return Tuned(key, times, fastest)


def _products(model: nn.Module, sample: Tensor | tuple[Any, ...]) -> dict[Problem, Product]:
    inputs = sample if isinstance(sample, tuple) else (sample,)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    leaves = (*model.parameters(), *tree_leaves(inputs))
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    gpus = {leaf.device.index for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(gpus), plans.recording() as products:
        outputs = tree_leaves(functional_call(model, buffers, inputs))
        losses = [output.float().square().sum() for output in outputs if output.requires_grad]
        if losses:
            torch.autograd.grad(losses, wanted, allow_unused=True)
    return products


def _times(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the times in a file's content; nothing if it has another form."""
    try:
        return {str(key): {str(name): float(time) for name, time in times.items()} for key, times in content.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _time(key: Problem, product: Product, named: dict[str, Plan]) -> dict[str, float]:
    """Return milliseconds of the plans that run and are correct; infinite if the device has too few resources."""
    milliseconds = {}
    sizes = ", ".join(str(tuple(operand.shape)) for operand in product.operands if isinstance(operand, Tensor))
    for name, plan in named.items():
        try:
            with torch.no_grad(), torch.autocast(product[0].device.type, enabled=False):
                if plan != EAGER and (fault := verify(plan, product).fault):
                    faulty = plans.variant(plan, key)
                    plans.remember(key.device, {faulty: {sizes: fault}})
                    _warn(f"{faulty} is wrong and is not used any more: {fault}")
                else:
                    milliseconds[name] = _milliseconds(partial(gemm.compute, plan, product))
        except triton.OutOfResources:
            milliseconds[name] = math.inf
        except NotCompiledError as error:
            plans.leave_out(plan, product, error)
        except Exception as error:
            if product[0].is_cuda:
                torch.cuda.synchronize()  # raises if the failure left the device unusable
            _warn(f"{product.name} by {name} failed and is left out: {type(error).__name__}: {error}")
    return milliseconds


def _warn(message: str) -> None:
    warnings.warn(f"warmup: {message}", stacklevel=4)


def _milliseconds(function: Callable[[], object]) -> float:
    return triton.testing.do_bench(function, return_mode="median")
