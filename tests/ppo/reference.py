"""One PPO iteration of a run folder, computed again from its archived responses by Transformers and plain PyTorch.

Nothing of `ovr_megatron.ppo`, the engine or Megatron takes part: responses are padded into one batch, equations are
written out as the papers have them, and AdamW is torch's.  Only prompts (rows, tokens, patches) are drawn by the
project, whose tests compare them with Transformers' processor.

Shapes: n response tokens; arrays are float64 [n] per response.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from ovr_megatron.config import RLConfig, build
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.stream import open_stream
from ovr_megatron.ppo.prompts import PromptStream
from tests.ppo.reference_maths import Steps, divergence, hub, literal_advantages, mismatch

ENDS = ("<|im_end|>", "<|endoftext|>")
VISUAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass
class Answer:
    """A response as the run archived it (``saved``: its per-token arrays), and what is computed of it here."""

    prompt: int
    sample: int
    line: dict[str, Any]
    tokens: Tensor
    saved: dict[str, np.ndarray]
    reward: float = 0.0
    arrays: dict[str, Tensor] = field(default_factory=dict)


def seq_rep(tokens: Sequence[int], n: int) -> float:
    """Return 1 less the share of distinct n-grams (Welleck et al. 2020)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def explained(answers: Sequence[Answer]) -> float:
    """Return the share of the returns' variance that the values explain; 0 where the returns do not vary."""
    values, returns = (torch.cat([answer.arrays[name] for answer in answers]) for name in ("values", "returns"))
    if returns.var() <= 1e-12:
        return 0.0
    return float(1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False))


