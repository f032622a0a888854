"""TRL's side of ``ovr bench peers``: ``python -m benchmarks.peer_trl TASK FOLDER`` prints a JSON row.

TRL comes from a folder on the search path; torch, Transformers and vLLM are the project's.  Everything is TRL's default
but what the task fixes: rows and their order, optimizer, float32, no recomputation, and of GRPO the algorithm.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ovr_megatron  # noqa: F401 (first: a machine without a GPU can import torchvision from here on)

# isort: split
import torch
from datasets import Dataset, Image, List
from torch.nn import functional
from torch.utils.data import SequentialSampler
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.generation import vllm_generation
from vllm.model_executor.layers import utils as vllm_layers

from benchmarks.peer_task import (
    BETA2,
    MAX_PIXELS,
    MIN_PIXELS,
    MODEL,
    PACK_TOKENS,
    PACKING,
    PROMPT_TOKENS,
    ROWS,
    SINGLE_ROWS,
    TRANSFORMERS,
    VISUAL_TOKENS,
    PeerTask,
    StepClock,
    replayed_texts,
    score,
)
from benchmarks.subprocess_bench import BenchRow
from ovr_megatron.families import ModelShape
from ovr_megatron.rollout.sampling import banned_tokens, end_tokens

GENERATION_MARKS = ("{%- generation %}", "{%- endgeneration %}")
CACHE_BYTES = 256 << 20  # of vLLM, as ours
MICRO_RESPONSES = 16  # that TRL computes at once; 32 and 64 take more memory and are not faster


class StepRecorder(TrainerCallback):
    """Record the end of each step, and the loss and the learned tokens of each micro-batch."""

    def __init__(self) -> None:
        self.clock = StepClock()
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the end of a step."""
        self.clock.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record what TRL logs of a step."""
        if "grad_norm" in logs:
            self.logs.append(dict(logs))

    def record(self, loss: torch.Tensor, mask: torch.Tensor) -> None:
        """Record a micro-batch: its mean loss, and which of its tokens are learned."""
        self.losses.append(float(loss.detach()))
        self.tokens.append(int(mask.sum()))

    def row(self, accumulated: int) -> BenchRow:
        """Return the steps of so many micro-batches each; a loss is the mean over the tokens of a step."""
        tokens = []
        losses = []
        for first in range(0, len(self.tokens), accumulated):
            counts = self.tokens[first : first + accumulated]
            means = self.losses[first : first + accumulated]
            tokens.append(sum(counts))
            losses.append(sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts))
        norms = [float(log["grad_norm"]) for log in self.logs]
        return {**self.clock.columns(), "tokens": tokens, "losses": losses, "norms": norms}


class OrderedSFTTrainer(SFTTrainer):
    """SFTTrainer that takes the rows in their order and tells its recorder of each micro-batch."""

    def __init__(self, recorder: StepRecorder, **kwargs: Any) -> None:
        self.recorder = recorder
        super().__init__(callbacks=[recorder], **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss and record it."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.recorder.record(loss, inputs["labels"][:, 1:] != -100)
        return loss


class RecordedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer that tells its recorder of each micro-batch, and that may learn from replayed responses."""

    def __init__(self, recorder: StepRecorder, replayed: list[list[int]], **kwargs: Any) -> None:
        self.recorder = recorder
        self.replayed = replayed
        super().__init__(callbacks=[recorder], **kwargs)

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        self.recorder.record(loss, inputs["completion_mask"])
        return loss

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.replayed:
            return self.replayed, None
        return super()._generate_single_turn(*args, **kwargs)


