"""The pool with its real worker processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ovr_megatron.rewards.grader import grade
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, PoolError, Reason, Verdict

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
HOSTILE = GradeRequest("\\boxed{9^{9^{9^{9^9}}}}", "\\sqrt{2}")
RIGHT = GradeRequest("\\boxed{7}", "7")


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=20.0) as pool:
        yield pool


def test_verdicts_are_the_graders_in_the_order_of_the_requests(pool):
    boxes = ["7", "8", "\\frac{14}{2}", "\\sqrt{49}", "", "x", "(7)", "7 apples", "seven", "é\ud800\u2028\n7"] * 3
    requests = [GradeRequest(f"\\boxed{{{box}}}", "7") for box in boxes] + [GradeRequest("none", "7")]
    requests += [GradeRequest("\\boxed{B}", "blue", ("red", "blue")), GradeRequest("x" * 300_000 + "\\boxed{7}", "7")]
    counted: list[int] = []
    verdicts = pool.grade(requests, counted.append)
    assert verdicts == [grade(request) for request in requests]
    assert sum(counted) == len(requests)
    assert {verdict.correct for verdict in verdicts} == {True, False}
    assert pool.grade([]) == []


def test_a_hostile_expression_costs_its_own_verdict_and_no_more_than_the_limit():
    with GraderPool(workers=1, timeout_s=1.0) as pool:
        assert pool.grade([RIGHT])[0].correct
        before, times = pool.pids, []
        verdicts = pool.grade([RIGHT, HOSTILE, RIGHT], lambda count: times.append(time.monotonic()))
        assert [verdict.reason for verdict in verdicts] == [Reason.TEXT, Reason.TIMEOUT, Reason.TEXT]
        assert verdicts[1] == Verdict(Reason.TIMEOUT) and verdicts[1].reward == 0.0
        assert 0.9 <= times[1] - times[0] < 5.0
        assert pool.pids != before and not Path(f"/proc/{before[0]}").exists()


def test_a_worker_that_dies_costs_one_verdict():
    with GraderPool(workers=1, timeout_s=30.0, cache=0) as pool:
        pool.grade([RIGHT])
        killer = threading.Timer(0.5, os.kill, (pool.pids[0], signal.SIGKILL))
        killer.start()
        assert [verdict.reason for verdict in pool.grade([HOSTILE, RIGHT])] == [Reason.CRASH, Reason.TEXT]
        os.kill(pool.pids[0], signal.SIGKILL)
        time.sleep(0.2)
        verdicts = pool.grade([RIGHT] * 5)
        assert sum(verdict.reason is Reason.CRASH for verdict in verdicts) <= 1
        assert sum(verdict.correct for verdict in verdicts) >= 4


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in the foreground: a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_nothing_to_the_next_call():
    with GraderPool(workers=1, timeout_s=30.0) as pool:
        pool.grade([RIGHT])
        began = time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.grade([HOSTILE])
        assert [verdict.correct for verdict in pool.grade([RIGHT] * 2)] == [True, True]
        assert time.monotonic() - began < 25


def test_workers_are_bounded_in_memory_and_gone_after_the_pool():
    with GraderPool(workers=1, memory_mib=700) as pool:
        pool.grade([RIGHT])
        pids = pool.pids
        limits = [Path(f"/proc/{pid}/limits").read_text() for pid in pids]
    for text in limits:
        assert any(line.split()[3:5] == [str(700 << 20)] * 2 for line in text.splitlines() if "address space" in line)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(PoolError, match="closed"):
        pool.grade([RIGHT])


def test_workers_that_cannot_start_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GraderPool(workers=1) as pool, pytest.raises(PoolError, match="did not start"):
        pool.grade([RIGHT])


@pytest.mark.parametrize("bad", [{"workers": 0}, {"timeout_s": 0.0}])
def test_a_pool_that_cannot_work_is_refused(bad):
    with pytest.raises(ValueError, match="at least one worker and a positive limit"):
        GraderPool(**bad)


def test_the_trainers_side_loads_neither_sympy_nor_torch():
    code = "import sys, ovr_megatron.rewards.pool; print(sorted({'sympy', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_eight_thousand_real_responses_are_graded_alike(pool):
    file = SHARED / "mathvision/graded_responses.jsonl"
    if not file.is_file():
        pytest.skip(f"no shared data at {file}")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    requests = [GradeRequest(row["response"], row["answer"], tuple(row["options"])) for row in rows]
    verdicts = pool.grade((requests * 21)[:8192])
    assert verdicts[:400] == verdicts[400:800] and sum(verdict.correct for verdict in verdicts[:400]) > 40
