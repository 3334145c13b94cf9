"""Images behind URLs, in folders and archives, give the same records as on disk; file:// is one kind of URL."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import s3fs
from click.testing import Result

from loader_service.data.records import Records
from loader_service.datasets.preprocessing.remote import Url, list_remote, read_remote
from loader_service.datasets.preprocessing.sources import list_files, read_bytes
from loader_service.errors import PictureError, PreprocessingFailed

Preprocess = Callable[..., Result]


@pytest.fixture(scope="module")
def fingerprints(album: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ...]]:
    """Preprocess the album from disk, and return fingerprint and rejected files by split."""
    out = tmp_path_factory.mktemp("local")
    command = [sys.executable, "-m", "tools.preprocess", str(album), str(out), "--workers=1"]
    subprocess.run(command, check=True, capture_output=True)
    return contents(out)


def contents(out: Path) -> list[tuple[str, ...]]:
    """Return fingerprint and rejected files of both environments."""
    found = []
    for split in ("train.lmdb", "val.lmdb"):
        with Records(out / split) as records:
            found.append((records.manifest.fingerprint, *(bad.source for bad in records.manifest.rejected)))
    return found


def tar_of(folder: Path, path: Path) -> Path:
    """Write a tar archive of a folder's content."""
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    return path


def test_a_folder_behind_a_url(
    album: Path, tmp_path: Path, preprocess: Preprocess, fingerprints: list[tuple[str, ...]]
) -> None:
    """The URL of a folder gives the same records as the folder, and a second run is up to date."""
    first, second = (preprocess(album.as_uri(), tmp_path) for _ in range(2))  # type: ignore[arg-type]
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "up to date" in second.output
    assert contents(tmp_path) == fingerprints


def test_an_archive_behind_a_url(
    album: Path, tmp_path: Path, preprocess: Preprocess, fingerprints: list[tuple[str, ...]]
) -> None:
    """A remote tar archive is read in ranges, without a copy on disk."""
    url = tar_of(album, tmp_path / "album.tar").as_uri()
    assert preprocess(url, tmp_path / "out").exit_code == 0  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == fingerprints


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".txz"])
def test_a_compressed_archive_behind_a_url(
    suffix: str, album: Path, tmp_path: Path, preprocess: Preprocess, fingerprints: list[tuple[str, ...]]
) -> None:
    """A remote compressed archive is decompressed while it is read; a second run is up to date; no copy stays."""
    path = tmp_path / f"album{suffix}"
    with tarfile.open(path, f"w:{suffix[-2:] if suffix != '.tar.bz2' else 'bz2'}") as archive:
        archive.add(album, ".")
    first, second = (preprocess(path.as_uri(), tmp_path / "out") for _ in range(2))  # type: ignore[arg-type]
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert "up to date" in second.output
    assert contents(tmp_path / "out") == fingerprints
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rejected.jsonl", "train.lmdb", "val.lmdb"]


def test_half_a_compressed_archive_behind_a_url(album: Path, tmp_path: Path, preprocess: Preprocess) -> None:
    """A compressed archive that is cut off or not compressed gives a sentence and leaves nothing."""
    path = tmp_path / "album.tar.gz"
    path.write_bytes(gzip.compress(tar_of(album, tmp_path / "album.tar").read_bytes())[:-2000])
    for sentence in ("cannot be read or decompressed", "it is not gzip, bzip2 or xz"):
        result = preprocess(path.as_uri(), tmp_path / "out")  # type: ignore[arg-type]
        assert result.exit_code == 3
        assert sentence in " ".join(result.output.split())
        assert list((tmp_path / "out").iterdir()) == []
        path.write_bytes(b"plain")


def test_each_file_has_its_bytes(album: Path, tmp_path: Path) -> None:
    """A remote tree has the same names, offsets and sizes as the tree on disk, without hidden files."""
    (tmp_path / "tree" / "ant").mkdir(parents=True)
    (tmp_path / "tree" / "ant" / "1.jpg").write_bytes(b"one")
    (tmp_path / "tree" / "ant" / ".hidden").write_bytes(b"no")
    (tmp_path / "tree" / "ant" / "empty").write_bytes(b"")
    tar_of(album / "val", tmp_path / "tree" / "more.tar")
    here = {f.name: read_bytes(f.path, f.name, f.offset, f.size) for f in list_files(tmp_path / "tree")}
    there = list_files(Url((tmp_path / "tree").as_uri()))
    assert {f.name: read_bytes(f.path, f.name, f.offset, f.size) for f in there} == here
    assert here["ant/1.jpg"] == b"one"


