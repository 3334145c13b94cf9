"""Checksums: single flipped bits in the file of an environment, and which records are compared when."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import lmdb
import numpy as np
import pytest

from loader_service.data.augment import complete_view
from loader_service.data.checksums import Checked, seal, unsealed
from loader_service.data.codecs import CODECS, HEADER, Codec
from loader_service.data.fill import empty_slice, fill
from loader_service.data.records import KEY, Records
from loader_service.errors import RecordError
from loader_service.types import SampleLayout, Slice, SliceId, View

RECORDS, SIDE = 6, 64
FLIPS = 150


@pytest.fixture(params=list(CODECS))
def dataset(request: pytest.FixtureRequest, tmp_path: Path, make_dataset: Any) -> Path:
    """A small dataset of each codec."""
    codec: Codec = request.param
    make_dataset(tmp_path / "train.lmdb", RECORDS, codec=codec, side=SIDE)
    return tmp_path / "train.lmdb"


def served(path: Path, checked: Checked | None = None) -> Slice:
    """Serve all records of an environment once."""
    with Records(path, checked=checked) as records:
        view = complete_view(View.named("train", SIDE), records.statistics)
        out = empty_slice(SampleLayout(view, "uint8"), RECORDS)
        fill(out, records, SliceId(view, 1, 0, 0, RECORDS))
        return out


def place_of(path: Path, number: int) -> range:
    """Return the bytes of the data file at which a record's value lies, header and payload."""
    with Records(path) as records, records.values() as values:
        value = bytes(values.find(number))
    start = (path / "data.mdb").read_bytes().index(value)
    return range(start, start + len(value))


def flip(path: Path, bit: int) -> None:
    """Flip one bit of the data file."""
    with (path / "data.mdb").open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_is_found(dataset: Path) -> None:
    """Any single bit of a record, in its header or its payload, makes it a bad record with its number and what to do."""
    rng = Random(1)
    places = [place_of(dataset, number) for number in range(RECORDS)]
    before = served(dataset)
    for turn in range(FLIPS):
        number = rng.randrange(RECORDS)
        # The header in a third of the turns: it is only a small part of a record.
        byte = places[number][rng.randrange(HEADER.size)] if turn % 3 == 0 else rng.choice(places[number])
        bit = 8 * byte + rng.randrange(8)
        flip(dataset, bit)
        with pytest.raises(
            RecordError, match=r"damaged: its checksum does not match; `loader-service verify`"
        ) as caught:
            served(dataset)
        assert caught.value.record == number
        flip(dataset, bit)
    after = served(dataset)
    assert np.array_equal(before.images, after.images)
    assert np.array_equal(before.labels, after.labels)


def test_all_readers_compare(dataset: Path) -> None:
    """Damage that does not prevent decoding is found by ``pixels`` and ``read`` too."""
    flip(dataset, 8 * place_of(dataset, 2)[-1])
    with Records(dataset) as records:
        records.pixels(1)
        with pytest.raises(RecordError, match=r"record 2 of .*damaged"):
            records.pixels(2)
        with records.values() as values, pytest.raises(RecordError, match=r"record 2 of .*damaged"):
            values.read(2)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change the records of an environment in a transaction."""
    with lmdb.open(str(path), max_dbs=3) as env, env.begin(write=True, db=env.open_db(b"records")) as txn:
        change(txn)


def test_a_record_under_another_number_is_damage(dataset: Path) -> None:
    """Two sound records that changed places are both bad: their seals have other numbers."""

    def swap(txn: Any) -> None:
        first, second = txn.get(KEY.pack(1)), txn.get(KEY.pack(4))
        txn.put(KEY.pack(1), second)
        txn.put(KEY.pack(4), first)

    edit(dataset, swap)
    with Records(dataset) as records:
        for number in (1, 4):
            with pytest.raises(RecordError, match="damaged"):
                records.check(number)


def test_records_of_version_0_1_have_no_seal(dataset: Path) -> None:
    """Zeros in the place of a seal mean that there is none; the payload is compared all the same."""

    def strip(txn: Any) -> None:
        for number in range(RECORDS):
            value = txn.get(KEY.pack(number))
            assert value[: HEADER.size] != unsealed(value)
            txn.put(KEY.pack(number), unsealed(value) + value[HEADER.size :])

    before = served(dataset)
    edit(dataset, strip)
    assert np.array_equal(served(dataset).images, before.images)
    flip(dataset, 8 * place_of(dataset, 3)[-1])
    with pytest.raises(RecordError, match=r"record 3 of .*damaged"):
        served(dataset)


def test_seals_are_golden() -> None:
    """A seal never changes, because it is stored in environments."""
    header = bytearray(HEADER.pack(3, CODECS["jpeg"], 2**63))
    seal(7, header)
    assert header.hex() == "0300000001" + "909c4f" + "0000000000000080"


def test_raw_records_are_compared_once(tmp_path: Path, make_dataset: Any) -> None:
    """Readers with the same memory compare a sound raw record once, and a damaged one each time."""
    path = tmp_path / "train.lmdb"
    make_dataset(path, RECORDS, side=SIDE)
    checked = Checked(RECORDS)
    flip(path, 8 * place_of(path, 5)[-1])
    for _ in range(2):
        with pytest.raises(RecordError, match=r"record 5 of .*damaged"):
            served(path, checked)
    flip(path, 8 * place_of(path, 5)[-1])
    served(path, checked)
    flip(path, 8 * place_of(path, 5)[-1])
    served(path, checked)  # every record was compared before: the promise is once per node and record
    with pytest.raises(RecordError, match=r"record 5 of .*damaged"):
        served(path)


@pytest.mark.parametrize("codec", ["jpeg", "centered"])
def test_other_records_are_compared_at_each_read(codec: Codec, tmp_path: Path, make_dataset: Any) -> None:
    """Jpeg and centered records are compared at each read, whatever was compared before."""
    path = tmp_path / "train.lmdb"
    make_dataset(path, RECORDS, codec=codec, side=SIDE)
    checked = Checked(RECORDS)
    served(path, checked)
    flip(path, 8 * place_of(path, 5)[-1])
    with pytest.raises(RecordError, match=r"record 5 of .*damaged"):
        served(path, checked)


def test_workers_share_what_they_compared() -> None:
    """A record that a forked process compared is not compared by the others; a billion records take 125 MB at most."""
    checked = Checked(10**9)
    numbers = np.array([0, 7, 8, 10**9 - 1])
    assert checked.missing(numbers) == [0, 1, 2, 3]
    pid = os.fork()
    if pid == 0:
        checked.add(7)
        checked.add(10**9 - 1)
        os._exit(0)
    os.waitpid(pid, 0)
    assert checked.missing(numbers) == [0, 2]
    assert 125_000_000 <= checked.max_bytes < 125_010_000
