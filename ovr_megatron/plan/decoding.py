"""An engine that decodes, simulated from the end of one response to the end of the next.

A step of the engine gives each running response one token.  Between two ends the number of running responses does not
change, so that the seconds of all steps in between are a closed formula (`DecodeRates.seconds`).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ovr_megatron.config import RLConfig
from ovr_megatron.plan.cost import DECODE_OVERHEAD, EFFICIENCY
from ovr_megatron.plan.flops import token_flops
from ovr_megatron.plan.memory import cache_bytes_per_token, engine_memory
from ovr_megatron.plan.scenario import Scenario, Span


@dataclass(frozen=True)
class DecodeRates:
    """Seconds of an engine's step: a constant, and what each part of its batch adds.

    Attributes:
        step_s: of every step: the weights are read once, and what the host does.
        sequence_s: of each running response.
        context_s: of each token whose keys and values the step reads.
        prefill_s: of each token of a prompt, in the step in which its response starts.
    """

    step_s: float
    sequence_s: float = 0.0
    context_s: float = 0.0
    prefill_s: float = 0.0

    def seconds(self, steps: int, running: int, context: int) -> float:
        """Return the seconds of ``steps`` steps of ``running`` responses that have ``context`` tokens before them."""
        # Each step adds a token to every response: 0 + 1 + ... + (steps - 1) times the running ones.
        read_tokens = steps * context + running * (steps * (steps - 1) // 2)
        return steps * (self.step_s + self.sequence_s * running) + self.context_s * read_tokens


def decode_rates(scenario: Scenario, span: Span) -> DecodeRates:
    """Return the rates by the plan's cost model (`ovr_megatron.plan.cost.generation_seconds`)."""
    config = scenario.config
    shape = scenario.shape
    gpu = scenario.gpu
    assert isinstance(config, RLConfig)
    engine = engine_memory(config.rollout, shape, gpu, config.model.dtype, config.offload)
    policy = token_flops(shape, config.model, span.load)
    token_s = policy.forward / (config.rollout.tp * gpu.flops * EFFICIENCY)
    return DecodeRates(
        step_s=engine["vLLM weights"] / gpu.bandwidth + DECODE_OVERHEAD,
        sequence_s=token_s,
        context_s=cache_bytes_per_token(shape, config.rollout, config.model.dtype) / gpu.bandwidth,
        prefill_s=token_s,
    )


class Piece(NamedTuple):
    """What an engine has to generate of one response.

    Attributes:
        key: index of the prompt in the round, and of the response to it.
        tokens: still to be generated.
        context: tokens before them: the prompt, and what earlier rounds generated.
        prefill: tokens of the context that the engine computes before the first step.
    """

    key: tuple[int, int]
    tokens: int
    context: int = 0
    prefill: int = 0


class SimulatedEngine:
    """One engine: its clock in seconds, its steps, the responses that run and those that wait for room.

    Attributes:
        clock: seconds after the begin of the round.
        step: steps done.
        generated: tokens.
    """

    def __init__(self, rates: DecodeRates, slots: int) -> None:
        """Start an engine that runs at most ``slots`` responses at once."""
        self.rates = rates
        self.slots = slots
        self.clock = 0.0
        self.step = 0
        self.generated = 0
        self._context = 0
        self._running: list[tuple[int, Piece]] = []  # a heap by the last step of each
        self._waiting: deque[Piece] = deque()

    @property
    def running(self) -> int:
        """Number of responses in the batch."""
        return len(self._running)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Have the engine generate ``pieces``, as soon as there is room."""
        self._waiting.extend(pieces)
        self.fill()

    def next_end(self) -> tuple[int, float] | None:
        """Return the step after which the next response ends, and its second; None without a running response."""
        if not self._running:
            return None
        last_step = self._running[0][0]
        return last_step, self.clock_at(last_step)

    def clock_at(self, step: int) -> float:
        """Return the second of a step up to that of the next end."""
        return self.clock + self.rates.seconds(step - self.step, self.running, self._context)

    def advance(self, step: int) -> list[Piece]:
        """Go on to ``step``, at most that of the next end; return the responses that end with it."""
        self.clock = self.clock_at(step)
        tokens = (step - self.step) * self.running
        self._context += tokens
        self.generated += tokens
        self.step = step
        ended = []
        while self._running and self._running[0][0] == step:
            _, piece = heapq.heappop(self._running)
            self._context -= piece.context + piece.tokens
            ended.append(piece)
        return ended

    def stop(self) -> list[tuple[Piece, int]]:
        """Give up what runs and waits; return each with the step after which it would have ended."""
        unfinished = [(piece, last_step) for last_step, piece in self._running]
        # Those that wait would have begun now at the earliest.
        unfinished += [(piece, self.step + piece.tokens) for piece in self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._context = 0
        return unfinished

    def fill(self) -> None:
        """Start waiting responses while there is room; call it after responses have ended."""
        prefill = 0
        while self._waiting and len(self._running) < self.slots:
            piece = self._waiting.popleft()
            heapq.heappush(self._running, (self.step + piece.tokens, piece))
            self._context += piece.context
            prefill += piece.prefill
        # Charged at once: the others of the batch wait for it, too.
        self.clock += self.rates.prefill_s * prefill
