"""Predicted time of each product of a ViT's linear layers on named GPUs, beside a modelled plain GEMM.

No GPU is needed, and nothing is timed except "measured / plain", on an H200 where it ran that plan (`python -m
benchmarks.products`). Times are in microseconds; a pipe's column is its time as if it worked alone. Ratios are the
product's time over the plain GEMM's: above 1 is slower. "waves" are the tiles that the busiest SM computes one after
the other, and wave efficiency is the useful part of what all SMs could multiply meanwhile. "exposed" is the time that
k-steps wait while their busiest pipe is idle, such as for combining that does not overlap with MMA; "fixed" is launch,
prologue and epilogue. The plain GEMM has the best of six tiles, its reduction split into up to 16 parts or not, and its
tiles shared between SMs so that L2 does not limit it.
Constants are fitted to the H200 at 64 images (`cost.py`; `prediction_errors.py` shows how well) and assumed for 4
images and for the A100 and B200, on which nothing ran. Clocks are from the data sheets. An H100 differs from an H200 by
its HBM, which limits no row.
"""

from collections.abc import Iterator

from tqdm import tqdm

from benchmarks import results
from benchmarks.compile_report import ACTIVATIONS, WEIGHTS, chosen, kernel, products
from benchmarks.cost import A100, B200, H200, Estimate, Gpu, Launch, costs_of, estimate, partial_bytes, plain
from benchmarks.products import LAYERS, Layer
from benchmarks.products import WEIGHTS as MEASURED_WEIGHTS
from benchmarks.results import Row
from m2pt_kernels.plans import Plan
from m2pt_kernels.products import Product
from m2pt_kernels.tiles import ceil_div, count_tiles

IMAGES = (64, 4)
SHOWN = [layer for layer in LAYERS if "ViT-B" in layer.name or layer.name in ("ViT-L mlp.fc1", "ViT-g mlp.fc2")]


def measured() -> dict[tuple[str, int, str, str], dict[str, float]]:
    """By layer, tokens, weights and product: the plain GEMM's microseconds, and every plan's time over them."""
    found = {}
    for row in results.read(results.TRACKED / "products-h200.md"):
        others = (other.rpartition(" ") for other in row["others / plain"].split(", "))
        ratios = {plan: float(ratio) for plan, _, ratio in others}
        ratios |= {"plain": row["plain GEMM, us"], row["its plan"]: row["this package / plain"]}
        found[row["layer"], row["tokens"], row["weights"], row["product"]] = ratios
    return found


def sizes(layer: Layer, product: str) -> tuple[int, int, int]:
    """Return the rows and columns of a product's result, and its depth."""
    return {
        "forward": (layer.tokens, layer.out_features, layer.in_features),
        "grad_input": (layer.tokens, layer.in_features, layer.out_features),
        "grad_parameters": (layer.out_features, layer.in_features, layer.tokens),
    }[product]


def predict(gpu: Gpu, layer: Layer, weights: str, position: int, plan: Plan) -> tuple[Estimate, float]:
    """Predict `products(...)[position]` with a plan; also return its wave efficiency."""
    made = kernel(f"sm_{gpu.arch}", weights, position, plan)
    rows, columns, depth = sizes(layer, made.product)
    weight_dtype, aux_dtype, _ = WEIGHTS[weights]
    weight_bytes = layer.in_features * layer.out_features * (weight_dtype.itemsize + aux_dtype.itemsize)
    steps = ceil_div(depth, made.depth)
    launch = Launch(
        tiles=count_tiles(plan.tile, rows, columns),
        steps=ceil_div(steps, made.unrolled) * made.unrolled,
        terms=made.terms._asdict(),
        hbm_bytes=weight_bytes + layer.tokens * (layer.in_features + layer.out_features) * ACTIVATIONS.itemsize,
        products=made.products,
        splits=plan.splits,
        partial_bytes=partial_bytes(rows, columns, plan.splits),
        resident=made.resident,
    )
    found = estimate(launch, costs_of(plan.by, made.product, gpu.arch), gpu)
    multiplied = made.rows * made.columns * made.depth * ceil_div(launch.steps, plan.splits)
    return found, rows * columns * depth / (found.waves * gpu.multiprocessors * multiplied)


def report(gpu: Gpu) -> Iterator[Row]:
    """Yield the rows of one GPU."""
    ratios = measured() if gpu == H200 else {}
    for layer in SHOWN:
        for images in IMAGES:
            shown = layer._replace(tokens=layer.tokens // 64 * images)
            for weights in MEASURED_WEIGHTS:
                for position, product in enumerate(products(*shown[1:], weights)):
                    yield row(gpu, shown, weights, position, product, ratios)


def row(gpu: Gpu, layer: Layer, weights: str, position: int, product: Product, ratios: dict) -> Row:
    """Predict `products(...)[position]` with the chosen plan, beside what was measured of that plan, if anything."""
    plan = chosen(f"sm_{gpu.arch}", product, gpu.multiprocessors)
    found, efficiency = predict(gpu, layer, weights, position, plan)
    modelled = plain(*sizes(layer, product.name), gpu)
    known = ratios.get((layer.name, layer.tokens, weights, product.name), {})
    return {
        "GPU": gpu.name,
        "layer": layer.name,
        "tokens": layer.tokens,
        "weights": weights,
        "product": product.name,
        "plan": str(plan),
        "waves": found.waves,
        "wave efficiency": efficiency,
        **found.terms,
        "overlap": costs_of(plan.by, product.name, gpu.arch).overlap,
        "predicted, us": found.total,
        "predicted plain, us": modelled,
        "measured plain, us": known.get("plain", "-"),
        "predicted / plain": found.total / modelled,
        "measured / plain": known.get(str(plan), "-"),
    }


def predict_all() -> list[Row]:
    return [row for gpu in tqdm((A100, H200, B200), unit="GPU") for row in report(gpu)]


if __name__ == "__main__":
    results.run("predictions", "offline", predict_all, __doc__)
