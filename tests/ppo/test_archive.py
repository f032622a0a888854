"""Archived rollouts stand beside the prompts that they answer, or are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from ovr_megatron.config import DataConfig, ParallelConfig, SourceConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.prompts import Prompts, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.runtime import distributed


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """Return that of a source whose every second row has no answer that its rule can verify."""
    folder = tmp_path_factory.mktemp("archive")
    rows = folder / "rows.jsonl"
    with rows.open("w") as out:
        for answer in ("1", "as you like", "3", "some", "5", "many"):
            message = {"role": "user", "content": f"Which one? {answer}"}
            out.write(json.dumps({"messages": [message], "answer": answer, "source": "dots"}) + "\n")
    data = DataConfig(sources=[SourceConfig(path=str(rows))], on_error="skip")
    return Processor(make_tiny_model(folder / "model", seed=5), data)


def prompt_stream(processor: Processor, needs_answers: bool) -> PromptStream:
    skipped = SkippedRows()
    stream = open_stream(processor.config, 1, skipped)
    return PromptStream(stream, processor, {"dots": "count"}, skipped, needs_answers=needs_answers)


def test_responses_do_not_land_on_other_prompts(processor: Processor, tmp_path: Path) -> None:
    world = distributed.start(ParallelConfig(), seed=1)
    prompts = prompt_stream(processor, needs_answers=True)
    before = prompts.state()
    rows = prompts.draw(3)
    responses = [Response(i, 0, [5, 6], np.zeros(2, np.float32), True, "text", 1.0, "right") for i in range(3)]
    rollout = Rollout(Prompts(rows, processor), 64, responses, dict.fromkeys(range(3), 8))
    assert archive.write(tmp_path, 0, rollout, before, responses, {}, world) is None
    saved = archive.read(tmp_path, 0, world)
    restored = archive.restore(saved, prompt_stream(processor, needs_answers=True))
    assert [row.where for row in restored.prompts.rows] == [row.where for row in rows]
    other = prompt_stream(processor, needs_answers=False)
    with pytest.raises(archive.ArchiveError, match=r"prompt \d was .*rows.jsonl.* when it was archived and is .* now"):
        archive.restore(saved, other)
