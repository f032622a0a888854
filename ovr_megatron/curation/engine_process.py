"""One process with vLLM: losses of responses, answers to prompts, or pass rates.

Started by `ovr_megatron.curation.engines`.

Replicas share the rows: row i belongs to replica i modulo their number.  Each replica writes its own journal, from
which an interrupted run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch.distributed as dist
from omegaconf import OmegaConf

from ovr_megatron.config import ParallelConfig, build
from ovr_megatron.curation.difficulty import PassRate
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import ROWS, batches
from ovr_megatron.curation.teacher import has_video, question_key
from ovr_megatron.curation.text import response_text
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.row_json import RowJson
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import Row
from ovr_megatron.errors import UserError
from ovr_megatron.rewards.combination import is_unknown
from ovr_megatron.rewards.failures import FailureWatch, count_verdicts
from ovr_megatron.rewards.judge_client import Judges
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.requests import RequestBuilder
from ovr_megatron.rewards.verdict import RewardRule, Verdict
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.offline import Request, answer_rows
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.journal import Journal
from ovr_megatron.runtime.json_lines import json_lines
from ovr_megatron.runtime.terminal import printable


@dataclass(frozen=True)
class IndexedRow:
    """A row with its index in the file, as JSON and parsed."""

    index: int
    raw: RowJson
    row: Row


class Replica:
    """The engine of this process with its share of the rows.

    Attributes:
        index: Index of this replica.
        count: Number of replicas.
        journal: Results of this replica.
        is_leader: Whether this process is the first of its tensor-parallel group, which alone writes.
    """

    def __init__(
        self,
        config: PrepareConfig,
        world: World,
        journal: Path,
        model: str,
        dtype: str,
        max_tokens: int,
    ) -> None:
        """Open ``journal``, and start vLLM with ``model`` and ``max_tokens`` of prompt and response together."""
        self.config = config
        self.index, rank_in_group = divmod(world.rank, config.rollout.tp)
        self.count = world.size // config.rollout.tp
        self.is_leader = rank_in_group == 0
        self.journal = Journal(journal.with_suffix(f".{self.index}.jsonl"))
        # All ranks of a tensor-parallel group must read the same results before the leader appends to them: they
        # skip rows by what they read, and must generate for the same ones.
        dist.barrier()
        # Stages look only at the last reply of a conversation.
        data = replace(config.data, learn="last")
        self.processor = Processor(model, data)
        self.engine = RolloutEngine(
            model,
            config.rollout,
            self.processor,
            dtype,
            max_tokens,
        )

    def rows(self, input_folder: Path) -> Iterator[IndexedRow]:
        """Yield this replica's rows."""
        root = Path(self.config.dir)
        path = input_folder / ROWS
        for line in json_lines(path):
            index = line.number - 1
            if index % self.count != self.index:
                continue
            raw = cast(RowJson, line.parse())
            where = f"{path}:{line.number}"
            # The engine reads the prompt alone.
            row = parse_row(raw, where, root, needs_answer=False)
            yield IndexedRow(index, raw, row)

    def pending_rows(self, input_folder: Path) -> Iterator[IndexedRow]:
        """Yield this replica's rows that have no result yet."""
        for item in self.rows(input_folder):
            if item.index not in self.journal:
                yield item

    def add(self, key: int, result: Mapping[str, object]) -> None:
        """Write a result, once for all processes of the replica."""
        if self.is_leader:
            self.journal.add(key, result)

    def answer(self, requests: Sequence[Request]) -> list[tuple[Request, list[Generation]]]:
        """Generate the responses to ``requests``; a prompt that is too long has an error as its result."""
        return answer_rows(self.engine, self.processor, requests, self.add)


