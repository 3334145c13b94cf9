"""What a run will do, decided before it starts: splits, order, codec, room, and the identity of its input."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import xxhash

from loader_service.data.codecs import Codec, raw_bytes
from loader_service.data.picture import LIBRARY, RECIPE
from loader_service.datasets.preprocessing.sources import Item, Listing
from loader_service.errors import PreprocessingFailed

PAGE_BYTES: Final = 4096

PAYLOAD_SHARES: Final[dict[Codec, float]] = {
    "raw": 1.0,
    "jpeg": 0.125,  # of a photograph at quality 90; 23 KB of 192 on average
    "centered": 3.0,  # 16 bits for each of a raw one's 8, which lies beside it until all are made
}
"""How large payloads are, beside raw ones."""

RAW_MEMORY_SHARE: Final = 0.5
"""Raw records should fit into this share of memory: read from disk instead, they come slower than JPEG is decoded."""

MEMORY_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

_ORDER: Final = b"order\0"
_SPLIT: Final = b"split\0"


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """The items in the order of a keyed hash of their names: mixed, and independent of any generator's version."""
    return sorted(items, key=lambda item: (_hash(_ORDER, item, seed), item.source))


def split_off(listing: Listing, share: float, seed: int) -> tuple[Listing, Listing]:
    """Training and validation items out of one listing: ``share`` of each class, at least one, goes to validation."""
    by_label: dict[int, list[Item]] = defaultdict(list)
    for item in listing.items:
        by_label[item.label].append(item)
    chosen: set[str] = set()
    for items in by_label.values():
        count = min(max(1, round(share * len(items))), len(items) - 1)  # a class of one picture stays in training
        items.sort(key=lambda item: (_hash(_SPLIT, item, seed), item.source))
        chosen.update(item.source for item in items[:count])
    return split_listed(listing, list(chosen))


def split_listed(listing: Listing, names: Sequence[str]) -> tuple[Listing, Listing]:
    """Training and validation items out of one listing: those whose sources are named go to validation.

    Raises:
        ValueError: a name is no item's.
    """
    chosen = set(names)
    if unknown := sorted(chosen - {item.source for item in listing.items}):
        raise ValueError(f"{len(unknown):,} of its {len(chosen):,} names are of no picture, the first {unknown[0]!r}")
    train = tuple(item for item in listing.items if item.source not in chosen)
    val = tuple(item for item in listing.items if item.source in chosen)
    return msgspec.structs.replace(listing, items=train), msgspec.structs.replace(listing, items=val)


def _hash(stream: bytes, item: Item, seed: int) -> bytes:
    return xxhash.xxh3_128_digest(stream + item.source.encode(), seed=seed)


def record_bytes(codec: Codec, side: int) -> int:
    """About how many bytes a record of ``side`` pixels takes on disk while it is made, in whole pages."""
    return math.ceil((PAYLOAD_SHARES[codec] * raw_bytes(side) + 128) / PAGE_BYTES) * PAGE_BYTES


def identity(
    listing: Listing, codec: Codec, parameters: Mapping[str, int | str], seed: int, size: int, statistics: str = ""
) -> str:
    """What a split's environment is made of: equal identities mean that there is nothing to do again.

    Args:
        listing: the items; their names, labels, sizes and times of change count.
        codec: of the payloads.
        parameters: the codec's.
        seed: of the order.
        size: the records' side in pixels.
        statistics: the fingerprint of the environment whose statistics are taken over.
    """
    digest = xxhash.xxh3_128()
    facts = (LIBRARY, RECIPE, codec, dict(parameters), seed, size, listing.class_names, statistics)
    digest.update(msgspec.msgpack.encode(facts))
    for item in listing.items:
        digest.update(msgspec.msgpack.encode((item.source, item.label, item.size, item.stamp_ns)))
    return digest.hexdigest()


def choose_codec(asked: Codec | Literal["auto"], count: int, size: int) -> Codec:
    """The codec: as asked, or by whether all records of ``size`` pixels fit into memory comfortably when they are raw."""
    if asked != "auto":
        return asked
    return "raw" if count * record_bytes("raw", size) <= RAW_MEMORY_SHARE * memory_bytes() else "jpeg"


def memory_bytes() -> int:
    """The memory that this process may use: the machine's, or its container's."""
    fields = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    machine = [int(field[1]) * 1024 for field in fields if field[0] == "MemTotal:"]
    limits = [path.read_text(encoding="ascii").strip() for path in MEMORY_LIMITS if path.is_file()]
    return min(machine + [int(limit) for limit in limits if limit.isdigit()])


def disk_bytes(count: int, codec: Codec, size: int) -> int:
    """About how many bytes ``count`` records of ``size`` pixels take on disk while they are made."""
    return math.ceil(1.02 * count * record_bytes(codec, size))


def check_disk_space(out: Path, count: int, codec: Codec, size: int) -> None:
    """See that there is room for ``count`` records of ``size`` pixels.

    Raises:
        PreprocessingFailed: there is not.
    """
    need, free = disk_bytes(count, codec, size), shutil.disk_usage(out).free
    if need > free:
        raise PreprocessingFailed(
            f"{out} has {free / 1e9:.1f} GB free, and {count:,} {codec} records need about {need / 1e9:.1f} GB: "
            f"make room, name another folder{', or take --codec jpeg' if codec != 'jpeg' else ''}."
        )
