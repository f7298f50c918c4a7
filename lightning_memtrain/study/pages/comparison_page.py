"""The page of a comparison."""

from __future__ import annotations

from html import escape

from lightning_memtrain.study.comparison import Comparison
from lightning_memtrain.study.comparison_rows import (
    headings,
    memory_rows,
    module_rows,
    other_rows,
    technique_rows,
)
from lightning_memtrain.study.pages.figures import bars
from lightning_memtrain.study.pages.page_parts import card, page, table


def render_comparison(comparison: Comparison) -> str:
    """Write the page of a comparison.

    Args:
        comparison: of at least two runs.

    Returns:
        The whole page, which needs no network and no script.
    """
    figure = bars({run.name: run.at_peak for run in comparison.runs})
    rows = [*memory_rows(comparison), *other_rows(comparison)]
    cards = []
    if comparison.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
        cards.append(card("To be known", "", f"<ul>{notes}</ul>", "notes"))
    first = card("Peak by category", f"Stage: {comparison.stage}.", figure, "peaks")
    second = card(
        "Techniques", "", table(["Run", "Techniques"], technique_rows(comparison), left=[1]), "techniques"
    )
    cards.append(f'<div class="two"><div>{first}</div><div>{second}</div></div>')
    # Of its own, since it is wide: a column for each run.
    cards.append(card("Numbers", "", table(headings(comparison, ""), rows), "numbers"))
    modules = module_rows(comparison, types=True)
    if modules:
        note = "What each holds at the peak, matched by name; those that differ most."
        cards.append(card("Modules", note, table(headings(comparison, "Module"), modules), "modules"))
    names = " and ".join(run.name for run in comparison.runs)
    models = ", ".join(dict.fromkeys(run.model for run in comparison.runs))
    return page("Comparison", names, models, cards)
