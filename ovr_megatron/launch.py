"""Turn a command line into a checked configuration: Hydra composes, the dataclasses check, errors are one sentence.

Nothing heavy is imported here: help, a mistyped key and a finished run are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig, build, defaults
from ovr_megatron.config.checks import require
from ovr_megatron.config.described import described_yaml
from ovr_megatron.families.presets import presets
from ovr_megatron.keys import leaf_names, nearest_names, text_names, unknown_setting, with_new_keys

RECIPES = Path(__file__).parent / "recipes"
# Hydra's message for an override of a key that the schema does not have.
_UNKNOWN_KEY = re.compile(r"Could not override '(.+?)'\.", re.DOTALL)


@dataclass(frozen=True)
class CommandLine:
    """A checked configuration, its recipe and overrides; ``dry_run``: print its plan and start nothing."""

    config: Any
    recipe: str
    overrides: tuple[str, ...] = ()
    dry_run: bool = False


def read_command_line(
    schema: type,
    recipe: str,
    description: str | None,
    arguments: Sequence[str],
    plan: bool = True,
    program: str = "ovr",
) -> CommandLine:
    """Parse and check a command line; with ``--help`` print every setting and leave.

    Args:
        schema: root dataclass; its defaults stand below every recipe under the name ``schema``.
        recipe: file under ``recipes/`` that is used without ``--config-name``.
        description: first lines of the help.
        arguments: options and ``key=value``, in any order, without the program's name.
        plan: whether the command has ``--dry-run``.
        program: name of the command in its help and errors.

    Raises:
        ConfigError: no such recipe, an unknown key, or a value that cannot work.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        add_help=False,  # --help prints the recipe's settings, too, see below
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="changes a setting")
    add("--config-name", default=recipe, metavar="RECIPE", help=f"name or YAML file of a recipe (default: {recipe})")
    add("--config-dir", type=Path, default=RECIPES, metavar="DIR", help="folder of the recipe (default: the package's)")
    if plan:
        add("--dry-run", action="store_true", help="print the plan of exactly this command line, and leave")
    add("-h", "--help", action="store_true", help="print this and every setting of the recipe, and leave")
    # Intermixed: options and overrides may come in any order.
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise ConfigError(_unknown_option(schema, parser, unknown[0]))
    path = recipe_path(options.config_name, options.config_dir)
    values = compose_values(schema, path, options.overrides)
    if options.help:
        print(f"{parser.format_help()}\nsettings of {path.stem}:\n{described_yaml(schema, values)}")
        parser.exit()
    dry_run = plan and options.dry_run
    if dry_run:
        values = fill_in(values, path.stem)
    return CommandLine(build(schema, values), path.stem, tuple(options.overrides), dry_run)


def _unknown_option(schema: type, parser: argparse.ArgumentParser, option: str) -> str:
    """Return the message for an option that a command of settings does not have."""
    name = option.lstrip("-").partition("=")[0]
    # The parser has no public list of its options, and does not know those that `spelled_out` replaces.
    options = [*re.findall(r"--[a-z-]+", parser.format_usage()), "--help"]
    if schema is RLConfig:
        options += SHORTCUTS
    abbreviated = [candidate for candidate in options if candidate.startswith(f"--{name}")]
    nearest = abbreviated or difflib.get_close_matches(f"--{name}", options, n=1, cutoff=0.7)
    settings = nearest_names(name.replace("-", "_"), leaf_names(schema))
    if nearest or not settings:
        remedy = f"did you mean {nearest[0]}?" if nearest else f"there are {' '.join(options)}, and settings, KEY=VALUE"
    else:
        remedy = f"a setting is written without dashes: {' or '.join(f'{setting}=VALUE' for setting in settings)}"
    return f"there is no option {option}; {remedy}"


