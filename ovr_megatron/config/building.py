"""Build settings: defaults of a schema, the checked dataclass of given values, and the refusal of unknown keys."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ovr_megatron.config.checks import ConfigError, require
from ovr_megatron.config.writing import remember_environment, text_as_written
from ovr_megatron.keys import unknown_setting

# Exceptions of `_check_values`: a reward may be below 0, and these counts have no size that must fit into memory.
SIGNED = ("wrong_reward",)
UNBOUNDED = ("seed", "expected_samples", "max_requests", "max_total_tokens")
LARGEST = 2**31 - 1


def defaults(schema: type) -> dict[str, Any]:
    """Return every key of ``schema`` with its default, nested; a value that must be given is ``???`` (Hydra's mark)."""
    hints: dict[str, Any] = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = _as_dict(field.default_factory())
        else:
            hint = hints[field.name]
            nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
            values[field.name] = defaults(hint) if nested else "???"
    return values


def _as_dict(value: Any) -> Any:
    """Return a dataclass as a nested dictionary, and any other value as it is."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def build(schema: type, values: DictConfig | dict[str, Any]) -> Any:
    """Check ``values`` against the dataclass ``schema``.

    Returns:
        A frozen instance of ``schema``.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value, or a value that cannot work.
    """
    config = values if isinstance(values, DictConfig) else OmegaConf.create(values)
    try:
        remember_environment(config)
        missing = sorted(OmegaConf.missing_keys(config))
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation of a variable or a setting that is not there
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from None
    require(not missing, f"no value for {', '.join(missing)}; give it as KEY=VALUE on the command line")
    try:
        settings: Any = TypeAdapter(schema).validate_python(resolved)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # a `ConfigError` of a `__post_init__`, which names its key
            raise ConfigError(str(first["ctx"]["error"])) from None
        key = ".".join(str(part) for part in first["loc"]) or "config"
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(unknown_setting(schema, key)) from None
        # The message shows ${oc.env:NAME}, not the variable's value, which may be a secret.
        text = text_as_written(tuple(map(str, first["loc"])), first["input"])
        raise ConfigError(f"{key}: {first['msg']} (got {text!r})") from error
    _check_values(settings)
    return settings


def _check_values(settings: Any, prefix: str = "") -> None:
    """Refuse what no setting can be: an empty text, or a number that is not finite, negative or too large a count.

    Bounds of single settings stand in the ``__post_init__`` of their schema.

    Raises:
        ConfigError: names the key and its value.
    """
    if isinstance(settings, str):
        require(settings != "", f"{prefix.rstrip('.')} is empty; give a value, or null where it may be left out")
        return
    if isinstance(settings, (list, tuple)):
        for index, element in enumerate(settings):
            _check_values(element, f"{prefix.rstrip('.')}[{index}].")
        return
    if isinstance(settings, dict):
        for name, element in settings.items():
            _check_values(element, f"{prefix}{name}.")
        return
    if not dataclasses.is_dataclass(settings):
        return
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        key = f"{prefix}{field.name}"
        if isinstance(value, (int, float)):
            require(math.isfinite(value), f"{key}={value} must be a finite number")
            require(value >= 0 or field.name in SIGNED, f"{key}={value} must be 0 or more")
            bounded = isinstance(value, int) and field.name not in UNBOUNDED
            require(not bounded or value <= LARGEST, f"{key}={value} must be at most {LARGEST}")
        else:
            _check_values(value, f"{key}.")


def forbid_unknown_keys(names: dict[str, Any]) -> None:
    """Make `build` refuse keys that the dataclasses among the ``names`` of a module do not have."""
    for value in list(names.values()):
        if isinstance(value, type) and dataclasses.is_dataclass(value):
            setattr(value, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010
