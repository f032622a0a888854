"""One process with vLLM: losses of responses, answers to prompts, or pass rates.

Started by `ovr_megatron.curation.engines`.

Replicas share the rows, row i going to replica i modulo their number, and each writes a journal of its own, from which
an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from ovr_megatron.config import ParallelConfig, build
from ovr_megatron.curation.journal import Journal
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import ROWS, batches
from ovr_megatron.curation.teacher import has_video, question_key
from ovr_megatron.curation.text import response_text
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import Row, parse_row
from ovr_megatron.errors import UserError
from ovr_megatron.rewards.failures import FailureWatch, counts
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.rules import is_plain
from ovr_megatron.rewards.verdict import GradeRequest, Verdict
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.terminal import printable


class Replica:
    """The engine of this process with its share of the rows.

    Attributes:
        number: Of this replica.
        count: Replicas in all.
        journal: What this replica has found; only the first process of its group writes.
        leads: Whether this process writes: the first of its tensor-parallel group.
    """

    def __init__(
        self, config: PrepareConfig, world: World, journal: Path, model: str, dtype: str, max_tokens: int
    ) -> None:
        """Open ``journal``, and start vLLM with ``model`` and ``max_tokens`` of prompt and response together."""
        self.config = config
        self.number, place = divmod(world.rank, config.rollout.tp)
        self.count, self.leads = world.size // config.rollout.tp, place == 0
        self.journal = Journal(journal.with_suffix(f".{self.number}.jsonl"))
        dist.barrier()  # all of a tensor-parallel group must find the same results, before one of them adds to them
        # Of a chat of several turns it is the last reply that a stage looks at.
        self.processor = Processor(model, replace(config.data, learn="last"))
        self.engine = RolloutEngine(model, config.rollout, self.processor, dtype, max_tokens)

    def rows(self, before: Path) -> Iterator[tuple[int, dict[str, Any], Row]]:
        """This replica's rows with their numbers, as JSON and parsed."""
        root = Path(self.config.dir)
        with (before / ROWS).open(encoding="utf-8", newline="\n") as file:
            for index, line in enumerate(file):
                if index % self.count == self.number:
                    raw = json.loads(line)
                    # A prompt row needs an answer to be one; here it is only asked.
                    yield index, raw, parse_row({"answer": "-", **raw}, f"{before / ROWS}:{index + 1}", root)

    def add(self, key: int, result: dict[str, Any]) -> None:
        """Note a result, once for all processes of the replica."""
        if self.leads:
            self.journal.add(key, result)


def score(config: PrepareConfig, before: Path, folder: Path, world: World) -> None:
    """Write the mean loss of every response to ``scores.N.jsonl``, keyed by the number of the row."""
    told = config.proxy_loss
    assert told.model is not None, "the configuration was checked"
    replica = Replica(config, world, folder / "scores", told.model, told.dtype, told.max_tokens + 1)
    with replica.journal as journal:
        todo = (item for item in replica.rows(before) if item[0] not in journal and not item[2].is_prompt)
        for batch in batches(todo, told.batch):
            prompts, lengths, numbers = [], [], []
            for index, _, row in batch:
                prompt, length, error = response_prompt(replica.processor, row, told.max_tokens)
                if error:
                    replica.add(index, {"error": error})
                else:
                    prompts.append(prompt)
                    lengths.append(length)
                    numbers.append(index)
            for index, length, logprobs in zip(numbers, lengths, replica.engine.score(prompts), strict=True):
                replica.add(index, {"loss": -float(logprobs[-length:].mean()), "tokens": length})


def response_prompt(processor: Processor, row: Row, limit: int) -> tuple[Prompt, int, str | None]:
    """Prompt and response as one prompt of at most ``limit`` tokens, how many are the response's, or why not."""
    nothing = Prompt(())
    try:
        [sample] = processor.encode([row], generation=False)
    except TooLongError as error:
        return nothing, 0, f"{error.field}: {error.problem}"
    response = sample.tokens[sample.loss_mask].tolist()
    length = min(len(response), limit - (len(sample) - len(response)))
    if length < 1:
        return nothing, 0, f"the prompt fills proxy_loss.max_tokens={limit}"
    return Prompt([*sample.prompt_tokens, *response[:length]], sample.images, sample.videos), length, None


