"""Split a job: its first ranks train, its last ranks generate, and each side has a default process group of its own.

What speaks of "all ranks", as a collective without a group, `default_store` and `World` do, then means those of one
side.  Megatron and vLLM take the default group for their world, and each finds one that it has alone.  `SplitJob` has
what reaches across: a group of all ranks for weights, one on the CPU for messages, and the store of all ranks.
"""

from __future__ import annotations

import datetime
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from ovr_megatron.errors import UserError
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.stop import Stop, StopRequest

Item = TypeVar("Item")

_REPORT_S = 1.0  # between two reports of a rank: the store is one process for all ranks
_PAUSE_S = 0.002
_STORE_PAUSE_S = 0.1  # the same of a rank that waits
_REQUEUE = 1 << 24  # a rank that is asked to stop adds 1 to the counter, and this where it is to be started again


class SideError(RuntimeError):
    """A rank of the other side has ended; the message says which and why, where it is known."""


class SplitJob:
    """All ranks of a job whose last ones only generate.

    Attributes:
        rank: of this process among all ranks.
        size: number of all ranks.
        trainers: number of those that train; they come first.
        group: of all ranks, with the backends of the default group.
        messages: CPU group of all ranks whose time-out no run reaches.
    """

    def __init__(self, rank: int, size: int, generators: int, store: dist.Store) -> None:
        """Name the sides; `join` makes the groups.

        Args:
            rank: of this process among all ranks.
            size: number of all ranks.
            generators: number of ranks that only generate, the last ones.
            store: key-value store of all ranks.
        """
        self.rank = rank
        self.size = size
        self.trainers = size - generators
        self._store = dist.PrefixStore("job", store)
        self._next_report = 0.0
        self._published = Stop.NO
        self._runs = 0  # of this process, one after the other; both sides count alike
        self._posts: list[tuple[dist.Work, Tensor]] = []  # under way, with what they send

    @property
    def generators(self) -> int:
        """Number of ranks that only generate."""
        return self.size - self.trainers

    @property
    def generates(self) -> bool:
        """Whether this rank only generates."""
        return self.rank >= self.trainers

    @property
    def side(self) -> str:
        """Name of this rank's side, which its keys in the store begin with."""
        return "generators" if self.generates else "trainers"

    @property
    def side_rank(self) -> int:
        """Rank of this process within its side."""
        return self.rank - self.trainers if self.generates else self.rank

    @property
    def side_size(self) -> int:
        """Number of ranks of this rank's side."""
        return self.generators if self.generates else self.trainers

    def join(self, backend: str, timeout: datetime.timedelta, no_timeout: datetime.timedelta) -> None:
        """Make the groups of all ranks, after the default group of this side.  A collective of all ranks."""
        self.group = self._make_group("job", dist.Backend(backend), timeout)
        self.messages = self._make_group("messages", "gloo", no_timeout)

    def _make_group(self, name: str, backend: str, timeout: datetime.timedelta) -> dist.ProcessGroup:
        """Return a group of all ranks, which is larger than the default group of this process.

        `torch.distributed.new_group` takes ranks of the default group alone; `init_process_group` makes that one by the
        function that is called here.
        """
        group, _ = distributed_c10d._new_process_group_helper(
            self.size,
            self.rank,
            [],
            backend,
            self._store,
            distributed_c10d.GroupName(name),
            timeout=timeout,
            group_desc=name,
        )
        # Ranks in calls with this group are those of the job.  `dist.get_rank(group)` knows the default group's alone.
        distributed_c10d._world.pg_group_ranks[group] = {peer: peer for peer in range(self.size)}
        return group

    def broadcast(self, item: Item | None, source: int) -> Item:
        """Return the object of rank ``source``.  A collective of all ranks."""
        box = [item]
        dist.broadcast_object_list(box, group=self.messages, group_src=source)
        received: Item = box[0]  # type: ignore[assignment]  # on the source it is an Item, and so on every rank
        return received

    def post(self, item: Any, peer: int) -> None:
        """Start sending an object to a rank of the other side, and return at once.

        That rank must `receive` it before the next barrier of all ranks.
        """
        payload = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        # The length goes first: a receiver must allocate its buffer before the message comes.
        for message in (torch.tensor([len(payload)]), payload):
            work = dist.isend(message, group=self.messages, group_dst=peer)
            assert work is not None
            self._posts.append((work, message))

    def receive(self, peer: int, request: StopRequest) -> Any:
        """Wait for the next object that a rank of the other side has posted to this one, and return it.

        Arguments and errors as of `barrier`.
        """
        received: Future[bytes] = Future()
        # In a thread: gloo's receive can only block, and unlike a barrier it cannot be polled.
        threading.Thread(target=self._receive_bytes, args=(peer, received), daemon=True).start()
        try:
            self._wait(received.done, request)
            return pickle.loads(received.result())  # raises where the rank has died
        except SideError:
            raise
        except RuntimeError as error:
            self._raise_ended(error)

    def _receive_bytes(self, peer: int, received: Future[bytes]) -> None:
        try:
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, group=self.messages, group_src=peer)
            payload = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(payload, group=self.messages, group_src=peer)
            received.set_result(payload.numpy().tobytes())
        except RuntimeError as error:
            received.set_exception(error)

    def barrier(self, request: StopRequest, group: dist.ProcessGroup | None = None) -> None:
        """Wait until all ranks of the group have called this.  A collective of the group.

        The watchdog is deferred as long as any rank of the job makes progress.

        Args:
            request: the stop request of this rank, which is published for the other side.
            group: a CPU group whose time-out no run reaches; None: all ranks of both sides.

        Raises:
            UserError: another rank has ended with it.
            SideError: another rank has ended.
        """
        try:
            barrier = dist.barrier(group or self.messages, async_op=True)
            assert barrier is not None
            # Polled, as a wait inside the collective would neither see the other side work nor let signals through.
            self._wait(barrier.is_completed, request)
            barrier.wait()  # raises where a rank has died
            if group is None:
                for work, _ in self._posts:  # all have arrived, or the other side would not be here
                    work.wait()
                self._posts.clear()
        except SideError:
            raise
        except RuntimeError as error:
            self._raise_ended(error)

    def _wait(self, is_done: Callable[[], bool], request: StopRequest) -> None:
        """Poll ``is_done`` for as long as any rank makes progress; arguments and errors as of `barrier`."""
        last_steps = -1
        next_look = 0.0
        while not is_done():
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _STORE_PAUSE_S
                self._publish(request)
                self._raise_failure()
                steps = self._store.add("steps", 0)
                if steps != last_steps:
                    watchdog.defer()
                last_steps = steps
            time.sleep(_PAUSE_S)

    @contextmanager
    def reporting(self, request: StopRequest) -> Iterator[None]:
        """Within the block tell the other side of this rank's progress, and this rank of stop requests of all ranks."""
        self._runs += 1
        self._published = Stop.NO

        def report() -> None:
            now = time.monotonic()
            if now < self._next_report:
                return
            self._next_report = now + _REPORT_S
            self._store.add("steps", 1)
            self._publish(request)
            level = self.stop_level()
            # Not a plain maximum: a signal may come between the comparison and the assignment.
            if level > request.received:
                request.received = level

        previous = watchdog.listen(report)
        try:
            yield
        finally:
            watchdog.listen(previous)

    def stop_level(self) -> Stop:
        """Return the strongest stop request that any rank has published."""
        count = self._store.add(f"stop/{self._runs}", 0)
        if count >= _REQUEUE:
            return Stop.LEAVE_AND_REQUEUE
        return Stop.LEAVE if count else Stop.NO

    def announce(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Leave word for the other side that this rank ends with ``error``; for `contextlib.ExitStack.push`."""
        if error is None:
            return
        failure: BaseException = SideError(
            f"rank {self.rank}, one of the {self.side}, has ended with {type(error).__name__}: {error}"
        )
        if isinstance(error, UserError):
            failure = error
        try:
            # The first error counts: those that follow are of ranks that have lost the one that had it.
            if self._store.add("failures", 1) == 1:
                self._store.set("failure", pickle.dumps(failure))
        except RuntimeError:
            pass  # the rank that serves the store has ended, which the other side sees by itself

    def _publish(self, request: StopRequest) -> None:
        """Count this rank's stop request, once each time that it has grown."""
        received = request.received
        if received > self._published:
            self._published = received
            self._store.add(f"stop/{self._runs}", _REQUEUE if received is Stop.LEAVE_AND_REQUEUE else 1)

    def _raise_failure(self) -> None:
        """Raise the error that a rank has announced, if one has."""
        if self._store.check(["failure"]):
            raise pickle.loads(self._store.get("failure"))

    def _raise_ended(self, error: RuntimeError) -> None:
        """Raise what a rank has announced before its connections closed, or that it has ended without a word."""
        try:
            self._raise_failure()
        except SideError:
            raise
        except RuntimeError:
            pass  # the store has ended as well
        raise SideError(
            f"rank {self.rank}, one of the {self.side}, has lost another rank of the job, which has ended; see the log "
            "of that rank, then start the same command again"
        ) from error
