"""Damaged, foreign and unfinished environments are refused with one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import lmdb
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg

from loader_service.data.checksums import unsealed
from loader_service.data.codecs import HEADER, RAW_BYTES, decode, encode
from loader_service.data.manifest import Manifest, digest_headers, fingerprint
from loader_service.data.records import KEY, Records
from loader_service.errors import DatasetInvalid, DatasetNotFound, DatasetUnfinished, RecordError

Picture = Callable[[int], npt.NDArray[np.uint8]]


@pytest.fixture
def dataset(tmp_path: Path, make_dataset: Callable[..., Manifest]) -> Path:
    """Make a small environment that a test may damage."""
    make_dataset(tmp_path / "d.lmdb", 6)
    return tmp_path / "d.lmdb"


def change(path: Path, database: bytes, edit: Callable[..., None]) -> None:
    """Edit a database of a finished environment without its manifest."""
    with lmdb.open(str(path), max_dbs=3, map_size=2**30) as env, env.begin(write=True) as txn:
        edit(txn, env.open_db(database, txn=txn))
    (path / "lock.mdb").unlink()


def rewrite_manifest(path: Path, **fields: object) -> None:
    """Change fields of a finished environment's manifest."""

    def edit(txn: lmdb.Transaction, database: object) -> None:
        manifest = msgspec.msgpack.decode(txn.get(b"manifest", db=database))
        txn.put(b"manifest", msgspec.msgpack.encode(manifest | fields), db=database)

    change(path, b"manifest", edit)


def test_a_record_comes_back_as_it_was_put(dataset: Path, picture: Picture) -> None:
    """Label, pixels and source of a raw record are those that were written."""
    with Records(dataset) as records:
        assert len(records) == 6
        label, pixels = records.pixels(4)
        assert label == 1
        assert np.array_equal(pixels, picture(4))
        assert records.source(4) == "bee/4.jpg"
        for number in range(6):
            records.check(number)