def load_processor(folder: Path) -> Any:
    """Return the processor; its template marks the replies, which TRL learns alone."""
    processor = AutoProcessor.from_pretrained(folder / MODEL, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    template = json.loads((folder / MODEL / "chat_template.json").read_text())["chat_template"]
    begin, end = GENERATION_MARKS
    ending = "{{- '<|im_end|>\\n' }}"
    # A reply with the token that ends it, without the line break behind it.
    marked = template.replace(
        "{%- if message.content is string %}",
        "{%- if message.role == 'assistant' %}"
        + begin
        + "{%- for part in message.content %}{{- part.text }}{%- endfor %}{{- '<|im_end|>' }}"
        + end
        + "{{- '\\n' }}{%- elif message.content is string %}",
    )
    head, _, tail = marked.rpartition(ending)
    processor.chat_template = head + "{%- if message.role != 'assistant' %}" + ending + "{%- endif %}" + tail
    return processor


def read_rows(task: PeerTask, folder: Path, column: str) -> Dataset:
    """Return the rows in TRL's form: chats in ``column``, and beside them the paths of their images."""
    rows = []
    for line in (folder / ROWS).read_text().splitlines():
        messages = json.loads(line)["messages"]
        parts = messages[0]["content"]
        images = [str(folder / part["image"]) for part in parts if part["type"] == "image"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        contents = texts + [message["content"] for message in messages[1:]]
        chat: list[dict[str, Any]] = []
        for message, content in zip(messages, contents, strict=True):
            # TRL itself puts the images before the text of a chat that has a column of images.
            text = content if task.images else [{"type": "text", "text": content}]
            chat.append({"role": message["role"], "content": text})
        rows.append({column: chat, "images": images} if task.images else {column: chat})
    dataset = Dataset.from_list(rows)
    return dataset.cast_column("images", List(Image())) if task.images else dataset


def shared_settings(task: PeerTask, folder: Path, micro_rows: int, accumulated: int) -> dict[str, Any]:
    """Return the settings of batch, optimizer, precision and log."""
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": micro_rows,
        "gradient_accumulation_steps": accumulated,
        "max_steps": task.step_count,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": BETA2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def load_model(folder: Path) -> Any:
    """Return the model in float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / MODEL, dtype=torch.float32)


def train_sft(task: PeerTask, folder: Path) -> BenchRow:
    """Take the steps of SFTTrainer.

    TRL packs all rows of the set, whatever step they were meant for: a step is a pack then, and the first loss is that
    of the first step's rows in a pack of their own.
    """
    rows = read_rows(task, folder, "messages")
    if task.who == SINGLE_ROWS:
        return _run_sft(task, folder, rows, 1, task.rows)
    if task.who != PACKING:
        return _run_sft(task, folder, rows, task.rows, 1)
    # `max_steps` of more than the packs of these rows: it learns them again, and the first loss is taken.
    first = _run_sft(task, folder, rows.select(range(task.rows)), 1, 1)
    result = _run_sft(task, folder, rows, 1, 1)
    return result | {"losses": first["losses"], "norms": first["norms"]}


def _run_sft(task: PeerTask, folder: Path, rows: Dataset, micro_rows: int, accumulated: int) -> BenchRow:
    """Run SFTTrainer over ``rows``."""
    recorder = StepRecorder()
    packing = task.who == PACKING
    settings = SFTConfig(
        packing=packing,
        max_length=PACK_TOKENS if packing else None,
        assistant_only_loss=True,
        **shared_settings(task, folder, micro_rows, accumulated),
    )
    trainer = OrderedSFTTrainer(
        recorder,
        model=load_model(folder),
        args=settings,
        train_dataset=rows,
        processing_class=load_processor(folder),
    )
    trainer.train()
    return recorder.row(accumulated)


def train_grpo(task: PeerTask, folder: Path) -> BenchRow:
    """Run the iterations of GRPOTrainer, or one that learns from replayed responses.

    vLLM generates in its process, or Transformers does, without correction then: probabilities are those of the model.
    """
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    replayed = []
    if task.replay:
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        replayed = [[*tokenizer(text)["input_ids"], end] for text in replayed_texts(task)]
    shape = ModelShape.from_hf(folder / MODEL)
    banned = set(banned_tokens(shape, tokenizer))
    uses_vllm = not task.replay and task.who != TRANSFORMERS
    generation: dict[str, Any] = {"suppress_tokens": sorted(banned)}
    if uses_vllm:
        generation = {"allowed_token_ids": sorted(set(range(shape.vocab)) - banned)}
    responses = task.rows * task.responses
    micro_rows = min(MICRO_RESPONSES, responses)
    accumulated = responses // micro_rows // task.processes
    settings = GRPOConfig(
        num_generations=task.responses,
        max_completion_length=task.tokens,
        use_vllm=uses_vllm,
        vllm_mode="colocate",
        # TRL hands vLLM a placeholder for each visual token: vLLM expands the first one again and keeps the others.
        vllm_max_model_length=PROMPT_TOKENS + VISUAL_TOKENS - 1 + task.tokens,
        generation_kwargs=generation,
        scale_rewards="none",
        ddp_backend="gloo" if task.processes > 1 else None,
        **shared_settings(task, folder, micro_rows, accumulated),
    )
    if uses_vllm:
        prepare_vllm()
    recorder = StepRecorder()
    affinity = os.sched_getaffinity(0)
    set_threads = torch.set_num_threads  # vLLM replaces it, and binds the process to one core
    trainer = RecordedGRPOTrainer(
        recorder,
        replayed,
        model=load_model(folder),
        reward_funcs=[make_reward(end_tokens(shape, tokenizer))],
        args=settings,
        train_dataset=read_rows(task, folder, "prompt"),
        processing_class=processor,
    )
    os.sched_setaffinity(0, affinity)
    set_threads(task.threads)
    trainer.train()
    row = recorder.row(accumulated)
    if task.processes > 1:
        row["tokens"] = sum_over_processes(row["tokens"])
    return row | {"losses": [float(log["loss"]) for log in recorder.logs]}


def sum_over_processes(counts: list[int]) -> list[int]:
    """Return the sums of ``counts`` over all processes.  A collective."""
    total = torch.tensor(counts)
    torch.distributed.all_reduce(total)
    return total.tolist()


def prepare_vllm() -> None:
    """Let TRL start vLLM on a CPU as ours starts it, and update its weights there.

    TRL passes neither dtype nor size of the cache.  On a CPU vLLM packs the weights of linear layers and drops the
    originals, so that TRL's update ends with "'Parameter' object has no attribute 'weight_loader'": here it keeps
    them, and torch multiplies.
    """
    settings = {"dtype": "float32", "kv_cache_memory_bytes": CACHE_BYTES}
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, **settings)
    vllm_layers.dispatch_cpu_unquantized_gemm = _multiply_by_torch


def _multiply_by_torch(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = functional.linear


def make_reward(end_ids: Sequence[int]) -> Callable[..., list[float]]:
    """Return TRL's form of our rule: a response that did not end by itself gets 0."""

    def reward(completions: list[Any], completion_ids: list[Any], **kwargs: Any) -> list[float]:
        rewards = []
        for (message,), ids in zip(completions, completion_ids, strict=True):
            ended = ids[-1] in end_ids
            rewards.append(score(message["content"], "", ()) if ended else 0.0)
        return rewards

    return reward


def main() -> None:
    """Measure the task of the command line and print its row."""
    task = PeerTask(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    train = train_sft if task.kind == "sft" else train_grpo
    row = train(task, Path(sys.argv[2]))
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
