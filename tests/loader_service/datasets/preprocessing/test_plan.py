"""Order, splits, codec, disk space and identity are decided before a run starts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_service.datasets.preprocessing.plan import (
    check_disk_space,
    choose_codec,
    disk_bytes,
    identity,
    memory_bytes,
    record_bytes,
    shuffled,
    split_off,
)
from loader_service.datasets.preprocessing.sources import Item, Listing
from loader_service.errors import PreprocessingFailed


def listing(sizes: list[int]) -> Listing:
    """Return a listing with these numbers of items in the classes."""
    items = [
        Item(f"c{label}/{i}.jpg", label, b"/x", 7, 0, 100) for label, count in enumerate(sizes) for i in range(count)
    ]
    return Listing(Path("/x"), tuple(f"c{label}" for label in range(len(sizes))), tuple(items))


def test_the_order_is_a_permutation_by_seed() -> None:
    """The order has every item once, does not depend on the listing's order, and changes with the seed."""
    items = listing([40, 40]).items
    assert sorted(item.source for item in shuffled(items, 1)) == sorted(item.source for item in items)
    assert shuffled(items, 1) == shuffled(reversed(items), 1)
    assert shuffled(items, 1) != shuffled(items, 2)


def test_the_order_stays_as_it_is() -> None:
    """The order is pinned, so that a dataset can be made again."""
    assert [item.source for item in shuffled(listing([4, 2]).items, 2012)] == PINNED


PINNED = ["c0/3.jpg", "c0/1.jpg", "c1/1.jpg", "c1/0.jpg", "c0/0.jpg", "c0/2.jpg"]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_a_split_takes_the_share_of_every_class(sizes: list[int], share: float, seed: int) -> None:
    """Each class gives its share to validation, at least one item, and keeps at least one; no item is lost or in both."""
    whole = listing(sizes)
    train, val = split_off(whole, share, seed)
    assert {*train.items, *val.items} == set(whole.items)
    assert len(train.items) + len(val.items) == len(whole.items)
    for label, size in enumerate(sizes):
        count = sum(item.label == label for item in val.items)
        assert count == min(max(1, round(share * size)), size - 1)


def test_auto_chooses_by_memory() -> None:
    """auto selects raw if all records fit into half of the memory, else jpeg; an explicit codec is kept."""
    fit = memory_bytes() // 2 // record_bytes("raw", 256)
    assert choose_codec("auto", fit, 256) == "raw"
    assert choose_codec("auto", fit + 1, 256) == "jpeg"
    assert choose_codec("jpeg", 1, 256) == "jpeg"
    assert choose_codec("raw", 10**12, 256) == "raw"
    assert choose_codec("auto", 4 * fit, 100) == "raw"


def test_room_is_looked_for_before_the_start(tmp_path: Path) -> None:
    """Records that do not fit on the disk are refused with both sizes."""
    check_disk_space(tmp_path, 10, "raw", 256)
    assert disk_bytes(10, "raw", 256) > 10 * 256 * 256 * 3 > disk_bytes(10, "jpeg", 256) > 0
    with pytest.raises(
        PreprocessingFailed, match=r"GB free, but 1,000,000,000,000 raw records need about .* or use --codec jpeg"
    ):
        check_disk_space(tmp_path, 10**12, "raw", 256)


def test_the_identity_is_of_all_that_decides_the_records() -> None:
    """Any change of a file, label, class, codec, quality, seed, size or source of statistics changes the identity."""
    base = listing([2])
    first, second = base.items
    changed = [
        msgspec.structs.replace(base, class_names=("other",)),
        *(
            msgspec.structs.replace(base, items=(msgspec.structs.replace(first, **{field: value}), second))
            for field, value in (("source", "z"), ("label", 1), ("size", 101), ("stamp_ns", 8))
        ),
    ]
    identities = [identity(each, "raw", {}, 0, 256) for each in (base, *changed)]
    identities += [
        identity(base, "jpeg", {}, 0, 256),
        identity(base, "jpeg", {"quality": 80}, 0, 256),
        identity(base, "raw", {}, 1, 256),
        identity(base, "raw", {}, 0, 255),
        identity(base, "raw", {}, 0, 256, "of another"),
    ]
    assert len(set(identities)) == len(identities)
    assert identity(listing([2]), "raw", {}, 0, 256) == identities[0]
