"""Numbers of a study as they are printed."""

from __future__ import annotations

from lightning_memtrain.study.grid import Score


def times(factor: float | None) -> str:
    """Write how many times as much something is.

    Args:
        factor: how many times as much; ``None`` if that is not known.

    Returns:
        The factor, or nothing.

    Example:
        >>> times(44.04), times(1.5), times(0.987), times(None)
        ('44.0x', '1.50x', '0.99x', '')
    """
    if factor is None:
        return ""
    return f"{factor:.1f}x" if factor >= 10 else f"{factor:.2f}x"


def short_score(score: Score, value: float, spread: float | None = None) -> str:
    """Write a score as it is shown.

    Args:
        score: what it is a value of.
        value: as it was logged.
        spread: of several seeds; ``None`` if there is only one.

    Returns:
        The value with its unit.

    Example:
        >>> accuracy = Score("test/accuracy", percent=True)
        >>> short_score(accuracy, 0.7491), short_score(accuracy, 0.7491, 0.0037)
        ('74.91 %', '74.91 ± 0.37 %')
    """
    digits = ".2f" if score.percent else ".4g"
    text = format(score.shown(value), digits)
    if spread is not None:
        text += f" ± {format(score.shown(spread), digits if score.percent else '.2g')}"
    return f"{text} %" if score.percent else text
