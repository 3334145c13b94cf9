"""`verify` accepts a sound environment and finds every kind of damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from loader_service.cli import main
from loader_service.data.codecs import HEADER, Codec, encode
from loader_service.data.manifest import Manifest
from loader_service.data.records import KEY
from loader_service.data.writer import Writer
from loader_service.datasets.statistics import Sums

Picture = Callable[[int], np.ndarray]
COUNT = 40


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, picture: Picture) -> Path:
    """Make a sound environment, which tests must not change."""
    path = tmp_path_factory.mktemp("sound") / "train.lmdb"
    write(path, picture, "raw")
    return path


def write(path: Path, picture: Picture, codec: Codec) -> Manifest:
    """Write an environment of COUNT records with their own statistics."""
    sums = Sums()
    with Writer(path, codec=codec, class_names=("a", "b")) as writer:
        for number in range(COUNT):
            pixels = picture(number)
            writer.put(number % 2, encode(pixels, codec), f"{number}.jpg")
            sums.add_picture(pixels)
        writer.reject("x", "y")
        return writer.finish(sums.statistics(), made_by={})


def run(path: Path) -> tuple[int, str, str]:
    """Run ``loader-service verify``; return exit code, stdout and stderr."""
    result = CliRunner().invoke(main, ["verify", str(path)])
    return result.exit_code, result.stdout, result.stderr


def test_a_sound_environment_gives_its_fingerprint(sound: Path, picture: Picture, tmp_path: Path) -> None:
    """A sound environment gives exit code 0, and only the fingerprint on stdout."""
    manifest = write(tmp_path / "again.lmdb", picture, "raw")
    assert run(sound)[:2] == (0, manifest.fingerprint + "\n")


def change(path: Path, database: bytes, key: bytes, alter: Callable[[bytes], bytes | None]) -> None:
    """Change or remove one value in place, without the manifest."""
    with lmdb.open(str(path), max_dbs=3, map_size=2**30, lock=False) as env:
        db = env.open_db(database)
        with env.begin(write=True, db=db) as txn:
            value = alter(bytes(txn.get(key)))
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)


def in_manifest(**fields: object) -> tuple[bytes, bytes, Callable[[bytes], bytes]]:
    """Return the arguments of change() that replace fields of the manifest."""

    def alter(stored: bytes) -> bytes:
        manifest = msgspec.msgpack.decode(stored, type=Manifest)
        return msgspec.msgpack.encode(msgspec.structs.replace(manifest, **fields))

    return b"manifest", b"manifest", alter


def flip_bit(value: bytes) -> bytes:
    """Flip one bit of the payload."""
    return value[:5000] + bytes([value[5000] ^ 1]) + value[5001:]


DAMAGE = {
    "bit": ((b"records", KEY.pack(7), flip_bit), "1 of its 40 records are bad"),
    "label": (
        (b"records", KEY.pack(8), lambda v: HEADER.pack(1, *HEADER.unpack_from(v)[1:]) + v[HEADER.size :]),
        "its manifest counts [20, 20] records by class, there are [19, 21]",
    ),
    "label of a sealed record": (
        (b"records", KEY.pack(8), lambda v: b"\1" + v[1:]),
        "1 of its 40 records are bad",
    ),
    "wild label": (
        (b"records", KEY.pack(8), lambda v: HEADER.pack(9, *HEADER.unpack_from(v)[1:]) + v[HEADER.size :]),
        "records are bad",
    ),
    "record gone": ((b"records", KEY.pack(9), lambda v: None), "it holds 39 records, its manifest says 40"),
    "source gone": ((b"sources", KEY.pack(3), lambda v: None), "1 of its 40 records are bad"),
    "mean": (in_manifest(channel_means=(1.0, 2.0, 3.0)), "channel_means are not those of its records"),
    "golden": (in_manifest(golden="0" * 32), "its golden samples, made on this machine, differ"),
    "fingerprint": (in_manifest(fingerprint="0" * 32), "its manifest says 0000"),
    "class names": (in_manifest(class_names=("a", "c")), "its fingerprint is"),
    "mean of others": (
        in_manifest(channel_means=(1.0, 2.0, 3.0), made_by={"statistics": "of another"}),
        "channel means are not those of its mean image",
    ),
    "eigenvalues of others": (
        in_manifest(eigenvalues=(1.0, 0.5, 0.1), made_by={"statistics": "of another"}),
        "are not those of its covariance",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(name: str, sound: Path, tmp_path: Path) -> None:
    """Any damage gives exit code 3, an empty stdout and a sentence that names it."""
    path = tmp_path / "train.lmdb"
    shutil.copytree(sound, path)
    where, sentence = DAMAGE[name]
    change(path, *where)
    code, out, err = run(path)
    assert code == 3
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err


def test_a_folder_without_an_environment_is_refused(tmp_path: Path) -> None:
    """A missing environment, an empty folder and a foreign file give a sentence."""
    assert run(tmp_path / "none.lmdb")[0] == 3
    assert "there is no dataset at" in run(tmp_path)[2]
    (tmp_path / "data.mdb").write_bytes(b"not LMDB" * 4096)
    assert "cannot be used" in run(tmp_path)[2]
