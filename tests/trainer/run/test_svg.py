"""The SVG writer makes documents that any XML parser reads."""

from __future__ import annotations

import doctest
from base64 import b64decode
from xml.etree import ElementTree

from trainer.run import svg

SVG = "{http://www.w3.org/2000/svg}"


def parsed(*parts: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.document(100, 50, parts))


def test_the_example_of_the_module_holds() -> None:
    """The docstring's document is what the functions write."""
    assert doctest.testmod(svg).failed == 0


def test_a_document_has_its_size_and_a_white_ground() -> None:
    """An empty document is a white rectangle of the given size."""
    root = parsed()
    assert (root.tag, root.get("width"), root.get("height")) == (f"{SVG}svg", "100", "50")
    assert [(part.tag, part.get("fill")) for part in root] == [(f"{SVG}rect", "white")]


def test_text_and_attributes_are_escaped() -> None:
    """Names of classes may hold any character."""
    words = "<a> & \"b\" 'c'"
    root = parsed(svg.text(1, 2, words, font_family=words))
    assert root[1].text == words
    assert root[1].get("font-family") == words


def test_numbers_are_pixels() -> None:
    """Floats are rounded to a tenth, integers are kept, and an underscore in a keyword becomes a hyphen."""
    assert (
        svg.rect(1, 2.04, 3.06, 4, stroke_width=1.5)
        == '<rect x="1" y="2.0" width="3.1" height="4" stroke-width="1.5"/>'
    )
    assert svg.line(0, 0, 1, 1, stroke="black") == '<line x1="0" y1="0" x2="1" y2="1" stroke="black"/>'
    assert svg.circle(1, 2, 3) == '<circle cx="1" cy="2" r="3"/>'
    assert svg.polyline([(0, 1), (2.55, 3)]) == '<polyline points="0.0,1.0 2.5,3.0" fill="none"/>'


def test_groups_hold_their_parts() -> None:
    """A group's attributes are its own; its parts are its children."""
    root = parsed(svg.group([svg.rect(0, 0, 1, 1), svg.text(0, 0, "a")], transform="translate(3 4)"))
    assert root[1].get("transform") == "translate(3 4)"
    assert [part.tag for part in root[1]] == [f"{SVG}rect", f"{SVG}text"]


def test_images_are_part_of_the_document() -> None:
    """The bytes of a PNG file stand in the document, so it is one file."""
    (image,) = parsed(svg.image(0, 0, 10, 10, b"png")).findall(f"{SVG}image")
    assert b64decode(image.attrib["href"].split(",")[1]) == b"png"
