"""Give a model folder more positions with YaRN."""

from __future__ import annotations

import json
from pathlib import Path

from ovr_megatron.config import ConfigError
from ovr_megatron.families import ModelShape


def stretch_positions(directory: str | Path, factor: float) -> ModelShape:
    """Write YaRN with ``factor`` into ``config.json`` of ``directory``, over any YaRN in it.

    From then on it is read by this project, Transformers and vLLM, and exports have it, too.

    Raises:
        ConfigError: ``factor`` stretches nothing.
        ShapeError: as `ModelShape.from_hf`.
    """
    if not factor > 1:
        raise ConfigError(f"--yarn {factor:g} gives no more positions; it must be above 1")
    original = ModelShape.from_hf(directory).trained_positions
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config") or config
    # The outer level may repeat fields of the nested one; both must agree afterwards.
    parts = [text]
    if text is not config:
        parts.append(config)
    positions = int(factor * original)
    for part in parts:
        # Transformers 4 says rope_scaling, 5 rope_parameters.
        for name in ("rope_scaling", "rope_parameters"):
            if part.get(name):
                part[name] = _stretched(part[name], factor, original)
        if part is text or "max_position_embeddings" in part:
            part["max_position_embeddings"] = positions
    content = json.dumps(config, indent=2, ensure_ascii=False)
    path.write_text(content + "\n")
    return ModelShape.from_hf(directory)


def _stretched(rope: dict[str, object], factor: float, original: int) -> dict[str, object]:
    """Return the rotary part with YaRN, its type under the field names that it has."""
    stretched: dict[str, object] = {}
    # Nothing else stays: options of another YaRN would not fit this factor.
    for name in ("rope_theta", "mrope_section", "mrope_interleaved"):
        if name in rope:
            stretched[name] = rope[name]
    kinds = [name for name in ("type", "rope_type") if name in rope] or ["rope_type"]
    stretched |= dict.fromkeys(kinds, "yarn")
    stretched["factor"] = factor
    stretched["original_max_position_embeddings"] = original
    return stretched
