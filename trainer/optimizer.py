"""The paper's update rule (section 5).

::

    v <- 0.9 v - 0.0005 * lr * w - lr * <dL/dw>
    w <- w + v

``torch.optim.SGD`` keeps ``buffer = -v / lr`` instead and so agrees only while the rate stands still; at a change of
rate the buffer must be multiplied by old / new, or the first steps after a drop are ten times too short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from trainer.model.presets import Preset

MOMENTUM: Final = 0.9
WEIGHT_DECAY: Final = 0.0005


class PaperSGD:
    """Stochastic gradient descent as published, for all parameters of a network.

    Args:
        model: whose parameters are updated; they may live on several devices.
        preset: the rate and decay of the biases.
        lr: learning rate of the weights.
        fused: whether one kernel for each device updates all of its parameters.
    """

    def __init__(self, model: nn.Module, preset: Preset, lr: float, fused: bool = True) -> None:
        self._named = dict(model.named_parameters())
        self._bias_rate = preset.bias_rate
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
        """The learning rate of the weights."""
        return self._lr

    def set_lr(self, lr: float) -> None:
        """Change the learning rate and leave every velocity v as it is."""
        if lr == self._lr:
            return
        buffers = list(self._buffers().values())
        if buffers:
            torch._foreach_mul_(buffers, self._lr / lr)  # one launch for each device, for rates that change each step
        self._lr = lr
        self._set_group_rates()

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self._sgd.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update every parameter by its gradient."""
        self._sgd.step()

    def momentum(self) -> dict[str, Tensor]:
        """The momentum buffers, by the name of their parameter; empty before the first step."""
        return self._buffers()

    def rates(self) -> dict[str, float]:
        """Each parameter's learning rate, by its name: minus its momentum buffer times that is its velocity v."""
        return {name: self._lr * (self._bias_rate if _is_bias(name) else 1.0) for name in self._named}

    def load_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        """Take over what ``momentum`` gave, under the same learning rate."""
        for name, buffer in momentum.items():
            parameter = self._named.get(name)
            if parameter is None:
                continue  # of a tower that lives in another process
            kept = torch.empty_like(parameter, requires_grad=False)
            self._sgd.state[parameter]["momentum_buffer"] = kept.copy_(buffer)

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
