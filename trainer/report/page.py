"""The page: one HTML file with all figures inside, which needs no network, no script and no other file.

It is dark or light as the reader's system is, and light on paper. Wide figures scroll on narrow screens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from trainer.report.drawing import Figure

STYLE: Final = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --card: #f6f8fa;
  --accent: #0072b2; --warn: #a04000; --blue: #0072B2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f1419; --ink: #e6e8eb; --faint: #9aa4af; --line: #313942; --card: #181f27; --accent: #63b3ed;
    --warn: #f0a35e; --blue: #4aa3df; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
main, header, footer { max-width: 1000px; margin: 0 auto; padding: 0 24px; }
.several main, .several header, .several footer { max-width: 1880px; }
header { padding-top: 36px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 0 0 8px; color: var(--faint); font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 12px; }
.faint, figcaption, footer { color: var(--faint); }
a { color: var(--accent); }
nav { margin: 16px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 22px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile span { color: var(--faint); font-size: .86rem; }
.missing { border-left: 4px solid var(--warn); background: var(--card); padding: 10px 16px; margin: 18px 0; border-radius: 0 8px 8px 0; }
.missing ul { margin: 4px 0 0; padding-left: 20px; }
section { border-top: 1px solid var(--line); padding: 28px 0 20px; }
.row { display: grid; gap: 32px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 620px), 1fr)); }
figure { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; margin: 14px 0 8px; }
.scroll svg { display: block; width: 100%; height: auto; overflow: visible;
  max-width: var(--width); min-width: min(600px, var(--width)); }
figcaption { font-size: .95rem; max-width: 46rem; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
.files { font-size: .85rem; }
footer { padding-top: 18px; padding-bottom: 40px; border-top: 1px solid var(--line); font-size: .9rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 640px) { main, header, footer { padding-left: 14px; padding-right: 14px; } h1 { font-size: 1.5rem; } }
@media print {
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --faint: #444444; --line: #bbbbbb; --card: #ffffff; --blue: #0072B2; }
  body { font-size: 11pt; }
  main, header, footer { max-width: none; padding: 0; }
  .row { display: block; }
  nav, .files, summary { display: none; }
  figure, .tile, h2 { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .scroll svg { min-width: 0; max-height: 22cm; }
  section { border: 0; padding: 12px 0; }
  @page { margin: 16mm; }
}
"""


@dataclass(frozen=True)
class Shown:
    """A figure in the page, and the run that it belongs to; an empty name if it shows all runs."""

    figure: Figure
    run: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: an anchor, a heading, and its figures, side by side if there are several."""

    anchor: str
    title: str
    figures: Sequence[Shown]


def page(
    title: str,
    subtitle: str,
    facts: Sequence[tuple[str, str]],
    comparison: Sequence[Sequence[str]],
    missing: Sequence[str],
    sections: Sequence[Section],
    made_by: str,
) -> str:
    """Return the page as an HTML document.

    Args:
        title: heading.
        subtitle: line below it.
        facts: values and what they are, shown in large type; of one run.
        comparison: table with a row for each run, the first row its headings; empty for one run.
        missing: sentences that say what is left out, and why.
        sections: figures.
        made_by: sentence for the end of the page.
    """
    several = ' class="several"' if any(len(section.figures) > 1 for section in sections) else ""
    tiles = "".join(f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in facts)
    links = "".join(f'<a href="#{each.anchor}">{escape(each.title)}</a>' for each in sections)
    parts = [
        "<!doctype html>",
        f'<html lang="en"{several}>',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing is loaded, from anywhere: all pictures are in the page.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>",
        f"<body><header><h1>{escape(title)}</h1><p class=faint>{escape(subtitle)}</p>",
        f'<nav aria-label="Figures">{links}</nav></header>',
        f"<main>{f'<div class=tiles>{tiles}</div>' if tiles else ''}",
        f"<div class=scroll tabindex=0>{table(comparison)}</div>" if comparison else "",
        _missing(missing),
        *(_section(each) for each in sections),
        f"</main><footer>{escape(made_by)}</footer></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _missing(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class=missing role="note"><b>Left out of this report</b><ul>{items}</ul></div>'


def _section(section: Section) -> str:
    figures = "".join(_figure(shown) for shown in section.figures)
    return (
        f'<section id="{section.anchor}" aria-label="{escape(section.title)}"><h2>{escape(section.title)}</h2>'
        f"<div class=row>{figures}</div></section>"
    )


def _figure(shown: Shown) -> str:
    figure = shown.figure
    files = ", ".join(f'<a href="{figure.name}.{kind}">{figure.name}.{kind}</a>' for kind in ("svg", "png", "json"))
    heading = f"<h3>{escape(shown.run)}</h3>" if shown.run else ""
    numbers = f"<details><summary>Numbers</summary>{table(figure.table)}</details>" if figure.table else ""
    return (
        f'<figure>{heading}<div class=scroll tabindex=0 role="group" aria-label="{escape(figure.title)}">'
        f"{figure.inline_svg()}</div><figcaption>{escape(figure.caption)}</figcaption>{numbers}"
        f'<p class="files faint">{files}</p></figure>'
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as an HTML table, the first one as its headings; columns of numbers are aligned at the right."""
    head, *body = rows
    numeric = [all(_is_number(row[at]) for row in body) for at in range(len(head))]

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (" class=number" if number else "" for number in numeric)
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{lines}</tbody></table>"


def _is_number(cell: str) -> bool:
    return not cell or cell.replace(",", "").replace(".", "").removesuffix("%").strip().isdecimal()
