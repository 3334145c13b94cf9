"""Inspection of an environment: a summary, and images of its content.

The summary has the sizes of the classes, the rejected files, and the colour statistics next to those of ImageNet. The images
show records, augmented samples, the mean image and the directions of the colour jitter.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from loader_service.data.records import Records
from loader_service.datasets.sheets import colour_sheet, mean_picture, record_sheet, sample_sheet

SHOWN_CLASSES: Final = 20
"""With more classes, the histogram shows only the smallest and the largest."""

BAR_COLUMNS: Final = 40
SHOWN_REASONS: Final = 10

PICTURES: Final = {
    "records.png": record_sheet,
    "samples.png": sample_sheet,
    "mean.png": mean_picture,
    "colours.png": colour_sheet,
}
"""The images that :func:`write_pictures` draws, by file name."""


class DatasetSummary(msgspec.Struct, frozen=True):
    """The facts of an environment.

    Fields:
        size: side of the records, in pixels.
        class_counts: number of records by class name.
        rejected: number of rejected files by reason, most frequent first.
        channel_means: R, G, B, 0..255; for ImageNet 127.3, 119.7, 104.9.
        deviations: standard deviations along the eigenvectors of the covariance, in grey levels, largest first; for ImageNet,
            AlexNet's authors give 121.78, 37.09, 19.72.
        direction: the leading eigenvector; for ImageNet (.5635, .5762, .5920).
        made_by: how and with which libraries the records were made.
    """

    path: str
    fingerprint: str
    count: int
    size: int
    codec: str
    bytes_on_disk: int
    class_counts: dict[str, int]
    rejected: dict[str, int]
    channel_means: tuple[float, ...]
    deviations: tuple[float, ...]
    direction: tuple[float, ...]
    made_by: dict[str, str]


def write_pictures(path: Path, folder: Path) -> list[Path]:
    """Draw PICTURES of the environment at ``path`` and return the files that were written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with Records(path) as records:
        for name, draw in PICTURES.items():
            draw(records).save(folder / name)
    return [folder / name for name in PICTURES]


def summarise(path: Path) -> DatasetSummary:
    """Return the facts of the environment at ``path``, read from its manifest."""
    with Records(path) as records:
        manifest, statistics = records.manifest, records.statistics
    return DatasetSummary(
        path=str(path),
        fingerprint=manifest.fingerprint,
        count=manifest.count,
        size=manifest.size,
        codec=" ".join([manifest.codec, *(f"{k}={v}" for k, v in sorted(manifest.codec_parameters.items()))]),
        bytes_on_disk=(path / "data.mdb").stat().st_size,
        class_counts=dict(zip(manifest.class_names, manifest.class_counts, strict=True)),
        rejected=dict(Counter(bad.reason for bad in manifest.rejected).most_common()),
        channel_means=manifest.channel_means,
        deviations=tuple((np.sqrt(statistics.eigenvalues) * 255).tolist()),  # variances of values in 0..1
        direction=tuple(statistics.eigenvectors[:, 0].tolist()),
        made_by=manifest.made_by,
    )


def describe(summary: DatasetSummary) -> list[str]:
    """Return a summary as lines of text."""
    facts = {
        "records": f"{summary.count:,} of {summary.size} x {summary.size} pixels, {summary.codec}, {summary.bytes_on_disk / 1e6:,.0f} MB",
        "classes": f"{len(summary.class_counts):,}",
        "channel means": f"{_numbers(summary.channel_means, 1)} (R, G, B; ImageNet: 127.3, 119.7, 104.9)",
        "colour deviations": f"{_numbers(summary.deviations, 2)} (ImageNet: 121.78, 37.09, 19.72)",
        "leading direction": f"{_numbers(summary.direction, 4)} (R, G, B)",
        "rejected": f"{sum(summary.rejected.values()):,}",
        "fingerprint": summary.fingerprint,
    }
    lines = [summary.path, *(f"  {name:<18} {text}" for name, text in facts.items())]
    lines += [f"    {count:>8,}  {reason}" for reason, count in list(summary.rejected.items())[:SHOWN_REASONS]]
    return [*lines, "", *histogram(summary.class_counts)]


def histogram(counts: dict[str, int]) -> list[str]:
    """Return one line with a bar per class, smallest class first; of many classes only the smallest and the largest."""
    order = sorted(counts, key=lambda name: (counts[name], name))  # by name too, so equal counts have one order
    if len(order) > SHOWN_CLASSES:
        half = SHOWN_CLASSES // 2
        order = [*order[:half], "", *order[-half:]]  # "" becomes the line of dots
    width, most = max(map(len, order)), max(max(counts.values()), 1)
    return [
        f"  {name:<{width}} {counts[name]:>8,} {'█' * round(BAR_COLUMNS * counts[name] / most)}" if name else "  ..."
        for name in order
    ]


def _numbers(values: tuple[float, ...], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)
