"""Pictures that lie behind a URL: object stores and web servers, through fsspec (the extra ``remote``).

A folder's files are listed once and read whole; of a tar archive only headers are read to list it, and of each picture in it
only its own range.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import IO, Any, Final, NamedTuple

import msgspec
import xxhash

from loader_service.data.picture import MAX_FILE_BYTES
from loader_service.errors import DatasetInvalid, OptionError, PictureError, PreprocessingFailed

URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")

VERSION_KEYS: Final = ("ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "Last-Modified")
"""Under these names file systems tell which version of a file they have."""


class Url(msgspec.Struct, frozen=True):
    """A source that is not on this machine; ``str()`` of it is the URL."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def suffix(self) -> str:
        """Of its last part, with the dot."""
        return PurePosixPath(self.text).suffix


class RemoteFile(NamedTuple):
    """One file: its name below the URL (empty if it is the URL's own), its own URL, a number for its version, its bytes."""

    name: str
    url: str
    stamp: int
    size: int


def list_remote(source: Url) -> list[RemoteFile]:
    """All files at or below a URL.

    Raises:
        DatasetInvalid: it cannot be listed.
        OptionError: fsspec, or what it needs for such URLs, is not installed.
    """
    fs, path = _open(source.text)
    try:
        found = {path: fs.info(path)} if fs.isfile(path) else fs.find(path, detail=True)
        root = path.rstrip("/") + "/"
        return [
            RemoteFile(
                name.removeprefix(root) if name != path else "", fs.unstrip_protocol(name), _stamp(info), info["size"]
            )
            for name, info in found.items()
        ]
    except Exception as error:  # each file system has errors of its own
        raise DatasetInvalid(str(source), f"it cannot be listed ({_said(error)})") from error


def open_remote(url: str) -> IO[bytes]:
    """A file to read and seek in; what is read of it is fetched as ranges."""
    fs, path = _open(url)
    file: IO[bytes] = fs.open(path, "rb")
    return file


def read_remote(url: str, source: str, offset: int, size: int) -> bytes:
    """``size`` bytes of a file from ``offset`` on.

    Raises:
        PictureError: it is gone, too large, or shorter than it was.
        PreprocessingFailed: it cannot be had now. That is not the picture's fault, and the run may go on later.
    """
    if size > MAX_FILE_BYTES:
        raise PictureError(source, f"it has {size} bytes, more than {MAX_FILE_BYTES}")
    fs, path = _open(url)
    try:
        content: bytes = fs.cat_file(path, start=offset, end=offset + size) if size else b""
    except FileNotFoundError as error:
        raise PictureError(source, "it is not there any more") from error
    except Exception as error:  # each file system has errors of its own
        raise PreprocessingFailed(f"{url} cannot be read now ({_said(error)}).") from error
    if len(content) != size:
        raise PictureError(source, f"it ends after {len(content)} of {size} bytes")
    return content


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        import fsspec  # an optional extra
    except ImportError as error:
        raise OptionError("SRC", url, "a path on this machine, or `pip install 'loader-service[remote]'`") from error
    try:
        fs, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise OptionError("SRC", url, f"a URL that fsspec can open here ({_said(error)})") from error
    return fs, path


def _stamp(info: dict[str, Any]) -> int:
    """A number that changes when a file does, of whatever the file system tells."""
    version = [str(info[key]) for key in VERSION_KEYS if key in info]
    return xxhash.xxh3_64_intdigest(repr(version).encode()) >> 1


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
