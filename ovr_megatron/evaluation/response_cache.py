"""Cache responses on disk, and find the results of finished evaluations."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, cast

import torch.distributed as dist

from ovr_megatron.config import ConfigError
from ovr_megatron.evaluation.scoring import EvaluationResult
from ovr_megatron.runtime.journal import Journal
from ovr_megatron.runtime.json_lines import read_json_lines

RESPONSE_FIELDS = ("response", "tokens", "stopped")  # the fields of `GradedResponse` that generation fills in


class Generated(TypedDict):
    """The fields ``RESPONSE_FIELDS`` of a response."""

    response: str | None
    tokens: int
    stopped: bool


class StoredResponse(Generated):
    """The fields of a line of ``SET.responses.jsonl`` that we rely on; the line has all of `GradedResponse`."""

    index: int
    sample: int | None


ResponseKey = tuple[int, int | None]
"""Index of the problem and of the sample; None is the greedy response."""


def check_results(out: Path, names: Iterable[str]) -> None:
    """Refuse a folder in which the results of the sets ``names`` would replace other files.

    Raises:
        ConfigError: names the file.
    """
    for name in names:
        path = out / f"{name}.json"
        if not path.exists():
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # A file that cannot be read may be anybody's: it is not replaced either.
            result = None
        if not isinstance(result, dict) or not {"set", "greedy"} <= result.keys():
            raise ConfigError(f"--out {out}: {path.name} is no result of an evaluation; give another folder")


def read_finished(out: Path, name: str, mark: str) -> tuple[EvaluationResult, list[StoredResponse]] | None:
    """Read the result and the responses of a finished evaluation with this mark; None if there is none.

    A collective: all ranks return the same.  A damaged line costs its response only, which is generated again.
    """
    responses = out / f"{name}.responses.jsonl"
    # The first rank decides for all: a rank that sees another state of a shared disk would take another path, and the
    # collectives of the ranks would no longer match.
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        # A damaged result counts as none: the set is evaluated again.
        with contextlib.suppress(OSError, ValueError):
            result = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
            if isinstance(result, dict) and result.get("mark") == mark and responses.exists():
                box = [result]
    dist.broadcast_object_list(box)
    result = box[0]
    if result is None:
        return None
    lines = read_json_lines(responses, "index", "sample", *RESPONSE_FIELDS)
    return result, cast(list[StoredResponse], lines)


class ResponseCache:
    """Responses by problem and sample, those of an interrupted evaluation included.  A context manager.

    Args:
        stem: Path of the files without their endings, one file for each replica; None caches in memory only.
        replica: Index of this engine.  All files are read, however many replicas wrote them.
        is_writer: Whether this rank writes its replica's file.
    """

    def __init__(self, stem: Path | None, replica: int, is_writer: bool):
        self._responses: dict[ResponseKey, Generated] = {}
        self._journal: Journal | None = None
        if stem is None:
            return
        # Sorted: where two files have the response, the same one counts on all ranks.
        for path in sorted(stem.parent.glob(f"{stem.name}.*.answers.jsonl")):
            with Journal(path) as journal:
                for entry in journal:
                    self._responses[entry["problem"], entry["sample"]] = entry["response"]
        # All ranks of an engine must read the same responses, before one of them appends to a file: they would
        # otherwise hand the engine different prompts.
        dist.barrier()
        if is_writer:
            self._journal = Journal(stem.with_name(f"{stem.name}.{replica}.answers.jsonl"))

    def add_finished(self, responses: Iterable[StoredResponse]) -> None:
        """Add the responses of a finished evaluation; they are on disk, so they are not written again."""
        for response in responses:
            # None stands for a prompt over the limit, which the engine never gets.
            if response["response"] is not None:
                key = response["index"], response["sample"]
                self._responses[key] = Generated(
                    response=response["response"], tokens=response["tokens"], stopped=response["stopped"]
                )

    def __enter__(self) -> Self:
        """Return the cache itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        if self._journal is not None:
            self._journal.__exit__(kind, error, trace)

    def __contains__(self, key: ResponseKey) -> bool:
        """Return whether there is a response of this problem and sample."""
        return key in self._responses

    def __getitem__(self, key: ResponseKey) -> Generated:
        """Return the fields ``RESPONSE_FIELDS`` of a response."""
        return self._responses[key]

    def add(self, problem: int, sample: int | None, response: Generated) -> None:
        """Add a response and append it to the file, so that an interruption from here on does not lose it."""
        self._responses[problem, sample] = response
        if self._journal is not None:
            # The journal wants one integer: 16 bits of it for the sample, of which 0 is the greedy response.
            key = (problem << 16) + (0 if sample is None else sample + 1)
            self._journal.add(key, {"problem": problem, "sample": sample, "response": response})
