"""Train a large ViT with every memory lever: int8 W_aux, checkpointing, step in backward, offloading, 8-bit Adam.

`python examples/large_vit.py vit_gigantic_patch14_224 24` prints what a step takes with each lever, and which of them a
GPU of 24 GiB needs; then it trains on random images. Without arguments it takes a tiny ViT and 2 GiB. 8-bit Adam needs
a GPU and `pip install ".[adam8bit]"`; on a CPU AdamW stands in.
"""

import sys

import timm
import torch

from m2pt import estimate_memory, low_memory, merge_pathways, reparameterize_aux_into_target_model


def main(name="vit_tiny_patch16_224", gpu_gib="2", batch=4):
    estimate = estimate_memory(name, {"data.batch_size": batch}, gpu_gib=float(gpu_gib))
    print(estimate)
    if estimate.fitting is None:
        print(f"{gpu_gib} GiB are too few, even with every lever")
    else:
        print(f"{gpu_gib} GiB are enough with:", ", ".join(estimate.fitting) or "no lever")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = timm.create_model(name, num_classes=10)
        aux_model = timm.create_model(name, num_classes=0)  # load an audio transformer of the same size here
    reparameterize_aux_into_target_model(model, aux_model, aux_dtype="int8")
    del aux_model  # the model holds an int8 copy
    optimizer = low_memory(model, lr=1e-4)  # updates inside backward: no optimizer.step(), no zero_grad()
    print("optimizer:", type(optimizer).__name__)

    images = torch.randn(batch, *model.pretrained_cfg["input_size"], device=device)
    labels = torch.arange(batch, device=device) % 10
    for step in range(3):
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        print(f"step {step}: loss {loss.item():.3f}")

    with torch.no_grad():
        logits = model.eval()(images)
        print("merged: logits differ by", (merge_pathways(model)(images) - logits).abs().max().item())


if __name__ == "__main__":
    main(*sys.argv[1:])
