"""Evaluate a model on problem sets: greedy and sampled responses by vLLM, graded, scored and written to files.

Under ``torchrun`` the engine's replicas share the problems, and the first rank writes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ovr_megatron.config import DataConfig, EvaluationSettings, RolloutConfig
from ovr_megatron.curation.stage import listing
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import Row
from ovr_megatron.evaluation.grading import grade, request_maker
from ovr_megatron.evaluation.problems import ProblemSet, open_problems
from ovr_megatron.evaluation.response_cache import Generated, ResponseCache, check_results, read_finished
from ovr_megatron.evaluation.scoring import EvaluationResult, GradedResponse, score
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.offline import Request, answer_rows
from ovr_megatron.rollout.sampling import Generation
from ovr_megatron.runtime.files import write_json, write_whole
from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.stop import StopRequest, StopRequested
from ovr_megatron.runtime.work_barrier import WorkBarrier

logger = get_logger(__name__)

CHUNK = 512  # problems whose images are in memory at a time


@dataclass(frozen=True)
class ProblemRequest(Request):
    """Some of the responses to the problem ``key``: ``samples`` has the index of each, None for the greedy one."""

    samples: Sequence[int | None]


@dataclass(frozen=True)
class EvalContext:
    """The model, engine and graders that evaluate any number of problem sets.

    Attributes:
        model: Name of the model in the results.
        engine: vLLM on this rank.
        processor: Turns rows into prompts and tokens into text.
        grader: Processes that grade.
        tp: Neighbouring ranks that hold one engine.
        stop: An evaluation ends early when any rank receives a signal; None ignores signals.
    """

    model: str
    engine: RolloutEngine
    processor: Processor
    grader: GraderPool
    tp: int = 1
    stop: StopRequest | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this process writes."""
        return dist.get_rank() == 0

    @property
    def replica(self) -> int:
        """Return the index of this rank's engine among the replicas."""
        return dist.get_rank() // self.tp

    @property
    def replicas(self) -> int:
        """Return the number of engines."""
        return dist.get_world_size() // self.tp

    @property
    def is_leader(self) -> bool:
        """Return whether this rank is the first of its engine; the others hold the same responses."""
        return dist.get_rank() % self.tp == 0


def evaluate_sets(
    model: Path,
    settings: EvaluationSettings,
    data: DataConfig,
    rollout: RolloutConfig,
    dtype: str,
    out: Path,
) -> Iterator[EvaluationResult]:
    """Evaluate the folder ``model`` on every set of ``settings`` with one start of vLLM; a collective.

    ``torch.distributed`` must be initialised; vLLM ends when the last result has been taken.

    Yields:
        The result of each set, on the first rank only.

    Raises:
        RowError: a row cannot be used, or has nothing to compare a response with.
    """
    check_results(out, [source.name or "" for source in settings.sources])
    problem_sets = [open_problems(source, settings.limit) for source in settings.sources]
    for problems in problem_sets:
        problems.check_references(problems.resolve_settings(settings).metric)
    processor = Processor(model, data)
    engine = RolloutEngine(model, rollout, processor, dtype, data.max_prompt_tokens + settings.max_tokens)
    with GraderPool(settings.workers) as grader:
        context = EvalContext(str(model), engine, processor, grader, rollout.tp)
        for problems in problem_sets:
            set_settings = problems.resolve_settings(settings)
            mark = _fingerprint(model, problems, set_settings, data, rollout, dtype)
            if result := evaluate(context, problems, set_settings, out, mark):
                yield result


def _fingerprint(
    model: Path,
    problems: ProblemSet,
    settings: EvaluationSettings,
    data: DataConfig,
    rollout: RolloutConfig,
    dtype: str,
) -> str:
    """Return a hash of all that decides about the responses; equal hashes share cached responses."""
    # A new model card does not change the responses.
    weights = [entry for entry in listing(str(model)) if not entry[0].endswith(".md")]
    fields = [
        weights,
        dtype,
        listing(problems.path),
        problems.count,
        settings.as_result(),
        _data_budget(data),
        rollout.stop,
    ]
    return hashlib.sha256(json.dumps(fields, default=str).encode()).hexdigest()[:12]


