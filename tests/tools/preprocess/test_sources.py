"""What is found in folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loader_service.errors import DatasetInvalid
from tools.preprocess.sources import find_splits, list_folder


def touch(root: Path, *names: str) -> None:
    """Make small files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_classes_are_folders_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Labels follow from sorted names, files may lie deeper, and loose and hidden ones are no pictures."""
    touch(tmp_path, "b/2.jpg", "b/deep/er/1.jpg", "a/x.JPEG", "readme.txt", ".git/config", "a/.DS_Store")
    listing = list_folder(tmp_path)
    assert listing.class_names == ("a", "b")
    assert [(item.source, item.label) for item in listing.items] == [
        ("a/x.JPEG", 0),
        ("b/2.jpg", 1),
        ("b/deep/er/1.jpg", 1),
    ]
    assert [Path(os.fsdecode(item.path)).stat().st_size for item in listing.items] == [i.size for i in listing.items]


def test_names_that_are_not_text_are_kept(tmp_path: Path) -> None:
    """A file name that is not UTF-8 is shown with escapes and opened by its bytes."""
    folder = tmp_path / "a"
    folder.mkdir()
    path = os.fsencode(folder) + b"/caf\xe9.jpg"
    Path(os.fsdecode(path)).write_bytes(b"x")
    (item,) = list_folder(tmp_path).items
    assert item.source == "a/caf\\xe9.jpg"
    assert item.path == path


def test_links(tmp_path: Path) -> None:
    """Links to files and to class folders count, links to folders below could go round in circles and do not."""
    touch(tmp_path, "real/one/1.jpg")
    root = tmp_path / "set"
    (root / "two").mkdir(parents=True)
    (root / "one").symlink_to(tmp_path / "real" / "one")
    (root / "two" / "2.jpg").symlink_to(tmp_path / "real" / "one" / "1.jpg")
    (root / "two" / "circle").symlink_to(root)
    (root / "two" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert [item.source for item in list_folder(root).items] == ["one/1.jpg", "two/2.jpg", "two/gone.jpg"]


def test_given_classes_decide_the_labels(tmp_path: Path) -> None:
    """A validation folder takes training's labels, also where it lacks classes, and may bring no others."""
    touch(tmp_path, "c/1.jpg")
    listing = list_folder(tmp_path, ("a", "b", "c"))
    assert listing.class_names == ("a", "b", "c")
    assert [item.label for item in listing.items] == [2]
    with pytest.raises(DatasetInvalid, match="its class 'c' is not among the 2 classes"):
        list_folder(tmp_path, ("a", "b"))


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    """A folder without classes or without files is not a dataset."""
    with pytest.raises(DatasetInvalid, match="no folders for classes"):
        list_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DatasetInvalid, match="hold no files"):
        list_folder(tmp_path)


def test_both_splits_are_found(tmp_path: Path) -> None:
    """train/ beside val/ or test/ are the splits; train/ alone is a class like any other."""
    (tmp_path / "train").mkdir()
    assert find_splits(tmp_path) == (tmp_path, None)
    (tmp_path / "test").mkdir()
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "test")
    (tmp_path / "val").mkdir()
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "val")
