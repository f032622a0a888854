"""Write and read the files of an archived iteration: per-token arrays of responses, and lines to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.batch import Response
from ovr_megatron.runtime.json_lines import json_lines


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


def write_arrays(path: Path, responses: Sequence[Response], arrays: Mapping[str, Ragged], version: int | None) -> None:
    """Write tokens and arrays of all ``responses`` one after the other; ``index`` says how to cut them.

    With ``version``, that of the current policy, there is an array of the tokens' versions, too.
    """
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
    if version is not None:
        tensors["versions"] = np.concatenate([_versions(r, version) for r in responses])
    for name, values in arrays.items():
        tensors[name] = np.concatenate(values)
    # Not the library's `save_file`, whose files nobody else may read, and whose error for a full disk is no OSError.
    path.write_bytes(save(tensors))


def _versions(response: Response, version: int) -> np.ndarray:
    if response.versions is None:
        return np.full(len(response.tokens), version, np.int32)
    return response.versions


def read_arrays(path: Path) -> tuple[np.ndarray, dict[str, Ragged]]:
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


def read_lines(path: Path) -> dict[tuple[int, int], ArchivedResponse]:
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


def read_responses(path: Path, lines: Mapping[tuple[int, int], ArchivedResponse], iteration: int) -> list[Response]:
    """Return the responses of a file of ``iteration``."""
    index, arrays = read_arrays(path)
    numbers = zip(index.tolist(), arrays["tokens"], arrays["logprobs"], strict=True)
    responses = []
    for i, ((prompt, sample, _), response_tokens, response_logprobs) in enumerate(numbers):
        versions = arrays["versions"][i] if "versions" in arrays else None
        if versions is not None and (versions == iteration).all():
            versions = None
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
                versions=versions,
            )
        )
    return responses
