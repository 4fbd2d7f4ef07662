"""KTO (arXiv:2402.01306): learning from single answers that people called good or bad.

With r = log p(answer | prompt) - log p_ref(answer | prompt) and z an estimate of how far the policy has moved from the
reference, a good answer costs w_good (1 - sigmoid(beta (r - z))), a bad one w_bad (1 - sigmoid(beta (z - r))), eq. 8.

z is the mean of r over the step's prompts, each with the answer of the row before it (the first with the last one's),
at least 0 and without gradient (a lone row's answer is its own). It is one number for the whole step, so it does not depend on ranks or micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from rayft.data.corpus import Corpus
from rayft.data.step import MicroBatch, StepPlan, deal, packed_layout, padded_layout
from rayft.data.template import Sample
from rayft.data.tensors import answer_tensors, sequence_tensors
from rayft.model.head import forward_logprobs
from rayft.objectives.base import Batch, Infer, Sequence, sum_over_ranks
from rayft.objectives.preference import sum_by_document
from rayft.objectives.reference import References
from rayft.spec import Job


class KtoObjective:
    """Sum over answers of the loss above; the denominator is their number."""

    together = True
    same_every_epoch = False  # each epoch brings prompts together with other rows' answers

    def __init__(self, job: Job, *, packed: bool, pad_id: int, references: References) -> None:
        self.dpo, self.max_length, self.micro_batch_size = (
            job.dpo,
            job.data.max_length,
            job.train.micro_batch_size,
        )
        self.packed, self.pad_id, self.references = packed, pad_id, references
        self._moved = 0.0
        self._good_scale = self._bad_scale = 0.0

    def denominator(self, step: StepPlan) -> int:
        """Answers of the step."""
        return step.rows

    def begin_step(self, infer: Infer, corpus: Corpus, step: StepPlan, rank: int) -> None:
        """Estimate z, and count good and bad answers for the metrics."""
        reference = self.references.of(corpus)
        mismatched = list(self._mismatched(corpus, step, rank))
        results = infer((batch for _, batch in mismatched), "logprobs")
        total = torch.zeros((), dtype=torch.float64)
        for (sequences, _), logprobs in zip(mismatched, results, strict=True):
            moved = logprobs.cpu() - reference.get(sequences)
            total += moved.double().sum()
        total = sum_over_ranks(total)
        self._moved = max(0.0, float(total) / step.rows)
        good = sum(corpus.answers(documents[0])[1] for documents in step.row_documents)
        self._good_scale = step.rows / max(good, 1)
        self._bad_scale = step.rows / max(step.rows - good, 1)

    def collate(self, corpus: Corpus, micro_batch: MicroBatch) -> Batch:
        """`answer_tensors`, with reference float32[D] and moved float32[1], z."""
        batch = answer_tensors(corpus, micro_batch, packed=self.packed, pad_id=self.pad_id)
        documents: list[Sequence] = [(document,) for row in micro_batch for document in row]
        batch["reference"] = self.references.of(corpus).get(documents)
        batch["moved"] = torch.tensor([self._moved], dtype=torch.float32)
        return batch

    def wanted(self, step: StepPlan) -> list[Sequence]:
        """Sequences whose reference the step needs, on any rank."""
        return [(documents[0],) for documents in step.row_documents] + list(_partners(step).items())

    def sequences(self, corpus: Corpus, step: StepPlan, rank: int) -> Iterator[tuple[list[Sequence], Batch]]:
        """What the reference model has to look at: this rank's answers, and its prompts with other rows' answers."""
        for micro_batch in step.micro_batches[rank]:
            documents: list[Sequence] = [(document,) for row in micro_batch for document in row]
            samples = [corpus.sample(document) for (document,) in documents]
            yield documents, sequence_tensors(samples, packed=self.packed, pad_id=self.pad_id)
        yield from self._mismatched(corpus, step, rank)

    def logprobs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """log p(answer | prompt) of each document, fp32[D]."""
        return sum_by_document(forward_logprobs(model, batch), batch["target_document"], len(batch["last"]))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed loss of the answers; metrics: z, and the mean reward of good and of bad answers."""
        logprobs_N = forward_logprobs(model, batch)
        logprobs = sum_by_document(logprobs_N, batch["target_document"], len(batch["last"]))
        moved_1, good = batch["moved"], batch["values"] > 0.5
        ratio = logprobs - batch["reference"]
        advantage = torch.where(good, ratio - moved_1, moved_1 - ratio)
        weight = torch.where(good, self.dpo.desirable_weight, self.dpo.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(self.dpo.strength * advantage))
        rewards = self.dpo.strength * ratio.detach()
        metrics = {
            "kl": float(moved_1 * len(rewards)),
            "good_reward": float(rewards[good].sum()) * self._good_scale,
            "bad_reward": float(rewards[~good].sum()) * self._bad_scale,
        }
        return losses.sum() + 0.0 * logprobs_N.sum(), metrics

    def _mismatched(
        self, corpus: Corpus, step: StepPlan, rank: int
    ) -> Iterator[tuple[list[Sequence], Batch]]:
        """This rank's share of the prompts with the answers of the rows read before them, laid out by their lengths."""
        pairs: list[Sequence] = list(_partners(step).items())
        samples = [_joined(corpus, asked, answered, self.max_length) for asked, answered in pairs]
        lengths = [len(sample.ids) for sample in samples]
        layout, ranks = packed_layout if self.packed else padded_layout, len(step.micro_batches)
        slots = layout(lengths, self.max_length, self.micro_batch_size, ranks)
        loads = [sum(lengths[i] for row in slot for i in row) for slot in slots]
        for slot in deal(slots, loads, ranks)[rank]:
            own = [i for row in slot for i in row]
            batch = sequence_tensors([samples[i] for i in own], packed=self.packed, pad_id=self.pad_id)
            yield [pairs[i] for i in own], batch


def _partners(step: StepPlan) -> dict[int, int]:
    """Each document of the step and the one read before it; before the first comes the last."""
    read = [documents[0] for documents in step.row_documents]
    return dict(zip(read, [read[-1], *read[:-1]], strict=True))


def _joined(corpus: Corpus, asked: int, answered: int, max_length: int) -> Sample:
    """The prompt of one document, without its beginning where that gets too long, with the answer of another."""
    prompt, answer = corpus.prompt_length(asked), corpus.prompt_length(answered)
    said = corpus.sample(answered)
    excess = max(0, min(prompt - 1, prompt + len(said.ids) - answer - max_length))
    ids = np.concatenate([corpus.sample(asked).ids[excess:prompt], said.ids[answer:]])
    trained = np.concatenate([np.zeros(prompt - excess, np.bool_), said.trained[answer:]])
    return Sample(ids, trained)
