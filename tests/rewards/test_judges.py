"""Judges: whole pools against a real HTTP server on this machine."""

import errno
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from ovr_megatron.config import ConfigError, RewardConfig, RewardJudgeConfig
from ovr_megatron.data.schema import Message, Row, RowError, TextPart
from ovr_megatron.rewards.combination import check_rules, is_unknown, needs_answer
from ovr_megatron.rewards.failures import FEWEST, FailureWatch, RewardError, count_verdicts
from ovr_megatron.rewards.judge_client import Judges
from ovr_megatron.rewards.judge_process import Job, _JudgeAnswers
from ovr_megatron.rewards.judge_templates import open_template
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Reason, Verdict
from ovr_megatron.rewards.references import check_reference
from ovr_megatron.rewards.verdict import RuleError
from ovr_megatron.runtime.chat_messages import Completion
from tests.rewards.judge_server import Server

KEY = "sk-secret-of-the-test"


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def start_server():
    servers = []

    def start(held=False):
        servers.append(Server())
        if held:
            servers[-1].hold()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def judge(url, **settings):
    defaults = {"base_url": url, "model": "m", "template": "answer", "attempts": 2, "backoff_s": 0.01, "timeout_s": 60}
    return RewardJudgeConfig(**{**defaults, "max_backoff_s": 0.1, **settings})


def request(text, rule="judge:j", **fields):
    row = Row((Message("user", (TextPart("Which colour?"),)),), answer="red", where="rows.jsonl:3", **fields)
    return GradeRequest(text, "red", (), rule, row=row)


def open_pool(folder, **settings):
    return GraderPool(1, judges=Judges({"j": judge(**settings)}, folder))


