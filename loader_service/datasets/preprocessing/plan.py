"""The plan of a run, made before it starts: splits, order, codec, disk space, and the identity of its input."""

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
from loader_service.data.image_file import LIBRARY, RECIPE
from loader_service.datasets.preprocessing.sources import Item, Listing
from loader_service.errors import PreprocessingFailed

PAGE_BYTES: Final = 4096

PAYLOAD_SHARES: Final[dict[Codec, float]] = {
    "raw": 1.0,
    "jpeg": 0.125,  # a photograph at quality 90 takes 23 of 192 KB on average
    "centered": 3.0,  # twice a raw payload, and the raw payload itself until all are converted
}
"""Disk space of payloads relative to raw ones."""

RAW_MEMORY_SHARE: Final = 0.5
"""Fraction of memory that raw records may take. Raw records that are read from a disk are slower than decoding JPEGs."""

MEMORY_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with a container's memory limit: cgroup version 2, and version 1."""

# Prefixes of the hashed names: with one seed, the split and the order must not depend on each other.
_ORDER: Final = b"order\0"
_SPLIT: Final = b"split\0"


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """Return the items in the order of a keyed hash of their names: shuffled, whatever the version of any generator."""
    return sorted(items, key=lambda item: (_hash(_ORDER, item, seed), item.source))


def split_off(listing: Listing, share: float, seed: int) -> tuple[Listing, Listing]:
    """Split a listing into training and validation: the fraction ``share`` of each class, at least one, is validation."""
    by_label: dict[int, list[Item]] = defaultdict(list)
    for item in listing.items:
        by_label[item.label].append(item)
    chosen: set[str] = set()
    for items in by_label.values():
        count = min(max(1, round(share * len(items))), len(items) - 1)  # a class of one image stays in training
        items.sort(key=lambda item: (_hash(_SPLIT, item, seed), item.source))
        chosen.update(item.source for item in items[:count])
    return split_listed(listing, list(chosen))


def split_listed(listing: Listing, names: Sequence[str]) -> tuple[Listing, Listing]:
    """Split a listing into training and validation: the items whose sources are named are validation.

    Raises:
        ValueError: a name is not the source of an item.
    """
    chosen = set(names)
    if unknown := sorted(chosen - {item.source for item in listing.items}):
        raise ValueError(f"{len(unknown):,} of its {len(chosen):,} names are not in SRC, the first is {unknown[0]!r}")
    train = tuple(item for item in listing.items if item.source not in chosen)
    val = tuple(item for item in listing.items if item.source in chosen)
    return msgspec.structs.replace(listing, items=train), msgspec.structs.replace(listing, items=val)


def _hash(stream: bytes, item: Item, seed: int) -> bytes:
    return xxhash.xxh3_128_digest(stream + item.source.encode(), seed=seed)


def record_bytes(codec: Codec, side: int) -> int:
    """Estimate the bytes that a record of ``side`` pixels takes on disk during the run, in whole pages."""
    # About 128 bytes for header, keys, source name and LMDB's page header.
    return math.ceil((PAYLOAD_SHARES[codec] * raw_bytes(side) + 128) / PAGE_BYTES) * PAGE_BYTES


def identity(
    listing: Listing, codec: Codec, parameters: Mapping[str, int | str], seed: int, size: int, statistics: str = ""
) -> str:
    """Return the identity of a split's input, 32 hexadecimal digits: equal identities give the same environment.

    Args:
        listing: the items; their names, labels, sizes and modification times count.
        codec: codec of the records.
        parameters: parameters of the codec.
        seed: seed of the order.
        size: side of the records, in pixels.
        statistics: fingerprint of the environment whose statistics the split uses; "" for its own.
    """
    # The libraries and the recipe count too: another resize gives other pixels.
    digest = xxhash.xxh3_128()
    facts = (LIBRARY, RECIPE, codec, dict(parameters), seed, size, listing.class_names, statistics)
    digest.update(msgspec.msgpack.encode(facts))
    for item in listing.items:
        digest.update(msgspec.msgpack.encode((item.source, item.label, item.size, item.stamp_ns)))
    return digest.hexdigest()


def choose_codec(asked: Codec | Literal["auto"], count: int, size: int) -> Codec:
    """Return the requested codec; for ``auto``, raw if all raw records of ``size`` pixels fit into RAW_MEMORY_SHARE."""
    if asked != "auto":
        return asked
    return "raw" if count * record_bytes("raw", size) <= RAW_MEMORY_SHARE * memory_bytes() else "jpeg"


def memory_bytes() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's limit."""
    fields = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    machine = [int(field[1]) * 1024 for field in fields if field[0] == "MemTotal:"]
    limits = [path.read_text(encoding="ascii").strip() for path in MEMORY_LIMITS if path.is_file()]
    return min(machine + [int(limit) for limit in limits if limit.isdigit()])  # cgroup version 2 writes "max" for none


def disk_bytes(count: int, codec: Codec, size: int) -> int:
    """Estimate the bytes that ``count`` records of ``size`` pixels take on disk during the run; 2 % are LMDB's tree."""
    return math.ceil(1.02 * count * record_bytes(codec, size))


def check_disk_space(out: Path, count: int, codec: Codec, size: int) -> None:
    """Check that the disk has space for ``count`` records of ``size`` pixels.

    Raises:
        PreprocessingFailed: it has not.
    """
    need, free = disk_bytes(count, codec, size), shutil.disk_usage(out).free
    if need > free:
        raise PreprocessingFailed(
            f"{out} has {free / 1e9:.1f} GB free, but {count:,} {codec} records need about {need / 1e9:.1f} GB: "
            f"free some space, name another folder{', or use --codec jpeg' if codec != 'jpeg' else ''}."
        )
