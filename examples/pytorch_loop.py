"""Plain PyTorch: train, validate after every epoch, and resume in the middle of one. See README.md in this folder."""

import argparse
import os

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from loader_service import Loader
from loader_service.torch import TensorLoader

options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", default="pytorch.pt")
args = options.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
pixels = {
    "device": device,
    "layout": "nchw",
    "mean": "image",
    "std": (60, 60, 60),
}  # on the device; they travel as uint8

with (
    Loader(args.address, split="train", view="train", batch_size=16) as loader,
    Loader(args.address, split="val", view="center", batch_size=16) as val_loader,
    TensorLoader(loader, fields=("images", "labels", "ids"), **pixels) as train,
    TensorLoader(val_loader, fields=("images", "labels"), **pixels) as val,
):
    kinds = len(loader.dataset.class_names)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, kinds)
    )
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    parts = {"model": model, "optimizer": optimizer, "train": train}  # all have state_dict() and load_state_dict()
    if os.path.exists(args.checkpoint):
        for name, state in torch.load(args.checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)

    while train.epoch < args.epochs:
        epoch = train.epoch
        for step, (images, labels, ids) in enumerate(train):  # after load_state_dict: the rest of its epoch
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"epoch {epoch} loss {loss.item():.2f} ids {ids.tolist()}", flush=True)
            if step % 5 == 4:  # the state counts the batches that this loop was given, however many are prefetched
                torch.save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint + ".new")
                os.replace(args.checkpoint + ".new", args.checkpoint)  # a crash while saving leaves the old one
        with torch.no_grad():
            right = torch.cat([model(images).argmax(1) == labels for images, labels in val])
        print(f"epoch {epoch} accuracy {int(right.sum())}/{len(right)}", flush=True)
