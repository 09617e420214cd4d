"""Models divided among processes (FSDP2, tensor parallelism): each function works on them, or refuses them by name
before anything has changed."""

import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import PLACES, connected, fused_layers, images, vit
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

import m2pt_kernels
from m2pt import (
    FusedCrossModalLinear,
    cross_modal_scales,
    disconnect_pathways,
    freeze_for_linear_probe,
    merge_pathways,
    quantization_errors,
    quantize_aux,
    reparameterize_aux_into_target_model,
    save_pathway,
    scale_table,
    step_in_backward,
)
from m2pt.checkpoint_formats import load_pretrained
from m2pt.checkpoints import merge_state_dict, save_state_dict
from m2pt.tensor_parallel import ColwiseParallel, RowwiseParallel
from m2pt_kernels import combined_weight, dequantize, quantize

pytestmark = pytest.mark.slow

FIRST = "blocks.0.attn.qkv"
PLAN = {
    "attn.qkv": ColwiseParallel(output_layouts=Replicate()),
    "attn.proj": RowwiseParallel(input_layouts=Replicate()),
    "mlp.fc1": ColwiseParallel(),
    "mlp.fc2": RowwiseParallel(),
}


@pytest.fixture(autouse=True, scope="module")
def alone():
    """This process in a group of its own."""
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def sharded(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def trained(model):
    """After a step, with what belongs to no block still whole after the pass in evaluation."""
    sharded(model)(images()).sum().backward()
    model.zero_grad()
    with torch.no_grad():
        model(images())
    return model


def whole_for_a_while(model):
    for module in sharded(model).modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return model


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, PLAN)
    return model


every_kind = pytest.mark.parametrize("divided", [sharded, trained, whole_for_a_while, tensor_parallel])
HINT = r"get_model_state_dict\(model, options=StateDictOptions\(full_state_dict=True\)\)"


@every_kind
@pytest.mark.parametrize(
    "function, remedy",
    [
        (merge_pathways, f"gather its state dict with .*{HINT}, and merge that with m2pt.checkpoints.merge_state_dict"),
        (lambda model: quantize_aux(model, "bfloat16"), "quantise .* before dividing"),
        (lambda model: quantization_errors(model, "int8", images()), "ask before dividing"),
        (lambda model: save_pathway(model, "pathway.safetensors"), "gather it first"),
        (disconnect_pathways, "remove auxiliary models before dividing"),
    ],
    ids=["merge_pathways", "quantize_aux", "quantization_errors", "save_pathway", "disconnect_pathways"],
)
def test_what_needs_whole_weights_refuses_a_divided_model(divided, function, remedy):
    model = connected()
    expected = model(images()).detach()
    divided(model)
    layers = fused_layers(model)
    with pytest.raises(ValueError, match=f"^{FIRST}: divided among processes: {remedy}"):
        function(model)
    assert fused_layers(model) == layers
    torch.testing.assert_close(model(images()), expected)


@every_kind
@pytest.mark.parametrize("argument", ["target_model", "aux_model"])
def test_surgery_refuses_divided_models(divided, argument):
    models = {"target_model": vit(0), "aux_model": vit(1)}
    divided(models[argument])
    with pytest.raises(ValueError, match=f"^{argument}: {FIRST} is divided among processes: connect whole .*{HINT}"):
        reparameterize_aux_into_target_model(**models)
    assert fused_layers(models["target_model"]) == {}


@pytest.mark.parametrize("divided", [sharded, tensor_parallel])
def test_a_layer_refuses_shards(divided):
    layer, plain = divided(connected()).get_submodule(FIRST), divided(vit()).get_submodule(FIRST)
    got = "expected a whole tensor, got a DTensor: gather it with its full_tensor"
    with pytest.raises(ValueError, match=f"^weight: {got}"):
        layer.merge()
    with pytest.raises(ValueError, match=f"^aux_weight: {got}"):
        layer.quantize_aux("bfloat16")
    with pytest.raises(ValueError, match=f"^origin_layer: {got}"):
        FusedCrossModalLinear(48, 144, origin_layer=plain, aux_weight=torch.ones(144, 48))
    with pytest.raises(ValueError, match=f"^aux_weight: {got}"):
        FusedCrossModalLinear(48, 144, aux_weight=plain.weight)


@every_kind
def test_scales_are_gathered(divided):
    model = connected()
    scales, table = cross_modal_scales(model), scale_table(model)
    divided(model)
    if divided is not trained:
        assert cross_modal_scales(model) == scales
        assert scale_table(model) == table
    assert cross_modal_scales(model).keys() == scales.keys()


