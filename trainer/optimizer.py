"""Stochastic gradient descent as in the paper (section 5).

::

    v <- 0.9 v - 0.0005 * lr * w - lr * <dL/dw>
    w <- w + v

``torch.optim.SGD`` computes ``buffer <- momentum * buffer + (1 - dampening) * (g + weight_decay * w)`` and
``w <- w - lr * buffer``. With ``lr = 1`` and ``dampening = 1 - rate`` the buffer is exactly -v, whatever the rate was before.
Its usual form, with the rate as ``lr``, stores -v / rate instead: a change of the rate then changes v, and a saved buffer
means nothing without the rate of its last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from trainer.model.presets import Preset

MOMENTUM: Final = 0.9  # paper section 5
WEIGHT_DECAY: Final = 0.0005  # paper section 5; "not merely a regularizer: it reduces the model's training error"


class PaperSGD:
    """An optimiser that follows the paper's update rule, for all parameters of a network.

    Args:
        model: network to update; its parameters may lie on several devices.
        preset: learning rate and weight decay of the biases.
        lr: learning rate of the weights.
        fused: update all parameters of a device with one kernel.
    """

    def __init__(self, model: nn.Module, preset: Preset, lr: float, fused: bool = True) -> None:
        self._named = dict(model.named_parameters())
        self._bias_rate = preset.bias_rate
        # Two groups, since presets treat biases differently.
        weights = [p for name, p in self._named.items() if not is_bias(name)]
        biases = [p for name, p in self._named.items() if is_bias(name)]
        groups = [
            {"params": weights, "weight_decay": WEIGHT_DECAY},
            {"params": biases, "weight_decay": WEIGHT_DECAY if preset.bias_decay else 0.0},
        ]
        # None, not False: without the fused kernel torch may still choose its foreach form, which GPUs need.
        self._sgd = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, fused=fused or None)
        for parameter in self._named.values():
            # v starts at 0. Without a buffer, SGD's first step would take the gradient without the rate.
            self._sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        self.set_lr(lr)

    @property
    def lr(self) -> float:
        """Learning rate of the weights."""
        return self._lr

    def set_lr(self, lr: float) -> None:
        """Change the learning rate; the velocities keep their values."""
        self._lr = lr
        weights, biases = self._sgd.param_groups
        weights["dampening"], biases["dampening"] = 1.0 - lr, 1.0 - lr * self._bias_rate

    def zero_grad(self) -> None:
        """Drop the gradients of the previous step."""
        self._sgd.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update every parameter with its gradient."""
        self._sgd.step()

    def momentum(self) -> dict[str, Tensor]:
        """Return a copy of the velocities v by parameter name, each of its parameter's shape; zeros before the first step."""
        buffers = self.decrements()
        return dict(zip(buffers, torch._foreach_neg(list(buffers.values())), strict=True))

    def decrements(self) -> dict[str, Tensor]:
        """Return -v by parameter name, the last step's w before minus w after; the optimiser's own memory, no copy."""
        return {name: self._sgd.state[parameter]["momentum_buffer"] for name, parameter in self._named.items()}

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Restore the result of ``momentum``, exactly, whatever the learning rate is now."""
        buffers = self.decrements()
        for name, velocity in momentum.items():
            if name in buffers:  # others belong to a tower of another process
                buffers[name].copy_(velocity).neg_()


def is_bias(name: str) -> bool:
    """Return True if the parameter of that name is a bias."""
    return name.rpartition(".")[2] == "bias"
