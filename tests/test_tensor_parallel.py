"""The operators on DTensors and layers divided among two processes, against plain torch in one and float64."""

import itertools

import pytest
import torch
from helpers import fused_layers, images, operands, outputs, published, vit
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from two_processes import in_two_processes

from m2pt import FusedCrossModalLinear, quantize_aux, reparameterize_aux_into_target_model
from m2pt.tensor_parallel import ColwiseParallel, RowwiseParallel
from m2pt_kernels import cross_modal_linear, dequantize, quantize

pytestmark = pytest.mark.slow

LAYOUTS = {
    "columns": {"weight": Shard(0), "aux_weight": Shard(-2), "aux_weight_scale": Shard(-2), "bias": Shard(0)},
    "rows": {"x": Shard(2), "weight": Shard(1), "aux_weight": Shard(-1)},
    "batch": {"x": Shard(0)},
    "sequence": {"x": Shard(1)},
}
CASES = [
    *itertools.product([None, "int8", "int4"], [1, 2], LAYOUTS, [True]),
    *itertools.product([None], [1], LAYOUTS, [False]),
]


def case(storage, models, has_bias, in_features=128):
    """Operands and a gradient for the output, and the same operands as plain torch has them."""
    torch.manual_seed(0)
    tensors, grad_output = operands(24, 6, in_features, torch.float64, torch.float64, models=models)
    tensors["x"] = tensors["x"].detach().view(4, 6, in_features).requires_grad_()
    tensors["scale"] = tensors["scale"].detach().double().requires_grad_()
    if not has_bias:
        tensors["bias"] = None
    plain = dict(tensors)
    if storage:
        tensors["aux_weight"], tensors["aux_weight_scale"] = quantize(tensors["aux_weight"], storage)
        plain["aux_weight"] = dequantize(tensors["aux_weight"], tensors["aux_weight_scale"]).double()
    return tensors, grad_output.view(4, 6, 6), plain


def every_operator():
    """Whole results of every case, and how often the operators communicated."""
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for storage, models, layout, has_bias in CASES:
        tensors, grad_output, _ = case(storage, models, has_bias)
        placements = LAYOUTS[layout] | (
            {"aux_weight_scale": Shard(-1)} if (storage, layout) == ("int4", "rows") else {}
        )
        shards = {
            name: distribute_tensor(tensor.detach(), mesh, [placements.get(name, Replicate())]).requires_grad_(
                tensor.requires_grad
            )
            for name, tensor in tensors.items()
            if tensor is not None
        }
        with CommDebugMode() as forward:
            y = cross_modal_linear(**shards)
        of_y = Replicate() if y.placements[0].is_partial() else y.placements[0]
        grad_output = distribute_tensor(grad_output, mesh, [of_y])
        with CommDebugMode() as backward:
            y.backward(grad_output)
        grads = {name: shard.grad for name, shard in shards.items() if shard.requires_grad}
        results[storage, models, layout, has_bias] = (
            forward.get_total_counts() + backward.get_total_counts(),
            {name: result.full_tensor() for name, result in ({"y": y.detach()} | grads).items()},
        )
    return results


@pytest.fixture(scope="module")
def operators():
    return in_two_processes(every_operator)


@pytest.mark.parametrize("storage,models,layout,has_bias", CASES)
def test_operators_on_shards_do_not_communicate_and_compute_the_same(operators, storage, models, layout, has_bias):
    _, grad_output, plain = case(storage, models, has_bias)
    want = outputs(published, plain, grad_output)
    for results in operators:
        communications, got = results[storage, models, layout, has_bias]
        assert communications == 0
        torch.testing.assert_close(got, want)


PLAN = {
    "attn.qkv": ColwiseParallel(output_layouts=Replicate()),
    "attn.proj": RowwiseParallel(input_layouts=Replicate()),
    "mlp.fc1": ColwiseParallel(),
    "mlp.fc2": RowwiseParallel(),
}
AUXILIARY = ["frozen", "int8", "int4", "two trained", "two int4"]


def model_with(auxiliary):
    """A small ViT whose auxiliary weights are so."""
    size = {"depth": 1, "embed_dim": 128, "num_heads": 2}
    models = [vit(seed, **size).double() for seed in range(3 if "two" in auxiliary else 2)]
    model = reparameterize_aux_into_target_model(models[0], models[1:], is_aux_trainable="trained" in auxiliary)
    for layer in fused_layers(model).values():
        torch.nn.init.normal_(layer.cross_modal_scale)
    storage = auxiliary.split()[-1]
    return model if storage in ("frozen", "trained") else quantize_aux(model, storage)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model):
    """The loss and every gradient of a step, and the state after two."""
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(images(torch.float64)).square().mean()
        loss.backward()
        steps.append((loss.detach(), {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}))
        optimizer.step()
    return *steps[0], get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def every_model():
    """What `trained` returns with the layers divided, and how large a process's part of every stored tensor is."""
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for auxiliary in AUXILIARY:
        model = model_with(auxiliary)
        sizes = {name: value.numel() for name, value in model.state_dict().items()}
        for block in model.blocks:
            parallelize_module(block, mesh, PLAN)
        parts = {
            name: value.to_local().numel() / sizes[name]
            for name, value in model.state_dict().items()
            if isinstance(value, DTensor)
        }
        results[auxiliary] = parts, trained(model)
    return results


@pytest.fixture(scope="module")
def models():
    return in_two_processes(every_model)


@pytest.mark.parametrize("auxiliary", AUXILIARY)
def test_a_divided_model_trains_as_a_whole_one(models, auxiliary):
    want = trained(model_with(auxiliary))
    for results in models:
        parts, got = results[auxiliary]
        for name, part in parts.items():
            layer, _, kind = name.rpartition(".")
            is_whole = kind == "cross_modal_scale" or (
                layer.endswith(("proj", "fc2"))
                and (kind == "bias" or (kind == "aux_weight_scale" and "int8" in auxiliary))
            )
            assert part == (1 if is_whole else 0.5), name
        torch.testing.assert_close(got, want)


def three_groups_in_two_processes():
    """A layer is refused; the operator gathers W_aux, whose groups cannot go with the shards of x and W."""
    mesh = init_device_mesh("cpu", (2,))
    layer = FusedCrossModalLinear(192, 6, aux_weight=torch.randn(6, 192))
    layer.quantize_aux("int4")
    with pytest.raises(ValueError, match=r"aux_weight: .*2 processes.* got 3"):
        parallelize_module(layer, mesh, RowwiseParallel())
    assert not any(isinstance(value, DTensor) for value in layer.state_dict().values())
    tensors, _, plain = case("int4", 1, True, 192)
    placements = {"x": Shard(2), "weight": Shard(1), "aux_weight": Shard(1)}
    shards = {name: distribute_tensor(t, mesh, [placements.get(name, Replicate())]) for name, t in tensors.items()}
    torch.testing.assert_close(cross_modal_linear(**shards).full_tensor(), published(**plain))


def test_groups_are_never_divided():
    in_two_processes(three_groups_in_two_processes)
