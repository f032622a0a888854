"""Write settings as YAML, in which values of environment variables stay as they were written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

KeyPath = tuple[str, ...]  # from the root to one setting; the index of a list is a key


@dataclasses.dataclass(frozen=True)
class EnvironmentSetting:
    """A setting with an environment variable in it: its resolved value, and its text in the recipe."""

    value: Any
    text: str


# Of the process, not of a configuration: a checked dataclass has nothing but its fields.
_environment: dict[KeyPath, EnvironmentSetting] = {}


def remember_environment(config: DictConfig) -> None:
    """Remember how settings with environment variables are written: files show that, not the variables' values."""
    if "oc.env" not in OmegaConf.to_yaml(config):
        return
    written = OmegaConf.to_container(config, resolve=False)
    resolved = dict(_leaves(OmegaConf.to_container(config, resolve=True)))
    for path, text in _leaves(written):
        if isinstance(text, str) and "${" in text and path in resolved:
            _environment[path] = EnvironmentSetting(resolved[path], text)


def text_as_written(path: KeyPath, value: Any) -> Any:
    """Return the text of the setting at ``path`` if an environment variable is in it, else ``value``."""
    setting = _environment.get(path)
    return value if setting is None else setting.text


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each setting below ``value`` that is no dictionary or list, with its path."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, (*path, str(key)))


def _as_written(value: Any, path: KeyPath = ()) -> Any:
    """Return ``value`` with the settings of `remember_environment` as they were written.

    A setting that has changed since, as ``dataclasses.replace`` does, is written with its new value.
    """
    if isinstance(value, dict):
        written = {}
        for key, item in value.items():
            written[key] = _as_written(item, (*path, str(key)))
        return written
    if isinstance(value, list):
        items = []
        for index, item in enumerate(value):
            items.append(_as_written(item, (*path, str(index))))
        return items
    setting = _environment.get(path)
    if setting is not None and str(setting.value) == str(value):
        return setting.text
    return value


def as_yaml(config: Any) -> str:
    """Return the checked ``config`` as YAML; values of environment variables stay ``${oc.env:NAME}``."""
    written = _as_written(dataclasses.asdict(config))
    return OmegaConf.to_yaml(OmegaConf.create(written))


def save(config: Any, path: Path) -> None:
    """Write the resolved ``config`` as YAML to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_yaml(config))
