"""A model in a layout with its processor: log-probabilities or values of chats, and sampled responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch.distributed as dist

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.conversion import open_weights
from ovr_megatron.checkpoint.finished import last_checkpoint
from ovr_megatron.checkpoint.manifest import CheckpointError
from ovr_megatron.config import ColdStartConfig, RLConfig, Sampling
from ovr_megatron.data.chats import Conversation, fitting_lengths, read_chats
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.errors import UserError
from ovr_megatron.ppo.batch import Batch
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.balance import balance
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.exchange import call_on_all, gather_objects
from ovr_megatron.weights.adapters import is_adapter_folder

if TYPE_CHECKING:
    from ovr_megatron.rollout.engine import RolloutEngine


class ModelUseError(UserError, ValueError):
    """A model is asked for what it does not have; the message names what to ask instead."""


@dataclass(frozen=True)
class Reply:
    """A sampled response of n tokens.

    Attributes:
        text: without special tokens.
        tokens: n ids, with the end token if the model gave one.
        logprobs: float32[n], of the distribution that was sampled: without banned ids, logits over the temperature.
        stopped: whether it ended by itself and not at its length limit.
    """

    text: str
    tokens: list[int]
    logprobs: np.ndarray
    stopped: bool


@dataclass
class ChatModel:
    """A policy or critic in a layout.  Every method is a collective: all ranks call it with the same arguments.

    Attributes:
        engine: Megatron's model.
        processor: turns chats into tokens, patches and positions.
        config: settings of the model, the data and vLLM.
        world: this process.
        folder: Hugging Face folder whose configuration vLLM reads.
        rollout: vLLM on this rank; None until `sample` starts it.
        make_room: set by a loop that keeps the weights of ``rollout`` the model's; offloads what vLLM needs no memory
            of.
    """

    engine: Engine
    processor: Processor
    config: ColdStartConfig | RLConfig
    world: World
    folder: Path
    rollout: RolloutEngine | None = None
    make_room: Callable[[], None] | None = None
    resources: ExitStack = field(default_factory=ExitStack, repr=False)

    def logprobs(self, chats: Sequence[Conversation]) -> list[np.ndarray]:
        """Return the log-probabilities of the tokens that training would learn of each chat.

        Args:
            chats: each ends with an assistant message.

        Returns:
            For each chat float64[n] of its n learned tokens, the end token included; with ``data.learn=all`` those of
            all replies.

        Raises:
            ModelUseError: the model is a critic.
            RowError: a chat cannot be used or is too long.
        """
        if self.engine.critic:
            raise ModelUseError("a critic has no log-probabilities; ask for its values, or load the policy")
        return self._scores(chats, "logprobs")

    def values(self, chats: Sequence[Conversation]) -> list[np.ndarray]:
        """Return the values where each learned token of each chat is predicted: float64[n] for its n learned tokens.

        Raises:
            ModelUseError: the model is a policy.
            RowError: a chat cannot be used or is too long.
        """
        if not self.engine.critic:
            raise ModelUseError("a policy has no values; load the model with critic=True")
        return self._scores(chats, "values")

    def _scores(self, chats: Sequence[Conversation], name: str) -> list[np.ndarray]:
        rows = read_chats(chats)
        lengths = fitting_lengths(self.processor, rows, generation=False)
        dp = self.engine.groups.dp
        share = sorted(balance(lengths, dp.size())[dp.rank()])
        # The pixels of other replicas' chats are left alone.
        replica_rows = [rows[index] for index in share]
        samples = call_on_all(lambda: self.processor.encode(replica_rows, generation=False))
        # The first token of a sample is predicted by none.
        targets = [int(sample.loss_mask[1:].sum()) for sample in samples]
        batch = Batch(samples, targets, self.config.data.pack_tokens, share, len(rows))
        pack_members = batch.group_into_packs(range(len(batch)))
        scores = self.engine.scores(batch.packs(pack_members))
        arrays = batch.unpack([getattr(pack_scores, name) for pack_scores in scores], pack_members)
        by_chat: dict[int, np.ndarray] = {}
        # Ranks of a replica hold the same arrays.
        for rank_arrays in gather_objects(dict(zip(share, arrays, strict=True))):
            by_chat |= rank_arrays
        return [by_chat[index] for index in range(len(rows))]

    def sample(
        self,
        chats: Sequence[Conversation],
        responses: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> list[list[Reply]]:
        """Sample responses with vLLM, the engine of the rollouts, from the weights as they are now.

        Args:
            chats: each ends with a user message; the reply of one that has it is left out.
            responses: to each chat.
            sampling: temperature and length limit; by default temperature 1 and at most 1024 tokens.
            seed: of the first response to a chat; those that follow have the seeds after it.

        Raises:
            ModelUseError: the model is a critic.
            RowError: a chat cannot be used or is too long.
            RolloutError: vLLM refused a prompt, for example as prompt and response are longer than it takes together.
        """
        if self.engine.critic:
            raise ModelUseError("a critic cannot generate; load the policy")
        # Imported here, so that scores and training do not wait for vLLM.
        from ovr_megatron.rollout.offline import sample_rows  # noqa: PLC0415

        rows = read_chats(chats)
        fitting_lengths(self.processor, rows, generation=True)
        rollout = self.start_rollout()
        seeds = range(seed, seed + responses)
        settings = sampling or Sampling()
        try:
            if self.make_room:
                self.make_room()
            else:
                rollout.update(self.engine.held())
            generations = sample_rows(rollout, self.processor, rows, seeds, settings, self.config.rollout.tp)
        finally:
            # A loop that keeps the weights in step needs them again; else the next call brings newer ones.
            rollout.sleep(deep=self.make_room is None)
        replies = []
        for row_generations in generations:
            row_replies = []
            for generation in row_generations:
                text = self.processor.decode(generation.tokens)
                row_replies.append(Reply(text, generation.tokens, generation.logprobs, generation.stopped))
            replies.append(row_replies)
        return replies

    def start_rollout(self) -> RolloutEngine:
        """Start vLLM without weights, unless it runs; return it.

        It takes ``rollout.max_model_len`` tokens of a prompt and its response together, or where that is 0
        ``data.max_prompt_tokens`` with ``evaluation.max_tokens``.
        """
        if self.rollout is None:
            data = self.config.data
            response_tokens = self.processor.shape.response_limit(
                self.config.evaluation.max_tokens, data.max_prompt_tokens
            )
            length = self.config.rollout.max_model_len or data.max_prompt_tokens + response_tokens
            self.rollout = start_empty_rollout(self.config, self.folder, self.processor, length)
        return self.rollout

    def close(self) -> None:
        """Leave the other ranks; a model of a loop is closed with the loop."""
        self.resources.close()

    def __enter__(self) -> Self:
        """Return the model itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.resources.__exit__(kind, error, traceback)


