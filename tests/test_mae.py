"""Masked-autoencoder pretraining: what is hidden, what is predicted, and that it learns, for every modality."""

import itertools

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from m2pt.models import MODALITIES, MaskedAutoencoder, create_model
from m2pt.models.mae import pixels

TINY = {
    "image": {"img_size": 32, "patch_size": 8},
    "audio": {"img_size": (48, 32), "patch_size": 8},
    "point": {"num_groups": 10, "group_size": 6},
    "video": {"num_frames": 4, "img_size": 32, "patch_size": 8},
}
SHAPES = {"image": (3, 32, 32), "audio": (1, 48, 32), "point": (40, 3), "video": (3, 4, 32, 32)}
RATIOS = {"image": 0.75, "audio": 0.8, "point": 0.6, "video": 0.9}
SEEN = {"image": 4, "audio": 24 - 19, "point": 4, "video": 2 * 2}
TOKENS = {"image": 16, "audio": 24, "point": 10, "video": 32}
DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}


def autoencoder(modality, **settings):
    model = create_model(
        modality, "tiny", num_classes=0, **{"embed_dim": 24, "depth": 2, "num_heads": 2, **TINY[modality]}
    )
    return MaskedAutoencoder(model, RATIOS[modality], **{**DECODER, **settings})


def batch_of(modality, size=2):
    return torch.randn(size, *SHAPES[modality])


def recorded(module):
    outputs = []
    module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


@pytest.mark.parametrize("modality", MODALITIES)
def test_blocks_see_visible_tokens_only(modality):
    model = autoencoder(modality)
    inside, predicted = recorded(model.model.blocks[0]), recorded(model.predict)
    loss = model(batch_of(modality))
    assert loss.shape == () and loss.isfinite()
    cls = modality in ("image", "audio")
    assert inside[0].shape == (2, cls + SEEN[modality], 24)
    assert predicted[0].shape[:2] == (2, TOKENS[modality] - SEEN[modality])


@pytest.mark.parametrize("modality", MODALITIES)
def test_seen_and_hidden_are_everything_drawn_per_sample(modality):
    seen, hidden = autoencoder(modality).draw(20, torch.device("cpu"))
    everything = torch.cat([seen, hidden], 1).sort(1).values
    assert torch.equal(everything, torch.arange(TOKENS[modality]).expand(20, -1))
    assert seen.shape == (20, SEEN[modality]) and len({tuple(sample) for sample in seen.tolist()}) > 5


def test_video_hides_tubes():
    seen, _ = autoencoder("video").draw(20, torch.device("cpu"))
    first, second = seen.sort(1).values.split(2, dim=1)
    assert (first < 16).all() and torch.equal(second, first + 16)


@pytest.mark.parametrize(
    ("modality", "shape", "seen"),
    [("image", (196,), 49), ("audio", (512,), 103), ("point", (64,), 26), ("video", (8, 196), 20)],
)
def test_seen_at_base_size(modality, shape, seen):
    with torch.device("meta"):
        model = MaskedAutoencoder(create_model(modality, num_classes=0, depth=1), RATIOS[modality], decoder_depth=1)
    *_, places = shape
    assert model.domain.num_places == places and places - model.num_hidden == seen
    assert model.domain.num_slices == (shape[0] if len(shape) == 2 else 1)


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_prediction_does_not_depend_on_what_is_hidden(modality):
    model, input = autoencoder(modality).eval(), batch_of(modality, 1)
    seen, hidden = model.draw(1, torch.device("cpu"))
    model.draw = lambda batch_size, device: (seen, hidden)
    predicted = recorded(model.predict)
    input.requires_grad_()
    model(input)
    (gradient,) = torch.autograd.grad(predicted[0].square().sum(), input)
    moved = pixels(gradient, model.model.patch_embed.patch_size)[0].abs().sum(1)
    assert not moved[hidden[0]].any() and moved[seen[0]].all()


def test_points_predict_from_visible_groups_and_places():
    model, points = autoencoder("point").eval(), batch_of("point", 1)
    centers, neighborhoods = model.model.group(points)
    seen, hidden = model.draw(1, torch.device("cpu"))
    model.draw = lambda batch_size, device: (seen, hidden)
    predicted = recorded(model.predict)
    for places in (hidden, seen):
        changed = neighborhoods.clone()
        changed[0, places[0]] += torch.randn(6, 3)
        model.model.group = lambda points, changed=changed: (centers, changed)
        model(points)
    model.model.group = lambda points: (centers, neighborhoods)
    model(points)
    assert torch.equal(predicted[0], predicted[2]) and not torch.allclose(predicted[1], predicted[2])


def test_pixels_are_in_the_order_of_the_tokens():
    images = batch_of("image")
    assert torch.equal(pixels(images, (8, 8)), F.unfold(images, 8, stride=8).mT)
    clips = batch_of("video")
    tubes = [
        clips[:, :, 2 * t : 2 * t + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].flatten(1)
        for t, y, x in itertools.product(range(2), range(4), range(4))
    ]
    assert torch.equal(pixels(clips, (2, 8, 8)), torch.stack(tubes, 1))


