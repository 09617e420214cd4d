"""The optimizer's step inside backward against a step after it."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from m2pt import step_in_backward
from m2pt.optimizer_in_backward import JOINT

ON_A_CPU = [name for name in list_optimizers() if not name.startswith(("bnb", "fused"))] + ["lookahead_adamw"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def groups(module):
    """Layers of their own, so that a mixed-up group shows."""
    return [
        {"params": module[0].parameters(), "lr": 1e-2, "weight_decay": 0.1},
        {"params": module[2].parameters(), "lr": 3e-2, "weight_decay": 0.0},
    ]


def train(module, optimizer, update, steps=3):
    """Steps of a scheduled learning rate."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(steps):
        torch.manual_seed(step)
        module(torch.randn(5, 8)).square().mean().backward()
        update()
        schedule.step()


@pytest.mark.parametrize("name", ON_A_CPU)
def test_every_optimizer_of_timm_trains_the_same_model_or_is_refused(name):
    after, inside = model(), model()
    optimizers = [create_optimizer_v2(groups(module), name, lr=1e-2) for module in (after, inside)]
    if type(optimizers[0]).__name__ in JOINT:
        with pytest.raises(ValueError, match=f"optimizer: .*got {type(optimizers[0]).__name__}"):
            step_in_backward(optimizers[1])
        return
    step_in_backward(optimizers[1])
    train(after, optimizers[0], lambda: (optimizers[0].step(), optimizers[0].zero_grad()))
    train(inside, optimizers[1], lambda: None)
    torch.testing.assert_close(inside.state_dict(), after.state_dict(), rtol=0, atol=0)
    assert not torch.equal(after[0].weight, model()[0].weight)


def test_an_optimizer_that_wants_a_closure_is_refused():
    with pytest.raises(ValueError, match=r"optimizer: .*got LBFGS"):
        step_in_backward(torch.optim.LBFGS(model().parameters()))


def test_a_class_of_ones_own_is_what_it_derives_from():
    class Own(timm.optim.Lamb):
        pass

    with pytest.raises(ValueError, match=r"optimizer: .*got Own"):
        step_in_backward(Own(model().parameters()))
    step_in_backward(type("Own", (torch.optim.AdamW,), {})(model().parameters()))


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW, model()])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(TypeError, match=r"^optimizer: expected a torch.optim.Optimizer, got "):
        step_in_backward(optimizer)


def test_one_gradient_at_a_time():
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    alive = []
    optimizer.register_step_pre_hook(
        lambda *_: alive.append([name for name, p in module.named_parameters() if p.grad is not None])
    )
    step_in_backward(optimizer)
    module(torch.randn(5, 8)).square().mean().backward()
    assert sorted(alive) == [["0.bias"], ["0.weight"], ["2.bias"], ["2.weight"]]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_frozen_parameters_stay_and_a_loaded_state_counts():
    module = model()
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(groups(module))
    step_in_backward(optimizer)
    before = copy.deepcopy(module.state_dict())
    state = optimizer.state_dict()
    state["param_groups"][1]["lr"] = 0.0
    optimizer.load_state_dict(state)
    module(torch.randn(5, 8)).square().mean().backward()
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert set(optimizer.state) == set(module[2].parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


def test_what_is_frozen_after_the_call_can_be_unfrozen():
    module = model()
    step_in_backward(torch.optim.SGD(module.parameters(), lr=0.1))
    before = copy.deepcopy(module.state_dict())
    for is_trained in (False, True):
        module[0].requires_grad_(is_trained)
        module(torch.randn(5, 8)).square().mean().backward()
        assert torch.equal(module[0].weight, before["0.weight"]) != is_trained
        assert module[0].weight.grad is None
