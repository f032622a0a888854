"""Settings of an OpenAI-compatible endpoint, which is a teacher or a judge."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field

from ovr_megatron.config.checks import ConfigError, ZeroMeans, require
from ovr_megatron.config.fields import section
from ovr_megatron.config.sampling import ResponseTokens, Sampling, Temperature

TRANSPORT_FIELDS = ("base_url", "key_env", "allow_http", "concurrency", "backoff_s", "max_backoff_s", "timeout_s")
"""Fields of `EndpointConfig` on which no answer depends."""
_SECRET = re.compile("key|token|secret|passw|sig|auth", re.IGNORECASE)
# Settings of an endpoint: a wait lasts a week at most, a budget fits into 64 bits.
Wait = Annotated[float, Field(ge=0, le=604800)]
Timeout = Annotated[float, Field(gt=0, le=604800)]
Budget = Annotated[int, Field(ge=0, le=1 << 62), ZeroMeans("unlimited")]
Concurrency = Annotated[int, Field(gt=0, le=4096)]
Attempts = Annotated[int, Field(gt=0, le=1000)]


def check_url(url: str, name: str, has_key: bool, allow_http: bool, remedy: str) -> None:
    """Refuse an address that would reveal a secret, in the files into which it is written or on the network.

    Args:
        url: address of an endpoint.
        name: name of the setting, for messages.
        has_key: whether a key is sent there.
        allow_http: whether the key may go unencrypted to another machine.
        remedy: setting that allows that, for messages.

    Raises:
        ConfigError: names the setting; the message never shows the secret.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise ConfigError(f"{name} is no address ({error}); give https://HOST/v1") from None
    require(parts.scheme in ("http", "https") and bool(host), f"{name} is no address; give https://HOST/v1")
    by_key = "name an environment variable that holds it with key_env"
    require("@" not in parts.netloc, f"{name} has a password in it (at {host}), which would stand in files; {by_key}")
    secret = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(key)]
    require(not secret, f"{name} has {'/'.join(secret)} in its query, which would stand in files; {by_key}")
    require(
        not has_key or parts.scheme == "https" or allow_http or _is_local(host),
        f"{name}: a key would go unencrypted to {host}; use https, or allow it with {remedy}",
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@section("endpoint.")
class EndpointConfig:
    """An OpenAI-compatible endpoint, and how it is asked: that of `ovr prepare`'s teacher, or a judge's."""

    base_url: str | None = None
    """Address of the endpoint; none: the model is local."""
    model: str | None = None
    """Name of the endpoint's model, or folder of the local one."""
    key_env: str | None = None
    """Environment variable with the key, which is written into the request only."""
    allow_http: bool = False
    """Send the key unencrypted to another machine."""
    temperature: Temperature = 0.0
    """Temperature of sampling."""
    max_tokens: ResponseTokens = 1024
    """Tokens of a response."""
    concurrency: Concurrency = 16
    """Requests at the same time."""
    attempts: Attempts = 6
    """Attempts of a request."""
    backoff_s: Wait = 1.0
    """Seconds before the second attempt."""
    max_backoff_s: Wait = 60.0
    """Longest wait in seconds between two requests, also one that the endpoint demands."""
    timeout_s: Timeout = 600.0
    """Seconds of a request from its first to its last byte."""
    max_requests: Budget = 0
    """Most requests that all runs in this folder send together; further questions have no answer."""
    max_total_tokens: Budget = 0
    """Most tokens of the requests and answers of all runs in this folder."""

    @property
    def sampling(self) -> Sampling:
        """Return how the responses are sampled."""
        return Sampling(self.temperature, self.max_tokens)
