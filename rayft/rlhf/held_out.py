"""Answers to prompts that are never trained on: their rewards, how far the policy has moved, how often it beats its beginning."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rayft.data.template import ChatTokenizer
from rayft.rlhf.browse import read_rows
from rayft.rlhf.kept import keep_rollouts, key_of
from rayft.rlhf.layout import lay_out
from rayft.rlhf.plan import RlPrepared
from rayft.rlhf.prompts import PromptSet
from rayft.rlhf.roles import Roles
from rayft.rlhf.rollout import Rollout
from rayft.rlhf.step import Scored
from rayft.spec import Job, RewardSource
from rayft.storage import ObjectNotFound, Store

#: Added to the run's seed, so that no held-out answer is drawn from a stream that a trained one is drawn from.
SEED = 1 << 32
#: Metrics of the policy before the first step; and those that a search gives to a trial, since another one has measured them.
BEFORE, GIVEN = "held-out-before.json", "held-out-given.json"


def held_out_prompts(job: Job, chat: ChatTokenizer, node_dir: Path) -> PromptSet:
    """The prompts of data.eval, in their order."""
    data = job.data.model_copy(update={"train": job.data.eval})
    longest = data.max_length - job.rollout.max_new_tokens
    return PromptSet(data, chat, seed=None, longest=longest, node_dir=node_dir, key="data.eval")


class HeldOut:
    """The prompts of data.eval, each answered `eval.answers` times as in training, by the same seeds every time."""

    def __init__(self, prepared: RlPrepared, store: Store, node_dir: Path) -> None:
        self.plan, self.store = prepared.plan, store
        job = self.plan.job
        prompts = held_out_prompts(job, prepared.prompts.chat, node_dir)
        of_the_start = [
            prepared.files.identity,
            prompts.identity,
            job.adapter.type,
            job.seed,
            job.train.precision,
            job.eval.answers,
            job.rollout.model_dump(mode="json"),
            [[source.model_dump(mode="json"), _text_of(source)] for source in job.rewards],
            self.plan.reference is not None,
        ]
        #: What decides on what is measured before the first step.
        self._of_the_start = hashlib.blake2b(json.dumps(of_the_start).encode(), digest_size=16).hexdigest()
        taken = prompts.take(0, prompts.order.epoch_rows(), prompts.order.epoch_rows())
        self.prompts, self.too_long = taken.prompts, len(taken.too_long)

    def measure(self, roles: Roles, step: int, leave: Callable[[], bool]) -> dict[str, float]:
        """Metrics of the policy after so many steps; keeps the answers as `rollouts/held-out-N.parquet`, and before the first step
        the metrics as `held-out-before.json`.

        score (and each source's, `score/NAME`) with its deviation over answers and its standard error, by the means of the
        prompts; kl: nats an answer to the reference, where there is one; win_rate/NAME: share of the answers that the source
        scores higher than the same prompt's of the policy before training, ties half. leave: whether to draw no more answers;
        raises Interrupted then.
        """
        job = self.plan.job
        roles.sync(step)
        rollouts = roles.generate(
            self.prompts, num_generations=job.eval.answers, seed=job.seed + SEED, leave=leave
        )
        scores_S, by_source = roles.score(rollouts)
        metrics = _described("score", scores_S, job.eval.answers)
        if len(by_source) > 1:
            for name, scores in by_source.items():
                metrics |= _described(f"score/{name}", scores, job.eval.answers)
        metrics["length"] = float(np.mean([len(r.ids) for r in rollouts]))
        metrics["truncated"] = float(np.mean([not r.ended for r in rollouts]))
        if self.plan.reference is not None:
            metrics["kl"] = self._kl(roles, rollouts)
        keep_rollouts(self.store, "held-out", step, Scored(rollouts, scores_S, by_source), {})
        if step > 0:
            return metrics | self._win_rates(by_source)
        self.store.put(BEFORE, json.dumps({"of": self._of_the_start, "metrics": metrics}).encode())
        return metrics

    def given(self) -> dict[str, float] | None:
        """What another trial of the same search has measured before its first step. None where none has, or where what decides on it
        is not the same."""
        try:
            kept = json.loads(self.store.get(GIVEN))
        except ObjectNotFound:
            return None
        if kept["of"] != self._of_the_start or self.store.stat(key_of("held-out", 0)) is None:
            return None
        metrics: dict[str, float] = kept["metrics"]
        return metrics

    def _kl(self, roles: Roles, rollouts: Sequence[Rollout]) -> float:
        job = self.plan.job.model_copy(
            update={"rl": self.plan.job.rl.model_copy(update={"num_mini_batches": 1})}
        )
        lengths = [rollout.length for rollout in rollouts]
        roles.take(rollouts, lay_out(lengths, job, ranks=len(roles.policy), packed=self.plan.packed, step=0))
        own, reference = roles.old_logprobs(len(rollouts)), roles.reference_logprobs(len(rollouts))
        assert reference is not None
        return float(np.mean([(a - b).sum() for a, b in zip(own, reference, strict=True)]))

    def _win_rates(self, by_source: dict[str, np.ndarray]) -> dict[str, float]:
        try:
            before = read_rows(self.store, key_of("held-out", 0))
        except ObjectNotFound:  # eval.before was false
            return {}
        if len(before) != len(self.prompts) * self.plan.job.eval.answers:
            return {}  # `eval` was another when the run began
        rates: dict[str, float] = {}
        for name, scores in by_source.items():
            start = np.array([row[f"score/{name}"] for row in before])
            wins = np.where(scores == start, 0.5, scores > start)
            rates |= {f"win_rate/{name}": float(wins.mean())}
        return rates


def _text_of(source: RewardSource) -> str:
    """The file of a reward that is a function in one."""
    path = Path(source.path.rpartition(":")[0])
    return path.read_text() if source.type == "function" and path.suffix == ".py" else ""


def _described(name: str, scores_S: np.ndarray, answers: int) -> dict[str, float]:
    """Mean, deviation over answers, and the mean's standard error: answers to one prompt are not independent, prompts are."""
    prompts_P = scores_S.reshape(-1, answers).mean(axis=1)
    return {
        name: float(scores_S.mean()),
        f"{name}_stderr": _deviation(prompts_P) / math.sqrt(len(prompts_P)),
        f"{name}_std": _deviation(scores_S),
    }


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