def recipe_path(name: str, folder: Path = RECIPES) -> Path:
    """Return the YAML file of a recipe: ``name`` itself if it is the path of one, else its file in ``folder``.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        recipes = ", ".join(sorted(recipe.stem for recipe in folder.glob("*.yaml"))) or "none"
        raise ConfigError(f"{name} is no recipe; give the path of a YAML file, or of those in {folder} one: {recipes}")
    return path.resolve()


def compose_values(schema: type, path: Path, overrides: Sequence[str]) -> DictConfig:
    """Return the values of the recipe at ``path`` over the defaults of ``schema``, changed by ``overrides``.

    Raises:
        ConfigError: the file or an override cannot be read, or a key is unknown.
    """
    # Recipes name `schema` in their defaults list, so that Hydra refuses keys that it does not have.
    ConfigStore.instance().store(name="schema", node=defaults(schema))
    for override in overrides:
        # Hydra takes these for config groups, of which there are none, and raises errors of its own kinds.
        key = override.lstrip("+~").split("=", 1)[0]
        if not key or "@" in key:
            raise ConfigError(f"{override!r} cannot be read; write a setting as KEY=VALUE")
        if "=" not in override and (override.endswith((".yaml", ".yml")) or (RECIPES / f"{override}.yaml").is_file()):
            raise ConfigError(f"{override} is a recipe; write --config-name {override}")
    try:
        hydra_overrides = with_new_keys(schema, with_plain_text(schema, overrides))
        # A recipe elsewhere may be built on one of the package's.
        packaged = str(RECIPES).replace("'", "\\'")
        hydra_overrides.append(f"hydra.searchpath=['file://{packaged}']")
        with hydra.initialize_config_dir(str(path.parent), version_base=None):
            values = hydra.compose(path.stem, hydra_overrides)
        OmegaConf.missing_keys(values)  # follows every ${interpolation}, so that an unknown one is refused here
        return values
    except (HydraException, OmegaConfBaseException) as error:
        if unknown := _UNKNOWN_KEY.match(str(error)):
            raise ConfigError(unknown_setting(schema, unknown[1])) from None
        if isinstance(error, OverrideParseException):
            override = str(error.override).lstrip("+")
            raise ConfigError(f"{override!r} cannot be read; write a setting as KEY=VALUE") from None
        cause = error.__cause__ or error
        full_key = getattr(cause, "full_key", None)
        values_by_key = dict(override.split("=", 1) for override in overrides if "=" in override)
        value = values_by_key.get(full_key or "", "")
        if "Cannot merge DictConfig with ListConfig" in str(cause) and value.startswith("{"):
            raise ConfigError(f"{full_key}={value} must be a list; write '{full_key}=[{value}]'") from None
        where = f"{path.stem}: {full_key}" if full_key else path.stem
        raise ConfigError(f"{where}: {str(cause).splitlines()[0]}") from error


def parse_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of a command whose settings are options, with ``--config-name RECIPE`` for some of them.

    A recipe is a YAML file of options by their names, a list for one that is repeated; the command line comes
    before it.

    Args:
        parser: of the command; gets the option.
        arguments: words after the command's name; None takes those of this process.

    Raises:
        ConfigError: no such file, or it is no mapping of options of ``parser``.
    """
    recipe_help = "YAML file, or a name under ovr_megatron/recipes/, with values for these options"
    parser.add_argument("--config-name", metavar="RECIPE", help=recipe_help)
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Found before the rest is parsed: what the recipe gives need not be on the command line.
    name_parser = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    name_parser.add_argument("--config-name")
    recipe = name_parser.parse_known_args(words)[0].config_name
    if not recipe:
        return parser.parse_args(words)
    path = recipe_path(recipe)
    recipe_words = _option_words(path, words)
    # The recipe comes first: of an option that is abbreviated on the command line the later value holds.
    options, unknown = parser.parse_known_args([*recipe_words, *words])
    for word in unknown:
        require(word not in recipe_words, f"{path.name}: {parser.prog} has no option {word}; --help lists them")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _option_words(path: Path, words: Sequence[str]) -> list[str]:
    """Return the options in the recipe at ``path`` that ``words`` do not give, as words of a command line."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: {str(error).splitlines()[0]}; write it as YAML, OPTION: VALUE") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} is no mapping; write it as YAML, OPTION: VALUE")
    on_command_line = {word.partition("=")[0] for word in words}
    option_words: list[str] = []
    for key, value in values.items():
        name = str(key)
        option = f"--{name.replace('_', '-')}"
        if option in on_command_line or value is None or value is False:
            continue
        if value is True:
            option_words.append(option)
            continue
        for element in value if isinstance(value, list) else [value]:
            require(
                not isinstance(element, dict | list),
                f"{path.name}: {name} has a section; the recipe of a command with options is a flat list of them",
            )
            option_words.append(f"{option}={element}")
    return option_words


def stage_of(path: Path) -> type[ColdStartConfig | RLConfig]:
    """Return the settings of the stage that the recipe at ``path`` is for: only that of RL has a curriculum.

    What a recipe does not say itself stands in those that its ``defaults`` name.
    """
    files = [path]
    for file in files:  # grows on the way
        values = OmegaConf.load(file)
        if not isinstance(values, DictConfig):  # composing it says what is wrong
            continue
        if "curriculum" in values:
            return RLConfig
        for base in values.get("defaults") or []:
            nearby = (folder / f"{base}.yaml" for folder in (file.parent, RECIPES))
            base_file = next(filter(Path.is_file, nearby), file)
            if base_file not in files:
                files.append(base_file)
    return ColdStartConfig


def compose(recipe: str, overrides: Sequence[str]) -> ColdStartConfig | RLConfig:
    """Return the checked settings of a recipe, for a program or a plan.

    ``run.dir`` is ``run`` where it is missing, and ``model.path`` the size in the recipe's name, which serves a plan.

    Args:
        recipe: a name under ``recipes/``, or the path of a YAML file.
        overrides: ``key=value``, as on a stage's command line.

    Raises:
        ConfigError: no such recipe, an unknown key, or a value that cannot work.
    """
    path = recipe_path(recipe)
    schema = stage_of(path)
    return build(schema, fill_in(compose_values(schema, path, overrides), path.stem))


def fill_in(values: DictConfig, recipe: str) -> DictConfig:
    """Set what is missing of ``run.dir``, ``model.path`` and ``algorithm.teacher`` to values that a plan can work with.

    The model is the preset in the recipe's name: ``cold_start_7b_64gpu`` names 7B.  A teacher that alone is learned
    from is as large as the model.
    """
    names = []
    for name in presets():
        words = name.lower().replace("-", "_")
        if f"_{words}_" in f"_{recipe}_":
            names.append(name)
    missing = OmegaConf.missing_keys(values)
    if "run.dir" in missing:
        values.run.dir = "run"
    if "model.path" in missing and names:
        # The longest: 32B would be in the name of another family's model, too.
        values.model.path = max(names, key=len)
    algorithm = values.get("algorithm")
    needs_teacher = algorithm is not None and algorithm.estimator == "none" and algorithm.teacher is None
    if needs_teacher and not OmegaConf.is_missing(values.model, "path"):
        algorithm.teacher = values.model.path
    return values


SHORTCUTS = ("--rollout-only", "--rehearse", "--train-only", "--critic-only")
"""Options of ``ovr rl`` that stand for settings."""


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Return the command line with the settings of its shortcuts.

    They are ``--rollout-only``, ``--rehearse``, ``--train-only FOLDER`` and ``--critic-only FOLDER``.
    """
    settings = []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if argument == "--rollout-only":
            settings.append("only=rollout")
        elif argument == "--rehearse":
            settings.append("only=rehearsal")
        elif option in ("--train-only", "--critic-only"):
            folder = value if equals else next(remaining, "")
            part = option.removeprefix("--").removesuffix("-only")
            settings += [f"only={part}", f"rollouts_from={folder}"]
        else:
            settings.append(argument)
    return settings


