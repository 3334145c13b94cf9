"""Single samples for pictures: the bytes that a training gets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from loader_service import Loader, View
from trainer.data.feed import Endpoint
from trainer.data.samples import centre_crops, fed_samples, whole_record

Picture = Callable[..., npt.NDArray[np.uint8]]


def test_a_record_is_shown_as_it_is_stored(node: str, picture: Picture) -> None:
    """The whole record, and its centre crop, are the dataset's own pixels."""
    where = Endpoint(node, "", 20.0)
    assert np.array_equal(whole_record(where, "train", 17), picture(17))
    last, first = centre_crops(where, "train", [299, 0], 64)
    assert np.array_equal(last, picture(299)[96:160, 96:160])
    assert np.array_equal(first, picture(0)[96:160, 96:160])


def test_samples_are_the_bytes_that_a_run_gets(node: str) -> None:
    """For each epoch the sample equals the one that a loader of the same view and seed delivers at that record's position."""
    found = fed_samples(Endpoint(node, "", 20.0), View(crop=0), 64, seed=5, record=42, epochs=2)
    assert [sample.epoch for sample in found] == [0, 1]
    with Loader(node, view="train", crop=64, batch_size=50, seed=5, epochs=2, timeout_s=20) as loader:
        for batch in loader.all_epochs():
            for at in np.flatnonzero(batch.ids == 42):
                sample, draw = found[batch.epoch], batch.draws[at]
                assert np.array_equal(sample.pixels, batch.images[at])
                assert (sample.y, sample.x, sample.flip) == (draw["y"], draw["x"], draw["flip"])
                assert sample.shift == tuple(draw["shift"])
    assert not np.array_equal(found[0].pixels, found[1].pixels)
