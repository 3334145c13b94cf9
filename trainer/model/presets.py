"""Two presets: ``paper`` follows the paper's text, ``original`` the authors' code of 2012. All their differences are here.

Both pad conv1's input with zeros at the right and bottom only, as the code does (the text does not say), and both
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
    """The choices in which the presets differ.

    Fields:
        name: value of ``--preset``.
        relu_before_lrn1: apply conv1's ReLU before LRN (section 3.5), not after the pooling. (The code also moves conv5's
            ReLU behind its pooling; these two commute, so the result is the same.)
        lrn_alpha: weight of each square in LRN (section 3.3).
        middle_std: initial std of the weights of conv3 to conv5 (section 5); all others have .01.
        bias_rate: learning rate of the biases, as a multiple of the weights'.
        bias_decay: apply weight decay to biases, too, as the update rule of section 5 reads.
        mean_follows_crop: subtract the crop's own window of the mean image, mirrored with it, not always the centre.
        jitter_by_deviation: scale colour jitter by .1 x standard deviation along each principal axis, not by
            .1 x eigenvalue (section 4.1).
        jittered_divisor: divisor of training inputs with colour jitter, after the subtraction of the mean; the code has it
            so that their scale stays near that of test inputs, which are not divided.
    """

    name: PresetName
    relu_before_lrn1: bool
    lrn_alpha: float
    middle_std: float
    bias_rate: float
    bias_decay: bool
    mean_follows_crop: bool
    jitter_by_deviation: bool
    jittered_divisor: float


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
        jittered_divisor=1.0,
    ),
    "original": Preset(
        name="original",
        relu_before_lrn1=False,
        lrn_alpha=lrn.ALPHA / lrn.SIZE,  # cuda-convnet divides alpha by the window's size
        middle_std=0.03,
        bias_rate=2.0,  # inferred from the authors' logs; their released settings do not state it
        bias_decay=False,
        mean_follows_crop=False,
        jitter_by_deviation=True,
        jittered_divisor=1.1,  # 1 + the coefficient of the noise
    ),
}


def preset_named(name: str) -> Preset:
    """Return the preset of that name; raise ConfigError if there is none."""
    if name not in PRESETS:
        raise ConfigError("--preset", name, f"one of {', '.join(get_args(PresetName))}")
    return PRESETS[name]
