"""Two ranks of Megatron-Core: save models of known weights in Megatron's formats, and load what we have written.

The parameters are filled by a literal transcription of Megatron's layout, apart from our table.  ``save HF OUT``
writes what Megatron writes; ``load HF BRIDGE GPT`` loads our two checkpoints and prints the parameters that differ.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from ovr_megatron.runtime.cpu import let_megatron_run  # before Transformers: torchvision is imported without a GPU

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

PADDED = 128  # rows of the vocabulary come in multiples of this, over all ranks


class BridgeModel(MegatronModule):
    """The modules that Megatron-Bridge's Qwen25VLModel has: Transformers' tower, and a GPTModel."""

    def __init__(self, language: GPTModel, tower: torch.nn.Module):
        super().__init__(config=language.config)
        self.visual = tower
        self.language_model = language


def build(reference: Qwen2_5_VLForConditionalGeneration, tp: int, pp: int) -> GPTModel:
    text = reference.config.text_config
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp)
    config = TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        ffn_hidden_size=text.intermediate_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        normalization="RMSNorm",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=-(-text.vocab_size // PADDED) * PADDED,
        max_sequence_length=text.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


def expected(reference: Qwen2_5_VLForConditionalGeneration, model: GPTModel) -> dict[str, Tensor]:
    """Return what each parameter of ``model`` on this rank is made of, from Transformers' weights."""
    text = reference.config.text_config
    rank, tp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), model.config.pipeline_model_parallel_size
    first_layer = stage * text.num_hidden_layers // stages
    language = reference.model.language_model.state_dict()
    head_dim = text.hidden_size // text.num_attention_heads
    group_size = text.num_attention_heads // text.num_key_value_heads

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(tp, dim)[rank]

    def vocabulary(tensor: Tensor) -> Tensor:
        rows = -(-len(tensor) // PADDED) * PADDED
        return cut(torch.cat([tensor, torch.zeros(rows - len(tensor), tensor.shape[1])]), 0)

    def query_key_value(layer: str, kind: str) -> Tensor:
        q, k, v = (language[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv")
        width = group_size * head_dim
        parts = []
        for group in range(text.num_key_value_heads):
            head = slice(group * head_dim, (group + 1) * head_dim)
            parts += [q[group * width : (group + 1) * width], k[head], v[head]]
        return cut(torch.cat(parts), 0)

    def gate_up(layer: str) -> Tensor:
        return torch.cat([cut(language[f"{layer}.mlp.{half}_proj.weight"], 0) for half in ("gate", "up")])

    values = {
        "embedding.word_embeddings.weight": vocabulary(language["embed_tokens.weight"]),
        "output_layer.weight": vocabulary(reference.lm_head.weight.detach()),
        "decoder.final_layernorm.weight": language["norm.weight"],
    }
    for local in range(len(model.decoder.layers)):
        layer = f"layers.{first_layer + local}"
        parts = {
            "input_layernorm.weight": language[f"{layer}.input_layernorm.weight"],
            "pre_mlp_layernorm.weight": language[f"{layer}.post_attention_layernorm.weight"],
            "self_attention.linear_qkv.weight": query_key_value(layer, "weight"),
            "self_attention.linear_qkv.bias": query_key_value(layer, "bias"),
            "self_attention.linear_proj.weight": cut(language[f"{layer}.self_attn.o_proj.weight"], 1),
            "mlp.linear_fc1.weight": gate_up(layer),
            "mlp.linear_fc2.weight": cut(language[f"{layer}.mlp.down_proj.weight"], 1),
        }
        values |= {f"decoder.layers.{local}.{name}": value for name, value in parts.items()}
    names = {name for name in model.state_dict() if not name.endswith("_extra_state")}
    assert names <= values.keys()
    return {name: values[name] for name in names}


def filled(reference: Qwen2_5_VLForConditionalGeneration, tp: int, pp: int) -> GPTModel:
    model = build(reference, tp, pp)
    model.load_state_dict(expected(reference, model), strict=False)
    return model


def sharded(model: MegatronModule, **metadata: object) -> dict[str, object]:
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return model.sharded_state_dict(metadata={**metadata, **groups})


def save(reference: Qwen2_5_VLForConditionalGeneration, out: Path) -> None:
    bridge = BridgeModel(filled(reference, 2, 1), reference.model.visual)
    _save(out / "bridge/iter_0000010", {"model": sharded(bridge), "iteration": 10})
    rank = parallel_state.get_tensor_model_parallel_rank()
    _save_rank(out / f"ranks/iter_0000040/mp_rank_{rank:02d}", bridge)
    model = filled(reference, 1, 2)
    singletons = sharded(model, singleton_local_shards=True)
    _save(out / "gpt/iter_0000020", {"model": singletons, "args": argparse.Namespace(tensor_model_parallel_size=1)})
    stage = parallel_state.get_pipeline_model_parallel_rank()
    _save_rank(out / f"stages/iter_0000030/mp_rank_00_{stage:03d}", model)
    for name, step in (("bridge", 10), ("gpt", 20), ("stages", 30), ("ranks", 40)):
        (out / name / "latest_checkpointed_iteration.txt").write_text(str(step))


def _save_rank(folder: Path, model: MegatronModule) -> None:
    """Write the file of this rank, with what Megatron-LM stores beside the weights."""
    folder.mkdir(parents=True)
    content = {
        "args": argparse.Namespace(attention_backend=AttnBackend.flash),
        "checkpoint_version": 3.0,
        "model": model.state_dict_for_save_checkpoint(),
        "rng_state": [{"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}],
    }
    torch.save(content, folder / "model_optim_rng.pt")


def _save(folder: Path, state: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder))


def load(reference: Qwen2_5_VLForConditionalGeneration, bridge: Path, gpt: Path) -> dict[str, list[str]]:
    tower = type(reference.model.visual)._from_config(reference.config.vision_config)
    model = BridgeModel(build(reference, 2, 1), tower)
    wanted = sharded(model)
    # What modules ask for beside their weights, as those of Transformer Engine do.
    assert any(key.endswith("self_attention.linear_qkv._extra_state") for key in wanted), sorted(wanted)
    state = dist_checkpointing.load({"model": wanted}, str(bridge / "release"))
    model.load_state_dict(state["model"], strict=False)
    values = {f"language_model.{name}": value for name, value in expected(reference, model.language_model).items()}
    values |= {f"visual.{name}": value for name, value in reference.model.visual.state_dict().items()}
    differing = {"bridge": _differences(model, values)}
    alone = build(reference, 1, 2)
    state = dist_checkpointing.load({"model": sharded(alone)}, str(gpt / "release"))
    alone.load_state_dict(state["model"], strict=False)
    return differing | {"gpt": _differences(alone, expected(reference, alone))}


def _differences(model: torch.nn.Module, values: dict[str, Tensor]) -> list[str]:
    parameters = dict(model.named_parameters())
    assert parameters.keys() <= values.keys() and len(parameters) > 10
    return [name for name, parameter in parameters.items() if not torch.equal(parameter, values[name])]


def main() -> None:
    let_megatron_run()
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    mode, model, *arguments = sys.argv[1:]
    paths = [Path(argument) for argument in arguments]
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    if mode == "save":
        save(reference, *paths)
    else:
        gathered: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, load(reference, *paths))
        if dist.get_rank() == 0:
            print(json.dumps(gathered), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
