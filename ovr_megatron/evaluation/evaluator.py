"""A model on problem sets: greedy and sampled responses by vLLM, graded, scored and kept.

Under ``torchrun`` the engine's replicas share the problems and the first rank writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ovr_megatron.config import ConfigError, DataConfig, RolloutConfig, SourceConfig
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.data.schema import ENDLESS, Row, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.evaluation.scoring import Graded, reference_of, score
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime.progress import Progress

CHUNK = 512  # problems whose images are held at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How problems are asked and graded.

    Attributes:
        samples: Responses at temperature 1 for pass@k, beside the greedy one; 0 for none.
        max_tokens: Longest response.
        metric: ``boxed``, ``exact``, or ``auto`` (`ovr_megatron.evaluation.scoring.reference_of`).
        seed: Of the samples.
    """

    samples: int = 0
    max_tokens: int = 1024
    metric: str = "auto"
    seed: int = 1


@dataclass(frozen=True)
class ProblemSet:
    """The first ``count`` rows of a source; ``name`` becomes the name of the files."""

    name: str
    path: str
    rows: RowSource
    count: int


@dataclass(frozen=True)
class Bench:
    """What answers and grades, for any number of problem sets: ``tp`` neighbouring ranks hold one engine."""

    model: str
    engine: RolloutEngine
    processor: Processor
    grader: GraderPool
    tp: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return dist.get_rank() == 0


def open_problems(source: SourceConfig, limit: int = 0) -> ProblemSet:
    """Open ``source``, which has a name, as a problem set; ``limit`` takes its first rows only, 0 all of them.

    Raises:
        ConfigError: the source is endless and there is no limit.
        RowError: the source cannot be opened.
    """
    assert source.name
    rows = open_source(replace(source, name=None))  # a name would stand for the rows' own sources
    if len(rows) >= ENDLESS and not limit:
        raise ConfigError(f"{source.path} never ends; give a limit, or for a puzzle split=heldout")
    return ProblemSet(source.name, source.path, rows, min(limit or len(rows), len(rows)))


def run(
    model: Path,
    sets: Mapping[str, str],
    limit: int,
    settings: Settings,
    data: DataConfig,
    rollout: RolloutConfig,
    dtype: str,
    out: Path,
) -> Iterator[dict[str, Any]]:
    """Evaluate the folder ``model`` on every set, path by name, with one start of vLLM; a collective.

    ``torch.distributed`` must be initialised; vLLM is gone when the last result has been taken.

    Yields:
        The result of each set, on the first rank only.
    """
    problems = [open_problems(SourceConfig(path=path, name=name), limit) for name, path in sets.items()]
    processor = Processor(model, data)
    engine = RolloutEngine(model, rollout, processor, dtype, data.max_prompt_tokens + settings.max_tokens)
    with GraderPool() as grader:
        bench = Bench(str(model), engine, processor, grader, rollout.tp)
        for each in problems:
            if result := evaluate(bench, each, settings, out):
                yield result