@every_kind
def test_a_linear_probe_of_a_divided_model_trains_head_and_scales(divided):
    model = freeze_for_linear_probe(divided(connected()))
    want = {"head.weight", "head.bias"} | {f"{place}.cross_modal_scale" for place in PLACES}
    for _ in range(2):
        model(images()).square().sum().backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == want
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == want
        model.zero_grad()


@pytest.mark.parametrize("divided", [sharded, tensor_parallel])
def test_steps_in_backward_train_what_steps_after_it_do(divided):
    states = []
    for prepare in (lambda model: model, divided):
        model = prepare(connected())
        step_in_backward(torch.optim.SGD(model.parameters(), lr=0.01))
        for _ in range(2):
            model(images()).square().sum().backward()
        states.append(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    torch.testing.assert_close(*states)


def test_a_divided_model_is_merged_by_its_state_dict():
    model, plain = connected(), vit(3)
    expected = model(images())
    with pytest.raises(ValueError, match="expected a whole tensor, got a DTensor"):
        merge_state_dict(sharded(model).state_dict())
    plain.load_state_dict(merge_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))))
    torch.testing.assert_close(plain(images()), expected)


@every_kind
def test_files_are_loaded_before_a_model_is_divided(divided, tmp_path):
    save_state_dict(vit(1).state_dict(), tmp_path / "plain.safetensors")
    model = vit(0)
    expected = model(images()).detach()
    with pytest.raises(ValueError, match=r"^model: [\w.]+ is divided among processes: load the file before"):
        load_pretrained(divided(model), tmp_path / "plain.safetensors")
    torch.testing.assert_close(model(images()), expected)


@every_kind
def test_warmup_comes_before_a_model_is_divided(divided):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"^model: [\w.]+ is divided among processes: warm up before"):
        m2pt_kernels.warmup(divided(connected()), images())


def test_functions_of_tensors_refuse_shards():
    mesh = init_device_mesh("cpu", (1,))
    weight, scale = torch.ones(4, 64), torch.ones(1)
    shard, scale_shard = distribute_tensor(weight, mesh, [Shard(0)]), distribute_tensor(scale, mesh, [Replicate()])
    data, scales = quantize(weight, "int8")
    for call, name in (
        (lambda: quantize(shard, "int8"), "weight"),
        (lambda: dequantize(distribute_tensor(data, mesh), scales), "data"),
        (lambda: dequantize(data, distribute_tensor(scales, mesh)), "scale"),
        (lambda: combined_weight(shard, shard, scale_shard, torch.float32), "weight"),
        (lambda: combined_weight(weight, shard, scale, torch.float32), "aux_weight"),
        (lambda: combined_weight(weight, weight, scale_shard, torch.float32), "scale"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected a whole tensor, got a DTensor"):
            call()


@pytest.mark.parametrize("divided", [DistributedDataParallel, sharded, tensor_parallel])
def test_a_divided_model_is_watched_like_any_other(divided):
    model = connected()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not called by")
        divided(model)(images()).sum().backward()
    assert not any(hook.__module__ == "m2pt.calls" for hook in model._forward_hooks.values())


def test_a_model_in_every_process_is_merged_where_it_is():
    wrapped = DistributedDataParallel(connected())
    wrapped(images()).sum().backward()
    expected = wrapped(images())
    merge_pathways(wrapped.module)
    torch.testing.assert_close(wrapped(images()), expected)


def half_of_each():
    """In two processes, where a scale is in one of them only."""
    model = connected()
    scales = cross_modal_scales(model)
    assert cross_modal_scales(sharded(model)) == scales
    with pytest.raises(ValueError, match=f"^{FIRST}: divided among processes"):
        merge_pathways(model)
    freeze_for_linear_probe(model)
    model(images()).square().sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_two_processes():
    want = {"head.weight", "head.bias"} | {f"{place}.cross_modal_scale" for place in PLACES}
    assert in_two_processes(half_of_each) == [want, want]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keeps_parameters", [True, False])
def test_fsdp1_is_refused_by_name(keeps_parameters):
    """It leaves a process with parts of some scales and none of others, which no function could tell."""
    model = FullyShardedDataParallel(
        connected().requires_grad_(), use_orig_params=keeps_parameters, device_id=torch.device("cpu")
    )
    expected = model(images())
    for function in (merge_pathways, quantize_aux, cross_modal_scales, scale_table):
        with pytest.raises(ValueError, match=r"divided .*get_model_state_dict|divided among processes: quantise"):
            function(model)
    with pytest.raises(ValueError, match=r"divided among processes: ask before"):
        quantization_errors(model, "int8")
    assert torch.equal(model(images()), expected)
