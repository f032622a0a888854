"""Grade the responses of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ovr_megatron.data.processing import Processor
from ovr_megatron.evaluation.problems import ProblemSet
from ovr_megatron.evaluation.scoring import GradedResponse, add_votes, rule_of
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rewards.requests import RequestBuilder
from ovr_megatron.rewards.rules import reads_box

RequestMaker = Callable[[GradedResponse], GradeRequest]


def boxed_request(response: GradedResponse) -> GradeRequest:
    """Return the request to grade a response by a rule that reads a box."""
    assert response.response is not None
    return GradeRequest(response.response, response.reference, response.options, rule_of(response.metric))


def request_maker(processor: Processor, problems: ProblemSet) -> RequestMaker:
    """Return a function that makes the requests for a set, with the row for rules that read it."""
    thinking = processor.config.template == "think"

    def make(response: GradedResponse) -> GradeRequest:
        rule = rule_of(response.metric)
        if reads_box(rule):
            return boxed_request(response)
        assert response.response is not None
        row = problems.rows[response.index]
        builder = RequestBuilder({row.source: rule}, thinking, processor.image_size)
        return replace(builder.build(row, response.response), answer=response.reference)

    return make


def grade(
    grader: GraderPool,
    responses: Sequence[GradedResponse],
    make_request: RequestMaker = boxed_request,
) -> list[GradedResponse]:
    """Return the responses with their verdicts and votes.

    Unlike for the reward, a box in a response that was cut off counts.
    """
    graded = list(responses)
    positions: list[int] = []  # of the responses that the graders get
    requests: list[GradeRequest] = []
    for position, response in enumerate(responses):
        if response.response is None:  # a prompt over the limit: wrong without a verdict
            continue
        if response.metric == "exact":
            is_same = response.response.strip() == response.reference.strip()
            reason = "same text" if is_same else "different"
            graded[position] = replace(response, correct=is_same, reason=reason)
        else:
            positions.append(position)
            requests.append(make_request(response))
    for position, verdict in zip(positions, grader.grade(requests), strict=True):
        graded[position] = replace(responses[position], correct=verdict.correct, reason=str(verdict.reason))
    return add_votes(grader, graded)
