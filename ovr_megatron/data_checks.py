"""Check the rows of a source before a run uses them, and report the rows that it could not use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ColdStartConfig, RLConfig, SourceConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import ENDLESS, Row, RowError, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.streamed import StreamedRows, StreamError
from ovr_megatron.rewards.judge_templates import open_templates
from ovr_megatron.rewards.references import check_reference
from ovr_megatron.runtime.logs import NOTICE, get_logger
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.terminal import printable

logger = get_logger(__name__)

Check = Callable[[Row], object]
GENERATED_ROWS = 1000  # checked of a source that never ends


def checks_of(config: ColdStartConfig | RLConfig, processor: Processor | None) -> list[Check]:
    """Return the checks of a stage: intact media within the limits, a verifiable answer (RL with rewards), and lengths.

    Args:
        config: A stage's configuration.
        processor: Processor of its model; None leaves the lengths out.
    """
    is_rl = isinstance(config, RLConfig)
    checks: list[Check] = [partial(load_media, config=config.data)]
    if isinstance(config, RLConfig) and config.algorithm.learns_from_rewards:
        judges = open_templates(config.reward.judges)
        checks.append(partial(check_reference, rules=config.reward.rules, judges=judges))
    if processor is not None:
        limit = 0 if is_rl else config.data.pack_tokens
        checks.append(partial(_check_length, processor=processor, generation=is_rl, limit=limit))
    return checks


def row_sources(config: ColdStartConfig | RLConfig) -> list[SourceConfig]:
    """Return the sources of a run's rows: to train on, and for SFT those of the validation."""
    if isinstance(config, RLConfig):
        return config.data.sources
    return [*config.data.sources, *config.validation.sources]


def bad_rows(source: RowSource, indices: Sequence[int], checks: Sequence[Check]) -> Iterator[RowError]:
    """Yield the error of every row among ``indices`` that cannot be used."""
    for index in indices:
        try:
            row = source[index]
            for check in checks:
                check(row)
        except RowError as error:
            yield error


def spread(length: int, count: int) -> range:
    """Return at most ``count`` indices that are spread evenly over ``length`` rows; all where there are fewer rows."""
    step = max(1, -(-length // count))  # rounded up
    return range(0, length, step)


def check_sample(config: ColdStartConfig | RLConfig, processor: Processor, rows: int) -> list[str]:
    """Check some rows of each source; return one sentence for each source that the run would stop at.

    Args:
        config: A stage's configuration.
        processor: Processor of its model.
        rows: Rows to check of each source.
    """
    problems = []
    checks = checks_of(config, processor)
    skip_errors = config.data.on_error == "skip"
    for settings in row_sources(config):
        if problem := _sample_problem(settings, rows, checks, skip_errors):
            problems.append(problem)
    return problems


def report_bad_rows(config: ColdStartConfig | RLConfig, rows: int = 0) -> int:
    """Print the error of every row of the sources that the run could not use; return the number of such rows.

    Args:
        config: A stage's configuration; lengths are measured where its ``model.path`` is a folder.
        rows: Rows to check of each source, spread over it; 0 for all.

    Raises:
        RowError: a source cannot be opened.
    """
    processor = None
    if Path(config.model.path).is_dir():
        processor = Processor(weights_of(config.model.path), config.data)
    else:
        logger.log(NOTICE, f"model.path={config.model.path} is no folder: lengths are not looked at")
    checks = checks_of(config, processor)
    return sum(_report_source(settings, checks, rows) for settings in row_sources(config))


def _report_source(settings: SourceConfig, checks: Sequence[Check], rows: int) -> int:
    """Print the errors of one source and a line of totals; return the number of rows that cannot be used."""
    if settings.streaming:
        return _report_streamed(settings, checks, rows or GENERATED_ROWS)
    source = open_source(settings)
    endless = len(source) >= ENDLESS
    if endless:
        indices = range(rows or GENERATED_ROWS)
    else:
        indices = spread(len(source), rows or len(source))
    bad = 0
    with Progress(len(indices), settings.path, "row", inner=True) as progress:
        for index in indices:
            for error in bad_rows(source, [index], checks):
                print(printable(error), flush=True)
                bad += 1
            progress.update()
    total = "an endless number" if endless else f"{len(source):,}"
    print(f"{settings.path}: {len(indices):,} of {total} rows looked at, {bad:,} cannot be used", flush=True)
    return bad


def streamed_errors(settings: SourceConfig, checks: Sequence[Check], rows: int) -> Iterator[RowError | None]:
    """Yield for each of the first ``rows`` rows of a streamed source its error, None for one that can be used."""
    source = StreamedRows(settings, "check")
    for _ in range(rows):
        try:
            row = next(source)
            if source.epoch > 0:  # the set has fewer rows
                return
            for check in checks:
                check(row)
            yield None
        except RowError as error:
            if source.epoch > 0:
                return
            yield error


def _report_streamed(settings: SourceConfig, checks: Sequence[Check], rows: int) -> int:
    """Print the errors among the first rows of a streamed source; return the number of rows that cannot be used."""
    count = 0
    bad = 0
    for error in streamed_errors(settings, checks, rows):
        count += 1
        if error is not None:
            print(printable(error), flush=True)
            bad += 1
    print(f"{settings.path}: the first {count:,} rows of a stream looked at, {bad:,} cannot be used", flush=True)
    return bad


def _sample_problem(settings: SourceConfig, rows: int, checks: Sequence[Check], skip_errors: bool) -> str | None:
    """Return the sentence of a source that the run would stop at, None if a sample of its rows lets it go on."""
    try:
        if settings.streaming:
            results = list(streamed_errors(settings, checks, rows))
            count = len(results)
            errors = [error for error in results if error is not None]
        else:
            source = open_source(settings)
            indices = spread(len(source), rows)
            count = len(indices)
            errors = list(bad_rows(source, indices, checks))
    except (RowError, StreamError) as error:
        return str(error)
    # A row that is too long is dropped and counted, so it stops the run only if no other row is left.
    fatal = [] if skip_errors else [error for error in errors if not isinstance(error, TooLongError)]
    if not fatal and len(errors) < count:
        return None
    reported = fatal or errors
    share = f"{len(reported)} of {count}"
    return f"{share} rows looked at cannot be used (ovr check-data lists all): {reported[0]}"


def _check_length(row: Row, processor: Processor, generation: bool, limit: int) -> None:
    """Raise `TooLongError` for a row over the processor's limit, or over ``limit`` tokens of a pack (0: no limit)."""
    (length,) = processor.lengths([row], generation)
    if isinstance(length, TooLongError):
        raise length
    if limit and length > limit:
        problem = f"has {length} tokens, more than data.pack_tokens={limit}"
        raise TooLongError(row.where, "messages", problem, "raise data.pack_tokens, or leave the row out")
