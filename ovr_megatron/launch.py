"""From a command line to a checked configuration: Hydra composes, the dataclasses judge, errors become one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from ovr_megatron.checkpoint.manifest import CheckpointError
from ovr_megatron.config import ConfigError, build, defaults
from ovr_megatron.data.processing import TemplateError
from ovr_megatron.data.schema import RowError
from ovr_megatron.engine import DivergenceError
from ovr_megatron.model.shape import ShapeError
from ovr_megatron.runtime.lock import RunLockedError
from ovr_megatron.runtime.stop import USER_ERROR
from ovr_megatron.weights.folder import WeightError
from ovr_megatron.weights.table import LayoutError

USER_ERRORS = (
    *(ConfigError, RowError, TemplateError, ShapeError, WeightError, LayoutError, CheckpointError),
    *(RunLockedError, DivergenceError),
)
RECIPES = Path(__file__).parent / "recipes"


def launch(
    schema: type, recipe: str, run: Callable[[Any], None], errors: tuple[type[Exception], ...] = USER_ERRORS
) -> None:
    """Run ``run`` on the configuration that the command line asks for.

    Args:
        schema: root dataclass; its defaults stand below every recipe under the name ``defaults``.
        recipe: file under ``recipes/`` used when ``--config-name`` is not given.
        run: receives the checked configuration.
        errors: a user's mistakes, which end the process with one sentence and code 2.
    """
    ConfigStore.instance().store(name="schema", node=defaults(schema))
    sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]

    @hydra.main(version_base=None, config_path=str(RECIPES), config_name=recipe)
    def main(values: DictConfig) -> None:
        in_one_sentence(lambda: run(build(schema, values)), errors)

    main()


def in_one_sentence(run: Callable[[], None], errors: tuple[type[Exception], ...] = USER_ERRORS) -> None:
    """Run ``run``; one of ``errors`` ends the process with its sentence and code 2."""
    try:
        run()
    except errors as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
