"""Archive the rollouts of every iteration: text to read, and per-token arrays to learn from again or to check.

``rollouts/000012.jsonl`` has a line for each response.  ``rollouts/000012/`` has tokens and per-token arrays as
safetensors, a file for each rank that trained on some, and ``iteration.json``: the length limit, the prompts that were
trained on and the position in the prompt stream, from which the prompts with their images are drawn again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from safetensors import SafetensorError

from ovr_megatron.data.schema import Row
from ovr_megatron.errors import UserError
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.archive_files import ArchivedResponse, read_arrays, read_lines, read_responses, write_arrays
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.prompts import Prompts, PromptState, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.exchange import gather_objects
from ovr_megatron.runtime.files import atomic_file, write_whole

PICTURES = 2  # images saved of a rank's responses that are trained on, and as many of its others
# Fields of `Experience`, and the names of their arrays in the files.
ARRAYS = ("values", "advantages", "old", "reference", "teacher")


class ArchiveError(UserError, ValueError):
    """Archived rollouts are missing or damaged; the message names the file."""


class IterationSummary(TypedDict):
    """``iteration.json``: what else an iteration is restored from (see `SavedIteration`).

    Attributes:
        kept: index and tokens of each prompt that was trained on.
        long: True of a long round; absent without ``rollout.oversample``.
        postponed: indices of the prompts that were left to a long round; absent without ``rollout.oversample``.
        restarted: indices in the queue of unfinished prompts of those that began again; absent without
            ``rollout.max_staleness``.
        unfinished: indices of the prompts that the next round went on with; absent likewise.
        mixed: index of each prompt with rewards, and whether these differ; absent where they decide about no prompt.
    """

    limit: int
    kept: list[list[int]]
    stream: PromptState
    drawn: int
    long: NotRequired[bool]
    postponed: NotRequired[list[int]]
    restarted: NotRequired[list[int]]
    unfinished: NotRequired[list[int]]
    mixed: NotRequired[list[tuple[int, bool]]]


@dataclass(frozen=True)
class SavedIteration:
    """An iteration as it was read back.

    Attributes:
        limit: most tokens of a prompt and its response together.
        train_prompts: tokens by index of the prompts that were trained on (see `Rollout`).
        stream: state of the prompt stream before the iteration.
        drawn: prompts that the iteration drew from it.
        responses: those in the files that this rank has read.
        long: whether it was a long round.
        postponed: indices of the prompts that were left to a long round.
        restarted: as in `Rollout`.
        unfinished: indices of the prompts that the next round went on with.
        where: file and line of the row, by index of its prompt; empty where they are not known.
        mixed: as in `Rollout`; empty where rewards decide about no later prompt.
    """

    limit: int
    train_prompts: dict[int, int]
    stream: PromptState
    drawn: int
    responses: list[Response]
    long: bool = False
    postponed: Sequence[int] = ()
    restarted: Sequence[int] | None = None
    unfinished: Sequence[int] = ()
    where: Mapping[int, str] = field(default_factory=dict)
    mixed: Mapping[int, bool] = field(default_factory=dict)


def write(
    run: Path,
    iteration: int,
    rollout: Rollout,
    stream: PromptState,
    responses: Sequence[Response],
    arrays: Mapping[str, Ragged | None],
    world: World,
) -> str | None:
    """Archive an iteration.  A collective.

    Responses to prompts that were given up or not trained on have lines to read, but no arrays.

    Args:
        run: the run folder.
        iteration: from 0.
        rollout: what was generated.
        stream: state of the prompt stream before the iteration.
        responses: those that this rank trains on; empty on ranks that hold a copy of another's.
        arrays: for each of these responses an array [n]; None where the algorithm has none.
        world: the processes.

    Returns:
        Why a rank could not write, on all ranks; then no file of the iteration stays.  None if all is written.
    """
    folder = _folder_of(run, iteration)
    train_prompts = [[i, tokens] for i, tokens in rollout.train_prompts.items()]
    summary: IterationSummary = {
        "limit": rollout.limit,
        "kept": train_prompts,
        "stream": stream,
        "drawn": len(rollout.prompts.rows),
    }
    if rollout.long or rollout.postponed:
        summary["long"] = rollout.long
        summary["postponed"] = rollout.postponed
    if rollout.restarted is not None:
        summary["restarted"] = rollout.restarted
        summary["unfinished"] = rollout.unfinished
    if "history" in stream:
        summary["mixed"] = list(rollout.mixed.items())
    part = folder / f"{world.rank:05d}"
    steps: list[Callable[[], None] | None] = [
        partial(_make_empty, folder) if world.is_main else None,
        partial(_write_part, run, iteration, rollout, responses, arrays, part),
        partial(_publish, folder, summary) if world.is_main else None,
    ]
    problem = None
    for step in steps:
        # Every rank takes part in every gather, so that none waits for a rank whose disk is full.
        problem = _run_step(step)
        if problem:
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            break
    return problem


def _folder_of(run: Path, iteration: int) -> Path:
    return run / "rollouts" / f"{iteration:06d}"


def _run_step(step: Callable[[], None] | None) -> str | None:
    """Run this rank's ``step``; return the problem of the first rank whose disk has one, or None.  A collective."""
    problem: str | None = None
    try:
        if step is not None:
            step()
    except OSError as error:
        problem = str(error)
    problems = gather_objects(problem)
    return next(filter(None, problems), None)


