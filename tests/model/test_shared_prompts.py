"""A prompt that several responses of a pack share is computed once, and nothing else changes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, pack
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.model.layers import BottomRightMask, _packed_attention
from ovr_megatron.model.segments import Segments
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.batch import Batch
from ovr_megatron.runtime import distributed
from ovr_megatron.weights.folder import WeightFolder
from tests.model.shared_prompts import compare, make_responses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), tied=False, seed=3, perturb=True)


@pytest.mark.parametrize("critic", [False, True])
def test_scores_and_gradients_are_those_of_whole_samples(folder: Path, critic: bool) -> None:
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    engine = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), ParallelConfig(), world, critic)
    engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(folder))
    differences = compare(engine)
    assert differences["scores"] < 1e-5 and differences["loss"] < 1e-6 and differences["gradients"] < 2e-5
    assert differences["rows"] < 0.7


def test_a_pack_has_a_prompt_once_and_its_images_once(folder: Path) -> None:
    samples, prompts = make_responses(ModelShape.from_hf(folder))
    shared = pack(samples, prompts=prompts)
    assert shared.prefix_of is not None
    documents = shared.cu_seqlens.diff().tolist()
    first_of_prompt = {prompt: sample for sample, prompt in reversed(list(zip(samples, prompts, strict=True)))}
    assert len(shared.grid_thw) == sum(len(sample.grid_thw) for sample in first_of_prompt.values())
    heads = [i for i in range(len(documents)) if i in shared.prefix_of]
    assert heads == list(range(3))  # the fourth prompt has one response, which keeps it
    # Put together again, they are the samples, in order.
    starts = shared.cu_seqlens.tolist()
    for number, sample in enumerate(samples, start=len(heads)):
        rows = list(range(starts[number], starts[number + 1]))
        head = int(shared.prefix_of[number])
        if head >= 0:
            rows = list(range(starts[head], starts[head + 1])) + rows
        np.testing.assert_array_equal(shared.tokens[rows], sample.tokens)
        np.testing.assert_array_equal(shared.position_ids[:, rows], sample.position_ids)
        labels = shared.labels[rows]
        np.testing.assert_array_equal(labels[labels != IGNORED], sample.tokens[sample.loss_mask])
    order = shared.labels[shared.labels != IGNORED]
    np.testing.assert_array_equal(order, np.concatenate([sample.tokens[sample.loss_mask] for sample in samples]))


def test_packs_keep_responses_to_a_prompt_together(folder: Path) -> None:
    samples, prompts = make_responses(ModelShape.from_hf(folder))
    lengths = [int(sample.loss_mask.sum()) for sample in samples]
    longest = max(map(len, samples))
    batch = Batch(samples, lengths, longest + 8, range(len(samples)), len(samples), prompts)
    pack_members = batch.group_into_packs(range(len(samples)))
    assert sorted(i for members in pack_members for i in members) == list(range(len(samples)))
    rows = [len(pack.tokens) for pack in batch.packs(pack_members)]
    assert max(rows) <= longest + 8
    work = batch.work()
    assert sum(work.lengths) == sum(rows)
    assert sum(np.prod(grid) for grid in work.grids) == sum(len(pack.patches) for pack in batch.packs(pack_members))


class RecordedAttention(torch.nn.Module):
    """In the place of Transformer Engine's attention: computes what its arguments say, document by document.

    Its mask is the documentation's of ``padding_causal_bottom_right``: "the causal mask is aligned to the bottom right
    corner" of a document's matrix (dot_product_attention.py, Transformer Engine 2.20).
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept_packed_seq_params: set[str] = set()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: Segments,
        attn_mask_type: BottomRightMask,
    ) -> torch.Tensor:
        assert attn_mask_type.name == "padding_causal_bottom_right"
        query_bounds = packed_seq_params.cu_seqlens_q.tolist()
        key_bounds = packed_seq_params.cu_seqlens_kv.tolist()
        assert packed_seq_params.max_seqlen_kv == max(np.diff(key_bounds)) and key_bounds[-1] == len(key)
        outputs = []
        for i in range(len(query_bounds) - 1):
            q = query[query_bounds[i] : query_bounds[i + 1]]
            k = key[key_bounds[i] : key_bounds[i + 1]]
            v = value[key_bounds[i] : key_bounds[i + 1]]
            scores = torch.einsum("qnh,knh->nqk", q, k) / q.shape[-1] ** 0.5
            rows, columns = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
            scores = scores.masked_fill(columns > rows + len(k) - len(q), -torch.inf)
            outputs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v))
        return torch.cat(outputs)


def test_transformer_engine_gets_the_keys_of_the_prompt_before_those_of_the_response(folder: Path) -> None:
    """Its arguments describe the attention of whole samples."""
    samples, prompts = make_responses(ModelShape.from_hf(folder))
    generator = torch.Generator().manual_seed(0)
    shared, separate = pack(samples, prompts=prompts), pack(samples)
    # Rows of the same token of the same sample have the same query, key and value.
    by_row: dict[tuple[int, ...], torch.Tensor] = {}

    def vectors(packed: "object", whole: list[list[int]]) -> torch.Tensor:
        rows = {}
        for number, sample_rows in enumerate(whole):
            for position, row in enumerate(sample_rows):
                prefix = (prompts[number], *samples[number].tokens[: position + 1].tolist())
                if prefix not in by_row:
                    by_row[prefix] = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64)
                rows[row] = by_row[prefix]
        return torch.stack([rows[row] for row in range(len(rows))], dim=1)

    starts = separate.cu_seqlens.tolist()
    whole = [list(range(starts[i], starts[i + 1])) for i in range(len(samples))]
    starts = shared.cu_seqlens.tolist()
    assert shared.prefix_of is not None
    heads = len(starts) - 1 - len(samples)
    cut = []
    for number in range(heads, len(starts) - 1):
        rows = list(range(starts[number], starts[number + 1]))
        head = int(shared.prefix_of[number])
        cut.append(rows if head < 0 else list(range(starts[head], starts[head + 1])) + rows)
    device = torch.device("cpu")
    outputs = []
    for packed, sample_rows in ((separate, whole), (shared, cut)):
        segments = Segments.build(packed.bounds, exact=False, device=device, prefix_of=packed.prefix_of)
        if packed is separate:
            attention = RecordedAttention()
            mask = BottomRightMask.padding_causal_bottom_right  # with as many keys as queries, any causal mask
        else:
            attention = _packed_attention(RecordedAttention)()
            mask = None
        query, key, value = vectors(packed, sample_rows)
        out = attention(query, key, value, None, packed_seq_params=segments, attn_mask_type=mask)
        outputs.append(torch.stack([out[row] for rows in sample_rows for row in rows]))
    torch.testing.assert_close(outputs[1], outputs[0])
