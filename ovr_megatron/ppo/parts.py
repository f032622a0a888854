"""Send finished responses to the trainers part by part, while the engines generate the rest of the iteration.

An engine sends the responses to a fixed number of prompts as one message once they are graded, in the order in which it
answered the prompts.  Part k of the iteration consists of the k-th message of every engine.  With
``rollout.schedule=static`` an engine's order is a function of token counts, so that no clock decides which responses a
part has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ovr_megatron.config import RLConfig
from ovr_megatron.ppo.batch import Response, group_by_prompt
from ovr_megatron.ppo.grading import RoundGrading
from ovr_megatron.ppo.prompts import Prompts
from ovr_megatron.runtime.split_job import SplitJob


@dataclass(frozen=True)
class EnginePart:
    """The responses of a part that one engine sends, or that one trainer receives from its engines.

    Attributes:
        responses: to the prompts of the part.
        tokens: total tokens by prompt, over all its responses, each with its prompt; without prompts that have an
            unrewarded response.
        is_last: whether the engine sends no further part of the iteration.
        is_cancelled: whether a signal has ended generation; responses and tokens are then ignored.
    """

    responses: list[Response]
    tokens: dict[int, int]
    is_last: bool = False
    is_cancelled: bool = False


def engine_peers(config: RLConfig, job: SplitJob) -> dict[int, int]:
    """Map the leader rank of each engine to the trainer rank that receives its parts; both are ranks of the job."""
    peers = {}
    for replica in range(job.generators // config.rollout.tp):
        leader = job.trainers + replica * config.rollout.tp
        peers[leader] = replica % job.trainers
    return peers


def count_tokens(responses: Iterable[Response], prompts: Prompts) -> dict[int, int]:
    """Return the total tokens by prompt, over all its responses, each with its prompt.

    Prompts with an unrewarded response are left out.
    """
    tokens = {}
    for prompt, group in group_by_prompt(responses).items():
        if all(r.rewarded for r in group):
            prompt_tokens = len(prompts.sample(prompt))
            tokens[prompt] = sum(prompt_tokens + len(r.tokens) for r in group)
    return tokens


class PartSender:
    """Sends the parts of one iteration for this rank's engine.

    Args:
        config: of the job.
        job: all ranks; this rank is one that generates.
    """

    def __init__(self, config: RLConfig, job: SplitJob) -> None:
        peers = engine_peers(config, job)
        self._job = job
        # Of an equal share of the prompts; an engine that takes more from the shared queue sends more parts.
        self._prompts_of_part = -(-config.prompts // (len(peers) * config.rollout.stream_parts))
        self._begun = 0  # prompts that the engine was given
        self._sent = 0
        self._is_finished = False
        # The other ranks of an engine send nothing: they have the same responses.
        self._trainer = peers.get(job.rank)

    def begin(self, count: int) -> None:
        """Note that the engine was given ``count`` prompts."""
        self._begun += count

    def send_graded(self, grading: RoundGrading, prompts: Prompts) -> None:
        """Send every full part that is answered and graded, but the last, which `finish` sends; return at once."""
        # If the engine has no prompt beyond this part, it is the last one: `finish` marks it.
        while self._begun > self._sent + self._prompts_of_part:
            part = grading.answered[self._sent : self._sent + self._prompts_of_part]
            if len(part) < self._prompts_of_part or not all(map(grading.is_graded, part)):
                return
            self._send(part, grading, prompts, is_last=False)

    def finish(self, grading: RoundGrading, prompts: Prompts) -> None:
        """Send the last part, when all prompts are graded or given up."""
        given_up = {prompt for prompt, _ in grading.responses}.difference(grading.answered)
        part = [*grading.answered[self._sent :], *sorted(given_up)]
        self._send(part, grading, prompts, is_last=True)

    def cancel(self) -> None:
        """Send a cancelled last part, as a signal has ended generation; nothing where the last part is sent already."""
        if self._is_finished:
            return
        self._post(EnginePart([], {}, is_last=True, is_cancelled=True))

    def _send(self, part: Sequence[int], grading: RoundGrading, prompts: Prompts, is_last: bool) -> None:
        self._sent += len(part)
        responses = []
        for prompt in part:
            responses += grading.group(prompt)
        self._post(EnginePart(responses, count_tokens(responses, prompts), is_last))

    def _post(self, engine_part: EnginePart) -> None:
        self._is_finished = engine_part.is_last
        if self._trainer is not None:
            self._job.post(engine_part, self._trainer)