def score(config: PrepareConfig, input_folder: Path, folder: Path, world: World) -> None:
    """Write the negative log-likelihood per token of each response, or an error, to ``scores.N.jsonl`` by row index."""
    settings = config.proxy_loss
    assert settings.model is not None, "the configuration was checked"
    replica = Replica(
        config,
        world,
        folder / "scores",
        settings.model,
        settings.dtype,
        settings.max_tokens + 1,  # vLLM samples a token behind each prompt that it scores
    )
    with replica.journal:
        pending = replica.pending_rows(input_folder)
        # A generator: the rows of a set need not fit into memory.
        rows = (item for item in pending if not item.row.is_prompt)
        for batch in batches(rows, settings.batch):
            # Apart from the batch: a row without a prompt gets its error at once and has no loss.
            prompts = []
            lengths = []
            indices = []
            for item in batch:
                prompt, length, error = response_prompt(
                    replica.processor,
                    item.row,
                    settings.max_tokens,
                )
                if error:
                    replica.add(item.index, {"error": error})
                else:
                    prompts.append(prompt)
                    lengths.append(length)
                    indices.append(item.index)
            prompt_logprobs = replica.engine.score(prompts)
            for index, length, logprobs in zip(indices, lengths, prompt_logprobs, strict=True):
                response_logprobs = logprobs[-length:]
                loss = -float(response_logprobs.mean())
                replica.add(index, {"loss": loss, "tokens": length})


def response_prompt(processor: Processor, row: Row, limit: int) -> tuple[Prompt, int, str | None]:
    """Join prompt and response to one prompt of at most ``limit`` tokens.

    Returns:
        the prompt, the number of its tokens that are the response's, and None or the reason why there is no prompt.
    """
    empty = Prompt(())
    try:
        [sample] = processor.encode([row], generation=False)
    except TooLongError as error:
        return empty, 0, f"{error.field}: {error.problem}"
    response = sample.tokens[sample.loss_mask].tolist()
    prompt_length = len(sample) - len(response)
    length = min(len(response), limit - prompt_length)
    if length < 1:
        return empty, 0, f"the prompt fills proxy_loss.max_tokens={limit}"
    tokens = [*sample.prompt_tokens, *response[:length]]
    prompt = Prompt(tokens, sample.images, sample.videos)
    return prompt, length, None


def answer(config: PrepareConfig, input_folder: Path, folder: Path, world: World) -> None:
    """Write the teacher's answers to ``journal.N.jsonl``, by the keys of `question_key`."""
    settings = config.teacher
    assert settings.model is not None, "the configuration was checked"
    max_tokens = config.data.max_prompt_tokens + settings.max_tokens
    replica = Replica(
        config,
        world,
        folder / "journal",
        settings.model,
        settings.dtype,
        max_tokens,
    )
    with replica.journal as journal, Journal(folder / "journal.jsonl") as earlier:
        rows = replica.rows(input_folder)
        # Answers of earlier runs count, too: `merge_journals` has moved them into one journal.
        requests = _questions(rows, config, (journal, earlier))
        for batch in batches(requests, config.rollout.max_num_seqs):
            for request, [generation] in replica.answer(batch):
                text = replica.processor.decode(generation.tokens)
                finish = "stop" if generation.stopped else "length"
                tokens = len(generation.prompt_tokens) + len(generation.tokens)
                result = {"text": text, "finish": finish, "tokens": tokens}
                replica.add(request.key, result)


def _questions(
    rows: Iterator[IndexedRow],
    config: PrepareConfig,
    journals: Sequence[Journal],
) -> Iterator[Request]:
    """Yield a request for every sample of a prompt row that none of ``journals`` has."""
    for item in rows:
        if response_text(item.raw) is not None or has_video(item.raw):
            continue
        for sample in range(config.teacher.samples):
            key = question_key(config.teacher, item.raw, sample)
            is_answered = any(key in journal for journal in journals)
            if not is_answered:
                seed = key >> 34  # 30 of the key's 64 bits
                yield Request(key, item.row, [seed], config.teacher.sampling)


