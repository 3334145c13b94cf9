"""Figures as files and as parts of a page."""

from __future__ import annotations

import base64
import importlib.util
import json
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from trainer.errors import ReportError
from trainer.report.drawing import Figure, check_installed, drawing, places, tile


def figure(name: str = "boxes") -> Figure:
    rows = [{"x": 5, "y": 5, "x2": 60, "y2": 30, "fill": "#0072B2"}]
    layers = [places(rows, "rect"), places([{"x": 10, "y": 50, "text": "a <b> & 'c'"}], "text", align="left")]
    return Figure(name, "Boxes", "A box.", 'a "box" & words', drawing(layers, 100, 60), {"rows": rows})


def test_a_figure_is_written_in_three_forms(tmp_path: Path) -> None:
    """SVG and PNG show the same, JSON has the numbers behind it; the ground is white."""
    assert [path.name for path in figure().write(tmp_path)] == ["boxes.svg", "boxes.png", "boxes.json"]
    root = ElementTree.parse(tmp_path / "boxes.svg").getroot()
    assert [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")] == ["a <b> & 'c'"]
    with Image.open(tmp_path / "boxes.png") as image:
        assert image.size == (2 * round(float(root.attrib["width"])), 2 * round(float(root.attrib["height"])))
        pixels = np.asarray(image.convert("RGB"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert (pixels == (0, 0x72, 0xB2)).all(2).any()
    assert json.loads((tmp_path / "boxes.json").read_bytes())["rows"][0]["x2"] == 60


def test_a_part_of_a_page_takes_its_colours_and_has_its_own_ids() -> None:
    """Text has the page's colour, the alternative text is escaped, and ids of two figures cannot meet."""
    part = figure().inline_svg()
    root = ElementTree.fromstring(part)
    assert root.attrib["aria-label"] == 'a "box" & words'
    assert root.attrib["role"] == "img"
    assert "width" not in root.attrib
    assert 'fill="currentColor"' in part
    assert 'fill="var(--blue)"' in part
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert all(each.startswith("boxes-") for each in ids)


@pytest.mark.parametrize("lossless", [True, False])
def test_a_tile_holds_its_picture(lossless: bool) -> None:
    """A tile is a data URI of the picture at the asked size."""
    uri = tile(np.full((20, 30, 3), 200, np.uint8), 40, lossless)
    with Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert (image.size, image.format) == ((40, 40), "PNG" if lossless else "JPEG")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error says which package is missing and how to install it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vl_convert" else find(name))
    with pytest.raises(ReportError, match=r"vl_convert cannot be imported; pip install 'loader-service\[report\]'"):
        check_installed()