def _make_empty(folder: Path) -> None:
    # A run that was killed here may have had more ranks: their files would be read as this iteration's.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_part(
    run: Path,
    iteration: int,
    rollout: Rollout,
    responses: Sequence[Response],
    arrays: Mapping[str, Ragged | None],
    part: Path,
) -> None:
    """Write this rank's arrays, and lines for its responses and for those of its engine that nothing trains on."""
    present = {name: values for name, values in arrays.items() if values is not None}
    untrained = [r for r in rollout.responses if r.prompt not in rollout.train_prompts]
    if responses:
        # Of all tokens where some may be older than the weights of the iteration.
        has_versions = rollout.restarted is not None or any(r.versions is not None for r in responses)
        version = iteration if has_versions else None
        write_arrays(part.with_suffix(".safetensors"), responses, present, version)
    if responses or untrained:
        advantages = present.get("advantages")
        with part.with_suffix(".jsonl").open("w", encoding="utf-8") as out:
            for line in _build_lines(run, iteration, rollout.prompts, responses, advantages):
                out.write(json.dumps(line) + "\n")
            # Lists of their own: each saves the images of a few prompts.
            for line in _build_lines(run, iteration, rollout.prompts, untrained, None):
                out.write(json.dumps(line) + "\n")


def _publish(folder: Path, summary: IterationSummary) -> None:
    """Join the lines of all ranks, and write ``iteration.json`` last: with it the iteration is complete."""
    joined = folder.with_suffix(".jsonl")
    with atomic_file(joined) as out:
        # In the order of ranks: the names are their numbers, filled up with zeros.
        for path in sorted(folder.glob("*.jsonl")):
            with path.open("rb") as lines:
                shutil.copyfileobj(lines, out)
    # After the rename: until then the lines of a rank are in its own file alone.
    for path in folder.glob("*.jsonl"):
        path.unlink()
    write_whole(folder / "iteration.json", json.dumps(summary))


def iterations(run: Path) -> list[int]:
    """Return the iterations whose rollouts are complete, in order."""
    # `iteration.json` is written last, so that a folder with one is complete.
    paths = (run / "rollouts").glob("*/iteration.json")
    return sorted(int(path.parent.name) for path in paths)


def read(run: Path, iteration: int, world: World) -> SavedIteration:
    """Read an iteration back; its files are divided among the ranks, however many wrote them.

    Raises:
        ArchiveError: a file is missing or damaged.
    """
    folder = _folder_of(run, iteration)
    try:
        summary = json.loads((folder / "iteration.json").read_text(encoding="utf-8"))
        lines = read_lines(folder.with_suffix(".jsonl"))
        responses: list[Response] = []
        # Any rank may read any file: responses are exchanged again before anything trains on them.
        paths = sorted(folder.glob("*.safetensors"))
        for path in paths[world.rank :: world.size]:
            responses += read_responses(path, lines, iteration)
        where = {prompt: line["where"] for (prompt, _), line in lines.items()}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        complete = ", ".join(map(str, iterations(run))) or "none"
        raise ArchiveError(
            f"{folder}: the rollouts of iteration {iteration} cannot be read ({error}); whole ones: {complete}"
        ) from error
    return _saved(summary, responses, where)


def _saved(summary: IterationSummary, responses: list[Response], where: Mapping[int, str]) -> SavedIteration:
    train_prompts = {prompt: tokens for prompt, tokens in summary["kept"]}
    return SavedIteration(
        summary["limit"],
        train_prompts,
        summary["stream"],
        summary["drawn"],
        responses,
        summary.get("long", False),
        summary.get("postponed", []),
        summary.get("restarted"),
        summary.get("unfinished", []),
        where,
        dict(summary.get("mixed", [])),
    )


