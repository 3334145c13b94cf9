"""AlexNet in two towers: its layers, presets, ablations and faster forms.

>>> from trainer.model import AlexNet
"""

from trainer.model.alexnet import AlexNet

__all__ = ["AlexNet"]
