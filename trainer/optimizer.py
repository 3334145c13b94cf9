"""Stochastic gradient descent as in the paper (section 5).

::

    v <- 0.9 v - 0.0005 * lr * w - lr * <dL/dw>
    w <- w + v

``torch.optim.SGD`` stores ``buffer = -v / lr`` instead of v. Both rules agree only while the learning rate is constant.
When the rate changes, the buffer must be multiplied by old / new, or the first steps after a drop are ten times too
short.
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
        weights = [p for name, p in self._named.items() if not _is_bias(name)]
        biases = [p for name, p in self._named.items() if _is_bias(name)]
        groups = [
            {"params": weights, "weight_decay": WEIGHT_DECAY},
            {"params": biases, "weight_decay": WEIGHT_DECAY if preset.bias_decay else 0.0},
        ]
        self._sgd = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, fused=fused)
        self._lr = lr
        self._set_group_rates()

    @property
    def lr(self) -> float:
        """Learning rate of the weights."""
        return self._lr

    def set_lr(self, lr: float) -> None:
        """Change the learning rate; the velocities v keep their values."""
        if lr == self._lr:
            return
        buffers = list(self._buffers().values())
        if buffers:  # none before the first step
            torch._foreach_mul_(buffers, self._lr / lr)  # one launch per device: warm-up changes the rate at every step
        self._lr = lr
        self._set_group_rates()

    def zero_grad(self) -> None:
        """Drop the gradients of the previous step."""
        self._sgd.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update every parameter with its gradient."""
        self._sgd.step()

    def momentum(self) -> dict[str, Tensor]:
        """Return the momentum buffers by parameter name, each of its parameter's shape; empty before the first step."""
        return self._buffers()

    def rates(self) -> dict[str, float]:
        """Return the learning rate of each parameter by name. The velocity is v = -rate * momentum buffer."""
        return {name: self._lr * (self._bias_rate if _is_bias(name) else 1.0) for name in self._named}

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Restore the result of ``momentum``; the learning rate must be the same as then."""
        for name, buffer in momentum.items():
            parameter = self._named.get(name)
            if parameter is None:
                continue  # it belongs to a tower of another process
            restored = torch.empty_like(parameter, requires_grad=False)  # the parameter's device and memory format
            self._sgd.state[parameter]["momentum_buffer"] = restored.copy_(buffer)

    def _buffers(self) -> dict[str, Tensor]:
        state = self._sgd.state
        return {
            name: state[parameter]["momentum_buffer"]
            for name, parameter in self._named.items()
            if state.get(parameter, {}).get("momentum_buffer") is not None
        }

    def _set_group_rates(self) -> None:
        weights, biases = self._sgd.param_groups
        weights["lr"], biases["lr"] = self._lr, self._lr * self._bias_rate


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"
