"""A model on problem sets: greedy and sampled responses by vLLM, graded, scored and kept.

Under ``torchrun`` the engine's replicas share the problems and the first rank writes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ovr_megatron.config import DataConfig, RolloutConfig, SourceConfig
from ovr_megatron.curation.stage import listing
from ovr_megatron.data.processing import Processor, Sample, TooLongError
from ovr_megatron.data.schema import Row
from ovr_megatron.evaluation.kept import Kept, check_results, finished_before
from ovr_megatron.evaluation.problems import ProblemSet, Settings, open_problems
from ovr_megatron.evaluation.scoring import BOXED, Graded, score, with_votes
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.stop import StopRequest, StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.work_barrier import WorkBarrier

CHUNK = 512  # problems whose images are held at a time


@dataclass(frozen=True)
class Bench:
    """What answers and grades, for any number of problem sets: ``tp`` neighbouring ranks hold one engine.

    With ``stop`` an evaluation is left when a signal comes, on any rank.
    """

    model: str
    engine: RolloutEngine
    processor: Processor
    grader: GraderPool
    tp: int = 1
    stop: StopRequest | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return dist.get_rank() == 0


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
    check_results(out, sets)
    problems = [open_problems(SourceConfig(path=path, name=name), limit) for name, path in sets.items()]
    processor = Processor(model, data)
    engine = RolloutEngine(model, rollout, processor, dtype, data.max_prompt_tokens + settings.max_tokens)
    with GraderPool() as grader:
        bench = Bench(str(model), engine, processor, grader, rollout.tp)
        for each in problems:
            chosen = each.settings(settings)
            weights = [entry for entry in listing(str(model)) if not entry[0].endswith(".md")]  # the card changes alone
            told = [weights, dtype, listing(each.path), each.count, asdict(chosen), _budget(data), rollout.stop]
            mark = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:12]
            if result := evaluate(bench, each, chosen, out, mark):
                yield result


def evaluate(
    bench: Bench, problems: ProblemSet, settings: Settings, out: Path, mark: str | None = None
) -> dict[str, Any] | None:
    """Ask every problem, write ``out/NAME.json`` and ``out/NAME.responses.jsonl``; a collective.

    With ``mark``, which stands for model, problems and settings, every response is kept as it comes; an evaluation of
    the same mark that was interrupted goes on where it was, and of one that is done nothing is asked again, only
    graded; files stay as they are where that changes nothing.

    Returns:
        What is in ``NAME.json``: the scores of `ovr_megatron.evaluation.scoring.score` with ``set``, ``model``,
        ``source``, ``benchmark`` (its name, or None), ``settings``, ``rules``, the first problem's ``prompt`` as the
        model sees it (None if it is too long), ``seconds`` and ``tokens_per_second``.  None on all ranks but the first.

    Raises:
        RowError: a row that cannot be used.
        StopRequested: on all ranks, as one was asked to stop; nothing is written.
    """
    assert settings.samples is not None
    began = time.perf_counter()
    replica, follower = divmod(dist.get_rank(), bench.tp)
    mine = range(replica, problems.count, dist.get_world_size() // bench.tp)
    graded: list[Graded] = []
    finished = finished_before(out, problems.name, mark) if mark else None
    kept = Kept(out / f".{problems.name}.{mark}" if mark else None, replica, follower == 0)
    kept.take(finished[1] if finished else ())
    work = WorkBarrier(f"evaluation/{out}/{problems.name}", bench.stop)

    def between() -> bool:
        return work.engine_step(bench.engine.agree)

    with kept, Progress(len(mine) * (1 + settings.samples), problems.name, "response", bench.is_main) as progress:
        with suppress(StopRequested):  # the other ranks hear of it in the barrier
            for start in range(0, len(mine), CHUNK):
                chunk = mine[start : start + CHUNK]
                answered = list(_answer(bench, problems, chunk, settings, kept, progress.update, between))
                graded += answered if follower else grade(bench.grader, answered)
    work.wait()
    everything: list[list[Graded]] | None = [[] for _ in range(dist.get_world_size())] if bench.is_main else None
    dist.gather_object([] if follower else graded, everything)
    if everything is None:
        return None
    responses = sorted((r for part in everything for r in part), key=lambda r: r.order)
    official = problems.known.official if problems.known else None
    if (
        finished
        and [_plain(r) for r in responses] == finished[1]
        and finished[0] | score(responses, official) == finished[0]
    ):
        return finished[0]
    seconds = finished[0]["seconds"] if finished else time.perf_counter() - began
    result = {
        "set": problems.name,
        "model": bench.model,
        "source": problems.path,
        "benchmark": problems.known.name if problems.known else None,
        **score(responses, official),
        "settings": asdict(settings) | _budget(bench.processor.config),
        "rules": dict(problems.known.rules) if problems.known else {},
        "prompt": _first_prompt(bench.processor, problems),
        "seconds": seconds,
        "tokens_per_second": sum(response.tokens for response in responses) / seconds,
        "mark": mark,
    }
    try:
        _write(out, problems.name, result, responses)
    except OSError as error:
        if mark:
            raise
        # While a run trains, the scores go into its metrics, too.
        say(f"warning: the responses to {problems.name} are not kept ({error}); training goes on")
    for left_over in out.glob(f".{problems.name}.*.answers.jsonl"):  # of other settings, too
        left_over.unlink()
    return result


def _plain(response: Graded) -> dict[str, Any]:
    """A response as it is read back from its file."""
    return json.loads(json.dumps(response.to_json()))


def _answer(
    bench: Bench,
    problems: ProblemSet,
    indices: Sequence[int],
    settings: Settings,
    kept: Kept,
    progress: Callable[[int], None],
    between: Callable[[], bool],
) -> Iterator[Graded]:
    """Responses to the problems ``indices``, not yet graded; a prompt over the limit gives wrong ones.

    ``progress`` is called with the number of responses that are there, ``between`` between two steps of the engine.
    """
    assert settings.samples is not None
    rows = [problems.rows[index] for index in indices]
    lengths = bench.processor.lengths(rows, generation=True)
    fits = [at for at, length in enumerate(lengths) if isinstance(length, int)]
    wanted: dict[int, list[int | None]] = {at: [None, *range(settings.samples)] for at in fits}
    todo = [at for at in fits if any((indices[at], sample) not in kept for sample in wanted[at])]
    progress(sum((indices[at], sample) in kept for at in todo for sample in wanted[at]))
    progress(len(wanted) * (1 + settings.samples) - len(todo) * (1 + settings.samples))
    samples = dict(zip(todo, bench.processor.encode([rows[at] for at in todo], generation=True), strict=True))
    for greedy in (True, False):
        asked: list[tuple[int, list[int | None]]] = []
        for at in todo:
            group = [number for number in wanted[at] if (number is None) == greedy]
            if missing := [number for number in group if (indices[at], number) not in kept]:
                asked.append((at, missing))

        def finished(number: int, found: list[Generation], asked: list = asked) -> None:
            at, several = asked[number]
            for sample, one in zip(several, found, strict=True):
                text = bench.processor.decode(one.tokens)
                kept.add(indices[at], sample, {"response": text, "tokens": len(one.tokens), "stopped": one.stopped})
            progress(len(found))

        prompts = []
        for at, several in asked:
            seeds = seeds_of(settings.seed, 0, indices[at], settings.samples)
            prompts.append(_prompt(samples[at], [0 if s is None else seeds[s] for s in several], settings))
        if prompts:
            bench.engine.generate(prompts, 0.0 if greedy else settings.temperature, finished, between)
    for at, (index, row) in enumerate(zip(indices, rows, strict=True)):
        blank = _ungraded(index, row, *problems.metric(row, settings.metric))
        for sample in (None, *range(settings.samples)):
            if at in wanted:
                yield replace(blank, sample=sample, **kept[index, sample])
            else:
                progress(1)
                yield replace(blank, sample=sample, reason="prompt too long")


def _prompt(sample: Sample, seeds: Sequence[int], settings: Settings) -> Prompt:
    return Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, settings.max_tokens)


def _ungraded(index: int, row: Row, metric: str, reference: str) -> Graded:
    question = "\n".join(message.text for message in row.prompt)
    return Graded(index, None, row.id, row.source, question, reference, row.options, metric)


def grade(grader: GraderPool, responses: Sequence[Graded]) -> list[Graded]:
    """Return the responses with their verdicts and votes.

    Unlike for the reward, a box in a response that was cut off counts.
    """
    graded = list(responses)
    boxed = [at for at, r in enumerate(responses) if r.response is not None and r.metric != "exact"]
    requests = [
        GradeRequest(r.response or "", r.reference, r.options, BOXED.get(r.metric, r.metric))
        for r in (responses[at] for at in boxed)
    ]
    for at, verdict in zip(boxed, grader.grade(requests), strict=True):
        graded[at] = replace(responses[at], correct=verdict.correct, reason=str(verdict.reason))
    for at, r in enumerate(responses):
        if r.response is not None and r.metric == "exact":
            same = r.response.strip() == r.reference.strip()
            graded[at] = replace(r, correct=same, reason="same text" if same else "different")
    return with_votes(grader, graded)


def _first_prompt(processor: Processor, problems: ProblemSet) -> str | None:
    try:
        [sample] = processor.encode([problems.rows[0]], generation=True)
    except TooLongError:
        return None
    return processor.decode(sample.prompt_tokens, skip_special_tokens=False)


def _budget(config: DataConfig) -> dict[str, Any]:
    names = ("template", "min_pixels", "max_pixels", "max_images", "max_frames", "max_prompt_tokens")
    return {name: getattr(config, name) for name in names}


def _write(out: Path, name: str, result: dict[str, Any], responses: Sequence[Graded]) -> None:
    """Write the responses, then the scores; at no moment do old scores, or a judge's, stand beside new responses."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (f"{name}.json", f"{name}.verdicts.jsonl"):
        (out / old).unlink(missing_ok=True)
    lines = (json.dumps(response.to_json(), ensure_ascii=False) + "\n" for response in responses)
    write_whole(out / f"{name}.responses.jsonl", "".join(lines))
    write_whole(out / f"{name}.json", json.dumps(result, indent=2) + "\n")