def evaluate(
    context: EvalContext,
    problems: ProblemSet,
    settings: EvaluationSettings,
    out: Path,
    mark: str | None = None,
) -> EvaluationResult | None:
    """Answer and grade every problem, write ``out/NAME.json`` and ``out/NAME.responses.jsonl``; a collective.

    ``mark`` stands for model, problems and settings.  With it, every response is written to a cache as soon as it is
    complete.  An interrupted evaluation of the same mark continues from its cache.  A finished one generates nothing
    and is only graded again; its files are rewritten only if that changes them.

    Returns:
        The content of ``NAME.json``: the scores of `ovr_megatron.evaluation.scoring.score` with ``set``, ``model``,
        ``source``, ``benchmark`` (its name, or None), ``settings``, ``rules``, the first problem's ``prompt`` as the
        model sees it (None if it is too long), ``seconds`` and ``tokens_per_second``.  None on all ranks but the first.

    Raises:
        RowError: a row cannot be used.
        StopRequested: on all ranks, as one was asked to stop; nothing is written.
    """
    start_time = time.perf_counter()
    finished = read_finished(out, problems.name, mark) if mark else None
    previous_result, previous_responses = finished or (None, [])
    stem = out / f".{problems.name}.{mark}" if mark else None
    cache = ResponseCache(stem, context.replica, context.is_leader)
    cache.add_finished(previous_responses)
    work = WorkBarrier(f"evaluation/{out}/{problems.name}", context.stop)
    local_responses = _generate_and_grade(context, problems, settings, cache, work)
    # Replicas take very different times: this barrier waits as long as any of them makes steps, which the gather below
    # would not. It raises StopRequested on all ranks.
    work.wait()
    responses = _gather(context, local_responses)
    if responses is None:
        return None

    # A finished evaluation is graded anew, since rows or graders may have changed. If nothing did, nothing is written.
    if previous_result and [_as_read_back(response) for response in responses] == previous_responses:
        if previous_result | score(responses, problems.official) == previous_result:
            return previous_result
    seconds = previous_result["seconds"] if previous_result else time.perf_counter() - start_time
    result = _result(context, problems, settings, responses, seconds, mark)
    try:
        _write(out, problems.name, result, responses)
    except OSError as error:
        if mark:
            raise
        # A periodic evaluation has no mark. Its scores are in the metrics of the run as well, so training continues.
        logger.warning(f"the responses to {problems.name} are not kept ({error}); training goes on")
    # Not earlier: until now only the caches held the responses. Caches of other settings are deleted as well.
    for journal in out.glob(f".{problems.name}.*.answers.jsonl"):
        journal.unlink()
    return result


def _generate_and_grade(
    context: EvalContext,
    problems: ProblemSet,
    settings: EvaluationSettings,
    cache: ResponseCache,
    work: WorkBarrier,
) -> list[GradedResponse]:
    """Answer this replica's share of the problems, and grade the responses on its leader; close the cache."""
    assert settings.samples is not None
    indices = range(context.replica, problems.count, context.replicas)
    graded: list[GradedResponse] = []

    make_request = request_maker(context.processor, problems)

    def between() -> bool:
        return work.engine_step(context.engine.agree)

    with cache, Progress(len(indices) * (1 + settings.samples), problems.name, "response", context.is_main) as progress:
        with suppress(StopRequested):  # the barrier that follows raises it on all ranks
            for start in range(0, len(indices), CHUNK):
                chunk = indices[start : start + CHUNK]
                responses = list(_generate(context, problems, chunk, settings, cache, progress.update, between))
                if context.is_leader:
                    responses = grade(context.grader, responses, make_request)
                graded += responses
    return graded


def _generate(
    context: EvalContext,
    problems: ProblemSet,
    indices: Sequence[int],
    settings: EvaluationSettings,
    cache: ResponseCache,
    progress: Callable[[int], None],
    between: Callable[[], bool],
) -> Iterator[GradedResponse]:
    """Yield the responses to the problems ``indices``, not graded yet; generate those that are not cached.

    A problem whose prompt is over the length limit gets responses without text, which count as wrong.

    Args:
        context: Engine and processor.
        problems: The problem set.
        indices: Different problems of the set.
        settings: Settings of the set.
        cache: Generated responses are added to it.
        progress: Called with the number of responses that are complete.
        between: Called between two steps of the engine; it stops when this returns True.
    """
    assert settings.samples is not None
    samples: list[int | None] = [None, *range(settings.samples)]
    rows = {index: problems.rows[index] for index in indices}
    requests = [request for index, row in rows.items() for request in _missing_requests(cache, index, row, settings)]
    progress(len(rows) * len(samples) - sum(len(request.samples) for request in requests))
    too_long: set[int] = set()

    def on_error(index: int, error: dict[str, str]) -> None:
        too_long.add(index)
        progress(len(samples))

    def on_result(request: ProblemRequest, generations: list[Generation]) -> None:
        for sample, generation in zip(request.samples, generations, strict=True):
            text = context.processor.decode(generation.tokens)
            response = Generated(response=text, tokens=len(generation.tokens), stopped=generation.stopped)
            cache.add(request.key, sample, response)
        progress(len(generations))

    answer_rows(context.engine, context.processor, requests, on_error, on_result, between)
    for index, row in rows.items():
        blank = _without_response(index, row, *problems.metric_of(row, settings.metric))
        for sample in samples:
            if index in too_long:
                yield replace(blank, sample=sample, reason="prompt too long")
            else:
                yield replace(blank, sample=sample, **cache[index, sample])


