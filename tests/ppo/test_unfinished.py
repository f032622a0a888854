"""Rounds that go on with unfinished responses: what each has is what a literal reading of the rules gives.

The ranks are threads with engines that draw one token a step for each response, at speeds of their own; everything
above the engine is the real thing.
"""

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch.distributed as dist

from ovr_megatron.data.schema import Message, Row, TextPart
from ovr_megatron.data.stream import RowStream
from ovr_megatron.ppo import counters, rollouts, round_cut, round_work, unfinished
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollout, Rollouts
from ovr_megatron.rewards.verdict import Reason, Verdict
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime.stop import StopRequested

PROMPT_TOKENS = 3
LONGEST_WAIT_S = 10
COUNT = 10_000  # rows


@dataclass
class Case:
    """Settings of a run, and how long each response becomes."""

    seed: int
    replicas: int
    prompts: int
    oversample: float
    responses: int
    max_staleness: int
    room: int
    schedule: str = "static"
    mean: float = 2.8
    limits: list[int] = field(default_factory=lambda: [10_000])
    behind: int = 0  # iterations from the weights that draw a round to those that learn from it

    def version(self, iteration: int) -> int:
        return max(iteration - self.behind, 0)

    def length(self, row: int, sample: int) -> int:
        """Tokens of a response, wherever and by whatever policy it is generated."""
        return response_length(self.seed, self.mean, row, sample)

    def limit(self, iteration: int) -> int:
        """Most tokens of a prompt and a response together."""
        return self.limits[min(iteration, len(self.limits) - 1)]

    @property
    def size(self) -> int:
        return self.prompts + math.ceil(self.prompts * self.oversample)


@cache
def response_length(seed: int, mean: float, row: int, sample: int) -> int:
    return 1 + int(random.Random(f"{seed} {row} {sample}").lognormvariate(mean, 1.0))


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    limits = draw.choice(([10_000], [20, 30, 60], [60, 30, 30, 80], [40, 40, 10_000]))
    prompts, oversample = draw.randint(1, 6), draw.choice((0.2, 0.5, 1.0, 2.5))
    room = draw.choice((2, 5, 1000))
    return Case(
        seed, draw.randint(1, 3), prompts, oversample, draw.randint(1, 4), draw.randint(1, 3), room, limits=limits
    )


def ahead(case: Case) -> Case:
    """Return a case of ranks that only generate, one iteration ahead of those that train."""
    return replace(case, behind=1, max_staleness=case.max_staleness + 1)


# The rules, read literally: all engines at once, step by step.

LiteralResponse = list[int]  # of each token the version


@dataclass
class LiteralGroup:
    row: int
    responses: list[LiteralResponse]


def is_finished(case: Case, row: int, sample: int, response: LiteralResponse, iteration: int) -> bool:
    limit = case.limit(iteration) - PROMPT_TOKENS
    return len(response) >= min(case.length(row, sample), limit)


@dataclass
class LiteralRun:
    case: Case
    queue: list[LiteralGroup] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    next_row: int = 0
    dropped: int = 0

    def iterate(self, iteration: int, rows: Sequence[int]) -> dict[int, list[LiteralResponse]]:
        """Return the versions of the tokens of each response to the prompts that are trained on, by row."""
        case = self.case
        going_on, again = [], []
        for group in self.queue:
            versions = [version for response in group.responses for version in response]
            if versions and iteration - min(versions) <= case.max_staleness:
                going_on.append(group)
            else:
                self.dropped += bool(versions)
                again.append(group.row)
        limit = case.limit(iteration) - PROMPT_TOKENS
        for group in going_on:
            group.responses = [response[:limit] for response in group.responses]
        beginning = again + self.returned
        missing = max(case.size - len(going_on), 0)
        beginning, self.returned = beginning[:missing], beginning[missing:]
        while len(beginning) < missing:
            beginning.append(rows[self.next_row])
            self.next_row += 1
        groups = going_on + [LiteralGroup(row, [[] for _ in range(case.responses)]) for row in beginning]
        answered = self.steps(groups, len(going_on), iteration)
        taken = sorted(answered, key=lambda index: (answered[index], index))[: case.prompts]
        self.queue = [group for index, group in enumerate(groups) if index not in taken]
        return {groups[index].row: groups[index].responses for index in taken}

    def steps(self, groups: list[LiteralGroup], going_on: int, iteration: int) -> dict[int, int]:
        """Generate until the end of the interval in which enough are answered; return the step of each answer."""
        case = self.case

        def missing(index: int) -> list[int]:
            group = groups[index]
            responses = enumerate(group.responses)
            return [k for k, response in responses if not is_finished(case, group.row, k, response, iteration)]

        work = [index for index in range(len(groups)) if index >= going_on or missing(index)]
        answered = {index: 1 for index in range(going_on) if index not in work}
        order: list[list[tuple[int, int]]] = []
        for replica in range(case.replicas):
            order.append([])
            for index in work[replica :: case.replicas]:
                # Those that begin are one request; those that go on are requests of their own, behind it.
                samples = sorted(missing(index), key=lambda k: (bool(groups[index].responses[k]), k))
                order[-1] += [(index, k) for k in samples]
        step = 0
        while len(answered) < len(groups):
            if step % round_cut.INTERVAL == 0 and step and len(answered) >= case.prompts:
                break
            step += 1
            for replica in range(case.replicas):
                running = [(index, k) for index, k in order[replica] if k in missing(index)][: case.room]
                for index, k in running:
                    groups[index].responses[k].append(case.version(iteration))
                for index in {index for index, _ in running}:
                    if not missing(index):
                        answered[index] = step
        return answered


