"""Verification of an environment against its manifest.

It checks every record's checksum, label, decoding and source name, then the counts, the statistics, the golden samples and
the fingerprint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from loader_service.data import golden
from loader_service.data.manifest import Manifest, Statistics, digest_headers, fingerprint
from loader_service.data.records import Records
from loader_service.datasets.progress import Progress
from loader_service.datasets.statistics import Sums
from loader_service.errors import DatasetInvalid, RecordError

SHOWN_BAD: Final = 10
"""Number of bad records that are named; all are counted."""

PARTS: Final = ("mean_image", "channel_means", "covariance", "eigenvalues", "eigenvectors")


def verify(path: Path) -> str:
    """Check an environment and return its fingerprint; report progress and bad records on stderr.

    Raises:
        DatasetNotFound: there is no environment at ``path``.
        DatasetUnfinished: it has no manifest.
        DatasetInvalid: something does not match; the error says what.
    """
    with Records(path) as records:
        # Records first: they are bad by number, and the later checks would only say that something differs.
        sums, counts = check_records(records)
        manifest = records.manifest
        if counts != list(manifest.class_counts):
            raise DatasetInvalid(
                path, f"its manifest counts {list(manifest.class_counts)} records by class, there are {counts}"
            )
        check_statistics(path, manifest, sums.statistics())
        if golden.of_dataset(records) != manifest.golden:
            raise DatasetInvalid(path, "its golden samples, made on this machine, differ from those in its manifest")
        # As the writer computed it: before it knew fingerprint and golden hash.
        plain = msgspec.structs.replace(manifest, fingerprint="", golden="")
        if (found := fingerprint(plain, digest_headers(records.headers()))) != manifest.fingerprint:
            raise DatasetInvalid(path, f"its fingerprint is {found}, its manifest says {manifest.fingerprint}")
    return found


def check_records(records: Records) -> tuple[Sums, list[int]]:
    """Check all records; return the sums of their pixels and the number of records of each class.

    Raises:
        DatasetInvalid: some records are bad; the first are named.
    """
    sums, counts, bad = Sums(records.side), [0] * len(records.manifest.class_names), 0
    with Progress("verify", len(records), "records") as progress:
        for number in range(len(records)):
            try:
                records.check(number)
                records.source(number)  # raises if there is none
                label, pixels = records.pixels(number)
            except RecordError as error:
                bad += 1
                progress.advance(bad=1)
                if bad <= SHOWN_BAD:
                    progress.say(str(error))
            else:
                counts[label] += 1
                sums.add_picture(pixels)
                progress.advance()
    if bad:
        raise DatasetInvalid(records.path, f"{bad} of its {len(records)} records are bad: preprocess the images again")
    return sums, counts


def check_statistics(path: Path, manifest: Manifest, own: Statistics) -> None:
    """Compare the manifest's statistics with those of the records; check the consistency of another split's statistics.

    Raises:
        DatasetInvalid: they differ, or are inconsistent.
    """
    stored = manifest.statistics
    differing = [part for part in PARTS if not np.array_equal(getattr(stored, part), getattr(own, part))]
    if not differing:
        return
    # A validation split has the statistics of the training split, whose pixels are not here.
    if manifest.made_by.get("statistics", "own") == "own":
        raise DatasetInvalid(path, f"its manifest's {', '.join(differing)} are not those of its records")
    check_form(path, stored)


def check_form(path: Path, statistics: Statistics) -> None:
    """Check that statistics whose pixels are not at hand are consistent in themselves.

    Raises:
        DatasetInvalid: they are not.
    """
    vectors, values = statistics.eigenvectors, statistics.eigenvalues
    mean = statistics.mean_image
    if not (np.isfinite(mean).all() and mean.min() >= 0 and mean.max() <= 255):
        raise DatasetInvalid(path, "its mean image has values outside of 0..255")
    # float32 rounds a grey level by at most 8e-6.
    if not np.allclose(mean.mean(axis=(0, 1), dtype=np.float64), statistics.channel_means, atol=1e-3):
        raise DatasetInvalid(path, "its channel means are not those of its mean image")
    if not np.allclose(vectors * values @ vectors.T, statistics.covariance, atol=1e-9):  # V diag(values) V^T
        raise DatasetInvalid(path, "its eigenvectors and eigenvalues are not those of its covariance")
