"""The page: well formed, self-contained, and readable without its pictures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from trainer.report.drawing import Figure, drawing, places
from trainer.report.page import Section, Shown, page, table

VOID = {"meta", "br", "link", "input", "img", "image", "path", "rect", "line", "stop", "circle"}


class Reader(HTMLParser):
    """A reader that checks that elements nest, and notes attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def figure(name: str) -> Figure:
    spec = drawing([places([{"x": 1, "y": 9, "text": "word"}], "text")], 40, 20)
    return Figure(name, "Title & more", "Caption <here>.", "instead", spec, {}, [["n", "name"], ["1,000", "x"]])


def made(*sections: Section, missing: tuple[str, ...] = ()) -> str:
    facts = [("12.5%", "top-1 error")]
    return page("Report of <run>", "a subtitle", facts, [["run"], ["r"]], missing, sections, "made by a test")


def test_the_page_needs_nothing_else() -> None:
    """No script runs and nothing is loaded: the only addresses are anchors, and files beside the page that exist with it."""
    document = made(Section("one", "One", [Shown(figure("a"))]))
    reader = Reader()
    reader.feed(document)
    assert reader.open == []
    links = {value for _, name, value in reader.attributes if name in ("href", "src", "xlink:href")}
    assert links == {"#one", "a.svg", "a.png", "a.json"}
    assert "<script" not in document
    assert "default-src 'none'" in document
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", document)


def test_the_page_is_dark_light_and_printable() -> None:
    """The style follows the reader's system, and paper gets a style of its own."""
    document = made()
    assert "color-scheme: light dark" in document
    assert "@media (prefers-color-scheme: dark)" in document
    assert "@media print" in document


def test_words_are_escaped_and_pictures_have_texts() -> None:
    """Titles, captions and what is left out are shown as they are; each picture has its alternative text."""
    document = made(Section("one", "One", [Shown(figure("a"), "run <1>")]), missing=("no <checkpoint>",))
    reader = Reader()
    reader.feed(document)
    for words in ("Report of <run>", "Caption <here>.", "run <1>", "no <checkpoint>", "12.5%"):
        assert words in reader.text
    assert ("svg", "aria-label", "instead") in reader.attributes
    assert ("html", "lang", "en") in reader.attributes


def test_several_runs_stand_side_by_side() -> None:
    """A section of several figures makes the page wide; one of one does not."""
    two = Section("one", "One", [Shown(figure("a"), "r"), Shown(figure("b"), "s")])
    assert '<html lang="en" class="several">' in made(two)
    assert '<html lang="en">' in made(Section("one", "One", [Shown(figure("a"))]))


def test_numbers_are_aligned_at_the_right() -> None:
    """A column of numbers is marked as such, one of words is not."""
    assert table([["n", "name"], ["1,000", "x"], ["", "y"]]).count("class=number") == 3
