"""Archive the rollouts of every iteration: text to read, and per-token arrays to learn from again or to check.

``rollouts/000012.jsonl`` has a line for each response.  ``rollouts/000012/`` has tokens and per-token arrays as
safetensors, a file for each rank that trained on some, and ``iteration.json``: the length limit, the prompts that were
trained on and the position in the prompt stream, from which the prompts with their images are drawn again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ovr_megatron.data.schema import Row
from ovr_megatron.errors import UserError
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.prompts import Prompts, PromptState, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.exchange import gather_objects
from ovr_megatron.runtime.files import atomic_file, write_whole
from ovr_megatron.runtime.json_lines import json_lines

PICTURES = 2  # images saved of a rank's responses that are trained on, and as many of its others
# Fields of `Experience`, and the names of their arrays in the files.
ARRAYS = ("values", "advantages", "old", "reference")


class ArchiveError(UserError, ValueError):
    """Archived rollouts are missing or damaged; the message names the file."""


class ArchivedResponse(TypedDict):
    """A line of ``rollouts/ITERATION.jsonl``; of its fields a rollout is restored, or people read them.

    Attributes:
        number: index of the prompt in the iteration.
        sample: index among the responses to this prompt.
        where: file and line of the prompt's row.
        tokens: count of the response's tokens.
        image: path below the run folder of the prompt's first image, of a few prompts.
    """

    iteration: int
    number: int
    sample: int
    where: str
    prompt: str
    response: str
    reward: float
    verdict: str
    failed: NotRequired[bool]
    answer: str | None
    source: str
    tokens: int
    stopped: bool
    advantage_mean: float | None
    image: str | None


class IterationSummary(TypedDict):
    """``iteration.json``: what else an iteration is restored from (see `SavedIteration`).

    Attributes:
        kept: index and tokens of each prompt that was trained on.
        long: True of a long round; absent without ``rollout.oversample``.
        postponed: indices of the prompts that were left to a long round; absent without ``rollout.oversample``.
    """

    limit: int
    kept: list[list[int]]
    stream: PromptState
    drawn: int
    long: NotRequired[bool]
    postponed: NotRequired[list[int]]


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
    """

    limit: int
    train_prompts: dict[int, int]
    stream: PromptState
    drawn: int
    responses: list[Response]
    long: bool = False
    postponed: Sequence[int] = ()


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
        _write_numbers(part.with_suffix(".safetensors"), responses, present)
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
        lines = _read_lines(folder.with_suffix(".jsonl"))
        responses: list[Response] = []
        # Any rank may read any file: responses are exchanged again before anything trains on them.
        paths = sorted(folder.glob("*.safetensors"))
        for path in paths[world.rank :: world.size]:
            responses += _read_responses(path, lines)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        complete = ", ".join(map(str, iterations(run))) or "none"
        raise ArchiveError(
            f"{folder}: the rollouts of iteration {iteration} cannot be read ({error}); whole ones: {complete}"
        ) from error
    train_prompts = dict(map(tuple, summary["kept"]))
    return SavedIteration(
        summary["limit"],
        train_prompts,
        summary["stream"],
        summary["drawn"],
        responses,
        summary.get("long", False),
        summary.get("postponed", []),
    )


def read_all(run: Path, iteration: int) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """Return the saved arrays [n] of every response of all ranks, by index of the prompt and of the response to it."""
    arrays_by_response: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    folder = _folder_of(run, iteration)
    for path in sorted(folder.glob("*.safetensors")):
        index, arrays = _read_arrays(path)
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
        _redraw(
            prompts,
            summary["stream"],
            int(summary["drawn"]),
            summary.get("long", False),
            summary.get("postponed", []),
        )
    except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
        remedy = f"remove {path.parent}, and the iteration is done again"
        raise ArchiveError(f"{path} cannot be read ({error}); {remedy}") from error