def attempt(config: PrepareConfig, input_folder: Path, folder: Path, world: World) -> None:
    """Write how many responses to every prompt are right to ``tries.N.jsonl``, by the index of the row."""
    settings = config.difficulty
    assert settings.model is not None, "the configuration was checked"
    max_tokens = config.data.max_prompt_tokens + settings.max_tokens
    replica = Replica(
        config,
        world,
        folder / "tries",
        settings.model,
        settings.dtype,
        max_tokens,
    )
    reward = config.reward
    grader = GraderPool(
        reward.workers,
        reward.timeout_s,
        reward.memory_mib,
        reward.cache,
        Judges(reward.judges, Path(config.dir) / "judges", replica.index, replica.count),
    )
    watch = FailureWatch(reward.rules)
    # Four times what the engine runs at a time: the engine idles less while the longest response of a batch finishes.
    batch_size = max(4 * config.rollout.max_num_seqs // settings.samples, 1)
    with replica.journal, grader:
        requests = _attempts(replica, input_folder)
        for batch in batches(requests, batch_size):
            groups = replica.answer(batch)
            if replica.is_leader:
                _grade(replica, grader, watch, groups)


def _attempts(replica: Replica, input_folder: Path) -> Iterator[Request]:
    """Yield a request for every prompt row that has no pass rate yet."""
    for item in replica.pending_rows(input_folder):
        if response_text(item.raw) is None:
            seeds = _attempt_seeds(replica.config, item.index)
            yield Request(item.index, item.row, seeds, replica.config.difficulty.sampling)


def _attempt_seeds(config: PrepareConfig, index: int) -> range:
    """Return a seed for each response to the row ``index``; consecutive, below 2^30 + the number of responses."""
    samples = config.difficulty.samples
    first_seed = ((config.seed << 16) + index) * samples % (1 << 30)
    return range(first_seed, first_seed + samples)


def _grade(
    replica: Replica,
    grader: GraderPool,
    watch: FailureWatch,
    groups: Sequence[tuple[Request, Sequence[Generation]]],
) -> None:
    """Grade the group of responses to each row, and write the pass rates.

    Raises:
        RewardError: nearly all verdicts of a source failed.
    """
    config = replica.config
    rules = config.reward.rules
    grade_requests = []
    builder = RequestBuilder(rules, config.data.template == "think", replica.processor.image_size)
    for request, group in groups:
        for generation in group:
            # A response that was cut off has no final answer, whatever stands in its last box.
            text = ""
            if generation.stopped:
                text = replica.processor.decode(generation.tokens)
            grade_requests.append(builder.build(request.row, text))
    all_verdicts = grader.grade(grade_requests)
    by_row = batches(all_verdicts, config.difficulty.samples)
    graded = []
    by_source: list[tuple[str, Verdict]] = []
    for (request, _), verdicts in zip(groups, by_row, strict=True):
        graded.append((request, verdicts))
        for verdict in verdicts:
            by_source.append((request.row.source, verdict))
    # In one call, so that a source is judged by the whole batch and not by its first prompt.
    watch.add([count_verdicts(by_source)])
    for request, verdicts in graded:
        rule = rules.get(request.row.source, "auto")
        replica.add(request.key, pass_rate(verdicts, rule))


def pass_rate(verdicts: Sequence[Verdict], rule: RewardRule) -> PassRate:
    """Return how many of a prompt's ``verdicts`` by ``rule`` are right, of how many, or the error if all failed.

    Verdicts whose reward is unknown are left out, as in training (`ovr_megatron.rewards.combination.is_unknown`).
    """
    valid = [verdict for verdict in verdicts if not is_unknown(verdict, rule)]
    if not valid:
        first = verdicts[0]
        parts = (first.reason, first.box)
        error = ": ".join(filter(None, parts))
        return {"error": error}
    right = sum(verdict.correct for verdict in valid)
    return {"right": right, "samples": len(valid)}


TASKS = {"score": score, "answer": answer, "attempt": attempt}


def main(task: str, job: str, input_folder: str) -> None:
    """Run ``task`` with the configuration in the file ``job`` on the rows in ``input_folder``."""
    try:
        config: PrepareConfig = build(PrepareConfig, OmegaConf.load(job))  # type: ignore[arg-type]
        parallel = ParallelConfig(tp=config.rollout.tp)
        world = distributed.start(parallel, config.seed, 0)
        run_task = TASKS[task]
        folder = Path(job).parent
        run_task(config, Path(input_folder), folder, world)
        distributed.finish()
    except UserError as error:
        print(printable(f"error: {error}"), flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