def _missing_requests(
    cache: ResponseCache,
    index: int,
    row: Row,
    settings: EvaluationSettings,
) -> Iterator[ProblemRequest]:
    """Yield requests for the greedy response and for the samples of a problem that are not cached."""
    assert settings.samples is not None
    # A greedy response draws nothing; its seed does not matter.
    if (index, None) not in cache:
        yield ProblemRequest(index, row, [0], settings.greedy, [None])
    # All seeds of the problem, so that a sample has the same seed however many are missing.
    seeds = seeds_of(settings.seed, 0, index, settings.samples)
    missing = [sample for sample in range(settings.samples) if (index, sample) not in cache]
    if missing:
        yield ProblemRequest(index, row, [seeds[sample] for sample in missing], settings.sampling, missing)


def _without_response(index: int, row: Row, metric: str, reference: str) -> GradedResponse:
    question = "\n".join(message.text for message in row.prompt)
    return GradedResponse(index, None, row.id, row.source, question, reference, row.options, metric)


def _gather(context: EvalContext, responses: list[GradedResponse]) -> list[GradedResponse] | None:
    """Gather the responses of all replicas in the order of the file; None on all ranks but the first."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if context.is_main else None
    # The ranks of an engine hold the same responses, so its leader alone sends them.
    dist.gather_object(responses if context.is_leader else [], gathered)
    if gathered is None:
        return None
    all_responses: list[GradedResponse] = []
    for rank_responses in gathered:
        all_responses += rank_responses
    return sorted(all_responses, key=lambda response: response.order)


def _result(
    context: EvalContext,
    problems: ProblemSet,
    settings: EvaluationSettings,
    responses: Sequence[GradedResponse],
    seconds: float,
    mark: str | None,
) -> EvaluationResult:
    """Return the content of ``NAME.json``."""
    benchmark = problems.benchmark
    return {
        "set": problems.name,
        "model": context.model,
        "source": problems.path,
        "benchmark": benchmark.name if benchmark else None,
        **score(responses, problems.official),
        "settings": settings.as_result() | _data_budget(context.processor.config),
        "rules": dict(benchmark.rules) if benchmark else {},
        "prompt": _first_prompt(context.processor, problems),
        "seconds": seconds,
        "tokens_per_second": sum(response.tokens for response in responses) / seconds,
        "mark": mark,
    }


def _as_read_back(response: GradedResponse) -> Any:
    """Return a response as it would be read from its file."""
    return json.loads(json.dumps(response.to_json()))


def _first_prompt(processor: Processor, problems: ProblemSet) -> str | None:
    try:
        [sample] = processor.encode([problems.rows[0]], generation=True)
    except TooLongError:
        return None
    return processor.decode(sample.prompt_tokens, skip_special_tokens=False)


def _data_budget(config: DataConfig) -> dict[str, object]:
    """Return the settings that decide how a row becomes a prompt."""
    names = ("template", "min_pixels", "max_pixels", "max_images", "max_frames", "max_prompt_tokens")
    return {name: getattr(config, name) for name in names}


def _write(out: Path, name: str, result: EvaluationResult, responses: Sequence[GradedResponse]) -> None:
    """Write the responses, then the scores."""
    out.mkdir(parents=True, exist_ok=True)
    # First remove the scores and a judge's verdicts, which belong to the old responses: an interruption between the
    # writes then leaves responses without scores, never scores of other responses.
    for old_name in (f"{name}.json", f"{name}.verdicts.jsonl"):
        (out / old_name).unlink(missing_ok=True)
    lines = (json.dumps(response.to_json(), ensure_ascii=False) + "\n" for response in responses)
    write_whole(out / f"{name}.responses.jsonl", "".join(lines))
    write_json(out / f"{name}.json", result)
