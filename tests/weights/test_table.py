"""The table against Transformers' own model, hand-made layouts, and its inverses on random shapes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen2_5_vl.shape import WindowedVisionShape
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.weights.table import LayoutError, canonical, from_hf, join, padded_vocab, rows, split, to_hf


def small_shape(heads=4, kv_heads=2, head_dim=4, ffn=6, vocab=11, tied=False, vision_heads=2, merge=2) -> ModelShape:
    return ModelShape(
        family="qwen2_5_vl",
        layers=2,
        hidden=12,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        norm_eps=1e-6,
        rope_theta=1e4,
        mrope_section=(1, 1, 0),
        max_positions=128,
        tied=tied,
        vision=WindowedVisionShape(
            depth=3,
            hidden=4 * vision_heads,
            ffn=ffn,
            heads=vision_heads,
            in_channels=3,
            patch=2,
            temporal_patch=2,
            merge=merge,
            window=8,
            full_attention_layers=(1,),
            tokens_per_second=2.0,
        ),
        image_token=1,
        video_token=2,
        vision_start_token=3,
        vision_end_token=4,
    )


def random_tensors(row, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in row.sizes]


def row_named(shape, megatron, critic=False):
    return {row.megatron: row for row in rows(shape, critic)}[megatron]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Transformers' tiny model with every weight random, its Megatron parameters, and its shape."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"), perturb=True, std=0.3)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()
    state = {canonical(name): tensor for name, tensor in model.state_dict().items()}
    shape = ModelShape.from_hf(folder)
    return (
        model.model,
        {row.megatron: from_hf(row, [state[name] for name in row.hf], shape) for row in rows(shape)},
        shape,
    )


def layer_of_one_token(parameters, prefix, x, groups, queries):
    """A transformer layer in Megatron's layout on one token: attention over one token is that token's value."""

    def linear(name, x):
        y = x @ parameters[f"{prefix}.{name}.weight"].T
        return y + parameters.get(f"{prefix}.{name}.bias", 0)

    def norm_and_linear(name, x):
        return linear(name, F.rms_norm(x, x.shape[-1:], parameters[f"{prefix}.{name}.layer_norm_weight"], 1e-6))

    heads = norm_and_linear("self_attention.linear_qkv", x).view(groups, queries + 2, -1)
    x = x + linear("self_attention.linear_proj", heads[:, -1:].expand(-1, queries, -1).reshape(1, -1))
    gate, up = norm_and_linear("mlp.linear_fc1", x).chunk(2, dim=1)
    return x + linear("mlp.linear_fc2", F.silu(gate) * up)


@torch.no_grad()
def test_a_language_layer_of_our_parameters_computes_what_transformers_does(tiny):
    model, parameters, shape = tiny
    x = torch.randn(1, shape.hidden, generator=torch.Generator().manual_seed(0))
    unturned = (torch.ones(1, 1, shape.head_dim), torch.zeros(1, 1, shape.head_dim))
    theirs = model.language_model.layers[1](x[None], position_embeddings=unturned)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    queries = shape.heads // shape.kv_heads
    ours = layer_of_one_token(parameters, "decoder.layers.1", x, shape.kv_heads, queries)
    torch.testing.assert_close(ours, theirs.view_as(ours))


@torch.no_grad()
def test_a_vision_layer_of_our_parameters_computes_what_transformers_does(tiny):
    model, parameters, shape = tiny
    vision = shape.vision
    x = torch.randn(1, vision.hidden, generator=torch.Generator().manual_seed(0))
    unturned = (torch.ones(1, vision.hidden // vision.heads), torch.zeros(1, vision.hidden // vision.heads))
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
    theirs = model.visual.blocks[1](x, cu_seqlens=cu_seqlens, position_embeddings=unturned)
    ours = layer_of_one_token(parameters, "vision.layers.1", x, vision.heads, 1)
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_the_merger_of_our_parameters_computes_what_transformers_does(tiny):
    model, parameters, shape = tiny
    x = torch.randn(8, shape.vision.hidden, generator=torch.Generator().manual_seed(0))
    merged = F.rms_norm(x, x.shape[-1:], parameters["vision.merger.norm.weight"], 1e-6).view(2, -1)
    fc1 = merged @ parameters["vision.merger.linear_fc1.weight"].T + parameters["vision.merger.linear_fc1.bias"]
    fc2 = F.gelu(fc1) @ parameters["vision.merger.linear_fc2.weight"].T + parameters["vision.merger.linear_fc2.bias"]
    torch.testing.assert_close(fc2, model.visual.merger(x))


def test_heads_of_tied_untied_and_critic():
    def heads(tied, critic):
        names = {row.megatron for row in rows(small_shape(tied=tied), critic)}
        return names & {"output_layer.weight", "value_head.weight", "embedding.word_embeddings.weight"}

    assert heads(tied=False, critic=False) == {"embedding.word_embeddings.weight", "output_layer.weight"}
    assert heads(tied=True, critic=False) == {"embedding.word_embeddings.weight"}
    for tied in (True, False):
        assert heads(tied, critic=True) == {"embedding.word_embeddings.weight", "value_head.weight"}
    value = row_named(small_shape(), "value_head.weight", critic=True)
    assert (value.hf, value.sizes) == (("value_head.weight",), ((1, 12),))


@pytest.mark.parametrize(
    ("stored", "hub"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("value_head.weight", "value_head.weight"),
    ],
)
def test_canonical_names(stored, hub):
    assert canonical(stored) == hub


def test_qkv_rows_are_grouped_by_key_value_head():
    shape = small_shape(heads=4, kv_heads=2, head_dim=1)
    row = row_named(shape, "decoder.layers.0.self_attention.linear_qkv.bias")
    fused = from_hf(row, [torch.arange(4), torch.arange(10, 12), torch.arange(20, 22)], shape)
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert split(row, fused, 2, 1, shape).tolist() == [2, 3, 11, 21]


def test_vision_qkv_rows_are_grouped_by_head():
    shape = replace(small_shape(vision_heads=2), vision=replace(small_shape().vision, hidden=4))
    row = row_named(shape, "vision.layers.1.self_attention.linear_qkv.bias")
    queries_keys_values = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23])
    fused = from_hf(row, [queries_keys_values], shape)
    assert fused.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_a_rank_holds_its_gate_then_its_up():
    shape = small_shape(ffn=4)
    row = row_named(shape, "vision.layers.0.mlp.linear_fc1.bias")
    fused = from_hf(row, [torch.arange(4), torch.arange(10, 14)], shape)
    assert fused.tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert split(row, fused, 2, 0, shape).tolist() == [0, 1, 10, 11]
    assert split(row, fused, 2, 1, shape).tolist() == [2, 3, 12, 13]


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_feed_forward_of_all_ranks_adds_up_to_the_hugging_face_one(tp):
    shape = small_shape(ffn=6)
    fc1, fc2 = (row_named(shape, f"decoder.layers.1.mlp.linear_fc{i}.weight") for i in (1, 2))
    (gate, up), (down,) = random_tensors(fc1), random_tensors(fc2, seed=1)
    x = torch.randn(5, shape.hidden, generator=torch.Generator().manual_seed(2))
    total = torch.zeros(5, shape.hidden)
    for rank in range(tp):
        gate_up = split(fc1, from_hf(fc1, [gate, up], shape), tp, rank, shape)
        gate_r, up_r = (x @ gate_up.T).chunk(2, dim=1)
        total += F.silu(gate_r) * up_r @ split(fc2, from_hf(fc2, [down], shape), tp, rank, shape).T
    torch.testing.assert_close(total, (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_patch_embedding_is_the_convolution_as_a_linear_map():
    shape = small_shape()
    row = row_named(shape, "vision.patch_embed.weight")
    (kernel,) = random_tensors(row)
    patches = torch.randn(7, shape.vision.patch_dim, generator=torch.Generator().manual_seed(1))
    convolved = F.conv3d(patches.view(7, *kernel.shape[1:]), kernel, stride=kernel.shape[2:]).view(7, -1)
    torch.testing.assert_close(patches @ from_hf(row, [kernel], shape).T, convolved)


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.integers(1, 6),
    queries=st.integers(1, 4),
    head_dim=st.integers(1, 3),
    vision_heads=st.integers(1, 6),
    vocab=st.integers(3, 20),
    tied=st.booleans(),
    critic=st.booleans(),
    tp=st.integers(1, 6),
)
def test_inverses(kv_heads, queries, head_dim, vision_heads, vocab, tied, critic, tp):
    """Hugging Face -> Megatron -> ranks -> Megatron -> Hugging Face gives every bit back."""
    shape = small_shape(kv_heads * queries, kv_heads, head_dim, 60, vocab, tied, vision_heads)
    for row in rows(shape, critic):
        tensors = random_tensors(row)
        whole = from_hf(row, tensors, shape)
        assert whole.numel() == sum(tensor.numel() for tensor in tensors)
        for tensor, back in zip(tensors, to_hf(row, whole, shape), strict=True):
            assert torch.equal(tensor, back)
        try:
            shards = [split(row, whole, tp, rank, shape) for rank in range(tp)]
        except LayoutError:
            cut_by = {"qkv": kv_heads, "vision_qkv": vision_heads, "row": whole.shape[-1], "column": whole.shape[0]}
            assert cut_by[row.kind] % tp
            continue
        assert torch.equal(join(row, shards, shape), whole)
        if row.kind == "vocabulary":
            stacked = torch.cat(shards)
            assert len(stacked) == padded_vocab(shape, tp)
            assert not stacked[vocab:].any()
            assert torch.equal(stacked[:vocab], whole)


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"), [(11, 1, 11), (11, 2, 12), (11, 4, 12), (12, 4, 12), (152064, 7, 152068)]
)
def test_padded_vocabulary_is_the_next_multiple_of_tp(vocab, tp, padded):
    assert padded_vocab(small_shape(vocab=vocab), tp) == padded


def test_more_ranks_than_key_value_heads_are_refused_with_the_reason():
    shape = small_shape(heads=28, kv_heads=4, head_dim=1)
    row = row_named(shape, "decoder.layers.0.self_attention.linear_qkv.weight")
    with pytest.raises(
        LayoutError, match=r"layers\.0\.self_att.*tp=8 does not divide the 4 key-value heads; tp can be 1, 2, 4"
    ):
        split(row, from_hf(row, random_tensors(row), shape), 8, 0, shape)
