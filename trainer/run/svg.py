"""A small writer of SVG documents, so that no figure needs a plotting library.

Each function returns one element as a string; ``document`` puts elements together. Positions and sizes are pixels.
Further attributes are keywords, with ``_`` for ``-`` (``stroke_width=1.5``). Text and attributes are escaped; floats are
rounded to a tenth of a pixel, which no screen shows, integers are kept.

>>> print(document(40, 20, [rect(0, 0, 40, 20, fill="red"), text(4, 12, "a & b")]), end="")
<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<rect x="0" y="0" width="40" height="20" fill="red"/>
<text x="4" y="12">a &amp; b</text>
</svg>
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

Value = str | float


def document(width: int, height: int, parts: Iterable[str]) -> str:
    """Return a document of ``width`` x ``height`` pixels on white, with the elements ``parts`` in their order."""
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([opening, element("rect", width="100%", height="100%", fill="white"), *parts, "</svg>\n"])


def group(parts: Iterable[str], **attributes: Value) -> str:
    """Return a group of elements, which share ``attributes`` such as ``transform``."""
    return "\n".join([f"<g{_written(attributes)}>", *parts, "</g>"])


def rect(x: float, y: float, width: float, height: float, **attributes: Value) -> str:
    """Return a rectangle whose top left corner is (x, y)."""
    return element("rect", x=x, y=y, width=width, height=height, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: Value) -> str:
    """Return a line from (x1, y1) to (x2, y2)."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def polyline(points: Iterable[tuple[float, float]], **attributes: Value) -> str:
    """Return lines from each point to the next, without a filled area."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", **{"points": places, "fill": "none"} | attributes)


def circle(x: float, y: float, radius: float, **attributes: Value) -> str:
    """Return a circle around (x, y)."""
    return element("circle", cx=x, cy=y, r=radius, **attributes)


def text(x: float, y: float, words: str, **attributes: Value) -> str:
    """Return a line of text whose baseline begins at (x, y), or ends there with ``text_anchor="end"``."""
    return element("text", words, x=x, y=y, **attributes)


def image(x: float, y: float, width: float, height: float, png: bytes, **attributes: Value) -> str:
    """Return a PNG file, scaled to ``width`` x ``height`` without smoothing: a matrix keeps its cells."""
    href = f"data:image/png;base64,{b64encode(png).decode()}"
    place: dict[str, Value] = {"x": x, "y": y, "width": width, "height": height}
    return element("image", **place, style="image-rendering:pixelated", href=href, **attributes)


def element(name: str, words: str = "", /, **attributes: Value) -> str:
    """Return any element, with ``words`` as its text; for what has no function here."""
    opening = f"<{name}{_written(attributes)}"
    return f"{opening}>{escape(words)}</{name}>" if words else f"{opening}/>"


def _written(attributes: dict[str, Value]) -> str:
    return "".join(f" {name.replace('_', '-')}={quoteattr(_shown(value))}" for name, value in attributes.items())


def _shown(value: Value) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