def read_all(run: Path, iteration: int) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """Return the saved arrays [n] of every response of all ranks, by index of the prompt and of the response to it."""
    arrays_by_response: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    folder = _folder_of(run, iteration)
    for path in sorted(folder.glob("*.safetensors")):
        index, arrays = read_arrays(path)
        for i, (prompt, sample, _) in enumerate(index.tolist()):
            response_arrays = {}
            for name, values in arrays.items():
                response_arrays[name] = values[i]
            arrays_by_response[prompt, sample] = response_arrays
    return arrays_by_response


def skip(run: Path, iteration: int, prompts: PromptStream) -> None:
    """Move the prompt stream to where the saved ``iteration`` left it.

    Raises:
        ArchiveError: ``iteration.json`` is damaged.
    """
    path = _folder_of(run, iteration) / "iteration.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        # The saved state is that before the iteration, so its prompts are drawn once more.
        _redraw(prompts, _saved(summary, [], {}))
    except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
        remedy = f"remove {path.parent}, and the iteration is done again"
        raise ArchiveError(f"{path} cannot be read ({error}); {remedy}") from error


def restore(saved: SavedIteration, prompts: PromptStream) -> Rollout:
    """Return the rollout as it was, its prompts drawn again; the stream ends where the iteration left it.

    Raises:
        ArchiveError: other rows are drawn than were archived, so that responses would stand beside other prompts.
    """
    rows = _redraw(prompts, saved)
    _check_rows(rows, saved)
    return Rollout(
        Prompts(rows, prompts.processor),
        saved.limit,
        saved.responses,
        saved.train_prompts,
        long=saved.long,
        postponed=list(saved.postponed),
        restarted=None if saved.restarted is None else list(saved.restarted),
        unfinished=list(saved.unfinished),
        mixed=dict(saved.mixed),
    )


def _check_rows(rows: Sequence[Row], saved: SavedIteration) -> None:
    for prompt, where in sorted(saved.where.items()):
        redrawn = rows[prompt].where if prompt < len(rows) else "missing"
        if redrawn != where:
            raise ArchiveError(
                f"prompt {prompt} was {where} when it was archived and is {redrawn} now; give the settings of data, "
                "reward.rules, algorithm.estimator, prompt_replay and prompt_exploration that drew it"
            )


def _redraw(prompts: PromptStream, saved: SavedIteration) -> list[Row]:
    """Draw the prompts of an iteration once more from the state before it, and leave the same to later ones."""
    if prompts.state() != saved.stream:  # a streamed source goes to a position by reading on to it
        prompts.load(saved.stream)
    if saved.restarted is not None:
        rows = prompts.continue_round(saved.drawn, saved.restarted)
        prompts.keep_unfinished(saved.unfinished)
    else:
        prompts.restart(range(prompts.unfinished))
        rows = prompts.draw_postponed(saved.drawn) if saved.long else prompts.draw(saved.drawn)
        prompts.postpone(saved.postponed)
    prompts.observe(prompts.round_positions, saved.mixed)
    return rows


def _build_lines(
    run: Path,
    iteration: int,
    prompts: Prompts,
    responses: Sequence[Response],
    advantages: Ragged | None,
) -> list[ArchivedResponse]:
    """Return a JSON object for each of ``responses``, and save the first image of a few prompts."""
    image_names: dict[int, str] = {}
    lines: list[ArchivedResponse] = []
    for i, r in enumerate(responses):
        sample = prompts.sample(r.prompt)
        row = prompts.rows[r.prompt]
        if sample.images and r.prompt not in image_names and len(image_names) < PICTURES:
            name = f"rollouts/images/{iteration:06d}_{r.prompt}.png"
            path = run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            sample.images[0].save(path)
            image_names[r.prompt] = name
        advantage_mean = None
        if advantages and len(r.tokens):  # a mean over no tokens would be NaN, which is no JSON
            advantage_mean = float(advantages[i].mean())
        lines.append(
            {
                "iteration": iteration,
                "number": r.prompt,
                "sample": r.sample,
                "where": row.where,
                "prompt": row.prompt[-1].text,
                "response": r.text,
                "reward": r.reward,
                "verdict": r.verdict,
                "failed": r.failed,
                "answer": row.answer,
                "source": row.source,
                "tokens": len(r.tokens),
                "stopped": r.stopped,
                "advantage_mean": advantage_mean,
                "image": image_names.get(r.prompt),
            }
        )
    return lines
