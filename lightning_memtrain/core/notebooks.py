"""Showing a result where its user is: in a notebook or in a terminal."""

from __future__ import annotations

import html
import sys
from typing import Any


def show(result: Any, text: str) -> None:
    """Show something: drawn in a notebook, printed elsewhere.

    Args:
        result: what has a ``_repr_html_``.
        text: what is printed.
    """
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        print(text)
    else:
        ipython.display.display(result)


def framed(page: str, height_pixels: int = 720) -> str:
    """Put a whole page into a notebook's cell.

    Args:
        page: which needs nothing but itself.
        height_pixels: of the frame.

    Returns:
        The frame, in which the page has its own styles and scripts.
    """
    return (
        f'<iframe srcdoc="{html.escape(page)}" style="width:100%;height:{height_pixels}px;border:0" '
        'sandbox="allow-scripts"></iframe>'
    )
