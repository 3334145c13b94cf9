"""Cost and loss of the jpeg codec, by quality and subsampling, compared with raw records.

python -m tools.bench.studies.codecs [--source ARCHIVE|FOLDER] [--rounds 5]

Prints the table of docs/datasets.md: similarity to the raw pixels, bytes, and records that one core decodes per second,
whole with libjpeg-turbo, and only the part that a random crop needs, as a worker decodes them.
"""

from __future__ import annotations

import statistics
import time
from itertools import product
from pathlib import Path
from typing import Final

import click
import numpy as np

from loader_service.cli.job import CONTEXT, Job
from loader_service.data.codecs import CODECS, HEADER, RAW_BYTES, SUBSAMPLINGS, decode, encode, raw_value
from loader_service.data.draws import draw
from loader_service.data.image_file import load_picture
from loader_service.data.kernel import Window
from loader_service.datasets.progress import Progress
from loader_service.types import RECORD_SIDE_PX, View
from tools.bench.ours import SEED
from tools.bench.records import Pixels, find_source, photographs

Pass = tuple[list[bytes], list[Window | None]]
"""Payloads, and the window that is decoded of each; None decodes all of it."""

QUALITIES: Final = (80, 85, 90, 92, 95)


@click.command(cls=Job, context_settings=CONTEXT)
@click.option("--source", type=click.Path(path_type=Path), help="Photographs.  [default: those of the benchmark]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Passes over the records.")
def main(source: Path | None, rounds: int) -> None:
    """Encode photographs with each quality and subsampling, and decode them in interleaved rounds."""
    records = [load_picture(content) for content in photographs(source or find_source())]  # each (256, 256, 3) uint8
    ways = list(product(QUALITIES, SUBSAMPLINGS))
    payloads = {}
    with Progress("encoded", len(ways), "ways") as progress:
        for quality, subsampling in ways:
            parameters: dict[str, int | str] = {"quality": quality, "subsampling": subsampling}
            payloads[quality, subsampling] = [encode(pixels, "jpeg", parameters) for pixels in records]
            progress.advance(1)
    # The same crops for every way, so that rates differ by the encoding alone.
    windows = _windows(len(records))
    whole: list[Pass] = [(encoded, [None] * len(records)) for encoded in payloads.values()]
    # One call for both kinds of passes: they take turns in the same rounds.
    rates = _rates([*whole, *((encoded, windows) for encoded in payloads.values())], rounds)
    click.echo(f"{len(records)} records; raw ones have {RAW_BYTES / 1000:.1f} KB and nothing to decode.\n")
    click.echo(
        "| quality | subsampling | PSNR, dB: mean (least) | KB | decoded by one core, records/s | crops of them/s |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- |")
    of_whole, of_crops = rates[: len(ways)], rates[len(ways) :]  # in the order of the call above
    for ((quality, subsampling), encoded), rate, crops in zip(payloads.items(), of_whole, of_crops, strict=True):
        close = [
            _psnr_db(pixels, decode(payload, CODECS["jpeg"])) for pixels, payload in zip(records, encoded, strict=True)
        ]
        kilobytes = statistics.mean(map(len, encoded)) / 1000
        name = ":".join(subsampling)
        click.echo(
            f"| {quality} | {name} | {statistics.mean(close):.1f} ({min(close):.1f}) | {kilobytes:.1f} "
            f"| {rate:,.0f} | {crops:,.0f} |"
        )


def _psnr_db(one: Pixels, other: Pixels) -> float:
    """Return the peak signal-to-noise ratio of (side, side, 3) uint8 pixels, in dB, for a peak of 255."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))  # float64 first: differences of uint8 wrap
    return 10 * float(np.log10(255**2 / max(error, 1e-3)))  # at most 78 dB: equal pixels would divide by zero


def _windows(count: int) -> list[Window | None]:
    """Return the crops of a training epoch: top, left, height, width."""
    # Without jitter, a view needs no basis of colours; crops do not depend on it.
    drawn = draw(View(jitter=0.0), SEED, 0, 0, count, RECORD_SIDE_PX)
    side = View().crop
    return [(int(y), int(x), side, side) for y, x in zip(drawn["y"], drawn["x"], strict=True)]


def _rates(ways: list[Pass], rounds: int) -> list[float]:
    """Return the records decoded per second in each pass, medians of interleaved rounds."""
    buffer = raw_value()[HEADER.size :]  # aligned as a worker's buffer
    found: list[list[float]] = [[] for _ in ways]
    with Progress("decoded", rounds, "rounds") as progress:
        for _ in range(rounds):
            for rates, (payloads, windows) in zip(found, ways, strict=True):
                # One buffer for all: it stays in the caches, as a worker's does.
                start = time.perf_counter()
                for payload, window in zip(payloads, windows, strict=True):
                    decode(payload, CODECS["jpeg"], buffer, window=window)
                rates.append(len(payloads) / (time.perf_counter() - start))
            progress.advance(1)
    return [statistics.median(rates) for rates in found]


if __name__ == "__main__":
    main()
