"""Who competes: this project, the machine's limits, and what people would use instead."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tools.bench.contest import Contestant

FORMS: Final = {
    "dataloader": {
        "raw": "PyTorch DataLoader, LMDB raw",
        "jpeg": "PyTorch DataLoader, LMDB jpeg, libjpeg-turbo",
        "files": "PyTorch DataLoader, JPEG files, PIL",
    },
    "dali": {"jpeg": "DALI (CPU), JPEG files"},
    "ffcv": {"raw": "FFCV raw", "jpeg": "FFCV jpeg"},
    "spdl": {"jpeg": "SPDL, JPEG files, libjpeg-turbo"},
    "tfdata": {"raw": "tf.data service, TFRecord raw", "jpeg": "tf.data service, TFRecord jpeg"},
}
"""What each peer is measured with, and what to call it."""


APART: Final = ("tfdata",)
"""Peers that do not wait for their turn: their service goes on filling its buffers while others are measured."""


def limits(records: Path, workers: int) -> list[Contestant]:
    """The machine's limits, by as many processes as a node has workers."""

    def limit(name: str, title: str, codec: str, copies: int, group: str) -> Contestant:
        command = (sys.executable, "-m", "tools.bench.limits", name, str(records / codec / "train.lmdb"))
        return Contestant(name, title, codec, "limit", command, copies, group)

    return [
        limit("memcpy", "limit: C memcpy of the crops", "raw", workers, "raw"),
        limit("zmq", "limit: ZeroMQ alone, TCP", "raw", 1, "tcp"),
        limit("zmq-curve", "limit: ZeroMQ alone, TCP, CURVE", "raw", 1, "tcp"),
        limit("decode", "limit: libjpeg-turbo decoding", "jpeg", workers, "jpeg"),
    ]


def ours(records: Path, workers: int) -> list[Contestant]:
    """This project, in each of its ways."""

    def way(name: str, title: str, codec: str, group: str, *options: str) -> Contestant:
        data = str(records / codec)
        command = (sys.executable, "-m", "tools.bench.ours", data, "--workers", str(workers), *options)
        return Contestant(f"ours-{name}", f"**this project**, {title}", codec, "ours", command, group=group)

    return [
        way("raw-shm", "shared memory, raw", "raw", "raw"),
        way("raw-tcp", "TCP, raw", "raw", "tcp", "--transport", "tcp"),
        way("raw-curve", "TCP with CURVE, raw", "raw", "tcp", "--transport", "tcp", "--curve"),
        way("jpeg-shm", "shared memory, jpeg", "jpeg", "jpeg"),
        way("jpeg-tcp", "TCP, jpeg", "jpeg", "jpeg", "--transport", "tcp"),
    ]


def peers(records: Path, workers: int, pythons: Mapping[str, Path]) -> list[Contestant]:
    """The peers whose environments are there; ``pythons`` has the Python of each."""
    return [
        Contestant(
            f"{peer}-{form}",
            title,
            "raw" if form == "raw" else "jpeg",
            "peer",
            (str(python), "-m", f"tools.bench.peers.{peer}", form, str(records), str(workers)),
            group=peer if peer in APART else "raw" if form == "raw" else "jpeg",
        )
        for peer, python in pythons.items()
        for form, title in FORMS[peer].items()
    ]
