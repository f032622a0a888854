"""Our rotary tables against Transformers', bit for bit, at the positions of long documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from ovr_megatron.families import ModelShape
from ovr_megatron.model.attention import rotary_table
from ovr_megatron.model.rope import inverse_frequencies
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

SIZES = TinySizes(layers=1, ffn=64, vision_hidden=32, vision_ffn=32)
YARN: dict[str, dict[str, Any]] = {
    "none": {},
    "plain": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "integers": {"factor": 2, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2},
    "fraction": {"factor": 2.5, "original_max_position_embeddings": 1000, "truncate": False},
    "factor": {"factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
}


@pytest.mark.parametrize("heads", [4, 1], ids=["head32", "head128"])
@pytest.mark.parametrize("theta", [10000.0, 1000000])
@pytest.mark.parametrize("options", YARN.values(), ids=YARN.keys())
def test_tables_are_transformers_past_40000_positions(
    tmp_path: Path, heads: int, theta: float, options: dict[str, Any]
) -> None:
    path = make_tiny_model(tmp_path, sizes=TinySizes(**{**vars(SIZES), "heads": heads, "kv_heads": 1})) / "config.json"
    config = json.loads(path.read_text())
    kind = {"type": "yarn"} if options else {}
    config |= {"rope_theta": theta, "max_position_embeddings": 131072}
    config["rope_scaling"] |= kind | options
    path.write_text(json.dumps(config))

    theirs = Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLConfig.from_pretrained(tmp_path).text_config)
    shape = ModelShape.from_hf(tmp_path)
    frequencies, scaling = inverse_frequencies(shape)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert scaling == theirs.attention_scaling and (scaling > 1) == bool(options)

    positions = torch.stack([torch.arange(n, n + 2000) for n in (40000, 40960, 100000)])
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor(shape.mrope_section))
    angles = positions[rows].t().float() * frequencies
    for dtype in (torch.float32, torch.bfloat16):
        cosines, sines = (part.float() for part in theirs(torch.zeros(1, dtype=dtype), positions[:, None]))
        table = rotary_table(angles, dtype, scaling)
        assert table.dtype == torch.float32
        assert torch.equal(table[:, 0, 0], torch.cat((cosines[0], sines[0]), dim=-1)), dtype
