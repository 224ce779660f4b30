"""The HTML report of a comparison: pictures, tables and style in one file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from training.comparison import COLUMNS, Column, Row, Spread, best_cells, column_titles, differences, reading

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1500px;
       margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92em; }
td small { font-weight: 400; color: #555; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3em 0.8em; text-align: left; vertical-align: top; }
table.figures td { white-space: nowrap; }
table.figures td:nth-child(n+2), table.figures th:nth-child(n+2) { text-align: right; }
thead th { border-bottom: 2px solid #888; }
td.best { font-weight: 700; }
tr.differs { background: #fff3cd; }
.note { color: #555; font-size: 0.92em; }
svg { width: 100%; height: auto; }
""".strip()


def html_report(
    title: str,
    rows: Sequence[Row],
    pictures: Mapping[str, bytes],
    notes: Sequence[str] = (),
    command: str = "",
) -> str:
    """The whole report as one HTML document.

    Args:
        rows: the compared groups.
        pictures: title -> SVG file content, drawn inline in this order.
        notes: remarks for the reader, such as logs that were left out.
        command: the command line that made the report.
    """
    count = sum(len(row.group.runs) for row in rows)
    remarks = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{count} runs in {len(rows)} lines. Runs that differ only in their seed share a line: "
        "mean (lowest to highest).</p>",
        f'<p class="note">Made by <code>{escape(command)}</code></p>' if command else "",
        f"<ul>\n{remarks}</ul>" if remarks else "",
        "<h2>Figures</h2>",
        _figures_table(rows),
        '<p class="note">Accuracies are of the validation images. The best epoch is chosen on these same '
        "images, so the final figure is the fairer one. images/s is the median over epochs, time that of "
        "the whole run.</p>",
        "".join(f"<p>{escape(sentence)}</p>\n" for sentence in reading(rows)),
        *(_picture(place, name, svg) for place, (name, svg) in enumerate(pictures.items())),
        _arguments(rows),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def inline_svg(svg: bytes, prefix: str, label: str) -> str:
    """An SVG file as an element of a page: no prolog, names of its own, a label for screen readers."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _figures_table(rows: Sequence[Row]) -> str:
    best = best_cells(rows)
    head = "".join(f"<th>{escape(title)}</th>" for title in column_titles())
    lines = []
    for at, row in enumerate(rows):
        tds = [f"<td>{escape(row.group.label)}</td>", f"<td>{escape(row.epochs)}</td>"]
        for place, column in enumerate(COLUMNS, len(tds)):
            opening = '<td class="best">' if (at, place) in best else "<td>"
            tds.append(f"{opening}{_figure(row.spreads[column.key], column)}</td>")
        lines.append(f"<tr>{''.join(tds)}</tr>")
    return _table("figures", head, lines)


def _figure(spread: Spread | None, column: Column) -> str:
    """The mean, with the range in small letters below it, so that the table stays narrow."""
    if spread is None:
        return "-"
    ends = spread.range_text(column)
    return escape(column.text(spread.mean)) + (f"<br><small>{escape(ends)}</small>" if ends else "")


def _arguments(rows: Sequence[Row]) -> str:
    """Table of what differs, highlighted, and behind a click the rest."""
    head = "<th></th>" + "".join(f"<th>{escape(row.group.label)}</th>" for row in rows)
    differing, equal = [], []
    for name, texts, differs in differences([row.group for row in rows]):
        tds = "".join(f"<td>{escape(text)}</td>" for text in texts)
        line = f"<tr{' class=differs' if differs else ''}><th>{escape(name)}</th>{tds}</tr>"
        (differing if differs else equal).append(line)
    if not differing and not equal:
        return "<h2>Arguments</h2>\n<p>The logs hold no arguments.</p>"
    shown = _table("arguments", head, differing) if differing else "<p>No logged argument differs.</p>"
    rest = ""
    if equal:
        summary = "<summary>Seeds, places, what is equal and what only some logs tell</summary>"
        rest = f"<details>{summary}\n{_table('arguments', head, equal)}\n</details>"
    return f"<h2>Arguments that differ</h2>\n{shown}\n{rest}"


def _picture(place: int, name: str, svg: bytes) -> str:
    return f"<h2>{escape(name)}</h2>\n{inline_svg(svg, f'p{place}-', name)}"


def _table(kind: str, head: str, lines: Sequence[str]) -> str:
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