# Engines and ranks of the test.


class Ranks:
    """Collectives of threads."""

    def __init__(self, size: int):
        self.size = size
        self.local = threading.local()
        self.items: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=LONGEST_WAIT_S)
        self.store = dist.HashStore()
        self.sent = 0

    def gather(self, item: Any) -> list[Any]:
        self.items[self.local.rank] = item
        self.barrier.wait()
        items = list(self.items)
        self.barrier.wait()
        return items

    def exchange(self, outgoing: dict[int, Any]) -> list[Any]:
        rank = self.local.rank
        self.sent += any(peer != rank for peer in outgoing)
        return [sent[rank] for sent in self.gather(outgoing) if rank in sent]

    def __next__(self) -> int:
        """Count the rounds of this thread, as every process does by itself."""
        self.local.rounds = getattr(self.local, "rounds", 0) + 1
        return self.local.rounds

    def start_again(self) -> None:
        """Forget what a start that was stopped has left."""
        self.barrier.reset()
        self.store = dist.HashStore()
        ThreadBarrier.arrived.clear()

    def part(self, prefix: str) -> Any:
        return dist.PrefixStore(prefix, self.store)


class ThreadBarrier:
    """The barrier of a round for threads; ``stop`` ends nothing here."""

    ranks: Ranks
    arrived: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def __init__(self, name: str, request: Any = None):
        self.name = name
        self.waits = 0

    def step(self) -> None:
        pass

    def engine_step(self, agree: Any) -> bool:
        return False

    def stop_asked(self) -> bool:
        return False

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        self.waits += 1
        key = f"{self.name}/{self.waits}"
        with self.lock:
            self.arrived[key] += 1
        deadline = time.monotonic() + LONGEST_WAIT_S
        while self.arrived[key] < self.ranks.size:
            assert time.monotonic() < deadline, "an engine waits for ever"
            if meanwhile:
                meanwhile()
            time.sleep(1e-5)


