"""Settings of a judge, and their options on a command line.  Nothing heavy is imported here."""

from __future__ import annotations

import argparse

from ovr_megatron.config import ConfigError, section
from ovr_megatron.config.endpoint import EndpointConfig, check_url
from ovr_megatron.runtime.options import add_option

LEXICAL = "lexical"
VLLM = "vllm:"


@section("--")
class JudgeConfig(EndpointConfig):
    """A judge; what it inherits is for an endpoint and a local model, whose address and name are in ``judge``."""

    judge: str = LEXICAL
    """Judge: lexical, vllm:FOLDER or URL#MODEL."""

    def __post_init__(self) -> None:
        if self.judge != LEXICAL and not self.judge.startswith(VLLM) and "#" not in self.judge:
            raise ConfigError(f"judge {self.judge!r} is none; give lexical, vllm:FOLDER or URL#MODEL")
        if self.judge != LEXICAL and not self.judge.startswith(VLLM):
            url = self.judge.rpartition("#")[0]
            check_url(url, "the judge's URL", bool(self.key_env), self.allow_http, "--allow-http")

    @property
    def is_lexical(self) -> bool:
        """Return whether the judge counts by wording, which is an approximation."""
        return self.judge == LEXICAL


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that every judge model has."""
    add_option(parser, JudgeConfig, "key_env", metavar="VAR", help="environment variable with the endpoint's key")
    add_option(parser, JudgeConfig, "allow_http", help="send the key to another machine without encryption")
    add_option(parser, JudgeConfig, "max_tokens", help="of a judge's answer")
    add_option(parser, JudgeConfig, "max_requests", help="budget of all runs in the folder (0: none)")
    add_option(parser, JudgeConfig, "max_total_tokens", help="budget of all runs in the folder (0: none)")
