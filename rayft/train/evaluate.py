"""Measurements during and around training, dealt over the ranks: evaluation loss, early stopping, suites."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rayft.data.corpus import Corpus
from rayft.data.order import Order
from rayft.data.step import MicroBatch, StepPlan, plan_step
from rayft.generate.hf import TransformersEngine
from rayft.generate.scores import ScoreEngine
from rayft.learner.learner import Learner
from rayft.objectives.base import Objective
from rayft.spec import Train
from rayft.storage import ObjectNotFound, Store, node_cache_dir
from rayft.train import setup
from rayft.train.group import RunPlan

if TYPE_CHECKING:
    from rayft.train.worker import Worker


class EarlyStopping:
    """Ends a run whose evaluation loss has not improved by `early_stopping_threshold` for `patience` evaluations."""

    def __init__(self, train: Train) -> None:
        self.patience, self.threshold = train.early_stopping_patience, train.early_stopping_threshold
        self.best, self.bad = math.inf, 0

    def seen(self, loss: float) -> None:
        """Take in an evaluation loss."""
        if loss < self.best - self.threshold:
            self.best, self.bad = loss, 0
        else:
            self.bad += 1

    @property
    def stop(self) -> bool:
        return self.patience is not None and self.bad >= self.patience

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return {"best": None if math.isinf(self.best) else self.best, "bad": self.bad}

    def restore(self, state: dict[str, Any]) -> None:
        """Take in what `state` gave."""
        self.best, self.bad = math.inf if state["best"] is None else state["best"], state["bad"]


def evaluation_steps(plan: RunPlan, corpus: Corpus, world_size: int, together: bool) -> Iterator[StepPlan]:
    """All evaluation rows in their order, in steps of the size of training's."""
    assert plan.eval_spec is not None
    order, position, end = Order.of(plan.eval_spec, None), 0, plan.eval_spec.rows
    while position < end:
        step = plan_step(
            corpus,
            order,
            position,
            data=plan.job.data,
            train=plan.job.train,
            packed=plan.packed,
            world_size=world_size,
            end=end,
            together=together,
        )
        position = step.next_position
        if step.rows:
            yield step


def evaluation_loss(
    plan: RunPlan, learner: Learner[Objective], rank: int, world_size: int, look: Callable[[], None]
) -> tuple[float, int, dict[str, float]]:
    """Mean loss and metrics over all evaluation rows, and how many tokens (for sft) or rows they are means over; equal
    on all ranks. look: called before every micro-batch, by all ranks; it raises to give the evaluation up."""
    assert plan.eval_spec is not None
    corpus = setup.open_corpus(plan, plan.eval_spec)
    objective, count = learner.objective, 0
    sums: Counter[str] = Counter()
    for step in evaluation_steps(plan, corpus, world_size, objective.together):
        objective.begin_step(learner.infer, corpus, step, rank)
        loss, metrics = learner.loss(_collated(objective, corpus, step.micro_batches[rank], look))
        sums.update({"loss": loss, **metrics})
        count += objective.denominator(step)
    names = sorted(sums)
    total = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=learner.device)
    dist.all_reduce(total)
    means = dict(zip(names, (total / max(count, 1)).tolist(), strict=True))
    return means.pop("loss"), count, means


def _collated(
    objective: Objective, corpus: Corpus, batches: list[MicroBatch], look: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    for batch in batches:
        look()
        yield objective.collate(corpus, batch)


def _kept(store: Store, key: str) -> dict[str, Any] | None:
    try:
        return json.loads(store.get(key))
    except ObjectNotFound:
        return None


def measure_suites(worker: Worker, when: str) -> None:
    """Run the job's suites on the model as it is and keep the results in the run folder; once per run and `when`."""
    from rayft.evals.run import run_suites

    suites, key = worker.job.eval.suites, f"suites-{when}.json"
    began = time.perf_counter()
    if not suites:
        return
    kept = setup.share(_kept(worker.store, key) if worker.rank == 0 else None)
    if kept is not None and kept.keys() == {suite.name for suite in suites}:
        if worker.rank == 0:  # rows of a start that left no checkpoint do not count, so it is told again
            worker.recorder.row.remote({"kind": "suites", "when": when, "step": worker.step, "results": kept})
        return
    learner = worker.learner
    batch_size = worker.job.eval.batch_size
    sync = setup.sync_largest(learner.device) if learner.stage == 3 else None
    engine: Any
    if worker.job.method == "reward":
        engine = ScoreEngine(learner.module, batch_size=batch_size, sync=sync)
    else:
        engine = TransformersEngine(learner.module, worker.tokenizer, batch_size=batch_size, sync=sync)
    learner.module.eval()
    samples: dict[str, Any] = {}
    details: dict[str, Any] = {}
    results = run_suites(
        suites,
        engine,
        worker.tokenizer,
        rank=worker.rank,
        world_size=worker.world_size,
        gather=setup.gather,
        keep_samples=samples.__setitem__,
        keep_details=details.__setitem__,
        cache_dir=node_cache_dir(),
    )
    learner.module.train()
    if worker.rank == 0:
        worker.store.put(f"samples-{when}.json", json.dumps(samples, indent=1, ensure_ascii=False).encode())
        if details:
            worker.store.put(f"details-{when}.json", json.dumps(details).encode())
        worker.store.put(key, json.dumps(results, indent=1, ensure_ascii=False).encode())
        row = {"kind": "suites", "when": when, "step": worker.step, "results": results}
        worker.recorder.row.remote(row | {"took_s": round(time.perf_counter() - began, 3)})
