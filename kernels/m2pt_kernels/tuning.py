"""Tuning ahead of training: every way to compute a model's products is timed once, and the fastest used from then on.

Nothing is timed unless `warmup` is called: a product that was not takes the first of its candidates.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from . import gemm, ops, records
from .configs import EAGER, TUNED, Plan, problem, variant
from .divided import check_undivided
from .verification import verify

_OPERATORS = {
    torch.ops.m2pt_kernels.cross_modal_linear.default: "forward",
    torch.ops.m2pt_kernels.grad_input.default: "grad_input",
    torch.ops.m2pt_kernels.grad_parameters.default: "grad_parameters",
}

_ARGUMENTS = {"forward": 6, "grad_input": 5, "grad_parameters": 7}

Calls = dict[tuple, tuple[str, tuple]]
"""A product's name and arguments, by its problem."""


@dataclass(frozen=True)
class Tuned:
    """One product of the model: its problem, what each candidate that ran takes in milliseconds, which one is used."""

    problem: tuple
    milliseconds: dict[str, float]
    plan: str

    @property
    def eager_wins(self) -> bool:
        """Whether plain torch, which makes the combined weight for the time of the product, is the fastest."""
        return min(self.milliseconds, key=self.milliseconds.__getitem__, default=str(EAGER)) == str(EAGER)


def warmup(model: nn.Module, sample: Tensor | tuple[Any, ...], use_eager: bool = False) -> list[Tuned]:
    """Time every way to compute the products of a training step, and use the fastest from now on in this process.

    Runs the model forward and backward once, within the caller's autocast; parameters, gradients, buffers and random
    numbers are left as they were. Before a candidate is timed its result is compared with float64. Times are kept as
    `records` says; what is found there is not timed again. A candidate that fails is left out, with a warning, and one
    whose result is wrong is never used again on such a GPU; if no kernel is left, plain torch computes. Call it before
    `torch.compile` and distributed wrappers.

    Args:
        model: on the GPU that it is trained on.
        sample: the input of a training step, or a tuple of inputs; products are tuned for exactly these sizes.
        use_eager: let plain torch, which makes the combined weight for the time of a product, compute what it is the
            fastest at. It is timed in any case, and a line on stderr says where it would win.

    Returns:
        A record for each product that differs in shapes, strides, alignment or dtypes.

    Raises:
        TypeError: `model` is no module.
        ValueError: no product of the model is computed by a Triton kernel, or a module is divided among processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_undivided(model, "warm up before dividing the model")
    calls = _products(model, sample)
    if not calls:
        raise ValueError(f"model: expected a model on a GPU with fused layers, got a {type(model).__name__} without")
    paths = {device: records.path_of("times", device, gemm.KERNELS) for _, device, *_ in calls}
    caches = {device: _times(records.read(path)) for device, path in paths.items()}
    timed = {}
    for key, (product, arguments) in tqdm(calls.items(), desc="tuning", unit="product"):
        cache = caches[key[1]]
        with gemm.device_of(arguments[0]):
            plans = {str(plan): plan for plan in gemm.usable_plans(key, *arguments)}
            if not cache.get(str(key), {}).keys() >= plans.keys():
                cache[str(key)] = _time(key, product, arguments, plans)
        timed[key] = plans, cache[str(key)]
    tuned = [_choose(key, *found, use_eager) for key, found in timed.items()]
    for device, cache in caches.items():
        records.write(paths[device], cache)
    winning = sum(record.eager_wins for record in tuned)
    if winning and not use_eager:
        message = "would be faster with a transient combined weight: warmup(..., use_eager=True) allows it"
        tqdm.write(f"{winning} of {len(tuned)} products {message}", file=sys.stderr)
    return tuned


def _choose(key: tuple, plans: dict[str, Plan], times: dict[str, float], use_eager: bool) -> Tuned:
    """The fastest from now on, of what runs and has not been found faulty meanwhile, in whichever product."""
    faults = records.faults(key[1], gemm.KERNELS)
    times = {name: times[name] for name, plan in plans.items() if name in times and variant(plan, key) not in faults}
    runs = [name for name, time in times.items() if time < math.inf]
    allowed = [name for name in runs if use_eager or plans[name] != EAGER]
    fastest = min(allowed, key=times.__getitem__, default=str(EAGER))
    TUNED[key] = plans[fastest]
    return Tuned(key, times, fastest)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if product := _OPERATORS.get(function):
            arguments = _flattened(product, *args)
            if ops.path_of(*(argument for argument in arguments if isinstance(argument, Tensor))) is gemm:
                with gemm.device_of(arguments[0]):
                    arguments = gemm.prepared(product, *arguments)
                    self.calls.setdefault(problem(product, *arguments), (product, arguments))
        return function(*args, **(kwargs or {}))


def _flattened(product: str, first: Tensor, second: Tensor, *others: Any) -> tuple:
    """The arguments of a product in `gemm`, from those of its operator."""
    if product == "grad_parameters":
        second = ops.flat(second)
    left_out = _ARGUMENTS[product] - 2 - len(others)
    return ops.flat(first), second, *others, *(None,) * left_out


def _products(model: nn.Module, sample: Tensor | tuple[Any, ...]) -> Calls:
    inputs = sample if isinstance(sample, tuple) else (sample,)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    leaves = (*model.parameters(), *tree_leaves(inputs))
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    gpus = {leaf.device.index for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(gpus), _Recorder() as recorder:
        outputs = tree_leaves(functional_call(model, buffers, inputs))
        losses = [output.float().square().sum() for output in outputs if output.requires_grad]
        if losses:
            torch.autograd.grad(losses, wanted, allow_unused=True)
    return recorder.calls


def _times(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What was timed before; nothing, if it is not that."""
    try:
        return {str(key): {str(name): float(time) for name, time in times.items()} for key, times in content.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _time(key: tuple, product: str, arguments: tuple, plans: dict[str, Plan]) -> dict[str, float]:
    """Milliseconds of the plans that run and are right; infinite where the device has too few resources."""
    milliseconds = {}
    sizes = ", ".join(str(tuple(argument.shape)) for argument in arguments if isinstance(argument, Tensor))
    for name, plan in plans.items():
        try:
            with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
                if plan != EAGER and (fault := verify(plan, product, *arguments).fault):
                    faulty = variant(plan, key)
                    records.remember(key[1], gemm.KERNELS, {faulty: {sizes: fault}})
                    _warn(f"{faulty} is wrong and is not used any more: {fault}")
                else:
                    milliseconds[name] = _milliseconds(partial(gemm.compute, plan, product, *arguments))
        except triton.OutOfResources:
            milliseconds[name] = math.inf
        except Exception as error:
            if arguments[0].is_cuda:
                torch.cuda.synchronize()  # raises where the failure has left the device unusable
            _warn(f"{product} by {name} failed and is left out: {type(error).__name__}: {error}")
    return milliseconds


def _warn(message: str) -> None:
    warnings.warn(f"warmup: {message}", stacklevel=4)


def _milliseconds(function: Callable[[], object]) -> float:
    return triton.testing.do_bench(function, return_mode="median")
