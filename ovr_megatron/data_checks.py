"""Looking at the rows of a source before they are used: which cannot be, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ColdStartConfig, RLConfig, SourceConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import ENDLESS, Row, RowError, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.rewards.references import check_reference
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.terminal import printable

Check = Callable[[Row], object]
GENERATED_ROWS = 1000  # looked at of a source that never ends


def checks_of(config: ColdStartConfig | RLConfig, processor: Processor | None) -> list[Check]:
    """What a stage demands of a row: intact media within the limits, an answer it can verify, and lengths.

    Args:
        config: A stage's configuration.
        processor: Of its model; None leaves the lengths out.
    """
    rl = isinstance(config, RLConfig)
    checks: list[Check] = [partial(load_media, config=config.data)]
    if isinstance(config, RLConfig):
        checks.append(partial(check_reference, rules=config.reward.rules))
    if processor is not None:
        limit = 0 if rl else config.data.pack_tokens
        checks.append(partial(_check_length, processor=processor, generation=rl, limit=limit))
    return checks


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
    """Return ``count`` indices that are spread evenly over ``length`` rows; all of them where there are fewer."""
    return range(0, length, max(1, -(-length // count)))


def check_sample(config: ColdStartConfig | RLConfig, processor: Processor, rows: int) -> list[str]:
    """Look at some rows of each source; return one sentence for each source that the run would stop at.

    Args:
        config: A stage's configuration.
        processor: Of its model.
        rows: Of each source.
    """
    problems = []
    checks = checks_of(config, processor)
    for settings in config.data.sources:
        if problem := _sample_problem(settings, rows, checks, config.data.on_error == "skip"):
            problems.append(problem)
    return problems


def report_bad_rows(config: ColdStartConfig | RLConfig, rows: int = 0) -> int:
    """Print the error of every row of the sources that the run could not use; return the number of such rows.

    Args:
        config: A stage's configuration; lengths are measured where its ``model.path`` is a folder.
        rows: Rows to look at of each source, spread over it; 0 for all.

    Raises:
        RowError: a source cannot be opened.
    """
    processor = None
    if Path(config.model.path).is_dir():
        processor = Processor(weights_of(config.model.path), config.data)
    else:
        print(f"model.path={config.model.path} is no folder: lengths are not looked at", file=sys.stderr)
    checks = checks_of(config, processor)
    return sum(_report_source(settings, checks, rows) for settings in config.data.sources)


def _report_source(settings: SourceConfig, checks: Sequence[Check], rows: int) -> int:
    source = open_source(settings)
    endless = len(source) >= ENDLESS
    indices = range(rows or GENERATED_ROWS) if endless else spread(len(source), rows or len(source))
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


def _sample_problem(settings: SourceConfig, rows: int, checks: Sequence[Check], skip: bool) -> str | None:
    try:
        source = open_source(settings)
    except RowError as error:
        return str(error)
    indices = spread(len(source), rows)
    errors = list(bad_rows(source, indices, checks))
    # What is too long is dropped and counted, so only a source of nothing else stops the run.
    stopping = [] if skip else [error for error in errors if not isinstance(error, TooLongError)]
    if not stopping and len(errors) < len(indices):
        return None
    count, first = len(stopping or errors), (stopping or errors)[0]
    return f"{count} of {len(indices)} rows looked at cannot be used (tools/check_data.py lists all): {first}"


def _check_length(row: Row, processor: Processor, generation: bool, limit: int) -> None:
    """Raise `TooLongError` for a row over a limit; ``limit`` (0: none) is that of a pack."""
    (length,) = processor.lengths([row], generation)
    if isinstance(length, TooLongError):
        raise length
    if limit and length > limit:
        problem = f"has {length} tokens, more than data.pack_tokens={limit}"
        raise TooLongError(row.where, "messages", problem, "raise data.pack_tokens, or leave the row out")
