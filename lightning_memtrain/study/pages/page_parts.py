"""What pages of several runs are made of, in the style of a memory report; without network and script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files


def page(overline: str, heading: str, summary: str, body: Sequence[str]) -> str:
    """Put cards into a page.

    Args:
        overline: what kind of page it is.
        heading: what it is about.
        summary: a line below.
        body: elements, whose texts are escaped already.

    Returns:
        The whole page, which forbids itself any request and any script.
    """
    parts = {
        "title": escape(f"{overline}: {heading}"),
        "style": report_style() + figure_style() + _asset("page.css"),
        "overline": escape(overline),
        "heading": escape(heading),
        "summary": escape(summary),
        "body": "\n".join(body),
    }
    # One pass over the template, so that no name of a run can be taken for a placeholder.
    pieces = _asset("page.html").split("%%")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def card(title: str, note: str, content: str, name: str) -> str:
    """A section with a title; the note and the title are escaped, the content is not."""
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card" id="{name}"><h2>{escape(title)}</h2>{remark}{content}</section>'


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (),
    styles: Sequence[str] = (),
) -> str:
    """A table whose first cells are names.

    Args:
        headings: of the columns.
        rows: texts, which are escaped here.
        left: columns of words, which begin at the left.
        styles: of the rows: ``"front"`` for a star, ``"failed"`` for red words, ``""`` for neither.

    Returns:
        The element.
    """

    def cell(tag: str, index: int, text: str, more: str = "") -> str:
        style = "name" if index == 0 else "text" if index in left else ""
        kind = f' class="{style}"' if style else ""
        shown = escape(text)
        if index == 0:
            shown = shown.replace(".", ".<wbr>")  # a long path may break after its dots
        return f"<{tag}{kind}{more}>{shown}</{tag}>"

    head = "".join(cell("th", index, text, ' scope="col"') for index, text in enumerate(headings))
    body = []
    for number, row in enumerate(rows):
        style = f' class="{styles[number]}"' if number < len(styles) and styles[number] else ""
        cells = [cell("th", 0, row[0], ' scope="row"')]
        cells += [cell("td", index, text) for index, text in enumerate(row) if index]
        body.append(f"<tr{style}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def standalone(figure: str) -> str:
    """A figure as a file of its own, with its colours in it."""
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', figure)
    assert size is not None
    width, height = int(size[1]), int(size[2])
    margin = 12
    opened = figure.replace(
        size[0], f'viewBox="{-margin} {-margin} {width + 2 * margin} {height + 2 * margin}"', 1
    ).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    end_of_tag = opened.index(">") + 1
    ground = (
        f'<rect x="{-margin}" y="{-margin}" width="{width + 2 * margin}" height="{height + 2 * margin}" '
        'style="fill:var(--card)"/>'
    )
    style = f"<style>{_colours()}{figure_style()}</style>"
    return f"{opened[:end_of_tag]}{style}{ground}{opened[end_of_tag:]}\n"


def report_style() -> str:
    """The style of a memory report's page."""
    return (files("lightning_memtrain.report.outputs") / "report.css").read_text(encoding="utf-8")


def figure_style() -> str:
    """The style of figures, whose colours are those of the page."""
    return _asset("figure.css")


def _asset(name: str) -> str:
    return (files("lightning_memtrain.study.pages") / name).read_text(encoding="utf-8")


def _colours() -> str:
    """The variables out of the report's style, for light and for dark."""
    style = report_style()
    return style[: style.index("* { box-sizing")]
