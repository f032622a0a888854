"""`ConfigError`, and the two checks that every ``__post_init__`` of a schema uses."""

from __future__ import annotations

from ovr_megatron.errors import UserError


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the key, its value and what to change."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless the ``value`` of ``key`` is among the ``allowed`` ones."""
    require(value in allowed, f"{key}={value!r} is not known; choose one of {', '.join(allowed)}")
