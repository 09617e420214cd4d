"""The layer: what it computes, what it shares with the two models, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from m2pt import FusedCrossModalLinear

IN, OUT = 6, 4


def fused(scale=0.0, bias=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    origin, aux = nn.Linear(IN, OUT, bias, dtype=dtype), nn.Linear(IN, OUT, dtype=dtype)
    layer = FusedCrossModalLinear(IN, OUT, origin_layer=origin, aux_weight=aux.weight, **options)
    nn.init.constant_(layer.cross_modal_scale, scale)
    return layer, origin, aux


def inputs(dtype=torch.float32):
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def published(layer, x):
    return F.linear(x, layer.weight + layer.cross_modal_scale * layer.aux_weight, layer.bias)


def state(layer):
    return {name: (p.dtype, p.device, p.requires_grad, p.tolist()) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_zero_scale_computes_exactly_what_the_origin_layer_does(dtype, bias):
    layer, origin, _ = fused(bias=bias, dtype=dtype)
    assert isinstance(layer, nn.Linear)
    assert layer.cross_modal_scale.tolist() == [0.0]
    assert torch.equal(layer(inputs(dtype)), origin(inputs(dtype)))


@pytest.mark.parametrize("scale", [0.5, -2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_that_of_the_published_formulation(scale, bias):
    layer, _, _ = fused(scale, bias)
    torch.testing.assert_close(layer(inputs()), published(layer, inputs()))


def test_published_checkpoint_loads_strictly():
    layer, _, _ = fused()
    checkpoint = {
        "weight": torch.randn(OUT, IN),
        "bias": torch.randn(OUT),
        "cross_modal_scale": torch.tensor([0.7]),
        "aux_weight": torch.randn(OUT, IN),
    }
    layer.load_state_dict(checkpoint, strict=True)
    combined = checkpoint["weight"] + 0.7 * checkpoint["aux_weight"]
    torch.testing.assert_close(layer(inputs()), F.linear(inputs(), combined, checkpoint["bias"]))


def test_constructor_arguments_are_the_published_ones_in_order():
    origin, aux = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
    layer = FusedCrossModalLinear(IN, OUT, True, origin, aux.weight, True)
    assert layer.weight is origin.weight
    assert layer.aux_weight.data_ptr() == aux.weight.data_ptr()
    assert layer.aux_weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_without_an_origin_layer_it_is_initialised_as_nn_linear(bias):
    torch.manual_seed(0)
    layer = FusedCrossModalLinear(IN, OUT, bias, aux_weight=torch.ones(OUT, IN))
    torch.manual_seed(0)
    assert torch.equal(layer(inputs()), nn.Linear(IN, OUT, bias)(inputs()))


@pytest.mark.parametrize("aux_requires_grad", [True, False])
@pytest.mark.parametrize("is_aux_trainable", [True, False])
def test_aux_weight_is_shared_and_the_aux_model_left_alone(aux_requires_grad, is_aux_trainable):
    aux = nn.Linear(IN, OUT).requires_grad_(aux_requires_grad)
    weight = aux.weight
    layer = FusedCrossModalLinear(IN, OUT, aux_weight=aux.weight, is_aux_trainable=is_aux_trainable)
    assert layer.aux_weight.data_ptr() == weight.data_ptr()
    assert layer.aux_weight.requires_grad == is_aux_trainable
    assert aux.weight is weight
    assert aux.weight.requires_grad == aux_requires_grad


@pytest.mark.parametrize("is_aux_trainable", [True, False])
def test_gradients(is_aux_trainable):
    layer, _, aux = fused(0.5, dtype=torch.float64, is_aux_trainable=is_aux_trainable)
    trained = [p for name, p in layer.named_parameters() if name != "aux_weight" or is_aux_trainable]
    x = inputs(torch.float64)
    layer(x).square().sum().backward()
    torch.testing.assert_close(
        [p.grad for p in trained], torch.autograd.grad(published(layer, x).square().sum(), trained)
    )
    assert (layer.aux_weight.grad is not None) == is_aux_trainable
    assert aux.weight.grad is None


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_origin_parameters_are_adopted(requires_grad, training, bias):
    origin = nn.Linear(IN, OUT, bias).requires_grad_(requires_grad).train(training)
    layer = FusedCrossModalLinear(IN, OUT, not bias, origin_layer=origin, aux_weight=torch.ones(OUT, IN))
    assert layer.weight is origin.weight
    assert layer.bias is origin.bias
    assert layer.weight.requires_grad == requires_grad
    assert layer.cross_modal_scale.requires_grad
    assert layer.training == training


@pytest.mark.parametrize("kind", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_origin_dtype_and_device_are_kept(kind):
    origin, expected = nn.Linear(IN, OUT, **kind), torch.empty(0, **kind)
    layer = FusedCrossModalLinear(IN, OUT, origin_layer=origin, aux_weight=torch.ones(OUT, IN))
    for parameter in (layer.weight, layer.bias, layer.cross_modal_scale):
        assert (parameter.dtype, parameter.device) == (expected.dtype, expected.device)
    assert layer.aux_weight.device == expected.device


@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16, torch.float16, "meta"])
def test_follows_to(target):
    layer = fused(0.5)[0].to(target)
    x = inputs().to(target)
    assert {(p.dtype, p.device) for p in layer.parameters()} == {(x.dtype, x.device)}
    y = layer(x)
    assert (y.shape, y.dtype, y.device) == ((3, 5, OUT), x.dtype, x.device)


def rebuilt(layer, assign=False):
    twin = fused(is_aux_trainable=layer.aux_weight.requires_grad)[0]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True, assign=assign)
    return twin


def assigned(layer):
    return rebuilt(layer, assign=True)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("is_aux_trainable", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, rebuilt, assigned])
def test_duplicates_compute_the_same_and_share_nothing(duplicate, is_aux_trainable):
    layer, _, _ = fused(0.5, is_aux_trainable=is_aux_trainable)
    twin = duplicate(layer)
    assert state(twin) == state(layer)
    assert torch.equal(twin(inputs()), layer(inputs()))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(requires_grad, training, bias, dtype):
    layer, origin, aux = fused(0.5, bias, dtype)
    layer.train(training)
    layer.weight.requires_grad_(requires_grad)
    before = state(layer)
    merged = layer.merge()
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, (origin.weight.float() + 0.5 * aux.weight.float()).to(dtype))
    assert merged.bias is layer.bias
    assert (merged.weight.requires_grad, merged.weight.is_leaf, merged.training) == (requires_grad, True, training)
    assert (merged.in_features, merged.out_features) == (IN, OUT)
    torch.testing.assert_close(merged(inputs(dtype)), layer(inputs(dtype)))
    assert state(layer) == before


@pytest.mark.parametrize("broken", ["weight", "aux_weight", "cross_modal_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merge_refuses_a_weight_that_is_not_finite(broken, value):
    layer, _, _ = fused(0.5)
    with torch.no_grad():
        layer.get_parameter(broken).flatten()[-1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge()


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize(
    "change", [torch.relu_, lambda y: y.add_(1), lambda y: y.mul_(2), lambda y: y[..., :2].zero_()]
)
def test_the_output_may_be_changed_in_place(change, shape):
    """As by `nn.ReLU(inplace=True)`, or by timm's attention, which adds a bias of its own."""
    layer = FusedCrossModalLinear(8, 6, aux_weight=torch.randn(6, 8))
    nn.init.constant_(layer.cross_modal_scale, 0.5)
    plain, gradients = layer.merge(), []
    for each in (layer, plain):
        x = torch.ones(shape).cumsum(-1).requires_grad_()
        y = each(x)
        change(y)
        y.square().sum().backward()
        gradients.append((y, x.grad, each.weight.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_is_computed_counts():
    layer, origin, _ = fused()
    expected = F.linear(inputs(), 2 * origin.weight, origin.bias)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(inputs()), expected)


def test_a_weight_that_is_a_mere_attribute_counts():
    layer, origin, _ = fused()
    expected = F.linear(inputs(), 2 * origin.weight, origin.bias)
    del layer.weight
    layer.weight = 2 * origin.weight
    torch.testing.assert_close(layer(inputs()), expected)


def test_a_weight_that_is_replaced_counts():
    layer, origin, _ = fused()
    layer(inputs())
    expected = F.linear(inputs(), 2 * origin.weight, origin.bias)
    layer.weight = nn.Parameter(2 * origin.weight)
    torch.testing.assert_close(layer(inputs()), expected)
