"""`rayft rollouts --replay`: put the answers of a step through the loss again, with the weights they met then."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from rich.console import Console

from rayft.checkpoint import committed_steps
from rayft.errors import JobError
from rayft.report.log import read_log
from rayft.rlhf.browse import Row, read_step
from rayft.rlhf.experience import Columns
from rayft.rlhf.layout import layout_of
from rayft.rlhf.plan import prepare
from rayft.rlhf.prompts import Prompt
from rayft.rlhf.roles import Roles
from rayft.rlhf.rollout import Rollout
from rayft.storage import Store, open_store
from rayft.train.cluster import connect, refuse_impossible
from rayft.train.finish import job_of_run
from rayft.train.recorder import start_recorder
from rayft.train.run import absolute_uri

#: Columns of a dump that are no values of tokens for the loss.
LOSS_COLUMNS = ("old_logprobs", "advantages", "importance", "weights", "reference", "returns", "old_values")


def replay(run: str, step: int, console: Console | None = None) -> int:
    """Print loss and gradient norm of each update of a step as it is made again, and whether the probabilities are the kept ones.

    What comes of it is thrown away and nothing is written. Raises JobError where the weights of then are not kept any more.
    """
    console, run_uri = console or Console(), absolute_uri(run.rstrip("/"))
    store = open_store(run_uri)
    rows = read_step(store, step)
    job = job_of_run(store)
    before = weights_before(store, step)
    rollouts, columns = rollouts_of(rows), columns_of(rows)
    logged: dict[str, Any] = {"metrics": {}}
    for row in read_log(store):
        if row["kind"] == "step" and row["step"] == step:
            logged = row
    connect(job.cluster)
    refuse_impossible(job.cluster)
    with tempfile.TemporaryDirectory(prefix="rayft-replay-") as folder:
        recorder = start_recorder(job, f"file://{folder}/run", {}, 0)
        prepared = prepare(job, run_uri, {}, console.print)
        roles = Roles(prepared.plan, recorder, console.print)
        try:
            roles.begin(0, before)
            layout = layout_of(rollouts, prepared.plan, ranks=len(roles.policy), step=step - 1)
            roles.take(rollouts, layout)
            old = roles.old_logprobs(len(rollouts))
            gap = max(float(np.abs(a - b).max()) for a, b in zip(old, columns["old_logprobs"], strict=True))
            console.print(f"log-probabilities: largest |Δ| to those kept {gap:g}", highlight=False)
            coef = float(logged["metrics"].get("kl_coef", job.rl.kl_coef or 0.0))
            rate = float(logged.get("learning_rate", 0.0))
            critic_rate = (
                rate * (job.rl.critic_learning_rate or job.train.learning_rate) / job.train.learning_rate
            )
            updates = [number for _ in range(job.rl.num_epochs or 1) for number in range(len(layout))]
            for count, number in enumerate(updates, 1):
                said = []
                critic = roles.update_critic(number, columns, critic_rate)
                if step > job.rl.critic_warmup_steps:
                    made = roles.update_policy(number, columns, rate, coef)
                    said = [f"loss {made.loss:.6g}, gradient norm {made.grad_norm:.4g}"]
                if critic:
                    said.append(f"critic's loss {critic.loss:.6g}, gradient norm {critic.grad_norm:.4g}")
                console.print(f"update {count} of {len(updates)}: {'; '.join(said)}", highlight=False)
        finally:
            roles.close()
            ray.kill(recorder)
    if "loss" in logged:
        console.print(
            f"the log has a mean loss of {logged['loss']:.6g} and a largest gradient norm of {logged['grad_norm']:.4g}",
            highlight=False,
        )
    return 0


def weights_before(store: Store, step: int) -> int | None:
    """The checkpoint that the step began from; None: the base model. Raises JobError if it is not kept."""
    if step == 1:
        return None
    kept = committed_steps(store)
    if step - 1 in kept:
        return step - 1
    able = ", ".join(str(number) for number in [1, *(n + 1 for n in kept)])
    raise JobError(
        f"The weights that step {step} began from are not kept (checkpoint {step - 1}).",
        f"Steps {able} can be replayed; checkpoint.every_steps and checkpoint.keep decide which.",
    )


def rollouts_of(rows: Sequence[Row]) -> list[Rollout]:
    """The answers of a step, as they were drawn."""
    return [
        Rollout(
            Prompt(row["position"], row["row"], tuple(row["prompt_ids"]), json.loads(row["prompt"]), {}),
            row["sample"],
            row["ids"],
            row["engine_logprobs"],
            row["ended"],
            row["version"],
            row["text"],
        )
        for row in rows
    ]


def columns_of(rows: Sequence[Row]) -> Columns:
    """What each token was trained with."""
    there = [name for name in LOSS_COLUMNS if name in rows[0]]
    return {name: [np.array(row[name]) for row in rows] for name in there}