class CountingEngine:
    """Draws a token a step for each of its first ``room`` responses, whose length is the case's.

    Token and log-probability are the position of the token in its response, so that a lost or doubled one shows.
    """

    def __init__(self, case: Case, pause: float):
        self.case = case
        self.pause = pause
        self.running: dict[tuple[int, int], list[int]] = {}

    def agree(self, decide: Callable[[], int]) -> int:
        return decide()

    def answer(self, take: Any, on_result: Any, should_stop: Any, on_unfinished: Any) -> list[tuple[int, str]]:
        requests: dict[int, Prompt] = {}
        finished: dict[tuple[int, int], Generation] = {}
        self.running = {}
        has_more = True
        while has_more or self.running:
            has_more = False
            if len(self.running) < self.case.room:
                for number, prompt in take(len(self.running)):
                    has_more = True
                    requests[number] = prompt
                    self.running.update({(number, k): [] for k in range(len(prompt.seeds))})
            for key in list(self.running)[: self.case.room]:
                self._draw(key, requests[key[0]], finished)
                prompt = requests[key[0]]
                results = [finished.get((key[0], k)) for k in range(len(prompt.seeds))]
                if all(results):
                    on_result(key[0], results)
                    for k in range(len(prompt.seeds)):
                        del finished[key[0], k]
            if self.pause:
                time.sleep(self.pause)
            if should_stop():
                parts = {key: self._generation(tokens, False) for key, tokens in self.running.items() if tokens}
                if on_unfinished:
                    on_unfinished(parts | finished)
                break
        return []

    def _draw(self, key: tuple[int, int], prompt: Prompt, finished: dict[tuple[int, int], Generation]) -> None:
        tokens = self.running[key]
        tokens.append(len(prompt.response) + len(tokens))
        sample = prompt.seeds[key[1]] % 1000
        stopped = len(prompt.response) + len(tokens) == self.case.length(prompt.tokens[0], sample)
        assert len(tokens) <= prompt.sampling.max_tokens
        if stopped or len(tokens) == prompt.sampling.max_tokens:
            finished[key] = self._generation(tokens, stopped)
            del self.running[key]

    def _generation(self, tokens: list[int], stopped: bool) -> Generation:
        return Generation(list(tokens), np.array(tokens, np.float32), stopped, [])

    def token_counts(self) -> dict[tuple[int, int], int]:
        return {key: len(tokens) for key, tokens in self.running.items()}


class Grader:
    """Says at once that everything is right."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    @property
    def pending(self) -> int:
        return len(self.keys)

    def submit(self, key: Any, request: Any) -> None:
        self.keys.append(key)

    def collect(self, wait: bool) -> list[tuple[Any, Verdict]]:
        keys, self.keys = self.keys, []
        return [(key, Verdict(Reason.TEXT)) for key in keys]


class Encoder:
    """A processor whose samples have the row's number for a prompt."""

    image_size = None  # no rule asks for it

    def encode(self, rows: Sequence[Row], generation: bool) -> list[Any]:
        return [Encoded(int(row.id)) for row in rows]

    def decode(self, tokens: Sequence[int]) -> str:
        return "text"


class Encoded:
    def __init__(self, row: int):
        self.prompt_tokens, self.images, self.videos = [row], (), ()

    def __len__(self) -> int:
        return PROMPT_TOKENS


