"""Format numbers as people read them: shares, durations and sizes, a dash for a number that is not there."""

from __future__ import annotations

NOTHING = "\N{EN DASH}"


def format_number(value: float | None, form: str) -> str:
    """Return a number in a format such as ``.3f``, or a dash."""
    return NOTHING if value is None else format(value, form)


def percent(value: float | None) -> str:
    """Return ``87.2 %``, or a dash."""
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Return ``45 s``, ``14 min`` or ``2 h 5 min``, or a dash."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    # Rounded before it is split: 59.7 minutes are 1 h 0 min, not 60 min.
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min"


def gigabytes(size: float | None) -> str:
    """Return ``5.1 GB``, or a dash."""
    if size is None:
        return NOTHING
    return f"{size / 1e9:.1f} GB"
