"""Send the responses of an iteration to the ranks that train in parts, each as soon as it is complete.

The prompts of an iteration are cut into ``rollout.stream_parts`` parts by index, so that no clock decides which
responses a part has.  An engine sends what it has of a part when every prompt of the part has been given to an engine
and its own ones are graded; a part is complete when all engines have sent theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ovr_megatron.config import RLConfig
from ovr_megatron.ppo.batch import Response, group_by_prompt
from ovr_megatron.ppo.grading import RoundGrading
from ovr_megatron.ppo.prompts import Prompts
from ovr_megatron.runtime.balance import cut_into_parts
from ovr_megatron.runtime.split_job import SplitJob


@dataclass(frozen=True)
class EnginePart:
    """What one engine has of a part.

    Attributes:
        responses: to the prompts that it was given.
        tokens: of each prompt whose responses all have a reward, with all its responses, the prompt counted with each.
    """

    responses: list[Response]
    tokens: dict[int, int]


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
    """Sends the parts of one iteration for this rank's engine, in order.

    Args:
        config: of the job.
        job: all ranks; this rank is one that generates.
    """

    def __init__(self, config: RLConfig, job: SplitJob) -> None:
        self._job = job
        self._parts = cut_into_parts(config.prompts, config.rollout.stream_parts)
        self._sent = 0
        self._begun: set[int] = set()
        # The other ranks of an engine send nothing: they have the same responses.
        self._trainer = engine_peers(config, job).get(job.rank)

    def begin(self, prompt: int) -> None:
        """Note that this engine was given ``prompt``."""
        self._begun.add(prompt)

    def send_complete(self, grading: RoundGrading, prompts: Prompts, has_given: Callable[[int], bool]) -> None:
        """Send the next parts of which this engine has all that it will have; return at once.

        Args:
            grading: of the round.
            prompts: of the iteration.
            has_given: says whether no engine will be given a prompt before this index any more.
        """
        while self._sent < len(self._parts):
            part = self._parts[self._sent]
            own_prompts = [prompt for prompt in self._begun if prompt in part]
            # The queue last: it is asked over the network.
            if not all(map(grading.is_graded, own_prompts)) or not has_given(part.stop):
                return
            self._send(grading, prompts)

    def finish(self, grading: RoundGrading, prompts: Prompts) -> None:
        """Send the other parts when all prompts are graded or given up."""
        while self._sent < len(self._parts):
            self._send(grading, prompts)

    def cancel(self) -> None:
        """Tell the trainers that the other parts will not come, as a signal has ended the round."""
        while self._sent < len(self._parts):
            self._post(None)

    def _send(self, grading: RoundGrading, prompts: Prompts) -> None:
        part = self._parts[self._sent]
        keys = sorted(key for key in grading.responses if key[0] in part)
        responses = [grading.responses[key] for key in keys]
        self._post(EnginePart(responses, count_tokens(responses, prompts)))

    def _post(self, engine_part: EnginePart | None) -> None:
        self._sent += 1
        if self._trainer is not None:
            self._job.post(engine_part, self._trainer)
