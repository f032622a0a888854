"""How responses are sampled: the record for vLLM and endpoints, and the types of the settings behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Temperature = Annotated[float, Field(ge=0, le=100)]
PositiveTemperature = Annotated[float, Field(gt=0, le=100)]
"""A temperature of responses that must differ from each other."""
ResponseTokens = Annotated[int, Field(gt=0, le=1 << 24)]
MAX_SAMPLES = 1 << 16  # of one prompt: journals keep 16 bits of a key for the index of a sample


@dataclass(frozen=True)
class Sampling:
    """How the responses to a prompt are sampled, by the rollouts, an evaluation, a teacher or a judge.

    The entire distribution is sampled, without a nucleus.  Texts that end a response are the engine's.

    Attributes:
        temperature: 0 takes the most likely token.
        max_tokens: Longest response, its end token included.
        endless: Whether nothing but `max_tokens` ends a response.
    """

    temperature: float = 1.0
    max_tokens: int = 1024
    endless: bool = False
