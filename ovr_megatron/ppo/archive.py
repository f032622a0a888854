"""Every iteration's rollouts on disk: text to read, and the numbers to go on from or to check.

``rollouts/000012.jsonl`` has a line for each response; ``rollouts/000012/`` has its tokens and per-token numbers as
safetensors, a file for each rank that held some, and ``iteration.json``: the limit, the prompts that were kept and the
place in the prompt stream, from which the prompts, their images too, are drawn again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ovr_megatron.errors import UserError
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Prompts, Rollout
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.json_lines import json_object

PICTURES = 2
ARRAYS = ("values", "advantages", "old", "reference")


class ArchiveError(UserError, ValueError):
    """Rollouts that are not there or not whole; says which file."""


@dataclass(frozen=True)
class Saved:
    """An iteration read back: its limit, tokens by kept prompt, the stream before it, and this rank's part.

    ``arrays`` [n per response] has those of `ARRAYS` that were saved.
    """

    limit: int
    kept: dict[int, int]
    stream: dict[str, Any]
    drawn: int
    responses: list[Response]
    arrays: dict[str, Ragged]


def write(
    run: Path,
    iteration: int,
    rollout: Rollout,
    stream: Mapping[str, Any],
    responses: Sequence[Response],
    arrays: Mapping[str, Ragged | None],
    world: World,
) -> str | None:
    """Save the iteration, a collective; ``responses`` are this rank's part, which no other rank has.

    Responses to prompts that were given up or not kept have lines to read, but no numbers: nothing learns from them.

    Args:
        run: the run folder.
        iteration: from 0.
        rollout: what was generated.
        stream: state of the prompt stream before the iteration.
        responses: this rank's; empty on ranks that hold a copy of another's.
        arrays: numbers for each token [n] of each of these.
        world: the processes.

    Returns:
        Why a rank could not write, on all ranks; then nothing of the iteration stays.  None: all is written.
    """
    folder = run / "rollouts" / f"{iteration:06d}"
    summary = {
        "limit": rollout.limit,
        "kept": [[i, tokens] for i, tokens in rollout.train_prompts.items()],
        "stream": dict(stream),
        "drawn": len(rollout.prompts.rows),
    }
    steps = [
        partial(_begin, folder) if world.is_main else None,
        partial(_write_part, run, iteration, rollout, responses, arrays, folder / f"{world.rank:05d}"),
        partial(_publish, folder, summary) if world.is_main else None,
    ]
    problem = None
    for step in steps:
        # Every rank takes part in every exchange, so that none waits for one whose disk is full.
        problem = _problem_of_any(step, world)
        if problem:
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            break
    return problem


def _problem_of_any(step: Callable[[], None] | None, world: World) -> str | None:
    """Do ``step`` and return the first rank's problem with the disk, if any has one.  A collective."""
    problem: str | None = None
    try:
        if step is not None:
            step()
    except OSError as error:
        problem = str(error)
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def _begin(folder: Path) -> None:
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
    """Write this rank's numbers and lines."""
    present = {name: values for name, values in arrays.items() if values is not None}
    left = [r for r in rollout.responses if r.prompt not in rollout.train_prompts]
    if responses:
        _write_numbers(part.with_suffix(".safetensors"), responses, present)
    if responses or left:
        with part.with_suffix(".jsonl").open("w", encoding="utf-8") as out:
            for line in _lines(run, iteration, rollout.prompts, responses, present.get("advantages")):
                out.write(json.dumps(line) + "\n")
            for line in _lines(run, iteration, rollout.prompts, left, None):
                out.write(json.dumps(line) + "\n")


def _publish(folder: Path, summary: Mapping[str, Any]) -> None:
    """Join the lines of all ranks; ``iteration.json``, which says that the iteration is whole, comes last."""
    whole = folder.with_suffix(".jsonl")
    with whole.with_suffix(".part").open("wb") as out:
        for path in sorted(folder.glob("*.jsonl")):
            with path.open("rb") as lines:
                shutil.copyfileobj(lines, out)
    os.replace(whole.with_suffix(".part"), whole)
    for path in folder.glob("*.jsonl"):
        path.unlink()
    write_whole(folder / "iteration.json", json.dumps(summary))


def iterations(run: Path) -> list[int]:
    """The iterations whose rollouts are there, in order."""
    return sorted(int(path.parent.name) for path in (run / "rollouts").glob("*/iteration.json"))


