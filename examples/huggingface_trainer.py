"""Train a Hugging Face ViT with the weights of a VideoMAE using the Trainer; save, load and merge it.

`python examples/huggingface_trainer.py [TARGET AUXILIARY]` takes names on the Hub or folders, such as
google/vit-base-patch16-224 and MCG-NJU/videomae-base; without them both models are small and random.
"""

import sys
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import VideoMAEModel, ViTForImageClassification

from m2pt import disabled_pathways, merge_pathways, parameter_groups
from m2pt.integrations.transformers import PathwayCallback, connect, from_pretrained

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}


def load(model_class, name):
    return model_class.from_pretrained(name) if name else model_class(model_class.config_class(**SIZE))


class Trainer(transformers.Trainer):
    def create_optimizer(self, *_):
        rates = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay, "scale_lr": 0.01}
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, **rates))
        return self.optimizer


def main(target=None, auxiliary=None):
    model, aux_model = load(ViTForImageClassification, target), load(VideoMAEModel, auxiliary)
    connect(model, aux_model)
    size = model.config.image_size
    images = torch.randn(32, 3, size, size)
    labels = (images.mean(dim=(1, 2, 3)) > 0).long()  # replace with your data
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    with TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, max_steps=6, logging_steps=2, save_steps=3, learning_rate=1e-3, weight_decay=0.05, report_to="none"
        )
        trainer = Trainer(model, args, train_dataset=data, callbacks=[PathwayCallback(merge=False)])
        trainer.train()
        trainer.save_model(folder)

        loaded = from_pretrained(ViTForImageClassification, folder, aux_model).eval()
        logits = model.cpu().eval()(images[:4]).logits
        with disabled_pathways(model):
            print("without its pathways: logits differ by", (model(images[:4]).logits - logits).abs().max().item())
        print("loaded: logits differ by", (loaded(images[:4]).logits - logits).abs().max().item())

        merge_pathways(loaded).save_pretrained(folder)  # PathwayCallback() merges when training ends
        plain = ViTForImageClassification.from_pretrained(folder)
        print("merged: logits differ by", (plain(images[:4]).logits - logits).abs().max().item())


if __name__ == "__main__":
    main(*sys.argv[1:])
