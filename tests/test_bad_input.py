"""Bad input to every public function: an exception of a documented type whose message begins with the argument's name,
or with the file, layer or entry at fault; and models, files and data are as they were."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import tiny_model
from torch import nn

import m2pt_kernels
from m2pt import (
    FusedCrossModalLinear,
    cross_modal_scales,
    describe_pathways,
    freeze_for_linear_probe,
    merge_pathways,
    quantization_errors,
    quantize_aux,
    remove_auxiliary,
    reparameterize_aux_into_target_model,
    scale_table,
    step_in_backward,
)
from m2pt.checkpoint_formats import convert_state_dict, load_auxiliary, load_pretrained, read_checkpoint
from m2pt.checkpoints import load_state_dict, merge_state_dict, save_state_dict
from m2pt.cli import main
from m2pt.data import create_dataset
from m2pt.matrix import Matrix, load_matrix, run_matrix
from m2pt.models import MaskedAutoencoder, create_model
from m2pt.saved_bytes import published_formulation, saved_for_backward_bytes
from m2pt.train import Recipe, evaluate_checkpoint, load_recipe, parse_assignment, pretrain, train
from m2pt_kernels import combined_weight, cross_modal_linear, dequantize, implementation, quantize

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 4}


small = partial(tiny_model, "image", 10, **VIT)


def connected(**settings):
    return reparameterize_aux_into_target_model(small(), small(), **settings)


PLAIN, AUX, QUANTIZED, CONNECTED_TO = small(), small(), connected(aux_dtype="int8"), small()
CONNECTED = reparameterize_aux_into_target_model(small(), CONNECTED_TO)
LAYER = CONNECTED.blocks[0].attn.proj
MODELS = (PLAIN, AUX, CONNECTED, QUANTIZED)
META = connected().to("meta")

X, W, A, S, B = torch.ones(2, 64), torch.ones(4, 64), torch.full((4, 64), 0.5), torch.ones(1), torch.ones(4)
INT8, INT4, FLOAT8 = (quantize(A, storage)[0] for storage in ("int8", "int4", "float8_e4m3fn"))
ROWS = torch.ones(4, 1)
"""The scales of an int8 matrix."""


def linear(**changed):
    return partial(cross_modal_linear, **({"x": X, "weight": W, "aux_weight": A, "scale": S, "bias": B} | changed))


def combine(**changed):
    good = {"weight": W, "aux_weight": A, "scale": S, "dtype": torch.float32}
    return partial(combined_weight, **(good | changed))


def layer(**changed):
    return partial(FusedCrossModalLinear, **({"in_features": 64, "out_features": 4, "aux_weight": A} | changed))


def connect(**changed):
    return partial(reparameterize_aux_into_target_model, **({"target_model": PLAIN, "aux_model": AUX} | changed))


def merge(**changed):
    good = {"a.weight": W, "a.aux_weight": A, "a.cross_modal_scale": S}
    return partial(merge_state_dict, good | {f"a.{name}": value for name, value in changed.items()})


def tiny(train=train, out="out", **overrides):
    """`train` or `pretrain` of a small recipe, with `optimizer__name` for `optimizer.name`."""
    recipe = load_recipe("tiny_image" if train is not pretrain else "pretrain_tiny_image")
    return lambda: train(
        recipe.with_overrides({key.replace("__", "."): value for key, value in overrides.items()}), out
    )


def build(modality="image", **overrides):
    settings = VIT if modality == "image" else {}
    return partial(create_model, modality, **({"size": "tiny", "num_classes": 2} | settings | overrides))


def entered(context, *arguments):
    def call():
        with context(*arguments):
            pass

    return call


def matrix(text):
    def call():
        Path("own.toml").write_text(text)
        try:
            load_matrix("own.toml")
        finally:
            Path("own.toml").unlink()

    return call


NO_TENSORS = {"a list": torch.Tensor.tolist, "an array": torch.Tensor.numpy}
LAYOUTS = {
    "sparse": torch.Tensor.to_sparse,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor], layout=torch.jagged),
} | ({"mkldnn": torch.Tensor.to_mkldnn} if torch.backends.mkldnn.is_available() else {})


def kinds_of(make, **tensors):
    """Each of these arguments as something that is no ordinary tensor."""
    rows = {}
    for name, good in tensors.items():
        for kind, change in NO_TENSORS.items():
            bad = change(good)
            rows[f"{name}: {kind}"] = (
                make(**{name: bad}),
                TypeError,
                f"{name}: expected a tensor, got {type(bad).__name__}",
            )
        for kind, change in LAYOUTS.items():
            rows[f"{name}: {kind}"] = make(**{name: change(good)}), ValueError, f"{name}: expected a dense tensor, got "
        complex_kind = good.to(torch.complex64)
        rows[f"{name}: complex"] = make(**{name: complex_kind}), TypeError, f"{name}: .*torch.complex64"
    return rows


def elsewhere(make, **tensors):
    """Each of these arguments on another device than the others."""
    return {
        f"{name}: on the meta device": (make(**{name: good.to("meta")}), ValueError, ".*expected .* device .*meta")
        for name, good in tensors.items()
    }


KERNELS = {
    "cross_modal_linear": kinds_of(linear, x=X, weight=W, aux_weight=A, scale=S, bias=B)
    | elsewhere(linear, x=X, weight=W, aux_weight=A, scale=S, bias=B)
    | {
        "x: missing": (linear(x=None), TypeError, "x: expected a tensor, got NoneType"),
        "x: another width": (linear(x=X[:, 1:]), ValueError, "x: "),
        "x: no dimensions": (linear(x=torch.ones(())), ValueError, "x: "),
        "x: integers": (linear(x=X.long()), TypeError, "x: "),
        "x: float8": (linear(x=X.to(torch.float8_e4m3fn)), TypeError, "x: "),
        "weight: missing": (linear(weight=None), TypeError, "weight: expected a tensor, got NoneType"),
        "weight: flat": (linear(weight=B), ValueError, "weight: "),
        "weight: another dtype": (linear(weight=W.bfloat16()), TypeError, "weight: "),
        "aux_weight: missing": (linear(aux_weight=None), TypeError, "aux_weight: expected a tensor, got NoneType"),
        "aux_weight: another shape": (linear(aux_weight=A.t()), ValueError, "aux_weight: "),
        "aux_weight: integers": (linear(aux_weight=INT8), TypeError, "aux_weight: "),
        "aux_weight: float8 without its scales": (linear(aux_weight=FLOAT8), TypeError, "aux_weight: "),
        "aux_weight: float8 of another kind": (
            linear(aux_weight=A.to(torch.float8_e5m2)),
            TypeError,
            "aux_weight: .*e5m2",
        ),
        "aux_weight: a stack of one model": (linear(aux_weight=A[None]), ValueError, "aux_weight: "),
        "aux_weight: two of another shape": (linear(aux_weight=torch.ones(2, 64, 4)), ValueError, "aux_weight: "),
        "aux_weight: a stack of stacks": (linear(aux_weight=torch.ones(2, 2, 4, 64)), ValueError, "aux_weight: "),
        "scale: missing": (linear(scale=None), TypeError, "scale: expected a tensor, got NoneType"),
        "scale: a number": (linear(scale=0.5), TypeError, "scale: expected a tensor, got float"),
        "scale: no dimensions": (linear(scale=torch.tensor(0.5)), ValueError, "scale: "),
        "scale: two for one model": (linear(scale=torch.ones(2)), ValueError, "scale: "),
        "scale: one for two models": (linear(aux_weight=torch.ones(2, 4, 64)), ValueError, "scale: "),
        "scale: integers": (linear(scale=S.int()), TypeError, "scale: "),
        "bias: another length": (linear(bias=torch.ones(3)), ValueError, "bias: "),
    },
    "cross_modal_linear, quantised": kinds_of(partial(linear, aux_weight=INT8), aux_weight_scale=ROWS)
    | {
        f"aux_weight_scale: {what}": (linear(aux_weight=aux_weight, aux_weight_scale=scales), error, f"{name}: ")
        for what, aux_weight, scales, error, name in (
            ("of a plain one", A, ROWS, TypeError, "aux_weight_scale"),
            ("half", INT8, ROWS.half(), TypeError, "aux_weight_scale"),
            ("elsewhere", INT8, ROWS.to("meta"), ValueError, "aux_weight_scale"),
            ("flat", INT8, B, ValueError, "aux_weight_scale"),
            ("int4's", INT8, ROWS.expand(4, 2), ValueError, "aux_weight_scale"),
            ("of two models", INT8, torch.ones(2, 4, 1), ValueError, "aux_weight_scale"),
            ("of one of two models", INT8.expand(2, 4, 64), ROWS, ValueError, "aux_weight_scale"),
            ("that are trained", INT8, ROWS.clone().requires_grad_(), ValueError, "aux_weight"),
            ("of float8 that is trained", FLOAT8.clone().requires_grad_(), ROWS, ValueError, "aux_weight"),
            ("of int8 of another width", INT8[:, :32], ROWS, ValueError, "aux_weight"),
            ("of int4 with int8's shape", INT8.view(torch.uint8), ROWS, ValueError, "aux_weight"),
            ("of int4 of another width", INT4[:, :24], ROWS, ValueError, "aux_weight"),
        )
    },
    "combined_weight": kinds_of(combine, weight=W, aux_weight=A, scale=S)
    | elsewhere(combine, weight=W, aux_weight=A, scale=S)
    | {
        "weight: missing": (combine(weight=None), TypeError, "weight: expected a tensor, got NoneType"),
        "weight: flat": (combine(weight=B), ValueError, "weight: expected shape"),
        "weight: integers": (combine(weight=W.int()), TypeError, "weight: expected a floating"),
        "aux_weight: another shape": (combine(aux_weight=A.t()), ValueError, "aux_weight: expected shape"),
        "aux_weight: int8 without its scales": (combine(aux_weight=INT8), TypeError, "aux_weight: "),
        "scale: two for one model": (combine(scale=torch.ones(2)), ValueError, "scale: expected shape"),
        "scale: integers": (combine(scale=S.int()), TypeError, "scale: expected a floating"),
        "dtype: a name": (combine(dtype="float32"), TypeError, "dtype: expected .* got 'float32'"),
        "dtype: integers": (combine(dtype=torch.int8), TypeError, "dtype: expected .* got torch.int8"),
        "aux_weight_scale: of a plain one": (combine(aux_weight_scale=ROWS), TypeError, "aux_weight_scale: "),
    },
    "quantize": kinds_of(lambda weight: partial(quantize, weight, "int8"), weight=W)
    | {
        "weight: missing": (lambda: quantize(None, "int8"), TypeError, "weight: expected a tensor, got NoneType"),
        "weight: integers": (lambda: quantize(W.int(), "int8"), TypeError, "weight: expected a floating"),
        "weight: quantised already": (lambda: quantize(FLOAT8, "int8"), TypeError, "weight: expected a floating"),
        "weight: flat": (lambda: quantize(B, "int8"), ValueError, r"weight: .*got \(4,\)"),
        "weight: no rows": (lambda: quantize(W[:0], "int8"), ValueError, r"weight: .*got \(0, 64\)"),
        "weight: NaN": (lambda: quantize(W * torch.nan, "int8"), ValueError, "weight: .*NaN"),
        "weight: not in groups": (lambda: quantize(W[:, 1:], "int4"), ValueError, "weight: .*multiple of 64"),
        "dtype: unknown": (lambda: quantize(W, "int2"), ValueError, "dtype: expected one of int8, int4.*got 'int2'"),
        "dtype: of torch": (lambda: quantize(W, torch.int8), ValueError, "dtype: expected one of .*got torch.int8"),
        "dtype: a list": (lambda: quantize(W, ["int8"]), ValueError, "dtype: expected one of .*got .'int8'."),
    },
    "dequantize": {
        "data: a list": (lambda: dequantize([1], ROWS), TypeError, "data: expected a tensor, got list"),
        "data: sparse": (lambda: dequantize(INT8.to_sparse(), ROWS), ValueError, "data: expected a dense tensor"),
        "data: floating": (lambda: dequantize(A, ROWS), TypeError, "data: expected .*int8.* got torch.float32"),
        "scale: a number": (lambda: dequantize(INT8, 1.0), TypeError, "scale: expected a tensor, got float"),
        "scale: half": (
            lambda: dequantize(INT8, ROWS.half()),
            TypeError,
            "scale: expected .*float32.* got torch.float16",
        ),
        "scale: other rows": (lambda: dequantize(INT8, ROWS[1:]), ValueError, r"scale: expected shape \(4, 1\)"),
        "scale: int4's": (lambda: dequantize(INT8, torch.ones(4, 2)), ValueError, r"scale: expected shape \(4, 1\)"),
        "scale: of other groups": (lambda: dequantize(INT4, torch.ones(4, 2)), ValueError, r"scale: expected shape"),
        "scale: elsewhere": (lambda: dequantize(INT8, ROWS.to("meta")), ValueError, "scale: expected .*device"),
        "data: half a group": (lambda: dequantize(INT4[:, :24], ROWS), ValueError, "data: expected .*multiple of 32"),
    },
    "implementation": {
        "name: unknown": (entered(implementation, "fast"), ValueError, "name: expected .*got 'fast'"),
        "name: missing": (entered(implementation, None), ValueError, "name: expected .*got None"),
    },
    "warmup": {
        "model: a name": (
            lambda: m2pt_kernels.warmup("vit", X),
            TypeError,
            "model: expected a torch.nn.Module, got str",
        ),
        "model: not on a GPU": (
            lambda: m2pt_kernels.warmup(nn.Linear(64, 4), X),
            ValueError,
            "model: expected a model on a GPU",
        ),
    },
}


def no_layers(function):
    """What a function refuses that wants a connected model."""
    return {
        "model: a name": (lambda: function("vit"), TypeError, "model: expected a torch.nn.Module, got str"),
        "model: a state dict": (lambda: function({}), TypeError, "model: expected a torch.nn.Module, got dict"),
        "model: not connected": (lambda: function(PLAIN), ValueError, "model: .*VisionTransformer"),
    }


PATHWAY = {
    "FusedCrossModalLinear": {
        "in_features: a fraction": (layer(in_features=64.0), TypeError, "in_features: expected .* got 64.0"),
        "in_features: text": (layer(in_features="64"), TypeError, "in_features: expected .* got '64'"),
        "in_features: negative": (layer(in_features=-64), ValueError, "in_features: expected .* got -64"),
        "out_features: a fraction": (layer(out_features=4.0), TypeError, "out_features: expected .* got 4.0"),
        "origin_layer: no layer": (layer(origin_layer=W), TypeError, "origin_layer: "),
        "origin_layer: a convolution": (
            layer(origin_layer=nn.Conv1d(64, 4, 1)),
            TypeError,
            "origin_layer: .*got Conv1d",
        ),
        "origin_layer: connected": (layer(origin_layer=LAYER), TypeError, "origin_layer: .*got FusedCrossModalLinear"),
        "origin_layer: another shape": (layer(origin_layer=nn.Linear(4, 64)), ValueError, "origin_layer: "),
        "aux_weight: missing": (layer(aux_weight=None), TypeError, "aux_weight: .*got NoneType"),
        "aux_weight: nothing": (layer(aux_weight=[]), TypeError, "aux_weight: .*got list"),
        "aux_weight: an array": (layer(aux_weight=A.numpy()), TypeError, "aux_weight: .*got ndarray"),
        "aux_weight: integers": (layer(aux_weight=INT8), TypeError, "aux_weight: .*got torch.int8"),
        "aux_weight: float8": (layer(aux_weight=FLOAT8), TypeError, "aux_weight: .*got torch.float8_e4m3fn"),
        "aux_weight: complex": (layer(aux_weight=A.to(torch.complex64)), TypeError, "aux_weight: .*torch.complex64"),
        "aux_weight: another shape": (layer(aux_weight=A.t()), ValueError, r"aux_weight: .*got \(64, 4\)"),
        "aux_weight: one row": (layer(aux_weight=A[:1]), ValueError, r"aux_weight: .*got \(1, 64\)"),
        "aux_weight: flat": (layer(aux_weight=A.flatten()), ValueError, r"aux_weight: .*got \(256,\)"),
        "aux_weight: two in one tensor": (
            layer(aux_weight=A.expand(2, 4, 64)),
            ValueError,
            "aux_weight: expected shape",
        ),
        "aux_weight: one of two missing": (layer(aux_weight=[A, None]), TypeError, "aux_weight: .*got NoneType"),
        "aux_weight: one of two of another shape": (
            layer(aux_weight=[A, A.t()]),
            ValueError,
            r"aux_weight: .*got \(64, 4\)",
        ),
        "aux_weight: one of two without data": (layer(aux_weight=[A, A.to("meta")]), ValueError, "aux_weight: .*meta"),
        "aux_weight: no data": (layer(aux_weight=A.to("meta")), ValueError, "aux_weight: .*meta"),
        "is_aux_trainable: text": (layer(is_aux_trainable="no"), TypeError, "is_aux_trainable: expected .* got 'no'"),
    }
    | {
        f"aux_weight: {kind}": (layer(aux_weight=change(A)), ValueError, "aux_weight: expected a dense tensor, got ")
        for kind, change in LAYOUTS.items()
    },
    "FusedCrossModalLinear.forward": {
        "x: a list": (lambda: LAYER([1.0]), TypeError, "x: expected a tensor, got list"),
        "x: another width": (lambda: LAYER(X[:, 1:]), ValueError, "x: expected shape"),
        "x: another dtype": (lambda: LAYER(X.double()), TypeError, "weight: expected torch.float64"),
        "x: elsewhere": (lambda: LAYER(X.to("meta")), ValueError, "x: .*got meta"),
    },
    "FusedCrossModalLinear.quantize_aux": {
        "dtype: unknown": (lambda: LAYER.quantize_aux("int3"), ValueError, "dtype: expected .*bfloat16.* got 'int3'"),
        "dtype: of torch": (lambda: LAYER.quantize_aux(torch.int8), ValueError, "dtype: expected .* got torch.int8"),
    },
    "FusedCrossModalLinear.merge": {
        "no data": (META.blocks[0].attn.proj.merge, ValueError, "there is nothing to merge on the meta device"),
    },
    "reparameterize_aux_into_target_model": {
        "target_model: a name": (connect(target_model="vit"), TypeError, "target_model: expected .*Module, got str"),
        "target_model: missing": (connect(target_model=None), TypeError, "target_model: expected .*Module, got None"),
        "target_model: connected to the same": (
            connect(target_model=CONNECTED, aux_model=CONNECTED_TO),
            ValueError,
            "aux_model: blocks.0.attn.qkv: it is connected to this auxiliary weight already",
        ),
        "target_model: connected to quantised ones": (
            connect(target_model=QUANTIZED),
            ValueError,
            "aux_model: blocks.0.attn.qkv: aux_dtype: expected 'int8'",
        ),
        "target_model: connected to frozen ones": (
            connect(target_model=CONNECTED, is_aux_trainable=True),
            ValueError,
            "aux_model: blocks.0.attn.qkv: is_aux_trainable: expected False",
        ),
        "target_model: several bodies": (
            connect(target_model=nn.ModuleDict({"a": small(), "b": small()})),
            ValueError,
            r"target_model: ModuleDict has several .* 'a.blocks' \(1 blocks\), 'b.blocks' \(1 blocks\)",
        ),
        "target_model: no body": (
            connect(target_model=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))),
            ValueError,
            "target_model: Sequential has no sequence of equal blocks",
        ),
        "aux_model: connected": (
            connect(target_model=PLAIN, aux_model=CONNECTED),
            ValueError,
            "aux_model: blocks.0.attn.qkv is connected to an auxiliary model already",
        ),
        "aux_model: a number as name": (connect(aux_model={1: AUX}), TypeError, r"aux_model\[1\]: expected .* by name"),
        "aux_model: nothing by name": (connect(aux_model={}), ValueError, "aux_model: expected .*, got none"),
        "aux_model: a name that is taken": (
            connect(target_model=CONNECTED, aux_model={"VisionTransformer": AUX}),
            ValueError,
            "aux_model: target_model is connected to a model 'VisionTransformer' already",
        ),
        "aux_model: another depth": (
            connect(aux_model=small(depth=2)),
            ValueError,
            "aux_model: expected 1 blocks in 'blocks' .* got 2: choose with blocks=",
        ),
        "aux_model: wider": (
            connect(aux_model=small(embed_dim=128)),
            ValueError,
            r"aux_model: blocks.0.attn.qkv has .*\(384, 128\), expected \(192, 64\) .*; no layer of this block fits",
        ),
        "aux_model: wider inside": (
            connect(aux_model=small(mlp_ratio=2)),
            ValueError,
            r"aux_model: blocks.0.mlp.fc1 has .*; what fits in this block: attn.qkv, attn.proj",
        ),
        "aux_model: missing": (connect(aux_model=None), TypeError, "aux_model: expected .*, got NoneType"),
        "aux_model: a number": (connect(aux_model=3), TypeError, "aux_model: expected .*, got int"),
        "aux_model: names": (connect(aux_model=["a.pth"]), TypeError, r"aux_model\[0\]: expected .*, got str"),
        "aux_model: a state dict": (
            connect(aux_model=AUX.state_dict()),
            TypeError,
            r"aux_model\['.*'\]: expected .*Tensor",
        ),
        "aux_model: float8": (
            connect(aux_model=small().to(torch.float8_e4m3fn)),
            TypeError,
            "aux_model: blocks.0.attn.qkv: aux_weight: .*float8",
        ),
        "layer_names: a number": (connect(layer_names=5), ValueError, "layer_names: expected .* got 5"),
        "layer_names: numbers": (connect(layer_names=[1]), ValueError, r"layer_names: expected .* got \[1\]"),
        "layer_names: lists": (connect(layer_names=[["mlp.fc1"]]), ValueError, "layer_names: expected .* got "),
        "layer_names: unknown": (connect(layer_names=["mlp.fc3"]), ValueError, "target_model: there is no layer .*fc3"),
        "layer_names: no partner": (connect(layer_names={"mlp.fc1": ()}), ValueError, "layer_names: expected .* got "),
        "layer_names: a number as partner": (connect(layer_names={"mlp.fc1": 1}), ValueError, "layer_names: .* got "),
        "layer_names: a set as partner": (
            connect(layer_names={"attn.proj": {"attn.proj"}}),
            ValueError,
            "layer_names: expected .* got {'attn.proj': {'attn.proj'}}",
        ),
        "layer_names: twice": (
            connect(layer_names={"mlp.fc1": "mlp.fc1", ("mlp.fc1",): "mlp.fc1"}),
            ValueError,
            "layer_names: expected .* different names",
        ),
        "layer_names: an unknown partner": (
            connect(layer_names={"mlp.fc1": "mlp.fc3"}),
            ValueError,
            "aux_model: there is no layer blocks.0.mlp.fc3",
        ),
        "layer_names: other rows": (
            connect(layer_names={"attn.proj": ("attn.proj", "attn.proj")}),
            ValueError,
            r"aux_model: blocks.0.attn.proj \+ blocks.0.attn.proj has weight shape \(128, 64\), expected \(64, 64\)",
        ),
        "main_body_name: a number": (connect(main_body_name=5), TypeError, "main_body_name: expected .* got 5"),
        "main_body_name: three": (connect(main_body_name=("a",) * 3), TypeError, "main_body_name: expected .* got "),
        "main_body_name: a pair of numbers": (connect(main_body_name=(1, 2)), TypeError, "main_body_name: .* got "),
        "main_body_name: unknown": (connect(main_body_name="body"), ValueError, "target_model: .* no module 'body'"),
        "main_body_name: one unknown": (
            connect(main_body_name=("blocks", "body")),
            ValueError,
            "aux_model: VisionTransformer has no module 'body'",
        ),
        "blocks: a number": (connect(blocks=1), TypeError, "blocks: expected .* got 1"),
        "blocks: a mapping": (connect(blocks={0: 0}), TypeError, "blocks: expected .* got {0: 0}"),
        "blocks: a set": (connect(blocks={0}), TypeError, "blocks: expected .* got {0}"),
        "blocks: unknown": (connect(blocks="odd"), ValueError, "blocks: expected one of even, first, last; got 'odd'"),
        "blocks: none": (connect(blocks=[]), TypeError, r"blocks: expected .* got \[\]"),
        "blocks: bools": (connect(blocks=[True]), TypeError, "blocks: expected .* got "),
        "blocks: floats": (connect(blocks=[(0, 0.0)]), TypeError, "blocks: expected .* got "),
        "blocks: three together": (connect(blocks=[(0, 0, 0)]), TypeError, "blocks: expected .* got "),
        "blocks: twice": (connect(blocks=[(0, 0), (0, 0)]), ValueError, "blocks: expected .* once; got "),
        "blocks: beyond the target": (connect(blocks=[1]), ValueError, r"blocks: expected .* below 1 .* got \(1, 1\)"),
        "blocks: beyond the other": (connect(blocks=[(0, 1)]), ValueError, r"blocks: expected .* got \(0, 1\)"),
        "blocks: negative": (connect(blocks=[-1]), ValueError, r"blocks: expected .* got \(-1, -1\)"),
        "is_aux_trainable: text": (
            connect(is_aux_trainable="no"),
            TypeError,
            ".*is_aux_trainable: expected .* got 'no'",
        ),
        "sample: a list": (connect(sample=[X]), TypeError, "sample: expected a tensor, a tuple .* got list"),
        "sample: of another shape": (connect(sample=X), ValueError, "sample: VisionTransformer raised "),
        "aux_dtype: a number": (connect(aux_dtype=8), ValueError, "aux_model: blocks.0.attn.qkv: dtype: .* got 8"),
    },
    "remove_auxiliary": no_layers(lambda model: remove_auxiliary(model, "VisionTransformer"))
    | {
        "name: a number": (lambda: remove_auxiliary(CONNECTED, 0), TypeError, "name: expected .* got 0"),
        "name: unknown": (
            lambda: remove_auxiliary(CONNECTED, "audio"),
            ValueError,
            "name: expected one of VisionTransformer; got 'audio'",
        ),
    },
    "describe_pathways": no_layers(describe_pathways)
    | {"model: no data": (lambda: describe_pathways(META), ValueError, "model: .*meta")},
    "merge_pathways": no_layers(merge_pathways)
    | {"model: no data": (lambda: merge_pathways(META), ValueError, "blocks.0.attn.qkv: .* meta device")},
    "quantize_aux": no_layers(quantize_aux)
    | {
        "dtype: missing": (lambda: quantize_aux(CONNECTED, None), ValueError, "blocks.0.attn.qkv: dtype: .* got None"),
        "dtype: a list": (lambda: quantize_aux(CONNECTED, ["int8"]), ValueError, "blocks.0.attn.qkv: dtype: .*int8"),
    },
    "quantization_errors": no_layers(lambda model: quantization_errors(model, "int8"))
    | {
        "model: no data": (lambda: quantization_errors(META, "int8"), ValueError, "model: .*meta"),
        "dtype: unknown": (
            lambda: quantization_errors(CONNECTED, "int3"),
            ValueError,
            "blocks.0.attn.qkv: dtype: .* got 'int3'",
        ),
    },
    "cross_modal_scales": no_layers(cross_modal_scales)
    | {"model: no data": (lambda: cross_modal_scales(META), ValueError, "model: .*meta")},
    "scale_table": no_layers(scale_table)
    | {"model: no data": (lambda: scale_table(META), ValueError, "model: .*meta")},
    "freeze_for_linear_probe": no_layers(freeze_for_linear_probe)
    | {
        "head_name: missing": (
            lambda: freeze_for_linear_probe(CONNECTED, None),
            TypeError,
            "head_name: expected .* got None",
        ),
    },
    "step_in_backward": {
        "optimizer: a name": (lambda: step_in_backward("adamw"), TypeError, "optimizer: expected .*Optimizer, got 'a"),
        "optimizer: parameters": (lambda: step_in_backward([LAYER.weight]), TypeError, "optimizer: expected "),
        "optimizer: of all parameters at once": (
            lambda: step_in_backward(torch.optim.LBFGS(PLAIN.parameters())),
            ValueError,
            "optimizer: expected .* got LBFGS",
        ),
    },
    "saved_for_backward_bytes": {
        "model: a name": (lambda: saved_for_backward_bytes("vit", X), TypeError, "model: expected .*Module, got str"),
    },
    "published_formulation": {
        "model: a name": (entered(published_formulation, "vit"), TypeError, "model: expected .*Module, got str"),
        "model: not connected": (entered(published_formulation, PLAIN), ValueError, "model: there is no Fused"),
    },
}


def no_path(function, argument="path"):
    """What a function refuses that reads a checkpoint, of which it takes the weights or their average."""
    return {
        "weights: unknown": (
            lambda: function("none.pth", weights="best"),
            ValueError,
            "weights: expected one of ema, raw; got 'best'",
        ),
        "weights: a list": (
            lambda: function("none.pth", weights=["ema"]),
            ValueError,
            "weights: expected one of .*ema",
        ),
        "weights: an average that is not there": (
            lambda: function("plain.safetensors", weights="ema"),
            ValueError,
            "plain.safetensors: there is no moving average",
        ),
        f"{argument}: a number": (lambda: function(5), TypeError, f"{argument}: expected a path, got 5"),
        f"{argument}: missing": (lambda: function(None), TypeError, f"{argument}: expected a path, got None"),
        f"{argument}: no such file": (lambda: function("none.pth"), FileNotFoundError, "none.pth: no such file"),
        f"{argument}: a folder": (lambda: function("."), FileNotFoundError, r"\.: (no such file|a folder without)"),
        f"{argument}: text": (lambda: function("text.pth"), ValueError, "text.pth: not a readable checkpoint"),
        f"{argument}: text named safetensors": (
            lambda: function("text.safetensors"),
            ValueError,
            "text.safetensors: not a readable checkpoint",
        ),
        f"{argument}: sparse tensors": (
            lambda: function("sparse.pth"),
            ValueError,
            "sparse.pth: .*norm1.weight: expected a dense tensor",
        ),
        f"{argument}: tensors without data": (
            lambda: function("meta.pth"),
            ValueError,
            "meta.pth: .*norm1.weight: expected a dense tensor with all",
        ),
    }


def save(state_dict=None, path="out.safetensors"):
    return partial(save_state_dict, {"a": W} if state_dict is None else state_dict, path)


CHECKPOINTS = {
    "load_state_dict": no_path(load_state_dict),
    "read_checkpoint": no_path(read_checkpoint)
    | {
        "path: connected": (
            lambda: read_checkpoint("connected.safetensors"),
            ValueError,
            "connected.safetensors: .*merge",
        )
    },
    "load_auxiliary": no_path(load_auxiliary),
    "load_pretrained": no_path(partial(load_pretrained, PLAIN))
    | {
        "model: a name": (
            lambda: load_pretrained("vit", "plain.safetensors"),
            TypeError,
            "model: expected .*, got str",
        ),
        "model: no data": (
            lambda: load_pretrained(small().to("meta"), "plain.safetensors"),
            ValueError,
            "model: .*meta",
        ),
        "model: connected": (
            lambda: load_pretrained(CONNECTED, "plain.safetensors"),
            ValueError,
            "plain.safetensors: VisionTransformer: missing in the file: .*aux_weight",
        ),
    },
    "convert_state_dict": {
        "state_dict: missing": (lambda: convert_state_dict(None), TypeError, "state_dict: expected tensors by name"),
        "state_dict: a number in it": (
            lambda: convert_state_dict(PLAIN.state_dict() | {"blocks.0.attn.qkv.weight": 3}),
            TypeError,
            "state_dict: .* got int for 'blocks.0.attn.qkv.weight'",
        ),
        "state_dict: no data": (lambda: convert_state_dict(META.state_dict()), ValueError, "state_dict: .*meta"),
        "state_dict: empty": (lambda: convert_state_dict({}), ValueError, "state_dict: expected .* it is empty"),
        "state_dict: connected": (
            lambda: convert_state_dict(CONNECTED.state_dict()),
            ValueError,
            "state_dict: .*connected",
        ),
    },
    "save_state_dict": {
        "state_dict: a tensor": (save(W), TypeError, "state_dict: expected tensors by name, got Tensor"),
        "state_dict: a model": (save(PLAIN), TypeError, "state_dict: expected tensors by name, got VisionTransformer"),
        "state_dict: a number in it": (save({"a": W, "b": 3}), TypeError, "state_dict: .* got int for 'b'"),
        "state_dict: numbered": (save({1: W}), TypeError, "state_dict: .* got Tensor for 1"),
        "state_dict: sparse": (save({"a": W.to_sparse()}), ValueError, "state_dict: a: expected a dense tensor"),
        "state_dict: no data": (save({"a": W.to("meta")}), ValueError, "state_dict: a: .*meta"),
        "state_dict: a dtype that is not stored": (
            save({"a": W.to(torch.complex128)}),
            ValueError,
            "state_dict: .*complex128",
        ),
        "path: a number": (save(path=5), TypeError, "path: expected a path, got 5"),
        "path: a folder": (save(path="folder.safetensors"), OSError, ".*folder.safetensors"),
    },
    "merge_state_dict": {
        "state_dict: a model": (lambda: merge_state_dict(CONNECTED), TypeError, "state_dict: expected tensors by name"),
        "state_dict: a number in it": (merge(weight=3), TypeError, "state_dict: .* got int for 'a.weight'"),
        "weight: flat": (merge(weight=B, aux_weight=B), ValueError, "a: weight: expected shape"),
        "weight: integers": (merge(weight=W.int()), ValueError, "a: weight: expected a floating"),
        "weight: sparse": (merge(weight=W.to_sparse()), ValueError, "state_dict: a.weight: expected a dense tensor"),
        "weight: no data": (merge(weight=W.to("meta")), ValueError, "state_dict: a.weight: .*meta"),
        "aux_weight: another shape": (merge(aux_weight=A.t()), ValueError, "a: aux_weight: expected shape"),
        "aux_weight: sparse": (
            merge(aux_weight=A.to_sparse()),
            ValueError,
            "state_dict: a.aux_weight: expected a dense tensor",
        ),
        "cross_modal_scale: two": (merge(cross_modal_scale=torch.ones(2)), ValueError, "a: .*scale: expected shape"),
        "cross_modal_scale: integers": (
            merge(cross_modal_scale=S.int()),
            ValueError,
            "a: .*scale: expected a floating",
        ),
    },
}


def autoencoder(model=None, mask_ratio=0.75, **settings):
    return partial(MaskedAutoencoder, PLAIN if model is None else model, mask_ratio, **settings)


def data(modality="image", layout="embedded", root=None, split="train", training=False, **settings):
    return partial(create_dataset, modality, layout, root, split, training, **settings)


MODELS_AND_DATA = {
    "create_model": {
        "modality: missing": (build(None), ValueError, "modality: expected one of .* got None"),
        "modality: a list": (build(["image"]), ValueError, "modality: expected one of .* got "),
        "size: a list": (build(size=[192]), ValueError, r"size: expected one of .* got \[192\]"),
        "task: a list": (build(task=[]), ValueError, r"task: expected one of .* got \[\]"),
        "num_classes: negative": (build(num_classes=-1), ValueError, "num_classes: expected .* got -1"),
        "num_classes: text": (build(num_classes="10"), TypeError, "num_classes: expected .* got '10'"),
        "num_classes: a fraction": (build(num_classes=2.5), TypeError, "num_classes: expected .* got 2.5"),
        "overrides: heads that do not divide": (build(num_heads=5), ValueError, "overrides: .*num_heads"),
        "overrides: no heads": (build(num_heads=0), ValueError, "overrides: .*num_heads"),
        "overrides: no patches": (build(patch_size=0), ValueError, "overrides: .*patch_size"),
        "overrides: a negative size": (build(img_size=-32), ValueError, "img_size: expected a patch or more, got "),
        "overrides: text": (build(depth="2"), TypeError, "overrides: .*depth"),
        "overrides: unknown": (build(colour="red"), TypeError, "overrides: .*colour"),
        "overrides: unknown of points": (build("point", colour="red"), TypeError, "overrides: .*colour"),
        "overrides: heads of points": (build("point", num_heads=5), ValueError, "overrides: .*num_heads"),
        "overrides: a mel size of audio": (
            build("audio", img_size=(7, 128)),
            ValueError,
            "img_size: expected a patch or more",
        ),
    },
    "the models' forward": {
        "input: a list": (lambda: PLAIN([1.0]), TypeError, "input: expected a tensor, got list"),
        "input: another shape": (lambda: PLAIN(torch.ones(1, 3, 8, 8)), ValueError, "input: expected shape"),
        "points: a list": (lambda: build("point")()([1.0]), TypeError, "points: expected a tensor, got list"),
        "points without categories": (
            lambda: build("point", task="segmentation")()(torch.ones(2, 8, 3)),
            TypeError,
            "input: expected points and categories, got Tensor",
        ),
        "categories: a number": (
            lambda: build("point", task="segmentation")()((torch.ones(1, 8, 3), 5)),
            TypeError,
            "category: expected a tensor, got int",
        ),
    },
    "MaskedAutoencoder": {
        "model: a name": (autoencoder("vit"), TypeError, "model: expected .* got str"),
        "model: a layer": (autoencoder(nn.Linear(2, 2)), TypeError, "model: expected .* got Linear"),
        "mask_ratio: text": (autoencoder(mask_ratio="0.75"), TypeError, "mask_ratio: expected .* got '0.75'"),
        "mask_ratio: missing": (autoencoder(mask_ratio=None), TypeError, "mask_ratio: expected .* got None"),
        "mask_ratio: NaN": (autoencoder(mask_ratio=float("nan")), ValueError, "mask_ratio: expected .* got nan"),
        "decoder_width: nothing": (autoencoder(decoder_width=0), ValueError, "decoder_width: expected .* got 0"),
        "decoder_width: not by heads": (
            autoencoder(decoder_width=100),
            ValueError,
            "decoder_width: expected .* got 100",
        ),
        "decoder_heads: none": (autoencoder(decoder_heads=0), ValueError, "decoder_heads: expected .* got 0"),
        "decoder_depth: negative": (autoencoder(decoder_depth=-1), ValueError, "decoder_depth: expected .* got -1"),
    },
    "MaskedAutoencoder.forward": {
        "input: a list": (lambda: autoencoder()()([1.0]), TypeError, "input: expected a tensor, got list"),
        "input: another shape": (lambda: autoencoder()()(torch.ones(1, 3, 8, 8)), ValueError, "input: expected shape"),
    },
    "create_dataset": {
        "modality: missing": (data(None), ValueError, "modality: expected one of .*got None"),
        "modality: a list": (data(["image"]), ValueError, "modality: expected one of .*got "),
        "layout: a list": (data(layout=[]), ValueError, r"layout .*: expected one of .*got \[\]"),
        "root: a number": (data(layout="folder", root=5), TypeError, "root: expected a path, got 5"),
        "root: missing": (data(layout="folder"), ValueError, "root: layout folder .* got none"),
        "root: of embedded data": (data(root="."), ValueError, "root: layout embedded"),
        "split: unknown": (data(split="dev"), ValueError, "split: expected one of test, train; got 'dev'"),
        "split: missing": (data(split=None), ValueError, "split: expected one of test, train; got None"),
        "split: a list": (data("video", split=[]), ValueError, r"split: expected one of test, train; got \[\]"),
        "setting: text": (data(size="32"), ValueError, "size: expected a positive integer, got '32'"),
        "setting: a fraction": (data("point", points=1.5), ValueError, "points: expected a positive integer, got 1.5"),
        "setting: text for a probability": (
            data(layout="folder", root="images", erasing="often"),
            ValueError,
            "erasing: expected a probability .* got 'often'",
        ),
        "setting: NaN for a probability": (
            data(layout="folder", root="images", erasing=float("nan")),
            ValueError,
            "erasing: expected a probability .* got nan",
        ),
    },
}

RECIPE = partial(load_recipe, "tiny_image")


def replace(**values):
    return partial(load_recipe, "pretrain_tiny_image", {key.replace("__", "."): value for key, value in values.items()})


NAN = float("nan")
SEEDS = "seeds = [1]\n"
TARGET = "[targets.image]\nrecipe = 'tiny_image'\n"
AUXILIARY = "[auxiliaries]\naudio = 'a.pth'\n"
MATRIX = Matrix({"image": RECIPE()}, {"audio": "a.pth"}, [0])

TRAINING = {
    "Recipe": {
        f"{part}: a name": (partial(Recipe, **vars(RECIPE()) | {part: "tiny"}), TypeError, f"{part}: .* got 'tiny'")
        for part in vars(RECIPE())
    },
    "Recipe.with_overrides": {
        "overrides: a list": (lambda: RECIPE().with_overrides(["a=b"]), TypeError, "overrides: expected .* got .'a=b'"),
        "a wrong value": (
            lambda: RECIPE().with_overrides({"run.seed": "a"}),
            TypeError,
            "run.seed: expected int, got 'a'",
        ),
    },
    "parse_assignment": {
        "text: a number": (lambda: parse_assignment(5), TypeError, "text: expected key.subkey=value, got 5"),
        "text: missing": (lambda: parse_assignment(None), TypeError, "text: expected key.subkey=value, got None"),
        "text: no key": (lambda: parse_assignment("=5"), ValueError, "text: expected key.subkey=value, got '=5'"),
        "text: no value": (lambda: parse_assignment("a"), ValueError, "text: expected key.subkey=value, got 'a'"),
    },
    "load_recipe": {
        "recipe: a number": (lambda: load_recipe(5), TypeError, "recipe: expected .* got 5"),
        "recipe: missing": (lambda: load_recipe(None), TypeError, "recipe: expected .* got None"),
        "recipe: not text": (lambda: load_recipe("plain.safetensors"), ValueError, "recipe: plain.safetensors: "),
        "overrides: a list": (
            lambda: load_recipe("tiny_image", ["a=b"]),
            TypeError,
            "overrides: expected .* got .'a=b'",
        ),
        "overrides: numbered": (lambda: load_recipe("tiny_image", {1: 2}), TypeError, "overrides: expected .* got 1"),
    }
    | {
        f"{key}: {value}": (replace(**{key.replace(".", "__"): value}), ValueError, f"{key}: expected .* got {value}")
        for key, values in {
            "optimizer.base_lr": (0.0, -1e-3, NAN, float("inf")),
            "optimizer.weight_decay": (-0.1, NAN),
            "optimizer.layer_decay": (0.0, -0.5, 1.5, NAN),
            "optimizer.scale_learning_rate": (-1.0, NAN),
            "optimizer.clip_grad": (-1.0, NAN),
            "schedule.warmup_epochs": (-1,),
            "schedule.warmup_lr": (-1.0, NAN),
            "schedule.min_lr": (-1.0, NAN),
            "loss.label_smoothing": (NAN,),
            "loss.mixup": (NAN,),
            "pretraining.mask_ratio": (0.0, 1.0, NAN),
            "pretraining.decoder_width": (0,),
            "pretraining.decoder_depth": (-1,),
            "pretraining.decoder_heads": (0,),
            "run.ema_decay": (NAN,),
        }.items()
        for value in values
    },
    "train": {
        "recipe: a name": (lambda: train("tiny_image", Path("out")), TypeError, "recipe: expected a Recipe, got str"),
        "recipe: of pretraining": (
            lambda: train(RECIPE().with_overrides({"pretraining.mask_ratio": 0.5}), "out"),
            ValueError,
            "recipe: ",
        ),
        "out: a number": (tiny(out=5), TypeError, "out: expected a path, got 5"),
        "out: a file": (tiny(out="text.pth", schedule__epochs=2), OSError, ".*text.pth"),
        "heads that do not divide": (tiny(model__overrides__num_heads=5), ValueError, "overrides: .*num_heads"),
        "no split": (tiny(data__test_split="dev"), ValueError, "split: expected one of test, train; got 'dev'"),
        "a batch larger than the data": (tiny(data__batch_size=5000), ValueError, "data.batch_size: 5000"),
        "no checkpoint": (tiny(model__init="none.pth"), FileNotFoundError, "none.pth: no such file"),
        "an auxiliary of another width": (
            tiny(auxiliary__path="narrow.safetensors"),
            ValueError,
            r"aux_model\['narrow.safetensors'\]: ",
        ),
        "no modality": (tiny(model__modality="smell"), ValueError, "modality: expected one of .* got 'smell'"),
        "no size": (tiny(model__size="colossal"), ValueError, "size: expected one of .* got 'colossal'"),
        "no optimizer": (tiny(optimizer__name="adamq"), ValueError, "optimizer.name: .* did you mean 'adam'"),
        "no scheduler": (
            tiny(schedule__name="cosinus"),
            ValueError,
            "schedule.name: Unknown scheduler 'cosinus'; did you mean 'cosine'",
        ),
        "optimizer options": (tiny(optimizer__options={"colour": 1}), TypeError, "AdamW.* argument 'colour'"),
        "nothing to resume": (
            lambda: train(RECIPE(), "images", resume=True),
            FileNotFoundError,
            "images/last.pth: no such file",
        ),
        "a run already": (lambda: train(RECIPE(), "run"), ValueError, "run: there is a run in it already"),
    },
    "pretrain": {
        "recipe: a name": (
            lambda: pretrain("tiny_image", Path("out")),
            TypeError,
            "recipe: expected a Recipe, got str",
        ),
        "recipe: of training": (lambda: pretrain(RECIPE(), "out"), ValueError, "recipe: "),
        "out: missing": (tiny(pretrain, out=None), TypeError, "out: expected a path, got None"),
        "decoder heads": (tiny(pretrain, pretraining__decoder_heads=5), ValueError, "decoder_width: "),
    },
    "evaluate_checkpoint": {
        "recipe: a name": (
            lambda: evaluate_checkpoint("tiny_image", "plain.safetensors"),
            TypeError,
            "recipe: expected a Recipe, got str",
        ),
        "checkpoint: of another model": (
            lambda: evaluate_checkpoint(RECIPE(), "narrow.safetensors"),
            ValueError,
            "narrow.safetensors: entries that do not fit the recipe's model: .*",
        ),
    }
    | no_path(lambda path, **settings: evaluate_checkpoint(RECIPE(), path, **settings), "checkpoint"),
    "run_matrix": {
        "matrix: missing": (lambda: run_matrix(None, Path("out")), TypeError, "matrix: expected a Matrix, got None"),
        "matrix: a file": (lambda: run_matrix("own.toml", "out"), TypeError, "matrix: expected a Matrix, got 'own"),
        "out: a number": (lambda: run_matrix(MATRIX, 5), TypeError, "out: expected a path, got 5"),
        "out: missing": (lambda: run_matrix(MATRIX, None), TypeError, "out: expected a path, got None"),
    },
    "load_matrix": {
        "path: a number": (lambda: load_matrix(5), TypeError, "path: expected a path, got 5"),
        "path: no such file": (lambda: load_matrix("none.toml"), FileNotFoundError, "none.toml: no such file"),
        "path: not text": (lambda: load_matrix("plain.safetensors"), ValueError, "plain.safetensors: "),
        "seeds: text": (matrix("seeds = ['a']\n" + TARGET + AUXILIARY), ValueError, "own.toml: seeds: expected .*'a'"),
        "seeds: lists": (
            matrix("seeds = [[1]]\n" + TARGET + AUXILIARY),
            ValueError,
            r"own.toml: seeds: expected .*\[1\]",
        ),
        "seeds: negative": (
            matrix("seeds = [-1]\n" + TARGET + AUXILIARY),
            ValueError,
            "own.toml: seeds: expected .*-1",
        ),
        "targets: a number": (
            matrix(SEEDS + "targets = 3\n" + AUXILIARY),
            ValueError,
            "own.toml: targets: expected .*3",
        ),
        "targets: none": (matrix(SEEDS + "[targets]\n" + AUXILIARY), ValueError, "own.toml: targets: expected"),
        "auxiliaries: a number": (
            matrix("auxiliaries = 3\n" + SEEDS + TARGET),
            ValueError,
            "own.toml: auxiliaries: exp",
        ),
        "auxiliaries: numbers": (
            matrix(SEEDS + TARGET + "[auxiliaries]\na = 3"),
            ValueError,
            "own.toml: auxiliaries: exp",
        ),
        "overrides: a number": (
            matrix(SEEDS + TARGET + "overrides = 3\n" + AUXILIARY),
            ValueError,
            "own.toml: targets.image.overrides: expected .*3",
        ),
        "recipe: a wrong value": (
            matrix(SEEDS + TARGET + "overrides.run.seed = 'a'\n" + AUXILIARY),
            TypeError,
            "own.toml: targets.image: run.seed: expected int, got 'a'",
        ),
    },
}

TABLE = {
    f"{function}: {what}": row
    for part in (KERNELS, PATHWAY, CHECKPOINTS, MODELS_AND_DATA, TRAINING)
    for function, rows in part.items()
    for what, row in rows.items()
}

COMMANDS = {
    "train none --out out": "recipe: none: no such file",
    "train plain.safetensors --out out": "recipe: plain.safetensors: ",
    "train tiny_image --out out schedule.epochs=ten": "schedule.epochs: expected int, got 'ten'",
    "train tiny_image --out out optimizer.base_lr=nan": "optimizer.base_lr: expected .* got nan",
    "train tiny_image --out out model.overrides.num_heads=5": "overrides: ",
    "train tiny_image --out out model.overrides.depth=two": "overrides: ",
    "train tiny_image --out out optimizer.name=adamq": "optimizer.name: .* got 'adamq'; did you mean 'adam'",
    "train tiny_image --out out schedule.name=cosinus": "Unknown scheduler 'cosinus'; did you mean 'cosine'",
    "train tiny_image --out out optimizer.options.colour=1": "AdamW.* argument 'colour'",
    "train tiny_image --out out --data .": "root: layout embedded",
    "train tiny_image --out out --init none.pth": "none.pth: no such file",
    "train tiny_image --out out --aux none.pth": "none.pth: no such file",
    "train tiny_image --out out --aux text.pth": "text.pth: not a readable checkpoint",
    "train tiny_image --out out --aux narrow.safetensors": r"aux_model\['narrow.safetensors'\]: ",
    "train tiny_image --out out --aux a.pth --aux a.pth": "auxiliary.path: expected a path or a list of different ones",
    "train tiny_image --out out --aux a.pth auxiliary.blocks=odd": "auxiliary.blocks: expected one of '', 'first',",
    "train tiny_image --out out --aux-dtype int8": "auxiliary.path: missing",
    "train tiny_image --out run": "run: there is a run in it already",
    "train tiny_image --out images --resume": "images/last.pth: no such file",
    "train pretrain_tiny_image --out out": "recipe: this one is for pretraining",
    "pretrain tiny_image --out out": r"recipe: expected one with a table \[pretraining\]",
    "pretrain pretrain_tiny_image --out out pretraining.mask_ratio=1.0": "pretraining.mask_ratio: expected",
    "eval none.pth --recipe tiny_image": "none.pth: no such file",
    "eval narrow.safetensors --recipe tiny_image": "narrow.safetensors: ",
    "eval sparse.pth --recipe tiny_image": "sparse.pth: ",
    "matrix none.toml --out out": "none.toml: no such file",
    "matrix plain.safetensors --out out": "plain.safetensors: ",
    "merge meta.pth out.safetensors": "meta.pth: ",
    "convert sparse.pth out.safetensors": "sparse.pth: ",
}


@pytest.fixture(scope="module")
def files(folder):
    """Good and bad files to name."""
    plain = PLAIN.state_dict()
    save_state_dict(plain, folder / "plain.safetensors")
    save_state_dict(CONNECTED.state_dict(), folder / "connected.safetensors")
    save_state_dict(small(embed_dim=48).state_dict(), folder / "narrow.safetensors")
    norm = "blocks.0.norm1.weight"
    torch.save(plain | {norm: plain[norm].to_sparse()}, folder / "sparse.pth")
    torch.save(plain | {norm: plain[norm].to("meta")}, folder / "meta.pth")
    for name in ("text.pth", "text.safetensors"):
        (folder / name).write_text("hello")
    for name in ("folder.safetensors", "images/train/a", "run"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "train" / "a" / "0.png")
    (folder / "run" / "last.pth").touch()
    return folder


def state():
    """All that could have changed of the models and files at hand."""
    entries = {}
    for index, model in enumerate(MODELS):
        entries |= {(index, name): (type(module), module.training) for name, module in model.named_modules()}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            entries[index, f"{name}."] = (id(tensor), tensor._version, tensor.dtype, tensor.requires_grad)
    files = sorted(Path().rglob("*"))
    return entries | {path: path.read_bytes() if path.is_file() else None for path in files}


@pytest.fixture
def unchanged(files, monkeypatch):
    """Runs the test among these files; afterwards models and files are as before."""
    monkeypatch.chdir(files)
    before = state()
    yield
    after = state()
    assert {key for key in before.keys() | after.keys() if before.get(key, ...) != after.get(key, ...)} == set()


@pytest.mark.parametrize("call, error, message", TABLE.values(), ids=TABLE.keys())
def test_refused(unchanged, call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_refused(unchanged, capsys, command):
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"m2pt: error: .*{COMMANDS[command]}", line), line
