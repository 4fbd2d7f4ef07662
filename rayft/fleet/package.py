"""What of a job travels to a cluster: the resolved job file and the files here that it names, nothing else.

Paths of a job are relative to where the command runs, and so they stay: the package keeps their places. What is absolute, on
S3, on a hub or inside an installed package is found on the cluster itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayft.errors import DataError, JobError
from rayft.fleet.functions import files_of_function
from rayft.fleet.runs import on_storage, refuse_another_name
from rayft.report.text import gib
from rayft.spec import Job, dump_job
from rayft.spec.search import jobs_of_lists
from rayft.storage import node_cache_dir

MAX_BYTES = 200 << 20
JOB_FILE = "job.yaml"
ENTRY_FILE = "jobs/run.py"
#: The same as the file of that name in the repository, for jobs that are written elsewhere.
ENTRY = '''"""The entry point of `ray job submit`: python jobs/run.py JOB [group.key=value …] ends with the exit code of the run."""

import sys

from rayft.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
'''
ENTRYPOINT = f"python {ENTRY_FILE} {JOB_FILE}"

SKIPPED_FOLDERS = {"__pycache__", "node_modules", "cache"}
#: Of a run that a job names as its model: what loading it never reads.
SKIPPED_OF_RUNS = {"checkpoints", "rollouts", "stacks", "log", "log.jsonl", "report.html"}


@dataclass(frozen=True)
class Package:
    """A folder with everything of a job, named by its content. notes: what of the job was changed, for people."""

    folder: Path
    digest: str
    files: int
    size: int
    notes: tuple[str, ...] = ()


def package(
    job: Job, *, here: Path | None = None, home: Path | None = None, limit: int = MAX_BYTES
) -> Package:
    """Copy what the job needs of `here` (default: the working directory) to a folder below `home`, or find it there.

    Raises JobError for what cannot travel: too much, outside of `here`, or results kept where they would be lost.
    """
    here = (here or Path.cwd()).absolute()
    refuse_scratch(job)
    job, notes = _with_runs(job, here)
    files = dict(_files_of(job, here))
    size = sum(path.stat().st_size for path in files.values())
    if size > limit:
        largest = max(files, key=lambda name: files[name].stat().st_size)
        raise JobError(
            f"The files that the job names come to {gib(size)}, and at most {gib(limit)} travel with a job "
            f"(the largest is {largest}).",
            "Put large data and models on s3:// or a folder that all nodes share, and name them there.",
        )
    texts = {JOB_FILE: dump_job(job), ENTRY_FILE: ENTRY}
    digest = hashlib.sha256()
    for name in sorted(files.keys() | texts.keys()):
        content = texts[name].encode() if name in texts else files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    key = digest.hexdigest()[:16]
    folder = packages_of(job.name, home) / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        half = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
        for name, path in files.items():
            (half / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, half / name)
        for name, text in texts.items():
            (half / name).parent.mkdir(parents=True, exist_ok=True)
            (half / name).write_text(text, encoding="utf-8")
        try:
            half.rename(folder)
        except OSError:  # somebody was faster with the same content
            shutil.rmtree(half, ignore_errors=True)
    os.utime(folder)
    whole = size + sum(len(text) for text in texts.values())
    return Package(folder, key, len(files) + len(texts), whole, tuple(notes))


def packages_of(run: str, home: Path | None = None) -> Path:
    """Where the packages of a run are kept on this machine."""
    return (home or node_cache_dir() / "packages") / run


def refuse_scratch(job: Job) -> None:
    """Raise JobError where results or the cache would go to the job's own scratch folder on a node."""
    for key, uri in (("storage", job.storage), ("data.cache", job.data.cache)):
        if uri and "://" not in uri and not Path(uri).is_absolute():
            raise JobError(
                f"{key}: {uri!r} is relative, and the folder in which a submitted job runs is deleted after it.",
                f"Give {key}=s3://BUCKET/PREFIX, or the absolute path of a folder that all nodes share.",
            )


def _with_runs(job: Job, here: Path) -> tuple[Job, list[str]]:
    """The job with runs that are not here named by their place on its storage, and what was changed."""

    def stays(path: str) -> bool:
        return (here / path).exists()

    for key, trial in jobs_of_lists(job) if job.tune else ():
        refuse_another_name(key, trial, on_storage(trial, job.storage, stays)[0])
    return on_storage(job, job.storage, stays)


def _files_of(job: Job, here: Path) -> Iterator[tuple[str, Path]]:
    """Name in the package and path here of every file that the job names, or a trial of its search."""
    trials = [trial for _, trial in jobs_of_lists(job)] if job.tune else []
    for key, text in dict.fromkeys(named for one in (job, *trials) for named in _paths_of(one, here)):
        if "://" in text or text.startswith(("package:", "~")) or Path(text).is_absolute():
            continue
        name, path = os.path.normpath(text), here / text
        if not path.exists():
            if _plainly_a_file(text):
                raise DataError(
                    f"{key}: there is no file or folder {text} here to send with the job.",
                    "Correct the path; it is relative to where the command runs.",
                )
            continue  # the id of a hub
        if name.startswith(".."):
            raise JobError(
                f"{key}: {text} lies outside of the folder in which the command runs, so it cannot be sent with the job.",
                "Run the command further up, or name it by s3:// or a path that all nodes share.",
            )
        if path.is_file():
            yield name, path
        else:
            yield from ((os.path.relpath(file, here), file) for file in _files_in(path))


def _paths_of(job: Job, here: Path) -> Iterator[tuple[str, str]]:
    """Key and value of everything in a job that may name a file, those beside a reward function included."""
    named: list[tuple[str, str | None]] = [
        ("model.path", job.model.path),
        ("model.tokenizer", job.model.tokenizer),
        ("model.chat_template", job.model.chat_template),
        *(("data.train", source.path) for source in job.data.train),
        *(("data.eval", source.path) for source in job.data.eval),
        *(("eval.suites", suite.path) for suite in job.eval.suites),
        *(("eval.suites", suite.schema_path) for suite in job.eval.suites),
        *(("rewards", reward.path) for reward in job.rewards if reward.type == "model"),
    ]
    yield from ((key, text) for key, text in named if text)
    for reward in job.rewards:
        if reward.type == "function":
            yield from (("rewards", str(file)) for file in files_of_function(reward.path, here))


def _files_in(folder: Path) -> Iterator[Path]:
    """Files of a folder without what is hidden, environments, caches and runs that happen to lie in it."""
    is_run = _is_run(folder)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (is_run and path.name in SKIPPED_OF_RUNS):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not _left_out(path):
            yield from _files_in(path)


def _left_out(folder: Path) -> bool:
    return folder.name in SKIPPED_FOLDERS or (folder / "pyvenv.cfg").exists() or _is_run(folder)


def _is_run(folder: Path) -> bool:
    return (folder / JOB_FILE).is_file() and (folder / "lineage.json").is_file()


def _plainly_a_file(text: str) -> bool:
    return text.startswith("./") or Path(text).suffix in (
        ".jsonl",
        ".json",
        ".parquet",
        ".csv",
        ".py",
        ".jinja",
        ".gguf",
    )
