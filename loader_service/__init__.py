"""A distributed image-loading service: each sample exactly once per epoch, even if processes die.

>>> from loader_service import Loader
>>> with Loader("tcp://127.0.0.1:5555", batch_size=128) as loader:  # doctest: +SKIP
...     for batch in loader:  # one epoch
...         train(batch.images, batch.labels)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from loader_service import errors
from loader_service.client.dataset import Dataset
from loader_service.client.loader import Batch, Loader
from loader_service.client.query import describe, status
from loader_service.local_node import LocalNode
from loader_service.metrics import LoaderMetrics, NodeMetrics
from loader_service.types import DRAWS, EpochAccount, View

try:
    __version__ = version("loader-service")
except PackageNotFoundError:  # a checkout that was never installed has no metadata
    __version__ = "0"

__all__ = [
    "DRAWS",
    "Batch",
    "Dataset",
    "EpochAccount",
    "Loader",
    "LoaderMetrics",
    "LocalNode",
    "NodeMetrics",
    "View",
    "__version__",
    "describe",
    "errors",
    "status",
]
