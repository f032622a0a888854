"""Run vLLM within the trainer's process: start it, update its weights, generate, let it sleep.

One engine runs on every rank (``external_launcher``): ``rollout.tp`` neighbouring ranks form a tensor-parallel group,
which holds one copy of the model, needs the same prompts on all of its ranks and returns the same responses.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from vllm import LLM
from vllm.device_allocator.alloc_conf import EXPANDABLE_SEGMENTS, alloc_conf_from_env, conf_flag_enabled
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.output_processor import RequestState

from ovr_megatron.config import RolloutConfig
from ovr_megatron.data.hf_assets import complete_folder
from ovr_megatron.data.processing import Processor
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.rollout.model import EMPTY, register_model
from ovr_megatron.rollout.pending import PendingPrompts, SampleKey, continue_text, public
from ovr_megatron.rollout.reshard import Reshard, Traffic
from ovr_megatron.rollout.sampling import (
    SCORING,
    Generation,
    Prompt,
    RolloutError,
    banned_tokens,
    end_tokens,
    prompt_logprobs,
    sampling_params,
)
from ovr_megatron.rollout.shared_memory import private_segments
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.distributed import keep_generators, share_timeout
from ovr_megatron.runtime.stop import StopRequested
from ovr_megatron.weights.slices import LocalShard

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
    # Float32 attention is Triton's on a GPU, whose products of float32 are TF32 (10 bits) unless it is told otherwise.
    "TRITON_F32_DEFAULT": "ieee",
}
_SMALLEST_SHARE = 0.01  # of the GPU, where the size of the cache says how much is taken
_CPU_BATCH_TOKENS = 8192
_CPU_BLOCK_TOKENS = 32
_CPU_CACHE_BYTES = 256 << 20

# When an engine is collected, vLLM destroys all process groups, the trainer's too: keep each until the process ends.
_started: list[LLM] = []


@contextmanager
def undisturbed(compiles: bool = False) -> Iterator[None]:
    """Restore the process after the block: generators, threads, affinity, default dtype and environment variables.

    On a CPU nothing is compiled in the block without ``compiles``.

    vLLM seeds the global generators, draws from them, replaces ``torch.set_num_threads`` and sets variables, among
    them ``LD_PRELOAD`` and ``LOCAL_WORLD_SIZE``, that child processes and the trainer would inherit.
    """
    environment = dict(os.environ)
    affinity = os.sched_getaffinity(0)
    cuda_generator = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    # Even where its model is not compiled, vLLM compiles one comparison of its sampler: seconds, and a C++ compiler.
    may_compile = compiles or torch.cuda.is_available()
    compiling = nullcontext() if may_compile else torch.compiler.set_stance("force_eager")
    os.environ.update(_ENVIRONMENT)
    try:
        with keep_generators(), compiling, warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        os.sched_setaffinity(0, affinity)
        if cuda_generator is not None:
            torch.cuda.set_rng_state(cuda_generator)


class RolloutEngine:
    """vLLM on this rank, with the weights of the last `update`.

    It lives as long as the process; for other weights of the same shape, `update` it instead of starting another.

    Attributes:
        banned: Ids that are never sampled; the trainer must leave out the same.
    """

    def __init__(
        self,
        model_dir: str | Path,
        config: RolloutConfig,
        processor: Processor,
        dtype: str,
        max_model_len: int,
        seed: int = 0,
        empty: bool = False,
        offload: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Start vLLM; ``torch.distributed`` must be initialised.

        Args:
            model_dir: Hugging Face folder of the model.
            config: Layout, memory and stop strings.
            processor: The trainer's; its tokenizer, image budget, position rule and frequencies hold here too.
            dtype: ``float32`` or ``bfloat16``.
            max_model_len: Most tokens of a prompt and its response together.
            seed: Of vLLM's own generators; responses have seeds of their own.
            empty: Read no weights; the first `update` brings them.
            offload: The trainer's models are not on the GPU while the engine works, and nothing of the engine is to
                stay there while it sleeps.
            group: Of all ranks that send weights or have an engine; None: these are the ranks of the default group.

        Raises:
            RolloutError: ``rollout.tp`` does not divide the processes, or a CPU is to compile without a compiler.
        """
        check_tp(config.tp)
        self._group = dist.new_subgroups(config.tp, backend="gloo")[0] if config.tp > 1 else None
        self.banned = banned_tokens(processor.shape, processor.tokenizer)
        self._end_ids = end_tokens(processor.shape, processor.tokenizer)
        self._stop = list(config.stop)
        self._max_num_seqs = config.max_num_seqs
        self._asleep: set[str] = set()
        self._pending = PendingPrompts()
        self._empty = empty
        self._compiles = config.enforce_eager is False
        register_model(family_of(processor.shape))
        settings = _settings(config, processor, dtype, max_model_len, offload)
        if empty:
            settings["load_format"] = EMPTY
        if torch.cuda.is_available():
            # Without a stream set in Python, vLLM's NCCL communicator makes one of its own current for good, and the
            # trainer's gradients would be accumulated on another stream than they are computed on.
            torch.cuda.set_stream(torch.cuda.current_stream())
        with undisturbed(self._compiles):
            # vLLM takes the launcher's rank for that in the default group, which may have a part of the ranks alone.
            os.environ["RANK"] = str(dist.get_rank())
            with private_segments(None if torch.cuda.is_available() else self._group):
                self._llm = LLM(model=str(complete_folder(Path(model_dir))), seed=seed, **settings)
            _started.append(self._llm)
            (self._model,) = self._llm.apply_model(lambda model: model)
            self._model.follow(self.banned, processor.after_video, processor.shape)
            self._reshard = Reshard(self._model, int(config.bucket_mib * 2**20), config.check_updates, group)
        share_timeout()
        self._can_sleep = settings.get("enable_sleep_mode", False)

    def update(self, shards: Sequence[LocalShard]) -> Traffic:
        """Copy the trainer's weights into vLLM and drop the caches of the old ones.  A collective.

        The first update and the one after a deep sleep fill every parameter, the others only those that are trained.

        Raises:
            TransferError: no rank holds rows that a parameter needs.
        """
        with undisturbed(self._compiles):
            self._wake("weights")
            if self._empty:
                self._llm.collective_rpc(clear_positions)
                self._model.clear_state()
            traffic = self._reshard.update(shards, everything=self._empty)
            self._empty = False
            self._reset_caches()
        return traffic

    def generate(
        self,
        prompts: Sequence[Prompt],
        on_result: Callable[[int, list[Generation]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[Generation]]:
        """Answer every prompt once for each of its seeds.

        Args:
            prompts: The same on all ranks of a tensor-parallel group.
            on_result: Called with a prompt's number and its responses, once all of its seeds are answered.
            should_stop: Called between two steps; it must return the same at the same step on all ranks of a
                tensor-parallel group.

        Returns:
            For each prompt the responses in the order of its seeds.

        Raises:
            RolloutError: the engine has no weights; or vLLM refused or gave up a prompt, which is raised after all
                others are answered: their responses reach the caller by ``on_result`` alone.
            StopRequested: ``should_stop`` returned True.
        """
        responses: list[list[Generation]] = [[] for _ in prompts]
        numbered_prompts = enumerate(prompts)
        stopped = False

        def take(outstanding: int) -> list[tuple[int, Prompt]]:
            return list(numbered_prompts)  # all of them the first time, none later

        def store(index: int, prompt_responses: list[Generation]) -> None:
            responses[index] = prompt_responses
            if on_result:
                on_result(index, prompt_responses)

        def between_steps() -> bool:
            nonlocal stopped
            stopped = bool(should_stop and should_stop())
            return stopped

        for index, problem in self.answer(take, store, between_steps):
            raise RolloutError(f"prompt {index} of {len(prompts)} was not answered: {problem}")
        if stopped:
            raise StopRequested
        return responses

    def answer(
        self,
        take: Callable[[int], Sequence[tuple[int, Prompt]]],
        on_result: Callable[[int, list[Generation]], None],
        should_stop: Callable[[], bool] | None = None,
        on_unfinished: Callable[[dict[SampleKey, Generation]], None] | None = None,
    ) -> list[tuple[int, str]]:
        """Answer the prompts that ``take`` gives until it has no more, each once for each of its seeds.

        Args:
            take: Called with the number of unfinished responses before each step in which these leave room for more;
                returns numbered prompts, the same on all ranks of a tensor-parallel group.
            on_result: Called with a prompt's number and its responses in the order of its seeds.
            should_stop: Called between two steps; where it returns True, the same at the same step on all ranks of a
                tensor-parallel group, the unfinished prompts are given up.
            on_unfinished: Called with what these prompts have of responses then, by a prompt's number and the index of
                the seed; without it nothing is said of them.

        Returns:
            The prompts that vLLM gave up or did not take, and why; for these `on_result` is not called.
        """
        failed: list[tuple[int, str]] = []
        with undisturbed(self._compiles):
            self._wake_to_work()
            waiting = self._pending = PendingPrompts()
            has_more = True
            while has_more or waiting:
                has_more = False
                unfinished = len(self._request_states())
                if self.room_left(unfinished):
                    for index, prompt in take(unfinished):
                        has_more = True
                        try:
                            waiting.add(index, prompt, self._enqueue(prompt))
                        except (VLLMValidationError, ValueError) as error:  # a request that vLLM does not take
                            failed.append((index, str(error)))
                if self._llm.llm_engine.has_unfinished_requests():
                    for output in self._llm.llm_engine.step():
                        if output.finished:
                            waiting.finish(output, on_result, failed)
                    self._finish_early(waiting, on_result, failed)
                watchdog.touch()
                if should_stop and should_stop():
                    if on_unfinished:
                        on_unfinished(waiting.responses_so_far(self._request_states()))
                    self._abort(waiting)
                    break
        return failed

    def _finish_early(
        self,
        waiting: PendingPrompts,
        on_result: Callable[[int, list[Generation]], None],
        failed: list[tuple[int, str]],
    ) -> None:
        """Finish the requests that have enough responses, and give up the others of these requests."""
        processor = self._llm.llm_engine.output_processor
        outputs = waiting.finish_early(processor.parent_requests.values(), processor.request_states)
        if not outputs:
            return
        self._give_up([output.request_id for output in outputs])
        for output in outputs:
            waiting.finish(output, on_result, failed)

    def _give_up(self, request_ids: Sequence[str]) -> None:
        """Abort requests of vLLM."""
        self._llm.llm_engine.abort_request(list(request_ids))
        # It forgets their samples alone, and would keep the finished ones of each request for as long as it lives.
        given_up = set(request_ids)
        parents = self._llm.llm_engine.output_processor.parent_requests
        for name in [name for name, parent in parents.items() if parent.external_req_id in given_up]:
            del parents[name]

    def token_counts(self) -> dict[SampleKey, int]:
        """Return the tokens so far of each response that `answer` has not finished; between two of its steps."""
        return self._pending.token_counts(self._request_states())

    def _request_states(self) -> list[RequestState]:
        """Return what vLLM has of each sample of an unfinished request."""
        return list(self._llm.llm_engine.output_processor.request_states.values())

    def _abort(self, waiting: PendingPrompts) -> None:
        """Abort the requests that vLLM has not finished.

        The steps that follow end what asynchronous scheduling has under way and have the model forget the requests;
        without them sleep would find blocks of the cache in use.
        """
        self._give_up(waiting.request_ids())
        core = self._llm.llm_engine.engine_core.engine_core
        while core.batch_queue or core.scheduler.has_requests():
            self._llm.llm_engine.step()

    def room_left(self, outstanding: int) -> bool:
        """Return whether vLLM can work on more responses than the ``outstanding`` ones."""
        return outstanding < self._max_num_seqs

    def agree(self, decide: Callable[[], int]) -> int:
        """Broadcast the first rank's decision within the tensor-parallel group.  A collective of the group."""
        if self._group is None:
            return decide()
        decision = torch.tensor(decide() if self._group.rank() == 0 else 0)
        dist.broadcast(decision, group=self._group, group_src=0)
        return int(decision)

    def score(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Compute the log-probability of every token of each prompt but its first; sampled tokens are discarded.

        Args:
            prompts: The same on all ranks of a tensor-parallel group; ``seeds`` and ``sampling`` do not matter.

        Returns:
            For each prompt float32[n - 1] of its n tokens, placeholders expanded; -inf at banned ids.

        Raises:
            RolloutError: vLLM gave a request up.
        """
        with undisturbed(self._compiles):
            self._wake_to_work()
            if prompts:
                inputs = [request_of(prompt) for prompt in prompts]
                self._llm.enqueue(inputs, [SCORING] * len(inputs), use_tqdm=False)
            logprobs: dict[int, np.ndarray] = {}
            while self._llm.llm_engine.has_unfinished_requests():
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        logprobs[int(output.request_id)] = prompt_logprobs(output)
                watchdog.touch()
        return [logprobs[request_id] for request_id in sorted(logprobs)]  # vLLM numbers requests in order

    def _enqueue(self, prompt: Prompt) -> list[tuple[str, int]]:
        """Hand the prompt to vLLM; return the ids of its requests with the numbers of their seeds, in their order."""
        params = sampling_params(prompt, self._end_ids, self._stop)
        ids = self._llm.enqueue([request_of(prompt)] * len(params), params, use_tqdm=False)
        if self._stop and prompt.response and not prompt.sampling.endless:
            public_ids = set(map(public, ids))
            for state in self._request_states():
                if state.external_req_id in public_ids:
                    continue_text(state, prompt.response, self._stop)
        return [(request_id, request_params.n) for request_id, request_params in zip(ids, params, strict=True)]

    def sleep(self, deep: bool = False) -> None:
        """Drop the caches and free the GPU for the trainer until the next `update` or `generate`.

        The weights move to the host, or with ``deep`` nowhere: then an `update` must come first.  Weights that are on
        the host already stay there, whatever ``deep`` says: vLLM takes no second sleep, and to drop them they would
        have to come back to the GPU.
        """
        # After an update the weights are awake while the cache may still sleep; then the weights go to sleep again.
        if "weights" in self._asleep:
            return
        with undisturbed(self._compiles):
            self._reset_caches()
            if self._can_sleep:
                self._llm.sleep(level=2 if deep else 1)
        self._asleep = {"weights", "kv_cache"}
        self._empty |= deep

    def drop_caches(self) -> None:
        """Drop keys, values and image features: responses then depend on no prompts of earlier calls."""
        with undisturbed(self._compiles):
            self._reset_caches()

    def _wake_to_work(self) -> None:
        if self._empty:
            raise RolloutError("the rollout engine has no weights: it was started or put to sleep without; update it")
        self._wake("weights", "kv_cache")

    def _wake(self, *parts: str) -> None:
        sleeping_parts = [part for part in parts if part in self._asleep]
        if sleeping_parts and self._can_sleep:
            self._llm.wake_up(tags=sleeping_parts)
        self._asleep -= set(sleeping_parts)

    def _reset_caches(self) -> None:
        """Drop keys and values and image features: vLLM keeps all of them over an update."""
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM kept its prefix cache: requests are still running")
        self._llm.llm_engine.reset_encoder_cache()
        self._llm.reset_mm_cache()


def clear_positions(worker: Any) -> None:
    """Zero the rotary positions of vLLM's worker, which lie with the weights and are lost in a deep sleep.

    A captured graph reads them for padding tokens, too, as indices.  Model runner V2 alone has them there
    (``vllm/v1/worker/gpu/mm/rope.py``, RopeState).
    """
    state = getattr(getattr(worker.model_runner, "model_state", None), "rope_state", None)
    if state is not None:
        state.positions.zero_()


def check_tp(tp: int) -> None:
    """Raise `RolloutError` where ``tp`` neighbouring ranks cannot form groups of all ranks."""
    ranks = dist.get_world_size()
    if ranks % tp:
        raise RolloutError(f"rollout.tp={tp} does not divide the {ranks} processes; change one of them")


def check_compiler() -> None:
    """Raise `RolloutError` where there is no C++ compiler, which torch's inductor calls on a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RolloutError(
            f"rollout.enforce_eager=false compiles vLLM's model on a CPU, and there is no {compiler}; install a C++ "
            "compiler, name one in CXX, or leave rollout.enforce_eager at null"
        )


def request_of(prompt: Prompt) -> dict[str, object]:
    """Return a prompt in vLLM's form."""
    request: dict[str, object] = {"prompt_token_ids": [*prompt.tokens, *prompt.response]}
    media: dict[str, Sequence[object]] = {}
    if images := list(prompt.images):
        media["image"] = images
    if videos := list(prompt.videos):
        media["video"] = videos
    if media:
        request["multi_modal_data"] = media
    return request


def _settings(
    config: RolloutConfig,
    processor: Processor,
    dtype: str,
    max_model_len: int,
    offload: bool = False,
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`."""
    data = processor.config
    settings = {
        "dtype": dtype,
        "tensor_parallel_size": config.tp,
        "distributed_executor_backend": "external_launcher",
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        # Logits as the trainer's (`model/heads.py`); with float32 weights nothing changes.
        "hf_overrides": {"head_dtype": "float32"},
        "limit_mm_per_prompt": {"image": data.max_images, "video": 1},
        "mm_processor_kwargs": processor.mm_processor_kwargs,
        "mm_processor_cache_gb": 0,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    share = config.memory_share(offload)
    if config.kv_cache_gib:
        settings["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
        # vLLM takes no more than that, and refuses to start all the same unless its share of the GPU is free.
        share = config.gpu_memory_utilization or _SMALLEST_SHARE
    if torch.cuda.is_available():
        return settings | {
            "gpu_memory_utilization": share,
            "enforce_eager": bool(config.enforce_eager),
            "async_scheduling": None if config.async_scheduling else False,  # None: vLLM does where it can
            "enable_sleep_mode": True,
            "sleep_mode_offload_cudagraph": offload,
            # It shares the graphs' buffers between ranks by cudaIpcGetMemHandle, which refuses expandable segments.
            "disable_custom_all_reduce": conf_flag_enabled(alloc_conf_from_env(), EXPANDABLE_SEGMENTS),
        }
    if config.enforce_eager is False:
        check_compiler()
    settings.setdefault("kv_cache_memory_bytes", _cache_bytes(config, processor.shape, dtype, max_model_len))
    return settings | {
        "enforce_eager": config.enforce_eager is not False,
        "block_size": _CPU_BLOCK_TOKENS,
        # vLLM rewinds a request's generator when it cuts its prefill, which torch's CPU generators cannot do.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, max_model_len),
    }


def _cache_bytes(config: RolloutConfig, shape: ModelShape, dtype: str, max_model_len: int) -> int:
    """Return the bytes of the cache on a CPU.

    It takes all sequences at full length, but at most 256 MiB, or two sequences if that is more.
    """
    element_bytes = 4 if dtype == "float32" else 2
    per_token = 2 * shape.layers * max(shape.kv_heads // config.tp, 1) * shape.head_dim * element_bytes
    length = -(-max_model_len // _CPU_BLOCK_TOKENS) * _CPU_BLOCK_TOKENS
    cache_bytes = min(config.max_num_seqs * length * per_token, _CPU_CACHE_BYTES)
    return max(cache_bytes, 2 * (length + _CPU_BLOCK_TOKENS) * per_token)