class Iteration:
    """Iteration ``number`` of the folder ``run``; `answers` are those learnt from, in order of prompt and sample."""

    def __init__(self, run: Path, number: int):
        self.run, self.number = run, number
        self.config: RLConfig = build(RLConfig, OmegaConf.load(run / "config.yaml"))
        self.algorithm = self.config.algorithm
        start = Path(self.config.model.path)
        self.before = run / f"checkpoints/step_{number:06d}" if number else None
        self.policy_folder = self.before / "policy" if self.before else start
        self.critic_folder = self.before / "critic" if self.before else start
        self.archive = json.loads((run / f"rollouts/{number:06d}/iteration.json").read_text())
        lines = map(json.loads, (run / f"rollouts/{number:06d}.jsonl").read_text().splitlines())
        self.lines = {(line["number"], line["sample"]): line for line in lines}
        self.processor = Processor(self.policy_folder, self.config.data)
        rows = open_stream(self.config.data, self.config.run.seed)
        stream = PromptStream(rows, self.processor, self.config.reward.rules)
        stream.load(self.archive["stream"])
        if "restarted" in self.archive:
            self.rows = stream.continue_round(self.archive["drawn"], self.archive["restarted"])
        else:
            self.rows = stream.draw(self.archive["drawn"])
        self.dropped = stream.dropped
        self.samples: list[Sample] = self.processor.encode(self.rows, generation=True)
        self.tokenizer = AutoTokenizer.from_pretrained(start)
        vocabulary = self.tokenizer.get_vocab()
        self.ends = {vocabulary[token] for token in ENDS}
        self.answers = self._read()
        self.metrics: dict[str, float] = {}

    def _read(self) -> list[Answer]:
        answers = []
        for path in (self.run / f"rollouts/{self.number:06d}").glob("*.safetensors"):
            file = load_file(path)
            index = file.pop("index").tolist()
            parts = {name: values.split([n for *_, n in index]) for name, values in file.items()}
            for i, (prompt, sample, _) in enumerate(index):
                saved = {name: values[i].double().numpy() for name, values in parts.items()}
                tokens = parts["tokens"][i].long()
                answers.append(Answer(prompt, sample, self.lines[prompt, sample], tokens, saved))
        return sorted(answers, key=lambda answer: (answer.prompt, answer.sample))

    # Rewards and what is learnt from ---------------------------------------------------------------------

    def limit(self) -> int:
        """Return the length limit of this iteration: its stage is the first whose ``until`` is above its number."""
        for stage in self.config.curriculum:
            if self.number < stage.until:
                return stage.max_tokens
        raise AssertionError("the curriculum has ended")

    def banned(self) -> list[int]:
        """Return the ids that can never be sampled, from the tokenizer alone."""
        vocabulary, size = self.tokenizer.get_vocab(), self.processor.shape.vocab
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        unknown = set(range(size)) - set(vocabulary.values())
        banned = (special | unknown | {vocabulary[token] for token in VISUAL}) - self.ends
        return sorted(i for i in banned if i < size)

    def verdict(self, line: dict[str, Any]) -> float:
        """Return 1 for a finished response with an even number of characters, as the run's rule says."""
        return float(line["stopped"] and len(line["response"]) % 2 == 0)

    def training_prompts(self) -> list[int]:
        """Return the prompts to learn from: with dynamic sampling those with unequal rewards first."""
        groups: dict[int, list[float]] = {}
        for (prompt, _), line in sorted(self.lines.items()):
            if line["tokens"]:
                groups.setdefault(prompt, []).append(self.verdict(line))
        count = self.config.prompts
        unequal = [prompt for prompt, rewards in groups.items() if len(set(rewards)) > 1]
        if self.algorithm.dynamic_sampling:
            self.metrics["data/drawn_prompts"] = len(self.rows)
            self.metrics["data/unequal_prompts"] = len(unequal) / len(self.rows)
            order = unequal + [prompt for prompt in groups if prompt not in unequal]
            return sorted(order[:count])
        return sorted(groups)

    def count_responses(self) -> None:
        """Note means over the responses that were given, of all sources and of each."""
        answered = [line for line in self.lines.values() if line["tokens"]]
        failed = {prompt for (prompt, _), line in self.lines.items() if not line["tokens"]}
        self.metrics |= {
            "curriculum/max_tokens": self.limit(),
            "reward/mean": float(np.mean([self.verdict(line) for line in answered])),
            "response/length": float(np.mean([line["tokens"] for line in answered])),
            "response/stopped": float(np.mean([line["stopped"] for line in answered])),
            "response/failed_prompts": len(failed),
            "data/dropped_prompts": self.dropped,
        }
        self.metrics["grading/failed"] = 0
        self.count_spread(answered, "")
        for source in self.sources():
            own = [line for line in answered if line["source"] == source]
            self.metrics[f"grading/failed/source/{source}"] = 0
            if own:
                self.metrics[f"reward/source/{source}"] = float(np.mean([self.verdict(line) for line in own]))
                self.metrics[f"response/length/source/{source}"] = float(np.mean([line["tokens"] for line in own]))
                self.metrics[f"response/stopped/source/{source}"] = float(np.mean([line["stopped"] for line in own]))
                self.count_spread(own, f"/source/{source}")

    def sources(self) -> list[str]:
        """Return the sources of the prompts where there are several."""
        names = sorted({row.source for row in self.rows})
        return names if len(names) > 1 else []

    def count_spread(self, lines: Sequence[dict[str, Any]], suffix: str) -> None:
        """Note how rewards and lengths of some responses are spread, and how much of those repeats itself."""
        rewards: dict[int, set[float]] = {}
        for line in lines:
            rewards.setdefault(line["number"], set()).add(self.verdict(line))
        lengths = torch.tensor([line["tokens"] for line in lines], dtype=torch.float64)
        verdicts = torch.tensor([self.verdict(line) for line in lines], dtype=torch.float64)
        for p in (50, 90, 99):
            self.metrics[f"response/length_p{p}{suffix}"] = float(lengths.quantile(p / 100))
        self.metrics[f"response/length_max{suffix}"] = float(lengths.max())
        self.metrics[f"response/reward_std{suffix}"] = float(verdicts.std(unbiased=False))
        self.metrics[f"response/mixed_prompts{suffix}"] = float(np.mean([len(group) > 1 for group in rewards.values()]))
        tokens = {(answer.prompt, answer.sample): answer.tokens.tolist() for answer in self.answers}
        keys = [(line["number"], line["sample"]) for line in lines]
        # The archive has the tokens of those responses alone that are learnt from.
        if all(key in tokens for key in keys):
            shares = [seq_rep(tokens[key], 4) for key in keys]
            self.metrics[f"response/repetition{suffix}"] = float(np.mean(shares))

    # Models ----------------------------------------------------------------------------------------------

    def load(self, folder: Path) -> Qwen2_5_VLForConditionalGeneration:
        """Return Transformers' model of ``folder`` in float32."""
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    def hidden(self, model: Qwen2_5_VLForConditionalGeneration, answers: Sequence[Answer]) -> list[Tensor]:
        """Return the states [n, D] before each response token, all responses padded into one batch."""
        full = [np.concatenate([self.samples[a.prompt].tokens, a.tokens.numpy()]) for a in answers]
        ids = torch.zeros(len(full), max(map(len, full)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, tokens in enumerate(full):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.from_numpy(tokens), 1
        images: dict[str, Tensor] = {}
        pictured = [s for s in (self.samples[a.prompt] for a in answers) if len(s.patches)]
        if pictured:
            images["pixel_values"] = torch.from_numpy(np.concatenate([s.patches for s in pictured]))
            images["image_grid_thw"] = torch.from_numpy(np.concatenate([s.grid_thw for s in pictured]))
        kinds = (ids == self.processor.shape.image_token).long() * mask
        out = model.model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **images).last_hidden_state
        ends = [(len(tokens) - 1, len(answer.tokens)) for tokens, answer in zip(full, answers, strict=True)]
        return [out[i, end - n : end] for i, (end, n) in enumerate(ends)]

    def scores(
        self, model: Qwen2_5_VLForConditionalGeneration, answers: Sequence[Answer]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return log-probabilities [n] of the tokens and entropies [n] of what they were sampled from."""
        scores = []
        for answer, hidden in zip(answers, self.hidden(model, answers), strict=True):
            logits = model.lm_head(hidden) / self.config.rollout.temperature
            logits[:, self.banned()] = -math.inf
            logprobs = logits.log_softmax(-1)
            own = logprobs.gather(1, answer.tokens[:, None])[:, 0]
            entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)
            scores.append((own, entropy))
        return scores

    # The iteration ---------------------------------------------------------------------------------------

    def compute(self) -> "Iteration":
        """Fill `metrics`, the answers' arrays and `weights` after the iteration."""
        self.count_responses()
        prompts = self.training_prompts()
        self.answers = [answer for answer in self.answers if answer.prompt in prompts]
        with torch.no_grad():
            self._score()
        self.weights: dict[str, dict[str, Tensor]] = {}
        self._train_critic()
        if self.number >= self.algorithm.critic_warmup_iterations:
            self._train_policy()
        else:
            policy = self.load(self.policy_folder)
            self.weights["policy"] = {hub(n): p.detach() for n, p in policy.named_parameters() if n != "lm_head.weight"}
        self.metrics |= {"policy/skipped": 0, "critic/skipped": 0}
        return self

    def _score(self) -> None:
        """Old and reference log-probabilities, values, rewards, advantages and returns."""
        a, answers = self.algorithm, self.answers
        policy = self.load(self.policy_folder)
        for answer, (logprobs, entropy) in zip(answers, self.scores(policy, answers), strict=True):
            answer.arrays |= {"old": logprobs.double(), "entropy": entropy.double()}
        if a.kl_coefficient:
            reference = self.load(Path(a.reference or self.config.model.path))
            for answer, (logprobs, _) in zip(answers, self.scores(reference, answers), strict=True):
                answer.arrays["reference"] = logprobs.double()
        body, head = self.critic()
        for answer, hidden in zip(answers, self.hidden(body, answers), strict=True):
            answer.arrays["values"] = (hidden @ head.t())[:, 0].double()
        for answer in answers:
            rewards = self._rewards(answer)
            values = answer.arrays["values"]
            policy, critic = (a.lam if own is None else own for own in (a.lam_policy, a.lam_critic))
            raw = literal_advantages(rewards, values, a.gamma, policy)
            returns = literal_advantages(rewards, values, a.gamma, critic) + values
            answer.arrays |= {"raw": raw, "returns": returns}
        raw, values, returns = (torch.cat([x.arrays[n] for x in answers]) for n in ("raw", "values", "returns"))
        for answer in answers:
            answer.arrays["advantages"] = (answer.arrays["raw"] - raw.mean()) / (raw.std(unbiased=False) + 1e-8)
        self._describe_advantages(answers, "")
        for source in self.sources():
            own = [answer for answer in answers if answer.line["source"] == source]
            if own:
                self._describe_advantages(own, f"/source/{source}")
                self.metrics[f"critic/explained_variance/source/{source}"] = explained(own)
        self.metrics["critic/value_mean"] = float(values.mean())
        self.metrics["critic/value_std"] = float(values.std(unbiased=False))
        self.metrics["critic/return_mean"] = float(returns.mean())
        self.metrics["critic/explained_variance"] = explained(answers)

    def _describe_advantages(self, answers: Sequence[Answer], suffix: str) -> None:
        """Note extremes, spread and quantiles of the advantages of all tokens of ``answers``."""
        advantages = torch.cat([answer.arrays["advantages"] for answer in answers]).sort().values
        self.metrics[f"advantage/min{suffix}"] = float(advantages[0])
        self.metrics[f"advantage/max{suffix}"] = float(advantages[-1])
        self.metrics[f"advantage/std{suffix}"] = float(advantages.std(unbiased=False))
        for percent in (10, 50, 90):
            # The smallest value that so many do not exceed.
            index = math.ceil(percent / 100 * len(advantages)) - 1
            self.metrics[f"advantage/p{percent}{suffix}"] = float(advantages[index])

    def _rewards(self, answer: Answer) -> Tensor:
        """Return each token's reward: on the last one the shaped verdict, less the divergence if that is wanted."""
        a, n = self.algorithm, len(answer.tokens)
        room = self.limit() - len(self.samples[answer.prompt].tokens)
        last = a.wrong_reward + (1 - a.wrong_reward) * self.verdict(answer.line)
        if a.overlong_buffer and n > room - a.overlong_buffer:
            last -= min(1.0, (n - (room - a.overlong_buffer)) / a.overlong_buffer)
        rewards = torch.zeros(n, dtype=torch.float64)
        if a.kl_coefficient and a.kl_in == "reward":
            rewards -= a.kl_coefficient * divergence(answer.arrays["old"], answer.arrays["reference"], a.kl_form)
        rewards[-1] += last
        return rewards

    def critic(self) -> tuple[Qwen2_5_VLForConditionalGeneration, Parameter]:
        """Return the body of the critic before the iteration, and its value head [1, D]."""
        body = self.load(self.critic_folder)
        if self.before:
            head = load_file(self.critic_folder / "model.safetensors")["value_head.weight"]
        else:
            width = body.config.get_text_config().hidden_size
            generator = torch.Generator().manual_seed(self.config.run.seed)
            head = torch.empty(1, width).normal_(0.0, 1 / (width + 1), generator=generator)
        return body, Parameter(head.clone())

    def _train_critic(self) -> None:
        a = self.algorithm
        body, head = self.critic()
        named = {hub(n): p for n, p in body.model.named_parameters(prefix="model")} | {"value_head.weight": head}
        settings, total = self.config.critic.optimizer, self.config.iterations * a.critic_steps
        steps = Steps(named, settings, self.before, "critic", self.number * a.critic_steps, total)
        losses, norms = [], []
        for turn in range(a.critic_steps):
            part = self.answers[turn :: a.critic_steps]
            per_token = []
            for answer, hidden in zip(part, self.hidden(body, part), strict=True):
                value, arrays = (hidden @ head.t())[:, 0], answer.arrays
                old, target = arrays["values"].float(), arrays["returns"].float()
                loss = (value - target) ** 2
                if a.value_clip:
                    bounded = old + (value - old).clamp(-a.value_clip, a.value_clip)
                    loss = 0.5 * torch.maximum(loss, (bounded - target) ** 2)
                per_token.append(loss)
            loss = self._reduce(per_token)
            loss.backward()
            losses.append(float(loss.detach()))
            norms.append(steps.take())
        self.metrics |= {"critic/loss": float(np.mean(losses)), "critic/grad_norm": float(np.mean(norms))}
        self.weights["critic"] = {name: p.detach() for name, p in named.items()}

    def _train_policy(self) -> None:
        a = self.algorithm
        model = self.load(self.policy_folder)
        named = {hub(n): p for n, p in model.named_parameters() if n != "lm_head.weight"}
        updates, learning = a.policy_epochs * a.policy_steps, self.number - a.critic_warmup_iterations
        total = (self.config.iterations - a.critic_warmup_iterations) * updates
        steps = Steps(named, self.config.optimizer, self.before, "policy", learning * updates, total)
        logs: list[dict[str, float]] = []
        differences: list[tuple[str, Tensor]] = []
        self.source_logs: dict[tuple[str, str], list[Tensor]] = {}  # values of tokens, by name and source
        for update in range(updates):
            part = self.answers[update % a.policy_steps :: a.policy_steps]
            loss, log = self._policy_loss(model, part, updates == 1, differences)
            loss.backward()
            logs.append(log | {"policy/loss": float(loss.detach()), "policy/grad_norm": steps.take()})
        self.metrics |= {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
        self.metrics |= mismatch(differences)
        for (name, source), values in self.source_logs.items():
            if source in self.sources():
                self.metrics[f"{name}/source/{source}"] = float(torch.cat(values).double().mean())
        self.weights["policy"] = {name: p.detach() for name, p in named.items()}

    def _policy_loss(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        part: Sequence[Answer],
        on_policy: bool,
        differences: list[tuple[str, Tensor]],
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a step and means over its tokens; add the rollout's differences [n] by modality."""
        a = self.algorithm
        per_token, logs = [], []
        scores = self.scores(model, part)
        for answer, (now, entropy) in zip(part, scores, strict=True):
            old = now.detach() if on_policy else answer.arrays["old"].float()
            rollout, advantage = torch.from_numpy(answer.saved["logprobs"]).float(), answer.arrays["advantages"].float()
            ratio = (now - old).exp()
            bounded = ratio.clamp(1 - a.clip, 1 + (a.clip_high or a.clip))
            loss = -torch.minimum(ratio * advantage, bounded * advantage)
            highest = -a.dual_clip * advantage
            at_bound = (advantage < 0) & (loss > highest) & (a.dual_clip > 0)
            loss = torch.where(at_bound, highest, loss)
            log = {
                "policy/entropy": entropy.detach(),
                "policy/clip_fraction": (bounded * advantage < ratio * advantage).float(),
                "policy/clip_fraction_low": ((ratio < 1 - a.clip) & (advantage < 0)).float(),
                "policy/clip_fraction_high": ((ratio > 1 + (a.clip_high or a.clip)) & (advantage > 0)).float(),
                "rollout/kl": divergence(rollout, old, "k3"),
            }
            if a.dual_clip:
                log["policy/dual_clip_fraction"] = at_bound.float()
            if a.correction:
                assert a.correction == "token_truncate"
                importance = (old - rollout).exp()
                log["rollout/truncated"] = (importance > a.correction_high).float()
                log["rollout/importance"] = importance.clamp(max=a.correction_high)
                loss = loss * log["rollout/importance"]
            if a.kl_coefficient:
                distance = divergence(now, answer.arrays["reference"].float(), a.kl_form)
                log["policy/reference_kl"] = distance.detach()
                loss = loss + (a.kl_coefficient * distance if a.kl_in == "loss" else 0.0)
            kind = "image" if len(self.samples[answer.prompt].grid_thw) else "text"
            differences.append((kind, (old - rollout).abs().double()))
            per_token.append(loss - a.entropy_bonus * entropy)
            logs.append(log)
            for name, values in log.items():
                if name not in ("rollout/truncated", "rollout/importance"):
                    self.source_logs.setdefault((name, answer.line["source"]), []).append(values)
        means = {name: float(torch.cat([log[name] for log in logs]).mean()) for name in logs[0]}
        if a.correction:
            importance = torch.cat([log["rollout/importance"] for log in logs]).double()
            share = importance.sum() ** 2 / importance.square().sum() / len(importance)
            means["rollout/effective_sample_size"] = float(share)
        loss = self._reduce(per_token)
        if a.positive_nll:
            right = [-now for answer, (now, _) in zip(part, scores, strict=True) if self.verdict(answer.line) == 1]
            nll = torch.cat(right).mean() if right else torch.zeros(())
            means["policy/positive_nll"] = float(nll.detach())
            loss = loss + a.positive_nll * nll
        return loss, means

    def _reduce(self, per_token: Sequence[Tensor]) -> Tensor:
        """Return one number of the losses [n] of each response of a step."""
        if self.algorithm.reduction == "sequence":
            return torch.stack([loss.mean() for loss in per_token]).mean()
        if self.algorithm.reduction == "constant":
            return torch.stack([loss.sum() for loss in per_token]).mean() / self.algorithm.reduction_tokens
        return torch.cat(list(per_token)).mean()
