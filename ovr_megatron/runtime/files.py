"""Write text files atomically."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write ``path`` atomically and return it: a reader sees the old text or the new one, never a part."""
    # A rename within a folder replaces the file in one step.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)