def test_a_jpeg_record_is_close_to_its_picture(picture: Picture) -> None:
    """A jpeg payload decodes to nearly the pixels it was made from, in the same channel order."""
    pixels = picture(2)
    pixels = (pixels // 4 + np.array([10, 90, 160], np.uint8)).astype(np.uint8)
    decoded = decode(encode(pixels, "jpeg", {"quality": 95, "subsampling": "444"}), 1)
    assert np.abs(decoded.astype(int) - pixels).mean() < 2


def test_an_environment_needs_no_write_access(dataset: Path) -> None:
    """Reading makes no lock file, so read-only mounts work."""
    with Records(dataset) as records:
        records.pixels(0)
        assert sorted(p.name for p in dataset.iterdir()) == ["data.mdb"]


def test_a_missing_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    """The error for a missing environment names the command that makes one."""
    with pytest.raises(DatasetNotFound, match="make preprocess"):
        Records(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("keep", [0.3, 0.97])
def test_a_truncated_file_is_refused(dataset: Path, keep: float) -> None:
    """A file shorter than its tree needs is refused, because reading past its end would kill the process."""
    data = dataset / "data.mdb"
    os.truncate(data, int(data.stat().st_size * keep) // 4096 * 4096)
    with pytest.raises(DatasetInvalid, match="truncated"):
        Records(dataset)


@pytest.mark.parametrize("content", [b"", b"not a database" * 1000])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file that LMDB did not write is refused with LMDB's reason."""
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(DatasetInvalid, match=str(tmp_path)):
        Records(tmp_path)


def test_no_manifest_means_unfinished(dataset: Path) -> None:
    """An environment without a manifest is refused as unfinished."""
    change(dataset, b"manifest", lambda txn, database: txn.delete(b"manifest", db=database))
    with pytest.raises(DatasetUnfinished, match="never finished"):
        Records(dataset)


def test_no_databases_mean_unfinished(tmp_path: Path) -> None:
    """An LMDB environment without the sub-databases is refused as unfinished."""
    with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as txn:
        txn.put(b"k", b"v")
    with pytest.raises(DatasetUnfinished):
        Records(tmp_path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"format": 2}, "it is of format 2, and this version reads format 1"),
        ({"size": 128}, "its mean image has 786432 bytes, records of 128 pixels need 196608"),
        ({"size": 7}, "its records are 7 pixels wide, and this version reads 8 to 1024"),
        ({"size": 2**40}, "pixels wide, and this version reads 8 to 1024"),
        ({"mean_image": b"short"}, "its mean image has 5 bytes"),
        ({"class_counts": (2, 2, 3)}, "its classes have 7 records together, its count says 6"),
        ({"class_counts": (6,)}, "its manifest is incomplete"),
        ({"eigenvalues": (1.0,)}, "its manifest is incomplete"),
        ({"count": 7, "class_counts": (3, 2, 2)}, "it holds 6 records, its manifest says 7"),
        ({"count": "six"}, "its manifest cannot be read"),
        ({"surprise": 1}, "its manifest cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(dataset: Path, fields: dict[str, object], sentence: str) -> None:
    """A manifest with inconsistent fields is refused with the reason."""
    rewrite_manifest(dataset, **fields)
    with pytest.raises(DatasetInvalid, match=sentence):
        Records(dataset)


def test_check_finds_a_changed_pixel(dataset: Path) -> None:
    """A payload that does not match its checksum gives an error with the record's number."""

    def edit(txn: lmdb.Transaction, database: object) -> None:
        value = bytearray(txn.get(KEY.pack(2), db=database))
        value[1000] ^= 1
        txn.put(KEY.pack(2), bytes(value), db=database)

    change(dataset, b"records", edit)
    with Records(dataset) as records:
        records.check(1)
        with pytest.raises(RecordError, match=r"record 2 of .* its checksum does not match"):
            records.check(2)


def test_check_finds_a_label_without_a_class(dataset: Path) -> None:
    """A label beyond the last class gives an error."""

    def edit(txn: lmdb.Transaction, database: object) -> None:
        value = txn.get(KEY.pack(2), db=database)
        plain = unsealed(b"\x63\0\0\0" + value[4:])  # of a version 0.1: a seal would not match the label
        txn.put(KEY.pack(2), plain + value[HEADER.size :], db=database)

    change(dataset, b"records", edit)
    with Records(dataset) as records, pytest.raises(RecordError, match="its label 99 is beyond the last class"):
        records.check(2)


def test_a_missing_source_name_is_named(dataset: Path) -> None:
    """A record without a source name gives an error with its number."""
    change(dataset, b"sources", lambda txn, database: txn.delete(KEY.pack(5), db=database))
    with Records(dataset) as records, pytest.raises(RecordError, match=r"record 5 of .* has no source name"):
        records.source(5)


def test_the_fingerprint_covers_records_and_statistics(dataset: Path) -> None:
    """The fingerprint can be recomputed from the stored records and statistics, and changes with any of them."""
    with Records(dataset) as records:
        manifest, headers = records.manifest, list(records.headers())
    digest = digest_headers(headers)
    assert fingerprint(manifest, digest) == manifest.fingerprint
    assert fingerprint(manifest, digest_headers([headers[1], headers[0], *headers[2:]])) != manifest.fingerprint
    for field in (
        {"eigenvalues": (1.0, 0.0, 0.0)},
        {"mean_image": bytes(RAW_BYTES * 4)},
        {"class_names": ("a", "b", "c")},
    ):
        assert fingerprint(msgspec.structs.replace(manifest, **field), digest) != manifest.fingerprint


def test_the_fingerprint_is_not_of_the_file(dataset: Path, tmp_path: Path) -> None:
    """A compacted copy, with other bytes but the same records, has the same fingerprint."""
    copy = tmp_path / "copy.lmdb"
    copy.mkdir()
    with lmdb.open(str(dataset), readonly=True, lock=False, max_dbs=3) as env:
        env.copy(str(copy), compact=True)
    with Records(copy) as records:
        assert fingerprint(records.manifest, digest_headers(records.headers())) == records.manifest.fingerprint
    assert (copy / "data.mdb").read_bytes() != (dataset / "data.mdb").read_bytes()


def test_a_golden_fingerprint(dataset: Path) -> None:
    """The fingerprint of these six records never changes."""
    with Records(dataset) as records:
        assert records.manifest.fingerprint == "961fcd233fc998025c2227bce222a306"


@pytest.mark.parametrize("pixels", [np.zeros((256, 255, 3), np.uint8), np.zeros((256, 256, 3), np.int16)])
def test_only_records_can_be_encoded(pixels: npt.NDArray[np.uint8]) -> None:
    """Pixels of another shape or dtype are refused."""
    with pytest.raises(ValueError, match=r"a record is \(side, side, 3\) uint8"):
        encode(pixels, "raw")


def test_a_jpeg_of_another_size_is_refused() -> None:
    """A JPEG that is not 256 x 256 is not decoded into a record."""
    small = bytes(simplejpeg.encode_jpeg(np.zeros((128, 128, 3), np.uint8)))
    with pytest.raises(ValueError, match="128"):
        decode(small, 1)
