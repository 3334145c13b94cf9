"""Pixels of a record to pixels of a sample: crop, flip, colour shift, mean subtraction.

This is the plain NumPy form, which defines what the bytes are.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from loader_service.data.records import Pixels, Statistics
from loader_service.spec import View


def complete_view(view: View, statistics: Statistics) -> View:
    """Fill in the dataset's own jitter basis: eigenvector times eigenvalue, in grey levels (paper section 4.1).

    The paper's formula makes sense for values in 0..1, where ImageNet's eigenvalues are .2281, .0212 and .0060; the
    shift is then scaled by 255 to grey levels: a standard deviation of about 5.8 along the first axis.
    """
    if view.kind != "train" or not view.jitter or view.basis:
        return view
    basis = 255.0 * statistics.eigenvectors * statistics.eigenvalues
    return msgspec.structs.replace(view, basis=tuple(basis.ravel().tolist()))


def augment(out: Pixels, pixels: Pixels, draw: npt.NDArray[np.void] | np.void) -> None:
    """Write one sample.

    Args:
        out: (side, side, 3) uint8, written whole; C-contiguous.
        pixels: (256, 256, 3) uint8, a record; C-contiguous.
        draw: one DRAWS: the crop's place, flip and colour shift. The shift is added with saturation.
    """
    side = out.shape[0]
    y, x = int(draw["y"]), int(draw["x"])
    flat = out.reshape(side, side * 3)  # whole rows, so that NumPy's inner loops are long ones
    if draw["flip"]:
        out[...] = pixels[y : y + side, x : x + side][:, ::-1]
        source = flat
    else:
        source = pixels.reshape(pixels.shape[0], -1)[y : y + side, 3 * x : 3 * (x + side)]
    shift = draw["shift"]
    if not shift.any():
        if source is not flat:
            flat[...] = source
        return
    # Saturating addition in uint8: clip first, then add; the negative part likewise.
    up = np.tile(np.maximum(shift, 0).astype(np.uint8), side)
    down = np.tile(np.maximum(-shift, 0).astype(np.uint8), side)
    np.minimum(source, 255 - up, out=flat)
    flat += up
    np.maximum(flat, down, out=flat)
    flat -= down


def centre(
    out: npt.NDArray[np.float32],
    sample: Pixels,
    mean_image: npt.NDArray[np.float32],
    draw: npt.NDArray[np.void] | np.void,
) -> None:
    """Subtract the mean's window from a finished sample: the window that was cropped, flipped as it was.

    Args:
        out: (side, side, 3) float32.
        sample: (side, side, 3) uint8, already cropped, flipped and shifted.
        mean_image: (256, 256, 3) float32.
        draw: the sample's DRAWS.
    """
    side = sample.shape[0]
    y, x = int(draw["y"]), int(draw["x"])
    window = mean_image[y : y + side, x : x + side]
    np.subtract(sample, window[:, ::-1] if draw["flip"] else window, out=out)
