"""Send the responses of an iteration to the ranks that train in parts, while others are generated.

An engine sends its prompts in the order in which it has answered them, so many at a time, as soon as they are graded.
Part k of the iteration is what the k-th messages of all engines have.  With ``rollout.schedule=static`` an engine's
order is a function of token counts, so that no clock decides which responses a part has.
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
    """One engine's share of a part.

    Attributes:
        responses: to the prompts of the part.
        tokens: of each prompt whose responses all have a reward, with all its responses, the prompt counted with each.
        is_last: whether the engine sends no further part of the iteration.
        is_cancelled: whether a signal has ended generation; the other fields then say nothing.
    """

    responses: list[Response]
    tokens: dict[int, int]
    is_last: bool = False
    is_cancelled: bool = False


def engine_peers(config: RLConfig, job: SplitJob) -> dict[int, int]:
    """Return the rank that speaks for each engine, and the trainer to which it sends its parts; ranks of the job."""
    peers = {}
    for replica in range(job.generators // config.rollout.tp):
        leader = job.trainers + replica * config.rollout.tp
        peers[leader] = replica % job.trainers
    return peers


def count_tokens(responses: Iterable[Response], prompts: Prompts) -> dict[int, int]:
    """Return the tokens of each prompt whose responses all have a reward, the prompt counted with each response."""
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
        """Send the next parts whose prompts are answered and graded, if the engine has more; return at once."""
        # Without a further prompt it is the last part, which must say so.
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
        """Send an end in place of further parts, as a signal has ended generation; not after the last part."""
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
