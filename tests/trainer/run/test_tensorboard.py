"""TensorBoard event files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from trainer.run.param_stats import ParamStats
from trainer.run.progress import EpochRecord, StepRecord
from trainer.run.tensorboard import TensorBoard

STEP = StepRecord(step=5, epoch=1, seen=150, loss=1.25, error=0.5, lr=0.01, images_per_s=1500.0, waiting=0.25)
EPOCH = EpochRecord(
    epoch=1, step=10, loss=1.2, error=0.39, val_loss=1.5, val_top1_error=0.5, val_top5_error=0.125, lr=0.01
)


def shown(folder: Path) -> dict[tuple[str, int], float]:
    """Return every scalar of the event files in ``folder``: records of length, checksum, event, checksum."""
    scalars = {}
    for path in folder.glob("events.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return scalars


def test_curves_and_layers_by_step(tmp_path: Path) -> None:
    """The files have each figure of the log, and no MFU if it is unknown."""
    tensorboard = TensorBoard(tmp_path, 0)
    tensorboard.step(STEP, {"fc8.weight": ParamStats(2.0, 0.5)})
    tensorboard.epoch(EPOCH)
    tensorboard.close()
    found = shown(tmp_path)
    assert found["train/loss", 5] == 1.25
    assert found["speed/waiting_for_data", 5] == 0.25
    assert found["dw_by_w/fc8.weight", 5] == 0.25
    assert found["validation/top-1_error", 10] == 0.5
    assert not [tag for tag, _ in found if "utilisation" in tag]


def test_the_mfu_is_there_where_it_is_known(tmp_path: Path) -> None:
    """A known MFU is written as a fraction."""
    known = StepRecord(**{name: getattr(STEP, name) for name in STEP.__struct_fields__} | {"mfu": 0.375})
    tensorboard = TensorBoard(tmp_path, 0)
    tensorboard.step(known, {})
    tensorboard.close()
    assert shown(tmp_path)["speed/model_FLOP_utilisation", 5] == pytest.approx(0.375)
