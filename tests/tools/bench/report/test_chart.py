"""The chart of the benchmark."""

from __future__ import annotations

from xml.etree import ElementTree

from tools.bench.contest import Kind
from tools.bench.report.chart import COLOURS, Row, draw


def test_every_contestant_has_its_bars_and_figures() -> None:
    """Each row has its name and three figures; a figure of 0 is still seen; the caption is there."""
    rows = [
        Row("this project", Kind.OURS, 73_000, 0.031, 812),
        Row("a & b", Kind.PEER, 0, 0.09, 2_000),
        Row("memcpy", Kind.LIMIT, 94_000, 0.01, 100),
    ]
    document = draw({"raw records": rows, "none": []}, "two cores")
    root = ElementTree.fromstring(document)
    words = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in (
        "raw records",
        "images/s",
        "this project",
        "a & b",
        "73,000",
        "0",
        "0.031",
        "2,000",
        "limits of the machine",
        "two cores",
    ):
        assert word in words, word
    bars = [path.attrib["fill"] for path in root.iter("{http://www.w3.org/2000/svg}path") if "fill" in path.attrib]
    assert all(bars.count(COLOURS[kind]) == 3 + 1 for kind in Kind)  # and one in the legend
