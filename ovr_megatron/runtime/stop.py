"""Stopping in order: Ctrl-C and SIGTERM let the step in progress end, then the run saves and leaves."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Remembers that a signal came; `asked` is a collective, so that all ranks stop after the same step."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def asked(self) -> bool:
        """Whether any rank has been asked to stop."""
        flag = torch.tensor(int(self.received))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
