"""The pool with its real worker processes."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ovr_megatron.rewards.grader import grade
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, PoolError, Reason, Verdict
from ovr_megatron.rewards.rules import RuleError, check

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
HOSTILE = GradeRequest("\\boxed{9^{9^{9^{9^9}}}}", "\\sqrt{2}")
RIGHT = GradeRequest("\\boxed{7}", "7")


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=20.0) as pool:
        yield pool


def pids_of(pool: GraderPool) -> list[int]:
    """Process ids of the present workers."""
    return [worker.process.pid for worker in pool._workers]


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
        before, cpu = pids_of(pool), children_cpu()
        verdicts = pool.grade([RIGHT, HOSTILE, RIGHT])
        assert [verdict.reason for verdict in verdicts] == [Reason.TEXT, Reason.TIMEOUT, Reason.TEXT]
        assert verdicts[1] == Verdict(Reason.TIMEOUT) and verdicts[1].reward == 0.0 and verdicts[1].failed
        assert 1.9 <= children_cpu() - cpu < 20.0  # one second in each of two workers, which also import
        assert pids_of(pool) != before and not Path(f"/proc/{before[0]}").exists()


def children_cpu() -> float:
    """CPU seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_worker_that_dies_costs_nothing():
    with GraderPool(workers=1, timeout_s=30.0, cache=0) as pool:
        pool.grade([RIGHT])
        os.kill(pids_of(pool)[0], signal.SIGKILL)
        time.sleep(0.2)
        assert all(verdict.correct for verdict in pool.grade([RIGHT] * 3))


def test_a_worker_that_is_killed_while_it_starts_is_replaced():
    with GraderPool(workers=2) as pool:
        for pid in pids_of(pool):
            os.kill(pid, signal.SIGKILL)
        assert all(verdict.correct for verdict in pool.grade([RIGHT] * 3))


RULES = """
import os, time
from pathlib import Path

def again(response, answer, options):
    '''Fail the first time in the way that the response names, and write down who was asked.'''
    log = Path(answer)
    first = not log.exists()
    with log.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if first or "always" in response:
        fail(response)
    return 1.0

def fail(how):
    if "nan" in how: raise_(float("nan"))
    if "raise" in how: raise KeyError("mine")
    if "crash" in how: os._exit(3)
    if "exit" in how: raise SystemExit(4)
    if "hang" in how: time.sleep(600)
    while "spin" in how: pass

def raise_(value):
    raise ValueError(value)

def nan(response, answer, options):
    return float("nan")

def slow(response, answer, options):
    time.sleep(1.5)
    return 1.0
"""


@pytest.fixture
def rules(tmp_path, monkeypatch):
    (tmp_path / "these_rules.py").write_text(RULES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_reward_that_fails_is_tried_once_more_in_a_fresh_worker(rules):
    kinds = ["raise", "crash", "hang"]
    asked = [GradeRequest(kind, str(rules / kind), (), "these_rules:again") for kind in kinds]
    with GraderPool(workers=1, timeout_s=0.5) as pool:
        verdicts = pool.grade(asked)
    assert [verdict.reward for verdict in verdicts] == [1.0] * len(kinds)
    for kind in kinds:
        first, second = (rules / kind).read_text().split()
        assert first != second, kind


def test_a_reward_that_fails_twice_is_no_verdict(rules):
    kinds = {"raise": Reason.RAISED, "crash": Reason.CRASH}
    asked = [GradeRequest(f"{kind} always", str(rules / kind), (), "these_rules:again") for kind in kinds]
    with GraderPool(workers=1) as pool:
        *verdicts, nan = pool.grade([*asked, GradeRequest("x", "", (), "these_rules:nan")])
    assert [verdict.reason for verdict in verdicts] == list(kinds.values())
    assert nan.reason is Reason.RAISED and "nan" in (nan.box or "") and "mine" in (verdicts[0].box or "")
    assert all(verdict.failed for verdict in (*verdicts, nan))
    assert all(len((rules / kind).read_text().split()) == 2 for kind in kinds)


def test_a_limit_counts_the_workers_own_time(rules):
    """A rule that waits, as a worker does on a node with more work than cores, has its verdict."""
    with GraderPool(workers=1, timeout_s=1.0) as pool:
        assert pool.grade([GradeRequest("x", "", (), "these_rules:slow")])[0].correct
        stopped = pids_of(pool)[0]
        pool.submit("x", RIGHT)
        os.kill(stopped, signal.SIGSTOP)
        pool.submit("y", GradeRequest("\\boxed{\\sqrt{49}}", "7"))
        threading.Timer(1.5, os.kill, (stopped, signal.SIGCONT)).start()
        collected = []
        while pool.pending:
            collected += pool.collect()
        assert [verdict.correct for _, verdict in collected] == [True, True] and pids_of(pool) == [stopped]


def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    for name in ("random", "sympy", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the current folder')")
    (tmp_path / "here.py").write_text("def right(response, answer, options): return 1.0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", "")]))
    with GraderPool(workers=1) as pool:
        assert pool.grade([RIGHT])[0].correct
    with pytest.raises(RuleError, match="No module named 'here'"):
        check("here:right")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here.py").rename(tmp_path / "elsewhere/here.py")
    check("here:right")


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


def test_workers_are_bounded_in_memory_yield_to_the_trainer_and_are_gone_after_the_pool():
    with GraderPool(workers=1, memory_mib=700) as pool:
        pool.grade([RIGHT])
        pids = pids_of(pool)
        limits = [Path(f"/proc/{pid}/limits").read_text() for pid in pids]
        niceness = [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids]
    assert niceness == [min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)] * len(pids)
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
