"""Remote sources: images in object stores and on web servers, through fsspec (the extra ``remote``).

The files of a folder are listed once and read whole. Of a tar archive, only the headers are read to list it, and each image
is then read as a range.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import IO, Any, Final, NamedTuple

import msgspec
import xxhash

from loader_service.data.image_file import MAX_FILE_BYTES
from loader_service.errors import DatasetInvalid, OptionError, PictureError, PreprocessingFailed

URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")

VERSION_KEYS: Final = ("ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "Last-Modified")
"""Keys under which fsspec's file systems report the version of a file."""


class Url(msgspec.Struct, frozen=True):
    """A source on another machine; ``str()`` returns the URL."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def suffix(self) -> str:
        """The suffix of the last part, with the dot."""
        return PurePosixPath(self.text).suffix


class RemoteFile(NamedTuple):
    """A remote file.

    Fields:
        name: name below the source's URL; "" if the file is the source itself.
        url: URL of the file.
        stamp: number that changes with the file's version.
        size: bytes.
    """

    name: str
    url: str
    stamp: int
    size: int


def list_remote(source: Url) -> list[RemoteFile]:
    """List all files at or below a URL.

    Raises:
        DatasetInvalid: it cannot be listed.
        OptionError: fsspec, or its package for such URLs, is not installed.
    """
    fs, path = _open(source.text)
    try:
        found = {path: fs.info(path)} if fs.isfile(path) else fs.find(path, detail=True)  # find() is recursive
        root = path.rstrip("/") + "/"
        return [
            RemoteFile(
                name.removeprefix(root) if name != path else "", fs.unstrip_protocol(name), _stamp(info), info["size"]
            )
            for name, info in found.items()
        ]
    except Exception as error:  # every fsspec file system raises errors of its own
        raise DatasetInvalid(str(source), f"it cannot be listed ({_said(error)})") from error


def open_remote(url: str) -> IO[bytes]:
    """Open a remote file for reading and seeking; fsspec fetches ranges of it as they are read."""
    fs, path = _open(url)
    file: IO[bytes] = fs.open(path, "rb")
    return file


def read_remote(url: str, source: str, offset: int, size: int) -> bytes:
    """Return ``size`` bytes of a remote file from ``offset`` on.

    Raises:
        PictureError: the file is gone, too large, or shorter than it was.
        PreprocessingFailed: the store cannot be read now. This is not the image's fault; the run can be resumed later.
    """
    if size > MAX_FILE_BYTES:
        raise PictureError(source, f"it has {size} bytes, more than {MAX_FILE_BYTES}")
    fs, path = _open(url)
    try:
        # HTTP has no range of zero bytes.
        content: bytes = fs.cat_file(path, start=offset, end=offset + size) if size else b""
    except FileNotFoundError as error:
        raise PictureError(source, "it does not exist any more") from error
    except Exception as error:  # every fsspec file system raises errors of its own
        raise PreprocessingFailed(f"{url} cannot be read now ({_said(error)}).") from error
    if len(content) != size:
        raise PictureError(source, f"it ends after {len(content)} of {size} bytes")
    return content


def _open(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
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
    """Return a number that changes when a file changes, from the version that its file system reports."""
    version = [str(info[key]) for key in VERSION_KEYS if key in info]  # empty: only the size tells files apart
    return xxhash.xxh3_64_intdigest(repr(version).encode()) >> 1  # fits into a signed 64-bit integer


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
