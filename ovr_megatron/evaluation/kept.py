"""Responses that are there already: of an evaluation that was interrupted, and of one that is done."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from ovr_megatron.config import ConfigError
from ovr_megatron.curation.journal import Journal
from ovr_megatron.runtime.json_lines import read_json_lines

RESPONSE = ("response", "tokens", "stopped")  # what an evaluation keeps of one


def check_results(out: Path, names: Iterable[str]) -> None:
    """Refuse a folder in which the results of the sets ``names`` would replace files that are none.

    Raises:
        ConfigError: names the file.
    """
    for path in (out / f"{name}.json" for name in names):
        if not path.exists():
            continue
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = None
        if not isinstance(result, dict) or not {"set", "greedy"} <= result.keys():
            raise ConfigError(f"--out {out}: {path.name} is no result of an evaluation; give another folder")


def finished_before(out: Path, name: str, mark: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Result and responses of a finished evaluation of this mark, None if there is none; all ranks find the same.

    A damaged line costs that response only, which is asked for again.
    """
    scores, responses = out / f"{name}.json", out / f"{name}.responses.jsonl"
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(scores.read_text(encoding="utf-8"))
            told = [result if isinstance(result, dict) and result.get("mark") == mark and responses.exists() else None]
    dist.broadcast_object_list(told)
    if told[0] is None:
        return None
    return told[0], read_json_lines(responses, "index", "sample", *RESPONSE)


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
                self._found[told["index"], told["sample"]] = {name: told[name] for name in RESPONSE}

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