def load_model(config: ColdStartConfig | RLConfig, critic: bool = False, world: World | None = None) -> ChatModel:
    """Load ``model.path`` in the layout of ``parallel``, to score and to sample; nothing of it trains.  A collective.

    Adapters of a checkpoint are added to the weights that they were trained beside.

    Args:
        config: settings of a recipe.  ``model.path`` is a folder of Hugging Face, a name on its hub, a checkpoint, or
            the folder of a run, which stands for its newest checkpoint.
        critic: load the value network; a folder without a value head gets a new one.
        world: the ranks, where the program has joined them already.

    Raises:
        CheckpointError: a checkpoint is damaged, or a run has none.
        UserError: the folder, the layout or another setting cannot work.
    """
    part = "critic" if critic else "policy"
    with ExitStack() as stack:
        if world is None:
            world = stack.enter_context(distributed.process_group(config.run, config.parallel))
        path = newest_weights(config.model.path, world)
        store.check_weights(path, world, part)
        folder = store.weights_of(path, part)
        processor = Processor(folder, config.data)
        engine = Engine(processor.shape, config.model.frozen(), config.parallel, world, critic)
        engine.load(open_weights(folder, merge=is_adapter_folder(folder)), seed=config.run.seed)
        return ChatModel(engine, processor, config, world, folder, resources=stack.pop_all())


def newest_weights(path: str, world: World) -> str:
    """Return the newest complete checkpoint of a run folder, and any other ``path`` as it is.  A collective.

    Raises:
        CheckpointError: on all ranks, as the run has no complete checkpoint.
    """
    answer: list[str | CheckpointError] = [""]
    if world.is_main:
        try:
            answer = [_newest_weights(path)]
        except CheckpointError as error:
            answer = [error]
    # One rank looks: the run may go on meanwhile, and others would see a newer checkpoint.
    dist.broadcast_object_list(answer, src=0)
    newest = answer[0]
    if isinstance(newest, CheckpointError):
        raise newest
    return newest


def _newest_weights(path: str) -> str:
    directory = Path(path) / "checkpoints"
    if not directory.is_dir():
        return path
    checkpoint = last_checkpoint(directory, 0)
    if checkpoint is None:
        raise CheckpointError(f"{directory} has no complete checkpoint; let the run save one, or name another model")
    return str(checkpoint)


def start_empty_rollout(
    config: ColdStartConfig | RLConfig,
    folder: Path,
    processor: Processor,
    max_model_len: int,
) -> RolloutEngine:
    """Start vLLM on this rank without weights, asleep until an update brings them.  A collective."""
    # Imported here, so that a run without evaluation does not wait for vLLM.
    from ovr_megatron.rollout.engine import RolloutEngine  # noqa: PLC0415

    rollout = RolloutEngine(folder, config.rollout, processor, config.model.dtype, max_model_len, empty=True)
    # Its memory is for training until responses are due.
    rollout.sleep(deep=True)
    return rollout
