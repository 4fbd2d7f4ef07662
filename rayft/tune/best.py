"""What a search leaves behind of its best trial: `best.yaml`, a job file ready to run, and `model/`, what it has learned."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from rayft.checkpoint import latest
from rayft.errors import StorageError
from rayft.report.trials import Segment, TrialState, lineage
from rayft.spec import Job
from rayft.spec.search import given
from rayft.storage import Store
from rayft.tune.choose import Choice
from rayft.tune.scale import label
from rayft.tune.space import job_of

BEST = "best.yaml"
MODEL = "model"
SUFFIX = "-best"
#: What `rayft.model.export` publishes last; with one of them there, the model is whole.
CONFIGS = ("config.json", "adapter_config.json")
MAX_NAME = 63


def best_job(search: Job, trial: TrialState) -> Job:
    """The trial's job as one of its own: without the search, under its own name, where the search's folder lies."""
    job = job_of(search, trial.values)
    name = search.name[: MAX_NAME - len(SUFFIX)].rstrip("-._") + SUFFIX
    return job.model_copy(update={"name": name})


def best_yaml(search: Job, choice: Choice, trials: Mapping[str, TrialState]) -> str:
    """The text of `best.yaml`: what differs from the defaults, with a comment on where it comes from."""
    trial = choice.trial
    found = ", ".join(f"{metric} {number:.6g}" for metric, number in choice.values.items())
    about = [
        f"The best trial of the search {search.name}: {trial.trial}, {found} at step {trial.step}, {choice.how}.",
        f"Run it with `rayft run {BEST}`.",
    ]
    line = lineage(trials, trial.trial)
    if len(line) > 1:
        about.append(
            "A run of this file does not repeat that trial: it went through other runs and values, and the last ones stand here."
        )
        about += [f"  {text}" for text in schedule(line)]
    text = yaml.safe_dump(given(best_job(search, trial)), sort_keys=False, allow_unicode=True)
    return "".join(f"# {sentence}\n" for sentence in about) + text


def schedule(line: list[tuple[Segment, int]]) -> list[str]:
    """A line of segments in words: `steps 1 to 8 (search-t0001): train.learning_rate 0.0003`, in which only values stand that
    change on the way."""
    keys = dict.fromkeys(key for segment, _ in line for key in segment.values)
    moved = [k for k in keys if len({label(segment.values.get(k)) for segment, _ in line}) > 1]
    sentences = []
    for segment, last in line:
        values = ", ".join(f"{key} {label(segment.values[key])}" for key in moved if key in segment.values)
        sentences.append(
            f"steps {segment.start + 1} to {last} ({segment.run}){': ' if values else ''}{values}"
        )
    return sentences


def write_best(store: Store, search: Job, choice: Choice, trials: Mapping[str, TrialState]) -> str:
    """Write `best.yaml` into the search folder `store`; returns its text."""
    text = best_yaml(search, choice, trials)
    store.put(BEST, text.encode())
    return text


def run_folder(store: Store, run: str) -> Store:
    """The folder of a trial's run in the search folder `store`."""
    return store.child("trials", run)


def export_best(store: Store, choice: Choice) -> str:
    """Put the best trial's model into `model/` of the search folder; returns one sentence on where it came from.

    A run that is done has exported its model, which is copied; of one that was stopped its newest checkpoint is exported.
    Raises StorageError where there is neither.
    """
    run = choice.trial.run
    if run is None:
        raise StorageError(
            f"{choice.trial.trial} has no run, so there is no model.", "Go on with the search."
        )
    source, out = run_folder(store, run), store.child(MODEL)
    if _whole(source.child(MODEL)):
        size = copy_model(source.child(MODEL), out)
        return f"The model of {run} is in {out.uri} ({size / 1e6:.0f} MB)."
    step = latest(source, verify=False)
    if step is None:
        raise StorageError(
            f"{choice.trial.trial} has neither a model nor a checkpoint in {source.uri}.",
            f"Train it again: rayft run {store.where(BEST)}",
        )
    from rayft.train.finish import export_run

    export_run(source.uri, out.uri, step=step)
    return f"Step {step} of {run}, which was not trained to its end, is in {out.uri}."


def copy_model(source: Store, out: Store) -> int:
    """Copy an exported model from one folder to another, whatever lies there; returns its bytes.

    Configs go first and come last, as in an export, so that what is there can be loaded or is refused. A copy that is there
    already is left alone.
    """
    entries = sorted(source.list(), key=lambda entry: (entry.key in CONFIGS, entry.key))
    there = {entry.key: entry.size for entry in out.list()}
    if there == {entry.key: entry.size for entry in entries} and _same_report(source, out):
        return sum(there.values())
    out.delete(CONFIGS)
    with tempfile.TemporaryDirectory(prefix="rayft-model-") as temporary:
        for entry in entries:
            local = source.local_path(entry.key)
            if local is None:
                local = Path(temporary) / "file"
                source.download(entry.key, local)
            out.upload(local, entry.key)
    out.delete(sorted(there.keys() - {entry.key for entry in entries}))
    return sum(entry.size for entry in entries)


def _whole(model: Store) -> bool:
    return any(model.exists(name) for name in CONFIGS)


def _same_report(source: Store, out: Store) -> bool:
    """Whether both are of one export; its report names the folder it was written to."""
    report = "export.json"
    return source.exists(report) and out.exists(report) and source.get(report) == out.get(report)
