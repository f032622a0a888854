"""Tokenise text rows once into a folder that `ovr sft` maps into memory (``data.tokenised=DIR``).

    ovr tokenise DIR --model MODEL [--workers N] 'data.sources=[{path: traces.jsonl, weight: 2}]' [data.KEY=VALUE]
    ovr tokenise DIR --verify

The settings are those of training (docs/data.md), with ``--config-name RECIPE`` on top of a training recipe's; a
source's weight says how often an epoch has each of its rows.
``--verify`` reads a set again and compares every byte with its manifest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ovr_megatron.config import ConfigError, DataConfig, build
from ovr_megatron.launch import compose_values, recipe_path, stage_of
from ovr_megatron.runtime.command import whole_number
from ovr_megatron.runtime.terminal import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Write or verify a set and print its manifest."""
    parser = argparse.ArgumentParser(
        prog="ovr tokenise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="Hugging Face folder with tokenizer and template")
    parser.add_argument("--workers", type=whole_number(1), default=1, help="processes that tokenise")
    parser.add_argument("--verify", action="store_true", help="read the set at FOLDER, write nothing")
    parser.add_argument("--config-name", metavar="RECIPE", help="training recipe, name or YAML file, for its data.*")
    parser.add_argument("settings", nargs="*", metavar="data.KEY=VALUE")
    # Settings may stand on both sides of an option, which `parse_args` does not take.
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.verify and not arguments.model:
        parser.error("--model is missing")
    config = settings(arguments.settings, arguments.config_name)

    # Imported here, so that a command line is checked before Transformers and datasets are loaded.
    from ovr_megatron.data.tokenised import verify_tokenised
    from ovr_megatron.data.tokenising import show, tokenise

    if arguments.verify:
        manifest = verify_tokenised(arguments.folder)
    else:
        manifest = tokenise(config, arguments.model, arguments.folder, arguments.workers)
    print(printable(show(manifest)))


def settings(pairs: list[str], recipe: str | None = None) -> DataConfig:
    """Build the checked configuration of ``data.KEY=VALUE`` pairs, on top of those of a training ``recipe``."""
    for pair in pairs:
        if not pair.startswith("data.") or "=" not in pair:
            raise ConfigError(f"{pair!r} is not known; settings have the form data.KEY=VALUE")
    if recipe:
        path = recipe_path(recipe)
        return build(DataConfig, compose_values(stage_of(path), path, pairs).data)
    config: DataConfig = build(DataConfig, OmegaConf.from_dotlist(pairs).get("data", {}))
    return config
