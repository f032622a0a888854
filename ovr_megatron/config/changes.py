"""List the settings in which two resolved configurations differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_VALUE = 80  # characters of a value


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``key before -> after`` for every setting that differs, also those that one side does not have."""
    old = dict(_flatten(before))
    new = dict(_flatten(after))
    # In the order of the first side, then what the second alone has.
    keys = dict.fromkeys([*old, *new])
    for key in keys:
        if key == "run.dir" or old.get(key) == new.get(key):
            continue
        old_text = _shorten(old[key]) if key in old else "(not set)"
        new_text = _shorten(new[key]) if key in new else "(not set)"
        yield f"{key} {old_text} -> {new_text}"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting with its dotted key."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shorten(value: Any) -> str:
    text = value
    if not isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _MAX_VALUE:
        return f"{text[:_MAX_VALUE]}..."
    return text
