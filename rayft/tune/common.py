"""What all trials of a search share: tokenised data, and what the model was before training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass

from rayft.data.cache import plan_cache
from rayft.data.formats import layouts_of
from rayft.data.template import ChatTokenizer
from rayft.model.files import job_files, load_tokenizer
from rayft.rlhf.held_out import BEFORE, GIVEN
from rayft.rlhf.kept import key_of
from rayft.spec import Job
from rayft.storage import ObjectNotFound, Store, node_cache_dir
from rayft.train.prepare import Shards, with_absolute_paths


@dataclass(frozen=True)
class Baseline:
    """What one trial measures before training, so that others need not.

    key: names it among those of its search. kind: of the log's row that says it is there. files: names as the trial that measures
    leaves them, and as others find them; the last one marks the rest whole.
    """

    key: str
    kind: str
    files: dict[str, str]

    @property
    def mark(self) -> str:
        """The last file."""
        return [*self.files][-1]


#: What `measure_suites` leaves in a run folder; a run that finds it does not measure again.
OF_SUITES = {name: name for name in ("details-before.json", "samples-before.json", "suites-before.json")}
#: What `HeldOut` leaves, and takes where it is given.
OF_HELD_OUT = {key_of("held-out", 0): key_of("held-out", 0), BEFORE: GIVEN}


def data_key(job: Job) -> str | None:
    """Names the tokenised data of a job among those of its search; None where nothing is tokenised before training."""
    if job.reinforced:
        return None
    made_of = [job.method, job.data.model_dump(mode="json"), job.model.model_dump(mode="json"), job.dpo.loss]
    return "data " + _digest(made_of)


def baselines_of(job: Job) -> list[Baseline]:
    """What a trial's job measures before training, in the order in which it does."""
    found: list[Baseline] = []
    if not job.eval.before:
        return found
    model = job.model.model_dump(mode="json")
    if job.eval.suites:
        suites = [suite.model_dump(mode="json") for suite in job.eval.suites]
        heads = job.reward.heads if job.method == "reward" else 0
        key = "baseline " + _digest([job.method, suites, model, job.train.precision, heads])
        found.append(Baseline(key, "suites", OF_SUITES))
    if job.reinforced and job.data.eval:
        sources = [source.model_dump(mode="json") for source in (*job.data.eval, *job.rewards)]
        data = [job.data.max_length, job.data.too_long, job.adapter.type, job.seed, job.train.precision]
        asked = [job.rollout.model_dump(mode="json"), job.eval.answers, job.reference is not None]
        key = "baseline-held-out " + _digest([sources, model, data, asked])
        found.append(Baseline(key, "eval", OF_HELD_OUT))
    return found


def prepare_data(job: Job, cache_uri: str) -> str:
    """Tokenise all of a job's data, so that trials only find it; returns what was done, for people."""
    began = time.monotonic()
    job = with_absolute_paths(job)
    files = job_files(job, node_cache_dir())
    tokenizer = ChatTokenizer(load_tokenizer(files, job.model), job.data.loss_on)
    rows = 0
    for sources in (job.data.train, job.data.eval):
        if not sources:
            continue
        spec = plan_cache(
            sources, data=job.data, tokenizer=tokenizer, node_dir=node_cache_dir(), allowed=layouts_of(job)
        )
        shards = Shards(spec, cache_uri, list(range(len(spec.shards))), at_once=4)
        shards.wait()
        shards.refuse_empty()
        rows += spec.rows
    return f"{rows} rows tokenised in {time.monotonic() - began:.1f} s, for all trials"


def keep_baseline(run: Store, search: Store, baseline: Baseline) -> None:
    """Put what a trial measured before training where the others find it."""
    folder = _folder(baseline.key)
    for name in baseline.files:
        with contextlib.suppress(ObjectNotFound):
            search.put(f"{folder}/{name}", run.get(name))


def give_baseline(run: Store, search: Store, baseline: Baseline) -> bool:
    """Lay what another trial of the search measured into a trial's folder; False where it is not there."""
    folder = _folder(baseline.key)
    if not search.exists(f"{folder}/{baseline.mark}"):
        return False
    for name, given in baseline.files.items():
        with contextlib.suppress(ObjectNotFound):
            run.put(given, search.get(f"{folder}/{name}"))
    return True


def _folder(key: str) -> str:
    return key.replace(" ", "/")


def _digest(made_of: object) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
