"""Departures from the network and the recipe, one for each comparison that the paper makes."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from trainer.errors import ConfigError

REMOVABLE: Final = ("conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
"""The middle layers (section 7: "removing any of the middle layers results in a loss of about 2%")."""

_ACROSS_TOWERS: Final = frozenset({"conv3", "conv4", "conv5"})

Activation = Literal["relu", "tanh"]
Pooling = Literal["overlapping", "plain"]


class Ablation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is otherwise than in the paper's net; the default is the paper's net itself.

    Fields:
        activation: ``tanh`` is what figure 1 compares ReLUs with (section 3.1).
        lrn: local response normalisation (section 3.3: 1.4 % top-1).
        pooling: windows of 3, two apart, or ``plain``: windows of 2, two apart (section 3.4: .4 %).
        dropout: of fc6 and fc7 (section 4.2). Without it their outputs are not halved in use either.
        without: layers to leave out, of REMOVABLE, with their activation, normalisation and dropout. The layer after
            reads what the missing one would have read; poolings stay, and so do the sizes of the maps.
        crops, flips, jitter: random crops and mirror images, and colour jitter (section 4.1). Without crops the centre
            is trained on.
    """

    activation: Activation = "relu"
    lrn: bool = True
    pooling: Pooling = "overlapping"
    dropout: bool = True
    without: tuple[str, ...] = ()
    crops: bool = True
    flips: bool = True
    jitter: bool = True

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--activation", self.activation, ("relu", "tanh")),
            ("--pooling", self.pooling, ("overlapping", "plain")),
        ):
            if value not in known:
                raise ConfigError(option, value, f"one of {', '.join(known)}")
        for layer in self.without:
            if layer not in REMOVABLE:
                raise ConfigError("--without", layer, f"one of {', '.join(REMOVABLE)}")
        if set(self.without) >= _ACROSS_TOWERS:
            raise ConfigError("--without", ",".join(self.without), "at least one of conv3, conv4 and conv5 to stay")
        if not self.crops and (self.flips or self.jitter):
            raise ConfigError("--crops", "off", "--no-flips and --no-jitter beside it: nodes serve the centre as it is")
