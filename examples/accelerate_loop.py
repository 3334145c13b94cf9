"""Hugging Face Accelerate: ``accelerate launch examples/accelerate_loop.py``. See README.md in this folder."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import nn
from torch.nn.functional import cross_entropy

from loader_service import Loader
from loader_service.torch import LookAhead, TensorLoader

options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", type=Path, default="accelerate-checkpoints")
args = options.parse_args()

BATCH = 8  # per rank
accelerator = Accelerator(cpu=not torch.cuda.is_available())  # without cpu=True, ranks on CPUs stay apart
torch.manual_seed(0)
pixels = {"device": accelerator.device, "layout": "nchw", "mean": "image", "std": (60, 60, 60)}

with (
    Loader(args.address, split="train", view="train", batch_size=BATCH, rank="auto") as loader,
    Loader(args.address, split="val", view="center", batch_size=BATCH, rank="auto") as val_loader,
    TensorLoader(loader, fields=("images", "labels", "ids"), **pixels) as batches,
    TensorLoader(val_loader, fields=("images", "labels"), **pixels) as val,
):
    kinds = len(loader.dataset.class_names)
    net = nn.Sequential(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, kinds))
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.003))
    ahead = LookAhead(batches)  # Accelerate takes a batch ahead, to know an epoch's last step; the state does not
    # Not prepare(): it would share the batches out among the ranks once more.
    train = DataLoaderShard(ahead, device=accelerator.device, batch_size=None)
    accelerator.register_for_checkpointing(ahead)
    if saved := sorted(args.checkpoint.glob("[0-9]*")):
        accelerator.load_state(saved[-1])

    while (epoch := batches.epoch) < args.epochs:
        for step, (images, labels, ids) in enumerate(train):
            loss = cross_entropy(model(images), labels, reduction="sum") / BATCH  # 0, not NaN, for an empty part
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            print(f"epoch {epoch} rank {loader.rank} loss {loss.item():.2f} ids {ids.tolist()}", flush=True)
            if step % 6 == 5:
                accelerator.save_state(args.checkpoint / "new")
                accelerator.wait_for_everyone()
                if (
                    accelerator.is_main_process
                ):  # a crash while saving leaves the one before; delete old ones as you like
                    place = "{epoch:04}-{position:09}".format(**ahead.state_dict())
                    (args.checkpoint / "new").rename(args.checkpoint / place)
        with torch.no_grad():
            right = torch.cat([net(images).argmax(1) == labels for images, labels in val])
        counts = accelerator.reduce(torch.stack([right.sum(), torch.ones_like(right).sum()]))
        accelerator.print(f"epoch {epoch} accuracy {int(counts[0])}/{int(counts[1])}", flush=True)
