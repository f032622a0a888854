"""The sizes of the published models of all families, from their ``config.json`` on Hugging Face.  No torch."""

from __future__ import annotations

import json
from pathlib import Path

from ovr_megatron.families import families, titles


def presets() -> dict[str, dict[str, object]]:
    """Return ``config.json`` of every published model by its name, as 7B."""
    configs: dict[str, dict[str, object]] = {}
    for family in families():
        configs |= family.presets
    return configs


def write_config(name: str, directory: str | Path) -> Path:
    """Write ``config.json`` of the published model ``name`` to ``directory``; return its path.

    Raises:
        ValueError: no model of that name.
    """
    configs = presets()
    if name not in configs:
        raise ValueError(f"{name!r} is no {titles()}; choose one of {', '.join(configs)}")
    path = Path(directory) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(configs[name], indent=2) + "\n")
    return path
