"""Passes of the network over a part of the data."""

from __future__ import annotations

import pytest
import torch

from trainer.data.feed import Endpoint
from trainer.report.inference import Network, load_network, look, nearest
from trainer.report.records import RunRecord


@pytest.fixture(scope="module")
def network(record: RunRecord) -> Network:
    return load_network(record, torch.device("cpu"))


def test_a_pass_ends_at_its_limit(network: Network, node: str) -> None:
    """The first images of a random order are looked at, from all classes, and progress is told."""
    told: list[tuple[int, int]] = []
    found = look(network, Endpoint(node, "", 20.0), "train", 50, 32, lambda *each: told.append(each))
    assert told == [(32, 50), (50, 50)]
    assert (found.split_images, found.evaluation.images) == (300, 50)
    assert found.records.tolist() != sorted(found.records.tolist())
    assert torch.equal(found.records % 3, found.labels)  # as the dataset is made
    assert found.best.shape == found.probabilities.shape == (50, 3)
    assert found.units.shape == (50, 2 * round(0.05 * 2048))
    assert torch.allclose(found.probabilities.sum(1), torch.ones(50))


def test_a_whole_split_agrees_with_the_validation(network: Network, node: str, record: RunRecord) -> None:
    """Over all validation images the error is the one that training logged, and the matrix counts every image."""
    found = look(network, Endpoint(node, "", 20.0), "val", 1000, 32, lambda *_: None)
    assert found.evaluation.top1_error == pytest.approx(record.log.epochs[-1].val_top1_error)
    assert sum(map(sum, found.evaluation.confusion)) == 60
    assert sorted(found.records.tolist()) == list(range(60))


def test_the_nearest_rows_are_found() -> None:
    """Rows come in the order of their Euclidean distance; no more than there are."""
    among = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    distances, places = nearest(torch.tensor([[0.0, 0.0]]), among, 5)
    assert places.tolist() == [[0, 2, 1]]
    assert distances.tolist() == [[0.0, 1.0, 5.0]]
