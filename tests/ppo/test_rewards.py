"""What becomes of verdicts in the loop: rewards, failures, and their metrics by source."""

import json
from contextlib import ExitStack, closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from ovr_megatron.config import RewardConfig, RewardJudgeConfig
from ovr_megatron.data.schema import Message, Row, TextPart
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.grading import write_verdict
from ovr_megatron.ppo.iteration import response_metrics
from ovr_megatron.ppo.prompts import Prompts
from ovr_megatron.ppo.rollouts import Rollout, Rollouts
from ovr_megatron.rewards.failures import FEWEST, FailureWatch, RewardError, count_verdicts
from ovr_megatron.rewards.judge_client import Judges
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rewards.verdict import Reason, Verdict
from tests.rewards.judge_server import Server

RAISED = Verdict(Reason.RAISED, "KeyError: 'x'")


@pytest.fixture
def one_rank():
    if dist.is_initialized():  # by another file of this process, whose group of one rank serves as well
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def response(prompt: int, verdict: Verdict, rule: str = "auto", tokens: int = 3) -> Response:
    made = Response(prompt, 0, list(range(tokens)), np.zeros(tokens, np.float32), True, "text")
    write_verdict(made, verdict, rule)
    return made


def test_only_a_function_of_the_users_that_fails_leaves_a_response_without_a_reward():
    failed = response(0, RAISED, "mine:rule")
    assert (failed.failed, failed.rewarded) == (True, False)
    assert failed.verdict == "own rule raised an error: KeyError: 'x'"
    hostile = response(0, Verdict(Reason.TIMEOUT))
    assert (hostile.failed, hostile.rewarded, hostile.reward, hostile.verdict) == (True, True, 0.0, "timeout")
    right = response(0, Verdict(Reason.USER_RULE, None, 0.5), "mine:rule")
    assert (right.failed, right.rewarded, right.reward) == (False, True, 0.5)


@pytest.mark.usefixtures("one_rank")
def test_what_has_no_reward_is_in_no_mean_and_no_source_overwrites_a_metric():
    names = ["mean", "failed", "mean", "gone"]
    rows = [Row((Message("user", (TextPart("?"),)),), answer="1", source=name) for name in names]
    given_up = Response(3, 0, [], np.zeros(0, np.float32), False, "", verdict="failed: too long", rewarded=False)
    responses = [
        response(0, Verdict(Reason.TEXT), tokens=2),
        response(1, Verdict(Reason.TIMEOUT), tokens=4),
        response(2, RAISED, "mine:rule", tokens=6),
        given_up,
    ]
    prompts = Prompts([], None)
    prompts.rows = rows
    metrics = response_metrics(Rollout(prompts, 10, responses))
    assert metrics == {
        "reward/mean": 0.5,
        "response/length": 4.0,
        "response/stopped": 1.0,
        "grading/failed": 2.0,
        "grading/failed/source/failed": 1.0,
        "grading/failed/source/gone": 0.0,
        "grading/failed/source/mean": 1.0,
        "reward/source/failed": 0.0,
        "reward/source/mean": 1.0,
        "response/length/source/failed": 4.0,
        "response/length/source/mean": 4.0,
        "response/stopped/source/failed": 1.0,
        "response/stopped/source/mean": 1.0,
    }
    json.dumps(metrics, allow_nan=False)


def test_a_run_stops_where_nearly_all_rewards_of_a_source_fail():
    watch = FailureWatch({"mine": "mine:rule"})
    right = Verdict(Reason.TEXT)
    watch.add([count_verdicts([("mine", RAISED)] * (FEWEST - 1) + [("math", right)] * 100)])
    with pytest.raises(RewardError, match=r"8 of 8 rewards of source 'mine' failed.*KeyError: 'x'.*mine:rule"):
        watch.add([count_verdicts([("mine", RAISED)])])


def test_a_hostile_response_now_and_then_stops_nothing():
    watch = FailureWatch({})
    for _ in range(20):
        rank = count_verdicts([("math", Verdict(Reason.TIMEOUT))] * 3 + [("math", Verdict(Reason.DIFFERENT))] * 5)
        watch.add([rank, rank])
    watch.add([count_verdicts([("rare", RAISED)])])


@pytest.mark.usefixtures("one_rank")
def test_what_judges_were_asked_is_in_the_metrics_of_the_round(tmp_path):
    row = Row((Message("user", (TextPart("?"),)),), answer="1", source="mine")
    with ExitStack() as stack:
        server = stack.enter_context(closing(Server()))
        judge = RewardJudgeConfig(base_url=server.url, model="m", template="answer", attempts=1)
        reward = RewardConfig(judges={"j": judge}, rules={"mine": "judge:j"})
        grader = stack.enter_context(GraderPool(1, judges=Judges(reward.judges, tmp_path)))
        rollouts = Rollouts.__new__(Rollouts)
        rollouts.config = SimpleNamespace(reward=reward)
        rollouts.grader = grader
        rollout = Rollout(Prompts([row], None), 10)
        for texts in (["good", "REFUSE", "SILENT"], ["good"]):  # two rounds of one iteration
            grader.grade([GradeRequest(text, "1", (), "judge:j", row=row) for text in texts])
            rollouts._record_judges(rollout)
    assert {name: value for name, value in rollout.metrics.items() if value} == {
        "grading/judge_requests": 3.0,
        "grading/judge_tokens": rollout.metrics["grading/judge_tokens"],
        "grading/judge_verdict": 2.0,
        "grading/judge_refused": 1.0,
        "grading/judge_malformed": 1.0,
        "grading/judge_journal": 1.0,
    }
    rollouts.config = SimpleNamespace(reward=RewardConfig())
    rollouts._record_judges(without := Rollout(Prompts([row], None), 10))
    assert without.metrics == {}


def test_verdicts_in_words_say_what_a_score_is_of():
    weighted = response(0, Verdict(Reason.WEIGHTED, "math 1 (same number), format 0 (no </think>)", 0.9), "auto")
    assert weighted.verdict == "weighted rules: math 1 (same number), format 0 (no </think>)"
    assert (weighted.reward, weighted.rewarded) == (0.9, True)
    unknown = response(0, Verdict(Reason.NO_VERDICT, "refused: HTTP 400"), "judge:j")
    assert (unknown.rewarded, unknown.failed) == (False, True)
    assert unknown.verdict == "no verdict of the judge: refused: HTTP 400"
    set_reward = response(0, Verdict(Reason.NO_VERDICT, "refused: HTTP 400", 0.5), "judge:j")
    assert (set_reward.rewarded, set_reward.failed, set_reward.reward) == (True, True, 0.5)
    right = response(0, Verdict(Reason.NUMBER, "5"))
    assert right.verdict == "same number"
