"""Images that show a dataset: contact sheets, the mean image, the directions of colour. All are (height, width, 3) uint8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from loader_service.data.augment import complete_view
from loader_service.data.codecs import Pixels
from loader_service.data.fill import empty_slice, fill
from loader_service.data.records import Records
from loader_service.types import SampleLayout, SliceId, View

TILE_PX: Final = 128
CAPTION_PX: Final = 14
COLUMNS: Final = 8
TILES: Final = 48
SAMPLE_EPOCHS: Final = COLUMNS - 1
DEVIATIONS: Final = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Steps along each colour direction, in standard deviations."""


def sheet(tiles: Sequence[npt.NDArray[np.uint8]], captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Arrange tiles in rows, each resized to TILE_PX with its caption below.

    Args:
        tiles: square images, (side, side, 3) uint8; sides may differ.
        captions: one caption per tile.
        columns: number of tiles in a row.
    """
    rows = -(-len(tiles) // columns)  # rounded up
    out = Image.new("RGB", (columns * (TILE_PX + 2), rows * (TILE_PX + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(out)
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        x, y = i % columns * (TILE_PX + 2), i // columns * (TILE_PX + CAPTION_PX)
        out.paste(Image.fromarray(tile).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC), (x, y))
        text = caption.encode("ascii", "replace").decode()[: TILE_PX // 6]  # the built-in font has ASCII only
        draw.text((x + 2, y + TILE_PX), text, fill="black")
    return out


def record_sheet(records: Records) -> Image.Image:
    """Return a sheet of the first records with their class names."""
    numbers = range(min(TILES, len(records)))
    labelled = [records.pixels(number) for number in numbers]
    return sheet([pixels for _, pixels in labelled], [records.manifest.class_names[label] for label, _ in labelled])


def sample_sheet(records: Records) -> Image.Image:
    """Return a sheet of training samples: each row has a record, then samples of it from several epochs."""
    # Sequential order: a position then has the same record in every epoch.
    view = complete_view(View(crop=0, order="sequential"), records.statistics)  # crop 0: 7/8 of the records' side
    count = min(TILES // COLUMNS, len(records))  # rows of the sheet
    epochs = []
    for epoch in range(SAMPLE_EPOCHS):
        out = empty_slice(SampleLayout(view, "uint8"), count)
        fill(out, records, SliceId(view, 0, epoch, 0, count))
        epochs.append(out)
    tiles, captions = list[Pixels](), list[str]()
    for number in range(count):
        label, pixels = records.pixels(number)
        tiles += [pixels, *(np.asarray(out.images[number], np.uint8) for out in epochs)]
        captions += [records.manifest.class_names[label], *(_drawn(out.draws[number]) for out in epochs)]
    return sheet(tiles, captions)


def _drawn(draws: np.void) -> str:
    """Return a sample's draws as a caption: row, column, "m" if mirrored, colour shift."""
    mirrored = "m" if draws["flip"] else ""
    return f"{draws['y']},{draws['x']}{mirrored} {'/'.join(f'{shift:+d}' for shift in draws['shift'])}"


def mean_picture(records: Records) -> Image.Image:
    """Return the mean image, rounded to uint8."""
    return Image.fromarray(np.rint(records.statistics.mean_image).astype(np.uint8))


def colour_sheet(records: Records) -> Image.Image:
    """Return a sheet of the first record, shifted along each eigenvector of the colour covariance (paper section 4.1)."""
    _, pixels = records.pixels(0)
    statistics = records.statistics
    tiles, captions = [], []
    for k in range(3):
        deviation = float(np.sqrt(statistics.eigenvalues[k])) * 255  # grey levels
        for steps in DEVIATIONS:
            shift = steps * deviation * statistics.eigenvectors[:, k]  # (3,), broadcast over all pixels
            tiles.append(np.clip(np.rint(pixels + shift), 0, 255).astype(np.uint8))
            captions.append(f"{k + 1}: {steps:+g} x {deviation:.1f}")
    return sheet(tiles, captions, len(DEVIATIONS))
