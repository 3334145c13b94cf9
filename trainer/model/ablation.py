"""Ablations: changes of network and recipe, one for each comparison in the paper."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from trainer.errors import ConfigError

REMOVABLE: Final = ("conv2", "conv3", "conv4", "conv5", "fc6", "fc7")
"""Layers that can be left out (section 7: "removing any of the middle layers results in a loss of about 2%")."""

_ACROSS_TOWERS: Final = frozenset({"conv3", "conv4", "conv5"})
"""The first of these that is present reads the maps of both towers."""

Activation = Literal["relu", "tanh"]
Pooling = Literal["overlapping", "plain"]


class Ablation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Differences from the paper's network and recipe; the defaults are the paper's.

    Fields:
        activation: ``relu``, or ``tanh``, which figure 1 compares it with (section 3.1).
        lrn: local response normalisation (section 3.3: 1.4 % top-1).
        pooling: ``overlapping``, windows of 3 at stride 2, or ``plain``, windows of 2 at stride 2 (section 3.4: .4 %).
        dropout: dropout of fc6 and fc7 (section 4.2). Without it their outputs are not halved at test time either.
        without: layers to leave out, from REMOVABLE, with their activation, normalisation and dropout. The next layer
            reads the missing layer's input; poolings, and so the sizes of the maps, stay.
        crops, flips, jitter: random crops, horizontal flips and colour jitter (section 4.1). Without crops, training uses
            the centre crop.
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
        # msgspec checks literals in files only, so values from the command line and from code are checked here.
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
            raise ConfigError(
                "--crops", "off", "also --no-flips and --no-jitter: nodes serve the centre crop unchanged"
            )
