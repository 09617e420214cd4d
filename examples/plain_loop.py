"""Train a timm ViT with the weights of an audio transformer in your own loop; save, load and merge the pathway.

`python examples/plain_loop.py [IMAGE.pth AUDIO.pth]` takes MAE's and AudioMAE's ViT-B; otherwise small random models.
"""

import sys
from tempfile import TemporaryDirectory

import timm
import torch

from m2pt import (
    disabled_pathways,
    load_pathway,
    merge_pathways,
    parameter_groups,
    reparameterize_aux_into_target_model,
    save_pathway,
)
from m2pt.checkpoint_formats import load_auxiliary, load_pretrained
from m2pt.models import create_model


def load(image, audio):
    if not image:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=32)
        return model, create_model("audio", "tiny", num_classes=0)
    model = timm.create_model("vit_base_patch16_224", num_classes=2)
    load_pretrained(model, image)
    return model, load_auxiliary(audio)


def main(image=None, audio=None):
    model, aux_model = load(image, audio)
    reparameterize_aux_into_target_model(model, aux_model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.05, scale_lr=1e-2))

    images = torch.randn(16, 3, *model.patch_embed.img_size)
    labels = (images.mean(dim=(1, 2, 3)) > 0).long()  # replace with your data
    for step in range(4):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad(), TemporaryDirectory() as folder:
        logits = model(images)
        with disabled_pathways(model):
            print("without its pathways: logits differ by", (model(images) - logits).abs().max().item())
        save_pathway(model, path := f"{folder}/model.safetensors", include_base=True)
        loaded = load_pathway(load(image, audio)[0].eval(), aux_model, path)
        print("loaded: logits differ by", (loaded(images) - logits).abs().max().item())
        print("merged: logits differ by", (merge_pathways(loaded)(images) - logits).abs().max().item())


if __name__ == "__main__":
    main(*sys.argv[1:])
