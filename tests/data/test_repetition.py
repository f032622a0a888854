"""How often the rows of a source are seen is computed and said."""

import json

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.data.repetition import SourceUse, show_uses, source_uses


def test_epochs_follow_weights_and_endless_sources_have_none(tmp_path):
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    for name, count in (("small", 2), ("large", 40)):
        (tmp_path / f"{name}.jsonl").write_text(count * (json.dumps(row) + "\n"))
    sources = [
        SourceConfig(path=str(tmp_path / "small.jsonl"), weight=1.0, name="small"),
        SourceConfig(path=str(tmp_path / "large.jsonl"), weight=2.0),
        SourceConfig(path="puzzle:digits?form=text&task=sum", weight=1.0),
    ]
    uses = source_uses(DataConfig(sources=sources), samples=400)
    assert uses == [SourceUse("small", 2, 50.0), SourceUse(str(tmp_path / "large.jsonl"), 40, 5.0)]


def test_many_epochs_are_warned_of():
    lines = show_uses([SourceUse("math", 200, 29_184.4), SourceUse("large", 10_000, 1.5)])
    assert lines == [
        "math: 200 rows, 29,184.4 epochs",
        "large: 10,000 rows, 1.5 epochs",
        "warning: every row of math is trained on 29,184 times; add rows, lower its weight, or train for fewer steps",
    ]
