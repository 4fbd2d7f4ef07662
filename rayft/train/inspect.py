"""The verbs that look without training: check the data, plan the memory, measure a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rayft.errors import DataError, JobError
from rayft.report.log import read_log
from rayft.report.tables import suites_table
from rayft.spec import Job
from rayft.storage import node_cache_dir, open_store


def check_job(job: Job, *, samples: int = 3) -> int:
    """Show what the job would train on and what is wrong with it. Raises DataError if something would ruin the run."""
    from rayft.data.doctor import check
    from rayft.data.findings import render
    from rayft.data.template import ChatTokenizer
    from rayft.model.files import load_tokenizer, resolve_model

    files = resolve_model(job.model, node_cache_dir())
    tokenizer = ChatTokenizer(load_tokenizer(files, job.model), job.data.loss_on)
    findings = check(job, tokenizer, node_dir=node_cache_dir(), samples=samples)
    render(findings, Console())
    if findings.errors:
        first = findings.errors[0]
        raise DataError(
            f"The data of {job.name} is not fit to train on: {first.message} ({first.count} times, such as {first.examples[0]}).",
            first.remedy,
        )
    return 0


def plan_job(job: Job) -> int:
    """Show the memory plan of a job, and after its run what was predicted against what was measured."""
    from rayft.model.files import resolve_model
    from rayft.plan.choose import architecture_of, choose, memory_limit, scorer_architectures
    from rayft.plan.gpus import find_gpu
    from rayft.plan.render import compare, render
    from rayft.train.prepare import reward_model_folders

    console = Console()
    architecture = architecture_of(config_folder(job, resolve_model))
    gpu = find_gpu(job.cluster.gpu) if job.cluster.gpu else None
    scorers = scorer_architectures(reward_model_folders(job))
    choice = choose(job, architecture, memory_limit(job), scorers)
    render(job, architecture, choice, console, gpu, scorers)
    if job.tune:
        console.print(
            "This is one trial of the search, with the job's own values; those of tune.space, and trials beside it on one machine, "
            "are not planned."
        )
    rows = read_log(open_store(job.storage).child(job.name))
    peaks = [row["peak_memory_gb"] for row in rows if row["kind"] == "step" and row.get("peak_memory_gb")]
    if peaks:
        highest = [
            max(values) for values in zip(*(p for p in peaks if len(p) == len(peaks[-1])), strict=True)
        ]
        console.print(compare(choice.plan, highest, job.cluster.gpus_per_worker > 0))
    return 0


def config_folder(job: Job, resolve_model: Any) -> Path:
    """Where the model's config.json is; a hub model's config is fetched without its weights."""
    return resolve_model(job.model.model_copy(update={"random_weights": True}), node_cache_dir()).folder


def evaluate_model(job: Job, model: str | None) -> int:
    """Measure the suites of a job on `model`, by default on what its run exported, and show them beside the base model's."""
    from rayft.evals.run import run_suites
    from rayft.generate.hf import TransformersEngine
    from rayft.generate.load import load_model
    from rayft.generate.scores import ScoreEngine, load_score_model
    from rayft.train.finish import suite_results

    if not job.eval.suites:
        raise JobError(
            f"The job {job.name} has no eval.suites to measure.", "Add some, such as those of jobs/demo.yaml."
        )
    store = open_store(job.storage).child(job.name)
    where, batch_size = model or store.where("model"), job.eval.batch_size
    engine: Any
    if job.method == "reward":
        module, tokenizer = load_score_model(where, cache_dir=node_cache_dir())
        engine = ScoreEngine(module, batch_size=batch_size)
    else:
        module, tokenizer = load_model(where, cache_dir=node_cache_dir())
        engine = TransformersEngine(module.eval(), tokenizer, batch_size=batch_size)
    results = run_suites(job.eval.suites, engine, tokenizer, cache_dir=node_cache_dir())
    Console().print(suites_table(suite_results(store, "before"), results, job.eval.suites))
    return 0


def score_file(models: Sequence[str], data: str, out: str) -> int:
    """Write the rows of `data` to `out` with the scores that the reward models give their answers."""
    from rayft.evals.score import score_rows, write_scores
    from rayft.generate.scores import ScoreEngine, load_score_model

    if not Path(out).absolute().parent.is_dir():
        raise JobError(f"There is no folder for {out}.", "Make it first, or give another --out.")
    if Path(out).exists():
        raise JobError(f"{out} exists already.", "Choose another name for --out, or remove it.")
    loaded = [load_score_model(model, cache_dir=node_cache_dir()) for model in models]
    engines = [(ScoreEngine(model), tokenizer) for model, tokenizer in loaded]
    rows = score_rows(data, engines, cache_dir=node_cache_dir())
    count = write_scores(rows, Path(out))
    Console().print(f"{count} rows with their scores are in {out}.")
    return 0