def restore(saved: SavedIteration, prompts: PromptStream) -> Rollout:
    """Return the rollout as it was, its prompts drawn again; the stream ends where the iteration left it."""
    rows = _redraw(prompts, saved.stream, saved.drawn, saved.long, saved.postponed)
    return Rollout(
        Prompts(rows, prompts.processor),
        saved.limit,
        saved.responses,
        saved.train_prompts,
        long=saved.long,
        postponed=list(saved.postponed),
    )


def _redraw(prompts: PromptStream, before: PromptState, drawn: int, long: bool, postponed: Sequence[int]) -> list[Row]:
    """Draw the ``drawn`` prompts of an iteration once more from the state ``before`` it, and postpone the same."""
    if prompts.state() != before:  # a streamed source goes to a position by reading on to it
        prompts.load(before)
    rows = prompts.draw_postponed(drawn) if long else prompts.draw(drawn)
    prompts.postpone(postponed)
    return rows


def _write_numbers(path: Path, responses: Sequence[Response], arrays: Mapping[str, Ragged]) -> None:
    """Write tokens and arrays of all ``responses`` one after the other; ``index`` says how to cut them."""
    index = []
    tokens = []
    logprobs = []
    for r in responses:
        index.append((r.prompt, r.sample, len(r.tokens)))
        tokens.append(np.asarray(r.tokens, np.int32))
        logprobs.append(np.asarray(r.logprobs, np.float32))
    tensors: dict[str, np.ndarray] = {
        "index": np.array(index, np.int64),
        "tokens": np.concatenate(tokens),
        "logprobs": np.concatenate(logprobs),
    }
    versions = [r.versions for r in responses if r.versions is not None]
    if len(versions) == len(responses):
        tensors["versions"] = np.concatenate(versions)
    for name, values in arrays.items():
        tensors[name] = np.concatenate(values)
    # Not the library's `save_file`, whose files nobody else may read, and whose error for a full disk is no OSError.
    path.write_bytes(save(tensors))


def _read_arrays(path: Path) -> tuple[np.ndarray, dict[str, Ragged]]:
    """Return the index [responses, 3] of a file (prompt, sample, n), and its arrays cut into [n] by response."""
    with safe_open(path, "numpy") as file:
        index = file.get_tensor("index")
        lengths = index[:, 2]
        cuts = np.cumsum(lengths)[:-1]
        arrays = {}
        for name in file.keys():
            if name != "index":
                arrays[name] = np.split(file.get_tensor(name), cuts)
        return index, arrays


def _read_lines(path: Path) -> dict[tuple[int, int], ArchivedResponse]:
    """Return the lines of an iteration by index of the prompt and of the response to it.

    Raises:
        ValueError: a line is damaged; without it the same iteration cannot be learned from.
    """
    lines = {}
    for line in json_lines(path):
        fields = line.parse_or_none()
        if fields is None:
            raise ValueError(f"line {line.number} of {path.name} is damaged")
        response = cast(ArchivedResponse, fields)
        lines[response["number"], response["sample"]] = response
    return lines


def _read_responses(path: Path, lines: Mapping[tuple[int, int], ArchivedResponse]) -> list[Response]:
    """Return the responses of a file."""
    index, arrays = _read_arrays(path)
    versions = arrays.get("versions", [None] * len(index))
    numbers = zip(index.tolist(), arrays["tokens"], arrays["logprobs"], versions, strict=True)
    responses = []
    for (prompt, sample, _), response_tokens, response_logprobs, response_versions in numbers:
        line = lines[prompt, sample]
        responses.append(
            Response(
                prompt,
                sample,
                tokens=response_tokens.tolist(),
                logprobs=response_logprobs,
                stopped=line["stopped"],
                text=line["response"],
                reward=line["reward"],
                verdict=line["verdict"],
                failed=line.get("failed", False),
                versions=response_versions,
            )
        )
    return responses


def _build_lines(
    run: Path, iteration: int, prompts: Prompts, responses: Sequence[Response], advantages: Ragged | None
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
                "prompt": row.messages[-1].text,
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
