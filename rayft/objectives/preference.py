"""Direct preference objectives on pairs: DPO and its conservative form, IPO, SimPO, ORPO.

Shapes: R pairs of a micro-batch, D = 2R documents (chosen, rejected, chosen, …), N trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from rayft.data.corpus import Corpus
from rayft.data.step import MicroBatch, StepPlan
from rayft.data.tensors import answer_tensors
from rayft.model.head import forward_logprobs
from rayft.objectives.base import Batch, Infer, Sequence
from rayft.objectives.reference import References
from rayft.spec import Dpo


def preference_loss(
    dpo: Dpo,
    logprobs_R2: torch.Tensor,
    lengths_R2: torch.Tensor,
    reference_R2: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each pair, fp32[R], and the implicit rewards of (chosen, rejected), fp32[R, 2] without gradient.

    logprobs_R2: log p(answer | prompt) of chosen and rejected, summed over the answer's tokens, of which there are
    lengths_R2; reference_R2: the same under the reference. With s = logprobs - reference:

    - sigmoid: -log sigmoid(beta (s_c - s_r)), arXiv:2305.18290 eq. 7; with label smoothing e it is (1 - e) of that and
      e of the loss with the pair turned round. `length_normalized` divides each s by its length.
    - ipo: (s_c - s_r - 1 / (2 beta))^2 with each s divided by its length, arXiv:2310.12036 eq. 17.
    - simpo: -log sigmoid(beta (p_c - p_r) - gamma), p = logprobs / length, arXiv:2405.14734 eq. 6; smoothed likewise.
    - orpo: -beta log sigmoid(log odds(p_c) - log odds(p_r)), p as above, arXiv:2403.07691 eq. 6 and 7.
    """
    beta = dpo.strength
    averaged = dpo.loss != "sigmoid" or dpo.length_normalized
    scores = logprobs_R2 if reference_R2 is None else logprobs_R2 - reference_R2
    if averaged:
        scores = scores / lengths_R2
    margin = scores[:, 0] - scores[:, 1]
    rewards = beta * scores.detach()
    if dpo.loss == "ipo":
        return (margin - 1 / (2 * beta)) ** 2, rewards
    if dpo.loss == "orpo":
        scores = scores.clamp(
            max=-1e-7
        )  # of a certain answer the odds are infinite, and the gradient is nothing
        log_odds = scores - log1mexp(scores)
        return -beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1]), rewards
    logits = beta * margin - (dpo.simpo_gamma if dpo.loss == "simpo" else 0.0)
    smoothing = dpo.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits), rewards


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Maechler, 2012)."""
    near = x > -0.6931472
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def sum_by_document(logprobs_N: torch.Tensor, document_N: torch.Tensor, documents: int) -> torch.Tensor:
    """Summed log-probability of each document, fp32[D]."""
    return logprobs_N.new_zeros(documents).index_add(0, document_N, logprobs_N)


class PreferenceObjective:
    """Sum over pairs of `preference_loss`, plus the chosen answers' negative log-likelihood where the job wants it.

    The denominator is the number of pairs; the likelihood is a mean over the step's chosen tokens.
    """

    together = True
    #: Whether the reference of every document is all it ever wants, however rows come together.
    same_every_epoch = True

    def __init__(self, dpo: Dpo, *, packed: bool, pad_id: int, references: References) -> None:
        self.dpo, self.packed, self.pad_id, self.references = dpo, packed, pad_id, references
        self._nll_coef = 1.0 if dpo.loss == "orpo" else dpo.nll_coef
        self._nll_scale = 0.0

    def denominator(self, step: StepPlan) -> int:
        """Pairs of the step."""
        return step.rows

    def begin_step(self, infer: Infer, corpus: Corpus, step: StepPlan, rank: int) -> None:
        """Count the chosen tokens of the step, over which their likelihood is averaged."""
        if self._nll_coef:
            chosen = [documents[0] for documents in step.row_documents]
            count = corpus.length if self.dpo.nll_on == "all" else corpus.trained_count
            tokens = sum(map(count, chosen)) - (len(chosen) if self.dpo.nll_on == "all" else 0)
            self._nll_scale = self._nll_coef * step.rows / tokens

    def collate(self, corpus: Corpus, micro_batch: MicroBatch) -> Batch:
        """`answer_tensors`, with reference float32[D] where the loss needs it."""
        whole_first = bool(self._nll_coef) and self.dpo.nll_on == "all"
        batch = answer_tensors(
            corpus, micro_batch, packed=self.packed, pad_id=self.pad_id, whole_first=whole_first
        )
        if self.dpo.needs_reference:
            documents = [(document,) for row in micro_batch for document in row]
            batch["reference"] = self.references.of(corpus).get(documents)
        return batch

    def wanted(self, step: StepPlan) -> list[Sequence]:
        """Sequences whose reference the step needs, on any rank."""
        return [(document,) for row in step.row_documents for document in row]

    def sequences(self, corpus: Corpus, step: StepPlan, rank: int) -> Iterator[tuple[list[Sequence], Batch]]:
        """What the reference model has to look at: this rank's micro-batches."""
        for micro_batch in step.micro_batches[rank]:
            documents: list[Sequence] = [(document,) for row in micro_batch for document in row]
            yield documents, answer_tensors(corpus, micro_batch, packed=self.packed, pad_id=self.pad_id)

    def logprobs(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """log p(answer | prompt) of each document, fp32[D]."""
        documents = len(batch["last"])
        return sum_by_document(forward_logprobs(model, batch), batch["target_document"], documents)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Summed loss of the pairs; metrics: how often the chosen answer is ahead, margin and rewards."""
        logprobs_N, document_N = forward_logprobs(model, batch), batch["target_document"]
        answered = logprobs_N * batch["in_answer"]
        documents = len(batch["last"])
        lengths = sum_by_document(batch["in_answer"].float(), document_N, documents)
        logprobs_R2 = sum_by_document(answered, document_N, documents).view(-1, 2)
        reference = batch["reference"].view(-1, 2) if "reference" in batch else None
        losses, rewards = preference_loss(self.dpo, logprobs_R2, lengths.view(-1, 2), reference)
        chosen, rejected = rewards.unbind(1)
        total = losses.sum()
        metrics = {
            "accuracy": float((chosen > rejected).sum()),
            "margin": float((chosen - rejected).sum()),
            "chosen_reward": float(chosen.sum()),
            "rejected_reward": float(rejected.sum()),
            "chosen_logprob": float(logprobs_R2[:, 0].sum()),
            "rejected_logprob": float(logprobs_R2[:, 1].sum()),
        }
        if self._nll_coef:
            nll = -logprobs_N[document_N % 2 == 0].sum() * self._nll_scale
            total = total + nll
            metrics["nll"] = float(nll) / self._nll_coef
        # Without a pair the sum is 0, and still depends on every parameter.
        return total + 0.0 * logprobs_N.sum(), metrics
