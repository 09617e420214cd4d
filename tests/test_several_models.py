"""Several auxiliary models at once, `W + sum of s_i W_aux_i`: operators on every path, layer, surgery, merging."""

import copy

import pytest
import torch
from helpers import (
    DTYPES,
    NAMES,
    STORAGES,
    assert_as_good_as_torch,
    assert_quantized_as_good_as_torch,
    every_other,
    operands,
    outputs,
    padded,
    scaled,
    transposed,
    vits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from m2pt import (
    FusedCrossModalLinear,
    cross_modal_scales,
    merge_pathways,
    quantization_errors,
    quantize_aux,
    reparameterize_aux_into_target_model,
    scale_table,
)
from m2pt.checkpoints import load_state_dict, merge_state_dict, save_state_dict
from m2pt.saved_bytes import published_formulation, saved_for_backward_bytes
from m2pt_kernels import cross_modal_linear, quantize
from m2pt_kernels.devices import INTERPRETED


@settings(max_examples=20 if INTERPRETED else 40)
@given(
    seed=st.integers(0, 2**32 - 1),
    models=st.integers(2, 4),
    shape=st.tuples(*[st.integers(1, 70)] * 3),
    dtypes=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from([torch.Tensor.contiguous, transposed, padded, every_other])] * 2),
    model_first=st.booleans(),
    needs_grad=st.sets(st.sampled_from(NAMES), min_size=1),
)
def test_any_number_shape_stride_dtype_and_subset(
    device, seed, models, shape, dtypes, layouts, model_first, needs_grad
):
    torch.manual_seed(seed)
    tensors, grad_output = operands(*shape, *dtypes, device, needs_grad=(), models=models)
    tensors["x"] = layouts[0](tensors["x"])
    matrices = [layouts[1](matrix) for matrix in tensors["aux_weight"]]
    tensors["aux_weight"] = torch.stack(matrices) if model_first else torch.stack(matrices, 1).transpose(0, 1)
    for name in needs_grad:
        tensors[name].requires_grad_()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def every_other_entry(vector):
    return vector.repeat_interleave(2)[::2]


def one_for_all(vector):
    return vector[:1].expand_as(vector)


@pytest.mark.parametrize("layout", [every_other_entry, one_for_all])
def test_vectors_of_any_stride(device, layout):
    tensors, grad_output = operands(37, 24, 33, device=device, needs_grad=(), models=3)
    for name in ("scale", "bias"):
        tensors[name] = layout(tensors[name])
        assert not tensors[name].is_contiguous()
    for tensor in tensors.values():
        tensor.requires_grad_()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def further_apart(scales):
    return F.pad(scales, (0, 3))[..., :-3]


def models_last(scales):
    return scales.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("layout", [further_apart, models_last])
@pytest.mark.parametrize("storage", STORAGES)
def test_scales_of_quantised_models_of_any_stride(device, storage, layout):
    tensors, grad_output = operands(9, 24, 128, device=device, needs_grad=("x", "weight", "scale"), models=3)
    assert_quantized_as_good_as_torch(tensors, grad_output, storage, layout_of_scales=layout)


