"""Load the weights of a supervised run, start its evaluation, and print its heading."""

from __future__ import annotations

import statistics
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ovr_megatron.chat_model import ChatModel, start_empty_rollout
from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.coldstart.balance import row_work
from ovr_megatron.config import ColdStartConfig, ConfigError
from ovr_megatron.data.epochs import EpochStream
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data.supervised import SupervisedPacks, has_data, open_packs
from ovr_megatron.engine import Engine
from ovr_megatron.model.layers import cautions, layers_in_use
from ovr_megatron.plan.heading import run_rows, show_heading, source_rows
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.runlog import record_layers
from ovr_megatron.runtime.starts import LaunchArgs, record_start
from ovr_megatron.weights.folder import WeightFolder

if TYPE_CHECKING:
    from ovr_megatron.evaluation.periodic import PeriodicEvaluation

logger = get_logger(__name__)

# Rows drawn for the heading: their mean length estimates the epochs, and those that are too long are warned of.
LENGTHS_MEASURED = 64


def open_data(config: ColdStartConfig, processor: Processor, world: World) -> tuple[SupervisedPacks | None, int]:
    """Open the packs as `open_packs` does; without any data return None: a program passes the chats of each step."""
    if has_data(config.data):
        return open_packs(config, processor, world, row_work(config, processor))
    return None, config.steps


def load_position(packs: SupervisedPacks | None, checkpoint: ResumePoint) -> None:
    """Go to the checkpoint's position in the data.

    Raises:
        ConfigError: the run has learned from data and now has none, or the reverse.
    """
    position = checkpoint.state["packs"]
    if (packs is None) != (position is None):
        source = "chats that a program passed" if position is None else "data.sources or data.tokenised"
        raise ConfigError(
            f"{checkpoint.path}: its run has learned from {source}, this one has other settings of data; go on with "
            "the same, or choose another run.dir"
        )
    if packs is not None:
        packs.load(position)


def load_weights(engine: Engine, config: ColdStartConfig, world: World) -> None:
    """Load the initial weights of ``model.path``.  A collective.

    Raises:
        CheckpointError: it is a checkpoint that is damaged.
    """
    store.check_weights(config.model.path, world)
    engine.load(WeightFolder(store.weights_of(config.model.path)), seed=config.run.seed)


def record_run(config: ColdStartConfig, processor: Processor, world: World, launch: LaunchArgs | None) -> None:
    """Write settings, layers, the start and the Hugging Face files of the model into the run folder."""
    run = Path(config.run.dir)
    run_folder.record(config, run)
    layers = layers_in_use(config.model)
    record_layers(run, layers, cautions(config.model, rollout=False))
    if launch:
        record_start(run, launch, world.size)
    write_hf_assets(run / "companions", processor)


def show_start(
    config: ColdStartConfig,
    processor: Processor,
    engine: Engine,
    world: World,
    checkpoint: ResumePoint | None,
    packs: SupervisedPacks | None,
) -> None:
    """Print the heading of the run: batch, data, model, and the checkpoint that it goes on from."""
    step_tokens = config.packs_per_step * config.data.pack_tokens
    batch = f"{config.packs_per_step} packs of {config.data.pack_tokens:,} = {step_tokens:,} tokens a step"
    rows = [("batch", batch)]
    if isinstance(packs, EpochStream):
        rows.append(("data", describe_epochs(config, packs)))
    elif config.data.sources:
        lengths, too_long = measure_drawn_rows(config, processor)
        if too_long:
            rows.append(("data", too_long_warning(config, too_long)))
        # The mean of no length is unknown: then a row is taken to fill a pack.
        sample_count = config.steps * step_tokens / (statistics.mean(lengths) if lengths else config.data.pack_tokens)
        rows += source_rows(config, sample_count)
    start = None
    if checkpoint:
        start = (checkpoint.path, checkpoint.step)
    rows += run_rows(config, {"model": engine}, world, start)
    heading = show_heading(f"SFT in {config.run.dir}", rows)
    logger.info(heading)


def describe_epochs(config: ColdStartConfig, packs: EpochStream) -> str:
    """Return the rows of an epoch, its steps, and how many epochs the run takes."""
    source = config.data.tokenised or "data.sources"
    rows = f"{source}: {packs.trained_rows:,} rows to train on, {packs.dropped:,} left out"
    if packs.dropped:
        rows += " as too long or unusable (ovr check-data lists them)"
    if not packs.epoch_steps:  # with very small weights an epoch may have no row
        return rows
    epochs = config.steps / packs.epoch_steps
    return f"{rows}; an epoch takes {packs.epoch_steps:,.1f} steps, the run {epochs:,.1f} epochs"


def measure_drawn_rows(config: ColdStartConfig, processor: Processor) -> tuple[list[int], int]:
    """Return the tokens of each of `LENGTHS_MEASURED` drawn rows that fits, and how many are too long.

    The stream shuffles and begins again, so that a row of a small source is drawn several times.
    """
    lengths = []
    too_long = 0
    # A stream of its own: the samples measured here are not taken from the training packs.
    stream = open_stream(config.data, config.run.seed, SkippedRows(None))
    for row in islice(stream, LENGTHS_MEASURED):
        try:
            [length] = processor.lengths([row], generation=False)
        except RowError:
            continue  # the loop itself names the row and stops, or skips it
        if isinstance(length, int) and length <= config.data.pack_tokens:
            lengths.append(length)
        else:
            too_long += 1
    return lengths, too_long


def too_long_warning(config: ColdStartConfig, too_long: int) -> str:
    """Return the line of the heading about rows that no pack takes: ``too_long`` of `LENGTHS_MEASURED` drawn ones."""
    limits = f"data.pack_tokens={config.data.pack_tokens}, data.max_prompt_tokens={config.data.max_prompt_tokens}"
    return (
        f"warning: {too_long} of {LENGTHS_MEASURED} rows drawn from data.sources are too long ({limits}) and are left "
        "out; raise the limit, lower data.max_pixels, or list them with ovr check-data"
    )


def build_evaluation(config: ColdStartConfig, policy: ChatModel) -> PeriodicEvaluation:
    """Start vLLM on this rank, for the model's samples, too; it sleeps between the evaluations."""
    # Imported here, so that a run without evaluation does not wait for vLLM.
    from ovr_megatron.evaluation.periodic import PeriodicEvaluation  # noqa: PLC0415

    processor = policy.processor
    shape = processor.shape
    prompt_tokens = config.data.max_prompt_tokens
    response_tokens = shape.response_limit(config.evaluation.max_tokens, prompt_tokens)
    max_length = prompt_tokens + response_tokens
    shape.check_length(max_length, "data.max_prompt_tokens with evaluation.max_tokens")
    policy.rollout = start_empty_rollout(config, policy.folder, processor, max_length)
    return PeriodicEvaluation(
        config.evaluation,
        policy.rollout,
        processor,
        config.rollout.tp,
        Path(config.run.dir),
        config.run.seed,
        keep=False,
    )
