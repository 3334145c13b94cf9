"""JAX, with Orbax checkpoints; the loader's NumPy arrays go to the device. See README.md in this folder."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from loader_service import Loader

options = argparse.ArgumentParser()
options.add_argument("--address", default="tcp://127.0.0.1:5555")
options.add_argument("--epochs", type=int, default=3)
options.add_argument("--checkpoint", type=Path, default="jax-checkpoints")
args = options.parse_args()


def logits(weights: dict, images: jax.Array) -> jax.Array:
    x = (images.astype(jnp.float32) - 120) / 60  # uint8 until here
    x = jax.lax.conv_general_dilated(x, weights["conv"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.relu(x).mean((1, 2)) @ weights["out"]


def loss_of(weights: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(weights, images)), labels[:, None], 1).mean()


@jax.jit
def train_step(weights: dict, images: jax.Array, labels: jax.Array) -> tuple:
    loss, slopes = jax.value_and_grad(loss_of)(weights, images, labels)
    return jax.tree.map(lambda weight, slope: weight - 0.1 * slope, weights, slopes), loss


with (  # rank="auto" asks jax.distributed, if it is initialised
    Loader(args.address, split="train", view="train", batch_size=16, rank="auto") as train,
    Loader(args.address, split="val", view="center", batch_size=16) as val,
    ocp.CheckpointManager(args.checkpoint.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager,
):
    keys = jax.random.split(jax.random.key(0))
    sizes = {"conv": (7, 7, 3, 32), "out": (32, len(train.dataset.class_names))}
    weights = {name: 0.05 * jax.random.normal(key, sizes[name]) for name, key in zip(sizes, keys, strict=True)}
    steps = manager.latest_step() or 0
    if steps:
        parts = ocp.args.Composite(weights=ocp.args.StandardRestore(weights), train=ocp.args.JsonRestore())
        restored = manager.restore(steps, args=parts)
        weights = restored["weights"]
        train.load_state_dict(restored["train"])

    while (epoch := train.epoch) < args.epochs:
        for batch in train:
            weights, loss = train_step(weights, jax.device_put(batch.images), batch.labels)
            print(f"epoch {epoch} loss {loss:.2f} ids {batch.ids.tolist()}", flush=True)
            steps += 1
            if steps % 5 == 0:
                parts = {"weights": ocp.args.StandardSave(weights), "train": ocp.args.JsonSave(train.state_dict())}
                manager.save(steps, args=ocp.args.Composite(**parts))  # a crash leaves the one before
        right = np.concatenate([logits(weights, batch.images).argmax(1) == batch.labels for batch in val])
        print(f"epoch {epoch} accuracy {right.sum()}/{len(right)}", flush=True)