class NumberedRows:
    """Rows whose text is their number."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Row:
        message = Message("user", (TextPart(str(index)),))
        return Row((message,), answer="1", id=str(index), where=f"rows:{index}")


def prompt_stream() -> PromptStream:
    processor: Any = Encoder()
    return PromptStream(RowStream([(NumberedRows(), 1.0)], seed=3), processor, {})


def prompt_rows(count: int) -> list[int]:
    """Return the rows that a stream draws."""
    stream = RowStream([(NumberedRows(), 1.0)], seed=3)
    return [int(next(stream).id) for _ in range(count)]


class Run:
    """A run of ranks that are threads."""

    def __init__(self, case: Case, monkeypatch: pytest.MonkeyPatch, pace: int = 0):
        self.case = case
        self.pace = random.Random(pace)
        self.dropped = 0.0
        self.ranks = Ranks(case.replicas)
        ThreadBarrier.ranks = self.ranks
        ThreadBarrier.arrived = Counter()
        for module in (rollouts, round_cut, unfinished):
            monkeypatch.setattr(module, "gather_objects", self.ranks.gather)
        monkeypatch.setattr(unfinished, "exchange", self.ranks.exchange)
        monkeypatch.setattr(rollouts, "WorkBarrier", ThreadBarrier)
        monkeypatch.setattr(rollouts, "_rounds", self.ranks)
        for module in (round_cut, round_work, counters):
            monkeypatch.setattr(module, "default_store", self.ranks.part)
        monkeypatch.setattr("ovr_megatron.ppo.prompts.lengths_or_errors", lambda processor, rows, **_: [1] * len(rows))
        # The sample of a request is its seed's last digits.
        monkeypatch.setattr(rollouts, "seeds_of", lambda *numbers: list(range(numbers[-1])))
        self.streams = [prompt_stream() for _ in range(case.replicas)]
        self.members = [self.member(rank) for rank in range(case.replicas)]

    def member(self, rank: int) -> Rollouts:
        case = self.case
        settings = SimpleNamespace(
            tp=1,
            schedule=case.schedule,
            max_staleness=case.max_staleness,
            continues_responses=case.max_staleness > 0,
            oversample=case.oversample,
            max_num_seqs=case.room,
            extra_responses=0,
            temperature=1.0,
        )
        config: Any = SimpleNamespace(
            rollout=settings,
            prompts=case.prompts,
            responses=case.responses,
            algorithm=SimpleNamespace(dynamic_sampling=0),
            reward=SimpleNamespace(rules={}, judges={}),
            data=SimpleNamespace(template="plain"),
            run=SimpleNamespace(seed=1),
        )
        engine: Any = CountingEngine(case, self.pace.choice((0.0, 0.0, 1e-5, 1e-4)))
        grader: Any = Grader()
        processor: Any = Encoder()
        world: Any = SimpleNamespace(size=case.replicas, rank=rank, is_main=False)
        return Rollouts(engine, grader, processor, config, world)

    def iterate(self, iteration: int) -> list[Rollout]:
        """Return the rollout of every rank."""
        results: list[Any] = [None] * self.case.replicas

        def work(rank: int) -> None:
            self.ranks.local.rank = rank
            if self.case.behind:
                self.members[rank].version = self.case.version(iteration)
            try:
                results[rank] = self.members[rank].collect(self.streams[rank], iteration, self.case.limit(iteration))
            except BaseException as error:
                results[rank] = error
                self.ranks.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.case.replicas)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        errors = [result for result in results if isinstance(result, BaseException)]
        # A rank that fails leaves the others at a broken barrier, which says nothing.
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return results

    def trained(self, iteration: int) -> dict[int, list[list[int]]]:
        """Run an iteration; return the versions of the tokens of each response that is trained on, by row."""
        found: dict[int, dict[int, list[int]]] = {}
        results = self.iterate(iteration)
        self.dropped += results[0].metrics.get("rollout/dropped_for_age", 0)
        states = [stream.state() for stream in self.streams]
        assert all(state == states[0] for state in states)
        for rollout in results:
            assert rollout.train_prompts == results[0].train_prompts
            for response in rollout.responses:
                assert response.tokens == list(range(len(response.tokens))), "a token was lost or drawn twice"
                assert response.logprobs.tolist() == response.tokens
                versions = response.versions
                if versions is None:
                    versions = np.full(len(response.tokens), iteration)
                row = int(rollout.prompts.rows[response.prompt].id)
                found.setdefault(row, {})[response.sample] = versions.tolist()
                length = self.case.length(row, response.sample)
                assert response.stopped == (len(response.tokens) == length)
        assert len(results[0].train_prompts) == self.case.prompts
        return {row: [group[k] for k in sorted(group)] for row, group in found.items()}

    def waiting(self) -> dict[int, list[list[int]]]:
        """Return the versions of the tokens that wait, by row."""
        found = {}
        state = self.streams[0].state()
        for member in self.members:
            for position, group in member.unfinished.groups.items():
                row = state["unfinished"][position][1]
                assert row not in found
                found[row] = [response.versions.tolist() for response in group.responses]
        return found


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    bar: Any = SimpleNamespace(__enter__=None)

    class Bar:
        done = 0

        def __enter__(self) -> Any:
            return bar

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(rollouts, "Progress", lambda *args, **more: Bar())


def check_iteration(run: Run, literal: LiteralRun, iteration: int, rows: Sequence[int]) -> list[int]:
    """Compare an iteration with the rules; return the rows that are trained on."""
    ours, theirs = run.trained(iteration), literal.iterate(iteration, rows)
    assert ours == theirs
    begun = {group.row: group.responses for group in literal.queue if any(map(len, group.responses))}
    assert run.waiting() == begun
    versions = [version for group in ours.values() for response in group for version in response]
    assert iteration - min(versions) <= literal.case.max_staleness
    assert all(len(group) == literal.case.responses for group in ours.values())
    assert run.dropped == literal.dropped
    return list(ours)


def check_once(trained: Sequence[int], literal: LiteralRun, rows: Sequence[int]) -> None:
    """Every prompt that was drawn is trained on once, or waits."""
    waiting = [group.row for group in literal.queue] + literal.returned
    assert sorted([*trained, *waiting]) == sorted(rows[: literal.next_row])


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("generates_ahead", [False, True])
def test_rounds_go_on_as_the_rules_say(seed: int, generates_ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any speed of the engines the same tokens; each prompt is trained on once, and nothing older than allowed."""
    case, rows = random_case(seed), prompt_rows(300)
    if generates_ahead:
        case = ahead(case)
    for pace in range(2):
        run, literal = Run(case, monkeypatch, pace), LiteralRun(case)
        trained: list[int] = []
        for iteration in range(8):
            trained += check_iteration(run, literal, iteration, rows)
        check_once(trained, literal, rows)


