"""Responses to a few prompts, as the tests of shared prompts pack them: with an image, with two, and without."""

import numpy as np

from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import Row
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.ppo.batch import Batch
from ovr_megatron.verify import Document, as_pack, make_documents, objective

# Responses of each document: one has no other to share its prompt with.
LENGTHS = ((5, 9, 30), (7, 1), (12,), (3, 3, 4, 20))


def make_responses(shape: ModelShape) -> tuple[list[Sample], list[int]]:
    """Return samples of responses to prompts with and without images, in a mixed order, and the prompt of each."""
    prompts = make_documents(shape)
    generator = np.random.default_rng(3)
    samples = []
    for number, (document, lengths) in enumerate(zip(prompts, LENGTHS, strict=True)):
        for length in lengths:
            response = generator.integers(10, 90, length)
            samples.append((number, _sample(document, response, shape)))
    order = generator.permutation(len(samples))
    return [samples[i][1] for i in order], [samples[i][0] for i in order]


def _sample(document: Document, response: np.ndarray, shape: ModelShape) -> Sample:
    unshared = as_pack([document], shape)
    prompt_rows = len(unshared.tokens)
    last = unshared.position_ids[:, -1:].numpy()
    positions = last + 1 + np.arange(len(response))
    return Sample(
        tokens=np.concatenate([unshared.tokens.numpy(), response]),
        loss_mask=np.arange(prompt_rows + len(response)) >= prompt_rows,
        position_ids=np.concatenate([unshared.position_ids.numpy(), positions], axis=1),
        patches=unshared.patches.numpy(),
        grid_thw=unshared.grid_thw.numpy(),
        placement=unshared.placement.numpy(),
        images=[],
        videos=[],
        prompt_tokens=[],
        row=Row(()),
    )


def compare(engine: Engine) -> dict[str, float]:
    """Return the largest differences of scores, loss and gradients between packs with and without shared prompts.

    They are relative to the largest score, the loss and the norm of each gradient.
    """
    samples, prompts = make_responses(engine.shape)
    lengths = [int(sample.loss_mask.sum()) for sample in samples]
    results = []
    rows = []
    for shared in (None, prompts):
        batch = Batch(samples, lengths, 256, range(len(samples)), len(samples), shared)
        pack_members = batch.group_into_packs(range(len(samples)))
        targets = [np.linspace(-1, 1, length) for length in lengths]
        packs = batch.packs(pack_members, target=targets)
        rows.append(sum(len(pack.tokens) for pack in packs))
        scored = [s.values if engine.critic else s.logprobs for s in engine.scores(packs)]
        scores = np.concatenate(batch.unpack(scored, pack_members))
        loss = engine.backward(packs, objective)["loss"]
        gradients = {name: gradient.double().clone() for name, gradient in engine.gradients()}
        results.append((scores, loss, gradients))
    (scores, loss, gradients), (shared_scores, shared_loss, shared_gradients) = results
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    differences = []
    for name, gradient in gradients.items():
        scale = max(float(gradient.norm()), 1e-6 * largest)
        differences.append(float((shared_gradients[name] - gradient).norm()) / scale)
    return {
        "scores": float(np.abs(shared_scores - scores).max() / np.abs(scores).max()),
        "loss": abs(shared_loss - loss) / abs(loss),
        "gradients": max(differences),
        "rows": rows[1] / rows[0],
    }