def test_a_changed_file_has_another_stamp(tmp_path: Path) -> None:
    """A second run notices that a file behind a URL has changed."""
    path = tmp_path / "1.jpg"
    path.write_bytes(b"one")
    (before,) = list_remote(Url(tmp_path.as_uri()))
    os.utime(path, ns=(1, 1))
    (after,) = list_remote(Url(tmp_path.as_uri()))
    assert before.stamp != after.stamp
    assert before._replace(stamp=0) == after._replace(stamp=0)


def test_a_missing_file_is_rejected_and_an_outage_stops_the_run(tmp_path: Path) -> None:
    """A missing or shortened file is rejected; a store that cannot be reached stops the run."""
    path = tmp_path / "1.jpg"
    with pytest.raises(PictureError, match="it does not exist any more"):
        read_remote(path.as_uri(), "1.jpg", 0, 3)
    path.write_bytes(b"on")
    with pytest.raises(PictureError, match="it ends after 2 of 3 bytes"):
        read_remote(path.as_uri(), "1.jpg", 0, 3)
    with pytest.raises(PreprocessingFailed, match="cannot be read now"):
        read_remote(tmp_path.as_uri(), "1.jpg", 0, 3)


@pytest.mark.parametrize(
    ("url", "code", "sentence"),
    [
        ("nonsense://bucket/x", 2, "a URL that fsspec can open here"),
        ("file:///no/such/folder", 3, "it holds no files"),
        ("file:///no/such.tar.gz", 3, "there is no such archive"),
        ("file:///no/such.csv", 3, "a table must be on this machine"),
    ],
)
def test_urls_that_cannot_work(url: str, code: int, sentence: str, tmp_path: Path, preprocess: Preprocess) -> None:
    """A URL that cannot be used gives an exit code and a sentence."""
    result = preprocess(url, tmp_path / "out")  # type: ignore[arg-type]
    assert result.exit_code == code
    assert sentence in " ".join(result.output.split())


def test_a_folder_that_is_named_like_an_archive(tmp_path: Path, preprocess: Preprocess) -> None:
    """A URL that ends in .tar.gz but is a folder gives a sentence."""
    folder = tmp_path / "x.tar.gz"
    folder.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (folder / name).write_bytes(b"")
    result = preprocess(folder.as_uri(), tmp_path / "out")  # type: ignore[arg-type]
    assert result.exit_code == 3, result.output
    assert "it is a folder of 2 files" in " ".join(result.output.split())


class Ranges(SimpleHTTPRequestHandler):
    """A web server for files and ranges of them."""

    def do_GET(self) -> None:
        """Send a file, or the bytes that a Range header names."""
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2]), len(content) - 1)) if asked else (0, len(content) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the base class
        """Print no log lines."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serve the files of ``tmp_path / "web"``; return the ``http://`` URL."""
    (tmp_path / "web").mkdir()
    handler = partial(Ranges, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["album.tar", "album.tar.gz"])
def test_a_web_server(
    name: str,
    web: str,
    album: Path,
    tmp_path: Path,
    preprocess: Preprocess,
    fingerprints: list[tuple[str, ...]],
) -> None:
    """A web server gives the same records: a tar in ranges, and a compressed tar as a stream."""
    content = tar_of(album, tmp_path / "web" / "album.tar").read_bytes()
    (tmp_path / "web" / "album.tar.gz").write_bytes(gzip.compress(content))
    result = preprocess(f"{web}/{name}", tmp_path / "out")  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out") == fingerprints


@pytest.fixture
def bucket(album: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start an S3 server with the album in ``s3://album``, as a folder and as a tar."""
    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", "0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stderr is not None
        endpoint = next(m[0] for line in server.stderr if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        fs = s3fs.S3FileSystem()
        fs.mkdir("album")
        fs.put(str(album), "album/tree", recursive=True)
        yield "s3://album"
        server.kill()


def test_an_object_store(
    bucket: str, album: Path, tmp_path: Path, preprocess: Preprocess, fingerprints: list[tuple[str, ...]]
) -> None:
    """An S3-compatible server gives the same records."""
    result = preprocess(f"{bucket}/tree", tmp_path)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    assert contents(tmp_path) == fingerprints
