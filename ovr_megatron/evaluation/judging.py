"""Every checkpoint's responses judged, summed up and compared: with another judge, and with people."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ovr_megatron.config import ConfigError
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, PAIRS, Trace, kappa, read_traces, summarise
from ovr_megatron.evaluation.judges import Counts, JudgeConfig, count
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.progress import Progress

RESULT, PER_TRACE, ANNOTATIONS = "behaviours.json", "counts.jsonl", "annotations.jsonl"


def judge(
    files: Mapping[str, Path], judges: Sequence[JudgeConfig], out: Path, limit: int, sample: int, annotate: bool
) -> dict[str, Any]:
    """Have the responses of every checkpoint judged; write ``behaviours.json`` and ``counts.jsonl`` to ``out``.

    Args:
        files: responses by name of the checkpoint.
        judges: who judges, and maybe a second judge of a sample.
        out: folder to write, or to go on with.
        limit: first traces of each file, 0 for all.
        sample: traces that the second judge, or people, see.
        annotate: whether to write ``annotations.jsonl`` for people to fill in; counts in it are compared in any case.

    Returns:
        What is in ``behaviours.json``.

    Raises:
        ConfigError: no responses, a judge that cannot be opened, or an annotation that is none.
        TeacherError: an endpoint refuses us, or nothing but failures.
    """
    first, *others = judges
    checkpoints = {name: read_traces(path, limit) for name, path in files.items()}
    traces = [trace for found in checkpoints.values() for trace in found]
    if not traces:
        raise ConfigError("the files hold no response")
    out.mkdir(parents=True, exist_ok=True)

    def ask(config: JudgeConfig, of: list[Trace]) -> Counts:
        with Progress(len(of) * len(BEHAVIOURS), config.judge, "question") as progress:
            return count(of, config, out, progress.update)

    counts = ask(first, traces)
    result: dict[str, Any] = {
        "judge": first.judge,
        "approximation": first.is_lexical,
        "missing": dict(counts.missing),
        "checkpoints": {},
    }
    lines, begin = [], 0
    for name, found in checkpoints.items():
        own = {b: values[begin : begin + len(found)] for b, values in counts.by_behaviour.items()}
        result["checkpoints"][name] = summarise(own) | {"file": files[name].name}
        for at, trace in enumerate(found):
            lines.append({"checkpoint": name, "id": trace.id, "counts": {b: values[at] for b, values in own.items()}})
        begin += len(found)
    chosen = sorted(random.Random(0).sample(range(len(traces)), min(sample, len(traces))))
    for second in others:
        other = ask(second, [traces[at] for at in chosen])
        mine = {b: [values[at] for at in chosen] for b, values in counts.by_behaviour.items()}
        result["second"] = {"judge": second.judge, "missing": dict(other.missing)}
        result["second"] |= agreement(mine, other.by_behaviour)
    owners = [name for name, found in checkpoints.items() for _ in found]
    if annotate:
        write_annotations(out / ANNOTATIONS, [(owners[at], traces[at]) for at in chosen])
    if (out / ANNOTATIONS).exists():
        keys = [(owner, trace.id) for owner, trace in zip(owners, traces, strict=True)]
        result["people"] = agreement(*annotated(out / ANNOTATIONS, keys, counts.by_behaviour))
    write_whole(out / PER_TRACE, "".join(json.dumps(line) + "\n" for line in lines))
    write_whole(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def agreement(one: dict[str, list[int | None]], other: dict[str, list[int | None]]) -> dict[str, Any]:
    """Cohen's kappa by behaviour and over all, on whether it occurs, and how many were compared."""
    told: dict[str, Any] = {"kappa": {name: kappa(one[name], other[name]) for name in one}}
    flat = [[count for name in one for count in counts[name]] for counts in (one, other)]
    told["kappa"]["all"] = kappa(*flat)
    return told | {"compared": sum(a is not None and b is not None for a, b in zip(*flat, strict=True))}


def write_annotations(path: Path, chosen: Sequence[tuple[str, Trace]]) -> None:
    """A line for every trace and behaviour, its ``count`` to be filled in; what is filled in already stays."""
    known = {(line["checkpoint"], line["id"], line["behaviour"]): line["count"] for line in _lines(path)}
    lines = [
        {
            "checkpoint": owner,
            "id": trace.id,
            "behaviour": behaviour.name,
            "count": known.get((owner, trace.id, behaviour.name)),
            "definition": behaviour.definition,
            **asdict(trace),
        }
        for owner, trace in chosen
        for behaviour in BEHAVIOURS.values()
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def annotated(
    path: Path, keys: Sequence[tuple[str, str]], counts: dict[str, list[int | None]]
) -> tuple[dict[str, list[int | None]], dict[str, list[int | None]]]:
    """The judge's and people's counts where people have given one.

    Raises:
        ConfigError: a line is none of ours, or its count is no number.
    """
    places = {key: at for at, key in enumerate(keys)}
    ours: dict[str, list[int | None]] = {name: [] for name in BEHAVIOURS}
    people: dict[str, list[int | None]] = {name: [] for name in BEHAVIOURS}
    for number, line in enumerate(_lines(path), 1):
        given, name = line.get("count"), line.get("behaviour")
        at = places.get((line.get("checkpoint"), line.get("id")))  # type: ignore[arg-type]
        if name not in BEHAVIOURS or not (given is None or (isinstance(given, int) and given >= 0)):
            raise ConfigError(f"{path}:{number}: behaviour {name!r} with count {given!r}; give a count of 0 or more")
        if given is not None and at is not None:
            ours[name].append(counts[name][at])
            people[name].append(given)
    return ours, people


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: is no JSON ({error}); correct the line") from None
    return found


def show(result: dict[str, Any]) -> str:
    """The rates as a table of text."""
    checkpoints = result["checkpoints"]
    note = ", an approximation by wording" if result["approximation"] else ""
    lines = [f"judge: {result['judge']}{note}", f"{'emergence':30}" + "".join(f"{name:>22}" for name in checkpoints)]
    for name, behaviour in BEHAVIOURS.items():
        cells = (_percent(found["behaviours"][name]["emergence"], "rate") for found in checkpoints.values())
        lines.append(f"{behaviour.title:30}" + "".join(f"{cell:>22}" for cell in cells))
    lines.append("transfer (visual / linguistic)")
    for linguistic, _ in PAIRS:
        cells = (_percent(found["transfer"][linguistic], "value") for found in checkpoints.values())
        lines.append(f"{BEHAVIOURS[linguistic].title:30}" + "".join(f"{cell:>22}" for cell in cells))
    for key, whose in (("second", "the second judge"), ("people", "people")):
        if key in result:
            value = result[key]["kappa"]["all"]
            shown = "nothing to compare" if value is None else f"{value:.2f}"
            lines.append(f"kappa with {whose}: {shown} ({result[key]['compared']} compared)")
    if result["missing"]:
        lines.append("without a count: " + ", ".join(f"{n} {why}" for why, n in result["missing"].items()))
    return "\n".join(lines)


def _percent(found: dict[str, Any] | None, key: str) -> str:
    if not found or found[key] is None:
        return "-"
    return f"{100 * found[key]:.1f} % ({100 * found['low']:.1f}-{100 * found['high']:.1f})"
