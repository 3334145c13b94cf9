"""Fixtures for all tests: small datasets made of fixed integers, so that their bytes are the same on every machine."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

from loader_service.data.codecs import Codec, centre_of, encode, encode_centred
from loader_service.data.manifest import Manifest, Statistics
from loader_service.data.writer import Writer
from loader_service.types import RECORD_SIDE_PX

# A shell starts background jobs with SIGINT ignored, and child processes inherit that; tests send SIGINT to children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU, Triton's interpreter runs its kernels. Triton reads the variable when a kernel is defined, so it must be
# set before the first test imports the trainer.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The user's own keys, which nodes and clients on loopback share, are made in a folder of the tests. Child processes inherit it.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="loader-service-tests-")


def _remove_home(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child that exits
        shutil.rmtree(folder, ignore_errors=True)


atexit.register(_remove_home, os.environ["XDG_CONFIG_HOME"], os.getpid())

# The same examples in every run, and no deadline, which a busy machine would miss.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

TRAIN_RECORDS, VAL_RECORDS = 300, 60
CLASSES = ("ant", "bee", "cat")

MakeDataset = Callable[..., Manifest]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` on a machine without one."""
    if item.get_closest_marker("gpu") and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("torch sees no GPU here")


def _picture(number: int, side: int = RECORD_SIDE_PX) -> npt.NDArray[np.uint8]:
    """Return the pixels of record ``number``, (side, side, 3) uint8: smooth, asymmetric, and different for each number."""
    y, x, channel = np.ogrid[:side, :side, :3]
    return ((3 * y + 5 * x + 80 * channel + 37 * number + (y * x) // 64) // 2 % 256).astype(np.uint8)


def _statistics(side: int = RECORD_SIDE_PX) -> Statistics:
    """Return colour statistics like ImageNet's, and a mean image without two equal windows."""
    y, x, channel = np.ogrid[:side, :side, :3]
    values = np.array([0.2281, 0.0212, 0.0060])
    vectors = np.array([[0.5675, 0.7192, 0.4009], [0.5808, -0.0045, -0.8140], [0.5836, -0.6948, 0.4203]])
    return Statistics(
        mean_image=(100 + y / 8 + x / 16 + channel).astype(np.float32),  # eighths and sixteenths are exact in binary
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
    """Provide ``picture(number, side=256)``: the pixels of record ``number`` of ``make_dataset``, (side, side, 3) uint8."""
    return _picture


@pytest.fixture(scope="session")
def statistics() -> Statistics:
    """Provide the statistics that ``make_dataset`` writes."""
    return _statistics()


@pytest.fixture(scope="session")
def make_dataset() -> MakeDataset:
    """Provide ``make_dataset(path, count, codec="raw", class_names=CLASSES, side=256)``; record i has label i % classes."""
    return _make_dataset


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a directory with ``train.lmdb`` (300 raw records, 3 classes) and ``val.lmdb`` (60), for reading only."""
    directory = tmp_path_factory.mktemp("dataset")
    _make_dataset(directory / "train.lmdb", TRAIN_RECORDS)
    _make_dataset(directory / "val.lmdb", VAL_RECORDS)
    return directory