def answer(config: PrepareConfig, before: Path, folder: Path, world: World) -> None:
    """Write the teacher's answers to ``journal.N.jsonl``, keyed as `question_key` says."""
    told = config.teacher
    assert told.model is not None, "the configuration was checked"
    longest = config.data.max_prompt_tokens + told.max_tokens
    replica = Replica(config, world, folder / "journal", told.model, told.dtype, longest)
    with replica.journal as journal, Journal(folder / "journal.jsonl") as answered:
        todo = (item for item in replica.rows(before) if response_text(item[1]) is None and not has_video(item[1]))
        for batch in batches(_questions(todo, config, journal, answered), config.rollout.max_num_seqs):
            prompts, keys = [], []
            for key, row in batch:
                try:
                    [sample] = replica.processor.encode([row], generation=True)
                except TooLongError as error:
                    replica.add(key, {"error": f"{error.field}: {error.problem}"})
                    continue
                seeds = [key >> 34]
                prompts.append(Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, told.max_tokens))
                keys.append(key)
            for key, [found] in zip(keys, replica.engine.generate(prompts, told.temperature), strict=True):
                text, finish = replica.processor.decode(found.tokens), "stop" if found.stopped else "length"
                tokens = len(found.prompt_tokens) + len(found.tokens)
                replica.add(key, {"text": text, "finish": finish, "tokens": tokens})


def _questions(
    rows: Iterator[tuple[int, dict[str, Any], Row]], config: PrepareConfig, *known: Journal
) -> Iterator[tuple[int, Row]]:
    for _, raw, row in rows:
        for sample in range(config.teacher.samples):
            key = question_key(config.teacher, raw, sample)
            if not any(key in journal for journal in known):
                yield key, row


def attempt(config: PrepareConfig, before: Path, folder: Path, world: World) -> None:
    """Write how many responses to every prompt are right to ``tries.N.jsonl``, keyed by the number of the row."""
    told = config.difficulty
    assert told.model is not None, "the configuration was checked"
    longest = config.data.max_prompt_tokens + told.max_tokens
    replica = Replica(config, world, folder / "tries", told.model, told.dtype, longest)
    reward = config.reward
    grader = GraderPool(reward.workers, reward.timeout_s, reward.memory_mib, reward.cache)
    watch = FailureWatch(reward.rules)
    at_once = max(4 * config.rollout.max_num_seqs // told.samples, 1)  # a queue, so that few wait for a long one
    with replica.journal as journal, grader:
        todo = (item for item in replica.rows(before) if item[0] not in journal and response_text(item[1]) is None)
        for batch in batches(todo, at_once):
            prompts, rows = [], []
            for index, _, row in batch:
                try:
                    [sample] = replica.processor.encode([row], generation=True)
                except TooLongError as error:
                    replica.add(index, {"error": f"{error.field}: {error.problem}"})
                    continue
                first = ((config.seed << 16) + index) * told.samples % (1 << 30)
                seeds = range(first, first + told.samples)
                prompts.append(Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, told.max_tokens))
                rows.append((index, row))
            answers = replica.engine.generate(prompts, told.temperature)
            requests = [
                GradeRequest(
                    replica.processor.decode(found.tokens) if found.stopped else "",
                    row.answer or "",
                    row.options,
                    reward.rules.get(row.source, "auto"),
                    thinking=config.data.template == "think",
                )
                for (_, row), group in zip(rows, answers, strict=True)
                for found in group
            ]
            verdicts = grader.grade(requests) if replica.leads else []
            if replica.leads:
                groups = list(batches(verdicts, told.samples))
                watch.add(counts((row.source, v) for v in group) for (_, row), group in zip(rows, groups, strict=True))
                for (index, row), group in zip(rows, groups, strict=True):
                    replica.add(index, pass_rate(group, reward.rules.get(row.source, "auto")))


def pass_rate(verdicts: Sequence[Verdict], rule: str) -> dict[str, object]:
    """Return how many of a prompt's ``verdicts`` by ``rule`` are right, of how many, or the error that all failed with.

    As in training, an expression that no grader can finish is no right answer, but of a user's function that fails
    nothing is known.
    """
    known = [verdict for verdict in verdicts if is_plain(rule) or not verdict.failed]
    if not known:
        return {"error": ": ".join(filter(None, (verdicts[0].reason, verdicts[0].box)))}
    return {"right": sum(verdict.correct for verdict in known), "samples": len(known)}


TASKS = {"score": score, "answer": answer, "attempt": attempt}


def main(task: str, job: str, before: str) -> None:
    """Do ``task`` by the configuration in the file ``job`` with the rows in the folder ``before``."""
    try:
        config: PrepareConfig = build(PrepareConfig, OmegaConf.load(job))  # type: ignore[arg-type]
        parallel = ParallelConfig(tp=config.rollout.tp)
        world = distributed.start(parallel, config.seed, 0)
        TASKS[task](config, Path(before), Path(job).parent, world)
        distributed.finish()
    except UserError as error:
        print(printable(f"error: {error}"), flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
