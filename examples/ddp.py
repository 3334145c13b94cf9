"""DistributedDataParallel: ``torchrun --nproc-per-node 2 examples/ddp.py``. See README.md in this folder."""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from loader_service import Loader
from loader_service.torch import TensorLoader

options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", default="ddp.pt")
args = options.parse_args()

BATCH = 8  # per rank: a step of two ranks takes 16 samples
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
torch.manual_seed(0)
pixels = {"device": device, "layout": "nchw", "mean": "image", "std": (60, 60, 60)}

with (  # rank="auto": each rank gets its part of every global batch, and all ranks step equally often
    Loader(args.address, split="train", view="train", batch_size=BATCH, rank="auto") as loader,
    Loader(args.address, split="val", view="center", batch_size=BATCH, rank="auto") as val_loader,
    TensorLoader(loader, fields=("images", "labels", "ids"), **pixels) as train,
    TensorLoader(val_loader, fields=("images", "labels"), **pixels) as val,
):
    kinds = len(loader.dataset.class_names)
    net = nn.Sequential(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, kinds))
    model = DistributedDataParallel(net.to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    parts = {"model": net, "optimizer": optimizer, "train": train}
    if os.path.exists(args.checkpoint):  # one file for all: the loader's state is a position of the whole epoch
        for name, state in torch.load(args.checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)

    while (epoch := train.epoch) < args.epochs:
        for step, (images, labels, ids) in enumerate(train):
            # Not the mean: in an epoch's last batch a rank has fewer samples, perhaps none, and each counts the same.
            loss = cross_entropy(model(images), labels, reduction="sum") / BATCH
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"epoch {epoch} rank {loader.rank} loss {loss.item():.2f} ids {ids.tolist()}", flush=True)
            if step % 5 == 4 and loader.rank == 0:
                torch.save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint + ".new")
                os.replace(args.checkpoint + ".new", args.checkpoint)
        with torch.no_grad():
            right = torch.cat([net(images).argmax(1) == labels for images, labels in val])
        counts = torch.stack([right.sum(), torch.ones_like(right).sum()])
        dist.all_reduce(counts)
        if loader.rank == 0:
            print(f"epoch {epoch} accuracy {int(counts[0])}/{int(counts[1])}", flush=True)
dist.destroy_process_group()
