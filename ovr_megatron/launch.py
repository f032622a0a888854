"""From a command line to a checked configuration: Hydra composes, the dataclasses judge, errors become one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ovr_megatron.checkpoint.manifest import CheckpointError
from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig, build, defaults
from ovr_megatron.data.processing import TemplateError
from ovr_megatron.data.schema import RowError
from ovr_megatron.engine import DivergenceError
from ovr_megatron.model.shape import ShapeError
from ovr_megatron.plan.report import dry_run, fill_in
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
    """Run ``run`` on the configuration that the command line asks for; with ``--dry-run`` print its plan instead.

    Args:
        schema: root dataclass; its defaults stand below every recipe under the name ``defaults``.
        recipe: file under ``recipes/`` used when ``--config-name`` is not given.
        run: receives the checked configuration.
        errors: a user's mistakes, which end the process with one sentence and code 2.
    """
    ConfigStore.instance().store(name="schema", node=defaults(schema))
    dry = "--dry-run" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--dry-run"]
    sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]

    @hydra.main(version_base=None, config_path=str(RECIPES), config_name=recipe)
    def main(values: DictConfig) -> None:
        name = HydraConfig.get().job.config_name or recipe

        def work() -> None:
            if dry:
                dry_run(build(schema, fill_in(values, name)), name)
            else:
                run(build(schema, values))

        in_one_sentence(work, errors)

    main()


def compose(recipe: str, overrides: Sequence[str]) -> ColdStartConfig | RLConfig:
    """The checked configuration of a recipe, for a plan: what only a run needs may be missing.

    Args:
        recipe: a name under ``recipes/``, or the path of a YAML file.
        overrides: ``key=value``, as on a stage's command line.

    Raises:
        ConfigError: no such recipe, an unknown key, or a value that cannot work.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(item.stem for item in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{recipe} is no recipe; give the path of a YAML file, or one of {known}")
    schema = RLConfig if "curriculum" in OmegaConf.load(path) else ColdStartConfig
    ConfigStore.instance().store(name="schema", node=defaults(schema))
    try:
        with hydra.initialize_config_dir(str(path.parent.resolve()), version_base=None):
            values = hydra.compose(path.stem, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{recipe}: {str(error.__cause__ or error).splitlines()[0]}") from error
    return build(schema, fill_in(values, path.stem))


def in_one_sentence(run: Callable[[], None], errors: tuple[type[Exception], ...] = USER_ERRORS) -> None:
    """Run ``run``; one of ``errors`` ends the process with its sentence and code 2."""
    try:
        run()
    except errors as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
