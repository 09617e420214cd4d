"""How far the predictions are from an H200's times, by kernel: every plan of every layer in the table of products.

The constants in `cost.py` are fitted to these very times. Kernels that the package no longer has are left out.
"""

import re
from collections import defaultdict
from statistics import median

from tqdm import tqdm

from benchmarks import results
from benchmarks.compile_report import products
from benchmarks.cost import H200, plain
from benchmarks.predictions import measured, predict, sizes
from benchmarks.products import LAYERS, WEIGHTS
from benchmarks.results import Row
from m2pt_kernels import gemm_pointers, gemm_tma
from m2pt_kernels.plans import Plan, gemm_hopper
from m2pt_kernels.tiles import GradTile


def errors() -> dict[tuple[str, str], list[float]]:
    """Return predicted over measured time minus 1, by kernel and product."""
    found, times = defaultdict(list), measured()
    for layer, weights in tqdm([(layer, weights) for layer in LAYERS for weights in WEIGHTS], unit="layer"):
        for position, product in enumerate(products(*layer[1:], weights)):
            known = times.get((layer.name, layer.tokens, weights, product.name))
            if known is None:
                continue
            found["plain GEMM", product.name].append(plain(*sizes(layer, product.name), H200) / known["plain"] - 1)
            for name in known.keys() - {"plain"}:
                plan = plan_of(name, product.name)
                if plan is not None:
                    time = predict(H200, layer, weights, position, plan)[0].total
                    found[plan.by, product.name].append(time / (known["plain"] * known[name]) - 1)
    return found


def plan_of(name: str, product: str) -> Plan | None:
    """Return the plan with a name, such as "tma 128x256x64x4x3 in 2 splits"; None if there is no such kernel."""
    by, sizes, splits = re.fullmatch(r"(\w+) (\w+)(?: in (\d+) splits)?", name).groups(default="1")
    modules = {"hopper": gemm_hopper, "tma": gemm_tma, "pointers": gemm_pointers}
    if by not in modules:
        return None
    kind = GradTile if product == "grad_parameters" else modules[by].CombinedTile
    values = (size == "True" if size in ("True", "False") else int(size) for size in sizes.split("x"))
    return Plan(by, kind(*values), int(splits))


def rows() -> list[Row]:
    return [
        {
            "kernel": kernel,
            "product": product,
            "times": len(found),
            "median error": median(map(abs, found)),
            "mean": sum(found) / len(found),
            "lowest": min(found),
            "highest": max(found),
        }
        for (kernel, product), found in sorted(errors().items())
    ]


if __name__ == "__main__":
    results.run("prediction-errors", "h200", rows, __doc__)