def read(run: Path, iteration: int, world: World) -> Saved:
    """Read an iteration back; its files are dealt out to the ranks, however many wrote them.

    Raises:
        ArchiveError: a file is missing or damaged.
    """
    folder = run / "rollouts" / f"{iteration:06d}"
    try:
        told = json.loads((folder / "iteration.json").read_text(encoding="utf-8"))
        texts = {}
        with (run / "rollouts" / f"{iteration:06d}.jsonl").open("rb") as lines:
            for number, text in enumerate(lines, 1):
                line = json_object(text)
                if line is None:  # the same iteration cannot be learnt from without it
                    raise ValueError(f"line {number} of {iteration:06d}.jsonl is damaged")
                texts[line["number"], line["sample"]] = line
        responses: list[Response] = []
        arrays: dict[str, Ragged] = {}
        for path in sorted(folder.glob("*.safetensors"))[world.rank :: world.size]:
            _read_numbers(path, texts, responses, arrays)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        there = ", ".join(map(str, iterations(run))) or "none"
        raise ArchiveError(
            f"{folder}: the rollouts of iteration {iteration} cannot be read ({error}); whole ones: {there}"
        ) from error
    return Saved(told["limit"], dict(map(tuple, told["kept"])), told["stream"], told["drawn"], responses, arrays)


def read_all(run: Path, iteration: int) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """The saved arrays [n] of every response of all ranks, by number of the prompt and sample."""
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for path in sorted((run / "rollouts" / f"{iteration:06d}").glob("*.safetensors")):
        index, parts = _split(path)
        for at, (prompt, sample, _) in enumerate(index.tolist()):
            found[prompt, sample] = {name: values[at] for name, values in parts.items()}
    return found


def skip(run: Path, iteration: int, prompts: PromptStream) -> None:
    """Leave the prompt stream where the saved ``iteration`` left it.

    Raises:
        ArchiveError: ``iteration.json`` is damaged.
    """
    path = run / "rollouts" / f"{iteration:06d}" / "iteration.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        prompts.stream.load(summary["stream"])
        prompts.draw(int(summary["drawn"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        remedy = f"remove {path.parent}, and the iteration is done again"
        raise ArchiveError(f"{path} cannot be read ({error}); {remedy}") from error


def restore(saved: Saved, prompts: PromptStream) -> Rollout:
    """The rollout as it was, its prompts drawn again; the stream is left where the iteration left it."""
    prompts.stream.load(saved.stream)
    rows = prompts.draw(saved.drawn)
    return Rollout(Prompts(rows, prompts.processor), saved.limit, saved.responses, saved.kept)


def _write_numbers(path: Path, responses: Sequence[Response], arrays: Mapping[str, Ragged]) -> None:
    found = {
        "index": np.array([(r.prompt, r.sample, len(r.tokens)) for r in responses], np.int64),
        "tokens": np.concatenate([np.asarray(r.tokens, np.int32) for r in responses]),
        "logprobs": np.concatenate([np.asarray(r.logprobs, np.float32) for r in responses]),
    }
    # Not the library's `save_file`, whose files nobody else may read, and whose error for a full disk is no OSError.
    path.write_bytes(save(found | {name: np.concatenate(values) for name, values in arrays.items()}))


def _read_numbers(
    path: Path, texts: dict[tuple[int, int], dict], responses: list[Response], arrays: dict[str, Ragged]
) -> None:
    with safe_open(path, "numpy") as file:
        index = file.get_tensor("index")
        cuts = np.cumsum(index[:, 2])[:-1]
        names = [name for name in file.keys() if name != "index"]
        parts = {name: np.split(file.get_tensor(name), cuts) for name in names}
    tokens, logprobs = parts.pop("tokens"), parts.pop("logprobs")
    for (prompt, sample, _), ids, scores in zip(index.tolist(), tokens, logprobs, strict=True):
        line = texts[prompt, sample]
        responses.append(
            Response(
                prompt,
                sample,
                ids.tolist(),
                scores,
                line["stopped"],
                line["response"],
                line["reward"],
                line["verdict"],
                line.get("failed", False),
            )
        )
    for name, values in parts.items():
        arrays.setdefault(name, []).extend(values)


def _lines(
    run: Path, iteration: int, prompts: Prompts, responses: Sequence[Response], advantages: Ragged | None
) -> list[dict[str, Any]]:
    """One JSON object for each response of this rank, with the pictures of a few prompts."""
    pictured: dict[int, str] = {}
    found = []
    for at, r in enumerate(responses):
        sample, row = prompts.sample(r.prompt), prompts.rows[r.prompt]
        if sample.images and r.prompt not in pictured and len(pictured) < PICTURES:
            name = f"rollouts/images/{iteration:06d}_{r.prompt}.png"
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            sample.images[0].save(run / name)
            pictured[r.prompt] = name
        found.append(
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
                "advantage_mean": float(advantages[at].mean()) if advantages and len(r.tokens) else None,
                "image": pictured.get(r.prompt),
            }
        )
    return found


def _split(path: Path) -> tuple[np.ndarray, dict[str, Ragged]]:
    """The index [responses, 3] of a file (prompt, sample, n), and its arrays cut into [n] by response."""
    with safe_open(path, "numpy") as file:
        index = file.get_tensor("index")
        cuts = np.cumsum(index[:, 2])[:-1]
        names = [name for name in file.keys() if name != "index"]
        return index, {name: np.split(file.get_tensor(name), cuts) for name in names}
