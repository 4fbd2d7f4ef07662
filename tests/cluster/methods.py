"""Small jobs of every method, the rows they learn from, and each method's loss written out for a plain loop."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rayft.data.corpus import Corpus
from rayft.data.step import StepPlan

#: Method -> the file it learns from and its groups of the job file.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("rows.jsonl", {}),
    "reward": ("pairs.jsonl", {"method": "reward"}),
    "reward_ranked": ("ranked.jsonl", {"method": "reward", "reward": {"heads": 2, "center_coef": 0.0}}),
    "reward_labels": ("labels.jsonl", {"method": "reward"}),
    "dpo": ("pairs.jsonl", {"method": "dpo", "dpo": {"nll_coef": 0.5}}),
    "dpo_conservative": ("pairs.jsonl", {"method": "dpo", "dpo": {"label_smoothing": 0.1}}),
    "dpo_normalized": ("pairs.jsonl", {"method": "dpo", "dpo": {"length_normalized": True, "beta": 2.0}}),
    "ipo": ("pairs.jsonl", {"method": "dpo", "dpo": {"loss": "ipo"}}),
    "simpo": ("pairs.jsonl", {"method": "dpo", "dpo": {"loss": "simpo"}}),
    "orpo": ("pairs.jsonl", {"method": "dpo", "dpo": {"loss": "orpo", "nll_on": "all"}}),
    "kto": ("labels.jsonl", {"method": "dpo", "dpo": {"loss": "kto", "undesirable_weight": 1.5}}),
}

WORDS = ["ray", "actor", "shard", "token", "step", "loss", "rank", "merge", "queue", "limit", "batch", "node"]


def write_comparisons(folder: Path, count: int = 48, seed: int = 0) -> None:
    """pairs.jsonl, ranked.jsonl and labels.jsonl with prompts and answers of uneven length."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "ranked": [], "labels": []}
    for i in range(count):
        prompt = message("user", f"{words(6)} {i}")
        answers = [message("assistant", f"{words(9)} {mark}") for mark in ("yes", "so", "no", "never")]
        rows["pairs"].append({"prompt": prompt, "chosen": answers[0], "rejected": answers[2]})
        if i % 3 == 0:
            rows["pairs"][-1]["margin"] = rng.randint(0, 2) / 2
        rows["ranked"].append({"prompt": prompt, "completions": answers[: rng.randint(2, 4)]})
        good = rng.random() < 0.6
        rows["labels"].append({"prompt": prompt, "completion": answers[0 if good else 2], "label": good})
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


#: log-probabilities of an answer's tokens given its prompt, of document ids or a joined (prompt, answer) pair.
Look = Callable[..., torch.Tensor]


def plain_loss(
    name: str, corpus: Corpus, step: StepPlan, policy: Look, reference: Look, scores: Look
) -> torch.Tensor:
    """The mean loss of a step of one of `METHODS`, as its paper writes it, one document at a time.

    policy(document, answer=None, whole=False): log p of the tokens after the prompt, in fp32 [N]; of all tokens with
    `whole`; with `answer`, of that document's answer after this one's prompt. scores(document): score of each head.
    """
    rows = step.row_documents
    if name == "sft":
        return -torch.cat([policy(document) for row in rows for document in row]).sum() / step.trained_tokens
    if name == "kto":
        return _kto(corpus, rows, policy, reference)
    losses = []
    for row in rows:
        if name.startswith("reward"):
            losses.append(_reward(name, [scores(document) for document in row], corpus.answers(row[0])[1]))
            continue
        (chosen, rejected), (chosen_ref, rejected_ref) = (
            [look(document) for document in row] for look in (policy, reference)
        )
        summed = (chosen.sum() - chosen_ref.sum()) - (rejected.sum() - rejected_ref.sum())
        averaged = (chosen - chosen_ref).mean() - (rejected - rejected_ref).mean()
        if name == "dpo":
            losses.append(-F.logsigmoid(0.1 * summed))
        elif name == "dpo_conservative":
            losses.append(-0.9 * F.logsigmoid(0.1 * summed) - 0.1 * F.logsigmoid(-0.1 * summed))
        elif name == "dpo_normalized":
            losses.append(-F.logsigmoid(2.0 * averaged))
        elif name == "ipo":
            losses.append((averaged - 1 / (2 * 0.1)) ** 2)
        elif name == "simpo":
            losses.append(-F.logsigmoid(2.0 * (chosen.mean() - rejected.mean()) - 1.0))
        else:
            odds = [p / (1 - p) for p in (chosen.mean().double().exp(), rejected.mean().double().exp())]
            losses.append(-0.1 * F.logsigmoid((odds[0] / odds[1]).log()).float())
    loss = torch.stack(losses).mean()
    if name == "dpo":
        loss = loss - 0.5 * torch.cat([policy(row[0]) for row in rows]).mean()
    if name == "orpo":
        loss = loss - torch.cat([policy(row[0], whole=True) for row in rows]).mean()
    return loss


def _reward(name: str, scores: list[torch.Tensor], value: float) -> torch.Tensor:
    if name == "reward_labels":
        sign = 1.0 if value else -1.0
        return -F.logsigmoid(sign * scores[0]).mean() + 0.01 * (2 * scores[0]).square().mean()
    if name == "reward":
        margin = 0.0 if math.isnan(value) else value
        won = torch.sigmoid(scores[0] - scores[1] - margin)
        return -won.log().mean() + 0.01 * (scores[0] + scores[1]).square().mean()
    strengths = [score.double().exp() for score in scores]
    chances = [strengths[i] / torch.stack(strengths[i:]).sum(0) for i in range(len(scores) - 1)]
    return -torch.stack(chances).prod(0).log().mean().float()


def _kto(corpus: Corpus, rows: list[range], policy: Look, reference: Look) -> torch.Tensor:
    documents = [row[0] for row in rows]
    with torch.no_grad():
        moved = torch.stack(
            [
                policy(document, answer=documents[i - 1]).sum() - reference(document, answer=documents[i - 1]).sum()
                for i, document in enumerate(documents)
            ]
        ).mean().clamp(min=0)  # fmt: skip
    losses = []
    for document in documents:
        ratio = policy(document).sum() - reference(document).sum()
        good = corpus.answers(document)[1] == 1
        losses.append(
            1 - torch.sigmoid(0.1 * (ratio - moved))
            if good
            else 1.5 * (1 - torch.sigmoid(0.1 * (moved - ratio)))
        )
    return torch.stack(losses).mean()


def looks(model: Any, corpus: Corpus) -> Look:
    """`policy` or `reference` of `plain_loss` over a transformers model."""

    def look(document: int, answer: int | None = None, *, whole: bool = False) -> torch.Tensor:
        sample, start = corpus.sample(document), corpus.prompt_length(document)
        ids, trained = sample.ids, sample.trained
        if answer is not None:
            other, after = corpus.sample(answer), corpus.prompt_length(answer)
            ids = np.concatenate([ids[:start], other.ids[after:]])
            trained = np.concatenate([trained[:start], other.trained[after:]])
        tokens = torch.from_numpy(ids.astype(np.int64))
        logprobs = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, tokens[1:, None]).squeeze(1)
        return picked if whole else picked[torch.from_numpy(trained[1:])]

    return look


def scores_of(model: Any, corpus: Corpus) -> Look:
    """`scores` of `plain_loss` over a transformers sequence classifier."""

    def score(document: int) -> torch.Tensor:
        ids = torch.from_numpy(corpus.sample(document).ids.astype(np.int64))[None]
        return model(input_ids=ids).logits[0]

    return score
