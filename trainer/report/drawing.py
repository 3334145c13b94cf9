"""Figures: a chart with its words and data, written as SVG and PNG or put into a page.

Charts are made with Altair and rendered by vl-convert, which needs neither a browser nor a network. Both are imported by the
functions that draw: the import takes half a second, and a machine that only trains needs neither of them.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; nothing is told by colour alone.
"""

from __future__ import annotations

import importlib.util
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import quoteattr

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.errors import ReportError
from trainer.run.folder import write_atomically

BLUE: Final = "#0072B2"
ORANGE: Final = "#D55E00"
GREEN: Final = "#009E73"
PINK: Final = "#CC79A7"
SKY: Final = "#56B4E9"
YELLOW: Final = "#E69F00"
GREY: Final = "#8A8F98"
SERIES: Final = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
"""Colours of several runs, in order; darker ones first, which are legible on white and on black."""

WIDTH_PX: Final = 860
"""Width of a figure's contents."""

TIMES: Final = " \N{MULTIPLICATION SIGN} "

_FONT: Final = "Helvetica, Arial, 'Liberation Sans', sans-serif"
_INK: Final = "#1f2328"
_SCALE: Final = 2
"""Pixels of a PNG per unit of the SVG, for screens of high density."""

_INHERITED: Final = "currentColor"
"""The colour of text in a page, which may be dark or light."""

_JPEG_QUALITY: Final = 85
_PNG_LEVEL: Final = 4  # of zlib: the highest take ten times as long for a tenth of the size

Spec = dict[str, Any]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Fields:
        name: stem of its files.
        title: heading.
        caption: sentences that say what is shown and how to read it.
        alt: text in place of the picture, for people who do not see it.
        spec: chart as a Vega-Lite specification.
        data: numbers behind the picture, as plain values.
        table: rows of a table to show below the picture, the first one its headings; empty for none.
    """

    name: str
    title: str
    caption: str
    alt: str
    spec: Spec
    data: Any
    table: Sequence[Sequence[str]] = ()

    def svg(self) -> str:
        """Return the figure as an SVG document on white."""
        return render(self.spec)

    def inline_svg(self) -> str:
        """Return the figure as an SVG element for a page: no ground, text in the page's colour, and ids of its own."""
        picture = _render(self.spec, _INHERITED, "transparent")
        picture = re.sub(r'id="', f'id="{self.name}-', picture).replace("url(#", f"url(#{self.name}-")
        picture = picture.replace(f'"{BLUE}"', '"var(--blue)"')  # too dark for a dark page
        size = re.search(r'width="([\d.]+)" height="([\d.]+)"', picture)
        assert size is not None, "vl-convert states the size of its documents"
        # The view box keeps the proportions; a narrow screen makes the picture smaller.
        words = f'style="--width:{float(size[1]):g}px" role="img" aria-label={quoteattr(self.alt)}'
        return picture.replace(size[0], words, 1)

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.svg, NAME.png and NAME.json into a folder, and return their paths."""
        picture = self.svg()
        contents = {
            "svg": picture.encode(),
            "png": _png(picture),
            "json": msgspec.json.format(msgspec.json.encode(self.data), indent=1) + b"\n",
        }
        paths = [folder / f"{self.name}.{kind}" for kind in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            write_atomically(path, content)
        return paths


def check_installed() -> None:
    """Raise ReportError if the packages that draw are missing."""
    missing = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        raise ReportError(
            f"{' and '.join(missing)} cannot be imported; pip install 'loader-service[report]' brings them"
        )


def tile(pixels: Pixels, side: int | None = None, lossless: bool = False) -> str:
    """Return a picture as a data URI.

    Args:
        pixels: (height, width, 3) uint8, R, G, B; with a fourth channel for transparency, if ``lossless``.
        side: side of the result, in pixels; None keeps the size. It is drawn at half of that, see the PNG's scale.
        lossless: write a PNG, for small drawings, not a JPEG.
    """
    image = Image.fromarray(pixels)
    if side is not None and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    file = BytesIO()
    if lossless:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{b64encode(file.getvalue()).decode()}"


def places(rows: Sequence[Mapping[str, Any]], mark: str, **properties: Any) -> Any:
    """Return marks at places in pixels, from the top left corner.

    Args:
        rows: for each mark ``x`` and ``y``, and as they apply ``x2``, ``y2``, ``text``, ``url``, ``fill`` and ``stroke``.
        mark: Vega-Lite's type of the marks.
        properties: properties of all marks.
    """
    import altair as alt

    chart = alt.Chart(alt.Data(values=list(rows)))
    encoding: dict[str, Any] = {
        "x": alt.X("x:Q", scale=None, axis=None),
        "y": alt.Y("y:Q", scale=None, axis=None),
    }
    present = rows[0].keys() if rows else ()
    channels = {
        "x2": alt.X2("x2"),
        "y2": alt.Y2("y2"),
        "text": alt.Text("text:N"),
        "url": alt.Url("url:N"),
        "fill": alt.Fill("fill:N", scale=None),
        "stroke": alt.Stroke("stroke:N", scale=None),
    }
    encoding |= {name: channel for name, channel in channels.items() if name in present}
    if "order" in present:  # points of outlines
        encoding |= {"order": alt.Order("order:Q"), "detail": alt.Detail("outline:N")}
    return getattr(chart, f"mark_{mark}")(**properties).encode(**encoding)


def drawing(layers: Sequence[Any], width: float, height: float) -> Spec:
    """Return layers of ``places`` as a specification of a drawing of that size, in pixels."""
    import altair as alt

    return spec_of(alt.layer(*layers).properties(width=width, height=height))


def spec_of(chart: Any) -> Spec:
    """Return an Altair chart as a plain Vega-Lite specification."""
    spec: Spec = chart.to_dict(validate=False)  # the same form every time; its check takes seconds
    spec.pop("config", None)  # the rendering has its own
    return spec


def render(spec: Spec) -> str:
    """Return a specification as an SVG document, dark on white."""
    return _render(spec, _INK, "white")


def _render(spec: Spec, ink: str, ground: str) -> str:
    import vl_convert

    picture: str = vl_convert.vegalite_to_svg(spec, config=_config(ink, ground))
    return picture


def _png(picture: str) -> bytes:
    import vl_convert

    content = BytesIO(vl_convert.svg_to_png(picture, scale=_SCALE))
    file = BytesIO()
    Image.open(content).convert("RGB").save(file, "PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


def _config(ink: str, ground: str) -> Spec:
    """Return Vega-Lite's configuration: one font, quiet axes, and text in ``ink`` on ``ground``."""
    faint = {"gridColor": GREY, "gridOpacity": 0.3, "domainColor": GREY, "tickColor": GREY}
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": 600}
    return {
        "background": ground,
        "font": _FONT,
        "mark": {"aria": False},  # the picture has one text for all of its marks
        "text": {"color": ink, "fontSize": 12},
        "point": {"color": ink},
        "view": {"stroke": None},
        "axis": faint | words,
        "legend": words | {"symbolStrokeWidth": 2.5, "symbolSize": 120},
        "header": words,
        "title": {"color": ink, "fontSize": 14, "anchor": "start", "fontWeight": 600, "offset": 8, "frame": "group"},
        "concat": {"spacing": 16},
    }
