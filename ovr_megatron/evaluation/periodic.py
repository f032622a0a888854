"""Evaluation while a stage trains: every few steps the live weights answer the chosen problem sets (figure 4)."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ovr_megatron.config import EvaluationConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.evaluation.evaluator import Bench, evaluate
from ovr_megatron.evaluation.problems import Settings, open_problems
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.runtime.stop import StopRequest


class PeriodicEvaluation:
    """Asks every set of ``config.sources`` when a step is due.

    Scores and responses lie in ``RUN/evaluation/step_NNNNNN/``, in the form of `evaluate`.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        engine: RolloutEngine,
        processor: Processor,
        tp: int,
        run: Path,
        seed: int,
        keep: bool = True,
    ):
        """Open the problem sets.

        Args:
            config: what is asked, and when.
            engine: vLLM on this rank; it must have the live weights whenever `after` is called.
            processor: the trainer's.
            tp: ranks that hold one engine.
            run: the run folder.
            seed: of the samples.
            keep: the engine's next use needs its weights; otherwise it is updated first.

        Raises:
            ConfigError: a set is endless and ``evaluation.limit`` is 0.
            RowError: a set cannot be opened.
        """
        self.config, self.engine, self.processor, self.tp, self.run = config, engine, processor, tp, run
        self.keep = keep
        longest = processor.shape.response_limit(config.max_tokens, processor.config.max_prompt_tokens)
        self.settings = Settings(samples=config.samples, max_tokens=longest, seed=seed)
        self.sets = [open_problems(source, config.limit) for source in config.sources]

    def due(self, done: int, last: bool) -> bool:
        """Whether the weights after ``done`` steps are to be scored."""
        return done % self.config.every == 0 or last

    def is_missing(self, done: int) -> bool:
        """Whether the weights after ``done`` steps are to be scored and were not, as the run left meanwhile.

        A collective.
        """
        out = self.run / "evaluation" / f"step_{done:06d}"
        box = [not all((out / f"{problems.name}.json").exists() for problems in self.sets)]
        dist.broadcast_object_list(box, src=0)
        return done > 0 and self.due(done, last=False) and box[0]

    def scores(self, done: int, stop: StopRequest | None = None) -> dict[str, float]:
        """Scores of the weights after ``done`` steps; a collective.

        Args:
            done: steps done.
            stop: leave when a signal comes.

        Returns:
            ``evaluation/NAME``, the greedy accuracy, ``.../cut_off``, the share of responses that reached the limit
            of their length, ``.../failed``, the greedy responses on which no grader came to a verdict, and with samples
            ``evaluation/NAME/pass@k``; empty on all ranks but the first.

        Raises:
            StopRequested: on all ranks, as one was asked to stop.
        """
        out, found = self.run / "evaluation" / f"step_{done:06d}", dict[str, float]()
        try:
            with GraderPool(self.config.workers) as grader:
                bench = Bench(f"{self.run} after {done} steps", self.engine, self.processor, grader, self.tp, stop)
                for problems in self.sets:
                    if result := evaluate(bench, problems, self.settings, out):
                        found[f"evaluation/{problems.name}"] = result["greedy"]["accuracy"]
                        if (stopped := result["greedy"]["stopped"]) is not None:
                            found[f"evaluation/{problems.name}/cut_off"] = 1 - stopped
                        found[f"evaluation/{problems.name}/failed"] = float(result["greedy"]["failed"])
                        passed = result["sampled"]["pass"] if result["sampled"] else {}
                        found |= {
                            f"evaluation/{problems.name}/pass@{k}": share["accuracy"] for k, share in passed.items()
                        }
        finally:
            # It forgets: a run that resumes here has nothing cached either. A checkpoint may need its memory.
            self.engine.sleep(deep=not self.keep)
        return found
