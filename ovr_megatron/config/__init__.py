"""Settings: schema, defaults and validation; those of data preparation are in ``curation/settings.py``.

The YAML files under ``recipes/`` hold values only; each is merged onto one of the root
dataclasses (here `ColdStartConfig` and `RLConfig`), so an unknown key or a value of the
wrong type stops the run before anything is loaded.  A new setting is a field of a class here:
its type says what is allowed, and ``--help`` prints the docstring under it.
"""

from __future__ import annotations

from ovr_megatron.config.algorithm import AlgorithmConfig, CriticConfig, RewardConfig, RewardJudgeConfig, StageConfig
from ovr_megatron.config.building import build, defaults
from ovr_megatron.config.checks import ConfigError, require
from ovr_megatron.config.data import FORMATS, DataConfig, SourceConfig
from ovr_megatron.config.evaluation import EvaluationConfig, EvaluationSettings
from ovr_megatron.config.fields import section
from ovr_megatron.config.model import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.config.rollout import RolloutConfig
from ovr_megatron.config.run import RunConfig
from ovr_megatron.config.sampling import Sampling
from ovr_megatron.config.stages import ColdStartConfig, RLConfig
from ovr_megatron.config.validation import ValidationConfig
from ovr_megatron.config.writing import as_yaml, save

__all__ = [
    "FORMATS",
    "AlgorithmConfig",
    "ColdStartConfig",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvaluationSettings",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RLConfig",
    "RewardConfig",
    "RewardJudgeConfig",
    "RolloutConfig",
    "RunConfig",
    "Sampling",
    "SourceConfig",
    "StageConfig",
    "ValidationConfig",
    "as_yaml",
    "build",
    "defaults",
    "require",
    "save",
    "section",
]
