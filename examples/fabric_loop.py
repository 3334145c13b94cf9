"""Lightning Fabric: your own loop on any number of devices. See README.md in this folder."""

import argparse
import os

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy

from loader_service import Loader
from loader_service.torch import TensorLoader

options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", default="fabric.pt")
options.add_argument("--devices", default="auto")
args = options.parse_args()

BATCH = 16  # per rank
fabric = Fabric(devices=args.devices)
fabric.launch()  # before the Loader: from here on the ranks are known
fabric.seed_everything(0)
pixels = {"device": fabric.device, "layout": "nchw", "mean": "image", "std": (60, 60, 60)}

with (
    Loader(args.address, split="train", view="train", batch_size=BATCH, rank="auto") as loader,
    Loader(args.address, split="val", view="center", batch_size=BATCH, rank="auto") as val_loader,
    TensorLoader(loader, fields=("images", "labels", "ids"), **pixels) as train,
    TensorLoader(val_loader, fields=("images", "labels"), **pixels) as val,
):
    kinds = len(loader.dataset.class_names)
    net = nn.Sequential(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, kinds))
    # The loaders need no setup_dataloaders(): they know their rank, and their tensors are on the device.
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=0.003))
    state = {"model": model, "optimizer": optimizer, "train": train}  # Fabric finds train's state_dict()
    if os.path.exists(args.checkpoint):
        fabric.load(args.checkpoint, state)

    while (epoch := train.epoch) < args.epochs:
        for step, (images, labels, ids) in enumerate(train):
            loss = cross_entropy(model(images), labels, reduction="sum") / BATCH  # 0, not NaN, for an empty part
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            print(f"epoch {epoch} rank {loader.rank} loss {loss.item():.2f} ids {ids.tolist()}", flush=True)
            if step % 5 == 4:
                fabric.save(args.checkpoint + ".new", state)
                if fabric.is_global_zero:
                    os.replace(args.checkpoint + ".new", args.checkpoint)  # a crash while saving leaves the old one
        with torch.no_grad():
            right = torch.cat([model(images).argmax(1) == labels for images, labels in val])
        counts = fabric.all_reduce(torch.stack([right.sum(), torch.ones_like(right).sum()]), reduce_op="sum")
        if fabric.is_global_zero:
            print(f"epoch {epoch} accuracy {int(counts[0])}/{int(counts[1])}", flush=True)