def test_a_disk_that_takes_no_answer_ends_no_wait(tmp_path, monkeypatch):
    """The reply says so; without one the round would wait for ever."""
    replies: queue.Queue = queue.Queue()
    answers = _JudgeAnswers("j", judge("http://127.0.0.1:9/v1"), Job(tmp_path, 0, 1, {}), replies)

    def full(key: int, entry: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(answers._journal, "add", full)
    future: Future = Future()
    future.set_result(Completion(7, text="<verdict>right</verdict>", tokens=3))
    answers._waiting[7] = [1, 2]
    answers._receive(7, future)
    first, second = replies.get_nowait(), replies.get_nowait()
    assert first["outcome"] == second["outcome"] == "failed" and "No space left" in first["text"]


def test_a_row_without_what_the_question_needs_is_refused():
    judges = {"j": open_template("j", "facts", 100)}
    row = request("x").row
    message = r"rows.jsonl:3: metadata.facts: is missing; the question to judge:j needs it"
    with pytest.raises(RowError, match=message):
        check_reference(row, {"": "judge:j"}, judges)
    check_reference(request("x", metadata={"facts": ["a"]}).row, {"": {"judge:j": 0.5, "format": 0.5}}, judges)


def test_a_question_with_the_answer_needs_one():
    judges = {name: open_template(name, name, 100) for name in ("facts", "answer")}
    assert needs_answer({"judge:answer": 0.5, "format": 0.5}, judges) and needs_answer("exact", judges)
    assert not needs_answer({"judge:facts": 0.5, "format": 0.5}, judges)
    row = replace(request("x", metadata={"facts": ["a"]}).row, answer=None)
    check_reference(row, {"": "judge:facts"}, judges)
    with pytest.raises(RowError, match=r"rows.jsonl:3: answer: is missing; the question to judge:answer needs it"):
        check_reference(row, {"": "judge:answer"}, judges)


def test_settings_that_cannot_work_are_refused(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="needs base_url"):
        RewardConfig(judges={"j": RewardJudgeConfig(model="m")})
    with pytest.raises(ConfigError, match="a key would go unencrypted to example"):
        RewardConfig(judges={"j": judge("http://example.org/v1", key_env="JUDGE_KEY")})
    with pytest.raises(ConfigError, match="the name becomes a file name; use letters"):
        RewardConfig(judges={"../j": judge("http://127.0.0.1/v1")})
    with pytest.raises(RuleError, match="there is no such judge"):
        check_rules(RewardConfig(rules={"s": {"judge:k": 0.5, "math": 0.5}}))
    with pytest.raises(RuleError, match=r"key_env=JUDGE_KEY: this environment variable is not set; export the key"):
        check_rules(RewardConfig(judges={"j": judge("https://example.org/v1", key_env="JUDGE_KEY")}))


def test_outcomes_are_rewards_or_counted(tmp_path, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    texts = ["good", "SCORE=wrong", "SCORE=0.25", "REFUSE it", "SILENT", "GARBAGE", "BUSY once", "SCORE=7", "good"]
    requests = [request(text) for text in texts]
    requests.append(request("SCORE=0.5", rule={"judge:j": 0.5, "exact": 0.5}))
    with open_pool(tmp_path, url=server.url, key_env="JUDGE_KEY") as pool:
        verdicts = pool.grade(requests)
        counts = pool.take_judge_counts()
        # The same responses in a later iteration: nothing is asked but what failed.
        again = pool.grade(requests)
        later_counts = pool.take_judge_counts()
    reasons = [verdict.reason for verdict in verdicts]
    nothing = Reason.NO_VERDICT
    assert reasons == [*[Reason.JUDGE] * 3, *[nothing] * 3, Reason.JUDGE, nothing, Reason.JUDGE, Reason.WEIGHTED]
    assert [v.reward for v in verdicts] == [1.0, 0.0, 0.25, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.25]
    assert [v.reward for v in again] == [v.reward for v in verdicts]
    assert all(is_unknown(verdict, "judge:j") == (verdict.reason is nothing) for verdict in verdicts)
    assert "refused: HTTP 400" in verdicts[3].box and "malformed: I looked at it." in verdicts[4].box
    assert "failed: 2 attempts, the last: not a chat completion" in verdicts[5].box
    expected = {"requests": 9, "verdict": 6, "refused": 1, "malformed": 2, "failed": 1, "over_budget": 0, "journal": 1}
    assert {name: counts[name] for name in expected} == expected and counts["tokens"] > 0
    assert later_counts["journal"] == 9 and later_counts["requests"] == 1 == later_counts["failed"]
    report = server.report()
    # Two responses and a later iteration have one question; in which order questions arrive is not determined.
    assert sum("good" in question for question in report["asked"]) == 1
    assert report["keys"] == [f"bearer {KEY}"]
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())


@pytest.fixture(scope="module")
def pool(server, tmp_path_factory):
    judges = {
        "half": judge(server.url, no_verdict=0.5),
        "slow": judge(server.url, timeout_s=0.5),
        "locked": judge(server.url, concurrency=1),
    }
    with GraderPool(1, judges=Judges(judges, tmp_path_factory.mktemp("judges"))) as pool:
        yield pool


def test_a_reward_without_a_verdict_can_be_set(pool):
    mixed_rule = {"judge:half": 0.5, "format": 0.5}
    [alone, mixed] = pool.grade([request("REFUSE a", "judge:half"), request("REFUSE b", mixed_rule)])
    assert (alone.reward, mixed.reward) == (0.5, 0.25)
    # It counts as a failure all the same, so that a run whose judge is gone does not go on.
    assert alone.failed and mixed.failed and not is_unknown(alone, "judge:half")
    message = r"failed \(no verdict of the judge: .*\) by the rule judge:half; correct base_url, .*so far are kept$"
    with pytest.raises(RewardError, match=message):
        FailureWatch({"s": "judge:half"}).add([count_verdicts([("s", alone)] * FEWEST)])
    unusable = Verdict(Reason.BAD_REFERENCE, "it is no box")
    message = r"\(unusable reference: it is no box\) by the rule box; correct the answers of the source, or"
    with pytest.raises(RewardError, match=message):
        FailureWatch({"s": "box"}).add([count_verdicts([("s", unusable)] * FEWEST)])


def test_a_slow_judge_takes_its_time_limit_and_no_more(pool):
    """The answer to SLOW never comes."""
    slow, quick = pool.grade([request("SLOW", "judge:slow"), request("quick", "judge:half")])
    assert slow.reason is Reason.NO_VERDICT and "2 attempts, the last: no whole answer after 0.5 s" in slow.box
    assert quick.reward == 1.0


def test_a_judge_that_refuses_the_key_is_asked_no_more(pool, server):
    verdicts = pool.grade([request(f"DENY {n}", "judge:locked") for n in range(20)])
    assert all(verdict.reason is Reason.NO_VERDICT for verdict in verdicts)
    assert all("refuses model 'm', HTTP 401" in verdict.box for verdict in verdicts)
    assert sum("DENY" in text for text in server.report()["asked"]) == 1


def test_a_judge_that_dies_is_bounded_and_asked_again_once_it_is_back(tmp_path, start_server):
    server = start_server()
    settings = {"url": server.url, "attempts": 1, "concurrency": 4, "max_backoff_s": 0.3}
    with open_pool(tmp_path, **settings) as pool:
        [before] = pool.grade([request("before")])
        server.close()
        dead = pool.grade([request(f"dead {n}") for n in range(200)])
        returned = subprocess.Popen(server.command(port=server.port), stdout=subprocess.PIPE)
        assert returned.stdout is not None and returned.stdout.readline()
        time.sleep(0.4)  # the pause
        [after] = pool.grade([request("after")])
        counts = pool.take_judge_counts()
        returned.kill()
        returned.wait()
    assert before.reward == after.reward == 1.0
    assert all(verdict.reason is Reason.NO_VERDICT for verdict in dead)
    assert counts["failed"] == 200 and all("ConnectError" in verdict.box for verdict in dead)
    assert any("not asked for another" in verdict.box for verdict in dead)


def test_a_budget_ends_the_questions_of_all_runs_and_ranks(tmp_path, server):
    def ask(name, rank, ranks, count):
        judges = Judges({"b": judge(server.url, max_requests=10)}, tmp_path, rank, ranks)
        with GraderPool(1, judges=judges) as pool:
            pool.grade([request(f"budget {name} {n}", rule="judge:b") for n in range(count)])
            return pool.take_judge_counts()

    first = ask("first", 0, 2, 8)
    assert (first["verdict"], first["over_budget"]) == (5, 3)  # half of it for each rank
    second = ask("second", 1, 2, 8)
    assert (second["verdict"], second["over_budget"]) == (2, 6)  # of the other five, a share
    # The answers of another rank are known.
    third = ask("first", 1, 2, 5)
    assert (third["journal"], third["over_budget"]) == (5, 0)


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_judges import Judges, GraderPool, judge, request

def main():
    judges = Judges({"j": judge(sys.argv[1], concurrency=32)}, Path(sys.argv[2]))
    with GraderPool(1, judges=judges) as pool:
        for number in range(int(sys.argv[4])):
            pool.submit(number, request(f"killed {number}"))
        done = 0
        while pool.pending:
            verdicts = pool.collect()
            assert all(verdict.reward == 1.0 for _, verdict in verdicts)
            done += len(verdicts)
            print(done, flush=True)
        print("requests", int(pool.take_judge_counts()["requests"]), flush=True)

main()
"""


def test_a_run_that_is_killed_and_resumed_asks_nothing_twice(tmp_path, start_server):
    server = start_server(held=True)
    server.release(32)
    count = 80
    command = [sys.executable, "-c", PROGRAM, server.url, str(tmp_path), str(Path(__file__).parent), str(count)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    while int(killed.stdout.readline()) < 32:
        pass
    # 32 are answered and 32 in flight.
    wait_until(lambda: len(server.report()["asked"]) == 64)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    # At once: the judges' process of the killed run still has its requests in flight, whose answers it keeps.
    resumed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    server.release()
    output, _ = resumed.communicate()
    assert resumed.returncode == 0
    asked = server.report()["asked"]
    assert len(asked) == len(set(asked)) == count
    assert int(output.split()[-1]) <= count - 64


def has_open(pid, path):
    try:
        return any(Path(os.readlink(link)) == path for link in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # closed meanwhile
        return False


def test_a_process_waits_for_the_answers_that_its_predecessor_has_in_flight(tmp_path, start_server):
    server = start_server(held=True)
    requests = [request(f"predecessor {number}") for number in range(8)]
    first = open_pool(tmp_path, url=server.url)
    for number, graded in enumerate(requests):
        first.submit(number, graded)
    wait_until(lambda: len(server.report()["asked"]) == 8)
    # As where its parent is killed: its input ends, and nobody waits for it.
    first._judges._stops_writing.set()
    first._judges._lines.put(b"")
    with open_pool(tmp_path, url=server.url) as second:
        for number, graded in enumerate(requests):
            second.submit(number, graded)
        wait_until(lambda: has_open(second._judges._process.pid, tmp_path / "00000.lock"))
        server.release()
        assert list(collect_all(second).values()) == [1.0] * 8
        assert second.take_judge_counts()["journal"] == 8
    assert len(server.report()["asked"]) == 8
    first.close()


def collect_all(pool):
    rewards = {}
    while pool.pending:
        rewards |= {key: verdict.reward for key, verdict in pool.collect()}
    return dict(sorted(rewards.items()))


def test_a_process_that_dies_is_started_again_and_its_questions_are_sent_again(tmp_path, start_server):
    """Also a second time, if the process answered between."""
    server = start_server()
    with open_pool(tmp_path, url=server.url) as pool:
        for death in range(2):
            server.hold()
            earlier = len(server.report()["asked"])
            for number in range(8):
                pool.submit(number, request(f"process {death} {number}"))
            wait_until(lambda earlier=earlier: len(server.report()["asked"]) == earlier + 8)
            pool._judges._process.kill()
            server.release()
            assert collect_all(pool) == dict.fromkeys(range(8), 1.0)


def test_hundreds_of_requests_are_in_flight(tmp_path, start_server):
    server = start_server(held=True)
    with open_pool(tmp_path, url=server.url, concurrency=256) as pool:
        for number in range(300):
            pool.submit(number, request(f"flight {number}"))
        wait_until(lambda: server.report()["now"] == 256)
        # All threads that ask: they would else interrupt the thread that generates.
        threads = map(int, os.listdir(f"/proc/{pool._judges._process.pid}/task"))
        niceness = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
        assert niceness.count(min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)) > 256
        server.release()
        assert collect_all(pool) == dict.fromkeys(range(300), 1.0)
    assert server.report()["most"] == 256


def test_settings_that_the_process_refuses_end_the_round_with_its_sentence(tmp_path, server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with (
        open_pool(tmp_path, url=server.url, key_env="JUDGE_KEY") as pool,
        pytest.raises(RuleError, match=r"reward.judges.j.key_env=JUDGE_KEY: this environment variable is not set"),
    ):
        pool.grade([request("a"), request("b")])


def test_a_folder_that_takes_no_answers_ends_the_round_with_one_sentence(tmp_path, server):
    folder = tmp_path / "judges"
    folder.write_text("")
    with (
        open_pool(folder, url=server.url) as pool,
        pytest.raises(RuleError, match=rf"the answers of judges cannot be kept: .*File exists: '{folder}'"),
    ):
        pool.grade([request("a")])
