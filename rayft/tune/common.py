"""What all trials of a search share: tokenised data, and what the model was before training."""

from __future__ import annotations

import hashlib
import json
import time

from rayft.data.cache import plan_cache
from rayft.data.formats import layouts_of
from rayft.data.template import ChatTokenizer
from rayft.model.files import job_files, load_tokenizer
from rayft.spec import Job
from rayft.storage import ObjectNotFound, Store, node_cache_dir
from rayft.train.prepare import Shards, with_absolute_paths

#: What `measure_suites` leaves in a run folder before training; a run that finds it does not measure again.
BASELINE = "suites-before.json"
BASELINE_FILES = (BASELINE, "samples-before.json", "details-before.json")


def data_key(job: Job) -> str | None:
    """Names the tokenised data of a job among those of its search; None where nothing is tokenised before training."""
    if job.reinforced:
        return None
    made_of = [job.method, job.data.model_dump(mode="json"), job.model.model_dump(mode="json"), job.dpo.loss]
    return "data " + _digest(made_of)


def baseline_key(job: Job) -> str | None:
    """Names the measurement before training among those of its search; None where there is none."""
    if not job.eval.suites or not job.eval.before:
        return None
    suites = [suite.model_dump(mode="json") for suite in job.eval.suites]
    heads = job.reward.heads if job.method == "reward" else 0
    made_of = [job.method, suites, job.model.model_dump(mode="json"), job.train.precision, heads]
    return "baseline " + _digest(made_of)


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


def keep_baseline(run: Store, search: Store, key: str) -> None:
    """Put what a trial measured before training where the others find it; the results last, since they mark it whole."""
    folder = _folder(key)
    for name in reversed(BASELINE_FILES):
        try:
            search.put(f"{folder}/{name}", run.get(name))
        except ObjectNotFound:
            continue


def give_baseline(run: Store, search: Store, key: str) -> bool:
    """Lay the search's measurement before training into a trial's folder; False where it is not there."""
    folder = _folder(key)
    if not search.exists(f"{folder}/{BASELINE}"):
        return False
    for name in reversed(BASELINE_FILES):
        try:
            run.put(name, search.get(f"{folder}/{name}"))
        except ObjectNotFound:
            continue
    return True


def _folder(key: str) -> str:
    return key.replace(" ", "/")


def _digest(made_of: object) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
