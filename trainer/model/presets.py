"""What the paper's text says, and where its authors' own code of 2012 does otherwise: two presets, all differences here.

Both pad conv1's input with zeros at the right and bottom only, as the code did (the text does not say), and both
normalise within each tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from trainer.errors import ConfigError
from trainer.model import lrn

PresetName = Literal["paper", "original"]


@dataclass(frozen=True)
class Preset:
    """The choices in which two readings of AlexNet differ.

    Fields:
        name: what ``--preset`` calls it.
        relu_before_lrn1: whether conv1's ReLU comes before LRN (section 3.5), or after the pooling. (The code also
            moves conv5's ReLU behind its pooling; there the two commute, so nothing differs.)
        lrn_alpha: weight of each square in LRN (section 3.3).
        middle_std: standard deviation of the weights of conv3 to conv5 at the start (section 5); all others have .01.
        bias_rate: learning rate of the biases, as a multiple of the weights'.
        bias_decay: whether weight decay acts on biases too, as the update rule of section 5 reads.
        mean_follows_crop: whether the mean image's window that is subtracted is the crop's own, mirrored with it, or
            always the centre.
        jitter_by_deviation: whether colour jitter is .1 x standard deviation along each principal axis, or
            .1 x eigenvalue (section 4.1).
    """

    name: PresetName
    relu_before_lrn1: bool
    lrn_alpha: float
    middle_std: float
    bias_rate: float
    bias_decay: bool
    mean_follows_crop: bool
    jitter_by_deviation: bool


PRESETS: Final[dict[str, Preset]] = {
    "paper": Preset(
        name="paper",
        relu_before_lrn1=True,
        lrn_alpha=lrn.ALPHA,
        middle_std=0.01,
        bias_rate=1.0,
        bias_decay=True,
        mean_follows_crop=True,
        jitter_by_deviation=False,
    ),
    "original": Preset(
        name="original",
        relu_before_lrn1=False,
        lrn_alpha=lrn.ALPHA / lrn.SIZE,
        middle_std=0.03,
        bias_rate=2.0,
        bias_decay=False,
        mean_follows_crop=False,
        jitter_by_deviation=True,
    ),
}


def preset_named(name: str) -> Preset:
    """The preset of that name; ConfigError if there is none."""
    if name not in PRESETS:
        raise ConfigError("--preset", name, f"one of {', '.join(get_args(PresetName))}")
    return PRESETS[name]
