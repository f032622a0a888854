"""Data preparation: ``ovr prepare --config-name prepare_sft dir=DIR 'data.sources=[{path: rows.jsonl}]'``.

Run the stages of the recipe in order; a stage that is complete with the same settings and inputs does not run again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from ovr_megatron import config as configuration
from ovr_megatron.config import ConfigError
from ovr_megatron.curation import (
    collect,
    decontaminate,
    dedup,
    difficulty,
    patterns,
    proxy_loss,
    strata,
    teacher,
    tokenise,
    verify,
)
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, check_stage_folder, run_stages
from ovr_megatron.data.hf_assets import check_assets
from ovr_megatron.rewards.combination import check_rules
from ovr_megatron.runtime.files import write_json
from ovr_megatron.runtime.lock import lock_folder

STAGES: dict[str, PrepareStage] = {
    module.STAGE.name: module.STAGE
    for module in (collect, dedup, decontaminate, teacher, patterns, proxy_loss, verify, difficulty, tokenise)
} | {stage.name: stage for stage in (strata.STRATIFY, strata.WEIGH)}


def prepare(config: PrepareConfig) -> Path:
    """Run the stages of ``config``; return the folder of the last one.

    Raises:
        RowError: a row or a source cannot be used.
        ConfigError: a setting cannot work or a stage keeps nothing.
        RunLockedError: another job works in this folder.
        RunFolderError: the folder cannot be made or written to.
        EndpointError: the teacher cannot be reached or refuses.
        EngineError: vLLM's process failed.
        RuleError: a rule of ``reward.rules`` would not work, or names a source that no row has.
        RewardError: nearly all rewards of a source failed.
    """
    folder = Path(config.dir)
    # All checks come before the first stage: a stage may take hours.
    check_folder(folder, config.stages)
    check_models(config)
    check_rules(config.reward)
    with lock_folder(folder):
        configuration.save(config, folder / "config.yaml")
        last = run_stages([STAGES[name] for name in config.stages], config)
        summary = summarise(config)
        write_json(folder / "summary.json", summary, indent=1, ensure_ascii=False)
    return last


def check_models(config: PrepareConfig) -> None:
    """Check configuration and tokenizer of every local model that a stage will open, before the first of them.

    Raises:
        ShapeError: a folder is no model of a known family.
        AssetError: its tokenizer or processor does not fit it.
    """
    models = {
        "tokenise": config.model,
        "proxy_loss": config.proxy_loss.model,
        "difficulty": config.difficulty.model,
        "teacher": None if config.teacher.base_url else config.teacher.model,
    }
    folders = {model for stage, model in models.items() if model and stage in config.stages}
    for folder in sorted(folders):
        check_assets(folder)


def check_folder(folder: Path, stages: Sequence[str]) -> None:
    """Refuse the folder of a model or a run, or one with files that the preparation would overwrite.

    Raises:
        ConfigError: names the file or folder that is in the way.
    """
    if not _is_preparation(folder):
        foreign = ("config.yaml", "summary.json", "lock", "config.json", "manifest.json")
        names = [name for name in foreign if (folder / name).exists()]
        if names:
            raise ConfigError(f"dir={folder} has {names[0]}, which no preparation has written; give a new folder")
    for name in stages:
        check_stage_folder(folder / name)


def _is_preparation(folder: Path) -> bool:
    """Return whether the configuration in ``folder`` is that of a preparation."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and {"dir", "stages", "collect"} <= settings.keys()


def summarise(config: PrepareConfig) -> list[dict[str, object]]:
    """Return name, rows in and kept, dropped rows by reason, and seconds of each stage."""
    summary = []
    for name in config.stages:
        report = json.loads((Path(config.dir) / name / "report.json").read_text(encoding="utf-8"))
        summary.append({key: report[key] for key in ("stage", "rows_in", "kept", "dropped", "seconds")})
    return summary
