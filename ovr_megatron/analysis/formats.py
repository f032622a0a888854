"""Format numbers as people read them: shares, durations and sizes, a dash for a number that is not there."""

from __future__ import annotations

NOTHING = "\N{EN DASH}"


def percent(value: float | None) -> str:
    """Return ``87.2 %``, or a dash."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Return ``45 s``, ``14 min`` or ``2 h 5 min``, or a dash."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def gigabytes(size: float | None) -> str:
    """Return ``5.1 GB``, or a dash."""
    return NOTHING if size is None else f"{size / 1e9:.1f} GB"