@pytest.mark.parametrize("shape", [(0, 8, 8), (130, 45, 129)], ids=str)
def test_empty_and_ragged(device, shape):
    tensors, grad_output = operands(*shape, device=device, models=3)
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def test_empty_features(device):
    tensors, grad_output = operands(5, 3, 0, device=device, models=3)
    got = outputs(cross_modal_linear, tensors, grad_output)
    assert torch.equal(got["y"], tensors["bias"].detach().expand(5, 3))
    assert got["aux_weight"].shape == (3, 3, 0) and got["scale"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_quantized(device, storage, dtypes):
    tensors, grad_output = operands(37, 24, 128, *dtypes, device, needs_grad=("x", "weight", "scale"), models=3)
    assert_quantized_as_good_as_torch(tensors, grad_output, storage)


def test_each_quantised_matrix_is_stored_as_if_alone():
    weight = torch.randn(3, 6, 128) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    for storage in ("int8", "int4", "float8_e4m3fn"):
        together = quantize(weight, storage)
        for i, alone in enumerate(quantize(each, storage) for each in weight):
            assert torch.equal(together[0][i].view(torch.uint8), alone[0].view(torch.uint8))
            assert torch.equal(together[1][i], alone[1])


def test_scale_gradients_are_exact_and_reproducible(device):
    sizes = (70, 45, 80) if INTERPRETED else (394, 768, 768)
    tensors, grad_output = operands(*sizes, *DTYPES[1], device, needs_grad=("scale",), models=2)
    runs = [outputs(cross_modal_linear, tensors, grad_output)["scale"] for _ in range(2)]
    accumulator = grad_output.double().t() @ tensors["x"].double()
    want = (accumulator * tensors["aux_weight"].double()).sum((1, 2))
    assert ((runs[0].double() - want).abs() <= 1e-5 * want.abs()).all()
    assert torch.equal(*runs)


def test_models_further_apart_than_32_bits_count(device):
    tensors, grad_output = operands(5, 5, 5, *DTYPES[1], device, needs_grad=(), models=3)
    stride = 2**30 + 16
    memory = torch.empty(2 * stride + 25, dtype=DTYPES[1][0], device=device)
    tensors["aux_weight"] = memory.as_strided((3, 5, 5), (stride, 5, 1)).copy_(tensors["aux_weight"])
    for name in ("x", "weight", "scale"):
        tensors[name].requires_grad_()
    assert_as_good_as_torch(outputs(cross_modal_linear, tensors, grad_output), tensors, grad_output)


def test_operators_describe_their_results_to_tracers():
    tensors, grad_output = operands(7, 6, 64, models=2, needs_grad=NAMES)
    torch.library.opcheck(torch.ops.m2pt_kernels.cross_modal_linear, tuple(tensors.values()))
    x, weight, aux_weight, scale = (tensors[name].detach() for name in NAMES[:4])
    torch.library.opcheck(torch.ops.m2pt_kernels.grad_input, (grad_output, weight, aux_weight, scale))
    for asked in ((aux_weight, scale), (aux_weight, None), (None, scale)):
        arguments = (grad_output, x, *asked, x.dtype, x.dtype)
        torch.library.opcheck(torch.ops.m2pt_kernels.grad_parameters, arguments)


IN, OUT = 64, 6


def layer(models=3, **options):
    origin = nn.Linear(IN, OUT)
    aux_weights = [nn.Linear(IN, OUT).weight for _ in range(models)]
    fused = FusedCrossModalLinear(IN, OUT, origin_layer=origin, aux_weight=aux_weights, **options)
    fused.cross_modal_scale.data = torch.linspace(-0.5, 0.7, models)
    return fused, aux_weights


def test_layer_sums_merges_and_saves_nothing_extra():
    fused, aux_weights = layer()
    x = torch.randn(3, IN, requires_grad=True)
    want = fused.weight.detach() + sum(
        scale * weight for scale, weight in zip(fused.cross_modal_scale.tolist(), aux_weights, strict=True)
    )
    torch.testing.assert_close(fused.merge().weight, want)
    torch.testing.assert_close(fused(x), nn.functional.linear(x, want, fused.bias))
    assert torch.equal(fused.merge()(x), fused(x))
    assert {name: tuple(value.shape) for name, value in fused.state_dict().items()} == {
        "weight": (OUT, IN),
        "bias": (OUT,),
        "aux_weight": (3, OUT, IN),
        "cross_modal_scale": (3,),
    }
    assert saved_for_backward_bytes(fused, x) == x.nbytes


def test_layer_of_one_in_a_list_is_the_layer_of_one():
    fused, (weight,) = layer(1)
    assert fused.aux_weight.data_ptr() == weight.data_ptr() and fused.aux_weight.shape == (OUT, IN)
    assert fused.cross_modal_scale.shape == (1,)


def test_training_the_auxiliary_weights():
    fused, _ = layer(is_aux_trainable=True)
    x = torch.randn(3, IN)
    fused(x).square().sum().backward()
    for i in range(3):
        torch.testing.assert_close(fused.aux_weight.grad[i], fused.cross_modal_scale[i].item() * fused.weight.grad)
        torch.testing.assert_close(
            fused.cross_modal_scale.grad[i], (fused.weight.grad * fused.aux_weight[i]).sum().detach()
        )


@pytest.mark.parametrize("storage", [None, "bfloat16", "int8", "int4", "float8_e4m3fn"])
def test_surgery_merges_to_the_same_logits(storage, tmp_path):
    target, *aux_models = vits(3)
    images, fresh = torch.randn(2, 3, 32, 32), copy.deepcopy(target)
    model = scaled(reparameterize_aux_into_target_model(target, aux_models, aux_dtype=storage))
    logits = model(images)
    save_state_dict(model.state_dict(), tmp_path / "trained.safetensors")
    twin = reparameterize_aux_into_target_model(copy.deepcopy(fresh), aux_models, aux_dtype=storage)
    twin.load_state_dict(load_state_dict(tmp_path / "trained.safetensors"), strict=True)
    assert torch.equal(twin(images), logits)
    fresh.load_state_dict(merge_state_dict(load_state_dict(tmp_path / "trained.safetensors")), strict=True)
    assert torch.equal(fresh(images), logits)
    assert torch.equal(merge_pathways(model)(images), logits)


def test_surgery_with_models_one_after_the_other_in_the_sum():
    """The second model's scale alone gives what connecting the second model alone gives."""
    target, *aux_models = vits(3)
    images = torch.randn(2, 3, 32, 32)
    both = reparameterize_aux_into_target_model(copy.deepcopy(target), aux_models)
    second = reparameterize_aux_into_target_model(copy.deepcopy(target), aux_models[1])
    for name, layer in both.named_modules():
        if isinstance(layer, FusedCrossModalLinear):
            layer.cross_modal_scale.data = torch.tensor([0.0, 0.4])
            second.get_submodule(name).cross_modal_scale.data.fill_(0.4)
    torch.testing.assert_close(both(images), second(images))


def test_scales_by_name_and_as_a_table():
    target, *aux_models = vits(3)
    model = scaled(reparameterize_aux_into_target_model(target, aux_models, layer_names=["attn.qkv", "mlp.fc1"]))
    scales = cross_modal_scales(model)
    assert list(scales)[:2] == ["blocks.0.attn.qkv[0]", "blocks.0.attn.qkv[1]"] and len(scales) == 8
    assert scales["blocks.1.mlp.fc1[1]"] == pytest.approx(-0.2)
    header, _, *rows = scale_table(model).splitlines()
    assert header == "| block | attn.qkv[0] | attn.qkv[1] | mlp.fc1[0] | mlp.fc1[1] |"
    assert rows[1] == "| blocks.1 | +0.3000 | -0.2000 | +0.3000 | -0.2000 |"


def test_errors_of_quantising_several():
    target, *aux_models = vits(3)
    images = torch.randn(2, 3, 32, 32)
    model = scaled(reparameterize_aux_into_target_model(target, aux_models))
    before = model(images)
    errors = quantization_errors(model, "int8", images)
    change = (quantize_aux(model, "int8")(images) - before).norm() / before.norm()
    assert errors.output == pytest.approx(change.item(), rel=1e-3) and 0 < errors.output < 0.01
    assert all(0.001 < error < 0.01 for error in errors.aux_weights.values())


@pytest.mark.parametrize(
    "aux_models, message",
    [
        (list, r"^aux_model: expected a module, a sequence of modules or modules by name, got none"),
        (lambda: vits(1) + vits(1, width=128), r"^aux_model\[1\]: blocks.0.attn.qkv has weight shape .384, 128."),
        (lambda: [*vits(1), nn.Sequential()], r"^aux_model\[1\]: Sequential has no sequence of equal blocks"),
    ],
)
def test_surgery_refuses_and_leaves_the_target_as_it_was(aux_models, message):
    (target,) = vits(1)
    with pytest.raises(ValueError, match=message):
        reparameterize_aux_into_target_model(target, aux_models())
    assert not any(isinstance(module, FusedCrossModalLinear) for module in target.modules())


def test_the_published_formulation_knows_one():
    target, *aux_models = vits(3)
    model = reparameterize_aux_into_target_model(target, aux_models)
    with pytest.raises(ValueError, match="or several"), published_formulation(model):
        pass
