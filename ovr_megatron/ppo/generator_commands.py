"""What the ranks that train say to those that only generate, and their replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.prompts import PromptState
from ovr_megatron.ppo.unfinished import UnfinishedGroup
from ovr_megatron.runtime.exchange import exchange
from ovr_megatron.runtime.split_job import SplitJob
from ovr_megatron.runtime.stop import Stop, StopRequest


@dataclass(frozen=True)
class Update:
    """Command: take new weights, those after ``version`` iterations."""

    version: int


@dataclass(frozen=True)
class Generate:
    """Command: generate and grade an iteration, and deliver its responses.

    Attributes:
        iteration: from 0, for the seeds.
        limit: most tokens of a prompt and its response together.
        stream: position of the prompt stream before the iteration.
    """

    iteration: int
    limit: int
    stream: PromptState


@dataclass(frozen=True)
class Evaluate:
    """Command: score the weights after ``done`` iterations, to the end unless ``may_stop``."""

    done: int
    may_stop: bool


@dataclass(frozen=True)
class Continue:
    """Command: go on with the unfinished responses that the trainers send."""


@dataclass(frozen=True)
class End:
    """Command: end with an exit code."""

    code: int


Command = Update | Generate | Evaluate | Continue | End


@dataclass
class Delivery:
    """Reply to `Generate` without the responses themselves.

    Attributes:
        stream: position of the prompt stream after the iteration.
        drawn: prompts drawn.
        seconds: from the command to the last verdict.
        rest: see `Rollout`.
        stopped: the signal that ended generation; the other fields then say nothing.
    """

    stream: PromptState | None = None
    drawn: int = 0
    seconds: float = 0.0
    train_prompts: dict[int, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    long: bool = False
    postponed: list[int] = field(default_factory=list)
    restarted: list[int] | None = None
    unfinished: list[int] = field(default_factory=list)
    mixed: dict[int, bool] = field(default_factory=dict)
    stopped: Stop = Stop.NO


@dataclass(frozen=True)
class EvaluationReply:
    """Reply to `Evaluate`: the scores, and the signal that ended the evaluation."""

    metrics: dict[str, float]
    stopped: Stop = Stop.NO


def deliver(
    job: SplitJob,
    delivery: Delivery,
    responses: Sequence[Response],
    groups: Mapping[int, UnfinishedGroup],
    stop: StopRequest,
) -> None:
    """Send what this generator has to the trainers.  A collective of all ranks, the reply to `Generate`.

    Args:
        job: all ranks.
        delivery: that of the first generator counts.
        responses: those of this rank's engine, none on its followers.
        groups: responses that this rank keeps for the next round, by index in the queue of unfinished prompts.
        stop: requests to stop on this rank.
    """
    job.barrier(stop)
    delivery = job.broadcast(delivery, job.trainers)
    if delivery.stopped:
        return
    # Equally over the trainers, which exchange them by the load of each once more.
    trainer = job.side_rank % job.trainers
    exchange({trainer: list(responses)} if responses else {}, job.messages)
    if delivery.restarted is not None:
        exchange({trainer: dict(groups)} if groups else {}, job.messages)


def receive_groups(job: SplitJob) -> dict[int, UnfinishedGroup]:
    """Return the unfinished responses that ranks of the other side send to this one.  A collective of all ranks."""
    groups: dict[int, UnfinishedGroup] = {}
    for rank_groups in exchange({}, job.messages):
        groups |= rank_groups
    return groups