def evaluate(bench: Bench, problems: ProblemSet, settings: Settings, out: Path) -> dict[str, Any] | None:
    """Ask every problem, write ``out/NAME.json`` and ``out/NAME.responses.jsonl``; a collective.

    Returns:
        What is in ``NAME.json``: the scores of `ovr_megatron.evaluation.scoring.score` with ``set``, ``model``,
        ``source``, ``settings``, ``seconds`` and ``tokens_per_second``.  None on all ranks but the first.

    Raises:
        RowError: a row that cannot be used.
    """
    began = time.perf_counter()
    replica, follower = divmod(dist.get_rank(), bench.tp)
    mine = range(replica, problems.count, dist.get_world_size() // bench.tp)
    graded: list[Graded] = []
    with Progress(len(mine) * (1 + settings.samples), problems.name, "response", bench.is_main) as progress:
        for start in range(0, len(mine), CHUNK):
            answered = list(_answer(bench, problems, mine[start : start + CHUNK], settings, progress.update))
            graded += answered if follower else grade(bench.grader, answered)
    everything: list[list[Graded]] | None = [[] for _ in range(dist.get_world_size())] if bench.is_main else None
    dist.gather_object([] if follower else graded, everything)
    if everything is None:
        return None
    responses = sorted((r for part in everything for r in part), key=lambda r: r.order)
    seconds = time.perf_counter() - began
    result = {
        "set": problems.name,
        "model": bench.model,
        "source": problems.path,
        **score(responses),
        "settings": asdict(settings) | _budget(bench.processor.config),
        "seconds": seconds,
        "tokens_per_second": sum(response.tokens for response in responses) / seconds,
    }
    _write(out, problems.name, result, responses)
    return result


def _answer(
    bench: Bench, problems: ProblemSet, indices: Sequence[int], settings: Settings, progress: Callable[[int], None]
) -> Iterator[Graded]:
    """Responses to the problems ``indices``, not yet graded; a prompt over the limit gives wrong ones."""
    rows = [problems.rows[index] for index in indices]
    lengths = bench.processor.lengths(rows, generation=True)
    fits = [at for at, length in enumerate(lengths) if isinstance(length, int)]
    samples = bench.processor.encode([rows[at] for at in fits], generation=True)
    blank = {index: _ungraded(index, row, settings.metric) for index, row in zip(indices, rows, strict=True)}
    for index in set(indices) - {indices[at] for at in fits}:
        for sample in (None, *range(settings.samples)):
            progress(1)
            yield replace(blank[index], sample=sample, reason="prompt too long")
    greedy = [_prompt(sample, [0], settings) for sample in samples]
    for at, [found] in zip(fits, bench.engine.generate(greedy, 0.0, progress), strict=True):
        yield _with(bench, blank[indices[at]], None, found)
    if settings.samples:
        seeds = [seeds_of(settings.seed, 0, indices[at], settings.samples) for at in fits]
        drawn = [_prompt(*item, settings) for item in zip(samples, seeds, strict=True)]
        for at, several in zip(fits, bench.engine.generate(drawn, 1.0, progress), strict=True):
            yield from (_with(bench, blank[indices[at]], number, found) for number, found in enumerate(several))


def _prompt(sample: Sample, seeds: Sequence[int], settings: Settings) -> Prompt:
    return Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, settings.max_tokens)


def _ungraded(index: int, row: Row, wanted: str) -> Graded:
    metric, reference = reference_of(row, wanted)
    question = "\n".join(message.text for message in row.prompt)
    return Graded(index, None, row.id, row.source, question, reference, row.options, metric)


def _with(bench: Bench, blank: Graded, sample: int | None, found: Generation) -> Graded:
    text = bench.processor.decode(found.tokens)
    return replace(blank, sample=sample, response=text, tokens=len(found.tokens), stopped=found.stopped)


def grade(grader: GraderPool, responses: Sequence[Graded]) -> list[Graded]:
    """The same responses with their verdicts.  Unlike the reward, a box in a response that was cut off counts."""
    graded = list(responses)
    boxed = [at for at, r in enumerate(responses) if r.response is not None and r.metric == "boxed"]
    requests = [GradeRequest(r.response or "", r.reference, r.options) for r in (responses[at] for at in boxed)]
    for at, verdict in zip(boxed, grader.grade(requests), strict=True):
        graded[at] = replace(responses[at], correct=verdict.correct, reason=str(verdict.reason))
    for at, r in enumerate(responses):
        if r.response is not None and r.metric == "exact":
            same = r.response.strip() == r.reference.strip()
            graded[at] = replace(r, correct=same, reason="same text" if same else "different")
    return graded


def _budget(config: DataConfig) -> dict[str, Any]:
    names = ("template", "min_pixels", "max_pixels", "max_images", "max_frames", "max_prompt_tokens")
    return {name: getattr(config, name) for name in names}


def _write(out: Path, name: str, result: dict[str, Any], responses: Sequence[Graded]) -> None:
    """Write the responses, then the scores under a temporary name that is renamed last."""
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(response.to_json(), ensure_ascii=False) + "\n" for response in responses)
    (out / f"{name}.responses.jsonl").write_text("".join(lines), encoding="utf-8")
    partial = out / f".{name}.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.rename(out / f"{name}.json")
