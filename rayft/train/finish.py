"""What a finished run leaves behind: the exported model, the report page, the table of what it learned and forgot."""

from __future__ import annotations

import itertools
import json
from typing import Any

import ray
from rich.console import Console

from rayft.checkpoint import CheckpointReader, latest
from rayft.errors import JobError, StorageError
from rayft.model.files import ModelFiles
from rayft.report.log import read_log
from rayft.report.tables import suites_table, summary_table
from rayft.spec import Job, parse_job
from rayft.storage import ObjectNotFound, Store, node_cache_dir, open_store


def finish(job: Job, files: ModelFiles, store: Store, recorder: Any) -> None:
    """Export the last checkpoint of a run as `model/`: an adapter as such, a full model in the dtype it computed in."""
    from rayft.model.export import export_model
    from rayft.train.setup import compute_dtype

    step = newest_step(store)
    report = export_model(
        CheckpointReader(store, step),
        files,
        job,
        store.child("model"),
        merge=False,
        dtype=compute_dtype(job),
    )
    message = f"step {step} is in {store.where('model')}, {report.bytes / 1e6:.0f} MB"
    ray.get(recorder.event.remote("export", message, step=step), timeout=60)


def export_run(run: str, out: str, *, step: int | None = None, merge: bool = False) -> int:
    """Export a checkpoint of any run, the newest by default; with `merge` an adapter is merged and the merge proven."""
    from rayft.model.export import export_model
    from rayft.model.files import job_files, load_tokenizer
    from rayft.train.setup import compute_dtype

    store = open_store(run)
    job = job_of_run(store)
    step = newest_step(store) if step is None else step
    files = job_files(job, node_cache_dir())
    reader = CheckpointReader(store, step)
    prompts = (
        proof_prompts(load_tokenizer(files, job.model), job) if merge and job.adapter.type != "none" else []
    )
    report = export_model(
        reader, files, job, open_store(out), merge=merge, dtype=compute_dtype(job), prompts=prompts
    )
    Console().print(f"Step {step} of {run} is in {report.uri} ({report.bytes / 1e6:.0f} MB, {report.dtype}).")
    if report.proof:
        Console().print(f"Merged and unmerged model agree: {report.proof}")
    return 0


def proof_prompts(tokenizer: Any, job: Job, count: int = 8) -> list[list[int]]:
    """Token ids of the first rows the job trains on: real prompts to compare a merged model with its parts."""
    from rayft.data.cache import encode_rows, plan_cache
    from rayft.data.formats import layouts_of, rename
    from rayft.data.read import open_tables, read_rows
    from rayft.data.template import ChatTokenizer

    node_dir = node_cache_dir()
    if job.reinforced:
        source = job.data.train[0]
        table = open_tables(source, every=count, node_dir=node_dir)[0]
        read = read_rows(table, 0, min(count, table.rows), node_dir)
        asked = [rename(row, source, where) for where, row in read]
        texts = [json.dumps(row.get("prompt") or row["messages"], ensure_ascii=False) for row in asked]
        return [tokenizer(text)["input_ids"][:512] for text in texts]
    spec = plan_cache(
        job.data.train[:1],
        job.data,
        ChatTokenizer(tokenizer, job.data.loss_on),
        node_dir=node_dir,
        allowed=layouts_of(job),
    )
    rows = itertools.islice(encode_rows(spec, spec.shards[0], node_dir=node_dir), count)
    return [sample.ids[:512].tolist() for _, samples, _ in rows for sample in samples]


def newest_step(store: Store) -> int:
    """The newest committed step. Raises StorageError where there is none."""
    step = latest(store, verify=False)
    if step is None:
        raise StorageError(
            f"{store.uri} holds no committed checkpoint.", "Check the run folder, or run it first."
        )
    return step


def job_of_run(store: Store) -> Job:
    """The resolved job of a run folder. Raises JobError where there is none."""
    import yaml

    try:
        text = store.get("job.yaml")
    except ObjectNotFound:
        raise JobError(
            f"{store.uri} is no run folder: it has no job.yaml.", "Give the folder <storage>/<run name>."
        ) from None
    return parse_job(yaml.safe_load(text), where=store.where("job.yaml"))


def show_result(store: Store, job: Job, console: Console) -> None:
    """The table at the end of a run, and how to talk to the result."""
    before, after = suite_results(store, "before"), suite_results(store, "after")
    if job.eval.suites:
        console.print(suites_table(before, after, job.eval.suites))
    console.print(summary_table(read_log(store), job.name))
    console.print(f"Report: {store.where('report.html')}")
    if job.method == "reward":
        console.print(f"Score with it: rayft score {store.where('model')} --data FILE --out FILE")
    else:
        console.print(f"Talk to it: rayft chat {store.where('model')}")


def suite_results(store: Store, when: str) -> dict[str, dict[str, float]] | None:
    """What `measure_suites` kept, or None if it did not run."""
    try:
        return json.loads(store.get(f"suites-{when}.json"))
    except ObjectNotFound:
        return None
