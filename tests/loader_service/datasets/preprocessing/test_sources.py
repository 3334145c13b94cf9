"""Trees of files in folders and archives are listed and labelled alike."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from loader_service.datasets.preprocessing.sources import File, label_files, list_files, split_files
from loader_service.errors import DatasetInvalid


def touch(root: Path, *names: str) -> None:
    """Write small files that contain their names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """Return an uncompressed tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def content_of(file: File) -> bytes:
    """Return the bytes at a file's place."""
    with Path(os.fsdecode(file.path)).open("rb") as on_disk:
        on_disk.seek(file.offset)
        return on_disk.read(file.size)


def files(*names: str) -> list[File]:
    """Return files with these names."""
    return [File(name, b"/x", 0, 0, 1) for name in names]


def test_a_folder_is_a_tree_without_hidden_files(tmp_path: Path) -> None:
    """Files of any depth are listed by name, without hidden ones."""
    touch(tmp_path, "b/2.jpg", "b/deep/er/1.jpg", "a/x.JPEG", "readme.txt", ".git/config", "a/.DS_Store")
    tree = list_files(tmp_path)
    assert [file.name for file in tree] == ["a/x.JPEG", "b/2.jpg", "b/deep/er/1.jpg", "readme.txt"]
    assert all(content_of(file) == file.name.encode() for file in tree)


def test_an_archive_is_the_same_tree(tmp_path: Path) -> None:
    """The files of a tar archive have their offsets in it, with long names and inner archives."""
    long = "a/" + "x" * 300 + ".jpg"
    members = {"./b/2.jpg": b"two", long: b"long", ".hidden/y": b"no", "c/.z": b"no"}
    inner = tar_of({"n01440764_1.JPEG": b"tench", "n01440764_2.JPEG": b"another"})
    path = tmp_path / "all.tar"
    path.write_bytes(tar_of({**members, "n01440764.tar": inner, "z/1.jpg": b"last"}))
    found = {file.name: content_of(file) for file in list_files(path)}
    assert found == {
        long: b"long",
        "b/2.jpg": b"two",
        "n01440764/n01440764_1.JPEG": b"tench",
        "n01440764/n01440764_2.JPEG": b"another",
        "z/1.jpg": b"last",
    }


def test_archives_in_a_folder_are_looked_into(tmp_path: Path) -> None:
    """A folder with one archive per class is a tree of these classes."""
    for name in ("ant", "bee"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of({"1.jpg": name.encode()}))
    assert {file.name: content_of(file) for file in list_files(tmp_path)} == {"ant/1.jpg": b"ant", "bee/1.jpg": b"bee"}


@pytest.mark.parametrize("length", [0, 700, 2500])
def test_a_damaged_archive_is_refused(length: int, tmp_path: Path) -> None:
    """The error names an archive that is damaged or cut off."""
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"a/1.jpg": b"1" * 2000, "a/2.jpg": b"2" * 2000})[:length] or b"not an archive" * 99)
    with pytest.raises(DatasetInvalid, match="cannot be read as a tar archive"):
        list_files(path)


def test_names_that_are_not_text_are_kept(tmp_path: Path) -> None:
    """A file name that is not UTF-8 is shown with escapes, and opened by its bytes."""
    folder = tmp_path / "a"
    folder.mkdir()
    path = os.fsencode(folder) + b"/caf\xe9.jpg"
    Path(os.fsdecode(path)).write_bytes(b"x")
    (file,) = list_files(tmp_path)
    assert file.name == "a/caf\\xe9.jpg"
    assert file.path == path
    assert content_of(file) == b"x"


def test_links(tmp_path: Path) -> None:
    """Links to files and to class folders are followed; links to deeper folders, which may form cycles, are not."""
    touch(tmp_path, "real/one/1.jpg")
    root = tmp_path / "set"
    (root / "two").mkdir(parents=True)
    (root / "one").symlink_to(tmp_path / "real" / "one")
    (root / "two" / "2.jpg").symlink_to(tmp_path / "real" / "one" / "1.jpg")
    (root / "two" / "circle").symlink_to(root)
    (root / "two" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert [file.name for file in list_files(root)] == ["one/1.jpg", "two/2.jpg", "two/gone.jpg"]


def test_labels_follow_from_sorted_names() -> None:
    """Classes are the top folders, or the prefix of ImageNet's file names; other loose files have no class."""
    listing = label_files(Path("x"), files("b/1.jpg", "a/deep/2.jpg", "readme.txt"))
    assert listing.class_names == ("a", "b")
    assert [(item.source, item.label) for item in listing.items] == [("b/1.jpg", 1), ("a/deep/2.jpg", 0)]
    flat = label_files(Path("x"), files("n01440764_tench.JPEG", "n01443537_2.JPEG"))
    assert flat.class_names == ("n01440764", "n01443537")


def test_given_classes_decide_the_labels() -> None:
    """A validation tree uses the labels of training; it may lack classes, but not add any."""
    listing = label_files(Path("x"), files("c/1.jpg"), ("a", "b", "c"))
    assert listing.class_names == ("a", "b", "c")
    assert [item.label for item in listing.items] == [2]
    with pytest.raises(DatasetInvalid, match="its class 'c' is not among the 2 classes"):
        label_files(Path("x"), files("c/1.jpg"), ("a", "b"))


def test_a_tree_without_classes_is_refused() -> None:
    """A tree of loose files is refused."""
    with pytest.raises(DatasetInvalid, match="no files in folders for classes"):
        label_files(Path("x"), files("1.jpg", "2.jpg"))


@pytest.mark.parametrize(
    ("tops", "train", "val"),
    [
        (("train", "other"), ["other/a/1.jpg", "train/a/1.jpg"], None),
        (("train", "test"), ["a/1.jpg"], ["a/1.jpg"]),
        (("train", "valid"), ["a/1.jpg"], ["a/1.jpg"]),
        (("cat", "dog"), ["cat/a/1.jpg", "dog/a/1.jpg"], None),
    ],
)
def test_both_splits_are_found(tops: tuple[str, ...], train: list[str], val: list[str] | None) -> None:
    """train/ together with val/ or test/ gives both splits; train/ alone is a class."""
    found = split_files(files(*sorted(f"{top}/a/1.jpg" for top in tops)))
    assert [file.name for file in found[0]] == train
    assert (found[1] and [file.name for file in found[1]]) == val