def test_all_that_can_happen_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases above drop responses for their age, send some to another engine, and leave some that are complete."""
    dropped = sent = complete = 0
    for seed in range(16):
        case, rows = random_case(seed), prompt_rows(300)
        run, literal = Run(case, monkeypatch), LiteralRun(case)
        for iteration in range(8):
            check_iteration(run, literal, iteration, rows)
            for member in run.members:
                groups = member.unfinished.groups.values()
                complete += sum(not group.unfinished(case.limit(iteration)) for group in groups)
        dropped += literal.dropped
        sent += run.ranks.sent
    assert min(dropped, sent, complete) > 5, (dropped, sent, complete)


@pytest.mark.parametrize("seed", range(6))
def test_other_ranks_go_on_from_the_checkpoint(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays of any number of ranks are read by any other, and no response changes."""
    case, rows = random_case(seed), prompt_rows(300)
    run, literal = Run(case, monkeypatch), LiteralRun(case)
    trained: list[int] = []
    for iteration in range(8):
        trained += check_iteration(run, literal, iteration, rows)
        files = [tensors for member in run.members if (tensors := member.unfinished.tensors())]
        state, before, dropped = run.streams[0].state(), run.waiting(), run.dropped
        case = replace(case, replicas=iteration % 3 + 1)
        literal.case = case
        run = Run(case, monkeypatch)
        run.dropped = dropped
        for rank, (stream, member) in enumerate(zip(run.streams, run.members, strict=True)):
            stream.load(state)
            member.unfinished.load(files[rank :: case.replicas])
        assert run.waiting() == before
    check_once(trained, literal, rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_stops_within_a_round_has_the_responses_before_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written with the state of the stream before the round, and the next start draws it again."""
    case, rows = random_case(seed), prompt_rows(300)
    run, literal = Run(case, monkeypatch), LiteralRun(case)
    for iteration in range(4):
        check_iteration(run, literal, iteration, rows)
        state, before = run.streams[0].state(), run.waiting()
        with monkeypatch.context() as stopping:
            stopping.setattr(ThreadBarrier, "wait", stop)
            with pytest.raises(StopRequested):
                run.iterate(iteration + 1)
        run.ranks.start_again()
        for stream in run.streams:
            stream.load(state)
        assert run.waiting() == before


def stop(barrier: ThreadBarrier, meanwhile: Any = None) -> None:
    raise StopRequested


@pytest.mark.parametrize("seed", range(6))
def test_engines_that_share_a_queue_lose_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(random_case(seed), schedule="shared", max_staleness=2)
    run = Run(case, monkeypatch, seed)
    trained: list[int] = []
    for iteration in range(8):
        groups = run.trained(iteration)
        assert all(len(group) == case.responses for group in groups.values())
        assert all(iteration - 2 <= version for group in groups.values() for versions in group for version in versions)
        trained += groups
    state = run.streams[0].state()
    waiting = [row for name in ("unfinished", "returned") for _, row in state.get(name, [])]
    assert max(Counter(trained + waiting).values()) == 1
    assert len(trained) + len(waiting) == state["drawn"]


def test_a_run_that_goes_on_without_generates_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other settings the prompts that wait begin again, before the stream's next, and none is lost."""
    case = Case(seed=1, replicas=2, prompts=3, oversample=1.0, responses=2, max_staleness=2, room=1000)
    run = Run(case, monkeypatch)
    trained = list(run.trained(0))
    waiting = [row for _, row in run.streams[0].state()["unfinished"]]
    for member in run.members:
        settings = member.config.rollout
        settings.max_staleness, settings.continues_responses, settings.oversample = 0, False, 0.0
    groups = run.trained(1)
    assert sorted(groups) == sorted(waiting)
    assert all(version == 1 for group in groups.values() for response in group for version in response)
    assert not set(trained) & set(waiting)
    assert run.waiting() == {}
    assert "unfinished" not in run.streams[0].state()
