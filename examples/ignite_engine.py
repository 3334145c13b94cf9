"""Ignite: an Engine with Ignite's own checkpoints. See README.md in this folder."""

import argparse
from pathlib import Path

import torch
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Accuracy
from torch import nn
from torch.nn.functional import cross_entropy

from loader_service import Loader
from loader_service.torch import TensorLoader

options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", default="ignite-checkpoints")
args = options.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
pixels = {"device": device, "layout": "nchw", "mean": "image", "std": (60, 60, 60)}

with (
    Loader(args.address, split="train", view="train", batch_size=16, rank="auto") as loader,
    Loader(args.address, split="val", view="center", batch_size=16) as val_loader,
    TensorLoader(loader, fields=("images", "labels", "ids"), **pixels) as train,
    TensorLoader(val_loader, fields=("images", "labels"), **pixels) as val,
):
    kinds = len(loader.dataset.class_names)
    net = nn.Sequential(nn.Conv2d(3, 32, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, kinds))
    model = net.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)

    def step(engine: Engine, batch: tuple) -> float:
        images, labels, ids = batch
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"epoch {engine.state.epoch - 1} loss {loss.item():.2f} ids {ids.tolist()}", flush=True)
        return loss.item()

    trainer, evaluator = Engine(step), create_supervised_evaluator(model, {"accuracy": Accuracy()}, device)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        accuracy = evaluator.run(val).metrics["accuracy"]
        print(f"epoch {trainer.state.epoch - 1} accuracy {accuracy:.2f}/1 after {evaluator.state.iteration} batches")

    parts = {"trainer": trainer, "model": model, "optimizer": optimizer, "train": train}
    disk = DiskSaver(args.checkpoint, require_empty=False)  # a resumed run adds to what it finds
    saver = Checkpoint(parts, disk, global_step_transform=lambda *_: trainer.state.iteration)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=5), saver)
    if saved := sorted(Path(args.checkpoint).glob("*.pt"), key=lambda path: path.stat().st_mtime):
        Checkpoint.load_objects(parts, torch.load(saved[-1], weights_only=True))
    trainer.run(train, max_epochs=args.epochs, epoch_length=len(train))
