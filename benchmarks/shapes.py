"""Name the shapes that `ovr bench` measures.  This module is free of torch, so that --help is quick."""

from ovr_megatron.families.presets import presets
from ovr_megatron.families.tiny import TinySizes

LAYER_SHAPES = {
    "tiny": TinySizes(),
    "3B layers": TinySizes(hidden=2048, heads=16, kv_heads=2, ffn=11008, layers=2),
    "7B layers": TinySizes(hidden=3584, heads=28, kv_heads=4, ffn=18944, layers=1),
}

STEP_SHAPES = ("tiny", *presets())
PEER_SHAPES = {
    "tiny": TinySizes(),
    "30M": TinySizes(
        hidden=512, layers=8, heads=8, kv_heads=2, ffn=1536, vision_hidden=256, vision_depth=4, vision_ffn=768
    ),
}
PARTS = ("model", "step", "vision", "head", "rl", "packing", "prepare", "save", "tail", "adapters", "peers")
