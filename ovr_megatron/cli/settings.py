"""Print all settings of `ovr sft`, `ovr rl` and `ovr prepare` as Markdown tables; docs/settings.md is this output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ovr_megatron.config import ColdStartConfig, RLConfig
from ovr_megatron.config.reference import settings_page
from ovr_megatron.curation.settings import PrepareConfig

ROOTS = {"ovr sft": ColdStartConfig, "ovr rl": RLConfig, "ovr prepare": PrepareConfig}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the page."""
    argparse.ArgumentParser(prog="ovr settings", description=__doc__).parse_args(argv)
    print(settings_page(ROOTS), end="")