@pytest.mark.parametrize("normalize_targets", [True, False])
@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_loss_is_the_mean_squared_error_of_hidden_pixels(modality, normalize_targets):
    model, input = autoencoder(modality, normalize_targets=normalize_targets), 3 + 2 * batch_of(modality)
    seen, hidden = model.draw(2, torch.device("cpu"))
    model.draw = lambda batch_size, device: (seen, hidden)
    predicted = recorded(model.predict)
    loss = model(input).item()
    total = 0.0
    targets = pixels(input, model.model.patch_embed.patch_size).double()
    for sample in range(2):
        for place, guess in zip(hidden[sample], predicted[0][sample].double(), strict=True):
            target = targets[sample, place]
            if normalize_targets:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total += (guess - target).square().mean().item() / hidden.numel()
    assert loss == pytest.approx(total, rel=1e-5)


def test_points_loss_is_the_chamfer_distance_of_hidden_groups():
    model, points = autoencoder("point").eval(), batch_of("point")
    seen, hidden = model.draw(2, torch.device("cpu"))
    model.draw = lambda batch_size, device: (seen, hidden)
    predicted = recorded(model.predict)
    loss = model(points).item()
    _, neighborhoods = model.model.group(points)
    total = 0.0
    for sample in range(2):
        for place, guess in zip(hidden[sample], predicted[0][sample].view(-1, 6, 3), strict=True):
            squared = (guess[:, None] - neighborhoods[sample, place]).square().sum(2)
            total += (squared.min(0).values.mean() + squared.min(1).values.mean()).item() / hidden.numel()
    assert loss == pytest.approx(total, rel=1e-5)


def trained(model, batch, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_learns_what_belongs_where(modality):
    *_, rows, columns = SHAPES[modality]
    slopes = torch.stack(torch.meshgrid(torch.linspace(-2, 2, rows), torch.linspace(-2, 2, columns), indexing="ij"))

    def batch():
        planes = torch.einsum("nd,dyx->nyx", 1 + 0.3 * torch.randn(16, 2), slopes)
        return planes.view(16, *[1] * (len(SHAPES[modality]) - 2), rows, columns).expand(16, *SHAPES[modality])

    model = trained(autoencoder(modality, normalize_targets=False), batch, 60)
    held_out = batch()
    without_places = held_out.square().mean().item()
    assert model(held_out) < 0.5 * without_places


def test_learns_to_complete_a_plane():
    def planes():
        return batch_of("point", 8) * torch.tensor([1.0, 1, 0])

    model = autoencoder("point")
    error = model(planes()).item()
    assert trained(model, planes, 25)(planes()) < 0.5 * error


@pytest.mark.parametrize("modality", MODALITIES)
def test_everything_but_the_classifiers_own_is_trained(modality):
    model = autoencoder(modality)
    model(batch_of(modality)).backward()
    without = {name.removeprefix("domain.model.") for name, p in model.named_parameters() if p.grad is None}
    assert (
        without
        == {
            "image": {"fc_norm.weight", "fc_norm.bias"},
            "audio": {"fc_norm.weight", "fc_norm.bias", "pos_embed"},
            "point": {"cls_token", "cls_pos"},
            "video": {"fc_norm.weight", "fc_norm.bias"},
        }[modality]
    )


@pytest.mark.parametrize("modality", MODALITIES)
def test_activation_checkpointing_changes_nothing(modality):
    model, input = autoencoder(modality), batch_of(modality)
    gradients = []
    for checkpointing in (False, True):
        model.model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        model.zero_grad()
        model(input).backward()
        gradients.append(model.model.blocks[0].mlp.fc1.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("modality", MODALITIES)
def test_what_is_not_frozen_gets_a_gradient(modality):
    model = autoencoder(modality).freeze_unused()
    model(batch_of(modality)).backward()
    assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in model.parameters())


def test_pretrains_any_timm_transformer_of_one_size():
    transformer = VisionTransformer(8, 2, 1, 0, "avg", embed_dim=96, depth=2, num_heads=3, fc_norm=False)
    model = MaskedAutoencoder(transformer, 0.5, 64, 1, 2, normalize_targets=False)
    model(torch.randn(3, 1, 8, 8)).backward()
    assert model.model is transformer and transformer.norm.weight.grad.any()
    assert isinstance(model.norm, nn.Identity)


@pytest.mark.parametrize("modality", MODALITIES)
def test_loss_under_autocast(modality):
    model, input = autoencoder(modality), batch_of(modality)
    losses = []
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(model(input))
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


@pytest.mark.parametrize("ratio", [0, 0.01, 1.0, -0.5])
def test_impossible_ratio(ratio):
    model = create_model("image", "tiny", num_classes=0, depth=1, **TINY["image"])
    with pytest.raises(ValueError, match=rf"mask_ratio: expected a part of 16 tokens, got {ratio}"):
        MaskedAutoencoder(model, ratio)
