"""Damage to a copy of a dataset."""

from __future__ import annotations

from pathlib import Path
from random import Random

from loader_service.data.codecs import HEADER
from loader_service.data.records import Records
from tools.chaos import damage
from tools.sample_dataset import write


def _pixels(data: Path) -> list[bytes]:
    with Records(data / damage.SPLIT) as records, records.values() as values:
        return [bytes(values.find(number)[HEADER.size :]) for number in range(len(records))]


def test_one_bit_of_each_chosen_record_is_flipped(tmp_path: Path) -> None:
    """Exactly one bit of each chosen payload differs in the copy; the other records and the original are as before."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    whole.mkdir()
    write(whole, 20, 8)
    damage.copy(whole, copy)
    damage.flip_bits(copy, [3, 11], Random(1))
    before, after = _pixels(whole), _pixels(copy)
    flipped = [
        sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))
        for one, other in zip(before, after, strict=True)
    ]
    assert flipped == [int(number in (3, 11)) for number in range(20)]


def test_an_erased_dataset_keeps_its_index(tmp_path: Path) -> None:
    """Every payload is zeros, and the number of records is as before."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    whole.mkdir()
    write(whole, 20, 8)
    damage.copy(whole, copy)
    damage.erase(copy)
    assert damage.count(copy) == 20
    assert {bytes(len(payload)) for payload in _pixels(copy)} == set(_pixels(copy))
