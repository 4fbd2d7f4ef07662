"""How long saving takes, against how long a node that is taken away still lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rayft.plan.architecture import Architecture
from rayft.plan.memory import of_method, with_score_heads
from rayft.plan.trainable import trainable_parameters
from rayft.spec import Job

#: Seconds until every rank knows of the notice and has come to the border of a micro-batch, where that takes less.
NOTICE_S = 3.0
#: So many checkpoints of a run's log say how long the next one may take.
LATEST = 5


@dataclass(frozen=True)
class SaveTime:
    """Seconds that saving takes and that there are; source: how the first was come to."""

    needed_s: float
    given_s: float
    source: str

    @property
    def fits(self) -> bool:
        return self.needed_s + NOTICE_S <= self.given_s

    def sentence(self) -> str:
        """For people, with the arithmetic."""
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"A checkpoint takes about {self.needed_s:.0f} s ({self.source}) and {NOTICE_S:.0f} s until all ranks know; it "
            f"{verdict} the {self.given_s:.0f} s that a node which is taken away has."
        )


def checkpoint_bytes(
    job: Job, architecture: Architecture, scorers: Mapping[str, Architecture] | None = None
) -> int:
    """Bytes of a checkpoint: master weights and both Adam moments of everything trained, a critic's too. What is frozen is
    referenced, not copied."""
    trained = trainable_parameters(job.adapter, of_method(job, architecture))
    if job.reinforced and job.rl.critic:
        body = (scorers or {}).get(job.critic_beginning or "", architecture)
        body = body if body.vocabulary == architecture.vocabulary else architecture
        trained += trainable_parameters(job.adapter, with_score_heads(body, 1))
    return trained * 3 * (2 if job.train.precision == "pure_bf16" else 4)


def estimated(size: int, nodes: int, node_mb_per_s: float, given_s: float) -> SaveTime:
    """The time for `size` bytes where every node writes its part."""
    source = f"{size / 1e9:.1f} GB over {nodes} node{'s' if nodes > 1 else ''} at {node_mb_per_s:g} MB/s each, estimated"
    return SaveTime(size / (nodes * node_mb_per_s * 1e6), given_s, source)


def measured(rows: Iterable[Mapping[str, Any]], given_s: float) -> SaveTime | None:
    """The longest of the last checkpoints by a run's log; None where it tells of none."""
    took = [
        float(row["took_s"])
        for row in rows
        if row.get("event") == "checkpoint" and isinstance(row.get("took_s"), int | float)
    ][-LATEST:]
    if not took:
        return None
    which = f"the longest of this run's last {len(took)}" if len(took) > 1 else "this run's only one so far"
    return SaveTime(max(took), given_s, f"{which}, measured")
