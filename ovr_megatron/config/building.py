"""Build settings: the defaults of a schema, and the checked dataclass of its values."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from ovr_megatron.config.checks import ConfigError, require
from ovr_megatron.config.sentences import describe_error
from ovr_megatron.config.writing import remember_environment

T = TypeVar("T")


def defaults(schema: type) -> dict[str, object]:
    """Return every key of ``schema`` with its default, nested; a value that must be given is ``???`` (Hydra's mark)."""
    hints = typing.get_type_hints(schema)
    values: dict[str, object] = {}
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = _as_dict(field.default_factory())
        else:
            hint = hints[field.name]
            is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
            values[field.name] = defaults(hint) if is_section else "???"
    return values


def _as_dict(value: Any) -> Any:
    """Return a dataclass as a nested dictionary, and any other value as it is."""
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_instance else value


def build(schema: type[T], values: DictConfig | dict[str, object]) -> T:
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
    # Before validation, which would take the mark ??? for a text.
    require(not missing, f"no value for {', '.join(missing)}; give it as KEY=VALUE on the command line")
    try:
        return TypeAdapter(schema).validate_python(resolved)
    except ValidationError as error:
        raise ConfigError(describe_error(error, schema)) from None
