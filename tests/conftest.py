"""Fixtures for every part: small datasets made from fixed integers, so that their bytes are the same everywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

from loader_service.data.centred import centre_of, encode_centred
from loader_service.data.codecs import Codec, encode
from loader_service.data.manifest import Manifest, Statistics
from loader_service.data.writer import Writer
from loader_service.types import RECORD_SIDE_PX

# A shell that runs tests in the background has SIGINT ignored, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU, Triton's kernels are run by its interpreter. This is read when one is defined, which is when the first of
# all test files imports the trainer.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, and no deadline for a busy machine to miss.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

TRAIN_RECORDS, VAL_RECORDS = 300, 60
CLASSES = ("ant", "bee", "cat")

MakeDataset = Callable[..., Manifest]


def _picture(number: int, side: int = RECORD_SIDE_PX) -> npt.NDArray[np.uint8]:
    """The pixels of record ``number``, (side, side, 3) uint8: smooth, without symmetry, unlike any other number's."""
    y, x, channel = np.ogrid[:side, :side, :3]
    return ((3 * y + 5 * x + 80 * channel + 37 * number + (y * x) // 64) // 2 % 256).astype(np.uint8)


def _statistics(side: int = RECORD_SIDE_PX) -> Statistics:
    """The colour statistics usual for ImageNet, and a mean image whose every window is another."""
    y, x, channel = np.ogrid[:side, :side, :3]
    values = np.array([0.2281, 0.0212, 0.0060])
    vectors = np.array([[0.5675, 0.7192, 0.4009], [0.5808, -0.0045, -0.8140], [0.5836, -0.6948, 0.4203]])
    return Statistics(
        mean_image=(100 + y / 8 + x / 16 + channel).astype(np.float32),  # eighths: exact in binary
        channel_means=np.array([123.5, 124.5, 125.5]),
        covariance=vectors * values @ vectors.T,
        eigenvalues=values,
        eigenvectors=vectors,
    )


def _make_dataset(
    path: Path,
    count: int,
    codec: Codec = "raw",
    class_names: tuple[str, ...] = CLASSES,
    side: int = RECORD_SIDE_PX,
) -> Manifest:
    centre = centre_of(_statistics(side).mean_image)
    with Writer(path, codec=codec, class_names=class_names) as writer:
        for number in range(count):
            name, pixels = class_names[number % len(class_names)], _picture(number, side)
            payload = encode_centred(pixels, centre) if codec == "centered" else encode(pixels, codec)
            writer.put(number % len(class_names), payload, f"{name}/{number}.jpg")
        return writer.finish(_statistics(side), made_by={"made by": "the tests"})


@pytest.fixture(scope="session")
def picture() -> Callable[..., npt.NDArray[np.uint8]]:
    """``picture(number, side=256)``: the pixels that ``make_dataset`` gives record ``number``, (side, side, 3) uint8."""
    return _picture


@pytest.fixture(scope="session")
def statistics() -> Statistics:
    """The statistics that ``make_dataset`` writes."""
    return _statistics()


@pytest.fixture(scope="session")
def make_dataset() -> MakeDataset:
    """``make_dataset(path, count, codec="raw", class_names=CLASSES, side=256)``: record i has label i modulo classes."""
    return _make_dataset


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``train.lmdb`` (300 raw records, 3 classes) and ``val.lmdb`` (60); not to be changed."""
    directory = tmp_path_factory.mktemp("dataset")
    _make_dataset(directory / "train.lmdb", TRAIN_RECORDS)
    _make_dataset(directory / "val.lmdb", VAL_RECORDS)
    return directory
