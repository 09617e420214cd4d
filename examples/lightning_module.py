"""Train a ViT in Lightning with the frozen weights of an audio transformer, and write the merged model.

Runs in seconds on a CPU. For real weights use pretrained=True with timm's names, and for the audio transformer
`m2pt.checkpoint_formats.load_auxiliary("audiomae.pth")`.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from m2pt import parameter_groups
from m2pt.integrations.lightning import PathwayCallback
from m2pt.models import create_model

SIZE = {"embed_dim": 48, "depth": 2, "num_heads": 3}


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = VisionTransformer(img_size=32, patch_size=8, num_classes=4, **SIZE)

    def training_step(self, batch, batch_index):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(parameter_groups(self.model, lr=1e-3, weight_decay=0.05, scale_lr=1e-2))


def main(out):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(4, (32,)))
    aux_model = create_model("audio", num_classes=0, img_size=[32, 128], **SIZE)
    merged = Path(out, "merged.safetensors")
    pathway = PathwayCallback(aux_model, save_aux_weights=False, export_path=merged)
    checkpoints = ModelCheckpoint(out, filename="pathway", enable_version_counter=False)
    settings = {"accelerator": "cpu", "max_epochs": 3, "logger": False, "log_every_n_steps": 1}
    trainer = Trainer(**settings, callbacks=[pathway, checkpoints])
    trainer.fit(Classifier(), DataLoader(data, batch_size=8, shuffle=True))
    for name, value in trainer.callback_metrics.items():
        print(f"{name}: {value:+.4f}")
    print(f"written: {checkpoints.best_model_path}, {merged}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
