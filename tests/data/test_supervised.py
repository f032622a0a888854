from dataclasses import replace
from types import SimpleNamespace

import pytest

from ovr_megatron.coldstart.setup import measure_drawn_rows, too_long_warning
from ovr_megatron.config import ColdStartConfig, ConfigError, DataConfig, ModelConfig, RunConfig, SourceConfig
from ovr_megatron.data.epochs import EpochStream
from ovr_megatron.data.pack_stream import PackStream
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.supervised import open_packs
from ovr_megatron.data.tokenising import tokenise
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)
WORLD = SimpleNamespace(dp_rank=0, dp_size=1, is_main=True)
ROW = '{"messages": [{"role": "user", "content": "red3"}, {"role": "assistant", "content": "So</think>3"}]}\n'


def test_one_function_opens_rows_and_sets(tmp_path, capsys):
    model, path = make_tiny_model(tmp_path / "model", sizes=SIZES), tmp_path / "rows.jsonl"
    path.write_text(ROW * 9)
    rows = DataConfig(sources=[SourceConfig(path=str(path))], pack_tokens=100, on_error="skip")
    run, processor = RunConfig(dir=str(tmp_path / "run")), Processor(model, rows)
    config = ColdStartConfig(run=run, model=ModelConfig(path=str(model)), data=rows, steps=7, packs_per_step=2)
    packs, steps = open_packs(config, processor, WORLD)
    assert isinstance(packs, PackStream) and steps == 7
    assert capsys.readouterr().err.startswith("data.template=think: chats are written with")
    next(packs)
    every, learned = packs.replies
    assert every == learned > 0
    longest = max(processor.lengths([packs._stream._sources[0][0]], generation=False))
    tokenise(rows, model, tmp_path / "set")
    tokenised = replace(rows, sources=[], tokenised=str(tmp_path / "set"))
    packs, steps = open_packs(replace(config, data=tokenised, steps=0, epochs=3), processor, WORLD)
    in_a_pack = 100 // longest
    assert isinstance(packs, EpochStream) and steps == -(-3 * -(-9 // in_a_pack) // 2)
    assert open_packs(replace(config, data=tokenised, steps=4), processor, WORLD)[1] == 4
    with pytest.raises(ConfigError, match=r"data.sources and data.tokenised are empty"):
        open_packs(replace(config, data=DataConfig()), processor, WORLD)
    with pytest.raises(RowError, match=r"absent.manifest.json: does not exist"):
        open_packs(replace(config, data=replace(tokenised, tokenised=str(tmp_path / "absent"))), processor, WORLD)


def test_rows_that_no_pack_takes_are_counted_before_the_first_step(tmp_path):
    model, path = make_tiny_model(tmp_path / "model", sizes=SIZES), tmp_path / "rows.jsonl"
    path.write_text(ROW * 2 + ROW.replace("So", "So " * 200))
    data = DataConfig(sources=[SourceConfig(path=str(path))], pack_tokens=100)
    config = ColdStartConfig(run=RunConfig(dir=str(tmp_path / "run")), model=ModelConfig(path=str(model)), data=data)
    lengths, too_long = measure_drawn_rows(config, Processor(model, data))
    assert too_long in (21, 22) and len(lengths) == 64 - too_long and max(lengths) <= 100
    assert too_long_warning(config, too_long).startswith(
        f"warning: {too_long} of 64 rows drawn from data.sources are too long (data.pack_tokens=100, "
        "data.max_prompt_tokens=8192) and"
    )
