"""Check whether the rule of a row's source can verify the row's reference answer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ovr_megatron.data.schema import ImagePart, Row, RowError, all_parts
from ovr_megatron.rewards import combination
from ovr_megatron.rewards.judge_templates import JudgeTemplate
from ovr_megatron.rewards.rules import JUDGE, answer_problem, is_judge, reads_box, reads_image_size
from ovr_megatron.rewards.verdict import RewardRule


def check_reference(
    row: Row,
    rules: Mapping[str, RewardRule],
    judges: Mapping[str, JudgeTemplate] = MappingProxyType({}),
) -> None:
    """Refuse a prompt row with an answer that no grader can verify, or without what the question to its judge needs.

    Functions of the user's take any answer.

    Args:
        row: A prompt row.
        rules: The rule of each source; ``auto`` for a source without one.
        judges: Templates of the judges by name.

    Raises:
        RowError: names the row, the reason and the remedy.
    """
    rule = rules.get(row.source, "auto")
    for name in combination.weights_of(rule):
        problem = answer_problem(name, row.answer or "", row.options)
        if problem:
            remedy = "give the bare final answer or remove the row"
            if not reads_box(name):
                remedy = f"give a reference of the rule {name}, or remove the row"
            raise RowError(row.where, "answer", problem, remedy)
        template = judges.get(name.removeprefix(JUDGE)) if is_judge(name) else None
        if template and template.needs_answer and not row.answer:
            remedy = f"the question to {name} needs it; add it to the row or change the template"
            raise RowError(row.where, "answer", "is missing", remedy)
        missing = template.missing_field(row) if template else None
        if missing:
            remedy = f"the question to {name} needs it; add it to the row's metadata or change the template"
            raise RowError(row.where, f"metadata.{missing}", "is missing", remedy)
        images = sum(isinstance(part, ImagePart) for part in all_parts(row.prompt))
        if reads_image_size(name) and images != 1:
            problem = f"has {images} images, and {name} scales coordinates by the size of a single one"
            remedy = "give references in pixels of the resized image, or one image"
            raise RowError(row.where, "messages", problem, remedy)