def with_plain_text(schema: type, overrides: Sequence[str]) -> list[str]:
    """Return ``overrides`` with the values of text settings quoted, so that Hydra takes them literally.

    A path may hold characters that Hydra's grammar reserves, as in ``run.dir=/data/it's (a=b), [x]``.  A value that the
    grammar reads as text, quoted or escaped by the user or not, is left alone, and so is an interpolation.
    """
    text_settings = set(text_names(schema))
    parser = OverridesParser.create()
    plain = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name.lstrip("+") in text_settings and not _is_text(parser, override):
            # In a quoted value Hydra reads backslashes as escapes only before a quote, so only there they are doubled.
            escaped = re.sub(r"(\\*)('|$)", _escaped_quote, value)
            override = f"{name}='{escaped}'"
        plain.append(override)
    return plain


def _escaped_quote(match: re.Match[str]) -> str:
    """Double the backslashes of ``match`` and escape the quote after them; at the end of the value there is none."""
    backslashes = 2 * match[1]
    return backslashes + "\\'" if match[2] else backslashes


def _is_text(parser: OverridesParser, override: str) -> bool:
    """Return whether Hydra reads the value as one text, or as null."""
    try:
        value = parser.parse_override(override).value()
    except HydraException:
        return False
    return value is None or isinstance(value, str | QuotedString)
