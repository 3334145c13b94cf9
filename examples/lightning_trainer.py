"""Lightning's Trainer, with its own checkpoints, on any number of devices. See README.md in this folder."""

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

from loader_service import Loader
from loader_service.torch import LookAhead, TensorLoader


class Net(lightning.LightningModule):
    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self.net = nn.Sequential(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.out = nn.Linear(512, 1000)  # as many classes as there may be

    def loader(self, split: str, view: str) -> TensorLoader:
        loader = Loader(self.address, split=split, view=view, batch_size=16, rank="auto")
        pixels = {"device": self.device, "layout": "nchw", "mean": "image", "std": (60, 60, 60)}
        return TensorLoader(loader, fields=("images", "labels", "ids"), **pixels)

    # The loaders are opened here, and not before fit(): rank="auto" needs the processes that fit() starts.
    def train_dataloader(self) -> LookAhead:
        return LookAhead(self.loader("train", "train"))  # Lightning takes a batch ahead, and saves its state_dict()

    def val_dataloader(self) -> TensorLoader:
        return self.loader("val", "center")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.003)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        images, labels, ids = batch
        print(f"epoch {self.current_epoch} rank {self.global_rank} ids {ids.tolist()}", flush=True)
        return cross_entropy(self.out(self.net(images)), labels, reduction="sum") / 16  # 0, not NaN, for an empty part

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        right = self.out(self.net(batch[0])).argmax(1) == batch[1]
        self.log_dict({"right": right.float().sum(), "of": float(len(right))}, reduce_fx="sum", sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking and self.trainer.is_global_zero:
            right, of = (int(self.trainer.callback_metrics[name]) for name in ("right", "of"))
            print(f"epoch {self.current_epoch} accuracy {right}/{of}", flush=True)


options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", default="lightning-checkpoints")
options.add_argument("--devices", default="auto")
args = options.parse_args()
save = ModelCheckpoint(args.checkpoint, every_n_train_steps=5, save_last=True)
trainer = lightning.Trainer(devices=args.devices, max_epochs=args.epochs, callbacks=[save], logger=False)
trainer.fit(Net(args.address), ckpt_path="last")  # continues at the newest checkpoint, if there is one
