"""Hugging Face's Trainer, with its own checkpoints. See README.md in this folder."""

import argparse

from torch import nn
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from loader_service import Loader
from loader_service.torch import TensorLoader

options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", default="huggingface-run")
given = options.parse_args()
args = TrainingArguments(given.checkpoint, num_train_epochs=given.epochs, learning_rate=0.01, save_steps=5)
args.eval_strategy, args.ignore_data_skip = "epoch", True  # the loader finds its place by itself


class Batches:  # as the Trainer passes them on: keywords of forward()
    def __init__(self, split: str, view: str) -> None:
        self.loader = Loader(given.address, split=split, view=view, batch_size=16, rank="auto")
        pixels = {"device": args.device, "layout": "nchw", "mean": "image", "std": (60, 60, 60)}
        self.batches = TensorLoader(self.loader, fields=("images", "labels", "ids"), **pixels)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return ({"images": images, "labels": labels, "ids": ids} for images, labels, ids in self.batches)


class Place(TrainerCallback, ExportableState):  # the Trainer saves state() in trainer_state.json
    def state(self) -> dict:
        return {"args": {}, "attributes": {"train": train.batches.state_dict()}}

    def on_train_begin(self, args, state, control, **more) -> None:
        if state.global_step:  # a resumed run
            train.batches.load_state_dict(state.stateful_callbacks["Place"]["attributes"]["train"])


class Net(nn.Sequential):
    def forward(self, images, labels, ids) -> dict:
        if self.training:
            print(f"epoch {train.batches.epoch} ids {ids.tolist()}", flush=True)
        return {"loss": cross_entropy(logits := super().forward(images), labels), "logits": logits}


def right(seen: EvalPrediction) -> dict:
    return {"right": int((seen.predictions.argmax(1) == seen.label_ids).sum()), "of": len(seen.label_ids)}


train, val = Batches("train", "train"), Batches("val", "center")
net = Net(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 1000))
trainer = Trainer(net, args, train_dataset=train, eval_dataset=val, compute_metrics=right, callbacks=[Place()])
trainer.get_train_dataloader, trainer.get_eval_dataloader = lambda: train, lambda *_: val
trainer.train(resume_from_checkpoint=get_last_checkpoint(given.checkpoint))
