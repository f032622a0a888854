"""Compare which problems two checkpoints solve in a number of samples: both, one of them alone, or neither.

The figures are those of arXiv 2507.14843 ("The Invisible Leash"), with a problem in the place of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ovr_megatron.config import ConfigError
from ovr_megatron.evaluation.statistics import Share, wilson
from ovr_megatron.evaluation.verdicts import read_responses

KINDS = ("solved_by_both", "solved_after_only", "solved_before_only", "solved_by_neither")


@dataclass(frozen=True)
class Support:
    """Ids of the problems that two checkpoints solve, in the order of their set.

    Attributes:
        solved_by_both: solved by both.
        solved_after_only: solved by the later checkpoint alone.
        solved_before_only: solved by the earlier checkpoint alone.
        solved_by_neither: solved by neither.
    """

    solved_by_both: tuple[str, ...]
    solved_after_only: tuple[str, ...]
    solved_before_only: tuple[str, ...]
    solved_by_neither: tuple[str, ...]

    @property
    def retention(self) -> Share | None:
        """Return the share of the earlier checkpoint's problems that the later one solves; None if it solved none."""
        return _share(self.solved_by_both, self.solved_before_only)

    @property
    def discovery(self) -> Share | None:
        """Return the share of the later checkpoint's problems that the earlier one did not solve; None without any."""
        return _share(self.solved_after_only, self.solved_by_both)


def _share(counted: Sequence[str], others: Sequence[str]) -> Share | None:
    total = len(counted) + len(others)
    return wilson(len(counted), total) if total else None


@dataclass(frozen=True)
class SampledProblem:
    """A problem of a set, how many responses were sampled, and how many of these are right."""

    id: str
    question: str
    source: str
    samples: int
    correct: int


def read_problems(path: Path, samples: int) -> dict[int, SampledProblem]:
    """Read the problems of an evaluation with the first ``samples`` sampled responses to each.

    Args:
        path: ``SET.responses.jsonl`` of ``ovr evaluate --samples``.
        samples: responses to each problem; 0 takes all.

    Returns:
        The problems by their index in the set.

    Raises:
        ConfigError: the file cannot be read, or a problem has fewer samples.
    """
    problems: dict[int, SampledProblem] = {}
    for response in read_responses(path):
        problem = problems.setdefault(
            response.index, SampledProblem(response.id, response.question, response.source, 0, 0)
        )
        is_counted = response.sample is not None and (not samples or response.sample < samples)
        if is_counted:
            correct = problem.correct + response.correct
            problems[response.index] = replace(problem, samples=problem.samples + 1, correct=correct)
    required = max(samples, 1)
    fewest = min((problem.samples for problem in problems.values()), default=0)
    if fewest < required:
        raise ConfigError(
            f"{path}: some problem has {fewest} samples, and {required} are compared; evaluate with "
            f"--samples {required} or more"
        )
    return problems


def compare(before: Path, after: Path, samples: int = 0) -> dict[str, Support]:
    """Compare the evaluations of two checkpoints on the same set.

    Args:
        before: ``SET.responses.jsonl`` of the earlier checkpoint.
        after: that of the later one.
        samples: responses to each problem, the first ones; 0 takes all, of which both must have equally many.

    Returns:
        The problems of each source, and all of them under the empty name.

    Raises:
        ConfigError: a file cannot be read or has fewer samples, or the two are not of the same problems.
    """
    earlier = read_problems(before, samples)
    later = read_problems(after, samples)
    if _questions(earlier) != _questions(later):
        raise ConfigError(f"{after}: has other problems than {before}; evaluate both on the same set and --limit")
    ids: dict[str, dict[str, list[str]]] = {}
    for index, problem in sorted(earlier.items()):
        successor = later[index]
        # More samples alone solve more problems.
        if problem.samples != successor.samples:
            raise ConfigError(
                f"{after}: problem {problem.id} has {successor.samples} samples, and {before} has "
                f"{problem.samples}; give --samples {min(problem.samples, successor.samples)}"
            )
        kind = _kind(problem.correct > 0, successor.correct > 0)
        for source in ("", problem.source):
            by_kind = ids.setdefault(source, {name: [] for name in KINDS})
            by_kind[kind].append(problem.id)
    supports = {}
    for source, by_kind in ids.items():
        supports[source] = Support(**{kind: tuple(by_kind[kind]) for kind in KINDS})
    return supports


def _questions(problems: dict[int, SampledProblem]) -> dict[int, tuple[str, str]]:
    """Return what identifies each problem, its id and question, by index."""
    return {index: (problem.id, problem.question) for index, problem in problems.items()}


def _kind(solved_before: bool, solved_after: bool) -> str:
    if solved_before:
        return "solved_by_both" if solved_after else "solved_before_only"
    return "solved_after_only" if solved_after else "solved_by_neither"


def format_table(supports: dict[str, Support]) -> str:
    """Format the counts of all problems and of each source, with retention and discovery and their intervals."""
    width = max(len("all problems"), *map(len, supports))
    lines = [f"{'':{width}}  {'both':>7}{'after':>7}{'before':>8}{'neither':>9}   {'retention':22}discovery"]
    for source, support in supports.items():
        counts = f"{len(support.solved_by_both):7}{len(support.solved_after_only):7}"
        counts += f"{len(support.solved_before_only):8}{len(support.solved_by_neither):9}"
        shares = f"{_format_share(support.retention):22}{_format_share(support.discovery)}"
        lines.append(f"{source or 'all problems':{width}}  {counts}   {shares}")
    return "\n".join(lines)


def _format_share(share: Share | None) -> str:
    if share is None:
        return "none solved"
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
