"""A model on problem sets: greedy and sampled responses by vLLM, graded, scored and kept.

Under ``torchrun`` the engine's replicas share the problems and the first rank writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from ovr_megatron.config import ConfigError, DataConfig, RolloutConfig, SourceConfig
from ovr_megatron.curation.journal import Journal
from ovr_megatron.curation.stage import listing
from ovr_megatron.data.processing import Processor, Sample, TooLongError
from ovr_megatron.data.schema import ENDLESS, Row, RowSource
from ovr_megatron.data.sources import open_source
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, OURS, Benchmark
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
        samples: Sampled responses for pass@k, beside the greedy one; 0 for none, None for as many as the set asks for.
        temperature: Of the samples.
        max_tokens: Longest response.
        metric: ``boxed``, ``exact``, or ``auto`` (`ovr_megatron.evaluation.scoring.reference_of`).
        seed: Of the samples.
    """

    samples: int | None = 0
    temperature: float = 1.0
    max_tokens: int = 1024
    metric: str = "auto"
    seed: int = 1


@dataclass(frozen=True)
class ProblemSet:
    """The first ``count`` rows of a source; ``name`` becomes the name of the files.

    ``known`` is the benchmark of this name, whose rules and scores then hold, wherever the rows are from.
    """

    name: str
    path: str
    rows: RowSource | Sequence[Row]
    count: int
    known: Benchmark | None = None

    def settings(self, wanted: Settings) -> Settings:
        """The same with a number of samples."""
        own = self.known.samples if self.known else 0
        return wanted if wanted.samples is not None else replace(wanted, samples=own)

    def metric(self, row: Row, wanted: str) -> tuple[str, str]:
        """How a row is graded, and against what (`ovr_megatron.evaluation.scoring.reference_of`)."""
        metric, reference = reference_of(row, wanted)
        rules = self.known.rules if self.known and metric == "boxed" else {}
        return rules.get(row.source) or rules.get("") or metric, reference


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

    A path that is the name of a benchmark stands for the place where it is published.

    Raises:
        ConfigError: the source is endless and there is no limit, or another harness runs the benchmark.
        RowError: the source cannot be opened.
    """
    assert source.name
    known = BENCHMARKS.get(source.name)
    paths: tuple[str, ...] = (source.path,)
    if source.path in BENCHMARKS and not Path(source.path).exists():
        known = BENCHMARKS[source.path]
        if known.harness != OURS:
            raise ConfigError(
                f"{known.title} is run by {known.harness} (its name there: {known.command}); see the docs"
            )
        paths = known.paths
    # A name would stand for the rows' own sources.
    opened = [open_source(replace(source, path=path, name=None)) for path in paths]
    rows: RowSource | Sequence[Row] = opened[0]
    if len(rows) >= ENDLESS and not limit:
        raise ConfigError(f"{source.path} never ends; give a limit, or for a puzzle split=heldout")
    if known and known.only:
        rows = [row for at in range(len(opened[0])) if (row := opened[0][at]).source == known.only]
        if not rows:
            raise ConfigError(f"{source.path}: no row is of the source {known.only!r}, which {known.title} is about")
    elif len(opened) > 1:
        rows = Joined(opened)
    return ProblemSet(source.name, source.path, rows, min(limit or len(rows), len(rows)), known)


class Joined:
    """The rows of several sources, one source after the other."""

    def __init__(self, sources: Sequence[RowSource]):
        """Join ``sources``."""
        self._sources = sources

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(map(len, self._sources))

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``; raises `RowError` if it cannot be used, `IndexError` past the end."""
        for source in self._sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)


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
    """
    assert settings.samples is not None
    began = time.perf_counter()
    replica, follower = divmod(dist.get_rank(), bench.tp)
    mine = range(replica, problems.count, dist.get_world_size() // bench.tp)
    graded: list[Graded] = []
    finished = _finished(out, problems.name, mark) if mark else None
    kept = Kept(out / f".{problems.name}.{mark}" if mark else None, replica, follower == 0)
    kept.take(finished[1] if finished else ())
    with kept, Progress(len(mine) * (1 + settings.samples), problems.name, "response", bench.is_main) as progress:
        for start in range(0, len(mine), CHUNK):
            answered = list(_answer(bench, problems, mine[start : start + CHUNK], settings, kept, progress.update))
            graded += answered if follower else grade(bench.grader, answered)
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
    _write(out, problems.name, result, responses)
    for left_over in out.glob(f".{problems.name}.*.answers.jsonl"):  # of other settings, too
        left_over.unlink()
    return result


def _finished(out: Path, name: str, mark: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Result and responses of a finished evaluation of this mark, None if there is none; all ranks find the same."""
    scores, responses = out / f"{name}.json", out / f"{name}.responses.jsonl"
    told = [False]
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(scores.read_text(encoding="utf-8"))
            told = [isinstance(result, dict) and result.get("mark") == mark and responses.exists()]
    dist.broadcast_object_list(told)
    if not told[0]:
        return None
    lines = filter(None, responses.read_text(encoding="utf-8").split("\n"))
    return json.loads(scores.read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def _plain(response: Graded) -> dict[str, Any]:
    """A response as it is read back from its file."""
    return json.loads(json.dumps(response.to_json()))


class Kept:
    """Responses by problem and sample (None: greedy), those of an interrupted evaluation too.  A context manager.

    Args:
        stem: of the files, one for each replica; None keeps nothing on disk.
        replica: number of this one; however many there were, all files are read.
        leads: whether this rank writes.
    """

    def __init__(self, stem: Path | None, replica: int, leads: bool):
        self._found: dict[tuple[int, int | None], dict[str, Any]] = {}
        self._journal: Journal | None = None
        if stem is None:
            return
        for path in sorted(stem.parent.glob(f"{stem.name}.*.answers.jsonl")):
            with Journal(path) as journal:
                self._found.update({(entry["problem"], entry["sample"]): entry["response"] for entry in journal})
        dist.barrier()  # all ranks of an engine must find the same, before one of them adds to it
        if leads:
            self._journal = Journal(stem.with_name(f"{stem.name}.{replica}.answers.jsonl"))

    def take(self, responses: Iterable[dict[str, Any]]) -> None:
        """Add the responses of a finished evaluation, which are on disk."""
        for told in responses:
            if told["response"] is not None:
                names = ("response", "tokens", "stopped")
                self._found[told["index"], told["sample"]] = {name: told[name] for name in names}

    def __enter__(self) -> Self:
        """Return the responses themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        if self._journal is not None:
            self._journal.__exit__(kind, error, at)

    def __contains__(self, place: tuple[int, int | None]) -> bool:
        """Whether there is a response of this problem and sample."""
        return place in self._found

    def __getitem__(self, place: tuple[int, int | None]) -> dict[str, Any]:
        """Fields of `Graded`."""
        return self._found[place]

    def add(self, problem: int, sample: int | None, response: dict[str, Any]) -> None:
        """Keep a response."""
        self._found[problem, sample] = response
        if self._journal is not None:
            key = (problem << 16) + (0 if sample is None else sample + 1)
            self._journal.add(key, {"problem": problem, "sample": sample, "response": response})


def _answer(
    bench: Bench,
    problems: ProblemSet,
    indices: Sequence[int],
    settings: Settings,
    kept: Kept,
    progress: Callable[[int], None],
) -> Iterator[Graded]:
    """Responses to the problems ``indices``, not yet graded; a prompt over the limit gives wrong ones."""
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
            bench.engine.generate(prompts, 0.0 if greedy else settings.temperature, finished)
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
    """The same responses with their verdicts.  Unlike the reward, a box in a response that was cut off counts."""
    graded = list(responses)
    boxed = [at for at, r in enumerate(responses) if r.response is not None and r.metric != "exact"]
    rules = {"boxed": "auto"}
    requests = [
        GradeRequest(r.response or "", r.reference, r.options, rules.get(r.metric, r.metric))
        for r in (responses[at] for at in boxed)
    ]
    for at, verdict in zip(boxed, grader.grade(requests), strict=True):
        graded[at] = replace(responses[at], correct=verdict.correct, reason=str(verdict.reason))
    for at, r in enumerate(responses):
        if r.response is not None and r.metric == "exact":
            same = r.response.strip() == r.reference.strip()
            graded[at] = replace(r, correct=same, reason="same text" if same else "different")
    return graded


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
    told = "".join(json.dumps(response.to_json(), ensure_ascii=False) + "\n" for response in responses)
    texts = {f"{name}.responses.jsonl": told, f"{name}.json": json.dumps(result, indent=2) + "\n"}
    for file, text in texts.items():
        (out / f".{file}.partial").write_text(text, encoding="utf-8")
    for old in (f"{name}.json", f"{name}.verdicts.jsonl"):
        (out / old).unlink(missing_ok=True)
    for file in texts:
        (out / f".{file}.partial").replace(out / file)
