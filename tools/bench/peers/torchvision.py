"""torchvision's AlexNet: ``python -m tools.bench.peers.torchvision BATCH DEVICE``.

Under ``torch.compile`` with autocast to bfloat16, channels-last and fused SGD: the fastest configuration that its users
have. It is the one-tower network of 2014, without LRN. One batch of uint8 noise stays on the device; each step subtracts
the mean, as ours does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from torchvision.models import alexnet

from tools.bench.turns import deliver

SIDE = 224
CLASSES = 1000
STEPS_BETWEEN_READINGS = {"cpu": 1, "cuda": 20}


def chunks(batch: int, device: torch.device) -> Iterator[int]:
    """Yield the images of a few steps at a time, once the device has finished them."""
    torch.manual_seed(0)
    # (batch, 224, 224, 3) uint8.
    images = torch.randint(0, 256, (batch, SIDE, SIDE, 3), dtype=torch.uint8).to(device)
    labels = torch.randint(0, CLASSES, (batch,)).to(device)
    model = alexnet(num_classes=CLASSES).to(device).to(memory_format=torch.channels_last)
    fast: Any = torch.compile(model)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
    while True:
        for _ in range(STEPS_BETWEEN_READINGS[device.type]):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                # permute() only changes strides: this is channels-last already. 120: the mean of tools.bench.steps.
                loss = functional.cross_entropy(fast(images.permute(0, 3, 1, 2).float() - 120), labels)
            # Outside autocast, as PyTorch advises: backward uses the dtypes of forward. The loss is never read, which
            # would wait for the GPU in every step.
            torch.autograd.backward([loss])
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield batch * STEPS_BETWEEN_READINGS[device.type]


if __name__ == "__main__":
    deliver(chunks(int(sys.argv[1]), torch.device(sys.argv[2])))
